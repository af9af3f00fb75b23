"""What the driver and the printing need of a kind of intervention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import xarray as xr

from kvjax.intervene.inputs import InterventionInputs, Outcome


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of intervention.

    Attributes:
      name: its name in flags and files.
      analyse: measures one window and labels what it found.
      summary_lines: writes the lines that a reader sees first, from the summary document.
      takes_components: whether its numbers depend on the named set of components.
      neuron_rows: rows of the table of neurons, from its arrays; None for kinds that measure no neurons.
    """

    name: str
    analyse: Callable[[InterventionInputs], Outcome]
    summary_lines: Callable[[Mapping[str, Any]], list[str]]
    takes_components: bool = False
    neuron_rows: Callable[[xr.Dataset], list[dict[str, Any]]] | None = None
