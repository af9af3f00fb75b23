"""What the driver and the printing need of a kind of intervention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import xarray as xr

from kvjax.intervene.inputs import InterventionInputs, Outcome
from kvjax.intervene.recovery import PairGroups


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of intervention.

    Attributes:
      name: its name in flags and files.
      analyse: measures one window and labels what it found.
      summary_lines: writes the lines that a reader sees first, from the summary document.
      settings: the settings that its numbers depend on, beside those that every kind does.
      neuron_rows: rows of the table of neurons, from its arrays; None for kinds that measure no neurons.
      reads: the kinds whose stored results of the same window it is shown beside.
      beside: puts those results, as far as there are any, beside what `analyse` measured: called with the arrays of
        `analyse`, the stored arrays by kind, and the pairs.
      summarise: summarises the arrays by a metric, as the kind's own part of the summary without `controls`; None if
        its numbers depend on the metric, or on none.
    """

    name: str
    analyse: Callable[[InterventionInputs], Outcome]
    summary_lines: Callable[[Mapping[str, Any]], list[str]]
    settings: tuple[str, ...] = ()
    neuron_rows: Callable[[xr.Dataset], list[dict[str, Any]]] | None = None
    reads: tuple[str, ...] = ()
    beside: Callable[[xr.Dataset, Mapping[str, xr.Dataset], PairGroups], Outcome] | None = None
    summarise: Callable[[xr.Dataset, str], dict[str, Any]] | None = None
