"""From measured sums to labelled means: the one place where rates and averages of a sweep are formed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from kvjax.measure.attribution import LAYER_TERMS, WHOLE_TERMS
from kvjax.measure.heads import ATTENTION_MEASURES
from kvjax.measure.residual import cosine_drift
from kvjax.model.sites import stage_names
from kvjax.sweep.ablations import ABLATIONS
from kvjax.sweep.dynamics import change_from_previous
from kvjax.sweep.fit import PROBE_TARGETS
from kvjax.task.encoding import NO_ROLE, RELATION_STALE, TOKEN_ROLES, EncodedRecords
from kvjax.task.stream import EVENT_AXES, SEQUENCE_AXES, Record
from kvjax.task.vocabulary import PAD_ID

ALL_SPLITS = "all"  # the whole probe set, beside its splits

READ_MEANS = {
    "answer_accuracy": ("read/correct", "share of reads whose argmax over the vocabulary is the answer", "1"),
    "answer_margin": ("read/margin", "logit of the answer minus the largest of the other values", "logits"),
    "answer_entropy": ("read/entropy", "entropy of the prediction over the vocabulary", "nats"),
    "answer_confidence": ("read/confidence", "probability of the answer", "1"),
    "q": ("read/q", "largest attention of any head from p_e to the read's key token", "1"),
    "r": ("read/r", "largest attention of any head from p_e to the support value", "1"),
    "key_selectivity": ("read/key_selectivity", "largest share of the read key in a head's attention to values", "1"),
    "recency_selectivity": ("read/recency_selectivity", "share of the current value in that head's key part", "1"),
}  # fmt: skip

LENS_MEANS = {
    "lens_answer_accuracy": ("lens/answer_correct", "logit lens: answer among values, at p_e", "1"),
    "lens_query_key_accuracy": ("lens/query_key_correct", "logit lens: read key among keys, at k_e", "1"),
    "lens_support_value_accuracy": (
        "lens/support_value_correct",
        "logit lens: value among values, at s_e",
        "1",
    ),
    "lens_answer_margin": ("lens/answer_margin", "logit lens: answer margin, at p_e", "logits"),
}

POSITION_ROLES = ("prediction", "support")  # p_e and s_e

NULL_PERCENTILE = 95

MARGIN_STATISTICS = ("mean", "std", "p10", "p50", "p90", "share_positive")


@dataclasses.dataclass(frozen=True)
class ProbeIndex:
    """What forming means needs to know of the probe set.

    Attributes:
      sample_ids: of the N records, in order.
      splits: the split names, in order.
      encoded: the records as arrays.
      difficulty: [N] easy or hard.
      axis_values: axis -> [N, Q] int, the value each read falls under.
    """

    sample_ids: tuple[str, ...]
    splits: tuple[str, ...]
    encoded: EncodedRecords
    difficulty: np.ndarray
    axis_values: Mapping[str, np.ndarray]

    @classmethod
    def of(
        cls,
        records: Sequence[Record],
        encoded: EncodedRecords,
        splits: Sequence[str],
        difficulty: Mapping[str, str],
    ) -> ProbeIndex:
        """Returns the index of a probe set's records."""
        axis_values = {}
        for axis in (*SEQUENCE_AXES, *EVENT_AXES):
            values = np.zeros(encoded.is_read.shape, int)
            for n, record in enumerate(records):
                events = record["query_events"]
                values[n, : len(events)] = (
                    [event[axis] for event in events] if axis in EVENT_AXES else record["axes"][axis]
                )
            axis_values[axis] = values
        return cls(
            sample_ids=tuple(record["sample_id"] for record in records),
            splits=tuple(splits),
            encoded=encoded,
            difficulty=np.array([difficulty[record["sample_id"]] for record in records]),
            axis_values=axis_values,
        )

    def split_weights(self) -> np.ndarray:
        """Returns which records each of `all` and the splits holds, bool [1 + splits, N]."""
        own = self.encoded.splits == np.arange(len(self.splits))[:, None]
        return np.concatenate([np.ones((1, len(self.encoded)), bool), own])


def build_dataset(
    arrays: Mapping[str, np.ndarray],
    steps: Sequence[int],
    probe: ProbeIndex,
    *,
    reference: Mapping[str, np.ndarray] | None,
) -> xr.Dataset:
    """Returns every mean of a sweep, labelled by step, split, stage, layer, head, ….

    Args:
      arrays: measured sums [C, N, …] by name, as `collect` returns them, for the checkpoints in `steps`.
      steps: the training steps, ascending.
      probe: what the records are.
      reference: the arrays of the checkpoint that drift is also measured to; that drift is NaN where None.

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
            "difficulty": ["easy", "hard"],
            "margin_statistic": list(MARGIN_STATISTICS),
        },
        attrs={"conventions": "means over read events; see docs/definitions.md"},
    )

    def put(name: str, dims: Sequence[str], values: np.ndarray, long_name: str, units: str) -> None:
        dataset[name] = (("step", *dims), values, {"long_name": long_name, "units": units})

    def by_split(sums_CxN: np.ndarray, counts: np.ndarray = reads) -> np.ndarray:
        """Returns per-read means by split from per-sequence sums: [C, N, …] to [C, splits, …]."""
        totals = np.einsum("cn...,zn->cz...", sums_CxN.astype(np.float64), in_split)
        return _ratio(totals, np.broadcast_to(counts.reshape(-1, *[1] * (totals.ndim - 2)), totals.shape))

    put_count = {"long_name": "number of read events", "units": "events"}
    dataset["read_count"] = (("split",), reads, put_count)
    for name, (source, long_name, units) in READ_MEANS.items():
        means, counts = _mean_over_reads(arrays[source], in_split, is_read)
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
    difficulty = np.stack([probe.difficulty == tag for tag in ("easy", "hard")])
    put(
        "difficulty_accuracy",
        ("difficulty",),
        _mean_over_reads(correct, difficulty, is_read)[0],
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
    _put_probes(dataset, put, arrays, probe, in_split)
    _put_changes(dataset, put)
    _put_drift(put, arrays, reference)
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


def _put_probes(
    dataset: xr.Dataset, put, arrays: Mapping[str, np.ndarray], probe: ProbeIndex, in_split: np.ndarray
) -> None:
    """Trained probes: accuracy and null by split, target, position and stage; the controls are labelled in `attrs`."""
    if f"probe/{PROBE_TARGETS[0]}" not in arrays:
        return
    dataset.coords["target"] = list(PROBE_TARGETS)
    is_read = probe.encoded.is_read
    with_stale = is_read & (probe.encoded.stale_values != PAD_ID)
    counted = {"stale_value": with_stale, "current_vs_stale": with_stale}
    accuracies, nulls = {}, {}
    for target in (*PROBE_TARGETS, "current_vs_stale"):
        reads = in_split @ counted.get(target, is_read).sum(axis=1)
        right = np.einsum("cng,zn->czg", arrays[f"probe/{target}"].astype(np.float64), in_split)
        accuracies[target] = _ratio(right, np.broadcast_to(reads[None, :, None], right.shape))
        own = arrays[f"null/{target}"].astype(np.float64)  # [C, permutations, splits, groups]
        permuted = np.concatenate([own.sum(axis=2, keepdims=True), own], axis=2)
        shares = _ratio(permuted, np.broadcast_to(reads[None, None, :, None], permuted.shape))
        nulls[target] = np.percentile(shares, NULL_PERCENTILE, axis=1)

    def by_position(values: Mapping[str, np.ndarray]) -> np.ndarray:
        stacked = np.stack([values[target] for target in PROBE_TARGETS], axis=2)  # [C, splits, targets, 2 S]
        return stacked.reshape(*stacked.shape[:3], len(POSITION_ROLES), -1)

    dims = ("split", "target", "position_role", "stage")
    put("probe_accuracy", dims, by_position(accuracies), "accuracy of a trained ridge probe of the target", "1")
    put("probe_null", dims, by_position(nulls), "95th percentile of the accuracy with permuted fit labels", "1")
    dataset["probe_accuracy"].attrs["controls"] = (
        "query_key at prediction and value at support are the token that stands there: controls, not findings"
    )
    meaning = "share of reads whose value probe at p_e ranks the current value above the stale one; chance 0.5"
    put("probe_current_vs_stale", ("split", "stage"), accuracies["current_vs_stale"], meaning, "1")
    meaning = "95th percentile of that share with permuted fit labels"
    put("probe_current_vs_stale_null", ("split", "stage"), nulls["current_vs_stale"], meaning, "1")


def _put_changes(dataset: xr.Dataset, put) -> None:
    """The change of every measure of heads and MLPs from the previous checkpoint."""
    for name in [name for name in dataset.data_vars if name.startswith(("head_", "mlp_"))]:
        values = dataset[name]
        changes = change_from_previous(values.values)
        put(f"{name}_change", values.dims[1:], changes, f"change of {name} from the previous checkpoint", values.units)


def build_events(arrays: Mapping[str, np.ndarray], steps: Sequence[int], probe: ProbeIndex) -> xr.Dataset:
    """Returns the per-read values and per-sequence sums that every mean and interval is made from."""
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
    for name, values in arrays.items():
        kind = name.partition("/")[0]
        if kind == "read" and values.dtype != bool:
            values = np.where(probe.encoded.is_read, values, np.nan)  # positions that are no read hold no value
        if kind == "probe":
            both = values.reshape(*values.shape[:2], -1, len(stages))  # p_e alone, or p_e and s_e
            own = dims[kind] if both.shape[2] > 1 else (*per_sequence, "stage")
            dataset[name.replace("/", "_")] = (own, both if both.shape[2] > 1 else both[:, :, 0])
        elif kind in dims:
            dataset[name.replace("/", "_")] = (dims[kind][: values.ndim], values)
    return dataset


def _mean_over_reads(
    values_CxNxQ: np.ndarray, groups_ZxN: np.ndarray, is_read_NxQ: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean over the reads of each group of records, and their number, [C, Z] each.

    Reads whose value is NaN are left out; the mean of none is NaN.
    """
    values = values_CxNxQ.astype(np.float64)
    counted = is_read_NxQ & ~np.isnan(values)
    totals = np.einsum("cn,zn->cz", np.where(counted, values, 0.0).sum(axis=-1), groups_ZxN)
    counts = np.einsum("cn,zn->cz", counted.sum(axis=-1), groups_ZxN)
    return _ratio(totals, counts), counts


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
    for axis, values in probe.axis_values.items():
        for value in np.unique(values[probe.encoded.is_read]):
            member = probe.encoded.is_read & (values == value)
            names.append(f"{axis}={value}")
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
    roles = probe.encoded.token_roles
    targets = roles[:, 1:] != NO_ROLE
    role_counts = np.stack([(roles[:, 1:] == role).sum(axis=1) for role in range(len(TOKEN_ROLES))], axis=1)
    target_counts = in_split @ targets.sum(axis=1)
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
        _ratio(right, np.broadcast_to(in_split @ role_counts, right.shape)),
        "share of targets of a role predicted right",
        "1",
    )


def _put_drift(put, arrays: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray] | None) -> None:
    def with_all(state_sums_xZxSxD: np.ndarray) -> np.ndarray:
        return np.concatenate([state_sums_xZxSxD.sum(axis=-3, keepdims=True), state_sums_xZxSxD], axis=-3)

    to_previous, to_reference = [], []
    for role in POSITION_ROLES:
        states = with_all(arrays[f"state/{role}"])  # [C, splits, S, D]
        missing = np.full(states.shape[:3], np.nan)
        previous = missing.copy()
        previous[1:] = cosine_drift(states[1:], states[:-1])
        to_previous.append(previous)
        if reference is None:
            to_reference.append(missing)
        else:
            to_reference.append(cosine_drift(states, with_all(reference[f"state/{role}"])[None]))
    dims = ("split", "position_role", "stage")
    for name, values, other in (
        ("residual_drift", to_previous, "previous"),
        ("residual_drift_to_reference", to_reference, "reference"),
    ):
        meaning = f"1 - cosine of the mean state at p_e or s_e with that of the {other} checkpoint"
        put(name, dims, np.stack(values, axis=2), meaning, "1")


def _ratio(totals: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(totals, counts, out=np.full(totals.shape, np.nan), where=counts != 0)
