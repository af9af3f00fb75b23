"""Measures how often 95 % intervals hold the truth, on simulated sequences whose reads depend on each other.

    python -m benchmarks.interval_coverage

Every case draws many data sets of 96 sequences with 7 reads each, whose true value is known by construction, and counts
how many of the sweep's intervals hold it. Reads of a sequence share a random effect, from none to nearly all of them.
"""

from __future__ import annotations

import numpy as np
from absl import app, flags

from benchmarks.reporting import machine, write_result
from kvjax.measure.uncertainty import DIFFERENCE_OF_RATES, RATE, Bounds, interval, resample_counts, resampled_ratios

FLAGS = flags.FLAGS
flags.DEFINE_integer("datasets", 2000, "Simulated data sets per case.", lower_bound=100)
flags.DEFINE_integer("sequences", 96, "Sequences per data set.", lower_bound=10)

READS = 7


def main(argv: list[str]) -> None:
    del argv
    counts = resample_counts(np.zeros(FLAGS.sequences, int))
    rng = np.random.default_rng(0)
    rows = []
    for rate in (0.0, 0.02, 0.1, 0.5, 0.9, 0.98, 1.0):
        for shared in (0.0, 0.3, 0.9):
            right = _answers(rng, rate, shared)
            rows.append(_case("rate", rate, shared, counts, right.sum(axis=1), rate, RATE))
    for before, after in ((0.0, 0.0), (0.1, 0.1), (0.1, 0.3), (0.5, 0.9), (0.98, 0.98)):
        for shared in (0.0, 0.9):
            effect = rng.random((FLAGS.sequences, 1, FLAGS.datasets))
            own = rng.random((FLAGS.sequences, READS, FLAGS.datasets))
            mixed = np.where(rng.random(own.shape) < shared, effect, own)
            # The same sequences at two checkpoints: what is easy stays easy.
            moved = (mixed < after).sum(axis=1) - (mixed < before).sum(axis=1)
            name = f"change of rate from {before}"
            rows.append(_case(name, after, shared, counts, moved, after - before, DIFFERENCE_OF_RATES))
    for shared in (0.0, 0.5, 0.9):
        effect = rng.normal(size=(FLAGS.sequences, 1, FLAGS.datasets))
        own = rng.normal(size=(FLAGS.sequences, READS, FLAGS.datasets))
        margins = 2.0 + 3.0 * (np.sqrt(shared) * effect + np.sqrt(1 - shared) * own)
        rows.append(_case("margin", 2.0, shared, counts, margins.sum(axis=1), 2.0, None))
        skewed = np.exp(margins / 3.0)
        truth = float(np.exp(2.0 / 3.0 + 0.5))
        rows.append(_case("skewed mean", truth, shared, counts, skewed.sum(axis=1), truth, None))
    for row in rows:
        print(f"{row['case']:26s} {row['value']:6.2f}  shared {row['shared']:.1f}  coverage {row['coverage']:.3f}")
    result = {
        "what": "share of 95 % intervals that hold the true value",
        "machine": machine(),
        "sequences": FLAGS.sequences,
        "reads_per_sequence": READS,
        "datasets": FLAGS.datasets,
        "rows": rows,
    }
    print(write_result("interval_coverage", result))


def _answers(rng: np.random.Generator, rate: float, shared: float) -> np.ndarray:
    """Draws right answers, bool [sequences, reads, data sets]; a share of reads follows its sequence."""
    effect = rng.random((FLAGS.sequences, 1, FLAGS.datasets))
    own = rng.random((FLAGS.sequences, READS, FLAGS.datasets))
    return np.where(rng.random(own.shape) < shared, effect, own) < rate


def _case(
    name: str, value: float, shared: float, counts: np.ndarray, sums: np.ndarray, truth: float, bounds: Bounds | None
) -> dict[str, float | str]:
    totals = np.full(sums.shape, READS, np.float32)
    values, samples = (x[..., 0, :] for x in resampled_ratios(counts, sums[None], totals[None]))
    low, high = interval(values, samples, len(sums), bounds=bounds)
    # In float32 an end may miss the truth by rounding.
    inside = (low - 1e-6 <= truth) & (truth <= high + 1e-6)
    return {"case": name, "value": value, "shared": shared, "coverage": float(inside.mean())}


if __name__ == "__main__":
    app.run(main)
