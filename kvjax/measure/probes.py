"""Fits linear probes: ridge regression to one-hot classes, many targets and label permutations from one Gram matrix.

Closed form on features standardised by the fit set, with intercept and penalty 1e-3 N (docs/definitions.md, "Trained
probes"). J permutations of a target's labels are J more right-hand sides of one factorised system.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

RIDGE = 1e-3  # penalty per fit row
LOGISTIC_STEPS = 200  # of L-BFGS at most
LOGISTIC_TOLERANCE = 1e-4  # of the gradient's largest entry, as scikit-learn has it

NO_LABEL = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RidgeProbes:
    """Linear probes of one target on G kinds of features, under J permutations of the labels.

    Attributes:
      weights: [G, J, Y, D] on standardised features, for Y classes.
      intercepts: [J, Y].
    """

    weights: jax.Array
    intercepts: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RidgeSystem:
    """The features of a fit set, standardised, and their factorised normal equations.

    Attributes:
      mean, scale: [G, D], of the fit rows; constant features have scale 1.
      features: [G, N, D] standardised; rows that do not count are 0.
      counts: [N] 1 for the rows that count, else 0.
      penalised: [G, D, D] the Gram matrix plus penalty.
      inverse: [G, D, D] its inverse.
    """

    mean: jax.Array
    scale: jax.Array
    features: jax.Array
    counts: jax.Array
    penalised: jax.Array
    inverse: jax.Array


def ridge_system(features_GxNxD: jax.Array, counts_N: jax.Array) -> RidgeSystem:
    """Forms the normal equations of those of N fit rows whose count is 1."""
    total = jnp.sum(counts_N)
    weights = counts_N[None, :, None]
    mean = jnp.sum(features_GxNxD * weights, axis=1) / total
    # Once more: what rounding leaves of a mean, which depends on the order of the sum, the systems blow up 1e5 times.
    mean += jnp.sum((features_GxNxD - mean[:, None]) * weights, axis=1) / total
    centred = (features_GxNxD - mean[:, None]) * weights
    scale = jnp.sqrt(jnp.sum(centred**2, axis=1) / total)
    # A constant feature leaves rounding noise, which must not be blown up to unit variance.
    scale = jnp.where(scale > 1e-6 * jnp.maximum(1.0, jnp.abs(mean)), scale, 1.0)
    standardised = centred / scale[:, None]
    gram = jnp.matmul(standardised.swapaxes(1, 2), standardised, precision="highest")
    penalised = gram + RIDGE * total * jnp.eye(gram.shape[-1])[None]
    return RidgeSystem(mean, scale, standardised, counts_N, penalised, jax.vmap(_inverse)(penalised))


def fit_probes(system: RidgeSystem, labels_JxN: jax.Array, num_classes: int) -> RidgeProbes:
    """Fits the ridge probes of one target.

    Args:
      system: of the fit set.
      labels_JxN: class of each row in each permutation; `NO_LABEL` for rows without one, which belong to no class.
      num_classes: Y.
    """
    groups, rows, width = system.features.shape
    by_row = system.features.swapaxes(0, 1).reshape(rows, groups * width)
    segments = jnp.where(labels_JxN == NO_LABEL, num_classes, labels_JxN)

    def class_sums(labels_N: jax.Array) -> jax.Array:
        # A sum by class is the product with the one-hot labels, without forming them.
        return jax.ops.segment_sum(by_row, labels_N, num_classes + 1)[:num_classes]

    cross_JxYxGD = jax.lax.map(class_sums, segments)
    cross = cross_JxYxGD.reshape(-1, groups, width).transpose(1, 2, 0)  # [G, D, J Y]
    solved = jnp.matmul(system.inverse, cross, precision="highest")
    # One step of refinement: the systems' condition numbers reach 1e5, float32 has seven digits.
    residual = cross - jnp.matmul(system.penalised, solved, precision="highest")
    solved += jnp.matmul(system.inverse, residual, precision="highest")
    weights = solved.swapaxes(1, 2).reshape(groups, len(labels_JxN), num_classes, width)
    members = jax.vmap(lambda labels: jax.ops.segment_sum(system.counts, labels, num_classes + 1))(segments)
    return RidgeProbes(weights, members[:, :num_classes] / jnp.sum(system.counts))


def fit_logistic(features_NxD: jax.Array, labels_N: jax.Array, num_classes: int) -> tuple[jax.Array, jax.Array]:
    """Fits a multinomial logistic probe: weights [Y, D] on the features, and intercepts [Y].

    Minimises the mean cross-entropy over the rows that have a label plus `RIDGE` / 2 times the squared weights, by
    L-BFGS. That is scikit-learn's `LogisticRegression` with C = 1 / (RIDGE · rows).

    Args:
      features_NxD: standardised.
      labels_N: class of each row, `NO_LABEL` for rows that do not count.
      num_classes: Y.
    """
    counted = labels_N != NO_LABEL
    targets = jnp.maximum(labels_N, 0)

    def loss(probe: tuple[jax.Array, jax.Array]) -> jax.Array:
        weights, intercepts = probe
        logits = jnp.matmul(features_NxD, weights.T, precision="highest") + intercepts[None]
        per_row = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(per_row * counted) / jnp.sum(counted) + 0.5 * RIDGE * jnp.sum(weights**2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: tuple) -> tuple:
        probe, state, index, _ = carry
        value, grad = value_and_grad(probe, state=state)
        updates, state = solver.update(grad, state, probe, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(probe, updates), state, index + 1, optax.tree.norm(grad, ord=jnp.inf)

    def unfinished(carry: tuple) -> jax.Array:
        _, _, index, largest = carry
        return (index < LOGISTIC_STEPS) & (largest > LOGISTIC_TOLERANCE)

    probe = (jnp.zeros((num_classes, features_NxD.shape[1])), jnp.zeros(num_classes))
    return jax.lax.while_loop(unfinished, step, (probe, solver.init(probe), 0, jnp.inf))[0]


def _inverse(spd_DxD: jax.Array) -> jax.Array:
    """Inverts a symmetric positive definite matrix by sweeping its rows (Goodnight 1979).

    LAPACK is avoided: JAX's calls of it on several CPU devices at once blocked each other forever. With thousands of
    right-hand sides, a product with the inverse also takes a third of the triangular solves' time.
    """

    def sweep(k: jax.Array, a: jax.Array) -> jax.Array:
        row = a[k] / a[k, k]
        column = a[:, k].at[k].set(0.0)
        swept = a.at[k].set(row) - column[:, None] * row[None]
        new_column = (-column / a[k, k]).at[k].set(1.0 / a[k, k])
        return swept.at[:, k].set(new_column)

    return jax.lax.fori_loop(0, len(spd_DxD), sweep, spd_DxD)


def standardise(system: RidgeSystem, features_GxNxD: jax.Array) -> jax.Array:
    """Standardises features of other rows by the fit set's mean and scale."""
    return (features_GxNxD - system.mean[:, None]) / system.scale[:, None]


def probe_scores(weights_YxD: jax.Array, intercepts_Y: jax.Array, standardised_NxD: jax.Array) -> jax.Array:
    """Scores every class for every row, classes first: [Y, N]."""
    return jnp.matmul(weights_YxD, standardised_NxD.T, precision="highest") + intercepts_Y[:, None]


def label_wins(scores_YxN: jax.Array, labels_N: jax.Array) -> jax.Array:
    """Checks whether the row's label has the highest score, bool [N]; False for rows without a label."""
    own = jnp.take_along_axis(scores_YxN, jnp.maximum(labels_N, 0)[None], axis=0)[0]
    return (own >= jnp.max(scores_YxN, axis=0)) & (labels_N != NO_LABEL)


def ranks_above(
    scores_YxN: jax.Array, labels_N: jax.Array, others_N: jax.Array, *, minus_YxN: jax.Array | None = None
) -> jax.Array:
    """Checks whether the row's label scores higher than another class, bool [N]; False if either is `NO_LABEL`.

    Args:
      scores_YxN: of a probe.
      labels_N, others_N: the classes.
      minus_YxN: scores of a second probe, fitted on the same rows to the other class, that are subtracted. Differences
        are the scores of the ridge regression to 1 for the label, -1 for the other class and 0 for all others: ridge
        solutions are linear in their targets.
    """
    both = jnp.maximum(jnp.stack([labels_N, others_N]), 0)
    own, other = jnp.take_along_axis(scores_YxN, both, axis=0)
    if minus_YxN is not None:
        own, other = jnp.stack([own, other]) - jnp.take_along_axis(minus_YxN, both, axis=0)
    return (own > other) & (labels_N != NO_LABEL) & (others_N != NO_LABEL)
