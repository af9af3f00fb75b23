"""Residual states of a window: taken across checkpoints, and cut into subspaces; as labelled arrays and a summary."""

from __future__ import annotations

import functools

import jax
import numpy as np

from kvjax.intervene.across_checkpoints import ROLES, across_effects
from kvjax.intervene.inputs import ANSWER_ACCURACY, CLEAN_METRIC, Outcome, Study, number, numbers
from kvjax.intervene.pair_runs import measuring
from kvjax.intervene.patching import stage_places
from kvjax.intervene.recovery import means_per_read, recoveries
from kvjax.intervene.subspaces import (
    OPERATIONS,
    POSITIONS,
    SUBSPACES,
    orthonormal_bases,
    probe_directions,
    subspace_effects,
    usable_ranks,
)
from kvjax.model.decoder import DecoderConfig


def across_checkpoints(study: Study) -> Outcome:
    """Returns every ordered pair of checkpoints: the one run on with each stage's states of the other."""
    stages = list(stage_places(study.config.n_layers))
    arrays = study.pairs.run(measuring(_across, study.config), study.stacked, study.stacked)
    dataset = study.dataset(states_of=study.steps, stage=stages, position_role=ROLES)
    dims = ("statistic", "pair_kind", "step", "states_of", "stage", "position_role")
    metric = means_per_read(study.groups, arrays["difference"])
    dataset["metric"] = (dims, metric, CLEAN_METRIC)
    accuracy = means_per_read(study.groups, arrays["clean_correct"])
    dataset["answer_accuracy"] = (dims, accuracy, ANSWER_ACCURACY)
    dataset["stage"].attrs["note"] = (
        "step is run on with the states of states_of; final_norm goes through step's unembedding"
    )
    effects = []
    for a, b in np.ndindex(len(study.steps), len(study.steps)):
        for s, stage in enumerate(stages):
            by_kind = {
                kind: {
                    "metric": numbers(metric[:, k, a, b, s, 0]),
                    "answer_accuracy": numbers(accuracy[:, k, a, b, s, 0]),
                }
                for k, kind in enumerate(study.groups.kinds)
            }
            effects.append({"step": study.steps[a], "states_of": study.steps[b], "stage": stage, **by_kind})
    same = np.abs(
        arrays["difference"][np.arange(len(study.steps)), :, np.arange(len(study.steps))]
        - arrays["difference_base"][..., None, None]
    )
    return Outcome(
        dataset,
        {
            "baseline": {"clean": study.baseline(arrays, "base")},
            "effects": effects,
            "controls": {"largest_effect_of_own_states_in_logits": float(same.max())},
            "notes": ["final_norm is the state of states_of through the unembedding of step"],
        },
    )


def subspaces(study: Study) -> Outcome:
    """Returns every stage's probe, class-mean and random subspaces removed, kept alone and exchanged."""
    ids = {"key_ids": tuple(study.vocabulary.key_ids.tolist()), "value_ids": tuple(study.vocabulary.value_ids.tolist())}
    directions = study.each_checkpoint(functools.partial(_directions, **ids), study.fit_bucket.batches)
    num_values = len(study.vocabulary.value_tokens)
    ranks = usable_ranks(study.config.d_model, num_values)
    bases = np.stack(
        [orthonormal_bases({name: x[c] for name, x in directions.items()}, max(ranks)) for c in range(len(study.steps))]
    )
    tree = {"params": study.stacked, "mean": directions["mean"], "bases": bases}
    arrays = study.pairs.run(measuring(_subspaces, study.config, num_values), tree)
    dataset = study.dataset(
        stage=stage_places(study.config.n_layers),
        position_role=POSITIONS,
        subspace=SUBSPACES,
        subspace_rank=ranks,
        operation=OPERATIONS,
    )
    dims = ("statistic", "pair_kind", "step", "stage", "position_role", "subspace", "subspace_rank", "operation")
    lost = recoveries(study.groups, arrays["difference"], arrays["difference_base"], arrays["difference_source"])
    meaning = "share of the clean run's lead over the corrupted one that is lost"
    dataset["loss"] = (dims, lost, {"long_name": meaning, "units": "1"})
    accuracy = means_per_read(study.groups, arrays["clean_correct"])
    dataset["clean_answer_accuracy"] = (
        dims,
        accuracy,
        ANSWER_ACCURACY,
    )
    effects = []
    for operation in OPERATIONS:
        for k, kind in enumerate(study.groups.kinds):
            for c, step in enumerate(study.steps):
                for role in POSITIONS:
                    at = dataset["loss"].sel(statistic="estimate", operation=operation, position_role=role)
                    at = at.isel(pair_kind=k, step=c)
                    gap = (at.sel(subspace="probe") - at.sel(subspace="random")).values  # [stages, ranks]
                    if not np.isfinite(gap).any():
                        continue
                    stage, rank = np.unravel_index(np.nanargmax(gap if operation != "kept" else -gap), gap.shape)
                    here = {"stage": int(stage), "subspace_rank": int(rank)}
                    effects.append(
                        {
                            "operation": operation,
                            "pair_kind": kind,
                            "step": step,
                            "position_role": role,
                            "stage": str(dataset["stage"].values[stage]),
                            "rank": int(ranks[rank]),
                            "loss": {s: number(at.isel(here).sel(subspace=s)) for s in SUBSPACES},
                        }
                    )
    summary = {
        "baseline": {"clean": study.baseline(arrays, "base"), "corrupted": study.baseline(arrays, "source")},
        "effects": effects,
        "controls": {"random_subspaces": "of the same rank, beside each effect"},
    }
    return Outcome(dataset, summary)


def _across(config, params, batch, extra, window, others):
    del extra, window
    return across_effects(params, config, batch, others)


def _subspaces(config, num_values, tree, batch, extra, window):
    del extra
    return subspace_effects(tree, config, batch, window=window, num_values=num_values)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("key_ids", "value_ids"))
def _directions(config: DecoderConfig, params, fit, *, key_ids, value_ids):
    return probe_directions(config, params, fit, key_ids=np.array(key_ids), value_ids=np.array(value_ids))
