"""Trained probes of a sweep against scikit-learn's Ridge on PyTorch's states."""

import json

import numpy as np
import pytest
import torch
import xarray as xr
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from tests.helpers.building import SMALL_MODEL, STEPS, read_lines
from tests.oracles.pytorch_loops import lens, load_module, reads_of

STEP = STEPS[1]
PENALTY = 1e-3  # per read of the fit set
STAGES = ("embedding", "layer_1_post_attn", "final_norm")


@torch.no_grad()
def reads_with_states(module, records, id_of):
    """Returns, for every read: its split, current and stale value (None if there is none), and states by position."""
    found = []
    for record in records:
        ids = [id_of[name] for name in record["tokens"]]
        trace = {}
        module(torch.tensor([ids]), trace)
        states = {stage: x.numpy().astype(np.float64) for stage, (x, _) in lens(module, trace).items()}
        for read in reads_of(record["tokens"]):
            at = {"prediction": read["predict"], "support": read["support"]}
            found.append(
                {
                    "split": record["split"],
                    "current": ids[read["answer"]],
                    "stale": ids[read["stale"][0]] if read["stale"] else None,
                    **{role: {stage: states[stage][at[role]] for stage in STAGES} for role in at},
                }
            )
    return found


@pytest.fixture(scope="module")
def reads(swept, small_benchmark):
    """The reads of the fit set and of the probe set."""
    vocabulary = json.loads((small_benchmark / "metadata.json").read_text())["vocabulary"]["tokens"]
    module = load_module(swept / "checkpoints" / f"step_{STEP:06d}.pt", SMALL_MODEL, len(vocabulary))
    id_of = {token: i for i, token in enumerate(vocabulary)}
    files = (swept / "analysis" / f"probe_set{part}.jsonl" for part in (".fit", ""))
    return [reads_with_states(module, read_lines(file), id_of) for file in files]


@pytest.fixture(scope="module")
def means(swept):
    return xr.open_dataset(swept / "analysis" / "checkpoint_metrics.nc", engine="netcdf4").load().sel(step=STEP)


@pytest.mark.parametrize("role", ["prediction", "support"])
@pytest.mark.parametrize("stage", STAGES)
def test_current_and_stale_values(reads, means, role, stage):
    """The ranking and the binary probe tell current from stale values as scikit-learn's fits do, on every split."""
    fit, scored = reads
    ids = np.arange(1 + max(read["current"] for read in fit + scored))
    current = np.array([read["current"] for read in fit])[:, None] == ids
    stale = np.array([-1 if read["stale"] is None else read["stale"] for read in fit])[:, None] == ids
    scaler = StandardScaler().fit([read[role][stage] for read in fit])
    both = [read for read in scored if read["stale"] is not None]
    rows = np.arange(len(both))
    splits = np.array([read["split"] for read in both])
    for name, targets in (("", current.astype(float)), ("_binary", current.astype(float) - stale)):
        if role == "support" and not name:
            continue  # the ranking is at p_e alone
        model = Ridge(alpha=PENALTY * len(fit)).fit(scaler.transform([read[role][stage] for read in fit]), targets)
        scores = model.predict(scaler.transform([read[role][stage] for read in both]))
        leads = scores[rows, [read["current"] for read in both]] - scores[rows, [read["stale"] for read in both]]
        ours = means[f"probe_current_vs_stale{name}"].sel(stage=stage)
        ours = ours.sel(position_role=role) if name else ours
        for split in ours["split"].values:
            own = leads[(splits == split) | (split == "all")]
            # A lead within float32's rounding may have either sign.
            ties = np.count_nonzero(abs(own) < 1e-4)
            assert abs(float(ours.sel(split=split)) * len(own) - np.count_nonzero(own > 0)) <= ties + 1e-6


def test_null_of_the_binary_probe(means):
    """Permuted labels leave it near chance, and it beats that where the value itself stands."""
    null, found = means["probe_current_vs_stale_binary_null"], means["probe_current_vs_stale_binary"]
    assert null.dims == found.dims == ("split", "position_role", "stage")
    assert (null > 0.4).all() and float(null.sel(split="all").max()) < 0.7
    assert (found > null).sel(split="all", position_role="support", stage="embedding")
