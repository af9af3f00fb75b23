"""What `kvjax verify` vouches for in comparisons of runs, and when they are made again."""

import dataclasses
import json
import shutil

import pytest

from kvjax.artifacts.files import FileHash
from kvjax.artifacts.identity import sealed
from kvjax.artifacts.layout import ComparisonLayout, RunLayout
from kvjax.artifacts.run_dir import RunDir
from kvjax.commands.main import main
from kvjax.pipeline.compare_seeds import comparison_is_current
from kvjax.pipeline.verify_comparisons import verify_comparison
from tests.helpers.commands import refused


@pytest.fixture(scope="module")
def made(tmp_path_factory, untied_run):
    """Two swept runs with windows, and their comparison; tests copy them to the same place."""
    folder = tmp_path_factory.mktemp("compared") / "work"
    for name in ("one", "other"):
        shutil.copytree(untied_run, folder / name)
    runs = f"--run_dirs={folder}/one,{folder}/other"
    assert main(["checkpoint-sweep", runs, "--ablations=zero", "--probe=none", "--noprogress"]) == 0
    assert main(["birth-windows", runs, "--noprogress"]) == 0
    assert main(["compare-seeds", runs, f"--output_dir={folder}/comparison", "--null_draws=20"]) == 0
    return folder


@pytest.fixture
def layout(made, tmp_path):
    """The comparison, in a folder that is as it was made when the test ends: its document names its runs by path."""
    kept = shutil.copytree(made, tmp_path / "kept")
    yield ComparisonLayout(made / "comparison")
    shutil.rmtree(made)
    shutil.copytree(kept, made)


def verdicts(layout, again=True):
    return {check.subject: check.verdict for check in verify_comparison(layout.path, again=again).checks}


def current(layout):
    return comparison_is_current([RunDir.open(layout.path.parent / name) for name in ("one", "other")], layout.path)


SUBJECTS = ("comparison.json", "files", "runs", "comparison.json, compared again")


def test_sound_comparison(layout, capsys):
    """Everything holds, compared again to the last digit."""
    assert verdicts(layout) == dict.fromkeys(SUBJECTS, "holds") and current(layout).holds
    arguments = [f"--run_dirs={layout.path.parent}/one", "--sample=0", f"--comparison_dirs={layout.path}"]
    assert main(["verify", *arguments, "--noprogress"]) == 0
    printed = capsys.readouterr().out
    assert f"comparison in {layout.path}" in printed and "holds    files: arrays, page and " in printed


@pytest.mark.parametrize("name", ["comparison.nc", "comparison.md", "figures/births.svg"])
def test_edited_file(layout, name, capsys):
    """A file that is not the one that was written differs, with status 1, and a pipeline would make it again."""
    path = layout.path / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert verdicts(layout)["files"] == "differs"
    assert not current(layout).holds and path.name in current(layout).reason
    arguments = [f"--run_dirs={layout.path.parent}/one", "--sample=0", f"--comparison_dirs={layout.path}"]
    assert main(["verify", *arguments, "--noprogress"]) == 1
    assert path.name in capsys.readouterr().out


def test_edited_number_with_its_hash_rewritten(layout):
    """No hash tells of it; the comparison made again does."""
    document = json.loads(layout.comparison.read_text())
    document["accuracy"]["all"]["best"]["median"] += 0.01
    rewrite(layout, document)
    assert verdicts(layout) == dict.fromkeys(SUBJECTS, "holds") | {"comparison.json, compared again": "differs"}
    assert verdicts(layout, again=False)["comparison.json, compared again"] == "open"


def test_run_that_was_measured_again(layout):
    """Other rows, or other windows of the same rows, are other runs than were compared; without them it is open."""
    other = layout.path.parent / "other"
    windows = layout.path.parent / "windows.json"
    default = json.loads(RunLayout(other).birth_windows.read_text())["config"]
    windows.write_text(json.dumps(default | {"resamples": 50}))
    assert main(["birth-windows", f"--run_dirs={other}", f"--config={windows}", "--noprogress"]) == 0
    assert verdicts(layout)["runs"] == "differs" and not current(layout).holds
    shutil.rmtree(other / "analysis")
    assert verdicts(layout)["runs"] == "open"


def test_comparison_of_another_version(layout):
    """Without hashes of page and figures, these are open, and the pipeline compares again."""
    document = json.loads(layout.comparison.read_text())
    del document["files"]
    for run in document["runs"]:
        del run["story_sha256"]
    rewrite(layout, document)
    found = verdicts(layout)
    assert found == dict.fromkeys(SUBJECTS, "holds") | {"files": "open"}
    assert not current(layout).holds


def test_file_outside_of_its_folder(layout):
    """A document that names files elsewhere is not followed there."""
    document = json.loads(layout.comparison.read_text())
    outside = layout.path.parent / "elsewhere"
    outside.write_text("mine")
    document["files"]["../elsewhere"] = dataclasses.asdict(FileHash.of(outside))
    rewrite(layout, document)
    assert verdicts(layout)["files"] == "differs"


def test_no_comparison_there(made, capsys):
    """A folder without one is refused before anything is verified."""
    line = refused(capsys, "verify", f"--run_dirs={made}/one", f"--comparison_dirs={made}/one", "--noprogress")
    assert "--comparison_dirs: expected folders with a comparison.json (run kvjax compare-seeds)" in line


def rewrite(layout, document):
    """Writes an edited document with its own hash made new."""
    document.pop("content_sha256", None)
    layout.comparison.write_text(json.dumps(sealed(document)))
