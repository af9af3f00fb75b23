"""Patches every place at every position of the window, at the positions of each role and at all, in one run of each.

What a patch changes is the residual stream after its layer, at the patched positions alone: the second half of a layer
looks at one position at a time. So each place has one state per position, and every set of positions chooses among
these and the base run's. A stage's two halves lead to the same state, the source run's.

A patch in the last layer at one read changes the answer of that read alone. All sets of positions there are sums over
reads of one run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.intervene.pair_runs import Effects, PairRuns, answer_effects, read_effects
from kvjax.intervene.places import Place, patch_edit
from kvjax.model.decoder import Block, Decoder
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.interventions import Edit
from kvjax.model.params import Params, layer_params
from kvjax.model.sites import SITES, Trace, take_positions
from kvjax.model.transforms import plain_forward
from kvjax.model.variant_rows import Rows
from kvjax.model.variants import WindowRun, in_window, reads_after_last, rows_after, run_on
from kvjax.model.weights import head_output_kernels
from kvjax.task.corruption import PAIR_ROLES
from kvjax.task.pair_encoding import EncodedPairs


def position_sets(batch: EncodedPairs, window_BxW: jax.Array, several: int) -> tuple[jax.Array, jax.Array]:
    """Lists the different sets of positions to patch, and which of them each result is of.

    Args:
      batch: a microbatch of pairs.
      window_BxW: the positions a change can reach.
      several: how many roles of one pair have more than one position, at most.

    Returns:
      bool [B, K, W]: all positions, roles of several positions, and each position up to the last affected read.
      int [B, W + roles + 1]: for each position, each of `PAIR_ROLES` but `before`, and all, its set; K for no position.
    """
    window = window_BxW.shape[1]
    reached_BxW = window_BxW <= batch.last_affected[:, None]
    once_BxW = window_BxW == window_BxW[:, :1] + jnp.arange(window)[None]
    single_BxWxW = jnp.eye(window, dtype=bool)[None] & (reached_BxW & once_BxW)[:, None]
    roles_BxW = jnp.where(once_BxW, jnp.take_along_axis(jnp.asarray(batch.roles), window_BxW, axis=1), -1)
    by_role = roles_BxW[:, None] == jnp.arange(1, len(PAIR_ROLES))[None, :, None]  # [B, roles, W]
    count = jnp.sum(by_role, axis=-1)
    slot = jnp.cumsum(count > 1, axis=1) - 1  # of a role with several positions
    order = jnp.argsort(count <= 1, axis=1, stable=True)[:, :several]
    where = [jnp.take_along_axis(by_role, order[..., None], axis=1), single_BxWxW]
    if window > 1:
        where.insert(0, jnp.ones((len(count), 1, window), bool))
    before = window > 1
    single = before + several
    of_role = jnp.select([count == 0, count == 1], [single + window, single + jnp.argmax(by_role, -1)], before + slot)
    of_position = jnp.broadcast_to(single + jnp.arange(window), (len(count), window))
    of_all = jnp.full((len(count), 1), 0 if window > 1 else single)
    return jnp.concatenate(where, axis=1), jnp.concatenate([of_position, of_role, of_all], axis=1)


def rows_of_sets(window: int, several: int) -> Rows:
    """Chooses the rows computed for `position_sets`: single positions change nothing before them."""
    return Rows.for_changes(window, (*(0,) * ((window > 1) + several), *range(window)))


def single_rows(window: int) -> int:
    """Counts the positions that are computed at once of a pair with a window of some positions, about."""
    return len(rows_of_sets(window, several=1))


def patched_positions(
    params: Params, config: DecoderConfig, runs: PairRuns, places: Sequence[Place], several: int
) -> Effects:
    """Patches every place at every set of positions: of each of `answer_effects`, [B, places, W + roles + 1]."""
    where_BxKxW, of_result = position_sets(runs.batch, runs.window_BxW, several)
    rows = rows_of_sets(runs.window_BxW.shape[1], several)
    base = WindowRun.of(runs.base, config, runs.window_BxW, runs.batch.prediction_positions)
    states = _states_in_window(params, config, runs)
    chosen = list(dict.fromkeys(_changed_state(place, config) for place in places))
    last = config.n_layers - 1

    def effects(logits_BxKxQxV: jax.Array) -> Effects:
        return jax.vmap(answer_effects, in_axes=(1, None), out_axes=1)(logits_BxKxQxV, runs.batch)

    def from_layer(at: tuple[jax.Array, jax.Array]) -> Effects:
        state, layer = at
        after = rows_after(params, config, base, states[state], where_BxKxW, rows, layer)
        return effects(run_on(params, config, base, after, rows, layer + 1))

    def from_last(state: jax.Array) -> Effects:
        return effects(reads_after_last(params, config, base, states[state], where_BxKxW))

    parts, found = [], []
    before_last = [(state, layer) for layer, state in chosen if layer < last]
    if before_last:
        parts += [(layer, state) for state, layer in before_last]
        found.append(jax.lax.map(from_layer, tuple(map(jnp.array, zip(*before_last, strict=True)))))
    into_last = [state for layer, state in chosen if layer == last]
    if into_last:
        parts += [(last, state) for state in into_last]
        found.append(jax.lax.map(from_last, jnp.array(into_last)))
    of_last = [state for layer, state in chosen if layer > last]
    if of_last:
        parts += [(last + 1, state) for state in of_last]
        each = _in_last_layer(params, config, runs, where_BxKxW)
        found.append({name: x[jnp.array(of_last)] for name, x in each.items()})
    index = np.array([parts.index(_changed_state(place, config)) for place in places])

    def of_places(name: str) -> jax.Array:
        x_PxBxK = jnp.concatenate([part[name] for part in found])[index]
        unchanged = jnp.broadcast_to(runs.base_effects[name][None, :, None], (*x_PxBxK.shape[:2], 1))
        with_base = jnp.concatenate([x_PxBxK, unchanged], axis=-1).swapaxes(0, 1)
        return jnp.take_along_axis(with_base, of_result[:, None], axis=-1)

    return {name: of_places(name) for name in found[0]}


def differs_before(runs: PairRuns, places: Sequence[Place]) -> jax.Array:
    """Checks of each pair whether an activation of a place differs between the runs before the change, bool [B]."""
    before_BxT = jnp.asarray(runs.batch.roles) == PAIR_ROLES.index("before")

    def at_site(site: str) -> jax.Array:
        unlike = runs.source.trace[site] != runs.base.trace[site]
        if SITES[site].per_layer:
            unlike = jnp.any(unlike, axis=0)
        return jnp.any(unlike.reshape(*before_BxT.shape, -1) & before_BxT[..., None], axis=(1, 2))

    return functools.reduce(jnp.logical_or, [at_site(site) for site in dict.fromkeys(place.site for place in places)])


def patched_before(params: Params, config: DecoderConfig, runs: PairRuns, places: Sequence[Place]) -> Effects:
    """Patches every place at all positions before the change, by the whole model: `answer_effects`, [B, places]."""
    before_BxT = jnp.asarray(runs.batch.roles) == PAIR_ROLES.index("before")
    sites = tuple(dict.fromkeys(place.site for place in places))

    def patched(at: tuple[jax.Array, jax.Array, jax.Array]) -> Effects:
        site_index, layer, head = at
        edits = {}
        for index, site in enumerate(sites):
            edit = patch_edit(config, runs.source, site, layer, head, before_BxT)[site]
            edits[site] = Edit(edit.mask & (site_index == index), edit.value)
        logits, _ = plain_forward(config)(params, runs.base.tokens, edits=edits)
        return answer_effects(take_positions(logits, runs.batch.prediction_positions, 1), runs.batch)

    at = zip(*((sites.index(place.site), place.layer, place.head) for place in places), strict=True)
    return {name: x.T for name, x in jax.lax.map(patched, tuple(map(jnp.array, at))).items()}


def _changed_state(place: Place, config: DecoderConfig) -> tuple[int, int]:
    """Names the state that a patched place leads to: the layer it enters, and its number.

    Numbers below the last layer are of `_states_in_window`; those in the last are of `states_after_layer`.
    """
    if place.site == "embedding":
        return 0, 0
    if place.site == "final_norm":
        return config.n_layers, 0
    own = {"post_attn": 0, "post_mlp": 0, "mlp_out": 1, "head_z": 2 + place.head}[place.site]
    if place.layer == config.n_layers - 1:
        return config.n_layers, own
    return place.layer + 1, 1 + place.layer * (config.n_heads + 2) + own


def states_after_layer(block: Block, kernel_HxExD: jax.Array, base: Trace, source: Trace) -> jax.Array:
    """Computes the residual stream after a layer with one of its places patched, at each position alone.

    Args:
      block: the layer, with its parameters.
      kernel_HxExD: its output projection.
      base, source: its `head_z` [B, P, H, E], and `post_attn`, `mlp_out` and `post_mlp` [B, P, D], in both runs.

    Returns:
      [2 + H, B, P, D]: after the whole stage, the MLP, and each head.
    """
    change = source["head_z"] - base["head_z"]
    written = jnp.einsum("bphe,hed->hbpd", change, kernel_HxExD, precision=block.config.precision)
    heads = block.from_post_attn(base["post_attn"][None] + written)
    return jnp.concatenate([source["post_mlp"][None], (base["post_attn"] + source["mlp_out"])[None], heads])


_PATCHED = ("head_z", "post_attn", "mlp_out", "post_mlp")


def _states_in_window(params: Params, config: DecoderConfig, runs: PairRuns) -> jax.Array:
    """Stacks the states that places lead to before the last layer, [1 + (L - 1) (2 + H), B, W, D], embedding first."""
    kernels = head_output_kernels(params, config.n_heads)

    def of_layer(at: tuple) -> jax.Array:
        own, kernel, base, source = at
        return states_after_layer(Block(config).bind({"params": own}), kernel, base, source)

    traces = [
        {name: in_window(run.trace[name][:-1], runs.window_BxW) for name in _PATCHED}
        for run in (runs.base, runs.source)
    ]
    states = [take_positions(runs.source.trace["embedding"], runs.window_BxW, 1)[None]]
    if config.n_layers > 1:
        early = jax.tree.map(lambda x: x[:-1], (params["blocks"], kernels))
        of_layers = jax.lax.map(of_layer, (*early, *traces))
        states.append(of_layers.reshape(-1, *of_layers.shape[2:]))
    return jnp.concatenate(states)


def _in_last_layer(params: Params, config: DecoderConfig, runs: PairRuns, where_BxKxW: jax.Array) -> Effects:
    """Patches the places of the last layer, [2 + H, B, K]: each read is patched alone, and sets are sums over reads."""
    last, positions = config.n_layers - 1, runs.batch.prediction_positions
    traces = [
        {name: take_positions(run.trace[name][last], positions, 1) for name in _PATCHED}
        for run in (runs.base, runs.source)
    ]
    block = Block(config).bind({"params": layer_params(params, last)})
    states = states_after_layer(block, head_output_kernels(params, config.n_heads)[last], *traces)
    logits = Decoder(config).apply({"params": params}, states, method=Decoder.read_out)
    patched = jax.vmap(read_effects, in_axes=(0, None))(logits, runs.batch)  # [2 + H, B, Q]
    at_reads = jnp.clip(positions - runs.window_BxW[:, :1], 0, runs.window_BxW.shape[1] - 1)
    is_patched = take_positions(where_BxKxW, at_reads, 2)

    def over_reads(name: str) -> jax.Array:
        each = jnp.where(is_patched[None], patched[name][:, :, None], runs.base_at_reads[name][None, :, None])
        return jnp.sum(each, axis=-1)

    return {name: over_reads(name) for name in patched}
