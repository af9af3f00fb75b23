"""Training runs on disk: what a run directory gets while its seeds train, and how it is resumed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from kvjax.converters.convert import check_recorded_config
from kvjax.converters.optimizer_state import AdamMoments, from_torch_optimizer, to_torch_optimizer
from kvjax.converters.to_flax import to_flax
from kvjax.converters.to_torch import to_torch
from kvjax.converters.torch_checkpoint import read_checkpoint, write_checkpoint

from kvjax.artifacts.files import read_json, replace_directory, replace_file, write_json, write_json_lines
from kvjax.artifacts.layout import RunLayout
from kvjax.artifacts.provenance import software_versions
from kvjax.artifacts.run_dir import RunDir
from kvjax.config.files import read_config
from kvjax.config.train import CheckpointingConfig, TrainConfig
from kvjax.devices import device_description
from kvjax.errors import unusable
from kvjax.model.decoder import Params
from kvjax.task.benchmark import Benchmark
from kvjax.train.loop import Row, Training
from kvjax.train.schedule import learning_rate, restore_adam
from kvjax.train.trainer import TrainState


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A trained seed: its directory and its last evaluations by split."""

    path: Path
    seed: int
    evaluations: Mapping[str, Row]


def run_directories(
    config: TrainConfig, seeds: Sequence[int] | None, output_dir: str | None
) -> dict[Path, TrainConfig]:
    """Lists each run directory with its config.

    Without seeds, the config's own run in its output directory; with seeds, `seed_<n>` folders in it, one each.
    """
    base = Path(output_dir or config.output_dir)
    if seeds is None:
        return {base: config.model_copy(update={"output_dir": str(base)})}
    return {
        base / f"seed_{seed}": config.model_copy(
            update={
                "seed": seed,
                "run_name": f"{config.run_name}_seed_{seed}",
                "output_dir": str(base / f"seed_{seed}"),
            }
        )
        for seed in seeds
    }


def train_runs(
    runs: Mapping[Path, TrainConfig],
    benchmark: Benchmark,
    *,
    resume: bool,
    overwrite: bool,
    advance: Callable[[int], None],
) -> list[TrainedRun]:
    """Trains runs that differ in their seed alone, as one program, one run directory each.

    Args:
      runs: run directory -> config.
      benchmark: what they are trained on.
      resume: continue from the latest step that all runs have a checkpoint of.
      overwrite: replace existing run directories.
      advance: called with the number of steps done.

    Raises:
      InputError: a directory is taken, or cannot be resumed.
    """
    config = next(iter(runs.values()))
    training = Training(config, benchmark, [run.seed for run in runs.values()])
    if resume:
        for path, run in runs.items():
            _check_same_training(path, run)
        step, states = _resumed_states(runs, training, benchmark)
        advance(step)
    else:
        step, states = 0, training.initial_states()
        for path in runs:
            _check_free(path, overwrite)
        for path, run in runs.items():
            with replace_directory(path) as fresh:
                (begun := RunLayout(fresh)).checkpoints.mkdir()
                write_json(begun.config, run.model_dump(mode="json"))
    metadata = read_json(benchmark.layout.metadata)
    num_parameters = sum(np.size(leaf) for leaf in jax.tree.leaves(states[0].params))
    recorders = [_Recorder(path, run, num_parameters, metadata, step) for path, run in runs.items()]
    training.run(states, recorders, done_steps=step, advance=advance)
    for recorder in recorders:
        recorder.finish()
    return [TrainedRun(r.path, r.config.seed, r.last_evaluations) for r in recorders]


def train_missing_runs(
    runs: Mapping[Path, TrainConfig], benchmark: Benchmark, *, advance: Callable[[int], None]
) -> None:
    """Trains what is not trained yet: finished runs stay as they are, begun ones go on, the others start.

    Args:
      runs: run directory -> config.
      benchmark: what they are trained on.
      advance: called with the number of steps done, of all runs together.

    Raises:
      InputError: a run directory holds a run of another config.
    """
    begun, fresh = {}, {}
    for path, config in runs.items():
        layout = RunLayout(path)
        if layout.config.is_file():
            recorded = read_config(layout.config, TrainConfig, recorded=True)
            places = {"output_dir", "benchmark_dir"}  # a folder that was moved holds the same run
            if recorded.model_dump(exclude=places) != config.model_dump(exclude=places):
                raise unusable(path, "a run of this config (or another `output_dir`)", "a run of another config")
        if layout.summary.is_file():
            advance(config.num_steps)
        elif layout.config.is_file() and _resumable(path):
            begun[path] = config
        else:
            fresh[path] = config
    for group, resume in ((begun, True), (fresh, False)):
        if group:
            train_runs(group, benchmark, resume=resume, overwrite=True, advance=_times(len(group), advance))


def _times(runs: int, advance: Callable[[int], None]) -> Callable[[int], None]:
    return lambda steps: advance(runs * steps)


def _check_free(path: Path, overwrite: bool) -> None:
    """Raises `InputError` where a run may not be put; all are checked before the first is replaced."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if not overwrite:
            raise unusable(path, "an empty run directory (or `resume`, or `overwrite`)", "files")
        config = RunLayout(path).config
        if not config.is_file():
            raise unusable(path, "an earlier run to overwrite", f"a path without {config.name}")


def _check_same_training(path: Path, config: TrainConfig) -> None:
    """Raises `InputError` where going on would give other steps than the recorded run; how long it is may change."""
    file = RunLayout(path).config
    recorded = read_config(file, TrainConfig, recorded=True)
    names = ["seed", "batch_size", "model", "optimization"]
    schedule = config.optimization.schedule
    if schedule.kind == "cosine_decay" and schedule.decay_end_step is None:
        names.append("num_steps")  # the decay ends there: another end is another schedule from the start
    for name in names:
        if getattr(recorded, name) != getattr(config, name):
            raise unusable(file, f"the same {name} as the config to resume with", "another")


def _resumable(path: Path) -> dict[int, Path]:
    """Lists every checkpoint that training can go on from, by step.

    Step checkpoints where the run keeps them, otherwise the last one, otherwise the best.
    """
    run = RunDir.open(path)
    if run.checkpoints:
        return dict(run.checkpoints)
    for file in (run.layout.last, run.layout.best):
        if file.is_file():
            return {read_checkpoint(file).step: file}
    return {}


def _resumed_states(
    runs: Mapping[Path, TrainConfig], training: Training, benchmark: Benchmark
) -> tuple[int, list[TrainState]]:
    available = {path: _resumable(path) for path in runs}
    common = set.intersection(*(set(files) for files in available.values()))
    if not common:
        where = ", ".join(map(str, runs))
        raise unusable(where, "a checkpoint to resume from, of one step in all runs", "none")
    step = max(common)
    return step, [_read_state(available[path][step], step, run, training, benchmark) for path, run in runs.items()]


def _read_state(path: Path, step: int, config: TrainConfig, training: Training, benchmark: Benchmark) -> TrainState:
    checkpoint = read_checkpoint(path)
    if checkpoint.step != step:
        raise unusable(path, f"the checkpoint of step {step}", f"step {checkpoint.step}")
    if check_recorded_config(checkpoint, config, benchmark, path):
        raise unusable(path, f"a checkpoint trained on the benchmark in {benchmark.path}", "one trained on another")
    model, vocab_size = training.config.model, training.decoder.vocab_size
    params = to_flax(checkpoint.state, model, vocab_size, where=path)
    if "unembedding" in params:
        raise unusable(path, "a tied unembedding, as this trainer trains", "one of its own")
    if not checkpoint.optimizer_state:
        raise unusable(path, "optimizer state to resume from", "none")
    moments = from_torch_optimizer(checkpoint.optimizer_state, params, model, vocab_size, where=path)
    if moments.count != checkpoint.step:
        raise unusable(path, f"optimizer state of step {checkpoint.step}", f"of step {moments.count}")
    mu, nu = moments.mu, moments.nu
    return TrainState(params, restore_adam(training.program.optimizer, params, count=moments.count, mu=mu, nu=nu))


def _drop_half_line(path: Path) -> None:
    """Removes a last line that an interruption left without its end."""
    text = path.read_bytes() if path.is_file() else b""
    if text and not text.endswith(b"\n"):
        with replace_file(path) as partial:
            partial.write_bytes(text[: text.rfind(b"\n") + 1])


def is_better(candidate: Row, best: Row | None, checkpointing: CheckpointingConfig) -> bool:
    """Checks whether a later evaluation beats the best so far; ties go to the lower loss, then to the earlier step."""
    if best is None:
        return True
    sign = 1.0 if checkpointing.best_checkpoint_maximize else -1.0
    metric = checkpointing.best_checkpoint_metric
    ahead, behind = sign * candidate[metric], sign * best[metric]
    return ahead > behind or (ahead == behind and candidate["loss"] < best["loss"])


class _Recorder:
    """One run directory while it is being trained."""

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
        with self._layout.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def save(self, step: int, params: Params, mu: Params, nu: Params, evaluations: dict[str, Row]) -> None:
        checkpointing = self.config.checkpointing
        self.last_evaluations = evaluations or self.last_evaluations
        if step % self.config.checkpoint_every_steps == 0 or step == self.config.num_steps:
            keeps_steps = checkpointing.save_step_checkpoints
            # Where no step checkpoints are saved, the last one is what the run is resumed from.
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
            rows = [row for row in RunDir.open(self.path).metrics if int(row["step"]) <= step]
            for row in rows:
                if row["phase"] == "eval":
                    self.last_evaluations[row["split"]] = row
                    is_tracked = row["split"] == checkpointing.best_checkpoint_split
                    if is_tracked and is_better(row, self._best, checkpointing):
                        self._best = row
        except (KeyError, TypeError, ValueError) as error:
            raise unusable(self._layout.metrics, "rows with phase, step and their evaluations", repr(error)) from None
        write_json_lines(self._layout.metrics, [*rows, {"phase": "resume", "step": step}])
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
