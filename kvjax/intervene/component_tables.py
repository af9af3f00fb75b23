"""Writes recovery by component and step as tables to read and to load, and the comparison with ablations."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr

from kvjax.artifacts.files import replace_file, write_json
from kvjax.artifacts.identity import sealed
from kvjax.artifacts.recovery_tables import component_recoveries
from kvjax.artifacts.results import RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.tables import SCHEMA_VERSION
from kvjax.errors import InputError, note
from kvjax.intervene.importance import compare_importance
from kvjax.intervene.inputs import number, numbers
from kvjax.intervene.metrics import METRICS
from kvjax.intervene.summary_text import REASONS, interval

RUNS = ("clean", "corrupted")

_COLUMNS = (
    *("metric", "pair_kind", "component", "step", "recovery", "low", "high", "clean_answer_accuracy"),
    *("clean_run_metric", "corrupted_run_metric", "clean_run_accuracy", "corrupted_run_accuracy", "clean_run_fails"),
)


def write_component_tables(run: RunDir, metric: str) -> None:
    """Writes what patching recovered by component, and the comparison with ablations if there is a sweep.

    Args:
      run: whose activation patching is read, of all windows. Nothing is written if there is none.
      metric: of the table to read and of the comparison; the table to load has all.
    """
    results, layout = RunResults(run), run.layout
    tables = {name: component_recoveries(results, metric=name) for name in METRICS}
    if tables[metric] is None:
        return
    rows = [row for name, table in tables.items() if table is not None for row in _rows(table, name)]
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    written = {".csv": text.getvalue(), ".md": _markdown(tables[metric], metric, run.config.run_name)}
    for suffix, content in written.items():
        with replace_file(layout.component_recovery.with_suffix(suffix)) as partial:
            partial.write_text(content, encoding="utf-8")
    try:
        comparison = compare_importance(results, metric)
    except InputError as error:
        note(f"ablations are not compared with recoveries: {error}")
        layout.importance.unlink(missing_ok=True)
        return
    document = {"schema_version": SCHEMA_VERSION, "run_name": run.config.run_name} | comparison
    write_json(layout.importance, sealed(document))


def _rows(table: xr.Dataset, metric: str) -> Iterator[dict[str, Any]]:
    order = ("pair_kind", "component", "step")
    recovery = table["recovery"].transpose(*order, "statistic").values
    estimates = table.sel(statistic="estimate")
    right = estimates["clean_answer_accuracy"].transpose(*order).values
    values = estimates["metric_of_runs"].transpose("run", "pair_kind", "step")
    shares = estimates["answer_accuracy_of_runs"].transpose("run", "answer", "pair_kind", "step")
    fails = table["clean_run_fails"].transpose("pair_kind", "step", "failure").values.astype(bool)
    names = [table[dim].values.tolist() for dim in order]
    for k, p, c in np.ndindex(*map(len, names)):
        labels = {dim: of[i] for dim, of, i in zip(order, names, (k, p, c), strict=True)}
        found = numbers(recovery[k, p, c])
        yield {
            "metric": metric,
            **labels,
            "recovery": found["estimate"],
            "low": found["low"],
            "high": found["high"],
            "clean_answer_accuracy": number(right[k, p, c]),
            **{f"{run}_run_metric": number(values.sel(run=run).values[k, c]) for run in RUNS},
            **{f"{run}_run_accuracy": number(shares.sel(run=run, answer=run).values[k, c]) for run in RUNS},
            "clean_run_fails": " ".join(table["failure"].values[fails[k, c]]),
        }


def _failures(at: xr.Dataset) -> list[str]:
    return at["failure"].values[at["clean_run_fails"].values.astype(bool)].tolist()


def _markdown(table: xr.Dataset, metric: str, run_name: str) -> str:
    steps, name = table["step"].values.tolist(), metric.replace("_", " ")
    lines = [
        f"# What carries the answer in {run_name}, component by component",
        "",
        "Each component's output in the corrupted run is replaced by its output in the clean run, at all positions.",
        f"The table shows which share of the {name} comes back: 1 is everything, 0 nothing, with 95 % intervals.",
        "Above it stand the two runs without patching: how often each gives its own stream's answer, and the metric.",
        "If the clean run fails, a recovery would be one of nothing: none is shown (component_recovery.csv has them).",
    ]
    for kind in table["pair_kind"].values.tolist():
        lines += ["", f"## {kind}", "", _row("", steps), _row("---", ["---:"] * len(steps))]
        by_step = [table.sel(pair_kind=kind, step=step) for step in steps]
        for run in RUNS:
            right = [interval(numbers(at["answer_accuracy_of_runs"].sel(run=run, answer=run).values)) for at in by_step]
            values = [interval(numbers(at["metric_of_runs"].sel(run=run).values)) for at in by_step]
            lines += [_row(f"{run} run: its answers", right), _row(f"{run} run: {name}", values)]
        failing = ["; ".join(REASONS[reason] for reason in _failures(at)) for at in by_step]
        if any(failing):
            lines.append(_row("fails", failing))
        for component in table["component"].values.tolist():
            cells = [
                "fails" if fails else interval(numbers(at["recovery"].sel(component=component).values))
                for at, fails in zip(by_step, failing, strict=True)
            ]
            lines.append(_row(component, cells))
    return "\n".join([*lines, ""])


def _row(first: str, cells: list[Any]) -> str:
    return f"| {' | '.join([first, *(str(cell).strip() for cell in cells)])} |"
