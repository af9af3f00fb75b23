"""Every head's and every MLP's ablation on one microbatch: zero, mean, resample, and the random control for scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from kvjax.errors import unusable
from kvjax.measure import behaviour
from kvjax.model.decoder import DecoderConfig, Params
from kvjax.model.interventions import Edit, Interventions, ablate_head, ablate_mlp
from kvjax.model.sites import Trace
from kvjax.model.transforms import Lift, over_interventions
from kvjax.sweep.engine import CleanRun, restart
from kvjax.task.encoding import EncodedRecords

Sums = dict[str, jax.Array]

ABLATIONS = ("zero", "mean", "resample", "random")
RANDOM_DRAWS = 8
RANDOM_SEED = 0


def chosen_ablations(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the kinds of ablation a flag names, in the order of `ABLATIONS`.

    Raises:
      InputError: one is unknown, or zero ablation, which ranks and triggers are made from, is missing.
    """
    unknown = [name for name in names if name not in ABLATIONS]
    if unknown:
        raise unusable("--ablations", f"kinds among {', '.join(ABLATIONS)}", unknown[0])
    if "zero" not in names:
        raise unusable("--ablations", "zero among the kinds, for ranks are by zero ablation", ",".join(names) or "none")
    return tuple(kind for kind in ABLATIONS if kind in names)


def measure_ablations(
    params: Params,
    config: DecoderConfig,
    clean: CleanRun,
    batch: EncodedRecords,
    *,
    kinds: tuple[str, ...],
    lift: Lift,
    value_ids: jax.Array,
    means: Trace,
    store: Trace,
    donors_RxBxT: jax.Array | None,
) -> Sums:
    """Returns right answers and margins under every ablation, summed over the reads of each sequence.

    Args:
      params: one checkpoint.
      config: its shape.
      clean: its clean run on the microbatch.
      batch: the microbatch.
      kinds: of `ABLATIONS`.
      lift: how the heads of one layer are run.
      value_ids: token ids of values.
      means: `head_z` [L, 1, 1, H, E] and `mlp_out` [L, 1, 1, D], what mean ablation puts in.
      store: `head_z` [L, tokens, H, E] and `mlp_out` [L, tokens, D] of the whole probe set, for resampling.
      donors_RxBxT: rows of `store` that each position is resampled from, in R draws.

    Returns:
      `head/<kind>/correct`, `head/<kind>/margin` [B, L, H] and the same of `mlp/<kind>` [B, L]; means over draws.
    """
    n_layers, n_heads = config.n_layers, config.n_heads
    donors = None if donors_RxBxT is None else donors_RxBxT[..., : clean.tokens.shape[1]]

    def answers_under(edits: Interventions, layer: jax.Array | int) -> Sums:
        logits = restart(params, config, clean, edits, layer=layer, positions_BxQ=batch.prediction_positions)
        per_read = {
            "correct": behaviour.answer_correct(logits, batch.answers),
            "margin": behaviour.answer_margin(logits, batch.answers, value_ids),
        }
        return {name: jnp.sum(jnp.where(batch.is_read, x, 0), axis=-1) for name, x in per_read.items()}

    def mean_over_draws(edits_of: Callable[[jax.Array], Interventions], draws: jax.Array, layer) -> Sums:
        drawn = jax.lax.map(lambda draw: answers_under(edits_of(draw), layer), draws)
        return jax.tree.map(lambda x: jnp.mean(x.astype(jnp.float32), axis=0), drawn)

    def head(kind: str, layer: jax.Array | int, head: jax.Array) -> Sums:
        def replaced(value: jax.Array | None) -> Interventions:
            return ablate_head(layer, head, n_layers=n_layers, n_heads=n_heads, value=value)

        if kind == "zero":
            return answers_under(replaced(None), layer)
        if kind == "mean":
            return answers_under(replaced(means["head_z"]), layer)
        if kind == "resample":
            return mean_over_draws(lambda rows: replaced(store["head_z"][layer, rows][None]), donors, layer)
        kernel_HxExD = params["blocks"]["attn"]["out_proj"]["kernel"][layer].reshape(n_heads, -1, config.d_model)
        z_BxTxE = clean.trace["head_z"][layer, :, :, head]
        written = jnp.matmul(z_BxTxE, kernel_HxExD[head], precision=config.precision)
        edits_of = _random_steps("post_attn", written, clean.trace["post_attn"][layer], layer, n_layers)
        return mean_over_draws(edits_of, _random_directions(config.d_model), layer)

    def mlp(kind: str, layer: jax.Array | int) -> Sums:
        def replaced(value: jax.Array | None) -> Interventions:
            return ablate_mlp(layer, n_layers=n_layers, value=value)

        if kind == "zero":
            return answers_under(replaced(None), layer)
        if kind == "mean":
            return answers_under(replaced(means["mlp_out"]), layer)
        if kind == "resample":
            return mean_over_draws(lambda rows: replaced(store["mlp_out"][layer, rows][None]), donors, layer)
        written, after = clean.trace["mlp_out"][layer], clean.trace["post_mlp"][layer]
        edits_of = _random_steps("post_mlp", written, after, layer, n_layers)
        return mean_over_draws(edits_of, _random_directions(config.d_model), layer)

    def every_layer(of_layer: Callable[[jax.Array | int], Sums]) -> Sums:
        # The last layer is a program of its own, at the prediction positions alone. Layers are never run side by
        # side: a batch of mixed restart layers would run from the lowest for all.
        final = jax.tree.map(lambda x: x[None], of_layer(n_layers - 1))
        if n_layers == 1:
            return final
        earlier = jax.lax.map(of_layer, jnp.arange(n_layers - 1))
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), earlier, final)

    sums: Sums = {}
    for kind in kinds:

        def heads_of(layer: jax.Array | int, kind: str = kind) -> Sums:
            return over_interventions(lambda h: head(kind, layer, h), lift=lift)(jnp.arange(n_heads))

        by_component = {"head": every_layer(heads_of), "mlp": every_layer(lambda layer, kind=kind: mlp(kind, layer))}
        for component, results in by_component.items():
            for name, x in results.items():
                sums[f"{component}/{kind}/{name}"] = jnp.moveaxis(x, -1, 0)
    return sums


def _random_steps(
    site: str, written_BxTxD: jax.Array, after_BxTxD: jax.Array, layer: jax.Array | int, n_layers: int
) -> Callable[[jax.Array], Interventions]:
    """Returns, for a unit direction, the step along it that is as long as a component's output at every position.

    The step is taken from the residual stream after the component, so that what it wrote stays.
    """
    sizes = jnp.linalg.norm(written_BxTxD, axis=-1, keepdims=True)
    mask = (jnp.arange(n_layers) == layer)[:, None, None, None]

    def edits(direction_D: jax.Array) -> Interventions:
        return {site: Edit(mask, (after_BxTxD - sizes * direction_D[None, None])[None])}

    return edits


def _random_directions(width: int) -> jax.Array:
    drawn = jax.random.normal(jax.random.key(RANDOM_SEED), (RANDOM_DRAWS, width))
    return drawn / jnp.linalg.norm(drawn, axis=-1, keepdims=True)
