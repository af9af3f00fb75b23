"""Measures how often birth windows are wrong, by the shipped search on simulated runs whose truth is known.

    python -m benchmarks.window_calibration
    python -m benchmarks.window_calibration --tables=power,drift

Rows of tables that are not measured stay in the result as they are, unless they were measured with other settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.reporting import machine, result_path, write_result
from benchmarks.simulated_runs import LOG_STEPS, Noise, Truth, simulate
from kvjax.config.files import find_config, read_config
from kvjax.config.windows import WindowConfig
from kvjax.windows.find_in_run import RunFinding, find_in_run


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table: runs of so many checkpoints, with one noise and one truth."""

    table: str
    checkpoints: int
    noise: Noise
    truth: Truth

    def describes(self, measured: Mapping[str, Any]) -> bool:
        """Checks whether a row of a result was measured on such runs."""
        mine = {"table": self.table, "checkpoints": self.checkpoints}
        mine |= dataclasses.asdict(self.noise) | dataclasses.asdict(self.truth)
        return mine == {name: measured.get(name) for name in mine}


def measure(
    checkpoints: int, noise: Noise, truth: Truth, config: WindowConfig, *, runs: int, seed: int
) -> dict[str, Any]:
    """Counts simulated runs with windows, and true shifts that a window is centred on within a checkpoint."""
    rng = np.random.default_rng(seed)
    with_windows = shifts = found = extra = ramps = 0
    for _ in range(runs):
        run, gaps = simulate(rng, checkpoints, noise, truth, config)
        finding = find_in_run(run, config)
        centres = [window.gap for window in finding.windows]
        hits = [gap for gap in gaps if any(abs(centre - gap) <= 1 for centre in centres)]
        with_windows += bool(centres)
        shifts += len(gaps)
        found += len(hits)
        extra += len(_unexplained(finding, gaps)) > 0
        ramps += len(finding.ramps) > 0
    return {
        "checkpoints": checkpoints,
        **dataclasses.asdict(noise),
        **dataclasses.asdict(truth),
        "runs": runs,
        "runs_with_windows": with_windows,
        "true_shifts": shifts,
        "found": found,
        "runs_with_false_windows": extra,
        "runs_with_ramps": ramps,
    }


def _unexplained(finding: RunFinding, gaps: Sequence[int]) -> list[int]:
    return [w.gap for w in finding.windows if not any(abs(w.gap - gap) <= 1 for gap in gaps)]


LENGTHS = (6, 8, 16, 48)
NOISES = tuple(Noise(rho, share) for share in (0.3, 0.9) for rho in (0.0, 0.5, 0.8))
MIDDLING = Noise(0.5, 0.6)
DRIFTS = {"drift": "steps", "drift in log steps": "log steps"}  # tables


def plan() -> list[Row]:
    """Lists every row, the hardest first: what has been measured is written after every row."""
    rows: list[Row] = []
    for noise in reversed(NOISES):
        rows.extend(Row("flat", length, noise, Truth("flat")) for length in LENGTHS)
        rows.append(Row("log steps", len(LOG_STEPS), noise, Truth("flat", spaced="log")))
    rows.extend(Row("spike", 16, MIDDLING, Truth("spike", 20.0, length=length)) for length in (1, 2, 3, 4, 6))
    for kind, size in (("spike", 20.0), ("shift", 7.0)):
        rows.append(Row("log steps", len(LOG_STEPS), MIDDLING, Truth(kind, size, spaced="log")))
    for table, even_in in DRIFTS.items():
        of_size = {size: Truth("drift", size, even_in=even_in) for size in (5.0, 10.0, 20.0, 40.0)}
        for length in (4, 5, 6, 8, 16, 48):
            rows.extend(Row(table, length, MIDDLING, of_size[size]) for size in (5.0, 10.0, 40.0))
        log_spaced = [dataclasses.replace(truth, spaced="log") for truth in of_size.values()]
        rows.extend(Row(table, len(LOG_STEPS), MIDDLING, truth) for truth in log_spaced)
        rows.append(Row(table, 16, MIDDLING, dataclasses.replace(of_size[20.0], missing=0.5)))
    for noise in reversed(NOISES):
        rows.extend(Row("shift", length, noise, Truth("shift", 7.0)) for length in LENGTHS)
        rows.extend(Row("few checkpoints", length, noise, Truth("flat")) for length in (4, 5))
    rows.extend(Row("shift", length, MIDDLING, Truth("shift", 7.0)) for length in (6, 8))
    for scale in (0.5, 2.0):
        for length in (8, 48):
            other = dataclasses.replace(MIDDLING, scale=scale)
            rows.append(Row("noise unlike the expected", length, other, Truth("flat")))
            rows.append(Row("noise unlike the expected", length, other, Truth("shift", 7.0)))
    rows.extend(Row("spike", 16, MIDDLING, Truth("spike", size)) for size in (10.0, 40.0))
    rows.append(Row("spike", 6, MIDDLING, Truth("spike", 20.0)))
    rows.extend(Row("two shifts", length, MIDDLING, Truth("two shifts", 7.0)) for length in (12, 16, 48))
    for kind, size in (("flat", 0.0), ("shift", 7.0)):
        rows.append(Row("missing steps", 16, MIDDLING, Truth(kind, size, missing=0.5)))
    for measures, splits in ((1, 1), (1, 4), (2, 4), (6, 4)):
        for size in (3.0, 5.0, 7.0, 10.0, 15.0):
            rows.append(Row("power", 16, MIDDLING, Truth("shift", size, measures, splits)))
    return rows


def merged(
    rows: Sequence[Row], measured: Mapping[Row, dict[str, Any]], earlier: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Puts measured rows in the place of the same earlier ones, in the order of the plan.

    Args:
      rows: of the plan; earlier rows that are none of them are dropped.
      measured: rows measured now.
      earlier: rows of a result measured with the same settings.
    """
    kept = [(row, found) for row in rows for found in earlier if row.describes(found)]
    of_plan = dict(kept) | dict(measured)
    return [of_plan[row] for row in rows if row in of_plan]


def main() -> None:
    planned = plan()
    tables = list(dict.fromkeys(row.table for row in planned))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="default")
    parser.add_argument("--runs", type=int, default=200, help="simulated runs per row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tables", help=f"comma-separated names of tables, instead of all: {', '.join(tables)}")
    arguments = parser.parse_args()
    wanted = arguments.tables.split(",") if arguments.tables else tables
    if unknown := sorted(set(wanted) - set(tables)):
        parser.error(f"--tables: found {', '.join(unknown)}, expected some of {', '.join(tables)}")
    config = read_config(find_config(arguments.config, "windows"), WindowConfig)
    # Noise is estimated from resamples only by its standard deviation; 200 give it within 5 %.
    config = config.model_copy(update={"resamples": 200})
    described, settings = machine(), config.model_dump(mode="json")
    path = result_path("window_calibration", described)
    before = json.loads(path.read_text()) if path.exists() else {"config": None, "rows": []}
    earlier = before["rows"] if before["config"] == settings else []
    measured: dict[Row, dict[str, Any]] = {}
    for row in (row for row in planned if row.table in wanted):
        begun = time.perf_counter()
        # Of the row itself, so that its runs stay the same whatever other rows there are.
        seed = arguments.seed + zlib.crc32(repr(row).encode())
        found = measure(row.checkpoints, row.noise, row.truth, config, runs=arguments.runs, seed=seed)
        seconds = round(time.perf_counter() - begun, 1)
        measured[row] = {"table": row.table, **found, "date": described["date"], "seconds": seconds}
        of_shifts = f", {found['found']}/{found['true_shifts']} found" if found["true_shifts"] else ""
        print(
            f"{row.table:<26} {row.checkpoints:>3} checkpoints, wobble {row.noise.wobble_share:.1f} of the variance, "
            f"autocorrelation {row.noise.autocorrelation:.1f}, scale {row.noise.scale:g}: {row.truth.kind} "
            f"{row.truth.size:g} in {row.truth.measures}x{row.truth.splits}: "
            f"{found['runs_with_windows']}/{found['runs']} with windows, "
            f"{found['runs_with_false_windows']} false{of_shifts}",
            flush=True,
        )
        rows = merged(planned, measured, earlier)
        write_result("window_calibration", {"machine": described, "config": settings, "rows": rows})
    print(markdown(merged(planned, measured, earlier)))
    print("written to", path)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Formats the tables of docs/birth_windows.md."""

    lines = [
        "| checkpoints | wobble, share of variance | autocorrelation | flat runs with a window | shifts of 7 found |"
    ]
    lines.append("| --- | --- | --- | --- | --- |")
    key = ("checkpoints", "wobble_share", "autocorrelation")
    found = {tuple(row[k] for k in key): row for row in rows if row["table"] == "shift"}
    for row in rows:
        if row["table"] in ("flat", "few checkpoints"):
            same = found.get(tuple(row[k] for k in key))
            cells = [*(str(row[k]) for k in key), _share(row["runs_with_windows"], row["runs"])]
            lines.append(
                "| " + " | ".join([*cells, _share(same["found"], same["true_shifts"]) if same else "–"]) + " |"
            )
    lines += ["", "| | checkpoints | noise over expected | runs with a window | false | shifts found | with a ramp |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        if row["table"] not in ("flat", "few checkpoints", "shift", "power", *DRIFTS):
            what = f"{row['kind']} {row['size']:g}" if row["size"] else row["kind"]
            what += ", half the steps missing" if row["missing"] else ""
            what += f", {row['length']} checkpoint{'s' * (row['length'] > 1)} long" if row["kind"] == "spike" else ""
            if row["spaced"] == "log":
                what += (
                    f", log-spaced steps, wobble {row['wobble_share']:g}, autocorrelation {row['autocorrelation']:g}"
                )
            cells = [what, str(row["checkpoints"]), f"{row['scale']:g}", _share(row["runs_with_windows"], row["runs"])]
            cells += [_share(row["runs_with_false_windows"], row["runs"]), _share(row["found"], row["true_shifts"])]
            cells.append(_share(row["runs_with_ramps"], row["runs"]))
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *_by_size([row for row in rows if row["table"] in DRIFTS], _drift, "runs_with_windows", "runs")]
    lines += ["", *_by_size([row for row in rows if row["table"] == "power"], _moves, "found", "true_shifts")]
    return "\n".join(lines)


def _share(part: int, of: int) -> str:
    return f"{100 * part / of:.1f} %" if of else "–"


def _drift(row: Mapping[str, Any]) -> str:
    spaced = "log-spaced, " if row["spaced"] == "log" else "half the steps missing, " if row["missing"] else ""
    return f"{row['checkpoints']} checkpoints, {spaced}even in {row['even_in']}"


def _moves(row: Mapping[str, Any]) -> str:
    return f"measures: {row['measures']}, splits: {row['splits']}"


def _by_size(
    rows: Sequence[dict[str, Any]], named: Callable[[Mapping[str, Any]], str], part: str, of: str
) -> list[str]:
    """Formats rows that differ in size alone as one line, with a column for every size."""
    sizes = sorted({row["size"] for row in rows})
    lines = ["| | " + " | ".join(f"{size:g}" for size in sizes) + " |", "| --- " * (len(sizes) + 1) + "|"]
    lined: dict[str, dict[float, str]] = {}
    for row in rows:
        lined.setdefault(named(row), {})[row["size"]] = _share(row[part], row[of])
    lines += [
        f"| {name} | " + " | ".join(found.get(size, "") for size in sizes) + " |" for name, found in lined.items()
    ]
    return lines


if __name__ == "__main__":
    main()
