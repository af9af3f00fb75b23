"""The metrics of interventions: scalars of the answers at the affected reads (docs/definitions.md, "Pairs of streams").

All of them come from the same logits, so every patched run gives all of them.
"""

from __future__ import annotations

METRICS = {
    "logit_difference": {"long_name": "logit(clean answer) - logit(corrupted answer)", "units": "logits"},
    "answer_loss": {"long_name": "-log p(clean answer) over the vocabulary", "units": "nats"},
    "answer_logit": {"long_name": "logit(clean answer)", "units": "logits"},
}

DEFAULT_METRIC = "logit_difference"
