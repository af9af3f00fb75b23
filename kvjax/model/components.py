"""A head or an MLP of the decoder, and its one spelling."""

from __future__ import annotations

import dataclasses
import re

from kvjax.errors import bad_argument

_SPELLING = re.compile(r"L(\d+)(?:H(\d+)|\.mlp)")


@dataclasses.dataclass(frozen=True)
class Component:
    """A head, or an MLP if `head` is None; `str` spells it `L1H3` or `L1.mlp`.

    Attributes:
      layer: its layer, from 0.
      head: its head, from 0; None for the layer's MLP.
    """

    layer: int
    head: int | None = None

    @classmethod
    def parse(cls, spelling: str, parameter: str = "component") -> Component:
        """Reads a component's spelling; `parameter` is the argument that gave it.

        Raises:
          InputError: it is spelled in another way.
        """
        match = _SPELLING.fullmatch(spelling)
        if older := re.fullmatch(r"MLP(\d+)", spelling):
            raise bad_argument(parameter, f"{cls(int(older[1]))} for the MLP of layer {older[1]}", spelling)
        if match is None:
            raise bad_argument(parameter, "a head such as L1H3 or an MLP such as L1.mlp", spelling)
        return cls(int(match[1]), None if match[2] is None else int(match[2]))

    @property
    def is_mlp(self) -> bool:
        """Checks whether it is an MLP."""
        return self.head is None

    def __str__(self) -> str:
        return f"L{self.layer}.mlp" if self.is_mlp else f"L{self.layer}H{self.head}"


def all_components(n_layers: int, n_heads: int) -> tuple[Component, ...]:
    """Lists every head and MLP in forward order: each layer's heads, then its MLP."""
    heads = range(n_heads)
    return tuple(Component(layer, head) for layer in range(n_layers) for head in (*heads, None))


def all_heads(n_layers: int, n_heads: int) -> tuple[Component, ...]:
    """Lists every head, layer by layer."""
    return tuple(Component(layer, head) for layer in range(n_layers) for head in range(n_heads))
