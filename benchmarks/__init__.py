"""Benchmarks against peers: `python -m benchmarks.<name>` prints ratios of one run and writes benchmarks/results."""
