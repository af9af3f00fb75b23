"""Optimizers of PyTorch after a few steps on a small model, and their states read back as a resume does."""

from __future__ import annotations

import torch
from kvjax.converters.optimizer_state import from_torch_optimizer
from kvjax.converters.to_flax import to_flax
from kvjax.converters.torch_checkpoint import read_checkpoint
from kvjax.converters.torch_decoder import TorchDecoder

from kvjax.config.run import ModelConfig
from kvjax.config.train import AdamWConfig

MODEL = ModelConfig(d_model=8, n_layers=2, n_heads=2, d_ff=12, max_seq_len=10)
VOCAB, STEPS, RATE, DECAY = 15, 3, 1e-2, 0.1
CONFIG = AdamWConfig(learning_rate=RATE, weight_decay=DECAY, beta1=0.9, beta2=0.95)
ADAMW = {"lr": RATE, "betas": (0.9, 0.95), "weight_decay": DECAY}


def tied_module():
    torch.manual_seed(0)
    module = TorchDecoder(MODEL, VOCAB)
    module.lm_head.weight = module.token_embedding.weight
    return module


def step(module, optimizer):
    """Takes a step along random gradients; returns them by name."""
    gradients = {}
    for name, parameter in module.named_parameters():
        parameter.grad = gradients[name] = torch.randn_like(parameter)
    optimizer.step()
    return gradients


def trained(groups, optimizer_class=torch.optim.AdamW, settings=ADAMW, **options):
    """Returns a module and an optimizer of its parameters after a few steps."""
    module = tied_module()
    optimizer = optimizer_class(groups(module), **(settings | options))
    for _ in range(STEPS):
        step(module, optimizer)
    return module, optimizer


def read(tmp_path, module, state, optimization=CONFIG, rate=RATE):
    """Reads a state from a file as a resume does."""
    path = tmp_path / "step_000003.pt"
    torch.save({"step": STEPS, "model_state": module.state_dict(), "optimizer_state": state}, path)
    checkpoint = read_checkpoint(path)
    params = to_flax(checkpoint.state, MODEL, VOCAB, where=path)
    return params, from_torch_optimizer(
        checkpoint.optimizer_state,
        params,
        MODEL,
        VOCAB,
        names=checkpoint.state,
        optimization=optimization,
        learning_rates=[rate],
        step=STEPS,
        where=path,
    )


def by_rule(decays, *, decayed_first=True, ordered=list, named=False):
    """Returns a maker of two groups, one that decays and one that does not."""

    def groups(module):
        parameters = dict(module.named_parameters())
        made = []
        for side in (decayed_first, not decayed_first):
            names = ordered([name for name, parameter in parameters.items() if decays(name, parameter) is side])
            listed = [(name, parameters[name]) for name in names]
            made.append(
                {
                    "params": listed if named else [parameter for _, parameter in listed],
                    "weight_decay": DECAY if side else 0.0,
                }
            )
        return made

    return groups


def is_matrix(name, parameter):
    return parameter.ndim >= 2


def is_linear_weight(name, parameter):
    return parameter.ndim >= 2 and "embedding" not in name


GROUPS = {
    "one": lambda module: module.parameters(),
    "one, named": lambda module: module.named_parameters(),
    "one, named in another order": lambda module: list(module.named_parameters())[::-1],
    "matrices decay": by_rule(is_matrix),
    "matrices decay, second": by_rule(is_matrix, decayed_first=False),
    "linear weights decay, sorted": by_rule(is_linear_weight, ordered=sorted),
    "no embedding decays": by_rule(lambda name, _: "embedding" not in name),
    "no norm decays": by_rule(lambda name, _: "norm" not in name and "ln_" not in name),
    "anything decays, named": by_rule(lambda name, _: "attn" in name, named=True, ordered=lambda n: n[::-1]),
}


def with_first(value):
    """Returns a change of a tensor that sets its first number."""

    def change(tensor):
        changed = tensor.clone()
        changed.view(-1)[0] = value
        return changed

    return change
