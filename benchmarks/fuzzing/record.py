"""Writes the counts of a fuzzing run to `benchmarks/results/` and to the table in `docs/reliability.md`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.fuzzing.readers import READERS
from benchmarks.reporting import machine, result_path, write_result

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
_BEGIN, _END = "<!-- counts of benchmarks/fuzz.py -->\n", "<!-- end of the counts -->\n"
_HEADS = ("file", "read by", "inputs", "refused", "equal", "changed", "defects", "a changed value is")


def record(counts: dict[str, dict[str, int]], *, seed: int, seconds: float, limits: dict[str, float]) -> None:
    """Writes the result file and the table; readers that were not run keep what an earlier run of this seed recorded.

    Args:
      counts: reader -> kind of outcome -> number of inputs.
      seed: of the damage.
      seconds: how long it took.
      limits: of an input and of its process, by name.
    """
    described = machine()
    file = result_path("fuzz", described)
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if earlier.get("seed") != seed:
        earlier = {}
    readers = {name: of for name, of in earlier.get("readers", {}).items() if name in READERS} | counts
    dates = {name: earlier["dates"].get(name) for name in readers if earlier} | dict.fromkeys(counts, described["date"])
    result = {
        "what": "damaged inputs of every reader",
        "machine": described,
        "seed": seed,
        "seconds": round(seconds) + (earlier.get("seconds", 0) if readers.keys() - counts.keys() else 0),
        "limits": limits,
        "inputs": sum(sum(of_reader.values()) for of_reader in readers.values()),
        "readers": dict(sorted(readers.items())),
        "dates": dict(sorted(dates.items())),
    }
    print(write_result("fuzz", result))
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(_BEGIN)
    DOCUMENT.write_text(before + _BEGIN + table(result) + _END + rest.split(_END)[1], encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """Writes the counts as a table of Markdown, with the command, the date and the versions."""
    versions = ", ".join(f"{name} {version}" for name, version in result["machine"]["versions"].items())
    dates = sorted(set(result["dates"].values()))
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    lines = [
        "",
        f"`python -m benchmarks.fuzz --record`, seed {result['seed']}, {when}, "
        f"{result['seconds'] / 60:.0f} minutes on {result['machine']['cores']} cores. {versions}.",
        "",
        _row(_HEADS),
        _row(["---"] * len(_HEADS)),
    ]
    totals = dict.fromkeys(("inputs", "refused", "equal", "changed", "defects"), 0)
    for name, of_reader in result["readers"].items():
        good = {kind: of_reader.get(kind, 0) for kind in ("refused", "equal", "changed")}
        inputs = sum(of_reader.values())
        numbers = {"inputs": inputs, **good, "defects": inputs - sum(good.values())}
        totals = {column: totals[column] + number for column, number in numbers.items()}
        reader = READERS[name]
        lines.append(_row([name, reader.what, *(f"{number:,}" for number in numbers.values()), reader.changed]))
    lines.append(_row(["**all**", "", *(f"**{number:,}**" for number in totals.values()), ""]))
    return "\n".join([*lines, "", ""])


def _row(cells: Any) -> str:
    return "| " + " | ".join(re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in cells) + " |"
