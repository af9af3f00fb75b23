"""Builds PyTorch's optimiser in optax: learning rate by 1-based step, clipping, AdamW."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from kvjax.config.train import OptimizationConfig


def learning_rate(config: OptimizationConfig, step: jax.Array | int, num_steps: int) -> jax.Array:
    """Computes the learning rate of a step, counted from 1: linear warm-up, then constant or cosine decay.

    Args:
      config: the optimisation settings.
      step: 1-based step, possibly traced.
      num_steps: of the whole run; a cosine decay ends there unless the config names a `decay_end_step`.
    """
    peak, schedule = config.learning_rate, config.schedule
    warmup = jnp.minimum(step / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    if schedule.kind == "constant":
        return jnp.asarray(peak * warmup, jnp.float32)
    start = schedule.decay_start_step if schedule.decay_start_step is not None else config.warmup_steps
    end = schedule.decay_end_step if schedule.decay_end_step is not None else num_steps
    floor = schedule.min_learning_rate or 0.0
    progress = jnp.clip((step - start) / max(1, end - start), 0.0, 1.0)
    decayed = floor + (peak - floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    return jnp.asarray(jnp.where(step < start, peak, decayed) * warmup, jnp.float32)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Clips gradients by their global norm as PyTorch does: times min(1, max_norm / (norm + 1e-6))."""

    def update(updates, state, params=None):
        del params
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda leaf: leaf * scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(
    config: OptimizationConfig, num_steps: int, undecayed: frozenset[tuple[str, ...]] = frozenset()
) -> optax.GradientTransformation:
    """Builds AdamW with decoupled decay, after clipping.

    Args:
      config: the optimisation settings.
      num_steps: of the whole run.
      undecayed: paths of the parameters without weight decay.
    """

    def decays(params: optax.Params) -> optax.Params:
        return jax.tree.map_with_path(lambda path, _: tuple(part.key for part in path) not in undecayed, params)

    clip = clip_by_global_norm(config.grad_clip_norm) if config.grad_clip_norm is not None else optax.identity()
    adamw = optax.adamw(
        # optax counts from 0, the schedule from 1.
        learning_rate=lambda count: learning_rate(config, count + 1, num_steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decays if undecayed else None,
    )
    return optax.chain(clip, adamw)


def restore_adam(
    optimizer: optax.GradientTransformation,
    params: optax.Params,
    *,
    count: int,
    mu: optax.Params,
    nu: optax.Params,
    step: int | None = None,
) -> optax.OptState:
    """Builds an optimiser's state from its moments.

    Args:
      optimizer: the optimiser.
      params: its parameters.
      count: how many updates it has taken, for the bias correction.
      mu, nu: first and second moments.
      step: steps of the run, for the schedule; by default `count`. Other trainers may skip updates.
    """

    def replace(part):
        if isinstance(part, optax.ScaleByAdamState):
            return optax.ScaleByAdamState(count=jnp.asarray(count, jnp.int32), mu=mu, nu=nu)
        if isinstance(part, optax.ScaleByScheduleState):
            return optax.ScaleByScheduleState(count=jnp.asarray(count if step is None else step, jnp.int32))
        return part

    return jax.tree.map(replace, optimizer.init(params), is_leaf=_is_counted)


def adam_moments(state: optax.OptState) -> tuple[optax.Params, optax.Params]:
    """Extracts the first and second moments of an optimiser state."""
    parts = jax.tree.leaves(state, is_leaf=_is_counted)
    (adam,) = [part for part in parts if isinstance(part, optax.ScaleByAdamState)]
    return adam.mu, adam.nu


def _is_counted(part: object) -> bool:
    return isinstance(part, (optax.ScaleByAdamState, optax.ScaleByScheduleState))
