"""Reads which optimiser of PyTorch a file's state is of, and whether its settings are a config's."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from kvjax.converters.optimizer_groups import Key, as_number

from kvjax.config.train import AdamWConfig, OptimizationConfig, SGDConfig
from kvjax.errors import note, unusable

# What only one optimiser's groups or states have; Adam and AdamW have none of it. ASGD has an alpha as well.
_OTHER_GROUPS = {
    "momentum_decay": "NAdam",
    "ns_steps": "Muon",
    "dampening": "SGD",
    "lambd": "ASGD",
    "etas": "Rprop",
    "rho": "Adadelta",
    "lr_decay": "Adagrad",
    "beta2_decay": "Adafactor",
    "alpha": "RMSprop",
    "correct_bias": "the AdamW of transformers, which decays after the update",
    "bias_correction": "a fused Adam of apex or DeepSpeed",
}
_OTHER_STATES = {
    "mu_product": "NAdam",
    "exp_inf": "Adamax",
    "momentum_buffer": "SGD or Muon",
    "acc_delta": "Adadelta",
    "square_avg": "RMSprop",
    "row_var": "Adafactor",
    "max_exp_avg_sq": "AdamW with amsgrad",
}


def check_optimizer(
    groups: object,
    entries: Mapping[Key, Mapping[str, Any]],
    optimization: OptimizationConfig,
    learning_rates: Sequence[float],
    *,
    where: object,
) -> list[bool]:
    """Checks that groups are of a config's optimiser, with the config's settings.

    A learning rate that differs is noted: the config's schedule goes on.

    Args:
      groups: `param_groups`.
      entries: `state`.
      optimization: the config's settings.
      learning_rates: those that a file of this step may hold, before and after its scheduler's step.
      where: the file, for messages.

    Returns:
      For each group, whether it decays.

    Raises:
      InputError: it is another optimiser, or one with other settings.
    """
    if not isinstance(groups, list) or not groups or not all(isinstance(group, dict) for group in groups):
        found = "none" if groups is None or (isinstance(groups, list) and not groups) else type(groups).__name__
        raise unusable(where, "param_groups of an optimizer", found)
    match optimization:
        case AdamWConfig():
            name, other, check = "AdamW", _other_than_adamw(groups, entries), _check_adamw
        case SGDConfig():
            name, other, check = "SGD", _other_than_sgd(groups, entries), _check_sgd
    if other:
        raise unusable(where, f"the state of {name}, which is what training goes on with", other)
    for group in groups:
        check(group, optimization, where)
    rates = [_number(group, "lr", where) for group in groups]
    if any(not math.isclose(rate, rates[0], rel_tol=1e-6) for rate in rates):
        raise unusable(where, "one learning rate for all parameters", f"lr {', '.join(f'{r:g}' for r in rates)}")
    if not any(math.isclose(rates[0], rate, rel_tol=1e-3, abs_tol=1e-12) for rate in learning_rates):
        note(f"{where}: its lr is {rates[0]:g}; training goes on with the config's {learning_rates[-1]:g}")
    if name == "AdamW" and optimization.weight_decay and any("decoupled_weight_decay" not in group for group in groups):
        note(f"{where}: older PyTorch does not record if weight decay is AdamW's or Adam's L2; taken as AdamW's")
    return [_decays(group, optimization, where) for group in groups]


def _other_than_adamw(groups: Sequence[Mapping[str, Any]], entries: Mapping[Key, Mapping[str, Any]]) -> str | None:
    """Names the optimiser if it is not AdamW, or does other things than this project's."""
    for group in groups:
        if other := _named_by(_OTHER_GROUPS, group):
            return other
        if "betas" not in group:
            return f"an optimizer without betas ({_some_of(group)})"
        if "amsgrad" not in group:
            return "RAdam, or another optimizer whose param_groups have no amsgrad"
        for option in ("amsgrad", "maximize"):
            if _is_on(group, option):
                return f"AdamW with {option}"
        if group.get("decoupled_weight_decay") is False and as_number(group.get("weight_decay")) != 0.0:
            return f"Adam with weight decay {group.get('weight_decay')} as L2, which is not AdamW's"
    return _named_by_states(entries, {"step", "exp_avg", "exp_avg_sq"})


def _other_than_sgd(groups: Sequence[Mapping[str, Any]], entries: Mapping[Key, Mapping[str, Any]]) -> str | None:
    """Names the optimiser if it is not SGD, or does other things than this project's."""
    for group in groups:
        if other := _named_by(_OTHER_GROUPS, group, but="dampening"):
            return other
        if "betas" in group:
            return "AdamW, or another optimizer with betas"
        if "dampening" not in group:
            return f"an optimizer without dampening, which SGD's groups have ({_some_of(group)})"
        if as_number(group["dampening"]) != 0.0:
            return f"SGD with dampening {group['dampening']}"
        if _is_on(group, "maximize"):
            return "SGD with maximize"
    return _named_by_states(entries, {"momentum_buffer"})


def _named_by_states(entries: Mapping[Key, Mapping[str, Any]], known: set[str]) -> str | None:
    """Names the optimiser by what only it keeps of a parameter; None if it keeps nothing but what is known."""
    for entry in entries.values():
        if unknown := set(entry) - known:
            keeps = f"an optimizer that also keeps {', '.join(sorted(map(str, unknown))[:3])}"
            return _named_by(_OTHER_STATES, unknown) or keeps
    return None


def _named_by(marks: Mapping[str, str], names: Collection[Any], *, but: str | None = None) -> str | None:
    return next((optimizer for mark, optimizer in marks.items() if mark in names and mark != but), None)


def _some_of(group: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, group))[:6])


def _is_on(group: Mapping[str, Any], option: str) -> bool:
    return not (group.get(option) is None or group.get(option) is False)


def _check_adamw(group: Mapping[str, Any], optimization: AdamWConfig, where: object) -> None:
    betas = group["betas"]
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise unusable(where, "two betas", betas)
    _check_number("beta1", optimization.beta1, as_number(betas[0]), where)
    _check_number("beta2", optimization.beta2, as_number(betas[1]), where)
    _check_number("eps", optimization.eps, _number(group, "eps", where), where)


def _check_sgd(group: Mapping[str, Any], optimization: SGDConfig, where: object) -> None:
    _check_number("momentum", optimization.momentum, _number(group, "momentum", where), where)
    if group.get("nesterov") is not optimization.nesterov:
        ours = json.dumps(optimization.nesterov)
        expected = f"nesterov {ours} as in the config (or set optimization.nesterov)"
        raise unusable(where, expected, repr(group.get("nesterov")))


def _check_number(name: str, ours: float, theirs: float | None, where: object) -> None:
    if theirs is None or not math.isclose(ours, theirs, rel_tol=1e-6):
        raise unusable(where, f"{name} {ours:g} as in the config (or set optimization.{name})", theirs)


def _decays(group: Mapping[str, Any], optimization: OptimizationConfig, where: object) -> bool:
    ours, theirs = optimization.weight_decay, _number(group, "weight_decay", where)
    if math.isclose(ours, theirs, rel_tol=1e-6):
        return True
    if theirs != 0.0:
        raise unusable(where, f"weight_decay {ours:g} as in the config (or set optimization.weight_decay)", theirs)
    return False


def _number(group: Mapping[str, Any], name: str, where: object) -> float:
    value = as_number(group.get(name))
    if value is None or not math.isfinite(value):
        raise unusable(where, f"a number as {name} of an optimizer's group", repr(group.get(name)))
    return value
