"""Activation and path patching by the engine against plain PyTorch patching, and against what was planted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kvjax.execution.over_pairs import OverPairs
from kvjax.intervene.kinds.activation_patching import patching_effects
from kvjax.intervene.kinds.path_patching import path_effects
from kvjax.intervene.pair_runs import DIRECTIONS, PairRuns, run_pairs
from kvjax.intervene.patched_positions import differs_before, patched_before
from kvjax.intervene.paths import all_edges
from kvjax.intervene.places import Place, component_places, stage_places
from kvjax.model.restart import CleanRun
from kvjax.task.corruption import PAIR_ROLES
from tests.oracles.patching import Node, Receiver, activation_patch, difference, path_patches

PLACES = stage_places(3) | component_places(3, 4)


def stack(params, copies=1):
    return jax.tree.map(lambda x: np.stack([x] * copies), params)


def oracle_place(place):
    match place.site:
        case "head_z":
            return ("z", place.layer, place.head)
        case "embedding" | "final_norm":
            return (place.site,)
    return (place.site, place.layer)


@functools.cache
def patching_paths(config):
    """Makes the measurement of one direction, which is an argument, so that both are one program."""

    def measure(params, batch, direction):
        return path_effects(params, config, run_pairs(params, config, batch.pairs, direction, window=batch.window))

    return measure


@functools.cache
def patching_everywhere(config):
    """Makes the measurement of one direction, with the control before the change."""
    places = tuple(PLACES.values())

    def measure(params, batch, direction):
        runs = run_pairs(params, config, batch.pairs, direction, window=batch.window)
        before = patched_before(params, config, runs, places)
        found = patching_effects(params, config, runs, places, batch.several)
        return found | {f"{name}_before": x for name, x in before.items()}

    return measure


@pytest.fixture(scope="module", params=DIRECTIONS)
def patched(request, model, encoded):
    _, params, config = model
    program = OverPairs(encoded, tokens_per_batch=300)
    measure = patching_everywhere(config)
    tokens = [torch.tensor(encoded.corrupted_tokens).long(), torch.tensor(encoded.clean_tokens).long()]
    base, source = tokens if request.param == "denoising" else tokens[::-1]
    return program.run(measure, stack(params), jnp.int32(DIRECTIONS.index(request.param))), base, source


@pytest.mark.parametrize("name", PLACES)
def test_activation_patching(patched, model, encoded, name):
    """Every place at every position, role and all positions equals plain PyTorch patching."""
    ours, base, source = patched
    module, index = model[0], list(PLACES).index(name)
    at = ours["logit_difference"][0, :, index]  # [N, window + roles + 1]
    roles = len(PAIR_ROLES) - 1
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        place = oracle_place(PLACES[name])
        whole = difference(activation_patch(module, base, source, place), encoded)
        unpatched = difference(module(base), encoded)
        by_role = [
            difference(activation_patch(module, base, source, place, torch.tensor(encoded.roles == role)), encoded)
            for role in range(len(PAIR_ROLES))
        ]
        spans = encoded.last_affected - encoded.first_changed + 1
        single = []
        for offset in range(0, int(spans.max()), 3):
            where = np.arange(encoded.clean_tokens.shape[1])[None] == (encoded.first_changed + offset)[:, None]
            single.append(difference(activation_patch(module, base, source, place, torch.tensor(where)), encoded))
    for pair in range(len(encoded)):
        window = int(np.isfinite(at[pair]).sum()) - roles - 1
        close(at[pair, window + roles], whole[pair])
        close(at[pair, window : window + roles], [by_role[r][pair] for r in range(1, len(PAIR_ROLES))])
        for step, values in enumerate(single):
            if 3 * step < spans[pair]:
                close(at[pair, 3 * step], values[pair])
    close(ours["logit_difference_before"][0, :, index], unpatched, err_msg="nothing differs before the change")
    assert not ours["differs_before"].any()
    close(by_role[0], unpatched)
    close(ours["logit_difference_base"][0], unpatched)


def test_activations_that_differ_before_the_change(encoded):
    """A difference of one activation is found in its pair if it lies before the change, and only then."""
    base = np.zeros((*encoded.clean_tokens.shape, 2), np.float32)
    source = base.copy()
    source[0, 0, 1] = 1e-30  # the smallest counts
    source[1, encoded.first_changed[1], 0] = 1.0
    both = (CleanRun(jnp.asarray(encoded.clean_tokens), {"embedding": jnp.asarray(x)}) for x in (base, source))
    runs = PairRuns(*both, encoded, jnp.zeros((len(encoded), 1), int), {}, {})
    assert np.flatnonzero(differs_before(runs, [Place("embedding")])).tolist() == [0]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_path_patching(model, encoded, direction):
    """Every direct path equals plain PyTorch path patching."""
    module, params, config = model
    program = OverPairs(encoded, tokens_per_batch=300, devices=2)
    measure = patching_paths(config)
    ours = program.run(measure, stack(params, 2), jnp.int32(DIRECTIONS.index(direction)))["logit_difference"]
    np.testing.assert_array_equal(ours[0], ours[1])
    tokens = [torch.tensor(encoded.corrupted_tokens).long(), torch.tensor(encoded.clean_tokens).long()]
    base, source = tokens if direction == "denoising" else tokens[::-1]
    kinds = {"query_input": "query", "key_input": "key", "value_input": "value", "mlp_input": "mlp"}
    theirs = []
    for sender, receiver in all_edges(3, 4):
        node = Node(sender.kind) if sender.kind == "embedding" else Node(*sender)
        if sender.kind == "mlp":
            node = Node("mlp", sender.layer)
        if receiver.site == "logits_input":
            to = Receiver("logits")
        else:
            head = None if receiver.site == "mlp_input" else receiver.head
            to = Receiver(kinds[receiver.site], receiver.layer, head)
        theirs.append((node, to))
    with torch.no_grad():
        for index, logits in enumerate(path_patches(module, base, source, theirs)):
            expected = difference(logits, encoded)
            np.testing.assert_allclose(ours[0, :, index], expected, rtol=1e-4, atol=2e-4, err_msg=str(theirs[index]))
