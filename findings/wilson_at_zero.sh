#!/usr/bin/env bash
# statsmodels 0.15: the Wilson interval of a rate that never happened does not begin at 0, for some sample sizes.
#
# Guessed: for 0 successes the lower limit is 0 and for n of n the upper is 1, exactly, as algebra says and SciPy gives.
# Found: centre and half width are equal by algebra and differ by rounding. The lower limit of 0 of 7 is 2.8e-17, so that
# `low > 0`, the usual test of "the interval excludes 0", says yes of something that was never seen.
#
# Seen with statsmodels 0.15.0, scipy 1.17.1, samples of 1 to 200:
#   statsmodels: 0 of 7 begins at 2.78e-17; 35 samples begin above 0; 61 end below 1
#   scipy: 0 samples begin above 0; 0 end below 1
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet statsmodels==0.15.0 scipy==1.17.1 numpy==2.4.6 pandas==3.1.1

"$work/venv/bin/python" - <<'PY'
import importlib.metadata
import sys

from scipy.stats import binomtest
from statsmodels.stats.proportion import proportion_confint

sizes = range(1, 201)
seven = proportion_confint(0, 7, method="wilson")[0]
above_0 = sum(proportion_confint(0, n, method="wilson")[0] > 0 for n in sizes)
below_1 = sum(proportion_confint(n, n, method="wilson")[1] < 1 for n in sizes)
scipy_above_0 = sum(binomtest(0, n).proportion_ci(method="wilson").low > 0 for n in sizes)
scipy_below_1 = sum(binomtest(n, n).proportion_ci(method="wilson").high < 1 for n in sizes)
print(f"statsmodels {importlib.metadata.version('statsmodels')}, scipy {importlib.metadata.version('scipy')}")
print(f"statsmodels: 0 of 7 begins at {seven:.2e}; {above_0} samples begin above 0; {below_1} end below 1")
print(f"scipy: {scipy_above_0} samples begin above 0; {scipy_below_1} end below 1")
sys.exit(0 if 0 < seven < 1e-15 and above_0 and below_1 and not scipy_above_0 and not scipy_below_1 else 1)
PY
