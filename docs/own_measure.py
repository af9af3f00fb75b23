"""Sweeps a custom measure over every checkpoint: how much each head attends to the value a read asks for.

python docs/own_measure.py runs/seed_7 data/benchmark
"""

import sys

import jax.numpy as jnp

import kvjax
from kvjax.model.transforms import plain_forward


def attention_to_the_value(params, config, records):
    """Averages each head's attention from a read to the position of its value: [layers, heads]."""
    _, trace = plain_forward(config)(params, records.tokens, capture=("pattern",))
    sequences = jnp.arange(len(records.tokens))[:, None]  # one axis for sequences, one for their reads
    at_reads = trace["pattern"][:, sequences, :, records.prediction_positions, records.support_positions]
    return jnp.mean(at_reads, axis=(0, 1), where=records.is_read[:, :, None, None])


run_dir, benchmark_dir = sys.argv[1:]
run = kvjax.open_run(run_dir, benchmark_dir=benchmark_dir)
attention = run.measure(attention_to_the_value, run.probe_set(), dims=("layer", "head"))
print(attention.max("layer").round(3).to_pandas())
