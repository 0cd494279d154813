"""Rows around a point amid them, whatever their sizes are in float32.

    G_ij = <s_i (v_i - z), s_j (v_j - z)>,    s_i = min(1/unit, FAR/|v_i - z|)

The unit is a distance that no minority of the rows can make large. Rows that are
farther than FAR units are drawn in along their ray, so that neither squares nor sums
overflow.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_avg.robust import _ranks, _stack
from optax_avg.robust._stack import Stack

FAR = 2.0**50  # in units of a typical distance; its square does not overflow
NEAR = 2.0**40  # FAR/NEAR over the largest number is one of full precision


class Centred(NamedTuple):
    """Rows around one of them, for rules that weigh rows by distances.

    Attributes:
      gram: Gram matrix (n, n) of ``s_i (v_i - z)``, ``s`` the :func:`scales` of the
        distances.
      valid: Rows that count, shape (n,).
      typical: A distance that no minority of the rows can make large.
      unit: The same distance, or the nearest whose inverse is an ordinary number.
      combine: Maps coefficients of the rows of ``gram``, with sum 1, to leaves.
    """

    gram: jax.Array
    valid: jax.Array
    typical: jax.Array
    unit: jax.Array
    combine: Callable[[jax.Array], list[jax.Array]]


def centred(stack: Stack, rank: Callable[[jax.Array], jax.Array | int]) -> Centred:
    """The Gram matrix around a row amid the others, in units of a typical distance.

    The centre is the row whose distance to the row of median norm is the median. No
    outlier is either of these, and near-identical rows do not cancel.

    Args:
      stack: Rows of gradients.
      rank: Function of the number of valid rows. It returns how many of them are closer
        to the row of median norm than the typical distance.

    Returns:
      A :class:`Centred`.
    """
    reference = _ranks.middle(stack.norms, stack.valid)
    distance = _stack.row_norms(stack.rows, stack.layout.axis_name, reference)
    valid = stack.valid & jnp.isfinite(distance)
    distance = jnp.where(valid, distance, 0)
    typical = distance[_ranks.nth(distance, valid, rank(jnp.sum(valid)))]
    unit = invertible(typical)
    stack = stack._replace(valid=valid)
    i = _ranks.middle(distance, valid)
    matrix = _stack.gram(stack, scales(distance, unit), i)

    def combine(c):
        weights, factors, total = factored(c, distance, unit)
        rest = jnp.where(jnp.any(valid), 1 - total, 0)
        return _stack.combine(stack, weights.at[i].add(rest), factors)

    return Centred(matrix, valid, typical, unit, combine)


def invertible(distance: jax.Array) -> jax.Array:
    """The distance, or the nearest number whose inverse is one of full precision."""
    least = 64 * jnp.finfo(distance.dtype).tiny
    return jnp.clip(distance, least, 1 / least)


def scales(distance: jax.Array, unit: jax.Array) -> jax.Array:
    """``s = min(1/unit, FAR/distance)``, shape (n,).

    Rows that are farther than FAR units still pull like a unit vector.
    """
    return jnp.minimum(1 / unit, FAR / distance)


def factored(
    c: jax.Array, distance: jax.Array, unit: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weights and factors of the rows whose product is ``c_i unit s_i``, and its sum.

    One number may be too small for a row that is far: 1e-30 of a row of 1e30.
    """
    far = distance > FAR * unit
    away = jnp.where(far, distance, 1)
    weights = jnp.where(far, c * NEAR * unit, c)
    factors = jnp.where(far, FAR / NEAR / away, 1)
    total = jnp.sum(jnp.where(far, c * (FAR * unit / away), c))
    return weights, factors, total


def distances(gram: jax.Array, c: jax.Array) -> jax.Array:
    """``|D_i - sum_j c_j D_j|`` from the Gram matrix of the ``D_i``, shape (n,)."""
    along = gram @ c
    return jnp.sqrt(jnp.maximum(jnp.diagonal(gram) - 2 * along + c @ along, 0))
