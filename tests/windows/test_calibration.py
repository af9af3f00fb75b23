"""The calibration's own bookkeeping: which rows a run of some tables replaces."""

import dataclasses

from benchmarks.simulated_runs import Truth
from benchmarks.window_calibration import merged, plan


def result(row, **more):
    return {
        "table": row.table,
        "checkpoints": row.checkpoints,
        **dataclasses.asdict(row.noise),
        **dataclasses.asdict(row.truth),
        **more,
    }


def test_rows_differ():
    """No two rows of the plan are the same, so that each is measured on runs of its own."""
    rows = plan()
    assert len(set(rows)) == len(rows)


def test_rows_of_other_tables_stay():
    """Measured rows take the place of the same earlier ones; others stay, in the order of the plan."""
    first, second, third = plan()[:3]
    gone = dataclasses.replace(first, truth=Truth("shift", 123.0))
    earlier = [result(third, runs=1), result(gone, runs=1), result(first, runs=1)]
    rows = merged(plan(), {second: result(second, runs=2), first: result(first, runs=2)}, earlier)
    assert rows == [result(first, runs=2), result(second, runs=2), result(third, runs=1)]


def test_row_without_a_field():
    """A row from before a field was added is no row of the plan."""
    row = plan()[0]
    older = result(row)
    del older["even_in"]
    assert row.describes(result(row)) and not row.describes(older)
