"""The search on simulated runs whose truth is known, and what the document says of hand-made ones."""

import dataclasses

import numpy as np
import pytest

from benchmarks import window_intervals
from benchmarks.simulated_runs import Noise, Truth, simulate
from benchmarks.window_calibration import measure
from kvjax.artifacts.birth_windows_schema import TrajectoryBreak
from kvjax.config.files import find_config, read_config
from kvjax.config.windows import WindowConfig
from kvjax.model.components import Component
from kvjax.windows.births import births
from kvjax.windows.breaks import NO_BREAKS, Breaks
from kvjax.windows.components import first_above_null
from kvjax.windows.find_in_run import find_in_run
from kvjax.windows.summary import verdict_sentence, window_entries
from kvjax.windows.trajectories import ComponentDrops, Metric, Trajectories

NOISE = Noise(autocorrelation=0.5, wobble_share=0.6)


@pytest.fixture(scope="module")
def config():
    shipped = read_config(find_config("default", "windows"), WindowConfig)
    return shipped.model_copy(update={"resamples": 100})


@pytest.mark.parametrize("kind", ["flat", "spike"])
def test_flat_runs_and_spikes(config, kind):
    """Runs in which no change lasts get almost no windows."""
    # Of a method that errs in 1 % of runs, 1 in 130 such samples of 40 would hold 3 or more.
    row = measure(16, NOISE, Truth(kind, 20.0), config, runs=40, seed=1)
    assert row["runs_with_windows"] <= 2


def test_large_shifts(config):
    """Nearly all large shifts are found within a checkpoint, with few false windows."""
    row = measure(16, NOISE, Truth("shift", 9.0), config, runs=40, seed=2)
    assert row["found"] >= 38 and row["runs_with_false_windows"] <= 2


@pytest.mark.parametrize(
    ("length", "spaced", "even_in"), [(5, "evenly", "steps"), (8, "evenly", "log steps"), (12, "log", "steps")]
)
def test_growth_on_few_checkpoints(config, length, spaced, even_in):
    """Steady growth makes almost no windows, however few and unevenly spaced the checkpoints of a run are."""
    row = measure(length, NOISE, Truth("drift", 20.0, spaced=spaced, even_in=even_in), config, runs=20, seed=8)
    # Of a method that errs in 2.5 % of runs, 1 in 100 such samples of 20 would hold 3 or more.
    assert row["runs_with_windows"] <= 2


@pytest.mark.parametrize("seed", range(4))
def test_dense_run(config, seed):
    """Of 160 checkpoints with two births and three ramps, the births are the windows and the ramps are ramps."""
    rng, steps = np.random.default_rng(seed), np.arange(1, 161) * 50

    def birth(step, size):
        return size / (1 + np.exp(-(steps - step) / 40))  # 10 to 90 % in 176 steps

    def ramp(begins, ends, size):
        return size * np.clip((steps - begins) / (ends - begins), 0, 1)

    curves = {
        "answer_accuracy": birth(2000, 0.5) + birth(6000, 0.4),
        "r": birth(2000, 0.5) + ramp(3000, 4500, 0.9),
        "key_selectivity": ramp(2900, 4500, 0.8) + birth(6000, 0.3),
        "w": ramp(3100, 4700, 12.0),
    }
    noise = {"w": 0.08}
    courses = {name: curve + noise.get(name, 0.008) * rng.standard_normal(160) for name, curve in curves.items()}
    found = find_in_run(hand_made(courses, steps=steps), config)
    centres = [int(steps[window.gap + 1]) for window in found.windows]
    assert len(centres) == 2
    assert abs(centres[0] - 2000) <= 100 and abs(centres[1] - 6000) <= 100
    metrics = found.trajectories.metrics
    assert {metrics[ramp.metric].measure for ramp in found.ramps} == {"r", "key_selectivity", "w"}


def test_reason_of_growth(config):
    """The reason for no transition names growth as such, not a shift that is too weak."""
    steps = np.arange(1, 9) * 250
    run = hand_made({"r": np.log(steps / 250), "answer_accuracy": 0.3 * np.log(steps / 250)}, steps=steps)
    found = find_in_run(run, config)
    assert found.verdict == "no transition" and found.growing
    assert "more than steady growth" in verdict_sentence(found, config, complete=True)


def test_intervals_of_one_run_at_other_checkpoints(config):
    """A run searched with every 2nd and every 3rd checkpoint gets intervals that overlap and hold the truth."""
    found = window_intervals.measure(500, config, runs=1, seed=0, everies=(2, 3))
    assert found["overlapping"] == found["pairs"] > 0
    for row in found["densities"]:
        assert row["found"] == row["looked_for"]
        # Of intervals that hold the truth in 95 %, 6 and 9 do so with one exception at most in 97 and 93 % of cases.
        assert row["midpoint"] >= row["found"] - 1


def test_onset_and_completion_of_a_long_rise(config):
    """Where a rise over 1600 steps begins and ends is inside its intervals, though its slow ends look like rest."""
    found = window_intervals.measure(1600, config, runs=2, seed=1, everies=(3,))
    (row,) = found["densities"]
    assert row["found"] == 18
    # Of intervals that hold the truth in 95 %, 3 of 18 miss it in 6 % of cases; in 60 % of them, 8 would.
    assert row["onset"] >= 16 and row["completion"] >= 16


def test_growing_run(config):
    """A growing run is undecidable, then without transition, then has the window of the whole run."""
    run, (gap,) = simulate(np.random.default_rng(4), 16, NOISE, Truth("shift", 12.0), config)

    def until(n):
        return Trajectories(run.steps[:n], run.metrics, run.values_CxM[:n], run.samples_JxCxM[:, :n])

    grown = [find_in_run(until(n), config) for n in (3, gap + 2, gap + 3, 16)]
    # Too few; the shift seen at one checkpoint only; at two; and the whole run.
    assert [found.verdict for found in grown] == ["undecidable", "no transition", "windows", "windows"]
    assert grown[2].windows[0].gap == grown[3].windows[0].gap == gap


@pytest.mark.parametrize("length", [1, 2, 3])
def test_too_few_checkpoints(config, length):
    """A run of 1 to 3 checkpoints is undecidable, and the reason says so."""
    run, _ = simulate(np.random.default_rng(5), 8, NOISE, Truth("flat"), config)
    short = Trajectories(run.steps[:length], run.metrics, run.values_CxM[:length], run.samples_JxCxM[:, :length])
    found = find_in_run(short, config)
    sentence = verdict_sentence(found, config, complete=True)
    assert found.verdict == "undecidable" and f"{length} measured checkpoint" in sentence and "4 in all" in sentence


def test_reason_of_a_flat_run(config):
    """The reason for no transition says that no shift is strong enough so far."""
    run, _ = simulate(np.random.default_rng(6), 24, NOISE, Truth("flat"), config)
    found = find_in_run(run, config)
    assert found.verdict == "no transition"
    assert "no shifts" in (sentence := verdict_sentence(found, config, complete=False)) or "no metric" in sentence
    assert "so far" in sentence


def hand_made(courses, *, steps, wobble=0.004, splits=("validation_iid", "heldout_pairs", "counterfactual")):
    """Builds trajectories that follow given curves, with resamples that differ by a little."""
    rng = np.random.default_rng(7)
    metrics = [Metric(name, name, split) for name in courses for split in splits]
    values = np.stack([courses[metric.measure] for metric in metrics], axis=1).astype(float)
    samples = values + wobble * rng.standard_normal((50, *values.shape))
    return Trajectories(np.asarray(steps), tuple(metrics), values, samples)


STEPS = np.array([100, 200, 300, 400, 500, 700, 1100, 1200, 1300, 1400])
EARLY = [0, 0, 0, 0.5, 1, 1, 1, 1, 1, 1]
LATE = [0, 0, 0, 0, 0.1, 0.9, 1, 1, 1, 1]
NOTHING = [0.3] * 10


@pytest.fixture(scope="module")
def formed(config):
    run = hand_made({"r": EARLY, "answer_accuracy": LATE, "q": NOTHING}, steps=STEPS)
    found = find_in_run(run, config)
    drops = np.stack([np.zeros(10), np.array(LATE) * 0.5, np.array(LATE[::-1]) * 0.4], axis=1)
    parts = ComponentDrops(
        (Component(0, 0), Component(0, 1), Component(0)), drops, np.full_like(drops, 0.01), 0.01, 1000
    )
    return found, window_entries(found, parts, config)


def test_order_of_metrics(formed):
    """Metrics are ordered as their hand-made curves rise."""
    _, (window,) = formed
    order = {entry["metric"]: entry for entry in window["order"]}
    assert list(order) == ["r", "answer_accuracy"]
    # Halfway at a checkpoint, and halfway between 0.1 at 500 and 0.9 at 700.
    assert order["r"]["midpoint"] == pytest.approx(400, abs=5)
    assert order["answer_accuracy"]["midpoint"] == pytest.approx(600, abs=5)
    assert order["answer_accuracy"]["between"] == (500, 700)
    for entry in order.values():
        for moment, name in (
            ("onset", "onset_interval"),
            ("midpoint", "interval"),
            ("completion", "completion_interval"),
        ):
            low, high = entry[name]
            assert low <= entry[moment] <= high and {low, high} <= set(STEPS.tolist()), name
        assert entry["direction"] == "rise"
        assert entry["onset"] < entry["midpoint"] < entry["completion"]
    (pair,) = window["precedes"]
    assert pair == {"first": "r", "second": "answer_accuracy", "probability": 1.0, "undetermined": 0.0}


def test_window_entry(formed):
    """A window lists its steps and triggers, and its centre lies inside it."""
    found, (window,) = formed
    assert window["steps"] == STEPS[found.windows[0].first : found.windows[0].last + 1].tolist()
    assert window["start_step"] < window["center_step"] < window["end_step"]
    assert {trigger["metric"] for trigger in window["triggers"]} == {"r", "answer_accuracy"}
    assert all(trigger["step"] in STEPS for trigger in window["triggers"])


def broken(run, **gaps):
    return dataclasses.replace(run, breaks=Breaks(**{kind: frozenset(of) for kind, of in gaps.items()}))


def test_no_window_rests_on_a_break(config):
    """Shifts at or near a jump, or largest where training was resumed, found no window; others do."""
    late = [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    run = hand_made({"r": late, "answer_accuracy": late, "q": NOTHING}, steps=STEPS)

    def verdict(run):
        return find_in_run(run, config).verdict

    assert verdict(run) == "windows"
    for gaps in ({"jumps": [5]}, {"jumps": [3]}, {"jumps": [7]}, {"resumed": [5]}):
        assert verdict(broken(run, **gaps)) == "no transition", gaps
    assert verdict(broken(run, jumps=[1], resumed=[8])) == "windows"


def test_breaks_of_trajectories():
    """Copies and foreign checkpoints are dropped; gaps are counted among the others."""

    def found(kind, before, after):
        return TrajectoryBreak(kind=kind, before=before, after=after, reason="")

    steps = [100, 200, 300, 400, 500, 600, 700]
    breaks = Breaks.of(steps, [found("copy", 100, 200), found("jump", 300, 400), found("resumed", 600, 700)])
    # Kept are 100, 300, 400, …: the jump is their second gap.
    assert breaks == Breaks(frozenset({200}), frozenset({1}), frozenset({4}), frozenset({400}))
    foreign = Breaks.of(steps, [found("jump", 300, 400), found("jump", 400, 500)])
    assert foreign == Breaks(frozenset({400}), frozenset({2}), frozenset(), frozenset({400, 500}))
    assert Breaks.of(steps, []) == NO_BREAKS


def test_ranks_of_components(formed):
    """Components have a rank before, inside and after a window."""
    _, (window,) = formed
    parts = {(part["layer"], part["head"]): part for part in window["components"]}
    grows, shrinks, idle = parts[0, 1], parts[0, None], parts[0, 0]
    assert (shrinks["rank_before"], grows["rank_after"]) == (1, 1)
    assert grows["importance_before"] < grows["importance_inside"] < grows["importance_after"]
    # 0.5 times 0.1 at step 500 is above 0.01 times the quantile for 30 tests (2.94), and stays so.
    assert grows["first_step_above_null"] == 500 and shrinks["first_step_above_null"] == 100
    assert idle["first_step_above_null"] is None
    assert [part["left_censored"] for part in (grows, shrinks, idle)] == [False, True, False]
    inside = [part["importance_inside"] for part in window["components"]]
    assert inside == sorted(inside, reverse=True)


def test_components_that_rose_and_fell(config):
    """A window names the components whose importance fell in it, and those whose importance rose, with both levels."""
    falls, rises = [0.6, 0.6, 0.6, 0.6, 0.6, 0.1, 0.1, 0.1, 0.1, 0.1], [0.0] * 5 + [0.4] * 5
    run = component_run({(0, 0): (falls, rises), (1, 2): (rises, rises), (1, None): (NOTHING, NOTHING)})
    found = find_in_run(run, config)
    parts = ComponentDrops((Component(0, 0),), np.zeros((10, 1)), np.full((10, 1), 0.01), 0.01, 1000)
    (window,) = window_entries(found, parts, config)
    assert [change["component"] for change in window["fell"]] == ["L0H0"]
    (fallen,) = window["fell"]
    assert fallen["splits"]["validation_iid"] == pytest.approx((0.6, 0.1)), "a fall is a trigger as a rise is"
    rose = {change["component"]: change["splits"] for change in window["rose"]}
    assert set(rose) == {"L0H0", "L1H2"} and set(rose["L0H0"]) == {"heldout_pairs"}
    assert set(rose["L1H2"]) == {"validation_iid", "heldout_pairs"}
    ways = {(entry["metric"], entry["direction"]) for entry in window["order"]}
    assert ways == {("head_accuracy_drop.L0H0", "fall"), ("head_accuracy_drop.L1H2", "rise")}


def component_run(curves, *, steps=STEPS):
    """Builds a run of components: (layer, head) -> their drops on validation_iid and heldout_pairs."""
    splits = ("validation_iid", "heldout_pairs")
    metrics, values = [], []
    for (layer, head), of_splits in curves.items():
        kind = "mlp_accuracy_drop" if head is None else "head_accuracy_drop"
        for split, curve in zip(splits, of_splits, strict=True):
            metrics.append(Metric(kind, f"{kind}.{Component(layer, head)}", split, layer, head))
            values.append(curve)
    values = np.stack(values, axis=1).astype(float)
    samples = values + 0.004 * np.random.default_rng(7).standard_normal((50, *values.shape))
    return Trajectories(np.asarray(steps), tuple(metrics), values, samples)


def test_first_step_above_chance():
    """A drop counts from where it exceeds what guessing explains, however little few right answers vary."""
    parts = (Component(0), Component(0, 0))
    # All right answers are lost at both: by luck at first, twice chance of 1 in 100 then, and in earnest later.
    drops = np.array([[0.01, 0.0], [0.02, 0.02], [0.02, 0.05], [0.3, 0.05]])
    never = ComponentDrops(parts, drops, np.full(drops.shape, 1e-4), 0.01, 1000)
    # A guesser's deviation is 0.0031, the quantile for 8 tests 2.50: above 0.0179 from the second checkpoint.
    assert first_above_null(never).tolist() == [1, 1]
    few = dataclasses.replace(never, num_reads=100)
    # With 100 reads it is 0.0099, and the null reaches up to 0.035.
    assert first_above_null(few).tolist() == [3, 2]
    unsure = dataclasses.replace(few, deviations_CxX=np.full(drops.shape, 0.2))
    assert first_above_null(unsure).tolist() == [4, 4]


def test_births_of_a_run(config):
    """Births, half-rises and censoring follow from hand-made curves."""
    late = [0, 0, 0, 0, 0, 0, 0, 0, 0.95, 0.95]
    run = hand_made({"r": EARLY, "answer_accuracy": late, "q": NOTHING, "key_selectivity": LATE}, steps=STEPS)
    thresholds = {"r": 0.4, "answer_accuracy": 0.9, "q": 0.9}
    found = births(run, thresholds=thresholds, config=config, complete=True)
    assert (found["r"]["step"], found["r"]["interval"], found["r"]["censored"]) == (400, (300, 400), False)
    assert found["r"]["half_rise_step"] in (400, 500)
    assert found["answer_accuracy"]["step"] is None and found["answer_accuracy"]["censored"]
    assert "too few further" in found["answer_accuracy"]["reason"]
    assert found["q"]["censored"] and "stays below 0.9" in found["q"]["reason"]
    assert found["q"]["half_rise_step"] is None
    assert found["key_selectivity"]["threshold"] is None and found["key_selectivity"]["half_rise_step"] == 700
    unfinished = births(run, thresholds=thresholds, config=config, complete=False)
    for name, entry in unfinished.items():
        assert entry == found[name] | {"provisional": True}, "to the last checkpoint, and marked"


def test_birth_before_the_first_checkpoint(config):
    """A metric above its threshold at the first checkpoint was born there or before: its interval has no lower end."""
    run = hand_made({"r": [0.5] * 10, "q": [0.39, 0.5] + [0.6] * 8}, steps=STEPS, wobble=0.0)
    run.samples_JxCxM[:10, 0] = 0.5  # q at the first checkpoint, in a fifth of the resamples
    found = births(run, thresholds={"r": 0.4, "q": 0.4}, config=config, complete=True)
    assert (found["r"]["step"], found["r"]["interval"]) == (100, (None, 100))
    assert (
        found["r"]["left_censored"]
        and not found["r"]["censored"]
        and "may have been born before" in found["r"]["reason"]
    )
    assert (found["q"]["step"], found["q"]["interval"], found["q"]["left_censored"]) == (200, (None, 200), False)


def test_birth_missed_by_some_resamples(config):
    """A birth that some resamples miss has an interval without an upper end."""
    run = hand_made({"r": [0] * 7 + [0.5, 0.5, 0.5]}, steps=STEPS)
    run.samples_JxCxM[:10, :, 0] = 0.0
    found = births(run, thresholds={"r": 0.4}, config=config, complete=True)
    assert found["r"]["step"] == 1200 and found["r"]["interval"] == (1100, None)


def test_residual_drift_alone(config):
    """Shifts of residual drift alone make no window."""
    stages = [f"residual_drift.layer_{i}_post_mlp" for i in range(4)]
    metrics = tuple(
        [Metric("residual_drift", stage, "validation_iid", resampled=False) for stage in stages]
        + [Metric("answer_accuracy", "answer_accuracy", "validation_iid")]
    )
    falls = np.where(np.arange(10) < 5, 0.0, -2.0)
    values = np.stack([*[falls] * 4, np.zeros(10)], axis=1)
    run = Trajectories(STEPS, metrics, values, np.repeat(values[None], 50, axis=0))
    found = find_in_run(run, config)
    assert found.verdict == "no transition" and len(found.joining) == 4
    drift = config.triggers.residual_drift.model_copy(update={"opens_window": True})
    opened = config.model_copy(update={"triggers": config.triggers.model_copy(update={"residual_drift": drift})})
    found = find_in_run(run, opened)
    assert found.verdict == "windows"
    nothing = ComponentDrops((Component(0, 0),), np.zeros((10, 1)), np.ones((10, 1)), 0.01, 1000)
    (window,) = window_entries(found, nothing, opened)
    # Drift has no value per sequence: only the two checkpoints are known.
    assert all(entry["interval"] == entry["between"] == (500, 700) for entry in window["order"])
    assert window["precedes"] == [] and all(entry["midpoint"] is not None for entry in window["order"])
