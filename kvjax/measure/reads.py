"""The reads of one microbatch as device functions of measures see them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax

from kvjax.measure import behaviour


@dataclasses.dataclass(frozen=True)
class Reads:
    """The reads of one microbatch in a clean run; a measure's `compute` takes it.

    Attributes:
      logits_BxQxV: at p_e.
      answers_BxQ: token ids y_e.
      value_ids: [values] token ids of all values.
      attention: by name, [L, B, H, Q] each, as `attention_per_read` returns it.
    """

    logits_BxQxV: jax.Array
    answers_BxQ: jax.Array
    value_ids: jax.Array
    attention: Mapping[str, jax.Array]

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

    @functools.cached_property
    def selectivities(self) -> tuple[jax.Array, jax.Array]:
        """Key and recency selectivity, [B, Q] each; NaN if undefined."""
        return behaviour.selectivities(
            self.attention["current_value_attention"], self.attention["key"], self.attention["value"]
        )
