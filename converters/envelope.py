"""Reads what trainers put around a state dict: which weights to take, the step, the optimiser's state."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from kvjax.converters.inert_pickle import InertArray, Opaque
from kvjax.converters.plain_values import section
from kvjax.converters.saved_tensors import SavedTensor
from kvjax.converters.weights import (
    AVERAGED,
    AVERAGES_BESIDE,
    Weights,
    check_types,
    find_weights,
    is_average,
    tensors_of,
    with_tied_head,
)

from kvjax.errors import unusable

WHOLE_MODEL = "its file holds a whole model object: the tensors are read, its code is not"
NO_STEP = "its file records no step, so that the step in its name is taken"
SEVERAL_STEPS = "its file records several steps; the one that agrees with its name is taken"

_WEIGHT_NAMES = ("model_state", "model_state_dict", "state_dict", "model", "module", "network", "net", "weights")
# Lightning's averaging callbacks put the trained weights here, and the averages under `state_dict`.
_TRAINED_BESIDE_AVERAGES = "current_model_state"
_STEP_NAMES = (
    *("step", "global_step", "iter_num", "iteration", "iter", "train_step", "current_step", "num_updates"),
    *("global_steps", "step_count"),
)
_OPTIMIZER_NAMES = ("optimizer_state", "optimizer", "optimizer_state_dict")
_TYING_NAMES = (
    *("tied", "tie_weights", "tie_embeddings", "tied_embeddings", "tie_word_embeddings", "weight_tying"),
    *("tie_unembedding", "share_embeddings"),
)


@dataclasses.dataclass(frozen=True)
class Envelope:
    """A checkpoint's document, taken apart.

    Attributes:
      weights: the decoder's weights.
      beside: everything else of the document.
      notes: what a reader should know about them.
    """

    weights: Weights
    beside: Mapping[Any, Any]
    notes: tuple[str, ...]


def open_envelope(document: Any, where: object) -> Envelope:
    """Finds the weights in a checkpoint's document: under a usual name, or as the document itself.

    Raises:
      InputError: there are none, or several that differ (see also `find_weights`).
    """
    entries = tensors_of(document)
    if entries is None:
        name = getattr(document, "name", None)
        found = f"an object of {name} (nothing in it was executed)" if name else type(document).__name__
        raise unusable(where, "a checkpoint with step and model_state", found)
    if isinstance(document, Opaque) and "_modules" in (document.state or {}):
        return Envelope(find_weights(entries, where), {}, (WHOLE_MODEL,))
    named = {name: tensors_of(entries[name]) for name in entries if _may_hold_weights(name, entries[name])}
    if not named:
        bare = {name: value for name, value in entries.items() if _is_tensor(value) and name not in _STEP_NAMES}
        if not any("." in str(name) for name in bare):
            raise unusable(where, "a checkpoint with step and model_state", sorted(map(str, entries))[:6] or "nothing")
        return Envelope(find_weights(bare, where), {n: v for n, v in entries.items() if n not in bare}, ())
    name, weights, notes = _choose({name: find_weights(state, where) for name, state in named.items()}, where)
    if isinstance(entries[name], Opaque) and "_modules" in (entries[name].state or {}):
        notes = (*notes, WHOLE_MODEL)
    return Envelope(weights, {n: v for n, v in entries.items() if n not in named}, notes)


def usable_weights(envelope: Envelope, config: Mapping[str, Any], where: object) -> Weights:
    """Completes a tied model's weights, unless its recorded config says that it is not tied, and checks their types.

    Raises:
      InputError: weights are no floating-point numbers.
    """
    spec = section(config, "train_spec")
    sections = (config, section(config, "model"), section(config, "model_args"), spec, section(spec, "model"))
    untied = any(part.get(name) is False for part in sections for name in _TYING_NAMES)
    weights = envelope.weights if untied else with_tied_head(envelope.weights)
    return dataclasses.replace(weights, notes=(*weights.notes, *check_types(weights.state, where)))


def find_step(beside: Mapping[Any, Any], expected: int | None, where: object) -> tuple[int, tuple[str, ...]]:
    """Reads the training step of a checkpoint, and notes on it.

    Args:
      beside: the document without its weights.
      expected: the step in the file's name; None if there is none.
      where: the file, for messages.

    Raises:
      InputError: there is none, it is no whole number, or it is another one than the file's name says.
    """
    recorded = {}
    for name in _STEP_NAMES:
        if beside.get(name) is not None:
            step = _whole_number(beside[name])
            if step is None:
                raise unusable(where, f"a {name} that is a whole number", _shown(beside[name]))
            recorded[name] = step
    if not recorded and expected is None:
        raise unusable(where, f"a step ({', '.join(_STEP_NAMES[:3])}, …)", "none")
    if not recorded:
        return expected, (NO_STEP,)
    if expected is None or next(iter(recorded.values())) == expected:
        return next(iter(recorded.values())), ()
    if expected in recorded.values():
        return expected, (SEVERAL_STEPS,)
    listed = ", ".join(f"{name} {step}" for name, step in recorded.items())
    raise unusable(where, f"the checkpoint of step {expected}", listed)


def find_optimizer_state(beside: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Finds the optimiser's state under the names that trainers give it; empty if there is no mapping under them."""
    states = (beside.get(name) for name in _OPTIMIZER_NAMES)
    return next((state for state in states if isinstance(state, dict)), {})


def _may_hold_weights(name: Any, value: Any) -> bool:
    known = name in (*_WEIGHT_NAMES, _TRAINED_BESIDE_AVERAGES) or (isinstance(name, str) and is_average(name))
    entries = tensors_of(value) if known else None
    if entries is None:
        return False
    return name.startswith(("model_state", "state_dict")) or any(map(_is_tensor, entries.values()))


def _choose(found: Mapping[str, Weights], where: object) -> tuple[str, Weights, tuple[str, ...]]:
    """Chooses the trained weights of several, the averaged ones if there are no others."""
    averages = [name for name, weights in found.items() if weights.averaged or is_average(name)]
    trained = [name for name in found if name not in averages]
    if _TRAINED_BESIDE_AVERAGES in trained:
        trained, averages = [_TRAINED_BESIDE_AVERAGES], [*averages, *trained]
    first, *others = trained or averages
    for other in others:
        if not _same(found[first].state, found[other].state):
            raise unusable(where, "one set of weights", f"{first} and {other}, which differ")
    weights = found[first]
    if not trained and not weights.averaged:
        weights = dataclasses.replace(weights, averaged=True, notes=(*weights.notes, AVERAGED))
    return first, weights, (AVERAGES_BESIDE,) if trained and averages else ()


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    same_shapes = {name: tensor.shape for name, tensor in a.items()} == {
        name: tensor.shape for name, tensor in b.items()
    }
    return same_shapes and all(np.array_equal(np.asarray(a[name]), np.asarray(b[name])) for name in a)


def _is_tensor(value: Any) -> bool:
    """Says whether a value is a tensor, or stands for one that cannot be used."""
    return isinstance(value, SavedTensor | InertArray) or (isinstance(value, Opaque) and "ensor" in value.name)


def _whole_number(value: Any) -> int | None:
    array = value.array if isinstance(value, InertArray) else value
    if isinstance(array, SavedTensor | np.ndarray | np.generic):
        if math.prod(array.shape) != 1:
            return None
        try:
            array = np.asarray(array).reshape(()).item()
        except ValueError:
            return None
    if isinstance(array, bool) or not isinstance(array, int | float) or array < 0 or array != array // 1:
        return None
    return int(array)


def _shown(value: Any) -> object:
    if isinstance(value, SavedTensor):
        return f"a tensor torch.{value.dtype} of shape {list(value.shape)}"
    return value.name if isinstance(value, Opaque) else value
