"""Variants that are continued together inside a window equal the whole model, run with each edit alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.model.decoder import Decoder
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.interventions import Edit
from kvjax.model.restart import RESTART_CAPTURE, WINDOW_CAPTURE, run_clean
from kvjax.model.sites import take_positions
from kvjax.model.transforms import plain_forward
from kvjax.model.variant_rows import Rows
from kvjax.model.variants import WindowRun, reads_after_last, rows_after, run_on

LENGTH, WINDOW = 11, 5
FIRST = np.array([0, 4, 6, 8])  # of each sequence's window; the last one's reaches beyond the end
READS = jnp.array([[4, 2, 0], [8, 4, 6], [10, 7, 6], [10, 8, 9]])
# Where each variant is changed: single positions, all of them; the first and the last, a read, none.
WHERE = [*np.eye(WINDOW, dtype=bool), np.ones(WINDOW, bool), np.array([0, 1, 0, 1, 0], bool), np.zeros(WINDOW, bool)]
ROWS = Rows(WINDOW, (*range(WINDOW), 0, 1, WINDOW - 1))


@pytest.fixture(scope="module", params=[1, 3])
def model(request):
    """A model of random weights, biases included, with its run on random tokens; one sequence ends in padding."""
    config = DecoderConfig(vocab_size=13, d_model=8, n_layers=request.param, n_heads=2, d_ff=16, max_seq_len=LENGTH)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 13, (len(FIRST), LENGTH))
    tokens[1, 9:] = 0
    params = jax.jit(Decoder(config).init)(jax.random.key(0), jnp.asarray(tokens))["params"]
    params = jax.tree.map(lambda x: jnp.asarray(x + rng.normal(size=x.shape) * 0.4, jnp.float32), params)
    capture = (*RESTART_CAPTURE, *WINDOW_CAPTURE)
    _, run = jax.jit(lambda tokens: run_clean(params, config, tokens, capture))(jnp.asarray(tokens))
    window = np.minimum(FIRST[:, None] + np.arange(WINDOW), LENGTH - 1)
    changed = rng.normal(size=(len(FIRST), LENGTH, config.d_model)).astype(np.float32)
    return config, params, run, jnp.asarray(window), jnp.asarray(changed)


def whole_model(model, layer):
    """Logits at the reads with the stream before a layer replaced, for each of `WHERE`, [K, B, Q, V]."""
    config, params, run, window, changed = model
    mask = np.zeros((len(WHERE), len(FIRST), LENGTH), bool)
    for k, where in enumerate(WHERE):
        for row, positions in enumerate(np.asarray(window)):
            mask[k, row, positions[where & (FIRST[row] + np.arange(WINDOW) < LENGTH)]] = True

    def one(mask_BxT):
        if layer == 0:
            edits = {"embedding": Edit(mask_BxT[..., None], changed)}
        else:
            here = jnp.arange(config.n_layers)[:, None, None, None] == layer - 1
            edits = {"post_mlp": Edit(here & mask_BxT[None, ..., None], changed[None])}
        logits, _ = plain_forward(config)(params, run.tokens, edits=edits)
        return take_positions(logits, READS, 1)

    return jax.jit(jax.vmap(one))(mask)


def together(model, layer):
    """The same by the functions under test, [B, K, Q, V]."""
    config, params, run, window, changed = model
    where = np.broadcast_to(np.stack(WHERE), (len(FIRST), len(WHERE), WINDOW))

    def all_variants(run):
        base = WindowRun.of(run, config, window, READS)
        inside = take_positions(changed, window, 1)
        if layer == config.n_layers - 1:
            return reads_after_last(params, config, base, inside, where)
        rows = rows_after(params, config, base, inside, where, ROWS, layer)
        return run_on(params, config, base, rows, ROWS, layer + 1)

    return jax.jit(all_variants)(run)


def test_variants_of_a_run(model):
    """Changed from any layer on, at one position, several or none, answers at reads are the whole model's."""
    for layer in range(model[0].n_layers):
        np.testing.assert_allclose(
            together(model, layer).swapaxes(0, 1), whole_model(model, layer), rtol=1e-4, atol=1e-4, err_msg=str(layer)
        )


def test_positions_computed():
    """A variant is computed from its change on, or a little before it, and never from after it."""
    rows = Rows.for_changes(10, (0, *range(10)))
    assert all(first <= position for first, position in zip(rows.first, (0, *range(10)), strict=True))
    assert len(rows) < 0.7 * 11 * 10 and len(set(rows.first)) <= 4
    whole = np.arange(11 * 10).reshape(1, 11, 10)
    kept = np.asarray(rows.of_grid(whole))
    assert kept.shape == (1, len(rows))
    grid = np.asarray(rows.grid(kept, np.zeros((1, 10), int)))
    assert grid[0, 0].tolist() == whole[0, 0].tolist() and grid[0, 10].tolist() == [*[0] * 7, *whole[0, 10, 7:]]
