"""One checkpoint file of a run, checked against the run and its benchmark, converted and certified."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.certificate import Certificate, certify
from converters.names import modern_name
from converters.to_flax import to_flax
from converters.torch_checkpoint import TorchCheckpoint, read_checkpoint
from kvjax.artifacts.files import file_sha256
from kvjax.config import RunConfig
from kvjax.errors import unusable
from kvjax.model.decoder import Params
from kvjax.task.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class ConvertedCheckpoint:
    """A checkpoint as Flax parameters.

    Attributes:
      path: its `.pt` file, with `sha256` of that file's bytes.
      step: the training step.
      params: the Flax tree.
      certificate: parity with PyTorch, where one was asked for.
      recorded: what the file holds beside tensors: `config` and `metrics`.
    """

    path: Path
    sha256: str
    step: int
    params: Params
    certificate: Certificate | None
    recorded: Mapping[str, Any]


def convert_checkpoint(
    path: Path,
    run: RunConfig,
    vocabulary: Vocabulary,
    *,
    expected_step: int | None = None,
    certify_on: np.ndarray | None = None,
) -> ConvertedCheckpoint:
    """Returns a run's checkpoint file as Flax parameters.

    Args:
      path: the `.pt` file.
      run: the run's config.
      vocabulary: the benchmark's tokens; a checkpoint trained on others is refused.
      expected_step: the step its name states.
      certify_on: sample sequences [B, T] for the parity certificate; none is made where None.

    Raises:
      InputError: the file is unusable, or not of this run, step or benchmark.
    """
    if not path.is_file():
        raise unusable(path, "a PyTorch checkpoint", "no such file")
    sha256 = file_sha256(path)
    checkpoint = read_checkpoint(path)
    if expected_step is not None and checkpoint.step != expected_step:
        raise unusable(path, f"the checkpoint of step {expected_step}", f"step {checkpoint.step}")
    _check_recorded_config(checkpoint, run, vocabulary, path)
    vocab_size = len(vocabulary.tokens)
    params = to_flax(checkpoint.state, run.model, vocab_size, where=path)
    certificate = None
    if certify_on is not None:
        state = {modern_name(name): array for name, array in checkpoint.state.items()}
        certificate = certify(state, params, run.model, certify_on, where=path)
    recorded = {"config": dict(checkpoint.config), "metrics": dict(checkpoint.metrics)}
    return ConvertedCheckpoint(path, sha256, checkpoint.step, params, certificate, recorded)


def _check_recorded_config(checkpoint: TorchCheckpoint, run: RunConfig, vocabulary: Vocabulary, path: Path) -> None:
    """Checks what the trainer recorded inside the file; a file without such records is judged by its tensors."""
    trained_on = (checkpoint.config.get("benchmark_metadata") or {}).get("vocabulary")
    if trained_on is not None:
        recorded = Vocabulary.from_metadata(trained_on, path)
        if recorded != vocabulary:
            raise unusable(
                path,
                f"a model of the benchmark's vocabulary ({_describe(vocabulary)})",
                f"one of another ({_describe(recorded)})",
            )
    spec = (checkpoint.config.get("train_spec") or {}).get("model")
    if spec is not None:
        ours = run.model.model_dump(exclude={"dropout"})
        theirs = {name: spec.get(name) for name in ours}
        if ours != theirs:
            different = next(name for name in ours if ours[name] != theirs[name])
            raise unusable(
                path,
                f"{different} {ours[different]} as in run_config.json",
                f"{different} {theirs[different]}",
            )


def _describe(vocabulary: Vocabulary) -> str:
    keys, values = vocabulary.key_tokens, vocabulary.value_tokens
    return f"{len(keys)} keys {keys[0]}…{keys[-1]}, {len(values)} values {values[0]}…{values[-1]}"
