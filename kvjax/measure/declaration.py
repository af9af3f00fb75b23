"""The type of a measure's declaration: what is said of it, and what follows from that.

It imports the standard library alone, so configs and schemas can be made from declarations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import jax
    import numpy as np

Level = Literal["read", "token", "stage", "head", "mlp", "layer", "model"]

# The first three are ratios of sums over sequences, which have intervals; the others are formed by code of their own.
Kind = Literal["rate", "mean", "difference of rates", "statistic", "count"]

# What a mean is divided by: `present` leaves out reads for which the measure is undefined (NaN), `contrasted` those
# whose support is the only value before them, and `measured` means that a second source holds the number of reads for
# which it is defined.
Counted = Literal["reads", "present", "stale", "contrasted", "targets", "role targets", "measured"]

Table = Literal["checkpoint", "heads", "mlps"]

LEVEL_AXES: dict[str, tuple[str, ...]] = {
    **{"read": (), "token": (), "model": ()},
    **{"stage": ("stage",), "head": ("layer", "head"), "mlp": ("layer",), "layer": ("layer",)},
}

HELDOUT_SPLIT = "heldout_pairs"


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a printed table: its heading and the format of its numbers."""

    heading: str
    form: str


@dataclasses.dataclass(frozen=True)
class RowField:
    """A field of a row that shows a measure.

    Attributes:
      name: of the field.
      where: label by axis that the field is limited to; the split is `all` unless named.
      delta: whether the row also has `delta_<name>`, the change from the previous checkpoint.
      trigger: kind of birth-window trigger that watches the field, if any.
      column: how commands print it, if they do.
    """

    name: str
    where: Mapping[str, str] = dataclasses.field(default_factory=dict)
    delta: bool = False
    trigger: str | None = None
    column: Column | None = None


@dataclasses.dataclass(frozen=True)
class Measure:
    """One measure.

    Attributes:
      name: of the variable in `checkpoint_metrics.nc`.
      level: what there is one value of; gives the axes unless `axes` does.
      units: of its values, "1" for shares and other pure numbers.
      description: one clause, the variable's `long_name`.
      kind: how it is formed, and which bounds its interval has.
      axes: names of the axes beyond step and split.
      by_split: whether it is formed for every split, or for the whole probe set alone.
      by_step: whether it depends on the checkpoint.
      sources: measured arrays it is formed from; `{ablation}` stands for every kind of ablation measured.
      combine: makes one array [C, N, *axes] of several sources.
      lost_from: the read measure whose clean value the ablated one is subtracted from.
      counted: what the mean is divided by; one entry per label of the first axis if they differ.
      groups: what groups the reads (difficulties, values of axes), by the labels of the measure's axis.
      interval: whether its 95 % interval is made.
      compute: takes a microbatch's `Reads` on the device and makes the array that `sources` names, or a tuple of them.
        Reads stand last and are summed over later: [B, Q] (levels read and model), [S, B, Q] (stage), [L, B, Q] (mlp,
        layer), [L, B, H, Q] (head). Level token is summed over a sequence's targets already: [B] or [B, roles].
      fields: of the rows that show it.
      split_metric: whether `split_metrics` of the row has it for every split.
      label: of its line or axis in figures.
      panel: of the trajectory figure that draws it on the birth split.
    """

    name: str
    level: Level
    units: str
    description: str
    kind: Kind = "mean"
    axes: tuple[str, ...] | None = None
    by_split: bool = True
    by_step: bool = True
    sources: tuple[str, ...] = ()
    combine: Callable[..., np.ndarray] | None = None
    lost_from: str | None = None
    counted: Counted | tuple[Counted, ...] = "reads"
    groups: str | None = None
    interval: bool = True
    compute: Callable[[Any], jax.Array | tuple[jax.Array, ...]] | None = None
    fields: tuple[RowField, ...] = ()
    split_metric: bool = False
    label: str | None = None
    panel: Literal["attention"] | None = None

    @property
    def own_axes(self) -> tuple[str, ...]:
        """Axes beyond step and split."""
        return LEVEL_AXES[self.level] if self.axes is None else self.axes

    @property
    def dims(self) -> tuple[str, ...]:
        """Dimensions of the variable in the file: the kind of ablation stands before the split."""
        first = tuple(axis for axis in self.own_axes if axis == "ablation")
        rest = tuple(axis for axis in self.own_axes if axis != "ablation")
        return (*(["step"] if self.by_step else []), *first, *(["split"] if self.by_split else []), *rest)

    @property
    def is_ratio(self) -> bool:
        """Checks whether it is a ratio of sums over sequences."""
        return self.kind not in ("statistic", "count")

    @property
    def table(self) -> Table:
        """The table whose rows show it."""
        return {"head": "heads", "mlp": "mlps"}.get(self.level, "checkpoint")

    def shape_in_row(self, field: RowField) -> tuple[str, ...]:
        """Axes along which a field of a row has labels; () for one number."""
        in_table = LEVEL_AXES[self.level] if self.table != "checkpoint" else ()
        return tuple(axis for axis in self.own_axes if axis not in field.where and axis not in in_table)

    def axis_label(self) -> str:
        """Label with units, for an axis of a figure."""
        label = self.label or self.name.replace("_", " ")
        return label if self.units == "1" else f"{label} ({self.units})"
