"""The trainer against PyTorch's AdamW and SGD, its data order, its schedules and its initial weights."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from kvjax.converters.to_torch import to_torch
from kvjax.converters.torch_decoder import TorchDecoder

from kvjax.config.train import AdamWConfig, InitializedModelConfig, ScheduleConfig, SGDConfig
from kvjax.model.decoder_config import DecoderConfig
from kvjax.train.schedule import Hyperparameters, learning_rate, make_optimizer
from kvjax.train.trainer import TrainState, batch_indices, initial_params, plan_training, start_training, train_segment
from tests.helpers.building import SMALL_MODEL

VOCAB, RECORDS, BATCH, LENGTH = 30, 21, 8, 14
MODEL = InitializedModelConfig.model_validate(SMALL_MODEL)
CONFIG = DecoderConfig.from_model_config(MODEL, VOCAB)
CONSTANT = AdamWConfig(learning_rate=3e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip_norm=1.0, warmup_steps=5)
COSINE = CONSTANT.model_copy(
    update={
        **{"learning_rate": 2e-3, "weight_decay": 0.3, "beta1": 0.8, "beta2": 0.99, "eps": 1e-6, "warmup_steps": 3},
        "grad_clip_norm": None,
        "schedule": CONSTANT.schedule.model_copy(
            update={"kind": "cosine_decay", "decay_start_step": 8, "decay_end_step": 16, "min_learning_rate": 1e-4}
        ),
    }
)
SGD = SGDConfig(optimizer="sgd", learning_rate=0.1, weight_decay=0.02, momentum=0.9, grad_clip_norm=1.0, warmup_steps=5)
SGD_COSINE = SGDConfig(
    optimizer="sgd", learning_rate=0.05, weight_decay=0.1, momentum=0.0, warmup_steps=3, schedule=COSINE.schedule
)
NESTEROV = [one.model_copy(update={"nesterov": True, "momentum": 0.8}) for one in (SGD, SGD_COSINE)]


def by_hand(optimization, step):
    """The learning rate of a 1-based step, in plain Python."""
    warmup = min(1.0, step / optimization.warmup_steps)
    schedule = optimization.schedule
    if schedule.kind == "constant" or step < schedule.decay_start_step:
        return optimization.learning_rate * warmup
    progress = min(1.0, (step - schedule.decay_start_step) / (schedule.decay_end_step - schedule.decay_start_step))
    floor = schedule.min_learning_rate
    return floor + (optimization.learning_rate - floor) * (1 + math.cos(math.pi * progress)) / 2


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCAB, (RECORDS, LENGTH)).astype(np.int32)
    for row in range(RECORDS):
        tokens[row, rng.integers(5, LENGTH + 1) :] = 0
    return tokens


def torch_optimizer(parameters, optimization):
    """Makes PyTorch's optimizer of a config."""
    shared = {"lr": optimization.learning_rate, "weight_decay": optimization.weight_decay}
    if isinstance(optimization, SGDConfig):
        return torch.optim.SGD(parameters, momentum=optimization.momentum, nesterov=optimization.nesterov, **shared)
    betas = (optimization.beta1, optimization.beta2)
    return torch.optim.AdamW(parameters, betas=betas, eps=optimization.eps, **shared)


def torch_losses(params, tokens, indices, optimization):
    """Trains in PyTorch, batches padded to their own longest record; returns losses, gradient norms and the module."""
    module = TorchDecoder(MODEL, VOCAB)
    module.lm_head.weight = module.token_embedding.weight
    module.load_state_dict(to_torch(params))
    optimizer = torch_optimizer(module.parameters(), optimization)
    max_norm = optimization.grad_clip_norm or math.inf  # which changes nothing, but returns the norm
    losses, norms = [], []
    for step, rows in enumerate(indices, start=1):
        optimizer.param_groups[0]["lr"] = by_hand(optimization, step)
        batch = tokens[rows[rows >= 0]]
        batch = torch.tensor(batch[:, : (batch != 0).sum(1).max()], dtype=torch.long)
        logits = module(batch)[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, module


@pytest.mark.parametrize(
    ("optimizations", "backend", "devices", "shared"),
    [
        ((CONSTANT, COSINE), "cpu", 1, "runs"),  # microbatches, one run after another
        ((CONSTANT, COSINE), "cpu", 2, "runs"),
        ((CONSTANT, COSINE), "cpu", 2, "batch"),
        ((CONSTANT, COSINE), "gpu", 1, "runs"),  # whole batches, runs side by side
        ((CONSTANT, COSINE), "gpu", 2, "batch"),
        ((SGD, SGD_COSINE), "cpu", 1, "runs"),
        ((SGD, SGD_COSINE), "gpu", 2, "batch"),
        (NESTEROV, "cpu", 2, "batch"),
        (NESTEROV, "gpu", 1, "runs"),
    ],
)
def test_twenty_steps(tokens, optimizations, backend, devices, shared):
    """Losses, gradient norms, rates and weights of 20 steps of runs with other settings equal PyTorch's."""
    seeds = (3, 4)
    program = plan_training(
        CONFIG,
        batch_size=BATCH,
        length=450 if backend == "cpu" else LENGTH,
        backend=backend,
        num_runs=len(seeds) if shared == "runs" else 1,
        num_devices=devices,
    )
    assert (program.microbatches > 1) == (backend == "cpu")
    assert (program.devices, program.shared) == (devices, shared)
    params = [initial_params(MODEL, CONFIG, seed) for seed in seeds]
    draw = functools.partial(batch_indices, num_records=RECORDS, batch_size=BATCH)
    indices = np.stack([draw(seed, 1, 20) for seed in seeds])
    theirs = [torch_losses(p, tokens, *own) for p, *own in zip(params, indices, optimizations, strict=True)]
    hypers = [Hyperparameters.of(one, 20) for one in optimizations]
    states = [TrainState(p, make_optimizer(hyper).init(p)) for p, hyper in zip(params, hypers, strict=True)]
    hypers, state, on_devices = start_training(program, hypers, states, tokens)
    train_segment.clear_cache()
    segments = []
    for start in (0, 10):
        state, segment = train_segment(
            program, hypers, state, on_devices, indices[:, start : start + 10], jnp.asarray(start + 1)
        )
        segments.append(segment)
    assert train_segment._cache_size() == 1, "one program serves every segment"
    metrics = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *segments)
    for r, (losses, norms, module) in enumerate(theirs):
        np.testing.assert_allclose(metrics.loss[r], losses, rtol=1e-4)
        np.testing.assert_allclose(metrics.grad_norm[r], norms, rtol=1e-3)
        final = to_torch(jax.tree.map(lambda leaf, r=r: np.asarray(leaf[r]), state.params))
        for name, tensor in module.state_dict().items():
            if name.endswith("k_proj.bias") and optimizations[r].optimizer == "adamw":
                continue  # attention does not depend on it: its gradient is rounding noise, which Adam makes full steps
            np.testing.assert_allclose(final[name], tensor, rtol=1e-2, atol=2e-4, err_msg=name)
        rates = [by_hand(optimizations[r], step) for step in range(1, 21)]
        np.testing.assert_allclose(metrics.learning_rate[r], rates, rtol=1e-5)


@pytest.mark.parametrize(
    ("runs", "devices", "batch", "expected"),
    [
        (8, 4, 32, (4, "runs")),
        (1, 4, 32, (4, "batch")),
        (6, 4, 32, (4, "batch")),
        (6, 4, 9, (3, "runs")),
        (7, 8, 6, (7, "runs")),
        (1, 4, 18, (3, "batch")),
        (1, 4, 7, (1, "runs")),
        (3, 1, 32, (1, "runs")),
    ],
)
def test_sharing_among_devices(runs, devices, batch, expected):
    """Devices share runs or the batch, whichever employs most of them."""
    sizes = {"batch_size": batch, "length": 450, "num_runs": runs, "num_devices": devices}
    program = plan_training(CONFIG, backend="cpu", **sizes)
    assert (program.devices, program.shared) == expected
    assert batch % (program.parts * program.microbatches) == 0


@pytest.mark.parametrize("scale", [1e-8, 1.0, 100.0])
@pytest.mark.parametrize("max_norm", [None, 2e-6, 1.0])
@pytest.mark.parametrize("optimization", [CONSTANT, SGD, *NESTEROV[:1]], ids=["adamw", "sgd", "nesterov"])
def test_eps_and_clipping(scale, max_norm, optimization):
    """Gradients near Adam's eps of 1e-8, and norms near clipping's 1e-6, as in PyTorch."""
    settings = optimization.model_copy(update={"grad_clip_norm": max_norm, "warmup_steps": 0})
    gradients = scale * np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    parameter = torch.nn.Parameter(torch.ones(5))
    theirs = torch_optimizer([parameter], settings)
    ours, optimizer = jnp.ones(5), make_optimizer(Hyperparameters.of(settings, 100))
    state = optimizer.init(ours)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        if max_norm:
            torch.nn.utils.clip_grad_norm_([parameter], max_norm)
        theirs.step()
        updates, state = optimizer.update(jnp.asarray(gradient), state, ours)
        ours = optax.apply_updates(ours, updates)
    moved = parameter.detach().numpy() - 1
    np.testing.assert_allclose(np.asarray(ours) - 1, moved, rtol=1e-3, atol=1e-6)


def test_schedules_by_hand():
    """Learning rates of both schedules, by hand."""
    constant, cosine = (Hyperparameters.of(one, 100) for one in (CONSTANT, COSINE))
    assert np.isclose(learning_rate(constant, 1), 3e-3 / 5)
    assert np.isclose(learning_rate(constant, 100), 3e-3)
    assert np.isclose(learning_rate(cosine, 12), 1e-4 + (2e-3 - 1e-4) / 2)
    assert np.isclose(learning_rate(cosine, 50), 1e-4)
    whole = CONSTANT.model_copy(update={"schedule": ScheduleConfig(kind="cosine_decay")})
    # From the end of the warm-up, step 5, to the last step, 105, down to 0.
    hyper = Hyperparameters.of(whole, 105)
    assert np.isclose(learning_rate(hyper, 5), 3e-3)
    assert np.isclose(learning_rate(hyper, 55), 1.5e-3)
    assert np.isclose(learning_rate(hyper, 105), 0.0)


def test_batches_of_an_epoch():
    """An epoch visits each record once and keeps its partial batch."""
    rows = batch_indices(5, 1, 9, num_records=RECORDS, batch_size=BATCH)  # three epochs of 8, 8 and 5
    for epoch in range(3):
        seen = rows[3 * epoch : 3 * epoch + 3]
        assert sorted(seen[seen >= 0]) == list(range(RECORDS))
        assert (seen[2] >= 0).sum() == 5
    assert not np.array_equal(rows[:3], rows[3:6])


def test_batches_of_a_segment():
    """Batches depend on the seed and the step alone."""
    whole = batch_indices(5, 1, 20, num_records=RECORDS, batch_size=BATCH)
    np.testing.assert_array_equal(batch_indices(5, 12, 9, num_records=RECORDS, batch_size=BATCH), whole[11:])
    assert not np.array_equal(batch_indices(6, 1, 20, num_records=RECORDS, batch_size=BATCH), whole)


def test_initial_weights():
    """Initial weights are distributed as PyTorch's defaults."""
    wide = InitializedModelConfig.model_validate(
        SMALL_MODEL | {"d_model": 64, "d_ff": 256, "max_seq_len": 200, "init_scale": 2.0}
    )
    config = DecoderConfig.from_model_config(wide, 300)
    state = to_torch(initial_params(wide, config, 0))
    for name, bound in (("attn.q_proj", 64**-0.5), ("ff.fc_in", 64**-0.5), ("ff.fc_out", 256**-0.5)):
        for kind in ("weight", "bias"):
            drawn = np.concatenate([state[f"blocks.{i}.{name}.{kind}"].numpy().ravel() for i in range(3)])
            assert np.abs(drawn).max() <= 2 * bound
            assert np.isclose(drawn.std(), 2 * bound / 3**0.5, rtol=0.15), (name, kind)
    assert np.isclose(state["token_embedding.weight"].std(), 2.0, rtol=0.05)
    assert (state["final_norm.weight"] == 1).all() and (state["blocks.1.ln_1.bias"] == 0).all()
    torch.testing.assert_close(state["lm_head.weight"], state["token_embedding.weight"])
    other = to_torch(initial_params(wide, config, 1))
    assert not torch.equal(other["token_embedding.weight"], state["token_embedding.weight"])
