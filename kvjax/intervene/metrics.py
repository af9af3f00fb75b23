"""The metrics of interventions: scalars of the answers at the affected reads (docs/definitions.md, "Pairs of streams").

All of them come from the same logits, so every patched run gives all of them.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of the clean answer at an affected read.

    Attributes:
      meaning: in words, for tables.
      units: of its values.
      better: +1 if a run that answers as the clean one has more of it, -1 if less.
    """

    meaning: str
    units: str
    better: int


METRICS = {
    "logit_difference": Metric("logit(clean answer) - logit(corrupted answer)", "logits", +1),
    "answer_loss": Metric("-log p(clean answer) over the vocabulary", "nats", -1),
    "answer_logit": Metric("logit(clean answer)", "logits", +1),
}

DEFAULT_METRIC = "logit_difference"

UNITS = "logits; nats of answer_loss"  # of arrays with the dimension `metric`
