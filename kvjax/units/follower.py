"""Any process of a group but process 0: does the tasks that it gets."""

from __future__ import annotations

import dataclasses
import os
import queue
import socket
import threading
import time

from kvjax.artifacts.code_hash import RUNNING
from kvjax.errors import InputError, bad_argument, one_line, unusable
from kvjax.units.alarm import Alarm, EndedError
from kvjax.units.leader import Work
from kvjax.units.line import Document, Line, LostError
from kvjax.units.membership import Membership
from kvjax.units.places import Place, Surroundings
from kvjax.units.worker import notes_into

_SECONDS_TO_CONNECT = 10.0


class Follower:
    """Any other process of a group: does the tasks that it gets, until process 0 ends the group.

    Args:
      membership: which process this is.

    Raises:
      InputError: process 0 is not there, or does not take this process.
    """

    leads = False

    def __init__(self, membership: Membership):
        self._membership, self._alarm = membership, Alarm()
        self._line = _connect(membership)
        self._inbox: queue.SimpleQueue[Document | None] = queue.SimpleQueue()
        self._line.send(
            {
                "kvjax": RUNNING,
                "index": membership.index,
                "count": membership.count,
                "pid": os.getpid(),
                "surroundings": dataclasses.asdict(Surroundings.here()),
            }
        )
        self._line.show_life()
        threading.Thread(target=self._listen, daemon=True).start()
        Place.of_json(self._next()["place"]).take()

    def serve(self, work: Work) -> int:
        """Does tasks until process 0 ends the group; returns the exit status that it gives.

        Raises:
          InputError: process 0 is gone, or says that another process is.
        """
        try:
            while True:
                for number, task in self._next().get("tasks", ()):
                    self._line.send(self._done(number, task, work))
        except EndedError as ended:
            return int(str(ended))
        except BaseException as error:
            if not isinstance(error, InputError):
                self._line.send({"failed": f"{type(error).__name__}: {one_line(error)}"})
            raise
        finally:
            self._alarm.cancel()

    def close(self, status: int) -> None:
        """Ends the connection."""
        del status  # process 0 sees only that this one ended
        self._line.close()

    def _done(self, number: int, task: Document, work: Work) -> Document:
        def advance(count: int) -> None:
            self._alarm.check()
            self._line.send({"advance": count})

        notes: list[str] = []
        with notes_into(notes):
            try:
                outcome = {"result": work(task, advance)}
            except InputError as error:
                self._alarm.check()
                outcome = {"refused": str(error), "parameter": error.parameter}
        return {"task": number, "notes": notes, **outcome}

    def _next(self) -> Document:
        document = self._inbox.get()
        self._alarm.check()
        return document or {}

    def _listen(self) -> None:
        try:
            while True:
                document = self._line.receive()
                if "failed" in document:
                    self._alarm.set(InputError(document["failed"]))
                elif "end" in document:
                    self._alarm.set(EndedError(str(document["end"])), status=document["end"])
                self._inbox.put(document)
        except LostError as error:
            words = f"process 0 of {self._membership.count} ({self._membership.address})"
            expected = "it to work until the tables are drawn (call again: what was measured is reused)"
            self._alarm.set(unusable(words, expected, error))
            self._inbox.put(None)


def _connect(membership: Membership) -> Line:
    """Connects to process 0 as soon as it listens."""
    deadline = time.monotonic() + membership.seconds_to_meet
    while True:
        try:
            return Line(socket.create_connection((membership.host, membership.port), timeout=_SECONDS_TO_CONNECT))
        except OSError as error:
            if time.monotonic() > deadline:
                expected = (
                    f"process 0 of {membership.count} at {membership.address} within {membership.seconds_to_meet:.0f} s"
                )
                raise bad_argument("processes", expected, error.strerror or error) from None
            time.sleep(0.2)
