"""The sweep's tables: schemas of rows, checked on write, and the labelled arrays of the netCDF file."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pydantic

from kvjax.artifacts.files import Replace, replace_file
from kvjax.artifacts.partials import partial_folder
from kvjax.errors import unusable
from kvjax.measure.declaration import Table
from kvjax.measure.registry import drop_fields, row_fields

if TYPE_CHECKING:
    import xarray

SCHEMA_VERSION = 2

_NETCDF = "netcdf4"  # the library that writes and reads netCDF
_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError)  # that it raises
_ROOM_BESIDE = 1 << 20  # bytes of a netCDF file beside its arrays, at most

# Arguments of xarray's `sel` and `isel`: `.sel(method=…)` could not choose along a dimension of such a name.
_TAKEN = frozenset({"indexers", "method", "tolerance", "drop", "missing_dims"})

Number = float | None  # None if the value does not exist


class _Row(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class AblatedHead(_Row):
    """A head by the accuracy its ablation costs."""

    layer: int
    head: int
    value: Number
    margin_drop: Number


class LocalizedHead(_Row):
    """A head by its attention to the support value."""

    layer: int
    head: int
    value: Number
    query_attention_mean: Number


class LargestHead(_Row):
    """The head whose mean over reads of some attention is largest."""

    layer: int
    head: int
    value: Number


class SelectiveHead(LargestHead):
    """The head with the largest mean key selectivity, beside the same for another key."""

    null: Number
    recency_selectivity: Number


class AblatedMlp(_Row):
    """An MLP by the accuracy its ablation costs."""

    layer: int
    value: Number
    margin_drop: Number


class WriteNorm(_Row):
    """Mean L2 norm of an MLP's output."""

    prediction: Number
    support: Number


def _with_drops(name: str, table: Table, base: type[_Row]) -> type[_Row]:
    """Makes the schema of a component with its drops under every kind of ablation, null for kinds not measured."""
    drops = {field.name: (Number, ...) for _, field in drop_fields(table)}
    return pydantic.create_model(name, __base__=base, **drops, ablations_disagree=(bool | None, ...))


class _Head(_Row):
    layer: int
    head: int


class _Mlp(_Row):
    layer: int


_RANKED: dict[str, Any] = {"ablations_disagree": bool | None, "rank": int, "ranked_by": str}

# Fields of each table's rows that show no single measure; the declarations of measures add theirs (docs/formats.md).
_BESIDE: dict[Table, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "checkpoint": (
        "CheckpointRow",
        {"schema_version": int, "run_name": str, "seed": int | None, "step": int, "ranked_by": str},
        {
            "split_accuracy": dict[str, Number],
            "split_metrics": dict[str, dict[str, Number]],
            "slice_accuracy": dict[str, dict[str, Number]],
            "slice_count": dict[str, dict[str, int]],
            "split_difficulty_accuracy": dict[str, dict[str, Number]],
            "birth_flags": dict[str, bool | None],
            "stabilized": dict[str, bool | None],
            "provisional": bool,
            "trajectory_breaks": list[str],
            "top_heads": list[_with_drops("LeadingHead", "heads", _Head)],
            "top_mlps": list[_with_drops("LeadingMlp", "mlps", _Mlp)],
            "top_heads_by_ablation": list[AblatedHead],
            "top_heads_by_localization": list[LocalizedHead],
            "top_mlps_by_ablation": list[AblatedMlp],
            "q_head": LargestHead,
            "r_head": LargestHead,
            "key_selectivity_head": SelectiveHead | None,
            "mlp_write_norm_by_layer": dict[str, WriteNorm],
        },
    ),
    "heads": (
        "HeadRow",
        {"step": int, "layer": int, "head": int},
        _RANKED,
    ),
    "mlps": ("MlpRow", {"step": int, "layer": int}, _RANKED),
}


def row_schema(table: Table) -> type[pydantic.BaseModel]:
    """Makes the schema of a table's rows: a field of every declared measure that rows show, and what stands beside.

    `checkpoint` is `checkpoint_metrics.jsonl`; `heads` and `mlps` are in `component_candidates/`.
    """
    name, first, last = _BESIDE[table]
    shown: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    for measure, field in row_fields(table):
        shown[field.name] = dict[str, Number] if measure.shape_in_row(field) else Number
        if field.delta:
            changes[f"delta_{field.name}"] = Number
    types = first | shown | changes | last
    return pydantic.create_model(name, __base__=_Row, **{name: (kind, ...) for name, kind in types.items()})


@contextlib.contextmanager
def rows_file(
    path: Path, schema: type[pydantic.BaseModel], *, replace: Replace = replace_file
) -> Iterator[Callable[[Iterable[dict[str, Any]]], None]]:
    """Yields a function that checks rows against their schema and writes them as JSON lines to a file, atomically.

    Raises:
      InputError: the file cannot be written.
    """
    with replace(path) as partial, partial.open("w", encoding="utf-8") as lines:

        def write(rows: Iterable[dict[str, Any]]) -> None:
            for row in rows:
                line = json.dumps(schema.model_validate(row).model_dump(), allow_nan=False) + "\n"
                try:
                    lines.write(line)
                except OSError as error:  # which names no file, and several may be open
                    raise OSError(error.errno, error.strerror, str(partial)) from None

        yield write


Groups = Sequence[tuple[str | None, "xarray.Dataset"]]  # group name, or None for the root; its dataset; the root first


def write_datasets(path: Path, groups: Groups, *, replace: Replace = replace_file) -> None:
    """Writes labelled arrays as one netCDF file, atomically.

    Args:
      path: the file.
      groups: the groups.
      replace: opens the file that is to replace `path`.

    Raises:
      InputError: the file cannot be written.
    """
    with datasets_file(path, replace=replace) as file:
        file.append(groups)


@contextlib.contextmanager
def datasets_file(
    path: Path, *, along: str | None = None, parts: int = 1, replace: Replace = replace_file
) -> Iterator[DatasetsFile]:
    """Yields a netCDF file to write labelled arrays to, part by part; it replaces `path` when the block ends.

    netCDF's library locks the file it writes, which fails on network file systems without locks. So it writes in the
    folder of temporary files, if there is room, and the file is copied.

    Args:
      path: the file.
      along: the dimension that several parts are appended along.
      parts: how many there will be; none is larger than the first.
      replace: opens the file that is to replace `path`.

    Raises:
      InputError: the file cannot be written.
    """
    with replace(path) as partial, contextlib.ExitStack() as held:
        file = DatasetsFile(path, lambda needed: held.enter_context(_scratch(path, parts * needed)), along, parts)
        yield file
        shutil.copyfile(file.scratch, partial)


class DatasetsFile:
    """A netCDF file of labelled arrays while it is written, see `datasets_file`."""

    def __init__(self, path: Path, make: Callable[[int], Path], along: str | None, parts: int):
        self._path, self._make, self._along, self._grows = path, make, along, parts > 1
        self.scratch: Path | None = None

    def append(self, groups: Groups) -> None:
        """Writes the first part of every group, or another one behind those that are there.

        The file is opened for each part, as by `read`.

        Variables without the dimension `along`, attributes and coordinates are those of the first part.
        """
        nbytes = sum(dataset.nbytes for _, dataset in groups)
        first = self.scratch is None
        if first:
            self.scratch = self._make(nbytes)
        try:
            self._begin(groups) if first else self._go_on(groups)
        except RuntimeError as error:  # netCDF4's kind of error
            # It says nothing of a full disk. The system does, if as much is written once more.
            _fill(self.scratch, 2**20 + nbytes, self._path)
            raise unusable(self._path, "a file that can be written", error) from None

    def read(self, begin: int, end: int, *groups: str | None) -> list[xarray.Dataset]:
        """Reads what was written so far of groups, at some places along the dimension that parts are appended along.

        The file is opened anew each time, for an open one keeps up to 64 MB of every variable.
        """
        import xarray as xr

        found = []
        for group in groups:
            with xr.open_dataset(self.scratch, engine=_NETCDF, group=group, cache=False) as dataset:
                found.append(dataset.isel({self._along: slice(begin, end)}).load())
        return found

    def _begin(self, groups: Groups) -> None:
        for index, (group, dataset) in enumerate(groups):
            assert not _TAKEN & set(dataset.dims), f"dimensions that sel cannot choose along: {set(dataset.dims)}"
            grows = {"unlimited_dims": [self._along]} if self._grows else {}
            encoding = {name: self._encoding(variable) for name, variable in dataset.data_vars.items()}
            mode = "a" if index else "w"
            dataset.to_netcdf(self.scratch, mode=mode, group=group, engine=_NETCDF, encoding=encoding, **grows)

    def _encoding(self, variable: xarray.DataArray) -> dict[str, Any]:
        encoding: dict[str, Any] = {}
        if variable.ndim and variable.dtype.kind in "fiub":
            encoding = {"zlib": True, "complevel": 1}
        if self._grows and self._along in variable.dims:  # a part is a chunk: what is written once is compressed once
            encoding["chunksizes"] = tuple(max(size, 1) for size in variable.shape)
        return encoding

    def _go_on(self, groups: Groups) -> None:
        import netCDF4

        with netCDF4.Dataset(self.scratch, "a") as file:
            file.set_auto_maskandscale(False)
            written = len(file.dimensions[self._along])  # of the root, which groups share
            for name, dataset in groups:
                group = file if name is None else file[name]
                for own, variable in dataset.variables.items():
                    if self._along in variable.dims:
                        place = [slice(None)] * variable.ndim
                        axis = variable.dims.index(self._along)
                        place[axis] = slice(written, written + variable.shape[axis])
                        values = variable.values
                        group[own][tuple(place)] = values.astype(np.int8) if values.dtype == bool else values


def _fill(scratch: Path, size: int, path: Path) -> None:
    """Appends zeros to a file; raises `InputError` about `path` if the system does not let it grow."""
    try:
        with scratch.open("ab") as file:
            file.write(bytes(size))
    except OSError as error:
        folder = scratch.parents[1]
        by_way_of = "" if folder == path.parent else f" by way of {folder} (TMPDIR names another folder)"
        raise unusable(path, f"a file that can be written{by_way_of}", error.strerror) from None


@contextlib.contextmanager
def _scratch(path: Path, needed: int) -> Iterator[Path]:
    """Yields a file for netCDF's library: in the folder of temporary files if that has room, else beside `path`."""
    folder = path.parent
    with contextlib.suppress(OSError):  # there is no folder of temporary files
        local = Path(tempfile.gettempdir())
        if shutil.disk_usage(local).free > needed + _ROOM_BESIDE:
            folder = local
    with contextlib.ExitStack() as held:
        try:
            owned = held.enter_context(partial_folder(folder / f"kvjax_{path.name}"))
            owned.chmod(0o700)  # others may read the folder of temporary files
        except OSError as error:
            raise unusable(path, f"a file that can be written by way of {folder}", error.strerror) from None
        yield owned / path.name


def read_dataset(path: Path, *, group: str | None = None, expected: str) -> xarray.Dataset:
    """Reads the labelled arrays of a netCDF file, or of a group of it, into memory.

    Args:
      path: the file.
      group: its group; the root if None.
      expected: what the file should be, for the error.

    Raises:
      InputError: the file does not exist or is damaged.
    """
    if not path.is_file():
        raise unusable(path, expected, "no such file")
    try:
        return _load(path, group)
    except _UNREADABLE as error:
        why = error
    try:  # netCDF's library says the same of a damaged file and of a file system without locks, which it needs
        with _scratch(path, path.stat().st_size) as copy:
            shutil.copyfile(path, copy)
            return _load(copy, group)
    except _UNREADABLE:
        raise unusable(path, expected, why) from None


def _load(path: Path, group: str | None) -> xarray.Dataset:
    import xarray as xr

    with xr.open_dataset(path, engine=_NETCDF, group=group) as dataset:
        return dataset.load()
