"""The largest elements of a vector, exactly as many as are wanted.

Among equal magnitudes at the limit those stay that come first.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from optax_avg import _numerics
from optax_avg._checkpoints.rules import Slices

DIGIT = 16  # bits of a magnitude that are counted in one pass
PART = 2**22  # elements that are counted at once
NO_END = 2**62  # of a whole vector
LAST = 2**31 - 1  # of a leaf


class Largest(NamedTuple):
    """The largest elements: all above a limit, and the first ones at it.

    Attributes:
      limit: the least magnitude that stays.
      end: elements at the limit stay if fewer than this many come before them.
    """

    limit: Any
    end: Any


def after(largest: Largest, start: int) -> Largest:
    """The same for what begins after ``start`` elements."""
    return largest._replace(end=min(max(largest.end - start, 0), LAST))


def is_among(largest: Largest, size: jax.Array) -> jax.Array:
    """Whether each element is among the largest, by the magnitudes of all."""
    at_limit = (size == largest.limit) & (_place(size) < largest.end)
    return (size > largest.limit) | at_limit


def largest_in(columns: list[list[Any]], density: float) -> list[list[Largest]]:
    """For leaves of models and their base, the largest elements over all leaves.

    Args:
      columns: for each leaf, those of the models and of the base.
      density: share of the elements of a model that stays.

    Returns:
      For each leaf, what stays of each model.
    """
    n = len(columns[0]) - 1
    if not all(_at_hand(x) for leaves in columns for x in leaves):
        models = [
            _counted([sizes(leaves)[t] for leaves in columns], density)
            for t in range(n)
        ]
        return [list(row) for row in zip(*models, strict=True)]
    found, start, rows = largest_on_host(lambda: iter(columns), n, density), 0, []
    for leaves in columns:
        rows.append([after(some, start) for some in found])
        start += jnp.size(leaves[0])
    return rows


@jax.jit
def sizes(leaves: list[Any]) -> list[jax.Array]:
    """Magnitudes of what models add to the base, the last of the leaves."""
    *xs, x0 = [_numerics.wide(jnp.asarray(x)) for x in leaves]
    return [jnp.abs(x - x0) for x in xs]


def _at_hand(x: Any) -> bool:
    if isinstance(x, Tracer):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def largest_on_host(slices: Slices, n: int, density: float) -> list[Largest]:
    """What stays of each of ``n`` models, from slices of them and their base.

    A magnitude is found digit by digit, by counting: the slices are passed through
    twice in float32, four times in float64, and once more where the limit is shared.
    """
    if density == 1:
        return [Largest(-1.0, NO_END)] * n
    integer = np.uint64 if jnp.result_type(float) == jnp.float64 else np.uint32
    width = np.iinfo(integer).bits
    limits, left = [integer(0)] * n, [0] * n
    shared = False
    for shift in range(width - DIGIT, -1, -DIGIT):
        counts = np.zeros((n, 2**DIGIT), np.int64)
        for t, _, bits in _bits(slices, integer):
            if shift + DIGIT < width:
                higher = integer(shift + DIGIT)
                bits = bits[bits >> higher == limits[t] >> higher]
            digits = (bits >> integer(shift)).astype(np.int64) & (2**DIGIT - 1)
            counts[t] += np.bincount(digits, minlength=2**DIGIT)
        shared = False
        for t, count in enumerate(counts):
            if shift + DIGIT == width:
                left[t] = max(1, round(density * int(count.sum())))
            larger = np.cumsum(count[::-1])[::-1]
            if not larger[0]:
                return [Largest(-1.0, NO_END)] * n
            digit = int(np.flatnonzero(larger >= left[t])[-1])
            left[t] -= int(larger[digit] - count[digit])
            limits[t] |= integer(digit) << integer(shift)
            shared |= count[digit] > left[t]
    ends = [NO_END] * n
    if shared:
        ends = _ends(slices, limits, left)
    real = np.float64 if integer is np.uint64 else np.float32
    return [
        Largest(limit.view(real), end) for limit, end in zip(limits, ends, strict=True)
    ]


def _ends(slices: Slices, limits: list[Any], left: list[int]) -> list[int]:
    """Where the last of the elements at each limit stands that stay."""
    left, ends = list(left), [0] * len(left)
    for t, start, bits in _bits(slices, type(limits[0])):
        places = np.flatnonzero(bits == limits[t])[: left[t]]
        if places.size:
            left[t] -= places.size
            ends[t] = start + int(places[-1]) + 1
    return ends


def _bits(slices: Slices, integer: Any) -> Iterator[tuple[int, int, np.ndarray]]:
    """Bits of magnitudes, which are ordered as they are: model, place, some of them."""
    real, start = np.float64 if integer is np.uint64 else np.float32, 0
    for leaves in slices():
        for t, size in enumerate(sizes(leaves)):
            bits = np.asarray(size, real).reshape(-1).view(integer)
            for i in range(0, bits.size, PART):
                yield t, start + i, bits[i : i + PART]
        start += jnp.size(leaves[0])


def _counted(found: list[jax.Array], density: float) -> list[Largest]:
    """The same for traced magnitudes, leaf by leaf."""
    n = sum(size.size for size in found)
    if density == 1 or not n:
        return [Largest(-1.0, LAST)] * len(found)
    keep = max(1, round(density * n))
    limit = _numerics.order_statistic(found, n - keep)
    left = jnp.asarray(keep)
    for size in found:
        left -= jnp.sum(size > limit)
    largest = []
    for size in found:
        hits = size == limit
        largest.append(Largest(limit, _end(hits, left)))
        left = jnp.maximum(left - jnp.sum(hits), 0)
    return largest


def _end(hits: jax.Array, left: jax.Array) -> jax.Array:
    """The last place with no more than ``left`` hits before it, bit by bit."""
    place = _place(hits)

    def lower_bit(i, end):
        later = end | (jnp.int32(1) << (30 - i))
        return jnp.where(jnp.sum(hits & (place < later)) <= left, later, end)

    return lax.cond(
        jnp.sum(hits) > left,
        lambda: lax.fori_loop(0, 31, lower_bit, jnp.int32(0)),
        lambda: jnp.int32(LAST),
    )


def _place(x: jax.Array) -> jax.Array:
    """How many elements come before each."""
    place = jnp.zeros(x.shape, jnp.int32)
    for axis, n in enumerate(x.shape):
        place = place * n + lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return place
