"""Converts an optimiser's state between the trees of optax and the numbered tensors of PyTorch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from kvjax.converters.optimizer_groups import (
    Key,
    ParameterGroup,
    as_key,
    as_number,
    name_parameters,
)
from kvjax.converters.optimizer_settings import check_optimizer
from kvjax.converters.parameter_names import TOKEN_EMBEDDING, UNEMBEDDING, modern_name, torch_names
from kvjax.converters.to_flax import to_flax
from kvjax.converters.to_torch import to_torch

from kvjax.config.run import ModelConfig
from kvjax.config.train import AdamWConfig, OptimizationConfig, SGDConfig
from kvjax.errors import unusable
from kvjax.model.params import Params


@dataclasses.dataclass(frozen=True)
class OptimizerState:
    """An optimiser's state after `count` steps.

    Attributes:
      count: steps taken.
      accumulators: what the config's `accumulators` names, each shaped like the parameters.
      groups: the optimiser's parameter groups; none if it has one, which numbers the parameters as `state_dict` does.
    """

    count: int
    accumulators: Mapping[str, Params]
    groups: tuple[ParameterGroup, ...] = ()


def to_torch_optimizer(
    state: OptimizerState, params: Params, optimization: OptimizationConfig, learning_rate: float
) -> dict[str, Any]:
    """Converts a state to what `load_state_dict` of the same optimiser of `torch.optim` reads.

    PyTorch numbers parameters in the order of `Module.parameters()`, where a tied unembedding has no number of its own.
    Other groups are numbered as the file that training went on from had them, and hold the parameters' names.
    """
    tensors = {name: to_torch(state.accumulators[name]) for name in optimization.accumulators}
    groups = state.groups or (ParameterGroup(tuple(_names(params))),)
    entries, written, first = {}, [], 0
    for group in groups:
        numbers = range(first, first + len(group.names))
        first = numbers.stop
        for number, name in zip(numbers, group.names, strict=True):
            step = {"step": torch.tensor(float(state.count))} if isinstance(optimization, AdamWConfig) else {}
            if entry := step | {kind: of[name] for kind, of in tensors.items()}:
                entries[number] = entry
        written.append(
            _group_settings(optimization, learning_rate, optimization.weight_decay if group.decays else 0.0)
            | {"params": list(numbers)}
            | ({"param_names": list(group.names)} if state.groups else {})
        )
    return {"state": entries, "param_groups": written}


def _group_settings(optimization: OptimizationConfig, learning_rate: float, weight_decay: float) -> dict[str, Any]:
    """Lists a group's settings in PyTorch's order."""
    match optimization:
        case AdamWConfig():
            return {
                "lr": learning_rate,
                "betas": (optimization.beta1, optimization.beta2),
                "eps": optimization.eps,
                "weight_decay": weight_decay,
                "amsgrad": False,
                "maximize": False,
                "foreach": None,
                "capturable": False,
                "differentiable": False,
                "fused": None,
                "decoupled_weight_decay": True,
            }
        case SGDConfig():
            return {
                "lr": learning_rate,
                "momentum": optimization.momentum,
                "dampening": 0,
                "weight_decay": weight_decay,
                "nesterov": optimization.nesterov,
                "maximize": False,
                "foreach": None,
                "differentiable": False,
                "fused": None,
            }


def from_torch_optimizer(
    state: Mapping[str, Any],
    params: Params,
    model: ModelConfig,
    vocab_size: int,
    *,
    names: Iterable[str],
    optimization: OptimizationConfig,
    learning_rates: Sequence[float],
    step: int,
    where: object,
) -> OptimizerState:
    """Converts a PyTorch state of a config's optimiser to that of the given parameters.

    Args:
      state: what the optimiser's `state_dict()` returned, its tensors as NumPy arrays.
      params: the parameters.
      model: the model's sizes.
      vocab_size: number of tokens of the benchmark.
      names: of the tensors of `model_state`, in its order, which is that of the optimiser's numbers.
      optimization: the settings that training goes on with.
      learning_rates: those that a file of this step may hold, before and after its scheduler's step.
      step: of the checkpoint; the count of SGD, which records none.
      where: the file, for messages.

    Raises:
      InputError: the state is of another optimiser or a model of another shape, has other settings, or is damaged.
    """
    entries, groups = _entries(state, where), state.get("param_groups")
    decays = check_optimizer(groups, entries, optimization, learning_rates, where=where)
    kinds = optimization.accumulators
    expected = {name: parameter.torch_shape(model, vocab_size) for name, parameter in _parameters(params)}
    if not kinds:
        _check_empty(entries, where)
    arrays = {key: {kind: _array(entry, kind, key, where) for kind in kinds} for key, entry in entries.items()}
    name_of = name_parameters(
        groups,
        decays,
        _once_each(names, tied="unembedding" not in params),
        {key: of[kinds[0]].shape for key, of in arrays.items()} if kinds else None,
        expected,
        where=where,
    )
    trees = {}
    for kind in kinds:
        named = {
            name: _accumulator(arrays[key][kind], kind, name, expected[name], where) for key, name in name_of.items()
        }
        trees[kind] = _tree(named, model, vocab_size, where)
    count = _count(entries, where) if isinstance(optimization, AdamWConfig) else step
    return OptimizerState(count, trees, _groups(groups, decays, name_of, _names(params)))


def undecayed_paths(groups: Iterable[ParameterGroup], n_layers: int, *, where: object) -> frozenset[tuple[str, ...]]:
    """Finds the Flax paths of the parameters without weight decay.

    Raises:
      InputError: a parameter decays in some layers only; layers are stacked here, and decay together.
    """
    undecayed = {name for group in groups if not group.decays for name in group.names}
    layers: dict[tuple[str, ...], list[bool]] = {}
    for name, parameter, _ in torch_names(n_layers):
        if parameter is not UNEMBEDDING:
            layers.setdefault(parameter.flax, []).append(name in undecayed)
    for path, of_layers in layers.items():
        if len(set(of_layers)) > 1:
            found = f"decay in {of_layers.count(False)} of {len(of_layers)}"
            raise unusable(where, f"weight decay of {'.'.join(path)} in all layers or in none", found)
    return frozenset(path for path, of_layers in layers.items() if of_layers[0])


def _entries(state: Mapping[str, Any], where: object) -> dict[Key, Mapping[str, Any]]:
    entries = state.get("state")
    if not isinstance(entries, dict):
        raise unusable(where, "an optimizer state with a mapping of parameters", type(entries).__name__)
    for key, entry in entries.items():
        if not isinstance(entry, dict):
            raise unusable(where, f"a mapping as the optimizer's state of parameter {key}", type(entry).__name__)
    return {as_key(key): entry for key, entry in entries.items()}


def _check_empty(entries: Mapping[Key, Mapping[str, Any]], where: object) -> None:
    """Refuses a state with anything in it; older PyTorch writes None for what it does not keep."""
    if kept := sorted({name for entry in entries.values() for name, value in entry.items() if value is not None}):
        raise unusable(where, "nothing kept of a parameter, as SGD without momentum does", ", ".join(kept))


def _array(entry: Mapping[str, Any], kind: str, key: Key, where: object) -> np.ndarray:
    array = entry.get(kind)
    if not isinstance(array, np.ndarray):
        found = "none" if array is None else type(array).__name__
        raise unusable(where, f"a tensor {kind} of parameter {key}, as the optimizer keeps one", found)
    return array


def _accumulator(array: np.ndarray, kind: str, name: str, shape: tuple[int, ...], where: object) -> np.ndarray:
    if array.shape != shape:
        raise unusable(where, f"{kind} of {name} of shape {list(shape)}", list(array.shape))
    if not np.issubdtype(array.dtype, np.floating):
        raise unusable(where, f"{kind} of {name} as real numbers", array.dtype)
    with np.errstate(over="ignore"):  # too large for float32: found below
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise unusable(where, f"finite numbers in {kind} of {name}", f"{int((~np.isfinite(array)).sum())} others")
    if kind == "exp_avg_sq" and (array < 0).any():
        raise unusable(where, f"no negative number in {kind} of {name}", f"{int((array < 0).sum())}")
    return array


def _count(entries: Mapping[Key, Mapping[str, Any]], where: object) -> int:
    """Reads how many steps the optimiser took; all parameters took the same."""
    counts = set()
    for key, entry in entries.items():
        count = as_number(entry.get("step"))
        if count is None or not math.isfinite(count) or count < 0 or count != int(count):
            raise unusable(
                where, f"a whole number of steps of parameter {key} in the optimizer", repr(entry.get("step"))
            )
        counts.add(int(count))
    if len(counts) != 1:
        found = ", ".join(map(str, sorted(counts)[:3]))
        raise unusable(where, "one number of steps for all parameters in the optimizer", found)
    return counts.pop()


def _groups(
    groups: Sequence[Mapping[str, Any]], decays: Sequence[bool], name_of: Mapping[Key, str], usual: Sequence[str]
) -> tuple[ParameterGroup, ...]:
    named = tuple(
        ParameterGroup(tuple(name_of[as_key(key)] for key in group["params"]), of_group)
        for group, of_group in zip(groups, decays, strict=True)
    )
    return () if named == (ParameterGroup(tuple(usual)),) else named


def _tree(arrays: dict[str, np.ndarray], model: ModelConfig, vocab_size: int, where: object) -> Params:
    tied = UNEMBEDDING.torch not in arrays
    if tied:
        arrays = {**arrays, UNEMBEDDING.torch: arrays[TOKEN_EMBEDDING.torch]}
    return to_flax(arrays, model, vocab_size, where=where)


def _once_each(names: Iterable[str], *, tied: bool) -> list[str]:
    """Lists the names of parameters; tied ones once, where the first of them stands."""
    listed = [TOKEN_EMBEDDING.torch if tied and modern_name(name) == UNEMBEDDING.torch else name for name in names]
    return list(dict.fromkeys(listed))


def _names(params: Params) -> list[str]:
    return [name for name, _ in _parameters(params)]


def _parameters(params: Params) -> list[tuple[str, Any]]:
    tied = "unembedding" not in params
    n_layers = len(params["blocks"]["ln_1"]["scale"])
    return [(name, part) for name, part, _ in torch_names(n_layers) if not (tied and part is UNEMBEDDING)]
