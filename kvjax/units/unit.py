"""A unit of work, and an engine that runs several: here in turn, in `kvjax.units.cluster` on other machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Unit:
    """A call that needs no other unit, and that may be made again: it writes files whole, and reuses what is there.

    Attributes:
      name: what it does, for messages: `sweep`.
      subject: what it does that to, for messages: a run directory.
      function: a function at the top level of a module, which other processes find by its name.
      arguments, keywords: what it is called with; all of it can be pickled.
    """

    name: str
    subject: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Engine(Protocol):
    """Runs units of work.

    Attributes:
      spreads: whether units run beside each other, so that work is best divided into many.
    """

    spreads: bool

    def workers(self) -> int:
        """Counts the units that can run beside each other now; 0 if none can yet."""

    def run(self, units: Sequence[Unit], advance: Callable[[int], None]) -> list[Any]:
        """Runs units and returns their results, in the order of the units.

        Args:
          units: what to do.
          advance: called with the number of units done.

        Raises:
          InputError: a unit was refused. What others wrote stays.
        """


class InProcess:
    """Runs units one after another in this process."""

    spreads = False

    def workers(self) -> int:
        return 1

    def run(self, units: Sequence[Unit], advance: Callable[[int], None]) -> list[Any]:
        results = []
        for unit in units:
            results.append(unit.function(*unit.arguments, **unit.keywords))
            advance(1)
        return results


IN_PROCESS = InProcess()
