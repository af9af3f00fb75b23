"""Answer accuracy on full splits of a benchmark, with the sweep's own program and no ablations."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from kvjax.model.decoder import DecoderConfig, Params
from kvjax.sweep.stream import ProbeProgram, SweepSettings
from kvjax.task.benchmark import Benchmark
from kvjax.task.encoding import encode_records


@dataclasses.dataclass(frozen=True)
class AnswerCount:
    """How many read events of a split were answered right, of how many."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.total


class SplitEvaluator:
    """Evaluates checkpoints of one shape on full splits, each encoded once."""

    def __init__(self, config: DecoderConfig, benchmark: Benchmark):
        self._config = config
        self._benchmark = benchmark

    def answers(self, params: Params, split: str, *, max_records: int | None = None) -> AnswerCount:
        """Returns the answers of one checkpoint on a split, or on its first `max_records` records."""
        program, reads = self._program(split, max_records)
        (measured,) = program.measure([params])
        return AnswerCount(int(measured["read/correct"][reads].sum()), int(reads.sum()))

    @functools.lru_cache(maxsize=16)  # noqa: B019  an evaluator lives as long as a command
    def _program(self, split: str, max_records: int | None) -> tuple[ProbeProgram, np.ndarray]:
        encoded = encode_records(
            self._benchmark.read_split(split)[:max_records],
            self._benchmark.vocabulary,
            [split],
            max_seq_len=self._config.max_seq_len,
        )
        program = ProbeProgram(
            self._config,
            self._benchmark.vocabulary,
            encoded,
            num_splits=1,
            settings=SweepSettings(checkpoint_batch="1"),
            ablate=False,
        )
        return program, encoded.is_read
