"""Ablates every head and every MLP on one microbatch: every kind of replacement, and the random control for scale."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from kvjax.execution.fit_set import NUM_ROLES, ComponentMeans
from kvjax.measure import behaviour
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.head_writes import HeadWrites
from kvjax.model.interventions import Edit, Interventions, ablate_mlp
from kvjax.model.params import Params
from kvjax.model.restart import CleanRun, restart, restart_from_head
from kvjax.model.sites import Trace
from kvjax.model.transforms import Lift, over_interventions, over_layers
from kvjax.model.weights import head_output_kernels
from kvjax.task.encoding import EncodedRecords

Sums = dict[str, jax.Array]

RANDOM_DRAWS = 8
RANDOM_SEED = 0


def ablation_slots(kinds: Sequence[str], *, draws: int) -> list[tuple[str, int]]:
    """Lists each component's replacements: (kind, draw). `random` does not replace an output, so it has none."""
    return [(kind, draw) for kind in kinds if kind != "random" for draw in range(draws if kind == "resample" else 1)]


def restarts_at_once(config: DecoderConfig, kinds: Sequence[str], *, draws: int) -> int:
    """Counts the intervened runs side by side if heads are lifted by `vmap`."""
    return config.n_heads * len(ablation_slots(kinds, draws=draws))


@dataclasses.dataclass(frozen=True)
class _Microbatch:
    """One checkpoint's clean run on a microbatch, with everything that restarts from it need.

    Attributes:
      writes: the maps of the checkpoint's heads.
      lift: how the interventions on one layer are run.
      value_ids: token ids of values.
    """

    params: Params
    config: DecoderConfig
    writes: HeadWrites
    clean: CleanRun
    batch: EncodedRecords
    lift: Lift
    value_ids: jax.Array

    def answers_under(self, edits: Interventions, layer: jax.Array | int) -> Sums:
        """Restarts under edits in a layer and sums right answers and margins over each sequence's reads: [B] each."""
        positions = self.batch.prediction_positions
        logits = restart(self.params, self.config, self.clean, edits, layer=layer, positions_BxQ=positions)
        return self.answers_in(logits)

    def answers_in(self, logits_BxQxV: jax.Array) -> Sums:
        """Sums right answers and margins over each sequence's reads: [B] each."""
        per_read = {
            "correct": behaviour.answer_correct(logits_BxQxV, self.batch.answers),
            "margin": behaviour.answer_margin(logits_BxQxV, self.batch.answers, self.value_ids),
        }
        return {name: jnp.sum(jnp.where(self.batch.is_read, x, 0), axis=-1) for name, x in per_read.items()}


# Rows of `replacement_rows`: zeros, the mean, the means of the roles, then the tokens of the probe set.
_ZERO, _MEAN, _ROLES, _TOKENS = 0, 1, 2, 2 + NUM_ROLES


def replacement_rows(config: DecoderConfig, means: ComponentMeans | None, runs: Sequence[CleanRun]) -> Trace:
    """Collects everything that a component's output can be replaced by, so that choosing is a lookup.

    Args:
      config: the checkpoint's shape.
      means: over the fit set; None if no kind of ablation needs them, and zeros stand in their rows.
      runs: clean runs [microbatch, …] of every bucket, for resampling; may be empty.

    Returns:
      `head_z` [L, rows, H, E] and `mlp_out` [L, rows, D]: a row of zeros, one of means, one of means for each role, and
      one for each token of the runs.
    """
    rows: Trace = {}
    for name, shape in (("head_z", (config.n_heads, config.d_head)), ("mlp_out", (config.d_model,))):
        fixed = [jnp.zeros((config.n_layers, _MEAN if means else _TOKENS, *shape))]
        if means is not None:
            fixed += [means.overall[name][:, :, 0], means.by_role[name]]
        by_token = [jnp.moveaxis(run.trace[name], 1, 0) for run in runs]  # [L, M, B, T, …]
        of_runs = [x.reshape(len(x), -1, *shape) for x in by_token]
        rows[name] = jnp.concatenate([*fixed, *of_runs], axis=1)
    return rows


class _Replacements:
    """The replacements of components' outputs, of every kind and draw, as data: all are one compiled restart.

    Args:
      kinds: of `kvjax.sweeps.settings.ABLATIONS`, without `random`.
      rows, donors_JxBxT: see `measure_ablations`.
      roles_BxT: of the tokens; -1, the first token's, is the last of the role means.
    """

    def __init__(
        self, kinds: tuple[str, ...], rows: Trace | None, roles_BxT: jax.Array, donors_JxBxT: jax.Array | None
    ):
        self._kinds, self._rows = kinds, rows
        self._slots = ablation_slots(kinds, draws=0 if donors_JxBxT is None else len(donors_JxBxT))
        row_of = {
            "zero": lambda draw: jnp.full(roles_BxT.shape, _ZERO),
            "mean": lambda draw: jnp.full(roles_BxT.shape, _MEAN),
            "role_mean": lambda draw: _ROLES + roles_BxT.astype(jnp.int32) % NUM_ROLES,
            "resample": lambda draw: _TOKENS + donors_JxBxT[draw],
        }
        self._row_KxBxT = jnp.stack([row_of[kind](draw) for kind, draw in self._slots])

    def __len__(self) -> int:
        return len(self._slots)

    def value(self, clean: CleanRun, name: str, layer: jax.Array | int, slot: jax.Array, *head: jax.Array) -> jax.Array:
        """Forms a slot's replacement of a component's output, [B, T, E or D]."""
        if self._rows is None:
            return jnp.zeros((*clean.tokens.shape, clean.trace[name].shape[-1]))
        return self._rows[name][layer, self._row_KxBxT[slot, :, : clean.tokens.shape[1]], *head]

    def by_kind(self, x_LxKx: jax.Array) -> Iterator[tuple[str, jax.Array]]:
        """Yields each kind with the mean over its draws, [L, …], from an array of all slots, [L, slots, …]."""
        for kind in self._kinds:
            own = x_LxKx[:, jnp.array([index for index, (k, _) in enumerate(self._slots) if k == kind])]
            yield kind, own[:, 0] if own.shape[1] == 1 else jnp.mean(own.astype(jnp.float32), axis=1)


def measure_ablations(
    params: Params,
    config: DecoderConfig,
    writes: HeadWrites,
    clean: CleanRun,
    batch: EncodedRecords,
    *,
    kinds: tuple[str, ...],
    lift: Lift,
    value_ids: jax.Array,
    num_splits: int,
    rows: Trace | None,
    donors_JxBxT: jax.Array | None,
) -> Sums:
    """Ablates every head and MLP, and sums right answers and margins over the reads of each sequence.

    Args:
      params, config: one checkpoint.
      writes: what its heads write.
      clean: its clean run on the microbatch.
      batch: the microbatch.
      kinds: of `kvjax.sweeps.settings.ABLATIONS`.
      lift: how the heads of one layer are run.
      value_ids: token ids of values.
      num_splits: Z, number of splits the records are in.
      rows: what outputs are replaced by, from `replacement_rows`; None if that is zeros alone.
      donors_JxBxT: tokens of the probe set that each position is resampled from, in J draws; None without resampling.

    Returns:
      `head/<kind>/correct`, `head/<kind>/margin` [B, L, H] and the same of `mlp/<kind>` [B, L]; means over draws.
      With the random control, its sums over the batch by draw and split as well: `draws/head/correct`, … [J, Z, L, H]
      and `draws/mlp/correct`, … [J, Z, L].
    """
    microbatch = _Microbatch(params, config, writes, clean, batch, lift, value_ids)
    replaced_by = tuple(kind for kind in kinds if kind != "random")
    replacements = _Replacements(replaced_by, rows, batch.token_roles, donors_JxBxT)
    sums: Sums = {}
    for component, of_layer in (("head", _replace_heads), ("mlp", _replace_mlp)):
        replaced = over_layers(functools.partial(of_layer, microbatch, replacements), config.n_layers)
        for name, x in replaced.items():  # [L, slots, …, B]
            for kind, mean in replacements.by_kind(x):
                sums[f"{component}/{kind}/{name}"] = jnp.moveaxis(mean, -1, 0)
    if "random" in kinds:
        in_split_BxZ = (batch.splits[:, None] == jnp.arange(num_splits)[None]) * batch.weights[:, None]
        for component, of_layer in (("head", _step_beside_heads), ("mlp", _step_beside_mlp)):
            for name, x in over_layers(functools.partial(of_layer, microbatch), config.n_layers).items():
                drawn = x.astype(jnp.float32)  # [L, …, J, B]
                sums[f"{component}/random/{name}"] = jnp.moveaxis(jnp.mean(drawn, axis=-2), -1, 0)
                by_split = jnp.matmul(drawn, in_split_BxZ, precision="highest")
                sums[f"draws/{component}/{name}"] = jnp.moveaxis(by_split, (-2, -1), (0, 1))
    return sums


def _replace_heads(run: _Microbatch, replacements: _Replacements, layer: jax.Array | int) -> Sums:
    """Puts every replacement in place of each head of a layer: [slots, H, B]."""
    n_heads = run.config.n_heads

    def one(pair: tuple[jax.Array, jax.Array]) -> Sums:
        head, slot = pair
        value = replacements.value(run.clean, "head_z", layer, slot, head)
        at = {"layer": layer, "head": head, "positions_BxQ": run.batch.prediction_positions}
        return run.answers_in(restart_from_head(run.params, run.config, run.clean, run.writes, value, **at))

    heads, slots = jnp.meshgrid(jnp.arange(n_heads), jnp.arange(len(replacements)), indexing="ij")
    flat = over_interventions(one, lift=run.lift)((heads.reshape(-1), slots.reshape(-1)))
    return jax.tree.map(lambda x: x.reshape(n_heads, len(replacements), *x.shape[1:]).swapaxes(0, 1), flat)


def _replace_mlp(run: _Microbatch, replacements: _Replacements, layer: jax.Array | int) -> Sums:
    """Puts every replacement in place of a layer's MLP: [slots, B]."""

    def one(slot: jax.Array) -> Sums:
        value = replacements.value(run.clean, "mlp_out", layer, slot)[None]
        return run.answers_under(ablate_mlp(layer, n_layers=run.config.n_layers, value=value), layer)

    return over_interventions(one, lift=run.lift)(jnp.arange(len(replacements)))


def _step_beside_heads(run: _Microbatch, layer: jax.Array | int) -> Sums:
    """Takes random steps as long as each head's output, with every head kept: [H, J, B], one each draw."""
    config = run.config
    kernel_HxExD = head_output_kernels(run.params, config.n_heads)[layer]

    def one(head: jax.Array) -> Sums:
        z_BxTxE = run.clean.at("head_z", layer)[:, :, head]
        written = jnp.matmul(z_BxTxE, kernel_HxExD[head], precision=config.precision)
        return _random_steps(run, "post_attn", written, layer)

    return over_interventions(one, lift=run.lift)(jnp.arange(config.n_heads))


def _step_beside_mlp(run: _Microbatch, layer: jax.Array | int) -> Sums:
    """Takes random steps as long as the MLP's output, with the MLP kept: [J, B], one each draw."""
    return _random_steps(run, "post_mlp", run.clean.at("mlp_out", layer), layer)


def _random_steps(run: _Microbatch, site: str, written_BxTxD: jax.Array, layer: jax.Array | int) -> Sums:
    """Steps along random directions, at every position as far as a component's output is long: [J, B].

    The step is taken from the residual stream after the component, so that the component's own output stays.
    """
    after_BxTxD = run.clean.at(site, layer)
    sizes = jnp.linalg.norm(written_BxTxD, axis=-1, keepdims=True)
    mask = (jnp.arange(run.config.n_layers) == layer)[:, None, None, None]

    def along(direction_D: jax.Array) -> Sums:
        return run.answers_under({site: Edit(mask, (after_BxTxD - sizes * direction_D[None, None])[None])}, layer)

    return jax.lax.map(along, _random_directions(run.config.d_model))


def _random_directions(width: int) -> jax.Array:
    drawn = jax.random.normal(jax.random.key(RANDOM_SEED), (RANDOM_DRAWS, width))
    return drawn / jnp.linalg.norm(drawn, axis=-1, keepdims=True)
