"""Compares checkpoints by their states at the reads: drift of single events, and linear CKA.

The sums that a sweep keeps suffice for the drift of the mean state. How single events move, and whether the geometry of
all of them stays, needs the states of two checkpoints at once. Each checkpoint is compared with the previous one of the
run's tables and with the reference. Checkpoints are compared as their states arrive, chunk by chunk, whether the states
come from measuring them or are formed again. What is found of a pair is stored like any other measurement.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.artifacts.checkpoint_sums import CheckpointResult, ResultStore
from kvjax.errors import unusable
from kvjax.execution.export_cache import compile_beside
from kvjax.execution.load_ahead import load_ahead
from kvjax.execution.over_checkpoints import over_chunks
from kvjax.execution.states_at_reads import ReadStates, by_split, form_states
from kvjax.measure.residual import event_drift, linear_cka
from kvjax.model.checkpoint import Checkpoint, CheckpointSource
from kvjax.model.params import Params, stack_params
from kvjax.model.transforms import over_checkpoints, over_interventions
from kvjax.sweeps.compiled_sweep import CompiledSweep
from kvjax.sweeps.measure_checkpoint import SweepSpec
from kvjax.task.encoding import EncodedRecords

OTHERS = ("previous", "reference")
COMPARISONS = ("event_drift", "split_cka")  # the arrays of a comparison, see `similarity`

Named = tuple[str, CheckpointResult]
Arrays = Mapping[str, np.ndarray]
Comparison = tuple[Named, str, Named]  # of a checkpoint with another, and how that relates to it, of `OTHERS`
Pair = tuple[frozenset[str], Arrays]  # hashes of two checkpoints' files, and how their states differ


class ArrivingStates:
    """Compares the states of checkpoints as they arrive in chunks, each with the one before it and with the reference.

    Args:
      sweep: the probe set, on the devices.
      reference: name of the checkpoint that all are compared with if it arrives first; None for none.
    """

    def __init__(self, sweep: CompiledSweep, reference: str | None):
        self._spec, self._rows, self._reference = sweep.spec, sweep.data.rows_of_splits, reference
        self._last: ReadStates | None = None  # of the chunk before, as the devices share it
        self._reference_states: ReadStates | None = None
        self._hashes: list[str] = []  # of all checkpoints that arrived

    def compile_ahead(self, states: ReadStates) -> None:
        """Traces the comparison here and compiles it in a thread, for states of these shapes and shardings."""
        whole = self._spec.placement.whole

        def of_one(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype, sharding=whole)

        reference = self._reference and jax.tree.map(of_one, states)
        compile_beside(compare.lower(self._spec, states, states, reference, self._rows))

    def dispatch(self, first: str, states: ReadStates) -> dict[str, dict[str, jax.Array]]:
        """Starts comparing a chunk, behind the work that forms its states; returns what `compare` does.

        Args:
          first: name of the chunk's first checkpoint.
          states: [C, …], as the devices share them.
        """
        placement, last = self._spec.placement, self._last
        if last is None and first == self._reference:
            of_first_device = jax.tree.map(lambda x: placement.parts(x)[0], states)
            # A slice is a program of its own; the whole of a part is none.
            of_reference = jax.tree.map(lambda x: x if len(x) == 1 else x[:1], of_first_device)
            self._reference_states = jax.device_put(of_reference, placement.whole)

        def one_device_on(own: jax.Array, before: jax.Array) -> jax.Array:
            return placement.joined([placement.parts(before)[-1], *placement.parts(own)[:-1]])

        left = jax.tree.map(one_device_on, states, states if last is None else last)
        self._last = states
        return compare(self._spec, states, left, self._reference_states, self._rows)

    def pairs(self, chunk: Sequence[tuple[str, Checkpoint]], compared: Mapping[str, Arrays]) -> Iterator[Pair]:
        """Yields the hashes of two checkpoints' files and how their states differ, for each pair that a chunk compares.

        Args:
          chunk: names and checkpoints, in the order of the chunks dispatched.
          compared: what `dispatch` started, as NumPy arrays.
        """
        for index, (_, checkpoint) in enumerate(chunk):
            others = {"previous": self._hashes[-1:], "reference": self._hashes[:1] or [checkpoint.sha256]}
            self._hashes.append(checkpoint.sha256)
            for kind, arrays in compared.items():
                for other in others[kind]:
                    yield frozenset({checkpoint.sha256, other}), {name: x[index] for name, x in arrays.items()}


@functools.partial(jax.jit, static_argnums=0)
def compare(
    spec: SweepSpec,
    states: ReadStates,
    left: ReadStates,
    reference: ReadStates | None,
    rows_ZxM: jax.Array,
) -> dict[str, dict[str, jax.Array]]:
    """Compares every checkpoint of a chunk with the one before it and with the reference.

    Args:
      spec: the sweep's settings.
      states: the chunk's, [C, …], shared by the devices.
      left: [C, …], for each device its left neighbour's states, of which the last checkpoint's are used: it comes
        before the device's own first. The first device has those of the last device in the chunk before.
      reference: [1, …], whole on each device; None for no reference.
      rows_ZxM: the rows of each split's reads, see `rows_of_splits`.

    Returns:
      For each of `OTHERS` that there is: `event_drift` [C, Z, G] and `split_cka` [C, 1 + Z, G], see `similarity`.
    """

    def of_device(
        states: ReadStates, left: ReadStates, reference: ReadStates | None, rows_ZxM: jax.Array
    ) -> dict[str, dict[str, jax.Array]]:
        previous = jax.tree.map(lambda own, left: jnp.concatenate([left[-1:], own[:-1]]), states, left)

        def of_checkpoint(pair: tuple[ReadStates, ReadStates]) -> dict[str, dict[str, jax.Array]]:
            own, before = pair
            others = {"previous": before}
            if reference is not None:
                others["reference"] = jax.tree.map(lambda x: x[0], reference)
            return {kind: similarity(spec, own, other, rows_ZxM) for kind, other in others.items()}

        return jax.lax.map(of_checkpoint, (states, previous))

    on_devices = spec.placement.on_each_device(of_device, split=(True, True, False, False))
    return on_devices(states, left, reference, rows_ZxM)


def similarity(spec: SweepSpec, states: ReadStates, others: ReadStates, rows_ZxM: jax.Array) -> dict[str, jax.Array]:
    """Measures how two checkpoints' states of the same reads differ, whichever of the two comes first.

    Returns:
      `event_drift` [Z, G]: 1 - cosine, summed over the reads of a split; `split_cka` [1 + Z, G]: linear CKA over all
      reads, then over those of each split.
    """
    counted_ZxM = rows_ZxM >= 0

    def of_group(pair: tuple[ReadStates, ReadStates]) -> tuple[jax.Array, jax.Array]:
        a, b = (by_split(states.values, rows_ZxM) for states in pair)
        drift_Z = jnp.sum(jnp.where(counted_ZxM, event_drift(a, b), 0.0), axis=1)
        return drift_Z, linear_cka(a, b, counted_ZxM, (pair[0].spread, pair[1].spread))

    # On a CPU one stage after another, which stay in cache.
    drift_GxZ, cka_GxZ = over_interventions(of_group, lift=spec.interventions)((states, others))
    return {"event_drift": drift_GxZ.T, "split_cka": cka_GxZ.T}


@functools.partial(jax.jit, static_argnums=0)
def states_of_checkpoints(
    spec: SweepSpec, stacked: Params, buckets: tuple[EncodedRecords, ...], rows_ZxM: jax.Array
) -> ReadStates:
    """Forms the states of stacked checkpoints, [C, …], shared by the devices; see `compare` for `rows_ZxM`."""

    def of_checkpoint(params: Params, records: tuple[tuple[EncodedRecords, ...], jax.Array]) -> ReadStates:
        buckets, rows_ZxM = records
        return ReadStates.of(form_states(spec.config, params, buckets), rows_ZxM)

    return over_checkpoints(of_checkpoint, spec.placement)(stacked, (buckets, rows_ZxM))


class Similarities:
    """Stores how a run's checkpoints differ, and reads what this sweep or an earlier one stored.

    What was found of two files waits in memory until it is known which comparisons of the run it is.

    Args:
      store: the run's results.
      anew: names of the checkpoints whose stored comparisons do not count.
    """

    def __init__(self, store: ResultStore, *, anew: Collection[str] = ()):
        self._store, self._anew = store, anew
        self._found: dict[frozenset[str], Arrays] = {}  # by the hashes of both files
        self._made: dict[str, str] = {}  # what this sweep stored: result name -> key

    def add(self, pairs: Iterable[Pair]) -> None:
        """Adds pairs that were compared, to be stored by `store_all`."""
        self._found.update(pairs)

    def of(self, named: Named, kind: str, other: Named) -> Arrays | None:
        """Reads how a checkpoint differs from another; gives None if that is not stored.

        Args:
          named: name and result of the checkpoint.
          kind: how the other relates to it, of `OTHERS`.
          other: name and result of the other.
        """
        stored_as, key = _place(named, kind, other)
        if named[0] in self._anew and self._made.get(stored_as) != key:
            return None
        stored = self._store.find(stored_as, key)
        # Comparisons of an earlier version lack the splits' CKA.
        return stored.arrays if stored and set(COMPARISONS) <= stored.arrays.keys() else None

    def read_again(self, named: Named, kind: str, other: Named, checkpoint: Path) -> Arrays:
        """Reads a comparison that was stored before; raises `InputError` about a checkpoint's file if it was lost."""
        return self._store.read_again(*_place(named, kind, other), checkpoint).arrays

    def store(self, named: Named, kind: str, other: Named) -> bool:
        """Stores how a checkpoint differs from another if that was found; says whether it is stored now.

        The same pair may be stored already as another kind, or as the other checkpoint's.
        """
        stored_as, key = _place(named, kind, other)
        if self._made.get(stored_as) == key:
            return True
        found = self._found.get(_files(named, other))
        if found is None:
            if self.of(named, kind, other) is not None:
                return True
            found = self._stored_elsewhere(named, other)
        if found is None:
            return False
        self._store.save(stored_as, key, named[1].step, found, {"other": other[0]})
        self._made[stored_as] = key
        return True

    def _stored_elsewhere(self, named: Named, other: Named) -> Arrays | None:
        """Reads how two checkpoints differ from where it is stored as another kind, or as the other's.

        For a checkpoint whose stored comparisons do not count, this sweep must have stored it.
        """
        for one, two in ((named, other), (other, named)):
            for kind in OTHERS:
                stored_as, key = _place(one, kind, two)
                if named[0] not in self._anew or self._made.get(stored_as) == key:
                    found = self.of(one, kind, two)
                    if found is not None:
                        return found
        return None

    def store_chunk(
        self,
        pairs: Iterable[Pair],
        checkpoints: Iterable[tuple[Named, Named | None]],
        reference: Named | None,
    ) -> None:
        """Stores what comparing a chunk found, as far as it is known by now what it is needed for.

        Args:
          pairs: the pairs that the chunk compared; they are not kept in memory.
          checkpoints: those of the chunk, each with the one before it.
          reference: None for none.
        """
        with self._held(pairs):
            for named, before in checkpoints:
                # The reference is measured first: the checkpoint before it may still come, with its comparison.
                if before and named != reference:
                    self.store(named, "previous", before)
                if reference:
                    self.store(named, "reference", reference)

    def store_needed(self, pairs: Iterable[Pair], needed: Mapping[frozenset[str], Iterable[Comparison]]) -> None:
        """Stores the comparisons that need one of these pairs, and keeps none of the pairs in memory."""
        with self._held(pairs) as found:
            for pair in found:
                for comparison in needed.get(pair, ()):
                    self.store(*comparison)

    def store_all(self, checkpoints: Iterable[tuple[Named, Named | None]], reference: Named | None) -> None:
        """Stores what was found of checkpoints once no other comes, each given with the one before it."""
        for named, before in checkpoints:
            for kind, other in zip(OTHERS, (before, reference), strict=True):
                if other:
                    self.store(named, kind, other)

    @contextlib.contextmanager
    def _held(self, pairs: Iterable[Pair]) -> Iterator[Collection[frozenset[str]]]:
        """Keeps pairs in memory for as long as `store` is to find them; yields the hashes of their files."""
        found = dict(pairs)
        self._found |= found
        yield found.keys()
        for files in found:
            del self._found[files]


def _place(named: Named, kind: str, other: Named) -> tuple[str, str]:
    """Forms the name and the key that a comparison is stored by."""
    hashes = " ".join(result.info["sha256"] for _, result in (named, other))
    return f"movement_{named[0]}_{kind}", hashlib.sha256(hashes.encode()).hexdigest()


def _files(named: Named, other: Named) -> frozenset[str]:
    return frozenset(result.info["sha256"] for _, result in (named, other))


def compare_consecutive(
    tabled: Sequence[Named],
    reference: Named | None,
    known: Similarities,
    *,
    files: Mapping[str, tuple[int | None, Path]],
    sweep: CompiledSweep,
    source: CheckpointSource,
) -> Callable[[Named], Arrays]:
    """Compares each checkpoint of a run with the previous one and with the reference.

    States that are not at hand, of checkpoints that were measured earlier, are formed again.

    Args:
      tabled: name and result of the run's checkpoints, in step order.
      reference: those of the reference; None for none.
      known: the comparisons made so far; gets the others.
      files: result name -> (step or None, checkpoint file).
      sweep: the probe set, on the devices.
      source: where parameters come from.

    Returns:
      What reads, for one of these checkpoints and each of `OTHERS`: `event_drift/<other>` [splits, 2 S], 1 - cosine
      summed over reads, and `split_cka/<other>` [1 + splits, 2 S]; NaN for the first checkpoint's previous, and if
      there is no reference. It raises `InputError` if they were lost.

    Raises:
      InputError: a checkpoint whose states are formed again cannot be used.
    """
    before = dict(zip((name for name, _ in tabled), [None, *tabled[:-1]], strict=True))

    def others(named: Named) -> Iterator[tuple[str, Named | None]]:
        yield from zip(OTHERS, (before[named[0]], reference), strict=True)

    missing = [
        (named, kind, other)
        for named in tabled
        for kind, other in others(named)
        if other and not known.store(named, kind, other)
    ]
    if missing:
        steps = {name: result.step for named, _, other in missing for name, result in (named, other)}
        names = sorted(steps, key=steps.__getitem__)
        if reference and any(kind == "reference" for _, kind, _ in missing):
            names = list(dict.fromkeys([reference[0], *names]))
        loaded = load_ahead(names, files, source.load, ahead=sweep.chunk + 1)
        needed: dict[frozenset[str], list[Comparison]] = {}
        for named, kind, other in missing:
            needed.setdefault(_files(named, other), []).append((named, kind, other))
        for pairs in form_and_compare(loaded, ArrivingStates(sweep, reference and reference[0]), sweep):
            known.store_needed(pairs, needed)
    for named, kind, other in missing:
        if not known.store(named, kind, other):
            file, other_file = files[named[0]][1], files[other[0]][1]
            raise unusable(file, "a file that stays as it is", f"that it or {other_file.name} changed during the sweep")
    groups = 2 * (2 * sweep.spec.config.n_layers + 2)
    shapes = {"event_drift": (sweep.spec.num_splits, groups), "split_cka": (1 + sweep.spec.num_splits, groups)}
    nothing = {name: np.full(shape, np.nan) for name, shape in shapes.items()}

    def of_checkpoint(named: Named) -> Arrays:
        return {
            f"{measure}/{kind}": x
            for kind, other in others(named)
            for measure, x in (known.read_again(named, kind, other, files[named[0]][1]) if other else nothing).items()
        }

    return of_checkpoint


def form_and_compare(
    checkpoints: Iterable[tuple[str, Checkpoint]], arriving: ArrivingStates, sweep: CompiledSweep
) -> Iterator[Iterator[Pair]]:
    """Forms the states of checkpoints, in the given order, and yields what comparing each chunk finds.

    Args:
      checkpoints: names and checkpoints.
      arriving: gets the states; those that arrive later are compared with the last of these.
      sweep: the probe set, on the devices.
    """

    def dispatch(chunk: list[tuple[str, Checkpoint]]) -> dict[str, dict[str, jax.Array]]:
        stacked = stack_params([checkpoint.params for _, checkpoint in chunk])
        return arriving.dispatch(
            chunk[0][0], states_of_checkpoints(sweep.spec, stacked, sweep.data.buckets, sweep.data.rows_of_splits)
        )

    for chunk in over_chunks(dispatch, checkpoints, size=sweep.chunk):
        yield arriving.pairs(chunk.items, chunk.outputs)
