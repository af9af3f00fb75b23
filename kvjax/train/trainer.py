"""Trains many runs as one program: a scanned segment of steps, lifted over runs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax.config.train import InitializedModelConfig
from kvjax.devices import DEVICE_AXIS, Lift, Placement
from kvjax.measure.behaviour import wins_among
from kvjax.model.decoder import Decoder
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params
from kvjax.task.vocabulary import PAD_ID
from kvjax.train.schedule import Hyperparameters, learning_rate, make_optimizer

CPU_TOKENS_PER_MICROBATCH = 700
MOST_LAYERS_UNROLLED = 8  # more take long to compile


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters and optimiser state; with several runs, every leaf has a leading run axis R."""

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

    A gradient is summed over the microbatches of each part of a batch, then over the parts in order. On a CPU that
    order is the same whatever the devices share, so that a run has the same numbers alone and beside others.

    Attributes:
      config: the model's shape.
      parts: how many equal parts a batch has; as many devices can share one.
      microbatches: how many equal microbatches a part has; they stay in cache on a CPU.
      lift: how the runs of a device are run, `map` (one after another) or `vmap`.
      devices: how many devices share the work.
      shared: what they share: `runs`, which are independent, or the parts of each step's `batch`.
      undecayed: paths of the parameters without weight decay.
    """

    config: DecoderConfig
    parts: int
    microbatches: int
    lift: Lift
    devices: int = 1
    shared: Literal["runs", "batch"] = "runs"
    undecayed: frozenset[tuple[str, ...]] = frozenset()

    @property
    def mesh(self) -> Mesh:
        return Placement(self.devices, self.lift).mesh

    @property
    def specs(self) -> tuple[PartitionSpec, PartitionSpec]:
        """Shards what each run has, [R, …], and batches, [R, steps, B], over the devices."""
        if self.shared == "runs":
            return PartitionSpec(DEVICE_AXIS), PartitionSpec(DEVICE_AXIS)
        return PartitionSpec(), PartitionSpec(None, None, DEVICE_AXIS)


def plan_training(
    config: DecoderConfig,
    *,
    batch_size: int,
    length: int,
    backend: str,
    num_runs: int,
    num_devices: int,
) -> TrainProgram:
    """Plans training on a backend: cache-sized microbatches and mapped runs on a CPU, all at once elsewhere.

    Devices (a CPU has one per core) share either the runs or every batch in equal parts, whichever uses more devices.
    """

    def sharing(items: int) -> int:
        return max(n for n in range(1, num_devices + 1) if items % n == 0)

    parts, devices, shared, microbatches = sharing(batch_size), sharing(num_runs), "runs", 1
    if parts > devices:  # otherwise runs, which are independent
        devices, shared = parts, "batch"
    elif backend != "cpu":
        parts = 1
    share = batch_size // parts
    if backend == "cpu":
        wanted = max(1, round(share * length / CPU_TOKENS_PER_MICROBATCH))
        small = [n for n in range(1, math.isqrt(share) + 1) if share % n == 0]
        divisors = sorted({*small, *(share // n for n in small)})
        microbatches = min(divisors, key=lambda n: abs(math.log(n / wanted)))
    lift = "map" if backend == "cpu" else "vmap"
    return TrainProgram(config, parts, microbatches, lift, devices, shared)


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
    unroll = config.n_layers if config.n_layers <= MOST_LAYERS_UNROLLED else 1
    logits, _ = Decoder(config, unroll).apply({"params": params}, tokens_BxT)
    targets = tokens_BxT[:, 1:]
    counted = (targets != PAD_ID) & (weights_B[:, None] > 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], targets)
    right = wins_among(logits[:, :-1], targets) & counted
    return jnp.sum(jnp.where(counted, losses, 0.0)), jnp.sum(right)


def batch_sums(program: TrainProgram, params: Params, batch_BxT: jax.Array, weights_B: jax.Array) -> tuple:
    """Sums loss, right predictions, their gradients and targets over a batch, of which this device has its share."""
    value_and_grad = jax.value_and_grad(functools.partial(loss_sums, program.config), has_aux=True)
    zero = ((jnp.zeros(()), jnp.zeros((), jnp.int32)), jax.tree.map(jnp.zeros_like, params))

    def added_up(function: Callable[[jax.Array, jax.Array], Any], pieces: int, *whole: jax.Array) -> Any:
        """Adds up a function of equal pieces, one after another."""

        def add(total: Any, piece: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, function(*piece)), None

        return jax.lax.scan(add, zero, [x.reshape(pieces, -1, *x.shape[1:]) for x in whole])[0]

    def of_part(*part: jax.Array) -> Any:
        # Between barriers, a part is the same program, to the last bit, whatever the devices share.
        params_here, *part = jax.lax.optimization_barrier((params, *part))
        of_microbatch = functools.partial(value_and_grad, params_here)
        return jax.lax.optimization_barrier(added_up(of_microbatch, program.microbatches, *part))

    num_targets = jnp.sum((batch_BxT[:, 1:] != PAD_ID) * weights_B[:, None])
    if program.shared == "batch" and program.devices > 1:
        of_parts = jax.lax.all_gather(of_part(batch_BxT, weights_B), DEVICE_AXIS)
        sums = jax.tree.map(lambda x_Px: functools.reduce(jnp.add, list(x_Px)), of_parts)
        num_targets = jax.lax.psum(num_targets, DEVICE_AXIS)
    else:
        sums = added_up(of_part, program.parts, batch_BxT, weights_B)
    return jax.lax.optimization_barrier((sums, num_targets))  # so is the rest of the step


def train_step(
    program: TrainProgram,
    hyper: Hyperparameters,
    state: TrainState,
    tokens_NxT: jax.Array,
    indices_B: jax.Array,
    step: jax.Array,
) -> tuple[TrainState, StepMetrics]:
    """Takes one step: gradient, clipping, update.

    Args:
      program: the static settings.
      hyper: the run's own settings.
      state: of one run.
      tokens_NxT: the training split.
      indices_B: the step's records, negative for padding; this device's share of them.
      step: 1-based.
    """
    weights = (indices_B >= 0).astype(jnp.float32)
    batch = tokens_NxT[jnp.maximum(indices_B, 0)]
    # Sums, divided once: the mean over the batch's targets, whichever microbatch they fell into.
    ((loss, right), grads), num_targets = batch_sums(program, state.params, batch, weights)
    grads = jax.tree.map(lambda leaf: leaf / num_targets, grads)
    optimizer = make_optimizer(hyper, program.undecayed)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
    metrics = StepMetrics(
        loss=loss / num_targets,
        token_accuracy=right / num_targets,
        grad_norm=optax.tree.norm(grads),
        learning_rate=learning_rate(hyper, step),
    )
    return TrainState(optax.apply_updates(state.params, updates), optimizer_state), metrics


def start_training(
    program: TrainProgram, hypers: Sequence[Hyperparameters], states: Sequence[TrainState], tokens_NxT: np.ndarray
) -> tuple[Hyperparameters, TrainState, jax.Array]:
    """Stacks the runs' settings and states, and puts them and the training split on `train_segment`'s devices.

    Placed elsewhere, the first segment would move them, and its program would be compiled again for the placement it
    returns.
    """
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *zip(hypers, states, strict=True))
    if program.devices == 1:
        return *stacked, jax.device_put(tokens_NxT)
    by_run, whole = (NamedSharding(program.mesh, spec) for spec in (program.specs[0], PartitionSpec()))
    return *jax.device_put(stacked, by_run), jax.device_put(tokens_NxT, whole)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def train_segment(
    program: TrainProgram,
    hypers: Hyperparameters,
    states: TrainState,
    tokens_NxT: jax.Array,
    indices_RxUxB: jax.Array,
    first_step: jax.Array,
) -> tuple[TrainState, StepMetrics]:
    """Trains every run for a segment of steps, and measures each step, [R, steps].

    Args:
      program: the static settings.
      hypers: each run's own settings, with a leading run axis R.
      states: with a leading run axis R.
      tokens_NxT: the training split, shared by all runs.
      indices_RxUxB: each run's batches.
      first_step: 1-based number of the first step.
    """

    def one_run(
        hyper: Hyperparameters,
        state: TrainState,
        indices_UxB: jax.Array,
        tokens_NxT: jax.Array,
        first_step: jax.Array,
    ) -> tuple[TrainState, StepMetrics]:
        steps = first_step + jnp.arange(indices_UxB.shape[0])

        def body(state: TrainState, x: tuple[jax.Array, jax.Array]) -> tuple[TrainState, StepMetrics]:
            return train_step(program, hyper, state, tokens_NxT, *x)

        return jax.lax.scan(body, state, (indices_UxB, steps))

    def all_runs(
        hypers: Hyperparameters, states: TrainState, indices_RxUxB: jax.Array, *rest: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        def one(x: tuple[Hyperparameters, TrainState, jax.Array]) -> tuple[TrainState, StepMetrics]:
            return one_run(*x, *rest)

        of_runs = (hypers, states, indices_RxUxB)
        return jax.lax.map(one, of_runs) if program.lift == "map" else jax.vmap(one)(of_runs)

    arguments = (hypers, states, indices_RxUxB, tokens_NxT, first_step)
    if program.devices == 1:
        return all_runs(*arguments)
    (runs_spec, batches_spec), whole = program.specs, PartitionSpec()
    return jax.shard_map(
        all_runs,
        mesh=program.mesh,
        in_specs=(runs_spec, runs_spec, batches_spec, whole, whole),
        out_specs=runs_spec,
        check_vma=False,
    )(*arguments)
