"""Rounding down of what has been raised by a sequence of low discrepancy.

    y = s floor(x / s + u)

``s`` is the spacing of the narrow dtype at ``x``. If ``u`` in [0, 1) is uniform, the
mean of ``y`` is ``x``. Random bits are uniform; here ``u`` is a function of the
iterate's number ``t`` and of the element's place ``i`` in its leaf, digit by digit:

    u = 0.u_0 u_1 ... u_31    in base 2,
    u_j = t_j xor g_j(t_{j+1}, t_{j+2}, ...) xor h(i)_j

Each leaf has a ``g`` and an ``h`` of its own.

``t_0`` is the lowest digit of ``t``. For every ``k``, as ``t`` runs through ``2^k``
iterates ``m 2^k, ..., (m + 1) 2^k - 1``, ``u`` meets each interval of length ``2^-k``
once: what rounding adds to a value that changes slowly cancels as it can with no
random bits. The function ``g`` is a hash, so the order within each run is another, and
no period of the iterates meets the same ``u`` again and again. The hash ``h`` makes the
elements differ.

This is van der Corput's sequence with the order of its points, but for runs, shuffled
(Owen, "Randomly Permuted (t,m,s)-Nets and (t,s)-Sequences", 1995).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from optax_avg import _numerics


def digits_of_time(t: jax.Array, seed: int | jax.Array) -> jax.Array:
    """``t_j xor g_j(t_{j+1}, ...)`` for all ``j``, the first in the highest bit.

    Args:
      t: Number of the iterate, an integer scalar.
      seed: What chooses ``g``, below 2^32.

    Returns:
      A uint32 scalar.
    """
    j = jnp.arange(32, dtype=jnp.uint32)
    from_j = t.astype(jnp.uint32) >> j
    g = _hash((from_j >> 1) ^ _hash(j ^ jnp.asarray(seed, jnp.uint32)))
    return jnp.sum(((from_j ^ g) & 1) << (31 - j), dtype=jnp.uint32)


def digits_of_place(shape: tuple[int, ...], seed: int | jax.Array) -> jax.Array:
    """``h(i)`` for the elements of a leaf, a uint32 array made where it is used.

    Under ``shard_map`` the place is that within the shard, under ``vmap`` that within
    the member, so shards and members share their sequences.
    """
    return _hash(_numerics.place(shape, jnp.uint32) ^ jnp.asarray(seed, jnp.uint32))


def raise_and_cut(x: jax.Array, dtype: DTypeLike, u: jax.Array) -> jax.Array:
    """``s floor(x / s + u)`` in ``dtype``, where ``x < 0`` with the sign put aside.

    What ``dtype`` holds stays as it is. What is closer to 0 than its largest number
    stays finite; NaN stays NaN.

    Args:
      x: Values, float32 or float64.
      dtype: A float dtype, at most as wide.
      u: Digits of ``u`` in base 2, uint32.

    Returns:
      An array like ``x`` in ``dtype``.
    """
    if x.dtype == dtype:  # so for complex leaves, which have no narrow dtype
        return x
    wide, narrow = jnp.finfo(x.dtype), jnp.finfo(dtype)
    whole = jnp.uint64 if wide.bits == 64 else jnp.uint32
    cut = wide.nmant - narrow.nmant  # bits
    below_cut = u >> (32 - cut) if cut <= 32 else u.astype(whole) << (cut - 32)
    same_exponents = wide.nexp == narrow.nexp
    lift = np.zeros([], x.dtype) if same_exponents else _lift(x, narrow.smallest_normal)
    bits = lax.bitcast_convert_type(x + lift, whole)
    fits = jnp.abs(x) < np.asarray(narrow.max, x.dtype)
    kept = jnp.where(fits, bits + below_cut.astype(whole), bits) >> cut
    if same_exponents:
        return lax.bitcast_convert_type(kept.astype(f"uint{narrow.bits}"), dtype)
    return (lax.bitcast_convert_type(kept << cut, x.dtype) - lift).astype(dtype)


def _lift(x: jax.Array, smallest_normal: Any) -> jax.Array:
    """What takes subnormal numbers to where normal ones have the same spacing."""
    smallest = np.asarray(smallest_normal, x.dtype)
    return jnp.where(jnp.abs(x) < smallest, jnp.copysign(smallest, x), 0)


def _hash(x: jax.Array) -> jax.Array:
    """Spreads every bit of a uint32 over all of them."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
