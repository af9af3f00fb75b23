"""Chooses the reference among trained runs and gives the reasons."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

# What decides, in order: accuracies, larger first, then the number of parameters, smaller first.
RANKED_SPLITS = ("heldout_pairs", "validation_iid", "structural_ood", "test_iid", "counterfactual")
VALIDATION_SPLIT = "validation_iid"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A trained run as a candidate.

    Attributes:
      run_dir: its directory.
      step, checkpoint_sha256: of the evaluated checkpoint; the hash is its file's.
      accuracies: split -> answer accuracy on the full split.
      parameter_count: number of parameters.
    """

    run_dir: str
    step: int
    checkpoint_sha256: str
    accuracies: Mapping[str, float]
    parameter_count: int

    def sort_key(self) -> tuple[float, ...]:
        """Builds the key that sorts the best candidate first."""
        return (*(-self.accuracies[split] for split in RANKED_SPLITS), self.parameter_count)


def select_reference(candidates: Sequence[Candidate], *, min_validation_answer_accuracy: float) -> dict[str, Any]:
    """Ranks candidates and selects the best, as a document with reasons.

    Args:
      candidates: the runs; equal ones stay in this order.
      min_validation_answer_accuracy: candidates below it are listed, but not eligible.

    Returns:
      {selected (run directory or None), reason, min_validation_answer_accuracy, ranked_by, candidates [{rank or None,
      run_dir, step, checkpoint_sha256, accuracies, parameter_count, eligible, reason}]}, eligible ones first.
    """
    floor = min_validation_answer_accuracy
    eligible = sorted((c for c in candidates if c.accuracies[VALIDATION_SPLIT] >= floor), key=Candidate.sort_key)
    others = sorted((c for c in candidates if c.accuracies[VALIDATION_SPLIT] < floor), key=Candidate.sort_key)
    rows = []
    for rank, candidate in enumerate(eligible, start=1):
        reason = "the only eligible run"
        if rank > 1:
            reason = "behind rank " + str(rank - 1) + ": " + _difference(eligible[rank - 2], candidate)
        elif len(eligible) > 1:
            reason = "ahead of rank 2: " + _difference(candidate, eligible[1])
        rows.append({"rank": rank, **dataclasses.asdict(candidate), "eligible": True, "reason": reason})
    for candidate in others:
        found = candidate.accuracies[VALIDATION_SPLIT]
        reason = f"not eligible: {VALIDATION_SPLIT} answer accuracy {found:.4f} is below {floor}"
        rows.append({"rank": None, **dataclasses.asdict(candidate), "eligible": False, "reason": reason})
    return {
        "selected": eligible[0].run_dir if eligible else None,
        "reason": rows[0]["reason"] if eligible else "no run reaches the minimum validation answer accuracy",
        "min_validation_answer_accuracy": floor,
        "ranked_by": [*RANKED_SPLITS, "parameter_count"],
        "candidates": rows,
    }


def _difference(ahead: Candidate, behind: Candidate) -> str:
    """Describes the first criterion in which two candidates differ."""
    for split in RANKED_SPLITS:
        if ahead.accuracies[split] != behind.accuracies[split]:
            return f"{split} answer accuracy {ahead.accuracies[split]:.4f} against {behind.accuracies[split]:.4f}"
    if ahead.parameter_count != behind.parameter_count:
        return f"equal accuracies, {ahead.parameter_count} parameters against {behind.parameter_count}"
    return "equal in everything; listed first"
