"""Check, write and read `sweep.json`: what a sweep measured, on what, and the hashes of its tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic

from kvjax.artifacts.birth_windows_schema import MeasuredOn, TrajectoryBreak
from kvjax.artifacts.files import FileHash, Replace, digest, read_json, replace_file, write_json
from kvjax.artifacts.identity import check_seal, sealed
from kvjax.errors import misfit, unusable

HIDDEN = "n_heads, the epsilon of LayerNorm and the form of GELU, which no tensor shows"


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SweptBenchmark(_Part):
    """The benchmark of a sweep; `sha256` is the hash that `BenchmarkHashes` compares."""

    name: str
    sha256: str
    path: str


class SweptProbeSet(_Part):
    """The probe set of a sweep: its file in the analysis folder, and the path it was given as."""

    file: str
    given_as: str
    content_sha256: str
    fit_sha256: str
    num_records: int


class SweptCheckpoint(pydantic.BaseModel):
    """A measured checkpoint; `fingerprint` names the sums in `measured/` that its row is made of."""

    model_config = pydantic.ConfigDict(extra="allow", frozen=True)

    step: int
    file: str
    sha256: str
    fingerprint: str
    notes: list[str]


class Vouched(_Part):
    """A recorded accuracy that a checkpoint reproduced: it vouches for the parts of the architecture no tensor shows.

    Attributes:
      source: the file that records it.
      step, split: of the checkpoint and the reads.
      recorded, found: answer_accuracy.
      num_reads: that it is over.
      differs: how the two differ, in words; None if they agree.
    """

    source: str
    step: int
    split: str
    recorded: float
    found: float
    num_reads: int
    differs: str | None = None

    def __str__(self) -> str:
        """Says in one line what vouches for what."""
        return (
            f"{self.source} vouches for the architecture: answer_accuracy on {self.split} at step {self.step} is "
            f"{self.found:.4f}, recorded {self.recorded:.4f} ({self.num_reads} reads)"
        )


class Sweep(_Part):
    """`analysis/sweep.json` (docs/formats.md).

    `tables` holds the hash of every table by its path in the analysis folder; it is empty in files of older versions.
    `ranked_by` is the kind of ablation that ranks components; files of older versions have none, they rank by zero.
    `reference` is the result name of the reference checkpoint, `reference_given` what `--reference` said.
    `vouched` is the recorded accuracy that a checkpoint was compared with, null if there was none to compare.
    `breaks` holds the pairs of checkpoints that cannot be neighbours in one training run.
    `converted` says whether the parameters of all checkpoints were in the store when the sweep ended.
    `drawn_from` is the hash of everything that the tables were drawn from; files of older versions have none.
    `content_sha256` is the hash of all else; files of older versions have none.
    """

    schema_version: int
    run_name: str
    identity: dict[str, Any]
    benchmark: SweptBenchmark
    probe_set: SweptProbeSet
    precision: str
    ranked_by: str = "zero"
    reference: str | None
    reference_given: str = "final"
    checkpoints: list[SweptCheckpoint]
    refused: dict[str, str]
    notes: list[str]
    versions: dict[str, str]
    device: dict[str, Any]
    timings: dict[str, Any]
    vouched: Vouched | None = None
    breaks: list[TrajectoryBreak] = []
    tables: dict[str, FileHash] = {}
    converted: bool = False
    drawn_from: str = ""
    content_sha256: str = ""

    @property
    def measured_on(self) -> MeasuredOn:
        """Collects what birth windows found in this sweep depend on: its settings, checkpoints and rows."""
        rows = sorted((checkpoint.step, checkpoint.sha256) for checkpoint in self.checkpoints)
        return MeasuredOn(
            probe_set_sha256=self.probe_set.content_sha256,
            steps=[step for step, _ in rows],
            checkpoints_sha256=[sha256 for _, sha256 in rows],
            sweep_sha256=digest({"identity": self.identity, "checkpoints": rows, "rows": self._rows_sha256}),
        )

    @property
    def _rows_sha256(self) -> dict[str, str]:
        """Collects the hashes of the tables of rows: equal numbers give equal ones, which netCDF does not promise."""
        return {name: table.sha256 for name, table in sorted(self.tables.items()) if name.endswith(".jsonl")}


def write_sweep(path: Path, sweep: Sweep, *, replace: Replace = replace_file) -> None:
    """Writes the document atomically."""
    write_json(path, sealed(sweep.model_dump(mode="json", exclude={"content_sha256"})), replace=replace)


def read_sweep(path: Path) -> Sweep:
    """Reads a run's `sweep.json`.

    Raises:
      InputError: the file is missing, does not fit the schema, or was edited.
    """
    if not path.is_file():
        raise unusable(path, "a sweep (run kvjax checkpoint-sweep first)", "no such file")
    document = read_json(path)
    try:
        sweep = Sweep.model_validate(document)
    except pydantic.ValidationError as error:
        raise misfit(path, error, "the provenance of a sweep (run kvjax checkpoint-sweep again)") from None
    if sweep.content_sha256:
        check_seal(document, path, "run kvjax checkpoint-sweep again")
    return sweep
