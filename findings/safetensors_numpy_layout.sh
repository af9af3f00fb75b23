#!/usr/bin/env bash
# safetensors 0.8.0 writes a NumPy array in its memory order and reads it in C order: other numbers, no word.
#
# Guessed: `safetensors.numpy.save` keeps the values of a transposed view, as 0.7.0 did.
# Found: 0.8.0 stores the bytes as they lie in memory, under the view's shape. Every array that is not C-contiguous comes
# back with its numbers in other places. `safetensors.torch` refuses such tensors by name; the NumPy half does not.
# PyTorch stores a linear layer as [out, in] and Flax as [in, out], so that a transposed view is what a converter has at hand.
#
# Seen with numpy 2.4.6:
#   safetensors 0.7.0: transposed kept, every second column kept, Fortran order kept
#   safetensors 0.8.0: transposed CHANGED, every second column CHANGED, Fortran order CHANGED
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"

cat > "$work/try.py" <<'PY'
import importlib.metadata
import sys

import numpy as np
from safetensors.numpy import load, save

weight_OxI = np.arange(24, dtype=np.float32).reshape(4, 6)
arrays = {
    "transposed": weight_OxI.T,
    "every second column": weight_OxI[:, ::2],
    "Fortran order": np.asfortranarray(weight_OxI),
}
back = load(save(arrays))
kept = {name: np.array_equal(back[name], array) for name, array in arrays.items()}
same_in_c_order = load(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
assert all(np.array_equal(same_in_c_order[name], array) for name, array in arrays.items()), "C order has to be kept"
version = importlib.metadata.version("safetensors")
print(f"safetensors {version}:", ", ".join(f"{name} {'kept' if ok else 'CHANGED'}" for name, ok in kept.items()))
expected = version == "0.7.0"
sys.exit(0 if set(kept.values()) == {expected} else 1)
PY
for version in 0.7.0 0.8.0; do
    "$work/venv/bin/pip" install --quiet numpy==2.4.6 safetensors==$version
    "$work/venv/bin/python" "$work/try.py"
done
