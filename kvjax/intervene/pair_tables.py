"""What the tables and summaries of patched runs share, whatever is patched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from kvjax.intervene.inputs import InterventionInputs, numbers
from kvjax.intervene.metrics import METRICS, UNITS
from kvjax.intervene.pair_runs import DIRECTIONS
from kvjax.intervene.recovery import PairGroups, means_per_read, recoveries
from kvjax.task.corruption import PAIR_KINDS

TOP = 12  # effects a summary names

ANSWERS = ("clean", "corrupted")  # the answer that a share of reads is of

RECOVERY = {"long_name": "(patched - base) / (source - base) of the metric", "units": "1"}
PAIR_METRIC = {"long_name": "metric, summed over a pair's affected reads", "units": UNITS}

# Why a recovery between two runs says nothing, in the order in which they are named.
FAILURES = {
    "not_above_chance": "the clean run gives the clean answer no more often than chance",
    "no_gap": "the metric does not tell the clean run from the corrupted one",
}


def each_direction(arrays: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Splits arrays [C, N, direction, …] by `DIRECTIONS`."""
    return [{name: x[:, :, d] for name, x in arrays.items()} for d in range(len(DIRECTIONS))]


def of_metrics(arrays: Mapping[str, np.ndarray], suffix: str = "") -> np.ndarray:
    """Stacks one array of each metric on a leading axis, float32."""
    return np.stack([arrays[f"{name}{suffix}"] for name in METRICS]).astype(np.float32)


def metric_recoveries(
    groups: PairGroups, patched: Mapping[str, np.ndarray], runs: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Forms the recoveries of every metric, [3, metrics, kinds, C, *X].

    Args:
      groups: kinds of pairs, and resamples.
      patched: each metric of the patched runs, [C, N, *X].
      runs: each metric of the runs without intervention, `<metric>_base` and `<metric>_source` [C, N].
    """
    each = [recoveries(groups, patched[m], runs[f"{m}_base"], runs[f"{m}_source"]) for m in METRICS]
    return np.stack(each, axis=1)


def put_runs(dataset: xr.Dataset, inputs: InterventionInputs, arrays: Mapping[str, np.ndarray], **runs: str) -> None:
    """Adds what runs without intervention answer: of every pair, of each kind of pair, and whether the clean one fails.

    Args:
      dataset: gets `metric_of_runs` and `answer_accuracy_of_runs`, with intervals; `kind_of_pair`, `affected_reads`,
        `metric_<run>`, `clean_answers_<run>` and `corrupted_answers_<run>` of every pair if it has the coordinate
        `pair`; and `clean_run_fails`.
      inputs: of the kind of intervention.
      arrays: effects with those of the runs beside them.
      runs: the suffix in `arrays` of the run `clean`, and of `corrupted` if there is one.
    """
    groups = inputs.groups
    metrics = {run: of_metrics(arrays, f"_{suffix}") for run, suffix in runs.items()}
    answers = {
        run: np.stack([arrays[f"{answer}_correct_{suffix}"] for answer in ANSWERS]) for run, suffix in runs.items()
    }
    if "pair" in dataset.coords:
        dataset.coords["kind_of_pair"] = ("pair", [PAIR_KINDS[code] for code in inputs.encoded.kinds])
        attrs = {"long_name": "affected reads of a pair, which its sums are over", "units": "events"}
        dataset["affected_reads"] = ("pair", groups.reads_N, attrs)
    for run in runs if "pair" in dataset.coords else ():
        dataset[f"metric_{run}"] = (("metric", "step", "pair"), metrics[run], PAIR_METRIC)
        for answer, counts in zip(ANSWERS, answers[run], strict=True):
            meaning = f"affected reads whose argmax is the {answer} answer"
            attrs = {"long_name": meaning, "units": "events"}
            dataset[f"{answer}_answers_{run}"] = (("step", "pair"), counts, attrs)

    def by_kind(of_runs: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.stack([np.stack([means_per_read(groups, x) for x in of_run], 1) for of_run in of_runs.values()], 2)

    dataset.coords["run"], dataset.coords["answer"] = list(runs), list(ANSWERS)
    dims = ("run", "pair_kind", "step")
    dataset["metric_of_runs"] = (
        ("statistic", "metric", *dims),
        by_kind(metrics),
        {"long_name": "metric of a run without intervention, mean over affected reads", "units": UNITS},
    )
    dataset["answer_accuracy_of_runs"] = (
        ("statistic", "answer", *dims),
        by_kind(answers),
        {"long_name": "share of affected reads at which a run without intervention gives an answer", "units": "1"},
    )
    dataset["answer_accuracy_of_runs"].attrs["chance"] = inputs.chance
    _put_failures(dataset, inputs, metrics)


def _put_failures(dataset: xr.Dataset, inputs: InterventionInputs, metrics: Mapping[str, np.ndarray]) -> None:
    low = dataset["answer_accuracy_of_runs"].sel(statistic="low", answer="clean", run="clean").values  # [kinds, C]
    better = np.array([metric.better for metric in METRICS.values()]).reshape(-1, 1, 1)
    # A low end that does not exist, as of a single pair, is above nothing.
    at_chance = np.broadcast_to(~(low > inputs.chance), (len(METRICS), *low.shape))
    no_gap = np.zeros_like(at_chance)  # of the clean run alone
    if "corrupted" in metrics:
        gaps = better * (metrics["clean"] - metrics["corrupted"])
        no_gap = np.stack([~(means_per_read(inputs.groups, x)[1] > 0) for x in gaps])
    fails = {"not_above_chance": at_chance, "no_gap": no_gap}
    dataset.coords["failure"] = list(FAILURES)
    meaning = "whether a recovery is one of nothing, and why: " + "; ".join(f"{k}: {v}" for k, v in FAILURES.items())
    dataset["clean_run_fails"] = (
        ("failure", "metric", "pair_kind", "step"),
        np.stack([fails[name] for name in FAILURES]),
        {"long_name": meaning},
    )


def baselines(dataset: xr.Dataset, metric: str) -> dict[str, Any]:
    """Summarises the runs without intervention, as `put_runs` added them.

    Returns:
      `metric`: its name. `chance`: of an answer. `baseline`: by run, kind of pair and step the metric, and the shares
      of affected reads that get the clean and the corrupted stream's answer. `clean_run_fails`: the kinds of pair and
      steps whose recoveries say nothing, each with the `reasons` among `FAILURES`.
    """
    found: dict[str, Any] = {}
    for run in dataset["run"].values:
        for kind in dataset["pair_kind"].values:
            for step in dataset["step"].values:
                at = {"run": run, "pair_kind": kind, "step": step}
                entry = {"metric": numbers(dataset["metric_of_runs"].sel({**at, "metric": metric}).values)}
                for answer in ANSWERS:
                    share = dataset["answer_accuracy_of_runs"].sel({**at, "answer": answer})
                    entry[f"{answer}_answer_accuracy"] = numbers(share.values)
                found.setdefault(str(run), {}).setdefault(str(kind), {})[str(step)] = entry
    chance = float(dataset["answer_accuracy_of_runs"].attrs["chance"])
    return {"metric": metric, "chance": chance, "baseline": found, "clean_run_fails": failures(dataset, metric)}


def failures(dataset: xr.Dataset, metric: str) -> list[dict[str, Any]]:
    """Lists the kinds of pair and steps whose recoveries say nothing, each with the `reasons`."""
    rows = []
    fails = dataset["clean_run_fails"].sel(metric=metric).transpose("pair_kind", "step", "failure").values
    for k, c in np.argwhere(fails.any(axis=-1)):
        reasons = [reason for reason, holds in zip(FAILURES, fails[k, c], strict=True) if holds]
        kind, step = str(dataset["pair_kind"].values[k]), int(dataset["step"].values[c])
        rows.append({"pair_kind": kind, "step": step, "reasons": reasons})
    return rows


def beside_recovery(summary: Mapping[str, Any], pair_kind: str, step: int) -> dict[str, Any]:
    """Looks up what stands beside every recovery: both runs without intervention, and whether the clean one fails.

    Args:
      summary: from `baselines`.
      pair_kind, step: of the recovery.

    Returns:
      `clean_run` and `corrupted_run`: estimates of the metric and of both answers' accuracies. `clean_run_fails`.
    """
    runs = {
        f"{run}_run": {name: found["estimate"] for name, found in by_kind[pair_kind][str(step)].items()}
        for run, by_kind in summary["baseline"].items()
    }
    failing = any((row["pair_kind"], row["step"]) == (pair_kind, step) for row in summary["clean_run_fails"])
    return runs | {"clean_run_fails": failing}


def largest_recoveries(dataset: xr.Dataset, suffix: str, where: Mapping[str, Any], metric: str) -> list[dict[str, Any]]:
    """Lists the largest recoveries of each kind of pair, direction and step, with what stands beside each.

    Args:
      dataset: recoveries and accuracies, and the runs that `put_runs` added.
      suffix: of their names, such as `by_role`; empty for none.
      where: what is chosen along further dimensions.
      metric: whose recoveries are ranked.
    """
    rows = []
    outer = ("direction", "pair_kind", "step")
    recovery, accuracy = (
        dataset[f"{name}_{suffix}" if suffix else name] for name in ("recovery", "clean_answer_accuracy")
    )
    recovery, accuracy = recovery.sel({**where, "metric": metric}), accuracy.sel(where)
    summary = baselines(dataset, metric)
    inner = [dim for dim in recovery.dims if dim not in ("statistic", *outer)]
    recovery, accuracy = (x.transpose(*outer, "statistic", *inner) for x in (recovery, accuracy))
    for at in np.ndindex(*recovery.shape[: len(outer)]):
        here = recovery.values[at]
        flat, right = here.reshape(len(here), -1), accuracy.values[at].reshape(len(here), -1)
        order = np.argsort(-np.nan_to_num(flat[0], nan=-np.inf), kind="stable")
        for index in order[np.isfinite(flat[0, order])][:TOP]:
            place = (*at, *np.unravel_index(index, here.shape[1:]))
            labels = {dim: recovery[dim].values[i] for dim, i in zip((*outer, *inner), place, strict=True)}
            row = {dim: int(label) if dim == "step" else str(label) for dim, label in labels.items()}
            found = {"recovery": numbers(flat[:, index]), "clean_answer_accuracy": numbers(right[:, index])}
            rows.append(row | found | beside_recovery(summary, row["pair_kind"], row["step"]))
    return rows


def component_table(dataset: xr.Dataset, components: Sequence[str], metric: str) -> list[dict[str, Any]]:
    """Lists the recovery of every component at every step by kind of pair, patched at all positions, denoising.

    Returns:
      Rows of `pair_kind` and `component`, in their order, each with `by_step`: step -> recovery with interval, and
      whether the clean run fails.
    """
    found = dataset["recovery_by_role"].sel(metric=metric, direction="denoising", position_role="all")
    found = found.sel(place=list(components)).transpose("pair_kind", "place", "step", "statistic")
    failing = {(row["pair_kind"], row["step"]) for row in failures(dataset, metric)}
    steps = found["step"].values.tolist()
    rows = []
    for k, kind in enumerate(found["pair_kind"].values.tolist()):
        for p, component in enumerate(components):
            by_step = {
                str(step): numbers(x) | {"clean_run_fails": (kind, step) in failing}
                for step, x in zip(steps, found.values[k, p], strict=True)
            }
            rows.append({"pair_kind": kind, "component": component, "by_step": by_step})
    return rows
