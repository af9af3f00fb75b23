"""Compares the weights of a run's checkpoints: how far tensors moved, and whether heads keep their leading directions.

A checkpoint is compared with the two before it in the run's tables, with the first and with the reference. Parameters
are held as checkpoints arrive, in whatever order, and only until all that are compared with them have arrived.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from kvjax.artifacts.checkpoint_sums import CheckpointResult, ResultStore
from kvjax.errors import unusable
from kvjax.execution.load_ahead import load_ahead
from kvjax.measure.weight_changes import squared_distances
from kvjax.measure.weight_spectra import HeadSpectra, direction_overlap, head_spectra
from kvjax.model.checkpoint import Checkpoint, CheckpointSource

# What a checkpoint is compared with, and in which respect.
_DISTANCES = ("previous", "before_previous", "first")
_OVERLAPS = ("previous", "reference")

Named = tuple[str, CheckpointResult]
Arrays = Mapping[str, np.ndarray]
Others = Mapping[str, str]  # kind -> name of the other checkpoint


@dataclasses.dataclass(frozen=True)
class _Held:
    checkpoint: Checkpoint
    spectra: HeadSpectra


class WeightComparisons:
    """Finds how the weights of a run's checkpoints differ, and stores it.

    Args:
      store: the run's results.
      anew: names of the checkpoints whose stored comparisons do not count.
    """

    def __init__(self, store: ResultStore, *, anew: Collection[str] = ()):
        self._store, self._anew = store, anew
        self._made: dict[str, str] = {}  # what this sweep stored: name -> key
        self._planned: dict[str, Others] = {}
        self._waiting: dict[str, set[str]] = {}  # by checkpoint, the planned comparisons that it takes part in
        self._held: dict[str, _Held] = {}

    def plan(self, others: Mapping[str, Others], arriving: Collection[str]) -> None:
        """Plans the comparisons whose checkpoints will all arrive; the others are left to `compare`."""
        arriving = set(arriving)
        self._plan({name: of for name, of in others.items() if {name, *of.values()} <= arriving})

    def arrive(self, name: str, checkpoint: Checkpoint, spectra: HeadSpectra) -> None:
        """Compares a checkpoint with those at hand, and stores every comparison that is complete now."""
        self._held[name] = _Held(checkpoint, spectra)
        waiting = sorted(self._waiting.get(name, ()))
        for own in waiting:
            if {own, *self._planned[own].values()} <= self._held.keys():
                self._compare(own, self._planned[own])
                self._drop(own)
        self._release(name)

    def give_up(self, name: str) -> None:
        """Drops the planned comparisons with a checkpoint that cannot be used."""
        for own in list(self._waiting.get(name, ())):
            self._drop(own)

    def compare(
        self,
        tabled: Sequence[Named],
        reference: Named | None,
        *,
        files: Mapping[str, tuple[int | None, Path]],
        source: CheckpointSource,
    ) -> Callable[[Named], Arrays]:
        """Compares every checkpoint of a run's tables; parameters of comparisons that are not known are loaded again.

        Args:
          tabled: name and result of the run's checkpoints, in step order.
          reference: those of the reference; None for none.
          files: result name -> (step or None, checkpoint file).
          source: where parameters come from.

        Returns:
          What reads, for one of these checkpoints, squared distances `distance/<kind>` [groups] to the `previous`,
          `before_previous` and `first` one, and the overlap of leading directions `overlap/<kind>` [matrices, L, H]
          with the `previous` one's and the `reference`'s. A checkpoint lacks those that do not exist. It raises
          `InputError` if they were lost.

        Raises:
          InputError: a checkpoint that is loaded again cannot be used.
        """
        results = dict(tabled) | ({reference[0]: reference[1]} if reference else {})
        others = compared_with([name for name, _ in tabled], reference and reference[0])
        hashes = {name: result.info["sha256"] for name, result in results.items()}
        keys = {name: _key(name, of, hashes) for name, of in others.items()}
        missing = [name for name, key in keys.items() if not self._is_stored(name, key)]
        if missing:
            self._plan({name: others[name] for name in missing})
            needed = {name for own in missing for name in (own, *others[own].values())}
            # The reference first: everything that is compared with it would have to wait for it.
            in_order = sorted(needed, key=lambda name: (not reference or name != reference[0], results[name].step))
            for name, checkpoint in load_ahead(in_order, files, source.load, ahead=2):
                self.arrive(name, checkpoint, head_spectra(checkpoint.params, checkpoint.config.n_heads))
        for name in missing:
            if not self._is_stored(name, keys[name]):
                expected = "a file that stays as it is"
                raise unusable(files[name][1], expected, "that it or one beside it changed during the sweep")

        def of_checkpoint(named: Named) -> Arrays:
            name, _ = named
            return self._store.read_again(f"weights_{name}", keys[name], files[name][1]).arrays

        return of_checkpoint

    def _is_stored(self, name: str, key: str) -> bool:
        """Checks, by reading them unless this sweep stored them, whether a checkpoint's comparisons are stored."""
        if self._made.get(name) == key:
            return True
        return name not in self._anew and self._store.find(f"weights_{name}", key) is not None

    def _compare(self, name: str, others: Others) -> None:
        own = self._held[name]
        layers = own.checkpoint.config.n_layers
        held = {kind: self._held[other] for kind, other in others.items()}
        found: dict[str, np.ndarray] = {}
        for kind in _DISTANCES:
            if kind in held:
                found[f"distance/{kind}"] = squared_distances(
                    own.checkpoint.params, held[kind].checkpoint.params, layers
                )
        for kind in _OVERLAPS:
            if kind in held:
                found[f"overlap/{kind}"] = direction_overlap(own.spectra, held[kind].spectra)
        key = _key(name, others, {n: held.checkpoint.sha256 for n, held in self._held.items()})
        self._store.save(f"weights_{name}", key, own.checkpoint.step, found, {"others": dict(others)})
        self._made[name] = key

    def _plan(self, others: Mapping[str, Others]) -> None:
        """Replaces the planned comparisons."""
        self._planned, self._waiting = dict(others), {}
        for own, of in others.items():
            for name in {own, *of.values()}:
                self._waiting.setdefault(name, set()).add(own)
        for name in list(self._held):
            self._release(name)

    def _drop(self, own: str) -> None:
        """Takes a comparison out of the plan, with the parameters that it alone needed."""
        for name in {own, *self._planned.pop(own).values()}:
            self._waiting[name].discard(own)
            self._release(name)

    def _release(self, name: str) -> None:
        """Drops a checkpoint's parameters if no planned comparison needs them."""
        if not self._waiting.get(name):
            self._waiting.pop(name, None)
            self._held.pop(name, None)


def compared_with(names: Sequence[str], reference: str | None) -> dict[str, dict[str, str]]:
    """Lists which checkpoints each is compared with: kind -> name of the other.

    Args:
      names: of the checkpoints in the tables, in step order.
      reference: name of the reference; None for none.
    """
    found = {}
    for index, name in enumerate(names):
        before = dict(zip(("previous", "before_previous"), reversed(names[max(0, index - 2) : index]), strict=False))
        found[name] = {"first": names[0], **before} | ({"reference": reference} if reference else {})
    return found


def _key(name: str, others: Others, hashes: Mapping[str, str]) -> str:
    """Hashes the contents of all files that a comparison is made of."""
    text = " ".join([hashes[name], *(f"{kind}={hashes[others[kind]]}" for kind in sorted(others))])
    return hashlib.sha256(text.encode()).hexdigest()
