"""Measures: pure functions from the arrays of one batch, or of one checkpoint, to numbers (docs/definitions.md)."""
