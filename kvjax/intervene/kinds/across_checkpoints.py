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
from kvjax.intervene.pair_runs import Effects, answer_effects, window_positions
from kvjax.intervene.pair_tables import baselines, put_runs
from kvjax.intervene.places import over_places, patch_edit, stage_places
from kvjax.intervene.recovery import means_per_read
from kvjax.intervene.summary_text import interval, run_lines
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params
from kvjax.model.restart import RESTART_CAPTURE, WINDOW_CAPTURE, CleanRun, restart, run_clean
from kvjax.model.sites import STAGE_SITES, Trace, take_positions
from kvjax.task.corruption import PAIR_ROLES
from kvjax.task.pair_encoding import EncodedPairs

ROLES = ("all", *PAIR_ROLES)

_CAPTURE = (*RESTART_CAPTURE, *WINDOW_CAPTURE)


def across_effects(stacked: Params, config: DecoderConfig, batch: EncodedPairs, *, window: int) -> Effects:
    """Runs the clean streams at each checkpoint A with each stage taken from each checkpoint B.

    States of A itself are taken whole alone, as a control: at the positions of a role they are A's own run.

    Args:
      stacked: parameters of all checkpoints, stacked on a leading axis C.
      config: their shape.
      batch: a microbatch of pairs.
      window: positions from the first changed one to the last affected read; roles after `before` lie there.

    Returns:
      Of each of `answer_effects`: `<name>` [B, A, B's checkpoint, stages, `ROLES`], and A's own `<name>_base` [B, A].
    """
    tokens, roles = jnp.asarray(batch.clean_tokens), jnp.asarray(batch.roles)
    window_BxW = window_positions(batch, window)
    whole = jnp.stack([jnp.ones_like(roles, bool), roles == PAIR_ROLES.index("before")])
    later = jnp.stack([roles == index for index in range(1, len(PAIR_ROLES))])
    stages = tuple(stage_places(config.n_layers).values())
    traces = jax.lax.map(lambda params: run_clean(params, config, tokens, STAGE_SITES)[1].trace, stacked)

    def at_checkpoint(at: tuple[jax.Array, Params]) -> Effects:
        own_index, params = at
        logits, own = run_clean(params, config, tokens, _CAPTURE)
        base = answer_effects(take_positions(logits, batch.prediction_positions, 1), batch)

        def taken_from(at: tuple[jax.Array, Trace]) -> Effects:
            other_index, trace = at
            theirs, is_own = CleanRun(tokens, trace), own_index == other_index

            def at_stage(site: str, layer: jax.Array | int, head: jax.Array) -> Effects:
                def under(mask_BxT: jax.Array, *, windowed: bool) -> Effects:
                    edits = patch_edit(config, theirs, site, layer, head, mask_BxT)
                    within = {"window_BxW": window_BxW} if windowed else {}
                    positions = batch.prediction_positions
                    return answer_effects(
                        restart(params, config, own, edits, layer=layer, positions_BxQ=positions, **within), batch
                    )

                def over(masks: jax.Array, is_control: jax.Array, *, windowed: bool) -> Effects:
                    def one(at: tuple[jax.Array, jax.Array]) -> Effects:
                        mask_BxT, runs = at
                        return jax.lax.cond(runs, lambda: under(mask_BxT, windowed=windowed), lambda: base)

                    return jax.lax.map(one, (masks, ~is_own | is_control))

                at_whole = over(whole, jnp.array([True, False]), windowed=False)
                at_later = over(later, jnp.zeros(len(later), bool), windowed=True)
                return jax.tree.map(lambda *x: jnp.concatenate(x), at_whole, at_later)

            return over_places(stages, config.n_layers, at_stage)

        found = jax.lax.map(taken_from, (jnp.arange(num_checkpoints), traces))
        return found | {f"{name}_base": x for name, x in base.items()}

    num_checkpoints = len(jax.tree.leaves(stacked)[0])
    found = jax.lax.map(at_checkpoint, (jnp.arange(num_checkpoints), stacked))
    return {name: jnp.moveaxis(x, -1, 0) for name, x in found.items()}


@dataclasses.dataclass(frozen=True)
class TakeStates:
    """The measurement: every checkpoint run on with the states of every other."""

    config: DecoderConfig

    def __call__(self, stacked: Params, batch: PairBatch) -> Effects:
        """Runs `across_effects`."""
        return across_effects(stacked, self.config, batch.pairs, window=batch.window)


def analyse(inputs: InterventionInputs) -> Outcome:
    """Runs each checkpoint on with each stage's states of each other."""
    stages = list(stage_places(inputs.config.n_layers))
    together = jax.tree.map(lambda x: x[None], inputs.stacked)
    found = inputs.over_streams.run(TakeStates(inputs.config), together)
    arrays = {name: x[0].swapaxes(0, 1) for name, x in found.items()}  # [A, N, …]
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
        arrays["logit_difference"][np.arange(len(inputs.steps)), :, np.arange(len(inputs.steps)), :, 0]
        - arrays["logit_difference_base"][..., None]
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
