#!/usr/bin/env bash
# xarray 2026.9 with netCDF4 1.7.5: a file that is read block by block, with `cache=False`, stays in memory all the same.
#
# Guessed: memory holds one block at a time, since nothing keeps the blocks and `cache=False` turns off xarray's cache.
# Found: as long as the file is open, netCDF's C library keeps 64 MB of what was read of every variable, decompressed
# (`netCDF4.get_chunk_cache()`). So memory grows to 64 MB times the number of variables. Python's own count of memory
# (tracemalloc) does not show it. Opening the file anew for each block, or calling `netCDF4.set_chunk_cache` with a small size
# before, keeps one block.
#
# Seen with 10 variables of 96 blocks of 1 MB each:
#   xarray 2026.9.0, netCDF4 1.7.5.1.post1 (netCDF 4.10.1)
#   file kept open: 644 MB more in the process, 2 MB at most by Python's count
#   small chunk cache: 2 MB more, 2 MB; opened for each block: 1 MB more, 2 MB
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet netCDF4==1.7.5.1.post1 xarray==2026.9.0 numpy==2.4.6 pandas==3.1.1

cd "$work"
cat > read.py <<'PY'
import sys
import tracemalloc

import netCDF4
import numpy as np
import xarray as xr

VARIABLES, BLOCKS, LENGTH = 10, 96, 131_072  # float64: 1 MB for each block of a variable


def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


def write():
    names = [f"v{place}" for place in range(VARIABLES)]
    data = xr.Dataset({name: (("block", "x"), np.zeros((BLOCKS, LENGTH))) for name in names})
    data.to_netcdf("data.nc", encoding={name: {"zlib": True, "chunksizes": (1, LENGTH)} for name in names})


def read_block(data, block):
    for name in data.data_vars:
        assert data[name].isel(block=block).values.sum() == 0


way = sys.argv[1]
if way == "write":
    write()
    sys.exit()
if way == "small_cache":
    netCDF4.set_chunk_cache(1_000_000)
with xr.open_dataset("data.nc", engine="netcdf4", cache=False) as data:
    read_block(data, 0)
before = resident()
tracemalloc.start()
if way == "anew":
    for block in range(BLOCKS):
        with xr.open_dataset("data.nc", engine="netcdf4", cache=False) as data:
            read_block(data, block)
    grown = resident() - before
else:
    with xr.open_dataset("data.nc", engine="netcdf4", cache=False) as data:
        for block in range(BLOCKS):
            read_block(data, block)
        grown = resident() - before
print(f"{grown:.0f} {tracemalloc.get_traced_memory()[1] / 2**20:.0f}")
PY
venv/bin/python read.py write
open_file=$(venv/bin/python read.py open)
small_cache=$(venv/bin/python read.py small_cache)
anew=$(venv/bin/python read.py anew)
venv/bin/python - "$open_file" "$small_cache" "$anew" <<'PY'
import sys

import netCDF4
import xarray as xr

print(f"xarray {xr.__version__}, netCDF4 {netCDF4.__version__} (netCDF {netCDF4.__netcdf4libversion__})")
grown = {}
for name, text in zip(("file kept open", "small chunk cache", "opened for each block"), sys.argv[1:]):
    grown[name], counted = map(int, text.split())
    print(f"{name}: {grown[name]} MB more in the process, {counted} MB at most by Python's count")
kept = grown.pop("file kept open")
sys.exit(0 if 600 < kept < 700 and max(grown.values()) < 100 else 1)
PY
