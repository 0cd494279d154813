"""Several objectives: directions from the gradients of all of them.

    d = sum_i w_i g_i,    w from the Gram matrix G_ij = <g_i, g_j>

All are aggregators over the axis of the objectives, like those of
:mod:`optax_avg.robust.aggregation`.
"""

from collections.abc import Callable
from typing import Unpack

import jax
import jax.numpy as jnp
from jax import lax
from optax.experimental import aggregating

from optax_avg import _checks
from optax_avg._keys import key_maker
from optax_avg.robust import _stack
from optax_avg.robust._gradients import clip_factor, equal_weights, quotient
from optax_avg.robust._options import INFINITY, RowOptions, with_row_options
from optax_avg.robust._quadratic import (
    PROXIMAL_ROUNDS,
    nonnegative_minimiser,
    shortest,
)
from optax_avg.robust._stack import Stack
from optax_avg.robust.aggregation import aggregator, memoryless

__all__ = ["cagrad", "mgda", "pcgrad", "upgrad"]

STATIONARY = 1e-3  # a common descent of gradients of length 1 that float32 can't tell

# From the Gram matrix (n, n) and the valid rows (n,) to weights (n,) or (k, n).
Weights = Callable[[jax.Array, jax.Array], jax.Array]


@with_row_options
def mgda(**options: Unpack[RowOptions]) -> aggregating.Aggregator:
    """The shortest convex combination of the gradients, ``min_w |sum_i w_i g_i|``.

    No objective gets worse along it, to first order. It is zero at Pareto-stationary
    points. If gradients are zero, or below 1e-18 of the largest, it is the mean of
    these.

    Args:
      **options: Options of every aggregator.

    Returns:
      An aggregator with the state :class:`optax_avg.AggregationState`.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.mgda()
      >>> stacked = jnp.array([[2.0, 0.0], [0.0, 2.0]])
      >>> tx.update(stacked, tx.init(jnp.zeros(2)))[0].tolist()
      [1.0, 1.0]

    References:
      Désidéri, "Multiple-Gradient Descent Algorithm (MGDA) for Multiobjective
      Optimization", 2012.
    """
    return aggregator(memoryless(_weighted(shortest)), **options)


@with_row_options
def upgrad(**options: Unpack[RowOptions]) -> aggregating.Aggregator:
    """The mean of the gradients, each projected on the cone where no objective rises.

    ``mean_i argmin_{d : <g_j, d> >= 0 for all j} |d - g_i|``. Gradients below 1e-18 of
    the largest count in the mean and put no bound on ``d``.

    Args:
      **options: Options of every aggregator.

    Returns:
      An aggregator with the state :class:`optax_avg.AggregationState`.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.upgrad()
      >>> stacked = jnp.array([[1.0, 0.0], [-2.0, 2.0]])
      >>> [round(x, 3) for x in tx.update(stacked, tx.init(jnp.zeros(2)))[0].tolist()]
      [0.25, 1.25]

    References:
      Quinton & Rey, "Jacobian Descent for Multi-Objective Optimization", 2024,
      2406.16232.
    """

    def weights(matrix, valid):
        # d = g_i + sum_j v_j g_j with the multipliers v of the constraints.
        v = jax.vmap(lambda row: nonnegative_minimiser(matrix, -row))(matrix)
        mean = equal_weights(valid)
        return mean + mean @ v

    return aggregator(memoryless(_weighted(weights)), **options)


@with_row_options
def cagrad(c: float = 0.5, **options: Unpack[RowOptions]) -> aggregating.Aggregator:
    """The direction near the mean gradient that is best for the worst objective.

    ``argmax_{|d - g_0| <= c |g_0|} min_i <g_i, d> = g_0 + c |g_0| g_w/|g_w|``, where
    ``g_0`` is the mean and ``w`` on the simplex minimises ``<g_w, g_0> + c |g_0|
    |g_w|``; not rescaled. It keeps to ``|d - g_0| <= c |g_0|`` to rounding, however
    nearly gradients cancel.

    Gradients that are zero, or below 1e-18 of the largest, are ignored. For ``c < 1``
    the direction is zero only where ``g_0`` is, so descent goes on to a stationary
    point of the mean loss. For ``c >= 1`` it may stop at any Pareto-stationary point.
    At such points, where ``g_w = 0``, the direction is the best one that is closest to
    ``g_0``.

    Args:
      c: Largest distance to the mean gradient in units of its norm, not negative. At 0
        the result is the mean.
      **options: Options of every aggregator.

    Returns:
      An aggregator with the state :class:`optax_avg.AggregationState`.

    Raises:
      ValueError: If ``c`` is negative.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.cagrad(0.5)
      >>> stacked = jnp.array([[1.0, 0.0], [-0.5, 0.0]])
      >>> [round(x, 4) for x in tx.update(stacked, tx.init(jnp.zeros(2)))[0].tolist()]
      [0.125, 0.0]

    References:
      Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", 2021,
      2110.14048.
    """
    c = _checks.within("c", c, 0, INFINITY, closed_high=False)

    def rule(stack):
        weights = _conflict_averse(_normalised_gram(stack), stack.valid, c)
        both = _stack.combine(stack, weights)
        # Where rows cancel, G has lost the lengths of their sums.
        g0, pull = _stack.row_norms(both, stack.layout.axis_name)
        factor = clip_factor(c * g0, pull)
        return [x[0] + factor.astype(x.real.dtype) * x[1] for x in both]

    return aggregator(memoryless(rule), **options)


def _conflict_averse(matrix: jax.Array, valid: jax.Array, c: float) -> jax.Array:
    """Weights (2, n) of ``g_0`` and of what CAGrad adds to it."""
    mean = equal_weights(valid)
    along = matrix @ mean
    radius = c * jnp.sqrt(jnp.maximum(mean @ along, 0))
    lengths = jnp.sqrt(jnp.diagonal(matrix))
    bound = valid & (lengths > 0)  # a zero gradient asks for nothing
    least = lambda x: jnp.min(jnp.where(bound, x, INFINITY))
    asked = lambda level: jnp.where(bound, level - along, 0)

    # The shortest q = sum_i v_i g_i with <g_i, g_0 + q> >= level for all i.
    pull = lambda level, rounds: nonnegative_minimiser(matrix, asked(level), rounds)

    # One round has a ridge: any level can be met, at a length that rises with it.
    def halve(_, levels):
        low, high = levels
        level = (low + high) / 2
        short = pull(level, 1) @ asked(level) < radius**2
        return jnp.where(short, level, low), jnp.where(short, high, level)

    levels = least(along), least(along + radius * lengths)
    level, _ = lax.fori_loop(0, 32, halve, levels)

    def within(v):
        size = jnp.sqrt(jnp.maximum(v @ matrix @ v, 0))
        return ~(size > radius), v * clip_factor(radius, size)

    # What the ridge has shifted comes back, unless the level can't be met.
    _, ridged = within(pull(level, 1))
    _, exact = within(pull(level, PROXIMAL_ROUNDS))
    slopes = lambda v: along + matrix @ v
    better = least(slopes(exact)) > least(slopes(ridged))
    best = jnp.where(better, exact, ridged)
    near, closest = within(pull(jnp.zeros_like(level), PROXIMAL_ROUNDS))
    stationary = _is_stationary(matrix, lengths, bound)
    return jnp.stack([mean, jnp.where(near & stationary, closest, best)])


def _is_stationary(
    matrix: jax.Array, lengths: jax.Array, bound: jax.Array
) -> jax.Array:
    """Whether no direction improves all objectives, whatever their lengths."""
    unit = jnp.where(bound, quotient(1, lengths), 0)
    cosines = unit[:, None] * matrix * unit[None]
    w = shortest(cosines, bound)
    return w @ cosines @ w <= STATIONARY**2


@with_row_options
def pcgrad(
    key: jax.Array | int, **options: Unpack[RowOptions]
) -> aggregating.Aggregator:
    """The sum of the gradients, each without what opposes the others.

    For each ``g_i``, for the others ``g_j`` in random order: if ``<g_i, g_j> < 0``,
    ``g_i <- g_i - <g_i, g_j>/|g_j|^2 g_j``. Gradients ``g_j`` below 1e-18 of the
    largest count in the sum and take nothing from others.

    Args:
      key: PRNG key of the orders, or an integer to make one of.
      **options: Options of every aggregator.

    Returns:
      An aggregator with the state :class:`optax_avg.AggregationState`.

    Raises:
      ValueError: If ``key`` is neither.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.pcgrad(0)
      >>> stacked = jnp.array([[1.0, 0.0], [-2.0, 2.0]])
      >>> [round(x, 3) for x in tx.update(stacked, tx.init(jnp.zeros(2)))[0].tolist()]
      [0.5, 2.5]

    References:
      Yu et al., "Gradient Surgery for Multi-Task Learning", 2020, 2001.06782.
    """
    make_key = key_maker(key, "pcgrad(jax.random.key(0))")

    def rule(stack, memory, step):
        del step
        now, later = jax.random.split(memory)
        n = len(stack.valid)
        order = jax.vmap(lambda k: jax.random.permutation(k, n))(
            jax.random.split(now, n)
        )
        without = jax.vmap(_without_conflicts, (None, 0, 0))
        each = without(_normalised_gram(stack), jnp.arange(n), order)
        total = jnp.sum(jnp.where(stack.valid[:, None], each, 0), axis=0)
        return _stack.combine(stack, total), later

    return aggregator(rule, lambda _: make_key(), **options)


def _without_conflicts(matrix: jax.Array, i: jax.Array, order: jax.Array) -> jax.Array:
    """Coefficients (n,) of ``g_i`` after the projections in this order."""

    def project(coefficients, j):
        along = coefficients @ matrix[j]
        opposed = (along < 0) & (j != i)
        off = jnp.where(opposed, quotient(along, matrix[j, j]), 0)
        return coefficients.at[j].add(-off), None

    start = jnp.eye(len(order), dtype=matrix.dtype)[i]
    return lax.scan(project, start, order)[0]


def _weighted(weights: Weights) -> Callable[[Stack], list[jax.Array]]:
    """A rule from weights of the Gram matrix and the valid rows."""
    return lambda stack: _stack.combine(
        stack, weights(_normalised_gram(stack), stack.valid)
    )


def _normalised_gram(stack: Stack) -> jax.Array:
    """The Gram matrix (n, n) in units of the squared largest norm."""
    most = jnp.max(jnp.where(stack.valid, stack.norms, 0))
    return _stack.gram(stack, jnp.where(stack.valid, quotient(1, most, 1), 0))
