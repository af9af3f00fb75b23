"""Compares a checkpoint's answers with the accuracies that its run recorded while it trained.

No tensor shows the number of heads, the epsilon of LayerNorm or the form of GELU. Parity with our own PyTorch model
cannot show them either: both sides have the same wrong ones. Only numbers of the trainer itself vouch for them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kvjax.artifacts.checkpoint_sums import CheckpointResult
from kvjax.artifacts.files import read_json
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.sweep_schema import HIDDEN, Vouched
from kvjax.artifacts.training_log import whole_number
from kvjax.devices import backend
from kvjax.errors import InputError
from kvjax.execution.memory_plan import CPU_TOKENS_PER_BATCH
from kvjax.measure import behaviour
from kvjax.measure.registry import BIRTH_SPLIT
from kvjax.model.checkpoint import Checkpoint
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params
from kvjax.model.sites import take_positions
from kvjax.model.transforms import plain_forward
from kvjax.task.benchmark import Benchmark
from kvjax.task.encoding import TOKEN_ROLES, EncodedRecords, bucket_by_length, encode_records

# Answers that rounding may flip between implementations, and the batch averages of some trainers round away.
FLIPPED_EVENTS = 2
# Share of the reads that low precision and averages over uneven batches may account for, near-ties apart.
UNEXPLAINED_SHARE = 0.02
# The answer and its strongest rival nearly tie within this share of the largest logit, as coarse as half precision.
NEAR_TIE = 1 / 64
LOSS_TOLERANCE = 1e-3  # relative

_ACCELERATOR_TOKENS_PER_BATCH = 32_768

Verdict = Literal["agrees", "differs", "contradicts"]


@dataclasses.dataclass(frozen=True)
class RecordedAccuracy:
    """An evaluation of a checkpoint on a split that its run recorded.

    Attributes:
      source: the file that holds it.
      split: which.
      answer_accuracy: share of reads answered right.
      num_reads: how many there were.
      loss: mean cross-entropy in nats; None if it is not recorded.
    """

    source: str
    split: str
    answer_accuracy: float
    num_reads: int
    loss: float | None


@dataclasses.dataclass(frozen=True)
class CountedAnswers:
    """The answers of one checkpoint on a split.

    Attributes:
      right: reads answered right.
      near_ties: reads that rounding could answer otherwise.
      total: all reads.
      loss: mean cross-entropy of the next token, in nats.
    """

    right: int
    near_ties: int
    total: int
    loss: float


def recorded_accuracies(run: RunDir, checkpoint: Checkpoint) -> list[RecordedAccuracy]:
    """Collects what a run recorded of a checkpoint, in its file or else in the log; `validation_iid` comes first.

    Entries that are incomplete or no numbers are passed over.

    Raises:
      InputError: the log cannot be read.
    """
    stored = [
        (checkpoint.path.name, {"split": split, **entry})
        for split, entry in checkpoint.recorded_metrics.items()
        if isinstance(entry, Mapping)
    ]
    found = [entry for source, document in stored if (entry := _recorded(source, document)) is not None]
    if not found:
        name = run.layout.metrics.name
        rows = run.log.evaluations_of(checkpoint.step)
        found = [entry for row in rows if (entry := _recorded(name, row)) is not None]
    return sorted(found, key=lambda entry: entry.split != BIRTH_SPLIT)


def _recorded(source: str, document: Mapping[str, Any]) -> RecordedAccuracy | None:
    accuracy, loss, reads = document.get("answer_accuracy"), document.get("loss"), document.get("num_examples")
    reads = whole_number(reads) if _is_number(reads) else None
    if not _is_number(accuracy) or not 0 <= accuracy <= 1 or reads is None or reads < 1:
        return None
    split = str(document.get("split"))
    return RecordedAccuracy(source, split, float(accuracy), reads, float(loss) if _is_number(loss) else None)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def judge(recorded: RecordedAccuracy, counted: CountedAnswers) -> tuple[Verdict, str]:
    """Judges whether a recorded accuracy and a counted one can be of the same model.

    Returns:
      `agrees`: within `FLIPPED_EVENTS` answers, and the loss too. `contradicts`: further apart than near-ties and
      `UNEXPLAINED_SHARE` of the reads allow. Else `differs`. And what differs, in words.
    """
    apart = abs(recorded.answer_accuracy * recorded.num_reads - counted.right)
    if apart > counted.near_ties + UNEXPLAINED_SHARE * counted.total + FLIPPED_EVENTS:
        return "contradicts", "answer_accuracy"
    if apart > FLIPPED_EVENTS:
        return "differs", f"{apart:.0f} answers"
    if recorded.loss is not None and not math.isclose(recorded.loss, counted.loss, rel_tol=LOSS_TOLERANCE):
        return "differs", f"losses ({recorded.loss:.4f} recorded, {counted.loss:.4f} found)"
    return "agrees", ""


class Voucher:
    """Compares checkpoints of a run with their recorded accuracies, as few as tell something.

    The first one that has a recorded accuracy is compared, and again one whose recorded accuracy is twice that of the
    last: early checkpoints answer nothing, whatever the number of heads. The others are taken on their word.

    Args:
      run: the run.
      benchmark: what it is measured on.
      refuse: whether a contradiction is refused; else it is noted.
      way_on: the parameter by which a person goes on in spite of one, for the error.

    Attributes:
      refused: whether a contradiction was refused.
    """

    def __init__(self, run: RunDir, benchmark: Benchmark, *, refuse: bool, way_on: str):
        self._run, self._benchmark, self._refuse, self._way_on = run, benchmark, refuse, way_on
        self._started: dict[Path, tuple[RecordedAccuracy, Mapping[str, jax.Array]]] = {}
        self._least_accuracy = 0.0
        self.refused = False
        self._reason = "the run recorded no accuracy of a measured checkpoint"

    @property
    def reason(self) -> str | None:
        """Says why no accuracy could be compared so far; None if one could."""
        return None if self._least_accuracy else self._reason

    def start(self, checkpoint: Checkpoint) -> None:
        """Starts the devices on a checkpoint's answers if comparing them with the recorded ones tells something new."""
        try:
            for recorded in recorded_accuracies(self._run, checkpoint):
                if recorded.answer_accuracy < self._least_accuracy:
                    return
                records = self._comparable(checkpoint, recorded)
                if records is not None:
                    self._started[checkpoint.path] = recorded, self._count(checkpoint, recorded.split, records)
                    self._least_accuracy = max(2 * recorded.answer_accuracy, 1 / recorded.num_reads)
                    return
        except InputError as error:
            self._reason = str(error)

    def finish(self, checkpoint: Checkpoint) -> Vouched | None:
        """Waits for the answers of a checkpoint that was started, and judges them; gives None for any other.

        Raises:
          InputError: they contradict the recorded ones.
        """
        if checkpoint.path not in self._started:
            return None
        recorded, counts = self._started.pop(checkpoint.path)
        right, near_ties, total, loss, targets = (
            float(counts[name]) for name in ("right", "near_ties", "total", "loss", "targets")
        )
        counted = CountedAnswers(round(right), round(near_ties), round(total), loss / targets)
        verdict, what = judge(recorded, counted)
        found = counted.right / counted.total
        self.refused = verdict == "contradicts" and self._refuse
        if self.refused:
            raise InputError(
                f"{checkpoint.path}: expected answer_accuracy {recorded.answer_accuracy:.4f} on {recorded.split}, as "
                f"{recorded.source} records; found {found:.4f} over {counted.total} reads with "
                f"{self._run.config.model.n_heads} heads, LayerNorm's epsilon 1e-5 and exact GELU (set model.n_heads "
                f"in {self._run.layout.config.name} to that of training, or go on with `{self._way_on}`)"
            )
        differs = None
        if verdict != "agrees":
            differs = (
                f"{checkpoint.path.name} and {recorded.source} differ in {what} on {recorded.split} (answer_accuracy "
                f"{recorded.answer_accuracy:.4f} recorded, {found:.4f} found): the run may have had other values of "
                f"{HIDDEN}, or it evaluated in another way"
            )
        return Vouched(
            source=recorded.source,
            step=checkpoint.step,
            split=recorded.split,
            recorded=recorded.answer_accuracy,
            found=found,
            num_reads=counted.total,
            differs=differs,
        )

    def _comparable(self, checkpoint: Checkpoint, recorded: RecordedAccuracy) -> EncodedRecords | None:
        """Reads the records that were evaluated; gives None, and says why, if they are not the benchmark's."""
        trained_on = checkpoint.recorded_config.get("benchmark_metadata")
        own = read_json(self._benchmark.layout.metadata)
        for name in ("seed", "holdout_pairs", "splits"):
            if isinstance(trained_on, Mapping) and name in trained_on and trained_on[name] != own.get(name):
                self._reason = f"{checkpoint.path.name} was trained on another benchmark, or its {name} changed since"
                return None
        records = self._benchmark.read_split(recorded.split)
        evaluation = self._run.config.evaluation
        limit = evaluation.max_eval_batches and evaluation.max_eval_batches * evaluation.batch_size
        for chosen in (records, records[:limit]):
            if sum(len(record["query_events"]) for record in chosen) == recorded.num_reads:
                return encode_records(
                    chosen,
                    self._benchmark.vocabulary,
                    [recorded.split],
                    max_seq_len=self._run.config.model.max_seq_len,
                    source=self._benchmark.layout.split(recorded.split),
                )
        self._reason = (
            f"{recorded.source} records {recorded.num_reads} reads of {recorded.split}, which has another number"
        )
        return None

    def _count(self, checkpoint: Checkpoint, split: str, encoded: EncodedRecords) -> Mapping[str, jax.Array]:
        on_cpu = backend() == "cpu"
        tokens = CPU_TOKENS_PER_BATCH if on_cpu else _ACCELERATOR_TOKENS_PER_BATCH
        (bucket,) = bucket_by_length(encoded, tokens_per_batch=tokens, max_buckets=1)
        return count_answers(checkpoint.config, checkpoint.params, bucket.batches)


def vouched_by(checkpoints: Sequence[CheckpointResult], reference: CheckpointResult | None) -> Vouched | None:
    """Finds the comparison that counts for a run: the reference's, else that of the latest checkpoint compared."""
    for result in (*([reference] if reference else []), *reversed(checkpoints)):
        if result.info.get("vouched") is not None:
            return Vouched.model_validate(result.info["vouched"])
    return None


def vouching_notes(vouched: Vouched | None, reason: str | None) -> list[str]:
    """Writes what a reader should know if recorded accuracies do not vouch for a run, for the given reason."""
    if vouched is None:
        return [f"nothing vouches for {HIDDEN}: {reason}"]
    return [vouched.differs] if vouched.differs is not None else []


@functools.partial(jax.jit, static_argnums=0)
def count_answers(config: DecoderConfig, params: Params, batches: EncodedRecords) -> dict[str, jax.Array]:
    """Counts the answers of one checkpoint in microbatches [microbatch, B, …].

    Returns:
      Sums: `right`, `near_ties` and `total` of reads, `loss` (nats) and `targets` of next tokens.
    """

    def of_batch(batch: EncodedRecords) -> dict[str, jax.Array]:
        logits, _ = plain_forward(config)(params, batch.tokens)
        at_reads = take_positions(logits, batch.prediction_positions, 1)
        vocabulary = jnp.arange(at_reads.shape[-1])[None, None]
        others = jnp.where(vocabulary == batch.answers[..., None], -jnp.inf, at_reads)
        answer = jnp.take_along_axis(at_reads, batch.answers[..., None], axis=-1)[..., 0]
        close = jnp.abs(answer - others.max(axis=-1)) <= NEAR_TIE * jnp.abs(at_reads).max(axis=-1)
        counted = batch.is_read & (batch.weights > 0)[:, None]
        loss, _ = behaviour.next_token_sums(logits, batch.tokens, batch.token_roles, num_roles=len(TOKEN_ROLES))
        targets = jnp.sum(batch.token_roles[:, 1:] >= 0, axis=1)
        return {
            "right": jnp.sum(behaviour.answer_correct(at_reads, batch.answers) & counted),
            "near_ties": jnp.sum(close & counted),
            "total": jnp.sum(counted),
            "loss": jnp.sum(loss * batch.weights),
            "targets": jnp.sum(targets * batch.weights),
        }

    return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(of_batch, batches))
