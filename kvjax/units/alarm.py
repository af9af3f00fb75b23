"""What ends a process of a group if another dies: at its next checkpoint, or soon after wherever it is."""

from __future__ import annotations

import contextlib
import os
import sys
import threading

from kvjax.errors import InputError

SECONDS_TO_STOP = 12.0  # between two checkpoints a process looks whether it is to stop; compiling takes longer


class EndedError(InputError):
    """Process 0 has ended the group, and says itself why."""


class Alarm:
    """Remembers the first thing that goes wrong with a group, and ends this process if its work does not stop then."""

    def __init__(self) -> None:
        self._error: InputError | None = None
        self._setting, self._timer = threading.Lock(), None
        self.changed = threading.Condition()

    def set(self, error: InputError, *, status: int = 2) -> None:
        """Says that something is wrong; `check` raises it from now on."""
        with self._setting:
            if self._error is not None:
                return
            self._error = error
            self._timer = threading.Timer(SECONDS_TO_STOP, self._end, [error, status])
            self._timer.daemon = True
            self._timer.start()
        with self.changed:
            self.changed.notify_all()

    def check(self) -> None:
        """Raises what went wrong, if anything did."""
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Lets this process end by itself."""
        if self._timer is not None:
            self._timer.cancel()

    @staticmethod
    def _end(error: InputError, status: int) -> None:
        if not isinstance(error, EndedError):
            with contextlib.suppress(OSError, ValueError):
                print(f"\nkvjax: {error}", file=sys.stderr, flush=True)
        os._exit(status)  # what was written is whole, as after a kill
