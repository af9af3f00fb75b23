"""What commands print of sweeps, windows and interventions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvjax.artifacts.layout import arrays_beside
from kvjax.errors import visible
from kvjax.model.components import Component

if TYPE_CHECKING:
    from kvjax.intervene.analysis import InterventionReport
    from kvjax.sweeps.results import SweepReport
    from kvjax.windows.run import WindowsReport

_SHOWN_ROWS = 24


def say(text: str) -> None:
    """Prints a text at once; control characters in it are made visible, for some of it may come from files."""
    print("\n".join(visible(line) for line in text.split("\n")), flush=True)


def print_sweep_reports(reports: Sequence[SweepReport]) -> None:
    """Prints each run's table."""
    for report in reports:
        print_sweep_report(report)


def print_sweep_report(report: SweepReport) -> None:
    """Prints a run's table, what was skipped and noted, and where the results are."""
    config, rows = report.run.config, report.rows
    if not rows:
        return
    say(f"\n{config.run_name} (seed {config.seed})")
    say("   step  accuracy  held-out    margin      r   loss  heads by accuracy drop")
    hidden = len(rows) - _SHOWN_ROWS
    for row in rows if hidden <= 0 else rows[: _SHOWN_ROWS // 2] + rows[-_SHOWN_ROWS // 2 :]:
        top = row["top_heads_by_ablation"][:3]
        heads = "  ".join(f"{Component(head['layer'], head['head'])} {head['value']:.3f}" for head in top)
        say(
            f"{row['step']:>7} {_cell(row['answer_accuracy'], '9.3f')} {_cell(row['heldout_answer_accuracy'], '9.3f')} "
            f"{_cell(row['answer_margin'], '9.2f')} {_cell(row['r'], '6.3f')} {_cell(row['loss'], '6.3f')}  {heads}"
        )
    if hidden > 0:
        say(f"  ({hidden} checkpoints between are in the table)")
    for file, reason in report.log.refused.items():
        say(f"skipped {file}: {reason}")
    for note in report.notes:
        say(f"note: {note}")
    log, layout = report.log, report.run.layout
    say(f"{len(log.measured)} measured, {len(log.reused)} reused, {len(log.refused)} skipped.")
    say(f"Results in {layout.analysis}: rows in {layout.rows.name}, arrays in {layout.arrays.name}.")


def _cell(value: float | None, form: str) -> str:
    return format(value, form) if value is not None else "-".rjust(int(form.partition(".")[0] or 1))


def print_windows_reports(reports: Sequence[WindowsReport], *, show: int) -> None:
    """Prints each run's verdict and windows."""
    for report in reports:
        print_windows_report(report, show=show)


def print_windows_report(report: WindowsReport, *, show: int) -> None:
    """Prints a run's verdict and windows, each with its first `show` triggers, metrics in order and components."""
    document = report.document
    say(f"\n{document['run_name']} (seed {report.run.config.seed}): {document['verdict']} ({document['reason']})")
    for window in document["windows"]:
        inside = ", ".join(map(str, window["steps"]))
        ends = f"from {window['start_step']} to {window['end_step']}"
        say(f"  window around step {window['center_step']}: {ends} ({inside})")
        say(f"    {len(window['triggers'])} triggers, the strongest:")
        for trigger in window["triggers"][:show]:
            shift = f"{trigger['size']:+.3f} at {trigger['step']}, score {trigger['score']:.1f}"
            say(f"      {trigger['metric']:<30} {trigger['split']:<16} {shift}")
        say("    order of metrics (step of onset, midpoint with 95 % interval, completion):")
        for moved in window["order"][:show]:
            ends = moved["interval"] or (None, None)
            interval = f"[{_cell(ends[0], '.0f')}, {_cell(ends[1], '.0f')}]"
            onset, midpoint, completion = (_cell(moved[name], "7.0f") for name in ("onset", "midpoint", "completion"))
            say(f"      {moved['metric']:<30} {moved['split']:<16} {onset} {midpoint} {interval:<14} {completion}")
        if len(window["order"]) > show:
            say(f"      and {len(window['order']) - show} more in the file")
        say("    accuracy an ablation costs, before, inside and after:")
        for part in window["components"][:show]:
            costs = "  ".join(f"{part[f'importance_{when}']:.3f}" for when in ("before", "inside", "after"))
            first = part["first_step_above_null"]
            name = str(Component(part["layer"], part["head"]))
            say(f"      {name:<30} {costs}  {f'above the null from {first}' if first is not None else ''}".rstrip())
    births = [f"{name} {_birth(entry)}" for name, entry in document["births"].items()]
    if births:
        say(f"  births: {'; '.join(births)}")
    for note in report.notes:
        say(f"  note: {note}")
    say(f"  Results in {report.run.layout.birth_windows}")


def _birth(entry: dict[str, Any]) -> str:
    parts = []
    if entry["step"] is not None:
        parts.append(f"at {entry['step']}")
    elif entry["censored"]:
        parts.append("not yet")
    if entry["half_rise_step"] is not None:
        parts.append(f"half-rise at {entry['half_rise_step']}")
    return ", ".join(parts) or "-"


def print_intervention_reports(reports: Sequence[InterventionReport]) -> None:
    """Prints the largest effects of each study."""
    for report in reports:
        print_intervention_report(report)


def print_intervention_report(report: InterventionReport) -> None:
    """Prints the largest effects of one kind of intervention in one window, and where every number is."""
    document = report.document
    say(
        f"\n{document['run_name']}, {report.window}, {report.kind.replace('_', ' ')} (steps {_list(document['steps'])})"
    )
    for line in _INTERVENTION_LINES[report.kind](document):
        say(f"  {line}")
    if report.reused:
        say("  measured before (--overwrite measures again)")
    say(f"  {report.path}, every number in {arrays_beside(report.path).name}")


def _list(steps: list[int]) -> str:
    return ", ".join(map(str, steps if len(steps) <= 8 else [*steps[:4], "…", *steps[-3:]]))


def _interval(numbers: dict[str, float | None]) -> str:
    return f"{_cell(numbers['estimate'], '6.2f')} [{_cell(numbers['low'], '.2f')}, {_cell(numbers['high'], '.2f')}]"


def _center(document: dict[str, Any]) -> int:
    return document["window"].get("center_step", document["steps"][-1])


def _best_by_kind(document: dict[str, Any], effects: list[dict[str, Any]], name: Any) -> list[str]:
    """Formats a line per kind of pair: the three largest recoveries at the center, denoising."""
    lines = []
    for kind in document["pairs"]["counts"]:
        own = [e for e in effects if (e["pair_kind"], e["step"]) == (kind, _center(document))]
        own = [e for e in own if e.get("direction", "denoising") == "denoising"][:3]
        shown = "; ".join(f"{name(e)} {_interval(e['recovery'])}" for e in own) or "no gap between the runs to recover"
        lines.append(f"{kind:<6} {shown}")
    return lines


def _patching_lines(document: dict[str, Any]) -> list[str]:
    effects = document["effects"]
    return [
        f"recovery at step {_center(document)} when taken from the clean run, the largest by kind of pair:",
        *_best_by_kind(document, effects["components"], lambda e: e["place"]),
        "and stage by stage, from which positions most is recovered:",
        *_holder_lines(document, effects["stages"]),
    ]


def _holder_lines(document: dict[str, Any], stages: list[dict[str, Any]]) -> list[str]:
    lines = []
    for kind in document["pairs"]["counts"]:
        own = [e for e in stages if (e["pair_kind"], e["step"]) == (kind, _center(document))]
        own = [e for e in own if e["direction"] == "denoising"]
        held: dict[str, list[str]] = {}
        for e in own:
            stage = e["place"].replace("layer_", "L").replace("_post_", ".post_")
            held.setdefault(e["position_role"], []).append(f"{stage} {_cell(e['recovery']['estimate'], '.2f')}")
        shown = "; ".join(f"{role}: {', '.join(parts)}" for role, parts in held.items())
        lines.append(f"{kind:<6} {shown or 'no gap between the runs to recover'}")
    return lines


def _path_lines(document: dict[str, Any]) -> list[str]:
    first = f"recovery at step {_center(document)} along one direct path, the largest by kind of pair:"
    return [first, *_best_by_kind(document, document["effects"]["paths"], lambda e: e["path"])]


def _necessity_lines(document: dict[str, Any]) -> list[str]:
    lines = ["faithfulness and completeness of the smallest faithful set, or the one named, under mean ablation:"]
    for effect in document["effects"]:
        if effect["step"] == _center(document):
            kept, left = effect["faithfulness_of_named_set"], effect["completeness_of_named_set"]
            shown = f"{_interval(kept)}, {_interval(left)}  {' '.join(effect['named_set'])}"
            lines.append(f"{effect['pair_kind']:<6} {shown}")
    return lines


def _across_lines(document: dict[str, Any]) -> list[str]:
    first, last = document["steps"][0], document["steps"][-1]
    lines = [f"answer accuracy of {first} run on with the states of {last}, and of {last} with those of {first}:"]
    for effect in document["effects"]:
        if (effect["step"], effect["states_of"]) == (first, last):
            back = next(
                e
                for e in document["effects"]
                if (e["step"], e["states_of"], e["stage"]) == (last, first, effect["stage"])
            )
            kind = next(iter(document["pairs"]["counts"]))
            there, here = effect[kind]["answer_accuracy"]["estimate"], back[kind]["answer_accuracy"]["estimate"]
            lines.append(f"{effect['stage']:<20} {_cell(there, '6.3f')} {_cell(here, '6.3f')}")
    return lines


def _subspace_lines(document: dict[str, Any]) -> list[str]:
    lines = ["share of the clean run's lead lost, where probe and random subspace of one rank differ most:"]
    for e in document["effects"]:
        if e["step"] == _center(document) and e["loss"]["probe"] is not None:
            losses = ", ".join(f"{name} {_cell(value, '.2f')}" for name, value in e["loss"].items())
            where = f"rank {e['rank']:<2} of {e['stage']} at {e['position_role']}"
            lines.append(f"{e['pair_kind']:<6} {e['operation']:<9} {where}: {losses}")
    return lines


def _neuron_lines(document: dict[str, Any]) -> list[str]:
    lines = ["neurons whose ablation moves the margin most (margin drop, accuracy drop):"]
    own = [e for e in document["effects"] if e["step"] == _center(document)][:6]
    for e in own:
        drops = f"{_cell(e['margin_drop'], '7.3f')} {_cell(e['accuracy_drop'], '7.3f')}"
        lines.append(f"layer {e['layer']} neuron {e['neuron']:<4} {drops}")
    return lines


def _attribution_lines(document: dict[str, Any]) -> list[str]:
    lines = ["rank correlation of first-order scores with exact effects:"]
    for e in document["effects"]["rank_correlation_with_exact"]:
        if e["step"] == _center(document):
            lines.append(f"{e['of']:<6} {e['method']:<21} {e['pair_kind']:<6} {_cell(e['rank_correlation'], '5.2f')}")
    return lines


_INTERVENTION_LINES = {
    "activation_patching": _patching_lines,
    "path_patching": _path_lines,
    "necessity": _necessity_lines,
    "across_checkpoints": _across_lines,
    "subspaces": _subspace_lines,
    "neurons": _neuron_lines,
    "attribution": _attribution_lines,
}
