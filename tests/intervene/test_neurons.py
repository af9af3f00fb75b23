"""Neurons, spectra and attribution scores against PyTorch."""

import functools

import jax
import numpy as np
import pytest
import torch

from kvjax.execution.over_pairs import OverPairs
from kvjax.intervene.kinds.attribution_patching import ScoreByGradients
from kvjax.intervene.kinds.neurons import neuron_effects
from kvjax.intervene.paths import all_edges, all_senders
from kvjax.task.benchmark import Benchmark
from kvjax.task.encoding import encode_records
from tests.helpers.building import SMALL_MODEL, read_lines
from tests.oracles.patching import forward
from tests.oracles.pytorch_loops import margin, reads_of


@pytest.fixture(scope="module")
def records(small_benchmark):
    return read_lines(small_benchmark / "test_iid.jsonl")[:3]


def test_neuron_ablation(model, records, small_benchmark):
    """Margins, write strengths and attributions of single neurons are PyTorch's."""
    module, params, config = model
    benchmark = Benchmark.open(small_benchmark)
    vocabulary = benchmark.vocabulary
    encoded = encode_records(records, vocabulary, ["test_iid"], max_seq_len=SMALL_MODEL["max_seq_len"])
    horizon = int(encoded.prediction_positions.max()) + 1
    measure = functools.partial(neuron_effects, config=config, horizon=horizon, value_ids=vocabulary.value_ids)
    ours = jax.device_get(jax.jit(lambda params, batch: measure(params, batch=batch))(params, encoded))
    value_ids = vocabulary.value_ids.tolist()
    for layer, neuron in ((0, 3), (1, 17), (2, 39)):
        linear = module.blocks[layer].ff.fc_out
        kept = linear.weight[:, neuron].clone()
        with torch.no_grad():
            for n, record in enumerate(records):
                ids = torch.tensor([record["token_ids"]])
                reads = reads_of(record["tokens"])
                hidden = _hidden(module, ids, layer)[0, :, neuron]
                linear.weight[:, neuron] = 0.0
                logits = module(ids)[0]
                linear.weight[:, neuron] = kept
                margins = [margin(logits[r["predict"]], int(ids[0, r["answer"]]), value_ids) for r in reads]
                np.testing.assert_allclose(ours["margin"][n, layer, neuron], sum(margins), rtol=1e-4, atol=1e-3)
                strength = sum(abs(float(hidden[r["predict"]])) for r in reads)
                np.testing.assert_allclose(ours["activation"][n, layer, neuron], strength, rtol=1e-4, atol=1e-5)
    total = ours["direct_logit_attribution"].sum(axis=2) + _bias_attribution(module, records, vocabulary)
    np.testing.assert_allclose(total, _mlp_attribution(module, records, vocabulary), rtol=1e-3, atol=1e-3)


def _hidden(module, ids, layer):
    record = forward(module, ids)
    block = module.blocks[layer]
    return torch.nn.functional.gelu(block.ff.fc_in(block.ln_2(record["mlp", layer, None])))


def _attributions(module, records, vocabulary, output):
    """What an output [B, T, D] of each layer adds to the answers, summed over reads: [records, layers]."""
    found = np.zeros((len(records), len(module.blocks)))
    with torch.no_grad():
        for n, record in enumerate(records):
            ids = torch.tensor([record["token_ids"]])
            trace = forward(module, ids)
            final = trace["post_mlp", len(module.blocks) - 1][0]
            for read in reads_of(record["tokens"]):
                at, answer = read["predict"], int(ids[0, read["answer"]])
                target = module.lm_head.weight[answer] - module.lm_head.weight[vocabulary.value_ids.tolist()].mean(0)
                scale = torch.sqrt(final[at].var(unbiased=False) + 1e-5)
                for layer in range(len(module.blocks)):
                    x = output(trace, layer, at)
                    found[n, layer] += float(((x - x.mean()) / scale * module.final_norm.weight) @ target)
    return found


def _mlp_attribution(module, records, vocabulary):
    return _attributions(module, records, vocabulary, lambda trace, layer, at: trace["mlp_out", layer][0, at])


def _bias_attribution(module, records, vocabulary):
    """The neurons and the output bias make up the MLP."""
    return _attributions(module, records, vocabulary, lambda trace, layer, at: module.blocks[layer].ff.fc_out.bias)


@pytest.fixture(scope="module")
def scores(model, encoded):
    """Scores by metric."""
    _, params, config = model
    pairs, stacked = OverPairs(encoded, tokens_per_batch=2000), jax.tree.map(lambda x: x[None], params)
    return {name: pairs.run(ScoreByGradients(config, name), stacked) for name in ("logit_difference", "answer_loss")}


@pytest.mark.parametrize("metric", ["logit_difference", "answer_loss"])
def test_attribution_scores(model, encoded, scores, metric):
    """Gradients by PyTorch's autograd in the corrupted run, times the change of the sender's output."""
    module, scores = model[0], scores[metric]
    clean, corrupted = (torch.tensor(x).long() for x in (encoded.clean_tokens, encoded.corrupted_tokens))
    with torch.no_grad():
        source = forward(module, clean)
    # Added zeros at every output and input: their gradients are the gradients there.
    zeros, edits = {}, {}
    for place, x in source.items():
        if place[0] not in ("out", "head_out"):
            zeros[place] = torch.zeros_like(x, requires_grad=True)
            edits[place] = lambda x, place=place: x + zeros[place]
    base = forward(module, corrupted, edits)
    n, q = np.nonzero(encoded.is_affected)
    at = base["out",][n, encoded.prediction_positions[n, q]]
    rows = np.arange(len(n))
    clean_answers = encoded.clean_answers[n, q]
    if metric == "answer_loss":
        torch.nn.functional.cross_entropy(at, torch.tensor(clean_answers).long(), reduction="sum").backward()
    else:
        (at[rows, clean_answers] - at[rows, encoded.corrupted_answers[n, q]]).sum().backward()

    def change(sender):
        place = {"embedding": ("embedding",), "mlp": ("mlp_out", sender.layer)}.get(sender.kind)
        place = place or ("head_out", sender.layer, sender.head)
        return source[place] - base[place].detach()

    senders = all_senders(3, 4)
    for index, sender in enumerate(senders):
        if sender.kind == "head":
            z = ("z", sender.layer, sender.head)
            expected = ((source[z] - base[z].detach()) * zeros[z].grad).sum(dim=(1, 2))
        else:
            place = ("embedding",) if sender.kind == "embedding" else ("mlp_out", sender.layer)
            expected = (change(sender) * zeros[place].grad).sum(dim=(1, 2))
        np.testing.assert_allclose(scores["nodes/gradient"][0, :, index], expected, rtol=2e-3, atol=2e-3)
    for index, (sender, receiver) in enumerate(all_edges(3, 4)):
        kind = receiver.site.removesuffix("_input")
        place = {"logits": ("logits", None, None), "mlp": ("mlp", receiver.layer, None)}.get(
            kind, (kind, receiver.layer, receiver.head)
        )
        expected = (change(sender) * zeros[place].grad).sum(dim=(1, 2))
        np.testing.assert_allclose(scores["edges/gradient"][0, :, index], expected, rtol=2e-3, atol=2e-3)


def test_integrated_gradients_of_the_embedding(model, encoded, scores):
    """The embedding's integrated gradient is the whole change of the metric, but for the steps of the integral."""
    module, scores = model[0], scores["logit_difference"]
    with torch.no_grad():
        change = np.zeros(len(encoded))
        for sign, tokens in ((1, encoded.clean_tokens), (-1, encoded.corrupted_tokens)):
            logits = module(torch.tensor(tokens).long()).numpy()
            for n, q in zip(*np.nonzero(encoded.is_affected), strict=True):
                at = logits[n, encoded.prediction_positions[n, q]]
                change[n] += sign * (at[encoded.clean_answers[n, q]] - at[encoded.corrupted_answers[n, q]])
    integrated = scores["nodes/integrated_gradients"][0, :, 0]
    once = scores["nodes/gradient"][0, :, 0]
    assert np.abs(integrated - change).mean() < 0.3 * np.abs(once - change).mean()
