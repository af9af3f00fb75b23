"""Writes files in a thread of its own, in order, while training goes on."""

from __future__ import annotations

import collections
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Self

from kvjax.converters.torch_checkpoint import use_one_torch_thread


class BackgroundWriter:
    """Does jobs one after another in a thread. As a context, it ends when all are done.

    After a job that failed no other is begun. Its error is raised in the thread that gives jobs: by `submit` or
    `check`, whichever comes next, or at the end of the context.

    Args:
      pending: how many jobs, which hold what they write, may be unfinished; another one waits.
    """

    def __init__(self, pending: int):
        self._pool = concurrent.futures.ThreadPoolExecutor(1, initializer=use_one_torch_thread)
        self._pending = pending
        self._jobs: collections.deque[concurrent.futures.Future[None]] = collections.deque()
        self._failed = threading.Event()

    def submit(self, job: Callable[[], None]) -> None:
        """Takes a job; waits while as many are pending as may be.

        Raises:
          InputError: an earlier job could not write its file.
        """
        self.check()
        while len(self._jobs) >= self._pending:
            self._jobs.popleft().result()
        self._jobs.append(self._pool.submit(self._do, job))

    def check(self) -> None:
        """Raises the error of a job that failed, if one did."""
        while self._jobs and self._jobs[0].done():
            self._jobs.popleft().result()

    def _do(self, job: Callable[[], None]) -> None:
        if self._failed.is_set():
            return
        try:
            job()
        except BaseException:
            self._failed.set()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for the jobs, also after an interruption: what they hold is whole."""
        self._pool.shutdown(wait=True)
        if kind is None:
            self.check()
