"""Runs without intervention, recovery by component, and ablations beside recoveries, on pairs made by hand."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import xarray as xr

from kvjax.artifacts.files import FileHash
from kvjax.artifacts.identity import sealed
from kvjax.artifacts.recovery_tables import component_recoveries
from kvjax.artifacts.results import RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.tables import write_datasets
from kvjax.intervene import component_tables
from kvjax.intervene.importance import ablation_drops, compare_importance
from kvjax.intervene.kinds.activation_patching import ROLES, summarise, summary_lines
from kvjax.intervene.metrics import METRICS
from kvjax.intervene.pair_tables import baselines, failures, metric_recoveries, of_metrics, put_runs
from kvjax.intervene.recovery import PairGroups
from kvjax.intervene.summary_text import comparison_lines
from kvjax.measure.uncertainty import resample_counts
from kvjax.task.corruption import PAIR_KINDS

STEPS = (100, 200)
COMPONENTS = ["L0H0", "L0H1", "L0.mlp", "L1H0", "L1H1", "L1.mlp"]
SHARES = np.array([0.9, 0.1, 0.3, 0.0, 0.6, 0.2])  # recovered by each component for `value`
PAIRS = 8  # of each kind
BETTER = {"logit_difference": 1, "answer_loss": -1, "answer_logit": 1}  # the sign of a clean run that answers
KINDS = ["zero", "mean", "role_mean", "random"]  # of ablation; the mean was not measured


def pairs_of(kinds, reads):
    """Stands for the inputs of a kind of intervention, as far as tables look at them."""
    codes = np.array([PAIR_KINDS.index(kind) for kind in kinds])
    members = {kind: np.flatnonzero(codes == i) for i, kind in enumerate(PAIR_KINDS) if (codes == i).any()}
    groups = PairGroups(members, np.array(reads), resample_counts(codes, seed=0))
    return SimpleNamespace(groups=groups, chance=0.1, encoded=SimpleNamespace(kinds=codes))


def empty(inputs, **coords):
    coords = {
        "statistic": ["estimate", "low", "high"],
        "metric": list(METRICS),
        "pair_kind": inputs.groups.kinds,
    } | coords
    return xr.Dataset(coords={name: list(values) for name, values in coords.items()})


def test_accuracy_of_the_corrupted_run():
    """Of 4 affected reads the corrupted run gives its own answer at 3, the clean run the clean answer at 2."""
    inputs = pairs_of(["value", "value"], [1, 3])
    ones = np.ones((1, 2))
    arrays = {f"{name}_{run}": ones for name in METRICS for run in ("base", "source")}
    arrays |= {"clean_correct_base": np.array([[0, 1]]), "corrupted_correct_base": np.array([[1, 2]])}
    arrays |= {"clean_correct_source": np.array([[1, 1]]), "corrupted_correct_source": np.array([[0, 0]])}
    dataset = empty(inputs, step=[100], pair=["a", "b"])
    put_runs(dataset, inputs, arrays, clean="source", corrupted="base")
    found = baselines(dataset, "answer_loss")["baseline"]
    corrupted, clean = (found[run]["value"]["100"] for run in ("corrupted", "clean"))
    own = corrupted["corrupted_answer_accuracy"]
    assert own["estimate"] == 3 / 4 and (own["low"], own["high"]) == pytest.approx((2 / 3, 1), abs=1e-6)
    assert corrupted["clean_answer_accuracy"]["estimate"] == 1 / 4
    assert clean["clean_answer_accuracy"]["estimate"] == 2 / 4 and clean["metric"]["estimate"] == 2 / 4
    assert dataset["corrupted_answers_corrupted"].values.tolist() == [[1, 2]]
    assert dataset["affected_reads"].values.tolist() == [1, 3]


@pytest.fixture
def runs():
    """Both runs of four kinds at two steps: only `value` at the second step has something to recover."""
    rng = np.random.default_rng(3)
    kinds = np.repeat(PAIR_KINDS, PAIRS)
    right = np.zeros((2, len(kinds)))
    right[:, kinds != "query"] = 1
    gap = rng.uniform(4, 6, (2, len(kinds)))
    gap[:, kinds == "swap"] = np.resize([1.0, -1.0], PAIRS)
    gap[:, kinds == "stale"] *= -1
    right[0], gap[0] = 0, np.resize([1.0, -1.0], len(kinds))
    base = rng.normal(size=gap.shape)
    arrays = {"clean_correct_source": right, "clean_correct_base": 0 * right}
    arrays |= {"corrupted_correct_source": 0 * right, "corrupted_correct_base": right}
    for name, better in BETTER.items():
        arrays |= {f"{name}_base": base, f"{name}_source": base + better * gap}
    return pairs_of(kinds, np.ones(len(kinds), int)), arrays


def test_kinds_that_the_clean_run_fails(runs):
    """A kind at chance, one without a gap and one whose gap has the wrong sign are marked, at each step."""
    inputs, arrays = runs
    dataset = empty(inputs, step=STEPS, pair=range(len(inputs.encoded.kinds)))
    put_runs(dataset, inputs, arrays, clean="source", corrupted="base")
    for metric in METRICS:
        found = {(row["pair_kind"], row["step"]): row["reasons"] for row in failures(dataset, metric)}
        both = ["not_above_chance", "no_gap"]
        assert found == {
            **{(kind, 100): both for kind in PAIR_KINDS},
            ("query", 200): ["not_above_chance"],
            ("swap", 200): ["no_gap"],
            ("stale", 200): ["no_gap"],
        }


def test_a_single_pair_is_not_counted():
    """One pair has no interval, so nothing says that its clean run is above chance."""
    inputs, ones = pairs_of(["swap"], [2]), np.ones((1, 1))
    arrays = {f"{name}_{run}": ones * (run == "source") for name in METRICS for run in ("base", "source")}
    names = ("clean_correct", "corrupted_correct")
    arrays |= {f"{name}_{run}": 2 * ones for name in names for run in ("base", "source")}
    dataset = empty(inputs, step=[100])
    put_runs(dataset, inputs, arrays, clean="source", corrupted="base")
    (row,) = failures(dataset, "logit_difference")
    assert row == {"pair_kind": "swap", "step": 100, "reasons": ["not_above_chance", "no_gap"]}


@pytest.fixture
def patched(runs):
    """Activation patching's arrays, in which each component of `value` recovers its share at the second step."""
    inputs, arrays = runs
    places = ["embedding", *COMPONENTS]
    pairs = range(len(inputs.encoded.kinds))
    dataset = empty(
        inputs,
        step=STEPS,
        pair=pairs,
        place=places,
        direction=["denoising", "noising"],
        position_role=ROLES,
    )
    dataset.coords["is_component"] = ("place", [place in COMPONENTS for place in places])
    shares = np.concatenate([[1.0], SHARES])
    of_kind = {"value": shares, "query": shares[::-1], "swap": shares, "stale": shares}
    by_pair = np.stack([of_kind[PAIR_KINDS[code]] for code in inputs.encoded.kinds])
    moved = {}
    for name in METRICS:
        base, source = arrays[f"{name}_base"], arrays[f"{name}_source"]
        at_all = base[..., None] + by_pair * (source - base)[..., None]
        moved[name] = np.stack([at_all + 7 * (role != "all") for role in ROLES], axis=-1)
    recovered = metric_recoveries(inputs.groups, moved, arrays)
    dims = ("pair_kind", "step", "place", "position_role")
    dataset["recovery_by_role"] = (
        ("statistic", "metric", "direction", *dims),
        np.stack([recovered, recovered + 33], axis=2),
    )
    accuracy = np.full(recovered[:, 0].shape, 0.5)
    dataset["clean_answer_accuracy_by_role"] = (("statistic", "direction", *dims), np.stack([accuracy] * 2, axis=1))
    stacked = np.stack([of_metrics(moved), of_metrics(moved) + 33], axis=1)
    dataset["metric_by_role"] = (("metric", "direction", "step", "pair", "place", "position_role"), stacked)
    put_runs(dataset, inputs, arrays, clean="source", corrupted="base")
    return dataset


@pytest.fixture
def run(small_run, patched):
    """A run with these arrays stored as its activation patching."""
    path = small_run / "analysis" / "interventions" / "activation_patching" / "steps_100_200.json"
    path.parent.mkdir(parents=True)
    write_datasets(path.with_suffix(".nc"), [(None, patched)])
    arrays = FileHash.of(path.with_suffix(".nc"))
    document = {"kind": "activation_patching", "steps": list(STEPS), "measured_on": {}, "arrays": vars(arrays)}
    path.write_text(json.dumps(sealed(document)))
    return RunDir.open(small_run)


@pytest.fixture
def events():
    """Right answers of 40 sequences of 5 reads, and those lost by each ablation, at the second step alone."""
    rng = np.random.default_rng(4)
    right = np.full((1, 40, 5), 1.0)
    dataset = xr.Dataset(coords={"step": [200], "layer": [0, 1], "head": [0, 1]})
    dataset["split"] = ("sequence", np.repeat(["validation_iid", "heldout_pairs"], 20))
    dataset["is_read"] = (("sequence", "read"), np.ones((40, 5), bool))
    dataset["read_correct"] = (("step", "sequence", "read"), right)
    heads = {"zero": [[0, 4], [3, 1]], "role_mean": [[4, 1], [0, 3]], "random": [[1, 1], [1, 1]]}
    for kind, lost in heads.items():
        of_heads = np.broadcast_to(5 - np.array(lost), (1, 40, 2, 2)) + (rng.random((1, 40, 2, 2)) < 0.01)
        dataset[f"head_{kind}_correct"] = (("step", "sequence", "layer", "head"), of_heads)
        dataset[f"mlp_{kind}_correct"] = (("step", "sequence", "layer"), np.broadcast_to([1, 2], (1, 40, 2)))
    return dataset


@pytest.fixture
def results(run, events):
    """The run's results, with these events as those of its sweep, and their drops as its intervals."""
    own = RunResults(run)
    lost = ablation_drops(events.sel(step=200), KINDS).drops
    intervals = xr.Dataset(coords={"statistic": ["estimate", "low", "high"], "split": ["all"], "step": [200]})
    intervals = intervals.assign_coords(ablation=list(lost), layer=[0, 1], head=[0, 1])
    drops = np.stack([np.broadcast_to(x, (3, 1, 1, 6)) for x in lost.values()], axis=3)  # [3, 1, 1, ablations, 6]
    dims = ("statistic", "split", "step", "ablation", "layer")
    intervals["head_accuracy_drop"] = ((*dims, "head"), drops[..., :4].reshape(3, 1, 1, -1, 2, 2))
    intervals["mlp_accuracy_drop"] = (dims, drops[..., 4:])
    return SimpleNamespace(events=events, intervals=intervals, intervention_files=own.intervention_files)


def test_recoveries_read_from_a_run(run):
    """The components of a run's patching come back by step, denoising and at all positions, with both runs."""
    found = component_recoveries(RunResults(run), metric="answer_loss")
    assert found["component"].values.tolist() == COMPONENTS and found["step"].values.tolist() == list(STEPS)
    at = found.sel(pair_kind="value", step=200)
    np.testing.assert_allclose(at["recovery"].sel(statistic="estimate"), SHARES, atol=1e-5)
    assert found["recovery"].sel(pair_kind="value", step=100).isnull().all(), "no gap at the first step"
    assert not at["clean_run_fails"].any() and found["clean_run_fails"].sel(step=100).any("failure").all()
    assert float(at["answer_accuracy_of_runs"].sel(run="corrupted", answer="corrupted", statistic="low")) == 1
    assert set(found["window"].values) == {"steps_100_200"}


def test_recoveries_of_a_run_without_patching(small_run, run):
    """A run without activation patching, or with a damaged one alone, has no table."""
    stored = run.layout.intervention("activation_patching", "steps_100_200")
    stored.with_suffix(".nc").write_bytes(b"damaged")
    assert component_recoveries(RunResults(run)) is None


def test_newest_measurement_of_a_step(run, patched):
    """A step that two windows hold is that of the later measurement."""
    path = run.layout.intervention("activation_patching", "window_200")
    later = patched.sel(step=[200]).assign(recovery_by_role=patched["recovery_by_role"].sel(step=[200]) + 1)
    write_datasets(path.with_suffix(".nc"), [(None, later)])
    document = json.loads(path.with_name("steps_100_200.json").read_text())
    del document["content_sha256"]
    path.write_text(json.dumps(sealed(document | {"arrays": vars(FileHash.of(path.with_suffix(".nc")))})))
    found = component_recoveries(RunResults(run))
    assert found["window"].values.tolist() == ["steps_100_200", "window_200"]
    at = found["recovery"].sel(pair_kind="value", step=200, statistic="estimate")
    np.testing.assert_allclose(at, SHARES + 1, atol=1e-5)


def test_rank_correlations_against_scipy(results):
    """Ranks of drops and recoveries correlate as SciPy says; only counted kinds enter, and no control."""
    document = compare_importance(results, "logit_difference")
    assert list(document["steps"]) == ["200"], "the one step that both sides have"
    at = document["steps"]["200"]
    assert at["counted_pair_kinds"] == ["value"]
    rows = at["components"]
    assert [row["component"] for row in rows] == ["L0H0", "L0H1", "L1H0", "L1H1", "L0.mlp", "L1.mlp"]
    assert set(rows[0]["accuracy_drop"]) == {"zero", "role_mean"}
    expected = dict(zip(COMPONENTS, SHARES, strict=True))
    for row in rows:
        for recovery in (row["recovery"]["value"], row["largest_recovery"]):
            assert recovery["estimate"] == pytest.approx(expected[row["component"]], abs=1e-5), row["component"]
    assert {(r["ablation"], r["of"], r["recovery"]) for r in at["rank_correlation"]} == {
        (kind, of, over)
        for kind in ("zero", "role_mean")
        for of in ("heads", "all")
        for over in ("largest", "mean", "value")
    }
    for r in at["rank_correlation"]:
        own = rows if r["of"] == "all" else rows[:4]
        drops = [row["accuracy_drop"][r["ablation"]]["estimate"] for row in own]
        recovered = [row["recovery"]["value"]["estimate"] for row in own]
        assert r["value"]["estimate"] == pytest.approx(scipy.stats.spearmanr(drops, recovered)[0], abs=1e-5)
        assert r["value"]["low"] <= r["value"]["estimate"] <= r["value"]["high"]
        assert r["headline"] == ((r["of"], r["recovery"]) == ("heads", "largest"))
    headline = {r["ablation"]: r["value"]["estimate"] for r in at["rank_correlation"] if r["headline"]}
    assert headline["role_mean"] == pytest.approx(1) and headline["zero"] < 0
    above = next(r["above_zero"] for r in at["rank_correlation"] if r["headline"] and r["ablation"] == "role_mean")
    assert above["estimate"] == pytest.approx(1 - headline["zero"], abs=1e-5) and above["low"] > 0


def test_drops_by_hand(events):
    """A drop is the right answers lost over all reads, of heads and then of MLPs."""
    events = events.sel(step=200)
    found = ablation_drops(events, KINDS)
    assert list(found.drops) == ["zero", "role_mean"]
    np.testing.assert_allclose(found.drops["zero"][4:], [4 / 5, 3 / 5])
    np.testing.assert_allclose(found.drops["zero"][:4], [0, 0.8, 0.6, 0.2], atol=0.02)
    assert found.samples["zero"].shape == (1000, 6)


def test_files_of_a_run(run, results, monkeypatch):
    """The table to load has every metric and both runs; the one to read shows no recovery where the clean run fails."""
    monkeypatch.setattr(component_tables, "compare_importance", lambda _, metric: compare_importance(results, metric))
    component_tables.write_component_tables(run, "answer_logit")
    text = run.layout.component_recovery.read_text()
    value, swap = text.split("## value")[1].split("## query")[0], text.split("## swap")[1].split("## stale")[0]
    assert "answer logit" in text and "| L0H0 | fails | 0.90 [0.90, 0.90] |" in value
    assert "| L0H0 | fails | fails |" in swap and "no gap between the runs" in swap
    with run.layout.component_recovery.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(METRICS) * len(PAIR_KINDS) * len(COMPONENTS) * len(STEPS)
    wanted = ("answer_loss", "value", "L1H1", "200")
    (row,) = (r for r in rows if (r["metric"], r["pair_kind"], r["component"], r["step"]) == wanted)
    assert float(row["recovery"]) == pytest.approx(0.6, abs=1e-5) and row["clean_run_fails"] == ""
    assert float(row["corrupted_run_accuracy"]) == 1 and float(row["clean_run_metric"]) < float(
        row["corrupted_run_metric"]
    )
    document = json.loads(run.layout.importance.read_text())
    lines = comparison_lines(document)
    assert document["metric"] == "answer_logit" and "not counted" in "\n".join(lines)
    assert [line.split()[0] for line in lines[3:5]] == ["L0H0", "L1H1"], "the largest recovery first"


def test_comparison_without_a_sweep(run):
    """Without a sweep there is no comparison: a note says so, and an older one does not stay."""
    run.layout.importance.write_text("{}")
    with pytest.warns(match="ablations are not compared with recoveries: .*sweep.json"):
        component_tables.write_component_tables(run, "logit_difference")
    assert run.layout.component_recovery.is_file() and not run.layout.importance.exists()


def test_printed_summary(patched):
    """Both runs stand before the recoveries, and no number where the clean run fails."""
    document = {"pairs": {"counts": dict.fromkeys(PAIR_KINDS, PAIRS)}, "steps": list(STEPS), "window": {}}
    lines = summary_lines(document | summarise(patched, "answer_loss"))
    text = "\n".join(lines)
    assert "answer loss" in text and text.count("FAILS: clean run at chance; no gap between the runs") >= 4
    (row,) = (line for line in lines if line.startswith("  L0H0"))
    assert row.split() == ["L0H0", "fails", "0.90", "[0.90,", "0.90]"]
    assert "  the clean run fails at each of these steps: nothing to recover" in lines
