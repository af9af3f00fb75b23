"""The optimizer in a training config: AdamW without a name, SGD by name; messages about what is neither is plain."""

import json

import pytest

from kvjax.config.files import read_config
from kvjax.config.train import AdamWConfig, SGDConfig, TrainConfig
from kvjax.errors import InputError
from tests.helpers.training import SGD, small_train_config

ADAMW = {"learning_rate": 3e-3, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.95}


def read(tmp_path, optimization, **how):
    document = small_train_config("elsewhere").model_dump(mode="json") | {"optimization": optimization}
    (tmp_path / "train.json").write_text(json.dumps(document))
    return read_config(tmp_path / "train.json", TrainConfig, **how).optimization


@pytest.mark.parametrize(
    ("optimization", "kind"), [(ADAMW, AdamWConfig), (ADAMW | {"optimizer": "adamw"}, AdamWConfig), (SGD, SGDConfig)]
)
def test_optimizer_by_name(tmp_path, optimization, kind):
    """Settings are read as the named optimizer's, as AdamW's without a name, and written as they are read again."""
    settings = read(tmp_path, optimization)
    assert type(settings) is kind
    assert read(tmp_path, settings.model_dump(mode="json")) == settings


REFUSED = {
    "unknown": (ADAMW | {"optimizer": "lion"}, 'optimization.optimizer: expected "adamw" or "sgd"; found "lion"'),
    "null": (ADAMW | {"optimizer": None}, 'optimization.optimizer: expected "adamw" or "sgd"; found null'),
    "list": ([], r"optimization: expected an object with fields, perhaps an optimizer: .*; found \[\]"),
    "momentum": (ADAMW | {"momentum": 0.9}, "optimization.momentum: adamw has no such setting .sgd has: set optimizer"),
    "beta1": (
        SGD | {"beta1": 0.9},
        "optimization.beta1: sgd has no such setting .adamw has: set optimizer.; found 0.9",
    ),
    "dampening": (SGD | {"dampening": 0.1}, "optimization.dampening: sgd has no such setting; found 0.1"),
    "momentum of 1": (SGD | {"momentum": 1.0}, "optimization.momentum: Input should be less than 1; found 1.0"),
    "true": (SGD | {"momentum": True}, "optimization.momentum: expected a number, not true or false; found true"),
    "nesterov alone": (SGD | {"momentum": 0, "nesterov": True}, "optimization: nesterov needs a momentum above 0"),
    "no momentum": ({k: v for k, v in SGD.items() if k != "momentum"}, "expected a field optimization.momentum"),
    "in a section": (SGD | {"schedule": {"kind": "step"}}, "optimization.schedule.kind: Input should be 'constant' or"),
    "schedule": (
        SGD | {"schedule": {"kind": "cosine_decay", "min_learning_rate": 1.0}},
        "optimization: min_learning_rate 1.0 is not between 0 and learning_rate",
    ),
}


@pytest.mark.parametrize(("optimization", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, optimization, message):
    """What an optimizer has not, or cannot be, is named as the file has it."""
    with pytest.raises(InputError, match=rf"train.json: {message}"):
        read(tmp_path, optimization)


def test_records_of_others(tmp_path):
    """A run's own record may hold fields of any kind; those unknown are ignored."""
    assert read(tmp_path, SGD | {"dampening": 0.0, "foreach": None}, recorded=True) == read(tmp_path, SGD)
