"""Names the tokens of the key-value stream and numbers them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from kvjax.errors import unusable

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "SET", "=", ";", "QRY", "ANS", "W", "R")
PAD, BOS, EOS, WRITE, READ = "<pad>", "<bos>", "<eos>", "W", "R"
PAD_ID = 0  # in every benchmark; `from_metadata` checks it


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Every token of a benchmark; ids are indices into `tokens`.

    Attributes:
      tokens: special tokens, then keys, then values.
      key_tokens: the keys, in id order.
      value_tokens: the values, in id order.
    """

    tokens: tuple[str, ...]
    key_tokens: tuple[str, ...]
    value_tokens: tuple[str, ...]

    @classmethod
    def of_size(cls, num_keys: int, num_values: int) -> Vocabulary:
        """Builds the vocabulary of a new benchmark: keys K00…, values V000…."""
        keys = tuple(f"K{i:02d}" for i in range(num_keys))
        values = tuple(f"V{i:03d}" for i in range(num_values))
        return cls(SPECIAL_TOKENS + keys + values, keys, values)

    @classmethod
    def from_metadata(cls, document: Mapping[str, Sequence[str]], where: object) -> Vocabulary:
        """Reads the vocabulary that a benchmark's metadata or a checkpoint records.

        Args:
          document: `{tokens, key_tokens, value_tokens}`.
          where: the file it comes from, for the error message.

        Raises:
          InputError: a part is missing, a token repeats, or a key or value is not among the tokens.
        """
        try:
            vocabulary = cls(*(tuple(document[name]) for name in ("tokens", "key_tokens", "value_tokens")))
        except (KeyError, TypeError) as error:
            raise unusable(where, "a vocabulary with tokens, key_tokens and value_tokens", repr(error)) from None
        for part in dataclasses.fields(cls):
            names = getattr(vocabulary, part.name)
            if not names or not all(isinstance(name, str) for name in names):
                raise unusable(where, f"token names in the vocabulary's {part.name}", names[:3])
        if vocabulary.tokens[PAD_ID : PAD_ID + 1] != (PAD,):
            raise unusable(where, f"{PAD} as the first token", vocabulary.tokens[:1])
        known = set(vocabulary.tokens)
        if len(known) != len(vocabulary.tokens):
            raise unusable(where, "a vocabulary of distinct tokens", "a token listed twice")
        stray = [
            t for t in (*vocabulary.key_tokens, *vocabulary.value_tokens, PAD, BOS, EOS, WRITE, READ) if t not in known
        ]
        if stray:
            raise unusable(where, "every key, value and stream token among the tokens", f"{stray[0]} missing")
        return vocabulary

    @functools.cached_property
    def id_of(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    @functools.cached_property
    def key_ids(self) -> np.ndarray:
        """Token ids of the keys, [num_keys] int32."""
        return np.array([self.id_of[token] for token in self.key_tokens], np.int32)

    @functools.cached_property
    def value_ids(self) -> np.ndarray:
        """Token ids of the values, [num_values] int32."""
        return np.array([self.id_of[token] for token in self.value_tokens], np.int32)

    def to_metadata(self) -> dict[str, list[str]]:
        """Builds the JSON form that `from_metadata` reads."""
        return {name: list(getattr(self, name)) for name in ("key_tokens", "tokens", "value_tokens")}
