"""Times training steps of runs as one program beside eager PyTorch, in turn, in one process on the same cores or GPU.

    python -m benchmarks.train --config=symbolic_kv_quickstart --runs=16
    python -m benchmarks.train --config=symbolic_kv_formation --benchmark=symbolic_kv_base --runs=1

A step is forward, backward, clipping and AdamW on both sides, from the same initial weights on the same batches, of the
config's model and batch and of tokens as long as the benchmark's records. On a busy machine CPU time says more than
wall time: of PyTorch, look at one thread, for threads that wait for each other spin.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags
from kvjax.converters.to_torch import to_torch
from kvjax.converters.torch_decoder import TorchAttention, TorchDecoder

from benchmarks.reporting import machine, torch_device, write_result
from kvjax.config.benchmark import BenchmarkConfig
from kvjax.config.files import find_config, read_config
from kvjax.config.train import TrainConfig
from kvjax.devices import share_cpu_cores
from kvjax.model.decoder_config import DecoderConfig
from kvjax.pipeline.screen_estimate import decoder_of
from kvjax.train.schedule import Hyperparameters, make_optimizer
from kvjax.train.trainer import TrainState, batch_indices, initial_params, plan_training, start_training, train_segment

FLAGS = flags.FLAGS
flags.DEFINE_string("config", "symbolic_kv_quickstart", "Training config, a file or the name of a shipped one.")
flags.DEFINE_string("benchmark", "symbolic_kv_quickstart", "Benchmark config that gives vocabulary and record length.")
flags.DEFINE_integer("runs", 16, "Runs trained as one program.", lower_bound=1)
flags.DEFINE_integer("steps", 4, "Steps per timed segment.", lower_bound=1)
flags.DEFINE_integer("repeats", 5, "Rounds; medians are reported.", lower_bound=1)

RECORDS = 2048
PAUSE = 0.5  # seconds until threads of PyTorch that wait have gone to sleep


@dataclasses.dataclass(frozen=True)
class Case:
    """What both sides train: a config, its model's shape, and tokens as long as a benchmark's longest record."""

    config: TrainConfig
    decoder: DecoderConfig
    tokens: np.ndarray

    @classmethod
    def of(cls, name: str) -> Case:
        config = read_config(find_config(name, "train"), TrainConfig)
        drawn = read_config(find_config(FLAGS.benchmark, "benchmark"), BenchmarkConfig)
        decoder = decoder_of(config, drawn)
        size = (RECORDS, drawn.train.longest_stream)
        tokens = np.random.default_rng(0).integers(1, decoder.vocab_size, size).astype(np.int32)
        return cls(config, decoder, tokens)

    def batches(self, seed: int) -> np.ndarray:
        return batch_indices(seed, 1, FLAGS.steps, num_records=RECORDS, batch_size=self.config.batch_size)


@dataclasses.dataclass
class Timed:
    """A side of the comparison: a segment of steps, and milliseconds per step and run of each round.

    Attributes:
      segment: trains one segment and returns the first loss of the first run.
      runs: how many runs it trains.
    """

    segment: Callable[[], float]
    runs: int
    wall: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)

    def time(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.segment()
        steps = FLAGS.steps * self.runs
        self.wall.append(1e3 * (time.perf_counter() - wall) / steps)
        self.cpu.append(1e3 * (time.process_time() - cpu) / steps)

    def medians(self) -> dict[str, float]:
        return {"wall_ms": statistics.median(self.wall), "cpu_ms": statistics.median(self.cpu)}


def main(argv: list[str]) -> None:
    del argv
    share_cpu_cores()
    case, device = Case.of(FLAGS.config), torch_device()
    sides = {"kvjax": Timed(_our_segment(case, FLAGS.runs), FLAGS.runs)}
    if device is not None:
        threads = torch.get_num_threads()
        for name, fused, used in (
            ("PyTorch, fused attention", True, threads),
            ("PyTorch, fused attention, one thread", True, 1),
            ("PyTorch, attention written out", False, threads),
        ):
            sides[name] = Timed(_torch_segment(case, device, fused=fused, threads=used), 1)
    losses = {name: side.segment() for name, side in sides.items()}  # compiles, and warms up
    for _ in range(FLAGS.repeats):
        for side in sides.values():
            time.sleep(PAUSE)
            side.time()
    found = {name: side.medians() for name, side in sides.items()}
    ours, theirs = found["kvjax"], {name: one for name, one in found.items() if name != "kvjax"}
    ratios = {
        kind: min(one[f"{kind}_ms"] for one in theirs.values()) / ours[f"{kind}_ms"]
        for kind in ("wall", "cpu")
        if theirs
    }
    result = {
        "what": "milliseconds per step and run: forward, backward, clipping, AdamW",
        "machine": machine(),
        "config": FLAGS.config,
        "runs_as_one_program": FLAGS.runs,
        "batch_size": case.config.batch_size,
        "tokens_per_record": case.tokens.shape[1],
        "medians": found,
        "rounds": {name: {"wall_ms": side.wall, "cpu_ms": side.cpu} for name, side in sides.items()},
        "ratio_to_fastest_torch": ratios,
        "first_losses": losses,
    }
    for name, one in found.items():
        print(f"{name:38s} {one['wall_ms']:7.1f} ms per step and run, {one['cpu_ms']:7.1f} ms of CPU time")
    print(f"the least of PyTorch over kvjax: {', '.join(f'{kind} {ratio:.2f}' for kind, ratio in ratios.items())}")
    print(f"first losses: {', '.join(f'{name} {loss:.5f}' for name, loss in losses.items())}")
    print(write_result(f"train_{FLAGS.config.removeprefix('symbolic_kv_')}_{FLAGS.runs}", result))


def _our_segment(case: Case, runs: int) -> Callable[[], float]:
    """Makes a segment of `runs` runs as one program."""
    config = case.config
    program = plan_training(
        case.decoder,
        batch_size=config.batch_size,
        length=case.tokens.shape[1],
        backend=jax.default_backend(),
        num_runs=runs,
        num_devices=jax.local_device_count(),
    )
    hyper = Hyperparameters.of(config.optimization, config.num_steps)
    params = [initial_params(config.model, case.decoder, seed) for seed in range(runs)]
    states = [TrainState(p, make_optimizer(hyper).init(p)) for p in params]
    indices = np.stack([case.batches(seed) for seed in range(runs)])
    hypers, states, tokens = start_training(program, [hyper] * runs, states, case.tokens)

    def segment() -> float:
        nonlocal states
        states, metrics = train_segment(program, hypers, states, tokens, indices, jnp.asarray(1))
        jax.block_until_ready(states)
        return float(metrics.loss[0, 0])

    return segment


def _torch_segment(case: Case, device: torch.device, *, fused: bool, threads: int) -> Callable[[], float]:
    """Makes a segment of one run in PyTorch.

    With `fused`, attention is PyTorch's own fused kernel; the batches have no padding, so a causal mask suffices.
    """
    config = case.config
    module = TorchDecoder(config.model, case.decoder.vocab_size).to(device)
    module.lm_head.weight = module.token_embedding.weight
    module.load_state_dict(to_torch(initial_params(config.model, case.decoder, 0)))
    if fused:
        for block in module.blocks:
            block.attn.forward = functools.partial(_fused_attention, block.attn)
    settings = config.optimization
    optimizer = torch.optim.AdamW(
        module.parameters(),
        lr=settings.learning_rate / settings.warmup_steps,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
    )
    batches = [torch.from_numpy(case.tokens[rows].astype(np.int64)).to(device) for rows in case.batches(0)]

    def segment() -> float:
        torch.set_num_threads(threads)
        losses = []
        for batch in batches:
            logits = module(batch)[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=0)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), settings.grad_clip_norm)
            optimizer.step()
            losses.append(loss.item())
        return losses[0]

    return segment


def _fused_attention(attn: TorchAttention, x: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None]:
    def heads(projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (attn.n_heads, -1)).transpose(1, 2)

    q, k, v = heads(attn.q_proj(x)), heads(attn.k_proj(x)), heads(attn.v_proj(x))
    z = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attn.out_proj(z.transpose(1, 2).flatten(2)), None


if __name__ == "__main__":
    app.run(main)
