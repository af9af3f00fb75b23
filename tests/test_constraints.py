"""`constraints.txt` pins what `pyproject.toml` asks for, and nothing else."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {None: PROJECT["dependencies"], **PROJECT["optional-dependencies"]}


def sections() -> dict[str | None, dict[str, str]]:
    """Reads the pins of each section by canonical name; a section's key is its extra, None for the core."""
    found: dict[str | None, dict[str, str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("# Needed by"):
            extra = re.search(r'the extra "(\w+)"', line)
            found[extra[1] if extra else None] = pins = {}
        elif line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    return found


def closure(requirements: list[str]) -> set[str]:
    """Follows requirements through the installed packages' own metadata.

    Raises:
        metadata.PackageNotFoundError: a package that the requirements need is not installed.
    """
    found: set[tuple[str, str]] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) not in found:
                found.add((name, extra))
                needed = map(Requirement, metadata.requires(name) or [])
                waiting += [r for r in needed if r.marker is None or r.marker.evaluate({"extra": extra})]
    return {name for name, _ in found}


def test_pins_of_declared_dependencies():
    """Every declared dependency is pinned to a version it allows, in its section or an earlier one."""
    pins: dict[str, str] = {}
    assert list(sections()) == list(EXTRAS)
    for extra, declared in EXTRAS.items():
        pins |= sections()[extra]
        for requirement in map(Requirement, declared):
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_single_pin_per_package():
    """No package is pinned in two sections, and the project does not pin itself."""
    names = [name for pins in sections().values() for name in pins]
    assert len(names) == len(set(names))
    assert "kvjax" not in names


@pytest.mark.parametrize("extra", EXTRAS, ids=str)
def test_pins_of_needed_packages(extra):
    """A section holds exactly what its dependencies need, directly or through others, and earlier sections lack."""
    made_with = (ROOT / "constraints.txt").read_text().splitlines()[0]
    here = f"Python {sys.version_info.major}.{sys.version_info.minor} on {sys.platform}"
    if here not in made_with:
        pytest.skip(f"the closure differs between systems; this is {here}")
    try:
        needed = closure([*PROJECT["dependencies"], *(EXTRAS[extra] if extra else ())])
    except metadata.PackageNotFoundError as error:
        pytest.skip(f"{error.name}, which {extra or 'the project'} needs, is not installed")
    earlier = list(EXTRAS)[: list(EXTRAS).index(extra)]
    assert set(sections()[extra]) == needed - {name for key in earlier for name in sections()[key]}
