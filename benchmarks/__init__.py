"""Benchmark scripts: `python -m benchmarks.<name>`. Ratios within one run; results as JSON in benchmarks/results."""
