"""Sweeps of the small runs, as the command makes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from kvjax.artifacts.run_dir import RunDir
from kvjax.execution.inputs import RunInputs, prepare_run
from kvjax.measure.weight_spectra import head_spectra
from kvjax.model.decoder import Decoder
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params
from kvjax.pipeline.sweep import checkpoint_source as source
from kvjax.sweeps.compiled_sweep import CompiledSweep
from kvjax.sweeps.measure_checkpoint import SweptModel
from kvjax.sweeps.results import SweepReport
from kvjax.sweeps.run import sweep_runs
from kvjax.sweeps.settings import SweepSettings
from kvjax.task.benchmark import Benchmark
from kvjax.task.encoding import encode_records

__all__ = ["SMALL_SWEEP", "prepared_run", "small_program", "source", "sweep", "swept_models"]

SMALL_SWEEP = SweepSettings(ablations=("zero",), probe="none", checkpoint_batch="2")
_SPLIT = "validation_iid"


def prepared_run(run, *, probe_set=None, steps="all", reference="final", **how) -> RunInputs:
    """Prepares a run directory, with its own benchmark."""
    return prepare_run(
        RunDir.open(run), benchmark_dir=None, probe_set=probe_set, steps=steps, reference=reference, **how
    )


def sweep(run, *, steps="all", reference="final", still_training=False, **settings) -> SweepReport:
    """Sweeps a run directory and returns the report, with its rows as they are now."""
    prepared = prepared_run(run, steps=steps, reference=reference, still_training=still_training)
    (report,) = sweep_runs([prepared], source, settings=SweepSettings(**settings), advance=lambda n: None)
    return dataclasses.replace(report, rows=list(report.rows))


def swept_models(params: Sequence[Params], n_heads: int) -> SweptModel:
    """Stacks checkpoints as the sweep's program takes them."""
    return SweptModel.stack(params, [head_spectra(own, n_heads) for own in params])


def small_program(
    benchmark: Benchmark, n_layers: int, settings: SweepSettings = SMALL_SWEEP, *, fit: bool = False
) -> tuple[CompiledSweep, Params]:
    """Returns the program that sweeps a tiny random model, and the model's parameters."""
    vocabulary = benchmark.vocabulary
    encoded = encode_records(benchmark.read_split(_SPLIT)[:12], vocabulary, [_SPLIT], max_seq_len=64)
    shape = {"d_model": 8, "n_layers": n_layers, "n_heads": 2, "d_ff": 12, "max_seq_len": 64}
    config = DecoderConfig(vocab_size=len(vocabulary.tokens), **shape)
    params = Decoder(config).init(jax.random.key(0), np.ones((1, 4), np.int32))["params"]
    fitted = encoded if fit else None
    program = CompiledSweep(config, vocabulary, encoded, 1, settings, fit=fitted, max_buckets=1)
    return program, jax.tree.map(np.asarray, params)
