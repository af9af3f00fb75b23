"""Sound checkpoint files of any trainer give the plain file's parameters, bit by bit."""

import argparse
import sys
import types

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from kvjax.errors import InputError
from tests.helpers.building import SMALL_MODEL, random_torch_model
from tests.helpers.checkpoint_files import (
    STATE,
    envelope,
    expected_params,
    opens_as_plain,
    params_of,
    parse,
    renamed,
    same,
    saved,
    small_state,
)

# Names


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"model.{name}",
        lambda name: f"model._orig_mod.{name}",
        lambda name: f"_forward_module.model.{name}",
        lambda name: name.replace("blocks.0.", "blocks.0._orig_mod."),
        lambda name: name.replace(".attn.", ".attn._orig_mod."),
        lambda name: name.replace(".ff.", "._checkpoint_wrapped_module.ff."),
        lambda name: name if name.startswith("lm_head") else f"transformer.{name}",
    ],
)
def test_names_of_wrappers(change):
    """Names that wrappers add around all parameters, or inside a block, are taken off without a note."""
    assert opens_as_plain(saved(envelope(model_state=renamed(STATE, change)))).notes == ()


def test_parameter_under_two_names():
    """A parameter that stands in a state both with and without a wrapper's name is refused by both names."""
    state = STATE | {"module.final_norm.bias": torch.zeros(24)}
    with pytest.raises(InputError, match=r"final_norm.bias once; found it as final_norm.bias and as module.final"):
        parse(saved(envelope(model_state=state)))


# Averages


def averaged_model(updates):
    module = random_torch_model(SMALL_MODEL, 40, 0, tied=False)
    averaged = AveragedModel(module)
    for _ in range(updates):
        averaged.update_parameters(module)
    return averaged


OTHER = small_state(seed=1)


@pytest.mark.parametrize(("updates", "note"), [(2, "averages over training"), (0, "n_averaged is 0")])
def test_averaged_weights_alone(updates, note):
    """A file of nothing but averaged weights gives them, with a note."""
    content = saved(envelope(model_state=averaged_model(updates).state_dict()))
    assert [note in found for found in opens_as_plain(content).notes] == [True]


@pytest.mark.parametrize(
    "document",
    [
        {"step": 250, "model_state": STATE, "ema": OTHER},
        {"step": 250, "ema_model_state": OTHER, "model": STATE},
        {
            "step": 250,
            "model_state": {"n_averaged": torch.tensor(3), **renamed(OTHER, lambda n: f"module.{n}")},
            "model": STATE,
        },
        {
            "global_step": 250,
            "state_dict": renamed(STATE, lambda n: f"model.{n}") | renamed(OTHER, lambda n: f"ema_model.module.{n}"),
        },
        {
            "global_step": 250,
            "state_dict": renamed(OTHER, lambda n: f"model.{n}"),
            "current_model_state": renamed(STATE, lambda n: f"model.{n}"),
            "averaging_state": {"n_averaged": torch.tensor(3)},
        },
        {
            "global_step": 250,
            "state_dict": renamed(OTHER, lambda n: f"second.module.{n}")
            | {"second.n_averaged": torch.tensor(3)}
            | renamed(STATE, lambda n: f"model.{n}"),
        },
    ],
    ids=["ema", "ema first", "n_averaged", "Lightning", "Lightning callback", "Lightning n_averaged"],
)
def test_averages_beside_trained_weights(document):
    """If a file holds both, the trained weights are taken, and a note says that averages were there."""
    notes = opens_as_plain(saved(document)).notes
    assert [note for note in notes if "averaged weights as well; the trained ones" in note]


def test_several_sets_of_weights():
    """Two sets of weights that differ are refused by name unless a name tells an average; equal ones are one."""
    with pytest.raises(InputError, match="one set of weights; found model and state_dict, which differ"):
        parse(saved({"step": 250, "model": STATE, "state_dict": OTHER}))
    both = renamed(STATE, lambda n: f"student.{n}") | renamed(OTHER, lambda n: f"teacher.{n}")
    with pytest.raises(InputError, match=r"one set of weights .*found student.token_embedding.*, teacher.token"):
        parse(saved(envelope(model_state=both)))
    opens_as_plain(saved({"step": 250, "model": STATE, "state_dict": STATE}))


# Envelopes and steps


@pytest.mark.parametrize("weights", ["model_state", "model", "model_state_dict", "state_dict", "module"])
@pytest.mark.parametrize("step", ["step", "global_step", "iter_num", "iteration"])
def test_envelopes(weights, step):
    """Weights and step are found under the names that trainers use."""
    document = {
        weights: STATE,
        step: 250,
        "epoch": 3,
        "rng_state": torch.get_rng_state(),
        "args": argparse.Namespace(a=1),
    }
    assert opens_as_plain(saved(document), step=250).notes == ()


def test_bare_state_dict():
    """A bare state dict takes its step from the file's name, with a note; without one it is refused."""
    assert ["records no step" in note for note in opens_as_plain(saved(STATE), step=250).notes] == [True]
    assert opens_as_plain(saved({**STATE, "step": torch.tensor(250)}), step=250).notes == ()
    with pytest.raises(InputError, match=r"a step \(step, global_step, iter_num, …\); found none"):
        parse(saved(STATE))


class Whole(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = random_torch_model(SMALL_MODEL, 40, 0, tied=False)
        self.register_buffer("scratch", torch.zeros(3, 5), persistent=False)


@pytest.mark.parametrize("document", [Whole(), envelope(model_state=Whole())], ids=["bare", "in an envelope"])
def test_whole_model_object(document):
    """A pickled module gives the tensors that its state dict would, with a note; its class is not loaded."""
    notes = opens_as_plain(saved(document), step=250).notes
    assert any("a whole model object" in note for note in notes)


@pytest.mark.parametrize(
    "step",
    [
        *(250.0, np.int64(250), np.float32(250), np.array(250), np.array([250])),
        *(torch.tensor(250), torch.tensor([250]), torch.tensor(250.0), torch.tensor(250.0, dtype=torch.bfloat16)),
    ],
    ids=str,
)
def test_types_of_the_step(step):
    """A whole number is the step, whatever type it was saved as."""
    assert type(opens_as_plain(saved(envelope(step=step)), step=250).step) is int


@pytest.mark.parametrize(
    "step", [2.5, -1, True, "250", float("nan"), torch.tensor(2.5), torch.tensor([1, 2]), [250]], ids=str
)
def test_steps_that_are_no_whole_numbers(step):
    """Anything else is no step."""
    with pytest.raises(InputError, match="a step that is a whole number; found"):
        parse(saved(envelope(step=step)))


def test_step_of_another_name():
    """A step other than the one in the file's name is refused; of several, one that agrees is taken with a note."""
    with pytest.raises(InputError, match="the checkpoint of step 300; found step 250, global_step 9"):
        parse(saved(envelope(global_step=9)), 300)
    notes = opens_as_plain(saved(envelope(step=3, global_step=250)), step=250).notes
    assert ["several steps" in note for note in notes] == [True]


# Tensors


def test_float64_weights():
    """float64 weights are narrowed, with a note; a value that float32 cannot hold is refused."""
    wide = {name: tensor.double() for name, tensor in STATE.items()}
    assert ["narrowed to float32" in note for note in opens_as_plain(saved(envelope(model_state=wide))).notes] == [True]
    wide["final_norm.bias"][3] = 1e300
    with pytest.raises(InputError, match=r"finite values in final_norm.bias; found 1 NaN or infinite"):
        params_of(parse(saved(envelope(model_state=wide))))


def test_numpy_weights():
    """Weights that were saved as NumPy arrays are the same weights."""
    opens_as_plain(saved(envelope(model_state={name: tensor.numpy() for name, tensor in STATE.items()})))


@pytest.mark.parametrize("missing", ["lm_head.weight", "token_embedding.weight"])
def test_tied_head_stored_once(missing):
    """A tied model that stores one of embedding and unembedding gives both, with a note."""
    state = small_state(tied=True)
    checkpoint = parse(saved(envelope(model_state={n: t for n, t in state.items() if n != missing})))
    assert same(params_of(checkpoint), expected_params(state)) and "unembedding" not in params_of(checkpoint)
    assert [missing in note for note in checkpoint.notes] == [True]


def test_missing_head_of_an_untied_model():
    """A missing unembedding is refused if the recorded config says that it is not tied."""
    state = {name: tensor for name, tensor in STATE.items() if name != "lm_head.weight"}
    config = {"train_spec": {"model": {"tie_embeddings": False}}}
    with pytest.raises(InputError, match=r"no lm_head.weight"):
        params_of(parse(saved(envelope(model_state=state, config=config))))


@pytest.mark.parametrize(
    ("name", "buffer"),
    [
        ("blocks.0.attn.mask", torch.ones(64, 64).tril().bool()),
        ("blocks.0.attn.bias", torch.ones(64, 64).tril().view(1, 1, 64, 64)),
        ("blocks.1.attn.mask", torch.ones(64, 64, dtype=torch.bool).triu(1)),
        ("attn_mask", torch.full((64, 64), float("-inf")).triu(1)),
        ("position_ids", torch.arange(64)[None]),
    ],
)
def test_buffers_beside_the_weights(name, buffer):
    """Causal masks and position numbers beside the weights are left out."""
    assert opens_as_plain(saved(envelope(model_state=STATE | {name: buffer}))).notes == ()


@pytest.mark.parametrize(
    "buffer",
    [torch.zeros(64, 64), torch.ones(64, 64).tril().triu(-4), torch.arange(1, 65), torch.ones(64), torch.zeros(1)],
    ids=["zeros", "band", "from 1", "ones", "one value"],
)
def test_unknown_tensors_beside_the_weights(buffer):
    """Any other tensor is refused by name: the model may compute with it."""
    with pytest.raises(InputError, match=r"unknown blocks.0.attn.mask"):
        params_of(parse(saved(envelope(model_state=STATE | {"blocks.0.attn.mask": buffer}))))


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (torch.eye(24).to_sparse(), "a sparse tensor"),
        (torch.empty(24, device="meta"), "a tensor without values, of the device meta"),
        (torch.zeros(24, dtype=torch.complex64), "found torch.complex64"),
        (torch.zeros(24).to(torch.float8_e4m3fn), "found torch.float8_e4m3fn"),
        (torch.zeros(24, dtype=torch.complex64).conj().imag, "negated or conjugated lazily"),
    ],
    ids=["sparse", "meta", "complex", "float8", "lazily negated"],
)
def test_tensors_without_plain_values(tensor, found):
    """Tensors that hold no plain floating-point numbers are refused by name and kind."""
    with pytest.raises(InputError, match=rf"for final_norm.bias; found .*{found}|for final_norm.bias; {found}"):
        parse(saved(envelope(model_state=STATE | {"final_norm.bias": tensor})))


@pytest.mark.parametrize("name", ["DTensor", "ShardedTensor"])
def test_shard_of_a_distributed_checkpoint(name, monkeypatch):
    """A shard of a distributed checkpoint is refused as that, by its class's name alone."""
    module = types.ModuleType("not_installed")
    shard = type(name, (), {"__module__": "not_installed"})
    setattr(module, name, shard)
    monkeypatch.setitem(sys.modules, "not_installed", module)
    content = saved(envelope(model_state=STATE | {"final_norm.bias": shard()}))
    with pytest.raises(InputError, match=f"a dense tensor for final_norm.bias; found a {name}, one process's shard"):
        parse(content)
