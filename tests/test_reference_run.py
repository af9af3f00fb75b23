"""The sweep of the reference trainer's own run, against what the reference implementation measured on it.

Every rate must agree within two events of its own count, every continuous value within 1e-4 relative + 1e-5.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter

import pytest
import xarray as xr

from kvjax.artifacts.birth_windows_schema import read_birth_windows
from tests.helpers.commands import optimised_environment
from tests.helpers.reference import golden, unpack_reference_run

ROLE_COUNTS_PER_EVENT = {
    "write": ("op_write", "key_write", "value_write"),
    "read": ("op_read", "key_read", "value_answer"),
}
EVENT_AXES = ("writes_since_support", "tokens_since_support", "slot_after_write")
OWN_AXES = ("earlier_answers", "tokens_since_copy")  # which the reference does not have
STEPS = (250, 1000, 1500, 1750, 2000, 3000, 4000, 6000)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The reference run swept by the command a researcher would type, in a fresh copy."""
    root = unpack_reference_run(tmp_path_factory.mktemp("reference"))
    command = [
        *(sys.executable, "-m", "kvjax.commands.main", "checkpoint-sweep"),
        *("--run_dirs=reference_run/run", "--benchmark_dir=reference_run/benchmark"),
        *("--probe_set=reference_run/probe_set.jsonl", "--noprogress"),
    ]
    done = subprocess.run(command, cwd=root.parent, capture_output=True, text=True, env=optimised_environment())
    assert done.returncode == 0, done.stderr
    analysis = root / "run" / "analysis"

    def lines(name):
        return [json.loads(line) for line in (analysis / name).read_text().splitlines()]

    return {
        "root": root,
        "stdout": done.stdout,
        "records": [json.loads(line) for line in (root / "probe_set.jsonl").read_text().splitlines()],
        "rows": {row["step"]: row for row in lines("checkpoint_metrics.jsonl")},
        "heads": {(h["step"], h["layer"], h["head"]): h for h in lines("component_candidates/heads.jsonl")},
        "mlps": {(m["step"], m["layer"]): m for m in lines("component_candidates/mlps.jsonl")},
        "dataset": xr.open_dataset(analysis / "checkpoint_metrics.nc", engine="netcdf4").load(),
        "events": xr.open_dataset(analysis / "checkpoint_metrics.nc", group="events", engine="netcdf4").load(),
        "sweep": json.loads((analysis / "sweep.json").read_text()),
    }


@pytest.fixture(scope="module")
def expected():
    return golden()


def assert_rate(ours, theirs, count, what):
    assert abs(ours - theirs) * count <= 2 + 1e-6 * count, f"{what}: {ours} against {theirs} of {count} events"


def assert_close(ours, theirs, what):
    assert math.isclose(ours, theirs, rel_tol=1e-4, abs_tol=1e-5), f"{what}: {ours} against {theirs}"


def role_counts(records):
    counts = Counter(eos=len(records))
    for record in records:
        for step in record["steps"]:
            counts.update(ROLE_COUNTS_PER_EVENT[step["op"]])
    return counts


def slice_counts(records):
    counts = {}
    for record in records:
        for event in record["query_events"]:
            axes = record["axes"] | {k: event[k] for k in EVENT_AXES}
            for axis, value in axes.items():
                counts.setdefault(axis, Counter())[str(value)] += 1
    return counts


def test_steps_of_the_rows(swept):
    """Each checkpoint has one row, in step order."""
    assert tuple(swept["rows"]) == STEPS
    assert "analysis" in swept["stdout"] and "Next:" in swept["stdout"]


@pytest.mark.parametrize("step", STEPS)
def test_behaviour(swept, expected, step):
    """Behaviour on the whole probe set equals the reference's."""
    row, theirs, records = swept["rows"][step], expected[step]["behavior"], swept["records"]
    reads = theirs["num_examples"]
    assert reads == sum(len(record["query_events"]) for record in records)
    assert_rate(row["answer_accuracy"], theirs["answer_accuracy"], reads, "answer_accuracy")
    for name in ("loss", "q", "r", "w"):
        assert_close(row[name], theirs[name], name)
    roles = role_counts(records)
    assert_rate(row["token_accuracy"], theirs["token_accuracy"], sum(roles.values()), "token_accuracy")
    assert set(row["token_role_accuracy"]) == set(theirs["token_role_accuracy"])
    for role, value in theirs["token_role_accuracy"].items():
        assert_rate(row["token_role_accuracy"][role], value, roles[role], role)


@pytest.mark.parametrize("step", STEPS)
def test_slices(swept, expected, step):
    """Accuracies of slices and their counts equal the reference's."""
    row, theirs = swept["rows"][step], expected[step]["behavior"]["slice_accuracy"]
    shared = {axis: counts for axis, counts in row["slice_count"].items() if axis not in OWN_AXES}
    assert shared == {a: dict(c) for a, c in slice_counts(swept["records"]).items()}
    assert {a: set(row["slice_accuracy"][a]) for a in shared} == {a: set(v) for a, v in theirs.items()}
    for axis, values in theirs.items():
        for value, accuracy in values.items():
            count = row["slice_count"][axis][value]
            assert_rate(row["slice_accuracy"][axis][value], accuracy, count, f"{axis}={value}")


def assert_slices(events, members, slices, split):
    """Compares a split's slices, formed here from the stored right answers."""
    right = {}
    for record in members:
        answers = events["read_correct"].sel(sequence=record["sample_id"]).values.astype(bool)
        for event, answer in zip(record["query_events"], answers, strict=False):
            axes = record["axes"] | {k: event[k] for k in EVENT_AXES}
            for axis, value in axes.items():
                right.setdefault((axis, str(value)), []).append(answer)
    assert set(right) == {(axis, value) for axis, values in slices.items() for value in values}
    for (axis, value), answers in right.items():
        assert_rate(sum(answers) / len(answers), slices[axis][value], len(answers), f"{split} {axis}={value}")


@pytest.mark.parametrize("step", STEPS)
def test_behaviour_by_split(swept, expected, step):
    """Behaviour on each split equals the reference's."""
    for split, theirs in expected[step]["split_behavior"].items():
        ours = swept["dataset"].sel(step=step, split=split)
        members = [record for record in swept["records"] if record["split"] == split]
        assert int(ours["read_count"]) == theirs["num_examples"]
        accuracy = swept["rows"][step]["split_accuracy"][split]
        assert_rate(accuracy, theirs["answer_accuracy"], theirs["num_examples"], split)
        assert_close(float(ours["loss"]), theirs["loss"], f"{split} loss")
        assert_slices(swept["events"].sel(step=step), members, theirs["slice_accuracy"], split)
        roles = role_counts(members)
        assert_rate(
            float(ours["token_accuracy"]),
            theirs["token_accuracy"],
            sum(roles.values()),
            f"{split} token_accuracy",
        )
        for role, value in theirs["token_role_accuracy"].items():
            assert_rate(float(ours["token_role_accuracy"].sel(token_role=role)), value, roles[role], f"{split} {role}")


@pytest.mark.parametrize("step", STEPS)
def test_residual_stream(swept, expected, step):
    """Logit lens values by stage equal the reference's."""
    row, theirs = swept["rows"][step], expected[step]["residual_probes"]
    reads = expected[step]["behavior"]["num_examples"]
    names = {
        "answer_probe_accuracy_by_stage": "lens_answer_accuracy_by_layer",
        "query_probe_accuracy_by_stage": "lens_query_key_accuracy_by_layer",
        "support_probe_accuracy_by_stage": "lens_support_value_accuracy_by_layer",
    }
    for theirs_name, ours_name in names.items():
        assert set(row[ours_name]) == set(theirs[theirs_name])
        for stage, value in theirs[theirs_name].items():
            assert_rate(row[ours_name][stage], value, reads, f"{ours_name} {stage}")
    for stage, value in theirs["answer_margin_by_stage"].items():
        assert_close(row["answer_margin_by_layer"][stage], value, f"margin {stage}")


@pytest.mark.parametrize("step", STEPS)
def test_drift_to_the_previous_checkpoint(swept, expected, step):
    """Drift of the mean state to the previous checkpoint equals the reference's."""
    ours = swept["rows"][step]["residual_drift_by_layer"]
    theirs = expected[step]["prediction_state_drift_by_stage"]
    if step == STEPS[0]:
        assert set(ours.values()) == {None}  # the reference writes 0.0 where there is no predecessor
        return
    assert expected[step]["previous_step"] == STEPS[STEPS.index(step) - 1]
    for stage, value in theirs.items():
        assert_close(ours[stage], value, f"drift {stage}")


@pytest.mark.parametrize("step", STEPS)
def test_heads(swept, expected, step):
    """Drops and attention of the reference's top heads are the same here."""
    reads = expected[step]["behavior"]["num_examples"]
    ablations = expected[step]["head_ablation_top"]
    localizations = expected[step]["head_localization_top"]
    assert len(ablations) == len(localizations) == 12
    for theirs in ablations:
        ours = swept["heads"][step, theirs["layer"], theirs["head"]]
        # A drop is the difference of two rates of the same reads.
        assert_rate(ours["accuracy_drop"], theirs["accuracy_drop"], reads, theirs)
    for theirs in localizations:
        ours = swept["heads"][step, theirs["layer"], theirs["head"]]
        for name in ("query_attention_mean", "support_attention_mean"):
            assert_close(ours[name], theirs[name], f"{name} {theirs}")


@pytest.mark.parametrize("step", STEPS)
def test_mlps(swept, expected, step):
    """Drops and writes of the reference's top MLPs are the same here."""
    reads = expected[step]["behavior"]["num_examples"]
    assert len(expected[step]["mlp_ablation_top"]) == len(expected[step]["mlp_write_top"]) == 3
    for theirs in expected[step]["mlp_ablation_top"]:
        ours = swept["mlps"][step, theirs["layer"]]
        assert_rate(ours["accuracy_drop"], theirs["accuracy_drop"], reads, theirs)
    for theirs in expected[step]["mlp_write_top"]:
        ours = swept["mlps"][step, theirs["layer"]]
        for name in ("write_norm_mean", "answer_margin_delta_mean"):
            assert_close(ours[name], theirs[name], f"{name} {theirs}")


def test_certificates(swept):
    """Each checkpoint carries a certificate that its logits are PyTorch's."""
    for checkpoint in swept["sweep"]["checkpoints"]:
        certificate = checkpoint["certificate"]
        assert certificate["max_abs_difference"] <= 2e-4 * certificate["max_abs_logit"]
    assert swept["sweep"]["versions"]["jax"] and swept["sweep"]["precision"] == "highest"


def test_companion_of_the_probe_set(swept):
    """What the reference's probe set lacks is written beside it."""
    companion = json.loads((swept["root"] / "probe_set.companion.json").read_text())
    assert companion["num_fit_records"] == 512
    tags = Counter(companion["difficulty"].values())
    assert min(tags.values()) >= len(swept["records"]) / 4
    assert len((swept["root"] / "probe_set.sources.jsonl").read_text().splitlines()) == 96


def test_ranking_of_heads(swept):
    """Role means rank the heads first that patching finds, zero ablation one that writes a constant for each role."""
    row = swept["rows"][6000]
    assert row["ranked_by"] == "role_mean"
    assert [(h["layer"], h["head"]) for h in row["top_heads"][:3]] == [(0, 3), (1, 2), (2, 1)]
    artefact = row["top_heads_by_ablation"][0]
    assert (artefact["layer"], artefact["head"]) == (1, 3)
    marked = swept["heads"][6000, 1, 3]
    assert marked["accuracy_drop"] > 0.4 > 0.05 > marked["accuracy_drop_role_mean"] and marked["ablations_disagree"]
    assert "heads by role-mean accuracy drop: zero | role-mean | resample" in swept["stdout"]


def test_birth_windows(swept):
    """Birth windows lie at the steps between which the reference's metrics move."""
    run = swept["root"] / "run"
    command = [sys.executable, "-m", "kvjax.commands.main", "birth-windows", f"--run_dirs={run}"]
    done = subprocess.run(command, capture_output=True, text=True, env=optimised_environment())
    assert done.returncode == 0, done.stderr
    found = read_birth_windows(run / "analysis" / "birth_windows.json")
    first, second = found.windows
    # The reference measured accuracy rising from 0.05 to 0.34 between 1500 and 1750, and from 0.41 to 0.67 between 3000
    # and 4000, when other heads take over.
    assert first.start_step <= 1500 < first.center_step == 1750 < first.end_step < 3000
    assert second.start_step <= 3000 < second.center_step == 4000 < second.end_step

    def heads(changes):
        return {change.component for change in changes if change.head is not None and "validation_iid" in change.splits}

    # Patching shows the second circuit: L0H3 binds, L1H2 and L2H1 retrieve. L1H3 writes a constant for each role.
    assert heads(first.rose) == {"L0H0"} and heads(second.rose) >= {"L0H3", "L1H2", "L2H1"}
    assert "L1H3" not in heads(second.rose)
    # The head that carried the first version is let go: the largest change of any head after that formation.
    assert heads(second.fell) == {"L0H0"} and not first.fell
    assert "window around step 1750" in done.stdout and "window around step 4000" in done.stdout
    # The run was stopped at 6000 of 16000 steps: half-rises are to its last checkpoint, and marked.
    assert not found.complete and all(birth.provisional for birth in found.births.values())
    assert found.births["answer_accuracy"].half_rise_step == 1750
    assert found.births["heldout_answer_accuracy"].threshold == 0.5
    # At step 250 everything is answered by chance: no component is above the null then.
    mlp = next(part for part in first.components if (part.layer, part.head) == (0, None))
    assert mlp.first_step_above_null == 1500 and not mlp.left_censored
    status = [sys.executable, "-m", "kvjax.commands.main", "status", f"--run_dirs={run}"]
    told = subprocess.run(status, capture_output=True, text=True, env=optimised_environment()).stdout
    assert "no   reference fixed" in told and "yes  sweep complete" in told and "yes  windows identified" in told
