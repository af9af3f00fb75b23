#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: `load` compares stored shapes with those of a target of JAX arrays, not of NumPy arrays.
#
# Guessed: a target whose shapes differ from the stored ones raises in both cases, for its types of numbers are obeyed
# in both cases.
# Found: with NumPy arrays, or `jax.ShapeDtypeStruct` without a sharding in the older interface, the stored shapes come
# back and nothing warns, while the type of number is cast to the target's. A tree of another model, or of transposed
# weights, is taken for the right one.
#
# Seen with orbax-checkpoint 0.12.8, jax 0.10.1, flax-style tree {"kernel": [2, 3]}, target [3, 2] of float16:
#   load, NumPy target: float16 of shape (2, 3); load, JAX target: ValueError
#   StandardCheckpointer.restore, NumPy target: float16 of shape (2, 3); JAX target: ValueError
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet orbax-checkpoint==0.12.8 jax==0.10.1 jaxlib==0.10.1 numpy==2.4.6

WORK="$work" JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import importlib.metadata
import logging
import os
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint
from orbax.checkpoint import v1

logging.disable(logging.WARNING)
stored = {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}
wanted = np.zeros((3, 2), np.float16)
sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
targets = {"NumPy": wanted, "JAX": jax.ShapeDtypeStruct(wanted.shape, wanted.dtype, sharding=sharding)}
folder = Path(os.environ["WORK"])
v1.save(folder / "new", stored)
with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / "old", stored)


def outcome(load, path, target):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found = load(path, {"kernel": target})["kernel"]
        except ValueError:
            return "ValueError"
    return f"{found.dtype} of shape {found.shape}"


restore = orbax.checkpoint.StandardCheckpointer().restore
found = {
    (name, kind): outcome(load, folder / path, target)
    for name, load, path in (("load", v1.load, "new"), ("StandardCheckpointer.restore", restore, "old"))
    for kind, target in targets.items()
}
print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("orbax-checkpoint", "jax")))
for (name, kind), what in found.items():
    print(f"{name}, {kind} target: {what}")
expected = {"NumPy": "float16 of shape (2, 3)", "JAX": "ValueError"}
sys.exit(0 if all(what == expected[kind] for (_, kind), what in found.items()) else 1)
PY
