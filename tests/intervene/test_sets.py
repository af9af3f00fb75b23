"""Component sets and states across checkpoints, each against PyTorch doing the same to one stream at a time."""

import jax
import numpy as np
import torch

from kvjax.intervene.across_checkpoints import ROLES, across_effects
from kvjax.intervene.necessity import BASELINES, draw_donors, growing_sets, set_effects, sets_to_ablate
from kvjax.intervene.pair_runs import PairProgram
from kvjax.intervene.patching import component_places, stage_places
from kvjax.task.benchmark import Benchmark
from kvjax.task.corruption import PAIR_ROLES
from tests.intervene.test_patching import difference
from tests.patching_oracle import forward, stage_place


def test_sets_by_hand():
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


def test_sets_are_ablated_as_in_pytorch(model, encoded, small_benchmark):
    module, params, config = model
    vocabulary = Benchmark.open(small_benchmark).vocabulary
    program = PairProgram(encoded, config, tokens_per_batch=400)
    donors = draw_donors(program.buckets, vocabulary)
    rng = np.random.default_rng(2)
    sets = rng.random((3, 15)) < 0.4
    means = {
        "head_z": rng.normal(size=(3, 1, 1, 4, 6)).astype(np.float32),
        "mlp_out": rng.normal(size=(3, 1, 1, 24)).astype(np.float32),
    }
    tree = jax.tree.map(lambda x: x[None], {"params": params, "means": means, "sets": sets})
    tokens = torch.tensor(encoded.clean_tokens).long()
    names = list(component_places(3, 4))
    for index, baseline in enumerate(BASELINES):

        def measure(tree, batch, donors, window, index=index):
            return set_effects(tree, config, batch, donors, index)

        ours = program.run(measure, tree, per_bucket=donors)["difference"][0]
        if baseline == "resample":
            assert np.isfinite(ours).all()
            continue
        for k, chosen in enumerate(sets):
            edits = {}
            for name, inside in zip(names, chosen, strict=True):
                place = component_places(3, 4)[name]
                if inside:
                    value = means[place.site][place.layer, 0, 0]
                    value = torch.tensor(value[place.head] if place.site == "head_z" else value)
                    value = value * (baseline == "mean")
                    at = ("z", place.layer, place.head) if place.site == "head_z" else ("mlp_out", place.layer)
                    edits[at] = lambda x, value=value: value.expand_as(x)
            with torch.no_grad():
                expected = difference(forward(module, tokens, edits)["out",], encoded)
            np.testing.assert_allclose(ours[:, k], expected, rtol=1e-4, atol=1e-4)


def test_donors_are_of_the_same_role_in_another_stream(encoded, model, small_benchmark):
    vocabulary = Benchmark.open(small_benchmark).vocabulary
    program = PairProgram(encoded, model[2], tokens_per_batch=400)
    roles = {"W": 0, "R": 3}
    for bucket, donors in zip(program.buckets, draw_donors(program.buckets, vocabulary), strict=True):
        for tokens, donor in zip(np.asarray(bucket.batches.clean_tokens), donors, strict=True):
            rows, length = tokens.shape

            def role(row, at, tokens=tokens):
                name = vocabulary.tokens[tokens[row, at - (at - 1) % 3]]
                return roles.get(name, -9) + (at - 1) % 3 if at else -1

            moved = 0
            for row in range(rows):
                for at in range(1, int((tokens[row] != 0).sum()) - 1):
                    there, position = divmod(int(donor[row, at]), length)
                    assert role(row, at) == role(there, position)
                    moved += there != row
            assert rows == 1 or moved > 0


def test_states_across_checkpoints_as_in_pytorch(model, other_model, encoded):
    module, params, config = model
    other_module, other_params = other_model
    program = PairProgram(encoded, config, tokens_per_batch=2000)
    both = jax.tree.map(lambda a, b: np.stack([a, b]), params, other_params)

    def measure(params, batch, extra, window, others):
        return across_effects(params, config, batch, others)

    ours = program.run(measure, both, both)["difference"]  # [A, N, B, stages, roles]
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
