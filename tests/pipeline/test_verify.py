"""What `kvjax verify` vouches for: nothing of a sound run differs, and edits are found whatever their hashes."""

import dataclasses
import json
import shutil
import types

import netCDF4
import numpy as np
import pytest
import torch

from kvjax.artifacts.files import FileHash
from kvjax.artifacts.identity import sealed
from kvjax.artifacts.layout import RunLayout, arrays_beside
from kvjax.artifacts.results import RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.commands.main import main
from kvjax.intervene.settings import InterventionSettings
from kvjax.pipeline import checks as checks_of
from kvjax.pipeline import verify as stage
from kvjax.pipeline.evaluate import evaluate
from kvjax.pipeline.interventions import intervene
from kvjax.pipeline.settings import EvaluateSettings, PairSource, RunsOnBenchmark, VerifySettings
from kvjax.pipeline.verify import verify
from kvjax.pipeline.verify_training import check_config
from kvjax.pipeline.windows import WindowSettings, find_birth_windows
from tests.helpers.building import STEPS
from tests.helpers.commands import refused
from tests.helpers.sweeping import SMALL_SWEEP, sweep

LITTLE = {"ablations": SMALL_SWEEP.ablations, "probe": SMALL_SWEEP.probe}
PATCHED = "activation_patching"


@pytest.fixture(scope="module")
def measured(tmp_path_factory, untied_run):
    """A run with a sweep, windows, an intervention and an evaluation; tests copy it."""
    run = shutil.copytree(untied_run, tmp_path_factory.mktemp("measured") / "run")
    sweep(run, **LITTLE)
    find_birth_windows(RunsOnBenchmark(run_dirs=(str(run),)), WindowSettings())
    settings = InterventionSettings(steps="200", kinds=(PATCHED,), pairs_per_kind=2, force=True)
    intervene(RunsOnBenchmark(run_dirs=(str(run),)), PairSource(), settings)
    evaluate(RunsOnBenchmark(run_dirs=(str(run),)), EvaluateSettings(checkpoint="200", splits=("test_iid",)))
    return run


@pytest.fixture
def run(measured, tmp_path):
    return shutil.copytree(measured, tmp_path / "run")


@pytest.fixture
def layout(run):
    return RunLayout(run)


def checked(run, **settings):
    """Returns every check of a run by its subject."""
    (found,) = verify(RunsOnBenchmark(run_dirs=(str(run),)), VerifySettings(**settings))
    return {check.subject: check for check in found.checks}


def those(checks, verdict):
    return {subject for subject, check in checks.items() if check.verdict == verdict}


def rewrite_hashes(layout):
    """Does what somebody does who edits a table and hides it: writes its hash and that of the sweep's content anew."""
    document = json.loads(layout.sweep.read_text())
    for name in document["tables"]:
        document["tables"][name] = dataclasses.asdict(FileHash.of(layout.analysis / name))
    del document["content_sha256"]
    layout.sweep.write_text(json.dumps(sealed(document)))
    for file in (layout.birth_windows, layout.story, layout.story_text):  # they name the sweep by its tables
        file.unlink()
    RunResults(RunDir.open(layout.path)).check_tables()


def test_sound_run(run, capsys):
    """Everything holds, and verifying writes nothing."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["verify", f"--run_dirs={run}", "--noprogress", f"--sample={len(STEPS)}"]) == 0
    printed = capsys.readouterr().out
    for step in STEPS:
        assert f"holds    step {step}, measured again" in printed
        assert f"holds    step {step}, converted again: logits agree with PyTorch's, and the stored" in printed
        assert f"holds    metrics.jsonl, step {step}: its accuracies on validation_iid counted again" in printed
    for subject in (
        *("run_config.json", "benchmark", "probe set", "tables", "story.json", "evaluation/200.json"),
        *(f"{PATCHED}/steps_200.json, measured again", "evaluation/200.json, evaluated again"),
    ):
        assert f"holds    {subject}: " in printed
    assert printed.endswith(" hold, 0 differ, 0 could not be vouched for\n")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_edited_table(run, layout, capsys):
    """A table whose hash is not the recorded one is named, with status 1, and nothing is measured on top of it."""
    text = layout.rows.read_text()
    layout.rows.write_text(text.replace('"answer_accuracy": 0.', '"answer_accuracy": 1.', 1))
    assert main(["verify", f"--run_dirs={run}", "--noprogress"]) == 1
    printed = capsys.readouterr().out
    assert "differs  tables: " in printed and "checkpoint_metrics.jsonl: expected the" in printed
    assert "open     numbers: nothing was measured again" in printed


@pytest.mark.parametrize("how", ["other weights", "gone"])
def test_edited_checkpoint(run, how):
    """A checkpoint that was trained on differs; one that is gone could not be vouched for."""
    path = run / "checkpoints" / "step_000200.pt"
    if how == "gone":
        path.unlink()
    else:
        document = torch.load(path, weights_only=True)
        document["model_state"]["blocks.0.attn.v_proj.weight"][0, 0] += 1e-6
        torch.save(document, path)
    checks = checked(run, sample=len(STEPS))
    assert those(checks, "differs") == ({"checkpoints"} if how == "other weights" else set())
    assert "steps 200 " in checks["checkpoints"].reason
    assert those(checks, "open") >= {"tables, drawn again", f"{PATCHED}/steps_200.json, measured again"}
    assert those(checks, "holds") >= {"step 100, measured again", "step 300, measured again"}


@pytest.mark.parametrize("table", ["rows", "heads", "arrays"])
def test_edited_number_with_its_hash_rewritten(run, layout, table):
    """No hash tells of it; the tables drawn again from the measured sums do, with the name of the number."""
    if table == "arrays":
        edit_arrays(layout.arrays, "answer_accuracy")
    else:
        path = getattr(layout, table)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        name = "answer_accuracy" if table == "rows" else "accuracy_drop"
        rows[1][name] += 1e-6
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewrite_hashes(layout)
    checks = checked(run, sample=1)
    assert those(checks, "differs") == {"tables, drawn again"}
    reason = checks["tables, drawn again"].reason
    assert ("accuracy_drop" if table == "heads" else "answer_accuracy") in reason
    assert "step 200" in reason or table != "rows"


def test_edited_sums(run, layout, monkeypatch):
    """Sums that were edited before the tables were drawn are found once their checkpoint is in the sample."""
    path = layout.measured / "step_000200.npz"
    with np.load(path) as stored:
        arrays = dict(stored)
    name = next(name for name in arrays if name.startswith("read/") and arrays[name].dtype.kind == "f")
    arrays[name].flat[0] += 0.01 * np.abs(arrays[name]).max()
    np.savez(path, **arrays)
    sweep(run, **LITTLE)
    assert those(checked(run, sample=0), "differs") == {"birth_windows.json", "story.json"}  # of the earlier rows
    checks = checked(run, sample=len(STEPS))
    measured_again = {subject for subject in those(checks, "differs") if "measured again" in subject}
    assert measured_again == {"step 200, measured again"}
    assert f"step_000200.npz {name}" in checks["step 200, measured again"].reason
    assert checks["tables, drawn again"].verdict == "holds"
    here = checks_of.device_description()
    for other in ({"backend": "gpu", "kind": "another"}, {"count": here["count"] + 1}):
        monkeypatch.setattr(checks_of, "device_description", lambda other=other: here | other)
        elsewhere = checked(run, sample=len(STEPS))["step 200, measured again"]
        assert elsewhere.verdict == "open" and "measured on cpu" in elsewhere.reason


@pytest.mark.parametrize("edited", ["summary", "arrays"])
def test_edited_intervention(run, layout, edited):
    """A number of an intervention that was edited with its hashes is found by measuring it again."""
    path = layout.intervention(PATCHED, "steps_200")
    document = json.loads(path.read_text())
    if edited == "arrays":
        edit_arrays(arrays_beside(path), "recovery_by_role")
        document["arrays"] = dataclasses.asdict(FileHash.of(arrays_beside(path)))
    else:
        first_number(document["effects"], add=0.01)
    del document["content_sha256"]
    path.write_text(json.dumps(sealed(document)))
    checks = checked(run, sample=1)
    assert those(checks, "differs") == {f"{PATCHED}/steps_200.json, measured again"}


@pytest.mark.parametrize("name", ["batch_size", "model.d_ff", "evaluation.tracked_splits"])
def test_edited_config(run, layout, name):
    """A field of the config that the checkpoint files record otherwise is named."""
    opened, document = RunDir.open(run), json.loads(layout.config.read_text())
    section, _, field = name.rpartition(".")
    (document[section] if section else document)[field] = 41
    layout.config.write_text(json.dumps(document))
    check = check_config(opened, STEPS)
    assert check.verdict == "differs" and check.reason.startswith(f"{name} is 41, and step_000300.pt")


def test_edited_place(run, layout):
    """A run that was moved, or prolonged after its last checkpoint, has the config it was trained with."""
    document = json.loads(layout.config.read_text())
    layout.config.write_text(json.dumps(document | {"output_dir": "moved", "num_steps": 900}))
    assert check_config(RunDir.open(run), STEPS).reason.startswith("num_steps is 900")
    with layout.metrics.open("a") as log:
        log.write(json.dumps({"phase": "resume", "step": 300, "num_steps": 900}) + "\n")
    assert check_config(RunDir.open(run), STEPS).verdict == "holds"
    assert check_config(RunDir.open(run), ()).verdict == "open"


def test_edited_log(run, layout):
    """An accuracy of the log that the checkpoint does not give is found once the checkpoint is in the sample."""
    rows = [json.loads(line) for line in layout.metrics.read_text().splitlines()]
    (row,) = [row for row in rows if row["step"] == 200]
    row["answer_accuracy"] += 0.1
    layout.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    checks = checked(run, sample=len(STEPS))
    assert those(checks, "differs") == {"metrics.jsonl, step 200"}
    assert "expected the answer_accuracy the run recorded" in checks["metrics.jsonl, step 200"].reason
    assert those(checks, "open") == {"metrics.jsonl, step 300"}


@pytest.mark.parametrize("hidden", [False, True])
def test_edited_evaluation(run, layout, hidden):
    """An edited evaluation is found by its hash, and with its hash rewritten by evaluating again."""
    path = layout.evaluation("200")
    document = json.loads(path.read_text())
    document["splits"]["test_iid"]["answer_accuracy"] += 0.01
    if hidden:
        del document["content_sha256"]
        document = sealed(document)
    path.write_text(json.dumps(document))
    checks = checked(run, sample=1)
    assert those(checks, "differs") == {"evaluation/200.json, evaluated again" if hidden else "evaluation/200.json"}
    if hidden:
        assert "test_iid answer_accuracy differs" in checks["evaluation/200.json, evaluated again"].reason


def test_evaluation_of_another_version(run, layout):
    """An evaluation without a hash is open, and evaluated again all the same; one of another checkpoint is not."""
    path = layout.evaluation("200")
    document = json.loads(path.read_text())
    del document["content_sha256"]
    path.write_text(json.dumps(document))
    checks = checked(run, sample=1)
    assert those(checks, "open") == {"evaluation/200.json"}
    assert checks["evaluation/200.json, evaluated again"].verdict == "holds"
    path.write_text(json.dumps(document | {"checkpoint_sha256": "0" * 64}))
    checks = checked(run, sample=1)
    assert "is another file by now" in checks["evaluation/200.json"].reason
    assert "evaluation/200.json, evaluated again" not in checks


def test_inputs_that_are_gone(run, small_benchmark, tmp_path):
    """Without the benchmark hashes are compared, and the rest is said to be open."""
    shutil.copytree(small_benchmark, tmp_path / "moved")
    runs = RunsOnBenchmark(run_dirs=(str(run),), benchmark_dir=str(tmp_path / "absent"))
    (found,) = verify(runs, VerifySettings())
    checks = {check.subject: check for check in found.checks}
    assert those(checks, "open") == {"benchmark", "numbers"} and not found.differs
    (tmp_path / "moved" / "structural_ood.jsonl").write_text("")
    runs = RunsOnBenchmark(run_dirs=(str(run),), benchmark_dir=str(tmp_path / "moved"))
    (found,) = verify(runs, VerifySettings())
    assert (
        "split structural_ood is another file" in {check.subject: check for check in found.checks}["benchmark"].reason
    )


def test_other_version(run, monkeypatch):
    """Numbers of another version of the measures are not compared."""
    monkeypatch.setattr(stage, "RESULT_VERSION", stage.RESULT_VERSION + 1)
    checks = checked(run)
    assert not those(checks, "differs") and "by version" in checks["numbers"].reason


def test_run_without_a_sweep(small_run, capsys):
    """There is nothing to verify, in one line with status 2."""
    assert "a sweep to verify (run kvjax checkpoint-sweep first)" in refused(
        capsys, "verify", f"--run_dirs={small_run}", "--noprogress"
    )


def test_choice_of_a_sample():
    """A seed chooses the same members each time, other seeds others, and a large sample all."""
    members = list(range(100))

    def chosen(seed, size):
        return stage._sample(stage.random.Random(f"{seed}/run"), members, size)

    assert chosen(0, 5) == chosen(0, 5) != chosen(1, 5) and chosen(0, 1000) == members
    assert len({tuple(chosen(seed, 5)) for seed in range(50)}) > 45
    everything = types.SimpleNamespace(found=set())
    for seed in range(200):
        everything.found |= set(chosen(seed, 5))
    assert everything.found == set(members)


def edit_arrays(path, name):
    """Changes one number of a netCDF file in place."""
    with netCDF4.Dataset(path, "a") as file:
        values = np.ma.getdata(file[name][:])
        values.flat[np.flatnonzero(np.isfinite(values))[0]] += 0.01
        file[name][:] = values


def first_number(document, add):
    """Changes the first number in a document that is no whole one."""
    entries = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(entries):
        if isinstance(value, float):
            document[key] += add
            return True
        if isinstance(value, dict | list) and first_number(value, add):
            return True
    return False
