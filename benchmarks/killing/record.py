"""Writes the counts of kills to `benchmarks/results/` and to the table in `docs/reliability.md`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.killing.journal import Journal
from benchmarks.killing.victims import VICTIMS
from benchmarks.reporting import machine, write_result

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
_BEGIN, _END = "<!-- counts of benchmarks/kill.py -->\n", "<!-- end of the kills -->\n"


def record(journal: Journal, *, seed: int) -> None:
    """Writes the result file and the table.

    Args:
      journal: of the trials.
      seed: of their moments.
    """
    commands = {name: _counts(journal, name, seed) for name in VICTIMS if journal.of(name, seed)}
    result = {"what": "commands killed at random moments", "machine": machine(), "seed": seed, "commands": commands}
    print(write_result("kill", result))
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(_BEGIN)
    DOCUMENT.write_text(before + _BEGIN + table(result) + _END + rest.split(_END)[1], encoding="utf-8")


def _counts(journal: Journal, command: str, seed: int) -> dict[str, Any]:
    trials = journal.of(command, seed)
    kills = [kill for trial in trials for kill in trial.kills]
    at_operations = sum(kill.startswith("before") for kill in kills)
    return {
        "before_operations": at_operations,
        "at_times": len(kills) - at_operations,
        "trials": len(trials),
        "largest": max(trial.largest for trial in trials),
        "defects": [defect for trial in trials for defect in trial.defects],
        "seconds": round(sum(trial.seconds for trial in trials)),
        "dates": sorted({trial.date for trial in trials}),
    }


def table(result: dict[str, Any]) -> str:
    """Writes the counts as a table of Markdown, with the command and the dates."""
    commands = result["commands"]
    dates = sorted({date for counts in commands.values() for date in counts["dates"]})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    lines = [
        "",
        f"`python -m benchmarks.kill --record`, seed {result['seed']}, {when}, on {result['machine']['cores']} cores "
        "that other work shared.",
        "",
        "| command | kills before an operation | at a time | trials, each to its end | largest relative difference "
        "| defects |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, counts in commands.items():
        apart = f"{counts['largest']:.0e}" if counts["largest"] else "0"
        cells = (counts["before_operations"], counts["at_times"], counts["trials"], apart, len(counts["defects"]))
        lines.append(f"| `{name}` | {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", ""])
