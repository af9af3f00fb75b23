"""Mean, role-mean, resample and random ablation against PyTorch: the same replacements, put in by hand."""

import numpy as np
import pytest
import torch
from kvjax.converters.to_flax import to_flax

from kvjax.config.run import ModelConfig
from kvjax.model.decoder_config import DecoderConfig
from kvjax.sweeps.ablations import RANDOM_DRAWS, RANDOM_SEED
from kvjax.sweeps.compiled_sweep import DONOR_SEED, CompiledSweep
from kvjax.sweeps.settings import ABLATIONS, SweepSettings
from kvjax.task.benchmark import Benchmark
from kvjax.task.donors import draw_donors
from kvjax.task.encoding import encode_records
from tests.helpers.building import SMALL_MODEL, as_numpy, random_torch_model
from tests.oracles.patching import forward
from tests.oracles.pytorch_loops import margin, roles_of

SPLITS = ("validation_iid", "structural_ood")
COMPONENTS = {(0, 2): ("z", 0, 2), (2, 1): ("z", 2, 1), (1,): ("mlp_out", 1), (2,): ("mlp_out", 2)}


@pytest.fixture(scope="module")
def case(small_benchmark):
    """The sweep's sums of a random model, the model, the records and the fit set."""
    benchmark = Benchmark.open(small_benchmark)
    vocabulary = benchmark.vocabulary
    records = [record for split in SPLITS for record in benchmark.read_split(split)[:5]]
    longest = SMALL_MODEL["max_seq_len"]
    encoded = encode_records(records, vocabulary, SPLITS, max_seq_len=longest)
    fit_records = benchmark.read_split("train")[:12]
    fit = encode_records(fit_records, vocabulary, ["train"], max_seq_len=longest)
    settings = ModelConfig.model_validate(SMALL_MODEL)
    module = random_torch_model(SMALL_MODEL, len(vocabulary.tokens), 6, tied=True)
    params = to_flax(as_numpy(module), settings, len(vocabulary.tokens), where="test")
    program = CompiledSweep(
        DecoderConfig.from_model_config(settings, len(vocabulary.tokens)),
        vocabulary,
        encoded,
        len(SPLITS),
        SweepSettings(ablations=ABLATIONS, resample_draws=2, probe="none"),
        fit=fit,
    )
    roles = [[roles_of(record["tokens"]) for record in split] for split in (records, fit_records)]
    return program.measure([params])[0], module, encoded, fit, vocabulary.value_ids.tolist(), roles


def margins(logits, encoded, value_ids):
    """Margins summed over the reads of each record."""
    total = np.zeros(len(encoded))
    for n, q in zip(*np.nonzero(encoded.is_read), strict=True):
        at = encoded.prediction_positions[n, q]
        total[n] += margin(logits[n, at], int(encoded.answers[n, q]), value_ids)
    return total


def ours(sums, kind, component):
    return sums[f"{'head' if len(component) == 2 else 'mlp'}/{kind}/margin"][:, *component]


def tokens_of(encoded):
    return torch.tensor(encoded.tokens).long()


@pytest.mark.parametrize("component", COMPONENTS)
@torch.no_grad()
def test_mean_ablation(case, component):
    """Mean ablation puts in the mean over the fit set's tokens."""
    sums, module, encoded, fit, value_ids, _ = case
    place = COMPONENTS[component]
    real = torch.tensor(fit.tokens != 0)
    mean = forward(module, tokens_of(fit))[place][real].mean(dim=0)
    logits = forward(module, tokens_of(encoded), {place: lambda x: mean.expand_as(x)})["out",]
    np.testing.assert_allclose(ours(sums, "mean", component), margins(logits, encoded, value_ids), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("component", COMPONENTS)
@torch.no_grad()
def test_role_mean_ablation(case, component):
    """Role-mean ablation puts in the mean over the fit set's tokens of the same role, the first token's apart."""
    sums, module, encoded, fit, value_ids, (roles, fit_roles) = case
    place = COMPONENTS[component]
    of_fit = forward(module, tokens_of(fit))[place]
    by_role = {}
    for outputs, of_record in zip(of_fit, fit_roles, strict=True):
        for output, role in zip(outputs, of_record, strict=False):  # padding has no role
            by_role.setdefault(role, []).append(output)
    means = {role: torch.stack(outputs).mean(dim=0) for role, outputs in by_role.items()}
    put_in = torch.zeros((*encoded.tokens.shape, of_fit.shape[-1]))
    for n, of_record in enumerate(roles):
        put_in[n, : len(of_record)] = torch.stack([means[role] for role in of_record])
    logits = forward(module, tokens_of(encoded), {place: lambda x: put_in})["out",]
    expected = margins(logits, encoded, value_ids)
    np.testing.assert_allclose(ours(sums, "role_mean", component), expected, rtol=1e-4, atol=1e-3)
    assert np.abs(expected - ours(sums, "mean", component)).max() > 0.1, "kinds that agree test nothing"


@pytest.mark.parametrize("component", COMPONENTS)
@torch.no_grad()
def test_resample_ablation(case, component):
    """Resample ablation puts in the donor's output."""
    sums, module, encoded, _, value_ids, _ = case
    place = COMPONENTS[component]
    own = forward(module, tokens_of(encoded))[place]
    expected = np.zeros(len(encoded))
    donors = draw_donors(encoded, draws=2, seed=DONOR_SEED)
    for draw in donors:
        taken = own.reshape(-1, own.shape[-1])[torch.tensor(draw)]
        logits = forward(module, tokens_of(encoded), {place: lambda x, taken=taken: taken})["out",]
        expected += margins(logits, encoded, value_ids) / len(donors)
    np.testing.assert_allclose(ours(sums, "resample", component), expected, rtol=1e-4, atol=1e-3)
    assert np.abs(expected - ours(sums, "mean", component)).max() > 0.1, "kinds that agree test nothing"


@pytest.mark.parametrize("component", COMPONENTS)
@torch.no_grad()
def test_random_control(case, component):
    """The random control takes steps as long as the output, in random directions; its sums tell these apart."""
    import jax

    sums, module, encoded, _, value_ids, _ = case
    layer = component[0]
    directions = np.asarray(jax.random.normal(jax.random.key(RANDOM_SEED), (RANDOM_DRAWS, SMALL_MODEL["d_model"])))
    directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    trace = forward(module, tokens_of(encoded))
    written = trace["head_out", *component] if len(component) == 2 else trace["mlp_out", layer]
    after = ("post_attn", layer) if len(component) == 2 else ("post_mlp", layer)
    by_direction = []
    for direction in directions:
        step = written.norm(dim=-1, keepdim=True) * torch.tensor(direction)
        logits = forward(module, tokens_of(encoded), {after: lambda x, step=step: x - step})["out",]
        by_direction.append(margins(logits, encoded, value_ids))
    expected = np.mean(by_direction, axis=0)
    np.testing.assert_allclose(ours(sums, "random", component), expected, rtol=1e-4, atol=1e-3)
    kind = "head" if len(component) == 2 else "mlp"
    by_split = np.stack(
        [np.array(by_direction)[:, encoded.splits == z].sum(axis=1) for z in range(len(SPLITS))], axis=1
    )
    np.testing.assert_allclose(sums[f"draws/{kind}/margin"][:, :, *component], by_split, rtol=1e-4, atol=1e-2)
    assert by_split.std(axis=0).min() > 0.1, "directions that agree test nothing"
