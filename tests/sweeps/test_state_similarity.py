"""Drift of single reads' states and CKA against PyTorch's states and the textbook formulas; logistic probes."""

import itertools
import types
import weakref

import jax
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.artifacts.checkpoint_sums import CheckpointResult, ResultStore
from kvjax.artifacts.layout import step_name
from kvjax.execution.states_at_reads import ReadStates, rows_of_splits
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.sites import stage_names
from kvjax.sweeps import compiled_sweep, state_similarity
from kvjax.sweeps.compiled_sweep import CompiledSweep
from kvjax.sweeps.settings import SweepSettings
from kvjax.sweeps.state_similarity import ArrivingStates, Similarities
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


def cka(a, b):
    """Linear CKA of two checkpoints' states, [reads, D]."""
    return hsic(a @ a.T, b @ b.T) / np.sqrt(hsic(a @ a.T, a @ a.T) * hsic(b @ b.T, b @ b.T))


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("stage", ["layer_0_post_mlp", "final_norm"])
def test_event_drift_and_cka(means, truth, role, stage):
    """Event drift and linear CKA equal the textbook formulas on PyTorch's states."""
    for before, step, suffix in ((100, 200, ""), (300, 200, "_to_reference")):
        a, b = states(truth, step, role, stage), states(truth, before, role, stage)
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        at = {"step": step, "position_role": role, "stage": stage}
        ours = float(means[f"residual_event_drift{suffix}"].sel(split="all", **at))
        np.testing.assert_allclose(ours, np.mean(1 - cosines), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(float(means[f"residual_cka{suffix}"].sel(split="all", **at)), cka(a, b), rtol=1e-4)
        a, b = (states(truth, s, role, stage, "structural_ood") for s in (step, before))
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        ours = float(means[f"residual_event_drift{suffix}"].sel(split="structural_ood", **at))
        np.testing.assert_allclose(ours, np.mean(1 - cosines), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", ["layer_0_post_mlp", "final_norm"])
def test_cka_by_split(means, truth, stage):
    """Linear CKA of every split equals the textbook formula on the PyTorch states of its reads."""
    for role, split in itertools.product(ROLES, means["split"].values[1:].tolist()):
        for before, step, suffix in ((100, 200, ""), (300, 200, "_to_reference")):
            a, b = states(truth, step, role, stage, split), states(truth, before, role, stage, split)
            ours = means[f"residual_cka{suffix}"].sel(step=step, position_role=role, stage=stage, split=split)
            np.testing.assert_allclose(float(ours), cka(a, b), rtol=1e-4)


def test_missing_and_equal_states(means):
    """The first checkpoint has no drift; the reference has none to itself."""
    assert np.isnan(means["residual_event_drift"].sel(step=STEPS[0])).all()
    assert np.isnan(means["residual_cka"].sel(step=STEPS[0])).all()
    last = means.sel(step=STEPS[-1])
    assert float(abs(last["residual_event_drift_to_reference"]).max()) < 1e-6
    moving = last["residual_cka_to_reference"]
    np.testing.assert_allclose(moving, 1.0, atol=1e-5)


def test_reuse_of_comparisons(small_run):
    """Comparisons are reused, and made again if a neighbour changes."""
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


@pytest.fixture
def formed(monkeypatch):
    """How many checkpoints' states are formed again, chunk by chunk, padding included."""
    counts = []
    form = state_similarity.states_of_checkpoints

    def counted(spec, stacked, *records):
        counts.append(len(jax.tree.leaves(stacked)[0]))
        return form(spec, stacked, *records)

    monkeypatch.setattr(state_similarity, "states_of_checkpoints", counted)
    return counts


COMPARED = (
    *("residual_event_drift", "residual_event_drift_to_reference", "residual_cka", "residual_cka_to_reference"),
    *("weight_change", "weight_change_from_first", "weight_update_cosine"),
    *("head_direction_overlap", "head_direction_overlap_to_reference"),
)


def test_states_of_checkpoints_measured_before(small_run, formed):
    """States are formed again only for these, and only if a comparison is missing."""
    at_once = sweep(small_run).dataset
    assert formed == []
    lost, *older = (small_run / "analysis" / "measured").glob("movement_*")
    lost.unlink()
    for path in older:  # as a version wrote them that compared all reads alone
        with np.load(path) as stored:
            kept = {name: stored[name] for name in stored.files if name != "split_cka"}
        assert len(kept) == len(stored.files) - 1
        np.savez(path, **kept)
    again = sweep(small_run).dataset
    assert sum(formed) == len(STEPS) + 1, "two calls for two checkpoints each, the second padded"
    for name in COMPARED:
        np.testing.assert_allclose(again[name], at_once[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("order", [("300", "100", "200"), ("100,300", "200"), ("200", "100,300")])
def test_comparisons_of_steps_measured_in_any_order(small_run, means, order):
    """A checkpoint is compared with the one before it in the tables, whichever sweep measured either."""
    for steps in order:
        found = sweep(small_run, steps=steps, ablations=("zero",), probe="none").dataset
    assert found["step"].values.tolist() == list(STEPS)
    for name in COMPARED:
        np.testing.assert_allclose(found[name], means[name], rtol=1e-4, atol=1e-6)


def test_a_reference_in_the_middle(small_run, means):
    """Its comparison with its own previous checkpoint, and that of the next with it, are not lost."""
    found = sweep(small_run, reference="200", ablations=("zero",), probe="none").dataset
    for name in ("residual_event_drift", "residual_cka"):
        np.testing.assert_allclose(found[name], means[name], rtol=1e-4, atol=1e-6)
    before = found["residual_cka"].sel(step=200)
    np.testing.assert_allclose(found["residual_cka_to_reference"].sel(step=100), before, rtol=1e-4)


def test_overwrite(small_run):
    """`--overwrite` takes neither stored comparisons nor stored logistic probes, whether it asks for these or not."""
    asked = {"steps": "200,300", "ablations": ("zero",), "probe": "logistic"}
    sweep(small_run, **asked)
    folder = small_run / "analysis" / "measured"
    stored = [*folder.glob("movement_*"), *folder.glob("logistic_*"), *folder.glob("weights_*")]
    assert len(stored) == 7
    written = {path: path.stat().st_mtime_ns for path in stored}
    sweep(small_run, **asked)
    assert written == {path: path.stat().st_mtime_ns for path in stored}
    sweep(small_run, **(asked | {"probe": "ridge"}), overwrite=True)
    assert all(path.stat().st_mtime_ns > before for path, before in written.items())


def test_overwrite_of_a_step_alone(small_run):
    """The reference is measured anew too, and compared anew with the checkpoint before it, which is not."""
    sweep(small_run, ablations=("zero",), probe="none")
    folder = small_run / "analysis" / "measured"
    before, last = (step_name(step) for step in STEPS[-2:])
    kept, written = [folder / f"{before}.npz", folder / f"movement_{before}_reference.npz"], []
    for overwrite in (False, True):
        sweep(small_run, ablations=("zero",), probe="none", steps=str(STEPS[0]), overwrite=overwrite)
        paths = [*kept, folder / f"movement_{last}_previous.npz"]
        written.append([path.stat().st_mtime_ns for path in paths])
    assert written[0][:2] == written[1][:2] and written[0][2] < written[1][2]


def _differ(value):
    return {"event_drift": np.full((1, 4), value), "split_cka": np.full((2, 4), value)}


def test_pairs_of_equal_files(tmp_path):
    """All comparisons of checkpoints with equal bytes are stored, and what was compared is not kept in memory."""
    one, two, reference = (
        (name, CheckpointResult(step, {}, {"sha256": sha256}))
        for step, name, sha256 in ((1, "one", "a"), (2, "two", "a"), (3, "reference", "r"))
    )
    found = {frozenset(pair): _differ(value) for pair, value in (("ar", 0.5), ("a", 0.0), ("r", 0.25))}
    alive = [weakref.ref(x) for arrays in found.values() for x in arrays.values()]
    in_order = [(one, None), (two, one), (reference, two)]
    known = Similarities(ResultStore(tmp_path, {}))
    known.store_chunk(found.items(), in_order, reference)
    del found
    assert [x() for x in alive] == [None] * 6
    known.store_all(in_order, reference)
    for named, kind, other, value in (
        (one, "reference", reference, 0.5),
        (two, "reference", reference, 0.5),
        (reference, "reference", reference, 0.25),
        (two, "previous", one, 0.0),
        (reference, "previous", two, 0.5),
    ):
        assert known.of(named, kind, other)["split_cka"][0, 0] == value


def test_sweep_without_event_drift(small_run, means):
    """Without event drift a sweep has no drift of events and no CKA, and the same values of everything else."""
    ours = sweep(small_run, ablations=("zero",), probe="none", event_drift=False).dataset
    of_states = {name for name in means.data_vars if name.startswith(("residual_event_drift", "residual_cka"))}
    assert of_states and not of_states & set(ours.data_vars)
    assert {"answer_accuracy", "residual_drift", "head_accuracy_drop"} <= set(ours.data_vars)
    by_rank = {
        f"{level}_{of}"
        for level in ("head", "mlp")
        for of in ("rank", "rank_change", "rank_correlation_prev", "turnover")
    }
    assert by_rank < set(ours.data_vars)
    for name, variable in ours.drop_vars(
        by_rank
    ).data_vars.items():  # ranks here are by zero ablation, there by role mean
        expected = means[name].sel(ablation=["zero"]) if "ablation" in variable.dims else means[name]
        np.testing.assert_allclose(variable, expected, rtol=1e-4, atol=1e-6, err_msg=name)


def test_side_by_side(small_run, means, monkeypatch):
    """Checkpoints side by side, as on an accelerator, give the same comparisons."""
    as_here = compiled_sweep.plan_chunks
    monkeypatch.setattr(
        compiled_sweep,
        "plan_chunks",
        lambda *args, **given: as_here(*args, **given | {"backend": "gpu", "num_devices": 1}),
    )
    ours = sweep(small_run, ablations=("zero",), probe="none").dataset
    for name in ("residual_event_drift", "residual_event_drift_to_reference", "residual_cka"):
        np.testing.assert_allclose(ours[name], means[name], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module", params=["1", "2", "6"], ids=["one device", "two devices", "three for each"])
def reads(request, small_benchmark):
    """A probe set on the devices, for chunks of some number of checkpoints; and states of 7 checkpoints."""
    benchmark = Benchmark.open(small_benchmark)
    encoded = encode_records(benchmark.read_split("test_iid")[:6], benchmark.vocabulary, ["test_iid"], max_seq_len=64)
    config = DecoderConfig(
        vocab_size=len(benchmark.vocabulary.tokens), d_model=8, n_layers=1, n_heads=2, d_ff=12, max_seq_len=64
    )
    asked = SweepSettings(ablations=("zero",), probe="none", checkpoint_batch=request.param)
    program = CompiledSweep(config, benchmark.vocabulary, encoded, 1, asked)
    num_reads = sum(bucket.batches.is_read.size for bucket in program.buckets)
    rows = rows_of_splits(program.buckets, 1)
    rng, of = np.random.default_rng(0), jax.jit(ReadStates.of)  # one program for all
    drawn = {f"step_{i}": rng.normal(size=(8, num_reads, 8)).astype(np.float32) for i in range(7)}
    return program, {name: jax.device_get(of(x, rows)) for name, x in drawn.items()}, rows[0]


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(7)), st.integers(1, 7), st.sampled_from([None, 0, 3, 6]), st.data())
def test_pairs_of_arriving_checkpoints(reads, order, number, reference, data):
    """Each is compared with the one that arrived before it, and with the first if that is the reference.

    Checkpoints arrive in any order, some never, in chunks of any size.
    """
    sweep, states, rows = reads
    names = list(states)
    order = [names[i] for i in order[:number]]
    arriving = ArrivingStates(sweep, reference if reference is None else names[reference])
    waiting, rest = [], order
    while rest:
        size = data.draw(st.integers(1, min(sweep.chunk, len(rest))))
        chunk, rest = rest[:size], rest[size:]
        padded = [states[name] for name in [*chunk, *[chunk[-1]] * (sweep.chunk - size)]]
        stacked = jax.tree.map(lambda *each: np.stack(each), *padded)
        on_devices = jax.device_put(stacked, sweep.spec.placement.split)
        waiting.append((chunk, arriving.dispatch(chunk[0], on_devices)))
    found = {}
    for chunk, compared in waiting:
        named = [(name, types.SimpleNamespace(sha256=name)) for name in chunk]
        found.update(arriving.pairs(named, jax.device_get(compared)))
    expected = {frozenset(pair) for pair in itertools.pairwise(order)}
    if reference is not None and order[0] == names[reference]:
        expected |= {frozenset({name, order[0]}) for name in order}
    assert found.keys() == expected
    for pair, arrays in found.items():
        one, other = (states[name].values for name in (*pair, *pair)[:2])
        theirs = [cka(a[rows], b[rows]) for a, b in zip(one.astype(float), other.astype(float), strict=True)]
        np.testing.assert_allclose(arrays["split_cka"], [theirs, theirs], rtol=1e-4)


def test_programs_of_several_devices(small_run):
    """Compared where each checkpoint's states are, one after another, every device would compile its own."""
    programs = (state_similarity.compare, state_similarity.states_of_checkpoints)
    for program in programs:
        program.clear_cache()
    report = sweep(small_run)
    assert len(report.log.later_call_seconds) == 1, "two calls, the second filled up"
    assert [program._cache_size() for program in programs] == [1, 0]
