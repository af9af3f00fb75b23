"""Reads pickles without executing anything: known plain values are made, everything else becomes a stand-in.

`pickle.Unpickler.find_class` decides what a pickle may call. Here it gives only functions and classes of this module
and plain containers, whatever a file names, so that no class has to be installed and none runs.
"""

from __future__ import annotations

import dataclasses
import io
import pathlib
import pickle
import pickletools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
from kvjax.converters.saved_tensors import NUMPY_TYPES, STORAGE_TYPES, SavedStorage, SavedTensor

_NUMPY_CODE = re.compile("[biufc][0-9]{1,2}")  # plain numbers; of other arrays only the type is kept
_MODULES_OF_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class Opaque:
    """Stands for an object whose class is not loaded, with what the pickle says of it.

    Attributes:
      name: the class or function that the pickle names, with its module.
      args: what it would have been called with.
      state: what it would have been restored from, mostly its attributes.
      entries: those of a class that extends dict.
      values: those of a class that extends list or set.
    """

    name: ClassVar[str] = "an object"

    def __new__(cls, *args: Any, **kwargs: Any) -> Opaque:
        self = super().__new__(cls)
        self.args, self.state, self.entries, self.values = args, None, {}, []
        return self

    def __init__(self, *args: Any, **kwargs: Any):
        """Takes the arguments of any class."""

    def __call__(self, *args: Any, **kwargs: Any) -> Opaque:
        return Opaque(*args)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, value: Any) -> None:
        """Takes a value: the unpickler calls this."""
        self.values.append(value)

    add = append

    def mapping(self) -> Mapping[Any, Any] | None:
        """Gives the entries, or else the attributes; None if the object has neither."""
        return self.entries or (self.state if isinstance(self.state, dict) else None)


@dataclasses.dataclass(frozen=True)
class StorageType:
    """Names the type of a storage in a pickle.

    Attributes:
      dtype: the type by PyTorch's name.
    """

    dtype: str


@dataclasses.dataclass(frozen=True)
class Function:
    """Stands for a function that a pickle calls.

    A pickle may set attributes of what it is given, even a function's defaults. Of this one it may not.
    """

    make: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.make(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("attributes for a function")


def read_pickle(file: io.BytesIO, find_storage: Callable[..., SavedStorage]) -> Any:
    """Reads the next pickle of a file; the file is then behind it.

    Args:
      file: the pickle, and what follows it.
      find_storage: makes the storage of a persistent id (type, key, location, number of elements, …).

    Raises:
      Exception: the pickle is damaged. Unpickling raises many kinds.
    """
    start = file.tell()
    # A damaged index of the memo makes the unpickler reserve memory up to it: 64 GB at most.
    for opcode, argument, position in pickletools.genops(file):
        if opcode.name in ("PUT", "LONG_BINPUT") and argument > position:
            raise pickle.UnpicklingError(f"entry {argument} of a shorter memo")
    file.seek(start)
    return InertUnpickler(file, find_storage).load()


class InertUnpickler(pickle.Unpickler):
    """Reads one pickle of a checkpoint file.

    Args:
      file: the pickle; reading goes on behind the last one.
      find_storage: makes the storage of a persistent id (type, key, location, number of elements, …); raises
        `pickle.UnpicklingError`.
    """

    def __init__(self, file: io.BytesIO, find_storage: Callable[..., SavedStorage]):
        super().__init__(file, encoding="utf-8")
        self._find_storage = find_storage
        self._classes: dict[str, type[Opaque]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Gives the stand-in of a global; nothing is imported."""
        module = _MODULES_OF_PYTHON_2.get(module, module)
        full = f"{module}.{name}"
        if full in _KNOWN:
            return _KNOWN[full]
        if module == "torch" and name in NUMPY_TYPES:
            return full
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return StorageType(STORAGE_TYPES.get(name, name.removesuffix("Storage").lower()))
        if module.split(".")[0] == "pathlib":
            return Function(_windows_path if "Windows" in name else _posix_path)
        if full not in self._classes:
            self._classes[full] = type("Opaque", (Opaque,), {"name": full})
        return self._classes[full]

    def persistent_load(self, pid: Any) -> Any:
        """Gives the storage, or the class, that a persistent id names."""
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] == "module":  # a class, with its source
            return pid[1]
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], StorageType):
            raise pickle.UnpicklingError("an object that is stored outside the pickle")
        return self._find_storage(*pid[1:])


class InertDict(dict):
    """A mapping of a class such as Counter; attributes of it are dropped."""

    def __setstate__(self, state: Any) -> None:
        """Drops the attributes."""


class InertDtype:
    """A NumPy type in a pickle, made of its code and byte order only: NumPy's own restoring trusts its input."""

    def __init__(self, code: Any = "", *_: Any):
        self.code, self.order = str(code), "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = str(state[1])

    def plain(self) -> np.dtype | None:
        """Gives the type if its values are plain numbers, else None."""
        if not _NUMPY_CODE.fullmatch(self.code):
            return None
        try:
            return np.dtype((">" if self.order == ">" else "<") + self.code)
        except TypeError:
            return None

    @property
    def name(self) -> str:
        """Names the type as the pickle does."""
        return f"numpy.dtype({self.code!r})"


class InertArray(Opaque):
    """A NumPy array in a pickle.

    Attributes:
      array: its values; None if they are not plain numbers.
    """

    name = "numpy.ndarray"
    array: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        self.array = _array(dtype, content, shape, "F" if fortran else "C")


def _array(dtype: Any, content: Any, shape: Any, order: str) -> np.ndarray | None:
    plain = dtype.plain() if isinstance(dtype, InertDtype) else None
    if plain is None or not isinstance(content, bytes | bytearray):
        return None
    try:
        return np.frombuffer(content, plain).reshape(shape, order=order)
    except (TypeError, ValueError):
        return None


def _new_array(*_: Any) -> InertArray:
    return InertArray()


def _from_buffer(content: Any, dtype: Any, shape: Any, order: str = "C") -> InertArray:
    made = InertArray()
    made.array = _array(dtype, content, shape, order)
    return made


def _scalar(dtype: Any, content: Any = b"") -> Any:
    found = _array(dtype, content, (), "C")
    return InertArray() if found is None else found[()]


def _encode(text: Any, encoding: str = "latin1") -> bytes:
    """Restores bytes, which protocol 2 writes as text."""
    if not isinstance(text, str):
        raise pickle.UnpicklingError(f"bytes of {type(text).__name__}")
    return text.encode("latin1")


def _as_bytes(content: Any = "", encoding: str = "latin1") -> bytes:
    return content if isinstance(content, bytes) else _encode(content)


def _set(values: Iterable[Any] = ()) -> set[Any]:
    return set(values)


def _frozenset(values: Iterable[Any] = ()) -> frozenset[Any]:
    return frozenset(values)


def _list(values: Iterable[Any] = (), *_: Any) -> list[Any]:
    return list(values)


def _size(values: Iterable[Any] = ()) -> tuple[Any, ...]:
    return tuple(values)


def _default_dict(*_: Any) -> InertDict:
    return InertDict()


def _reconstructor(cls: Any, *_: Any) -> Any:
    return cls() if isinstance(cls, type) and issubclass(cls, Opaque) else Opaque(cls)


def _posix_path(*parts: str) -> str:
    return str(pathlib.PurePosixPath(*parts))


def _windows_path(*parts: str) -> str:
    return str(pathlib.PureWindowsPath(*parts))


def _device(*parts: Any) -> str:
    return ":".join(map(str, parts))


class LazyTensor(Opaque):
    """A tensor that is to be negated or conjugated when it is read."""

    name = "torch.Tensor, negated or conjugated lazily"


def _tensor(
    storage: SavedStorage,
    offset: int,
    shape: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
) -> SavedTensor | Opaque:
    return _typed_tensor(storage, offset, shape, stride, requires_grad, hooks, f"torch.{storage.dtype}", metadata)


def _typed_tensor(
    storage: SavedStorage,
    offset: int,
    shape: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> SavedTensor | Opaque:
    if isinstance(metadata, dict) and any(metadata.values()):
        return LazyTensor()
    named = dtype if isinstance(dtype, str) else str(getattr(dtype, "name", dtype))  # of a type that NumPy lacks
    return SavedTensor(named.removeprefix("torch."), tuple(shape), tuple(stride), offset, storage)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _device_tensor(data: Any, dtype: Any, *_: Any) -> Any:
    """Takes the values of a tensor of a TPU or another such device, saved as a CPU's."""
    return data if isinstance(data, SavedTensor) and f"torch.{data.dtype}" == dtype else Opaque(data, dtype)


def _of_type(make: Any, cls: Any, args: Any, *_: Any) -> Any:
    """Makes a tensor with attributes, which are dropped; one of another class than PyTorch's stays opaque."""
    made = make(*args)
    plain = getattr(cls, "name", "") in _TENSOR_CLASSES and isinstance(made, SavedTensor)
    return made if plain else _reconstructor(cls)


_TENSOR_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "builtins.set": _set,
    "builtins.frozenset": _frozenset,
    "builtins.complex": complex,
    "builtins.bytes": _as_bytes,
    "builtins.bytearray": _as_bytes,
    "_codecs.encode": _encode,
    "collections.OrderedDict": InertDict,
    "collections.Counter": InertDict,
    "collections.defaultdict": _default_dict,
    "collections.deque": _list,
    "copyreg._reconstructor": _reconstructor,
    "torch.Size": _size,
    "torch.device": _device,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _device_tensor,
    "torch._tensor._rebuild_from_type": _of_type,
    "torch._tensor._rebuild_from_type_v2": _of_type,
}
for _core in ("numpy.core", "numpy._core"):  # of NumPy 1 and 2
    _FUNCTIONS = {
        **_FUNCTIONS,
        f"{_core}.multiarray._reconstruct": _new_array,
        f"{_core}.multiarray.scalar": _scalar,
        f"{_core}.numeric._frombuffer": _from_buffer,
    }
_KNOWN: Mapping[str, Any] = {
    **{name: Function(make) for name, make in _FUNCTIONS.items()},
    "numpy.dtype": InertDtype,
    "numpy.ndarray": InertArray,
}
