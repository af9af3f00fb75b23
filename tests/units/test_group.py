"""Processes that share work: results in order, one line for what goes wrong; here each is a thread of its own."""

from __future__ import annotations

import concurrent.futures
import contextlib
import socket
import threading
import time

import pytest

from kvjax.artifacts.code_hash import RUNNING
from kvjax.errors import InputError, Note, note
from kvjax.units import line
from kvjax.units.alarm import Alarm
from kvjax.units.group import joined
from kvjax.units.leader import Leader
from kvjax.units.line import Line
from kvjax.units.membership import Membership, detect_membership
from kvjax.units.places import Place
from tests.helpers.processes import free_port, launched_by_hand, launched_by_slurm


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    """No thread takes the place of a process, or ends it."""
    monkeypatch.setattr(Place, "take", lambda place: None)
    monkeypatch.setattr(Alarm, "_end", staticmethod(lambda error, status: None))


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def followers(port):
    """Starts followers of a group of so many, all or up to the last; gives each one's future: a status or an error."""
    with concurrent.futures.ThreadPoolExecutor() as threads:

        def follow(index, count, work):
            with joined(Membership(index, count, "127.0.0.1", port)) as member:
                return member.serve(work)

        yield lambda count, work, last=None: [
            threads.submit(follow, index, count, work) for index in range(1, count if last is None else last + 1)
        ]


@pytest.fixture
def lead(port):
    return lambda count: joined(Membership(0, count, "127.0.0.1", port))


def advancing(task, advance):
    """Reports progress without end, so that its process has to be stopped."""
    while True:
        advance(1)
        time.sleep(0.05)


def double(task, advance):
    time.sleep(task["seconds"])
    advance(1)
    return {"double": 2 * task["number"], "thread": threading.get_ident()}


def test_results_keep_their_order(followers, lead):
    """Results come in the order of the tasks, whoever ends first; each process does its own; progress counts all."""
    ended = followers(3, double)
    with lead(3) as leader:
        given = [(1, 0.3), (2, 0.0), (0, 0.1), (1, 0.0)]
        tasks = [(place, {"number": n, "seconds": seconds}) for n, (place, seconds) in enumerate(given)]
        counted = []
        results = leader.run(tasks, double, counted.append)
        assert [result["double"] for result in results] == [0, 2, 4, 6] and counted == [1] * 4
        threads = [result["thread"] for result in results]
        assert len(set(threads)) == 3 and threads[0] == threads[3] and threads[2] == threading.get_ident()
        assert leader.run([], double, counted.append) == []
    assert [one.result() for one in ended] == [0, 0]


def test_refused_task(followers, lead):
    """Each refused task has its error in its place; all others are done."""
    done = []

    def work(task, advance):
        if task["bad"]:
            raise InputError(f"{task['bad']}: expected a file; found none", parameter="steps")
        done.append(threading.get_ident())
        return {}

    ended = followers(3, work)
    with lead(3) as leader:
        tasks = [(0, {"bad": ""}), (1, {"bad": "x"}), (2, {"bad": "y"}), (0, {"bad": "z"}), (1, {"bad": ""})]
        good, *refused, last = leader.run(tasks, work, lambda n: None)
    assert (good, last) == ({}, {}) and len(done) == 2
    assert [str(error) for error in refused] == [f"{name}: expected a file; found none" for name in "xyz"]
    assert {error.parameter for error in refused} == {"steps"}
    assert [one.result() for one in ended] == [0, 0]


def test_notes_of_tasks(followers, lead):
    """A note made in another process is made in process 0."""

    def work(task, advance):
        note("runs/x: odd")
        return {}

    followers(2, work)
    with pytest.warns(Note, match="runs/x: odd"), lead(2) as leader:
        leader.run([(1, {})], work, lambda n: None)


def test_error_that_nobody_foresaw(followers, lead):
    """An error of another process is one line in all others; its own traceback stays with it."""

    def work(task, advance):
        raise ZeroDivisionError("by zero")

    ended = followers(2, work)
    expected = r"process 1 of 2 \(.*\): expected .*; found ZeroDivisionError: by zero"
    with pytest.raises(InputError, match=expected), lead(2) as leader:
        leader.run([(1, {})], work, lambda n: None)
    assert isinstance(ended[0].exception(), ZeroDivisionError)


def test_progress_that_cannot_be_shown(followers, lead):
    """If what another process sends cannot be taken in, as when the progress bar's file is full, all end in a line."""
    ended = followers(2, advancing)

    def full(number):
        raise OSError(28, "No space left on device")

    expected = (
        r"process 1 of 2 \(.*\): expected .*; found that what it sent could not be taken in \(OSError: .*No space"
    )
    with pytest.raises(InputError, match=expected), lead(2) as leader:
        leader.run([(1, {})], advancing, full)
    assert isinstance(ended[0].exception(), InputError)


@pytest.mark.parametrize("silent", [False, True])
def test_process_that_goes(port, followers, lead, monkeypatch, silent):
    """A process that ends, or a machine that falls silent, is found and named by all; work stops at a checkpoint."""
    monkeypatch.setattr(line, "SECONDS_OF_SILENCE", 0.6)
    monkeypatch.setattr(line, "_SECONDS_BETWEEN_SIGNS", 0.1)

    def work(task, advance):
        while True:
            time.sleep(0.01)
            advance(1)

    ended = followers(3, work, last=1)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        leading = threads.submit(_lead, lead(3), [(0, {}), (1, {}), (2, {})], work)
        gone = Line(_connected(port))
        gone.send(_hello(2, 3))
        gone.receive()
        if not silent:
            gone.close()
        found = "no sign of it for" if silent else "that it ended"
        for error in (leading.exception(), ended[0].exception()):
            assert "process 2 of 3 (77 on far): expected it to measure its share" in str(error) and found in str(error)


def test_leader_that_goes(port):
    """The others find that process 0 ended, while they work and while they wait."""
    with socket.create_server(("127.0.0.1", port)) as listening, concurrent.futures.ThreadPoolExecutor() as threads:

        def follow():
            with joined(Membership(1, 2, "127.0.0.1", port)) as member:
                member.serve(double)

        following = threads.submit(follow)
        leader = Line(listening.accept()[0])
        leader.receive()
        leader.send({"place": {"cores": 1, "memory_bytes": 1, "processes": 2, "gpus": None}})
        leader.close()
        assert str(following.exception()) == (
            f"process 0 of 2 (127.0.0.1:{port}): expected it to work until the tables are drawn (call again: what was "
            "measured is reused); found that it ended"
        )


def test_processes_that_do_not_meet(port, followers):
    """Whoever waits in vain says for whom; strangers and processes of another kind are turned away."""
    expected = rf"processes: expected process 0 of 2 at 127\.0\.0\.1:{port} within 1 s"
    with pytest.raises(InputError, match=expected), joined(Membership(1, 2, "127.0.0.1", port, 1.0)):
        pass
    ended = followers(2, double)  # of a group of two, where three are awaited
    with concurrent.futures.ThreadPoolExecutor() as threads:
        leading = threads.submit(_lead, joined(Membership(0, 3, "127.0.0.1", port, 3.0)), [], double)
        stranger = _connected(port)
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        found = f"processes: expected 3 processes at 127.0.0.1:{port}; found 1 after 3 s (missing: 1, 2)"
        assert str(leading.exception()) == found
        assert "expected each of the 3 processes of kvjax" in str(ended[0].exception())
        stranger.close()


def test_port_that_is_taken(port):
    """Process 0 names a port at which it cannot listen."""
    expected = f"127.0.0.1:{port}: expected a free port .*; found that another process"
    leading = joined(Membership(0, 2, "127.0.0.1", port))
    with socket.create_server(("127.0.0.1", port)), pytest.raises(InputError, match=expected), leading:
        pass


@pytest.mark.parametrize("launched", [launched_by_slurm, launched_by_hand])
def test_detection(launched, port, monkeypatch):
    """A process of Slurm, or of an environment made by hand, knows its number, how many there are and where to meet."""
    for index, environment in enumerate(launched(3, port)):
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            found = detect_membership()
        assert (found.index, found.count, found.port) == (index, 3, port) and found.host in ("localhost", "127.0.0.1")


def test_nothing_to_detect(monkeypatch):
    """Without a launcher, or with a contradictory environment, one line says what is missing."""
    with pytest.raises(InputError, match=r"processes: expected a launcher that JAX detects, .*; found none"):
        detect_membership()
    wrong = {"JAX_COORDINATOR_ADDRESS": "here:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="JAX_PROCESS_ID: expected a number from 0 to 1, for 2 processes; found 2"):
        detect_membership()
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(InputError, match="the launcher's environment: expected what JAX can read; found ValueError"):
        detect_membership()
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "here")
    with pytest.raises(InputError, match="JAX_COORDINATOR_ADDRESS: expected host:port; found here"):
        detect_membership()


def _lead(opening, tasks, work):
    with opening as leader:
        assert isinstance(leader, Leader)
        return leader.run(tasks, work, lambda n: None)


def _connected(port):
    while True:
        with contextlib.suppress(OSError):
            return socket.create_connection(("127.0.0.1", port))
        time.sleep(0.02)


def _hello(index, count):
    surroundings = {"host": "far", "cores": [0], "core_limit": 1, "memory_bytes": 1, "gpus": [], "driver_gpus": []}
    return {"kvjax": RUNNING, "index": index, "count": count, "pid": 77, "surroundings": surroundings}
