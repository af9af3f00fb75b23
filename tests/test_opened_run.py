"""A run opened from Python: its checkpoints, streams and probe set, and a measure of one's own at every checkpoint."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import kvjax
from kvjax.errors import InputError
from kvjax.model.transforms import plain_forward
from tests.helpers.building import SMALL_MODEL, STEPS
from tests.helpers.sweeping import sweep
from tests.oracles.pytorch_loops import load_module

ROOT = Path(__file__).resolve().parents[1]


def test_checkpoints(small_run):
    """A checkpoint computes what its file does in PyTorch."""
    run = kvjax.open_run(small_run)
    assert run.steps == STEPS
    key, value = run.vocabulary.key_tokens[0], run.vocabulary.value_tokens[0]
    tokens = run.encode([["<bos>", "W", key, value], ["R"]])
    assert tokens.shape == (2, 4) and tokens[1].tolist() == [run.vocabulary.id_of["R"], 0, 0, 0]
    for which, step in ((100, 100), ("final", STEPS[-1]), ("best", STEPS[-1])):
        checkpoint = run.checkpoint(which)
        assert checkpoint.step == step
        path = small_run / "checkpoints" / ("best.pt" if which == "best" else f"step_{step:06d}.pt")
        module = load_module(path, SMALL_MODEL, len(run.vocabulary.tokens))
        ours = kvjax.ablate(checkpoint.params, checkpoint.config, tokens[:1])
        with torch.no_grad():
            theirs = module(torch.tensor(tokens[:1]).long())
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not (small_run / "analysis").exists(), "looking leaves no trace"


@pytest.mark.parametrize(
    ("ask", "complaint"),
    [
        (lambda run: run.checkpoint(150), "expected a checkpoint for `checkpoint=150`; found steps 100, 200, 300"),
        (lambda run: run.checkpoint("last"), "expected best, final or a step; found last"),
        (lambda run: run.encode([["W", "K99"]]), "streams: expected tokens of .*; found 'K99'"),
        (lambda run: run.encode([["W"] * 1000]), "at most max_seq_len"),
        (lambda run: run.measure(lambda params, config: jnp.zeros(2), dims=("a", "b")), "dims: expected 1 names"),
        (
            lambda run: run.measure(lambda params, config: {"a": jnp.zeros(2)}),
            "expected one array as its result; found",
        ),
        (lambda run: run.measure(lambda params, config: None), "expected one array as its result; found NoneType"),
        (lambda run: run.measure(lambda params, config: jnp.zeros(2), dims=["step"]), "dims: expected different names"),
    ],
)
def test_invalid_requests(small_run, ask, complaint):
    """A request for something that a run does not have is refused by name."""
    with pytest.raises(InputError, match=complaint):
        ask(kvjax.open_run(small_run))


def test_own_measure(small_run):
    """A measure written by the user equals the sweep's measure of the same name."""
    dataset = sweep(small_run, ablations=("zero",), probe="none").dataset
    run = kvjax.open_run(small_run)

    def margins(params, config, records):
        logits, _ = plain_forward(config)(params, records.tokens)
        sequences = jnp.arange(len(records.tokens))[:, None]
        at_reads = logits[sequences, records.prediction_positions]
        values = run.vocabulary.value_ids
        scores = at_reads[:, :, values]
        right = values[None, None] == records.answers[..., None]
        best_other = jnp.max(jnp.where(right, -jnp.inf, scores), axis=-1)
        margin = jnp.max(jnp.where(right, scores, -jnp.inf), axis=-1) - best_other
        return jnp.sum(jnp.where(records.is_read, margin, 0), axis=1)

    records = run.probe_set()
    ours = run.measure(margins, records, dims=("sequence",))
    assert ours.dims == ("step", "sequence") and ours.name == "margins"
    mean = ours.sum("sequence") / records.is_read.sum()
    np.testing.assert_allclose(mean, dataset["answer_margin"].sel(split="all"), rtol=1e-4)
    two = run.measure(margins, records, steps=[300, 100])
    assert two["step"].values.tolist() == [100, 300]
    np.testing.assert_allclose(two, ours.sel(step=[100, 300]).values, rtol=1e-5, atol=1e-5)


def test_script_of_the_docs(small_run, small_benchmark):
    """The script of the docs prints the sweep's attention of every head."""
    dataset = sweep(small_run, ablations=("zero",), probe="none").dataset
    script = [sys.executable, ROOT / "docs" / "own_measure.py", small_run, small_benchmark]
    printed = subprocess.run(script, check=True, capture_output=True, text=True).stdout
    rows = [line.split() for line in printed.splitlines()][-len(STEPS) :]
    largest = dataset["head_support_attention"].sel(split="all").max("layer")
    np.testing.assert_allclose(np.array(rows, float)[:, 1:], largest, atol=6e-4)


def test_devices_of_an_own_measure(small_run):
    """Checkpoints are shared among devices, and traced once."""
    traced = []

    def where(params, config):
        traced.append(config)
        return params["final_norm"]["scale"]

    found = kvjax.open_run(small_run).measure(where)
    assert len(traced) == 1 and jax.local_device_count() == 2, "three checkpoints on two devices, traced once"
    assert found.shape == (len(STEPS), SMALL_MODEL["d_model"])
