"""Handovers: planted ones are found with their members and dates, and decoys are not."""

import numpy as np
import pytest

from kvjax.model.components import all_heads
from kvjax.story.handovers import Span, find_handovers
from kvjax.story.shares import Shares

HEADS = all_heads(1, 4)
STEPS = np.arange(1, 11) * 100
# Between checkpoints 1 and 2, and 5 and 6.
WINDOWS = [Span(1, 2, 3, 0), Span(5, 6, 7, 1)]

LEADER = [0, 0, 0.8, 0.8, 0.8, 0.8, 0.2, 0.2, 0.2, 0.2]
HEIR = [0, 0, 0.1, 0.1, 0.1, 0.1, 0.6, 0.6, 0.6, 0.6]
REST = [0, 0, 0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 0.2]
NOBODY = [0.0] * 10


def shares_of(*trajectories, noise=0.005, seed=0):
    """Makes shares of four heads; checkpoints at which all are 0 have no carriers."""
    shares = np.stack([np.array(one, float) for one in (*trajectories, *[NOBODY] * (4 - len(trajectories)))], axis=1)
    shares = np.where((shares == 0).all(axis=1, keepdims=True), np.nan, shares)
    samples = shares + np.random.default_rng(seed).normal(0.0, noise, (200, *shares.shape))
    carriers = np.nan_to_num(shares) >= 0.5 * np.nan_to_num(shares).max(axis=1, keepdims=True)
    carriers &= np.nan_to_num(shares) > 0
    return Shares(HEADS, shares, samples, shares, samples, carriers)


def handovers(*trajectories, windows=WINDOWS, persistence=2, noise=0.005, **breaks):
    return find_handovers(shares_of(*trajectories, noise=noise), STEPS, windows, persistence=persistence, **breaks)


def members(handover):
    return [[m.component for m in side] for side in (handover.lost, handover.gained)]


def test_planted_handover():
    """A handover is found once, with both sets, its dates, and how long it was seen."""
    (found,) = handovers(LEADER, HEIR, REST)
    assert members(found) == [[0], [1]]
    assert (found.earlier.window, found.later.window) == (0, 1)
    assert found.between == (5, 6) and found.persisted and found.support == 1.0
    (lost,), (gained,) = found.lost, found.gained
    assert (lost.before, gained.before) == (0.8, 0.1) and lost.after == pytest.approx(0.2)
    assert lost.midpoint == gained.midpoint == pytest.approx(650.0), "halfway on the line from step 600 to 700"
    assert lost.interval == gained.interval == (5, 6)
    assert lost.held_from == gained.held_from == 6 and lost.further == gained.further == 2
    assert lost.change[0] < -0.6 < lost.change[1] and gained.change[0] < 0.5 < gained.change[1]


def test_several_successors():
    """All that double and end above belong to the set that takes over, the largest gain first."""
    second = [0, 0, 0.05, 0.05, 0.05, 0.05, 0.05, 0.4, 0.4, 0.4]
    first = [0, 0, 0.1, 0.1, 0.1, 0.1, 0.6, 0.5, 0.5, 0.5]
    (found,) = handovers(LEADER[:6] + [0.35] + [0.1] * 3, first, second)
    assert members(found) == [[0], [1, 2]]
    assert found.between == (5, 7), "the second rises a checkpoint later"


def test_successor_that_ends_below():
    """One that doubles and still ends below a member that handed over takes nothing over from it."""
    falls = [0, 0] + [0.9] * 4 + [0.3] * 4
    above, below = [0, 0] + [0.05] * 4 + [0.42] * 4, [0, 0] + [0.05] * 4 + [0.28] * 4
    (found,) = handovers(falls, above, below)
    assert members(found) == [[0], [1]]


DECOYS = {
    "moves within noise": {"trajectories": (LEADER, HEIR, REST), "noise": 0.6},
    "falls without a successor": {"trajectories": (LEADER, [0.1] * 10, [0.1] * 10, [0.1] * 10)},
    "rises while the leader stays": {"trajectories": ([0, 0] + [0.6] * 8, HEIR)},
    "loses less than a third": {"trajectories": ([0, 0] + [0.6] * 4 + [0.45] * 4, [0, 0] + [0.2] * 4 + [0.5] * 4)},
    "does not double": {"trajectories": (LEADER, [0, 0] + [0.35] * 4 + [0.6] * 4)},
    "ends below": {"trajectories": ([0, 0] + [0.9] * 4 + [0.5] * 4, [0, 0] + [0.05] * 4 + [0.4] * 4)},
    "goes back at once": {"trajectories": ([*LEADER[:6], 0.2, 0.8, 0.8, 0.8], [*HEIR[:6], 0.6, 0.1, 0.1, 0.1])},
    "one checkpoint at the end": {
        "trajectories": ([0, 0] + [0.8] * 7 + [0.2], [0, 0] + [0.1] * 7 + [0.6]),
        "windows": [WINDOWS[0], Span(7, 8, 9, 1)],
    },
    "loses a third in half of the resamples": {
        "trajectories": ([0, 0] + [0.6] * 4 + [0.39] * 4, [0, 0] + [0.2] * 4 + [0.6] * 4),
        "noise": 0.02,
    },
    "doubles in half of the resamples": {
        "trajectories": ([0, 0] + [0.7] * 4 + [0.1] * 4, [0, 0] + [0.3] * 4 + [0.61] * 4),
        "noise": 0.02,
    },
    "answers are lost": {"trajectories": (LEADER[:6] + [0.0] * 4, HEIR[:6] + [0.0] * 4)},
}


@pytest.mark.parametrize("decoy", DECOYS.values(), ids=DECOYS.keys())
def test_decoys(decoy):
    """What looks like a handover and is none is not found."""
    more = {name: value for name, value in decoy.items() if name != "trajectories"}
    assert handovers(*decoy["trajectories"], **more) == []


def test_chance_before_the_first_window():
    """What carries first has taken over from nobody: there were no shares to hand over."""
    assert handovers(LEADER, windows=WINDOWS[:1]) == []


def test_handover_at_the_end_of_a_run():
    """If the run ends before it was seen long enough, the handover is provisional; a member may be seen once."""
    late = [0, 0] + [0.8] * 6 + [0.2, 0.2]
    heirs = [0, 0] + [0.1] * 6 + [0.5, 0.5], [0, 0] + [0.05] * 6 + [0.1, 0.3]
    (found,) = handovers(late, *heirs, windows=[WINDOWS[0], Span(7, 8, 9, 1)])
    assert members(found) == [[0], [1, 2]] and not found.persisted
    assert [m.further for m in (*found.lost, *found.gained)] == [1, 1, 0]
    assert found.between == (7, 9)


def test_handover_without_a_first_window():
    """What carries at the first checkpoint formed before it, and can hand over as well."""
    (found,) = handovers([0.8] * 6 + [0.2] * 4, [0.1] * 6 + [0.6] * 4, windows=WINDOWS[1:])
    assert found.earlier.window is None and found.later.window == 1 and found.between == (5, 6)


def test_slow_handover_without_windows():
    """A ramp has no window; from its beginning to its end it is a handover all the same."""
    ramp = np.linspace(0.05, 0.8, 10)
    (found,) = handovers(0.85 - ramp, ramp, windows=[])
    assert members(found) == [[0], [1]] and found.earlier.window is None and found.later.window is None


def test_closest_windows_of_a_handover():
    """If two pairs of windows enclose a handover, the story has it once, between the closer pair."""
    between = Span(3, 4, 5, 1)
    (found,) = handovers(LEADER, HEIR, windows=[WINDOWS[0], between, Span(5, 6, 7, 2)])
    assert (found.earlier.window, found.later.window) == (1, 2)


def test_two_handovers_in_a_row():
    """Two handovers of a run both appear, each with its own sets."""
    first = [0.8] * 3 + [0.1] * 7
    second = [0.1] * 3 + [0.8] * 4 + [0.15] * 3
    third = [0.1] * 7 + [0.7] * 3
    windows = [Span(2, 3, 4, 0), Span(6, 7, 8, 1)]
    found = handovers(first, second, third, windows=windows, persistence=1)
    assert [members(one) for one in found] == [[[0], [1]], [[1], [2]]]


@pytest.mark.parametrize("kind", ["jumps", "resumed"])
def test_handover_at_a_break(kind):
    """Across a jump, or where training was resumed, nothing was handed over."""
    assert handovers(LEADER, HEIR, REST, **{kind: {5}}) == []


def test_interval_of_a_midpoint():
    """It holds the checkpoints around the midpoints of the resamples, as far as those scatter."""
    ramp = [0.8, 0.8, 0.8, 0.8, 0.65, 0.5, 0.35, 0.2, 0.2, 0.2]
    windows = [Span(0, 1, 2, 0), Span(3, 5, 7, 1)]
    (sharp,) = handovers(ramp, [1 - x for x in ramp], windows=windows, noise=0.001)
    (wide,) = handovers(ramp, [1 - x for x in ramp], windows=windows, noise=0.08)
    assert sharp.lost[0].midpoint == pytest.approx(600.0), "0.5 is reached at the sixth checkpoint"
    low, high = wide.lost[0].interval
    assert low < sharp.lost[0].interval[0] and high > sharp.lost[0].interval[1]


def test_determinism_of_handovers():
    """Equal inputs give equal handovers."""
    once, again = (handovers(LEADER, HEIR, REST) for _ in range(2))
    assert [members(one) for one in once] == [members(one) for one in again]
    assert [one.lost for one in once] == [one.lost for one in again]
