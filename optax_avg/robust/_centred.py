"""Rows around a point amid them, whatever their sizes are in float32.

    G_ij = <s_i (v_i - z), s_j (v_j - z)>,    s_i = min(1/unit, FAR/|v_i - z|)

The unit is a distance that no minority of the rows can make large. What is farther than
FAR units is drawn in along its ray, so that neither squares nor sums overflow.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_avg.robust import _stack
from optax_avg.robust._stack import Stack

FAR = 2.0**50  # in units of a typical distance; its square does not overflow
NEAR = 2.0**40  # FAR/NEAR over the largest number is one of full precision


class Centred(NamedTuple):
    """Rows around one of them, for rules that weigh rows by distances.

    Attributes:
      gram: of ``s_i (v_i - z)``, ``s`` the :func:`scales` of the distances.
      valid: rows that count.
      typical: a distance that no minority of the rows can make large.
      unit: the same, where its inverse is an ordinary number.
      combine: from coefficients of the rows of ``gram``, with sum 1, to leaves.
    """

    gram: jax.Array
    valid: jax.Array
    typical: jax.Array
    unit: jax.Array
    combine: Callable[[jax.Array], list[jax.Array]]


def centred(stack: Stack, axis_name: Any, rank: Callable[[jax.Array], Any]) -> Centred:
    """The Gram matrix around a row amid the others, in units of a typical distance.

    The row in the middle of the distances to the row of median norm: outliers are
    neither, and near-identical rows do not cancel. ``rank`` says of the number of rows
    how many are closer than the typical distance.
    """
    reference = _stack.middle(stack.norms, stack.valid)
    distance = _stack.row_norms(stack.rows, axis_name, reference)
    valid = stack.valid & jnp.isfinite(distance)
    distance = jnp.where(valid, distance, 0)
    typical = distance[_stack.nth(distance, valid, rank(jnp.sum(valid)))]
    unit = invertible(typical)
    stack = stack._replace(valid=valid)
    i = _stack.middle(distance, valid)
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
    """``1/unit``, and ``FAR/distance`` for rows that are farther than FAR units.

    These are drawn in along their ray: their pull stays that of a unit vector.
    """
    return jnp.minimum(1 / unit, FAR / distance)


def factored(
    c: jax.Array, distance: jax.Array, unit: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weights and factors of the rows whose product is ``c_i unit s_i``, and its sum.

    One number may be too small for what is far: 1e-30 of a row of 1e30.
    """
    far = distance > FAR * unit
    away = jnp.where(far, distance, 1)
    weights = jnp.where(far, c * NEAR * unit, c)
    factors = jnp.where(far, FAR / NEAR / away, 1)
    total = jnp.sum(jnp.where(far, c * (FAR * unit / away), c))
    return weights, factors, total


def distances(gram: jax.Array, c: jax.Array) -> jax.Array:
    """``|D_i - sum_j c_j D_j|`` from the Gram matrix of the ``D_i``."""
    along = gram @ c
    return jnp.sqrt(jnp.maximum(jnp.diagonal(gram) - 2 * along + c @ along, 0))
