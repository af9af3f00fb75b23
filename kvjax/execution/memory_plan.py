"""Plans how much is computed at once: sequences per microbatch, checkpoints per call."""

from __future__ import annotations

import dataclasses

from kvjax.devices import Lift, Placement
from kvjax.errors import bad_argument
from kvjax.model.decoder_config import DecoderConfig

CPU_TOKENS_PER_BATCH = 900  # activations of a microbatch stay in cache; measured, see docs/performance.md
# A few checkpoints of whole probe sets fill an accelerator. More at once would compute more copies of the last one
# if a run's number of checkpoints is not a multiple.
MOST_PER_ACCELERATOR = 16
_FEWEST_TOKENS_PER_BATCH = 256
_LARGEST_BATCH = 10_000  # a chunk is padded to this many checkpoints, however few there are


@dataclasses.dataclass(frozen=True)
class ChunkPlan:
    """How the work is cut.

    Attributes:
      checkpoints: checkpoints per call; each call is padded to this many, so that one program serves all.
      placement: which devices share them, and how each runs its part.
      tokens_per_batch: about how many tokens a microbatch holds.
      interventions: how the interventions on one checkpoint are run.
    """

    checkpoints: int
    placement: Placement
    tokens_per_batch: int
    interventions: Lift


def plan_chunks(
    requested: str | int,
    config: DecoderConfig,
    *,
    backend: str,
    num_devices: int,
    num_tokens: int,
    memory_gb: float,
    side_by_side: int = 0,
    keeps_runs: bool = False,
) -> ChunkPlan:
    """Plans how to cut a sweep.

    On a CPU every core is a device that runs one checkpoint after another in cache-sized microbatches, as many cores as
    memory allows. On an accelerator, whole probe sets of several checkpoints run side by side, as memory allows. If one
    checkpoint does not fit, microbatches are cut.

    Args:
      requested: `auto` or a number of checkpoints.
      config: the model's shape.
      backend: `cpu`, `gpu` or `tpu`.
      num_devices: devices there are.
      num_tokens: padded tokens of the probe set.
      memory_gb: memory of each accelerator to fill, or of the machine on a CPU.
      side_by_side: how many intervened runs of a checkpoint there are at once.
      keeps_runs: whether the clean runs of all records are kept at once, for resampling.

    Raises:
      InputError: `requested` is neither `auto` nor a positive number, or far too large.
    """
    if requested != "auto" and not (str(requested).isdecimal() and 0 < int(requested) <= _LARGEST_BATCH):
        raise bad_argument("checkpoint_batch", f"auto or a positive number up to {_LARGEST_BATCH}", requested)

    def needed(tokens_per_batch: int, at_once: int) -> float:
        kept = num_tokens if keeps_runs else tokens_per_batch
        return checkpoint_bytes(config, kept_tokens=kept, tokens_per_batch=tokens_per_batch, side_by_side=at_once)

    if backend == "cpu":
        budget = memory_gb * 1e9
        fitting = max(1, min(int(budget / needed(CPU_TOKENS_PER_BATCH, 1)), num_devices))
        chunk = fitting if requested == "auto" else _shareable(int(requested), num_devices)
        return ChunkPlan(chunk, Placement(min(chunk, num_devices), "map"), CPU_TOKENS_PER_BATCH, "map")
    budget = memory_gb * 1e9
    tokens = num_tokens
    while needed(tokens, side_by_side) > budget and tokens > _FEWEST_TOKENS_PER_BATCH:
        tokens = -(-tokens // 2)
    fitting = num_devices * max(1, min(int(budget / needed(tokens, side_by_side)), MOST_PER_ACCELERATOR))
    chunk = fitting if requested == "auto" else _shareable(int(requested), num_devices)
    return ChunkPlan(chunk, Placement(min(chunk, num_devices), "vmap"), tokens, "vmap")


def _shareable(chunk: int, num_devices: int) -> int:
    """Rounds up to a number of checkpoints that devices share equally; fewer than devices stay as they are."""
    return chunk if chunk < num_devices else -(-chunk // num_devices) * num_devices


def checkpoint_bytes(config: DecoderConfig, *, kept_tokens: int, tokens_per_batch: int, side_by_side: int) -> float:
    """Estimates from above the bytes that measuring one checkpoint takes beside its parameters.

    Args:
      config: the model's shape.
      kept_tokens: tokens whose clean run is kept for restarts.
      tokens_per_batch: tokens of one microbatch.
      side_by_side: how many intervened runs of a microbatch there are at once.
    """
    layers, attention = config.n_layers, config.n_heads * config.max_seq_len
    kept = layers * (4 * config.d_model + config.d_ff + attention) + config.d_model
    live = 2 * config.d_model + config.d_ff + attention  # what one run has at once, by the compiler's own account
    return 4 * (kept_tokens * kept + 1.5 * tokens_per_batch * ((1 + side_by_side) * live + 4 * config.vocab_size))
