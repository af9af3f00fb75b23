"""When something formed in a run: triggers, windows, the order of metrics, and whether a run is ready for more."""
