"""Movement of single reads' states and CKA against PyTorch's states and the textbook formulas; logistic probes."""

import types

import jax
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from kvjax.measure.residual import linear_cka
from kvjax.model.decoder import DecoderConfig
from kvjax.model.sites import stage_names
from kvjax.model.transforms import CHECKPOINT_AXIS, checkpoint_mesh
from kvjax.sweeps import compiled_sweep, movement_watch, state_similarity
from kvjax.sweeps.compiled_sweep import ProbeProgram
from kvjax.sweeps.movement_watch import MovementWatch
from kvjax.sweeps.settings import SweepSettings
from kvjax.sweeps.state_similarity import read_states
from kvjax.task.benchmark import Benchmark
from kvjax.task.encoding import encode_records
from tests.helpers.building import SMALL_MODEL, STEPS
from tests.helpers.sweeping import sweep

STAGES = stage_names(SMALL_MODEL["n_layers"])
ROLES = {"prediction": "state", "support": "support_state"}


@pytest.fixture(scope="module")
def means(swept):
    return xr.open_dataset(swept / "analysis" / "checkpoint_metrics.nc", engine="netcdf4").load()


def states(truth, step, role, stage, split=None):
    return np.stack([r[ROLES[role]][stage] for r in truth[step]["reads"] if split in (None, r["split"])])


def hsic(k, m):
    """The biased Hilbert-Schmidt independence criterion of two kernels, with an explicit centring matrix."""
    n = len(k)
    centre = np.eye(n) - np.ones((n, n)) / n
    return np.trace(k @ centre @ m @ centre)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("stage", ["layer_0_post_mlp", "final_norm"])
def test_event_drift_and_cka(means, truth, role, stage):
    for before, step, suffix in ((100, 200, ""), (300, 200, "_to_reference")):
        a, b = states(truth, step, role, stage), states(truth, before, role, stage)
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        at = {"step": step, "position_role": role, "stage": stage}
        ours = float(means[f"residual_event_drift{suffix}"].sel(split="all", **at))
        np.testing.assert_allclose(ours, np.mean(1 - cosines), rtol=1e-4, atol=1e-6)
        theirs = hsic(a @ a.T, b @ b.T) / np.sqrt(hsic(a @ a.T, a @ a.T) * hsic(b @ b.T, b @ b.T))
        np.testing.assert_allclose(float(means[f"residual_cka{suffix}"].sel(**at)), theirs, rtol=1e-4)
        a, b = (states(truth, s, role, stage, "structural_ood") for s in (step, before))
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        ours = float(means[f"residual_event_drift{suffix}"].sel(split="structural_ood", **at))
        np.testing.assert_allclose(ours, np.mean(1 - cosines), rtol=1e-4, atol=1e-6)


def test_what_does_not_exist_and_what_is_the_same(means):
    assert np.isnan(means["residual_event_drift"].sel(step=STEPS[0])).all()
    assert np.isnan(means["residual_cka"].sel(step=STEPS[0])).all()
    last = means.sel(step=STEPS[-1])
    assert float(abs(last["residual_event_drift_to_reference"]).max()) < 1e-6
    moving = last["residual_cka_to_reference"]
    np.testing.assert_allclose(moving, 1.0, atol=1e-5)


def test_movement_is_kept_and_made_again_when_a_neighbour_changes(small_run):
    first = sweep(small_run).dataset
    folder = small_run / "analysis" / "measured"
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob("movement_*")}
    assert len(written) == 2 * len(STEPS) - 1
    second = sweep(small_run).dataset
    assert written == {path.name: path.stat().st_mtime_ns for path in folder.glob("movement_*")}
    assert first["residual_cka"].equals(second["residual_cka"])
    (small_run / "checkpoints" / "step_000200.pt").unlink()
    third = sweep(small_run).dataset  # step 300 now follows step 100
    assert float(third["residual_event_drift"].sel(step=300, split="all", position_role="support")[2]) != float(
        second["residual_event_drift"].sel(step=300, split="all", position_role="support")[2]
    )


def test_states_are_formed_again_only_for_checkpoints_measured_before(small_run, monkeypatch):
    formed = []

    def count(*args):
        formed.append(args)
        return read_states(*args)

    monkeypatch.setattr(state_similarity, "read_states", count)
    at_once = sweep(small_run).dataset
    assert formed == []
    for path in (small_run / "analysis" / "measured").glob("movement_*"):
        path.unlink()
    again = sweep(small_run).dataset
    assert len(formed) == len(STEPS)
    for name in ("residual_event_drift", "residual_event_drift_to_reference", "residual_cka"):
        np.testing.assert_allclose(again[name], at_once[name], rtol=1e-4, atol=1e-6)


def test_without_event_drift_the_rest_is_the_same(small_run, swept):
    report = sweep(small_run, event_drift=False)
    assert "residual_cka" not in report.dataset and report.dataset["answer_accuracy"].size


def test_side_by_side_as_on_an_accelerator_moves_the_same(small_run, means, monkeypatch):
    as_here = compiled_sweep.plan_chunks
    monkeypatch.setattr(
        compiled_sweep,
        "plan_chunks",
        lambda *args, **given: as_here(*args, **given | {"backend": "gpu", "num_devices": 1}),
    )
    ours = sweep(small_run, ablations=("zero",), probe="none").dataset
    for name in ("residual_event_drift", "residual_event_drift_to_reference", "residual_cka"):
        np.testing.assert_allclose(ours[name], means[name], rtol=1e-4, atol=1e-6)


class Kept(dict):
    """Stands in for the store: which checkpoints were compared, and what was found."""

    def save(self, name, key, step, arrays, info):
        assert name not in self
        self[name] = arrays["cka"], step, info["other"]


@pytest.fixture(scope="module", params=["1", "2", "6"], ids=["one device", "two devices", "three for each"])
def reads(request, small_benchmark):
    """A probe set on the devices, for chunks of some number of checkpoints; and states of 7 checkpoints."""
    benchmark = Benchmark.open(small_benchmark)
    encoded = encode_records(benchmark.read_split("test_iid")[:6], benchmark.vocabulary, ["test_iid"], max_seq_len=64)
    config = DecoderConfig(
        vocab_size=len(benchmark.vocabulary.tokens), d_model=8, n_layers=1, n_heads=2, d_ff=12, max_seq_len=64
    )
    asked = SweepSettings(ablations=("zero",), probe="none", checkpoint_batch=request.param)
    program = ProbeProgram(config, benchmark.vocabulary, encoded, 1, asked)
    num_reads = sum(bucket.batches.is_read.size for bucket in program.buckets)
    rng = np.random.default_rng(0)
    return program, {f"step_{i}": rng.normal(size=(8, num_reads, 8)).astype(np.float32) for i in range(7)}


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(7)), st.integers(1, 7), st.sampled_from([None, 0, 3, 6]), st.data())
def test_whatever_arrives_when_each_is_compared_with_its_own_others(reads, order, number, reference, data):
    """Checkpoints arrive in any order, some never, in chunks of any size."""
    program, states = reads
    names, reference = list(states), reference if reference is None else f"step_{reference}"
    kept, waiting = Kept(), []
    watch = MovementWatch(names, reference, program, kept)
    on_devices = NamedSharding(checkpoint_mesh(program.devices), PartitionSpec(CHECKPOINT_AXIS))
    arriving, expected, at_hand = [names[i] for i in order[:number]], {}, set()
    others = {
        name: {"reference": reference, "previous": before} for name, before in zip(names, [None, *names], strict=False)
    }
    while arriving:
        size = data.draw(st.integers(1, min(program.chunk, len(arriving))))
        chunk, arriving = arriving[:size], arriving[size:]
        filled = [states[name] for name in [*chunk, *[chunk[-1]] * (program.chunk - size)]]
        named = [(name, types.SimpleNamespace(sha256=name, step=names.index(name))) for name in chunk]
        waiting.append(watch(named, jax.device_put(np.stack(filled), on_devices)))
        at_hand |= set(chunk)
        for name in at_hand:
            for kind, other in others[name].items():
                if other in at_hand:
                    expected[f"movement_{name}_{kind}"] = name, other
        at_hand &= {reference, chunk[-1]}
    for keep in waiting:
        keep()
    assert kept.keys() == expected.keys()
    batches = tuple(bucket.batches for bucket in program.buckets)
    for key, (name, other) in expected.items():
        found, step, of = kept[key]
        assert (names[step], of) == (name, other)
        theirs = linear_cka(states[name], states[other], state_similarity._counted(batches))
        np.testing.assert_allclose(found, theirs, rtol=1e-4)


def test_devices_share_one_program(small_run):
    """Compared where each checkpoint's states are, one after another, every device would compile its own."""
    programs = (
        movement_watch._spread_of_checkpoints,
        movement_watch._movement_of_pairs,
        state_similarity.spread_of_states,
        state_similarity.movement,
    )
    for program in programs:
        program.clear_cache()
    report = sweep(small_run)
    assert len(report.log.later_call_seconds) == 1, "two calls, the second filled up"
    assert [program._cache_size() for program in programs] == [1, 1, 0, 0]
