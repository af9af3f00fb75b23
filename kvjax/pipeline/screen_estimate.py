"""Estimates what a factor screen takes before any of it is begun: operations, time and disk."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kvjax.config.benchmark import BenchmarkConfig
from kvjax.config.factors import overrides_in_words
from kvjax.config.train import TrainConfig
from kvjax.devices import backend, device_count
from kvjax.model.decoder_config import DecoderConfig
from kvjax.pipeline.factor_plan import PlannedSetting, ScreenPlan
from kvjax.pipeline.settings import ProbeSetSettings
from kvjax.pipeline.text import in_minutes
from kvjax.report.text import say
from kvjax.sweeps.settings import SweepSettings
from kvjax.task.vocabulary import Vocabulary
from kvjax.train.memory import checkpoint_file_bytes

# Share of the rate of a large product, on all cores, that small models reach in training and sweeps.
_SHARE_REACHED = 0.5
_SECONDS_PER_SHAPE = 60.0  # compiling the programs of one shape: training, evaluation, sweep
_FORWARD_AND_BACKWARD = 3.0  # the backward pass costs two forward passes
_RESTARTED_SHARE = 0.6  # of the layers, those after an ablated component, on average with its own
_MATMUL_SIZE = 1024


@dataclasses.dataclass(frozen=True)
class Estimate:
    """About what a part of a screen takes.

    Attributes:
      training_flop, sweep_flop: floating-point operations.
      checkpoint_bytes: size of all checkpoint files.
    """

    training_flop: float
    sweep_flop: float
    checkpoint_bytes: float

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(
            self.training_flop + other.training_flop,
            self.sweep_flop + other.sweep_flop,
            self.checkpoint_bytes + other.checkpoint_bytes,
        )


def estimate_setting(setting: PlannedSetting, base: BenchmarkConfig) -> Estimate:
    """Estimates a setting's runs; those of other data are also measured on the base's probe set."""
    config, drawn, runs = setting.config, setting.benchmark, len(setting.runs)
    model = decoder_of(config, drawn)
    length = drawn.train.longest_stream
    per_run = config.num_steps * config.batch_size * length * _FORWARD_AND_BACKWARD * forward_flop(model, length)
    checkpoints = checkpoints_of(config)
    files = checkpoints + config.checkpointing.save_best_checkpoint
    passes = 1 if drawn == base else 2
    return Estimate(
        training_flop=runs * per_run,
        sweep_flop=runs * checkpoints * passes * _sweep_flop(model, drawn),
        checkpoint_bytes=float(runs * files * checkpoint_file_bytes(model, len(config.optimization.accumulators))),
    )


def seconds_of(estimate: Estimate, *, shapes: int, flop_per_second: float) -> float:
    """Estimates the time of a whole screen on this machine."""
    work = (estimate.training_flop + estimate.sweep_flop) / (_SHARE_REACHED * flop_per_second)
    return work + shapes * _SECONDS_PER_SHAPE


def shapes_of(plan: ScreenPlan) -> int:
    """Counts the different shapes of programs: model, batch and length of records."""
    found = set()
    for setting in plan.settings:
        config = setting.config
        model = decoder_of(config, setting.benchmark)
        found.add((model, config.batch_size, setting.benchmark.train.longest_stream))
    return len(found)


def checkpoints_of(config: TrainConfig) -> int:
    """Counts the step checkpoints of a run; the last step has one whatever the interval."""
    if not config.checkpointing.save_step_checkpoints:
        return 1
    return -(-config.num_steps // config.checkpoint_every_steps)


def decoder_of(config: TrainConfig, benchmark: BenchmarkConfig) -> DecoderConfig:
    """Forms the model's shape; the vocabulary has the benchmark's keys and values."""
    vocab_size = len(Vocabulary.of_size(benchmark.num_keys, benchmark.num_values).tokens)
    return DecoderConfig.from_model_config(config.model, vocab_size)


def forward_flop(model: DecoderConfig, length: int) -> float:
    """Counts the operations of a forward pass per token: products of the layers, attention, logits."""
    layer = 2 * model.d_model * (4 * model.d_model + 2 * model.d_ff) + 4 * length * model.d_model
    return float(model.n_layers * layer + 2 * model.d_model * model.vocab_size)


def _sweep_flop(model: DecoderConfig, benchmark: BenchmarkConfig) -> float:
    """Counts the operations of a sweep of one checkpoint: a clean run, and every component ablated in each kind."""
    probe = {field.name: field.default for field in dataclasses.fields(ProbeSetSettings)}
    records = [(probe["examples_per_split"], name) for name in _probed_splits(benchmark)]
    components = model.n_layers * (model.n_heads + 1)
    runs = 1 + _RESTARTED_SHARE * components * len(SweepSettings().ablations)
    total = 0.0
    for count, split in records:
        length = benchmark.split(split).longest_stream
        total += count * length * runs * forward_flop(model, length)
    fit = benchmark.train.longest_stream
    return total + probe["fit_examples"] * fit * forward_flop(model, fit)


def _probed_splits(benchmark: BenchmarkConfig) -> Sequence[str]:
    return ("validation_iid", "heldout_pairs", "structural_ood", benchmark.counterfactual.source_split)


def matmul_rate() -> float:
    """Measures how many operations per second this machine's devices reach in a large float32 product."""
    x = jnp.ones((_MATMUL_SIZE, _MATMUL_SIZE), jnp.float32)
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    # A large product takes all cores of a CPU, however many devices they are.
    return (1 if backend() == "cpu" else device_count()) * 2 * _MATMUL_SIZE**3 / best


def print_estimate(plan: ScreenPlan) -> None:
    """Prints the runs of a screen by setting, and about what they take."""
    rate, base = matmul_rate(), plan.base.benchmark
    counts = f"{len(plan.varied)} factors, {len(plan.settings)} settings, {len(plan.runs)} runs"
    say(f"{plan.screen.name}: {counts} in {plan.layout.path}")
    parts = [estimate_setting(setting, base) for setting in plan.settings]
    width = max(len(setting.name) for setting in plan.settings)
    for setting, part in zip(plan.settings, parts, strict=True):
        seeds = ", ".join(str(config.seed) for config in setting.runs.values())
        differs = overrides_in_words(setting.overrides)
        work = f"{part.training_flop / 1e12:6.2f} + {part.sweep_flop / 1e12:.2f} TFLOP"
        say(f"  {setting.name.ljust(width)}  seeds {seeds}  {work}  {differs}")
    whole, shapes = sum(parts[1:], start=parts[0]), shapes_of(plan)
    seconds = seconds_of(whole, shapes=shapes, flop_per_second=rate)
    say(
        f"Training {whole.training_flop / 1e12:.1f} TFLOP, sweeps {whole.sweep_flop / 1e12:.1f} TFLOP: about "
        f"{in_minutes(seconds)} here, {shapes * _SECONDS_PER_SHAPE:.0f} s of it for compiling {shapes} shapes, the "
        f"rest at {_SHARE_REACHED:.0%} of the {rate / 1e9:.0f} GFLOP/s of a large product; "
        f"{whole.checkpoint_bytes / 1e9:.2f} GB of checkpoints."
    )
