"""The Flax decoder against PyTorch, and interventions against what they mean."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from kvjax.converters.to_flax import to_flax

from kvjax.config.run import ModelConfig
from kvjax.devices import Placement
from kvjax.errors import InputError
from kvjax.model.decoder import Decoder, gelu
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.interventions import CLEAN, Edit, ablate_head, ablate_mlp, compose
from kvjax.model.params import stack_params
from kvjax.model.sites import SITES, residual_stages, stage_names
from kvjax.model.transforms import capture, intervene, over_checkpoints, over_interventions, plain_forward
from tests.helpers.building import SMALL_MODEL, as_numpy, random_torch_model
from tests.oracles.pytorch_loops import zero_head, zero_mlp

VOCAB = 40
MODEL = ModelConfig.model_validate(SMALL_MODEL)
SHAPE = {"n_layers": MODEL.n_layers, "n_heads": MODEL.n_heads}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def both(request):
    """The same random weights in PyTorch and in Flax."""
    module = random_torch_model(SMALL_MODEL, VOCAB, 0, tied=request.param)
    params = to_flax(as_numpy(module), MODEL, VOCAB, where="test")
    config = DecoderConfig.from_model_config(MODEL, VOCAB, tied=request.param)
    return module, params, plain_forward(config)


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCAB, (5, 19)).astype(np.int32)
    for row, length in enumerate((19, 12, 19, 5, 9)):
        tokens[row, length:] = 0
    return tokens


@functools.cache
def compiled(forward):
    """Returns the forward pass jitted over edits, so that tests of many edits compile once."""
    return jax.jit(lambda params, tokens, edits: intervene(forward, edits)(params, tokens)[0])


def torch_run(module, tokens):
    trace = {}
    with torch.no_grad():
        logits = module(torch.tensor(tokens, dtype=torch.long), trace)
    return logits.numpy(), {name: np.stack([x.numpy() for x in layers]) for name, layers in trace.items()}


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5 * np.abs(theirs).max())


def test_activations(both, tokens):
    """Logits and every activation equal PyTorch's."""
    module, params, forward = both
    logits, trace = forward(params, tokens, capture=tuple(SITES))
    expected, theirs = torch_run(module, tokens)
    real = tokens != 0
    close(np.asarray(logits)[real], expected[real])
    for name in ("post_attn", "post_mlp", "mlp_out"):
        close(np.asarray(trace[name])[:, real], theirs[name][:, real])
    for name in ("embedding", "final_norm"):
        close(np.asarray(trace[name])[real], theirs[name][0][real])
    close(np.asarray(trace["pattern"]), theirs["pattern"])


def test_order_of_stages(both, tokens):
    """Stages lie in the order of their names."""
    _, params, forward = both
    _, trace = forward(params, tokens, capture=tuple(SITES))
    stages = residual_stages(trace)
    names = stage_names(MODEL.n_layers)
    assert len(stages) == len(names) == 2 * MODEL.n_layers + 2
    chex.assert_trees_all_equal(stages[names.index("layer_1_post_attn")], trace["post_attn"][1])
    chex.assert_trees_all_equal(stages[names.index("layer_2_post_mlp")], trace["post_mlp"][2])
    assert names[0] == "embedding" and names[-1] == "final_norm"


def test_empty_intervention(both, tokens):
    """The empty intervention is the plain model, bit for bit."""
    _, params, forward = both
    plain = jax.jit(lambda p, t: forward(p, t)[0])(params, tokens)
    empty = jax.jit(lambda p, t: intervene(forward, CLEAN)(p, t)[0])(params, tokens)
    chex.assert_trees_all_equal(plain, empty)
    # Not only the same numbers: the same program.
    assert str(jax.make_jaxpr(forward)(params, tokens)) == str(
        jax.make_jaxpr(intervene(forward, CLEAN))(params, tokens)
    )


@pytest.mark.parametrize("layer", range(MODEL.n_layers))
def test_zero_ablations(both, tokens, layer):
    """Zero ablations of heads and MLPs equal PyTorch's."""
    module, params, forward = both
    real = tokens != 0
    for head in range(MODEL.n_heads):
        with zero_head(module.blocks[layer], head):
            expected, _ = torch_run(module, tokens)
        ours = compiled(forward)(params, tokens, ablate_head(layer, head, **SHAPE))
        close(np.asarray(ours)[real], expected[real])
    with zero_mlp(module.blocks[layer]):
        expected, _ = torch_run(module, tokens)
    ours = compiled(forward)(params, tokens, ablate_mlp(layer, n_layers=MODEL.n_layers))
    close(np.asarray(ours)[real], expected[real])


def test_ablation_of_a_silent_component(both, tokens):
    """Ablating a component that writes nothing changes nothing, bit for bit."""
    _, params, forward = both
    silent = jax.tree.map(np.array, params)
    width = MODEL.d_model // MODEL.n_heads
    silent["blocks"]["attn"]["out_proj"]["kernel"][1, width : 2 * width] = 0.0  # layer 1, head 1
    silent["blocks"]["mlp"]["fc_out"]["kernel"][2] = 0.0
    silent["blocks"]["mlp"]["fc_out"]["bias"][2] = 0.0
    run = compiled(forward)
    clean = run(silent, tokens, CLEAN)
    chex.assert_trees_all_equal(clean, run(silent, tokens, ablate_head(1, 1, **SHAPE)))
    chex.assert_trees_all_equal(clean, run(silent, tokens, ablate_mlp(2, n_layers=MODEL.n_layers)))


def test_patch_of_a_run_into_itself(both, tokens):
    """Patching a run into itself changes nothing, at any site."""
    _, params, forward = both
    logits, trace = forward(params, tokens, capture=tuple(SITES))
    for name, site in SITES.items():
        everywhere = Edit(jnp.ones((1,) * len(site.axes), bool), trace[name])
        patched = compiled(forward)(params, tokens, {name: everywhere})
        chex.assert_trees_all_close(patched, logits, rtol=1e-4, atol=1e-5)


def test_patch_of_a_whole_stage(both, tokens):
    """A whole stage taken from another run gives that run's logits."""
    _, params, forward = both
    other = np.roll(tokens, 1, axis=0)
    there, trace = forward(params, other, capture=("post_mlp", "final_norm"))
    last = jnp.arange(MODEL.n_layers)[:, None, None, None] == MODEL.n_layers - 1
    for edits in (
        {"post_mlp": Edit(last, trace["post_mlp"])},
        {"final_norm": Edit(jnp.ones((1, 1, 1), bool), trace["final_norm"])},
    ):
        chex.assert_trees_all_close(intervene(forward, edits)(params, tokens)[0], there, rtol=1e-5)


def test_composed_transforms(both, tokens):
    """Nested interventions equal composed ones."""
    _, params, forward = both
    first, second = ablate_head(0, 1, **SHAPE), ablate_mlp(1, n_layers=MODEL.n_layers)
    nested = intervene(intervene(forward, first), second)
    together = intervene(forward, compose(first, second))
    chex.assert_trees_all_equal(nested(params, tokens)[0], together(params, tokens)[0])
    _, trace = capture(nested, ("head_z",))(params, tokens)
    assert not np.asarray(trace["head_z"])[0, :, :, 1].any() and np.asarray(trace["head_z"])[1, :, :, 1].any()


def test_two_edits_of_one_site():
    """Of two edits of a site the later one wins wherever both apply."""
    mask_a = jnp.array([True, True, False]).reshape(1, 1, 3)
    mask_b = jnp.array([False, True, True]).reshape(1, 1, 3)
    both = compose(
        {"embedding": Edit(mask_a, jnp.full((1, 1, 1), 1.0))},
        {"embedding": Edit(mask_b, jnp.full((1, 1, 1), 2.0))},
    )["embedding"]
    x = jnp.zeros((1, 1, 3))
    assert jnp.where(both.mask, both.value, x).ravel().tolist() == [1.0, 2.0, 2.0]


@pytest.mark.parametrize("lift", ["map", "vmap"])
def test_lifts(both, tokens, lift):
    """Lifting over checkpoints equals a loop over them."""
    _, params, forward = both

    def ablated(head):
        return compiled(forward)(params, tokens, ablate_head(1, head, **SHAPE))

    lifted = over_interventions(ablated, lift=lift)(jnp.arange(MODEL.n_heads))
    chex.assert_trees_all_close(lifted, jnp.stack([ablated(h) for h in range(MODEL.n_heads)]), rtol=1e-4, atol=1e-4)
    doubled = jax.tree.map(lambda x: 1.5 * x, params)
    stacked = stack_params([params, doubled])
    lifted = over_checkpoints(lambda p, t: forward(p, t)[0], Placement(lift=lift))(stacked, tokens)
    looped = jnp.stack([forward(p, tokens)[0] for p in (params, doubled)])
    chex.assert_trees_all_close(lifted, looped, rtol=1e-4, atol=1e-4)


def test_compilation_of_another_component(both, tokens):
    """Choosing another component compiles nothing new."""
    chex.clear_trace_counter()
    _, params, forward = both

    @jax.jit
    @chex.assert_max_traces(n=1)
    def ablated(layer, head):
        return intervene(forward, ablate_head(layer, head, **SHAPE))(params, tokens)[0]

    assert not np.allclose(ablated(0, 1), ablated(2, 3))


def test_stack_of_tied_and_untied(tokens):
    """Tied and untied checkpoints stack, and give their own logits."""
    tied = random_torch_model(SMALL_MODEL, VOCAB, 0, tied=True)
    untied = random_torch_model(SMALL_MODEL, VOCAB, 1, tied=False)
    trees = [to_flax(as_numpy(module), MODEL, VOCAB, where="test") for module in (tied, untied)]
    forward = plain_forward(DecoderConfig.from_model_config(MODEL, VOCAB, tied=False))
    stacked = stack_params(trees)
    for c, module in enumerate((tied, untied)):
        ours, _ = forward(jax.tree.map(lambda x, c=c: x[c], stacked), tokens)
        close(np.asarray(ours)[tokens != 0], torch_run(module, tokens)[0][tokens != 0])


def test_invalid_edits(both, tokens):
    """Unknown sites and edits of a wrong rank are refused by name."""
    _, params, forward = both
    with pytest.raises(InputError, match=r"expected a site among .*; found heads"):
        intervene(forward, {"heads": Edit(jnp.ones(()), jnp.ones(()))})(params, tokens)
    with pytest.raises(InputError, match=r"head_z.mask with axes LBPHE; found rank 1"):
        intervene(forward, {"head_z": Edit(jnp.ones(3, bool), jnp.ones((1,) * 5))})(params, tokens)


def test_exact_gelu():
    """GELU is the exact one, as in PyTorch."""
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    expected = torch.nn.functional.gelu(torch.tensor(x)).numpy()
    np.testing.assert_allclose(gelu(x), expected, atol=1e-6)


def test_layer_norm_at_a_large_mean():
    """LayerNorm keeps its precision at a large mean."""
    config = DecoderConfig.from_model_config(MODEL, VOCAB)
    params = Decoder(config).init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    x = 30 + np.random.default_rng(0).normal(size=(7, MODEL.d_model)).astype(np.float32)
    ours = Decoder(config).apply({"params": params}, x, method=lambda model, x: model.final_norm(x))
    np.testing.assert_allclose(ours, torch.nn.functional.layer_norm(torch.tensor(x), x.shape[1:]).numpy(), atol=1e-5)
