"""What a run's numbers were measured on, and what could not be vouched for."""

from __future__ import annotations

from kvjax.artifacts.results import RunResults
from kvjax.artifacts.sweep_schema import HIDDEN, Sweep
from kvjax.report.parts import Part, Section, Table, section


def provenance_section(results: RunResults) -> Section:
    """Lists benchmark, probe set, checkpoints with their hashes, software, notes, and what nothing vouches for."""
    return section(
        "provenance",
        "Provenance",
        "What was measured on what, by which software, and what could not be vouched for.",
        lambda: _parts(results, results.sweep),
    )


def _parts(results: RunResults, sweep: Sweep) -> list[Part]:
    facts = [
        ["run directory", results.run.path],
        ["benchmark", f"{sweep.benchmark.name}, {sweep.benchmark.path}, SHA-256 {sweep.benchmark.sha256}"],
        ["probe set", f"{sweep.probe_set.num_records} streams, SHA-256 {sweep.probe_set.content_sha256}"],
        ["components ranked by", sweep.ranked_by.replace("_", " ")],
        ["reference checkpoint", sweep.reference],
        ["precision of matrix products", sweep.precision],
        ["device", ", ".join(f"{name} {value}" for name, value in sweep.device.items())],
        ["software", ", ".join(f"{name} {version}" for name, version in sweep.versions.items())],
    ]
    checkpoints = [[one.step, one.file, one.sha256, "; ".join(one.notes) or None] for one in sweep.checkpoints]
    return [
        Part("Vouched for, and not", _vouched(results, sweep)),
        Part("Measured on", tables=[Table("", ["what", "which"], facts)]),
        Part("Notes", sweep.notes or ["None."]),
        Part("Checkpoints", tables=[Table("", ["step", "file", "SHA-256", "notes"], checkpoints)], folded=True),
    ]


def _vouched(results: RunResults, sweep: Sweep) -> list[str]:
    lines = []
    if sweep.vouched is None:
        lines.append(f"No recorded accuracy was there to compare with, so that nothing vouches for {HIDDEN}.")
    elif sweep.vouched.differs is None:
        lines.append(f"{sweep.vouched}.")
    else:
        lines.append(f"The recorded accuracy contradicts the measured one: {sweep.vouched.differs}.")
    lines += [f"Skipped {file}: {reason}." for file, reason in sweep.refused.items()]
    lines += [
        f"Steps {own.before} and {own.after} cannot be neighbours in one training: {own.reason}."
        for own in sweep.breaks
    ]
    if changed := results.changed_checkpoints():
        lines.append(f"Checkpoint files that changed since they were measured: steps {', '.join(map(str, changed))}.")
    if not results.run.complete:
        lines.append("The run has not reached its planned end; what depends on the end is provisional.")
    return lines
