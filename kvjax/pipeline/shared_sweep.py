"""Sweeps whose runs several processes measure together: each takes a share of the checkpoints, one draws the tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from kvjax.artifacts.run_dir import RunDir
from kvjax.converters.cached_loader import CachedLoader
from kvjax.errors import InputError
from kvjax.execution.inputs import OpenedInputs, RunInputs, prepare_run
from kvjax.model.checkpoint import CheckpointSource
from kvjax.pipeline.progress import Advance
from kvjax.pipeline.settings import SweepInputs
from kvjax.sweeps.run import measure_share, open_results
from kvjax.sweeps.run_sweep import Compiled
from kvjax.sweeps.settings import SweepSettings
from kvjax.sweeps.shares import ShareReport, cut_into_shares
from kvjax.units.leader import Leader
from kvjax.units.unit import Engine, Unit


@dataclasses.dataclass(frozen=True)
class Share:
    """Some checkpoints of a run for one process to measure, and all that it needs to know for that.

    Attributes:
      run: the run directory, or the folder of its results.
      files: name of the checkpoint's result, its step (None for the best) and its file, in the order of steps. A folder
        that lists files later on another machine may not show them yet.
      benchmark_dir, inputs, settings, still_training: see `kvjax.pipeline.sweep.sweep`.
    """

    run: str
    files: tuple[tuple[str, int | None, str], ...]
    benchmark_dir: str | None
    inputs: SweepInputs
    settings: SweepSettings
    still_training: bool

    def as_json(self) -> dict[str, Any]:
        """Writes it as a JSON document."""
        return dataclasses.asdict(self)

    @classmethod
    def of_json(cls, document: Mapping[str, Any]) -> Self:
        """Reads a document that `as_json` wrote."""
        made = {"inputs": SweepInputs(**document["inputs"]), "settings": SweepSettings(**document["settings"])}
        return cls(**{**document, **made, "files": tuple(tuple(file) for file in document["files"])})

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the checkpoints' results."""
        return tuple(name for name, _, _ in self.files)

    def prepare(self, opened: OpenedInputs) -> RunInputs:
        """Finds and checks everything that the sweep of the run needs.

        Raises:
          InputError: see `prepare_run`.
        """
        prepared = prepare_run(
            RunDir.open(Path(self.run)),
            benchmark_dir=self.benchmark_dir,
            probe_set=self.inputs.probe_set,
            steps=self.inputs.steps,
            reference=self.inputs.reference,
            still_training=self.still_training,
            opened=opened,
        )
        own = {name: (step, Path(file)) for name, step, file in self.files}
        return dataclasses.replace(prepared, wanted={**prepared.wanted, **own})


class ShareWorker:
    """Measures shares of runs in this process; inputs are opened and programs compiled once.

    The lock of each run is with whoever hands the shares out.
    """

    def __init__(self) -> None:
        self._opened, self._compiled = OpenedInputs(), Compiled()

    def measure(self, share: Share, advance: Advance = lambda number: None) -> ShareReport:
        """Measures a share.

        Args:
          share: the checkpoints.
          advance: called with the number of checkpoints done.

        Raises:
          InputError: a checkpoint or an input cannot be used. What was measured before stays.
        """
        prepared = share.prepare(self._opened)
        source, names = shared_source(prepared), share.names
        compiled = self._compiled
        return measure_share(prepared, names, source, settings=share.settings, advance=advance, compiled=compiled)

    def __call__(self, document: Mapping[str, Any], advance: Advance) -> dict[str, Any]:
        """Measures a share that came as a JSON document, and reports as one."""
        return self.measure(Share.of_json(document), advance).as_json()


def measure_alone(share: Share) -> ShareReport | InputError:
    """Measures a share, or returns what refused it; for a unit of work, see `ShareWorker`."""
    try:
        return ShareWorker().measure(share)
    except InputError as error:
        return error


def shared_source(work: RunInputs) -> CheckpointSource:
    """Opens where a run's checkpoints come from, for a process that adds to the parameter store beside others."""
    return CachedLoader(work.run, work.benchmark, certify_on=work.certificate_tokens, shared=True)


class Sharing(Protocol):
    """Measures shares of runs, in other processes or on other machines.

    Attributes:
      number: of shares that a run is best cut into.
    """

    number: int

    def measure(self, shares: Sequence[Share], advance: Advance) -> list[ShareReport | InputError]:
        """Measures shares, and returns in order what is reported of each, or what refused it.

        Raises:
          InputError: a process is gone. What others measured stays.
        """


class InGroup:
    """Shares runs among the processes of a group, this one included.

    Args:
      leader: of the group.
    """

    def __init__(self, leader: Leader):
        self._leader, self._worker = leader, ShareWorker()
        self.number = leader.count

    def measure(self, shares: Sequence[Share], advance: Advance) -> list[ShareReport | InputError]:
        tasks = [(index % self.number, share.as_json()) for index, share in enumerate(shares)]
        found = self._leader.run(tasks, self._worker, advance)
        return [one if isinstance(one, InputError) else ShareReport.of_json(one) for one in found]


class OnEngine:
    """Shares runs among the workers of an engine.

    Args:
      engine: runs units beside each other.
      number: of shares that a run is cut into.
    """

    def __init__(self, engine: Engine, number: int):
        self._engine, self.number = engine, number

    def measure(self, shares: Sequence[Share], advance: Advance) -> list[ShareReport | InputError]:
        units = [Unit("sweep", share.run, measure_alone, (share,)) for share in shares]
        sizes = [len(share.names) for share in shares]  # about equal: which unit has ended does not matter
        return self._engine.run(units, lambda done: advance(sum(sizes.pop() for _ in range(done))))


def measure_in_shares(
    behind: Sequence[RunInputs],
    sharing: Sharing,
    advance: Advance,
    *,
    benchmark_dir: str | None,
    inputs: SweepInputs,
    settings: SweepSettings,
    still_training: bool,
) -> list[list[ShareReport] | InputError]:
    """Measures runs in shares, and returns the reports of each run's, or what refused the first of them that was.

    Args:
      behind: the runs, locked by this process.
      sharing: who measures.
      advance: called with the number of checkpoints done.
      benchmark_dir, inputs, settings, still_training: see `kvjax.pipeline.sweep.sweep`.

    Raises:
      InputError: see `Sharing.measure`.
    """
    shares, runs = [], []
    for place, work in enumerate(behind):
        _, store = open_results(work, settings)
        for names in cut_into_shares(work, store, sharing.number, anew=settings.overwrite):
            files = tuple((name, step, str(file)) for name in names for step, file in [work.wanted[name]])
            shares.append(Share(str(work.run.path), files, benchmark_dir, inputs, settings, still_training))
            runs.append(place)
    found = sharing.measure(shares, advance)
    of_runs = [[one for one, run in zip(found, runs, strict=True) if run == place] for place in range(len(behind))]
    return [next((one for one in of_run if isinstance(one, InputError)), of_run) for of_run in of_runs]
