"""From shifts to windows: corroboration, merging, extents."""

import numpy as np
import pytest

from kvjax.windows.group_shifts import DetectionSettings, Shift, find_shifts, find_windows, scaled_thresholds

SETTINGS = DetectionSettings(
    threshold=4.5, threshold_alone=7.0, corroboration=3, similar_support=0.5, calibrated_tests=5000
)
STEPS = np.arange(1, 21) * 100


def shift(metric, gap, *, score=6.0, first=None, last=None, size=1.0, relative=0.8):
    first, last = gap if first is None else first, gap if last is None else last
    return Shift(metric, gap, first, last, size, score, relative)


def windows(shifts, *, opens=None, kinds=None, courses=None, steps=STEPS, origins=None, growing=()):
    opens = [True] * 20 if opens is None else opens
    kinds = [f"kind{i}" for i in range(20)] if kinds is None else kinds
    courses = np.full((len(shifts), 2), np.nan) if courses is None else np.asarray(courses, float)
    origins = {shift: shift for shift in shifts} | (origins or {})
    more = {"origins": origins, "growing": growing, "steps": steps, "num_tests": 900, "settings": SETTINGS}
    return find_windows(shifts, courses, kinds, opens, **more)


def test_corroboration():
    """Three metrics together, or one with a high score, make a window; two weak ones do not."""
    assert windows([shift(0, 5), shift(1, 5)]) == []
    assert [w.gap for w in windows([shift(0, 5), shift(1, 5), shift(2, 5)])] == [5]
    assert [w.gap for w in windows([shift(0, 5, score=7.5)])] == [5]


def test_corroboration_across_gaps():
    """Metrics in touching gaps corroborate each other; distant ones do not."""
    assert [w.gap for w in windows([shift(0, 5), shift(1, 6), shift(2, 5)])] == [5]
    assert windows([shift(0, 5), shift(1, 8), shift(2, 11)]) == []


def test_centre_with_many_of_one_kind():
    """A kind counts once in the choice of the centre, however many metrics of it move."""
    many_of_one = [shift(i, 6, relative=0.9) for i in range(3)]
    two_kinds = [shift(3, 5, relative=0.6), shift(4, 5, relative=0.6)]
    (window,) = windows([*many_of_one, *two_kinds], kinds=["a", "a", "a", "b", "c"])
    assert window.gap == 5 and len(window.shifts) == 5


def test_kinds_that_open_no_window():
    """Metrics of such kinds join a window of others, but make none of their own."""
    closed = [False] * 3 + [True] * 17
    drifts = [shift(0, 5, score=30.0), shift(1, 5), shift(2, 5)]
    assert windows(drifts, opens=closed) == []
    (window,) = windows([*drifts, shift(3, 5), shift(4, 5), shift(5, 5)], opens=closed)
    assert window.shifts[0].metric == 0 and len(window.shifts) == 6


def test_windows_with_a_quiet_gap_between():
    """A quiet gap keeps two windows apart; movement at every gap between makes them one."""
    early, late = [shift(i, 5) for i in range(3)], [shift(i, 8) for i in range(3, 6)]
    assert [w.gap for w in windows([*early, *late])] == [5, 8]
    between = [shift(i, 8, first=6, last=8) for i in range(6, 9)]
    (window,) = windows([*early, *late, *between])
    assert (window.first, window.last) == (5, 10) and len(window.shifts) == 9


def test_window_of_a_lead_up():
    """A lead-up to a much larger movement is a window of its own, cut where the larger begins."""
    small = [shift(i, 5, first=4, last=6, relative=0.2) for i in range(3)]
    large = [shift(i, 8, first=7, last=9, relative=0.9) for i in range(3, 9)]
    courses = [[550, 900]] * 3 + [[790, 1100]] * 6
    early, late = windows([*small, *large], courses=courses)
    assert (early.gap, late.gap) == (5, 8)
    # The first, lighter one would reach its plateau at step 900. The second begins at 700, which is the first's centre:
    # that keeps a checkpoint after it.
    assert (STEPS[early.first], STEPS[early.last]) == (500, 800)
    assert (STEPS[late.first], STEPS[late.last]) == (700, 1100)


def test_extent_of_a_window():
    """A window covers its fastest metric's course, and one checkpoint on each side of its centre."""
    group = [shift(0, 9, relative=0.9), shift(1, 9), shift(2, 9)]
    # Alone the gap 9: its checkpoints are 9 and 10, the centre is 10.
    (window,) = windows(group)
    assert (window.first, window.last) == (9, 11)
    # Leaves its floor at 640, reaches its plateau at 1310: checkpoints 5 (step 600) and 13 (step 1400).
    (window,) = windows(group, courses=[[640, 1310], [100, 2000], [100, 2000]])
    assert (STEPS[window.first], STEPS[window.last]) == (600, 1400)


def test_extent_at_the_end_of_a_run():
    """A window ends with the run's last checkpoint at the latest."""
    group = [shift(i, 18) for i in range(3)]
    (window,) = windows(group)
    assert window.last == 19


def test_thresholds_by_number_of_tests():
    """More tests raise both thresholds by one factor; fewer do not lower them."""
    assert scaled_thresholds(100, SETTINGS) == (4.5, 7.0)
    together, alone = scaled_thresholds(500_000, SETTINGS)
    assert 4.5 < together < 6 and together / 4.5 == pytest.approx(alone / 7.0)


def test_shift_over_neighbouring_gaps():
    """Neighbouring gaps of one direction are one shift; a change of sign or a pause ends it."""
    holds = np.array([[1, 1, 1, 0, 1, 1]], bool).T
    size = np.array([[1, 3, -2, 9, 1, 2.0]]).T
    score = np.full_like(size, 6.0)
    found = find_shifts(size, score, holds, np.array([4.0]), threshold=5.0)
    assert [(s.first, s.last, s.gap, s.size, s.relative) for s in found] == [
        (0, 1, 1, 3.0, 0.75),
        (2, 2, 2, -2.0, 0.5),
        (4, 5, 5, 2.0, 0.5),
    ]
    assert find_shifts(size, score, holds, np.array([4.0]), threshold=6.5) == []


def test_shifts_that_repeat_another():
    """A shift and those that repeat it count once, also where the centre is chosen."""
    accuracy, its_copy, third, other = shift(0, 5), shift(1, 5), shift(2, 5), shift(3, 5)
    assert windows([accuracy, its_copy, third], origins={its_copy: accuracy}) == []
    (window,) = windows([accuracy, its_copy, third, other], origins={its_copy: accuracy})
    assert len(window.shifts) == 4, "the repetition is listed as well"
    later = [shift(i, 6, relative=0.75) for i in (4, 5)]
    assert windows([accuracy, its_copy, *later])[0].gap == 5, "0.8 twice against 0.75 twice"
    assert windows([accuracy, its_copy, *later], origins={its_copy: accuracy})[0].gap == 6


def test_shifts_that_growth_explains():
    """Shifts that growth explains found no window, alone or together; they join that of others and do not move it."""
    strong = [shift(i, 5, score=9.0) for i in range(3)]
    assert windows(strong, growing=strong) == []
    assert windows(strong, growing=strong[:1])[0].gap == 5, "two are left, and one of them suffices alone"
    weak = [shift(i, 5) for i in range(4)]
    assert windows(weak, growing=weak[:2]) == [], "two are left"
    with_growth, without = windows(weak, growing=weak[:1]), windows(weak)
    assert with_growth == without and len(with_growth[0].shifts) == 4
