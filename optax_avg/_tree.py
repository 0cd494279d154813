"""The pytree helpers that more than one module needs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

# A tree of bools like (a prefix of) params, or a predicate on (key_path, leaf).
Where = Callable[[Any, Any], Any] | Any


def is_masked(node: Any) -> bool:
    """Whether a node is Optax's placeholder for a leaf that is left out."""
    return isinstance(node, optax.MaskedNode)


def is_absent(node: Any) -> bool:
    """Whether there is no array: None, or left out."""
    return node is None or is_masked(node)


def is_float(leaf: Any) -> bool:
    """Whether a leaf can be averaged: real or complex floating point."""
    dtype = getattr(leaf, "dtype", None)
    return jnp.issubdtype(
        jnp.result_type(leaf) if dtype is None else dtype, jnp.inexact
    )


def float32_or_wider(dtype: Any) -> Any:
    """The dtype in which sums over this one are taken."""
    return jnp.promote_types(dtype, jnp.float32)


def copy_as(x: Any, dtype: Any = None) -> jax.Array:
    """A copy in ``dtype`` (by default float32 or wider), never an alias."""
    x = jnp.asarray(x)
    if dtype is None or jnp.iscomplexobj(x):
        dtype = float32_or_wider(x.dtype)
    return jnp.array(x, dtype=dtype, copy=True)


def require_params(name: str, params: Any) -> None:
    """Raises if ``update`` was called without the parameters."""
    if params is None:
        raise ValueError(
            f"{name} needs the parameters; call tx.update(updates, state, params)."
        )


def select(tree: Any, where: Where | None) -> Any:
    """Keeps the float leaves inside ``where``; the others become ``MaskedNode``."""
    if not jax.tree.leaves(tree):
        return tree

    def keep(leaf):
        return leaf if is_float(leaf) else optax.MaskedNode()

    if where is None:
        return jax.tree.map(keep, tree)
    if callable(where):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: keep(leaf) if where(path, leaf) else optax.MaskedNode(),
            tree,
        )
    return jax.tree.map(
        lambda inside, part: jax.tree.map(
            keep if inside else lambda _: optax.MaskedNode(), part
        ),
        where,
        tree,
    )


def zeros_like_wide(tree: Any) -> Any:
    """Zeros in float32 or wider for float leaves, ``MaskedNode`` for the others."""
    return jax.tree.map(
        lambda x: jnp.zeros_like(wide(jnp.asarray(x))), select(tree, None)
    )


def align(tree: Any, params: Any) -> list[Any]:
    """Leaves of ``tree`` in the order of those of ``params``, None at ``MaskedNode``.

    A ``MaskedNode`` may stand for a whole subtree, and containers may differ (Flax nnx
    wraps the leaves in another variable type) where the leaves match one to one.

    Raises:
      ValueError: If leaves do not match, naming the first offending one.
    """
    values, structure = jax.tree.flatten(tree, is_leaf=is_masked)
    try:
        parts = structure.flatten_up_to(params)
    except (ValueError, TypeError):
        parts = jax.tree.leaves(params)
    sizes = [len(jax.tree.leaves(part)) for part in parts]
    aligned = []
    for value, size in zip(values, sizes, strict=False):
        aligned += [None] * size if is_masked(value) else [value]
    paths = jax.tree.flatten_with_path(params)[0]
    if len(values) != len(parts) or len(aligned) != len(paths):
        raise ValueError(
            f"params has {len(paths)} leaves and the average {len(values)}; pass the "
            "parameters that are trained."
        )
    for value, (path, leaf) in zip(aligned, paths, strict=True):
        if value is not None and value.shape != jnp.shape(leaf):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)} and "
                f"its average {value.shape}; pass the parameters that are trained."
            )
    return aligned


def new_iterate(params: Any, updates: Any) -> Any:
    """``x_t = params + updates`` as training will hold it, rounding included."""

    def one(x, u):
        return x if u is None or not is_float(x) else optax.apply_updates(x, u)

    return jax.tree.map(one, params, updates)


def wide(x: jax.Array) -> jax.Array:
    """``x`` in float32 or wider."""
    return x.astype(float32_or_wider(x.dtype))


def is_local(x: jax.Array) -> bool:
    """Whether reshaping moves nothing between devices."""
    return bool(jax.typeof(x).sharding.mesh.empty) or bool(
        jax.sharding.get_abstract_mesh().manual_axes
    )


def join_small(
    leaves: list[jax.Array],
) -> tuple[list[jax.Array], Callable[[list[jax.Array]], list[jax.Array]]]:
    """Small leaves of a dtype as one vector, and the way back.

    A thousand leaves take minutes to compile where each one is reduced.
    """
    groups: dict[Any, list[int]] = {}
    for i, x in enumerate(leaves):
        small = x.size < 2**12 and is_local(x)
        groups.setdefault(x.dtype if small else i, []).append(i)

    def joined(group):
        if len(group) == 1:
            return leaves[group[0]]
        return jnp.concatenate([leaves[i].reshape(-1) for i in group])

    def split(parts):
        out: dict[int, jax.Array] = {}
        for group, part in zip(groups.values(), parts, strict=True):
            begin = 0
            for i in group:
                size = leaves[i].size
                own = part if len(group) == 1 else part[begin : begin + size]
                out[i] = own.reshape(leaves[i].shape)
                begin += size
        return [out[i] for i in range(len(leaves))]

    return [joined(group) for group in groups.values()], split


def widen(x: jax.Array) -> jax.Array:
    """``x`` in float32 or wider, with exactly the value that it was rounded to.

    Without the barrier XLA may keep a bf16 value in float32 under jit.
    """
    if float32_or_wider(x.dtype) == x.dtype:
        return x
    return wide(lax.optimization_barrier(x))


def count_if(condition: jax.Array, counter: jax.Array) -> jax.Array:
    """One more where the condition holds; never overflows."""
    return jnp.where(condition, optax.safe_increment(counter), counter)


def all_finite(tree: Any) -> jax.Array:
    """Whether every element of every leaf is finite, also across ``shard_map``."""
    leaves = [x for x in jax.tree.leaves(tree) if x.size]
    if not leaves:
        return jnp.asarray(True)
    if all(jax.typeof(x).sharding.mesh.empty for x in leaves):
        finite = lax.platform_dependent(
            *leaves, cpu=_all_finite_on_cpu, default=_all_finite
        )
    else:
        finite = _all_finite(*leaves)
    return agreed(finite)


def agreed(condition: jax.Array) -> jax.Array:
    """Whether it holds on all devices of ``shard_map`` over which it differs."""
    axes = varying_axes(condition)
    return lax.pmin(condition.astype(jnp.int32), axes) > 0 if axes else condition


def _all_finite(*leaves: jax.Array) -> jax.Array:
    """The sum of ``0 x`` is 0 if every element of ``x`` is finite, NaN otherwise.

    A maximum would not do: on large vectors XLA's CPU backend loses a NaN in it.
    """
    return _all_zero([jnp.sum(0 * x) for x in leaves])


def _all_finite_on_cpu(*leaves: jax.Array) -> jax.Array:
    """The same, for a backend that sums on one core and compiles sums slowly."""
    sums: list[jax.Array] = []
    alike: dict[Any, list[jax.Array]] = {}
    for x in leaves:
        if x.ndim > 1 and x.size >= 2**18 and x.dtype == jnp.float32:
            zeros = lax.optimization_barrier(jnp.zeros(x.shape[-1]))
            sums.append(jnp.sum(jnp.tensordot(x, zeros, axes=1)))  # on all cores
        elif x.size < 2**12:  # sums of scalars take minutes to compile
            alike.setdefault(x.dtype, []).append(x.reshape(-1))
        else:
            alike.setdefault((x.shape, x.dtype), []).append(0 * x)
    for kind, group in alike.items():
        add = functools.partial(functools.reduce, jnp.add)
        join = lambda vectors: 0 * jnp.concatenate(vectors)
        together = add if isinstance(kind, tuple) else join
        batches = [group[i : i + 16] for i in range(0, len(group), 16)]
        sums += [jnp.sum(together(batch)) for batch in batches]
    return _all_zero(sums)


def _all_zero(sums: list[jax.Array]) -> jax.Array:
    # Without the barrier XLA fuses a thousand reductions into one kernel.
    return jnp.all(jnp.stack([lax.optimization_barrier(s) == 0 for s in sums]))


def varying_axes(x: jax.Array) -> tuple[str, ...]:
    """Mesh axes over which ``x`` differs inside ``shard_map(check_vma=True)``."""
    kind: Any = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):
        return tuple(kind.manual_axis_type.varying)
    return tuple(getattr(kind, "vma", ()))  # before jax 0.10


def vary(x: Any, axes: tuple[str, ...]) -> Any:
    """A value that is replicated over axes of ``shard_map`` as each device's own."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    have = varying_axes(x)
    missing = tuple(name for name in axes if name in manual and name not in have)
    if not missing:
        return x
    namespace: Any = lax
    if hasattr(lax, "pcast"):
        return namespace.pcast(x, missing, to="varying")
    return namespace.pvary(x, missing)  # before jax 0.9


def over(f: Callable[..., Any], params: Any, *trees: Any) -> Any:
    """Maps leaves that have a float gradient in all ``trees``; None elsewhere."""

    def one(_, *leaves):
        missing = any(leaf is None or not is_float(leaf) for leaf in leaves)
        return None if missing else f(*leaves)

    return jax.tree.map(one, params, *trees, is_leaf=lambda leaf: leaf is None)


def norm(tree: Any) -> jax.Array:
    """Euclidean norm over all leaves in float32 or wider; no overflow, no underflow."""
    leaves = jax.tree.leaves(tree)
    return norms([leaves])[0] if leaves else jnp.zeros([])


def norms(groups: list[list[jax.Array]]) -> jax.Array:
    """The norm of each group of leaves, 0 of an empty one."""
    groups = [[wide(x) for x in group] for group in groups]

    def squares(factors):
        if factors is None:
            return _sums_of_squares(groups)
        moved = [[x * factors[i] for x in group] for i, group in enumerate(groups)]
        return _sums_of_squares(moved)

    return square_roots(squares)


def square_roots(squares: Callable[[Any], jax.Array]) -> jax.Array:
    """Norms from ``squares(factors)``, sums of squares of what is scaled by factors."""
    plain = squares(None)
    info = jnp.finfo(plain.dtype)
    # A power of two that brings squares out of reach into the middle of the range.
    far = 2.0 ** round(0.7 * float(info.maxexp))
    safe = (plain > info.tiny / info.eps) & (plain < info.max)
    factors = jnp.where(safe, 1, jnp.where(plain < 1, far, 1 / far))
    scaled = lambda: jnp.sqrt(squares(factors)) / factors
    return lax.cond(jnp.all(safe), lambda: jnp.sqrt(plain), scaled)


def _sums_of_squares(groups: list[list[jax.Array]]) -> jax.Array:
    sums = [_sum_of_squares(group) if group else jnp.zeros([]) for group in groups]
    if len(sums) > 1:  # or XLA fuses a thousand reductions into one kernel
        sums = [lax.optimization_barrier(s) for s in sums]
    return jnp.stack(sums) if sums else jnp.zeros(0)


def _sum_of_squares(leaves: list[jax.Array]) -> jax.Array:
    sums = [jnp.sum(jnp.real(x * jnp.conj(x))) for x in leaves]
    if len(sums) > 64:  # or XLA fuses a thousand reductions into one kernel
        return jnp.sum(jnp.stack([lax.optimization_barrier(s) for s in sums]))
    return jnp.asarray(sum(sums))


def order_statistic(leaves: list[jax.Array], below: Any) -> jax.Array:
    """The value that stands after ``below`` others in ascending order; exact.

    Bits of non-negative floats are ordered as the floats are, so that the answer is
    found bit by bit, by counting, with no copy of the leaves.
    """
    dtype = jnp.result_type(jnp.float32, *leaves)
    integer = jnp.int64 if jnp.finfo(dtype).bits == 64 else jnp.int32
    as_float = lambda bits: lax.bitcast_convert_type(bits, dtype)

    def lower_bit(i, bits):
        higher = bits | (jnp.ones([], integer) << (jnp.iinfo(integer).bits - 2 - i))
        counts = [jnp.sum(leaf < as_float(higher)) for leaf in leaves]
        return jnp.where(sum(counts, 0) <= below, higher, bits)

    axes = tuple({name for leaf in leaves for name in varying_axes(leaf)})
    start = vary(jnp.zeros([], integer), axes)
    return as_float(lax.fori_loop(0, jnp.iinfo(integer).bits - 1, lower_bit, start))


def dot(a: Any, b: Any) -> jax.Array:
    """Inner product over all leaves in float32 or wider."""
    products = jax.tree.map(
        lambda x, y: jnp.sum(jnp.real(wide(x) * jnp.conj(wide(y)))), a, b
    )
    return jnp.asarray(sum(jax.tree.leaves(products), 0.0))


def scale(factor: Any, tree: Any) -> Any:
    """``factor`` times every leaf."""
    return jax.tree.map(lambda x: factor * x, tree)


def add(a: Any, b: Any) -> Any:
    """Leafwise sum."""
    return jax.tree.map(jnp.add, a, b)


def unit(tree: Any) -> Any:
    """``v/|v|`` over all leaves, 0 at 0."""
    n = norm(tree)
    return jax.tree.map(lambda v: v / jnp.where(n > 0, n, 1), tree)


def project_out(v: Any, w: Any) -> Any:
    """The part of ``v`` orthogonal to ``w``, ``v - (v.w/|w|^2) w``; ``v`` if w is 0."""
    u = unit(w)
    along = dot(v, u)
    return jax.tree.map(lambda v, u: v - along * u, v, u)


def check_every(every: Any, start: Any) -> None:
    """Raises unless ``every >= 1`` and ``start >= 0``; arrays are not checked."""
    check_integer("every", every, 1)
    check_integer("start", start, 0)


def check_integer(name: str, value: Any, low: int) -> None:
    """Raises unless ``value`` is an integer from ``low`` on; arrays are not checked."""
    if isinstance(value, jax.Array):  # traced ones too
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}.")


def within(
    name: str,
    value: Any,
    low: float,
    high: float,
    open_low: bool = False,
    closed_high: bool = True,
) -> Any:
    """A Python number as a float after the range check; an array as float32."""
    if not isinstance(value, (int, float, np.number)) or isinstance(value, bool):
        if isinstance(value, (jax.Array, np.ndarray)):
            return value.astype(jnp.promote_types(value.dtype, jnp.float32))
        raise ValueError(f"{name} must be a number, got {value!r}.")
    value = float(value)
    above = value > low if open_low else value >= low
    below = value <= high if closed_high else value < high
    if not (above and below):
        left, right = "(" if open_low else "[", "]" if closed_high else ")"
        raise ValueError(
            f"{name} must lie in {left}{low:g}, {high:g}{right}, got {value:g}."
        )
    return value
