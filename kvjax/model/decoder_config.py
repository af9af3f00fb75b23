"""The static shape of a decoder."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvjax.config.run import ModelConfig


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The static shape of a decoder; hashable, so that it keys compiled programs.

    Attributes:
      tied: the unembedding is the token embedding, and the parameters hold no other.
      precision: of every matrix product, `highest` or `default` (with which JAX may use TF32 on a GPU).
      pad_id: the token that no query attends to.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    max_seq_len: int
    tied: bool = True
    precision: str = "highest"
    pad_id: int = 0

    @classmethod
    def from_model_config(cls, model: ModelConfig, vocab_size: int, **static: Any) -> DecoderConfig:
        """Takes the shape from a run's recorded model section."""
        shape = {field: getattr(model, field) for field in ("d_model", "n_layers", "n_heads", "d_ff", "max_seq_len")}
        return cls(vocab_size=vocab_size, **shape, **static)

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads
