"""Converts AdamW's state between optax, where moments are trees, and PyTorch, where they are numbered tensors."""

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
    check_optimizer,
    name_parameters,
)
from kvjax.converters.parameter_names import TOKEN_EMBEDDING, UNEMBEDDING, modern_name, torch_names
from kvjax.converters.to_flax import to_flax
from kvjax.converters.to_torch import to_torch

from kvjax.config.run import ModelConfig
from kvjax.config.train import OptimizationConfig
from kvjax.errors import unusable
from kvjax.model.decoder import Params

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True)
class AdamMoments:
    """AdamW's state after `count` steps: first and second moments, shaped like the parameters.

    Attributes:
      count: steps taken.
      mu, nu: first and second moments.
      groups: the optimiser's parameter groups; none if it has one, which numbers the parameters as `state_dict` does.
    """

    count: int
    mu: Params
    nu: Params
    groups: tuple[ParameterGroup, ...] = ()


def to_torch_optimizer(moments: AdamMoments, optimization: OptimizationConfig, learning_rate: float) -> dict[str, Any]:
    """Converts moments to the state that `torch.optim.AdamW.load_state_dict` reads.

    PyTorch numbers parameters in the order of `Module.parameters()`, where a tied unembedding has no number of its own.
    Other groups are numbered as the file that training went on from had them, and hold the parameters' names.
    """
    first, second = to_torch(moments.mu), to_torch(moments.nu)
    groups = moments.groups or (ParameterGroup(tuple(_names(moments.mu))),)
    state, written = {}, []
    for group in groups:
        numbers = range(len(state), len(state) + len(group.names))
        for number, name in zip(numbers, group.names, strict=True):
            step = torch.tensor(float(moments.count))
            state[number] = {"step": step, "exp_avg": first[name], "exp_avg_sq": second[name]}
        written.append(
            {
                "lr": learning_rate,
                "betas": (optimization.beta1, optimization.beta2),
                "eps": optimization.eps,
                "weight_decay": optimization.weight_decay if group.decays else 0.0,
                "amsgrad": False,
                "maximize": False,
                "foreach": None,
                "capturable": False,
                "differentiable": False,
                "fused": None,
                "decoupled_weight_decay": True,
                "params": list(numbers),
                **({"param_names": list(group.names)} if moments.groups else {}),
            }
        )
    return {"state": state, "param_groups": written}


def from_torch_optimizer(
    state: Mapping[str, Any],
    params: Params,
    model: ModelConfig,
    vocab_size: int,
    *,
    names: Iterable[str],
    optimization: OptimizationConfig,
    learning_rates: Sequence[float],
    where: object,
) -> AdamMoments:
    """Converts a PyTorch AdamW state to the moments of the given parameters.

    Args:
      state: what `torch.optim.AdamW.state_dict()` returned, its tensors as NumPy arrays.
      params: the parameters.
      model: the model's sizes.
      vocab_size: number of tokens of the benchmark.
      names: of the tensors of `model_state`, in its order, which is that of the optimiser's numbers.
      optimization: the settings that training goes on with.
      learning_rates: those that a file of this step may hold, before and after its scheduler's step.
      where: the file, for messages.

    Raises:
      InputError: the state is no AdamW state of a model of this shape, has other settings, or is damaged.
    """
    entries, groups = _entries(state, where), state.get("param_groups")
    decays = check_optimizer(groups, entries, optimization, learning_rates, where=where)
    shapes = {name: parameter.torch_shape(model, vocab_size) for name, parameter in _parameters(params)}
    arrays = {key: {kind: _array(entry, kind, key, where) for kind in _MOMENTS} for key, entry in entries.items()}
    name_of = name_parameters(
        groups,
        decays,
        _once_each(names, tied="unembedding" not in params),
        {key: of["exp_avg"].shape for key, of in arrays.items()},
        shapes,
        where=where,
    )
    moments = {
        kind: {name: _moment(arrays[key][kind], kind, name, shapes[name], where) for key, name in name_of.items()}
        for kind in _MOMENTS
    }
    count = _count(entries, where)
    mu, nu = (_tree(moments[kind], model, vocab_size, where) for kind in _MOMENTS)
    return AdamMoments(count, mu, nu, _groups(groups, decays, name_of, _names(params)))


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


def _array(entry: Mapping[str, Any], kind: str, key: Key, where: object) -> np.ndarray:
    array = entry.get(kind)
    if not isinstance(array, np.ndarray):
        found = "none" if array is None else type(array).__name__
        raise unusable(where, f"a tensor {kind} of parameter {key}, as AdamW keeps one", found)
    return array


def _moment(array: np.ndarray, kind: str, name: str, shape: tuple[int, ...], where: object) -> np.ndarray:
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


def _tree(moments: dict[str, np.ndarray], model: ModelConfig, vocab_size: int, where: object) -> Params:
    tied = UNEMBEDDING.torch not in moments
    if tied:
        moments = {**moments, UNEMBEDDING.torch: moments[TOKEN_EMBEDDING.torch]}
    return to_flax(moments, model, vocab_size, where=where)


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
