"""Keep a run's results in another folder than the run directory, which may be read-only.

Such a folder holds `analysis/` and `source_run.json`, which names the run directory. Wherever a run directory is named,
the folder may be named instead: checkpoints are found in the one and results in the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pydantic

from kvjax.artifacts.files import read_json, write_json
from kvjax.artifacts.layout import RunLayout
from kvjax.errors import note, unusable


class SourceRun(pydantic.BaseModel):
    """`source_run.json`: the run directory that results belong to, and the name and seed of its run."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    kvjax_source_run: Literal[1] = 1
    path: str
    run_name: str
    seed: int | None


def layout_of(path: Path) -> RunLayout:
    """Finds the files of the run in a directory: its own, or that of the results there.

    Raises:
      InputError: the results' `source_run.json` cannot be read, or its run directory is gone.
    """
    record = RunLayout(path).source_run
    if not record.is_file():
        return RunLayout(path)
    source = Path(read_source(record).path)
    if not source.is_dir():
        expected = 'in "path" the run directory that these results belong to (write its new path there if it was moved)'
        raise unusable(record, expected, f"{source}, which does not exist")
    return RunLayout(source, results=path)


def read_source(record: Path) -> SourceRun:
    """Reads a `source_run.json`; raises `InputError` if it is none."""
    try:
        return SourceRun.model_validate(read_json(record))
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the document"
        raise unusable(record, "path, run_name and seed of a run", f"{where}: {problem['msg']}") from None


def claim(folder: Path, source: SourceRun) -> None:
    """Makes a folder that of a run's results, unless it is already.

    Raises:
      InputError: the folder is a run directory or holds results of another run, or it cannot be written.
    """
    names = RunLayout(folder)
    if names.config.is_file():
        raise unusable(folder, f"a folder for the results of {source.path}", "a run directory")
    if not names.source_run.is_file():
        write_json(names.source_run, source.model_dump())
        return
    recorded = read_source(names.source_run)
    if recorded == source:
        return
    moved = not Path(recorded.path).is_dir() and recorded.model_copy(update={"path": source.path}) == source
    if not moved:
        expected = f"a folder for the results of {source.path} (or another `output_dir`)"
        raise unusable(folder, expected, f"those of {recorded.path}")
    note(f"{names.source_run}: the run was at {recorded.path} and is at {source.path} now")
    write_json(names.source_run, source.model_dump())
