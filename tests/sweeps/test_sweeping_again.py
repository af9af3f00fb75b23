"""Sweeps of a run that was swept before, in part, with other settings, or that has damaged files."""

import json
import math
import shutil

import pytest
import torch
from kvjax.converters.parameter_store import read_stored_run

from kvjax.artifacts.results import RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.sweep_schema import read_sweep
from kvjax.config.files import find_config, read_config
from kvjax.config.windows import WindowConfig
from kvjax.errors import InputError
from kvjax.execution.inputs import prepare_run
from kvjax.model.sites import stage_names
from kvjax.pipeline.sweep_state import checkpoints_are_measured
from kvjax.sweeps.run import sweep_runs
from kvjax.sweeps.settings import SweepSettings
from kvjax.windows.run import write_windows
from tests.helpers.building import SMALL_MODEL, STEPS, read_lines
from tests.helpers.close import close
from tests.helpers.sweeping import source, sweep
from tests.oracles.pytorch_loops import fixed_margins, mean

STAGES = stage_names(SMALL_MODEL["n_layers"])


def test_second_sweep(small_run):
    """Sweeping again reuses everything and changes nothing."""
    first = sweep(small_run)
    second = sweep(small_run)
    assert (sorted(first.log.measured), first.log.reused) == (list(STEPS), [])
    assert (second.log.measured, sorted(second.log.reused)) == ([], list(STEPS))
    assert first.rows == second.rows


def test_steps_in_any_order(small_run):
    """Steps are measured in any order, and earlier ones stay in the table."""
    whole = sweep(small_run, overwrite=True).rows
    for file in (small_run / "analysis" / "measured").iterdir():
        file.unlink()
    only_last = sweep(small_run, steps="300")
    assert [row["step"] for row in only_last.rows] == [300]
    assert only_last.rows[0]["delta_answer_accuracy"] is None, "no predecessor was measured"
    assert only_last.rows[0]["stabilized"] == {"residual": None, "heads": None}, "what lasts is not known from a part"
    assert None not in whole[0]["stabilized"].values()
    assert sweep(small_run, steps="100-200").rows == whole


@pytest.mark.parametrize("batch", ["1", "2", "5"])
def test_checkpoint_batch(small_run, batch, rows):
    """Rows do not depend on the checkpoint batch."""
    ours = {row["step"]: row for row in sweep(small_run, checkpoint_batch=batch).rows}

    def compare(a, b):
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            for key in a:
                compare(a[key], b[key])
        elif isinstance(a, list):
            for x, y in zip(a, b, strict=True):
                compare(x, y)
        elif isinstance(a, float):
            assert math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6)
        else:
            assert a == b

    compare(ours, rows)


def test_damaged_result(small_run):
    """Results with damaged sums or logits are measured again; a checkpoint of another step is refused."""
    sweep(small_run)
    (small_run / "analysis" / "measured" / "values_step_000300.npz").write_bytes(b"damaged")
    (small_run / "analysis" / "measured" / "step_000100.npz").write_bytes(b"damaged")
    files = small_run / "checkpoints"
    (files / "step_000200.pt").write_bytes((files / "best.pt").read_bytes())
    with pytest.raises(InputError, match=r"step_000200.pt: expected the checkpoint of step 200; found step 300"):
        sweep(small_run)
    (files / "step_000200.pt").unlink()
    assert sweep(small_run).log.measured == []  # the damaged ones were measured before the other was refused


def test_unwritable_store(small_run, capsys):
    """A store that cannot be written is a note."""
    (small_run / "analysis").mkdir()
    (small_run / "analysis" / "converted").write_text("in the way")
    report = sweep(small_run, ablations=("zero",), probe="none")
    assert [row["step"] for row in report.rows] == list(STEPS)
    (note,) = report.notes
    assert note.startswith("converted parameters are not kept: ") and "converted" in note
    path = small_run / "checkpoints" / "step_000200.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"step_000200.pt: expected a whole PyTorch checkpoint"):
        sweep(small_run, ablations=("zero",), probe="none", overwrite=True)


def test_other_settings(small_run):
    """Other settings replace earlier results only if asked."""
    small = {"ablations": ("zero",), "probe": "none"}
    rows = sweep(small_run, **small).rows
    complaint = "json: expected `precision=highest`, as it was measured, or `overwrite`; found `precision=default`"
    with pytest.raises(InputError, match=complaint):
        sweep(small_run, precision="default", **small)
    assert read_lines(small_run / "analysis" / "checkpoint_metrics.jsonl") == rows
    assert sorted(sweep(small_run, precision="default", overwrite=True, **small).log.measured) == list(STEPS)


def test_other_ranking(swept, rows, tmp_path):
    """Another ranking kind draws the tables again and measures nothing; birth windows and status follow the sweep."""
    run = shutil.copytree(swept, tmp_path / "run")
    again = sweep(run, rank_by="zero")
    assert again.log.measured == [] and read_sweep(run / "analysis" / "sweep.json").ranked_by == "zero"
    follow = {"top_heads", "top_mlps", "ranked_by", "stabilized", "head_rank_correlation_prev", "head_turnover"}
    for row in again.rows:
        before = rows[row["step"]]
        changed = {name for name in row if row[name] != before[name]}
        assert {"top_heads", "ranked_by"} <= changed <= follow | {"mlp_rank_correlation_prev", "mlp_turnover"}
        places = [(head["layer"], head["head"], head["accuracy_drop"]) for head in row["top_heads"]]
        assert places == [(head["layer"], head["head"], head["value"]) for head in row["top_heads_by_ablation"]]
    config = read_config(find_config("default", "windows"), WindowConfig)
    assert write_windows(RunResults(RunDir.open(run)), config).document["ranked_by"] == "zero"
    (run / "analysis" / "checkpoint_metrics.jsonl").unlink()
    remedy = checkpoints_are_measured(RunDir.open(run)).command
    assert "--rank_by=zero" in remedy and "--ablations" not in remedy
    assert {row["step"]: row for row in sweep(run).rows} == rows


def test_reference_of_an_incomplete_run(small_run, truth):
    """A run that stopped early is measured against its last checkpoint, and marked; one still followed against none."""
    (small_run / "checkpoints" / "step_000300.pt").unlink()
    report = sweep(small_run)
    for row in report.rows:
        expected = fixed_margins(truth[row["step"]]["reads"], truth[200]["reads"])
        close(row["fixed_margin"], mean(expected))
        assert row["provisional"] and None not in row["stabilized"].values()
    assert report.rows[0]["residual_drift_to_reference_by_layer"]["final_norm"] > 1e-4
    assert abs(report.rows[1]["residual_drift_to_reference_by_layer"]["final_norm"]) < 1e-9
    assert any("provisional" in note and "200 of 300 steps" in note for note in report.notes)
    followed = sweep(small_run, still_training=True)
    assert {v for row in followed.rows for v in row["residual_drift_to_reference_by_layer"].values()} == {None}
    assert [row["fixed_margin"] for row in followed.rows] == [None, None]
    assert any("still followed" in note for note in followed.notes)
    named = sweep(small_run, reference="200")
    assert named.log.measured == [], "competitors are found in stored logits"
    assert [row["fixed_margin"] for row in named.rows] == [row["fixed_margin"] for row in report.rows]


def test_best_checkpoint_as_reference(small_run):
    """The best checkpoint can be the reference."""
    best, final = sweep(small_run, reference="best"), sweep(small_run, reference="final")
    for a, b in zip(best.rows, final.rows, strict=True):  # the small run's best checkpoint is its last
        for stage in STAGES:
            close(
                a["residual_drift_to_reference_by_layer"][stage],
                b["residual_drift_to_reference_by_layer"][stage],
            )


def test_skip_bad(small_run, rows):
    """Bad checkpoints are skipped and listed if asked."""
    path = small_run / "checkpoints" / "step_000200.pt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"step_000200.pt: expected a whole PyTorch checkpoint"):
        sweep(small_run)
    report = sweep(small_run, skip_bad=True)
    assert list(report.log.refused) == ["step_000200.pt"]
    assert [row["step"] for row in report.rows] == [100, 300]
    for row in report.rows:
        assert row["answer_accuracy"] == rows[row["step"]]["answer_accuracy"]
        assert row["top_heads_by_ablation"] == rows[row["step"]]["top_heads_by_ablation"]
    assert json.loads((small_run / "analysis" / "sweep.json").read_text())["refused"].keys() == {"step_000200.pt"}


def test_other_model_section(small_run):
    """A changed model section does not reuse earlier results."""
    for path in (small_run / "checkpoints").glob("*.pt"):
        document = torch.load(path, weights_only=True)
        del document["config"]["train_spec"]
        torch.save(document, path)
    sweep(small_run)
    path = small_run / "run_config.json"
    document = json.loads(path.read_text())
    document["model"]["n_heads"] = 2
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"`model=.*n_heads:4.*; found `model=.*n_heads:2"):
        sweep(small_run)


def test_note_of_other_held_out_pairs(small_run, small_benchmark):
    """A checkpoint that records other held-out pairs than the benchmark's is measured, with a note."""
    path = small_run / "checkpoints" / "step_000100.pt"
    document = torch.load(path, weights_only=True)
    document["config"]["benchmark_metadata"]["holdout_pairs"].pop()
    torch.save(document, path)
    work = prepare_run(
        RunDir.open(small_run), benchmark_dir=str(small_benchmark), probe_set=None, steps="100-300", reference="final"
    )
    (report,) = sweep_runs([work], source, settings=SweepSettings(), advance=lambda n: None)
    assert any("held-out pairs differ" in note for note in report.notes)
    assert [row["step"] for row in report.rows] == list(STEPS)


def test_unwritable_results(small_run, monkeypatch):
    """Results that cannot be written are tried once, and conversions stay."""
    tried = []

    def full_disk(store, name, *measured):
        tried.append(name)
        raise InputError(f"{name}.npz: expected a file that can be written; found a full disk")

    monkeypatch.setattr("kvjax.artifacts.checkpoint_sums.ResultStore.save", full_disk)
    with pytest.raises(InputError, match="full disk"):
        sweep(small_run, checkpoint_batch="1")
    assert len(tried) == 1, "the first chunk is stored before the next is dispatched"
    assert len(list(read_stored_run(small_run / "analysis" / "converted"))) >= 1
