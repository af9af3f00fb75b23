"""Converts PyTorch checkpoints to Flax parameters and back. No other package imports torch."""
