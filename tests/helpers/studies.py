"""The settings of the small study that tests of the pipeline share."""

from __future__ import annotations

from pathlib import Path

from kvjax.pipeline.settings import PipelineSettings


def study_settings(folder: Path) -> PipelineSettings:
    """Names the two configs in a folder, one seed, and the study beside them."""
    named = {"config": str(folder / "train.json"), "benchmark_config": str(folder / "benchmark.json")}
    return PipelineSettings(**named, seeds=(3,), output_dir=str(folder / "study"))
