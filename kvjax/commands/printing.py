"""What commands print of a sweep."""

from __future__ import annotations

from typing import Any

_SHOWN_ROWS = 24


def print_sweep_report(report: Any) -> None:
    """Prints a run's table, what was skipped and noted, and where the results are."""
    config, rows = report.run.config, report.rows
    if not rows:
        return
    print(f"\n{config.run_name} (seed {config.seed})")
    print("   step  accuracy  held-out    margin      r   loss  heads by accuracy drop")
    hidden = len(rows) - _SHOWN_ROWS
    for row in rows if hidden <= 0 else rows[: _SHOWN_ROWS // 2] + rows[-_SHOWN_ROWS // 2 :]:
        heads = "  ".join(f"L{h['layer']}H{h['head']} {h['value']:.3f}" for h in row["top_heads_by_ablation"][:3])
        print(
            f"{row['step']:>7} {_cell(row['answer_accuracy'], '9.3f')} {_cell(row['heldout_answer_accuracy'], '9.3f')} "
            f"{_cell(row['answer_margin'], '9.2f')} {_cell(row['r'], '6.3f')} {_cell(row['loss'], '6.3f')}  {heads}"
        )
    if hidden > 0:
        print(f"  ({hidden} checkpoints between are in the table)")
    for file, reason in report.log.refused.items():
        print(f"skipped {file}: {reason}")
    for note in report.notes:
        print(f"note: {note}")
    log = report.log
    print(f"{len(log.measured)} measured, {len(log.reused)} reused, {len(log.refused)} skipped.")
    print(f"Results in {report.run.analysis}: rows in checkpoint_metrics.jsonl, arrays in checkpoint_metrics.nc.")


def _cell(value: float | None, form: str) -> str:
    return format(value, form) if value is not None else "-".rjust(int(form.partition(".")[0]))
