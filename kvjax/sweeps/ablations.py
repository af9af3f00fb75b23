"""Every head's and every MLP's ablation on one microbatch: zero, mean, resample, and the random control for scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from kvjax.errors import bad_argument
from kvjax.measure import behaviour
from kvjax.model.decoder import DecoderConfig, Params
from kvjax.model.head_writes import HeadWrites
from kvjax.model.interventions import Edit, Interventions, ablate_mlp
from kvjax.model.restart import CleanRun, restart, restart_from_head
from kvjax.model.sites import Trace
from kvjax.model.transforms import Lift, over_interventions
from kvjax.task.encoding import EncodedRecords

Sums = dict[str, jax.Array]

ABLATIONS = ("zero", "mean", "resample", "random")
RANDOM_DRAWS = 8
RANDOM_SEED = 0


def chosen_ablations(names: Sequence[str] | str) -> tuple[str, ...]:
    """Returns the kinds of ablation that a list, or a text with commas, names, in the order of `ABLATIONS`.

    Raises:
      InputError: one is unknown, or zero ablation, which ranks and triggers are made from, is missing.
    """
    names = names.split(",") if isinstance(names, str) else names
    unknown = [name for name in names if name not in ABLATIONS]
    if unknown:
        raise bad_argument("ablations", f"kinds among {', '.join(ABLATIONS)}", unknown[0])
    if "zero" not in names:
        raise bad_argument(
            "ablations", "zero among the kinds, for ranks are by zero ablation", ",".join(names) or "none"
        )
    return tuple(kind for kind in ABLATIONS if kind in names)


def ablation_slots(kinds: Sequence[str], *, draws: int) -> list[tuple[str, int]]:
    """Returns what each component is replaced by, in turn: (kind, draw); `random` steps are no replacement."""
    return [(kind, draw) for kind in kinds if kind != "random" for draw in range(draws if kind == "resample" else 1)]


def restarts_at_once(config: DecoderConfig, kinds: Sequence[str], *, draws: int) -> int:
    """Returns how many intervened runs there are side by side where heads are lifted by `vmap`."""
    return config.n_heads * len(ablation_slots(kinds, draws=draws))


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
    means: Trace,
    store: Trace,
    donors_RxBxT: jax.Array | None,
) -> Sums:
    """Returns right answers and margins under every ablation, summed over the reads of each sequence.

    Args:
      params: one checkpoint.
      config: its shape.
      writes: what its heads write.
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
    batch_size, length = clean.tokens.shape
    # What replaces an output is data, so that all kinds and draws are one compiled restart.
    replacing = tuple(kind for kind in kinds if kind != "random")
    slots = ablation_slots(kinds, draws=0 if donors_RxBxT is None else len(donors_RxBxT))
    kind_of_slot = jnp.array([replacing.index(kind) for kind, _ in slots])
    draw_of_slot = jnp.array([draw for _, draw in slots])

    def replacement(name: str, layer: jax.Array | int, slot: jax.Array, *head: jax.Array) -> jax.Array:
        """Returns what a component puts out instead, [B, T, E or D]."""
        shape = (batch_size, length, clean.trace[name].shape[-1])
        by_kind = {
            "zero": lambda: jnp.zeros(shape),
            "mean": lambda: jnp.broadcast_to(means[name][layer, 0, 0, *head][None, None], shape),
            "resample": lambda: store[name][layer, donors_RxBxT[draw_of_slot[slot], :, :length], *head],
        }
        return jax.lax.switch(kind_of_slot[slot], [by_kind[kind] for kind in replacing])

    def answers_under(edits: Interventions, layer: jax.Array | int) -> Sums:
        return answers_in(restart(params, config, clean, edits, layer=layer, positions_BxQ=batch.prediction_positions))

    def answers_in(logits: jax.Array) -> Sums:
        per_read = {
            "correct": behaviour.answer_correct(logits, batch.answers),
            "margin": behaviour.answer_margin(logits, batch.answers, value_ids),
        }
        return {name: jnp.sum(jnp.where(batch.is_read, x, 0), axis=-1) for name, x in per_read.items()}

    def heads_of(layer: jax.Array | int) -> Sums:
        def one(head: jax.Array, slot: jax.Array) -> Sums:
            value = replacement("head_z", layer, slot, head)
            at = {"layer": layer, "head": head, "positions_BxQ": batch.prediction_positions}
            return answers_in(restart_from_head(params, config, clean, writes, value, **at))

        heads, of_slots = jnp.meshgrid(jnp.arange(n_heads), jnp.arange(len(slots)), indexing="ij")
        flat = over_interventions(lambda pair: one(*pair), lift=lift)((heads.reshape(-1), of_slots.reshape(-1)))
        return jax.tree.map(lambda x: x.reshape(n_heads, len(slots), *x.shape[1:]).swapaxes(0, 1), flat)

    def mlp_of(layer: jax.Array | int) -> Sums:
        def one(slot: jax.Array) -> Sums:
            value = replacement("mlp_out", layer, slot)[None]
            return answers_under(ablate_mlp(layer, n_layers=n_layers, value=value), layer)

        return over_interventions(one, lift=lift)(jnp.arange(len(slots)))

    def random_head(layer: jax.Array | int) -> Sums:
        kernel_HxExD = params["blocks"]["attn"]["out_proj"]["kernel"][layer].reshape(n_heads, -1, config.d_model)

        def one(head: jax.Array) -> Sums:
            z_BxTxE = clean.at("head_z", layer)[:, :, head]
            written = jnp.matmul(z_BxTxE, kernel_HxExD[head], precision=config.precision)
            return random_steps("post_attn", written, layer)

        return over_interventions(one, lift=lift)(jnp.arange(n_heads))

    def random_mlp(layer: jax.Array | int) -> Sums:
        return random_steps("post_mlp", clean.at("mlp_out", layer), layer)

    def random_steps(site: str, written_BxTxD: jax.Array, layer: jax.Array | int) -> Sums:
        edits_of = _random_steps(site, written_BxTxD, clean.at(site, layer), layer, n_layers)
        drawn = jax.lax.map(lambda u: answers_under(edits_of(u), layer), _random_directions(config.d_model))
        return jax.tree.map(lambda x: jnp.mean(x.astype(jnp.float32), axis=0), drawn)

    def every_layer(of_layer: Callable[[jax.Array | int], Sums]) -> Sums:
        # The last layer is a program of its own, at the prediction positions alone. Layers are never run side by
        # side: a batch of mixed restart layers would run from the lowest for all.
        final = jax.tree.map(lambda x: x[None], of_layer(n_layers - 1))
        if n_layers == 1:
            return final
        earlier = jax.lax.map(of_layer, jnp.arange(n_layers - 1))
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), earlier, final)

    sums: Sums = {}
    for component, of_layer in (("head", heads_of), ("mlp", mlp_of)):
        for name, x in every_layer(of_layer).items():  # [L, slots, …, B]
            for kind in replacing:
                own = x[:, jnp.array([index for index, (k, _) in enumerate(slots) if k == kind])]
                mean = own[:, 0] if own.shape[1] == 1 else jnp.mean(own.astype(jnp.float32), axis=1)
                sums[f"{component}/{kind}/{name}"] = jnp.moveaxis(mean, -1, 0)
    if "random" in kinds:
        for component, of_layer in (("head", random_head), ("mlp", random_mlp)):
            for name, x in every_layer(of_layer).items():
                sums[f"{component}/random/{name}"] = jnp.moveaxis(x, -1, 0)
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
