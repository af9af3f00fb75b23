"""Lists every reader of files: what to damage, how to read it, and when a changed value may be accepted."""

from __future__ import annotations

from benchmarks.fuzzing.material import BENCHMARK, COMPARISON, CONFIGS, FACTOR, RANKING, RUN, STEPS
from benchmarks.fuzzing.mutations import damage_bytes, damage_checkpoint, damage_json, damage_json_lines
from benchmarks.fuzzing.reader import Reader
from benchmarks.fuzzing.reading import (
    check_cache_miss,
    check_identity,
    check_missing,
    check_moments,
    check_nothing,
    check_tensors,
    check_unsealed,
    check_written_again,
    read_best,
    read_compared,
    read_compared_factor,
    read_config_of,
    read_converted,
    read_evaluation,
    read_metadata,
    read_metrics,
    read_pairs,
    read_probe_set,
    read_ranking,
    read_records,
    read_resumed_metrics,
    read_resumed_state,
    read_run_config,
    read_store,
    read_story_and_status,
    read_summary,
    read_sums,
    read_sweep_and_status,
    read_tables,
    read_windows_and_status,
)
from kvjax.artifacts.layout import step_name
from kvjax.config.benchmark import BenchmarkConfig
from kvjax.config.train import TrainConfig
from kvjax.config.windows import WindowConfig

_BYTES, _JSON, _LINES = (damage_bytes,), (damage_bytes, damage_json), (damage_bytes, damage_json_lines)

_DETECTED = "a defect: a hash covers the file"
_SEALED = "the same without the hash of its content, as older versions wrote it"
_ANALYSIS = f"{RUN}/analysis"
_PROBE = f"{_ANALYSIS}/probe_set"


def readers_of(step: int) -> dict[str, Reader]:
    """Lists the readers by name, for a material whose run ends at a step."""
    return {
        "benchmark config": Reader(
            "`generate-benchmark --config`",
            [f"{CONFIGS}/benchmark.json"],
            _JSON,
            read_config_of(BenchmarkConfig),
            "another valid config, the same when written and read again",
            check_written_again,
        ),
        "training config": Reader(
            "`train --config`",
            [f"{CONFIGS}/train.json"],
            _JSON,
            read_config_of(TrainConfig),
            "another valid config, the same when written and read again",
            check_written_again,
        ),
        "window config": Reader(
            "`birth-windows --config`",
            [f"{CONFIGS}/windows.json"],
            _JSON,
            read_config_of(WindowConfig),
            "another valid config, the same when written and read again",
            check_written_again,
        ),
        "run_config.json": Reader(
            "opening a run, `status`",
            [f"{RUN}/run_config.json"],
            _JSON,
            read_run_config,
            "another valid config",
            lambda value, sound, file: check_written_again(value[0], sound, file),
            names=("run",),
        ),
        "benchmark metadata": Reader(
            "opening a benchmark",
            [f"{BENCHMARK}/metadata.json"],
            _JSON,
            read_metadata,
            "another benchmark, by another hash",
            check_identity,
            names=(BENCHMARK,),
        ),
        "benchmark records": Reader(
            "reading and encoding a split",
            [f"{BENCHMARK}/{split}.jsonl" for split in ("train", "validation_iid", "counterfactual", "structural_ood")],
            _LINES,
            read_records,
            "another benchmark, by another hash",
            check_identity,
            names=("metadata.json",),
        ),
        "probe set": Reader(
            "opening and encoding a probe set",
            [f"{_PROBE}.jsonl", f"{_PROBE}.fit.jsonl", f"{_PROBE}.sources.jsonl"],
            _LINES,
            read_probe_set,
            _DETECTED,
        ),
        "probe set's manifest": Reader(
            "opening a probe set",
            [f"{_PROBE}.metadata.json"],
            _JSON,
            read_probe_set,
            _DETECTED,
            names=("probe_set.",),
        ),
        "pairs": Reader("opening pairs of streams", [f"{_PROBE}.pairs.jsonl"], _LINES, read_pairs, _DETECTED),
        "pairs' manifest": Reader(
            "opening pairs of streams",
            [f"{_PROBE}.pairs.metadata.json"],
            _JSON,
            read_pairs,
            _DETECTED,
            names=("probe_set.",),
        ),
        "checkpoint (bytes)": Reader(
            "converting a `.pt` file",
            [f"{RUN}/checkpoints/{step_name(step)}.pt"],
            _BYTES,
            read_converted,
            "a defect: every member has a CRC-32",
        ),
        "checkpoint (document)": Reader(
            "converting a `.pt` file that was edited and saved again",
            [f"{RUN}/checkpoints/{step_name(step)}.pt"],
            (damage_checkpoint,),
            read_converted,
            "the very tensors of the edited file",
            check_tensors,
            share=0.5,  # PyTorch takes 20 ms to write such a file
        ),
        "optimizer state (bytes)": Reader(
            "`train --resume`",
            [f"{RUN}/checkpoints/{step_name(step)}.pt"],
            _BYTES,
            read_resumed_state,
            "a defect: every member has a CRC-32",
        ),
        "optimizer state (document)": Reader(
            "`train --resume` from an edited file",
            [f"{RUN}/checkpoints/{step_name(step)}.pt"],
            (damage_checkpoint,),
            read_resumed_state,
            "finite moments, the second not negative",
            check_moments,
            share=0.5,
        ),
        "tables": Reader(
            "`kvjax.open_results`: rows and components",
            [
                f"{_ANALYSIS}/checkpoint_metrics.jsonl",
                f"{_ANALYSIS}/component_candidates/heads.jsonl",
                f"{_ANALYSIS}/component_candidates/mlps.jsonl",
            ],
            _LINES,
            read_tables,
            _DETECTED,
        ),
        "netCDF of a sweep": Reader(
            "`kvjax.open_results`: arrays",
            [f"{_ANALYSIS}/checkpoint_metrics.nc"],
            _BYTES,
            read_tables,
            _DETECTED,
        ),
        "sweep.json": Reader(
            "`kvjax.open_results`, `status`",
            [f"{_ANALYSIS}/sweep.json"],
            _JSON,
            read_sweep_and_status,
            _SEALED,
            check_unsealed,
            names=("checkpoint_metrics", "heads.jsonl", "mlps.jsonl"),
        ),
        "birth_windows.json": Reader(
            "`kvjax.open_results`, `status`, windows to intervene in",
            [f"{_ANALYSIS}/birth_windows.json"],
            _JSON,
            read_windows_and_status,
            _SEALED,
            check_unsealed,
            names=("checkpoints: expected the window's checkpoint",),
        ),
        "story.json": Reader(
            "`kvjax.open_results`, `status`",
            [f"{_ANALYSIS}/story.json"],
            _JSON,
            read_story_and_status,
            _DETECTED,
        ),
        "intervention's summary": Reader(
            "`kvjax.open_results`, reuse by `intervene`",
            [f"{_ANALYSIS}/interventions/neurons/steps_{step}.json"],
            _JSON,
            read_summary,
            _DETECTED,
            names=(f"steps_{step}.nc",),
        ),
        "netCDF of an intervention": Reader(
            "`kvjax.open_results`: arrays of an intervention",
            [f"{_ANALYSIS}/interventions/neurons/steps_{step}.nc"],
            _BYTES,
            read_summary,
            _DETECTED,
        ),
        "comparison.json": Reader(
            "`report --comparison_dir`, `verify`",
            [f"{COMPARISON}/comparison.json"],
            _JSON,
            read_compared,
            _DETECTED,
            names=("comparison.nc",),
        ),
        "netCDF of a comparison": Reader(
            "`report --comparison_dir`, `verify`",
            [f"{COMPARISON}/comparison.nc"],
            _BYTES,
            read_compared,
            _DETECTED,
        ),
        "factor.json": Reader(
            "`report --factor_dirs`, `verify`",
            [f"{FACTOR}/factor.json"],
            _JSON,
            read_compared_factor,
            _DETECTED,
            names=("factor.nc",),
        ),
        "netCDF of a factor": Reader(
            "`report --factor_dirs`, `verify`",
            [f"{FACTOR}/factor.nc"],
            _BYTES,
            read_compared_factor,
            _DETECTED,
        ),
        "store's manifest": Reader(
            "converted parameters",
            [f"{_ANALYSIS}/converted/manifest.json"],
            _JSON,
            read_store,
            "a cache miss: the checkpoint is converted again",
            check_cache_miss,
        ),
        "measured sums": Reader(
            "reuse of a measured checkpoint",
            [f"{_ANALYSIS}/measured/{step_name(step)}.npz"],
            _BYTES,
            read_sums,
            "a cache miss: the checkpoint is measured again",
            check_missing,
        ),
        "metrics.jsonl": Reader(
            "a run's own evaluations",
            [f"{RUN}/metrics.jsonl"],
            _LINES,
            read_metrics,
            "other rows, each a JSON object",
            check_nothing,
        ),
        "metrics.jsonl (resumed)": Reader(
            "`train --resume`: rows up to its step, and the best checkpoint of them",
            [f"{RUN}/metrics.jsonl"],
            _LINES,
            read_resumed_metrics,
            "other rows, each with what a resume needs",
            check_nothing,
        ),
        "best_checkpoint.json": Reader(
            "finding the best checkpoint",
            [f"{RUN}/best_checkpoint.json"],
            _JSON,
            read_best,
            "another step, which is compared with the file's",
            check_nothing,
        ),
        "evaluation": Reader(
            "whether an evaluation is current",
            [f"{_ANALYSIS}/evaluation/best.json"],
            _JSON,
            read_evaluation,
            "not current: measured again",
            check_nothing,
        ),
        "ranking": Reader(
            "whether a ranking is current",
            [RANKING],
            _JSON,
            read_ranking,
            "not current: ranked again",
            check_nothing,
        ),
    }


READERS = readers_of(STEPS)
