"""Reads and writes `.pt` checkpoints, without ever executing their content (docs/formats.md, "Checkpoint files")."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvjax.converters.envelope import find_optimizer_state, find_step, open_envelope, usable_weights
from kvjax.converters.plain_values import PlainValues, section
from kvjax.converters.saved_tensors import with_arrays
from kvjax.converters.torch_archive import damaged, open_archive
from kvjax.converters.weights import Saved

from kvjax.artifacts.files import HashedFile, replace_file
from kvjax.errors import unusable

if TYPE_CHECKING:
    import torch  # takes 1.5 s to import, and reading a file needs none of it

_SHOWN_PLACES = 3


@dataclasses.dataclass(frozen=True)
class TorchCheckpoint:
    """The content of a `.pt` file.

    Attributes:
      path: the file.
      step: the training step it was saved at.
      state: tensor name -> weights in the file's own precision, without the names that wrappers add. They are views of
        the file's bytes: `np.asarray(tensor, np.float32)` reads one, once its `shape` is known to be right.
      config: `train_spec`, `benchmark_metadata`, … as the trainer recorded them, in JSON values; empty if it did not.
      metrics: the evaluation results stored with it, by split, in JSON values; often empty.
      notes: what a reader should know about the file.
      saved_optimizer: the optimiser's state as it was saved.
    """

    path: Path
    step: int
    state: Mapping[str, Saved]
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    notes: tuple[str, ...]
    saved_optimizer: Mapping[Any, Any] = dataclasses.field(repr=False)

    @functools.cached_property
    def optimizer_state(self) -> Mapping[Any, Any]:
        """What `optimizer.state_dict()` gave, every tensor as a NumPy array; empty if the trainer saved none.

        `state` and `param_groups` are as they were saved. Arrays have the file's precision, bfloat16 that of float32.

        Raises:
          InputError: a tensor's values are not in the file.
        """
        try:
            return with_arrays(self.saved_optimizer)
        except (ValueError, RecursionError) as error:
            raise unusable(self.path, "optimizer state of plain tensors", error) from None


def read_checkpoint(path: Path, expected_step: int | None = None) -> TorchCheckpoint:
    """Reads a checkpoint file.

    Raises:
      InputError: there is no such file, or it cannot be used (see `parse_checkpoint`).
    """
    return parse_checkpoint(HashedFile.read(path, "a PyTorch checkpoint"), expected_step)


def parse_checkpoint(file: HashedFile, expected_step: int | None = None) -> TorchCheckpoint:
    """Parses the bytes of a checkpoint file; nothing in it is executed.

    Args:
      file: the file's bytes.
      expected_step: the step that its name states; None if there is none.

    Raises:
      InputError: the file is damaged, is no checkpoint, is one of another step, or holds weights that cannot be used.
    """
    archive = open_archive(file)
    try:
        envelope = open_envelope(archive.document, file.path)
        plain = PlainValues()
        recorded = {name: plain.convert(envelope.beside.get(name), name) for name in ("config", "metrics")}
    except RecursionError:
        raise damaged(file, "values inside values without end") from None
    weights = usable_weights(envelope, section(recorded, "config"), file.path)
    step, notes = find_step(envelope.beside, expected_step, file.path)
    return TorchCheckpoint(
        path=file.path,
        step=step,
        state=weights.state,
        config=_mapping(recorded, "config"),
        metrics=_mapping(recorded, "metrics"),
        notes=(*archive.notes, *envelope.notes, *weights.notes, *notes, *_note(plain.changed)),
        saved_optimizer=find_optimizer_state(envelope.beside),
    )


def _mapping(recorded: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Reads the mapping under a name; any other value is kept under its name."""
    part = recorded[name]
    return part if isinstance(part, dict) else {} if part is None else {name: part}


def _note(changed: list[str]) -> tuple[str, ...]:
    """Names values beside the weights of which JSON holds less than the file."""
    if not changed:
        return ()
    more = f" and {len(changed) - _SHOWN_PLACES} more" if len(changed) > _SHOWN_PLACES else ""
    listed = ", ".join(changed[:_SHOWN_PLACES])
    return (f"its file records values that are kept as text, mapping, list or null: {listed}{more}",)


def use_one_torch_thread() -> None:
    """Gives PyTorch one thread in the calling thread: its threads wait by spinning, beside busy devices for long."""
    import torch

    torch.set_num_threads(1)


def write_checkpoint(
    path: Path,
    *,
    step: int,
    state: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    optimizer_state: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint file in the reference trainer's layout, atomically.

    Raises:
      InputError: the file cannot be written, as on a full disk.
    """
    import torch

    document = {
        "step": step,
        "model_state": dict(state),
        "optimizer_state": dict(optimizer_state or {}),
        "metrics": dict(metrics),
        "config": dict(config),
    }
    content = io.BytesIO()  # PyTorch's own writer turns a full disk into a RuntimeError without the file's name
    torch.save(document, content)
    with replace_file(path) as partial:
        partial.write_bytes(content.getbuffer())
