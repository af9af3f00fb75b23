"""How much is computed at once: sequences per microbatch, checkpoints per call."""

from __future__ import annotations

import dataclasses

from kvjax.errors import unusable
from kvjax.model.decoder import DecoderConfig
from kvjax.model.transforms import Lift

CPU_TOKENS_PER_BATCH = 900  # activations of a microbatch stay in cache; measured, see docs/design.md
DEFAULT_ACCELERATOR_GB = 8.0


@dataclasses.dataclass(frozen=True)
class ChunkPlan:
    """How the work is cut.

    Attributes:
      checkpoints: checkpoints per call; each call is padded to this many, so that one program serves all.
      tokens_per_batch: about how many tokens a microbatch holds.
      interventions, over_checkpoints: how each is lifted.
    """

    checkpoints: int
    tokens_per_batch: int
    interventions: Lift
    over_checkpoints: Lift


def plan_chunks(
    requested: str, config: DecoderConfig, *, backend: str, num_tokens: int, memory_gb: float | None
) -> ChunkPlan:
    """Returns how to cut a sweep.

    On a CPU, checkpoints run one after another in cache-sized microbatches. On an accelerator, whole probe sets of as
    many checkpoints as memory allows run side by side.

    Args:
      requested: the `--checkpoint_batch` flag, `auto` or a number.
      config: the model's shape.
      backend: `cpu`, `gpu` or `tpu`.
      num_tokens: padded tokens of the largest bucket.
      memory_gb: accelerator memory to use.

    Raises:
      InputError: `requested` is neither `auto` nor a positive number.
    """
    if requested != "auto" and not (requested.isdecimal() and int(requested) > 0):
        raise unusable("--checkpoint_batch", "auto or a positive number", requested)
    if backend == "cpu":
        return ChunkPlan(1 if requested == "auto" else int(requested), CPU_TOKENS_PER_BATCH, "map", "map")
    budget = (memory_gb or DEFAULT_ACCELERATOR_GB) * 1e9
    fitting = max(1, int(budget / checkpoint_bytes(config, num_tokens)))
    return ChunkPlan(fitting if requested == "auto" else int(requested), num_tokens, "vmap", "vmap")


def checkpoint_bytes(config: DecoderConfig, num_tokens: int) -> int:
    """Returns an upper estimate of the bytes one checkpoint's activations take, with its heads ablated side by side."""
    layers, heads = config.n_layers, config.n_heads
    kept = layers * (4 * config.d_model + 2 * heads * config.max_seq_len)  # the clean run, for restarts
    live = (heads + 1) * (6 * config.d_model + 2 * config.d_ff + 2 * heads * config.max_seq_len)
    return 4 * num_tokens * (kept + live + 4 * config.vocab_size)
