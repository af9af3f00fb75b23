"""How machines are divided among processes: each core once, bound processes as they are, one GPU at most once."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest

from kvjax.devices import share_cpu_cores
from kvjax.errors import InputError
from kvjax.machine import available_cores, machine_memory_bytes
from kvjax.units.places import Place, Surroundings, divide

GB = 1_000_000_000


def at(host="a", cores=range(8), limit=None, gpus=()):
    cores = tuple(cores)
    return Surroundings(host, cores, len(cores) if limit is None else limit, 8 * GB, tuple(gpus))


@pytest.mark.parametrize(
    ("members", "cores"),
    [
        ([at()], [8]),
        ([at(), at()], [4, 4]),
        ([at(), at(), at()], [2, 3, 3]),
        ([at(cores=range(2))] * 4, [1, 1, 1, 1]),
        ([at("a"), at("b"), at("a")], [4, 8, 4]),
        ([at(cores=range(4)), at(cores=range(4, 8))], [4, 4]),
        ([at(limit=3), at(limit=3)], [1, 2]),
    ],
)
def test_cores(members, cores):
    """Processes share a machine's cores, or the quota of it; those bound to cores of their own keep them."""
    assert [place.cores for place in divide(members)] == cores


def test_memory_and_gpus():
    """Memory is shared in equal parts; GPUs go round, unless each process sees its own; too few are refused."""
    assert [place.memory_bytes for place in divide([at("a"), at("b"), at("a")])] == [4 * GB, 8 * GB, 4 * GB]
    assert [place.gpus for place in divide([at(), at()])] == [None, None]
    assert [place.gpus for place in divide([at(gpus="0123"), at(gpus="0123")])] == [("0", "2"), ("1", "3")]
    assert [place.gpus for place in divide([at(gpus="0"), at(gpus="1")])] == [None, None]
    with pytest.raises(InputError, match="processes: expected at most one for each GPU of a; found 2 for 1"):
        divide([at(gpus="0"), at(gpus="0")])


def test_place_that_is_taken(monkeypatch):
    """A process in its place plans with its share of cores and memory, and XLA computes with as many threads."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        patch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
        for name in ("NPROC", "PJRT_NPROC"):
            os.environ.pop(name, None)
        Place(1, GB // 2, ("3",)).take()
        assert (available_cores(), machine_memory_bytes()) == (1, GB // 2)
        assert os.environ["PJRT_NPROC"] == "1" and os.environ["CUDA_VISIBLE_DEVICES"] == "3"
        share_cpu_cores()  # what was chosen before stays
        assert os.environ["PJRT_NPROC"] == "1"


def test_surroundings_as_json():
    """What a process says of itself, and the place that it gets, arrive as they were sent."""
    for sent in (Surroundings.here(), Place(2, GB, None), Place(2, GB, ("0", "1"))):
        assert type(sent).of_json(json.loads(json.dumps(dataclasses.asdict(sent)))) == sent
