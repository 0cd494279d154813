"""Stacks of gradients: rows ``v_1 ... v_n`` over an axis of the leaves or over devices.

    sum_i w_i v_i,    G_ij = <s_i (v_i - z), s_j (v_j - z)>

Rules for locations and conflicts need no more than these two: whatever they iterate,
they iterate on ``n`` numbers. Across devices each one holds all rows of its share of
the coordinates, so that rules that go coordinate by coordinate need no more either.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from optax_avg import _leaves, _mesh, _numerics

CHUNK = 2**18  # elements that fit into a cache
SMALL = 2**14  # elements a row; smaller leaves are joined, to be one program each
UNROLLED = 32  # rows up to which a sorting network is written out


class NotStackedError(ValueError):
    """Gradients that should be those of several elements have no axis of elements."""


class Stack(NamedTuple):
    """Rows of gradients.

    Attributes:
      rows: leaves of shape (n, ...).
      norms: shape (n,), float32 or wider.
      valid: shape (n,), rows of finite norm.
      total: sums over the devices that share the coordinates.
      arrange: brings a tree like the result into the layout of the rows.
      place: puts leaves in that layout into such a tree, in its dtypes.
      blank: a tree like the result, in the dtypes of the gradients.
    """

    rows: list[jax.Array]
    norms: jax.Array
    valid: jax.Array
    total: Callable[[jax.Array], jax.Array]
    arrange: Callable[[Any], list[jax.Array]]
    place: Callable[[list[jax.Array], Any], Any]
    blank: Any


def stack_of(updates: Any, axis: int | None, axis_name: Any) -> Stack:
    """The rows in ``updates``: along ``axis`` of the leaves, and over ``axis_name``.

    Raises:
      ValueError: If a leaf has no such axis, or another length along it.
    """
    leaves, structure = jax.tree.flatten(updates, is_leaf=_leaves.is_absent)
    paths = jax.tree.flatten_with_path(updates, is_leaf=_leaves.is_absent)[0]
    found: dict[int, jax.Array] = {}
    for i, (path, x) in enumerate(paths):
        if not _leaves.is_gradient(x):
            continue
        if axis is not None:
            _check_axis(path, x, axis)
        found[i] = jnp.expand_dims(x, 0) if axis is None else jnp.moveaxis(x, axis, 0)
        n = next(iter(found.values())).shape[0]
        if found[i].shape[0] != n:
            raise ValueError(
                f"updates{jax.tree_util.keystr(path)} has {found[i].shape[0]} "
                f"elements, other leaves have {n}."
            )
    groups = _groups(found)
    devices = 1 if axis_name is None else lax.axis_size(axis_name)

    def parts_of(tree: Any) -> list[Any]:
        parts = jax.tree.leaves(tree, is_leaf=_leaves.is_absent)
        if len(parts) != len(leaves):
            raise ValueError(
                f"{len(leaves)} gradients for a location of {len(parts)} leaves; pass "
                "gradients like the parameters of init."
            )
        return parts

    def arrange(tree: Any) -> list[jax.Array]:
        parts = parts_of(tree)
        joined = [_join([parts[i][None] for i in group]) for group in groups]
        if axis_name is None:
            return [x[0] for x in joined]
        here = lax.axis_index(axis_name)
        return [
            lax.dynamic_index_in_dim(_padded(x, devices)[0], here, keepdims=False)
            for x in joined
        ]

    def place(located: list[jax.Array], tree: Any) -> Any:
        new = parts_of(tree)
        for group, x in zip(groups, located, strict=True):
            x = x if axis_name is None else everywhere(x, axis_name).reshape(-1)
            begin = 0
            for i in group:
                size = math.prod(found[i].shape[1:])
                whole = len(group) == 1 and axis_name is None
                part = x if whole else x[begin : begin + size]
                if part.shape != found[i].shape[1:]:
                    part = part.reshape(found[i].shape[1:])
                new[i] = part.astype(new[i].dtype)
                begin += size
        return jax.tree.structure(tree, is_leaf=_leaves.is_absent).unflatten(new)

    blank = structure.unflatten(
        x if _leaves.is_absent(x) or i in found else _first(path, x, axis)
        for i, (path, x) in enumerate(paths)
    )
    rows = [_join([found[i] for i in group]) for group in groups]
    total = lambda x: x if axis_name is None else lax.psum(x, axis_name)
    if axis_name is not None:
        rows = [_exchanged(_padded(x, devices), axis_name) for x in rows]
    norms = row_norms(rows, axis_name)
    return Stack(rows, norms, jnp.isfinite(norms), total, arrange, place, blank)


def _first(path: Any, x: Any, axis: int | None) -> Any:
    """The first row of a leaf that is not floating, such as a counter."""
    if axis is None:
        return x
    _check_axis(path, x, axis)
    if x.dtype == jax.dtypes.float0:
        return np.take(x, 0, axis)
    return lax.index_in_dim(jnp.asarray(x), 0, axis, keepdims=False)


def _check_axis(path: Any, x: Any, axis: int) -> None:
    if not -jnp.ndim(x) <= axis < jnp.ndim(x):
        raise NotStackedError(
            f"updates{jax.tree_util.keystr(path)} of shape {jnp.shape(x)} has no axis "
            f"{axis} of elements; pass stacked gradients, as of jax.vmap, or "
            "per_elt_axis=None with an axis_name."
        )


def _groups(found: dict[int, jax.Array]) -> list[list[int]]:
    """Leaves that are laid side by side: the small ones."""
    groups: dict[Any, list[int]] = {}
    for i, x in found.items():
        small = _mesh.is_local(x) and x[0].size < SMALL
        groups.setdefault(str(x.dtype) if small else i, []).append(i)
    return list(groups.values())


def _join(leaves: list[jax.Array]) -> jax.Array:
    """Leaves (rows, ...) side by side, shape (rows, d); a sharded one as it is."""
    if len(leaves) == 1 and not _mesh.is_local(leaves[0]):
        return leaves[0]
    flat = [x.reshape(x.shape[0], math.prod(x.shape[1:])) for x in leaves]
    return flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=1)


def _padded(x: jax.Array, parts: int) -> jax.Array:
    """(rows, d) as (rows, parts, d / parts), filled up with zeros."""
    width = -(-x.shape[1] // parts)
    return jnp.pad(x, ((0, 0), (0, parts * width - x.shape[1]))).reshape(
        x.shape[0], parts, width
    )


def _exchanged(x: jax.Array, axis_name: Any) -> jax.Array:
    """Own rows of all coordinates for all rows of own coordinates, (n, width)."""
    x = _mesh.vary(x, axis_names(axis_name))
    received = lax.all_to_all(x, axis_name, split_axis=1, concat_axis=0, tiled=True)
    return received.reshape(-1, x.shape[-1])


def everywhere(x: jax.Array, axis_name: Any) -> jax.Array:
    """``x`` of every device on every device, alike on all: shape (devices, ...)."""
    x = _mesh.vary(x, axis_names(axis_name))
    namespace: Any = lax
    if not _mesh.varying_axes(x):
        return lax.all_gather(x, axis_name)
    if hasattr(lax, "all_gather_invariant"):  # before jax 0.10
        return namespace.all_gather_invariant(x, axis_name)
    return namespace.all_gather(x, axis_name, to="invarying")


def axis_names(axis_name: Any) -> tuple[Any, ...]:
    return tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)


# A centre: none, a vector in the layout of the rows, or the integer index of a row.
Centre = list[jax.Array] | jax.Array | None


def row_norms(
    rows: list[jax.Array], axis_name: Any = None, centre: Centre = None
) -> jax.Array:
    """``|v_i - z|``, shape (n,); no overflow, no underflow."""
    if not rows:
        return jnp.zeros(0)

    def squares(factors):
        def one(x, z):
            x = _numerics.wide(x) if z is None else _numerics.wide(x) - z[None]
            x = x if factors is None else x * like(factors, x)
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
    shares = everywhere(norms, axis_name).T
    return _numerics.square_roots(
        lambda factors: jnp.sum(
            (shares if factors is None else shares * factors[:, None]) ** 2, axis=1
        )
    )


def _parts(centre: Centre, rows: list[jax.Array]) -> list[Any]:
    """Of every leaf what stands for its centre."""
    return list(centre) if isinstance(centre, list) else [centre] * len(rows)


def combine(
    stack: Stack, weights: jax.Array, factors: jax.Array | None = None
) -> list[jax.Array]:
    """``sum_i w_i (f_i v_i)`` over the valid rows, in float32 or wider.

    Rows get factors, by default 1, where a weight alone would under- or overflow.
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
            x = x * like(factors, x)
        return product(jnp.where(like(stack.valid, x), x, 0))

    def slow(rows):
        return [_by_chunks(without, x).astype(_numerics.wide(x).dtype) for x in rows]

    def quick(rows):
        return [product(x) for x in rows]

    return lax.cond(plain, quick, slow, stack.rows)


def like(per_row: jax.Array, x: jax.Array) -> jax.Array:
    """One number a row, with as many axes as ``x``."""
    return per_row.reshape(-1, *[1] * (x.ndim - 1))


def gram(stack: Stack, scale: jax.Array, centre: Centre = None) -> jax.Array:
    """``<s_i (v_i - z), s_j (v_j - z)>``, shape (n, n), 0 for rows that are not valid.

    Without the centre near-identical rows would cancel.
    """

    def product(x, z):
        x = _numerics.wide(x) if z is None else _numerics.wide(x) - z[None]
        part = like(scale, x) * x
        return _inner(jnp.where(like(stack.valid, x), part, 0))

    products = [
        lax.optimization_barrier(_sum_over_chunks(product, x, part))
        for x, part in zip(stack.rows, _parts(centre, stack.rows), strict=True)
    ]
    return stack.total(functools.reduce(jnp.add, products))


def _chunks(x: jax.Array) -> tuple[int, int]:
    """Number and width of chunks of columns (n, width) that stay in a cache."""
    if not _mesh.is_local(x) or x.size <= CHUNK:
        return 1, 0
    count = -(-x.size // CHUNK)
    return count, -(-x.shape[1] // count)


def _sum_over_chunks(
    f: Callable[[jax.Array, Any], jax.Array], x: jax.Array, centre: Any
) -> jax.Array:
    """The sum of ``f`` over chunks of the columns of ``x`` and their centre."""
    index: Any = centre
    by_row = centre is not None and jnp.issubdtype(centre.dtype, jnp.integer)

    def around(columns, z):
        return f(columns, _row(columns, index) if by_row else z)

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

        return around(cut(x), None if by_row or centre is None else cut(centre))

    like_sum = jax.eval_shape(part, jnp.asarray(0))
    zeros = jnp.zeros(like_sum.shape, like_sum.dtype)
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

    like_part = jax.eval_shape(part, jnp.asarray(0))
    shape = (*like_part.shape[:-1], x.shape[1])
    zeros = _mesh.vary(jnp.zeros(shape, like_part.dtype), _mesh.varying_axes(x))

    def write(i, whole):
        begin = jnp.minimum(i * width, x.shape[1] - width)
        return lax.dynamic_update_slice_in_dim(whole, part(i), begin, whole.ndim - 1)

    return lax.fori_loop(0, count, write, zeros)


def _row(x: jax.Array, i: jax.Array) -> jax.Array:
    return _numerics.wide(lax.dynamic_index_in_dim(x, i, keepdims=False))


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


def nth(values: jax.Array, valid: jax.Array, n: Any) -> jax.Array:
    """Index of the valid value with ``n`` others before it in ascending order.

    The last one where there are no more.
    """
    order = jnp.argsort(jnp.where(valid, values, jnp.inf))
    return order[jnp.clip(n, 0, jnp.maximum(jnp.sum(valid) - 1, 0))]


def middle(values: jax.Array, valid: jax.Array) -> jax.Array:
    """Index of the (lower) median of the valid values."""
    return nth(values, valid, (jnp.sum(valid) - 1) // 2)


def rank_weighted(stack: Stack, weights: jax.Array) -> list[jax.Array]:
    """``sum_k w_k v_(k)`` coordinate by coordinate, ``v_(k)`` the k-th smallest.

    Rows that are not valid come last.
    """

    def one(x):
        if jnp.iscomplexobj(x):
            raise ValueError("complex numbers have no order; use geometric_median.")
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
        keeps_low = like(partner >= jnp.arange(len(rows)), x)
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
