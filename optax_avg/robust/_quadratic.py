"""Small quadratic programs of Gram matrices.

    argmin_{v >= 0} v' A v/2 - b' v

The method is block principal pivoting inside the proximal point method. ``n`` is the
number of objectives.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_avg.robust._gradients import quotient

RIDGE = 1e-6  # of a correlation matrix, for rows that depend on each other
PROXIMAL_ROUNDS = 3  # each takes away most of what the ridge has shifted
PATIENCE = 3  # block changes that do not help, before one coordinate changes alone


def shortest(gram: jax.Array, valid: jax.Array) -> jax.Array:
    """``argmin w' G w`` on the simplex of the valid rows, shape (n,).

    The minimiser ``v`` of ``v' G v/2 - sum_i v_i`` is ``w/(w' G w)``. If rows have
    length zero, it is infinite, and the shortest combination is their mean.
    """
    v = nonnegative_minimiser(gram, valid.astype(gram.dtype))
    zero = (valid & (jnp.diagonal(gram) == 0)).astype(v.dtype)
    v = jnp.where(jnp.any(zero > 0), zero, v)
    return quotient(v, jnp.sum(v))


def nonnegative_minimiser(
    a: jax.Array, b: jax.Array, rounds: int = PROXIMAL_ROUNDS
) -> jax.Array:
    """``argmin_{v >= 0} v' A v/2 - b' v`` for a small positive semidefinite ``A``.

    Rows that depend on each other have no single answer. The proximal point method,
    ``v <- argmin v' A v/2 - b' v + r |v - v_last|^2/2``, comes to one of them. One of
    its rounds is the minimiser with a ridge.

    Args:
      a: Matrix of shape (n, n).
      b: Vector of shape (n,).
      rounds: Number of rounds.

    Returns:
      The minimiser, shape (n,).

    References:
      Rockafellar, "Monotone Operators and the Proximal Point Algorithm", 1976.
    """
    diagonal = jnp.diagonal(a)
    unit = quotient(1, jnp.sqrt(diagonal), 1)
    a = unit[:, None] * a * unit[None] + RIDGE * jnp.eye(len(b), dtype=a.dtype)
    size = jnp.max(jnp.abs(unit * b))
    b = unit * b / jnp.where(size > 0, size, 1)
    round_ = lambda _, before: _pivoted(a, b + RIDGE * before)
    v = lax.fori_loop(0, rounds, round_, jnp.zeros_like(b))
    return unit * v * jnp.where(size > 0, size, 0)


class _Pivots(NamedTuple):
    """State of block principal pivoting.

    Attributes:
      free: Coordinates that are not held at zero, shape (n,).
      v: The solution with the others held at zero, shape (n,).
      wrong: Coordinates whose sign or slope is wrong, shape (n,).
      fewest: Smallest number of wrong coordinates so far.
      patience: Number of block changes left that may not reduce it.
      left: Number of changes left.
    """

    free: jax.Array
    v: jax.Array
    wrong: jax.Array
    fewest: jax.Array
    patience: jax.Array
    left: jax.Array


def _pivoted(a: jax.Array, c: jax.Array) -> jax.Array:
    """``argmin_{v >= 0} v' A v/2 - c' v`` for a positive definite ``A``.

    All coordinates that are wrong change sides. If that does not reduce their number,
    only the last one changes, which ends after finitely many changes.

    References:
      Júdice & Pires, "A Block Principal Pivoting Algorithm for Large-Scale Strictly
      Monotone Linear Complementarity Problems", 1994.
    """
    n = len(c)

    def pivot(now: _Pivots) -> _Pivots:
        count = jnp.sum(now.wrong)
        better = count < now.fewest
        patience = jnp.where(better, PATIENCE, now.patience - 1)
        last = jnp.arange(n) == jnp.max(jnp.where(now.wrong, jnp.arange(n), -1))
        change = jnp.where(better | (patience >= 0), now.wrong, last)
        free = now.free ^ change
        v, wrong = _solution(a, c, free)
        fewest = jnp.minimum(count, now.fewest)
        return _Pivots(free, v, wrong, fewest, patience, now.left - 1)

    counts = jnp.asarray(n + 1), jnp.asarray(PATIENCE), jnp.asarray(20 + 5 * n)
    start = _Pivots(c > 0, *_solution(a, c, c > 0), *counts)
    unsolved = lambda now: jnp.any(now.wrong) & (now.left > 0)
    return jnp.maximum(lax.while_loop(unsolved, pivot, start).v, 0)


def _solution(
    a: jax.Array, c: jax.Array, free: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The solution with the other coordinates held at zero, and which are wrong."""
    tolerance = 4 * len(c) * jnp.finfo(a.dtype).eps
    both = free[:, None] & free[None]
    fixed = jnp.where(both, a, jnp.eye(len(c), dtype=a.dtype))
    v = jnp.linalg.solve(fixed, jnp.where(free, c, 0))
    # Of dependent rows v can be 1/RIDGE, and what is rounded away with it.
    length = jnp.max(jnp.abs(v))
    slope, most = a @ v - c, jnp.abs(a) @ jnp.abs(v) + jnp.abs(c)
    low = jnp.where(free, v < -tolerance * length, slope < -tolerance * most)
    return v, low
