"""Parameters of tiny models, made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np


def zeros(*, tied: bool = True) -> dict[str, Any]:
    """Makes the parameters of a model with two layers of one head, all 0."""

    def linear(inputs: int, outputs: int) -> dict[str, np.ndarray]:
        return {"kernel": np.zeros((2, inputs, outputs), np.float32), "bias": np.zeros((2, outputs), np.float32)}

    def norm(*shape: int) -> dict[str, np.ndarray]:
        return {"scale": np.zeros(shape, np.float32), "bias": np.zeros(shape, np.float32)}

    attn = {f"{name}_proj": linear(4, 4) for name in ("q", "k", "v", "out")}
    blocks = {
        "ln_1": norm(2, 4),
        "ln_2": norm(2, 4),
        "attn": attn,
        "mlp": {"fc_in": linear(4, 6), "fc_out": linear(6, 4)},
    }
    embeddings = {f"{name}_embedding": {"embedding": np.zeros((5, 4), np.float32)} for name in ("token", "position")}
    own = {} if tied else {"unembedding": {"kernel": np.zeros((4, 5), np.float32)}}
    return {**embeddings, "blocks": blocks, "final_norm": norm(4), **own}
