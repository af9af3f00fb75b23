"""How machines are divided among processes: each core once, bound processes as they are, one GPU at most once."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os

import pytest

from kvjax.devices import fillable_memory_gb, share_cpu_cores
from kvjax.errors import InputError
from kvjax.machine import available_cores, machine_memory_bytes, processes_here
from kvjax.units.places import Place, Surroundings, divide

GB = 1_000_000_000


def at(host="a", cores=range(8), limit=None, gpus=(), cards=("uuid",)):
    cores = tuple(cores)
    return Surroundings(host, cores, len(cores) if limit is None else limit, 8 * GB, tuple(gpus), tuple(cards))


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
    places = divide([at("a"), at("b"), at("a")])
    assert [place.memory_bytes for place in places] == [4 * GB, 8 * GB, 4 * GB]
    assert [place.processes for place in places] == [2, 1, 2]
    assert [place.gpus for place in divide([at(), at()])] == [None, None]
    assert [place.gpus for place in divide([at(gpus="0123"), at(gpus="0123")])] == [("0", "2"), ("1", "3")]
    assert [place.gpus for place in divide([at(gpus="0"), at(gpus="1")])] == [None, None]
    with pytest.raises(InputError, match="processes: expected at most one for each GPU of a; found 2 for 1"):
        divide([at(gpus="0"), at(gpus="0")])


def test_one_card_for_each_task():
    """Slurm with control groups shows each task its own card, which every task counts as 0: they keep them."""
    tasks = [at(gpus="0", cards=[f"GPU-{index}"]) for index in range(4)]
    assert [place.gpus for place in divide(tasks)] == [None] * 4
    pairs = [at(gpus="01", cards=["GPU-a", "GPU-b"])] * 2 + [at(gpus="01", cards=["GPU-c", "GPU-d"])] * 2
    assert [place.gpus for place in divide(pairs)] == [("0",), ("1",), ("0",), ("1",)]


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (None, ("0", "1", "2")),
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("2,0", ("2", "0")),
        ("0, -1,1", ("0",)),
        ("GPU-8932f937,GPU-7c1a", ("GPU-8932f937", "GPU-7c1a")),
    ],
)
def test_gpus_that_are_shown(tmp_path, monkeypatch, named, expected):
    """A machine of three: those that the environment hides stay hidden, and others keep the names it gives them."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf 'GPU-8932f937\\nGPU-7c1a\\nGPU-ff00\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    found = Surroundings.here()
    assert found.gpus == expected and found.driver_gpus == ("GPU-8932f937", "GPU-7c1a", "GPU-ff00")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert Surroundings.here().gpus == ()


def test_place_that_is_taken(monkeypatch):
    """A process in its place plans with its share of cores and memory, and XLA computes with as many threads."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        patch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
        for name in ("NPROC", "PJRT_NPROC"):
            os.environ.pop(name, None)
        Place(1, GB // 2, 4, ("3",)).take()
        assert (available_cores(), machine_memory_bytes(), processes_here()) == (1, GB // 2, 4)
        assert fillable_memory_gb(8.0) == 2.0  # given for the machine
        assert os.environ["PJRT_NPROC"] == "1" and os.environ["CUDA_VISIBLE_DEVICES"] == "3"
        share_cpu_cores()  # what was chosen before stays
        assert os.environ["PJRT_NPROC"] == "1"


def test_surroundings_as_json():
    """What a process says of itself, and the place that it gets, arrive as they were sent."""
    for sent in (Surroundings.here(), Place(2, GB, 1, None), Place(2, GB, 3, ("0", "1"))):
        assert type(sent).of_json(json.loads(json.dumps(dataclasses.asdict(sent)))) == sent
