"""Whatever stands beside the weights of a checkpoint file is read without executing anything, or kept as text."""

import argparse
import collections
import datetime
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from kvjax.errors import InputError
from tests.helpers.checkpoint_files import envelope, opens_as_plain, parse, rezipped, saved


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
