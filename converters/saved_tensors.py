"""Views tensors of a checkpoint's bytes as NumPy arrays: nothing is copied or widened before its shape is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

# PyTorch's types by name, and by the name of their storage class.
NUMPY_TYPES: Mapping[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "complex64": np.dtype("<c8"),
    "complex128": np.dtype("<c16"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint64": np.dtype("<u8"),
    "uint32": np.dtype("<u4"),
    "uint16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}
STORAGE_TYPES: Mapping[str, str] = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}

_MOST_AXES = 32


def item_size(dtype: str) -> int:
    """Looks up the bytes of one value of a type; quantised ones have no NumPy type."""
    return NUMPY_TYPES[dtype].itemsize if dtype in NUMPY_TYPES else {"qint32": 4}.get(dtype, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class SavedStorage:
    """The memory that tensors of a file are views of.

    Attributes:
      dtype: the type its size is counted in, by PyTorch's name.
      numel: how many elements the file says it has.
      read: gives its bytes; raises `ValueError` if the file does not hold them.
    """

    dtype: str
    numel: int
    read: Callable[[], memoryview]


@dataclasses.dataclass(frozen=True, eq=False)
class SavedTensor:
    """A dense tensor of a checkpoint file, as far as the file describes it; its values are read by `numpy`.

    Attributes:
      dtype: its type, by PyTorch's name without `torch.`.
      shape: the size of each axis.
      stride: the elements from one entry to the next along each axis.
      offset: the first element in the storage.
      storage: the memory it is a view of.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: SavedStorage

    def __post_init__(self) -> None:
        numbers = (*self.shape, *self.stride, self.offset)
        whole = all(type(number) is int and number >= 0 for number in numbers)
        if not whole or len(self.shape) != len(self.stride) or len(self.shape) > _MOST_AXES:
            raise ValueError(f"a tensor of shape {self.shape}, stride {self.stride} and offset {self.offset}")

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a tensor that is changed after it was made")

    def numpy(self) -> np.ndarray:
        """Views the values in the file's own precision; the array is read-only and keeps the file's bytes alive.

        Raises:
          ValueError: NumPy has no such type, or the tensor reaches beyond its storage.
        """
        if self.dtype not in NUMPY_TYPES:
            raise ValueError(f"values of type {self.dtype}")
        dtype = NUMPY_TYPES[self.dtype]
        strides = tuple(step * dtype.itemsize for step in self.stride)
        try:
            content = self.storage.read()
            return np.ndarray(self.shape, dtype, content, self.offset * dtype.itemsize, strides)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"a tensor of shape {list(self.shape)} without its values ({error})") from None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads the values for `np.asarray`, in another type if asked for."""
        with np.errstate(over="ignore"):  # a float64 that float32 cannot hold is refused as infinite
            return np.array(self.numpy(), dtype) if copy else np.asarray(self.numpy(), dtype)


def with_arrays(value: Any) -> Any:
    """Replaces the tensors of nested mappings and sequences by arrays of their own precision, bfloat16 by float32.

    Raises:
      ValueError: a tensor's values cannot be read (see `SavedTensor.numpy`).
    """
    if isinstance(value, SavedTensor):
        return np.array(value, np.float32 if value.dtype == "bfloat16" else None)
    if isinstance(value, dict):
        return {key: with_arrays(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(with_arrays(part) for part in value)
    return value
