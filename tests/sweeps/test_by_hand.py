"""Two sequences, two checkpoints, one layer of two heads: every mean of a row worked out by hand."""

import numpy as np
import pytest

from kvjax.artifacts.tables import row_schema
from kvjax.config.run import BirthThresholds, Stabilization
from kvjax.measure import registry
from kvjax.sweeps.dataset import build_dataset
from kvjax.sweeps.intervals import build_intervals
from kvjax.sweeps.probe_index import ProbeIndex
from kvjax.sweeps.rows import checkpoint_rows, head_rows, mlp_rows, stabilized_from, stable_checkpoints
from kvjax.task.benchmark import Benchmark
from kvjax.task.encoding import encode_records

SPLITS = ("validation_iid", "heldout_pairs")
STAGES = ("embedding", "layer_0_post_attn", "layer_0_post_mlp", "final_norm")
NAN = np.nan
SELECTIVITIES = ("key_selectivity", "key_selectivity_null", "recency_selectivity")


@pytest.fixture(scope="module")
def probe(small_benchmark):
    """A sequence of 3 reads and one of 4."""
    benchmark = Benchmark.open(small_benchmark)
    chosen = [
        next(r for r in benchmark.read_split(split) if len(r["query_events"]) == reads)
        for split, reads in zip(SPLITS, (3, 4), strict=True)
    ]
    encoded = encode_records(chosen, benchmark.vocabulary, SPLITS, max_seq_len=64)
    difficulty = {chosen[0]["sample_id"]: "easy", chosen[1]["sample_id"]: "hard"}
    return ProbeIndex.of(chosen, encoded, SPLITS, difficulty)


@pytest.fixture(scope="module")
def arrays(probe):
    """What the device would have summed: [checkpoint, sequence, …]."""

    def per_read(first, second):
        return np.array([[[*a, NAN][:4], b] for a, b in (first, second)], np.float32)

    def both(values):
        return np.array(values, np.float32)

    correct = per_read(([1, 0, 0], [0, 0, 0, 0]), ([1, 1, 1], [1, 0, 0, 1]))
    roles = probe.encoded.token_roles
    targets = np.stack([(roles[:, 1:] == role).sum(axis=1) for role in range(7)], axis=1)
    stages = np.arange(4)
    arrays = {
        "read/correct": np.nan_to_num(correct).astype(bool),
        "read/margin": per_read(([1, -1, -3], [-2, -2, -4, -4]), ([5, 3, 1], [2, -1, -1, 4])),
        "read/answer_loss": per_read(([3, 2, 1], [5] * 4), ([1, 0, 2], [1, 1, 2, 0])),
        "read/answer_logit": per_read(([1] * 3, [2] * 4), ([4] * 3, [6] * 4)),
        "read/answer_logit_centred": per_read(([0] * 3, [1] * 4), ([2] * 3, [3] * 4)),
        # No competitor is known of the second sequence.
        "read/fixed_margin": per_read(([-1, 0, 1], [NAN] * 4), ([2, 3, 7], [NAN] * 4)),
        "read/entropy": per_read(([3, 3, 3], [4, 4, 4, 4]), ([1, 1, 1], [2, 2, 2, 2])),
        "read/confidence": per_read(([0.1] * 3, [0.2] * 4), ([0.8] * 3, [0.1] * 4)),
        "read/q": per_read(([0.5] * 3, [0.5] * 4), ([0.5] * 3, [0.5] * 4)),
        "read/r": per_read(([0.1] * 3, [0.1] * 4), ([0.7] * 3, [0.0] * 4)),
        # A read whose heads attend to no value has no selectivity.
        "read/key_selectivity": per_read(([0.6, NAN, 0.8], [NAN] * 4), ([0.9] * 3, [0.2] * 4)),
        "read/key_selectivity_null": per_read(([NAN, 0.2, 0.4], [NAN] * 4), ([0.1] * 3, [NAN] * 4)),
        "read/recency_selectivity": per_read(([0.5, NAN, NAN], [NAN] * 4), ([1.0] * 3, [0.5] * 4)),
        "token/loss": both([[60, 90], [30, 45]]),
        "token/role_correct": np.stack([targets * 0, targets]),
        "head/zero/correct": both([[[[1, 1]], [[0, 0]]], [[[0, 3]], [[1, 2]]]]),
        "head/zero/margin": both([[[[-3, -3]], [[-12, -12]]], [[[2, 9]], [[-3, 4]]]]),
        "mlp/zero/correct": both([[[1], [0]], [[3], [0]]]),
        "mlp/zero/margin": both([[[-3], [-12]], [[9], [-10]]]),
        "mlp/write_norm": both([[[6], [8]], [[9], [12]]]),
        "mlp/write_norm_support": both([[[3], [4]], [[3], [4]]]),
        # Sums of states over reads, [checkpoint, split, stage, 2].
        "state/prediction": np.array([[[[1, 0]] * 4, [[0, 1]] * 4], [[[0, 1]] * 4, [[0, 1]] * 4]], float),
        "state/support": np.array([[[[1, 0]] * 4, [[1, 0]] * 4]] * 2, float),
        # W_QK has singular values 4 and 3, W_OV 2 and 0; the tensor groups' squared norms are 50, 0 and nine times 1.
        "weights/singular_values": np.array([[[[[4, 3]] * 2], [[[2, 0]] * 2]]] * 2, float),
        "weights/fc_in_norm": np.array([[1], [2]], float),
        "weights/fc_out_norm": np.array([[3], [4]], float),
        "weights/squared_norm": np.array([[50, 0, *[1] * 9, NAN]] * 2, float),
    }
    lens = [m.sources[0] for m in registry.MEASURES if m.name.startswith("lens_")]
    for index, source in enumerate(lens):
        arrays[source] = np.stack([np.tile(stages, (2, 1)), np.tile(stages + index, (2, 1))]).astype(np.float32)
    for measure in registry.MEASURES:
        if (
            measure.level == "head"
            and measure.name.startswith("head_")
            and measure.is_ratio
            and "ablation" not in measure.own_axes
        ):
            arrays[measure.sources[0]] = both([[[[0.3, 0.6]], [[0.4, 0.8]]], [[[1.5, 0.0]], [[2.0, 4.0]]]])
    # At the first checkpoint one read of the first sequence counts, and none of the second head's.
    defined = both([[[[1, 0]], [[0, 0]]], [[[3, 2]], [[4, 4]]]])
    arrays |= {f"head/{name}_defined": defined for name in SELECTIVITIES}
    for term in ("embedding", "final_norm_bias"):
        arrays[f"attribution/{term}"] = both([[3, 4], [6, 8]])
    for term in ("head", "attn_bias", "mlp"):
        shape = (1, 2) if term == "head" else (1,)
        arrays[f"attribution/{term}"] = np.full((2, 2, *shape), 7.0, np.float32)
    return arrays


@pytest.fixture(scope="module")
def dataset(arrays, probe):
    return means_of(arrays, probe, "zero")


@pytest.fixture(scope="module")
def intervals(arrays, probe):
    return build_intervals(arrays, [100, 300], probe)


@pytest.fixture(scope="module")
def rows(dataset, intervals):
    return rows_of(dataset, intervals)


def means_of(arrays, probe, ranked_by):
    reference = {name: x[1] for name, x in arrays.items()}
    moved, overlap = np.array([2.0, *[1.0] * 8, 5.0, 0.0, NAN]), np.full((2, 1, 2), 0.25)
    weights = [
        {"distance/first": 0 * moved, "overlap/reference": overlap},
        {
            "distance/first": moved,
            "distance/previous": moved,
            "overlap/previous": overlap,
            "overlap/reference": 4 * overlap,
        },
    ]
    return build_dataset(arrays, [100, 300], probe, reference=reference, weights=weights, ranked_by=ranked_by)


def rows_of(dataset, intervals):
    return checkpoint_rows(
        dataset,
        intervals,
        run_name="by_hand",
        seed=1,
        thresholds=BirthThresholds(answer_accuracy=0.9, q=0.6, r=0.65, w=2.0),
        stabilized=stabilized_from(
            stable_checkpoints(dataset, Stabilization(residual_drift=10.0, head_rank_correlation=0.5))
        ),
    )


def test_behaviour(rows):
    """Rates, margins and losses, by hand."""
    first, last = rows
    assert first["answer_accuracy"] == pytest.approx(1 / 7) and last["answer_accuracy"] == pytest.approx(5 / 7)
    assert last["split_accuracy"] == {"validation_iid": 1.0, "heldout_pairs": 0.5}
    assert first["heldout_answer_accuracy"] == 0.0 and last["delta_heldout_answer_accuracy"] == 0.5
    assert first["answer_margin"] == pytest.approx(-15 / 7) and last["answer_margin"] == pytest.approx(13 / 7)
    assert last["w"] == last["answer_margin"] and last["delta_w"] == pytest.approx(4.0)
    summary = last["answer_margin_summary"]
    margins = [5, 3, 1, 2, -1, -1, 4]
    assert summary["p50"] == 2 and summary["share_positive"] == pytest.approx(5 / 7)
    assert summary["std"] == pytest.approx(np.sqrt(sum((m - 13 / 7) ** 2 for m in margins) / 7))
    assert first["answer_entropy"] == pytest.approx(25 / 7) and last["answer_entropy"] == pytest.approx(11 / 7)
    assert first["answer_loss"] == pytest.approx(26 / 7) and last["delta_answer_loss"] == pytest.approx(-19 / 7)
    assert last["answer_logit"] == pytest.approx(36 / 7) and last["answer_logit_centred"] == pytest.approx(18 / 7)
    assert first["fixed_margin"] == 0.0 and last["fixed_margin"] == 4.0 and last["delta_fixed_margin"] == 4.0
    assert last["split_metrics"]["heldout_pairs"]["fixed_margin"] is None
    assert last["answer_confidence"] == pytest.approx((2.4 + 0.4) / 7)
    assert last["q"] == pytest.approx(0.5) and last["r"] == pytest.approx(2.1 / 7)
    # Two of seven reads have a key selectivity at the first checkpoint, one a recency selectivity.
    assert first["key_selectivity"] == pytest.approx(0.7) and first["recency_selectivity"] == pytest.approx(0.5)
    assert first["split_metrics"]["heldout_pairs"]["key_selectivity"] is None
    assert first["key_selectivity_null"] == pytest.approx(0.3) and last["key_selectivity_null"] == pytest.approx(0.1)
    assert last["key_selectivity"] == pytest.approx(3.5 / 7) and last["delta_key_selectivity"] == pytest.approx(-0.2)
    assert last["difficulty_accuracy"] == {"easy": 1.0, "hard": 0.5}
    assert last["split_difficulty_accuracy"]["heldout_pairs"] == {"easy": None, "hard": 0.5}
    # Only the first sequence, which is easy, is of the training distribution.
    assert first["easy_iid_accuracy"] == pytest.approx(1 / 3) and last["hard_iid_accuracy"] is None
    # Half of the held-out reads are answered at the last step, which is the default threshold.
    held, not_held = {"heldout_answer_accuracy": True}, {"heldout_answer_accuracy": False}
    assert last["birth_flags"] == {"answer_accuracy": True, "q": False, "r": True, "w": True} | held
    assert first["birth_flags"] == {"answer_accuracy": False, "q": False, "r": False, "w": False} | not_held
    assert first["delta_answer_accuracy"] is None and last["delta_answer_accuracy"] == pytest.approx(4 / 7)


def test_run_without_seed_and_thresholds(dataset, intervals):
    """A run that records neither has null for its seed, and flags of the thresholds it has alone."""
    made = checkpoint_rows(
        dataset, intervals, run_name="by_hand", seed=None, thresholds=BirthThresholds(q=0.3), stabilized=[{}, {}]
    )
    for row in made:
        reached = row["split_metrics"]["validation_iid"]["q"] >= 0.3
        held = row["split_metrics"]["heldout_pairs"]["answer_accuracy"] >= 0.5
        expected = {"answer_accuracy": None, "heldout_answer_accuracy": held, "q": reached, "r": None, "w": None}
        assert row["birth_flags"] == expected
        assert row_schema("checkpoint").model_validate(row).seed is None


def test_slices(rows, probe):
    """Accuracies of slices, by hand."""
    last = rows[1]
    assert probe.axis_values["num_queries"][:, 0].tolist() == [3, 4]
    assert last["slice_accuracy"]["num_queries"] == {"3": 1.0, "4": 0.5}
    assert last["slice_count"]["num_queries"] == {"3": 3, "4": 4}


def test_tokens(rows, probe):
    """Token accuracies by role, by hand."""
    targets = int((probe.encoded.token_roles[:, 1:] >= 0).sum())
    assert rows[0]["loss"] == pytest.approx(150 / targets) and rows[1]["loss"] == pytest.approx(75 / targets)
    assert rows[0]["token_accuracy"] == 0.0 and rows[1]["token_accuracy"] == 1.0
    assert set(rows[1]["token_role_accuracy"].values()) == {1.0}


def test_residual_stream(rows):
    """Logit lens values by stage, by hand."""
    first, last = rows
    # Two sequences with 0, 1, 2, 3 right of 7 reads in all at the four stages.
    expected = dict(zip(STAGES, (0, 2 / 7, 4 / 7, 6 / 7), strict=True))
    assert first["lens_answer_accuracy_by_layer"] == pytest.approx(expected)
    # The mean state at p_e: (1, 1) to (0, 2), at 45 degrees.
    drift = 1 - 1 / np.sqrt(2)
    assert first["residual_drift_by_layer"] == dict.fromkeys(STAGES)
    assert last["residual_drift_by_layer"] == pytest.approx(dict.fromkeys(STAGES, drift))
    assert first["residual_drift_to_reference_by_layer"] == pytest.approx(dict.fromkeys(STAGES, drift))
    assert last["residual_drift_to_reference_by_layer"] == pytest.approx(dict.fromkeys(STAGES, 0.0), abs=1e-12)


def test_heads(dataset, intervals, rows):
    """Drops and attention of heads, by hand."""
    table = head_rows(dataset, intervals)
    assert [(row["step"], row["head"]) for row in table] == [(100, 0), (100, 1), (300, 0), (300, 1)]
    # Of 5 right answers head 0 leaves 1, head 1 leaves all; margins 13 - (-1) and 13 - 13 over 7 reads.
    assert table[2]["accuracy_drop"] == pytest.approx(4 / 7) and table[3]["accuracy_drop"] == pytest.approx(0)
    assert table[2]["margin_drop"] == pytest.approx(14 / 7) and table[3]["margin_drop"] == pytest.approx(0)
    assert table[2]["rank"] == 1 and table[3]["rank"] == 2
    assert table[2]["support_attention_mean"] == pytest.approx(0.5)
    assert table[3]["query_attention_mean"] == pytest.approx(4 / 7)
    assert table[0]["direct_logit_attribution"] == pytest.approx(2.0)
    for name in SELECTIVITIES:
        # Sums (0.7, 1.4) and (3.5, 4) over 1, 0, 7 and 6 reads for which they are defined.
        assert [row[name] for row in table] == [pytest.approx(0.7), None, pytest.approx(0.5), pytest.approx(4 / 6)]
    assert rows[0]["q_head"] == {"layer": 0, "head": 1, "value": pytest.approx(1.4 / 7)}
    selective = [(row["key_selectivity_head"]["head"], row["key_selectivity_head"]["null"]) for row in rows]
    assert selective == [(0, pytest.approx(0.7)), (1, pytest.approx(4 / 6))]
    assert table[0]["delta_accuracy_drop"] is None and table[2]["delta_accuracy_drop"] == pytest.approx(4 / 7)
    assert table[2]["accuracy_drop_mean"] is None and table[2]["ablations_disagree"] is None
    top = rows[1]["top_heads_by_ablation"]
    assert [(head["layer"], head["head"]) for head in top] == [(0, 0), (0, 1)]
    located = rows[1]["top_heads_by_localization"]
    assert (located[0]["head"], located[0]["value"]) == (1, pytest.approx(4 / 7))
    # Both heads drop nothing at the first checkpoint: no order, no correlation; the top head stays the first.
    assert rows[1]["head_rank_correlation_prev"] is None and rows[1]["head_turnover"] == 0.0
    assert rows[1]["stabilized"] == {"residual": True, "heads": False}
    assert rows[0]["stabilized"] == {"residual": False, "heads": False}


@pytest.fixture(scope="module")
def more_arrays(arrays):
    """The same with role means, under which the other head matters, and the random control in two directions."""

    def both(values):
        return np.array(values, np.float32)

    # [checkpoint, direction, split, layer, head] and without heads: head 1 costs 0 of 7 or 2 of 7 answers at first.
    of_heads = both([[[[[1, 1]], [[0, 0]]], [[[1, 0]], [[0, -1]]]], [[[[3, 3]], [[2, 2]]], [[[3, 0]], [[2, 2]]]]])
    of_mlps = both([[[[1], [0]], [[1], [0]]], [[[3], [2]], [[2], [1]]]])
    more = {
        "head/role_mean/correct": both([[[[0, 1]], [[0, 0]]], [[[3, 1]], [[2, 1]]]]),
        "head/role_mean/margin": both([[[[-3, -3]], [[-12, -12]]], [[[9, 1]], [[4, 2]]]]),
        "mlp/role_mean/correct": both([[[1], [0]], [[3], [1]]]),
        "mlp/role_mean/margin": both([[[-3], [-12]], [[9], [-10]]]),
        **{f"draws/head/{name}": of_heads for name in ("correct", "margin")},
        **{f"draws/mlp/{name}": of_mlps for name in ("correct", "margin")},
    }
    for name in ("correct", "margin"):
        for component, draws in (("head", of_heads), ("mlp", of_mlps)):
            more[f"{component}/random/{name}"] = draws.mean(axis=1)
    return arrays | more


@pytest.mark.parametrize("ranked_by", ["zero", "role_mean"])
def test_ranking_kind(more_arrays, probe, ranked_by):
    """The chosen kind of ablation ranks components; fields of zero ablation stay what they are."""
    dataset = means_of(more_arrays, probe, ranked_by)
    intervals = build_intervals(more_arrays, [100, 300], probe)
    first, last = rows_of(dataset, intervals)
    heads = {(row["step"], row["head"]): row for row in head_rows(dataset, intervals)}
    leader = 0 if ranked_by == "zero" else 1
    assert first["ranked_by"] == last["ranked_by"] == heads[300, 0]["ranked_by"] == ranked_by
    assert heads[300, leader]["rank"] == 1 and heads[300, 1 - leader]["rank"] == 2
    assert [head["head"] for head in last["top_heads"]] == [leader, 1 - leader]
    assert [head["head"] for head in last["top_heads_by_ablation"]] == [0, 1]
    # Of 5 right answers head 1 leaves 2 under role means and all under zero.
    drops = {"accuracy_drop": 0, "accuracy_drop_role_mean": 3 / 7, "margin_drop_role_mean": 10 / 7}
    second = last["top_heads"][0 if leader == 1 else 1]
    assert {name: second[name] for name in drops} == pytest.approx(drops)
    assert {name: heads[300, 1][name] for name in drops} == pytest.approx(drops)
    assert heads[300, 1]["delta_accuracy_drop_role_mean"] == pytest.approx(3 / 7)
    assert second["accuracy_drop_mean"] is None and second["accuracy_drop_resample"] is None
    assert second["ablations_disagree"] is False, "two sequences show nothing"
    assert last["top_mlps"][0]["accuracy_drop_role_mean"] == pytest.approx(1 / 7)
    # Role means: head 0 costs 1/7 and head 1 nothing at first, and the other way round later.
    order = {"zero": (None, 0.0), "role_mean": (-1.0, 1.0)}[ranked_by]
    assert (last["head_rank_correlation_prev"], last["head_turnover"]) == order
    # On the second split: role means of head 0 cost nothing, then 0 of 4; of head 1 nothing, then 1 of 4.
    held = dataset.sel(split="heldout_pairs")
    assert held["head_rank"].values.tolist() == ([[[1, 2]]] * 2 if ranked_by == "zero" else [[[1, 2]], [[2, 1]]])
    assert held["head_turnover"].values.tolist() == pytest.approx([NAN, order[1]], nan_ok=True)
    assert np.isnan(held["head_rank_correlation_prev"]).all(), "at first nothing has an order there"
    assert dataset["mlp_rank"].dims == ("step", "split", "layer") and (dataset["mlp_rank"] == 1).all()
    for row in (first, last):
        row_schema("checkpoint").model_validate(row)


def test_spread_of_the_random_control(more_arrays, probe):
    """The spread is the standard deviation of the drops under single directions, over all reads and by split."""
    dataset = means_of(more_arrays, probe, "zero")
    row = head_rows(dataset, build_intervals(more_arrays, [100, 300], probe))[1]
    # Of 1 right answer, head 1's steps leave 1 and -1 (a sum made up to differ): drops of 0 and 2/7.
    assert (row["step"], row["head"]) == (100, 1)
    assert row["accuracy_drop_random"] == pytest.approx(1 / 7)
    assert row["accuracy_drop_random_spread"] == pytest.approx(np.sqrt(2) / 7)
    spread = dataset["head_accuracy_drop_random_spread"].sel(step=300, layer=0, head=1)
    # 3 right of 3 reads or none on the first split; on the other the directions agree.
    assert (
        spread.sel(split="validation_iid") == pytest.approx(1 / np.sqrt(2)) and spread.sel(split="heldout_pairs") == 0
    )
    assert dataset["mlp_margin_drop_random_spread"].sel(step=300, split="all", layer=0) == pytest.approx(np.sqrt(2) / 7)


def test_mlps(dataset, intervals, rows):
    """Drops and writes of MLPs, by hand."""
    table = mlp_rows(dataset, intervals)
    assert table[1]["accuracy_drop"] == pytest.approx(2 / 7) and table[1]["margin_drop"] == pytest.approx(14 / 7)
    assert table[0]["write_norm_mean"] == pytest.approx(2.0) and table[1]["write_norm_mean"] == pytest.approx(3.0)
    assert table[1]["write_norm_support_mean"] == pytest.approx(1.0)
    # The lens margin's sums are 2 · (stage + 3) at the last checkpoint: 2/7 from one half of the layer to the next.
    assert table[1]["answer_margin_delta_mean"] == pytest.approx(2 / 7)
    assert rows[1]["mlp_write_norm_by_layer"] == {
        "0": {"prediction": pytest.approx(3.0), "support": pytest.approx(1.0)}
    }


def test_weights(dataset, intervals, rows):
    """Changes of weights per 1000 steps, ranks, norms and overlaps, by hand."""
    first, last = rows
    assert first["weight_change"] is None and first["weight_change_from_first"] == 0.0
    # Squared distances add up to 15, squared norms to 59; 200 steps are a fifth of a thousand.
    assert last["weight_change"] == pytest.approx(5 * np.sqrt(15 / 59))
    assert last["weight_change_from_first"] == pytest.approx(np.sqrt(15 / 59))
    groups = last["weight_change_by_group"]
    assert groups["token_embedding"] == pytest.approx(5 * np.sqrt(2 / 50)) and groups["layer_0_ln_1"] == 5.0
    assert groups["position_embedding"] is None, "a norm of 0"
    assert groups["layer_0_fc_out"] == pytest.approx(5 * np.sqrt(5)) and groups["final_norm"] == 0.0
    assert groups["unembedding"] is None
    assert last["weight_update_cosine"] is None, "there is one update"
    row = head_rows(dataset, intervals)[3]
    assert row["qk_norm"] == pytest.approx(5.0) and row["qk_participation_ratio"] == pytest.approx(625 / 337)
    entropy = np.log(7) - (4 * np.log(4) + 3 * np.log(3)) / 7
    assert row["qk_effective_rank"] == pytest.approx(np.exp(entropy)) and row["ov_effective_rank"] == pytest.approx(1)
    assert row["ov_direction_overlap"] == 0.25 and row["ov_direction_overlap_to_reference"] == 1.0
    assert head_rows(dataset, intervals)[0]["ov_direction_overlap"] is None
    assert [(row["fc_in_norm"], row["fc_out_norm"]) for row in mlp_rows(dataset, intervals)] == [(1.0, 3.0), (2.0, 4.0)]


def test_intervals_of_one_sequence(arrays, probe):
    """Resampling one sequence gives the same one: rates get Wilson's bound for one sequence, means none."""
    intervals = build_intervals(arrays, [100, 300], probe)
    held = intervals["answer_accuracy"].sel(split="heldout_pairs", step=300)
    bound = 1.959964**2 / (1 + 1.959964**2)
    assert held.values == pytest.approx([0.5, 0.0, 1.0]) and 0.5 - bound < 0
    margin = intervals["answer_margin"].sel(split="heldout_pairs", step=300)
    assert margin.values == pytest.approx([1.0, np.nan, np.nan], nan_ok=True)
    change = intervals["answer_margin_change"].sel(split="validation_iid", step=300)
    assert change.values == pytest.approx([4.0, np.nan, np.nan], nan_ok=True)
