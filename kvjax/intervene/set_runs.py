"""Ablates sets of components in the clean streams of pairs, each distinct stream once and each set once."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.devices import Placement
from kvjax.execution.export_cache import LoweredFunction
from kvjax.execution.fit_set import COMPONENT_SITES
from kvjax.execution.over_pairs import compiled_on_microbatches
from kvjax.execution.unbucket import unbucket
from kvjax.intervene.inputs import InterventionInputs
from kvjax.intervene.pair_runs import Effects, read_effects
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params
from kvjax.model.restart import run_clean
from kvjax.model.set_ablation import SET_CAPTURE, SetTree, under_sets
from kvjax.model.sites import Trace, take_positions
from kvjax.task.donors import draw_donors
from kvjax.task.encoding import EncodedRecords
from kvjax.task.stream_reads import StreamReads, bucket_streams

DONOR_SEED = 0

# Bytes of the states that a microbatch holds at once, which bounds its tokens if there are many components.
STATE_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class AblateSets:
    """The measurement: every set of a checkpoint ablated in a microbatch of clean streams."""

    config: DecoderConfig

    def __call__(self, tree: tuple[Params, SetTree], batch: tuple[StreamReads, Trace]) -> Effects:
        """Measures each of K sets.

        Args:
          tree: one checkpoint's parameters, and the sets.
          batch: B rows of streams, and the replacements at their positions, `head_z` [B, T, L, H, E] and `mlp_out`
            [B, T, L, D].

        Returns:
          Of each of `read_effects`: `<name>` [B, Q, K], and `<name>_base` [B, Q] of the clean run.
        """
        params, sets = tree
        rows, values = batch
        positions = jnp.asarray(rows.prediction_positions)
        logits, clean = run_clean(params, self.config, jnp.asarray(rows.tokens), SET_CAPTURE)
        by_layer = {name: jnp.moveaxis(x, 2, 0) for name, x in values.items()}
        found = under_sets(
            params,
            self.config,
            clean,
            by_layer,
            sets,
            positions_BxQ=positions,
            measure=lambda logits_BxQxV: read_effects(logits_BxQxV, rows),
        )
        base = read_effects(take_positions(logits, positions, 1), rows)
        return {name: jnp.moveaxis(x, 0, -1) for name, x in found.items()} | {f"{n}_base": x for n, x in base.items()}


class SetRuns:
    """The effects of sets of components, each measured when it is first asked for.

    Args:
      inputs: the checkpoints, pairs and fit set.
      capacity: how many sets are measured at once.
    """

    def __init__(self, inputs: InterventionInputs, capacity: int):
        self._inputs, self._capacity = inputs, capacity
        self._rows = StreamReads.of(inputs.encoded, inputs.clean, inputs.clean_rows)
        most_tokens = STATE_BYTES // (4 * capacity * inputs.config.d_model)
        self._buckets = bucket_streams(
            self._rows,
            tokens_per_batch=min(inputs.tokens_per_batch, most_tokens),
            max_buckets=inputs.max_buckets,
            devices=inputs.devices,
        )
        self._found: dict[tuple[int, str], dict[bytes, dict[str, np.ndarray]]] = {}
        self._programs: list[LoweredFunction] = []

    def under(self, checkpoint: int, ablation: str, sets_KxM: np.ndarray) -> dict[str, np.ndarray]:
        """Measures sets at one checkpoint.

        Args:
          checkpoint: its index.
          ablation: of `ABLATIONS`.
          sets_KxM: bool, whether each component, in forward order, is ablated.

        Returns:
          Of each of `answer_effects`: `<name>` [N, K] of every pair, and `<name>_base` [N] of the clean run.
        """
        found = self._found.setdefault((checkpoint, ablation), {})
        none = np.zeros(sets_KxM.shape[1], bool).tobytes()
        new = {own.tobytes(): own for own in sets_KxM if own.any() and own.tobytes() not in found}
        keys = list(new)
        chunks = [keys[first : first + self._capacity] for first in range(0, len(keys), self._capacity)]
        for chunk in chunks or ([] if none in found else [[]]):
            sets = np.array([new[key] for key in chunk], bool).reshape(len(chunk), sets_KxM.shape[1])
            effects = self._measure(checkpoint, ablation, sets)
            names = [name for name in effects if f"{name}_base" in effects]
            found[none] = {name: effects[f"{name}_base"] for name in names}
            found |= {key: {name: effects[name][:, k] for name in names} for k, key in enumerate(chunk)}
        each = [found[own.tobytes()] for own in sets_KxM]
        base = {f"{name}_base": x for name, x in found[none].items()}
        return {name: np.stack([x[name] for x in each], axis=-1) for name in found[none]} | base

    def _measure(self, checkpoint: int, ablation: str, sets_KxM: np.ndarray) -> dict[str, np.ndarray]:
        inputs, config = self._inputs, self._inputs.config
        by_layer = sets_KxM.reshape(-1, config.n_layers, config.n_heads + 1)
        tree = inputs.checkpoint(checkpoint), SetTree.of(by_layer, self._capacity)
        table, index = self._replacements(checkpoint, ablation)
        placement, batches = Placement(inputs.devices), []
        tree = jax.device_put(tree, placement.whole)
        for bucket in self._buckets:
            tokens = index[bucket.batches.streams][..., : bucket.batches.tokens.shape[-1]]
            values = {name: x[tokens] for name, x in table.items()}
            batches.append(jax.device_put((bucket.batches, values), placement.split))
        if not self._programs:
            measures = [AblateSets(config)] * len(batches)
            self._programs = compiled_on_microbatches(measures, placement, tree, batches)
        outputs = [program(tree, batch) for program, batch in zip(self._programs, batches, strict=True)]
        by_row = unbucket(jax.device_get(outputs), self._buckets, len(self._rows))
        return {name: self._by_pair(x[0]) for name, x in by_row.items()}

    def _by_pair(self, values_RxQxX: np.ndarray) -> np.ndarray:
        """Sums values of reads over each pair's, [N, *X]; those of no read are 0."""
        found = np.zeros((len(self._inputs.encoded), *values_RxQxX.shape[2:]), values_RxQxX.dtype)
        np.add.at(found, self._rows.pairs, values_RxQxX)
        return found

    def _replacements(self, checkpoint: int, ablation: str) -> tuple[Trace, np.ndarray]:
        """Finds what outputs are replaced by: a table [entries, L, …] by site, and each token's entry, [streams, T]."""
        inputs = self._inputs
        if ablation == "resample":
            outputs = jax.device_get(token_outputs(inputs.config, inputs.checkpoint(checkpoint), inputs.clean_batches))
            return _entries_first(outputs), self._donors
        if ablation == "role_mean":
            own = {name: x[checkpoint] for name, x in inputs.role_means.items()}
            return _entries_first(own), inputs.clean.token_roles
        overall = {name: x[checkpoint][:, 0] for name, x in inputs.means.items()}
        if ablation == "zero":
            overall = {name: np.zeros_like(x) for name, x in overall.items()}
        return _entries_first(overall), np.zeros_like(inputs.clean.token_roles)

    @functools.cached_property
    def _donors(self) -> np.ndarray:
        return clean_donors(self._inputs.clean)


def clean_donors(clean: EncodedRecords) -> np.ndarray:
    """Draws, for every token of the clean streams, the token that resampling takes its outputs from: int [N, T].

    One draw of `draw_donors`: of the same token role, in another stream of the same split, whatever the batches. A
    token is named row * T + position.
    """
    return draw_donors(clean, draws=1, seed=DONOR_SEED)[0]


@functools.partial(jax.jit, static_argnums=0)
def token_outputs(config: DecoderConfig, params: Params, batches: EncodedRecords) -> Trace:
    """Records the outputs of components at every token of records in microbatches, [L, tokens, …] by site."""

    def of_batch(batch: EncodedRecords) -> Trace:
        _, clean = run_clean(params, config, batch.tokens, COMPONENT_SITES)
        return {name: clean.trace[name] for name in COMPONENT_SITES}

    by_batch = jax.lax.map(of_batch, batches)  # [M, L, B, T, …]
    return {name: jnp.moveaxis(x, 1, 0).reshape(x.shape[1], -1, *x.shape[4:]) for name, x in by_batch.items()}


def _entries_first(by_layer: Trace) -> Trace:
    return {name: np.ascontiguousarray(np.moveaxis(np.asarray(x), 1, 0)) for name, x in by_layer.items()}
