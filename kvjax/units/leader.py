"""Process 0 of a group: divides machines among the processes, hands out tasks, and collects what comes of them."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

from kvjax.artifacts.code_hash import RUNNING
from kvjax.errors import InputError, bad_argument, note, one_line, unusable
from kvjax.units.alarm import SECONDS_TO_STOP, Alarm
from kvjax.units.line import Document, Line, LostError
from kvjax.units.membership import Membership
from kvjax.units.places import Surroundings, divide

Advance = Callable[[int], None]
Work = Callable[[Document, Advance], Document]

_SECONDS_TO_GREET = 10.0


@dataclasses.dataclass
class _Follower:
    """What process 0 knows of another process.

    Attributes:
      line: the connection to it.
      words: which process, for messages.
      lost: how it was found that it is gone; None if it is there.
    """

    line: Line
    words: str
    lost: str | None = None


class Leader:
    """Process 0 of a group: hands out tasks, does its own, and collects the results.

    Args:
      membership: which process this is.
      listening: the socket that the others connect to.
      started: the others, if this process started them.

    Raises:
      InputError: not all processes arrive, or one is no part of this group.
    """

    leads = True

    def __init__(
        self, membership: Membership, listening: socket.socket, started: Sequence[subprocess.Popen] = ()
    ) -> None:
        self._membership, self._started = membership, started
        self._alarm, self._followers = Alarm(), {}
        self._results: dict[int, Document | InputError] = {}
        self._notes: list[str] = []
        self._awaited: dict[int, int] = {}  # task -> process
        self._advance: Advance = lambda number: None
        surroundings = self._meet(listening)
        try:
            places = divide([surroundings[index] for index in range(membership.count)])
        except InputError as error:
            self._tell_all({"failed": str(error)})
            raise
        for index, follower in self._followers.items():
            follower.line.send({"place": dataclasses.asdict(places[index])})
            threading.Thread(target=self._listen, args=(index, follower), daemon=True).start()
        places[0].take()

    @property
    def count(self) -> int:
        """The number of processes, this one included."""
        return self._membership.count

    def run(self, tasks: Sequence[tuple[int, Document]], work: Work, advance: Advance) -> list[Document | InputError]:
        """Runs tasks, each on the process that it names; all are done, even if one is refused.

        Args:
          tasks: the process and the document that its work gets.
          work: does this process's own tasks.
          advance: called with how much of the work is done, by any process.

        Returns:
          Of each task in order its result, or the error that refused it.

        Raises:
          InputError: a process is gone.
        """
        self._results, self._notes = {}, []
        counting = threading.Lock()

        def counted(number: int) -> None:
            with counting:
                advance(number)

        def own(number: int) -> None:
            self._alarm.check()
            counted(number)

        self._advance = counted
        with self._alarm.changed:
            self._awaited = {number: process for number, (process, _) in enumerate(tasks) if process}
        for index, follower in self._followers.items():
            theirs = [[number, task] for number, (process, task) in enumerate(tasks) if process == index]
            if theirs and follower.lost:
                self._fail(index, follower.lost)
            elif theirs:
                follower.line.send({"tasks": theirs})
        for number, (process, task) in enumerate(tasks):
            if process == 0:
                try:
                    self._results[number] = work(task, own)
                except InputError as error:
                    self._alarm.check()  # what went wrong with the group comes first
                    self._results[number] = error
        with self._alarm.changed:
            self._alarm.changed.wait_for(lambda: not self._awaited or self._is_failing())
        self._alarm.check()
        for sentence in self._notes:
            note(sentence)
        return [self._results[number] for number in range(len(tasks))]

    def close(self, status: int) -> None:
        """Ends the other processes with an exit status, and waits for those that this one started."""
        self._alarm.cancel()
        self._awaited = {}
        self._tell_all({"end": status})
        deadline = time.monotonic() + (SECONDS_TO_STOP if status != 130 else 1.0)
        for process in self._started:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for follower in self._followers.values():
            follower.line.close()

    def _is_failing(self) -> bool:
        try:
            self._alarm.check()
        except InputError:
            return True
        return False

    def _tell_all(self, document: Document, but: int | None = None) -> None:
        for index, follower in self._followers.items():
            if index != but and follower.lost is None:
                follower.line.send(document)

    def _fail(self, index: int, found: str) -> None:
        words = self._followers[index].words
        error = unusable(words, "it to measure its share (call again: what was measured is reused)", found)
        self._tell_all({"failed": str(error)}, but=index)
        self._alarm.set(error)

    def _listen(self, index: int, follower: _Follower) -> None:
        """Takes what another process sends, until it is gone."""
        try:
            while True:
                self._take(index, follower.line.receive())
        except LostError as error:
            follower.lost = str(error)
            with self._alarm.changed:
                needed = index in self._awaited.values()
            if needed:
                self._fail(index, follower.lost)
        except Exception as error:  # a document of another form, or a progress bar that cannot be written
            self._fail(index, f"that what it sent could not be taken in ({type(error).__name__}: {one_line(error)})")
            follower.line.send({"failed": "process 0 could not take in what this one sent"})

    def _take(self, index: int, document: Document) -> None:
        if "advance" in document:
            self._advance(document["advance"])
            return
        if "failed" in document:
            self._fail(index, document["failed"])
            return
        self._notes += document["notes"]
        number = document["task"]
        if "refused" in document:
            self._results[number] = InputError(document["refused"], parameter=document["parameter"])
        else:
            self._results[number] = document["result"]
        with self._alarm.changed:
            self._awaited.pop(number, None)
            self._alarm.changed.notify_all()

    def _meet(self, listening: socket.socket) -> dict[int, Surroundings]:
        """Waits until all other processes are connected; returns the surroundings of all."""
        found = {0: Surroundings.here()}
        arrived: queue.SimpleQueue[tuple[Line, Document]] = queue.SimpleQueue()
        deadline = time.monotonic() + self._membership.seconds_to_meet
        with listening:
            listening.settimeout(0.1)
            while len(found) < self.count:
                with contextlib.suppress(TimeoutError):
                    connection, _ = listening.accept()
                    threading.Thread(target=_greet, args=(connection, arrived), daemon=True).start()
                while not arrived.empty():
                    self._admit(*arrived.get(), found)
                missing = ", ".join(str(index) for index in range(self.count) if index not in found)
                for number, process in enumerate(self._started, 1):
                    if number not in found and process.poll() is not None:
                        self._refuse_all(f"that process {number} ended with status {process.returncode} at its start")
                if missing and time.monotonic() > deadline:
                    self._refuse_all(
                        f"{len(found)} after {self._membership.seconds_to_meet:.0f} s (missing: {missing})"
                    )
        return found

    def _admit(self, line: Line, hello: Document, found: dict[int, Surroundings]) -> None:
        try:
            index, own = hello["index"], Surroundings.of_json(hello["surroundings"])
            words = f"process {index} of {self.count} ({hello['pid']} on {own.host})"
            alike = (hello["kvjax"], hello["count"]) == (RUNNING, self.count)
            fits = alike and 0 < index < self.count and index not in found
        except (KeyError, TypeError, ValueError):
            line.close()  # something that is no process of a group
            return
        if not fits:
            expected = f"each of the {self.count} processes of kvjax {RUNNING} once at {self._membership.address}"
            line.send({"failed": str(bad_argument("processes", expected, f"kvjax {hello['kvjax']}, {words}"))})
            line.close()
            return
        found[index] = own
        self._followers[index] = _Follower(line, words)
        line.show_life()

    def _refuse_all(self, found: str) -> None:
        error = bad_argument("processes", f"{self.count} processes at {self._membership.address}", found)
        self._tell_all({"failed": str(error)})
        raise error


def _greet(connection: socket.socket, arrived: queue.SimpleQueue[tuple[Line, Document]]) -> None:
    """Hears what a process that has connected says of itself; whatever says nothing is left."""
    line = Line(connection, seconds_of_silence=_SECONDS_TO_GREET)
    with contextlib.suppress(LostError):
        hello = line.receive()
        line.expect_life()
        arrived.put((line, hello))
