"""Finds checkpoints that cannot be neighbours in one run (docs/definitions.md, "Breaks in a trajectory")."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.sweep_schema import TrajectoryBreak
from kvjax.errors import InputError
from kvjax.measure.registry import ALL_SPLITS

# A drift of the embeddings from here on is a jump: those of independent models are orthogonal, a drift of 1.
JUMP_DRIFT = 0.8
# A jump drifts so many times as far as its neighbours would in as many steps.
JUMP_RATIO = 3.0


def trajectory_breaks(
    run: RunDir, steps: Sequence[int], digests_Cx32: np.ndarray, drift_C: np.ndarray
) -> list[TrajectoryBreak]:
    """Finds every pair of consecutive checkpoints that cannot be neighbours in one training run, in step order.

    Args:
      run: the run, whose log says where training was resumed.
      steps: [C] ascending.
      digests_Cx32: see `copies`.
      drift_C: see `embedding_drift`.
    """
    try:
        resumed = [row.step for row in run.log.rows if row.phase == "resume"]
    except InputError:
        resumed = []  # a log that cannot be read says nothing
    found = [
        *copies(steps, digests_Cx32),
        *jumps(steps, drift_C),
        *resumptions(steps, [step for step in resumed if step is not None]),
    ]
    return sorted(found, key=lambda found: (found.after, found.before, found.kind))


def copies(steps: Sequence[int], digests_Cx32: np.ndarray) -> list[TrajectoryBreak]:
    """Finds checkpoints whose parameters are an earlier one's in every bit.

    A single update may change nothing, as the first of a warm-up does, so steps that follow each other are no copies.

    Args:
      steps: [C] ascending.
      digests_Cx32: hashes of all parameters, uint8.
    """
    first: dict[bytes, int] = {}
    found = []
    for index, step in enumerate(steps):
        earlier = first.setdefault(digests_Cx32[index].tobytes(), step)
        if step - earlier > 1:
            reason = f"steps {earlier} and {step} have the same parameters"
            found.append(TrajectoryBreak(kind="copy", before=earlier, after=step, reason=reason))
    return found


def embedding_drift(dataset: xr.Dataset) -> np.ndarray:
    """Measures how far the embeddings at p_e moved since the previous checkpoint, [C]; NaN for the first.

    It is 1 - cosine, the mean over reads if the sweep measured that, else of the mean state.
    """
    name = "residual_event_drift" if "residual_event_drift" in dataset else "residual_drift"
    return dataset[name].sel(split=ALL_SPLITS, position_role="prediction", stage="embedding").values


def jumps(steps: Sequence[int], drift_C: np.ndarray) -> list[TrajectoryBreak]:
    """Finds intervals across which the embeddings move as far as those of another run would be.

    An interval is a jump if it drifts by `JUMP_DRIFT` or more, and `JUMP_RATIO` times as far as the nearest shorter
    drifts on both sides would in as many steps: the square of the ratio of their lengths, as of a straight movement.
    Embeddings of small initial values turn quickly at first, and a warm-up quickens them. An interval longer than all
    training before it is therefore no jump, whatever it drifts.

    Args:
      steps: [C] ascending.
      drift_C: from the checkpoint before, NaN if unknown.
    """
    lengths_G, drift_G = np.diff(np.asarray(steps, float)), np.asarray(drift_C, float)[1:]
    far_G = np.nan_to_num(drift_G) >= JUMP_DRIFT
    found = []
    for gap in np.flatnonzero(far_G).tolist():
        before = next((g for g in range(gap, -1, -1) if not far_G[g]), None)
        after = next((g for g in range(gap, len(far_G)) if not far_G[g]), None)
        sides = [side for side in (before, after) if side is not None and np.isfinite(drift_G[side])]
        allowed = [drift_G[side] * max(1.0, lengths_G[gap] / lengths_G[side]) ** 2 for side in sides]
        early = steps[gap] < lengths_G[gap]
        if sides and not early and drift_G[gap] > JUMP_RATIO * max(allowed):
            reason = (
                f"the embeddings of step {steps[gap + 1]} are unrelated to those of step {steps[gap]} (drift "
                f"{drift_G[gap]:.2f}; {max(drift_G[side] for side in sides):.2g} beside it), as those of two runs are"
            )
            found.append(TrajectoryBreak(kind="jump", before=steps[gap], after=steps[gap + 1], reason=reason))
    return found


def resumptions(steps: Sequence[int], resumed_at: Sequence[int]) -> list[TrajectoryBreak]:
    """Finds the intervals inside which, or at whose begin, training was resumed.

    Args:
      steps: [C] ascending.
      resumed_at: steps after which training went on from a checkpoint.
    """
    found = {}
    for step in resumed_at:
        after = next((other for other in steps if other > step), None)
        before = max((other for other in steps if other <= step), default=None)
        if after is not None and before is not None:
            reason = f"training was resumed from step {step}"
            found[after] = TrajectoryBreak(kind="resumed", before=before, after=after, reason=reason)
    return list(found.values())
