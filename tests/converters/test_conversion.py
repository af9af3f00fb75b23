"""Conversion of checkpoints: exact in both directions, certified, and unusable files refused by name."""

import json
import pickle
import re

import jax
import numpy as np
import pytest
import torch
from kvjax.converters.certificate import certify
from kvjax.converters.convert import convert_checkpoint
from kvjax.converters.convert_run import convert_run, export_run
from kvjax.converters.parameter_names import PARAMETERS, torch_names
from kvjax.converters.to_flax import to_flax
from kvjax.converters.to_torch import to_torch
from kvjax.converters.torch_checkpoint import read_checkpoint

from kvjax.artifacts.run_dir import RunDir
from kvjax.config.run import ModelConfig
from kvjax.errors import InputError
from kvjax.task.benchmark import Benchmark
from tests.helpers.building import SMALL_MODEL, STEPS, as_numpy, random_torch_model
from tests.helpers.malicious import Bomb, write_malicious

VOCAB = 40
MODEL = ModelConfig.model_validate(SMALL_MODEL)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def module(request):
    return random_torch_model(SMALL_MODEL, VOCAB, 0, tied=request.param)


def convert(state):
    return to_flax(state, MODEL, VOCAB, where="file.pt")


def test_names_and_shapes_of_the_parameter_table(module):
    """The table lists every tensor of the state once, in PyTorch's order, with its shape."""
    assert [name for name, _, _ in torch_names(MODEL.n_layers)] == list(module.state_dict())
    for name, parameter, _ in torch_names(MODEL.n_layers):
        assert parameter.torch_shape(MODEL, VOCAB) == tuple(module.state_dict()[name].shape)
    assert len({parameter.flax for parameter in PARAMETERS}) == len(PARAMETERS)


def test_round_trip(module):
    """A state converted to Flax and back is bit-identical, and tied exactly if it was."""
    state = module.state_dict()
    again = to_torch(convert(as_numpy(module)))
    assert list(again) == list(state)
    for name, tensor in state.items():
        assert torch.equal(again[name], tensor) and again[name].dtype == torch.float32
    same_storage = again["lm_head.weight"].data_ptr() == again["token_embedding.weight"].data_ptr()
    assert same_storage == torch.equal(state["lm_head.weight"], state["token_embedding.weight"])


def test_layout_of_flax_parameters():
    """Linears are transposed, and layers stacked on a leading axis."""
    state = as_numpy(random_torch_model(SMALL_MODEL, VOCAB, 0, tied=False))
    params = convert(state)
    np.testing.assert_array_equal(params["blocks"]["mlp"]["fc_in"]["kernel"][2], state["blocks.2.ff.fc_in.weight"].T)
    np.testing.assert_array_equal(params["unembedding"]["kernel"], state["lm_head.weight"].T)


def test_legacy_mlp_names(module):
    """Legacy names of MLP tensors are the same tensors."""
    state = as_numpy(module)
    legacy = {n.replace("ff.fc_in", "ff.net.0").replace("ff.fc_out", "ff.net.2"): a for n, a in state.items()}
    assert set(legacy) != set(state)
    assert jax.tree.all(jax.tree.map(np.array_equal, convert(legacy), convert(state)))


def altered(state, **changes):
    return {name: array for name, array in (state | changes).items() if array is not None}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: altered(s, **{"blocks.0.attn.q_proj.bias": None}), "no blocks.0.attn.q_proj.bias"),
        (lambda s: altered(s, **{"lm_head.weight": None}), "no lm_head.weight"),
        (lambda s: altered(s, extra=np.zeros(3)), "unknown extra"),
        (lambda s: altered(s, **{"blocks.3.ln_1.weight": np.zeros(24)}), "unknown blocks.3.ln_1.weight"),
        (
            lambda s: altered(s, **{"final_norm.bias": np.zeros(25, np.float32)}),
            r"final_norm.bias of shape \[24\]; found \[25\]",
        ),
        (
            lambda s: altered(s, **{"final_norm.bias": np.full(24, np.nan, np.float32)}),
            "finite values in final_norm.bias; found 24 NaN",
        ),
        (
            lambda s: altered(s, **{"blocks.0.ff.net.0.weight": s["blocks.0.ff.fc_in.weight"]}),
            "a mix of blocks.0.ff.net.0.weight and",
        ),
    ],
)
def test_unexpected_tensors(change, complaint):
    """A missing, unknown, misshapen, non-finite or doubly named tensor is refused by name."""
    state = as_numpy(random_torch_model(SMALL_MODEL, VOCAB, 0, tied=False))
    with pytest.raises(InputError, match=complaint):
        convert(change(state))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, module, dtype):
    """Half-precision tensors are widened to float32 exactly."""
    half = {name: tensor.to(dtype) for name, tensor in module.state_dict().items()}
    path = tmp_path / "half.pt"
    torch.save({"step": 3, "model_state": half}, path)
    state = read_checkpoint(path).state
    for name, tensor in half.items():
        widened = np.array(state[name], np.float32)
        assert torch.equal(torch.from_numpy(widened), tensor.float())


@pytest.mark.parametrize("name", ["optimizer_state", "optimizer", "optimizer_state_dict"])
def test_names_of_the_optimizer_state(tmp_path, module, name):
    """The optimiser's state is found under each of its names: groups as they are, tensors as arrays."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.5, betas=(0.25, 0.75))
    module(torch.ones(1, 3, dtype=torch.int64)).sum().backward()
    optimizer.step()
    path = tmp_path / "file.pt"
    torch.save({"step": 1, "model_state": module.state_dict(), name: optimizer.state_dict()}, path)
    found, saved = read_checkpoint(path).optimizer_state, optimizer.state_dict()
    assert found["param_groups"] == saved["param_groups"] and found["state"].keys() == saved["state"].keys()
    for index, entry in saved["state"].items():
        for kind, tensor in entry.items():
            assert isinstance(found["state"][index][kind], np.ndarray)
            assert np.array_equal(found["state"][index][kind], tensor.numpy())


def test_file_of_the_format_before_zip(tmp_path, module):
    """Files of PyTorch's older format load."""
    path = tmp_path / "old.pt"
    torch.save({"step": 3, "model_state": module.state_dict()}, path, _use_new_zipfile_serialization=False)
    assert read_checkpoint(path).step == 3


@pytest.mark.parametrize("kind", ["zip", "plain pickle"])
def test_malicious_file(tmp_path, kind):
    """A file whose pickle would run code is refused in one line, and nothing is executed."""
    path, target = tmp_path / "evil.pt", tmp_path / "executed"
    if kind == "zip":
        write_malicious(path, target)
    else:
        path.write_bytes(pickle.dumps(Bomb(target)))
    with pytest.raises(InputError, match=re.escape(str(path))) as caught:
        read_checkpoint(path)
    assert not target.exists()
    assert "\n" not in str(caught.value) and "nothing in it was executed" in str(caught.value)
    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.exists(), "the bomb itself works"


@pytest.mark.parametrize(
    ("write", "complaint"),
    [
        (lambda p: p.write_bytes(b""), "an empty file"),
        (lambda p: p.write_bytes(b"not a checkpoint"), "expected a"),
        (lambda p: torch.save([1, 2], p), "with step and model_state; found list"),
        (lambda p: torch.save({"step": 1}, p), "with step and model_state"),
        (
            lambda p: torch.save({"step": "one", "model_state": {}}, p),
            "a step that is a whole number; found one",
        ),
        (lambda p: torch.save({"step": 1, "model_state": {"a": 3}}, p), "expected a tensor for a; found int"),
        (
            lambda p: torch.save({"step": 1, "model_state": {"lm_head.weight": torch.zeros(2, dtype=torch.int64)}}, p),
            "half precision for lm_head.weight; found torch.int64",
        ),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, write, complaint):
    """Other content than a checkpoint's is refused with the file's name."""
    path = tmp_path / "file.pt"
    write(path)
    with pytest.raises(InputError, match=complaint) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(str(path))


def test_truncated_file(tmp_path, module):
    """A truncated file is refused with its name, wherever it was cut."""
    path = tmp_path / "step.pt"
    torch.save({"step": 3, "model_state": module.state_dict()}, path)
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="a whole PyTorch checkpoint"):
            read_checkpoint(path)


class TestCertificate:
    tokens = np.random.default_rng(0).integers(1, VOCAB, (4, 15)).astype(np.int32)

    def test_faithful_conversion(self, module):
        """A faithful conversion gets a certificate with a difference within the tolerance."""
        state = as_numpy(module)
        certificate = certify(state, convert(state), MODEL, self.tokens, where="file.pt")
        assert 0 < certificate.max_abs_difference <= 2e-4 * certificate.max_abs_logit
        assert certificate.num_sequences == 4

    def test_changed_weights(self, module):
        """One changed row of a kernel is refused."""
        state = as_numpy(module)
        params = jax.tree.map(np.array, convert(state))
        params["blocks"]["attn"]["q_proj"]["kernel"][1, 0, :] += 1.0
        with pytest.raises(InputError, match=r"file.pt: expected Flax logits within"):
            certify(state, params, MODEL, self.tokens, where="file.pt")

    @pytest.mark.parametrize("apart", [1e-5, 0.2], ids=["nearly tied", "apart"])
    def test_differing_argmax(self, apart):
        """A differing argmax counts as a near-tie if PyTorch's two largest logits nearly tie, and is refused otherwise.

        Two tokens' unembeddings change places, so that the answer differs at every position where either wins.
        """
        module = random_torch_model(SMALL_MODEL, VOCAB, 0, tied=False)
        state = as_numpy(module)
        tokens = torch.from_numpy(self.tokens).long()
        with torch.no_grad():
            often = int(module(tokens).argmax(-1).mode().values[0])
            unembedding = state["lm_head.weight"] = state["lm_head.weight"].copy()
            other = (often + 1) % VOCAB
            unembedding[other] = unembedding[often] * (1 - apart)
            module.load_state_dict({name: torch.from_numpy(x) for name, x in state.items()})
            wins = int(torch.isin(module(tokens).argmax(-1), torch.tensor([often, other])).sum())
        swapped = unembedding.copy()
        swapped[[often, other]] = unembedding[[other, often]]
        params = convert(state | {"lm_head.weight": swapped})
        assert wins > 5
        if apart > 0.1:
            with pytest.raises(InputError, match=f"a difference of .* and {wins} other answers"):
                certify(state, params, MODEL, self.tokens, where="file.pt")
        else:
            assert certify(state, params, MODEL, self.tokens, where="file.pt").argmax_near_ties == wins


@pytest.fixture
def benchmark(small_benchmark):
    return Benchmark.open(small_benchmark)


def test_checkpoint_of_another_vocabulary(small_run, benchmark):
    """A checkpoint that was trained on another vocabulary is refused."""
    run = RunDir.open(small_run)
    path = run.checkpoints[100]
    document = torch.load(path, weights_only=True)
    vocabulary = document["config"]["benchmark_metadata"]["vocabulary"]
    vocabulary["tokens"][-1] = vocabulary["value_tokens"][-1] = "V999"
    torch.save(document, path)
    with pytest.raises(InputError, match=r"step_000100.pt: expected a model of the benchmark's vocabulary .*V999"):
        convert_checkpoint(path, run.config, benchmark)


def test_checkpoint_of_another_run(small_run, benchmark):
    """A checkpoint whose recorded sizes differ from the run's is refused, even if its tensors fit."""
    run = RunDir.open(small_run)
    path = run.checkpoints[100]
    document = torch.load(path, weights_only=True)
    document["config"]["train_spec"]["model"]["n_heads"] = 2  # the tensors would fit all the same
    torch.save(document, path)
    with pytest.raises(InputError, match=r"expected n_heads 4 as in run_config.json; found n_heads 2"):
        convert_checkpoint(path, run.config, benchmark)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda d: d.update(config=[1]), None),
        (lambda d: d.update(metrics=torch.zeros(2)), "metrics (float32 [2])"),
        (lambda d: d["config"].update(train_spec="x"), None),
        (lambda d: d["config"].update(benchmark_metadata=[1]), None),
        (lambda d: d["config"]["benchmark_metadata"]["vocabulary"].update(key_tokens=[]), "vocabulary that its file"),
        (lambda d: d["config"]["benchmark_metadata"].update(vocabulary=None), "vocabulary that its file"),
        (lambda d: d["metrics"].update(loss=float("nan")), "metrics.loss (nan)"),
    ],
)
def test_odd_records_of_a_run(small_run, benchmark, change, note):
    """What stands beside a run's weights never makes them unusable; a note names what is not kept or compared."""
    run = RunDir.open(small_run)
    path = run.checkpoints[100]
    before = convert_checkpoint(path, run.config, benchmark)
    document = torch.load(path, weights_only=True)
    change(document)
    torch.save(document, path)
    after = convert_checkpoint(path, run.config, benchmark)
    assert jax.tree.all(jax.tree.map(np.array_equal, before.params, after.params))
    assert [note in found for found in after.notes] == ([True] if note else [])


@pytest.mark.parametrize("verify", ["sample", "all", "metrics", "none"])
def test_round_trip_of_a_run(small_run, benchmark, verify):
    """A run converted to the store and exported again has its own tensors, configs and steps."""
    run = RunDir.open(small_run)
    report = convert_run(run, benchmark, verify=verify, advance=lambda n: None)
    assert report.steps == list(STEPS) and (report.largest_difference is None) == (verify == "none")
    assert len(report.metric_checks) == (len(STEPS) if verify == "metrics" else 0)
    exported = export_run(run, verify="sample", advance=lambda n: None)
    for step, path in run.checkpoints.items():
        original = torch.load(path, weights_only=True)
        again = torch.load(exported.folder / f"step_{step:06d}.pt", weights_only=True)
        assert again["step"] == step and again["config"] == original["config"]
        assert list(again["model_state"]) == list(original["model_state"])
        assert all(torch.equal(again["model_state"][n], t) for n, t in original["model_state"].items())


def test_recorded_accuracy_that_differs(small_run, benchmark):
    """A recorded accuracy that the checkpoint does not reproduce stops the conversion; nothing is stored."""
    path = small_run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["answer_accuracy"] += 3 / rows[1]["num_examples"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"step_000200.pt: expected the answer_accuracy the run recorded"):
        convert_run(RunDir.open(small_run), benchmark, verify="metrics", advance=lambda n: None)
    assert not (small_run / "analysis" / "converted").exists()


def test_recorded_accuracies_before_a_resume(small_run, benchmark):
    """Accuracies that a resume took back are not compared: their checkpoints were replaced."""
    path = small_run / "metrics.jsonl"
    first, *later = [json.loads(line) for line in path.read_text().splitlines()]
    taken_back = [row | {"answer_accuracy": 1 - row["answer_accuracy"]} for row in later]
    rows = [first, *taken_back, {"phase": "resume", "step": STEPS[0], "num_steps": STEPS[-1]}, *later]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = convert_run(RunDir.open(small_run), benchmark, verify="metrics", advance=lambda n: None)
    assert [check.step for check in report.metric_checks] == list(STEPS)


def test_verification_by_metrics_without_a_record(small_run, benchmark):
    """A run without recorded evaluations cannot be verified by them."""
    (small_run / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match="an evaluation recorded"):
        convert_run(RunDir.open(small_run), benchmark, verify="metrics", advance=lambda n: None)
