"""Tries inputs in forked processes that limits guard, so that a hang or a crash is a result and not the end.

The parent must not have started threads: a forked child would inherit their locks. It imports what the readers need,
so that a child starts in milliseconds.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import resource
import selectors
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

_RESERVED = 8 << 30
_BATCH = 250  # inputs per child: few enough that nothing piles up, many enough that forking does not count


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one input.

    Attributes:
      reader: the reader's name.
      index: the input's number, from which it can be made again.
      kind: how it ended, such as "refused".
      detail: the message or the place, for defects.
    """

    reader: str
    index: int
    kind: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class _Limits:
    """Bytes of address space that a child may have, and of resident memory that it may gain."""

    address_space: int
    resident: int


# From a reader's name, the input's number and the lane's number to the kind of outcome and its detail.
Trial = Callable[[str, int, int], tuple[str, str]]


def try_inputs(
    trial: Trial, counts: dict[str, int], *, lanes: int, seconds: float, memory_bytes: int, first: int = 0
) -> Iterator[Outcome]:
    """Tries the inputs `first`, … of each reader and yields their outcomes as they come.

    Args:
      trial: tries one input, in the child.
      counts: reader -> number of inputs.
      lanes: how many children run at once.
      seconds: wall-clock limit of one input. An input that exceeds it is tried once more, alone in its child.
      memory_bytes: how much resident memory a child may gain. Address space is limited to more, since threads reserve
        much that they never touch.
      first: number of the first input.
    """
    work = collections.deque(
        (reader, range(start, min(start + _BATCH, first + count)), False)
        for reader, count in counts.items()
        for start in range(first, first + count, _BATCH)
    )
    limits = _Limits(_address_space() + memory_bytes + _RESERVED, memory_bytes)
    running: dict[int, _Child] = {}
    with selectors.DefaultSelector() as selector:
        try:
            while work or running:
                for lane in range(lanes):
                    if lane not in running and work:
                        running[lane] = _Child(trial, lane, *work.popleft(), limits)
                        selector.register(running[lane].pipe, selectors.EVENT_READ, lane)
                ready = {key.data for key, _ in selector.select(timeout=0.2)}
                for lane, child in list(running.items()):
                    if lane in ready:
                        child.read()
                        yield from child.take()
                    late = time.monotonic() - child.heard > seconds
                    if child.ended or late:
                        selector.unregister(child.pipe)
                        status = child.stop()
                        yield from child.take()
                        del running[lane]
                        if child.left:
                            first_left, others = child.left[:1], child.left[1:]
                            if late and not child.retried:
                                work.appendleft((child.reader, first_left, True))
                            elif late or status:
                                kind = "hang" if late else "killed"
                                detail = f"over {seconds:g} s" if late else _why(status)
                                yield Outcome(child.reader, first_left[0], kind, detail)
                            else:  # it left on purpose, after an outcome that may have spoilt it
                                others = child.left
                            if others:
                                work.append((child.reader, others, False))
        finally:
            for child in running.values():
                child.stop()


class _Child:
    """A forked process and the inputs it has not answered for yet."""

    def __init__(self, trial: Trial, lane: int, reader: str, inputs: range, retried: bool, limits: _Limits):
        self.reader, self.left, self.retried = reader, inputs, retried
        self.heard, self.ended = time.monotonic(), False
        self._lines: list[bytes] = []
        self._rest = b""
        self.pipe, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # JAX warns of forks after its threads have started; they have not
            self._pid = os.fork()
        if not self._pid:
            os.close(self.pipe)
            _serve(trial, lane, reader, inputs, limits, write)
        os.close(write)

    def read(self) -> None:
        """Reads what the child has answered since."""
        content = os.read(self.pipe, 1 << 16)
        self.ended = not content
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + content).split(b"\n")
        self._lines += lines

    def take(self) -> Iterator[Outcome]:
        """Yields the outcomes that were read."""
        lines, self._lines = self._lines, []
        for line in lines:
            index, kind, detail = json.loads(line)
            self.left = self.left[1:]
            yield Outcome(self.reader, index, kind, detail)

    def stop(self) -> int:
        """Ends the child if it still runs; returns its wait status, 0 if it left by itself."""
        with contextlib.suppress(ProcessLookupError):
            if not self.ended:
                os.kill(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        while not self.ended:
            self.read()
        os.close(self.pipe)
        return status


def _serve(trial: Trial, lane: int, reader: str, inputs: Sequence[int], limits: _Limits, write: int) -> None:
    """Tries inputs in the child and never returns."""
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limits.address_space, limits.address_space))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        before = _peak()
        for index in inputs:
            kind, detail = trial(reader, index, lane)
            if (gained := _peak() - before) > limits.resident:
                kind, detail = "memory", f"{gained / 1e6:.0f} MB more"
            os.write(write, json.dumps([index, kind, detail[:500]]).encode() + b"\n")
            if kind == "memory":
                break
        os._exit(0)
    finally:
        os._exit(1)


def _peak() -> int:
    """Reads the most memory that this process has had resident, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _why(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
