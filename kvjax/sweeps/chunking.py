"""How much is computed at once: sequences per microbatch, checkpoints per call."""

from __future__ import annotations

import dataclasses

import jax

from kvjax.errors import unusable
from kvjax.model.decoder import DecoderConfig
from kvjax.model.transforms import Lift

CPU_TOKENS_PER_BATCH = 900  # activations of a microbatch stay in cache; measured, see docs/design.md
DEFAULT_ACCELERATOR_GB = 8.0  # where the device does not say how much it has
MEMORY_SHARE = 0.7


@dataclasses.dataclass(frozen=True)
class ChunkPlan:
    """How the work is cut.

    Attributes:
      checkpoints: checkpoints per call; each call is padded to this many, so that one program serves all.
      devices: how many devices share them.
      tokens_per_batch: about how many tokens a microbatch holds.
      interventions, over_checkpoints: how each is lifted.
    """

    checkpoints: int
    devices: int
    tokens_per_batch: int
    interventions: Lift
    over_checkpoints: Lift


def plan_chunks(
    requested: str, config: DecoderConfig, *, backend: str, num_devices: int, num_tokens: int, memory_gb: float | None
) -> ChunkPlan:
    """Returns how to cut a sweep.

    On a CPU every core is a device that runs one checkpoint after another in cache-sized microbatches. On an
    accelerator, whole probe sets of as many checkpoints as memory allows run side by side.

    Args:
      requested: the `--checkpoint_batch` flag, `auto` or a number.
      config: the model's shape.
      backend: `cpu`, `gpu` or `tpu`.
      num_devices: devices there are.
      num_tokens: padded tokens of the probe set.
      memory_gb: memory of each accelerator to use; None for most of what it has.

    Raises:
      InputError: `requested` is neither `auto` nor a positive number.
    """
    if requested != "auto" and not (requested.isdecimal() and int(requested) > 0):
        raise unusable("--checkpoint_batch", "auto or a positive number", requested)
    if backend == "cpu":
        chunk = num_devices if requested == "auto" else int(requested)
        return ChunkPlan(chunk, _sharers(chunk, num_devices), CPU_TOKENS_PER_BATCH, "map", "map")
    budget = (memory_gb or _device_memory_gb()) * 1e9
    fitting = num_devices * max(1, int(budget / checkpoint_bytes(config, num_tokens)))
    chunk = fitting if requested == "auto" else int(requested)
    return ChunkPlan(chunk, _sharers(chunk, num_devices), num_tokens, "vmap", "vmap")


def _sharers(chunk: int, num_devices: int) -> int:
    """Returns how many devices can share a chunk equally."""
    return max(devices for devices in range(1, num_devices + 1) if chunk % devices == 0)


def _device_memory_gb() -> float:
    """Returns the accelerator memory that a sweep may fill: most of what JAX may allocate."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit * MEMORY_SHARE / 1e9 if limit else DEFAULT_ACCELERATOR_GB


def checkpoint_bytes(config: DecoderConfig, num_tokens: int) -> int:
    """Returns an upper estimate of the bytes one checkpoint's activations take, with its heads ablated side by side."""
    layers, heads = config.n_layers, config.n_heads
    kept = layers * (4 * config.d_model + config.d_ff + 2 * heads * config.max_seq_len)  # the clean run, for restarts
    live = (heads + 1) * (6 * config.d_model + 2 * config.d_ff + 2 * heads * config.max_seq_len)
    return 4 * num_tokens * (kept + live + 4 * config.vocab_size)
