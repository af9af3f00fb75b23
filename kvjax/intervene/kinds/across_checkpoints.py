"""Residual states across checkpoints: A run on with a stage's states of B.

Whether A's later layers can read B's state at a stage says which half of the mechanism changed between the two.
`final_norm` is B's state through A's unembedding.

Definitions: docs/definitions.md, "Interventions".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from kvjax.execution.over_pairs import PairBatch
from kvjax.intervene.inputs import ANSWER_ACCURACY, CLEAN_METRIC, InterventionInputs, Outcome, numbers
from kvjax.intervene.kinds.kind import Kind
from kvjax.intervene.metrics import METRICS
from kvjax.intervene.pair_runs import PAIR_CAPTURE, Effects, answer_effects
from kvjax.intervene.pair_tables import baselines, put_runs
from kvjax.intervene.places import over_places, patch_edit, stage_places
from kvjax.intervene.recovery import means_per_read
from kvjax.intervene.summary_text import interval, run_lines
from kvjax.model.decoder import DecoderConfig, Params
from kvjax.model.restart import restart, run_clean
from kvjax.model.sites import take_positions
from kvjax.task.corruption import PAIR_ROLES
from kvjax.task.pair_encoding import EncodedPairs

ROLES = ("all", *PAIR_ROLES)


def across_effects(params: Params, config: DecoderConfig, batch: EncodedPairs, stacked_others: Any) -> Effects:
    """Runs the clean streams at checkpoint A with each stage taken from each checkpoint B.

    Args:
      params: of checkpoint A.
      config: the shape of all.
      batch: a microbatch of pairs.
      stacked_others: parameters of the checkpoints B, stacked on a leading axis.

    Returns:
      Of each of `answer_effects`: `<name>` [B, others, stages, `ROLES`], and A's own `<name>_base` [B].
    """
    tokens = jnp.asarray(batch.clean_tokens)
    logits, own = run_clean(params, config, tokens, PAIR_CAPTURE)
    base = answer_effects(take_positions(logits, batch.prediction_positions, 1), batch)
    roles = jnp.asarray(batch.roles)
    masks = jnp.concatenate(
        [jnp.ones((1, *roles.shape), bool), roles[None] == jnp.arange(len(PAIR_ROLES))[:, None, None]]
    )

    def taken_from(other: Params) -> Effects:
        _, theirs = run_clean(other, config, tokens, PAIR_CAPTURE)

        def at_stage(site: str, layer: jax.Array | int, head: jax.Array) -> Effects:
            def at_role(mask_BxT: jax.Array) -> Effects:
                edits = patch_edit(config, theirs, site, layer, head, mask_BxT)
                read = restart(params, config, own, edits, layer=layer, positions_BxQ=batch.prediction_positions)
                return answer_effects(read, batch)

            return jax.lax.map(at_role, masks)

        return over_places(tuple(stage_places(config.n_layers).values()), config.n_layers, at_stage)

    found = jax.lax.map(taken_from, stacked_others)
    return {name: jnp.moveaxis(x, -1, 0) for name, x in found.items()} | {f"{n}_base": x for n, x in base.items()}


@dataclasses.dataclass(frozen=True)
class TakeStates:
    """The measurement: one checkpoint run on with the states of all."""

    config: DecoderConfig

    def __call__(self, params: Params, batch: PairBatch, stacked_others: Params) -> Effects:
        """Runs `across_effects`."""
        return across_effects(params, self.config, batch.pairs, stacked_others)


def analyse(inputs: InterventionInputs) -> Outcome:
    """Runs each checkpoint on with each stage's states of each other."""
    stages = list(stage_places(inputs.config.n_layers))
    arrays = inputs.over_streams.run(TakeStates(inputs.config), inputs.stacked, inputs.stacked)
    dataset = inputs.dataset(states_of=inputs.steps, stage=stages, position_role=ROLES)
    dims = ("pair_kind", "step", "states_of", "stage", "position_role")
    metric = np.stack([means_per_read(inputs.groups, arrays[name]) for name in METRICS], axis=1)
    dataset["metric_by_stage"] = (("statistic", "metric", *dims), metric, CLEAN_METRIC)
    accuracy = means_per_read(inputs.groups, arrays["clean_correct"])
    dataset["answer_accuracy"] = (("statistic", *dims), accuracy, ANSWER_ACCURACY)
    dataset["stage"].attrs["note"] = (
        "step is run on with the states of states_of; final_norm goes through step's unembedding"
    )
    put_runs(dataset, inputs, arrays, clean="base")
    same = np.abs(
        arrays["logit_difference"][np.arange(len(inputs.steps)), :, np.arange(len(inputs.steps))]
        - arrays["logit_difference_base"][..., None, None]
    )
    controls = {"largest_effect_of_own_states_in_logits": float(same.max())}
    return Outcome(dataset, summarise(dataset, inputs.metric) | {"controls": controls})


def summarise(dataset: xr.Dataset, metric: str) -> dict[str, Any]:
    """Lists a metric and the answer accuracy of every ordered pair of checkpoints at every stage."""
    order = ("step", "states_of", "stage", "pair_kind", "statistic")
    whole = dataset.sel(position_role="all")
    found = whole["metric_by_stage"].sel(metric=metric).transpose(*order).values
    accuracy = whole["answer_accuracy"].transpose(*order).values
    steps, stages, kinds = (dataset[name].values.tolist() for name in ("step", "stage", "pair_kind"))
    effects = []
    for a, b, s in np.ndindex(len(steps), len(steps), len(stages)):
        by_kind = {
            kind: {"metric": numbers(found[a, b, s, k]), "answer_accuracy": numbers(accuracy[a, b, s, k])}
            for k, kind in enumerate(kinds)
        }
        effects.append({"step": steps[a], "states_of": steps[b], "stage": stages[s], **by_kind})
    notes = ["final_norm is the state of states_of through the unembedding of step"]
    return baselines(dataset, metric) | {"effects": effects, "notes": notes}


def summary_lines(document: Mapping[str, Any]) -> list[str]:
    """Writes the answer accuracy of the first checkpoint with states of the last, and the other way round."""
    first, last = document["steps"][0], document["steps"][-1]
    kind = next(iter(document["pairs"]["counts"]))
    found = {(e["step"], e["states_of"], e["stage"]): e[kind]["answer_accuracy"] for e in document["effects"]}
    lines = [
        *run_lines(document, list(dict.fromkeys([first, last]))),
        f"answer accuracy on the clean streams of {kind} pairs, with a stage's states of the other checkpoint:",
        f"{'':<20} {f'{first} with {last}':>20} {f'{last} with {first}':>20}",
    ]
    for stage in dict.fromkeys(e["stage"] for e in document["effects"]):
        both = (interval(found[a, b, stage]) for a, b in ((first, last), (last, first)))
        lines.append(f"{stage:<20} {' '.join(text.rjust(20) for text in both)}")
    return lines


KIND = Kind("across_checkpoints", analyse, summary_lines, summarise=summarise)
