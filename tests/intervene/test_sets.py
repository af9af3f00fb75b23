"""Component sets and states across checkpoints, each against PyTorch doing the same to one stream at a time."""

import jax
import numpy as np
import pytest
import torch

from kvjax.execution.over_pairs import OverPairs
from kvjax.intervene.kinds.across_checkpoints import ROLES, TakeStates
from kvjax.intervene.kinds.component_sets import (
    AblateSets,
    growing_sets,
    pair_donors,
    sets_to_ablate,
    token_outputs,
)
from kvjax.intervene.places import component_places, stage_places
from kvjax.task.corruption import PAIR_ROLES
from kvjax.task.encoding import microbatches
from kvjax.task.pair_encoding import encode_clean_streams
from tests.oracles.patching import difference, forward, stage_place


def test_sets_by_hand():
    """The prefixes of a ranking and the sets of each criterion, counted by hand."""
    ranking = np.array([2, 0, 1])
    assert growing_sets(ranking).tolist() == [
        [False, False, False],
        [False, False, True],
        [True, False, True],
        [True, True, True],
    ]
    sets = sets_to_ablate(ranking, np.array([True, False, True]))
    assert sets["named"].tolist() == [[True, False, True], [False, True, False]]
    assert sets["minimality"].tolist() == [[True, True, False], [False, True, True]]


@pytest.fixture(scope="module")
def sets():
    return np.random.default_rng(2).random((3, 15)) < 0.4


def pytorchs(module, encoded, chosen, value_of):
    """The metric with a set of components replaced: value_of(place, own output) is what by."""
    edits = {}
    for (name, place), inside in zip(component_places(3, 4).items(), chosen, strict=True):
        del name
        if inside:
            at = ("z", place.layer, place.head) if place.site == "head_z" else ("mlp_out", place.layer)
            edits[at] = lambda x, place=place, at=at: value_of(place, at, x)
    with torch.no_grad():
        return difference(forward(module, torch.tensor(encoded.clean_tokens).long(), edits)["out",], encoded)


@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_set_ablation(model, encoded, sets, baseline):
    """Sets ablated by zero or by given values are as in PyTorch."""
    module, params, config = model
    rng = np.random.default_rng(3)
    values = {
        "head_z": rng.normal(size=(3, 1, 1, 4, 6)).astype(np.float32),
        "mlp_out": rng.normal(size=(3, 1, 1, 24)).astype(np.float32),
    }
    if baseline == "zero":
        values = jax.tree.map(np.zeros_like, values)
    tree = jax.tree.map(lambda x: x[None], {"params": params, "values": values, "sets": sets})
    program = OverPairs(encoded, tokens_per_batch=400, whole_streams=True)
    ours = program.run(AblateSets(config), tree)["logit_difference"][0]

    def value_of(place, at, x):
        value = values[place.site][place.layer, 0, 0]
        return torch.tensor(value[place.head] if place.site == "head_z" else value).expand_as(x)

    for k, chosen in enumerate(sets):
        expected = pytorchs(module, encoded, chosen, value_of)
        np.testing.assert_allclose(ours[:, k], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("whole_streams", [True, False])
def test_sets_at_other_paddings(model, encoded, sets, whole_streams):
    """The sizes that pairs are padded to change no effect."""
    _, params, config = model
    values = {"head_z": np.zeros((3, 1, 1, 4, 6), np.float32), "mlp_out": np.zeros((3, 1, 1, 24), np.float32)}
    tree = jax.tree.map(lambda x: x[None], {"params": params, "values": values, "sets": sets})
    one, four = (
        OverPairs(encoded, tokens_per_batch=400, max_buckets=sizes, whole_streams=whole_streams) for sizes in (1, 4)
    )
    assert (len(one.buckets), len(four.buckets)) == (1, 4)
    expected, found = (program.run(AblateSets(config), tree) for program in (one, four))
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_resampled_sets(model, encoded, pair_set, sets):
    """Donors have the same role and split in another stream, and enter as in PyTorch."""
    module, params, config = model
    pairs, vocabulary = pair_set
    clean, rows = encode_clean_streams(pairs, vocabulary, max_seq_len=config.max_seq_len)
    assert (clean.tokens[rows][:, : encoded.clean_tokens.shape[1]] == encoded.clean_tokens).all()
    program = OverPairs(encoded, tokens_per_batch=400, whole_streams=True)
    donors = pair_donors(clean, rows, program.buckets)
    length = clean.tokens.shape[1]
    by_pair = np.tile(np.arange(encoded.clean_tokens.shape[1]), (len(encoded), 1))
    for bucket, own in zip(program.buckets, donors, strict=True):
        flat = own.reshape(-1, own.shape[-1])
        for n, named in zip(bucket.indices, flat, strict=True):
            if n >= 0:
                by_pair[n, : len(named)] = named
    for n, row in enumerate(rows):
        for at in range(int(encoded.last_affected[n]) + 1):  # later ones have no effect
            other, position = divmod(int(by_pair[n, at]), length)
            assert clean.token_roles[row, at] == clean.token_roles[other, position]
            assert clean.splits[row] == clean.splits[other] and other != row
    batches, _ = microbatches(clean, np.arange(len(clean)), 4)
    outputs = jax.device_get(token_outputs(config, params, batches))
    tree = jax.tree.map(lambda x: x[None], {"params": params, "values": outputs, "sets": sets})
    ours = program.run(AblateSets(config), tree, donors=donors)["logit_difference"][0]
    with torch.no_grad():
        trace = forward(module, torch.tensor(clean.tokens).long())

    def value_of(place, at, x):
        return trace[at].reshape(-1, x.shape[-1])[torch.tensor(by_pair)]

    for k, chosen in enumerate(sets):
        expected = pytorchs(module, encoded, chosen, value_of)
        np.testing.assert_allclose(ours[:, k], expected, rtol=1e-4, atol=2e-4)


def test_states_across_checkpoints(model, other_model, encoded):
    """Every stage of another checkpoint, at every role, enters as in PyTorch."""
    module, params, config = model
    other_module, other_params = other_model
    program = OverPairs(encoded, tokens_per_batch=2000, whole_streams=True)
    both = jax.tree.map(lambda a, b: np.stack([a, b]), params, other_params)

    ours = program.run(TakeStates(config), both, both)["logit_difference"]  # [A, N, B, stages, roles]
    tokens = torch.tensor(encoded.clean_tokens).long()
    with torch.no_grad():
        theirs = forward(other_module, tokens)
        for stage, name in enumerate(stage_places(3)):
            place = stage_place(name)
            for index, role in enumerate(ROLES):
                where = np.ones_like(encoded.roles, bool) if role == "all" else encoded.roles == PAIR_ROLES.index(role)
                mask = torch.tensor(where)[:, :, None]
                mixed = forward(module, tokens, {place: lambda x, m=mask, p=place: torch.where(m, theirs[p], x)})
                expected = difference(mixed["out",], encoded)
                np.testing.assert_allclose(ours[0, :, 1, stage, index], expected, rtol=1e-4, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(ours[1, :, 1, :, 0], ours[1, :, 1, :1, 0].repeat(8, axis=1), rtol=1e-4, atol=1e-4)
