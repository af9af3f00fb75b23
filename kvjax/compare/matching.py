"""Follows heads of the same role across runs, although their addresses differ.

A role score is attention times the share of the causal effect (docs/definitions.md, "Roles"). Heads of two runs are
matched by the overlap of their scores, and what is found is compared with what chance gives.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

NULL_SEED = 0


@dataclasses.dataclass(frozen=True)
class RoleEvidence:
    """What role scores are made of, averaged over the checkpoints that are compared.

    Attributes:
      attention: role -> [X] in [0, 1], how far each head's attention shows the role.
      effects: role -> [X], the causal effect of each head that the role asks for; negative ones count as none.
    """

    attention: Mapping[str, np.ndarray]
    effects: Mapping[str, np.ndarray]

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(self.attention)


@dataclasses.dataclass(frozen=True)
class Null:
    """What chance gives: the mean and the 95th percentile of the statistic, and how often it reaches the observed."""

    mean: float
    high: float
    probability: float


@dataclasses.dataclass(frozen=True)
class Stability:
    """A statistic and its null. Both are NaN if no head has a score."""

    observed: float
    null: Null


@dataclasses.dataclass(frozen=True)
class Match:
    """How the heads of one run answer to those of another.

    Attributes:
      heads: [X] for each head of the first run, the index of its match in the second.
      overlap: [X] the overlap of the matched pairs' scores.
      similarity: overlap of all matched pairs over what either run has, in [0, 1]; 0 without any score. Its null
        matches again with causal effects permuted among the heads of each run.
      address: share of the matched overlap that stays at its (layer, head). Its null gives heads random addresses.
    """

    heads: np.ndarray
    overlap: np.ndarray
    similarity: Stability
    address: Stability


@dataclasses.dataclass(frozen=True)
class Matching:
    """The matches of every two of several runs.

    Attributes:
      pairs: (index of one run, index of another) -> their match.
      similarity, address: means over the pairs, and their nulls: the stability of roles, and of addresses.
    """

    pairs: Mapping[tuple[int, int], Match]
    similarity: Stability
    address: Stability


def role_scores(evidence: RoleEvidence) -> np.ndarray:
    """Scores heads, [X, roles] in [0, 1]: attention times the share of the sum of positive effects.

    A missing attention or effect counts as none.
    """
    columns = []
    for role in evidence.roles:
        effects = np.maximum(np.nan_to_num(np.asarray(evidence.effects[role], float)), 0.0)
        total = effects.sum()
        shares = effects / total if total > 0 else np.zeros_like(effects)
        columns.append(np.clip(np.nan_to_num(np.asarray(evidence.attention[role], float)), 0.0, 1.0) * shares)
    return np.stack(columns, axis=1)


def match_runs(
    runs: Sequence[RoleEvidence],
    layers_X: np.ndarray,
    *,
    within_layers: bool,
    draws: int,
    seed: int = NULL_SEED,
) -> Matching:
    """Matches the heads of every two runs so that the overlap of their role scores is largest.

    The best match of two runs without a circuit overlaps too. So the null matches again after causal effects are
    permuted among the heads of each run: attention and effect then coincide by chance alone. Every draw permutes each
    run once, so that means over pairs, which share runs, have their own null.

    Args:
      runs: evidence of at least two runs, of the same heads and roles.
      layers_X: layer of each head.
      within_layers: whether only heads of one layer may match.
      draws, seed: of the nulls.

    Raises:
      ValueError: the runs have other heads or roles, or there are fewer than two.
    """
    scores = [role_scores(run) for run in runs]
    shapes = {x.shape for x in scores} | {(len(layers_X), len(runs[0].roles))} if runs else set()
    if len(runs) < 2 or len(shapes) > 1 or len({run.roles for run in runs}) > 1:
        raise ValueError(f"runs: expected two or more with the same heads and roles; found {len(runs)} of {shapes}")
    generator, keys = np.random.default_rng(seed), list(itertools.combinations(range(len(runs)), 2))
    best = {(a, b): _best_match(scores[a], scores[b], layers_X, within_layers) for a, b in keys}
    similarity = np.array([_similarity(scores[a], scores[b], best[a, b][1]) for a, b in keys])
    address = np.array([_address_share(*best[key]) for key in keys])
    similarities, addresses = np.empty((draws, len(keys))), np.empty((draws, len(keys)))
    for draw in range(draws):
        permuted = [role_scores(_permute_effects(run, generator)) for run in runs]
        moved = [_random_addresses(layers_X, within_layers, generator) for _ in runs]
        for index, (a, b) in enumerate(keys):
            overlap = _best_match(permuted[a], permuted[b], layers_X, within_layers)[1]
            similarities[draw, index] = _similarity(permuted[a], permuted[b], overlap)
            addresses[draw, index] = _address_share(*best[a, b], moved[a], moved[b])
    matches = {
        key: Match(
            *best[key],
            _stability(similarities[:, index], similarity[index]),
            _stability(addresses[:, index], address[index]),
        )
        for index, key in enumerate(keys)
    }
    told = np.isfinite(address)
    overall = (
        _stability(addresses[:, told].mean(axis=1), address[told].mean()) if told.any() else matches[keys[0]].address
    )
    return Matching(matches, _stability(similarities.mean(axis=1), similarity.mean()), overall)


def _best_match(
    a_XxR: np.ndarray, b_XxR: np.ndarray, layers_X: np.ndarray, within_layers: bool
) -> tuple[np.ndarray, np.ndarray]:
    overlap_XxX = np.minimum(a_XxR[:, None], b_XxR[None]).sum(axis=2)
    # Heads of no role tie; a tie is decided against the own address, so that it does not look like stability.
    tie = 1e-9 * np.eye(len(a_XxR))
    allowed = (layers_X[:, None] == layers_X[None]) | (not within_layers)
    rows, columns = linear_sum_assignment(np.where(allowed, overlap_XxX - tie, -np.inf), maximize=True)
    heads = np.empty(len(a_XxR), int)
    heads[rows] = columns
    return heads, overlap_XxX[np.arange(len(heads)), heads]


def _similarity(a_XxR: np.ndarray, b_XxR: np.ndarray, overlap_X: np.ndarray) -> float:
    """Divides what both have by what either has; the union of scores is their sums less the overlap."""
    union = a_XxR.sum() + b_XxR.sum() - overlap_X.sum()
    return float(overlap_X.sum() / union) if union > 0 else 0.0


def _permute_effects(evidence: RoleEvidence, generator: np.random.Generator) -> RoleEvidence:
    order = generator.permutation(len(next(iter(evidence.effects.values()))))
    return RoleEvidence(evidence.attention, {role: np.asarray(x)[order] for role, x in evidence.effects.items()})


def _address_share(
    heads_X: np.ndarray, overlap_X: np.ndarray, a_X: np.ndarray | None = None, b_X: np.ndarray | None = None
) -> float:
    """Computes the share of the overlap whose two addresses agree; by default addresses are the heads' own."""
    own = np.arange(len(heads_X))
    stays = (own if a_X is None else a_X) == (own if b_X is None else b_X)[heads_X]
    total = overlap_X.sum()
    return float(overlap_X[stays].sum() / total) if total > 0 else float("nan")


def _random_addresses(layers_X: np.ndarray, within_layers: bool, generator: np.random.Generator) -> np.ndarray:
    addresses = np.arange(len(layers_X))
    groups = [np.flatnonzero(layers_X == layer) for layer in np.unique(layers_X)] if within_layers else [addresses]
    for group in groups:
        addresses[group] = generator.permutation(group)
    return addresses


def _stability(samples: np.ndarray, observed: float) -> Stability:
    """Compares with a null; the observed value counts as one draw more, so that no probability is 0."""
    if np.isnan(observed):
        nan = float("nan")
        return Stability(nan, Null(nan, nan, nan))
    reached = np.sum(samples >= observed - 1e-12)
    probability = float((reached + 1) / (len(samples) + 1))
    return Stability(float(observed), Null(float(samples.mean()), float(np.percentile(samples, 95)), probability))
