"""Restarted runs against the plain forward, for random shapes, layers, lengths and edits."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvjax.converters.to_flax import to_flax

from kvjax.config.run import ModelConfig
from kvjax.errors import InputError
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.head_writes import HeadWrites
from kvjax.model.interventions import Edit, ablate_head
from kvjax.model.restart import HEAD_CAPTURE, RESTART_CAPTURE, WINDOW_CAPTURE, restart, restart_from_head, run_clean
from kvjax.model.sites import SITES, take_positions
from kvjax.model.transforms import intervene, plain_forward
from tests.helpers.building import as_numpy, random_torch_model

VOCAB, LENGTH, BATCH, READS = 20, 11, 3, 2


# Every site, alone or with others, in models of one to four layers; each case compiles once, hypothesis draws the rest.
CASES = (
    ((1, 2), ("post_attn",)),
    ((1, 2), ("logits_input", "final_norm")),
    ((2, 3), ("head_z", "post_mlp", "final_norm")),
    ((2, 3), ("value", "mlp_hidden")),
    ((2, 3), ("mlp_hidden",)),
    ((4, 2), ("embedding",)),
    ((4, 2), ("query_input", "mlp_input")),
    ((4, 2), ("key_input", "value_input", "logits_input")),
    ((4, 2), ("key",)),
    ((4, 2), ("attn_out",)),
    ((4, 2), ("mlp_pre",)),
    ((4, 2), ("mlp_out",)),
    ((4, 2), ("post_mlp",)),
)
WINDOW_CASES = tuple(
    ((4, 2), site) for site in ("embedding", "query_input", "key", "head_z", "post_attn", "mlp_out", "post_mlp")
)


@functools.cache
def model_of(n_layers, n_heads, d_model=12, d_ff=10):
    """A random model of the shape."""
    shape = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "d_ff": d_ff, "max_seq_len": LENGTH}
    model = ModelConfig.model_validate(shape)
    params = to_flax(as_numpy(random_torch_model(shape, VOCAB, 0, tied=False)), model, VOCAB, where="test")
    return DecoderConfig.from_model_config(model, VOCAB, tied=False), params


@functools.cache
def setting(*shape):
    """A random model of the shape, and both ways of running it, compiled once per set of sites."""
    config, params = model_of(*shape)

    @jax.jit
    def plain(tokens, positions, edits):
        logits, _ = intervene(plain_forward(config), edits)(params, tokens)
        return take_positions(logits, positions, 1)

    @functools.partial(jax.jit, static_argnames=("last", "keep_hidden"))
    def restarted(tokens, positions, edits, layer, window=None, *, last, keep_hidden=False):
        capture = (*RESTART_CAPTURE, *WINDOW_CAPTURE, *(("mlp_hidden",) if keep_hidden else ()))
        _, clean = run_clean(params, config, tokens, capture)
        # The last layer is named by a Python number, any other by a traced one.
        layer = config.n_layers - 1 if last else layer
        return restart(params, config, clean, edits, layer=layer, positions_BxQ=positions, window_BxW=window)

    return config, plain, restarted


def axis_sizes(config, batch, length):
    return {
        "L": config.n_layers,
        "B": batch,
        "P": length,
        "T": length,
        "H": config.n_heads,
        "E": config.d_head,
        "D": config.d_model,
        "F": config.d_ff,
    }


def random_shape(whole, config, name, where):
    """Returns the shape of an edit: axes of width are of their length or 1, by `whole`, two flags of this example.

    A site has at most two such axes, and neighbouring sites take the flags the other way round. Each set of shapes is
    compiled anew: four of them meet every combination of a site's own axes; `test_any_shape` draws the others.
    """
    sizes = axis_sizes(config, *where.shape)
    turned = list(SITES).index(name)
    widths = [axis for axis in SITES[name].axes if axis not in "BPTL"]
    kept = {axis: whole[(index + turned) % 2] for index, axis in enumerate(widths)}
    return tuple(sizes[axis] if kept.get(axis, True) else 1 for axis in SITES[name].axes)


def random_edit(rng, config, name, layer, where, whole):
    """Returns a random edit of a site from a layer on, at the positions `where` [B, T]."""
    sizes = axis_sizes(config, *where.shape)
    axes = SITES[name].axes
    shape = random_shape(whole, config, name, where)
    mask = rng.random(shape) < 0.4
    at = [sizes[axis] if axis in "BPT" else 1 for axis in axes]
    mask &= where.reshape([n if axis in "BPT" else 1 for axis, n in zip(axes, at, strict=True)])
    if SITES[name].per_layer:
        mask &= (np.arange(config.n_layers) >= layer).reshape(-1, *[1] * (len(axes) - 1))
    return Edit(jnp.asarray(mask), jnp.asarray(rng.normal(size=shape), jnp.float32))


def random_inputs(seed, batch=BATCH, longest=LENGTH, reads=READS):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCAB, (batch, longest)).astype(np.int32)
    lengths = rng.integers(3, longest + 1, batch)
    for row, length in enumerate(lengths):
        tokens[row, length:] = 0
    positions = np.stack([rng.integers(1, length, reads) for length in lengths]).astype(np.int32)
    return rng, tokens, positions


def assert_same(ours, plain):
    chex.assert_trees_all_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_sites_of_the_cases():
    """The cases name every site but the attention pattern."""
    assert {site for _, sites in CASES for site in sites} == set(SITES) - {"pattern"}


@pytest.mark.parametrize(("shape", "sites"), CASES, ids=lambda x: "-".join(map(str, x)))
@settings(max_examples=12, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10_000))
def test_edits_of_sites(shape, sites, data, seed):
    """A restart with edits of some sites from some layer on equals the plain forward."""
    config, plain, restarted = setting(*shape)
    rng, tokens, positions = random_inputs(seed)
    layer = data.draw(st.integers(0, config.n_layers - 1))
    layer = 0 if "embedding" in sites else layer
    whole = rng.random(2) < 0.7
    everywhere = np.ones((BATCH, LENGTH), bool)
    edits = {name: random_edit(rng, config, name, layer, everywhere, whole) for name in sites}
    # Kept activations of the MLP are used where edits of them come first.
    keep_hidden = sites == ("mlp_hidden",)
    ours = restarted(tokens, positions, edits, layer, last=layer == config.n_layers - 1, keep_hidden=keep_hidden)
    assert_same(ours, plain(tokens, positions, edits))


@settings(max_examples=16, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10_000))
def test_any_shape(data, seed):
    """Any model and any set of sites; each example is compiled anew, so few are drawn."""
    draw = data.draw
    heads = draw(st.integers(1, 4), "heads")
    shape = (draw(st.integers(1, 4), "layers"), heads, heads * draw(st.integers(1, 5), "width"))
    config, plain, restarted = setting(*shape, draw(st.integers(1, 12), "MLP width"))
    size = (draw(st.integers(1, 3), "sequences"), draw(st.integers(3, LENGTH), "longest"), draw(st.integers(1, 5)))
    rng, tokens, positions = random_inputs(seed, *size)
    drawable = sorted(set(SITES) - {"pattern"})
    sites = draw(st.lists(st.sampled_from(drawable), min_size=1, max_size=3, unique=True), "sites")
    layer = 0 if "embedding" in sites else draw(st.integers(0, config.n_layers - 1), "layer")
    everywhere = np.ones(tokens.shape, bool)
    edits = {name: random_edit(rng, config, name, layer, everywhere, rng.random(2) < 0.7) for name in sites}
    ours = restarted(tokens, positions, edits, layer, last=layer == config.n_layers - 1)
    assert_same(ours, plain(tokens, positions, edits))


@pytest.mark.parametrize(("shape", "site"), WINDOW_CASES)
@settings(max_examples=12, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10_000))
def test_windows(shape, site, data, seed):
    """Inside a window the logits are the whole model's, with clean keys before it."""
    config, plain, restarted = setting(*shape)
    width = 4
    rng, tokens, _ = random_inputs(seed)
    lengths = (tokens != 0).sum(axis=1)
    start = np.array([rng.integers(0, length) for length in lengths])
    window = np.minimum(start[:, None] + np.arange(width)[None], LENGTH - 1).astype(np.int32)
    positions = np.stack(
        [rng.integers(s, max(s + 1, min(s + width, n)), READS) for s, n in zip(start, lengths, strict=True)]
    )
    layer = 0 if site == "embedding" else data.draw(st.integers(0, config.n_layers - 1))
    inside = np.zeros((BATCH, LENGTH), bool)
    np.put_along_axis(inside, window, True, axis=1)
    edits = {site: random_edit(rng, config, site, layer, inside, rng.random(2) < 0.7)}
    positions = positions.astype(np.int32)
    ours = restarted(tokens, positions, edits, layer, window, last=layer == config.n_layers - 1)
    assert_same(ours, plain(tokens, positions, edits))


@functools.cache
def head_restart(n_layers, n_heads):
    config, params = model_of(n_layers, n_heads)

    @functools.partial(jax.jit, static_argnames="last")
    def from_head(tokens, positions, value, layer, head, *, last):
        _, clean = run_clean(params, config, tokens, (*RESTART_CAPTURE, *HEAD_CAPTURE))
        layer = config.n_layers - 1 if last else layer
        at = {"layer": layer, "head": head, "positions_BxQ": positions}
        return restart_from_head(params, config, clean, HeadWrites.of(params, config), value, **at)

    return from_head


@pytest.mark.parametrize("shape", [(1, 2), (4, 3)])
@settings(max_examples=12, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10_000))
def test_restart_from_one_head(shape, data, seed):
    """A restart from one head equals the plain forward."""
    config, plain, _ = setting(*shape)
    rng, tokens, positions = random_inputs(seed)
    layer, head = data.draw(st.integers(0, config.n_layers - 1)), data.draw(st.integers(0, config.n_heads - 1))
    value = rng.normal(size=(BATCH, LENGTH, config.d_head)).astype(np.float32)
    edits = ablate_head(layer, head, n_layers=config.n_layers, n_heads=config.n_heads, value=value[None, :, :, None])
    ours = head_restart(*shape)(tokens, positions, value, layer, head, last=layer == config.n_layers - 1)
    assert_same(ours, plain(tokens, positions, edits))


def test_edited_attention_pattern():
    """The attention pattern can be edited at every query, but not inside a window."""
    _, plain, restarted = setting(2, 3)
    rng, tokens, positions = random_inputs(1)
    mask = rng.random((2, BATCH, 3, LENGTH, LENGTH)) < 0.2
    edits = {"pattern": Edit(jnp.asarray(mask), jnp.zeros((1,) * 5))}
    assert_same(restarted(tokens, positions, edits, 0, last=False), plain(tokens, positions, edits))
    with pytest.raises(InputError, match="inside a window"):
        restarted(tokens, positions, edits, 0, positions, last=False)


def test_invalid_edits():
    """No edit at all, and edits of unknown sites, are refused."""
    _, _, restarted = setting(2, 3)
    _, tokens, positions = random_inputs(1)
    with pytest.raises(InputError, match="expected an edit"):
        restarted(tokens, positions, {}, 0, last=False)
    with pytest.raises(InputError, match="found nowhere"):
        restarted(tokens, positions, {"nowhere": Edit(jnp.ones(1, bool), jnp.ones(1))}, 0, last=False)


def test_run_cut_after_its_last_read():
    """A run cut after its last read gives the same reads."""
    config, params = model_of(4, 2)
    _, tokens, _ = random_inputs(3)
    positions = np.full((BATCH, 1), 5, np.int32)
    _, clean = run_clean(params, config, tokens, RESTART_CAPTURE)
    edits = ablate_head(1, 0, n_layers=4, n_heads=2)
    whole, cut = (
        restart(params, config, run, edits, layer=1, positions_BxQ=positions) for run in (clean, clean.cut(6))
    )
    chex.assert_trees_all_close(cut, whole, rtol=1e-5, atol=1e-5)


def test_compilation_of_early_layers():
    """All layers but the last share one compilation."""
    chex.clear_trace_counter()
    config, params = model_of(5, 2)
    _, tokens, positions = random_inputs(0)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def ablated(layer, head):
        _, clean = run_clean(params, config, tokens, RESTART_CAPTURE)
        edits = ablate_head(layer, head, n_layers=5, n_heads=2)
        return restart(params, config, clean, edits, layer=layer, positions_BxQ=positions)

    results = [ablated(layer, 0) for layer in range(4)]
    assert all(not np.allclose(a, b) for a, b in itertools.pairwise(results))
