"""Stacks of gradients: rows ``v_1 ... v_n`` and what rules compute from them.

    sum_i w_i v_i,    G_ij = <s_i (v_i - z), s_j (v_j - z)>

Rules for locations and conflicts need these two alone: their rounds are on ``n``
numbers. Rules that go coordinate by coordinate are in :mod:`optax_avg.robust._ranks`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec

from optax_avg import _mesh, _numerics
from optax_avg.robust import _layout
from optax_avg.robust._gradients import Tree
from optax_avg.robust._layout import Layout
from optax_avg.robust._options import AxisName

CHUNK = 2**17  # elements that fit twice into a cache
SPREAD = 2**21  # elements that keep all cores busy
BATCH = 64  # arrays that share a loop; each is an argument of all branches of a switch

# A centre: none, a vector in the layout of the rows, or the integer index of a row.
Centre = list[jax.Array] | jax.Array | None


class Stack(NamedTuple):
    """Rows of gradients.

    Attributes:
      rows: Arrays of shape (n, ...), joined leaves of the gradients.
      norms: Norms of the rows, shape (n,), float32 or wider.
      valid: Rows of finite norm, shape (n,).
      layout: How the leaves lie in the rows.
      blank: A tree like the result, in the dtypes of the gradients.
    """

    rows: list[jax.Array]
    norms: jax.Array
    valid: jax.Array
    layout: Layout
    blank: Tree


def stack_of(updates: optax.Updates, axis: int | None, axis_name: AxisName) -> Stack:
    """The rows of ``updates``: along ``axis`` of the leaves, and over ``axis_name``.

    Raises:
      ValueError: If a leaf has no such axis, or another length along it.
    """
    layout, rows, blank = _layout.rows_of(updates, axis, axis_name)
    norms = row_norms(rows, axis_name)
    return Stack(rows, norms, jnp.isfinite(norms), layout, blank)


def row_norms(
    rows: list[jax.Array], axis_name: AxisName = None, centre: Centre = None
) -> jax.Array:
    """``|v_i - z|``, shape (n,); no overflow, no underflow."""
    if not rows:
        return jnp.zeros(0)

    def squares(factors):
        def one(x, z):
            x = _numerics.wide(x) if z is None else _numerics.wide(x) - z[None]
            x = x if factors is None else x * per_row(factors, x)
            axes = tuple(range(1, x.ndim))
            return jnp.sum(jnp.real(x * jnp.conj(x)), axis=axes)

        if factors is not None or centre is not None:
            return _sum_over_columns(one, rows, centre)
        # There is no copy to keep small.
        sums = [lax.optimization_barrier(one(x, None)) for x in rows]
        return functools.reduce(jnp.add, sums)

    if centre is None:
        norms = _numerics.square_roots(squares)
    else:
        norms = _numerics.square_roots_in_rounds(squares, len(rows[0]))
    if axis_name is None:
        return norms
    shares = _layout.everywhere(norms, axis_name).T
    return _numerics.square_roots(
        lambda factors: jnp.sum(
            (shares if factors is None else shares * factors[:, None]) ** 2, axis=1
        )
    )


def _parts(centre: Centre, rows: list[jax.Array]) -> list[jax.Array | None]:
    """The centre of each array of rows."""
    return [*centre] if isinstance(centre, list) else [centre] * len(rows)


def combine(
    stack: Stack, weights: jax.Array, factors: jax.Array | None = None
) -> list[jax.Array]:
    """``sum_i w_i (f_i v_i)`` over the valid rows, in float32 or wider.

    Args:
      stack: Rows of gradients.
      weights: ``w``, of shape (n,), or (sums, n) for several sums.
      factors: ``f`` of shape (n,), 1 by default, for rows whose weight alone would
        under- or overflow.
    """
    weights = jnp.where(jnp.broadcast_to(stack.valid, weights.shape), weights, 0)
    plain = jnp.all(stack.valid)
    if factors is not None:
        plain &= jnp.all(factors == 1)

    def product(x):
        x = _numerics.wide(x)
        return jnp.tensordot(weights.astype(x.dtype), x, axes=1, precision="highest")

    def without(x):
        if factors is not None:
            x = _numerics.wide(x)
            x = x * per_row(factors, x)
        return product(jnp.where(per_row(stack.valid, x), x, 0))

    def slow(rows):
        local = [i for i, x in enumerate(rows) if _mesh.is_local(x)]
        own = [rows[i] for i in local]
        each = lambda w: _by_rows(own, w, factors)
        found = each(weights) if weights.ndim == 1 else lax.map(each, weights)
        sums = dict(zip(local, found, strict=True))
        return [sums[i] if i in sums else without(x) for i, x in enumerate(rows)]

    def quick(rows):
        return [product(x) for x in rows]

    return lax.cond(plain, quick, slow, stack.rows)


def _by_rows(
    rows: list[jax.Array], weights: jax.Array, factors: jax.Array | None
) -> list[jax.Array]:
    """``sum_i w_i (f_i v_i)`` row by row; rows without weight are not read."""
    order = jnp.argsort(weights == 0)  # is stable
    axes = (*_mesh.varying_axes(weights), *_axes(_alike(rows)))

    def add(place, sums):
        i = order[place]
        w, f = weights[i], None if factors is None else factors[i]
        moved = [x if f is None else x * f for x in (_row(x, i) for x in rows)]
        return [
            total + w.astype(x.dtype) * x for total, x in zip(sums, moved, strict=True)
        ]

    def zeros(x):
        wide = _numerics.float32_or_wider(x.dtype)
        dtype = wide if factors is None else jnp.result_type(wide, factors)
        return _mesh.vary(jnp.zeros(x.shape[1:], dtype), axes)

    blank = [zeros(x) for x in rows]
    sums = lax.fori_loop(0, jnp.sum(weights != 0), add, blank)
    return [
        total.astype(_numerics.float32_or_wider(x.dtype))
        for total, x in zip(sums, rows, strict=True)
    ]


def per_row(values: jax.Array, x: jax.Array) -> jax.Array:
    """One number for each row, with as many axes as ``x``."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def gram(stack: Stack, scale: jax.Array, centre: Centre = None) -> jax.Array:
    """``<s_i (v_i - z), s_j (v_j - z)>``, shape (n, n), 0 for rows that are not valid.

    Without the centre near-identical rows would cancel.
    """

    def product(x, z):
        x = _numerics.wide(x) if z is None else _numerics.wide(x) - z[None]
        part = per_row(scale, x) * x
        return _inner(jnp.where(per_row(stack.valid, x), part, 0))

    total = _sum_over_columns(product, stack.rows, centre)
    axis_name = stack.layout.axis_name
    return total if axis_name is None else lax.psum(total, axis_name)


def _sum_over_columns(
    f: Callable[[jax.Array, jax.Array | None], jax.Array],
    rows: list[jax.Array],
    centre: Centre,
) -> jax.Array:
    """The sum over all arrays of ``f`` of some of their columns and of their centre."""
    sums, chunked = [], _chunked(rows)
    parts = _parts(centre, rows)
    for i in set(range(len(rows))).difference(*chunked):
        z = parts[i]
        if z is not None and jnp.issubdtype(z.dtype, jnp.integer):
            z = _row(rows[i], z)
        sums.append(lax.optimization_barrier(f(rows[i], z)))
    for batch in chunked:
        own = None if centre is None else [parts[i] for i in batch]
        sums.append(_sum_over_chunks(f, [rows[i] for i in batch], own))
    return functools.reduce(jnp.add, sums)


def _row(x: jax.Array, index: jax.Array) -> jax.Array:
    return _numerics.wide(lax.dynamic_index_in_dim(x, index, keepdims=False))


def _chunked(rows: list[jax.Array]) -> list[list[int]]:
    """Indices of large arrays, in batches that share one loop over their columns."""
    alike: dict[jnp.dtype, list[int]] = {}
    for i, x in enumerate(rows):
        if _mesh.is_local(x) and x.size > CHUNK:
            alike.setdefault(x.dtype, []).append(i)
    return [
        group[i : i + BATCH]
        for group in alike.values()
        for i in range(0, len(group), BATCH)
    ]


class _Chunks(NamedTuple):
    """Chunks of the columns of several arrays, which are numbered in one sequence.

    Attributes:
      count: Number of chunks.
      width: Number of columns of each.
      place: Takes the number of a chunk. It returns the index of its array, its first
        column, and which columns are in no earlier chunk: the last chunk of an array
        reaches back.
    """

    count: int
    width: int
    place: Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


def _chunks_of(arrays: list[jax.Array], size: int) -> _Chunks:
    """Chunks of about ``size`` elements.

    One loop over the chunks of all arrays is compiled once, a loop for each array as
    often as there are arrays.
    """
    lengths = np.array([x.shape[1] for x in arrays], np.int32)
    width = min(max(1, size // arrays[0].shape[0]), int(lengths.min()))
    ends = np.cumsum(-(-lengths // width), dtype=np.int32)

    def place(number):
        k = jnp.searchsorted(ends, number, side="right").astype(jnp.int32)
        before = jnp.where(k > 0, jnp.asarray(ends)[k - 1], 0)
        first = (number - before) * width
        begin = jnp.minimum(first, jnp.asarray(lengths)[k] - width)
        return k, begin, begin + jnp.arange(width) >= first

    return _Chunks(int(ends[-1]), width, place)


@functools.partial(jax.jit, static_argnames="width")  # is traced once
def _cut(
    arrays: list[jax.Array], k: jax.Array, begin: jax.Array, width: int
) -> jax.Array:
    """Some columns of the array with index ``k``."""

    def of(i: int) -> Callable[[list[jax.Array], jax.Array], jax.Array]:
        return lambda xs, b: lax.dynamic_slice_in_dim(xs[i], b, width, xs[i].ndim - 1)

    return lax.switch(k, [of(i) for i in range(len(arrays))], arrays, begin)


def _alike(arrays: list[jax.Array]) -> list[jax.Array]:
    """The arrays, varying over the same axes of ``shard_map``."""
    axes = tuple({name for x in arrays for name in _mesh.varying_axes(x)})
    return [_mesh.vary(x, axes) for x in arrays]


def _sum_over_chunks(
    f: Callable[[jax.Array, jax.Array | None], jax.Array],
    arrays: list[jax.Array],
    centre: list[jax.Array] | None,
) -> jax.Array:
    """The sum of ``f`` over chunks of the columns of arrays and their centre."""
    index = None
    if centre is not None and jnp.issubdtype(centre[0].dtype, jnp.integer):
        index, centre = centre[0], None
    arrays = _alike(arrays)
    centre = None if centre is None else _alike(centre)
    chunks = _chunks_of(arrays, CHUNK)

    def part(number):
        k, begin, fresh = chunks.place(number)

        def cut(xs):
            return jnp.where(fresh, _cut(xs, k, begin, chunks.width), 0)

        x = cut(arrays)
        z = None if centre is None else cut(centre)
        return f(x, z if index is None else _row(x, index))

    def advance(number, sums):
        total, error = sums
        total, lost = _numerics.sum_and_error(total, part(number))
        return total, error + lost

    kind = jax.eval_shape(part, jnp.asarray(0))
    axes = tuple({name for x in (arrays, centre) for name in _axes(x)})
    zeros = _mesh.vary(jnp.zeros(kind.shape, kind.dtype), axes)
    total, error = lax.fori_loop(0, chunks.count, advance, (zeros, zeros))
    # A sum that overflows has no finite error.
    return jnp.where(jnp.isfinite(error), total + error, total)


def _axes(arrays: list[jax.Array] | None) -> tuple[str, ...]:
    return _mesh.varying_axes(arrays[0]) if arrays else ()


def by_columns(
    f: Callable[[jax.Array], jax.Array], rows: list[jax.Array]
) -> list[jax.Array]:
    """``f``, which maps columns (n, d) to numbers (d,), of each array.

    ``f`` is compiled once for all large arrays of a dtype, whose results lie in one
    vector until the end.
    """
    chunked = _chunked(rows)
    out: dict[int, jax.Array] = {
        i: f(rows[i]) for i in set(range(len(rows))).difference(*chunked)
    }
    for batch in chunked:
        out |= dict(zip(batch, _by_chunks(f, [rows[i] for i in batch]), strict=True))
    return [out[i] for i in range(len(rows))]


def _by_chunks(
    f: Callable[[jax.Array], jax.Array], arrays: list[jax.Array]
) -> list[jax.Array]:
    """``f`` of chunks of the columns of arrays, side by side."""
    if len(arrays) == 1:
        return [f(arrays[0])]
    arrays = _alike(arrays)
    chunks = _chunks_of(arrays, SPREAD)
    ends = np.cumsum([x.shape[1] for x in arrays], dtype=np.int32)
    begins = ends - np.array([x.shape[1] for x in arrays], np.int32)

    def write(number, whole):
        k, begin, _ = chunks.place(number)
        new = f(_cut(arrays, k, begin, chunks.width))
        return lax.dynamic_update_slice(whole, new, (jnp.asarray(begins)[k] + begin,))

    kind = jax.eval_shape(f, arrays[0])
    blank = _mesh.vary(jnp.zeros(int(ends[-1]), kind.dtype), _axes(arrays))
    whole = lax.fori_loop(0, chunks.count, write, blank)
    return [whole[a:b] for a, b in zip(begins, ends, strict=True)]


def _inner(x: jax.Array) -> jax.Array:
    """``<x_i, x_j>`` over all axes but the first."""
    axes = tuple(range(1, x.ndim))
    spec = jax.typeof(x).sharding.spec
    out = PartitionSpec(None, None) if any(spec) else None
    found = lax.dot_general(
        jnp.conj(x),
        x,
        ((axes, axes), ((), ())),
        precision="highest",
        out_sharding=out,
    )
    return jnp.real(found)
