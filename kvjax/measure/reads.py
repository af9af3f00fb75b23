"""The reads of one microbatch as device functions of measures see them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from kvjax.measure import attribution, behaviour, heads, residual
from kvjax.measure.qk_separation import qk_separation
from kvjax.model.decoder import Decoder
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params
from kvjax.model.sites import Trace, take_positions


@dataclasses.dataclass(frozen=True)
class Reads:
    """The reads of one microbatch in a clean run, and all that a measure may look at; its `compute` takes this.

    Attributes:
      params, config: of the checkpoint.
      trace: activations by site, at all positions.
      logits_BxTxV: at all positions.
      states_GxBxQxD: residual states, G = 2 S: every stage at p_e, then at s_e.
      tokens_BxT, token_roles_BxT: token ids, and the role of each; negative if it is no target.
      num_roles: how many roles there are.
      positions_BxQ, support_positions_BxQ: p_e and s_e.
      answers_BxQ, keys_BxQ: token ids of the answer and of the key read.
      relations_BxQxT: the relation of each position to each read.
      relation_groups: the relations in each of the groups `current`, `stale`, `key`, `null_key` and `value`.
      value_ids, key_ids: token ids of all values and of all keys.
      key_directions_LxHxDxR: the leading right singular directions of every head's W_QK.
    """

    params: Params
    config: DecoderConfig
    trace: Trace
    logits_BxTxV: jax.Array
    states_GxBxQxD: jax.Array
    tokens_BxT: jax.Array
    token_roles_BxT: jax.Array
    num_roles: int
    positions_BxQ: jax.Array
    support_positions_BxQ: jax.Array
    answers_BxQ: jax.Array
    keys_BxQ: jax.Array
    relations_BxQxT: jax.Array
    relation_groups: Mapping[str, Sequence[int]]
    value_ids: jax.Array
    key_ids: jax.Array
    key_directions_LxHxDxR: jax.Array

    @functools.cached_property
    def logits_BxQxV(self) -> jax.Array:
        """The logits at p_e."""
        return take_positions(self.logits_BxTxV, self.positions_BxQ, 1)

    def at_prediction(self, site: str) -> jax.Array:
        """Takes the activations of a per-layer site at p_e, [L, B, Q, ...]."""
        return self._at(site, self.positions_BxQ)

    def at_support(self, site: str) -> jax.Array:
        """Takes the activations of a per-layer site at s_e, [L, B, Q, ...]."""
        return self._at(site, self.support_positions_BxQ)

    def _at(self, site: str, positions_BxQ: jax.Array) -> jax.Array:
        return jax.vmap(lambda x: take_positions(x, positions_BxQ, 1))(self.trace[site])

    @property
    def correct(self) -> jax.Array:
        """Checks whether the argmax over the vocabulary is the answer, bool [B, Q]."""
        return behaviour.answer_correct(self.logits_BxQxV, self.answers_BxQ)

    @property
    def margin(self) -> jax.Array:
        """Logit of the answer minus the largest of the other values, [B, Q]."""
        return behaviour.answer_margin(self.logits_BxQxV, self.answers_BxQ, self.value_ids)

    @functools.cached_property
    def distribution(self) -> tuple[jax.Array, jax.Array]:
        """Entropy of the prediction (nats) and probability of the answer, [B, Q] each."""
        return behaviour.answer_distribution(self.logits_BxQxV, self.answers_BxQ)

    @property
    def answer_loss(self) -> jax.Array:
        """Minus the log probability of the answer, nats, [B, Q]."""
        return behaviour.answer_loss(self.logits_BxQxV, self.answers_BxQ)

    @functools.cached_property
    def answer_logits(self) -> tuple[jax.Array, jax.Array]:
        """The answer's logit, and that minus the mean over values, [B, Q] each."""
        return behaviour.answer_logits(self.logits_BxQxV, self.answers_BxQ, self.value_ids)

    @functools.cached_property
    def next_token(self) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy in nats [B] and right predictions by role [B, roles], summed over a sequence's targets."""
        return behaviour.next_token_sums(
            self.logits_BxTxV, self.tokens_BxT, self.token_roles_BxT, num_roles=self.num_roles
        )

    @functools.cached_property
    def attention(self) -> Mapping[str, jax.Array]:
        """Where heads attend at the reads, [L, B, H, Q] each, as `attention_per_read` returns it."""
        return heads.attention_per_read(
            self.trace["pattern"],
            self.positions_BxQ,
            self.support_positions_BxQ,
            self.relations_BxQxT,
            self.relation_groups,
        )

    @functools.cached_property
    def qk_separation(self) -> tuple[jax.Array, jax.Array]:
        """How far scores tell the support from other values, [L, B, H, Q] in nats, in full and by 8 directions."""
        return qk_separation(
            self.params,
            self.config,
            self.trace,
            self.key_directions_LxHxDxR,
            prediction_positions_BxQ=self.positions_BxQ,
            support_positions_BxQ=self.support_positions_BxQ,
            relations_BxQxT=self.relations_BxQxT,
            value_relations=self.relation_groups["value"],
        )

    @functools.cached_property
    def head_selectivities(self) -> Mapping[str, jax.Array]:
        """Selectivities of heads, [L, B, H, Q] each, as `behaviour.head_selectivities` returns them."""
        has_null = jnp.any(jnp.isin(self.relations_BxQxT, jnp.array(self.relation_groups["null_key"])), axis=-1)
        return behaviour.head_selectivities(self.attention, has_null)

    @functools.cached_property
    def selectivities(self) -> Mapping[str, jax.Array]:
        """Selectivities of reads, [B, Q] each; NaN if undefined."""
        return behaviour.read_selectivities(self.head_selectivities)

    @functools.cached_property
    def lens(self) -> Mapping[str, jax.Array]:
        """The logit lens at every stage, [S, B, Q] each, as `lens_per_read` returns it."""

        def logits(states_SxBxQxD: jax.Array) -> jax.Array:
            # The last stage is the final LayerNorm's output already.
            model, variables = Decoder(self.config), {"params": self.params}
            before = model.apply(variables, states_SxBxQxD[:-1], method=Decoder.read_out)
            after = model.apply(variables, states_SxBxQxD[-1:], method=Decoder.unembed)
            return jnp.concatenate([before, after])

        at_prediction, at_support = jnp.split(self.states_GxBxQxD, 2)
        return residual.lens_per_read(
            logits(at_prediction),
            logits(at_support),
            self.answers_BxQ,
            self.keys_BxQ,
            value_ids=self.value_ids,
            key_ids=self.key_ids,
        )

    @functools.cached_property
    def attribution(self) -> Mapping[str, jax.Array]:
        """Direct logit attribution of every component, as `direct_logit_attribution` returns it."""
        at_reads = {site: self.at_prediction(site) for site in ("head_z", "mlp_out", "post_mlp")}
        at_reads["embedding"] = take_positions(self.trace["embedding"], self.positions_BxQ, 1)
        return attribution.direct_logit_attribution(self.params, at_reads, self.answers_BxQ, self.value_ids)

    @property
    def write_norms(self) -> tuple[jax.Array, jax.Array]:
        """The L2 norm of each MLP's output at p_e and at s_e, [L, B, Q] each."""
        outputs = self.at_prediction("mlp_out"), self.at_support("mlp_out")
        return tuple(jnp.linalg.norm(x, axis=-1) for x in outputs)
