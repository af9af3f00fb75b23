"""What commands print of sweeps, windows and interventions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvjax.artifacts.files import read_json
from kvjax.artifacts.layout import arrays_beside
from kvjax.artifacts.recovery_tables import PATCHING
from kvjax.errors import short_name, visible
from kvjax.intervene.kinds import find_kind
from kvjax.intervene.summary_text import cell, comparison_lines
from kvjax.measure.declaration import Column
from kvjax.measure.registry import BIRTH_SPLIT, row_fields
from kvjax.model.components import Component
from kvjax.report.leaders import ablation_in_words, leaders_cell, leaders_heading, leaders_notes
from kvjax.report.shown_rows import rows_of_change

if TYPE_CHECKING:
    from kvjax.intervene.analysis import InterventionReport
    from kvjax.sweeps.results import SweepReport
    from kvjax.windows.run import WindowsReport

_SHOWN_ROWS = 24


def say(text: str) -> None:
    """Prints a line at once; control characters in it are made visible, for some of it may come from files.

    Empty lines come before it if the text starts with newlines.
    """
    line = text.lstrip("\n")
    print("\n" * (len(text) - len(line)) + visible(line), flush=True)


def print_sweep_reports(reports: Sequence[SweepReport]) -> None:
    """Prints each run's table."""
    for report in reports:
        print_sweep_report(report)


def print_sweep_report(report: SweepReport) -> None:
    """Prints a run's table, what was skipped and noted, and where the results are."""
    rows = report.rows
    if not rows:
        return
    say(f"\n{report.run.config.title}")
    columns = _printed_columns()
    headings = " ".join(column.heading.rjust(_width(column.form)) for column in columns.values())
    say(f"{'step':>7} {headings}  {leaders_heading(rows[0])}")
    shown = [rows[index] for index in rows_of_change(rows, most=_SHOWN_ROWS)]
    for row in shown:
        numbers = " ".join(cell(row[field], column.form) for field, column in columns.items())
        say(f"{row['step']:>7} {numbers}  {leaders_cell(row)}")
    if hidden := len(rows) - len(shown):
        say(f"  ({hidden} of {len(rows)} checkpoints, at which less changes, are left out; all are in the table)")
    for line in leaders_notes(shown):
        say(f"  {line}")
    for file, reason in report.log.refused.items():
        say(f"skipped {file}: {reason}")
    for note in report.notes:
        say(f"note: {note}")
    if report.vouched is not None and report.vouched.differs is None:
        say(str(report.vouched))
    log, layout = report.log, report.run.layout
    say(f"{len(log.measured)} measured, {len(log.reused)} reused, {len(log.refused)} skipped.")
    say(f"Results in {layout.analysis}: rows in {layout.rows.name}, arrays in {layout.arrays.name}.")


def _printed_columns() -> dict[str, Column]:
    """Collects the declared columns of a printed checkpoint by field of the row, the widest first."""
    declared = {field.name: field.column for _, field in row_fields("checkpoint") if field.column is not None}
    return dict(sorted(declared.items(), key=lambda item: -_width(item[1].form)))


def _width(form: str) -> int:
    return int(form.partition(".")[0])


def print_windows_report(report: WindowsReport, *, show: int) -> None:
    """Prints a run's verdict and windows, each with its first `show` triggers, metrics in order and components."""
    document = report.document
    say(f"\n{report.run.config.title}: {document['verdict']} ({document['reason']})")
    for window in document["windows"]:
        inside = ", ".join(map(str, window["steps"]))
        ends = f"from {window['start_step']} to {window['end_step']}"
        say(f"  window around step {window['center_step']}: {ends} ({inside})")
        say(f"    {len(window['triggers'])} triggers, the strongest:")
        for trigger in window["triggers"][:show]:
            shift = f"{trigger['size']:+.3f} at {trigger['step']}, score {trigger['score']:.1f}"
            repeats = f", repeats {trigger['repeats']}" if trigger["repeats"] else ""
            say(f"      {trigger['metric']:<30} {trigger['split']:<16} {shift}{repeats}")
        say("    order of metrics (onset, midpoint, completion; the midpoint was observed between):")
        for moved in window["order"][:show]:
            between = "-" if moved["interval"] is None else "{} and {}".format(*moved["interval"])
            moments = " ".join(cell(moved[name], "7.0f") for name in ("onset", "midpoint", "completion"))
            way = f"{moved['metric']} {'rises' if moved['direction'] == 'rise' else 'falls'}"
            say(f"      {way:<36} {moved['split']:<16} {moments}  {between}")
        if len(window["order"]) > show:
            say(f"      and {len(window['order']) - show} more in the file")
        for direction in ("rose", "fell"):
            if changes := window[direction]:
                more = f" and {len(changes) - show} more" if len(changes) > show else ""
                say(f"    importance {direction}: {'; '.join(map(_change, changes[:show]))}{more}")
        say(f"    accuracy that {ablation_in_words(document['ranked_by'])} ablation costs, before, inside and after:")
        for part in window["components"][:show]:
            costs = "  ".join(f"{part[f'importance_{when}']:.3f}" for when in ("before", "inside", "after"))
            first, before = part["first_step_above_null"], " or before" if part["left_censored"] else ""
            above = f"above the null from {first}{before}" if first is not None else ""
            name = str(Component(part["layer"], part["head"]))
            say(f"      {name:<30} {costs}  {above}".rstrip())
    if ramps := document["ramps"]:
        say("  steady growth, which makes no window:")
        for ramp in ramps[:show]:
            levels = f"{ramp['before']:.3f} to {ramp['after']:.3f} between {ramp['start_step']} and {ramp['end_step']}"
            say(f"      {ramp['metric']:<30} {ramp['split']:<16} {levels}")
        if len(ramps) > show:
            say(f"      and {len(ramps) - show} more in the file")
    births = [f"{name} {_birth(entry)}" for name, entry in document["births"].items()]
    if births:
        say(f"  births: {'; '.join(births)}")
    for note in report.notes:
        say(f"  note: {note}")
    say(f"  Results in {report.run.layout.birth_windows}")


def _change(entry: dict[str, Any]) -> str:
    """Writes how a component's importance changed: on the split of births if it did there, else where it did most."""
    splits = entry["splits"]
    largest = max(splits, key=lambda split: abs(splits[split][1] - splits[split][0]))
    split = BIRTH_SPLIT if BIRTH_SPLIT in splits else largest
    return "{} {:.3f} to {:.3f} ({})".format(entry["component"], *splits[split], split)


def _birth(entry: dict[str, Any]) -> str:
    parts = []
    if entry["step"] is not None:
        parts.append(f"at {entry['step']}{' or before' if entry['left_censored'] else ''}")
    elif entry["unconfirmed_step"] is not None:
        parts.append(f"from {entry['unconfirmed_step']} on, not yet confirmed")
    elif entry["censored"]:
        parts.append("not yet")
    if entry["half_rise_step"] is not None:
        parts.append(f"half-rise at {entry['half_rise_step']}{' so far' if entry['provisional'] else ''}")
    return ", ".join(parts) or "-"


def print_intervention_reports(reports: Sequence[InterventionReport]) -> None:
    """Prints the largest effects of each study, then for each run what ablations cost beside what patching recovers."""
    for report in reports:
        print_intervention_report(report)
    for run in {report.run.path: report.run for report in reports if report.kind == PATCHING}.values():
        layout = run.layout
        if layout.importance.is_file():
            say(f"\n{run.config.title}")
            for line in comparison_lines(read_json(layout.importance)):
                say(f"  {line}")
            say(f"  {layout.importance}; recovery by component in {layout.component_recovery.name} and .csv")


def print_intervention_report(report: InterventionReport) -> None:
    """Prints the largest effects of one kind of intervention in one window, and where every number is."""
    document = report.document
    say(
        f"\n{short_name(document['run_name'])}, {report.window}, {report.kind.replace('_', ' ')} "
        f"(steps {_list(document['steps'])})"
    )
    for line in find_kind(report.kind).summary_lines(document):
        say(f"  {line}")
    if report.reused:
        say("  measured before (--overwrite measures again)")
    say(f"  {report.path}, every number in {arrays_beside(report.path).name}")


def _list(steps: list[int]) -> str:
    return ", ".join(map(str, steps if len(steps) <= 8 else [*steps[:4], "…", *steps[-3:]]))
