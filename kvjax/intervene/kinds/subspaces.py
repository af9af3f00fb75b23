"""Residual subspaces: what a stage's state says about the answer only inside a few directions, or only outside them.

At one stage and one position of the affected reads a subspace of rank r is removed (the state's part in it is set to
the mean's), kept alone (the rest is set to the mean's), or exchanged between the runs of a pair. Subspaces are the row
space of a trained probe's weights, that of class means, and a random one of the same rank for scale.

Definitions: docs/definitions.md, "Interventions".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from kvjax.execution.fit_set import probe_labels
from kvjax.execution.over_pairs import PairBatch
from kvjax.execution.states_at_reads import form_states
from kvjax.intervene.inputs import ANSWER_ACCURACY, InterventionInputs, Outcome, number
from kvjax.intervene.kinds.kind import Kind
from kvjax.intervene.metrics import METRICS
from kvjax.intervene.pair_runs import NOISING, Effects, effects_under, run_pairs, with_runs
from kvjax.intervene.pair_tables import baselines, beside_recovery, metric_recoveries, put_runs
from kvjax.intervene.places import over_places, place_mask, stage_index, stage_places
from kvjax.intervene.recovery import means_per_read
from kvjax.intervene.summary_text import cell, center_step, failure, run_lines
from kvjax.measure.probes import NO_LABEL, fit_probes, ridge_system
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.interventions import Edit
from kvjax.model.params import Params
from kvjax.model.restart import CleanRun
from kvjax.model.sites import SITES, take_positions
from kvjax.task.encoding import EncodedRecords
from kvjax.task.pair_encoding import EncodedPairs

SUBSPACES = ("probe", "class_means", "random")
OPERATIONS = ("removed", "kept", "exchanged")
RANKS = (1, 4, 16, 64)
# p_e and the clean stream's s_e of affected reads: where the subspaces' probes and means were fitted.
POSITIONS = ("prediction", "support")

RANDOM_SEED = 0


def probe_directions(
    config: DecoderConfig, params: Params, fit: EncodedRecords, *, key_ids: np.ndarray, value_ids: np.ndarray
) -> dict[str, jax.Array]:
    """Fits what the subspaces of one checkpoint are made of, on its fit set.

    Args:
      config, params: one checkpoint.
      fit: the fit set's microbatches.
      key_ids, value_ids: token ids.

    Returns:
      For the 2 S stages and positions, p_e first: `mean` [2 S, D]; `probe` [2 S, values, D], the weights of the value
      probe on raw states; `class_means` [2 S, values, D], centred.
    """
    states_GxNxD = form_states(config, params, (fit,))
    labels = probe_labels(fit, key_ids=key_ids, value_ids=value_ids)
    counts = (labels["query_key"] != NO_LABEL).astype(jnp.float32)
    system = ridge_system(states_GxNxD, counts)
    probes = fit_probes(system, labels["value"][None], len(value_ids))
    classes = jnp.where(labels["value"] == NO_LABEL, len(value_ids), labels["value"])

    def means(states_NxD: jax.Array) -> jax.Array:
        sums = jax.ops.segment_sum(states_NxD * counts[:, None], classes, len(value_ids) + 1)[:-1]
        members = jax.ops.segment_sum(counts, classes, len(value_ids) + 1)[:-1]
        overall = jnp.sum(sums, axis=0) / jnp.sum(members)
        centred = sums / jnp.maximum(members, 1.0)[:, None] - overall[None]
        return jnp.where(members[:, None] > 0, centred, 0.0)

    return {
        "mean": system.mean,
        "probe": probes.weights[:, 0] / system.scale[:, None],
        "class_means": jax.lax.map(means, states_GxNxD),
    }


def orthonormal_bases(directions: dict[str, np.ndarray], rank: int) -> np.ndarray:
    """Finds the leading orthonormal directions of each subspace, [2 S, `SUBSPACES`, rank, D].

    By singular value decomposition on the host: JAX's calls of LAPACK on several CPU devices at once can block. Random
    subspaces are drawn once per stage and position, the same for every checkpoint.
    """
    groups, _, width = directions["probe"].shape
    rng = np.random.default_rng(RANDOM_SEED)
    drawn = rng.normal(size=(groups, width, width))
    bases = np.zeros((groups, len(SUBSPACES), rank, width), np.float32)
    for g in range(groups):
        for k, rows in enumerate((directions["probe"][g], directions["class_means"][g], drawn[g])):
            right = np.linalg.svd(rows.astype(np.float64), full_matrices=False)[2]
            bases[g, k, : min(rank, len(right))] = right[:rank]
    return bases


def subspace_effects(
    tree: dict, config: DecoderConfig, batch: EncodedPairs, *, window: int, num_values: int, position: int
) -> Effects:
    """Runs clean streams with a subspace removed, kept alone, or exchanged with the corrupted run's, at one position.

    Args:
      tree: one checkpoint's `params`, `mean` [2 S, D] and `bases` [2 S, subspaces, rank, D].
      config: its shape.
      batch: a microbatch of pairs.
      window: positions computed, from the first edited one on, which the pairs hold as their first changed one.
      num_values: of the vocabulary.
      position: index into `POSITIONS`, where states are edited.

    Returns:
      Of each of `answer_effects`: `<name>` [B, stages, `SUBSPACES`, ranks, `OPERATIONS`], and
      `<name>_base`, `<name>_source` [B] of the clean and the corrupted run.
    """
    params = tree["params"]
    runs = run_pairs(params, config, batch, NOISING, window=window)
    stages, ranks = 2 * config.n_layers + 2, usable_ranks(config.d_model, num_values)
    axes = (jnp.arange(len(SUBSPACES)), jnp.array(ranks), jnp.arange(len(OPERATIONS)))
    grid = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1)
    positions_BxQ = (batch.prediction_positions, batch.support_positions)[position]
    rows = jnp.arange(len(positions_BxQ))[:, None]
    at_reads = jax.nn.one_hot(positions_BxQ, batch.clean_tokens.shape[1], dtype=bool)
    where_BxT = jnp.any(at_reads & batch.is_affected[..., None], axis=1)

    def at_stage(site: str, layer: jax.Array | int, head: jax.Array) -> Effects:
        def states(run: CleanRun) -> jax.Array:
            x = run.trace[site]
            return jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False) if SITES[site].per_layer else x

        clean_BxTxD = states(runs.base)
        clean, corrupted = (take_positions(states(run), positions_BxQ, 1) for run in (runs.base, runs.source))
        group = position * stages + stage_index(site, layer, config.n_layers)
        mask = place_mask(config, site, layer, head, where_BxT)

        def one(choice: jax.Array) -> Effects:
            subspace, rank, operation = choice
            mean, directions = tree["mean"][group][None, None], tree["bases"][group, subspace]
            basis_RxD = jnp.where(jnp.arange(len(directions))[:, None] < rank, directions, 0.0)
            centred = clean - mean
            of = jax.lax.select_n(operation, centred, centred, corrupted - clean)
            coordinates = jnp.matmul(of, basis_RxD.T, precision=config.precision)
            part = jnp.matmul(coordinates, basis_RxD, precision=config.precision)
            edited_BxQxD = jax.lax.select_n(operation, clean - part, mean + part, clean + part)
            value = clean_BxTxD.at[rows, positions_BxQ].set(edited_BxQxD)
            edits = {site: Edit(mask, value[None] if SITES[site].per_layer else value)}
            return effects_under(params, config, runs, edits, layer)

        return jax.lax.map(one, grid.reshape(-1, len(axes)))

    places = tuple(stage_places(config.n_layers).values())
    found = over_places(places, config.n_layers, at_stage)  # [stages, choices, B]
    shape = (len(batch.is_affected), stages, *grid.shape[:-1])
    return with_runs({name: jnp.moveaxis(x, -1, 0).reshape(shape) for name, x in found.items()}, runs)


def usable_ranks(width: int, num_values: int) -> tuple[int, ...]:
    """Lists the ranks of `RANKS` that leave something outside, none above what probes and class means span.

    Targets that sum to one, and means around their own mean, span one direction less than there are values.
    """
    return tuple(sorted({min(rank, num_values - 1) for rank in RANKS if min(rank, num_values - 1) < width}))


@dataclasses.dataclass(frozen=True)
class EditSubspaces:
    """The measurement: every subspace removed, kept alone and exchanged at one of `POSITIONS`."""

    config: DecoderConfig
    num_values: int
    position: int

    def __call__(self, tree: dict[str, Any], batch: PairBatch) -> Effects:
        """Runs `subspace_effects`."""
        at = {"window": batch.window, "num_values": self.num_values, "position": self.position}
        return subspace_effects(tree, self.config, batch.pairs, **at)


def analyse(inputs: InterventionInputs) -> Outcome:
    """Removes, keeps alone and exchanges every stage's probe, class-mean and random subspaces."""
    ids = {
        "key_ids": tuple(inputs.vocabulary.key_ids.tolist()),
        "value_ids": tuple(inputs.vocabulary.value_ids.tolist()),
    }
    directions = inputs.each_checkpoint(functools.partial(_directions, **ids), inputs.fit_bucket.batches)
    num_values = len(inputs.vocabulary.value_tokens)
    ranks = usable_ranks(inputs.config.d_model, num_values)
    bases = np.stack(
        [
            orthonormal_bases({name: x[c] for name, x in directions.items()}, max(ranks))
            for c in range(len(inputs.steps))
        ]
    )
    tree = {"params": inputs.stacked, "mean": directions["mean"], "bases": bases}
    each = [
        over.run(EditSubspaces(inputs.config, num_values, position), tree)
        for position, over in enumerate((inputs.over_predictions, inputs.over_supports))
    ]
    arrays = each[0] | {name: np.stack([x[name] for x in each], axis=3) for name in (*METRICS, "clean_correct")}
    dataset = inputs.dataset(
        stage=stage_places(inputs.config.n_layers),
        position_role=POSITIONS,
        subspace=SUBSPACES,
        subspace_rank=ranks,
        operation=OPERATIONS,
    )
    dims = ("pair_kind", "step", "stage", "position_role", "subspace", "subspace_rank", "operation")
    lost = metric_recoveries(inputs.groups, arrays, arrays)
    meaning = "share of the clean run's lead over the corrupted one that is lost"
    dataset["loss"] = (("statistic", "metric", *dims), lost, {"long_name": meaning, "units": "1"})
    accuracy = means_per_read(inputs.groups, arrays["clean_correct"])
    dataset["clean_answer_accuracy"] = (("statistic", *dims), accuracy, ANSWER_ACCURACY)
    put_runs(dataset, inputs, arrays, clean="base", corrupted="source")
    controls = {"random_subspaces": "of the same rank, beside each effect"}
    return Outcome(dataset, summarise(dataset, inputs.metric) | {"controls": controls})


def summarise(dataset: xr.Dataset, metric: str) -> dict[str, Any]:
    """Finds where probe and random subspaces of one rank differ most, by the loss of a metric."""
    summary, effects = baselines(dataset, metric), []
    for operation in OPERATIONS:
        for kind in map(str, dataset["pair_kind"].values):
            for step in map(int, dataset["step"].values):
                for role in POSITIONS:
                    at = {"pair_kind": kind, "step": step, "operation": operation, "position_role": role}
                    loss = dataset["loss"].sel({**at, "metric": metric, "statistic": "estimate"})
                    gap = (loss.sel(subspace="probe") - loss.sel(subspace="random")).values  # [stages, ranks]
                    if not np.isfinite(gap).any():
                        continue
                    stage, rank = np.unravel_index(np.nanargmax(gap if operation != "kept" else -gap), gap.shape)
                    here = loss.isel({"stage": int(stage), "subspace_rank": int(rank)})
                    found = {
                        "stage": str(dataset["stage"].values[stage]),
                        "rank": int(dataset["subspace_rank"].values[rank]),
                        "loss": {s: number(here.sel(subspace=s)) for s in SUBSPACES},
                    }
                    effects.append(at | found | beside_recovery(summary, kind, step))
    return summary | {"effects": effects}


def summary_lines(document: Mapping[str, Any]) -> list[str]:
    """Writes both runs, and where probe and random subspaces of one rank differ most."""
    step, name = center_step(document), document["metric"].replace("_", " ")
    lines = [
        *run_lines(document, [step]),
        f"share of the gap in {name} lost, where probe and random subspace of one rank differ most:",
    ]
    for kind in document["pairs"]["counts"]:
        if fails := failure(document, kind, step):
            lines.append(f"{kind:<6} FAILS: {fails}")
            continue
        for e in document["effects"]:
            if (e["pair_kind"], e["step"]) == (kind, step) and e["loss"]["probe"] is not None:
                losses = ", ".join(f"{name} {cell(value, '.2f')}" for name, value in e["loss"].items())
                where = f"rank {e['rank']:<2} of {e['stage']} at {e['position_role']}"
                lines.append(f"{kind:<6} {e['operation']:<9} {where}: {losses}")
    return lines


@functools.partial(jax.jit, static_argnums=0, static_argnames=("key_ids", "value_ids"))
def _directions(
    config: DecoderConfig,
    params: Params,
    fit: EncodedRecords,
    *,
    key_ids: tuple[int, ...],
    value_ids: tuple[int, ...],
) -> dict[str, jax.Array]:
    return probe_directions(config, params, fit, key_ids=np.array(key_ids), value_ids=np.array(value_ids))


KIND = Kind("subspaces", analyse, summary_lines, summarise=summarise)
