"""Converts AdamW's state between optax, where moments are trees, and PyTorch, where they are numbered tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from kvjax.converters.parameter_names import UNEMBEDDING, torch_names
from kvjax.converters.to_flax import to_flax
from kvjax.converters.to_torch import to_torch

from kvjax.config.run import ModelConfig
from kvjax.config.train import OptimizationConfig
from kvjax.errors import unusable
from kvjax.model.decoder import Params


@dataclasses.dataclass(frozen=True)
class AdamMoments:
    """AdamW's state after `count` steps: first and second moments, shaped like the parameters."""

    count: int
    mu: Params
    nu: Params


def to_torch_optimizer(moments: AdamMoments, optimization: OptimizationConfig, learning_rate: float) -> dict[str, Any]:
    """Converts moments to the state that `torch.optim.AdamW.load_state_dict` reads.

    PyTorch numbers parameters in the order of `Module.parameters()`, where a tied unembedding has no number of its own.
    """
    first, second = to_torch(moments.mu), to_torch(moments.nu)
    names = _numbered_names(moments.mu)
    return {
        "state": {
            index: {
                "step": torch.tensor(float(moments.count)),
                "exp_avg": first[name],
                "exp_avg_sq": second[name],
            }
            for index, name in enumerate(names)
        },
        "param_groups": [
            {
                "lr": learning_rate,
                "betas": (optimization.beta1, optimization.beta2),
                "eps": 1e-8,
                "weight_decay": optimization.weight_decay,
                "amsgrad": False,
                "maximize": False,
                "foreach": None,
                "capturable": False,
                "differentiable": False,
                "fused": None,
                "decoupled_weight_decay": True,
                "params": list(range(len(names))),
            }
        ],
    }


def from_torch_optimizer(
    state: Mapping[str, Any], params: Params, model: ModelConfig, vocab_size: int, *, where: object
) -> AdamMoments:
    """Converts a PyTorch AdamW state, its tensors as NumPy arrays, to the moments of the given parameters.

    Raises:
      InputError: the state is no AdamW state of a model of this shape.
    """
    names = _numbered_names(params)
    try:
        numbered = [state["state"][index] for index in range(len(names))]
        counts = {int(entry["step"]) for entry in numbered}
        moments = {
            kind: {name: np.asarray(entry[kind], np.float32) for name, entry in zip(names, numbered, strict=True)}
            for kind in ("exp_avg", "exp_avg_sq")
        }
        extra = len(state["state"]) - len(names)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise unusable(where, f"the AdamW state of {len(names)} parameters", repr(error)) from None
    if extra or len(counts) != 1:
        raise unusable(where, f"the AdamW state of {len(names)} parameters at one step", f"{extra} more, {counts}")
    trees = [_moments_tree(moments[kind], model, vocab_size, where) for kind in ("exp_avg", "exp_avg_sq")]
    return AdamMoments(counts.pop(), *trees)


def _moments_tree(moments: dict[str, np.ndarray], model: ModelConfig, vocab_size: int, where: object) -> Params:
    tied = UNEMBEDDING.torch not in moments
    if tied:
        moments = {**moments, UNEMBEDDING.torch: moments["token_embedding.weight"]}
    return to_flax(moments, model, vocab_size, where=where)


def _numbered_names(params: Params) -> list[str]:
    n_layers = len(params["blocks"]["ln_1"]["scale"])
    tied = "unembedding" not in params
    return [name for name, parameter, _ in torch_names(n_layers) if not (tied and parameter is UNEMBEDDING)]
