"""Times a training step against eager PyTorch, and many seeds as one program against one after another.

    python -m benchmarks.train

Reference shape and batch (3 layers, D 128, batch 128, 56 tokens): the same step on both sides — forward, backward,
clipping, AdamW — in the same process on the same cores or GPU.
"""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags
from kvjax.converters.to_torch import to_torch
from kvjax.converters.torch_decoder import TorchAttention, TorchDecoder

from benchmarks.reporting import machine, median_seconds, torch_device, write_result
from kvjax.config.files import find_config, read_config
from kvjax.config.train import InitializedModelConfig, TrainConfig
from kvjax.devices import share_cpu_cores
from kvjax.model.decoder import DecoderConfig
from kvjax.train.schedule import Hyperparameters, make_optimizer
from kvjax.train.trainer import TrainState, batch_indices, initial_params, plan_training, start_training, train_segment

FLAGS = flags.FLAGS
flags.DEFINE_integer("steps", 10, "Steps per timed segment.", lower_bound=1)
flags.DEFINE_integer("repeats", 5, "Timed segments; the median is reported.", lower_bound=1)
flags.DEFINE_integer("seeds", 8, "Seeds trained as one program, against as many one after another.", lower_bound=2)

VOCAB, LENGTH, RECORDS = 146, 56, 2048


def main(argv: list[str]) -> None:
    del argv
    share_cpu_cores()
    config = read_config(find_config("symbolic_kv_formation", "train"), TrainConfig)
    tokens = np.random.default_rng(0).integers(1, VOCAB, (RECORDS, LENGTH)).astype(np.int32)
    device, theirs, torch_loss = torch_device(), {}, None
    if device is not None:
        theirs["attention written out"], torch_loss = _torch_seconds_per_step(config, tokens, device, fused=False)
        theirs["fused attention"], _ = _torch_seconds_per_step(config, tokens, device, fused=True)
    one, compile_one, our_loss = _our_seconds_per_step(config, tokens, 1)
    many, compile_many, _ = _our_seconds_per_step(config, tokens, FLAGS.seeds)
    result = {
        "what": "one training step: forward, backward, clipping, AdamW",
        "machine": machine(),
        "batch_size": config.batch_size,
        "tokens_per_record": LENGTH,
        "kvjax_seconds_per_step": one,
        "kvjax_compile_seconds": compile_one,
        "torch_seconds_per_step": theirs,
        "ratio_to_fastest_torch": min(theirs.values()) / one if theirs else None,
        "first_losses": {"kvjax": our_loss, "torch": torch_loss},
        "seeds": FLAGS.seeds,
        "seconds_per_step_of_all_seeds_as_one_program": many,
        "compile_seconds_as_one_program": compile_many,
        "ratio_to_one_after_another": FLAGS.seeds * one / many,
    }
    path = write_result("train", result)
    print(f"kvjax   {one * 1e3:8.1f} ms per step (compile {compile_one:.1f} s, once)")
    for name, seconds in theirs.items():
        print(f"PyTorch {seconds * 1e3:8.1f} ms per step, {name} ({seconds / one:.2f}x)")
    print(f"first losses: kvjax {our_loss:.5f}, PyTorch {torch_loss}")
    print(f"{FLAGS.seeds} seeds as one program: {many * 1e3:.1f} ms per step of all ({FLAGS.seeds * one / many:.2f}x)")
    print(path)


def _model(config: TrainConfig) -> tuple[InitializedModelConfig, DecoderConfig]:
    return config.model, DecoderConfig.from_model_config(config.model, VOCAB)


def _our_seconds_per_step(config: TrainConfig, tokens: np.ndarray, seeds: int) -> tuple[float, float, float]:
    """Measures seconds per step of all seeds, compile seconds, and the first loss of the first seed."""
    model, decoder = _model(config)
    program = plan_training(
        decoder,
        batch_size=config.batch_size,
        length=LENGTH,
        backend=jax.default_backend(),
        num_runs=seeds,
        num_devices=jax.local_device_count(),
    )
    params = [initial_params(model, decoder, seed) for seed in range(seeds)]
    hyper = Hyperparameters.of(config.optimization, config.num_steps)
    states = [TrainState(p, make_optimizer(hyper).init(p)) for p in params]
    indices = np.stack(
        [batch_indices(s, 1, FLAGS.steps, num_records=RECORDS, batch_size=config.batch_size) for s in range(seeds)]
    )
    hypers, states, tokens = start_training(program, [hyper] * seeds, states, tokens)
    start = time.perf_counter()
    states, metrics = train_segment(program, hypers, states, tokens, indices, jnp.asarray(1))
    loss = float(metrics.loss[0, 0])
    first = time.perf_counter() - start

    def segment():
        nonlocal states
        states, metrics = train_segment(program, hypers, states, tokens, indices, jnp.asarray(1))
        return metrics.loss

    seconds = median_seconds(segment, FLAGS.repeats)
    return seconds / FLAGS.steps, first - seconds, loss


def _torch_seconds_per_step(
    config: TrainConfig, tokens: np.ndarray, device: torch.device, *, fused: bool
) -> tuple[float, float]:
    """Measures seconds per step and the first loss, from the same initial weights on the same batches.

    With `fused`, attention is PyTorch's own fused kernel; the batches have no padding, so a causal mask suffices.
    """
    model, decoder = _model(config)
    module = TorchDecoder(model, VOCAB).to(device)
    module.lm_head.weight = module.token_embedding.weight
    module.load_state_dict(to_torch(initial_params(model, decoder, 0)))
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
    indices = batch_indices(0, 1, FLAGS.steps, num_records=RECORDS, batch_size=config.batch_size)
    batches = [torch.from_numpy(tokens[rows].astype(np.int64)).to(device) for rows in indices]
    losses = []

    def segment() -> None:
        for batch in batches:
            logits = module(batch)[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=0)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), settings.grad_clip_norm)
            optimizer.step()
            losses.append(loss.item())

    segment()
    return median_seconds(segment, FLAGS.repeats) / FLAGS.steps, losses[0]


def _fused_attention(attn: TorchAttention, x: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None]:
    def heads(projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (attn.n_heads, -1)).transpose(1, 2)

    q, k, v = heads(attn.q_proj(x)), heads(attn.k_proj(x)), heads(attn.v_proj(x))
    z = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attn.out_proj(z.transpose(1, 2).flatten(2)), None


if __name__ == "__main__":
    app.run(main)
