"""Which rows of a long table are printed."""

import numpy as np
import pytest

from kvjax.report.shown_rows import rows_of_change


def rows_of(accuracy, *, heldout=None, drops=None):
    """Makes rows of the fields that choose, 100 steps apart; `drops` of heads by (layer, head)."""
    count = len(accuracy)
    heldout = [0.0] * count if heldout is None else heldout
    rows = []
    for r in range(count):
        heads = {head: values[r] for head, values in (drops or {}).items()}
        ordered = sorted(heads, key=lambda head: -heads[head])
        top = [{"layer": x[0], "head": x[1], "accuracy_drop_role_mean": heads[x]} for x in ordered]
        rows.append(
            {
                "step": 100 * (r + 1),
                "answer_accuracy": accuracy[r],
                "heldout_answer_accuracy": heldout[r],
                "ranked_by": "role_mean",
                "top_heads": top,
            }
        )
    return rows


def test_short_table():
    """A table that fits is shown whole."""
    assert rows_of_change(rows_of([0.1] * 24), most=24) == list(range(24))


def test_rows_of_a_jump():
    """A jump in the middle is shown on both sides, a plateau by its ends."""
    assert rows_of_change(rows_of([0.0] * 50 + [0.9] * 50), most=24) == [0, 49, 50, 99]


def test_rows_of_a_ramp():
    """A straight ramp is its two ends; if it bends, the bend is shown."""
    assert rows_of_change(rows_of(np.linspace(0, 0.9, 100).tolist()), most=24) == [0, 99]
    bent = [*np.linspace(0, 0.1, 60), *np.linspace(0.1 + 0.8 / 40, 0.9, 40)]
    assert rows_of_change(rows_of(bent), most=3) == [0, 59, 99]


@pytest.mark.parametrize("course", ["heldout", "leader"])
def test_rows_of_other_courses(course):
    """Held-out accuracy and the drops of leading heads choose rows as accuracy does."""
    jump, fall = [0.0] * 30 + [0.5] * 40, [0.4] * 30 + [0.0] * 40
    more = {"heldout": jump} if course == "heldout" else {"drops": {(0, 0): fall, (1, 2): jump}}
    assert rows_of_change(rows_of([0.6] * 70, **more), most=24) == [0, 29, 30, 69]


def test_rows_of_a_run_without_values():
    """A null counts as 0, and without a held-out split or heads the accuracy chooses alone."""
    rows = rows_of([0.1] * 30, heldout=[None] * 30)
    assert rows_of_change(rows, most=24) == [0, 29]


def test_most_rows():
    """A noisy run shows as many rows as fit, the first and the last among them, and always the same."""
    noisy = np.random.default_rng(0).uniform(size=400).tolist()
    shown = rows_of_change(rows_of(noisy), most=24)
    assert len(shown) == 24 and (shown[0], shown[-1]) == (0, 399) and shown == sorted(set(shown))
    assert shown == rows_of_change(rows_of(noisy), most=24)
