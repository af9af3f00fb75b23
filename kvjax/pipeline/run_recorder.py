"""What a run directory gets while its seed trains: metrics, checkpoints, the best of them, a summary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from kvjax.artifacts.files import replace_file, write_json, write_json_lines
from kvjax.artifacts.layout import RunLayout
from kvjax.artifacts.provenance import software_versions
from kvjax.artifacts.run_dir import RunDir
from kvjax.config.train import CheckpointingConfig, TrainConfig
from kvjax.converters.optimizer_state import AdamMoments, to_torch_optimizer
from kvjax.converters.to_torch import to_torch
from kvjax.converters.torch_checkpoint import read_checkpoint, write_checkpoint
from kvjax.devices import device_description
from kvjax.errors import unusable
from kvjax.model.decoder import Params
from kvjax.train.loop import Row
from kvjax.train.schedule import learning_rate


def _drop_half_line(path: Path) -> None:
    """Removes a last line that an interruption left without its end."""
    text = path.read_bytes() if path.is_file() else b""
    if text and not text.endswith(b"\n"):
        with replace_file(path) as partial:
            partial.write_bytes(text[: text.rfind(b"\n") + 1])


def is_better(candidate: Row, best: Row | None, checkpointing: CheckpointingConfig) -> bool:
    """Says whether a later evaluation beats the best so far; ties go to the lower loss, then to the earlier step."""
    if best is None:
        return True
    sign = 1.0 if checkpointing.best_checkpoint_maximize else -1.0
    metric = checkpointing.best_checkpoint_metric
    ahead, behind = sign * candidate[metric], sign * best[metric]
    return ahead > behind or (ahead == behind and candidate["loss"] < best["loss"])


class FileRecorder:
    """Writes one run directory while its seed trains.

    Args:
      path: the run directory, with its `checkpoints` folder.
      config: of the run.
      num_parameters: of the model.
      metadata: of the benchmark, for the checkpoint files.
      done_steps: steps that an earlier call trained, which are gone on from.
    """

    def __init__(self, path: Path, config: TrainConfig, num_parameters: int, metadata: Any, done_steps: int):
        self.path = path
        self.config = config
        self.last_evaluations: dict[str, Row] = {}
        self._spec = config.model_dump(mode="json")
        self._metadata = metadata
        self._best: Row | None = None
        self._num_parameters = num_parameters
        self._layout = RunLayout(path)
        if done_steps:
            self._rewind(done_steps)
            write_json(self._layout.config, self._spec)  # it may have been prolonged

    def log(self, row: Row) -> None:
        """Appends a row to `metrics.jsonl`."""
        with self._layout.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def save(self, step: int, params: Params, mu: Params, nu: Params, evaluations: dict[str, Row]) -> None:
        """Writes the checkpoints that are due at a step, and the best one if this is it."""
        checkpointing = self.config.checkpointing
        self.last_evaluations = evaluations or self.last_evaluations
        if step % self.config.checkpoint_every_steps == 0 or step == self.config.num_steps:
            keeps_steps = checkpointing.save_step_checkpoints
            # If no step checkpoints are saved, the last one is what the run is resumed from.
            file = self._layout.step_checkpoint(step) if keeps_steps else self._layout.last
            self._write(file, step, params, AdamMoments(step, mu, nu), evaluations)
        if checkpointing.save_best_checkpoint and evaluations:
            candidate = evaluations[checkpointing.best_checkpoint_split]
            if is_better(candidate, self._best, checkpointing):
                self._best = candidate
                self._write(self._layout.best, step, params, AdamMoments(step, mu, nu), evaluations)
                write_json(self._layout.best_record, self._best_record())

    def finish(self) -> None:
        """Writes `summary.json`."""
        write_json(
            self._layout.summary,
            {
                "run_name": self.config.run_name,
                "seed": self.config.seed,
                "num_steps": self.config.num_steps,
                "model_parameter_count": self._num_parameters,
                "final": self.last_evaluations,
                "best_checkpoint": self._best_record() if self._best else None,
                "versions": software_versions(),
                "device": device_description(),
            },
        )

    def _rewind(self, step: int) -> None:
        """Drops what was logged after the step training goes on from, and finds the best checkpoint up to it."""
        self._layout.summary.unlink(missing_ok=True)  # the run is unfinished again
        _drop_half_line(self._layout.metrics)
        checkpointing = self.config.checkpointing
        try:
            rows = [row.values for row in RunDir.open(self.path).log.rows if int(row.values["step"]) <= step]
            for row in rows:
                if row["phase"] == "eval":
                    self.last_evaluations[row["split"]] = row
                    is_tracked = row["split"] == checkpointing.best_checkpoint_split
                    if is_tracked and is_better(row, self._best, checkpointing):
                        self._best = row
        except (KeyError, TypeError, ValueError) as error:
            raise unusable(self._layout.metrics, "rows with phase, step and their evaluations", repr(error)) from None
        resume = {"phase": "resume", "step": step, "num_steps": self.config.num_steps}
        write_json_lines(self._layout.metrics, [*rows, resume])
        if self._best is not None and checkpointing.save_best_checkpoint:
            self._restore_best(int(self._best["step"]))

    def _restore_best(self, step: int) -> None:
        """Makes `best.pt` the best checkpoint of the rows that were kept; without its weights there is none."""
        best, same = self._layout.best, self._layout.step_checkpoint(step)
        if same.is_file():
            with replace_file(best) as partial:
                shutil.copyfile(same, partial)
        elif not (best.is_file() and read_checkpoint(best).step == step):
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

    def _write(self, path: Path, step: int, params: Params, moments: AdamMoments, evaluations: dict[str, Row]) -> None:
        optimization = self.config.optimization
        rate = float(learning_rate(optimization, step, self.config.num_steps))
        write_checkpoint(
            path,
            step=step,
            state=to_torch(params),
            optimizer_state=to_torch_optimizer(moments, optimization, rate),
            metrics=evaluations,
            config={
                "train_spec": self._spec,
                "benchmark_metadata": self._metadata,
                "model_parameter_count": self._num_parameters,
            },
        )
