"""The architecture: imports go one way, and torch stays in the converters."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each folder uses only those before it.
ORDER = (
    *("errors", "right_sums", "machine", "devices", "declarations", "config", "artifacts", "model", "measure"),
    *("task", "execution"),
    *("sweeps", "windows", "intervene", "story", "train", "compare", "report", "converters"),
    *("opened_run", "units", "pipeline", "api", "commands"),
)


def imports(path: Path) -> set[str]:
    """Returns every module a file imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """Returns the dotted name a file is imported under: the top-level `converters/` installs as `kvjax.converters`."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name if name.startswith("kvjax") else f"kvjax.{name}"


def layer_of(name: str) -> str:
    """Returns the layer of a module: its folder, but for declarations of measures.

    These import the standard library alone, so that configs and row schemas can be made from them.
    """
    if name.startswith(("kvjax.measure.registry", "kvjax.measure.declaration")):
        return "declarations"
    return name.split(".")[1]


@pytest.mark.parametrize(
    "path", [*modules("kvjax"), *modules("converters")], ids=lambda path: str(path.relative_to(ROOT))
)
def test_direction_of_imports(path):
    """A module imports only from its own layer and from earlier ones."""
    parts = module_name(path).split(".")
    if parts == ["kvjax", "__init__"]:
        (named,) = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert named.module == "kvjax.right_sums", "importing kvjax must stay instant"
        return
    own = ORDER.index(layer_of(".".join(parts)))
    for name in imports(path):
        if name.startswith("kvjax.") and layer_of(name) in ORDER:
            assert ORDER.index(layer_of(name)) <= own, f"{path} imports {name} of a later layer"


def test_order_names_every_folder():
    """Each folder and module has its place in the order."""
    folders = {path.name for path in (ROOT / "kvjax").iterdir() if path.is_dir() and path.name != "__pycache__"}
    files = {path.stem for path in (ROOT / "kvjax").glob("*.py")} - {"__init__"}
    assert folders | files | {"converters", "declarations"} == set(ORDER)


@pytest.mark.parametrize("path", modules("kvjax"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_of_torch(path):
    """Only converters import torch."""
    assert not [name for name in imports(path) if name.split(".")[0] == "torch"]


@pytest.mark.parametrize("path", [*modules("kvjax"), *modules("converters")], ids=lambda path: path.stem)
def test_imports_of_underscore_names(path):
    """No module imports underscore names of another."""
    ours = [name for name in imports(path) if name.split(".")[0] == "kvjax"]
    assert not [name for name in ours if any(p.startswith("_") and not p.endswith("__") for p in name.split("."))]


ASKS_JAX_FOR_DEVICES = {
    *("devices", "local_devices", "device_count", "local_device_count", "default_backend"),
    *("process_index", "process_count"),
}


@pytest.mark.parametrize("path", [*modules("kvjax"), *modules("converters")], ids=lambda path: path.stem)
def test_devices_in_one_module(path):
    """Only kvjax/devices.py asks JAX for its devices and backend."""
    asked = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "jax"
    }
    assert bool(asked & ASKS_JAX_FOR_DEVICES) == (module_name(path) == "kvjax.devices")


@pytest.mark.parametrize(
    "path", [*modules("kvjax/windows"), *modules("kvjax/intervene")], ids=lambda path: str(path.relative_to(ROOT))
)
def test_imports_of_windows_and_interventions(path):
    """Birth windows and interventions share the layers below the sweep, and import nothing of it or of each other."""
    others = {"sweeps", "windows", "intervene"} - {layer_of(module_name(path))}
    assert not [name for name in imports(path) if name.startswith("kvjax.") and layer_of(name) in others]


def test_imports_of_flax():
    """Only the decoder and its attention import Flax."""
    users = {path.name for path in modules("kvjax") if any(n.split(".")[0] == "flax" for n in imports(path))}
    assert users == {"attention.py", "decoder.py"}


def test_shipped_packages():
    """pyproject.toml ships every package."""
    import tomllib

    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    present = {module_name(path).rpartition(".")[0] for folder in ("kvjax", "converters") for path in modules(folder)}
    assert set(shipped) == present | {"kvjax.configs"}


def test_imports_of_test_modules():
    """No test module imports another: what they share stands in tests/helpers, tests/oracles or a conftest.py."""
    for path in modules("tests"):
        found = [name for name in imports(path) if name.split(".")[0] == "tests" and ".test_" in name]
        assert not found, f"{path} imports {found}"


def test_names_of_tests():
    """A test has a name of at most 60 characters and a docstring whose first line states the fact it tests."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert len(node.name) <= 60, f"{path}: {node.name}"
                assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


@pytest.mark.parametrize("arguments", [["--help"], ["checkpoint-sweep", "--help"], ["checkpoint-sweep", "--steps_=1"]])
def test_imports_of_help(arguments):
    """Help and flag errors import nothing heavy."""
    code = (
        "import sys; from kvjax.commands.main import main; main(sys.argv[1:]);"
        "heavy = {'jax', 'torch', 'numpy', 'scipy', 'xarray', 'pydantic', 'orbax'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
