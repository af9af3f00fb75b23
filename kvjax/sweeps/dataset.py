"""From measured sums to labelled means: the one place where rates and averages of a sweep are formed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from kvjax.measure.attribution import LAYER_TERMS, WHOLE_TERMS
from kvjax.measure.between_checkpoints import change_from_previous
from kvjax.measure.heads import ATTENTION_MEASURES
from kvjax.model.sites import stage_names
from kvjax.sweeps.ablations import ABLATIONS
from kvjax.sweeps.probe_index import (
    ALL_SPLITS,
    DIFFICULTIES,
    LENS_MEANS,
    POSITION_ROLES,
    READ_MEANS,
    ProbeIndex,
    mean_over_reads,
    ratio,
)
from kvjax.sweeps.residual_means import put_drift, put_logistic, put_movement, put_probes
from kvjax.task.encoding import RELATION_STALE, TOKEN_ROLES

MARGIN_STATISTICS = ("mean", "std", "p10", "p50", "p90", "share_positive")


def build_dataset(
    arrays: Mapping[str, np.ndarray],
    steps: Sequence[int],
    probe: ProbeIndex,
    *,
    reference: Mapping[str, np.ndarray] | None,
    moved: Sequence[Mapping[str, np.ndarray]] | None = None,
    logistic: Sequence[Mapping[str, np.ndarray] | None] = (),
) -> xr.Dataset:
    """Returns every mean of a sweep, labelled by step, split, stage, layer, head, ….

    Args:
      arrays: measured sums [C, N, …] by name, as `collect` returns them, for the checkpoints in `steps`.
      steps: the training steps, ascending.
      probe: what the records are.
      reference: the arrays of the checkpoint that drift is also measured to; that drift is NaN where None.
      moved: how each checkpoint's states differ from others', as `measure_movement` returns it; None where not asked.
      logistic: each checkpoint's logistic probes, None for those that have none; empty where not asked.

    Returns:
      A dataset; `split` runs over `all` and the splits. Drift is of the mean state at p_e and at s_e.
    """
    in_split = probe.split_weights()
    is_read = probe.encoded.is_read
    reads = in_split @ is_read.sum(axis=1)  # [splits]
    n_layers = arrays["mlp/write_norm"].shape[-1]
    ablations = [kind for kind in ABLATIONS if f"head/{kind}/correct" in arrays]
    dataset = xr.Dataset(
        coords={
            "step": list(steps),
            "split": [ALL_SPLITS, *probe.splits],
            "stage": list(stage_names(n_layers)),
            "layer": np.arange(n_layers),
            "head": np.arange(arrays["head/query_attention"].shape[-1]),
            "ablation": ablations,
            "position_role": list(POSITION_ROLES),
            "token_role": list(TOKEN_ROLES),
            "difficulty": list(DIFFICULTIES),
            "margin_statistic": list(MARGIN_STATISTICS),
        },
        attrs={"conventions": "means over read events; see docs/definitions.md"},
    )

    def put(name: str, dims: Sequence[str], values: np.ndarray, long_name: str, units: str) -> None:
        dataset[name] = (("step", *dims), values, {"long_name": long_name, "units": units})

    def by_split(sums_CxN: np.ndarray, counts: np.ndarray = reads) -> np.ndarray:
        """Returns per-read means by split from per-sequence sums: [C, N, …] to [C, splits, …]."""
        totals = np.einsum("cn...,zn->cz...", sums_CxN.astype(np.float64), in_split)
        return ratio(totals, np.broadcast_to(counts.reshape(-1, *[1] * (totals.ndim - 2)), totals.shape))

    put_count = {"long_name": "number of read events", "units": "events"}
    dataset["read_count"] = (("split",), reads, put_count)
    for name, (source, long_name, units) in READ_MEANS.items():
        means, counts = mean_over_reads(arrays[source], in_split, is_read)
        put(name, ("split",), means, long_name, units)
        if name.endswith("selectivity"):
            put(f"{name}_count", ("split",), counts, f"number of reads whose {name} is defined", "events")
    put(
        "answer_margin_summary",
        ("split", "margin_statistic"),
        _margin_summary(arrays["read/margin"], in_split, is_read),
        "distribution of the answer margin over reads",
        "logits",
    )
    correct = arrays["read/correct"]
    difficulty = np.stack([probe.difficulty == tag for tag in DIFFICULTIES])
    put(
        "difficulty_accuracy",
        ("difficulty",),
        mean_over_reads(correct, difficulty, is_read)[0],
        "answer accuracy",
        "1",
    )
    dataset["difficulty_count"] = (("difficulty",), difficulty @ is_read.sum(axis=1), put_count)
    _put_slices(dataset, correct, probe)
    _put_tokens(dataset, put, arrays, probe, in_split)
    for name, (source, long_name, units) in LENS_MEANS.items():
        put(name, ("split", "stage"), by_split(arrays[source]), long_name, units)

    with_stale = in_split @ (probe.encoded.relations == RELATION_STALE).any(axis=2).sum(axis=1)
    for name in ATTENTION_MEASURES:
        units = "nats" if name == "attention_entropy" else "1"
        # A read whose support overwrote nothing has no stale value to attend to.
        counted = with_stale if name == "stale_attention" else reads
        put(
            f"head_{name}",
            ("split", "layer", "head"),
            by_split(arrays[f"head/{name}"], counted),
            f"mean {name} of a head",
            units,
        )
    norms = [by_split(arrays[f"mlp/{name}"]) for name in ("write_norm", "write_norm_support")]
    put(
        "mlp_write_norm",
        ("split", "position_role", "layer"),
        np.stack(norms, 2),
        "L2 norm of an MLP's output",
        "1",
    )
    margins = dataset["lens_answer_margin"]
    after, before = (
        margins.sel(stage=[f"layer_{layer}_{half}" for layer in range(n_layers)]).values
        for half in ("post_mlp", "post_attn")
    )
    put("mlp_answer_margin_delta", ("split", "layer"), after - before, "lens margin an MLP adds", "logits")
    for kind, dims in (("head", ("layer", "head")), ("mlp", ("layer",))):
        for measure, clean, units in (
            ("accuracy", "answer_accuracy", "1"),
            ("margin", "answer_margin", "logits"),
        ):
            name = "correct" if measure == "accuracy" else "margin"
            unablated = dataset[clean].values.reshape(*dataset[clean].shape, *[1] * len(dims))
            put(
                f"{kind}_{measure}_drop",
                ("ablation", "split", *dims),
                np.stack([unablated - by_split(arrays[f"{kind}/{ablation}/{name}"]) for ablation in ablations], 1),
                f"clean minus ablated answer {measure}",
                units,
            )
    _put_attribution(put, arrays, by_split)
    put_probes(dataset, put, arrays, probe)
    _put_changes(dataset, put)
    put_drift(put, arrays, reference)
    if moved is not None:
        put_movement(put, moved, probe)
    put_logistic(dataset, put, logistic, probe)
    return dataset


def _put_attribution(put, arrays: Mapping[str, np.ndarray], by_split) -> None:
    dims = {"head": ("layer", "head"), "mlp": ("layer",), "attn_bias": ("layer",)}
    names = {"head": "head_direct_logit_attribution", "mlp": "mlp_direct_logit_attribution"}
    for term in (*WHOLE_TERMS, *LAYER_TERMS):
        put(
            names.get(term, f"{term}_direct_logit_attribution"),
            ("split", *dims.get(term, ())),
            by_split(arrays[f"attribution/{term}"]),
            f"what the {term} adds to logit(answer) - mean logit over values",
            "logits",
        )


def _put_changes(dataset: xr.Dataset, put) -> None:
    """The change of every measure of heads and MLPs from the previous checkpoint."""
    for name in [name for name in dataset.data_vars if name.startswith(("head_", "mlp_"))]:
        values = dataset[name]
        changes = change_from_previous(values.values)
        put(f"{name}_change", values.dims[1:], changes, f"change of {name} from the previous checkpoint", values.units)


def build_events(arrays: Mapping[str, np.ndarray], steps: Sequence[int], probe: ProbeIndex) -> xr.Dataset:
    """Returns the per-read values and per-sequence sums that every mean and interval is made from.

    Beside them, what each read is: its split, and the value it has on every axis of the benchmark.
    """
    per_sequence = ("step", "sequence")
    stages = list(stage_names(arrays["mlp/write_norm"].shape[-1]))
    dims = {
        "read": (*per_sequence, "read"),
        "token": (*per_sequence, "token_role"),
        "lens": (*per_sequence, "stage"),
        "head": (*per_sequence, "layer", "head"),
        "mlp": (*per_sequence, "layer"),
        "attribution": (*per_sequence, "layer", "head"),
        "probe": (*per_sequence, "position_role", "stage"),
    }
    dataset = xr.Dataset(coords={"step": list(steps), "sequence": list(probe.sample_ids), "stage": stages})
    dataset["split"] = (("sequence",), np.array(probe.splits)[probe.encoded.splits])
    dataset["is_read"] = (("sequence", "read"), probe.encoded.is_read)
    for axis, of_reads in probe.axis_values.items():
        values = np.where(probe.encoded.is_read, of_reads, -1).astype(np.int32)
        dataset[axis] = (("sequence", "read"), values, {"long_name": f"{axis} of each read, -1 for none", "units": "1"})
    for name, values in arrays.items():
        kind = name.partition("/")[0]
        if kind == "read" and values.dtype != bool:
            values = np.where(probe.encoded.is_read, values, np.nan)  # positions that are no read hold no value
        if kind == "probe":
            both = values.reshape(*values.shape[:2], -1, len(stages))  # p_e alone, or p_e and s_e
            own = dims[kind] if both.shape[2] > 1 else (*per_sequence, "stage")
            values = both if both.shape[2] > 1 else both[:, :, 0]
        elif kind in dims:
            own = dims[kind][: values.ndim]
        else:
            continue
        dataset[name.replace("/", "_")] = (own, values, _event_attrs(kind, name))
    sizes = {"token_role": list(TOKEN_ROLES), "position_role": list(POSITION_ROLES)}
    sizes |= {axis: range(dataset.sizes[axis]) for axis in ("layer", "head")}
    return dataset.assign_coords({axis: list(labels) for axis, labels in sizes.items() if axis in dataset.sizes})


def _event_attrs(kind: str, name: str) -> dict[str, str]:
    """Returns what an array of the events holds, in words."""
    over = {"read": "of each read", "token": "summed over the tokens of a sequence"}
    long_name = f"{name.replace('/', ' ')}, {over.get(kind, 'summed over the reads of a sequence')}"
    if kind == "attribution" or name.endswith("margin"):
        return {"long_name": long_name, "units": "logits"}
    return {"long_name": long_name, "units": "nats" if name.endswith(("entropy", "loss")) else "1"}


def _margin_summary(margins_CxNxQ: np.ndarray, in_split: np.ndarray, is_read: np.ndarray) -> np.ndarray:
    summary = np.full((len(margins_CxNxQ), len(in_split), len(MARGIN_STATISTICS)), np.nan)
    for z, members in enumerate(in_split):
        margins = margins_CxNxQ[:, is_read & members[:, None]].astype(np.float64)  # [C, events]
        if not margins.shape[1]:
            continue
        summary[:, z] = np.stack(
            [
                margins.mean(axis=1),
                margins.std(axis=1),
                *np.percentile(margins, [10, 50, 90], axis=1),
                (margins > 0).mean(axis=1),
            ],
            axis=1,
        )
    return summary


def _put_slices(dataset: xr.Dataset, correct_CxNxQ: np.ndarray, probe: ProbeIndex) -> None:
    names, counts, accuracies = [], [], []
    for name, member in probe.slices():
        names.append(name)
        counts.append(int(member.sum()))
        accuracies.append(correct_CxNxQ[:, member].mean(axis=1))
    dataset.coords["axis_value"] = names
    dataset["slice_accuracy"] = (
        ("step", "axis_value"),
        np.stack(accuracies, axis=1),
        {"long_name": "answer accuracy of the reads with this value of an axis", "units": "1"},
    )
    dataset["slice_count"] = (
        ("axis_value",),
        counts,
        {"long_name": "number of read events", "units": "events"},
    )


def _put_tokens(
    dataset: xr.Dataset, put, arrays: Mapping[str, np.ndarray], probe: ProbeIndex, in_split: np.ndarray
) -> None:
    role_counts = probe.targets_by_role()
    target_counts = in_split @ role_counts.sum(axis=1)
    dataset["token_role_count"] = (
        ("split", "token_role"),
        in_split @ role_counts,
        {"long_name": "number of targets of a role", "units": "tokens"},
    )
    loss = arrays["token/loss"].astype(np.float64) @ in_split.T / target_counts
    put("loss", ("split",), loss, "cross-entropy of the next token, over non-pad targets", "nats")
    right = np.einsum("cnr,zn->czr", arrays["token/role_correct"].astype(np.float64), in_split)
    put(
        "token_accuracy",
        ("split",),
        right.sum(axis=-1) / target_counts,
        "share of targets predicted right",
        "1",
    )
    put(
        "token_role_accuracy",
        ("split", "token_role"),
        ratio(right, np.broadcast_to(in_split @ role_counts, right.shape)),
        "share of targets of a role predicted right",
        "1",
    )
