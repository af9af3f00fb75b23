"""Path patching: what flows from one component to another along the direct path alone.

The receiver's input gets the difference of the sender's output between the two runs. Everything before the receiver
stays as in the base run, the receiver and everything after it are computed again (`patched_paths`).

Definitions: docs/definitions.md, "Interventions". Source: Goldowsky-Dill et al., Localizing model behavior with path
patching (2023); Wang et al., Interpretability in the wild (2022).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from kvjax.execution.over_pairs import PairBatch
from kvjax.intervene.inputs import ANSWER_ACCURACY, InterventionInputs, Outcome
from kvjax.intervene.kinds.kind import Kind
from kvjax.intervene.pair_runs import (
    DENOISING,
    DIRECTIONS,
    Effects,
    PairRuns,
    both_directions,
    run_streams,
    with_runs,
)
from kvjax.intervene.pair_tables import (
    PAIR_METRIC,
    RECOVERY,
    baselines,
    each_direction,
    largest_recoveries,
    metric_recoveries,
    of_metrics,
    put_runs,
)
from kvjax.intervene.patched_paths import patched_paths, rows_of_paths
from kvjax.intervene.paths import all_edges
from kvjax.intervene.recovery import means_per_read
from kvjax.intervene.summary_text import center_step, largest_by_pair_kind, run_lines
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params


def path_effects(params: Params, config: DecoderConfig, runs: PairRuns) -> Effects:
    """Patches every direct path.

    Args:
      params, config: one checkpoint.
      runs: both runs of a microbatch of pairs.

    Returns:
      Of each of `answer_effects`: `<name>` [B, edges] in the order of `all_edges`; `<name>_base`, `<name>_source` [B].
    """
    return with_runs(patched_paths(params, config, runs), runs)


@dataclasses.dataclass(frozen=True)
class PatchPaths:
    """The measurement: every direct path patched, in both directions."""

    config: DecoderConfig

    def __call__(self, params: Params, batch: PairBatch) -> Effects:
        """Runs `path_effects` for each direction, [B, directions, …]."""
        runs = run_streams(params, self.config, batch.pairs, window=batch.window)
        return both_directions(lambda at: path_effects(params, self.config, runs.towards(at)))


def analyse(inputs: InterventionInputs) -> Outcome:
    """Patches every direct path, in both directions."""
    edges = all_edges(inputs.config.n_layers, inputs.config.n_heads)
    over = inputs.over_rows(functools.partial(rows_of_paths, inputs.config))
    by_direction = each_direction(over.run(PatchPaths(inputs.config), inputs.stacked))
    names = [f"{edge.sender.name}->{edge.receiver.name}" for edge in edges]
    dataset = inputs.dataset(direction=DIRECTIONS, path=names, pair=inputs.pair_ids)
    dataset["sender"] = ("path", [edge.sender.name for edge in edges])
    dataset["receiver"] = ("path", [edge.receiver.name for edge in edges])
    found = np.stack([metric_recoveries(inputs.groups, arrays, arrays) for arrays in by_direction], axis=2)
    dims = ("direction", "pair_kind", "step", "path")
    dataset["recovery"] = (("statistic", "metric", *dims), found, RECOVERY)
    accuracy = np.stack([means_per_read(inputs.groups, a["clean_correct"]) for a in by_direction], axis=1)
    dataset["clean_answer_accuracy"] = (("statistic", *dims), accuracy, ANSWER_ACCURACY)
    stacked = np.stack([of_metrics(arrays) for arrays in by_direction], axis=1)
    dataset["metric_by_path"] = (("metric", "direction", "step", "pair", "path"), stacked, PAIR_METRIC)
    put_runs(dataset, inputs, by_direction[DENOISING], clean="source", corrupted="base")
    return Outcome(dataset, summarise(dataset, inputs.metric) | {"controls": {}})


def summarise(dataset: xr.Dataset, metric: str) -> dict[str, Any]:
    """Summarises the largest recoveries of a metric along one path."""
    return baselines(dataset, metric) | {"effects": {"paths": largest_recoveries(dataset, "", {}, metric)}}


def summary_lines(document: Mapping[str, Any]) -> list[str]:
    """Writes both runs, and the paths of the largest recovery."""
    step = center_step(document)
    return [
        *run_lines(document, [step]),
        f"recovery of {document['metric'].replace('_', ' ')} at step {step} along one direct path, the largest:",
        *largest_by_pair_kind(document, document["effects"]["paths"], lambda e: e["path"]),
    ]


KIND = Kind("path_patching", analyse, summary_lines, summarise=summarise)
