"""When something formed: the birth windows, what moved in them in which order, births by threshold."""

from __future__ import annotations

from collections.abc import Sequence

from kvjax.artifacts.birth_windows_schema import BirthWindows, WindowEntry
from kvjax.artifacts.results import RunResults
from kvjax.report.charts.description import Band, Span, Timeline
from kvjax.report.parts import Part, Section, Table, section
from kvjax.report.sections.run_data import window_bands

_MOST_ROWS = 14
_MOST_TRIGGERS = 12


def windows_section(results: RunResults) -> Section:
    """Shows each birth window with its triggers, the order in which metrics moved, and births by threshold."""
    return section(
        "windows",
        "Birth windows",
        "The few checkpoints between which something formed, what moved there, and in which order.",
        lambda: _parts(results.windows, window_bands(results)),
    )


def _parts(found: BirthWindows, bands: Sequence[Band]) -> list[Part]:
    parts = [Part(lines=[f"{found.verdict.capitalize()}: {found.reason}."])]
    for window in found.windows:
        inside = ", ".join(map(str, window.steps))
        lines = [f"From step {window.start_step} to {window.end_step}: checkpoints {inside}."]
        lines += [
            f"Importance {verb}: {_changes(own)}."
            for verb, own in (("rose", window.rose), ("fell", window.fell))
            if own
        ]
        parts.append(
            Part(
                f"Window around step {window.center_step}",
                lines,
                [order_chart(window, bands)] if window.order else [],
                [_triggers(window)],
            )
        )
    births = [
        [name, own.split, own.threshold, own.step, _ends(own.interval), own.half_rise_step, own.reason]
        for name, own in found.births.items()
    ]
    if births:
        header = ["metric", "split", "threshold", "born at", "95 %", "half-rise", "why"]
        parts.append(Part("Births", tables=[Table("Births by threshold", header, births)]))
    ramps = [[own.metric, own.split, own.before, own.after, own.start_step, own.end_step] for own in found.ramps]
    if ramps:
        header = ["metric", "split", "before", "after", "from step", "to step"]
        table = Table("Steady growth, which makes no window", header, ramps)
        parts.append(Part("Steady growth", tables=[table], folded=True))
    return parts


def order_chart(window: WindowEntry, bands: Sequence[Band] = ()) -> Timeline:
    """Draws when the metrics of a window moved: from onset to completion, the earliest midpoint first."""
    moved = [own for own in window.order if own.midpoint is not None]
    shown = sorted(moved, key=lambda own: own.midpoint)[:_MOST_ROWS]
    more = f" The first {_MOST_ROWS} of {len(moved)}." if len(moved) > _MOST_ROWS else ""
    return Timeline(
        name=f"order_{window.center_step}",
        title=f"What moved when, around step {window.center_step}",
        caption="Onset to completion, with a dot at the midpoint; all are interpolated between checkpoints, none is "
        f"known better than the checkpoints it lies between.{more}",
        spans=[
            Span(f"{own.metric} ({own.split})", own.onset, own.midpoint, own.completion, f"{own.direction}s")
            for own in shown
        ],
        bands=[band for band in bands if band.start <= window.center_step <= band.end],
    )


def _triggers(window: WindowEntry) -> Table:
    rows = [
        [own.metric, own.split, f"{own.size:+.3f}", own.step, f"{own.score:.1f}", own.repeats]
        for own in window.triggers[:_MOST_TRIGGERS]
    ]
    title = f"The {len(rows)} strongest of {len(window.triggers)} level shifts that make the window"
    return Table(title, ["metric", "split", "shift", "at step", "score", "repeats"], rows)


def _changes(changes: Sequence) -> str:
    parts = []
    for own in changes[:5]:
        split, (before, after) = max(own.splits.items(), key=lambda item: abs(item[1][1] - item[1][0]))
        parts.append(f"{own.component} {before:.2f} to {after:.2f} ({split})")
    return "; ".join(parts) + (f" and {len(changes) - 5} more" if len(changes) > 5 else "")


def _ends(interval: tuple[int | None, int | None] | None) -> str | None:
    return None if interval is None else " to ".join("beyond" if end is None else str(end) for end in interval)
