"""Read everything that was measured on a run: the sweep's tables, birth windows and interventions.

A file is hashed before a library parses it: netCDF's may hang on a damaged one. `sweep.json` records the hashes of its
tables, an intervention's summary that of its arrays.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvjax.artifacts.birth_windows_schema import BirthWindows, read_birth_windows
from kvjax.artifacts.files import FileHash, Replacements, file_sha256, read_json, read_json_lines
from kvjax.artifacts.identity import check_seal
from kvjax.artifacts.layout import arrays_beside
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.story_schema import Story, read_story
from kvjax.artifacts.sweep_schema import Sweep, read_sweep
from kvjax.artifacts.tables import read_dataset
from kvjax.errors import InputError, command, unusable

if TYPE_CHECKING:
    import xarray as xr


def open_results(run: str | Path) -> RunResults:
    """Opens the results of a run directory; each file is read when it is first asked for.

    Raises:
      InputError: there is no run.
    """
    return RunResults(RunDir.open(Path(run)))


@dataclasses.dataclass(frozen=True)
class Intervention:
    """One kind of intervention in one window.

    Attributes:
      kind: of intervention, such as `path_patching`.
      window: its name, such as `window_500` or `steps_100_200`.
      path: the summary's file.
      document: the summary.
    """

    kind: str
    window: str
    path: Path
    document: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> Intervention:
        """Reads a summary.

        Raises:
          InputError: it is missing, edited, or no summary of this version.
        """
        document = read_json(path)
        expected = "the summary of an intervention (run kvjax intervene)"
        if not isinstance(document, dict):
            raise unusable(path, expected, type(document).__name__)
        if missing := [name for name in ("kind", "steps", "measured_on", "arrays") if name not in document]:
            raise unusable(path, expected, f"no {missing[0]}")
        check_seal(document, path, "run kvjax intervene again")
        return cls(path.parent.name, path.stem, path, document)

    @classmethod
    def open_whole(cls, path: Path) -> Intervention | None:
        """Opens a summary whose own hash and whose arrays' hash are right; gives None for any other."""
        try:
            found = cls.open(path)
            found.check_arrays()
        except InputError:
            return None
        return found

    def check_arrays(self) -> None:
        """Checks the arrays against the hash in the summary; raises `InputError` if they differ."""
        try:
            recorded = FileHash(**self.document["arrays"])
        except TypeError:
            raise unusable(self.path, "sha256 and bytes of its arrays", self.document["arrays"]) from None
        recorded.check(arrays_beside(self.path), recorded_in=self.path, remedy="run kvjax intervene again")

    @functools.cached_property
    def dataset(self) -> xr.Dataset:
        """Every number of the summary, labelled."""
        self.check_arrays()
        expected = "every number of a summary (run kvjax intervene again)"
        return read_dataset(arrays_beside(self.path), expected=expected)


class RunResults:
    """What was measured on a run, read lazily and kept.

    Every attribute raises `InputError` if its file is missing, damaged, or not the one that the sweep wrote.

    Attributes:
      run: the run directory.
    """

    def __init__(self, run: RunDir):
        self.run = run
        self._checked: set[Path] = set()

    @functools.cached_property
    def sweep(self) -> Sweep:
        """The provenance of the sweep."""
        return read_sweep(self.run.layout.sweep)

    @functools.cached_property
    def metrics(self) -> xr.Dataset:
        """Every mean of docs/definitions.md."""
        return self._arrays(None)

    @functools.cached_property
    def intervals(self) -> xr.Dataset:
        """Estimate, low and high end of every mean that has a 95 % interval, and of its change."""
        return self._arrays("intervals")

    @functools.cached_property
    def events(self) -> xr.Dataset:
        """Values per read and sums per sequence, which the means are made of."""
        return self._arrays("events")

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        """One row per checkpoint, in step order."""
        return self._rows(self.run.layout.rows)

    @functools.cached_property
    def heads(self) -> list[dict[str, Any]]:
        """One row per checkpoint and head."""
        return self._rows(self.run.layout.heads)

    @functools.cached_property
    def mlps(self) -> list[dict[str, Any]]:
        """One row per checkpoint and MLP."""
        return self._rows(self.run.layout.mlps)

    @functools.cached_property
    def windows(self) -> BirthWindows:
        """The birth windows that were found in this sweep."""
        path = self.run.layout.birth_windows
        found = read_birth_windows(path)
        if found.measured_on != self.sweep.measured_on:
            expected = f"birth windows of {self.run.layout.sweep.name} as it is ({self._remedy('birth-windows')})"
            raise unusable(path, expected, "those of a sweep that has changed since")
        return found

    @functools.cached_property
    def story(self) -> Story:
        """What happened in the run, as told from its birth windows."""
        path, windows = self.run.layout.story, self.windows
        found = read_story(path)
        if found.told_from.windows_sha256 != windows.content_sha256:
            expected = f"the story of {self.run.layout.birth_windows.name} as it is ({self._remedy('birth-windows')})"
            raise unusable(path, expected, "that of windows found before")
        return found

    def interventions(self, kind: str | None = None) -> Iterator[Intervention]:
        """Yields the interventions of a kind, or of all kinds, by kind and window; their arrays are read lazily."""
        for path in self.intervention_files(kind):
            yield Intervention.open(path)

    def intervention_files(self, kind: str | None = None) -> list[Path]:
        """Lists the summaries that exist, damaged ones too."""
        return sorted(self.run.layout.interventions.glob(f"{kind or '*'}/*.json"))

    @functools.cached_property
    def tree(self) -> xr.DataTree:
        """All arrays: groups `metrics`, `intervals`, `events` and `interventions/<kind>/<window>`."""
        import xarray as xr

        groups = {"metrics": self.metrics, "intervals": self.intervals, "events": self.events}
        groups |= {f"interventions/{found.kind}/{found.window}": found.dataset for found in self.interventions()}
        run = xr.Dataset(attrs=self.run.config.attributes)
        return xr.DataTree.from_dict({"/": run, **groups})

    def checkpoint_hashes(self) -> dict[int, str]:
        """Hashes the files that measured checkpoints have now: step -> SHA-256; a step without a file is left out.

        Raises:
          InputError: there is no sweep, or a file cannot be read.
        """
        files = self.run.checkpoints
        steps = [checkpoint.step for checkpoint in self.sweep.checkpoints if checkpoint.step in files]
        with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
            return dict(zip(steps, pool.map(file_sha256, map(files.get, steps)), strict=True))

    def changed_checkpoints(self) -> list[int]:
        """Lists the measured steps whose checkpoint file is another now, in step order."""
        recorded = {checkpoint.step: checkpoint.sha256 for checkpoint in self.sweep.checkpoints}
        return sorted(step for step, sha256 in self.checkpoint_hashes().items() if sha256 != recorded[step])

    def check_tables(self) -> None:
        """Checks every table of the sweep against its recorded hash; raises `InputError` for the first that differs."""
        layout = self.run.layout
        for path in (layout.arrays, layout.rows, layout.heads, layout.mlps):
            self._check(path)

    def _arrays(self, group: str | None) -> xr.Dataset:
        path = self.run.layout.arrays
        self._check(path)
        return read_dataset(path, group=group, expected=f"the arrays of a sweep ({self._remedy('checkpoint-sweep')})")

    def _rows(self, path: Path) -> list[dict[str, Any]]:
        self._check(path)
        return read_json_lines(path)

    def _check(self, path: Path) -> None:
        if path in self._checked:
            return
        record, remedy = self.run.layout.sweep, self._remedy("checkpoint-sweep")
        recorded = self.sweep.tables.get(table_name(self.run, path))
        if recorded is None:
            raise unusable(record, f"the hash of {path.name} ({remedy}; measured checkpoints are reused)", "none")
        recorded.check(path, recorded_in=record, remedy=remedy)
        self._checked.add(path)

    def _remedy(self, name: str) -> str:
        return f"run {command(name, run_dirs=str(self.run.path))} again"


def table_name(run: RunDir, path: Path) -> str:
    """Forms the name by which `sweep.json` records a table's hash."""
    return path.relative_to(run.layout.analysis).as_posix()


def hash_tables(run: RunDir, written: Replacements) -> dict[str, FileHash]:
    """Hashes the tables that a sweep has written and is about to put in place."""
    layout = run.layout
    return {
        table_name(run, path): written.hash(path) for path in (layout.rows, layout.heads, layout.mlps, layout.arrays)
    }
