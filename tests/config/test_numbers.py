"""Numbers of configs: what no run can use is refused by field, in every field of every config that has a number."""

import json
import math
import types
import typing

import pytest

from kvjax.config.base import Section
from kvjax.config.benchmark import BenchmarkConfig
from kvjax.config.files import find_config, read_config
from kvjax.config.run import RunConfig
from kvjax.config.train import TrainConfig
from kvjax.config.windows import WindowConfig
from kvjax.errors import InputError
from tests.helpers.building import run_config, small_benchmark_config
from tests.helpers.training import small_train_config

DOCUMENTS = {
    BenchmarkConfig: small_benchmark_config(),
    RunConfig: run_config("benchmark"),
    TrainConfig: small_train_config("benchmark").model_dump(mode="json"),
    WindowConfig: json.loads(find_config("default", "windows").read_text()),
}
# Fields for which a negative number, or one of any size, means something.
NEGATIVE = {"seed", "answer_accuracy", "q", "r", "w", "head_rank_correlation", "dropout", "num_workers"}
NEGATIVE |= {"max_analysis_batches", "decay_start_step"}
NUMBERS = {int, float, int | None, float | None, tuple[int, ...]}


def options_of(kind):
    """Lists the types that a union consists of, whatever else is noted of them."""
    if typing.get_origin(kind) is typing.Annotated:
        return options_of(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return [option for part in typing.get_args(kind) for option in options_of(part)]
    return [kind]


def number_fields(schema, prefix=()):
    """Yields the path and type of every field with a number, in sections within sections too."""
    for name, field in schema.model_fields.items():
        kind = field.annotation
        if kind in NUMBERS:
            yield (*prefix, name), kind
        sections = [option for option in options_of(kind) if isinstance(option, type) and issubclass(option, Section)]
        for section in sections[:1]:  # the first of several is what a document without a choice has
            yield from number_fields(section, (*prefix, name))


FIELDS = [(schema, path, kind) for schema in DOCUMENTS for path, kind in number_fields(schema)]


def read_with(tmp_path, schema, path, text):
    """Reads a sound config in which one field is written as a text of JSON."""
    document = json.loads(json.dumps(DOCUMENTS[schema]))
    part = document
    for name in path[:-1]:
        part = part.setdefault(name, {})
    part[path[-1]] = "HERE"
    file = tmp_path / "config.json"
    file.write_text(json.dumps(document).replace('"HERE"', text))
    return read_config(file, schema, recorded=schema is RunConfig)


def test_fields_found():
    """Every config has fields with numbers, those of nested sections included."""
    names = {(schema.__name__, *path) for schema, path, _ in FIELDS}
    assert ("TrainConfig", "optimization", "schedule", "min_learning_rate") in names
    assert ("WindowConfig", "triggers", "q", "shift_floor") in names
    assert ("RunConfig", "evaluation", "birth_thresholds", "q") in names
    assert ("BenchmarkConfig", "structural_ood", "query_lag", "max") in names


@pytest.mark.parametrize(("schema", "path", "kind"), FIELDS, ids=lambda part: str(getattr(part, "__name__", part)))
def test_number_that_cannot_be(tmp_path, schema, path, kind):
    """NaN, infinities, truth values, words and sizes beyond any array are refused with the field's name."""
    wrong = ["NaN", "Infinity", "-Infinity", "1e400", "true", '"nan"', '"many"', "[]", "{}", "9" * 5000]
    whole = kind not in (float, float | None)
    wrong += ["0.5"] if whole else []
    wrong += ["1" + "0" * 18] if whole and not path[-1].endswith("seed") else []
    wrong += ["-1"] if path[-1] not in NEGATIVE else []
    for text in wrong:
        given = f"[1, {text}]" if kind == tuple[int, ...] else text
        with pytest.raises(InputError) as refusal:
            read_with(tmp_path, schema, path, given)
        line = str(refusal.value)
        assert str(tmp_path / "config.json") in line and len(line.splitlines()) == 1 and len(line) < 600
        assert path[-1] in line or len(text) > 4300, (text, line)


@pytest.mark.parametrize("path", [("seed",), ("resample_seed",)])
def test_seed_of_many_digits(tmp_path, path):
    """A seed may have any number of digits, for Python and NumPy take it whole."""
    schema = BenchmarkConfig if path == ("seed",) else WindowConfig
    assert getattr(read_with(tmp_path, schema, path, "1" + "0" * 40), path[0]) == 10**40


@pytest.mark.parametrize("text", ["0.002", '"0.002"', "2e-3", '"2e-3"'])
def test_number_as_text(tmp_path, text):
    """A number in quotes, as some tools write 2e-3, is that number."""
    config = read_with(tmp_path, TrainConfig, ("optimization", "learning_rate"), text)
    assert math.isclose(config.optimization.learning_rate, 0.002)


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        (("num_keys",), "1000000000", "num_keys times num_values: expected a benchmark that fits into this machine's"),
        (("train", "num_samples"), "1000000000", "train.num_samples: expected a benchmark that fits"),
        (("counterfactual", "num_samples"), "1000000000", "counterfactual.num_samples: expected a benchmark that fits"),
        (
            ("test_iid", "overwrite_count", "max"),
            "1000000000",
            "test_iid.overwrite_count: expected at most num_values",
        ),
        (("test_iid", "num_queries", "max"), "1000000000", "test_iid.num_samples: expected a benchmark that fits"),
    ],
)
def test_benchmark_beyond_memory(tmp_path, path, text, complaint):
    """A benchmark that cannot be drawn here is refused by field before anything is drawn."""
    with pytest.raises(InputError, match="^" + str(tmp_path)) as refusal:
        read_with(tmp_path, BenchmarkConfig, path, text)
    assert complaint in str(refusal.value)


def test_model_beyond_memory(tmp_path):
    """A model whose parameters this machine cannot hold is refused by its sizes."""
    with pytest.raises(InputError, match=r"model: expected parameters that fit into .* d_model 10000000,"):
        read_with(tmp_path, TrainConfig, ("model", "d_model"), "10000000")
