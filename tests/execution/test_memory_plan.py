"""How a sweep is cut: what memory allows on an accelerator, equal shares for devices, cache-sized batches on a CPU."""

import numpy as np
import pytest

from kvjax.errors import InputError
from kvjax.execution.memory_plan import CPU_TOKENS_PER_BATCH, MOST_PER_ACCELERATOR, checkpoint_bytes, plan_chunks
from kvjax.model.decoder_config import DecoderConfig
from kvjax.sweeps.ablations import restarts_at_once
from kvjax.sweeps.settings import SweepSettings

CONFIG = DecoderConfig(vocab_size=146, d_model=128, n_layers=3, n_heads=4, d_ff=512, max_seq_len=96)
TOKENS = 384 * 83


def plan(requested="auto", **given):
    settings = {"backend": "gpu", "num_devices": 1, "num_tokens": TOKENS, "memory_gb": 20.0, "side_by_side": 12}
    return plan_chunks(requested, CONFIG, **{**settings, "keeps_runs": True, **given})


def test_accelerator():
    """An accelerator holds as many checkpoints as fit."""
    one = checkpoint_bytes(CONFIG, kept_tokens=TOKENS, tokens_per_batch=TOKENS, side_by_side=12) / 1e9
    for fitting in (1, 3, 7):
        found = plan(memory_gb=one * (fitting + 0.5))
        assert (found.checkpoints, found.tokens_per_batch) == (fitting, TOKENS)
    assert plan(memory_gb=1000.0).checkpoints == MOST_PER_ACCELERATOR
    assert plan(memory_gb=one * 2.5, num_devices=4).checkpoints == 8
    assert plan(memory_gb=one * 2.5).placement.lift == "vmap"


def test_runs_at_once():
    """More runs at once need more memory."""
    at_once = [restarts_at_once(CONFIG, kinds, draws=draws) for kinds, draws in ((["zero"], 1), (["zero", "mean"], 1))]
    at_once.append(restarts_at_once(CONFIG, ["zero", "mean", "resample", "random"], draws=8))
    assert at_once == [4, 8, 40]
    fitting = [plan(side_by_side=number).checkpoints for number in at_once]
    assert fitting[0] > fitting[1] > fitting[2] >= 1
    assert plan(keeps_runs=False, memory_gb=3.0).checkpoints >= plan(memory_gb=3.0).checkpoints


def test_microbatches():
    """Microbatches are cut if one checkpoint does not fit."""
    found = plan(memory_gb=1.0)
    assert found.checkpoints == 1 and found.tokens_per_batch < TOKENS
    needed = checkpoint_bytes(CONFIG, kept_tokens=TOKENS, tokens_per_batch=found.tokens_per_batch, side_by_side=12)
    assert needed <= 1e9
    assert plan(memory_gb=0.1).tokens_per_batch > 0, "it ends, where nothing is small enough"


@pytest.mark.parametrize(
    ("requested", "backend", "chunk", "devices"),
    [
        ("auto", "cpu", 4, 4),
        ("3", "cpu", 3, 3),
        ("5", "cpu", 8, 4),
        ("8", "gpu", 8, 4),
        ("9", "gpu", 12, 4),
        ("1", "gpu", 1, 1),
    ],
)
def test_devices(requested, backend, chunk, devices):
    """Devices share checkpoints equally, and none is idle."""
    found = plan(requested, backend=backend, num_devices=4)
    assert (found.checkpoints, found.placement.devices) == (chunk, devices)


def test_machine_memory():
    """A machine runs as many checkpoints as its memory holds."""
    one = checkpoint_bytes(CONFIG, kept_tokens=TOKENS, tokens_per_batch=CPU_TOKENS_PER_BATCH, side_by_side=1) / 1e9
    for given, cores in ((0.5, 1), (3.5, 3), (1000, 16)):
        found = plan(backend="cpu", num_devices=16, memory_gb=one * given)
        assert (found.checkpoints, found.placement.devices) == (cores, cores)
    assert plan(backend="cpu", num_devices=16, memory_gb=one, keeps_runs=False).placement.devices > 10, (
        "one microbatch each"
    )
    assert plan("16", backend="cpu", num_devices=16, memory_gb=one).placement.devices == 16, (
        "who names a number gets it"
    )


def test_numbers():
    """A number is taken as its text is."""
    assert plan(4) == plan("4")
    assert SweepSettings(resample_draws=np.int64(2)) == SweepSettings(resample_draws=2)


@pytest.mark.parametrize("requested", ["0", "-1", "many", "1.5", 0, -1, 1.5])
def test_invalid_numbers(requested):
    """A value that is no number is refused."""
    with pytest.raises(InputError, match="checkpoint_batch: expected auto or a positive number"):
        plan(requested)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"memory_gb": 0}, "memory_gb: expected a number above 0; found 0"),
        ({"memory_gb": -1.0}, "memory_gb: expected a number above 0; found -1.0"),
        ({"memory_gb": float("inf")}, "memory_gb: expected a number above 0; found inf"),
        ({"memory_gb": float("nan")}, "memory_gb: expected a number above 0; found nan"),
        ({"memory_gb": "8"}, "memory_gb: expected a number above 0; found 8"),
        ({"resample_draws": True}, "resample_draws: expected a whole number from 1 to 10000; found True"),
        ({"resample_draws": 0}, "resample_draws: expected a whole number from 1 to 10000; found 0"),
        ({"resample_draws": 1.5}, "resample_draws: expected a whole number from 1 to 10000; found 1.5"),
    ],
)
def test_invalid_settings(settings, complaint):
    """Settings that cannot be are refused."""
    with pytest.raises(InputError, match=complaint):
        SweepSettings(**settings)
