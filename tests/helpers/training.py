"""Trainings small enough for a test."""

from __future__ import annotations

from typing import Any

import jax
import torch

from kvjax.config.train import TrainConfig
from tests.helpers.building import SMALL_MODEL

SGD = {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 1e-3, "momentum": 0.9, "grad_clip_norm": 1.0}


def small_train_config(benchmark: object, **changes: Any) -> TrainConfig:
    """Returns the config of a training that takes about a second."""
    document = {
        "run_name": "trained",
        "seed": 3,
        "device": "mps",
        "benchmark_dir": str(benchmark),
        "output_dir": "unused",
        "batch_size": 24,
        "num_steps": 24,
        "log_every_steps": 2,
        "eval_every_steps": 8,
        "checkpoint_every_steps": 8,
        "num_workers": 0,
        "model": SMALL_MODEL,
        "optimization": {
            "learning_rate": 3e-3,
            "weight_decay": 0.01,
            "beta1": 0.9,
            "beta2": 0.95,
            "grad_clip_norm": 1.0,
            "warmup_steps": 4,
            "schedule": {"kind": "constant"},
        },
        "evaluation": {
            "batch_size": 8,
            "tracked_splits": ["validation_iid", "heldout_pairs"],
            "birth_thresholds": {"answer_accuracy": 0.9, "q": 0.2, "r": 0.2, "w": 1.0},
        },
        "checkpointing": {"best_checkpoint_split": "validation_iid"},
    }
    return TrainConfig.model_validate(document | changes)


class Kept:
    """Keeps what a run's training hands out."""

    def __init__(self):
        self.rows, self.saved, self.diverged = [], {}, None

    def log(self, row):
        self.rows.append(row)

    def save(self, step, params, accumulators, evaluations):
        self.saved[step] = jax.tree.leaves((params, accumulators))

    def diverge(self, step, loss):
        self.diverged = step


def torch_step(module, optimizer, sequences):
    """Takes one training step in PyTorch and returns its loss."""
    longest = max(map(len, sequences))
    batch = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
    logits = module(batch)[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), ignore_index=0)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    return loss.item()
