"""A run opened for measures and interventions of one's own: its checkpoints, vocabulary and probe set, from Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from kvjax.artifacts.run_dir import RunDir
from kvjax.converters.cached_loader import CachedLoader
from kvjax.devices import Placement, device_count, start_jax
from kvjax.errors import unusable
from kvjax.execution.over_checkpoints import over_chunks
from kvjax.model.checkpoint import Checkpoint
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params, stack_params
from kvjax.model.transforms import over_checkpoints
from kvjax.task.benchmark import Benchmark
from kvjax.task.encoding import EncodedRecords, encode_records
from kvjax.task.probe_set import open_probe_set, own_probe_set
from kvjax.task.vocabulary import PAD_ID, Vocabulary

if TYPE_CHECKING:
    import xarray as xr


def open_run(run_dir: str | Path, *, benchmark_dir: str | Path | None = None) -> OpenedRun:
    """Opens a run directory, of PyTorch's trainer or of `kvjax train`.

    Args:
      run_dir: the run.
      benchmark_dir: its benchmark; the one its config records, or that it was swept on, where None.

    Raises:
      InputError: the run or its benchmark cannot be used.
    """
    start_jax()
    run = RunDir.open(Path(run_dir))
    return OpenedRun(run, Benchmark.open(run.benchmark_dir(benchmark_dir and str(benchmark_dir))))


class OpenedRun:
    """A run and its benchmark; checkpoints are converted when they are asked for, or read where a sweep kept them.

    Attributes:
      run: the directory.
      benchmark: what it was trained on.
    """

    def __init__(self, run: RunDir, benchmark: Benchmark):
        self.run, self.benchmark = run, benchmark
        self._loader = CachedLoader(run, benchmark, certify_on=None, keep="nothing")

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that there are checkpoints of, ascending."""
        return tuple(self.run.checkpoints)

    @property
    def vocabulary(self) -> Vocabulary:
        """The benchmark's tokens, keys and values."""
        return self.benchmark.vocabulary

    def checkpoint(self, which: int | str) -> Checkpoint:
        """Loads the checkpoint of a step, `best` or `final`.

        Raises:
          InputError: there is none, or it cannot be used.
        """
        step, path = self.run.checkpoint_named(str(which))
        return self._loader.load(path, None if which == "best" else step)

    def encode(self, streams: Sequence[Sequence[str]]) -> np.ndarray:
        """Encodes streams of tokens such as `["<bos>", "W", "K01", "V083", …]` as ids [B, T], padded at their ends.

        Raises:
          InputError: a token is not in the vocabulary, or a stream is longer than the model's positions.
        """
        limit, id_of = self.run.config.model.max_seq_len, self.vocabulary.id_of
        ids = np.full((len(streams), max(map(len, streams), default=0)), PAD_ID, np.int32)
        for row, stream in zip(ids, streams, strict=True):
            unknown = [token for token in stream if token not in id_of]
            if unknown:
                raise unusable("streams", f"tokens of {self.benchmark.path}", repr(unknown[0]))
            if len(stream) > limit:
                raise unusable("streams", f"at most max_seq_len {limit} tokens", len(stream))
            row[: len(stream)] = [id_of[token] for token in stream]
        return ids

    def probe_set(self, path: str | Path | None = None) -> EncodedRecords:
        """Opens a probe set as arrays: the one in a file, or the run's own, which is made if there is none."""
        probe = (
            open_probe_set(Path(path), self.benchmark)
            if path
            else own_probe_set(self.run.layout.probe_set, self.benchmark)
        )
        limits = {"max_seq_len": self.run.config.model.max_seq_len, "source": probe.path}
        return encode_records(probe.records, self.vocabulary, probe.manifest.splits, **limits)

    def measure(
        self,
        function: Callable[..., Any],
        *shared: Any,
        dims: Sequence[str] = (),
        steps: str | int | Sequence[int] = "all",
    ) -> xr.DataArray:
        """Evaluates a custom measure at every checkpoint: compiled once, and shared by all devices.

        Args:
          function: from the parameters and config of one checkpoint and `shared` to an array; traced by JAX.
          *shared: arrays, or trees of them such as `probe_set()`.
          dims: names of the array's axes.
          steps: `all`, a step, several, or ranges such as `250,1000-4000`.

        Returns:
          The arrays with the first dimension `step`.

        Raises:
          InputError: a checkpoint cannot be used, the function returns anything but an array, or `dims` names another
            number of axes.
        """
        import xarray as xr  # whoever only loads checkpoints need not wait for it

        wanted = self.run.select_steps(steps)
        devices = min(device_count(), len(wanted))
        measured = np.concatenate(list(self._measured(function, shared, wanted, devices, tuple(dims))))
        dims = tuple(dims) or tuple(f"axis_{axis}" for axis in range(measured.ndim - 1))
        name = getattr(function, "__name__", None)
        return xr.DataArray(measured, dims=("step", *dims), coords={"step": wanted}, name=name)

    def _measured(
        self,
        function: Callable[..., Any],
        shared: tuple[Any, ...],
        steps: Sequence[int],
        devices: int,
        dims: tuple[str, ...],
    ) -> Iterator[np.ndarray]:
        compiled: dict[bool, Callable[..., jax.Array]] = {}  # by whether unembeddings are tied

        def dispatch(params: list[Params]) -> jax.Array:
            stacked = stack_params(params)
            tied = "unembedding" not in stacked
            if tied not in compiled:
                config = self._config(tied=tied)

                def one(params: Params, *shared: Any) -> jax.Array:
                    return function(params, config, *shared)

                compiled[tied] = jax.jit(over_checkpoints(one, Placement(devices)))
                _check_measure(compiled[tied].trace(stacked, *shared).out_info, dims)
            return compiled[tied](stacked, *shared)

        params_of_steps = (self.checkpoint(step).params for step in steps)
        for chunk in over_chunks(dispatch, params_of_steps, size=devices):
            yield chunk.outputs

    def _config(self, *, tied: bool) -> DecoderConfig:
        return DecoderConfig.from_model_config(self.run.config.model, len(self.vocabulary.tokens), tied=tied)


def _check_measure(found: Any, dims: tuple[str, ...]) -> None:
    """Checks the shape of what a function returns for stacked checkpoints, before anything is computed."""
    if not isinstance(found, jax.ShapeDtypeStruct):
        raise unusable("function", "one array as its result", type(found).__name__)
    axes = found.shape[1:]
    if "step" in dims or len(set(dims)) < len(dims):
        raise unusable("dims", "different names, none of them step", dims)
    if dims and len(dims) != len(axes):
        raise unusable("dims", f"{len(axes)} names, one for each axis of {list(axes)}", dims)
