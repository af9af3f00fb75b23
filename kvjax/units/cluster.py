"""Runs units on a cluster, by Dask distributed: one unit at a time in each worker process."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import pickle
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvjax.artifacts.files import read_json
from kvjax.errors import bad_argument, first_refusal, note, one_line, unusable
from kvjax.units.unit import Unit
from kvjax.units.worker import Assignment, Outcome, run_assignment

if TYPE_CHECKING:
    from distributed import Client, Future

_SECONDS_TO_GREET = 3


class Cluster:
    """Runs units on the workers of a Dask scheduler; results lie in a file system that all of them share.

    Args:
      scheduler: its address, or the file that it wrote.
      compilation_cache: whether workers keep compiled programs.

    Raises:
      InputError: Dask is not installed, or the text names no scheduler.
    """

    spreads = True

    def __init__(self, scheduler: str, *, compilation_cache: bool = True):
        if importlib.util.find_spec("distributed") is None:
            raise bad_argument("scheduler", "Dask distributed (pip install 'kvjax[cluster]')", "no such package")
        self._address, self._compilation_cache = _address(scheduler), compilation_cache

    def workers(self) -> int:
        """Counts the workers that there are now.

        Raises:
          InputError: the scheduler is not there.
        """
        with _connected(self._address) as client:
            return _count_workers(client)

    def run(self, units: Sequence[Unit], advance: Callable[[int], None]) -> list[Any]:
        """Runs units on the workers, and returns their results in order; all run, even if one is refused.

        A unit whose worker dies runs again elsewhere, until as many have died with it as the scheduler allows.

        Raises:
          InputError: a unit was refused or failed, with the first one's message; or the scheduler is not there, or went
            away. What units wrote stays.
        """
        outcomes: dict[int, Outcome] = {}
        with _connected(self._address) as client:
            waiting = self._submit(client, units)
            if not _count_workers(client):
                note(f"{self._address}: no worker yet; the work waits for the first")
            for index, future in _as_they_end(client, waiting):
                outcomes[index] = self._outcome(future, units[index], done=f"{len(outcomes)} of {len(units)}")
                advance(1)
        ordered = [outcomes[index] for index in range(len(units))]
        for sentence in (sentence for outcome in ordered for sentence in outcome.notes):
            note(sentence)
        _check_all(units, ordered)
        return [outcome.result for outcome in ordered]

    def _submit(self, client: Client, units: Sequence[Unit]) -> dict[Future, int]:
        """Submits every unit; a scheduler gets bytes, and so needs nothing that a unit imports."""
        assignments = [Assignment(unit, os.getcwd(), self._compilation_cache) for unit in units]
        return {
            # A key of its own for each call: Dask takes equal keys, and equal pure calls, for one.
            client.submit(run_assignment, pickle.dumps(one), key=f"{one.unit.name}-{uuid.uuid4().hex}", pure=False): i
            for i, one in enumerate(assignments)
        }

    def _outcome(self, future: Future, unit: Unit, *, done: str) -> Outcome:
        from distributed import KilledWorker

        try:
            return future.result()
        except CancelledError:
            expected = f"a scheduler until the end ({done} units have ended; what they wrote is reused)"
            raise bad_argument("scheduler", expected, f"none at {self._address} any more") from None
        except KilledWorker as error:
            found = f"{error.allowed_failures + 1} workers that died, the last {error.last_worker.address}"
            expected = f"its {unit.name} to end (give workers more memory, or see their logs)"
            return Outcome(error=unusable(unit.subject, expected, found))
        except Exception as error:  # of Dask: a unit's own come as outcomes
            found = f"{type(error).__name__}: {one_line(error)}"
            return Outcome(error=unusable(unit.subject, f"workers that can run its {unit.name}", found))


def _count_workers(client: Client) -> int:
    return len(client.scheduler_info(n_workers=-1)["workers"])


def _check_all(units: Sequence[Unit], outcomes: Sequence[Outcome]) -> None:
    """Raises the first error of units, with the subjects of the others that have one."""
    failed = [(unit, outcome.error) for unit, outcome in zip(units, outcomes, strict=True) if outcome.error]
    if failed:
        raise first_refusal([(unit.subject, error) for unit, error in failed], len(units))


def _address(scheduler: str) -> str:
    """Finds the address of a scheduler in the file that it wrote, unless the text is an address itself."""
    expected = "an address such as tcp://host:8786, or the file that a scheduler wrote"
    if Path(scheduler).is_file():
        document = read_json(Path(scheduler))
        if not isinstance(document, dict) or not isinstance(document.get("address"), str):
            raise unusable(scheduler, "the file that a scheduler wrote, with an address", "none")
        return document["address"]
    host, colon, port = scheduler.rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise bad_argument("scheduler", expected, scheduler)
    return scheduler


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Client]:
    """Connects to a scheduler until the block ends; then what has not begun is cancelled.

    Raises:
      InputError: nothing answers there.
    """
    from distributed import Client

    with _quiet():
        try:
            asyncio.run(_greet(address))
            client = Client(address, set_as_default=False)
        except Exception as error:  # of any kind, for the address may be of anything
            found = one_line(error) or "something that does not greet as one (its dashboard has another port)"
            raise bad_argument("scheduler", f"a scheduler at {address}", found) from None
        try:
            yield client
        finally:
            with contextlib.suppress(OSError):  # it went away
                client.close()


async def _greet(address: str) -> None:
    """Connects once, for a client waits for ever on a server that does not greet, and leaves traces of what fails."""
    import dask
    from dask.utils import parse_timedelta
    from distributed.comm import connect
    from distributed.security import Security

    seconds = parse_timedelta(dask.config.get("distributed.comm.timeouts.connect"))
    connecting = connect(address, timeout=seconds, **Security().get_connection_args("client"))
    comm = await asyncio.wait_for(connecting, seconds + _SECONDS_TO_GREET)
    await comm.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Dask's log of lost connections off the terminal: a command says it in one line."""
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _as_they_end(client: Client, waiting: dict[Future, int]) -> Iterator[tuple[int, Future]]:
    """Yields each future when it ends; a result leaves its worker's memory as soon as the next is asked for."""
    from distributed import as_completed

    for future in as_completed(list(waiting), loop=client.loop):
        yield waiting.pop(future), future
