"""What a run directory gets while it trains: metrics, checkpoints, the best of them, a summary."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvjax.artifacts.files import replace_directory, replace_file, write_json
from kvjax.artifacts.layout import RunLayout
from kvjax.artifacts.partials import remove_abandoned
from kvjax.artifacts.provenance import software_versions
from kvjax.config.train import TrainConfig
from kvjax.converters.optimizer_groups import ParameterGroup
from kvjax.converters.optimizer_state import OptimizerState, to_torch_optimizer
from kvjax.converters.to_torch import to_torch
from kvjax.converters.torch_checkpoint import read_checkpoint, write_checkpoint
from kvjax.devices import device_description
from kvjax.errors import InputError, note, unusable
from kvjax.model.params import Params
from kvjax.pipeline.background_writer import BackgroundWriter
from kvjax.pipeline.run_history import RunHistory, is_better
from kvjax.train.loop import Row
from kvjax.train.schedule import Hyperparameters, learning_rate


@dataclasses.dataclass(frozen=True)
class OptimizerStart:
    """How the optimiser of a run is written, if another trainer began it.

    Attributes:
      groups: its parameter groups, as in `OptimizerState`.
      more_updates: how many updates it has taken beyond the run's steps.
    """

    groups: tuple[ParameterGroup, ...] = ()
    more_updates: int = 0


class FileRecorder:
    """Writes one run directory while its run trains. `begin` or `go_on` comes first, `finish` last.

    The log is written at once, checkpoints and the summary by `writer`, in order.

    Attributes:
      last_evaluations: by split, of the latest evaluation.
      diverged_at: the step at which loss or gradient stopped being finite; None if they did not.

    Args:
      path: the run directory.
      config: of the run.
      num_parameters: of the model.
      metadata: of the benchmark, for the checkpoint files.
      writer: writes while training goes on.
      start: how the optimiser began.
    """

    def __init__(
        self,
        path: Path,
        config: TrainConfig,
        num_parameters: int,
        metadata: Any,
        writer: BackgroundWriter,
        start: OptimizerStart = OptimizerStart(),
    ):
        self.path = path
        self.config = config
        self.last_evaluations: dict[str, Row] = {}
        self.diverged_at: int | None = None
        self._spec = config.model_dump(mode="json")
        self._metadata = metadata
        self._best: Row | None = None
        self._num_parameters = num_parameters
        self._writer = writer
        self._start = start
        self._layout = RunLayout(path)

    def begin(self) -> None:
        """Starts a run: removes what an earlier training wrote there, and writes the config.

        The earlier run's analysis goes as well, with a note. Other files stay.
        """
        layout = self._layout
        if not layout.config.is_file():
            with replace_directory(self.path) as fresh:
                (begun := RunLayout(fresh)).checkpoints.mkdir()
                write_json(begun.config, self._spec)
            return
        layout.summary.unlink(missing_ok=True)  # first: without it, an interrupted run counts as unfinished
        if layout.analysis.is_dir():
            note(f"{layout.analysis} was removed: it measured the run that is overwritten")
            shutil.rmtree(layout.analysis)
        self._remove_abandoned()
        written = [layout.best_record, layout.metrics, layout.best, layout.last]
        for file in (*written, *(path for _, path in layout.step_checkpoints())):
            file.unlink(missing_ok=True)
        layout.checkpoints.mkdir(exist_ok=True)
        write_json(layout.config, self._spec)

    def go_on(self, history: RunHistory) -> None:
        """Takes a run back to the step it goes on from: its log, its best checkpoint, its config."""
        layout = self._layout
        self.last_evaluations, self._best = dict(history.evaluations), history.best
        resume = {"phase": "resume", "step": history.step, "num_steps": self.config.num_steps}
        with replace_file(layout.metrics) as partial:
            partial.write_bytes(b"".join(line + b"\n" for line in (*history.lines, json.dumps(resume).encode())))
        if history.step < self.config.num_steps:
            layout.summary.unlink(missing_ok=True)  # the run is unfinished again
        self._remove_abandoned()
        if self._best is not None and self.config.checkpointing.save_best_checkpoint:
            self._restore_best(int(self._best["step"]))
        write_json(layout.config, self._spec)  # it may have been prolonged

    def _remove_abandoned(self) -> None:
        """Removes what a killed training left half-written, beside the run directory and among its checkpoints."""
        for folder in (self.path.resolve().parent, self._layout.checkpoints):
            remove_abandoned(folder)

    def log(self, row: Row) -> None:
        """Appends a row to `metrics.jsonl`."""
        self._writer.check()
        try:
            with self._layout.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        except OSError as error:
            raise unusable(self._layout.metrics, "a file that can be written", error) from None

    def save(self, step: int, params: Params, accumulators: Mapping[str, Params], evaluations: dict[str, Row]) -> None:
        """Hands the checkpoints that are due at a step to the writer, and the best one if this is it."""
        checkpointing, files = self.config.checkpointing, []
        self.last_evaluations = evaluations or self.last_evaluations
        if step % self.config.checkpoint_every_steps == 0 or step == self.config.num_steps:
            keeps_steps = checkpointing.save_step_checkpoints
            # If no step checkpoints are saved, the last one is what the run is resumed from.
            files.append(self._layout.step_checkpoint(step) if keeps_steps else self._layout.last)
        if checkpointing.save_best_checkpoint and evaluations:
            candidate = evaluations[checkpointing.best_checkpoint_split]
            if is_better(candidate, self._best, checkpointing):
                self._best = candidate
                files.append(self._layout.best)
        if files:
            optimizer = OptimizerState(step + self._start.more_updates, accumulators, self._start.groups)
            best = self._best_record() if self._layout.best in files else None
            rate = float(learning_rate(Hyperparameters.of(self.config.optimization, self.config.num_steps), step))
            job = functools.partial(self._write, files, step, params, optimizer, evaluations, rate=rate, best=best)
            self._writer.submit(job)

    def diverge(self, step: int, loss: float) -> None:
        """Ends the run at the step at which it diverged, while others may go on; what it saved before stays."""
        self.diverged_at = step
        self.finish()
        advice = "a lower learning rate may help; what was saved before stays"
        note(f"{self.path}: diverged, with loss {loss:g} at step {step} ({advice})")

    def finish(self) -> None:
        """Hands `summary.json` to the writer: the file says that all before it is written."""
        summary = {
            "run_name": self.config.run_name,
            "seed": self.config.seed,
            "num_steps": self.config.num_steps,
            "model_parameter_count": self._num_parameters,
            "final": _finite(self.last_evaluations),
            "best_checkpoint": self._best_record() if self._best else None,
            "diverged_at_step": self.diverged_at,
            "versions": software_versions(),
            "device": device_description(),
        }
        self._writer.submit(functools.partial(write_json, self._layout.summary, summary))

    def _restore_best(self, step: int) -> None:
        """Makes `best.pt` the best checkpoint of the rows that were kept; without its weights there is none."""
        best, same = self._layout.best, self._layout.step_checkpoint(step)
        if same.is_file():
            with replace_file(best) as partial:
                shutil.copyfile(same, partial)
        elif not _is_of_step(best, step):
            note(f"{best}: removed, for it is not of step {step}, the best so far; training finds another")
            self._best = None
            best.unlink(missing_ok=True)
            self._layout.best_record.unlink(missing_ok=True)
            return
        write_json(self._layout.best_record, self._best_record())

    def _best_record(self) -> Row:
        checkpointing = self.config.checkpointing
        return {
            "path": str(self._layout.best),
            "step": self._best["step"],
            "split": checkpointing.best_checkpoint_split,
            "metric": checkpointing.best_checkpoint_metric,
            "maximize": checkpointing.best_checkpoint_maximize,
            "metric_value": self._best[checkpointing.best_checkpoint_metric],
            "loss": self._best["loss"],
        }

    def _write(
        self,
        files: Sequence[Path],
        step: int,
        params: Params,
        optimizer: OptimizerState,
        evaluations: dict[str, Row],
        *,
        rate: float,
        best: Row | None,
    ) -> None:
        """Writes a state to files, and the record of the best one behind it if this is it."""
        state = to_torch(params)
        optimizer_state = to_torch_optimizer(optimizer, params, self.config.optimization, rate)
        for file in files:
            write_checkpoint(
                file,
                step=step,
                state=state,
                optimizer_state=optimizer_state,
                metrics=evaluations,
                config={
                    "train_spec": self._spec,
                    "benchmark_metadata": self._metadata,
                    "model_parameter_count": self._num_parameters,
                },
            )
        if best is not None:
            write_json(self._layout.best_record, best)


def _is_of_step(path: Path, step: int) -> bool:
    try:
        return read_checkpoint(path).step == step
    except InputError:
        return False


def _finite(value: Any) -> Any:
    """Replaces numbers that JSON cannot hold, which another trainer may have logged, by null."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
