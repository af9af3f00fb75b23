"""Declares every measure of a sweep once: its name, units, origin, and where it is shown.

One loop over `MEASURES` gives means, intervals, full-split evaluations, trajectories of birth windows, netCDF
attributes, row schemas and figure labels. A new measure of the clean run, of whatever level, is one more
declaration with `compute`.
The declarations stand in `kvjax.measure.declarations`, a module per subject. They and this module import the standard
library alone, so configs and schemas can be made from them (docs/definitions.md lists the same declarations; a test
holds the two together).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvjax.measure.declaration import LEVEL_AXES, Measure, RowField, Table
from kvjax.measure.declarations import behaviour, components, dynamics, residual, tokens, weights

ALL_SPLITS = "all"  # the whole probe set, beside its splits
BIRTH_SPLIT = "validation_iid"  # the split that birth thresholds were written for

MEASURES: tuple[Measure, ...] = (
    *(*behaviour.MEASURES, *tokens.MEASURES, *residual.LENS, *components.MEASURES),
    *(*residual.PROBES, *dynamics.MEASURES, *weights.MEASURES, *behaviour.COUNTS),
)


def declared(name: str) -> Measure:
    """Looks up a measure by name.

    Raises:
      KeyError: no measure has the name.
    """
    for measure in MEASURES:
        if measure.name == name:
            return measure
    raise KeyError(name)


def computed() -> list[Measure]:
    """Lists the measures that declare their own device function."""
    return [measure for measure in MEASURES if measure.compute is not None]


def computed_sources() -> frozenset[str]:
    """Names every array that a declared device function makes."""
    return frozenset(source for measure in computed() for source in measure.sources)


def computed_names() -> tuple[str, ...]:
    """Names every measure that declares its own device function."""
    return tuple(measure.name for measure in computed())


def axes_of_sources() -> Mapping[str, tuple[str, ...]]:
    """Maps every array that a declared device function makes to its axes beyond the sequence."""
    of_level = LEVEL_AXES | {"read": ("read",)}
    return {
        source: measure.own_axes if measure.level == "token" else of_level[measure.level]
        for measure in computed()
        for source in measure.sources
    }


def row_fields(table: Table) -> Iterator[tuple[Measure, RowField]]:
    """Yields every field of a table's rows with the measure it shows."""
    for measure in MEASURES:
        if measure.table == table:
            for field in measure.fields:
                yield measure, field


def drop_fields(table: Table) -> Iterator[tuple[Measure, RowField]]:
    """Yields every field of a component table that shows what an ablation costs."""
    for measure, field in row_fields(table):
        if "ablation" in measure.own_axes or measure.name.endswith(components.SPREAD):
            yield measure, field


def triggers() -> Iterator[tuple[Measure, RowField]]:
    """Yields every field that a kind of birth-window trigger watches, with its measure."""
    for measure in MEASURES:
        for field in measure.fields:
            if field.trigger is not None:
                yield measure, field


def units_of_source(source: str) -> str:
    """Looks up the units of a measured array, "1" if no measure with units is formed from it."""
    kind, _, quantity = source.partition("/")
    pattern = f"{kind}/{{ablation}}/{quantity.rpartition('/')[2]}" if "/" in quantity else source
    units = {m.units for m in MEASURES if pattern in m.sources}
    return next(iter(units - {"1"}), "1")
