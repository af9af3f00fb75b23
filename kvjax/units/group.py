"""Processes that share work: process 0 hands out tasks and collects results, the others do what they are given.

Each has one connection to process 0. A process that dies closes it, and a machine that is lost falls silent. Either
ends the others in one line, within a minute. Results lie in files, so that a later call goes on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence

from kvjax.errors import unusable
from kvjax.units.follower import Follower
from kvjax.units.leader import Leader
from kvjax.units.membership import Membership

_LOOPBACK = "127.0.0.1"


@contextlib.contextmanager
def joined(membership: Membership) -> Iterator[Leader | Follower | None]:
    """Joins the group that this process was started in; None if it is alone.

    Raises:
      InputError: the processes do not find each other.
    """
    if membership.count == 1:
        yield None
    elif membership.index:
        with _closing(Follower(membership)) as follower:
            yield follower
    else:
        with _closing(Leader(membership, _listen_at(membership))) as leader:
            yield leader


@contextlib.contextmanager
def started(count: int, command: Sequence[str]) -> Iterator[Leader]:
    """Starts processes on this machine, and leads them.

    Args:
      count: of the processes, this one included.
      command: starts one that joins the group which its environment names.

    Raises:
      InputError: a process does not start.
    """
    listening = socket.create_server((_LOOPBACK, 0), backlog=count)
    membership = Membership(0, count, *listening.getsockname())
    others = [
        # In groups of their own, so that Ctrl-C reaches this process alone, which then ends them.
        subprocess.Popen(command, env=os.environ | environment, stdin=subprocess.DEVNULL, process_group=0)
        for environment in map(membership.environment, range(1, count))
    ]
    try:
        with _closing(Leader(membership, listening, others)) as leader:
            yield leader
    finally:
        for process in others:
            if process.poll() is None:
                process.kill()
                process.wait()


@contextlib.contextmanager
def _closing(member: Leader | Follower) -> Iterator[Leader | Follower]:
    """Ends the group however the block ends."""
    status = 2
    try:
        yield member
        status = 0
    except KeyboardInterrupt:
        status = 130
        raise
    finally:
        member.close(status)


def _listen_at(membership: Membership) -> socket.socket:
    """Opens the port of process 0: on the loopback if the others are there as well, else on every network."""
    try:
        if membership.host in (_LOOPBACK, "localhost"):
            return socket.create_server((_LOOPBACK, membership.port), backlog=membership.count)
        if socket.has_dualstack_ipv6():
            address = ("", membership.port)
            return socket.create_server(address, family=socket.AF_INET6, dualstack_ipv6=True, backlog=membership.count)
        return socket.create_server(("", membership.port), backlog=membership.count)
    except OSError as error:
        found = "that another process listens there" if error.errno == errno.EADDRINUSE else error.strerror
        expected = "a free port for processes to meet at (JAX_COORDINATOR_PORT names another)"
        raise unusable(membership.address, expected, found) from None
