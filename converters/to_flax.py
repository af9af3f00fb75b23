"""Converts a PyTorch `model_state` to the layer-stacked Flax parameter tree; refuses unexpected tensors by name."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from kvjax.converters.parameter_names import LEGACY_MLP, TOKEN_EMBEDDING, UNEMBEDDING, modern_name, torch_names
from kvjax.converters.weights import Saved

from kvjax.config.run import ModelConfig
from kvjax.errors import InputError, unusable
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params


def to_flax(
    state: Mapping[str, Saved], model: ModelConfig | DecoderConfig, vocab_size: int, *, where: object
) -> Params:
    """Converts a PyTorch state to Flax parameters; a tied unembedding is left out of them.

    Args:
      state: tensor name -> array, or tensor of a file, of any floating-point type; current or legacy MLP names.
      model: the model's sizes.
      vocab_size: number of tokens of the benchmark.
      where: the file, for messages.

    Raises:
      InputError: a tensor is unknown, missing, present under two names, of another shape, or not finite.
    """
    state = _with_modern_names(state, where)
    expected = {name: (parameter, layer) for name, parameter, layer in torch_names(model.n_layers)}
    unknown = [name for name in state if name not in expected]
    if unknown:
        raise unusable(where, f"the tensors of a {model.n_layers}-layer decoder", f"unknown {_some(unknown)}")
    missing = [name for name in expected if name not in state]
    if missing:
        raise unusable(where, f"the tensors of a {model.n_layers}-layer decoder", f"no {_some(missing)}")
    for name, (parameter, _) in expected.items():
        shape = parameter.torch_shape(model, vocab_size)
        if state[name].shape != shape:
            raise unusable(where, f"{name} of shape {list(shape)}", list(state[name].shape))
    # Only now, all shapes being right, do values take memory.
    arrays = {name: _as_float32(state[name], name, where) for name in expected}

    tied = np.array_equal(arrays[UNEMBEDDING.torch], arrays[TOKEN_EMBEDDING.torch])
    stacks: dict[tuple[str, ...], list[np.ndarray]] = {}
    params: Params = {}
    for name, (parameter, _) in expected.items():
        if parameter is UNEMBEDDING and tied:
            continue
        leaf = arrays[name].T if parameter.transposed else arrays[name]
        if parameter.per_layer:
            stacks.setdefault(parameter.flax, []).append(leaf)
        else:
            _put(params, parameter.flax, np.array(leaf, order="C"))  # a copy: views keep the whole file in memory
    for path, leaves in stacks.items():
        _put(params, path, np.stack(leaves))
    return params


def _as_float32(tensor: Saved, name: str, where: object) -> np.ndarray:
    """Reads a tensor's values; raises `InputError` if they are not there, or not finite."""
    try:
        array = np.asarray(tensor, np.float32)
    except ValueError as error:
        raise unusable(where, f"the values of {name}", error) from None
    if not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise unusable(where, f"finite values in {name}", f"{bad} NaN or infinite")
    return array


def _with_modern_names(state: Mapping[str, Saved], where: object) -> dict[str, Saved]:
    legacy = [name for name in state if modern_name(name) != name]
    modern = [name for name in state if any(part in name for part in LEGACY_MLP.values())]
    if legacy and modern:
        raise InputError(f"{where}: expected one way of naming the MLP; found a mix of {legacy[0]} and {modern[0]}")
    return {modern_name(name): array for name, array in state.items()}


def _put(tree: Params, path: tuple[str, ...], leaf: np.ndarray) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = leaf


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
