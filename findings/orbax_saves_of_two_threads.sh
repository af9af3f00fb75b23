#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: two threads that save to two folders at once disturb each other.
#
# Guessed: saves to folders of their own are independent, as those of NumPy and safetensors are: all succeed.
# Found: about one save in seven raises, with an error that points at the disk: FileExistsError for a temporary folder
# of its own, "Directory not empty", or a ValueError that holds NOT_FOUND. Orbax keeps the number of the operation at
# work in one place of the process (`OperationIdGenerator`), and a save looks it up there. Saves that raise nothing can
# be read back. With a lock around `save` none raises.
#
# Seen with orbax-checkpoint 0.12.8, jax 0.10.1, 100 pairs of saves of ten small arrays, on 2 cores:
#   together: 29 and 32 of 200 saves raised in two calls, all others read back equal; one after the other: 0 of 200
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet orbax-checkpoint==0.12.8 jax==0.10.1 jaxlib==0.10.1 numpy==2.4.6

WORK="$work" JAX_PLATFORMS=cpu "$work/venv/bin/python" - 2>"$work/errors" <<'PY'
import collections
import concurrent.futures
import contextlib
import importlib.metadata
import logging
import os
import sys
import threading
from pathlib import Path

import numpy as np
from orbax.checkpoint import v1

logging.disable(logging.CRITICAL)
work = Path(os.environ["WORK"])
print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("orbax-checkpoint", "jax")))


def save(guard, path, value):
    with guard:
        try:
            v1.save(path, {f"array_{i}": np.full((4, 16), value + i, np.float32) for i in range(10)})
        except (OSError, ValueError, RuntimeError) as error:
            return type(error).__name__


def count(name, guard):
    raised, lost = collections.Counter(), 0
    for pair in range(100):
        paths = [work / f"{name}_{pair}_{own}" for own in (0, 1)]
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            errors = list(threads.map(lambda own: save(guard, paths[own], 100.0 * own), (0, 1)))
        for own, error in enumerate(errors):
            if error:
                raised[error] += 1
                continue
            read = v1.load(paths[own])
            lost += not all(np.all(read[f"array_{i}"] == 100.0 * own + i) for i in range(10))
    print(f"{name}: {raised.total()} of 200 saves raised {dict(raised)}; {lost} others read back with other values")
    return raised.total(), lost


together = count("together", contextlib.nullcontext())
in_turn = count("in turn", threading.Lock())
sys.exit(0 if together[0] > 0 and together[1] == 0 and in_turn == (0, 0) else 1)
PY
