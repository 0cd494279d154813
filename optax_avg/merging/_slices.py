"""What merges find in vectors that may come slice by slice.

    <x_i, x_j> = u_i u_j <x_i/u_i, x_j/u_j>,    u_i a power of two near max |x_i|

:class:`Products` are inner products with no overflow. :class:`Largest` are the largest
elements, exactly as many as are wanted; among equal magnitudes the first count as
larger.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

from optax_avg import _numerics
from optax_avg.merging.trees import Slices


class Products(NamedTuple):
    """Inner products of ``n`` vectors, each in a unit of its own size.

    Attributes:
      units: Shape (n,), a power of two near the largest element of each vector.
      gram: Shape (n, n), the inner products in these units.
    """

    units: jax.Array
    gram: jax.Array


def unit_of(x: jax.Array) -> jax.Array:
    """The power of two at or below the largest magnitude in ``x``."""
    most = jnp.max(jnp.abs(x), initial=0)
    info = jnp.finfo(most.dtype)
    most = jnp.clip(most, info.tiny, info.max)
    mantissa, _ = jnp.frexp(most)
    return most / (2 * mantissa)


# Compiled once per shape, not once per call, if merges are not themselves compiled.
@jax.jit
def products(xs: list[jax.Array]) -> Products:
    """All inner products of vectors, with no overflow and no underflow."""
    units = [unit_of(x) for x in xs]
    ys = [x / u for x, u in zip(xs, units, strict=True)]
    n = len(ys)
    # The matrix is symmetric: half of it is computed.
    half = {
        (i, j): jnp.sum(jnp.real(jnp.conj(ys[i]) * ys[j]))
        for i in range(n)
        for j in range(i + 1)
    }
    rows = [[half[max(i, j), min(i, j)] for j in range(n)] for i in range(n)]
    return Products(jnp.stack(units), jnp.stack([jnp.stack(row) for row in rows]))


@jax.jit
def joined_products(a: Products, b: Products) -> Products:
    """Products over two slices, as products over both."""
    units = jnp.maximum(a.units, b.units)

    def moved(p: Products) -> jax.Array:
        ratio = p.units / units
        return p.gram * jnp.outer(ratio, ratio)

    return Products(units, moved(a) + moved(b))


def cosines(p: Products) -> tuple[jax.Array, jax.Array]:
    """Norms of the vectors in their units, and inner products of their directions."""
    norms = jnp.sqrt(jnp.diagonal(p.gram))
    safe = jnp.where(norms > 0, norms, 1)
    return norms, p.gram / jnp.outer(safe, safe)


DIGIT = 16  # bits of a magnitude that are counted in one pass
PART = 2**22  # elements that are counted at once
NO_END = 2**62  # larger than the number of elements of a tree
LAST = 2**31 - 1  # at least the number of elements of a leaf


class Largest(NamedTuple):
    """The largest elements: all above a limit, and the first ones at the limit.

    Attributes:
      limit: Smallest magnitude of these elements.
      end: Place before which elements at the limit count.
    """

    limit: jax.Array | np.floating | float
    end: jax.Array | int


def after(largest: Largest, start: int) -> Largest:
    """The same for a slice that begins after ``start`` elements."""
    return largest._replace(end=min(max(int(largest.end) - start, 0), LAST))


def is_among(largest: Largest, size: jax.Array) -> jax.Array:
    """Whether each element is among the largest, from the magnitudes of a slice."""
    at_limit = (size == largest.limit) & (_place(size) < largest.end)
    return (size > largest.limit) | at_limit


def largest_in(columns: list[list[ArrayLike]], density: float) -> list[list[Largest]]:
    """The largest elements of task vectors over several leaves.

    Args:
      columns: For each leaf, those of the models and then that of the base.
      density: Share of the elements of each task vector.

    Returns:
      For each leaf, the largest elements of each task vector.
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
def sizes(leaves: Sequence[ArrayLike]) -> list[jax.Array]:
    """Magnitudes of task vectors, from leaves of models and then of their base."""
    *xs, x0 = [_numerics.wide(jnp.asarray(x)) for x in leaves]
    return [jnp.abs(x - x0) for x in xs]


def _at_hand(x: ArrayLike) -> bool:
    """Whether the elements of an array can be read now, by this process."""
    if isinstance(x, Tracer):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def largest_on_host(slices: Slices, n: int, density: float) -> list[Largest]:
    """The largest elements of ``n`` task vectors, which come slice by slice.

    A limit is found digit by digit, by counting. This takes two passes over the slices
    in float32 and four in float64, and one more if several elements have the limit.

    Args:
      slices: Slices of the models and then of their base.
      n: Number of models.
      density: Share of the elements of each task vector.
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


def _ends(
    slices: Slices, limits: list[np.unsignedinteger], left: list[int]
) -> list[int]:
    """The place after the last element at each limit that counts."""
    left, ends = list(left), [0] * len(left)
    for t, start, bits in _bits(slices, type(limits[0])):
        places = np.flatnonzero(bits == limits[t])[: left[t]]
        if places.size:
            left[t] -= places.size
            ends[t] = start + int(places[-1]) + 1
    return ends


def _bits(
    slices: Slices, integer: type[np.unsignedinteger]
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yields a model, a place and the bits of some magnitudes from there on.

    The bits are ordered as the magnitudes are.
    """
    real, start = np.float64 if integer is np.uint64 else np.float32, 0
    for leaves in slices():
        for t, size in enumerate(sizes(leaves)):
            bits = np.asarray(size, real).reshape(-1).view(integer)
            for i in range(0, bits.size, PART):
                yield t, start + i, bits[i : i + PART]
        start += jnp.size(leaves[0])


def _counted(found: list[jax.Array], density: float) -> list[Largest]:
    """The largest elements of one task vector, from traced magnitudes of its leaves."""
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
    """The last place with at most ``left`` hits before it, found bit by bit."""
    place = _place(hits)

    def lower_bit(i: jax.Array, end: jax.Array) -> jax.Array:
        later = end | (jnp.int32(1) << (30 - i))
        return jnp.where(jnp.sum(hits & (place < later)) <= left, later, end)

    return lax.cond(
        jnp.sum(hits) > left,
        lambda: lax.fori_loop(0, 31, lower_bit, jnp.int32(0)),
        lambda: jnp.int32(LAST),
    )


def _place(x: jax.Array) -> jax.Array:
    """The number of elements before each element."""
    place = jnp.zeros(x.shape, jnp.int32)
    for axis, n in enumerate(x.shape):
        place = place * n + lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return place
