"""Leaves checkpoints out of trajectories, and shifts out of windows, where a run is no one trajectory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kvjax.artifacts.birth_windows_schema import TrajectoryBreak
from kvjax.windows.group_shifts import Shift


@dataclasses.dataclass(frozen=True)
class Breaks:
    """Where the checkpoints of a run are no one trajectory.

    Attributes:
      dropped: steps that are left out: a copy of an earlier step, or a checkpoint unrelated to both its neighbours.
      jumps: gaps between the others across which a run becomes another one.
      resumed: gaps inside which training was resumed.
      no_drift: steps whose drift from the previous checkpoint is that from another trajectory.
    """

    dropped: frozenset[int] = frozenset()
    jumps: frozenset[int] = frozenset()
    resumed: frozenset[int] = frozenset()
    no_drift: frozenset[int] = frozenset()

    @classmethod
    def of(cls, steps: Sequence[int], found: Sequence[TrajectoryBreak]) -> Breaks:
        """Sorts the breaks of a sweep; gaps are counted among the steps that are not dropped."""
        begins, ends = ({getattr(one, end) for one in found if one.kind == "jump"} for end in ("before", "after"))
        foreign = begins & ends
        dropped = foreign | {one.after for one in found if one.kind == "copy"}
        kept = [step for step in steps if step not in dropped]

        def gaps(kind: str) -> frozenset[int]:
            # The gap that ends at the first kept step from the break on; none if the kept steps begin or end there.
            ending = (next((i for i, s in enumerate(kept) if s >= one.after), 0) for one in found if one.kind == kind)
            return frozenset(index - 1 for index in ending if index > 0)

        return cls(frozenset(dropped), gaps("jump"), gaps("resumed"), frozenset(ends))

    def founds_no_window(self, shift: Shift, *, side: int) -> bool:
        """Checks whether a shift may be a break's, with `side` checkpoints averaged on each side of a gap.

        Then it holds across a jump or is averaged across one, or it is largest where training was resumed.
        """
        across = any(shift.first <= gap <= shift.last or abs(shift.gap - gap) < side for gap in self.jumps)
        return across or shift.gap in self.resumed


NO_BREAKS = Breaks()
