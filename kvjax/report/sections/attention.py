"""What chosen heads attend to in one stream of the probe set, at every step shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from kvjax.report.charts.description import Heatmap
from kvjax.report.parts import Part, Section


@dataclasses.dataclass(frozen=True)
class AttentionPatterns:
    """Attention patterns of some heads on one stream.

    Attributes:
      tokens: of the stream, [T].
      sample: its id, and its split.
      heads: names of the heads, [N].
      steps: [S].
      patterns: [S, N, T, T] attention from a row's position to a column's.
    """

    tokens: Sequence[str]
    sample: str
    heads: Sequence[str]
    steps: Sequence[int]
    patterns: np.ndarray


def attention_section(found: AttentionPatterns | None, missing: str | None) -> Section:
    """Shows a map of attention for each head, with the stream's tokens on both axes."""
    lead = "Where chosen heads look, token by token, in one stream. The slider chooses the step."
    if found is None:
        return Section("attention", "Attention patterns", lead, missing=missing)
    reading = (
        f"Stream {found.sample}: {' '.join(found.tokens)}. A row is the token that looks, a column the token it "
        "looks at; rows sum to 1. `--heads`, `--steps` and `--example` choose others."
    )
    return Section("attention", "Attention patterns", lead, [Part(lines=[reading], charts=attention_charts(found))])


def attention_charts(found: AttentionPatterns) -> list[Heatmap]:
    """Draws a token × token map of each head's attention at each step."""
    labels = [f"{place} {token}" for place, token in enumerate(found.tokens)]
    later = np.triu(np.ones((len(labels), len(labels)), bool), 1)
    return [
        Heatmap(
            name=f"attention_{head}",
            title=f"Attention of {head}",
            caption=f"On stream {found.sample}.",
            x=labels,
            y=labels,
            values=np.where(later, np.nan, found.patterns[:, place]),
            x_title="looked at",
            y_title="looks",
            unit="attention",
            scale="share",
            steps=tuple(found.steps),
        )
        for place, head in enumerate(found.heads)
    ]
