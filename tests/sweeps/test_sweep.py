"""A whole sweep of a small run against the PyTorch oracle."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import scipy.stats
import xarray as xr

from kvjax.config.files import find_config, read_config
from kvjax.config.windows import WindowConfig
from kvjax.model.sites import stage_names
from kvjax.windows.trajectories import component_drops
from tests.helpers.building import SMALL_MODEL, STEPS, read_lines
from tests.helpers.close import close
from tests.oracles.pytorch_loops import fixed_margins, mean

STAGES = stage_names(SMALL_MODEL["n_layers"])
HEADS = [(layer, head) for layer in range(3) for head in range(4)]


def number(value):
    """Returns a number of the arrays, None for NaN."""
    return None if np.isnan(float(value)) else float(value)


def of(reads, field, split=None):
    return mean([read[field] for read in reads if split in (None, read["split"])])


def test_variety_of_the_oracle(truth):
    """Guards the comparison itself: with nothing right and nothing dropping it would compare zeros."""
    for measured in truth.values():
        assert 0.1 < of(measured["reads"], "correct") < 1.0
        drops = [sum(r["correct"] - r["ablated"][h]["correct"] for r in measured["reads"]) for h in HEADS]
        assert len(set(drops)) > 4


@pytest.mark.parametrize("step", STEPS)
def test_behaviour(rows, truth, step):
    """Behaviour equals PyTorch's, of all reads and of each split."""
    row, reads, tokens = rows[step], truth[step]["reads"], truth[step]["tokens"]
    for ours, theirs in {
        "answer_accuracy": "correct",
        "answer_margin": "margin",
        "w": "margin",
        "answer_entropy": "entropy",
        "answer_confidence": "confidence",
        "answer_loss": "answer_loss",
        "answer_logit": "answer_logit",
        "answer_logit_centred": "answer_logit_centred",
        "q": "q",
        "r": "r",
        "key_selectivity": "key_selectivity",
        "key_selectivity_null": "key_selectivity_null",
        "recency_selectivity": "recency_selectivity",
    }.items():
        close(row[ours], of(reads, theirs), ours)
    close(row["heldout_answer_accuracy"], of(reads, "correct", "heldout_pairs"))
    close(row["loss"], mean([token["loss"] for token in tokens]), "loss")
    close(row["token_accuracy"], mean([token["right"] for token in tokens]), "token_accuracy")
    for role, accuracy in row["token_role_accuracy"].items():
        close(accuracy, mean([token["right"] for token in tokens if token["role"] == role]), role)
    for split, accuracy in row["split_accuracy"].items():
        close(accuracy, of(reads, "correct", split), split)
        for ours, theirs in {"q": "q", "r": "r", "w": "margin", "key_selectivity": "key_selectivity"}.items():
            close(row["split_metrics"][split][ours], of(reads, theirs, split), f"{split} {ours}")
        for name in ("answer_loss", "answer_logit", "answer_logit_centred", "key_selectivity_null"):
            close(row["split_metrics"][split][name], of(reads, name, split), f"{split} {name}")


@pytest.mark.parametrize("step", STEPS)
def test_fixed_margin(rows, truth, step):
    """The margin to the final checkpoint's competitors equals PyTorch's, of all reads and of each split."""
    reads = truth[step]["reads"]
    margins = fixed_margins(reads, truth[STEPS[-1]]["reads"])
    close(rows[step]["fixed_margin"], mean(margins))
    for split, shown in rows[step]["split_metrics"].items():
        own = [margin for margin, read in zip(margins, reads, strict=True) if read["split"] == split]
        close(shown["fixed_margin"], mean(own), split)
    if step == STEPS[-1]:
        close(rows[step]["fixed_margin"], rows[step]["w"])
    else:
        assert abs(rows[step]["fixed_margin"] - rows[step]["w"]) > 0.01, "other values compete"


@pytest.mark.parametrize("step", STEPS)
def test_slices(rows, truth, swept, step):
    """Slices, difficulty and the margin summary equal PyTorch's."""
    row, reads = rows[step], truth[step]["reads"]
    assert row["slice_accuracy"].keys() == reads[0]["axes"].keys()
    assert {"0", "1", "2+"} >= row["slice_count"]["earlier_answers"].keys() > {"0"}
    for axis, values in row["slice_accuracy"].items():
        assert row["slice_count"][axis] == Counter(str(read["axes"][axis]) for read in reads)
        for value, accuracy in values.items():
            close(
                accuracy,
                mean([r["correct"] for r in reads if str(r["axes"][axis]) == value]),
                f"{axis}={value}",
            )
    tags = json.loads((swept / "analysis" / "probe_set.metadata.json").read_text())["difficulty"]
    for tag in ("easy", "hard"):
        close(
            row["difficulty_accuracy"][tag],
            mean([r["correct"] for r in reads if tags[r["sample_id"]] == tag]),
        )
        iid = [r["correct"] for r in reads if tags[r["sample_id"]] == tag and r["split"] == "validation_iid"]
        close(row[f"{tag}_iid_accuracy"], mean(iid))
        for split, by_tag in row["split_difficulty_accuracy"].items():
            own = [r["correct"] for r in reads if tags[r["sample_id"]] == tag and r["split"] == split]
            close(by_tag[tag], mean(own), f"{tag} {split}")
    margins = [read["margin"] for read in reads]
    summary = row["answer_margin_summary"]
    close(summary["std"], float(np.std(margins)))
    for name, share in (("p10", 10), ("p50", 50), ("p90", 90)):
        close(summary[name], float(np.percentile(margins, share)), name)
    close(summary["share_positive"], mean([m > 0 for m in margins]))


def test_slices_by_split(swept, truth):
    """The arrays have each slice's accuracy and number of reads for every split; a split may lack a slice."""
    means = xr.open_dataset(swept / "analysis" / "checkpoint_metrics.nc", engine="netcdf4").load()
    counts = means["slice_count"]
    assert (counts.sel(split="all") == counts.sel(split=counts["split"].values[1:]).sum("split")).all()
    found = means["slice_accuracy"].sel(step=200)
    for split in found["split"].values[1:]:
        for label in found["axis_value"].values:
            axis, _, value = label.partition("=")
            reads = [r for r in truth[200]["reads"] if r["split"] == split and str(r["axes"][axis]) == value]
            assert counts.sel(split=split, axis_value=label) == len(reads)
            close(number(found.sel(split=split, axis_value=label)), mean([r["correct"] for r in reads]), label)


@pytest.mark.parametrize("step", STEPS)
def test_logit_lens(rows, truth, step):
    """Logit lens values by stage equal PyTorch's."""
    row, reads = rows[step], truth[step]["reads"]
    for ours, theirs in {
        "lens_answer_accuracy_by_layer": "lens_answer",
        "lens_query_key_accuracy_by_layer": "lens_key",
        "lens_support_value_accuracy_by_layer": "lens_support",
        "answer_margin_by_layer": "lens_margin",
    }.items():
        assert tuple(row[ours]) == STAGES
        for stage, value in row[ours].items():
            close(value, mean([read[theirs][stage] for read in reads]), f"{ours} {stage}")


def mean_state(measured, stage, field="state"):
    return np.mean([read[field][stage] for read in measured["reads"]], axis=0)


def drift(a, b):
    return 1 - float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_drift(rows, truth):
    """Drift of the mean state equals PyTorch's."""
    for before, step in zip((None, *STEPS), STEPS, strict=False):
        for stage in STAGES:
            here = mean_state(truth[step], stage)
            expected = None if before is None else drift(here, mean_state(truth[before], stage))
            close(rows[step]["residual_drift_by_layer"][stage], expected, stage)
            final = drift(here, mean_state(truth[STEPS[-1]], stage))
            close(rows[step]["residual_drift_to_reference_by_layer"][stage], final, stage)


def test_drift_at_the_support(swept, truth):
    """Drift at the support token is in the arrays."""
    dataset = xr.open_dataset(swept / "analysis" / "checkpoint_metrics.nc", engine="netcdf4")
    drifts = dataset["residual_drift"].sel(split="all", position_role="support")
    for before, step in itertools.pairwise(STEPS):
        for stage in STAGES:
            states = [mean_state(truth[s], stage, "support_state") for s in (step, before)]
            close(float(drifts.sel(step=step, stage=stage)), drift(*states), stage)


def drops(measured, components, field, kind="ablated"):
    reads = measured["reads"]
    return {c: mean([float(r[field]) - float(r[kind][c][field]) for r in reads]) for c in components}


def test_heads(swept, truth):
    """Drops, attention, ranks and changes of heads equal PyTorch's; role-mean ablation ranks."""
    table = read_lines(swept / "analysis" / "component_candidates" / "heads.jsonl")
    assert [(row["step"], row["layer"], row["head"]) for row in table] == [(s, *h) for s in STEPS for h in HEADS]
    accuracy = {step: drops(truth[step], HEADS, "correct") for step in STEPS}
    by_role = {step: drops(truth[step], HEADS, "correct", "role_mean_ablated") for step in STEPS}
    for row in table:
        head, step = (row["layer"], row["head"]), row["step"]
        close(row["accuracy_drop"], accuracy[step][head], f"{step} {head}")
        close(row["margin_drop"], drops(truth[step], [head], "margin")[head], f"{step} {head}")
        close(row["accuracy_drop_role_mean"], by_role[step][head], f"{step} {head}")
        margin_drop = drops(truth[step], [head], "margin", "role_mean_ablated")[head]
        close(row["margin_drop_role_mean"], margin_drop, f"{step} {head}")
        for name in (
            "query_attention",
            "support_attention",
            "current_value_attention",
            "stale_attention",
            "binding_attention",
        ):
            expected = mean([read["attention"][head][name] for read in truth[step]["reads"]])
            close(row[f"{name}_mean"], expected, f"{name} {head}")
        for name in ("attention_entropy", "key_selectivity", "key_selectivity_null", "recency_selectivity"):
            close(row[name], mean([read["attention"][head][name] for read in truth[step]["reads"]]), f"{name} {head}")
        separation = mean([read["separation"][head] for read in truth[step]["reads"]])
        close(row["qk_separation"], separation)
        close(row["qk_separation_rank8"], separation)  # its heads have 6 directions
        previous = STEPS[STEPS.index(step) - 1] if step != STEPS[0] else None
        change = None if previous is None else accuracy[step][head] - accuracy[previous][head]
        close(row["delta_accuracy_drop"], change)
        ahead = [h for h in HEADS if (-by_role[step][h], h) < (-by_role[step][head], head)]
        assert row["rank"] == len(ahead) + 1 and row["ranked_by"] == "role_mean"
    assert any(np.argmax(list(accuracy[s].values())) != np.argmax(list(by_role[s].values())) for s in STEPS)


@pytest.mark.parametrize("step", STEPS)
def test_largest_heads(rows, truth, step):
    """The maximum after averaging names its head, and is below the average of the maxima."""
    row, reads = rows[step], truth[step]["reads"]
    of_heads = {
        name: {head: mean([read["attention"][head][name] for read in reads]) for head in HEADS}
        for name in (
            *("query_attention", "support_attention"),
            *("key_selectivity", "key_selectivity_null", "recency_selectivity"),
        )
    }
    for field, name in {"q": "query_attention", "r": "support_attention", "key_selectivity": "key_selectivity"}.items():
        found, means = row[f"{field}_head"], of_heads[name]
        head = max(HEADS, key=lambda h: means[h])
        assert (found["layer"], found["head"]) == head
        close(found["value"], means[head], field)
        assert found["value"] < row[field]
    head = row["key_selectivity_head"]["layer"], row["key_selectivity_head"]["head"]
    close(row["key_selectivity_head"]["null"], of_heads["key_selectivity_null"][head])
    close(row["key_selectivity_head"]["recency_selectivity"], of_heads["recency_selectivity"][head])


def test_mlps(swept, truth):
    """Drops and writes of MLPs equal PyTorch's."""
    for row in read_lines(swept / "analysis" / "component_candidates" / "mlps.jsonl"):
        layer, reads = row["layer"], truth[row["step"]]["reads"]
        close(row["accuracy_drop"], drops(truth[row["step"]], [(layer,)], "correct")[layer,])
        close(row["margin_drop"], drops(truth[row["step"]], [(layer,)], "margin")[layer,])
        by_role = drops(truth[row["step"]], [(layer,)], "correct", "role_mean_ablated")[layer,]
        close(row["accuracy_drop_role_mean"], by_role)
        close(row["write_norm_mean"], mean([read["write_norm"][layer] for read in reads]))
        close(row["write_norm_support_mean"], mean([read["write_norm_support"][layer] for read in reads]))
        added = [
            r["lens_margin"][f"layer_{layer}_post_mlp"] - r["lens_margin"][f"layer_{layer}_post_attn"] for r in reads
        ]
        close(row["answer_margin_delta_mean"], mean(added))


def test_orders_by_split(swept, truth):
    """Ranks, rank correlations and turnovers of every split follow from PyTorch's drops there."""
    means = xr.open_dataset(swept / "analysis" / "checkpoint_metrics.nc", engine="netcdf4").load()
    for split in means["split"].values[1:]:
        reads = {step: [r for r in truth[step]["reads"] if r["split"] == split] for step in STEPS}
        for before, step in itertools.pairwise(STEPS):
            a, b = (drops({"reads": reads[s]}, HEADS, "correct", "role_mean_ablated") for s in (before, step))
            here = means.sel(split=split, step=step)
            by_place = sorted(HEADS, key=lambda h, of=b: (-of[h], h))
            assert [here["head_rank"].sel(layer=layer, head=head) for layer, head in by_place] == [*range(1, 13)]
            ranks = [scipy.stats.rankdata(list(x.values())) for x in (a, b)]
            varies = all(len(set(x)) > 1 for x in ranks)
            expected = float(np.corrcoef(*ranks)[0, 1]) if varies else None
            close(number(here["head_rank_correlation_prev"]), expected, split)
            tops = [set(sorted(HEADS, key=lambda h, x=x: (-x[h], h))[:3]) for x in (a, b)]
            close(float(here["head_turnover"]), 1 - len(tops[0] & tops[1]) / len(tops[0] | tops[1]))


def test_order_and_turnover(rows, truth):
    """Rank correlation, turnover and the top heads follow from PyTorch's drops."""
    first = rows[STEPS[0]]
    for name in ("head_rank_correlation_prev", "mlp_rank_correlation_prev", "head_turnover", "mlp_turnover"):
        assert first[name] is None
    for before, step in itertools.pairwise(STEPS):
        a, b = (drops(truth[s], HEADS, "correct", "role_mean_ablated") for s in (before, step))
        ranks = [scipy.stats.rankdata(list(x.values())) for x in (a, b)]
        close(rows[step]["head_rank_correlation_prev"], float(np.corrcoef(*ranks)[0, 1]))
        tops = [set(sorted(HEADS, key=lambda h, x=x: (-x[h], h))[:3]) for x in (a, b)]  # 12 heads // 4
        close(rows[step]["head_turnover"], 1 - len(tops[0] & tops[1]) / len(tops[0] | tops[1]))
        zero = drops(truth[step], HEADS, "correct")
        for field, by, value in (
            ("top_heads", b, "accuracy_drop_role_mean"),
            ("top_heads_by_ablation", zero, "value"),
        ):
            top = rows[step][field]
            expected = sorted(HEADS, key=lambda h, by=by: (-by[h], h))[:8]
            assert [(head["layer"], head["head"]) for head in top] == expected
            close(top[0][value], by[expected[0]])
        assert [mlp["layer"] for mlp in rows[step]["top_mlps_by_ablation"]] == sorted(
            range(3), key=lambda layer: (-drops(truth[step], [(layer,)], "correct")[layer,], layer)
        )


@pytest.mark.parametrize(("kind", "field"), [("zero", "ablated"), ("role_mean", "role_mean_ablated")])
def test_drops_that_windows_watch(swept, truth, kind, field):
    """Windows watch the drops of the kind of ablation that they are told."""
    config = read_config(find_config("default", "windows"), WindowConfig).model_copy(update={"resamples": 50})
    path = swept / "analysis" / "checkpoint_metrics.nc"
    with xr.open_dataset(path, group="events", engine="netcdf4") as events:
        watched = component_drops(events, config, chance=1 / 48, ranked_by=kind)
    for c, step in enumerate(STEPS):
        expected = drops(truth[step], [*HEADS, (0,), (1,), (2,)], "correct", field)
        for component, drop in zip(watched.components, watched.drops_CxX[c], strict=True):
            own = (component.layer,) if component.is_mlp else (component.layer, component.head)
            close(float(drop), expected[own], f"{step} {component}")


def test_deltas_and_birth_flags(rows, truth):
    """Deltas are differences of rows; birth flags compare with the run's thresholds."""
    names = [name.removeprefix("delta_") for name in rows[STEPS[0]] if name.startswith("delta_")]
    assert len(names) == 15
    for before, step in zip((None, *STEPS), STEPS, strict=False):
        for name in names:
            expected = None if before is None else rows[step][name] - rows[before][name]
            close(rows[step][f"delta_{name}"], expected, name)
        reads = truth[step]["reads"]
        assert rows[step]["birth_flags"] == {
            "answer_accuracy": of(reads, "correct", "validation_iid") >= 0.05,
            "q": of(reads, "q", "validation_iid") >= 0.2,
            "r": of(reads, "r", "validation_iid") >= 0.99,
            "w": of(reads, "margin", "validation_iid") >= -100.0,
            "heldout_answer_accuracy": of(reads, "correct", "heldout_pairs") >= 0.5,
        }


def test_netcdf(swept, rows):
    """The netCDF file holds the rows, and the events that they are made from."""
    path = swept / "analysis" / "checkpoint_metrics.nc"
    dataset = xr.open_dataset(path, engine="netcdf4")
    events = xr.open_dataset(path, group="events", engine="netcdf4")
    assert dataset["step"].values.tolist() == list(STEPS)
    for step in STEPS:
        whole = dataset.sel(step=step, split="all")
        assert float(whole["answer_accuracy"]) == rows[step]["answer_accuracy"]
        right = events["read_correct"].sel(step=step).values[events["is_read"].values.astype(bool)]
        close(float(right.mean()), rows[step]["answer_accuracy"])
        counts = int(events["is_read"].sum())
        head = events["head_zero_correct"].sel(step=step).sum("sequence") / counts
        close(float(whole["answer_accuracy"] - head[1, 2]), float(whole["head_accuracy_drop"][0, 1, 2]))
    for name, variable in dataset.data_vars.items():
        assert {"long_name", "units"} <= variable.attrs.keys(), name


def test_events(swept):
    """The events describe each read."""
    events = xr.open_dataset(swept / "analysis" / "checkpoint_metrics.nc", group="events", engine="netcdf4")
    for name, variable in events.data_vars.items():
        assert name in ("is_read", "split") or {"units", "long_name"} <= variable.attrs.keys(), name
    records = {record["sample_id"]: record for record in read_lines(swept / "analysis" / "probe_set.jsonl")}
    for sequence in events["sequence"].values[:6]:
        record, of_sequence = records[sequence], events.sel(sequence=sequence)
        lags = [event["tokens_since_support"] for event in record["query_events"]]
        filled = of_sequence.sizes["read"] - len(lags)
        assert of_sequence["tokens_since_support"].values.tolist() == [*lags, *[-1] * filled]
        assert (of_sequence["active_keys"].values[: len(lags)] == record["axes"]["active_keys"]).all()
    assert events["layer"].values.tolist() == [0, 1, 2] and events["head"].values.tolist() == [0, 1, 2, 3]


def test_padding_of_events(swept):
    """Padding between reads holds no value."""
    path = swept / "analysis" / "checkpoint_metrics.nc"
    events = xr.open_dataset(path, group="events", engine="netcdf4")
    absent = ~events["is_read"].values.astype(bool)
    for name in ("read_margin", "read_correct"):
        values = events[name].values
        assert absent.any() and np.isnan(values[:, absent]).all() and not np.isnan(values[:, ~absent]).any()
    assert set(np.unique(events["read_correct"].values[:, ~absent])) == {0.0, 1.0}
