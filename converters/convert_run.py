"""Converts whole runs: every checkpoint to Flax parameters in a store, and back to `.pt` files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from kvjax.converters.cached_loader import CachedLoader
from kvjax.converters.parameter_store import read_stored_run
from kvjax.converters.to_flax import to_flax
from kvjax.converters.to_torch import to_torch
from kvjax.converters.torch_checkpoint import read_checkpoint, write_checkpoint

from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.sweep_schema import Vouched
from kvjax.errors import InputError, unusable
from kvjax.model.checkpoint import Certificate, Checkpoint
from kvjax.model.decoder_config import DecoderConfig
from kvjax.sweeps.evaluation import SplitEvaluator
from kvjax.sweeps.vouching import Voucher, recorded_accuracies, vouching_notes
from kvjax.task.benchmark import Benchmark
from kvjax.task.encoding import encode_records

Verify = Literal["sample", "all", "metrics", "none"]

VERIFY_SPLIT = "validation_iid"

_SAMPLE_RECORDS = 16
_EVENTS_OF_TOLERANCE = 2


@dataclasses.dataclass(frozen=True)
class MetricCheck:
    """An `answer_accuracy` that the run recorded, and the same accuracy of the converted checkpoint."""

    step: int
    split: str
    recorded: float
    measured: float
    num_events: int


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """The result of converting or exporting a run.

    Attributes:
      folder: the folder that was written.
      steps: the converted steps.
      largest_difference: the largest `Certificate.relative_difference`; None if no certificate was made.
      near_ties: how many positions have another argmax; all of them are near-ties.
      metric_checks: the run's recorded accuracies, reproduced.
      notes: what a reader should know about the files, each once.
      vouched: the recorded accuracy that the latest checkpoint with one reproduced; None if nothing was compared.
    """

    folder: Path
    steps: list[int]
    largest_difference: float | None
    near_ties: int
    metric_checks: list[MetricCheck]
    notes: list[str]
    vouched: Vouched | None = None


def convert_run(
    run: RunDir, benchmark: Benchmark, *, verify: Verify, advance: Callable[[int], None]
) -> ConversionReport:
    """Converts every step checkpoint of a run into the parameter store beside it.

    Args:
      run: the run.
      benchmark: the benchmark it was trained on.
      verify: `sample` certifies each checkpoint on a few validation sequences, `all` on the whole split. `metrics`
        also reproduces the accuracies that the run recorded while it trained. `none` certifies nothing.
        Unless it is `none`, the latest checkpoint with a recorded accuracy is compared with that.
      advance: called with the number of checkpoints done.

    Raises:
      InputError: a checkpoint cannot be used, computes other logits after conversion, or does not reproduce a
        recorded accuracy; or the store cannot be written.
    """
    steps = run.select_steps("all")
    tokens = _certificate_tokens(run, benchmark, verify)
    checks = MetricVerifier(run, benchmark) if verify == "metrics" else None
    # Verification converts every file again: stored conversions would verify themselves.
    loader = CachedLoader(run, benchmark, certify_on=tokens, trust_store=False, keep="everything")
    certificates: list[Certificate] = []
    metric_checks: list[MetricCheck] = []
    notes: dict[str, None] = {}
    latest: Checkpoint | None = None
    for step in steps:
        checkpoint = loader.load(run.checkpoints[step], step)
        notes.update(dict.fromkeys(checkpoint.notes))
        if checkpoint.certificate is not None:
            certificates.append(checkpoint.certificate)
        if checks is not None:
            metric_checks += checks.check(checkpoint)
        elif verify != "none" and (latest is None or _is_recorded(run, checkpoint)):
            latest = checkpoint
        advance(1)
    if checks is not None and not metric_checks:
        raise unusable(
            run.layout.metrics,
            "an evaluation recorded at a saved checkpoint's step (`verify=metrics`)",
            "none",
        )
    voucher = Voucher(run, benchmark, refuse=True, way_on="verify=none")
    if latest is not None:
        voucher.start(latest)
    vouched = latest and voucher.finish(latest)
    if latest is not None:
        notes.update(dict.fromkeys(vouching_notes(vouched, voucher.reason)))
    loader.save()
    return ConversionReport(
        folder=run.layout.converted,
        steps=steps,
        largest_difference=max((c.relative_difference for c in certificates), default=None),
        near_ties=sum(c.argmax_near_ties for c in certificates),
        metric_checks=metric_checks,
        notes=list(notes),
        vouched=vouched,
    )


def export_run(run: RunDir, *, verify: Verify, advance: Callable[[int], None]) -> ConversionReport:
    """Writes a run's stored parameters as `.pt` files, for the reference trainer's tools.

    Unless `verify` is `none`, reads every file back and compares it with the stored parameters, bit by bit.

    Raises:
      InputError: there is no store, it is damaged, or a written file holds other parameters.
    """
    folder, steps = run.layout.exported_torch, []
    for stored in read_stored_run(run.layout.converted):
        path = folder / stored.path.name
        write_checkpoint(
            path,
            step=stored.step,
            state=to_torch(stored.params),
            config=stored.recorded_config,
            metrics=stored.recorded_metrics,
        )
        if verify != "none":
            again = to_flax(read_checkpoint(path).state, stored.config, stored.config.vocab_size, where=path)
            same = jax.tree.all(jax.tree.map(np.array_equal, stored.params, again))
            if not same:
                raise unusable(path, "exactly the stored parameters", "other values (is something else writing there?)")
        steps.append(stored.step)
        advance(1)
    return ConversionReport(folder, steps, None, 0, [], [])


def _is_recorded(run: RunDir, checkpoint: Checkpoint) -> bool:
    """Checks whether the run recorded an accuracy of a checkpoint; a log that cannot be read records none."""
    try:
        return bool(recorded_accuracies(run, checkpoint))
    except InputError:
        return False


def _certificate_tokens(run: RunDir, benchmark: Benchmark, verify: Verify) -> np.ndarray | None:
    if verify == "none":
        return None
    records = benchmark.read_split(VERIFY_SPLIT)
    records = records if verify == "all" else records[:_SAMPLE_RECORDS]
    limits = {"max_seq_len": run.config.model.max_seq_len, "source": benchmark.layout.split(VERIFY_SPLIT)}
    return encode_records(records, benchmark.vocabulary, [VERIFY_SPLIT], **limits).tokens


class MetricVerifier:
    """Compares checkpoints with the full-split accuracies that their run recorded: an oracle outside this project."""

    def __init__(self, run: RunDir, benchmark: Benchmark):
        self._run = run
        config = DecoderConfig.from_model_config(run.config.model, len(benchmark.vocabulary.tokens))
        self._evaluator = SplitEvaluator(config, benchmark)

    def check(self, checkpoint: Checkpoint) -> Iterator[MetricCheck]:
        """Yields each accuracy that the log records of a checkpoint, beside the one it gives.

        Raises:
          InputError: they differ, or the log cannot be used.
        """
        evaluation = self._run.config.evaluation
        limit = evaluation.max_eval_batches and evaluation.max_eval_batches * evaluation.batch_size
        for row in self._run.log.evaluations_of(checkpoint.step):
            where = f"{self._run.layout.metrics} (step {checkpoint.step})"
            try:
                split, recorded = str(row["split"]), float(row["answer_accuracy"])
                num_examples = int(row["num_examples"])
            except (KeyError, TypeError, ValueError) as error:
                raise unusable(where, "split, answer_accuracy and num_examples", repr(error)) from None
            counted = self._evaluator.evaluate(checkpoint.params, split, max_records=limit)
            if counted.total != num_examples:
                raise unusable(where, f"the {counted.total} read events of {split}", num_examples)
            # Written so that a recorded NaN fails.
            if not abs(recorded * counted.total - counted.correct) <= _EVENTS_OF_TOLERANCE:
                raise InputError(
                    f"{checkpoint.path}: expected the answer_accuracy the run recorded for {split}, {recorded:.6f}; "
                    f"found {counted.answer_accuracy:.6f} over {counted.total} reads"
                )
            yield MetricCheck(checkpoint.step, split, recorded, counted.answer_accuracy, counted.total)
