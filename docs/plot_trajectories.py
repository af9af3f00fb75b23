"""Plots three trajectories of a sweep with their 95 % intervals.

python docs/plot_trajectories.py runs/seed_7/analysis/checkpoint_metrics.nc trajectories.png
"""

import sys

import matplotlib.pyplot as plt
import xarray as xr

PANELS = {
    "answer accuracy": ("answer_accuracy", {"split": "heldout_pairs"}),
    "recency selectivity": ("recency_selectivity", {"split": "validation_iid"}),
    "accuracy drop of L1H3": ("head_accuracy_drop", {"split": "all", "ablation": "zero", "layer": 1, "head": 3}),
}

source, target = sys.argv[1:]
# Group `intervals` holds estimate, low and high. The root group holds every mean, `events` the values behind both.
data = xr.open_dataset(source, group="intervals")
figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 3), layout="constrained")
for axis, (title, (name, where)) in zip(axes, PANELS.items(), strict=True):
    band = data[name].sel(where)
    axis.fill_between(data["step"], band.sel(statistic="low"), band.sel(statistic="high"), alpha=0.25)
    axis.plot(data["step"], band.sel(statistic="estimate"), marker=".")
    axis.set(title=title, xlabel="training step")
figure.savefig(target, dpi=120)
