"""PyTorch checkpoints to Flax parameter trees and back. The only package that imports torch."""
