"""What commands print of a sweep."""

from __future__ import annotations

from typing import Any

_SHOWN_ROWS = 24


def print_sweep_report(report: Any) -> None:
    """Prints a run's table, what was skipped and noted, and where the results are."""
    config, rows = report.run.config, report.rows
    if not rows:
        return
    print(f"\n{config.run_name} (seed {config.seed})")
    print("   step  accuracy  held-out    margin      r   loss  heads by accuracy drop")
    hidden = len(rows) - _SHOWN_ROWS
    for row in rows if hidden <= 0 else rows[: _SHOWN_ROWS // 2] + rows[-_SHOWN_ROWS // 2 :]:
        heads = "  ".join(f"L{h['layer']}H{h['head']} {h['value']:.3f}" for h in row["top_heads_by_ablation"][:3])
        print(
            f"{row['step']:>7} {_cell(row['answer_accuracy'], '9.3f')} {_cell(row['heldout_answer_accuracy'], '9.3f')} "
            f"{_cell(row['answer_margin'], '9.2f')} {_cell(row['r'], '6.3f')} {_cell(row['loss'], '6.3f')}  {heads}"
        )
    if hidden > 0:
        print(f"  ({hidden} checkpoints between are in the table)")
    for file, reason in report.log.refused.items():
        print(f"skipped {file}: {reason}")
    for note in report.notes:
        print(f"note: {note}")
    log = report.log
    print(f"{len(log.measured)} measured, {len(log.reused)} reused, {len(log.refused)} skipped.")
    print(f"Results in {report.run.analysis}: rows in checkpoint_metrics.jsonl, arrays in checkpoint_metrics.nc.")


def _cell(value: float | None, form: str) -> str:
    return format(value, form) if value is not None else "-".rjust(int(form.partition(".")[0]))


def print_windows_report(report: Any, *, show: int) -> None:
    """Prints a run's verdict and windows, each with its first `show` triggers, metrics in order and components."""
    document = report.document
    print(f"\n{document['run_name']} (seed {report.run.config.seed}): {document['verdict']} ({document['reason']})")
    for window in document["windows"]:
        inside = ", ".join(map(str, window["steps"]))
        ends = f"from {window['start_step']} to {window['end_step']}"
        print(f"  window around step {window['center_step']}: {ends} ({inside})")
        print(f"    {len(window['triggers'])} triggers, the strongest:")
        for trigger in window["triggers"][:show]:
            shift = f"{trigger['size']:+.3f} at {trigger['step']}, score {trigger['score']:.1f}"
            print(f"      {trigger['metric']:<30} {trigger['split']:<16} {shift}")
        print("    order of metrics (step of onset, midpoint with 95 % interval, completion):")
        for moved in window["order"][:show]:
            ends = moved["interval"] or (None, None)
            interval = f"[{_cell(ends[0], '.0f')}, {_cell(ends[1], '.0f')}]"
            onset, midpoint, completion = (_cell(moved[name], "7.0f") for name in ("onset", "midpoint", "completion"))
            print(f"      {moved['metric']:<30} {moved['split']:<16} {onset} {midpoint} {interval:<14} {completion}")
        if len(window["order"]) > show:
            print(f"      and {len(window['order']) - show} more in the file")
        print("    accuracy an ablation costs, before, inside and after:")
        for part in window["components"][:show]:
            name = f"L{part['layer']} MLP" if part["head"] is None else f"L{part['layer']}H{part['head']}"
            costs = "  ".join(f"{part[f'importance_{when}']:.3f}" for when in ("before", "inside", "after"))
            first = part["first_step_above_null"]
            print(f"      {name:<30} {costs}  {f'above the null from {first}' if first is not None else ''}".rstrip())
    births = [f"{name} {_birth(entry)}" for name, entry in document["births"].items()]
    if births:
        print(f"  births: {'; '.join(births)}")
    for note in report.notes:
        print(f"  note: {note}")
    print(f"  Results in {report.run.analysis / 'birth_windows.json'}")


def _birth(entry: dict[str, Any]) -> str:
    parts = []
    if entry["step"] is not None:
        parts.append(f"at {entry['step']}")
    elif entry["censored"]:
        parts.append("not yet")
    if entry["half_rise_step"] is not None:
        parts.append(f"half-rise at {entry['half_rise_step']}")
    return ", ".join(parts) or "-"


def print_readiness(state: Any, *, reasons: bool) -> None:
    """Prints which conditions for circuit work a run meets, and the next command."""
    config = state.run.config
    print(f"\n{config.run_name} (seed {config.seed}), {state.run.path}")
    for condition in state.conditions:
        mark = "yes" if condition.holds else "no "
        print(f"  {mark}  {condition.name}{f': {condition.reason}' if reasons else ''}")
    if state.ready:
        print("  Next: circuit work in the windows of analysis/birth_windows.json")
    elif state.next_command is not None:
        print(f"  Next: {state.next_command}")
    else:
        print("  Next: nothing to run; see the reason above")
