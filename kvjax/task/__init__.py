"""The symbolic key-value task: vocabulary, streams, benchmarks and probe sets."""
