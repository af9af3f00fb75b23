"""The arithmetic that interventions cannot avoid, counted by hand for one pair and a model of two layers.

D = 2, one head, F = 3, five tokens: a projection takes 2 * 2 * 2 = 8 operations at a position, an MLP 4 * 2 * 3 = 24, a
block 4 * 8 + 24 = 56, the logits of a read 2 * 2 * 5 = 20. The stream has 5 positions. The corrupted one differs from
position 2 on, and the one affected read is at position 4; its support is at 3.
"""

import dataclasses

import numpy as np
import pytest

from benchmarks.flops import across_checkpoints_flops, attribution_flops, set_ablation_flops, subspace_flops
from kvjax.model.decoder_config import DecoderConfig
from kvjax.task.encoding import EncodedRecords
from kvjax.task.pair_encoding import EncodedPairs
from kvjax.task.stream_reads import StreamReads

CONFIG = DecoderConfig(vocab_size=5, d_model=2, n_layers=2, n_heads=1, d_ff=3, max_seq_len=5)
BOTH_RUNS = 5 * 2 * 56 + 3 * 2 * 56  # the clean stream, and the corrupted one from position 2 on
TO_LOGITS = 24 + 8 + 20  # of a read, from its z: output projection, MLP, logits
# The last layer's attention at the read without keys and values: W_Q, W_K and W_V at one position, and five states
# scored and mixed. With the key and value of one position it takes as much, with those of more it takes more.
READ_ATTENTION = 3 * 8 + 5 * 2 * (2 * 2)
FROM_LAST = READ_ATTENTION + TO_LOGITS


@pytest.fixture
def pairs():
    def row(*values, dtype=np.int32):
        return np.array([values], dtype)

    read = {"is_read": True, "is_affected": True, "is_target": True, "prediction_positions": 4, "support_positions": 3}
    of_read = {name: row(value, dtype=type(value) if value is True else np.int32) for name, value in read.items()}
    return EncodedPairs(
        clean_tokens=row(1, 2, 3, 3, 2),
        corrupted_tokens=row(1, 2, 4, 3, 2),
        kinds=np.zeros(1, np.int8),
        weights=np.ones(1, np.float32),
        **of_read,
        clean_answers=row(3),
        corrupted_answers=row(4),
        roles=row(0, 0, 1, 2, 3, dtype=np.int8),
        is_changed=row(False, False, True, False, False, dtype=bool),
        first_changed=np.array([2]),
        last_affected=np.array([4]),
    )


def test_attribution(pairs):
    """Both runs, and five passes forwards and back, each with the products of the scores."""
    # Three positions: the first layer, the last one's keys and values, and the read alone from its query on.
    forward = 3 * 56 + 3 * 2 * 8 + (8 + TO_LOGITS)
    # The embedding reaches q, k, v and the MLP of layer 0, k and v of layer 1; head 0 the MLP and k, v; MLP 0 k and v.
    at_positions = 6 + 3 + 2
    # All five senders reach the logits, three q and four the MLP of layer 1, where only the read's counts.
    at_reads = 5 + 3 + 4
    scores = (3 * at_positions + at_reads) * 2 * 2
    heads_write = 2 * 3 * 8
    assert attribution_flops(CONFIG, pairs) == BOTH_RUNS + heads_write + 5 * (2 * forward + scores)


def test_set_ablation(pairs):
    """Two sets share the state of layer 0, whose head is ablated, so that its attention is not computed."""
    none = np.zeros(1, np.float32)
    clean = {f.name: none for f in dataclasses.fields(EncodedRecords)} | {"tokens": pairs.clean_tokens}
    rows = StreamReads.of(pairs, EncodedRecords(**clean), np.array([0]))
    # Components in forward order: L0H0, L0.mlp, L1H0, L1.mlp.
    sets = np.array([[True, False, False, False], [True, False, False, True], [False] * 4], bool)
    first_layer = 5 * (8 + 24)
    last_layer = 2 * (READ_ATTENTION + 8) + 24  # the second set's MLP is not computed
    one_ablation = first_layer + last_layer + 2 * 20
    clean_run = 5 * 2 * 56 + 20
    assert set_ablation_flops(CONFIG, rows, [sets]) == clean_run + one_ablation
    assert set_ablation_flops(CONFIG, rows, [sets, sets]) == clean_run + 2 * one_ablation


def test_subspaces(pairs):
    """Edits at the read compute one position, those at its support two."""

    def after_stages(positions):
        # Embedding; both halves of layer 0; both of layer 1, read out after its MLP or at once; the final norm.
        halves = 24 + 2 * FROM_LAST + (24 + 20) + 20
        return positions * 56 + FROM_LAST + halves + 20

    into_and_back = 6 * 2 * (2 * 2)  # of the edited state at each of six stages, for each direction of a subspace
    edits = 3 * 3 * sum(2 * after_stages(positions) + (1 + 2) * into_and_back for positions in (1, 2))
    assert subspace_flops(CONFIG, pairs, ranks=(1, 2)) == BOTH_RUNS + edits


def test_across_checkpoints(pairs):
    """Two checkpoints' streams, and each with the other's states, whole and by role."""

    def after_stages(replaced, positions):
        return positions * 56 + FROM_LAST + replaced * 24 + 2 * FROM_LAST + (24 + 20) + 20 + 20

    # The whole stream, then roles: two positions from 0 on, and one each at 2, 3 and 4.
    sets = after_stages(5, 5) + after_stages(2, 5) + after_stages(1, 3) + after_stages(1, 2) + after_stages(1, 1)
    assert across_checkpoints_flops(CONFIG, pairs, 2) == 2 * 5 * 2 * 56 + 2 * sets
