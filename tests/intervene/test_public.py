"""The public functions: their docstrings' examples, the plain oracle, and jit, vmap and grad of each."""

import dataclasses
import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import kvjax
from kvjax.errors import InputError
from kvjax.intervene import public
from tests.oracles.patching import Node, Receiver, activation_patch, forward, path_patches, zero_ablate


def test_docstring_examples():
    """The examples in the public functions' docstrings give what they show."""
    found = doctest.testmod(public)
    assert found.attempted >= 20 and found.failed == 0


@pytest.fixture(scope="module")
def tokens(encoded):
    """Unpadded prefixes of a few pairs: clean and corrupted."""
    length = int(encoded.lengths.min())
    return encoded.clean_tokens[:4, :length], encoded.corrupted_tokens[:4, :length]


def as_torch(x):
    return torch.tensor(np.asarray(x)).long()


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("site", "layer", "head", "place"),
    [
        ("embedding", 0, None, ("embedding",)),
        ("post_attn", 1, None, ("post_attn", 1)),
        ("head_z", 2, 3, ("z", 2, 3)),
        ("mlp_out", 0, None, ("mlp_out", 0)),
        ("query_input", 1, 2, ("query", 1, 2)),
        ("final_norm", 0, None, ("final_norm",)),
    ],
)
def test_patch(model, tokens, site, layer, head, place):
    """`patch` equals plain PyTorch patching at every kind of site."""
    module, params, config = model
    clean, corrupted = tokens
    where = np.arange(clean.shape[1])[None] % 3 == np.arange(len(clean))[:, None] % 3
    ours = jax.jit(
        lambda layer: kvjax.patch(params, config, corrupted, clean, site=site, layer=layer, head=head, where_BxT=where)
    )(layer)
    close(ours, activation_patch(module, as_torch(corrupted), as_torch(clean), place, torch.tensor(where)))


@pytest.mark.parametrize(
    ("sender", "receiver"),
    [
        (("embedding", 0, 0), ("value_input", 1, 2)),
        (("head_z", 0, 1), ("query_input", 2, 0)),
        (("head_z", 1, 3), ("mlp_input", 1, None)),
        (("mlp_out", 1, 0), ("logits_input", 0, None)),
    ],
)
def test_path_patch(model, tokens, sender, receiver):
    """`path_patch` equals plain PyTorch path patching."""
    module, params, config = model
    clean, corrupted = tokens
    kinds = {"embedding": "embedding", "head_z": "head", "mlp_out": "mlp"}
    node = {
        "embedding": Node("embedding"),
        "head": Node("head", *sender[1:]),
        "mlp": Node("mlp", sender[1]),
    }[kinds[sender[0]]]
    part = receiver[0].removesuffix("_input")
    to = Receiver("logits") if part == "logits" else Receiver(part, *receiver[1:])
    ours = kvjax.path_patch(
        params,
        config,
        corrupted,
        clean,
        sender=sender[0],
        sender_layer=sender[1],
        sender_head=sender[2],
        receiver=receiver[0],
        receiver_layer=receiver[1],
        receiver_head=receiver[2],
    )
    close(ours, next(iter(path_patches(module, as_torch(corrupted), as_torch(clean), [(node, to)]))))


def test_ablation_of_every_head_by_vmap(model, tokens):
    """Ablations of all heads, side by side, equal PyTorch's one after another."""
    module, params, config = model
    masks = jnp.eye(12, dtype=bool).reshape(12, 3, 4)
    ours = jax.vmap(lambda mask: kvjax.ablate(params, config, tokens[0], heads_LxH=mask))(masks)
    for index in (0, 5, 11):
        close(ours[index], zero_ablate(module, as_torch(tokens[0]), Node("head", index // 4, index % 4)))
    mlps = kvjax.ablate(params, config, tokens[0], mlps_L=jnp.array([False, True, False]))
    close(mlps, zero_ablate(module, as_torch(tokens[0]), Node("mlp", 1)))


def test_across_checkpoints(model, tokens, other_model):
    """A stage of another checkpoint enters as in PyTorch."""
    module, params, config = model
    other_module, other_params = other_model
    ours = kvjax.across_checkpoints(params, other_params, config, tokens[0], site="post_attn", layer=1)
    theirs = forward(other_module, as_torch(tokens[0]))["post_attn", 1]
    close(ours, forward(module, as_torch(tokens[0]), {("post_attn", 1): lambda x: theirs})["out",])


def test_gradients_through_patches(model, tokens):
    """Gradients flow through parameters and through patched activations."""
    _, params, config = model
    clean, corrupted = tokens

    def metric(scale):
        scaled = jax.tree.map(lambda x: x * scale, params)
        logits = kvjax.path_patch(
            scaled, config, corrupted, clean, sender="mlp_out", receiver="key_input", receiver_layer=1, receiver_head=1
        )
        return jnp.mean(logits[:, -1] ** 2)

    slope = float(jax.grad(metric)(1.0))
    step = 1e-2
    numeric = float(metric(1.0 + step) - metric(1.0 - step)) / (2 * step)
    np.testing.assert_allclose(slope, numeric, rtol=2e-2)


def test_identities(model, tokens):
    """A run patched into itself is unchanged; a whole stage gives the source's output; nothing precedes the change."""
    _, params, config = model
    clean, corrupted = tokens
    own, other = (kvjax.ablate(params, config, x) for x in (corrupted, clean))
    same = kvjax.patch(params, config, corrupted, corrupted, site="post_mlp", layer=1)
    np.testing.assert_array_equal(same, own)
    whole = kvjax.patch(params, config, corrupted, clean, site="post_attn", layer=0)
    np.testing.assert_allclose(whole, other, rtol=1e-5, atol=1e-5)
    first = (clean != corrupted).argmax(axis=1)
    before = np.arange(clean.shape[1])[None] < first[:, None]
    nothing = kvjax.patch(params, config, corrupted, clean, site="head_z", layer=1, where_BxT=before)
    np.testing.assert_array_equal(nothing, own)


def test_config_of_another_model(model, tokens):
    """Parameters with an own unembedding are refused under the config of a tied model."""
    _, params, config = model
    with pytest.raises(InputError, match="expected a tied unembedding as the config says; found one of its own"):
        kvjax.ablate(params, dataclasses.replace(config, tied=True), tokens[0])


def test_unknown_places(model, tokens):
    """Sites, senders and receivers that there are not are refused by name."""
    _, params, config = model
    with pytest.raises(InputError, match="expected a site among"):
        kvjax.patch(params, config, *tokens, site="resid_pre")
    with pytest.raises(InputError, match="expected a sender among"):
        kvjax.path_patch(params, config, *tokens, sender="post_mlp", receiver="mlp_input")
    with pytest.raises(InputError, match="expected a receiver"):
        kvjax.path_patch(params, config, *tokens, sender="mlp_out", receiver="post_mlp")


@pytest.mark.parametrize(
    ("place", "complaint"),
    [
        ({"site": "head_z", "layer": 3}, "layer: expected one from 0 to 2; found 3"),
        ({"site": "head_z", "layer": np.int64(-1)}, "layer: expected one from 0 to 2; found -1"),
        ({"site": "head_z", "layer": 1, "head": 4}, "head: expected one from 0 to 3; found 4"),
        ({"site": "mlp_out", "layer": 1, "head": 3}, "head: expected none, for mlp_out is not of one head; found 3"),
        ({"site": "final_norm", "layer": 1}, "layer: expected none, for final_norm is not of one layer; found 1"),
        ({"site": "head_z", "layer": 0.5}, "layer: expected one whole number; found 0.5"),
        ({"site": "head_z", "layer": None}, "layer: expected one whole number; found None"),
        ({"site": "head_z", "layer": "last"}, "layer: expected one whole number; found last"),
        ({"site": "head_z", "layer": True}, "layer: expected one whole number; found True"),
        ({"site": "head_z", "layer": [0, 1, 2]}, r"layer: expected one whole number; found \[0, 1, 2\]"),
        ({"site": "head_z", "head": np.arange(4)}, r"head: expected one whole number; found \[0 1 2 3\]"),
        ({"site": "head_z", "where_BxT": np.ones((4, 1), bool)}, "where_BxT: expected truth values of shape"),
    ],
)
def test_places_outside_the_model(model, tokens, place, complaint):
    """Its mask would be empty, and the unpatched run would read as a patch without effect."""
    _, params, config = model
    with pytest.raises(InputError, match=complaint):
        kvjax.patch(params, config, *tokens, **place)


@pytest.mark.parametrize(
    ("sender", "receiver"),
    [
        (("head_z", 2), ("key_input", 1)),
        (("head_z", 1), ("value_input", 1)),
        (("mlp_out", 1), ("mlp_input", 1)),
    ],
)
def test_path_backwards(model, tokens, sender, receiver):
    """A receiver that does not come after its sender is refused."""
    _, params, config = model
    path = dict(zip(("sender", "sender_layer", "receiver", "receiver_layer"), (*sender, *receiver), strict=True))
    with pytest.raises(InputError, match="path_patch: expected a receiver after its sender"):
        kvjax.path_patch(params, config, *tokens, **path)
    with pytest.raises(InputError, match="sender_layer: expected one from 0 to 2; found 7"):
        kvjax.path_patch(params, config, *tokens, **path | {"sender_layer": 7})


@pytest.mark.parametrize(
    ("masks", "complaint"),
    [
        ({"heads_LxH": np.ones((3, 1), bool)}, r"heads_LxH: expected truth values of shape \[3, 4\]; found bool of"),
        ({"heads_LxH": np.ones(4, bool)}, r"heads_LxH: expected truth values of shape \[3, 4\]"),
        ({"heads_LxH": np.eye(3, 4)}, "heads_LxH: expected truth values .*; found float64"),
        ({"mlps_L": np.ones(1, bool)}, r"mlps_L: expected truth values of shape \[3\]; found bool of shape \[1\]"),
        ({"mlps_L": np.array([1, 0, 0])}, "mlps_L: expected truth values .*; found int64"),
    ],
)
def test_masks_of_other_shapes(model, tokens, masks, complaint):
    """It would be spread over heads and layers that nobody chose."""
    _, params, config = model
    with pytest.raises(InputError, match=complaint):
        kvjax.ablate(params, config, tokens[0], **masks)


def test_traced_arguments(model, tokens):
    """Of traced arguments the shape and type are checked."""
    _, params, config = model
    for bad in (jnp.arange(3), jnp.array(0.5)):
        with pytest.raises(InputError, match=r"layer: expected one whole number; found (int|float)32 of shape"):
            jax.jit(lambda layer: kvjax.patch(params, config, *tokens, site="head_z", layer=layer))(bad)
    with pytest.raises(InputError, match="sender_head: expected one whole number; found None"):
        kvjax.path_patch(params, config, *tokens, sender="head_z", sender_head=None, receiver="logits_input")


def test_known_arguments_inside_a_program(model, tokens):
    """Known tokens are checked inside a program too; traced masks work there."""
    _, params, config = model
    clean = jnp.asarray(tokens[0])

    def total(params, first, second):
        return kvjax.ablate(params, config, clean, mlps_L=jnp.array([first, second, False])).sum()

    ours = jax.jit(total)(params, True, False)
    np.testing.assert_allclose(ours, total(params, True, False), rtol=1e-4)
    unknown = clean + 1000
    with pytest.raises(InputError, match="ids from 0 to"):
        jax.jit(lambda params: kvjax.ablate(params, config, unknown))(params)


def test_arguments_that_are_no_arrays(model, tokens):
    """Lists and tensors of other libraries are refused by the argument's name."""
    _, params, config = model
    with pytest.raises(InputError, match="tokens_BxT: expected an array; found"):
        kvjax.ablate(params, config, [[1, 2], [3]])
    with pytest.raises(InputError, match="mlps_L: expected an array; found"):
        kvjax.ablate(params, config, tokens[0], mlps_L=[[True], [True, False]])
    with pytest.raises(InputError, match="layer: expected one whole number; found tensor"):
        kvjax.patch(params, config, *tokens, site="head_z", layer=torch.tensor(1))


def test_across_checkpoints_of_a_head(model, tokens, other_model):
    """States of another checkpoint are those of residual stages alone."""
    _, params, config = model
    with pytest.raises(InputError, match=r"across_checkpoints: expected a stage among embedding, post_attn, .*; found"):
        kvjax.across_checkpoints(params, other_model[1], config, tokens[0], site="head_z", layer=1)


def test_unusable_tokens(model, tokens):
    """Unknown ids, too many positions and other shapes or types are refused."""
    _, params, config = model
    clean, corrupted = tokens
    for bad, complaint in (
        (clean + config.vocab_size, "ids from 0 to"),
        (np.tile(clean, (1, 20)), "at most max_seq_len"),
        (clean[0], r"whole numbers of shape \[B, T\]"),
        (clean.astype(np.float32), "whole numbers"),
    ):
        with pytest.raises(InputError, match=complaint):
            kvjax.ablate(params, config, bad)
    with pytest.raises(InputError, match="source_tokens_BxT: expected the shape of tokens_BxT"):
        kvjax.patch(params, config, clean, corrupted[:, :-1], site="mlp_out")
