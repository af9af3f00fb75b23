"""Training runs on disk: what a run directory gets while its seeds train, and how it is resumed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from converters.optimizer_state import AdamMoments, from_torch_optimizer, to_torch_optimizer
from converters.to_flax import to_flax
from converters.to_torch import to_torch
from converters.torch_checkpoint import read_checkpoint, write_checkpoint
from kvjax.artifacts.files import read_json, replace_directory, replace_file, write_json, write_json_lines
from kvjax.artifacts.provenance import device_description, software_versions
from kvjax.artifacts.run_dir import RunDir
from kvjax.config import CheckpointingConfig, TrainConfig, read_config
from kvjax.errors import unusable
from kvjax.model.decoder import Params
from kvjax.task.benchmark import METADATA_FILE, Benchmark
from kvjax.train.loop import Row, Training
from kvjax.train.schedule import learning_rate, restore_adam
from kvjax.train.trainer import TrainState

BEST_FILE = "best.pt"


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A trained seed: its directory and its last evaluations by split."""

    path: Path
    seed: int
    evaluations: Mapping[str, Row]


def run_directories(
    config: TrainConfig, seeds: Sequence[int] | None, output_dir: str | None
) -> dict[Path, TrainConfig]:
    """Returns run directory -> its config.

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
        step, states = _resumed_states(runs, training)
        advance(step)
    else:
        step, states = 0, training.initial_states()
        for path in runs:
            _claim(path, overwrite)
    metadata = read_json(benchmark.path / METADATA_FILE)
    num_parameters = sum(np.size(leaf) for leaf in jax.tree.leaves(states[0].params))
    recorders = [_Recorder(path, run, num_parameters, metadata, step) for path, run in runs.items()]
    training.run(states, recorders, done_steps=step, advance=advance)
    for recorder in recorders:
        recorder.finish()
    return [TrainedRun(r.path, r.config.seed, r.last_evaluations) for r in recorders]


def train_missing_runs(
    runs: Mapping[Path, TrainConfig], benchmark: Benchmark, *, advance: Callable[[int], None]
) -> None:
    """Trains what is not trained yet: nothing where all runs are finished, from the latest common checkpoint where
    all have begun, from the start otherwise.

    Raises:
      InputError: a run directory holds a run of another config.
    """
    begun = [path for path in runs if (path / "run_config.json").is_file()]
    for path in begun:
        recorded = read_config(path / "run_config.json", TrainConfig, recorded=True)
        if recorded != runs[path]:
            raise unusable(path, "a run of this config (or another --output_dir)", "a run of another config")
    if all((path / "summary.json").is_file() for path in runs):
        advance(next(iter(runs.values())).num_steps)
        return
    resume = len(begun) == len(runs) and bool(set.intersection(*(set(_resumable(path)) for path in runs)))
    train_runs(runs, benchmark, resume=resume, overwrite=True, advance=advance)


def _claim(path: Path, overwrite: bool) -> None:
    if path.exists() and any(path.iterdir()):
        if not overwrite:
            raise unusable(path, "an empty run directory (or --resume, or --overwrite)", "files")
        if not (path / "run_config.json").is_file():
            raise unusable(path, "an earlier run to overwrite", "a directory without run_config.json")
    with replace_directory(path) as fresh:
        (fresh / "checkpoints").mkdir()


def _check_same_training(path: Path, config: TrainConfig) -> None:
    """Raises `InputError` where going on would give other steps than the recorded run; how long it is may change."""
    recorded = read_config(path / "run_config.json", TrainConfig, recorded=True)
    for name in ("seed", "batch_size", "model", "optimization"):
        if getattr(recorded, name) != getattr(config, name):
            raise unusable(path / "run_config.json", f"the same {name} as the config to resume with", "another")


def _resumable(path: Path) -> dict[int, Path]:
    """Returns step -> file of every checkpoint training can go on from."""
    run = RunDir.open(path)
    files = dict(run.checkpoints)
    if (path / "best_checkpoint.json").is_file():
        step, file = run.best_checkpoint()
        files.setdefault(step, file)
    return files


def _resumed_states(runs: Mapping[Path, TrainConfig], training: Training) -> tuple[int, list[TrainState]]:
    available = {path: _resumable(path) for path in runs}
    common = set.intersection(*(set(files) for files in available.values()))
    if not common:
        where = ", ".join(map(str, runs))
        raise unusable(where, "a checkpoint to resume from, of one step in all runs", "none")
    step = max(common)
    return step, [_read_state(available[path][step], training) for path in runs]


def _read_state(path: Path, training: Training) -> TrainState:
    checkpoint = read_checkpoint(path)
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
    """Whether a later evaluation beats the best so far; ties go to the lower loss, then to the earlier step."""
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
        write_json(path / "run_config.json", self._spec)
        self._metrics_path = path / "metrics.jsonl"
        if done_steps:
            self._rewind(done_steps)

    def log(self, row: Row) -> None:
        with self._metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def save(self, step: int, params: Params, mu: Params, nu: Params, evaluations: dict[str, Row]) -> None:
        checkpointing = self.config.checkpointing
        self.last_evaluations = evaluations or self.last_evaluations
        if checkpointing.save_step_checkpoints and step % self.config.checkpoint_every_steps == 0:
            self._write(f"step_{step:06d}.pt", step, params, AdamMoments(step, mu, nu), evaluations)
        if checkpointing.save_best_checkpoint and evaluations:
            candidate = evaluations[checkpointing.best_checkpoint_split]
            if is_better(candidate, self._best, checkpointing):
                self._best = candidate
                self._write(BEST_FILE, step, params, AdamMoments(step, mu, nu), evaluations)
                write_json(self.path / "best_checkpoint.json", self._best_record())

    def finish(self) -> None:
        """Writes `summary.json`."""
        write_json(
            self.path / "summary.json",
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
        _drop_half_line(self._metrics_path)
        rows = [row for row in RunDir.open(self.path).metrics if row.get("step", 0) <= step]
        write_json_lines(self._metrics_path, [*rows, {"phase": "resume", "step": step}])
        split = self.config.checkpointing.best_checkpoint_split
        for row in rows:
            if row.get("phase") == "eval":
                self.last_evaluations[row["split"]] = row
                if row["split"] == split and is_better(row, self._best, self.config.checkpointing):
                    self._best = row

    def _best_record(self) -> Row:
        checkpointing = self.config.checkpointing
        return {
            "path": str(self.path / "checkpoints" / BEST_FILE),
            "step": self._best["step"],
            "split": checkpointing.best_checkpoint_split,
            "metric": checkpointing.best_checkpoint_metric,
            "maximize": checkpointing.best_checkpoint_maximize,
            "metric_value": self._best[checkpointing.best_checkpoint_metric],
            "loss": self._best["loss"],
        }

    def _write(self, name: str, step: int, params: Params, moments: AdamMoments, evaluations: dict[str, Row]) -> None:
        optimization = self.config.optimization
        rate = float(learning_rate(optimization, step, self.config.num_steps))
        write_checkpoint(
            self.path / "checkpoints" / name,
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
