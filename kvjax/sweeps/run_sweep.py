"""Measures one run: loads its checkpoints, measures each, stores its sums, and compares it with others."""

from __future__ import annotations

import bisect
import collections
import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kvjax.artifacts.checkpoint_sums import CheckpointResult, ResultStore
from kvjax.artifacts.provenance import software_versions
from kvjax.devices import device_description
from kvjax.errors import InputError
from kvjax.execution.inputs import BEST, RunInputs, step_files
from kvjax.execution.load_ahead import load_ahead
from kvjax.execution.over_checkpoints import Chunk, over_chunks
from kvjax.measure import registry
from kvjax.measure.weight_spectra import HeadSpectra, head_spectra
from kvjax.model.checkpoint import Checkpoint, CheckpointSource
from kvjax.model.decoder_config import DecoderConfig
from kvjax.sweeps.clean import VALUE_LOGITS
from kvjax.sweeps.compiled_sweep import CompiledSweep
from kvjax.sweeps.fixed_margin import ValueLogits
from kvjax.sweeps.logistic_probes import measure_logistic
from kvjax.sweeps.results import MeasuredRun, SweepLog
from kvjax.sweeps.settings import SweepSettings
from kvjax.sweeps.shares import ShareReport, joined_log
from kvjax.sweeps.state_similarity import ArrivingStates, Similarities, compare_consecutive, form_and_compare
from kvjax.sweeps.vouching import Voucher
from kvjax.sweeps.weight_comparisons import WeightComparisons, compared_with
from kvjax.sweeps.weights import WEIGHT_ARRAYS, measure_weights

NamedCheckpoint = tuple[str, Checkpoint]
Compiled = dict[Any, CompiledSweep]  # by shape and probe set


class RunSweep:
    """The sweep of one run: loads its checkpoints, measures them, stores their sums and compares them.

    Args:
      inputs: the run, and what it is measured on.
      sweep: the compiled program for its shape and probe set.
      store: where results are kept.
      source: where checkpoints come from.
      settings: the sweep's settings.

    Attributes:
      log: what happened.
    """

    def __init__(
        self,
        inputs: RunInputs,
        sweep: CompiledSweep,
        store: ResultStore,
        source: CheckpointSource,
        settings: SweepSettings,
    ):
        self._inputs, self._sweep, self._store, self._source, self._settings = inputs, sweep, store, source, settings
        self.log = SweepLog()
        # Steps measured earlier stay in the tables whatever steps this sweep was given.
        self._files = step_files(inputs.run) | dict(inputs.wanted)
        self._anew = frozenset(inputs.wanted) if settings.overwrite else frozenset()
        self._similarities = Similarities(store, anew=self._anew)
        self._value_logits = ValueLogits(store, inputs.encoded, inputs.benchmark.vocabulary.value_ids)
        self._weights = WeightComparisons(store, anew=self._anew)
        self._measured_weights: dict[str, tuple[dict[str, np.ndarray], HeadSpectra]] = {}  # until results are stored
        self._results: dict[str, CheckpointResult] = {}  # without arrays
        self._neighbours: dict[str, CheckpointResult] = {}  # of other shares: step and hash of the file
        self._steps: list[tuple[int, str]] = []  # step and name of both but for the best, in step order
        refuse = settings.contradiction == "refuse"
        self._voucher = Voucher(inputs.run, inputs.benchmark, refuse=refuse, way_on="contradiction=note")
        self._provenance = {
            "device": device_description(),
            "precision": settings.precision,
            "versions": software_versions(),
        }

    def measure(self, advance: Callable[[int], None], *, meanwhile: Callable[[], Any] = lambda: None) -> MeasuredRun:
        """Measures the checkpoints that are not measured yet, and returns everything measured on the run so far.

        Args:
          advance: called with the number of checkpoints done, for a progress bar.
          meanwhile: called whenever the devices have been given work.

        Raises:
          InputError: a checkpoint cannot be used, unless `settings.skip_bad`. Results stored before stay.
        """
        with self._keeping_conversions():
            wanted = self._pending(list(self._inputs.reference_first()), self._files, advance)
            self._complete_store()
            of_steps = sorted({*self._results, *wanted} - {BEST}, key=lambda name: self._files[name][0])
            self._weights.plan(compared_with(of_steps, self._inputs.reference), wanted)
            arriving = ArrivingStates(self._sweep, self._inputs.reference)
            self._compile_ahead(wanted, arriving)
            self._measure(wanted, arriving, advance, meanwhile)
            return self._compared()

    def measure_share(self, names: Sequence[str], advance: Callable[[int], None]) -> ShareReport:
        """Measures those checkpoints of a share that are not measured yet, and compares them with their neighbours.

        What cannot be compared, because a neighbour cannot be read, is left to `collect`.

        Args:
          names: of the share's, in the order of steps.
          advance: called with the number of checkpoints done.

        Raises:
          InputError: a checkpoint cannot be used, unless `settings.skip_bad`. Results stored before stay.
        """
        with self._keeping_conversions():
            pending = self._pending(names, names, advance)
            self._complete_store()
            arriving = ArrivingStates(self._sweep, self._inputs.reference)
            self._compile_ahead(pending, arriving)
            introduced = self._introduce(pending)
            first = [name for name in pending if name == self._inputs.reference]  # all others are compared with it
            self._measure(first, arriving, advance)
            if self._settings.event_drift:
                for pairs in form_and_compare(introduced, arriving, self._sweep):
                    self._similarities.add(pairs)
            self._measure([name for name in pending if name not in first], arriving, advance)
            self._similarities.store_all([(named, self._before(named)) for named in self._tabled()], self._reference())
            self._logistic(self._tabled())
        return ShareReport(self.log, {name: result.info["sha256"] for name, result in self._results.items()})

    def collect(self, shares: Sequence[ShareReport]) -> MeasuredRun:
        """Collects what processes have measured into the run's measured sums, and compares what they left.

        Their checkpoints are not read again; those of earlier sweeps are hashed.

        Raises:
          InputError: sums were lost since they were measured.
        """
        self.log = joined_log(shares)
        self._store.look_again()
        for name, sha256 in ((name, sha256) for share in shares for name, sha256 in share.sha256.items()):
            self._add(name, self._store.read_again(name, sha256, self._files[name][1]).without_arrays())
        for name, result in self._stored_results(self._files.keys() - self._inputs.wanted.keys()).items():
            self._add(name, result)
        with self._keeping_conversions():
            return self._compared()

    @contextlib.contextmanager
    def _keeping_conversions(self) -> Iterator[None]:
        """Writes new conversions to the store at the end, however it ends."""
        try:
            yield
        finally:
            try:
                self._source.save()
            except InputError as error:  # results are stored, and conversions are made again another time
                self.log.not_kept = str(error)

    def _complete_store(self) -> None:
        """Converts measured checkpoints that the store lacks, for a killed sweep measures some that it never stores."""
        lacking = [name for name, result in self._results.items() if not self._source.is_stored(result.info["sha256"])]
        loaded = load_ahead(
            lacking, self._files, self._source.load, ahead=self._sweep.chunk + 1, on_refused=lambda name, error: None
        )
        collections.deque(loaded, maxlen=0)  # loading is what holds them for the store
        with contextlib.suppress(InputError):  # the last `save` says so
            self._source.save()

    def _compared(self) -> MeasuredRun:
        """Compares the checkpoints with each other and fits logistic probes, where asked for."""
        tabled, reference = self._tabled(), self._reference()
        shared = {"files": self._files, "sweep": self._sweep, "source": self._source}
        moved = None
        weights = self._weights.compare(tabled, reference, files=self._files, source=self._source)
        if self._settings.event_drift and tabled:
            moved = compare_consecutive(tabled, reference, self._similarities, **shared)
        logistic = self._logistic(tabled)
        margins = self._value_logits.fixed_margins(reference, files=self._files)
        return MeasuredRun(tabled, reference, weights, moved, logistic, margins, self._sums)

    def _logistic(self, tabled: list[tuple[str, CheckpointResult]]) -> list[Mapping[str, np.ndarray] | None]:
        """Fits logistic probes where asked for; returns those of each checkpoint, nothing if there are no probes."""
        if self._settings.probe == "none":
            return []
        asked = self._inputs.named if self._settings.probe == "logistic" else self._measured_before(tabled)
        return measure_logistic(
            tabled,
            asked,
            store=self._store,
            anew=bool(self._anew),
            files=self._files,
            sweep=self._sweep,
            source=self._source,
        )

    def _sums(self, named: tuple[str, CheckpointResult]) -> Mapping[str, np.ndarray]:
        """Reads the sums of a checkpoint again; raises `InputError` if they were lost since the sweep began."""
        name, result = named
        return self._store.read_again(name, result.info["sha256"], self._files[name][1]).arrays

    def _measured_before(self, tabled: list[tuple[str, CheckpointResult]]) -> set[str]:
        """Names the checkpoints measured anew that had logistic probes, so that all of it is measured again."""
        anew = [(name, result.info["sha256"]) for name, result in tabled if name in self._anew]
        return {name for name, sha256 in anew if self._store.holds(f"logistic_{name}", sha256)}

    def _stored_results(self, names: Iterable[str]) -> dict[str, CheckpointResult]:
        """Loads the stored results of those checkpoint files that have not changed since, by name.

        A result that lacks its logits, or an array of a measure because it was declared later, is none.
        """
        complete = registry.computed_sources() | WEIGHT_ARRAYS

        def stored(name: str) -> CheckpointResult | None:
            found = self._store.load(name, self._files[name][1])
            if found is None or not complete <= found.arrays.keys():
                return None
            return found.without_arrays() if self._value_logits.holds(name, found.info["sha256"]) else None

        names = [name for name in names if name not in self._anew]
        with concurrent.futures.ThreadPoolExecutor() as readers:  # hashing releases the interpreter lock
            found = zip(names, readers.map(stored, names), strict=True)
            return {name: result for name, result in found if result is not None}

    def _pending(self, wanted: Sequence[str], known: Iterable[str], advance: Callable[[int], None]) -> list[str]:
        """Lists which wanted checkpoints are not measured yet, after the stored results of `known` ones are loaded."""
        for name, result in self._stored_results(known).items():
            self._add(name, result)
        for name in wanted:
            if name in self._results:
                self.log.reused.append(self._results[name].step)
                advance(1)
        return [name for name in wanted if name not in self._results]

    def _introduce(self, pending: Sequence[str]) -> list[NamedCheckpoint]:
        """Loads the checkpoints that pending ones are compared with and that are not pending themselves.

        Returns:
          Those whose states the pending ones' are compared with: the reference, unless it is pending; the checkpoint
          before a pending reference; and, last, that before the first of the others.
        """
        reference = self._inputs.reference
        in_tables = [n for n in step_files(self._inputs.run) if n in self._inputs.wanted or self._store.has_file(n)]
        others = compared_with(in_tables, reference)
        planned = {name: others[name] for name in pending if name in others}
        needed = {other for of in planned.values() for other in of.values()} - set(pending)
        in_order = sorted(needed, key=lambda name: (name != reference, self._files[name][0]))
        self._weights.plan(planned, [*needed, *pending])
        firsts = sorted(pending, key=lambda name: name != reference)[: 1 + (reference in pending)]
        before = (others[name].get("previous") for name in firsts if name in others)
        introduced = dict.fromkeys([reference, *before])
        for name, checkpoint in load_ahead(
            in_order,
            self._files,
            self._source.load,
            ahead=2,
            on_refused=lambda name, error: self._weights.give_up(name),  # who measures it says so
        ):
            if name not in self._results:
                self._neighbours[name] = CheckpointResult(checkpoint.step, {}, {"sha256": checkpoint.sha256})
                if name != BEST:
                    bisect.insort(self._steps, (checkpoint.step, name))
            self._weights.arrive(name, checkpoint, head_spectra(checkpoint.params, checkpoint.config.n_heads))
            if name in introduced:
                introduced[name] = checkpoint
        return [(name, checkpoint) for name, checkpoint in introduced.items() if checkpoint is not None]

    def _measure(
        self,
        pending: Sequence[str],
        arriving: ArrivingStates,
        advance: Callable[[int], None],
        meanwhile: Callable[[], Any] = lambda: None,
    ) -> None:
        """Measures checkpoints in the given order.

        Files are read ahead while the devices compute, and each result is stored as soon as it is there.
        """

        def refuse(name: str, error: InputError) -> None:
            self.log.refused[self._files[name][1].name] = str(error)
            self._weights.give_up(name)
            advance(1)

        def dispatch(chunk: list[NamedCheckpoint]) -> tuple[Any, Any]:
            weights = {
                name: measure_weights(checkpoint.params, checkpoint.config) for name, checkpoint in dict(chunk).items()
            }
            self._measured_weights |= weights
            for _, checkpoint in chunk:  # first, for it compiles a program beside the sweep's
                self._voucher.start(checkpoint)
            spectra = [weights[name][1] for name, _ in chunk]
            sums, states = self._sweep.dispatch([checkpoint.params for _, checkpoint in chunk], spectra)
            compared = states and arriving.dispatch(chunk[0][0], states)
            meanwhile()
            return sums, compared

        checkpoints = load_ahead(
            pending,
            self._files,
            self._source.load,
            ahead=self._sweep.chunk + 1,
            on_refused=refuse if self._settings.skip_bad else None,
        )
        chunks = over_chunks(dispatch, checkpoints, size=self._sweep.chunk)
        try:
            for chunk in chunks:
                self._keep(chunk, arriving, advance)
        finally:
            # If a result cannot be stored, nothing more is read, but what the devices have begun is kept.
            checkpoints.close()
            for chunk in chunks:
                self._keep(chunk, arriving, advance)
        self.log.unvouched = self._voucher.reason if self.log.measured else None

    def _compile_ahead(self, pending: Sequence[str], arriving: ArrivingStates) -> None:
        """Compiles the programs in threads, so that the first checkpoints are converted and certified beside it."""
        for name in pending[:1]:
            with contextlib.suppress(InputError):  # loading the file says so
                states = self._sweep.compile_ahead(self._source.shapes(self._files[name][1]))
                if states is not None:
                    arriving.compile_ahead(states)

    def _keep(self, chunk: Chunk[NamedCheckpoint], arriving: ArrivingStates, advance: Callable[[int], None]) -> None:
        """Stores the sums of a chunk's checkpoints, and how they differ from the checkpoints before."""
        sums, compared = chunk.outputs
        self.log.add_call(chunk.seconds)
        if self._voucher.refused:
            return
        # Before anything is kept: of a refused run nothing is.
        vouched = {name: self._voucher.finish(checkpoint) for name, checkpoint in chunk.items}
        for (name, checkpoint), arrays in zip(chunk.items, self._sweep.collect(sums), strict=True):
            info = {
                "file": self._files[name][1].name,
                "sha256": checkpoint.sha256,
                "certificate": dataclasses.asdict(checkpoint.certificate),
                "notes": list(checkpoint.notes),
                "seconds": chunk.seconds / len(chunk.items),
                "vouched": vouched[name] and vouched[name].model_dump(),
                **self._provenance,
            }
            self._value_logits.save(name, checkpoint.sha256, checkpoint.step, arrays.pop(VALUE_LOGITS))
            weights, spectra = self._measured_weights.pop(name)
            saved = self._store.save(name, checkpoint.sha256, checkpoint.step, arrays | weights, info)
            self._add(name, saved.without_arrays())
            self._weights.arrive(name, checkpoint, spectra)
            self.log.measured.append(checkpoint.step)
            advance(1)
        if compared is not None:
            # Stored now, so that a sweep that is stopped need not compare again.
            of_steps = [(name, self._results[name]) for name, _ in chunk.items if name != BEST]
            with_before = [(named, self._before(named)) for named in of_steps]
            self._similarities.store_chunk(arriving.pairs(chunk.items, compared), with_before, self._reference())

    def _add(self, name: str, result: CheckpointResult) -> None:
        self._results[name] = result
        if name != BEST:
            bisect.insort(self._steps, (result.step, name))

    def _before(self, named: tuple[str, CheckpointResult]) -> tuple[str, CheckpointResult] | None:
        """Finds the checkpoint before one, of those there are by now; None if there is none."""
        name, result = named
        place = bisect.bisect_left(self._steps, (result.step, name))
        return self._named(self._steps[place - 1][1]) if place else None

    def _tabled(self) -> list[tuple[str, CheckpointResult]]:
        """Lists name and result of the step checkpoints, which rows are made of, in step order."""
        return [(name, self._results[name]) for _, name in self._steps if name in self._results]

    def _reference(self) -> tuple[str, CheckpointResult] | None:
        return self._named(self._inputs.reference)

    def _named(self, name: str | None) -> tuple[str, CheckpointResult] | None:
        result = self._results.get(name, self._neighbours.get(name))
        return None if result is None else (name, result)


def compiled_sweep(inputs: RunInputs, settings: SweepSettings, compiled: Compiled) -> CompiledSweep:
    """Finds the program compiled for a run's shape and probe set, or compiles one."""
    config = DecoderConfig.from_model_config(inputs.run.config.model, len(inputs.benchmark.vocabulary.tokens))
    key = (config, inputs.probe.manifest.content_sha256)
    if key not in compiled:
        num_splits = len(inputs.probe.manifest.splits)
        compiled[key] = CompiledSweep(
            config, inputs.benchmark.vocabulary, inputs.encoded, num_splits, settings, fit=inputs.fit
        )
    return compiled[key]
