"""A training that is killed at some moment and resumed ends with the bytes of one that nobody disturbed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.helpers.building import read_lines
from tests.helpers.commands import optimised_environment
from tests.helpers.training import small_train_config

SEEDS, STEPS, EVERY = (3, 4, 5), 160, 8
PATIENCE = 120  # seconds until a checkpoint must be there


@pytest.fixture(scope="module")
def command(small_benchmark, tmp_path_factory):
    """Returns a function that starts a training of three seeds in a process of its own."""
    folder = tmp_path_factory.mktemp("killed")
    config = small_train_config(small_benchmark, num_steps=STEPS, eval_every_steps=EVERY, checkpoint_every_steps=EVERY)
    (folder / "config.json").write_text(config.model_dump_json())
    seeds, environment = ",".join(map(str, SEEDS)), optimised_environment() | {"JAX_NUM_CPU_DEVICES": "2"}

    def start(output, *flags):
        arguments = [f"--config={folder / 'config.json'}", f"--seeds={seeds}", f"--output_dir={output}", *flags]
        program = [sys.executable, "-m", "kvjax.commands.main", "train", *arguments, "--noprogress"]
        return subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL)

    return start


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    assert command(output).wait() == 0
    return output


def tensors(document):
    """Returns a checkpoint's parameters and moments as bytes, by name."""
    state = {("model", name): tensor for name, tensor in document["model_state"].items()}
    for number, entry in document["optimizer_state"]["state"].items():
        state |= {(number, name): tensor for name, tensor in entry.items()}
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


def test_bytes_after_a_kill(command, undisturbed, tmp_path):
    """Parameters, moments and losses of every checkpoint are those of the undisturbed training, byte for byte."""
    seed, step, delay = random.choice(SEEDS), random.randrange(2 * EVERY, 10 * EVERY, EVERY), random.random() / 4
    moment = f"killed {delay:.3f} s after seed {seed} saved step {step}"
    training = command(tmp_path)
    awaited = tmp_path / f"seed_{seed}" / "checkpoints" / f"step_{step:06d}.pt"
    deadline = time.monotonic() + PATIENCE
    while not awaited.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(delay)
    training.send_signal(signal.SIGKILL)
    assert training.wait() == -signal.SIGKILL, moment
    assert not (tmp_path / f"seed_{seed}" / "summary.json").exists(), moment
    assert command(tmp_path, "--resume").wait() == 0, moment
    for one in (f"seed_{seed}" for seed in SEEDS):
        ours, theirs = tmp_path / one, undisturbed / one
        names = sorted(path.name for path in (theirs / "checkpoints").iterdir())
        assert sorted(path.name for path in (ours / "checkpoints").iterdir()) == names and len(names) == 21
        for name in names:
            loaded = [torch.load(run / "checkpoints" / name, weights_only=True) for run in (ours, theirs)]
            assert loaded[0]["step"] == loaded[1]["step"], (moment, one, name)
            assert tensors(loaded[0]) == tensors(loaded[1]), (moment, one, name)
        rows = [row for row in read_lines(ours / "metrics.jsonl") if row["phase"] != "resume"]
        assert rows == read_lines(theirs / "metrics.jsonl"), moment
