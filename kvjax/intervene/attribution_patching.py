"""Attribution patching: a first-order screen of what activation and path patching would find.

A node's score is the change of its output between the runs times the metric's gradient there; a path's, the change of
the sender's output times the gradient at the receiver's input. Gradients are taken in the base run, or averaged along
the line between the two runs' embeddings (integrated gradients). The plain forward pass is differentiated: a restarted
one has no gradient through its traced start.

Source: Nanda, Attribution patching (2023); Syed et al. (2023); Hanna et al., Have faith in faithfulness (2024).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.intervene.pair_runs import PairRuns, answer_effects, run_pairs
from kvjax.intervene.paths import all_edges, all_senders, sender_changes
from kvjax.model.decoder import DecoderConfig, Params
from kvjax.model.interventions import Edit, Interventions
from kvjax.model.restart import before_layer
from kvjax.model.sites import SITES, Trace, take_positions
from kvjax.model.transforms import plain_forward
from kvjax.task.pair_encoding import EncodedPairs

METHODS = ("gradient", "integrated_gradients")
INTEGRATION_STEPS = 4

_LAYER_SITES = ("head_z", "mlp_out", "query_input", "key_input", "value_input", "mlp_input")
_TRACE = ("embedding", "head_z", "mlp_out", "post_attn", "post_mlp")


def attribution_scores(
    params: Params, config: DecoderConfig, batch: EncodedPairs, *, window: int, direction: jax.Array | int
) -> dict[str, jax.Array]:
    """Returns the first-order effect on the metric of patching each node and each direct path.

    Returns:
      For each of `METHODS`: `nodes/<method>` [B, senders] and `edges/<method>` [B, edges], in the order of
      `all_senders` and `all_edges`; in logits, summed over the affected reads of a pair.
    """
    runs = run_pairs(params, config, batch, direction, window=window)
    changes = sender_changes(params, config, runs)  # [senders, B, T, D]
    z_change = runs.source.trace["head_z"] - runs.base.trace["head_z"]
    middles = (jnp.arange(INTEGRATION_STEPS) + 0.5) / INTEGRATION_STEPS
    along = jax.lax.map(lambda share: _gradients(params, config, runs, share), middles)
    gradients = {
        "gradient": _gradients(params, config, runs, jnp.zeros(())),
        "integrated_gradients": jax.tree.map(lambda x: jnp.mean(x, axis=0), along),
    }
    scores = {}
    for method, found in gradients.items():
        scores[f"nodes/{method}"] = _node_scores(config, changes, z_change, found)
        scores[f"edges/{method}"] = _edge_scores(config, changes, found)
    return scores


def _gradients(params: Params, config: DecoderConfig, runs: PairRuns, share: jax.Array) -> Trace:
    """Returns the metric's gradient at every output and input, in the run whose embedding lies `share` of the way.

    Each site's layers are differentiated one at a time: its activation there is replaced by itself, so that what
    reaches the answer through later layers counts.
    """
    batch, apply = runs.batch, plain_forward(config)
    own, other = runs.base.trace["embedding"], runs.source.trace["embedding"]
    start: Interventions = {"embedding": Edit(jnp.ones((1, 1, 1), bool), own + share * (other - own))}
    _, trace = apply(params, runs.base.tokens, edits=start, capture=_TRACE)

    def metric(site: str, mask: jax.Array, value: jax.Array) -> jax.Array:
        logits, _ = apply(params, runs.base.tokens, edits=dict(start) | {site: Edit(mask, value)})
        read = take_positions(logits, batch.prediction_positions, 1)
        return jnp.sum(answer_effects(read, batch)["difference"])

    def at_layer(site: str, layer: jax.Array) -> jax.Array:
        rank = len(SITES[site].axes)
        mask = (jnp.arange(config.n_layers) == layer).reshape(-1, *[1] * (rank - 1))
        if site in ("head_z", "mlp_out"):
            value = jax.lax.dynamic_index_in_dim(trace[site], layer, 0, keepdims=False)
        elif site == "mlp_input":
            value = jax.lax.dynamic_index_in_dim(trace["post_attn"], layer, 0, keepdims=False)
        else:
            resid = before_layer(trace, layer)[:, :, None]
            value = jnp.broadcast_to(resid, (*resid.shape[:2], config.n_heads, config.d_model))
        return jax.grad(lambda x: metric(site, mask, x[None]))(value)

    layers = jnp.arange(config.n_layers)
    gradients = {site: jax.lax.map(lambda layer, s=site: at_layer(s, layer), layers) for site in _LAYER_SITES}
    everywhere = jnp.ones((1, 1, 1), bool)
    gradients["logits_input"] = jax.grad(lambda x: metric("logits_input", everywhere, x))(trace["post_mlp"][-1])
    gradients["embedding"] = jax.grad(lambda x: metric("embedding", everywhere, x))(start["embedding"].value)
    return gradients


def _node_scores(config: DecoderConfig, changes: jax.Array, z_change: jax.Array, gradients: Trace) -> jax.Array:
    heads = jnp.sum(z_change * gradients["head_z"], axis=(2, 4))  # [L, B, H]
    by_layer = changes[1:].reshape(config.n_layers, config.n_heads + 1, *changes.shape[1:])
    mlps = jnp.sum(by_layer[:, -1] * gradients["mlp_out"], axis=(2, 3))  # [L, B]
    layers = jnp.concatenate([heads, mlps[..., None]], axis=-1)  # [L, B, H + 1]
    embedding = jnp.sum(changes[0] * gradients["embedding"], axis=(1, 2))
    return jnp.concatenate([embedding[:, None], jnp.moveaxis(layers, 1, 0).reshape(len(embedding), -1)], axis=1)


def _edge_scores(config: DecoderConfig, changes: jax.Array, gradients: Trace) -> jax.Array:
    senders = all_senders(config.n_layers, config.n_heads)
    products = {}
    for site in ("query_input", "key_input", "value_input"):
        products[site] = jnp.einsum("sbtd,lbthd->slhb", changes, gradients[site], precision="highest")
    products["mlp_input"] = jnp.einsum("sbtd,lbtd->slb", changes, gradients["mlp_input"], precision="highest")
    products["logits_input"] = jnp.einsum("sbtd,btd->sb", changes, gradients["logits_input"], precision="highest")
    columns = []
    for sender, receiver in all_edges(config.n_layers, config.n_heads):
        x = products[receiver.site][senders.index(sender)]
        if receiver.site == "mlp_input":
            x = x[receiver.layer]
        elif receiver.site != "logits_input":
            x = x[receiver.layer, receiver.head]
        columns.append(x)
    return jnp.stack(columns, axis=-1)
