"""The metrics of interventions on logits made by hand."""

import math

import numpy as np
import pytest
import torch

from kvjax.intervene.metrics import METRICS
from kvjax.intervene.pair_runs import answer_effects


@pytest.fixture
def logits(encoded):
    """Random logits at every read, [N, Q, V]."""
    rng = np.random.default_rng(5)
    vocabulary = int(max(encoded.clean_answers.max(), encoded.corrupted_answers.max())) + 3
    return rng.normal(0, 3, (*encoded.is_affected.shape, vocabulary)).astype(np.float32)


def test_metrics_against_pytorch(encoded, logits):
    """Each metric, and the right answers, are PyTorch's, summed over affected reads alone."""
    ours = answer_effects(logits, encoded)
    theirs = dict.fromkeys((*METRICS, "clean_correct", "corrupted_correct"), 0)
    assert set(ours) == set(theirs)
    for name in theirs:
        expected = []
        for n in range(len(encoded)):
            total = 0.0
            for q in np.flatnonzero(encoded.is_affected[n]):
                row = torch.tensor(logits[n, q]).double()
                clean, corrupted = int(encoded.clean_answers[n, q]), int(encoded.corrupted_answers[n, q])
                total += {
                    "logit_difference": (row[clean] - row[corrupted]).item(),
                    "answer_loss": torch.nn.functional.cross_entropy(row[None], torch.tensor([clean])).item(),
                    "answer_logit": row[clean].item(),
                    "clean_correct": float(row.argmax() == clean),
                    "corrupted_correct": float(row.argmax() == corrupted),
                }[name]
            expected.append(total)
        np.testing.assert_allclose(ours[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_metrics_by_hand(encoded):
    """An answer with probability 1/4 has a loss of log 4, whatever all logits are raised by."""
    one = encoded.take(np.array([0]))
    shape = (*one.is_affected.shape, int(one.clean_answers.max() + one.corrupted_answers.max()) + 1)
    logits = np.full(shape, -np.inf, np.float32)
    for q in np.flatnonzero(one.is_affected[0]):
        logits[0, q, one.clean_answers[0, q]] = 7.0
        logits[0, q, one.corrupted_answers[0, q]] = 7.0 + math.log(3)
    found = answer_effects(np.where(one.is_affected[..., None], logits, 0.0), one)
    reads = one.is_affected.sum()
    assert found["answer_loss"] == pytest.approx(reads * math.log(4), rel=1e-5)
    assert found["answer_logit"] == pytest.approx(reads * 7.0)
    assert found["logit_difference"] == pytest.approx(-reads * math.log(3), rel=1e-5)
    assert (found["clean_correct"], found["corrupted_correct"]) == (0, reads)
