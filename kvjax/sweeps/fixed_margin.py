"""Measures how far each answer leads the value that competes with it at the reference checkpoint, on every checkpoint.

The competitor of a read is its largest other value logit at the reference (docs/definitions.md, "Behaviour"). Each
checkpoint keeps its logits of all values at the reads. So a run may get a reference, or another one, without measuring
anything again, and no margin is ever to the competitor of another reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from kvjax.artifacts.checkpoint_sums import CheckpointResult, ResultStore
from kvjax.sweeps.clean import VALUE_LOGITS
from kvjax.task.encoding import EncodedRecords

NO_COMPETITOR = -1

Named = tuple[str, CheckpointResult]


@dataclasses.dataclass(frozen=True)
class FixedMargins:
    """What fixed margins are formed with, once the reference is known.

    Attributes:
      competitors_NxQ: token ids of the competitors, `NO_COMPETITOR` if there is none.
      of_checkpoint: forms a checkpoint's margins [N, Q]: logit of the answer minus that of the competitor; NaN without
        a reference, and for no read. Raises `InputError` if its stored logits were lost since the sweep began.
    """

    competitors_NxQ: np.ndarray
    of_checkpoint: Callable[[Named], np.ndarray]


def strongest_others(logits_RxV: np.ndarray, answers_R: np.ndarray) -> np.ndarray:
    """Finds the value with the largest logit beside the answer's, int [R]; the first of equal ones.

    Args:
      logits_RxV: of all values at R reads.
      answers_R: index of the answer among the values.
    """
    others = logits_RxV.copy()
    others[np.arange(len(others)), answers_R] = -np.inf
    return others.argmax(axis=1)


class ValueLogits:
    """Keeps the logits of all values at the reads, one file per checkpoint beside its sums.

    Args:
      store: the run's results.
      encoded: the probe records.
      value_ids: token ids of the values, in the order of the logits.
    """

    def __init__(self, store: ResultStore, encoded: EncodedRecords, value_ids: np.ndarray):
        self._store, self._encoded, self._value_ids = store, encoded, value_ids

    def save(self, name: str, key: str, step: int, logits_NxQxV: np.ndarray) -> None:
        """Stores those of a checkpoint whose file has the hash `key`; places that hold no read are left out."""
        self._store.save(f"values_{name}", key, step, {VALUE_LOGITS: logits_NxQxV[self._encoded.is_read]}, {})

    def holds(self, name: str, key: str) -> bool:
        """Checks by reading them whether those of a checkpoint are stored and sound."""
        return self._store.find(f"values_{name}", key) is not None

    def fixed_margins(self, reference: Named | None, *, files: Mapping[str, tuple[int | None, Path]]) -> FixedMargins:
        """Finds the competitors at the reference.

        Args:
          reference: its name and result; None for none.
          files: result name -> (step or None, checkpoint file).

        Raises:
          InputError: its stored logits were lost since the sweep began.
        """
        is_read = self._encoded.is_read
        competitors = np.full(is_read.shape, NO_COMPETITOR, np.int32)
        missing = np.full(is_read.shape, np.nan, np.float32)
        if reference is None:
            return FixedMargins(competitors, lambda named: missing)
        answers_R = np.argmax(self._encoded.answers[is_read][:, None] == self._value_ids, axis=1)
        competitors_R = strongest_others(self._stored(reference, files), answers_R)
        competitors[is_read] = self._value_ids[competitors_R]
        rows = np.arange(len(answers_R))

        def of_checkpoint(named: Named) -> np.ndarray:
            logits_RxV, margins = self._stored(named, files), missing.copy()
            margins[is_read] = logits_RxV[rows, answers_R] - logits_RxV[rows, competitors_R]
            return margins

        return FixedMargins(competitors, of_checkpoint)

    def _stored(self, named: Named, files: Mapping[str, tuple[int | None, Path]]) -> np.ndarray:
        """Reads those of a checkpoint, [R, values], reads in the order of the records."""
        name, result = named
        return self._store.read_again(f"values_{name}", result.info["sha256"], files[name][1]).arrays[VALUE_LOGITS]
