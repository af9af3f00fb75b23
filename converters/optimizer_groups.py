"""Finds which parameter each number in a PyTorch optimiser's state is."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from kvjax.converters.inert_pickle import InertArray
from kvjax.converters.parameter_names import modern_name
from kvjax.converters.weights import WRAPPERS

from kvjax.errors import InputError, note, unusable

Key = int | str  # by which `state` holds a parameter's entry: its number, or its name


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Parameters that an optimiser treats alike.

    Attributes:
      names: their PyTorch names, in the order in which the optimiser numbers them.
      decays: whether the config's weight decay applies to them.
    """

    names: tuple[str, ...]
    decays: bool = True


def name_parameters(
    groups: Sequence[Mapping[str, Any]],
    decays: Sequence[bool],
    order: Sequence[str],
    shapes: Mapping[Key, tuple[int, ...]] | None,
    expected: Mapping[str, tuple[int, ...]],
    *,
    where: object,
) -> dict[Key, str]:
    """Finds which parameter each entry of an optimiser's state belongs to.

    Names in the groups decide. Without any, PyTorch numbers parameters in the order of `Module.parameters()`, which is
    that of `model_state`. Several groups are numbered one after the other. If one group decays and another does not,
    the shapes say which of the usual rules made them.

    Args:
      groups: `param_groups`.
      decays: whether each decays.
      order: names of the parameters as in `model_state`, each once.
      shapes: of what the optimiser keeps of each parameter, by its key in `state`; None if it keeps nothing.
      expected: the shape of each parameter, by current name.
      where: the file, for messages.

    Raises:
      InputError: numbers and parameters do not fit, or fit in several ways.
    """
    keys = [[as_key(key) for key in _listed(group, "params", where)] for group in groups]
    every = list(itertools.chain.from_iterable(keys))
    in_state = set(every if shapes is None else shapes)
    if len(set(every)) < len(every) or set(every) != in_state or len(every) != len(expected):
        found = f"{len(every)} in param_groups, {len(in_state)} in state"
        raise unusable(where, f"an optimizer state of {len(expected)} parameters", found)
    names = _recorded_names(groups, keys, where)
    if names is not None:
        resolved = [_known(name, expected, where) for name in names]
        if len(set(resolved)) < len(resolved):
            raise unusable(where, "each parameter once in param_names", f"{len(set(resolved))} different ones")
        return dict(zip(every, resolved, strict=True))
    candidates = {tuple(modern_name(name) for name in names): None for names in _numberings(keys, decays, order)}
    found = None if shapes is None else [shapes[key] for key in every]
    fitting = [names for names in candidates if found is None or [expected[name] for name in names] == found]
    if not fitting:
        _refuse_shapes(every, found, next(iter(candidates), ()), expected, where)
    if len(fitting) > 1:
        told = "param_names that tell its groups' parameters apart (give the optimizer named_parameters())"
        raise unusable(where, told, f"{len(fitting)} ways in which the shapes fit")
    if len(groups) > 1:
        note(f"{where}: the parameters of its {len(groups)} groups are told by their shapes, as it records no names")
    return dict(zip(every, fitting[0], strict=True))


def as_key(key: object) -> Key:
    """Converts a key of `state` to a number, also from text; a parameter's name stays as it is."""
    text = str(key)
    return int(text) if text.isdecimal() and text.isascii() and len(text) < 10 else text


def as_number(value: object) -> float | None:
    """Converts a plain number, or an array of one real number, to a float; None if it is neither."""
    value = value.array if isinstance(value, InertArray) else value
    if isinstance(value, np.ndarray):
        value = value.reshape(-1)[0] if value.size == 1 else None
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _listed(group: Mapping[str, Any], name: str, where: object) -> list[Any]:
    if not isinstance(group.get(name), list | tuple):
        raise unusable(where, f"a list of {name} in each of an optimizer's groups", type(group.get(name)).__name__)
    return list(group[name])


def _recorded_names(
    groups: Sequence[Mapping[str, Any]], keys: Sequence[Sequence[Key]], where: object
) -> list[str] | None:
    """Lists the parameters' names, if the groups have them; None if not."""
    if all(isinstance(key, str) for of_group in keys for key in of_group):
        return [str(key) for of_group in keys for key in of_group]
    if not all("param_names" in group for group in groups):
        return None
    names = [_listed(group, "param_names", where) for group in groups]
    if list(map(len, names)) != list(map(len, keys)):
        raise unusable(where, "as many param_names as params in each group", list(map(len, names)))
    return [str(name) for of_group in names for name in of_group]


def _known(name: str, expected: Mapping[str, Any], where: object) -> str:
    """Finds the parameter that a name means, whatever wraps the model."""
    plain = modern_name(".".join(part for part in name.split(".") if part not in WRAPPERS))
    for known in expected:
        if plain == known or plain.endswith(f".{known}"):
            return known
    if plain.endswith("lm_head.weight"):
        return "token_embedding.weight"  # the same tensor, if they are tied
    raise unusable(where, "param_names of this model", name)


def _numberings(keys: Sequence[Sequence[Key]], decays: Sequence[bool], order: Sequence[str]) -> list[list[str]]:
    """Lists the orders in which trainers number parameters: as they stand, or as a rule of decay sorts them."""
    sizes, numberings, sorted_by = list(map(len, keys)), [], [decays]
    if len(set(decays)) == 1:
        numberings.append(list(order))
        # Without any decay in the config, the groups of a rule look alike.
        sorted_by = [(True, False), (False, True)] if len(keys) == 2 else []
    rules: list[Callable[[str], bool]] = [
        lambda name: name.endswith(".weight") and not _of_norm(name),  # matrices, embeddings included
        lambda name: name.endswith(".weight") and not _of_norm(name) and not _of_embedding(name),
        lambda name: not name.endswith(".bias"),
        lambda name: not _of_norm(name),
        lambda name: not _of_embedding(name),
    ]
    for rule, listed, of_group in itertools.product(rules, (list(order), sorted(order)), sorted_by):
        sides = {side: iter([name for name in listed if rule(name) is side]) for side in (True, False)}
        taken = [list(itertools.islice(sides[side], size)) for side, size in zip(of_group, sizes, strict=True)]
        if list(map(len, taken)) == sizes and all(next(rest, None) is None for rest in sides.values()):
            numberings.append(list(itertools.chain.from_iterable(taken)))
    return numberings


def _of_norm(name: str) -> bool:
    return ".ln_" in name or "norm" in name


def _of_embedding(name: str) -> bool:
    return "embedding" in name


def _refuse_shapes(
    keys: Sequence[Key],
    found: Sequence[tuple[int, ...]],
    names: Sequence[str],
    expected: Mapping[str, tuple[int, ...]],
    where: object,
) -> None:
    """Raises the error about moments of no known numbering; it names the first that differs from the likeliest."""
    for key, shape, name in zip(keys, found, names, strict=False):
        if expected[name] != shape:
            raise unusable(where, f"moments of shape {list(expected[name])} for {name}", f"{list(shape)} (entry {key})")
    told = "groups that decay matrices alone, or param_names (give the optimizer named_parameters())"
    raise InputError(f"{where}: expected {told}; found groups of {len(keys)} parameters of no known rule")
