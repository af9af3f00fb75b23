"""Builds PyTorch's optimisers in optax: learning rate by 1-based step, clipping, AdamW or SGD."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kvjax.config.train import AdamWConfig, OptimizationConfig, SGDConfig

_NEVER = float(np.finfo(np.float32).max)  # a step that no run reaches


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdamWNumbers:
    """What AdamW has of its own."""

    beta1: jax.Array
    beta2: jax.Array
    eps: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SGDNumbers:
    """What SGD has of its own; runs with and without `nesterov` are different programs."""

    momentum: jax.Array
    nesterov: bool = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """A run's optimiser settings as float32 numbers, so that runs that differ in them share a program.

    With several runs, every leaf has a leading run axis R. Runs of other optimisers have other trees.

    Attributes:
      learning_rate, min_learning_rate: at its peak, and at the end of its decay.
      warmup_steps: 0 for none.
      decay_start, decay_end: steps of the cosine decay; later than any step for a constant rate.
      weight_decay: decoupled for AdamW, part of the gradient for SGD.
      max_norm: of a clipped gradient; infinite without clipping.
      own: what only this optimiser has.
    """

    learning_rate: jax.Array
    min_learning_rate: jax.Array
    warmup_steps: jax.Array
    decay_start: jax.Array
    decay_end: jax.Array
    weight_decay: jax.Array
    max_norm: jax.Array
    own: AdamWNumbers | SGDNumbers

    @classmethod
    def of(cls, config: OptimizationConfig, num_steps: int) -> Hyperparameters:
        """Forms the numbers of a config.

        Args:
          config: the optimisation settings.
          num_steps: of the whole run; a cosine decay ends there unless the config names a `decay_end_step`.
        """
        schedule, start, end = config.schedule, _NEVER, _NEVER
        if schedule.kind == "cosine_decay":
            start = schedule.decay_start_step if schedule.decay_start_step is not None else config.warmup_steps
            end = schedule.decay_end_step if schedule.decay_end_step is not None else num_steps
        numbers = {
            "learning_rate": config.learning_rate,
            "min_learning_rate": schedule.min_learning_rate or 0.0,
            "warmup_steps": config.warmup_steps,
            "decay_start": start,
            "decay_end": end,
            "weight_decay": config.weight_decay,
            "max_norm": config.grad_clip_norm if config.grad_clip_norm is not None else np.inf,
        }
        return cls(**{name: np.float32(number) for name, number in numbers.items()}, own=_own_numbers(config))


def _own_numbers(config: OptimizationConfig) -> AdamWNumbers | SGDNumbers:
    match config:
        case AdamWConfig():
            return AdamWNumbers(np.float32(config.beta1), np.float32(config.beta2), np.float32(config.eps))
        case SGDConfig():
            return SGDNumbers(np.float32(config.momentum), config.nesterov)


def learning_rate(hyper: Hyperparameters, step: jax.Array | int) -> jax.Array:
    """Computes the learning rate of a step, counted from 1: linear warm-up, then constant or cosine decay."""
    warmup = jnp.where(hyper.warmup_steps > 0, jnp.minimum(step / jnp.maximum(hyper.warmup_steps, 1.0), 1.0), 1.0)
    length = jnp.maximum(1.0, hyper.decay_end - hyper.decay_start)
    progress = jnp.clip((step - hyper.decay_start) / length, 0.0, 1.0)
    peak, floor = hyper.learning_rate, hyper.min_learning_rate
    decayed = floor + (peak - floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    return jnp.where(step < hyper.decay_start, peak, decayed) * warmup


def clip_by_global_norm(max_norm: jax.Array | float) -> optax.GradientTransformation:
    """Clips gradients by their global norm as PyTorch does: times min(1, max_norm / (norm + 1e-6))."""

    def update(updates, state, params=None):
        del params
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda leaf: leaf * scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(
    hyper: Hyperparameters, undecayed: frozenset[tuple[str, ...]] = frozenset()
) -> optax.GradientTransformation:
    """Builds AdamW with decoupled decay, or SGD with decay in the gradient, after clipping.

    Args:
      hyper: the settings of one run; they may be traced. The state does not depend on their numbers.
      undecayed: paths of the parameters without weight decay.
    """

    def decays(params: optax.Params) -> optax.Params:
        return jax.tree.map_with_path(lambda path, _: tuple(part.key for part in path) not in undecayed, params)

    def rate(count: jax.Array) -> jax.Array:
        return learning_rate(hyper, count + 1)  # optax counts from 0, the schedule from 1

    mask = decays if undecayed else None
    match hyper.own:
        case AdamWNumbers() as own:
            parts = [optax.adamw(rate, own.beta1, own.beta2, own.eps, weight_decay=hyper.weight_decay, mask=mask)]
        case SGDNumbers() as own:
            decay = optax.add_decayed_weights(hyper.weight_decay, mask)
            parts = [decay, optax.sgd(rate, own.momentum, own.nesterov)]
    return optax.chain(clip_by_global_norm(hyper.max_norm), *parts)


def restore_optimizer(
    optimizer: optax.GradientTransformation,
    params: optax.Params,
    *,
    count: int,
    accumulators: Mapping[str, optax.Params],
    step: int | None = None,
) -> optax.OptState:
    """Builds an optimiser's state from its accumulators.

    Args:
      optimizer: the optimiser.
      params: its parameters.
      count: how many updates it has taken, for AdamW's bias correction.
      accumulators: as `accumulators_of` returns them; none for SGD without momentum.
      step: steps of the run, for the schedule; by default `count`. Other trainers may skip updates.
    """

    def replace(part: Any) -> Any:
        if isinstance(part, optax.ScaleByScheduleState):
            return optax.ScaleByScheduleState(count=jnp.asarray(count if step is None else step, jnp.int32))
        if isinstance(part, optax.ScaleByAdamState):
            mu, nu = accumulators["exp_avg"], accumulators["exp_avg_sq"]
            return optax.ScaleByAdamState(count=jnp.asarray(count, jnp.int32), mu=mu, nu=nu)
        if isinstance(part, optax.TraceState) and accumulators:
            return optax.TraceState(trace=accumulators["momentum_buffer"])
        return part

    return jax.tree.map(replace, optimizer.init(params), is_leaf=_is_state)


def accumulators_of(state: optax.OptState) -> dict[str, optax.Params]:
    """Extracts what an optimiser keeps of every parameter from step to step, under PyTorch's names."""
    found = {}
    for part in jax.tree.leaves(state, is_leaf=_is_state):
        if isinstance(part, optax.ScaleByAdamState):
            found |= {"exp_avg": part.mu, "exp_avg_sq": part.nu}
        elif isinstance(part, optax.TraceState):
            found |= {"momentum_buffer": part.trace}
    return found


def _is_state(part: object) -> bool:
    return isinstance(part, optax.ScaleByAdamState | optax.TraceState | optax.ScaleByScheduleState)
