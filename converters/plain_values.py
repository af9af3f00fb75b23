"""Turns what a trainer saved beside the weights into plain JSON values, and says what JSON could not hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from kvjax.converters.inert_pickle import InertArray, Opaque
from kvjax.converters.saved_tensors import SavedTensor

_MOST_VALUES = 200_000  # a pickle may name one list any number of times
_MOST_LEVELS = 100
_LONGEST_TEXT = 1000  # of what stands for an object
_LARGEST_INTEGER = 2**63


class PlainValues:
    """Converts saved objects to JSON values.

    | saved | becomes |
    | --- | --- |
    | mappings, lists, tuples, numbers, texts | the same in JSON; a key becomes text |
    | tensors, NumPy arrays and scalars of one value | the number |
    | NaN, infinities | null |
    | sets | sorted lists |
    | objects with attributes or entries (argparse.Namespace, dataclasses) | mappings of them |
    | everything else | text that names it |

    Attributes:
      changed: the places of which JSON holds less than the file, with what stands there: "metrics.loss (nan)".
    """

    def __init__(self) -> None:
        self.changed: list[str] = []
        self._left = _MOST_VALUES

    def convert(self, value: Any, place: str, level: int = 0) -> Any:
        """Converts a value; `place` names it for `changed`."""
        self._left -= 1
        if self._left < 0 or level > _MOST_LEVELS:
            return self._change(None, place, "more than is kept")
        if isinstance(value, SavedTensor | InertArray | np.generic):
            return self._number(value, place)
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int):
            return value if abs(value) < _LARGEST_INTEGER else self._change(hex(value)[:_LONGEST_TEXT], place, "int")
        if isinstance(value, float):
            return value if math.isfinite(value) else self._change(None, place, str(value))
        return self._compound(value, place, level)

    def _compound(self, value: Any, place: str, level: int) -> Any:
        if isinstance(value, Opaque) and (mapping := value.mapping()) is not None:
            self.changed.append(f"{place} ({value.name})")
            value = mapping
        if isinstance(value, dict):
            named = ((_key(key), part) for key, part in value.items())
            return {key: self.convert(part, f"{place}.{key}", level + 1) for key, part in named}
        if isinstance(value, list | tuple):
            return [self.convert(part, f"{place}[{index}]", level + 1) for index, part in enumerate(value)]
        if isinstance(value, set | frozenset):
            return self._change(sorted((self.convert(part, place, level + 1) for part in value), key=str), place, "set")
        if isinstance(value, bytes | bytearray):
            return self._change(repr(bytes(value))[:_LONGEST_TEXT], place, "bytes")
        if isinstance(value, complex):
            return self._change(str(value), place, "complex")
        name = _name(value)
        return self._change(name, place, name)

    def _number(self, value: Any, place: str) -> Any:
        """Converts the number of a scalar, or of a tensor or array of one value; names others by type and shape."""
        array = value.array if isinstance(value, InertArray) else value
        if array is None:
            return self._change(value.name, place, value.name)
        kind = f"{array.dtype} {list(array.shape)}"
        try:
            number = np.asarray(array).reshape(()).item() if math.prod(array.shape) == 1 else None
        except ValueError:
            number = None
        if isinstance(number, bool | int):
            return number
        if number is None or isinstance(number, complex):
            return self._change(kind, place, kind)
        return float(number) if math.isfinite(number) else self._change(None, place, str(number))

    def _change(self, value: Any, place: str, kind: str) -> Any:
        self.changed.append(f"{place} ({kind})")
        return value


def section(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Reads the mapping under a name of plain values; empty if there is none."""
    part = document.get(name)
    return part if isinstance(part, dict) else {}


def _key(key: Any) -> str:
    return key if isinstance(key, str) else str(key) if isinstance(key, bool | int | float | None) else _name(key)


def _name(value: Any) -> str:
    """Names the class of an object of which nothing else is known."""
    return str(getattr(value, "name", type(value).__name__))[:_LONGEST_TEXT]
