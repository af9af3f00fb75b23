"""Which positions of each variant of a run are computed, all of them as rows of one array, or as a grid of windows."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# More starts compute fewer positions (a window of 24: 1.25 times as many as needed) and make larger programs.
_STARTS = 4


@dataclasses.dataclass(frozen=True)
class Rows:
    """The positions computed of each variant.

    Attributes:
      window: W, the positions of the window.
      first: for each of K variants, the first position of the window that is computed; all after it are too. Few
        different ones, and equal ones side by side, make small programs.
    """

    window: int
    first: tuple[int, ...]

    @classmethod
    def for_changes(cls, window: int, earliest: Sequence[int]) -> Rows:
        """Chooses rows for variants whose earliest changed positions are given, from at most `_STARTS` positions on."""
        starts = np.unique(np.linspace(0, window, min(_STARTS, window), endpoint=False).astype(int))
        return cls(window, tuple(int(starts[starts <= position].max()) for position in earliest))

    @functools.cached_property
    def _groups(self) -> list[tuple[int, int]]:
        """Lists how many variants in turn begin at which position."""
        return [(len(list(equal)), first) for first, equal in itertools.groupby(self.first)]

    def __len__(self) -> int:
        return sum(self.window - first for first in self.first)

    def of_window(self, x_BxW: jax.Array) -> jax.Array:
        """Repeats what all variants share, [B, W, …], for each row, [B, N, …]."""
        pieces = [x_BxW[:, None, first:] for _, first in self._groups]
        wide = [jnp.broadcast_to(x, (len(x), n, *x.shape[2:])) for x, (n, _) in zip(pieces, self._groups, strict=True)]
        return _joined_rows(wide)

    def of_grid(self, x_BxKxW: jax.Array) -> jax.Array:
        """Takes the rows, [B, N, …], from all positions of all variants, [B, K, W, …]."""
        pieces, k = [], 0
        for count, first in self._groups:
            pieces.append(x_BxKxW[:, k : k + count, first:])
            k += count
        return _joined_rows(pieces)

    def grid(self, rows: jax.Array, shared: jax.Array, axis: int = 1) -> jax.Array:
        """Puts the rows of each variant after the positions that all share: [B, N, …] and [B, W, …] to [B, K, W, …].

        Args:
          rows, shared: with the rows and the window's positions on `axis`.
          axis: which.
        """
        pieces, done = [], 0
        for count, first in self._groups:
            end = done + count * (self.window - first)
            own = jax.lax.slice_in_dim(rows, done, end, axis=axis)
            own = own.reshape(*rows.shape[:axis], count, self.window - first, *rows.shape[axis + 1 :])
            if first:
                before = jnp.expand_dims(jax.lax.slice_in_dim(shared, 0, first, axis=axis), axis)
                before = jnp.broadcast_to(before, (*own.shape[: axis + 1], first, *own.shape[axis + 2 :]))
                own = jnp.concatenate([before, own], axis=axis + 1)
            pieces.append(own)
            done = end
        return jnp.concatenate(pieces, axis=axis)


def _joined_rows(pieces: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate([x.reshape(len(x), -1, *x.shape[3:]) for x in pieces], axis=1)
