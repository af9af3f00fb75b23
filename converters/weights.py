"""Finds the decoder's weights among saved tensors: without wrappers' names, averages apart, known buffers left out."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from kvjax.converters.inert_pickle import InertArray, Opaque
from kvjax.converters.parameter_names import PARAMETERS, TOKEN_EMBEDDING, UNEMBEDDING, modern_name
from kvjax.converters.saved_tensors import SavedTensor

from kvjax.errors import unusable

Saved = SavedTensor | np.ndarray

AVERAGED = "its weights are averages over training (n_averaged, or a name such as ema), not those of one step"
NOT_AVERAGED_YET = "its averaged weights (n_averaged is 0) are those that averaging started from"
AVERAGES_BESIDE = "its file holds averaged weights as well; the trained ones are measured"
TIED = f"its file has no {UNEMBEDDING.torch}, so that {TOKEN_EMBEDDING.torch} serves as the unembedding too"
TIED_TO_HEAD = f"its file has no {TOKEN_EMBEDDING.torch}, so that {UNEMBEDDING.torch} serves as the embedding too"
NARROWED = "its float64 weights are narrowed to float32"

# Parts of a name that PyTorch's wrappers add: DataParallel, DDP and AveragedModel; torch.compile; FSDP; activation
# checkpointing; Lightning Fabric.
WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"},
)
_COUNT = "n_averaged"  # in the state of torch.optim.swa_utils.AveragedModel
_AVERAGE = re.compile(r"(^|[._])(ema|swa|avg|average|averaged|shadow)([._]|$)", re.IGNORECASE)
_ROOTS = frozenset(parameter.torch.split(".")[0] for parameter in PARAMETERS)
_NAMES = frozenset(parameter.torch for parameter in PARAMETERS)
_LARGEST_BUFFER = 1 << 24  # values
_FLOATS = ("float32", "float16", "bfloat16", "float64")

# What a tensor is that has no plain values, by a part of its class or of the function that makes it.
_UNUSABLE_TENSORS = {
    "_rebuild_qtensor": "a quantised tensor (save the dequantised weights)",
    "_rebuild_sparse": "a sparse tensor (save it as to_dense())",
    "_rebuild_meta": "a tensor without values, of the device meta (save it from the device it was trained on)",
    "_rebuild_nested": "a nested tensor",
    "DTensor": "a DTensor, one process's shard (save full_tensor(), or use "
    "torch.distributed.checkpoint.state_dict with full_state_dict=True)",
    "ShardedTensor": "a ShardedTensor, one process's shard (save the full state dict)",
}


@dataclasses.dataclass(frozen=True)
class Weights:
    """The tensors of one state dict, as the converter reads them.

    Attributes:
      state: name -> tensor, in the file's order, without wrappers and known buffers.
      averaged: whether they are averages over training.
      notes: what a reader should know about them.
    """

    state: Mapping[str, Saved]
    averaged: bool
    notes: tuple[str, ...]


def tensors_of(value: Any) -> dict[str, Any] | None:
    """Gives the entries of a state dict, or of a whole pickled module; None if the value is neither."""
    if isinstance(value, Opaque) and isinstance(value.state, dict) and "_modules" in value.state:
        return dict(_module_tensors(value, ""))
    mapping = value.mapping() if isinstance(value, Opaque) else value
    return mapping if isinstance(mapping, dict) else None


def is_average(name: str) -> bool:
    """Says whether a name, or a part of it between dots or underscores, is one that people give averaged weights."""
    return _AVERAGE.search(name) is not None


def find_weights(entries: Mapping[Any, Any], where: object) -> Weights:
    """Finds the decoder's weights in a state dict.

    Args:
      entries: name -> tensor, as saved.
      where: the file, for messages.

    Raises:
      InputError: an entry is no dense floating-point tensor; two entries are the same parameter; or there are several
        sets of weights, and no name says which are averages.
    """
    groups: dict[str, dict[str, Saved]] = {}
    first_names: dict[tuple[str, str], str] = {}
    counts: dict[str, int] = {}
    for saved_name, value in entries.items():
        saved_name = str(saved_name)
        parts = [part for part in saved_name.split(".") if part not in WRAPPERS]
        at = next((index for index, part in enumerate(parts) if part in _ROOTS), len(parts) - 1)
        prefix, name = ".".join(parts[:at]), ".".join(parts[at:])
        tensor = _dense(value, saved_name, where)
        if name == _COUNT:
            counts[prefix] = _count(tensor)
            continue
        if not _is_parameter(name) and _is_known_buffer(tensor):
            continue
        if (prefix, name) in first_names:
            both = f"it as {first_names[prefix, name]} and as {saved_name}"
            raise unusable(where, f"{name} once", both)
        first_names[prefix, name] = saved_name
        # An unknown tensor keeps its name, by which it is refused.
        groups.setdefault(prefix, {})[name if name.split(".")[0] in _ROOTS else saved_name] = tensor
    return _choose(groups, counts, where)


def with_tied_head(weights: Weights) -> Weights:
    """Adds the one of embedding and unembedding that a file of a tied model may leave out."""
    state = dict(weights.state)
    for missing, other, note in (
        (UNEMBEDDING.torch, TOKEN_EMBEDDING.torch, TIED),
        (TOKEN_EMBEDDING.torch, UNEMBEDDING.torch, TIED_TO_HEAD),
    ):
        if missing not in state and other in state:
            state[missing] = state[other]
            return dataclasses.replace(weights, state=state, notes=(*weights.notes, note))
    return weights


def check_types(state: Mapping[str, Saved], where: object) -> tuple[str, ...]:
    """Checks that weights are floating-point numbers; returns a note if float32 holds them less precisely.

    Raises:
      InputError: they are of another type.
    """
    types = {
        name: f"torch.{tensor.dtype}" if isinstance(tensor, SavedTensor) else f"numpy.{tensor.dtype.name}"
        for name, tensor in state.items()
        if _is_parameter(name)
    }
    for name, found in types.items():
        if found.split(".")[1] not in _FLOATS:
            raise unusable(where, f"float32, float64 or half precision for {name}", found)
    return (NARROWED,) if any(found.endswith("float64") for found in types.values()) else ()


def _choose(groups: Mapping[str, Mapping[str, Saved]], counts: Mapping[str, int], where: object) -> Weights:
    """Chooses the trained weights among the modules of a state dict, the averaged ones if there are no others."""

    def averages(prefix: str) -> bool:
        inside = any(not of or prefix == of or prefix.startswith(f"{of}.") for of in counts)
        return inside or is_average(prefix)

    trained = [prefix for prefix in groups if not averages(prefix)]
    chosen = trained or list(groups)
    state: dict[str, Saved] = {}
    for prefix in chosen:
        twice = next((name for name in groups[prefix] if name in state), None)
        if twice is not None:
            listed = ", ".join(sorted(f"{prefix}.{twice}".lstrip(".") for prefix in chosen if twice in groups[prefix]))
            raise unusable(where, "one set of weights (or names that say which is an average, such as ema)", listed)
        state |= groups[prefix]
    if trained:
        return Weights(state, False, (AVERAGES_BESIDE,) if len(trained) < len(groups) else ())
    averaged = bool(groups)
    untouched = bool(counts) and not any(counts.values())
    return Weights(state, averaged, (NOT_AVERAGED_YET if untouched else AVERAGED,) if averaged else ())


def _is_parameter(name: str) -> bool:
    return re.sub(r"^blocks\.\d+\.", "blocks.{i}.", modern_name(name)) in _NAMES


def _is_known_buffer(tensor: Saved) -> bool:
    """Says whether a tensor is a causal mask or position numbers: what a decoder may keep beside its parameters."""
    shape = tuple(size for size in tensor.shape if size != 1)
    if len(shape) > 2 or math.prod(shape) > _LARGEST_BUFFER:
        return False
    try:
        values = np.asarray(tensor).reshape(shape)
    except ValueError:
        return False
    if len(shape) < 2:
        return values.dtype.kind in "iu" and values.size > 1 and np.array_equal(values, np.arange(values.size))
    if shape[0] != shape[1]:
        return False
    ones = np.ones(shape, bool)
    allowed, forbidden = np.tril(ones), np.triu(ones, 1)
    if values.dtype.kind in "biu":
        return any(np.array_equal(values.astype(bool), mask) for mask in (allowed, forbidden))
    as_numbers = values.astype(np.float32)
    added = bool((as_numbers[allowed] == 0).all() and (as_numbers[forbidden] <= -1e4).all())
    return added or np.array_equal(as_numbers, allowed.astype(np.float32))


def _dense(value: Any, name: str, where: object) -> Saved:
    if isinstance(value, SavedTensor):
        return value
    if isinstance(value, InertArray) and value.array is not None:
        return value.array
    if not isinstance(value, Opaque):
        raise unusable(where, f"a tensor for {name}", type(value).__name__)
    found = next((what for part, what in _UNUSABLE_TENSORS.items() if part in value.name), value.name)
    raise unusable(where, f"a dense tensor for {name}", found)


def _count(tensor: Saved) -> int:
    try:
        return int(np.asarray(tensor).max(initial=0))
    except (TypeError, ValueError):
        return 1


def _module_tensors(module: Opaque, prefix: str) -> Iterable[tuple[str, Any]]:
    """Lists what `state_dict()` of a pickled module would: parameters, persistent buffers, and those of its modules."""
    state = module.state if isinstance(module.state, dict) else {}
    passing = state.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, tensor in (state.get(kind) or {}).items():
            if tensor is not None and name not in passing:
                yield f"{prefix}{name}", tensor
    for name, inside in (state.get("_modules") or {}).items():
        if isinstance(inside, Opaque):
            yield from _module_tensors(inside, f"{prefix}{name}.")
