"""Writes the counts of kills to `benchmarks/results/` and to the table in `docs/reliability.md`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.reporting import machine, write_result

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
_BEGIN, _END = "<!-- counts of benchmarks/kill.py -->\n", "<!-- end of the kills -->\n"


def record(counts: dict[str, dict[str, Any]], *, seed: int, seconds: float) -> None:
    """Writes the result file and the table.

    Args:
      counts: command -> fields of its `Count`.
      seed: of the moments.
      seconds: how long it took.
    """
    what = {"what": "commands killed at random moments", "machine": machine(), "seed": seed, "seconds": round(seconds)}
    result = what | {"commands": counts}
    print(write_result("kill", result))
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(_BEGIN)
    DOCUMENT.write_text(before + _BEGIN + table(result) + _END + rest.split(_END)[1], encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """Writes the counts as a table of Markdown, with the command and the date."""
    lines = [
        "",
        f"`python -m benchmarks.kill --record`, seed {result['seed']}, {result['machine']['date']}, "
        f"{result['seconds'] / 60:.0f} minutes on {result['machine']['cores']} cores.",
        "",
        "| command | kills | trials that ended by themselves | largest relative difference | defects |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, count in result["commands"].items():
        apart = f"{count['largest']:.0e}" if count["largest"] else "0"
        lines.append(f"| `{name}` | {count['kills']} | {count['trials']} | {apart} | {len(count['defects'])} |")
    return "\n".join([*lines, "", ""])
