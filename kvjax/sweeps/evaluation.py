"""Full splits of a benchmark: answers, losses and roles, with the sweep's own program and no ablations."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from kvjax.measure.sequence_sums import all_sequence_sums
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params
from kvjax.sweeps.compiled_sweep import CompiledSweep
from kvjax.sweeps.probe_index import ProbeIndex
from kvjax.sweeps.settings import SweepSettings
from kvjax.task.benchmark import Benchmark
from kvjax.task.encoding import TOKEN_ROLES, encode_records

# What a recorded evaluation shows of the declared measures.
_MEASURES = ("answer_margin", "loss", "token_accuracy", "token_role_accuracy", "slice_accuracy")


@dataclasses.dataclass(frozen=True)
class SplitEvaluation:
    """One checkpoint on one split.

    Attributes:
      correct, total: read events answered right, and all.
      answer_margin: mean over them, in logits.
      loss: mean cross-entropy over non-pad targets, in nats.
      token_accuracy: share of targets predicted right; `token_role_accuracy` by role, of `token_role_count` each.
      slice_accuracy: {axis: {value: answer accuracy}}, of `slice_count` reads each.
    """

    correct: int
    total: int
    answer_margin: float
    loss: float
    token_accuracy: float
    token_role_accuracy: dict[str, float]
    token_role_count: dict[str, int]
    slice_accuracy: dict[str, dict[str, float]]
    slice_count: dict[str, dict[str, int]]

    @property
    def answer_accuracy(self) -> float:
        return self.correct / self.total

    def to_row(self) -> dict[str, Any]:
        """Forms the fields of an evaluation row of `metrics.jsonl`."""
        fields = dataclasses.asdict(self)
        num_examples = fields.pop("total")
        del fields["correct"]
        return {"answer_accuracy": self.answer_accuracy, "num_examples": num_examples, **fields}


class SplitEvaluator:
    """Evaluates checkpoints of one shape on full splits, each read and encoded once."""

    def __init__(self, config: DecoderConfig, benchmark: Benchmark):
        self._config = config
        self._benchmark = benchmark

    def prepare(self, split: str, *, max_records: int | None = None) -> None:
        """Reads and encodes a split, so that what is wrong with it shows before anything is measured."""
        self._prepared(split, max_records)

    def evaluate(self, params: Params, split: str, *, max_records: int | None = None) -> SplitEvaluation:
        """Evaluates one checkpoint on a split, or on its first `max_records` records."""
        program, index = self._prepared(split, max_records)
        (measured,) = program.measure([params])
        arrays = {name: values[None] for name, values in measured.items()}
        counting, everyone = index.counting(arrays), index.members()[0]
        sums = {one.measure.name: one for one in all_sequence_sums(arrays, counting)}
        means = {name: sums[name].means(everyone)[0] for name in _MEASURES}
        correct, total = (int(side.sum()) for side in sums["answer_accuracy"].of_sequences(everyone))
        roles = sums["token_role_accuracy"].totals(everyone)[0].astype(int).tolist()
        slices = sums["slice_accuracy"].totals(everyone)[0].astype(int).tolist()
        return SplitEvaluation(
            correct=correct,
            total=total,
            answer_margin=float(means["answer_margin"]),
            loss=float(means["loss"]),
            token_accuracy=float(means["token_accuracy"]),
            token_role_accuracy=dict(zip(TOKEN_ROLES, means["token_role_accuracy"].tolist(), strict=True)),
            token_role_count=dict(zip(TOKEN_ROLES, roles, strict=True)),
            slice_accuracy=_by_axis(counting.labels["axis_value"], means["slice_accuracy"].tolist()),
            slice_count=_by_axis(counting.labels["axis_value"], slices),
        )

    @functools.lru_cache(maxsize=16)  # noqa: B019  an evaluator lives as long as a command
    def _prepared(self, split: str, max_records: int | None) -> tuple[CompiledSweep, ProbeIndex]:
        records = self._benchmark.read_split(split)[:max_records]
        vocabulary = self._benchmark.vocabulary
        limits = {"max_seq_len": self._config.max_seq_len, "source": self._benchmark.layout.split(split)}
        encoded = encode_records(records, vocabulary, [split], **limits)
        # One length for all: splits of one shape then share a program, and compiling outweighs some padding.
        program = CompiledSweep(
            self._config,
            vocabulary,
            encoded,
            num_splits=1,
            settings=SweepSettings(checkpoint_batch="1", ablations=(), probe="none", event_drift=False),
            max_buckets=1,
        )
        no_tags = dict.fromkeys((record["sample_id"] for record in records), "")
        return program, ProbeIndex.of(records, encoded, [split], no_tags)


def _by_axis(labels: Sequence[str], values: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Groups values by axis and level; a label reads `axis=level`."""
    grouped: dict[str, dict[str, Any]] = {}
    for label, value in zip(labels, values, strict=True):
        axis, _, level = label.partition("=")
        grouped.setdefault(axis, {})[level] = value
    return grouped
