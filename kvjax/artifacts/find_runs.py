"""Open the runs that a person names: by directories, lists of them and globs, each run once."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from kvjax.artifacts.layout import RunLayout
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.source_run import SourceRun, claim, layout_of
from kvjax.errors import bad_argument, note

Needs = Literal["nothing", "checkpoints", "step checkpoints"]

_MOST_COMMAS = 16  # that a directory's name in a longer list may have
_LISTED = 5


def find_run_dirs(names: Iterable[str], *, needs: Needs = "nothing") -> list[RunDir]:
    """Opens the runs that some texts name, in order, each once.

    A text is the path of a directory, a glob, or several of these joined by commas. An existing path is taken as it is,
    whatever characters it has. A run that several names lead to counts once, under the first.

    Args:
      names: the texts.
      needs: what a directory that a glob finds needs so as not to be skipped. Whatever else it finds is skipped with a
        note: files, folders that are no runs, links to nothing. A directory that is named has to be a run.

    Raises:
      InputError: a glob finds no run, or a named directory is none.
    """
    found: dict[Path, RunDir] = {}
    for path in named_paths(names, needs=needs):
        run = RunDir.open(path)
        first = found.setdefault(run.layout.path.resolve(), run)
        if os.path.abspath(first.path) != os.path.abspath(run.path):
            note(f"{run.path} is the same run as {first.path}, which counts")
    if not found:
        raise bad_argument("run_dirs", "one or more run directories", "none")
    return list(found.values())


def with_results_in(runs: Sequence[RunDir], output_dir: Path) -> list[RunDir]:
    """Opens runs with their results in another folder: itself for one run, else a folder in it per run directory.

    Raises:
      InputError: two runs would share a folder, or it is a run directory, of another run, or cannot be written.
    """
    several = len(runs) > 1 or RunLayout(output_dir / _name(runs[0])).source_run.is_file()
    if several and RunLayout(output_dir).source_run.is_file():
        raise bad_argument("output_dir", "a folder for the results of several runs", f"those of one run, {output_dir}")
    folders: dict[Path, RunDir] = {}
    for run in runs:
        folder = output_dir / _name(run) if several else output_dir
        if folder in folders:
            expected = f"run directories of different names (or an `output_dir` each), for {folder}"
            raise bad_argument("output_dir", expected, f"{folders[folder].path} and {run.path}")
        folders[folder] = run
    return [_moved(run, folder) for folder, run in folders.items()]


def _moved(run: RunDir, folder: Path) -> RunDir:
    source = run.layout.path.resolve()
    if folder.resolve() == source:
        return RunDir.open(run.layout.path)
    claim(folder, SourceRun(path=str(source), run_name=run.config.run_name, seed=run.config.seed))
    return RunDir.open(folder)


def _name(run: RunDir) -> str:
    return run.layout.path.resolve().name


def names_of_results(names: Sequence[str], output_dir: str | None) -> Sequence[str]:
    """Says how runs are named once their results lie in a folder: by it, or by a glob for several runs in it."""
    if output_dir is None:
        return names
    one = RunLayout(Path(output_dir)).source_run.is_file()
    return (output_dir,) if one else (f"{glob.escape(output_dir.rstrip('/'))}/*",)


def named_paths(names: Iterable[str], *, needs: Needs = "nothing") -> Iterator[Path]:
    """Yields the directories that texts name, globs expanded and cleared of what is no run; see `find_run_dirs`.

    Raises:
      InputError: a glob finds no run.
    """
    for name in (name for text in names if text for name in _split(text)):
        if os.path.lexists(name) or not glob.has_magic(name):
            yield Path(name)
            continue
        matches = [Path(match) for match in sorted(glob.glob(name))]
        reasons = {path: why for path in matches if (why := _why_no_run(path, needs)) is not None}
        if len(reasons) == len(matches):
            raise bad_argument("run_dirs", f"run directories matching {name}", _listed(reasons) or "none")
        if reasons:
            note(f"skipped among {name}: {_listed(reasons)}")
        yield from (path for path in matches if path not in reasons)


def _split(text: str) -> list[str]:
    """Splits a list at its commas, but for those of a path that exists or of a glob that finds something."""
    if os.path.lexists(text):
        return [text]
    parts, names = text.split(","), []
    while parts:
        for taken in range(min(len(parts), _MOST_COMMAS), 0, -1):
            name = ",".join(parts[:taken])
            if taken == 1 or os.path.lexists(name) or (glob.has_magic(name) and glob.glob(name)):
                break
        names.append(name if os.path.lexists(name) else name.strip())
        parts = parts[taken:]
    return [name for name in names if name]


def _why_no_run(path: Path, needs: Needs) -> str | None:
    """Says why a directory that a glob found is skipped; None if it is a run."""
    if not path.exists():
        return "a link to nothing"
    if not path.is_dir():
        return "a file"
    if not RunLayout(path).source_run.is_file() and not RunLayout(path).config.is_file():
        return f"no {RunLayout(path).config.name}"
    if needs == "nothing":
        return None
    layout = layout_of(path)
    if layout.step_checkpoints() or (needs == "checkpoints" and (layout.best.is_file() or layout.last.is_file())):
        return None
    return f"no {needs}"


def _listed(reasons: dict[Path, str]) -> str:
    words = [f"{path} ({why})" for path, why in list(reasons.items())[:_LISTED]]
    more = [f"and {len(reasons) - _LISTED} more"] if len(reasons) > _LISTED else []
    return ", ".join([*words, *more])
