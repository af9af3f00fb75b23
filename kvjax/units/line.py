"""A connection between two processes of a group: JSON documents both ways, and signs of life in between.

Nothing that arrives is run or unpickled: whoever reaches the port can send no code.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import Any

SECONDS_OF_SILENCE = 45.0
_SECONDS_BETWEEN_SIGNS = 5.0
_LONGEST = 64 << 20  # bytes of a document
_SIGN = {"alive": True}

Document = dict[str, Any]


class LostError(Exception):
    """The process at the other end is gone; the message says how that was found."""


class Line:
    """Sends documents to one other process, and receives its documents. Several threads may send at once.

    Args:
      connection: a connected socket, which belongs to the line from now on.
      seconds_of_silence: after which the other end counts as gone; None for `SECONDS_OF_SILENCE`.
    """

    def __init__(self, connection: socket.socket, *, seconds_of_silence: float | None = None):
        self._socket = connection
        connection.settimeout(SECONDS_OF_SILENCE if seconds_of_silence is None else seconds_of_silence)
        self._incoming = connection.makefile("rb")
        self._sending, self._closed = threading.Lock(), threading.Event()

    def send(self, document: Document) -> None:
        """Sends a document; if the other end is gone, whoever receives finds out."""
        content = json.dumps(document).encode() + b"\n"
        with self._sending, contextlib.suppress(OSError):
            self._socket.sendall(content)

    def receive(self) -> Document:
        """Waits for the next document.

        Raises:
          LostError: the other end is gone, silent, or sends something else.
        """
        while True:
            try:
                content = self._incoming.readline(_LONGEST)
            except TimeoutError:
                raise LostError(f"no sign of it for {self._socket.gettimeout():.0f} s") from None
            except (OSError, ValueError) as error:  # a closed file is a ValueError
                raise LostError(f"that it ended ({getattr(error, 'strerror', None) or error})") from None
            if not content:
                raise LostError("that it ended")
            try:
                document = json.loads(content)
            except (ValueError, RecursionError):
                document = None
            if not isinstance(document, dict):
                raise LostError("something else than kvjax there")
            if document != _SIGN:
                return document

    def expect_life(self) -> None:
        """Takes the other end for gone after `SECONDS_OF_SILENCE` from now on."""
        self._socket.settimeout(SECONDS_OF_SILENCE)

    def show_life(self) -> None:
        """Sends signs of life from now on, in a thread."""

        def signs() -> None:
            while not self._closed.wait(_SECONDS_BETWEEN_SIGNS):
                self.send(_SIGN)

        threading.Thread(target=signs, daemon=True).start()

    def close(self) -> None:
        """Ends the connection: the other end finds that this process ended."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
