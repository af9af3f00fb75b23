#!/usr/bin/env bash
# zarr 3.1 and xarray 2026.9: whole-number arrays in Zarr format 2 lose their zeros; each becomes NaN.
#
# Guessed: zeros that were written come back as zeros, in either format.
# Found: zarr-python gives every array a fill value, 0 by default. xarray takes the fill value of a format-2 array as the mark of a
# missing value, and of a format-3 array not. Counts [0, 1, 2] come back as [nan, 1, 2], as floats, so that their mean is
# 1.5 and not 1. Arrays that xarray itself writes have no fill value and are safe in both formats.
#
# Seen with zarr 3.1.6, xarray 2026.9.0:
#   format 2: [nan  1.  2.] mean 1.5; format 3: [0 1 2] mean 1.0; written by xarray in format 2: [0 1 2] mean 1.0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet zarr==3.1.6 xarray==2026.9.0 numpy==2.4.6 pandas==3.1.1

cd "$work"
venv/bin/python - <<'PY'
import sys
import warnings

import numpy as np
import xarray as xr
import zarr

counts = np.array([0, 1, 2], dtype=np.int64)


def by_zarr(path, zarr_format):
    names = {"dimension_names": ["sequence"]} if zarr_format == 3 else {}
    array = zarr.create_group(path, zarr_format=zarr_format).create_array("count", shape=3, dtype="i8", **names)
    array[:] = counts
    if zarr_format == 2:
        array.attrs["_ARRAY_DIMENSIONS"] = ["sequence"]
    assert np.array_equal(array[:], counts), "zarr itself has to read what was written"
    return xr.open_zarr(path, consolidated=False)["count"].load()


def by_xarray(path):
    xr.Dataset({"count": ("sequence", counts)}).to_zarr(path, zarr_format=2)
    return xr.open_zarr(path)["count"].load()


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    found = {
        "format 2": by_zarr("two.zarr", 2),
        "format 3": by_zarr("three.zarr", 3),
        "written by xarray in format 2": by_xarray("xarray.zarr"),
    }
print(f"zarr {zarr.__version__}, xarray {xr.__version__}")
print("; ".join(f"{name}: {array.values} mean {float(array.mean())}" for name, array in found.items()))
same = np.array_equal(found.pop("format 2"), [np.nan, 1, 2], equal_nan=True) and all(
    np.array_equal(array, counts) for array in found.values()
)
sys.exit(0 if same else 1)
PY
