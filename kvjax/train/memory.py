"""Estimates what training takes before any of it is taken: memory for states and activations, disk for checkpoints."""

from __future__ import annotations

import functools
import math

import jax

from kvjax.devices import available_memory_bytes
from kvjax.errors import InputError
from kvjax.model.decoder_config import DecoderConfig
from kvjax.train.trainer import TrainProgram, parameter_shapes


@functools.cache
def parameter_count(config: DecoderConfig) -> int:
    """Counts the parameters of a model without making any."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameter_shapes(config)))


def checkpoint_file_bytes(config: DecoderConfig, accumulators: int) -> int:
    """Estimates the size of a checkpoint file: parameters and so many accumulators of the optimiser in float32."""
    return 4 * (1 + accumulators) * parameter_count(config)


def check_memory(
    program: TrainProgram,
    *,
    num_runs: int,
    accumulators: int,
    batch_size: int,
    length: int,
    segment: int,
    on_cpu: bool,
) -> None:
    """Refuses a training that cannot fit into the memory of the machine, or of an accelerator.

    The estimate is from below: it counts states, gradients, the activations of a microbatch, and the numbers of a
    segment's records.

    Args:
      program: what is trained.
      num_runs: how many runs train together.
      accumulators: how many arrays the optimiser keeps of every parameter.
      batch_size: records per step.
      length: tokens of the longest record.
      segment: steps that are dispatched together.
      on_cpu: whether all devices share one memory.

    Raises:
      InputError: it does not fit; the message has the numbers.
    """
    config, devices = program.config, program.devices
    by_run = program.shared == "runs"
    rows = batch_size // program.parts // program.microbatches
    at_once = devices if program.lift == "map" or not by_run else num_runs
    kept = config.n_layers * (4 * config.d_model + config.d_ff + config.n_heads * length) + 2 * config.vocab_size
    copies = 2 + accumulators  # parameters and their gradient
    states = 4 * copies * parameter_count(config) * num_runs * (devices if on_cpu and not by_run else 1)
    activations = 4 * kept * rows * length * at_once
    batches = 4 * batch_size * segment * num_runs
    parts = 1 if on_cpu else devices  # accelerators have a memory each
    needed = states / (parts if by_run else 1) + (activations + batches) / parts
    if needed > (there := available_memory_bytes()):
        runs = "1 run" if num_runs == 1 else f"{num_runs} runs"
        raise InputError(
            f"expected a training that fits into {_size(there)} of memory; found {_size(states)} for parameters and "
            f"optimizer of {runs}, {_size(activations)} for activations and {_size(batches)} for the batches of "
            f"{segment} steps (lower the model's sizes, batch_size {batch_size}, or the number of runs)"
        )


def _size(size: float) -> str:
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if size >= unit), (1e3, "kB"))
    return f"{size / unit:.3g} {name}"
