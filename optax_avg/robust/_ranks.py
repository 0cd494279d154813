"""Order statistics: of rows by coordinate, and of one number for each row."""

import jax
import jax.numpy as jnp
from jax import lax

from optax_avg import _numerics
from optax_avg.robust._gradients import equal_weights
from optax_avg.robust._stack import Stack, per_row

UNROLLED = 32  # rows up to which a sorting network is written out


def nth(values: jax.Array, valid: jax.Array, n: jax.Array | int) -> jax.Array:
    """Index of the valid value with ``n`` others before it in ascending order.

    It is the last one if there are fewer.
    """
    order = jnp.argsort(jnp.where(valid, values, jnp.inf))
    return order[jnp.clip(n, 0, jnp.maximum(jnp.sum(valid) - 1, 0))]


def middle(values: jax.Array, valid: jax.Array) -> jax.Array:
    """Index of the (lower) median of the valid values."""
    return nth(values, valid, (jnp.sum(valid) - 1) // 2)


def trimmed(valid: jax.Array, trim: int) -> jax.Array:
    """Weights (n,) by rank of the trimmed mean.

    They are those of the median if at most ``2 * trim`` rows are valid.
    """
    count = jnp.sum(valid)
    end = jnp.minimum(trim, (jnp.maximum(count, 1) - 1) // 2)
    rank = jnp.arange(len(valid))
    return equal_weights((rank >= end) & (rank < count - end))


def rank_weighted(stack: Stack, weights: jax.Array) -> list[jax.Array]:
    """``sum_k w_k v_(k)`` coordinate by coordinate, ``v_(k)`` the k-th smallest.

    Rows that are not valid come last.

    Raises:
      ValueError: If a leaf is complex.
    """

    def one(x):
        if jnp.iscomplexobj(x):
            raise ValueError(
                "complex numbers have no order; use oa.geometric_median()."
            )
        rows = [jnp.where(ok, x[i], jnp.inf) for i, ok in enumerate(stack.valid)]
        kept = [
            jnp.where(w > 0, w * _numerics.wide(v), 0)
            for w, v in zip(weights, _sorted(rows), strict=True)
        ]
        return sum(kept[1:], kept[0])

    return [one(x) for x in stack.rows]


def _sorted(rows: list[jax.Array]) -> list[jax.Array]:
    """Rows in ascending order, coordinate by coordinate."""
    stages = merge_exchange(len(rows))
    if len(rows) <= UNROLLED:  # one pass over memory
        for stage in stages:
            for a, b in stage:
                swap = rows[a] > rows[b]
                rows[a], rows[b] = (
                    jnp.where(swap, rows[b], rows[a]),
                    jnp.where(swap, rows[a], rows[b]),
                )
        return rows
    partners = jnp.array(
        [_partners(stage, len(rows)) for stage in stages], dtype=jnp.int32
    )

    def exchange(x, partner):
        other = x[partner]
        keeps_low = per_row(partner >= jnp.arange(len(rows)), x)
        return jnp.where(keeps_low == (x < other), x, other), None

    return list(lax.scan(exchange, jnp.stack(rows), partners)[0])


def _partners(stage: list[tuple[int, int]], n: int) -> list[int]:
    partner = list(range(n))
    for a, b in stage:
        partner[a], partner[b] = b, a
    return partner


def merge_exchange(n: int) -> list[list[tuple[int, int]]]:
    """Batcher's sorting network: stages of disjoint pairs that are put in order.

    References:
      Knuth, "The Art of Computer Programming" 3, algorithm 5.2.2M.
    """
    stages = []
    top = 1 << max(n - 1, 0).bit_length() - 1 if n > 1 else 0
    p = top
    while p:
        q, r, d = top, 0, p
        while True:
            stages.append([(i, i + d) for i in range(n - d) if i & p == r])
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    return stages
