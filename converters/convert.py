"""Converts one checkpoint file of a run, checks it against the run and its benchmark, and certifies it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from kvjax.converters.certificate import certify
from kvjax.converters.parameter_names import modern_name
from kvjax.converters.plain_values import section
from kvjax.converters.to_flax import to_flax
from kvjax.converters.torch_checkpoint import TorchCheckpoint, parse_checkpoint

from kvjax.artifacts.files import HashedFile
from kvjax.config.run import RunConfig
from kvjax.errors import InputError, unusable
from kvjax.model.checkpoint import Checkpoint
from kvjax.model.decoder_config import DecoderConfig
from kvjax.task.benchmark import Benchmark
from kvjax.task.vocabulary import Vocabulary

UNREADABLE_VOCABULARY = "the vocabulary that its file records cannot be read, and is not compared with the benchmark's"


def convert_checkpoint(
    path: Path,
    run: RunConfig,
    benchmark: Benchmark,
    *,
    file: HashedFile | None = None,
    expected_step: int | None = None,
    certify_on: np.ndarray | None = None,
) -> Checkpoint:
    """Converts a run's checkpoint file to Flax parameters.

    Args:
      path: the `.pt` file.
      run: the run's config.
      benchmark: the benchmark to measure on. A checkpoint of another vocabulary is refused; one that was trained on
        another benchmark of the same vocabulary gets a note.
      file: its bytes, if they were read already.
      expected_step: the step that the file's name states.
      certify_on: sample sequences [B, T] for the parity certificate; None makes no certificate.

    Raises:
      InputError: the file is unusable, or not of this run, step or benchmark.
    """
    file = file or HashedFile.read(path, "a PyTorch checkpoint")
    checkpoint = parse_checkpoint(file, expected_step)
    notes = checkpoint.notes + check_recorded_config(checkpoint, run, benchmark, path)
    vocab_size = len(benchmark.vocabulary.tokens)
    params = to_flax(checkpoint.state, run.model, vocab_size, where=path)
    certificate = None
    if certify_on is not None:
        # Copies, because PyTorch takes no read-only arrays.
        state = {modern_name(name): np.array(tensor, np.float32) for name, tensor in checkpoint.state.items()}
        certificate = certify(state, params, run.model, certify_on, where=path)
    return Checkpoint(
        step=checkpoint.step,
        params=params,
        config=DecoderConfig.from_model_config(run.model, vocab_size, tied="unembedding" not in params),
        path=path,
        sha256=file.sha256,
        certificate=certificate,
        recorded_config=checkpoint.config,
        recorded_metrics=checkpoint.metrics,
        notes=notes,
    )


def check_recorded_config(
    checkpoint: TorchCheckpoint, run: RunConfig, benchmark: Benchmark, path: Path
) -> tuple[str, ...]:
    """Compares the config that the trainer recorded in a file with its run and benchmark; returns notes on them.

    A file without such records is judged by its tensors alone.

    Raises:
      InputError: the file is of another model or vocabulary.
    """
    spec = section(section(checkpoint.config, "train_spec"), "model")
    ours = run.model.model_dump(include={"d_model", "n_layers", "n_heads", "d_ff", "max_seq_len"})
    for name, value in ours.items():
        if spec.get(name, value) != value:
            raise unusable(path, f"{name} {value} as in run_config.json", f"{name} {spec[name]}")
    trained_on = section(checkpoint.config, "benchmark_metadata")
    if "vocabulary" not in trained_on:
        return ()
    try:
        recorded = Vocabulary.from_metadata(trained_on["vocabulary"], path)
    except InputError:  # it stands beside the weights, which it does not make unusable
        return (UNREADABLE_VOCABULARY,)
    if recorded != benchmark.vocabulary:
        raise unusable(
            path,
            f"a model of the benchmark's vocabulary ({_describe(benchmark.vocabulary)})",
            f"one of {_describe(recorded)}",
        )
    pairs = trained_on.get("holdout_pairs")
    if isinstance(pairs, list) and set(map(str, pairs)) != benchmark.holdout_pairs:
        return (
            f"trained on another benchmark than {benchmark.path}: its held-out pairs differ, so that accuracy on "
            "heldout_pairs does not measure generalisation",
        )
    return ()


def _describe(vocabulary: Vocabulary) -> str:
    keys, values = vocabulary.key_tokens, vocabulary.value_tokens
    return f"{len(keys)} keys {keys[0]}…{keys[-1]}, {len(values)} values {values[0]}…{values[-1]}"
