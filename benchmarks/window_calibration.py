"""Measures how often birth windows are wrong, by the shipped search on simulated runs whose truth is known.

    python -m benchmarks.window_calibration
    python -m benchmarks.window_calibration --tables=power,drift

Rows of tables that are not measured stay in the result as they are, unless they were measured with other settings.

A run has the metrics of a small model: every behavioural measure that is a trigger, 12 heads, 3 MLPs, rank order and
residual drift, on 4 splits. Every value is a level, plus the mean of sequences that keep their own difficulty over
checkpoints and err anew at each (clustered, paired event noise), plus a wobble of training that is autocorrelated. Both
noises are partly shared between metrics. Sizes are in standard deviations of one checkpoint's total noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from benchmarks.reporting import machine, result_path, write_result
from kvjax.config.files import find_config, read_config
from kvjax.config.windows import WindowConfig
from kvjax.measure import registry
from kvjax.measure.uncertainty import resample_counts
from kvjax.model.components import Component, all_components
from kvjax.windows.score_runs import RunFinding, find_in_runs
from kvjax.windows.trajectories import Metric, Trajectories

SPLITS = ("validation_iid", "heldout_pairs", "structural_ood", "counterfactual")
# Fields of rows that windows watch on every split.
BEHAVIOUR = tuple(
    field.name for measure, field in registry.triggers() if measure.level == "read" and "split" not in field.where
)
LAYERS, HEADS = 3, 4
SEQUENCES = 96  # per split

# A metric's noise is its expected wobble times exp of a normal with this standard deviation: between measures, and
# between the splits of one.
MEASURE_SPREAD, SPLIT_SPREAD = 0.4, 0.2
# Shares of a noise's variance that metrics have in common: all of a run, and the splits of one measure.
SHARED_BY_ALL, SHARED_BY_SPLITS = 0.2, 0.4
# What copies another measure altogether: without layer 0's MLP nothing is answered, and the competitor stays the same.
COPIES = {f"mlp_accuracy_drop.{Component(0)}": "answer_accuracy", "fixed_margin": "w"}

# Steps as many trainers save them while a run is young.
LOG_STEPS = np.array([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000])

_RUNS_PER_BATCH = 20


@dataclasses.dataclass(frozen=True)
class Noise:
    """The noise of a simulated run.

    Attributes:
      autocorrelation: of the wobble, from checkpoint to checkpoint.
      wobble_share: of the noise's variance; event noise is the rest.
      scale: noise over what the config expects.
    """

    autocorrelation: float
    wobble_share: float
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Truth:
    """The events of a simulated run.

    Attributes:
      kind: flat, drift, shift, two shifts, or spike. A spike that lasts as long as a shift must hold is two shifts.
      size: of it, in noise standard deviations (a drift's over the whole run).
      measures: number of behavioural measures that change.
      splits: number of splits they change on.
      missing: share of the run's checkpoints that were not saved, so that steps are uneven.
      length: of a spike, in checkpoints.
      spaced: whether the run has every 250th step or `LOG_STEPS`.
      even_in: a drift grows evenly in steps, or in their logarithm.
    """

    kind: str
    size: float = 0.0
    measures: int = 2
    splits: int = 4
    missing: float = 0.0
    length: int = 1
    spaced: Literal["evenly", "log"] = "evenly"
    even_in: Literal["steps", "log steps"] = "steps"


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


def metrics() -> tuple[Metric, ...]:
    """Lists the metrics of a simulated run."""
    listed = []
    for split in SPLITS:
        for measure in BEHAVIOUR:
            heldout = measure == "answer_accuracy" and split == "heldout_pairs"
            name = "heldout_answer_accuracy" if heldout else measure
            listed.append(Metric(name, name, split))
        for component in all_components(LAYERS, HEADS):
            kind = "mlp_accuracy_drop" if component.is_mlp else "head_accuracy_drop"
            listed.append(Metric(kind, f"{kind}.{component}", split, component.layer, component.head))
        listed.append(Metric("head_rank_correlation", "head_rank_correlation", split))
        for stage in ("post_attn", "post_mlp"):
            listed.append(Metric("residual_drift", f"residual_drift.{stage}", split))
    return tuple(listed)


def simulate(
    rng: np.random.Generator, checkpoints: int, noise: Noise, truth: Truth, config: WindowConfig
) -> tuple[Trajectories, list[int]]:
    """Simulates one run, with the gaps at which something truly happened."""
    listed = metrics()
    expected = np.array([getattr(config.triggers, metric.kind).expected_wobble for metric in listed])
    _, family = np.unique([metric.measure for metric in listed], return_inverse=True)
    spread = MEASURE_SPREAD * rng.standard_normal(family.max() + 1)[family]
    total = noise.scale * expected * np.exp(spread + SPLIT_SPREAD * rng.standard_normal(len(listed)))
    steps = np.arange(1, checkpoints + 1) * 250
    if truth.missing:
        full = round(checkpoints / (1 - truth.missing))
        steps = np.sort(rng.choice(np.arange(1, full + 1), checkpoints, replace=False)) * 250
    if truth.spaced == "log":
        steps = LOG_STEPS[:checkpoints]
    # Those measures move whose shifts can open a window.
    opening = [name for name in BEHAVIOUR if name not in COPIES and getattr(config.triggers, name).opens_window]
    level, gaps = _levels(rng, steps, listed, total, truth, opening, hold=config.side_checkpoints)
    common = _autocorrelated(rng, checkpoints, 1, noise.autocorrelation)
    shared = _autocorrelated(rng, checkpoints, family.max() + 1, noise.autocorrelation)[:, family]
    own = _autocorrelated(rng, checkpoints, len(listed), noise.autocorrelation)
    wobble = np.sqrt(SHARED_BY_ALL) * common + np.sqrt(SHARED_BY_SPLITS) * shared
    wobble = wobble + np.sqrt(1 - SHARED_BY_ALL - SHARED_BY_SPLITS) * own
    level = level + np.sqrt(noise.wobble_share) * total * wobble
    values, samples = np.empty(level.shape), np.empty((config.resamples, *level.shape), np.float32)
    event = np.sqrt((1 - noise.wobble_share) * SEQUENCES) * total
    for split in SPLITS:
        columns = [i for i, metric in enumerate(listed) if metric.split == split]
        counts = resample_counts(np.zeros(SEQUENCES), resamples=config.resamples, seed=int(rng.integers(2**31)))
        own_difficulty = 3 * rng.standard_normal((SEQUENCES, 1, len(columns)))
        errors = np.sqrt(SHARED_BY_ALL) * rng.standard_normal((SEQUENCES, checkpoints, 1))
        errors = errors + np.sqrt(1 - SHARED_BY_ALL) * rng.standard_normal((SEQUENCES, checkpoints, len(columns)))
        sequences = (own_difficulty + errors) * event[columns]
        values[:, columns] = level[:, columns] + sequences.mean(axis=0)
        drawn = (counts / SEQUENCES) @ sequences.reshape(SEQUENCES, -1)
        samples[:, :, columns] = level[:, columns] + drawn.reshape(len(counts), checkpoints, -1)
    place = {(metric.measure.removeprefix("heldout_"), metric.split): i for i, metric in enumerate(listed)}
    for split in SPLITS:
        for copy, original in COPIES.items():
            to, of = place[copy, split], place[original, split]
            values[:, to], samples[:, :, to] = values[:, of], samples[:, :, of]
    return Trajectories(steps, listed, values, samples), gaps


def _levels(
    rng: np.random.Generator,
    steps: np.ndarray,
    listed: Sequence[Metric],
    total: np.ndarray,
    truth: Truth,
    opening: Sequence[str],
    *,
    hold: int,
) -> tuple[np.ndarray, list[int]]:
    """Draws the noiseless trajectories and the gaps of true shifts, three checkpoints or more from the ends."""
    n = len(steps)
    level = np.zeros((n, len(listed)))
    if truth.kind == "flat":
        return level, []
    chosen = rng.choice(opening, truth.measures, replace=False)
    splits = rng.choice(SPLITS, truth.splits, replace=False)
    moved = [
        i
        for i, metric in enumerate(listed)
        if metric.measure.removeprefix("heldout_") in chosen and metric.split in splits
    ]
    size = truth.size * total[moved]
    if truth.kind == "drift":
        # The logarithm of step 0 is taken for that of half a step.
        at = steps if truth.even_in == "steps" else np.log(np.maximum(steps, 0.5))
        level[:, moved] = ((at - at[0]) / (at[-1] - at[0]))[:, None] * size
        return level, []
    if truth.kind == "spike":
        # Of one checkpoint anywhere; a longer one comes and goes inside the run.
        begin = int(rng.integers(n) if truth.length == 1 else rng.integers(1, n - truth.length))
        level[begin : begin + truth.length, moved] = size
        return level, [begin - 1, begin + truth.length - 1] if truth.length >= hold else []
    places = [int(rng.integers(2, n - 3))]
    if truth.kind == "two shifts":
        places = [int(rng.integers(2, n // 2 - 1)), int(rng.integers(n // 2 + 2, n - 3))]
    for place in places:
        level[place + 1 :, moved] += size
    return level, places


def _autocorrelated(rng: np.random.Generator, n: int, width: int, autocorrelation: float) -> np.ndarray:
    wobble = rng.standard_normal((n, width))
    for c in range(1, n):
        wobble[c] = autocorrelation * wobble[c - 1] + np.sqrt(1 - autocorrelation**2) * wobble[c]
    return wobble


def measure(
    checkpoints: int, noise: Noise, truth: Truth, config: WindowConfig, *, runs: int, seed: int
) -> dict[str, Any]:
    """Counts simulated runs with windows, and true shifts that a window is centred on within a checkpoint."""
    rng = np.random.default_rng(seed)
    with_windows = shifts = found = extra = ramps = 0
    for start in range(0, runs, _RUNS_PER_BATCH):
        batch = [simulate(rng, checkpoints, noise, truth, config) for _ in range(min(_RUNS_PER_BATCH, runs - start))]
        for finding, (_, gaps) in zip(find_in_runs([run for run, _ in batch], config), batch, strict=True):
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
            what += f", {row['length']} checkpoints long" if row["kind"] == "spike" else ""
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
