"""Ablates many sets of components in the same streams, and computes what several sets have in common once.

Up to a layer, a run under a set depends on the set's members in the layers before alone. The runs are therefore a
tree: each layer computes its distinct states, each from one of the layer before. Ahead of a set's first member lies the
clean run; a layer whose heads are all ablated needs no attention, and an ablated MLP is not computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.model.attention import attention_mask
from kvjax.model.decoder import Block, Decoder
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params, layer_params
from kvjax.model.restart import CleanRun
from kvjax.model.sites import Trace, take_positions

SET_CAPTURE = ("embedding", "head_z", "post_mlp")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SetTree:
    """The states that sets of components need in each layer, and the states of the layer before that they go on from.

    Attributes:
      parents_LxK: int32: 0 for the clean run, 1 + k for state k of the layer before.
      members_LxKxM: bool, of the layer: its heads, then its MLP, so that M is H + 1.
      counts_L: int32: how many of the K are states; the rest is filled up. In the last layer state k is set k.
    """

    parents_LxK: np.ndarray
    members_LxKxM: np.ndarray
    counts_L: np.ndarray

    @classmethod
    def of(cls, sets_KxLxM: np.ndarray, capacity: int) -> SetTree:
        """Finds the distinct states of at most `capacity` sets, so that as many sets are one program."""
        num_sets, n_layers, _ = sets_KxLxM.shape
        assert num_sets <= capacity
        parents, counts = np.zeros((n_layers, capacity), np.int32), np.zeros(n_layers, np.int32)
        members = np.zeros((n_layers, capacity, sets_KxLxM.shape[2]), bool)
        here = np.zeros(num_sets, np.int32)
        for layer in range(n_layers):
            states: dict[tuple, int] = {}
            after = np.zeros_like(here)
            for k, (parent, own) in enumerate(zip(here, sets_KxLxM[:, layer], strict=True)):
                is_last = layer == n_layers - 1
                if not (is_last or parent or own.any()):
                    continue  # still the clean run
                state = states.setdefault((k,) if is_last else (parent, *own), len(states))
                parents[layer, state], members[layer, state], after[k] = parent, own, 1 + state
            counts[layer], here = len(states), after
        return cls(parents, members, counts)


def under_sets(
    params: Params,
    config: DecoderConfig,
    clean: CleanRun,
    values: Trace,
    tree: SetTree,
    *,
    positions_BxQ: jax.Array,
    measure: Callable[[jax.Array], Any],
) -> Any:
    """Measures the logits at given positions with each of K sets of components replaced, at every position.

    Args:
      params: of the checkpoint the clean run came from.
      config: its shape.
      clean: the clean run, with `SET_CAPTURE`.
      values: the replacements, `head_z` [L, B, T, H, E] and `mlp_out` [L, B, T, D].
      tree: the sets.
      positions_BxQ: the positions read.
      measure: of logits [B, Q, V], a tree of arrays.

    Returns:
      What `measure` finds of each set, stacked on a leading axis K; 0 beyond the last set.
    """
    block, is_token_BxT, last = Block(config), clean.tokens != config.pad_id, config.n_layers - 1
    before_LxBxTxD = jnp.concatenate([clean.at("embedding")[None], clean.at("post_mlp")[:-1]])
    clean_z, slots = clean.at("head_z"), jnp.arange(tree.parents_LxK.shape[1])

    def over_states(of_state: Callable[[jax.Array, jax.Array], Any], parents_K: Any, members_KxM: Any, count: Any):
        def one(at: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
            slot, parent, members_M = at
            shapes = jax.eval_shape(of_state, parent, members_M)
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            return jax.lax.cond(slot < count, of_state, lambda *_: nothing, parent, members_M)

        return jax.lax.map(one, (slots, jnp.asarray(parents_K), jnp.asarray(members_KxM)))

    def state(own: Params, clean_here: Trace, replaced: Trace, states_KxBxTxD: jax.Array, queries_BxP: Any) -> Callable:
        mask, variables = attention_mask(is_token_BxT, queries_BxP), {"params": own}

        def at_queries(x: jax.Array) -> jax.Array:
            return x if queries_BxP is None else take_positions(x, queries_BxP, 1)

        def after(parent: jax.Array, members_M: jax.Array) -> jax.Array:
            heads_H, mlp = members_M[:-1], members_M[-1]
            resid = jnp.where(parent == 0, clean_here["before"], states_KxBxTxD[jnp.maximum(parent - 1, 0)])
            z = jax.lax.cond(
                (parent == 0) | jnp.all(heads_H),
                lambda: at_queries(clean_here["head_z"]),
                lambda: block.apply(variables, resid, mask, queries_BxP=queries_BxP, method=Block.head_z),
            )
            z = jnp.where(heads_H[:, None], at_queries(replaced["head_z"]), z)
            post_attn = block.apply(variables, at_queries(resid), z, method=Block.post_attn)
            return jax.lax.cond(
                mlp,
                lambda: post_attn + at_queries(replaced["mlp_out"]),
                lambda: block.apply(variables, post_attn, method=Block.from_post_attn),
            )

        return after

    def layer_body(states_KxBxTxD: jax.Array, at: tuple) -> tuple[jax.Array, None]:
        own, clean_here, replaced, *of_tree = at
        return over_states(state(own, clean_here, replaced, states_KxBxTxD, None), *of_tree), None

    everything = (params["blocks"], {"before": before_LxBxTxD, "head_z": clean_z}, values)
    everything = (*everything, tree.parents_LxK, tree.members_LxKxM, tree.counts_L)
    earlier = jax.tree.map(lambda x: jnp.asarray(x)[:last], everything)
    states = jnp.zeros((len(slots), *before_LxBxTxD.shape[1:]), before_LxBxTxD.dtype)
    states, _ = jax.lax.scan(layer_body, states, earlier)

    here = {"before": before_LxBxTxD[last], "head_z": clean_z[last]}
    after = state(
        layer_params(params, last), here, {name: x[last] for name, x in values.items()}, states, positions_BxQ
    )

    def measured(parent: jax.Array, members_M: jax.Array) -> Any:
        return measure(Decoder(config).apply({"params": params}, after(parent, members_M), method=Decoder.read_out))

    return over_states(measured, tree.parents_LxK[last], tree.members_LxKxM[last], tree.counts_L[last])
