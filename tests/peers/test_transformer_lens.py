"""TransformerLens as an oracle: it is the same model, and its patches mean what PyTorch's own hooks say they mean."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import torch
from kvjax.converters.to_flax import to_flax

from kvjax.config.run import ModelConfig
from kvjax.execution.over_pairs import OverPairs
from kvjax.intervene.kinds.activation_patching import patching_effects
from kvjax.intervene.pair_runs import DENOISING, run_pairs
from kvjax.intervene.places import component_places, stage_places
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.transforms import plain_forward
from kvjax.task.benchmark import Benchmark
from kvjax.task.encoding import encode_records
from kvjax.task.pair_encoding import encode_pairs
from kvjax.task.pairs import generate_pairs
from kvjax.task.probe_set import generate_probe_set
from tests.helpers.building import SMALL_MODEL, as_numpy, fit_read_out, random_torch_model
from tests.oracles import pytorch_loops as oracle

pytest.importorskip("transformer_lens", reason="comes with the peers extra")

# The peers that benchmarks are timed against: a ratio means something only if the peer computes the same numbers.
from benchmarks.peers.torch_eager import TorchAblations
from benchmarks.peers.transformer_lens import (
    TransformerLensAblations,
    hooked_transformer,
    library_patch_means,
    patch_arrays,
)

VOCAB = 40
MODEL = ModelConfig.model_validate(SMALL_MODEL)
TINY = SMALL_MODEL | {"d_model": 12, "n_layers": 2, "n_heads": 3, "d_ff": 20, "max_seq_len": 9}


@pytest.mark.parametrize("tied", [True, False])
def test_logits(tied):
    """TransformerLens, PyTorch and kvjax give the same logits."""
    module = random_torch_model(SMALL_MODEL, VOCAB, 0, tied=tied)
    tokens = np.random.default_rng(0).integers(1, VOCAB, (4, MODEL.max_seq_len)).astype(np.int32)
    tokens[1, 12:] = tokens[2, 1:] = 0
    real = tokens != 0
    with torch.no_grad():
        theirs = hooked_transformer(MODEL, module.state_dict())(torch.from_numpy(tokens).long()).numpy()
        torchs = module(torch.from_numpy(tokens).long()).numpy()
    params = to_flax(as_numpy(module), MODEL, VOCAB, where="test")
    ours, _ = plain_forward(DecoderConfig.from_model_config(MODEL, VOCAB, tied=tied))(params, tokens)
    np.testing.assert_allclose(theirs[real], torchs[real], rtol=0, atol=1e-4)
    np.testing.assert_allclose(np.asarray(ours)[real], theirs[real], rtol=0, atol=1e-4)


def test_legacy_names():
    """Tensors under their legacy names are the same model."""
    module = random_torch_model(SMALL_MODEL, VOCAB, 0, tied=True)
    legacy = {
        name.replace(".ff.fc_in.", ".ff.net.0.").replace(".ff.fc_out.", ".ff.net.2."): tensor
        for name, tensor in module.state_dict().items()
    }
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        logits = [hooked_transformer(MODEL, state)(tokens) for state in (legacy, module.state_dict())]
    assert torch.equal(*logits)


def test_incomplete_weights():
    """Missing and misshapen weights are refused."""
    state = random_torch_model(SMALL_MODEL, VOCAB, 0, tied=True).state_dict()
    with pytest.raises(KeyError, match=r"k_proj\.bias"):
        hooked_transformer(MODEL, {n: t for n, t in state.items() if n != "blocks.1.attn.k_proj.bias"})
    with pytest.raises(RuntimeError, match="W_in"):
        hooked_transformer(MODEL, state | {"blocks.1.ff.fc_in.weight": torch.zeros(39, MODEL.d_model)})


def test_ablations(small_benchmark):
    """Ablations equal eager PyTorch's, and the clean pass equals a plain loop over reads."""
    benchmark = Benchmark.open(small_benchmark)
    records = benchmark.read_split("structural_ood")[:7]
    vocabulary = benchmark.vocabulary
    encoded = encode_records(records, vocabulary, ["structural_ood"], max_seq_len=MODEL.max_seq_len)
    assert len(set(encoded.lengths)) > 1, "padding must be among what is tested"
    module = random_torch_model(SMALL_MODEL, len(vocabulary.tokens), 0, tied=False)
    fit_read_out(module, records)
    hooked = hooked_transformer(MODEL, module.state_dict())
    theirs = TransformerLensAblations(hooked, encoded, vocabulary.value_ids, 3).measure()
    torchs = TorchAblations(module, encoded, vocabulary.value_ids, 4).measure()

    places = itertools.product(range(MODEL.n_layers), range(MODEL.n_heads))
    assert set(theirs) == set(torchs) == {(), *places, *((layer,) for layer in range(MODEL.n_layers))}
    for component, (correct, margin) in torchs.items():
        np.testing.assert_array_equal(theirs[component][0], correct)
        np.testing.assert_allclose(theirs[component][1], margin, rtol=0, atol=1e-3)
        if component:
            assert np.abs(margin - torchs[()][1]).max() > 0.1, "an ablation that changes nothing tests nothing"

    for n, record in enumerate(records):
        with torch.no_grad():
            logits = module(torch.tensor([record["token_ids"]]))[0]
        right, margins = 0, 0.0
        for read in oracle.reads_of(record["tokens"]):
            answer = record["token_ids"][read["answer"]]
            right += int(logits[read["predict"]].argmax()) == answer
            margins += oracle.margin(logits[read["predict"]], answer, list(vocabulary.value_ids))
        assert theirs[()][0][n] == right
        assert theirs[()][1][n] == pytest.approx(margins, abs=1e-3)


@pytest.fixture(scope="module")
def tiny():
    """A tiny model, and three pairs of different lengths, each with its changed token before p_e."""
    module = random_torch_model(TINY, 17, 1, tied=True)
    rng = np.random.default_rng(1)
    clean = rng.integers(1, 17, (3, 8))
    for row, length in enumerate((8, 6, 7)):
        clean[row, length:] = 0
    corrupted = clean.copy()
    changed = np.array([1, 2, 0])
    corrupted[range(3), changed] = 1 + clean[range(3), changed] % 16
    return module, clean, corrupted, changed, np.array([6, 4, 5]), np.array([3, 9, 11]), np.array([5, 2, 16])


def hook_at(module, site, layer, edit):
    """Registers `edit`, which changes a [1, T, D] activation in place, by PyTorch's own hooks."""
    block = module.blocks[layer]
    match site:
        # A LayerNorm is given the residual stream itself, so that what is written here is also what is added to.
        case "resid_pre":
            return block.ln_1.register_forward_pre_hook(lambda _, args: edit(args[0]))
        case "resid_mid":
            return block.ln_2.register_forward_pre_hook(lambda _, args: edit(args[0]))
        case "z":
            return block.attn.out_proj.register_forward_pre_hook(lambda _, args: edit(args[0]))
        case "mlp_out":
            return block.ff.register_forward_hook(lambda _, __, output: edit(output))


@torch.no_grad()
def run_edited(module, tokens, site, layer, edit):
    handle = hook_at(module, site, layer, edit)
    logits = module(torch.from_numpy(tokens)[None])[0]
    handle.remove()
    return logits


def test_patches(tiny):
    """Patches equal those of PyTorch's own hooks, one pair at a time."""
    module, clean, corrupted, _, positions, right, wrong = tiny
    hooked = hooked_transformer(ModelConfig.model_validate(TINY), module.state_dict())
    arrays = patch_arrays(hooked, clean, corrupted, positions, right, wrong)
    layers, heads, width = TINY["n_layers"], TINY["n_heads"], TINY["d_model"] // TINY["n_heads"]
    assert {site: m.shape for site, m in arrays.items()} == {
        "resid_pre": (layers, 8, 3),
        "resid_mid": (layers, 8, 3),
        "z": (layers, 8, heads, 3),
        "mlp_out": (layers, 8, 3),
    }
    for site, m in arrays.items():
        for n, layer in itertools.product(range(3), range(layers)):
            length = int((clean[n] != 0).sum())
            kept = {}
            run_edited(module, clean[n, :length], site, layer, lambda x, kept=kept: kept.update(x=x.clone()))
            for t, head in itertools.product(range(length), range(heads) if site == "z" else [None]):
                columns = slice(None) if head is None else slice(head * width, (head + 1) * width)

                def patch(x, t=t, columns=columns, source=kept["x"]):
                    x[0, t, columns] = source[0, t, columns]

                logits = run_edited(module, corrupted[n, :length], site, layer, patch)[positions[n]]
                place = (layer, t, n) if head is None else (layer, t, head, n)
                assert m[place] == pytest.approx(float(logits[right[n]] - logits[wrong[n]]), abs=1e-4), (site, place)


def test_patches_known_beforehand(tiny):
    """The changed token's first stream restores the clean run; unreached positions change nothing."""
    module, clean, corrupted, changed, positions, right, wrong = tiny
    hooked = hooked_transformer(ModelConfig.model_validate(TINY), module.state_dict())
    arrays = patch_arrays(hooked, clean, corrupted, positions, right, wrong)
    m_clean, m_corrupted = (
        np.array(
            [float(logits[p, a] - logits[p, b]) for logits, p, a, b in zip(each, positions, right, wrong, strict=True)]
        )
        for each in (module(torch.from_numpy(tokens)).detach() for tokens in (clean, corrupted))
    )
    assert (np.abs(m_clean - m_corrupted) > 0.1).all(), "a corruption that changes nothing tests nothing"
    # The first residual stream at the changed token is all that differs.
    np.testing.assert_allclose(arrays["resid_pre"][0, changed, range(3)], m_clean, rtol=0, atol=1e-4)
    for n in range(3):
        for m in arrays.values():
            for unreached in (m[:, : changed[n], ..., n], m[:, positions[n] + 1 :, ..., n]):
                np.testing.assert_allclose(unreached, m_corrupted[n], rtol=0, atol=1e-4)


def test_batches_and_sites(tiny):
    """Batches and a choice of sites change no value."""
    module, clean, corrupted, _, *answers = tiny
    hooked = hooked_transformer(ModelConfig.model_validate(TINY), module.state_dict())
    whole = patch_arrays(hooked, clean, corrupted, *answers)
    parts = patch_arrays(hooked, clean, corrupted, *answers, sites=("z", "resid_mid"), batch_size=2)
    assert set(parts) == {"z", "resid_mid"}
    for site, m in parts.items():
        np.testing.assert_allclose(m, whole[site], rtol=0, atol=1e-5)


def test_means_of_the_library(tiny):
    """TransformerLens's own patching functions give the means over pairs."""
    module, clean, corrupted, _, *answers = tiny
    hooked = hooked_transformer(ModelConfig.model_validate(TINY), module.state_dict())
    arrays = patch_arrays(hooked, clean, corrupted, *answers)
    means = library_patch_means(hooked, clean, corrupted, *answers)
    assert set(means) == {"resid_pre", "resid_mid"}
    for site, mean in means.items():
        np.testing.assert_allclose(mean, arrays[site].mean(axis=-1), rtol=0, atol=1e-4)


def test_pairs_that_do_not_fit(tiny):
    """Pairs of unequal shape are refused."""
    module, clean, corrupted, _, *answers = tiny
    hooked = hooked_transformer(ModelConfig.model_validate(TINY), module.state_dict())
    with pytest.raises(ValueError, match="one shape"):
        patch_arrays(hooked, clean, corrupted[:, :-1], *answers)
    with pytest.raises(ValueError, match="per pair"):
        patch_arrays(hooked, clean, corrupted, answers[0][:2], *answers[1:])
    with pytest.raises(ValueError, match="at most 9 tokens"):
        patch_arrays(hooked, np.tile(clean, 2), np.tile(corrupted, 2), *answers)


def test_patching_of_kvjax(small_benchmark, tmp_path):
    """kvjax's patching equals TransformerLens's at every layer and position."""
    benchmark = Benchmark.open(small_benchmark)
    probe = generate_probe_set(benchmark, tmp_path / "probe.jsonl", examples_per_split=8, fit_examples=16, seed=1)
    pairs = generate_pairs(probe, benchmark, pairs_per_kind=3).pairs
    encoded = encode_pairs(pairs, benchmark.vocabulary, max_seq_len=MODEL.max_seq_len)
    # Its metric is of one read of each pair.
    encoded = dataclasses.replace(encoded, is_affected=encoded.is_target)
    vocab_size = len(benchmark.vocabulary.tokens)
    module = random_torch_model(SMALL_MODEL, vocab_size, 2, tied=False)
    params = to_flax(as_numpy(module), MODEL, vocab_size, where="test")
    config = DecoderConfig.from_model_config(MODEL, vocab_size, tied=False)
    places = stage_places(MODEL.n_layers) | component_places(MODEL.n_layers, MODEL.n_heads)

    def measure(params, batch):
        runs = run_pairs(params, config, batch.pairs, DENOISING, window=batch.window)
        return patching_effects(params, config, runs, tuple(places.values()), batch.several)

    program = OverPairs(encoded, tokens_per_batch=400)
    ours = program.run(measure, jax.tree.map(lambda x: x[None], params))["logit_difference"][0]
    rows, target = np.arange(len(encoded)), encoded.is_target.argmax(axis=1)
    theirs = patch_arrays(
        hooked_transformer(MODEL, module.state_dict()),
        encoded.clean_tokens,
        encoded.corrupted_tokens,
        encoded.prediction_positions[rows, target],
        encoded.clean_answers[rows, target],
        encoded.corrupted_answers[rows, target],
    )
    compared = 0
    for name, place in places.items():
        match place.site:
            case "embedding":
                peer = theirs["resid_pre"][0]
            case "post_attn":
                peer = theirs["resid_mid"][place.layer]
            case "post_mlp" if place.layer + 1 < MODEL.n_layers:
                peer = theirs["resid_pre"][place.layer + 1]
            case "head_z":
                peer = theirs["z"][place.layer, :, place.head]
            case "mlp_out":
                peer = theirs["mlp_out"][place.layer]
            case _:
                continue
        for n in rows:
            first, last = int(encoded.first_changed[n]), int(encoded.last_affected[n])
            mine = ours[n, list(places).index(name), : last - first + 1]
            np.testing.assert_allclose(mine, peer[first : last + 1, n], rtol=1e-4, atol=1e-4, err_msg=name)
            # Before the change nothing differs, and what comes after the read does not reach it.
            outside = np.concatenate([peer[:first, n], peer[last + 1 :, n]])
            assert np.ptp(outside) < 1e-4
            compared += last - first + 1
    assert compared > 1000
