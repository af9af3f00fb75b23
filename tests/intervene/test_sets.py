"""Component sets and states across checkpoints, each against PyTorch doing the same to one stream at a time."""

import jax
import numpy as np
import pytest
import torch

from kvjax.execution.over_pairs import OverPairs
from kvjax.intervene import inputs as inputs_module
from kvjax.intervene.ablations import ABLATIONS
from kvjax.intervene.inputs import InterventionInputs
from kvjax.intervene.kinds.across_checkpoints import ROLES, TakeStates
from kvjax.intervene.kinds.component_sets import growing_sets, sets_to_ablate
from kvjax.intervene.pair_runs import answer_effects
from kvjax.intervene.places import component_places, stage_places
from kvjax.intervene.set_runs import SetRuns, clean_donors
from kvjax.model.restart import run_clean
from kvjax.model.set_ablation import SetTree
from kvjax.model.sites import take_positions
from kvjax.task.corruption import PAIR_ROLES
from kvjax.task.pair_encoding import encode_clean_streams
from kvjax.task.stream_reads import StreamReads
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


def members(*names):
    return [name in names for name in component_places(3, 4)]


# Random sets, the clean run, everything, a whole layer, and sets that begin in each layer or share their beginning.
SETS = np.concatenate(
    [
        np.random.default_rng(2).random((3, 15)) < 0.4,
        [members(), members(*component_places(3, 4)), members("L0H0", "L0H1", "L0H2", "L0H3", "L0.mlp")],
        [members("L2H1"), members("L2.mlp"), members("L1H0", "L2.mlp"), members("L1H0", "L1.mlp"), members("L0.mlp")],
        [members("L0H1", "L1H0", "L1H1", "L1H2", "L1H3"), members("L0H1", "L2H3")],
    ]
)


@pytest.fixture(scope="module")
def inputs(model, encoded, pair_set):
    """The random model as a window of one checkpoint, whose fit set is the pairs' clean streams."""
    _, params, config = model
    pairs, vocabulary = pair_set
    clean, rows = encode_clean_streams(pairs, vocabulary, max_seq_len=config.max_seq_len)
    assert (clean.tokens[rows][:, : encoded.clean_tokens.shape[1]] == encoded.clean_tokens).all()
    return InterventionInputs(
        config=config,
        vocabulary=vocabulary,
        steps=(100,),
        stacked=jax.tree.map(lambda x: x[None], params),
        encoded=encoded,
        pair_ids=tuple(pair.pair_id for pair in pairs),
        clean=clean,
        clean_rows=rows,
        fit=clean,
        records=clean,
        components=None,
        devices=2,
        tokens_per_batch=400,
        record_tokens_per_batch=400,
    )


@pytest.fixture(scope="module")
def runs(inputs):
    return SetRuns(inputs, capacity=len(SETS))


def replacement(module, clean, ablation):
    """Finds by PyTorch what replaces the output at a place at every token of the clean streams, [streams, T, …]."""
    with torch.no_grad():
        trace = forward(module, torch.tensor(clean.tokens).long())
    real = clean.tokens != 0
    donors = clean_donors(clean)

    def at(place):
        x = trace[place].numpy()
        if ablation == "zero":
            return np.zeros_like(x)
        if ablation == "mean":
            return np.broadcast_to(x[real].mean(axis=0), x.shape)
        if ablation == "resample":
            return x.reshape(-1, x.shape[-1])[donors]
        of_roles = np.zeros_like(x)
        for role in np.unique(clean.token_roles[real]):  # the first token's is -1
            of_roles[clean.token_roles == role] = x[real & (clean.token_roles == role)].mean(axis=0)
        return of_roles

    return at


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_set_ablation(model, encoded, inputs, runs, ablation):
    """Sets replaced by zero, means, role means or another stream's outputs answer as in PyTorch, run one by one."""
    module = model[0]
    ours = runs.under(0, ablation, SETS)
    value_of = replacement(module, inputs.clean, ablation)
    length = encoded.clean_tokens.shape[1]
    for k, chosen in enumerate(SETS):
        edits = {}
        for place in [place for place, inside in zip(component_places(3, 4).values(), chosen, strict=True) if inside]:
            at = ("z", place.layer, place.head) if place.site == "head_z" else ("mlp_out", place.layer)
            value = torch.tensor(value_of(at)[inputs.clean_rows][:, :length])
            edits[at] = lambda x, value=value: value
        with torch.no_grad():
            logits = forward(module, torch.tensor(encoded.clean_tokens).long(), edits)["out",]
        expected = difference(logits, encoded)
        close = {"rtol": 1e-4, "atol": 2e-4 if ablation == "resample" else 1e-4}
        np.testing.assert_allclose(ours["logit_difference"][:, k], expected, **close, err_msg=str(k))
        if not chosen.any():
            np.testing.assert_allclose(ours["logit_difference_base"], expected, rtol=1e-4, atol=1e-4)


def test_sets_measured_once(inputs, runs, monkeypatch):
    """A set that was measured is not measured again, whatever else is asked for beside it; the clean run is none."""
    before = runs.under(0, "zero", SETS)
    monkeypatch.setattr(runs, "_measure", lambda *given: pytest.fail("measured again"))
    again = runs.under(0, "zero", SETS[[4, 0, 3]])
    np.testing.assert_array_equal(again["answer_loss"], before["answer_loss"][:, [4, 0, 3]])
    with pytest.raises(pytest.fail.Exception):
        runs.under(0, "zero", ~SETS[:1])


def test_sets_at_other_paddings(inputs, runs, monkeypatch):
    """The sizes that streams are padded to change no effect."""
    monkeypatch.setattr(inputs_module, "FEW_BUCKETS", 1)
    expected, found = runs.under(0, "zero", SETS), SetRuns(inputs, capacity=len(SETS)).under(0, "zero", SETS)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("whole_streams", [True, False])
def test_pairs_at_other_paddings(model, encoded, whole_streams):
    """The sizes that pairs are padded to change no answer."""
    _, params, config = model

    def measure(params, batch):
        logits, _ = run_clean(params, config, batch.pairs.corrupted_tokens, ())
        return answer_effects(take_positions(logits, batch.pairs.prediction_positions, 1), batch.pairs)

    one, four = (
        OverPairs(encoded, tokens_per_batch=400, max_buckets=sizes, whole_streams=whole_streams) for sizes in (1, 4)
    )
    assert (len(one.buckets), len(four.buckets)) == (1, 4)
    expected, found = (program.run(measure, jax.tree.map(lambda x: x[None], params)) for program in (one, four))
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_donors_of_clean_streams(inputs):
    """Donors have the same role and split in another stream."""
    clean, donors = inputs.clean, clean_donors(inputs.clean)
    length = clean.tokens.shape[1]
    for row, at in zip(*np.nonzero(clean.tokens), strict=True):
        other, position = divmod(int(donors[row, at]), length)
        assert clean.token_roles[row, at] == clean.token_roles[other, position]
        assert clean.splits[row] == clean.splits[other] and other != row


def test_reads_of_clean_streams(encoded, inputs):
    """Every affected read of every pair stands once, with its pair's stream up to the last read of the row."""
    rows = StreamReads.of(encoded, inputs.clean, inputs.clean_rows)
    assert len(rows) < len(encoded), "pairs share streams"
    found = set()
    for n, q in zip(*np.nonzero(rows.is_affected), strict=True):
        pair, position = int(rows.pairs[n, q]), int(rows.prediction_positions[n, q])
        assert rows.streams[n] == inputs.clean_rows[pair]
        own = rows.tokens[n][rows.tokens[n] != 0]
        assert len(own) == rows.prediction_positions[n].max() + 1
        assert (own == encoded.clean_tokens[pair][: len(own)]).all()
        found.add((pair, position, int(rows.clean_answers[n, q]), int(rows.corrupted_answers[n, q])))
    answers = (encoded.prediction_positions, encoded.clean_answers, encoded.corrupted_answers)
    pairs, reads = np.nonzero(encoded.is_affected)
    expected = zip(pairs.tolist(), *(x[pairs, reads].tolist() for x in answers), strict=True)
    assert found == set(expected) and rows.is_affected.sum() == len(pairs)


def test_states_of_sets_by_hand():
    """Sets share the states of the layers in which they agree; a layer ahead of all members is the clean run."""
    sets = np.zeros((4, 3, 2), bool)
    sets[0, 0, 0] = sets[1, 0, 0] = True  # both begin alike
    sets[1, 1, 1] = True
    sets[2, 1, 1] = True
    sets[3, 2, 0] = True
    tree = SetTree.of(sets, 5)
    assert tree.counts_L.tolist() == [1, 3, 4]
    assert tree.parents_LxK[:, :4].tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 2, 3, 0]]
    assert tree.members_LxKxM[1, :3].tolist() == [[False, False], [False, True], [False, True]]
    assert tree.members_LxKxM[2, :4].tolist() == [[False, False]] * 3 + [[True, False]]


def test_states_across_checkpoints(model, other_model, encoded):
    """Every stage of another checkpoint, at every role, enters as in PyTorch."""
    module, params, config = model
    other_module, other_params = other_model
    program = OverPairs(encoded, tokens_per_batch=2000, max_buckets=1, whole_streams=True)
    both = jax.tree.map(lambda a, b: np.stack([a, b]), params, other_params)

    together = jax.tree.map(lambda x: x[None], both)
    found = program.run(TakeStates(config), together)
    ours = found["logit_difference"][0].swapaxes(0, 1)  # [A, N, B, stages, roles]
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
