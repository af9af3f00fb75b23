"""Writes numbers, intervals and names of a story as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvjax.artifacts.story_schema import Change

_Ends = tuple[float, float]


def both_values(one: Change) -> str:
    """Writes the values before and after: `0.10 to 0.69`."""
    return f"{one.before:.2f} to {one.after:.2f}"


def with_change(one: Change) -> str:
    """Writes both values, their difference and its interval."""
    return f"{one.before:.3f} to {one.after:.3f}, a change of {one.change:+.3f} ({signed(one.interval)})"


def with_interval(one: Change) -> str:
    """Writes both values and the interval of their difference."""
    return f"{one.before:.3f} to {one.after:.3f} (change {signed(one.interval)})"


def share_change(one: Change) -> str:
    """Writes a share before and after, in percent."""
    return " to ".join("none" if share is None else percent(share) for share in (one.before, one.after))


def numbers(ends: _Ends | None, digits: int = 3) -> str:
    """Writes an interval with so many digits."""
    return "no interval" if ends is None else f"{ends[0]:.{digits}f} to {ends[1]:.{digits}f}"


def signed(ends: _Ends | None) -> str:
    """Writes an interval of a difference, with signs."""
    return "no interval" if ends is None else f"{ends[0]:+.3f} to {ends[1]:+.3f}"


def points(ends: _Ends | None) -> str:
    """Writes an interval of a difference of shares, in percentage points."""
    return "no interval" if ends is None else f"{100 * ends[0]:+.0f} to {100 * ends[1]:+.0f} points"


def percent(share: float) -> str:
    """Writes a share in percent, without a sign if it rounds to 0."""
    return f"{abs(100 * share) if -0.005 < share < 0 else 100 * share:.0f} %"


def cell(value: float | None) -> str:
    """Writes a number that may not exist."""
    return "none" if value is None else f"{value:.3f}"


def distance(ends: tuple[int, int]) -> str:
    """Writes a range of distances, or a single one."""
    return str(ends[0]) if ends[0] == ends[1] else from_to(ends)


def from_to(ends: tuple[int, int]) -> str:
    """Writes two steps."""
    return f"{ends[0]} to {ends[1]}"


def count(number: int, thing: str) -> str:
    """Writes how many there are of a thing."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def joined(names: Iterable[str]) -> str:
    """Joins names as a sentence does."""
    listed = list(names)
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"


def inflected(verb: str, subjects: Sequence[str]) -> str:
    """Inflects a verb for one subject or for several."""
    if len(subjects) != 1:
        return verb
    return f"{verb[:-1]}ies" if verb.endswith("y") else f"{verb}s"
