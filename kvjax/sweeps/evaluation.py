"""Full splits of a benchmark: answers, losses and roles, with the sweep's own program and no ablations."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from kvjax.model.decoder import DecoderConfig, Params
from kvjax.sweeps.compiled_sweep import CompiledSweep
from kvjax.sweeps.probe_index import ProbeIndex
from kvjax.sweeps.settings import SweepSettings
from kvjax.task.benchmark import Benchmark
from kvjax.task.encoding import TOKEN_ROLES, encode_records


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
        """Returns the fields an evaluation row of `metrics.jsonl` has."""
        fields = dataclasses.asdict(self)
        num_examples = fields.pop("total")
        del fields["correct"]
        return {"answer_accuracy": self.answer_accuracy, "num_examples": num_examples, **fields}


class SplitEvaluator:
    """Evaluates checkpoints of one shape on full splits, each read and encoded once."""

    def __init__(self, config: DecoderConfig, benchmark: Benchmark):
        self._config = config
        self._benchmark = benchmark

    def evaluate(self, params: Params, split: str, *, max_records: int | None = None) -> SplitEvaluation:
        """Returns one checkpoint's evaluation on a split, or on its first `max_records` records."""
        program, index = self._prepared(split, max_records)
        (measured,) = program.measure([params])
        encoded = index.encoded
        reads, roles = encoded.is_read, encoded.token_roles[:, 1:]
        correct = measured["read/correct"]
        role_counts = np.array([(roles == role).sum() for role in range(len(TOKEN_ROLES))])
        role_right = measured["token/role_correct"].sum(axis=0)
        return SplitEvaluation(
            correct=int(correct[reads].sum()),
            total=int(reads.sum()),
            answer_margin=float(measured["read/margin"][reads].mean(dtype=np.float64)),
            loss=float(measured["token/loss"].sum(dtype=np.float64) / role_counts.sum()),
            token_accuracy=float(role_right.sum() / role_counts.sum()),
            token_role_accuracy={
                role: float(right / count)
                for role, right, count in zip(TOKEN_ROLES, role_right, role_counts, strict=True)
            },
            token_role_count={role: int(count) for role, count in zip(TOKEN_ROLES, role_counts, strict=True)},
            slice_count={
                axis: {str(value): int((values[reads] == value).sum()) for value in np.unique(values[reads])}
                for axis, values in index.axis_values.items()
            },
            slice_accuracy={
                axis: {
                    str(value): float(correct[reads & (values == value)].mean()) for value in np.unique(values[reads])
                }
                for axis, values in index.axis_values.items()
            },
        )

    @functools.lru_cache(maxsize=16)  # noqa: B019  an evaluator lives as long as a command
    def _prepared(self, split: str, max_records: int | None) -> tuple[CompiledSweep, ProbeIndex]:
        records = self._benchmark.read_split(split)[:max_records]
        vocabulary = self._benchmark.vocabulary
        encoded = encode_records(records, vocabulary, [split], max_seq_len=self._config.max_seq_len)
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
