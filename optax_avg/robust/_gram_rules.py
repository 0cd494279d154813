"""Coefficients of rows from their Gram matrix, for the rules of aggregation.

    z = sum_i c_i v_i,    |v_i - z|^2 = G_ii - 2 (G c)_i + c' G c
    G_ij = <s_i (v_i - z_0), s_j (v_j - z_0)>,    s_i = min(1/unit, FAR/|v_i - z_0|)

The rules work on ``n`` numbers or on an (n, n) matrix. The unit is a distance that no
minority of the rows can make large. Rows that are farther than FAR units are drawn in
along their ray, so that neither squares nor sums overflow.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_avg.robust import _ranks, _stack
from optax_avg.robust._gradients import clip_factor
from optax_avg.robust._options import INFINITY
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


def weiszfeld(
    gram: jax.Array, valid: jax.Array, nu: jax.Array, num_iters: int
) -> jax.Array:
    """Coefficients (n,) of the geometric median.

    ``c <- beta/sum_i beta_i``, ``beta_i = 1/max(nu, |v_i - z|)``, from the mean of the
    half of the rows that is closest to the centre.
    """
    size = jnp.diagonal(gram)
    near = valid & (size <= size[_ranks.middle(size, valid)])

    def normalised(beta):
        return beta / jnp.maximum(jnp.sum(beta), jnp.finfo(beta.dtype).tiny)

    def advance(_, c):
        return normalised(valid / jnp.maximum(nu, distances(gram, c)))

    return lax.fori_loop(0, num_iters, advance, normalised(near.astype(gram.dtype)))


def group_means(stack: Stack, groups: int) -> Stack:
    """The means of contiguous groups of rows; groups without a valid row are invalid.

    Raises:
      ValueError: If the groups cannot be of one size.
    """
    n = len(stack.valid)
    if n % groups:
        raise ValueError(
            f"{n} elements do not make {groups} groups of one size; pass a divisor of "
            f"{n}."
        )
    member = (jnp.arange(groups)[:, None] == jnp.arange(n)[None] // (n // groups)) & (
        stack.valid[None]
    )
    weights = member / jnp.maximum(jnp.sum(member, axis=1, keepdims=True), 1)
    rows = _stack.combine(stack, weights)
    norms = _stack.row_norms(rows, stack.layout.axis_name)
    valid = jnp.any(member, axis=1) & jnp.isfinite(norms)
    return stack._replace(rows=rows, norms=norms, valid=valid)


def clipped_rounds(
    gram: jax.Array, share: jax.Array, radius: jax.Array, c: jax.Array, num_iters: int
) -> jax.Array:
    """Coefficients (n,) of centered clipping after the first round.

    ``z <- z + sum_i share_i min(1, radius/|v_i - z|) (v_i - z)``.
    """

    def advance(_, c):
        pull = share * clip_factor(radius, distances(gram, c))
        return (1 - jnp.sum(pull)) * c + pull

    return lax.fori_loop(1, num_iters, advance, c)


def krum_scores(gram: jax.Array, valid: jax.Array, num_byzantine: int) -> jax.Array:
    """Sums (n,) of the ``n - f - 2`` smallest squared distances to other valid rows."""
    n = len(valid)
    size = jnp.diagonal(gram)
    squared = jnp.maximum(size[:, None] + size[None] - 2 * gram, 0)
    others = valid[None] & ~jnp.eye(n, dtype=bool)
    nearest = jnp.sort(jnp.where(others, squared, INFINITY), axis=1)
    nearest = nearest[:, : n - num_byzantine - 2]
    total = jnp.sum(jnp.where(jnp.isfinite(nearest), nearest, 0), axis=1)
    return jnp.where(valid, total, INFINITY)


def flag_mean(stack: Stack, rank: int, num_iters: int) -> list[jax.Array]:
    """``mean_i Y Y' v_i`` with the basis ``Y`` of :func:`_flag_basis`."""
    size = jnp.where(stack.valid, stack.norms, 0)
    least = 64 * jnp.finfo(size.dtype).tiny
    # Rows of length 4: the inverse of the largest number is not a full one.
    inverse = jnp.where(size > 0, 4 / jnp.maximum(size, least), 0)
    matrix = _stack.gram(stack, inverse) / 16
    basis = _flag_basis(matrix, rank, num_iters)
    unit = jnp.maximum(jnp.max(size), jnp.finfo(size.dtype).tiny)
    mean = (size / unit) @ matrix @ basis / jnp.maximum(jnp.sum(stack.valid), 1)
    c = basis @ mean / 4
    small = (size > 0) & (size < unit / FAR)
    weights = jnp.where(small, unit, unit * jnp.where(small, 0, inverse)) * c
    factors = jnp.where(small, inverse, 1)
    return _stack.combine(stack, weights, factors)


def _flag_basis(gram: jax.Array, rank: int, num_iters: int) -> jax.Array:
    """Coefficients (n, rank) of ``Y`` in unit rows with this Gram matrix.

    ``Y = argmin sum_i sqrt(1 - |Y' v_i|^2)`` by iteratively reweighted least squares.
    """
    present = jnp.diagonal(gram) > 0

    def fitted(a):
        values, vectors = jnp.linalg.eigh(a[:, None] * gram * a[None])
        values, vectors = values[-rank:], vectors[:, -rank:]
        real = values > len(a) * jnp.finfo(values.dtype).eps * values[-1]
        inverse = jnp.where(real, 1 / jnp.sqrt(jnp.where(real, values, 1)), 0)
        return a[:, None] * vectors * inverse[None]

    def advance(_, basis):
        explained = jnp.sum((gram @ basis) ** 2, axis=1)
        # The authors' regularised weight of the square of the sine.
        weight = (jnp.abs(1 - explained) + 1e-7) ** -0.25
        return fitted(jnp.where(present, weight, 0))

    return lax.fori_loop(0, num_iters, advance, fitted(present.astype(gram.dtype)))
