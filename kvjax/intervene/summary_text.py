"""Pieces of the lines that summarise an intervention, as all kinds write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

SHOWN_STEPS = 4  # columns of a printed table
SHOWN_COMPONENTS = 6  # rows of each kind of pair
WORTH_A_ROW = 0.1  # recovery at one of these steps

REASONS = {
    "not_above_chance": "clean run at chance",
    "no_gap": "no gap between the runs",
}


def cell(value: float | None, form: str) -> str:
    """Formats a number, or a dash of the same width if there is none."""
    return format(value, form) if value is not None else "-".rjust(int(form.partition(".")[0] or 1))


def interval(numbers: Mapping[str, float | None]) -> str:
    """Formats an estimate with its 95 % interval: `0.51 [0.41, 0.61]`."""
    return f"{cell(numbers['estimate'], '6.2f')} [{cell(numbers['low'], '.2f')}, {cell(numbers['high'], '.2f')}]"


def center_step(document: Mapping[str, Any]) -> int:
    """Finds the step that a summary is printed for: the window's center, or the last of the named steps."""
    return document["window"].get("center_step", document["steps"][-1])


def shown_steps(document: Mapping[str, Any]) -> list[int]:
    """Chooses the steps of a printed table: all if they are few, else the ends, the center and some between."""
    steps = document["steps"]
    if len(steps) <= SHOWN_STEPS:
        return list(steps)
    chosen = {0, len(steps) - 1, steps.index(center_step(document))}
    for index in (len(steps) // 2, len(steps) // 4, 3 * len(steps) // 4):
        if len(chosen) < SHOWN_STEPS:
            chosen.add(index)
    return [steps[index] for index in sorted(chosen)]


def failure(document: Mapping[str, Any], pair_kind: str, step: int) -> str | None:
    """Says why a recovery of a kind of pair would be one of nothing; None if it would not."""
    for row in document["clean_run_fails"]:
        if (row["pair_kind"], row["step"]) == (pair_kind, step):
            return "; ".join(REASONS[reason] for reason in row["reasons"])
    return None


def run_lines(document: Mapping[str, Any], steps: Sequence[int]) -> list[str]:
    """Writes what the clean and the corrupted run answer without intervention, by kind of pair and step."""
    lines = [
        f"without intervention: share of affected reads answered right (chance {document['chance']:.3f}), and mean "
        f"{document['metric'].replace('_', ' ')}",
        f"{'pairs':<6} {'step':>6}  " + " ".join(f"{run} run".ljust(27) for run in document["baseline"]).rstrip(),
    ]
    for kind in document["pairs"]["counts"]:
        for step in steps:
            runs = []
            for run, by_kind in document["baseline"].items():
                found = by_kind[kind][str(step)]
                right = found[f"{run}_answer_accuracy"]
                runs.append(f"{interval(right)}  {cell(found['metric']['estimate'], '6.2f')}")
            fails = failure(document, kind, step)
            mark = f"  FAILS: {fails}" if fails else ""
            lines.append(f"{kind if step == steps[0] else '':<6} {step:>6} {' '.join(runs)}{mark}")
    return lines


def component_lines(document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> list[str]:
    """Writes a table by component and step for each kind of pair, of components that recover something.

    Args:
      document: the summary.
      rows: from `pair_tables.component_table`.
      steps: of the columns.
    """
    lines = []
    for kind in document["pairs"]["counts"]:
        counted = [step for step in steps if failure(document, kind, step) is None]
        lines.append(f"{kind:<8}" + "".join(f"{step:>20}" for step in steps))

        def largest(row: Mapping[str, Any], counted: Sequence[int] = tuple(counted)) -> float:
            found = [row["by_step"][str(step)]["estimate"] for step in counted]
            return max((x for x in found if x is not None), default=0.0)

        own = sorted((row for row in rows if row["pair_kind"] == kind), key=lambda row: -largest(row))
        for row in [row for row in own if largest(row) >= WORTH_A_ROW][:SHOWN_COMPONENTS]:
            cells = [interval(row["by_step"][str(step)]) if step in counted else "fails" for step in steps]
            lines.append(f"  {row['component']:<6}" + "".join(f"{text:>20}" for text in cells))
        if not counted:
            lines.append("  the clean run fails at each of these steps: nothing to recover")
        elif largest(own[0]) < WORTH_A_ROW:
            lines.append(f"  no component recovers {WORTH_A_ROW}")
    return lines


def largest_by_pair_kind(
    document: Mapping[str, Any], effects: Sequence[Mapping[str, Any]], name: Callable[[Mapping[str, Any]], str]
) -> list[str]:
    """Writes a line per kind of pair: the three largest recoveries at the center, denoising."""
    lines, step = [], center_step(document)
    for kind in document["pairs"]["counts"]:
        own = [e for e in effects if (e["pair_kind"], e["step"]) == (kind, step)]
        own = [e for e in own if e.get("direction", "denoising") == "denoising"][:3]
        fails = failure(document, kind, step)
        shown = "; ".join(f"{name(e)} {interval(e['recovery'])}" for e in own)
        lines.append(f"{kind:<6} {f'FAILS: {fails}' if fails else shown}")
    return lines


def comparison_lines(document: Mapping[str, Any], *, shown: int = 12) -> list[str]:
    """Writes the comparison of ablations with recoveries at its last step, and the rank correlations."""
    if not document["steps"]:
        return []
    step, at = list(document["steps"].items())[-1]
    ablations = list(at["components"][0]["accuracy_drop"])
    kinds = list(at["components"][0]["recovery"])
    rows = sorted(at["components"], key=lambda row: -_sort_key(row))
    lost, taken = "accuracy lost when ablated by", "recovered when taken from the clean run"
    lines = [
        f"what ablation costs beside what patching recovers, step {step} ({document['metric'].replace('_', ' ')}):",
        f"{'':<8} {lost.center(11 * len(ablations))}  {taken}",
        f"{'':<8} {''.join(name.rjust(11) for name in ablations)}  {''.join(kind.rjust(8) for kind in kinds)}",
    ]
    for row in rows[:shown]:
        drops = "".join(_cell(row["accuracy_drop"][name], 11, 3) for name in ablations)
        recovered = "".join(_cell(row["recovery"][kind], 8, 2) for kind in kinds)
        lines.append(f"{row['component']:<8} {drops}  {recovered}")
    if len(rows) > shown:
        lines.append(f"({len(rows) - shown} more components in the file)")
    if failing := [kind for kind in kinds if kind not in at["counted_pair_kinds"]]:
        lines.append(f"not counted, for the clean run fails there: {', '.join(failing)}")
    for of in ("heads", "all"):
        own = [r for r in at["rank_correlation"] if (r["of"], r["recovery"]) == (of, "largest")]
        if own:
            what = f"the {own[0]['components']} heads" if of == "heads" else f"all {own[0]['components']} components"
            lines.append(f"rank correlation of the drops with the largest recovery over kinds of pair, of {what}:")
            lines += [f"  {r['ablation']:<10} {interval(r['value'])}{_above_zero(r)}" for r in own]
    return lines


def _above_zero(row: Mapping[str, Any]) -> str:
    return f"  (above zero ablation's by {interval(row['above_zero']).strip()})" if "above_zero" in row else ""


def _sort_key(row: Mapping[str, Any]) -> float:
    found = row["largest_recovery"]
    return found["estimate"] if found and found["estimate"] is not None else float("-inf")


def _cell(found: Mapping[str, float | None], width: int, digits: int) -> str:
    value = found["estimate"]
    return ("-" if value is None else f"{value:.{digits}f}").rjust(width)
