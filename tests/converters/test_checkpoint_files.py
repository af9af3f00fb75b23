"""Checkpoint files as people have them: damage is refused, sound files give the plain file's parameters bit by bit."""

import argparse
import collections
import datetime
import gzip
import io
import os
import random
import struct
import sys
import tracemalloc
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel
from torch.serialization import set_crc32_options

from kvjax.artifacts.files import HashedFile
from kvjax.errors import InputError
from tests.helpers.building import SMALL_MODEL, random_torch_model
from tests.helpers.checkpoint_files import expected_params, params_of, parse, same, saved, small_state

STATE = small_state()
PLAIN = expected_params(STATE)


def envelope(**changes):
    return {"step": 250, "model_state": STATE} | changes


def opens_as_plain(content, *, step=None):
    """Parses a file that must hold the plain file's parameters; returns it."""
    checkpoint = parse(content, step)
    assert same(params_of(checkpoint), PLAIN) and checkpoint.step == 250
    return checkpoint


def renamed(state, change):
    return {change(name): tensor for name, tensor in state.items()}


def rezipped(content, *, compression=zipfile.ZIP_STORED, **more):
    """Returns an archive written again by another tool, with more records in its folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w", compression) as out:
        for name in source.namelist():
            out.writestr(name, source.read(name))
        for name, record in more.items():
            out.writestr(f"archive/{name}", record, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


# Damaged bytes


def test_random_damage():
    """No file with flipped, zeroed, cut or lost bytes is read as other parameters."""
    whole = saved(envelope(metrics={"validation_iid": {"loss": 0.5}}))
    rng, refused = random.Random(1), 0
    for _ in range(100):
        content, at = bytearray(whole), rng.randrange(len(whole))
        kind, size = rng.choice(["flip", "zero", "cut", "lose"]), rng.randrange(1, 4096)
        if kind == "flip":
            content[at] ^= 1 << rng.randrange(8)
        elif kind == "zero":
            content[at : at + size] = bytes(len(content[at : at + size]))
        elif kind == "cut":
            del content[at:]
        else:
            del content[at : at + size]
        try:
            assert same(params_of(parse(bytes(content))), PLAIN), (kind, at, size)
        except InputError as error:
            refused += 1
            assert str(error).startswith("step.pt: expected ") and "\n" not in str(error)
    assert refused > 70


def test_damaged_record_by_name():
    """One flipped bit of a tensor is refused by the record's name, even in a record that no weight needs."""
    whole = saved(envelope(optimizer_state={"state": {0: {"exp_avg": torch.full((7,), 1.25)}}, "param_groups": []}))
    at = whole.index(struct.pack("<f", 1.25) * 7)
    content = bytearray(whole)
    content[at] ^= 1
    with pytest.raises(InputError, match=r"damaged file \(record archive/data/\d+ does not match its CRC-32\)"):
        parse(bytes(content))


def test_two_records_of_one_name():
    """A file with two records of one name is refused: PyTorch reads the first, other tools the last."""
    buffer = io.BytesIO(saved(envelope()))
    with zipfile.ZipFile(buffer, "a") as out, pytest.warns(UserWarning, match="Duplicate name"):
        out.writestr("archive/data/0", bytes(STATE["token_embedding.weight"].nbytes))
    with pytest.raises(InputError, match="several records of one name"):
        parse(buffer.getvalue())


def test_file_saved_without_checksums():
    """A file that torch saved without checksums opens, with a note that nothing vouches for it."""
    set_crc32_options(False)
    try:
        content = saved(envelope())
    finally:
        set_crc32_options(True)
    assert any("nothing vouches" in note for note in opens_as_plain(content).notes)


@pytest.mark.parametrize("cut", [1, 5000, 60_000])
def test_old_format(cut):
    """A file of the format before zip opens with a note that nothing vouches for it, and a truncated one is refused."""
    content = saved(envelope(), _use_new_zipfile_serialization=False)
    assert any("nothing vouches" in note for note in opens_as_plain(content).notes)
    for damaged in (content[:-cut], content + b"x" * cut):
        with pytest.raises(InputError, match="a damaged file"):
            parse(damaged)


def test_old_format_with_a_huge_memo():
    """A damaged memo index of gigabytes is refused before memory is reserved for it."""
    content = saved(envelope(), _use_new_zipfile_serialization=False)
    at = next(
        at for at in range(400, len(content)) if content[at : at + 1] == b"r" and content[at + 2 : at + 5] == b"\1\0\0"
    )
    with pytest.raises(InputError, match="a shorter memo"):
        parse(content[: at + 4] + b"\x70" + content[at + 5 :])


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


# Memory


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_memory_of_misshapen_tensors(compression):
    """A view far larger than its storage, and a record that nothing reads, take no memory; the shape is refused."""
    huge = torch.zeros(1, dtype=torch.float16).expand(20_000, 20_000)
    content = saved(envelope(model_state=STATE | {"final_norm.bias": huge}))
    content = rezipped(content, compression=compression, **{"data/unused": bytes(40 << 20)})
    tracemalloc.start()
    with pytest.raises(InputError, match=r"final_norm.bias of shape \[24\]; found \[20000, 20000\]"):
        params_of(parse(content))
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_views():
    """Transposed, strided and expanded views are read as the tensors they are."""
    wide = torch.zeros(24, 80)
    wide[:, ::2] = STATE["blocks.0.ff.fc_out.weight"]
    views = {
        "blocks.0.attn.q_proj.weight": STATE["blocks.0.attn.q_proj.weight"].T.contiguous().T,
        "blocks.0.ff.fc_out.weight": wide[:, ::2],
        "final_norm.weight": torch.full((1,), 0.5).expand(24),
    }
    found = params_of(parse(saved(envelope(model_state=STATE | views))))
    assert same(found, expected_params(STATE | {"final_norm.weight": torch.full((24,), 0.5)}))


def test_archive_of_another_tool():
    """An archive that was unpacked and compressed again holds the same parameters."""
    opens_as_plain(rezipped(saved(envelope()), compression=zipfile.ZIP_DEFLATED))


# What stands beside the weights


class NotInstalled:
    """Stands for a trainer's own class."""

    def __init__(self):
        self.lr, self.layers = 0.5, [1, 2]


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return (self.function, self.args)


class NotInstalledDict(dict):
    """Stands for a trainer's own mapping."""


Pair = collections.namedtuple("Pair", "loss accuracy")


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (float("nan"), None),
        (torch.tensor(0.5), 0.5),
        (torch.tensor(3), 3),
        (torch.tensor(float("inf")), None),
        (np.float64(0.25), 0.25),
        (np.bool_(True), True),
        (np.array([7]), 7),
        (np.arange(6).reshape(2, 3), "int64 [2, 3]"),
        (np.array([{}], object), "numpy.ndarray"),
        (np.array("2020-01-01", "datetime64[D]")[()], "numpy.ndarray"),
        (torch.zeros(2, 3, dtype=torch.bfloat16), "bfloat16 [2, 3]"),
        (torch.float32, "torch.float32"),
        (torch.device("cuda", 1), "cuda:1"),
        (torch.Size([2, 3]), [2, 3]),
        ({2, 1}, [1, 2]),
        (frozenset({"a"}), ["a"]),
        (Path("/a/b"), "/a/b"),
        (argparse.Namespace(lr=0.1), {"lr": 0.1}),
        (NotInstalled(), {"lr": 0.5, "layers": [1, 2]}),
        (NotInstalledDict(a=1), {"a": 1}),
        (collections.OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (collections.defaultdict(list, {1: [2]}), {"1": [2]}),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.deque([1, 2], 3), [1, 2]),
        (Pair(1, 2), f"{__name__}.Pair"),
        (datetime.date(2020, 1, 1), "datetime.date"),
        (np.random.default_rng, "numpy.random._generator.default_rng"),
        (np.dtype("float32"), "numpy.dtype('f4')"),
        (b"ab", "b'ab'"),
        (bytearray(b""), "b''"),
        (1 + 2j, "(1+2j)"),
        (10**30, hex(10**30)),
        (float, "builtins.float"),
        (slice(1, 2), "builtins.slice"),
        (NotInstalled, f"{__name__}.NotInstalled"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_values_beside_the_weights(value, kept, protocol):
    """Whatever stands beside the weights, they open; it is kept as the nearest JSON value."""
    document = envelope(metrics={"validation_iid": {"value": value}}, config={"args": value}, extra=value)
    checkpoint = opens_as_plain(saved(document, pickle_protocol=protocol))
    if "numpy.random" in str(kept):  # the module's name is NumPy's own business
        assert checkpoint.config["args"].startswith("numpy.random.")
    else:
        assert checkpoint.config == {"args": kept} and type(checkpoint.config["args"]) is type(kept)
        assert checkpoint.metrics == {"validation_iid": {"value": kept}}


def test_note_on_values_beside_the_weights():
    """A note names the places whose value JSON cannot hold, and only those."""
    metrics = {"loss": float("nan"), "accuracy": np.float64(0.5), "kinds": {1}}
    config = {"args": argparse.Namespace(device=torch.device("cpu"), dtype=torch.float16)}
    (note,) = opens_as_plain(saved(envelope(metrics=metrics, config=config))).notes
    assert note.endswith("list or null: config.args (argparse.Namespace), metrics.loss (nan), metrics.kinds (set)")


@pytest.mark.parametrize("config", [[1, 2], 0.5, NotInstalled(), None], ids=lambda value: type(value).__name__)
def test_config_that_is_no_mapping(config):
    """A config that is no mapping is kept under its name, or as its attributes."""
    kept = {"NotInstalled": {"lr": 0.5, "layers": [1, 2]}, "NoneType": {}}.get(
        type(config).__name__, {"config": config}
    )
    assert opens_as_plain(saved(envelope(config=config))).config == kept


@pytest.mark.parametrize(
    "state", ["adamw", [{"state": {}}], Calls(os.getcwd), None], ids=lambda value: type(value).__name__
)
def test_optimizer_that_is_no_mapping(state):
    """An optimiser's name or object in place of its state is no state, and the weights open."""
    assert opens_as_plain(saved(envelope(optimizer=state))).optimizer_state == {}
    kept = {"param_groups": [], "state": {}}
    assert opens_as_plain(saved(envelope(optimizer=state, optimizer_state_dict=kept))).optimizer_state == kept


def test_lists_that_name_each_other(monkeypatch):
    """A config whose JSON would have 2^60 values, and one that holds itself, are cut off with a note."""
    monkeypatch.setattr("kvjax.converters.plain_values._MOST_VALUES", 1000)
    doubling = [1]
    for _ in range(60):
        doubling = [doubling, doubling]
    holding_itself = {}
    holding_itself["itself"] = holding_itself
    for config in ({"a": doubling}, holding_itself):
        assert "more than is kept" in opens_as_plain(saved(envelope(config=config))).notes[0]


@pytest.mark.parametrize("where", ["config", "metrics", "optimizer_state", "extra", "step"])
def test_functions_in_a_pickle(where, monkeypatch):
    """A function that a pickle names is not called, wherever in the document it stands."""
    content, called = saved(envelope(**{where: {"a": Calls(os.getcwd)} if where != "step" else Calls(os.getcwd)})), []
    monkeypatch.setattr(f"{os.getcwd.__module__}.getcwd", lambda: called.append(1))
    if where == "step":
        with pytest.raises(InputError, match=r"a step that is a whole number; found \w+.getcwd"):
            parse(content)
    else:
        opens_as_plain(content)
    torch.load(io.BytesIO(content), weights_only=False)
    assert called == [1], "only by torch.load itself"


def test_attributes_of_functions(monkeypatch):
    """A pickle cannot change the functions that read it."""
    content = rezipped(saved(envelope()))
    attack = b"\x80\x02c_codecs\nencode\nN}X\x04\x00\x00\x00makeX\x01\x00\x00\x00xs\x86b."
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        records = {name: source.read(name) for name in source.namelist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        for name, record in records.items():
            out.writestr(name, attack if name.endswith("data.pkl") else record)
    with pytest.raises(InputError, match="attributes for a function"):
        parse(buffer.getvalue())
    opens_as_plain(saved(envelope(config={"a": b"bytes"})))


# What is no checkpoint


def zip_of(**records):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        for name, record in records.items():
            out.writestr(name.replace("__", "/"), record)
    return buffer.getvalue()


def torchscript():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            "a Git LFS pointer .*git lfs pull",
        ),
        (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page"),
        (struct.pack("<Q", 40) + b'{"a":{"dtype":"F32","shape":[1]}}' + bytes(50), "a safetensors file"),
        (gzip.compress(saved(envelope())), "a gzip file"),
        (b'{"step": 250}', "a JSON file"),
        (b"not a checkpoint", "a file of another kind, or damage"),
        (bytes(1000), "a file of another kind, or damage"),
        (zip_of(a=b"1", b=b"2"), r"a zip archive of other files \(a, b\)"),
        (zip_of(**{"arr_0.npy": b"1"}), "a zip archive of NumPy arrays"),
        (zip_of(a__constants__pkl=b"", **{"a/constants.pkl": b"", "a/data.pkl": b""}), "a TorchScript archive"),
    ],
)
def test_other_files_under_the_name(content, found):
    """A file that torch.save did not write is named as what it is, with the remedy, and never with torch's advice."""
    with pytest.raises(
        InputError, match=f"step.pt: expected a checkpoint written by torch.save; found {found}"
    ) as caught:
        parse(content)
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)


def test_paths_that_are_no_files(tmp_path):
    """A directory, a dangling link and a missing file are named as what they are."""
    (tmp_path / "step.pt").mkdir()
    (tmp_path / "link.pt").symlink_to(tmp_path / "gone.pt")
    for name, found in (
        ("step", "a directory"),
        ("link", "a link to .*gone.pt, which does not"),
        ("gone", "no such file"),
    ):
        with pytest.raises(InputError, match=rf"{name}.pt: expected a PyTorch checkpoint; found {found}"):
            HashedFile.read(tmp_path / f"{name}.pt", "a PyTorch checkpoint")
