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
import optax
from jax import lax
from jax.sharding import PartitionSpec

from optax_avg import _mesh, _numerics
from optax_avg.robust import _layout
from optax_avg.robust._gradients import Tree
from optax_avg.robust._layout import Layout
from optax_avg.robust._options import AxisName

CHUNK = 2**18  # elements that fit into a cache

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

        # Without a centre and factors there is no copy to keep small.
        chunked = factors is not None or centre is not None
        sums = [
            _sum_over_chunks(one, x, part) if chunked else one(x, None)
            for x, part in zip(rows, _parts(centre, rows), strict=True)
        ]
        sums = [lax.optimization_barrier(s) for s in sums]
        return functools.reduce(jnp.add, sums)

    norms = _numerics.square_roots(squares)
    if axis_name is None:
        return norms
    shares = _mesh.everywhere(norms, axis_name).T
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

    Factors, 1 by default, are for rows whose weight alone would under- or overflow.
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
        return [_by_chunks(without, x).astype(_numerics.wide(x).dtype) for x in rows]

    def quick(rows):
        return [product(x) for x in rows]

    return lax.cond(plain, quick, slow, stack.rows)


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

    products = [
        lax.optimization_barrier(_sum_over_chunks(product, x, part))
        for x, part in zip(stack.rows, _parts(centre, stack.rows), strict=True)
    ]
    total = functools.reduce(jnp.add, products)
    axis_name = stack.layout.axis_name
    return total if axis_name is None else lax.psum(total, axis_name)


def _chunks(x: jax.Array) -> tuple[int, int]:
    """Number and width of chunks of columns (n, width) that stay in a cache."""
    if not _mesh.is_local(x) or x.size <= CHUNK:
        return 1, 0
    count = -(-x.size // CHUNK)
    return count, -(-x.shape[1] // count)


def _sum_over_chunks(
    f: Callable[[jax.Array, jax.Array | None], jax.Array],
    x: jax.Array,
    centre: jax.Array | None,
) -> jax.Array:
    """The sum of ``f`` over chunks of the columns of ``x`` and their centre."""
    index = None
    if centre is not None and jnp.issubdtype(centre.dtype, jnp.integer):
        index, centre = centre, None

    def around(columns, z):
        if index is not None:
            z = lax.dynamic_index_in_dim(columns, index, keepdims=False)
            z = _numerics.wide(z)
        return f(columns, z)

    count, width = _chunks(x)
    if not width:
        return around(x, centre)

    def part(i):
        # The last chunk reaches back, to columns that then count as zero.
        begin = jnp.minimum(i * width, x.shape[1] - width)
        fresh = begin + jnp.arange(width) >= i * width

        def cut(a):
            a = lax.dynamic_slice_in_dim(a, begin, width, a.ndim - 1)
            return jnp.where(jnp.broadcast_to(fresh, a.shape), a, 0)

        return around(cut(x), None if centre is None else cut(centre))

    sum_shape = jax.eval_shape(part, jnp.asarray(0))
    zeros = jnp.zeros(sum_shape.shape, sum_shape.dtype)
    zeros = _mesh.vary(zeros, _mesh.varying_axes(x))
    return lax.fori_loop(0, count, lambda i, total: total + part(i), zeros)


def _by_chunks(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """``f`` of chunks of the columns of ``x``, side by side."""
    count, width = _chunks(x)
    if not width:
        return f(x)

    def part(i):
        begin = jnp.minimum(i * width, x.shape[1] - width)
        return f(lax.dynamic_slice_in_dim(x, begin, width, 1))

    part_shape = jax.eval_shape(part, jnp.asarray(0))
    shape = (*part_shape.shape[:-1], x.shape[1])
    zeros = _mesh.vary(jnp.zeros(shape, part_shape.dtype), _mesh.varying_axes(x))

    def write(i, whole):
        begin = jnp.minimum(i * width, x.shape[1] - width)
        return lax.dynamic_update_slice_in_dim(whole, part(i), begin, whole.ndim - 1)

    return lax.fori_loop(0, count, write, zeros)


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
