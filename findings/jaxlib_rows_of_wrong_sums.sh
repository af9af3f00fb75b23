#!/usr/bin/env bash
# jaxlib 0.10.2 on x86 CPUs: a jitted row mean is wrong in whole slices of a larger array, and right in a smaller one.
#
# Guessed: x - n * mean(n * x) over the last axis differs by rounding alone from NumPy, whatever the other axes are.
# Found: with axes 16 x 11 x 24 x 128 all rows of the eleventh slice are wrong, by as much as the numbers are large, and with
# 8 x 11 x 24 x 128 none. XLA hands the reduction to YNNPACK. jaxlib 0.10.1 is right, and so is 0.10.2 with reductions kept
# from YNNPACK by a flag. No warning, no NaN, the same in every call; outside jit it is right. First-order scores of
# paths between components (attribution patching) form just this, of the changes of 11 and 15 senders behind a LayerNorm.
#
# Seen on two cores with AVX-512, numpy 2.4.6:
#   jaxlib 0.10.2: 8 pairs: slices [] wrong; 16 pairs: slices [10] wrong
#   jaxlib 0.10.2, --xla_cpu_experimental_ynn_fusion_type=-reduce: 8 pairs: slices [] wrong; 16 pairs: slices [] wrong
#   jaxlib 0.10.1: 8 pairs: slices [] wrong; 16 pairs: slices [] wrong
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 0.10.2 0.10.1; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet "jax==$version" "jaxlib==$version" numpy==2.4.6
done

cd "$work"
cat > rows.py <<'PY'
import sys

import jax
import jax.numpy as jnp
import numpy as np


@jax.jit
def without_direction(x, n):
    return x - n[:, None] * jnp.mean(n[:, None] * x, axis=-1, keepdims=True)


random = np.random.default_rng(0)
wrong = {}
for pairs in (8, 16):
    x, n = random.standard_normal((pairs, 11, 24, 128)), random.standard_normal((pairs, 24, 128))
    expected = x - n[:, None] * np.mean(n[:, None] * x, axis=-1, keepdims=True)
    found = np.asarray(without_direction(x.astype(np.float32), n.astype(np.float32)))
    wrong[pairs] = np.flatnonzero((np.abs(found - expected) > 1e-3).any(axis=(0, 2, 3))).tolist()
print(f"jaxlib {jax.lib.__version__}{sys.argv[1]}:", "; ".join(f"{n} pairs: slices {s} wrong" for n, s in wrong.items()))
PY
flag=--xla_cpu_experimental_ynn_fusion_type=-reduce
{
  0.10.2/bin/python rows.py ""
  XLA_FLAGS=$flag 0.10.2/bin/python rows.py ", $flag"
  0.10.1/bin/python rows.py ""
} 2> /dev/null | tee seen
diff seen - <<EOF
jaxlib 0.10.2: 8 pairs: slices [] wrong; 16 pairs: slices [10] wrong
jaxlib 0.10.2, $flag: 8 pairs: slices [] wrong; 16 pairs: slices [] wrong
jaxlib 0.10.1: 8 pairs: slices [] wrong; 16 pairs: slices [] wrong
EOF
