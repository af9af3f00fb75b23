"""Read `metrics.jsonl`, the log that training appends to: interrupted writes and resumed runs leave traces in it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvjax.errors import InputError, note, unusable

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class LoggedRow:
    """A row of the log.

    Attributes:
      values: its document.
      line: its bytes without the line's end, to be written again as they are.
      number: of its line, from 1.
    """

    values: Mapping[str, Any]
    line: bytes
    number: int

    @property
    def step(self) -> int | None:
        """Its step; None if it has none that is a whole number."""
        return whole_number(self.values.get("step"))

    @property
    def phase(self) -> Any:
        """What the row is about: `train`, `eval`, `resume`, …"""
        return self.values.get("phase")


@dataclasses.dataclass(frozen=True)
class TrainingLog:
    """The rows that count, in order. A row `resume` takes back all earlier rows of later steps.

    Attributes:
      path: of `metrics.jsonl`.
      rows: the rows that no resume took back, `resume` rows included.
      torn: number of the last line if it is unfinished and was ignored.
    """

    path: Path
    rows: tuple[LoggedRow, ...] = ()
    torn: int | None = None

    @classmethod
    def read(cls, path: Path) -> TrainingLog:
        """Reads a log; it is empty if there is no such file.

        An unfinished last line is ignored: an interrupted write leaves one, and so does one that goes on.

        Raises:
          InputError: the file cannot be read, or another line is no JSON object.
        """
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return cls(path)
        except OSError as error:
            raise unusable(path, "a JSON-lines file", error) from None
        *lines, last = content.removeprefix(_BYTE_ORDER_MARK).split(b"\n")
        rows: list[LoggedRow] = []
        torn = None
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            _append(rows, LoggedRow(_parsed(line, f"{path}:{number}"), line.rstrip(b"\r"), number))
        if last.strip(b"\0"):  # some file systems fill up with zeros what they had no time to write
            number = len(lines) + 1
            try:
                _append(rows, LoggedRow(_parsed(last, path), last, number))
            except InputError:
                torn = number
        return cls(path, tuple(rows), torn)

    @property
    def planned_steps(self) -> int | None:
        """The last step that the latest resume planned; None without a resume that says it."""
        resumes = [row for row in self.rows if row.phase == "resume"]
        return whole_number(resumes[-1].values.get("num_steps")) if resumes else None

    def note_torn_line(self) -> None:
        """Notes that a line was ignored, for those to whom it may matter what it said."""
        if self.torn is not None:
            note(f"{self.path}: line {self.torn}, the last, is cut off and was ignored")

    def evaluations(self) -> list[Mapping[str, Any]]:
        """Selects the evaluations; of several of one split and step, the last: its checkpoint replaced the others."""
        self.note_torn_line()
        latest = {(str(row.values.get("split")), row.step): row for row in self.rows if row.phase == "eval"}
        return [row.values for row in latest.values()]

    def evaluations_of(self, step: int) -> Sequence[Mapping[str, Any]]:
        """Selects the evaluations of a step, in order."""
        return self._evaluations_by_step.get(step, ())

    @functools.cached_property
    def _evaluations_by_step(self) -> Mapping[Any, Sequence[Mapping[str, Any]]]:
        by_step: dict[Any, list[Mapping[str, Any]]] = {}
        for row in self.evaluations():
            by_step.setdefault(row.get("step"), []).append(row)
        return by_step


def whole_number(value: object) -> int | None:
    """Converts a number without a fraction to an integer; None if a value is none."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _append(rows: list[LoggedRow], row: LoggedRow) -> None:
    if row.phase == "resume" and row.step is not None:
        rows[:] = [earlier for earlier in rows if earlier.step is None or earlier.step <= row.step]
    rows.append(row)


def _parsed(line: bytes, where: str | Path) -> Mapping[str, Any]:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise unusable(where, "a JSON object", error) from None
    if not isinstance(document, dict):
        raise unusable(where, "a JSON object", type(document).__name__)
    return document
