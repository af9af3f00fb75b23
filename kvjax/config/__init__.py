"""Validated configurations: benchmarks, training runs, birth windows (fields and defaults: docs/formats.md)."""
