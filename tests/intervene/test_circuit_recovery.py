"""The planted circuit is what the engine finds: every true node, path and position, and no other."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from kvjax.intervene.inputs import InterventionInputs
from kvjax.intervene.kinds import find_kind
from kvjax.intervene.paths import all_edges
from kvjax.intervene.places import component_places, stage_places
from kvjax.model.components import Component
from kvjax.task.benchmark import Benchmark
from kvjax.task.corruption import PAIR_KINDS, PAIR_ROLES
from kvjax.task.encoding import encode_records
from kvjax.task.pair_encoding import encode_clean_streams, encode_pairs
from kvjax.task.pairs import generate_pairs
from kvjax.task.probe_set import generate_probe_set
from tests.oracles.known_circuit import (
    GATE,
    N_HEADS,
    N_LAYERS,
    PLANTED_NODES,
    SHOWN_EDGES,
    SHOWN_NODES,
    SHOWN_ROLES,
    known_circuit,
)

METRIC = "logit_difference"
TRUE, FALSE = 0.98, 0.02  # recovery of the planted and of everything else
SITES = {
    "query": "query_input",
    "key": "key_input",
    "value": "value_input",
    "mlp": "mlp_input",
    "logits": "logits_input",
}


@pytest.fixture(scope="module")
def inputs(small_benchmark, tmp_path_factory):
    """The planted model as a window of one checkpoint."""
    benchmark = Benchmark.open(small_benchmark)
    circuit = known_circuit(benchmark.vocabulary)
    path = tmp_path_factory.mktemp("circuit") / "probe_set.jsonl"
    probe = generate_probe_set(benchmark, path, examples_per_split=12, fit_examples=40, seed=2)
    pairs = generate_pairs(probe, benchmark, pairs_per_kind=6).pairs
    longest = circuit.config.max_seq_len
    clean, clean_rows = encode_clean_streams(pairs, benchmark.vocabulary, max_seq_len=longest)
    return InterventionInputs(
        config=circuit.config,
        vocabulary=benchmark.vocabulary,
        steps=(100,),
        stacked=jax.tree.map(lambda x: x[None], circuit.params),
        encoded=encode_pairs(pairs, benchmark.vocabulary, max_seq_len=longest),
        pair_ids=tuple(pair.pair_id for pair in pairs),
        clean=clean,
        clean_rows=clean_rows,
        fit=encode_records(probe.fit_records, benchmark.vocabulary, ["train"], max_seq_len=longest),
        records=encode_records(probe.records, benchmark.vocabulary, probe.manifest.splits, max_seq_len=longest),
        components=tuple(
            Component(node.layer, node.head if node.kind == "head" else None) for node in PLANTED_NODES.values()
        ),
        devices=1,
        tokens_per_batch=2000,
        record_tokens_per_batch=900,
    )


def _name(node):
    return f"L{node.layer}.mlp" if node.kind == "mlp" else f"L{node.layer}H{node.head}"


def check(recovery, is_true, what):
    for statistic in recovery["statistic"].values:
        value = float(recovery.sel(statistic=statistic))
        assert (TRUE < value < 2 - TRUE) if is_true else abs(value) < FALSE, (what, statistic, value)


@pytest.fixture(scope="module")
def patched(inputs):
    return find_kind("activation_patching").analyse(inputs)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_nodes_and_stages(patched, inputs, kind, direction):
    """Activation patching shows every planted component and holder, and no other."""
    recovery = patched.dataset["recovery_by_role"].sel(metric=METRIC, pair_kind=kind, direction=direction, step=100)
    shown = {_name(node) for node in SHOWN_NODES[kind]}
    for name in component_places(N_LAYERS, N_HEADS):
        check(recovery.sel(place=name, position_role="all"), name in shown, name)
    for stage, holder in SHOWN_ROLES[kind].items():
        for role in PAIR_ROLES[1:]:
            if not (inputs.encoded.roles[inputs.groups.members[kind]] == PAIR_ROLES.index(role)).any():
                assert recovery.sel(place=stage, position_role=role).isnull().all(), "no such positions, no number"
                continue
            check(recovery.sel(place=stage, position_role=role), role == holder, (stage, role))
        check(recovery.sel(place=stage, position_role="before"), False, (stage, "before"))
        check(recovery.sel(place=stage, position_role="all"), True, (stage, "all"))
    assert patched.summary["controls"]["largest_effect_before_the_change_in_logits"] < 1e-3


@pytest.mark.parametrize("run", ["clean", "corrupted"])
@pytest.mark.parametrize("of", ["clean", "corrupted"])
def test_baseline_accuracies(patched, inputs, run, of):
    """PyTorch, one read at a time, answers as often as in one stream or the other as the baseline of a run says."""
    module = known_circuit(inputs.vocabulary).torch_module()
    encoded = inputs.encoded
    tokens = encoded.clean_tokens if run == "clean" else encoded.corrupted_tokens
    answers = encoded.clean_answers if of == "clean" else encoded.corrupted_answers
    with torch.no_grad():
        predicted = module(torch.tensor(tokens).long()).argmax(dim=-1).numpy()
    for code, kind in enumerate(PAIR_KINDS):
        reads = [(n, q) for n, q in zip(*np.nonzero(encoded.is_affected), strict=True) if encoded.kinds[n] == code]
        right = [predicted[n, encoded.prediction_positions[n, q]] == answers[n, q] for n, q in reads]
        found = patched.summary["baseline"][run][kind]["100"][f"{of}_answer_accuracy"]["estimate"]
        assert found == pytest.approx(np.mean(right), abs=1e-6)
        assert np.mean(right) == (run == of), "the planted circuit solves every stream"


def test_changed_position(patched, inputs):
    """For value pairs the changed token alone carries the value through the first layers."""
    single = (
        patched.dataset["metric_by_position"]
        .sel(metric=METRIC, direction="denoising", step=100, place="layer_0_post_mlp")
        .values
    )
    base = patched.dataset["metric_corrupted"].sel(metric=METRIC, step=100).values
    clean = patched.dataset["metric_clean"].sel(metric=METRIC, step=100).values
    encoded = inputs.encoded
    for n in np.flatnonzero(encoded.kinds == PAIR_KINDS.index("value")):
        share = (single[n] - base[n]) / (clean[n] - base[n])
        written = np.flatnonzero(encoded.roles[n] == PAIR_ROLES.index("changed"))
        assert len(written) == 1 and share[written[0]] > TRUE
        assert np.abs(np.delete(share, written)).max() < FALSE


@pytest.fixture(scope="module")
def paths(inputs):
    return find_kind("path_patching").analyse(inputs).dataset


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_paths(paths, kind, direction):
    """Path patching shows every planted path, and no other."""
    shown = {
        (s.kind if s.kind == "embedding" else _name(s), SITES[r.kind], r.layer or 0, r.head or 0)
        for s, r in SHOWN_EDGES[kind]
    }
    found = paths["recovery"].sel(metric=METRIC, pair_kind=kind, direction=direction, step=100)
    for index, edge in enumerate(all_edges(N_LAYERS, N_HEADS)):
        receiver = edge.receiver
        key = (edge.sender.name, receiver.site, receiver.layer, receiver.head)
        check(found.isel(path=index), key in shown, edge)


def test_planted_set(inputs):
    """The planted set is faithful, complete and minimal; role means leave what the gate writes: the kind of a token."""
    dataset = find_kind("necessity").analyse(dataclasses.replace(inputs, rank_by="mean")).dataset.sel(step=100)
    for baseline in ("mean", "role_mean", "resample"):
        own = dataset.sel(baseline=baseline, statistic="estimate")
        for kind in PAIR_KINDS:
            assert abs(float(own["faithfulness_of_named_set"].sel(pair_kind=kind)) - 1) < 0.05, (baseline, kind)
    for baseline in ("mean", "role_mean"):
        own = dataset.sel(baseline=baseline, statistic="estimate")
        for kind in PAIR_KINDS:
            assert abs(float(own["completeness_of_named_set"].sel(pair_kind=kind))) < 0.05
            for node in PLANTED_NODES.values():
                lost = float(own["minimality"].sel(pair_kind=kind, component=_name(node)))
                assert abs(lost) < 1e-3 if (baseline, node) == ("role_mean", GATE) else lost > 0.3, (kind, node)
            curve = own["faithfulness"].sel(pair_kind=kind).values
            assert abs(curve[0]) < 1e-6 and abs(curve[-1] - 1) < 1e-6
            assert abs(own["completeness"].sel(pair_kind=kind).values[0] - 1) < 1e-6
        outside = set(component_places(N_LAYERS, N_HEADS)) - {_name(node) for node in PLANTED_NODES.values()}
        assert np.isnan(own["minimality"].sel(component=sorted(outside))).all()
    cost = dataset["cost_alone"]
    assert float(cost.sel(component=_name(GATE))) > 1, "its mean ablation alone costs logits"


def test_ranking_by_role_means(inputs):
    """By default components are ranked by their role means, under which the gate costs nothing."""
    outcome = find_kind("necessity").analyse(inputs)
    cost = outcome.dataset["cost_alone"].sel(step=100)
    assert abs(float(cost.sel(component=_name(GATE)))) < 1e-2
    carriers = {_name(node) for node in PLANTED_NODES.values() if node != GATE}
    assert set(outcome.dataset["ranking"].sel(step=100).values[:3].tolist()) == carriers
    assert outcome.summary["ranked_by"] == "role_mean"
    assert outcome.dataset["baseline"].values.tolist() == ["zero", "role_mean", "resample"]


def test_own_states(inputs):
    """A checkpoint run on with its own states is unchanged."""
    outcome = find_kind("across_checkpoints").analyse(inputs)
    assert outcome.summary["controls"]["largest_effect_of_own_states_in_logits"] < 1e-3
    assert outcome.dataset.sizes["stage"] == len(stage_places(N_LAYERS))
    lines = printed("across_checkpoints", outcome)
    assert lines[-1].split() == ["final_norm", *("1.00", "[1.00,", "1.00]") * 2], "the circuit answers every read"


def printed(kind, outcome):
    """Writes the lines of a summary."""
    document = {"pairs": {"counts": dict.fromkeys(PAIR_KINDS, 6)}, "steps": [100], "window": {}}
    return find_kind(kind).summary_lines(document | outcome.summary)


def test_subspaces(inputs):
    """Exchanging everything at p_e late is exchanging the run; before the retriever p_e knows nothing of the value."""
    outcome = find_kind("subspaces").analyse(inputs)
    assert not any("FAILS" in line for line in printed("subspaces", outcome)), "every kind of pair has a gap"
    circuit_loss = outcome.dataset["loss"].sel(metric=METRIC, statistic="estimate", step=100)
    loss = circuit_loss.sel(pair_kind="value")
    late = loss.sel(stage="layer_2_post_mlp", position_role="prediction", subspace="probe")
    early = loss.sel(stage="layer_1_post_mlp", position_role="prediction")
    assert float(late.sel(operation="exchanged").isel(subspace_rank=-1)) > 0.9
    assert float(abs(early.sel(operation="exchanged")).max()) < FALSE
    at_write = loss.sel(stage="layer_1_post_mlp", position_role="support", subspace="probe", operation="exchanged")
    assert float(at_write.isel(subspace_rank=-1)) > 0.9
    bound = circuit_loss.sel(pair_kind="swap", stage="layer_0_post_mlp", position_role="support", operation="exchanged")
    assert float(abs(bound).max()) < FALSE, "before the binder the value's position knows nothing of its key"
    random = loss.sel(stage="layer_2_post_mlp", position_role="prediction", subspace="random", operation="exchanged")
    assert float(random.sel(subspace_rank=4)) < 0.3
