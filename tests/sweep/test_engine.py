"""Restarted runs against the plain forward, for random shapes, layers, lengths and edits."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.to_flax import to_flax
from kvjax.config import ModelConfig
from kvjax.model.decoder import DecoderConfig
from kvjax.model.interventions import Edit, ablate_head, ablate_mlp, compose
from kvjax.model.sites import take_positions
from kvjax.model.transforms import intervene, plain_forward
from kvjax.sweep.engine import RESTART_CAPTURE, restart, run_clean
from tests.building import as_numpy, random_torch_model

VOCAB, LENGTH, BATCH, READS = 20, 11, 3, 2


@functools.cache
def setting(n_layers, n_heads):
    """A random model of the shape, its config, and both ways of running it, compiled once."""
    shape = {"d_model": 12, "n_layers": n_layers, "n_heads": n_heads, "d_ff": 10, "max_seq_len": LENGTH}
    model = ModelConfig.model_validate(shape)
    params = to_flax(as_numpy(random_torch_model(shape, VOCAB, 0, tied=False)), model, VOCAB, where="test")
    config = DecoderConfig.from_model_config(model, VOCAB, tied=False)

    @jax.jit
    def plain(tokens, positions, edits):
        logits, _ = intervene(plain_forward(config), edits)(params, tokens)
        return take_positions(logits, positions, 1)

    @functools.partial(jax.jit, static_argnames=("site", "last"))
    def restarted(tokens, positions, edits, layer, site, last):
        clean = run_clean(params, config, tokens, RESTART_CAPTURE)
        # The last layer is named by a Python number, any other by a traced one.
        layer = config.n_layers - 1 if last else layer
        return restart(params, config, clean, edits, site=site, layer=layer, positions_BxQ=positions)

    return plain, restarted


def random_inputs(seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    lengths = rng.integers(3, LENGTH + 1, BATCH)
    for row, length in enumerate(lengths):
        tokens[row, length:] = 0
    positions = np.stack([rng.integers(1, length, READS) for length in lengths]).astype(np.int32)
    return rng, tokens, positions


def assert_same(ours, plain):
    chex.assert_trees_all_close(ours, plain, rtol=1e-4, atol=1e-4)


SHAPES = st.sampled_from([(1, 2), (2, 3), (4, 2)])


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, data=st.data(), seed=st.integers(0, 10_000))
def test_zero_ablations_restarted_equal_the_plain_forward(shape, data, seed):
    n_layers, n_heads = shape
    plain, restarted = setting(*shape)
    _, tokens, positions = random_inputs(seed)
    layer = data.draw(st.integers(0, n_layers - 1))
    head = data.draw(st.integers(-1, n_heads - 1))
    if head >= 0:
        edits, site = ablate_head(layer, head, n_layers=n_layers, n_heads=n_heads), "head_z"
    else:
        edits, site = ablate_mlp(layer, n_layers=n_layers), "mlp_out"
    ours = restarted(tokens, positions, edits, layer, site=site, last=layer == n_layers - 1)
    assert_same(ours, plain(tokens, positions, edits))


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, data=st.data(), seed=st.integers(0, 10_000))
def test_edits_of_several_sites_with_values_per_position(shape, data, seed):
    """Random masks and values at head_z, mlp_hidden and post_mlp from a layer on, and at the final norm."""
    n_layers, n_heads = shape
    plain, restarted = setting(*shape)
    rng, tokens, positions = random_inputs(seed)
    layer = data.draw(st.integers(0, n_layers - 1))
    from_here = (np.arange(n_layers) >= layer).reshape(-1, 1, 1, 1)
    # The MLP's inside can be edited by a restart after the heads, not by one after the MLP.
    layers = (n_layers, BATCH, LENGTH)
    edits = {
        "head_z": Edit(
            jnp.asarray(from_here[..., None] & (rng.random((*layers, n_heads, 1)) < 0.4)),
            jnp.asarray(rng.normal(size=(1, BATCH, LENGTH, n_heads, 12 // n_heads)), jnp.float32),
        ),
        "mlp_hidden": Edit(
            jnp.asarray(from_here & (rng.random((*layers, 10)) < 0.3)), jnp.zeros((1, 1, 1, 1), jnp.float32)
        ),
    }
    later = {
        "post_mlp": Edit(
            jnp.asarray(from_here & (rng.random((*layers, 1)) < 0.3)),
            jnp.asarray(rng.normal(size=(n_layers, BATCH, LENGTH, 12)), jnp.float32),
        ),
        "final_norm": Edit(
            jnp.asarray(rng.random((BATCH, LENGTH, 1)) < 0.3),
            jnp.asarray(rng.normal(size=(1, 1, 12)), jnp.float32),
        ),
    }
    both = compose(edits, later)
    ours = restarted(tokens, positions, both, layer, site="head_z", last=layer == n_layers - 1)
    assert_same(ours, plain(tokens, positions, both))


def test_every_early_layer_shares_one_compilation():
    chex.clear_trace_counter()
    shape = {"d_model": 12, "n_layers": 5, "n_heads": 2, "d_ff": 10, "max_seq_len": LENGTH}
    model = ModelConfig.model_validate(shape)
    params = to_flax(as_numpy(random_torch_model(shape, VOCAB, 0, tied=False)), model, VOCAB, where="test")
    config = DecoderConfig.from_model_config(model, VOCAB, tied=False)
    _, tokens, positions = random_inputs(0)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def ablated(layer, head):
        clean = run_clean(params, config, tokens, RESTART_CAPTURE)
        edits = ablate_head(layer, head, n_layers=5, n_heads=2)
        return restart(params, config, clean, edits, site="head_z", layer=layer, positions_BxQ=positions)

    results = [ablated(layer, 0) for layer in range(4)]
    assert all(not np.allclose(a, b) for a, b in itertools.pairwise(results))
