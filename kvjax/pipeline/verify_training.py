"""Whether a run's config, its log and its evaluations are what its checkpoints give.

Config and log carry no hash. Checkpoint files record the config that they were trained with, and a sweep records the
hashes of the files. What the log says of accuracy is counted again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvjax.artifacts.differences import Difference, between_documents
from kvjax.artifacts.files import file_sha256, read_json
from kvjax.artifacts.identity import check_seal
from kvjax.artifacts.run_dir import RunDir
from kvjax.converters.convert import convert_checkpoint
from kvjax.converters.convert_run import MetricVerifier
from kvjax.converters.plain_values import section
from kvjax.converters.torch_checkpoint import read_checkpoint
from kvjax.errors import InputError, command, unusable
from kvjax.pipeline.checks import MEASURED, SEALED, UNSEALED, Check, made_again
from kvjax.pipeline.evaluate import CheckpointEvaluator
from kvjax.task.benchmark import Benchmark

_PLACES = {"output_dir", "benchmark_dir", "device", "num_workers"}  # a run that was moved is the same
_SMALL = 1e-3  # of accuracies and losses, which are of the order of 1


def check_config(run: RunDir, steps: Sequence[int]) -> Check:
    """Compares `run_config.json` with the config that the last of some checkpoint files records.

    Args:
      run: the run.
      steps: those whose files have the hashes that they were measured by.
    """
    path = run.layout.config
    if not steps:
        return Check(path.name, "open", "no checkpoint is the file that was measured")
    file = run.checkpoints[max(steps)]
    recorded = section(read_checkpoint(file).config, "train_spec")
    if not recorded:
        return Check(path.name, "open", f"{file.name} does not record the config that it was trained with")
    given = read_json(path)
    shared = sorted(given.keys() & recorded.keys() - _PLACES)
    if "num_steps" in shared and run.log.planned_steps == given["num_steps"]:
        shared.remove("num_steps")  # a resume prolonged the run, maybe after its last checkpoint
    for name in shared:
        if between_documents(given[name], recorded[name], where=name).size:
            field = _differing(given[name], recorded[name], name)
            return Check(path.name, "differs", f"{field}, and {file.name} was trained with another")
    return Check(path.name, "holds", f"{len(shared)} fields as {file.name} records them; paths are not compared")


def _differing(given: Any, recorded: Any, name: str) -> str:
    """Names the first field within a value that differs, with what is given."""
    if isinstance(given, Mapping) and isinstance(recorded, Mapping):
        for key in given.keys() | recorded.keys():
            if given.get(key) != recorded.get(key):
                return _differing(given.get(key), recorded.get(key), f"{name}.{key}")
    return f"{name} is {given}"


def check_log(run: RunDir, benchmark: Benchmark, steps: Sequence[int]) -> Iterator[Check]:
    """Counts the accuracies again that the log records of some checkpoints."""
    verifier, name = MetricVerifier(run, benchmark), run.layout.metrics.name
    for step in steps:
        subject = f"{name}, step {step}"
        try:
            checkpoint = convert_checkpoint(run.checkpoints[step], run.config, benchmark, expected_step=step)
            found = list(verifier.check(checkpoint))
        except InputError as error:
            yield Check(subject, "differs", str(error))
            continue
        splits = ", ".join(check.split for check in found)
        reason = f"its accuracies on {splits} counted again" if found else "it records no evaluation of this checkpoint"
        yield Check(subject, "holds" if found else "open", reason)


def evaluation_files(run: RunDir) -> list[Path]:
    """Lists the evaluations of a run's checkpoints on full splits."""
    return sorted(run.layout.evaluation("best").parent.glob("*.json"))


def check_evaluation(run: RunDir, path: Path) -> Check:
    """Compares an evaluation with the hash of its content, and of the checkpoint it names."""
    remedy = command("evaluate", run_dirs=[run.path], checkpoint=path.stem)
    try:
        document = read_json(path)
        if not isinstance(document, Mapping) or "splits" not in document:
            raise unusable(path, f"an evaluation ({remedy})", "another document")
        sealed = "content_sha256" in document
        if sealed:
            check_seal(document, path, remedy)
    except InputError as error:
        return Check(_name(path), "differs", str(error))
    try:
        sha256 = file_sha256(run.checkpoint_named(path.stem)[1])
    except InputError as error:
        return Check(_name(path), "open", str(error))
    if document.get("checkpoint_sha256") != sha256:
        return Check(_name(path), "open", f"the checkpoint {path.stem} is another file by now ({remedy})")
    return Check(_name(path), "holds" if sealed else "open", SEALED if sealed else UNSEALED)


def evaluate_again(run: RunDir, benchmark: Benchmark, path: Path) -> Check:
    """Evaluates a checkpoint again on the splits of an evaluation."""
    document = read_json(path)

    def again() -> Difference:
        evaluated = CheckpointEvaluator().evaluate(run, benchmark, path.stem, list(document["splits"]))
        splits = {split: evaluation.to_row() for split, evaluation in evaluated.splits.items()}
        return between_documents(document["splits"], splits, where=path.name, floor=_SMALL)

    return made_again(f"{_name(path)}, evaluated again", again, MEASURED, device=document.get("device"))


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
