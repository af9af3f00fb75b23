"""Trains many seeds as one program: a scanned segment of steps, lifted over seeds."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax.config.train import InitializedModelConfig, OptimizationConfig
from kvjax.devices import DEVICE_AXIS, Lift, Placement
from kvjax.measure.behaviour import wins_among
from kvjax.model.decoder import Decoder, DecoderConfig, Params
from kvjax.task.vocabulary import PAD_ID
from kvjax.train.schedule import learning_rate, make_optimizer

CPU_TOKENS_PER_MICROBATCH = 900


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters and optimiser state; with several seeds, every leaf has a leading seed axis R."""

    params: Params
    optimizer: optax.OptState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What each step of a segment measured on its own batch, before its update: [R, steps] each.

    Attributes:
      loss: mean cross-entropy over non-pad next tokens, in nats.
      token_accuracy: share of them predicted right.
      grad_norm: global norm of the gradient before clipping.
      learning_rate: of the step.
    """

    loss: jax.Array
    token_accuracy: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array


@dataclasses.dataclass(frozen=True)
class TrainProgram:
    """The static settings of the compiled training segment; hashable.

    Attributes:
      config: the model's shape.
      optimization: the optimiser's settings.
      num_steps: of the whole run.
      microbatches: how many equal parts of a device's share of a batch the gradient is summed over; they stay in cache
        on a CPU.
      lift: how the seeds of a device are run, `map` (one after another) or `vmap`.
      devices: how many devices share the work.
      shared: what they share: `seeds`, which are independent, or each step's `batch`, whose gradients are summed.
      undecayed: paths of the parameters without weight decay.
    """

    config: DecoderConfig
    optimization: OptimizationConfig
    num_steps: int
    microbatches: int
    lift: Lift
    devices: int = 1
    shared: Literal["seeds", "batch"] = "seeds"
    undecayed: frozenset[tuple[str, ...]] = frozenset()

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.optimization, self.num_steps, self.undecayed)

    @property
    def mesh(self) -> Mesh:
        return Placement(self.devices, self.lift).mesh

    @property
    def specs(self) -> tuple[PartitionSpec, PartitionSpec]:
        """Shards states [R, …] and batches [R, steps, B] over the devices."""
        if self.shared == "seeds":
            return PartitionSpec(DEVICE_AXIS), PartitionSpec(DEVICE_AXIS)
        return PartitionSpec(), PartitionSpec(None, None, DEVICE_AXIS)


def plan_training(
    config: DecoderConfig,
    optimization: OptimizationConfig,
    *,
    num_steps: int,
    batch_size: int,
    length: int,
    backend: str,
    num_seeds: int,
    num_devices: int,
) -> TrainProgram:
    """Plans training on a backend: cache-sized microbatches and mapped seeds on a CPU, all at once elsewhere.

    Devices (a CPU has one per core) share either the seeds or every batch in equal parts, whichever uses more devices.
    """

    def sharing(items: int) -> int:
        return max(n for n in range(1, num_devices + 1) if items % n == 0)

    devices, shared = sharing(num_seeds), "seeds"  # preferred: seeds are independent
    if sharing(batch_size) > devices:
        devices, shared = sharing(batch_size), "batch"
    microbatches, share = 1, batch_size // (devices if shared == "batch" else 1)
    if backend == "cpu":
        wanted = max(1, round(share * length / CPU_TOKENS_PER_MICROBATCH))
        small = [parts for parts in range(1, math.isqrt(share) + 1) if share % parts == 0]
        divisors = sorted({*small, *(share // parts for parts in small)})
        microbatches = min(divisors, key=lambda parts: abs(math.log(parts / wanted)))
    lift = "map" if backend == "cpu" else "vmap"
    return TrainProgram(config, optimization, num_steps, microbatches, lift, devices, shared)


@functools.lru_cache
def parameter_shapes(config: DecoderConfig) -> Params:
    """Returns the shapes of a model's parameters without making any. They are found by a trace, so once per model."""
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def initial_params(model: InitializedModelConfig, config: DecoderConfig, seed: int) -> Params:
    """Draws parameters from PyTorch's default distributions, times `init_scale`.

    Embeddings are N(0, 1), linear weights and biases U(±1/√fan_in); LayerNorms start at 1 and 0, unscaled.
    """
    flat, structure = jax.tree.flatten_with_path(parameter_shapes(config))
    keys = jax.random.split(jax.random.key(seed), len(flat))
    fan_in = {
        "/".join(part.key for part in path[:-1]): leaf.shape[-2] for path, leaf in flat if path[-1].key == "kernel"
    }

    def draw(key: jax.Array, path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name, parent = path[-1].key, "/".join(part.key for part in path[:-1])
        if name == "embedding":
            return model.init_scale * jax.random.normal(key, leaf.shape)
        if parent in fan_in:
            bound = fan_in[parent] ** -0.5
            return model.init_scale * jax.random.uniform(key, leaf.shape, minval=-bound, maxval=bound)
        return jnp.ones(leaf.shape) if name == "scale" else jnp.zeros(leaf.shape)

    leaves = [draw(key, path, leaf) for key, (path, leaf) in zip(keys, flat, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def batch_indices(seed: int, first_step: int, steps: int, *, num_records: int, batch_size: int) -> np.ndarray:
    """Draws the records each step trains on, [steps, batch_size]; -1 pads the partial last batch of an epoch.

    Every epoch visits every record once, in an order drawn from (seed, epoch) alone, so that a resumed run sees the
    batches the uninterrupted one would have seen.

    Args:
      seed: the run's seed.
      first_step: 1-based number of the first step.
      steps: how many steps.
      num_records: size of the training split.
      batch_size: records per step.
    """
    per_epoch = math.ceil(num_records / batch_size)
    rows = np.full((steps, batch_size), -1, np.int32)
    order, drawn_epoch = np.empty(0, np.int64), -1
    for row, step in enumerate(range(first_step - 1, first_step - 1 + steps)):
        epoch, batch = divmod(step, per_epoch)
        if epoch != drawn_epoch:
            order, drawn_epoch = np.random.default_rng([seed, epoch]).permutation(num_records), epoch
        members = order[batch * batch_size : (batch + 1) * batch_size]
        rows[row, : len(members)] = members
    return rows


def loss_sums(config: DecoderConfig, params: Params, tokens_BxT: jax.Array, weights_B: jax.Array) -> tuple:
    """Sums cross-entropy and right predictions over the non-pad next tokens of records with weight 1."""
    logits, _ = Decoder(config).apply({"params": params}, tokens_BxT)
    targets = tokens_BxT[:, 1:]
    counted = (targets != PAD_ID) & (weights_B[:, None] > 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], targets)
    right = wins_among(logits[:, :-1], targets) & counted
    return jnp.sum(jnp.where(counted, losses, 0.0)), jnp.sum(right)


def over_shares(program: TrainProgram, sums: Any) -> Any:
    """Adds up sums over each device's share of a batch, if devices share batches."""
    return jax.lax.psum(sums, DEVICE_AXIS) if program.shared == "batch" and program.devices > 1 else sums


def train_step(
    program: TrainProgram, state: TrainState, tokens_NxT: jax.Array, indices_B: jax.Array, step: jax.Array
) -> tuple[TrainState, StepMetrics]:
    """Takes one step: gradient, clipping, update.

    Args:
      program: the static settings.
      state: of one seed.
      tokens_NxT: the training split.
      indices_B: the step's records, negative for padding; this device's share of them.
      step: 1-based.
    """
    weights = (indices_B >= 0).astype(jnp.float32)
    batch = tokens_NxT[jnp.maximum(indices_B, 0)]
    num_targets = over_shares(program, jnp.sum((batch[:, 1:] != PAD_ID) * weights[:, None]))
    value_and_grad = jax.value_and_grad(functools.partial(loss_sums, program.config), has_aux=True)

    def parts(x: jax.Array) -> jax.Array:
        return x.reshape(program.microbatches, -1, *x.shape[1:])

    def add_microbatch(total: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, value_and_grad(state.params, *part)), None

    # Sums over microbatches, divided once: the mean over the batch's targets, whichever microbatch they fell into.
    zero = ((jnp.zeros(()), jnp.zeros((), jnp.int32)), jax.tree.map(jnp.zeros_like, state.params))
    sums, _ = jax.lax.scan(add_microbatch, zero, (parts(batch), parts(weights)))
    (loss, right), grads = over_shares(program, sums)
    grads = jax.tree.map(lambda leaf: leaf / num_targets, grads)
    updates, optimizer_state = program.optimizer.update(grads, state.optimizer, state.params)
    metrics = StepMetrics(
        loss=loss / num_targets,
        token_accuracy=right / num_targets,
        grad_norm=optax.tree.norm(grads),
        learning_rate=learning_rate(program.optimization, step, program.num_steps),
    )
    return TrainState(optax.apply_updates(state.params, updates), optimizer_state), metrics


def start_training(
    program: TrainProgram, states: Sequence[TrainState], tokens_NxT: np.ndarray
) -> tuple[TrainState, jax.Array]:
    """Stacks the seeds' states and puts them and the training split on the devices `train_segment` uses.

    Placed elsewhere, the first segment would move them, and its program would be compiled again for the placement it
    returns.
    """
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    if program.devices == 1:
        return stacked, jax.device_put(tokens_NxT)
    by_seed, whole = (NamedSharding(program.mesh, spec) for spec in (program.specs[0], PartitionSpec()))
    return jax.device_put(stacked, by_seed), jax.device_put(tokens_NxT, whole)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_segment(
    program: TrainProgram,
    states: TrainState,
    tokens_NxT: jax.Array,
    indices_RxUxB: jax.Array,
    first_step: jax.Array,
) -> tuple[TrainState, StepMetrics]:
    """Trains every seed for a segment of steps, and measures each step, [R, steps].

    Args:
      program: the static settings.
      states: with a leading seed axis R.
      tokens_NxT: the training split, shared by all seeds.
      indices_RxUxB: each seed's batches.
      first_step: 1-based number of the first step.
    """

    def one_seed(
        state: TrainState, indices_UxB: jax.Array, tokens_NxT: jax.Array, first_step: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        steps = first_step + jnp.arange(indices_UxB.shape[0])

        def body(state: TrainState, x: tuple[jax.Array, jax.Array]) -> tuple[TrainState, StepMetrics]:
            return train_step(program, state, tokens_NxT, *x)

        return jax.lax.scan(body, state, (indices_UxB, steps))

    def all_seeds(states: TrainState, indices_RxUxB: jax.Array, *rest: jax.Array) -> tuple[TrainState, StepMetrics]:
        def one(x: tuple[TrainState, jax.Array]) -> tuple[TrainState, StepMetrics]:
            return one_seed(*x, *rest)

        return (
            jax.lax.map(one, (states, indices_RxUxB))
            if program.lift == "map"
            else jax.vmap(one)((states, indices_RxUxB))
        )

    arguments = (states, indices_RxUxB, tokens_NxT, first_step)
    if program.devices == 1:
        return all_seeds(*arguments)
    (states_spec, batches_spec), whole = program.specs, PartitionSpec()
    return jax.shard_map(
        all_seeds,
        mesh=program.mesh,
        in_specs=(states_spec, batches_spec, whole, whole),
        out_specs=states_spec,
        check_vma=False,
    )(*arguments)
