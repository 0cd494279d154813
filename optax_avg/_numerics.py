"""Norms, sums and counters that neither overflow nor lose digits."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import core, lax
from jax.typing import ArrayLike, DTypeLike

from optax_avg import _mesh


def float32_or_wider(dtype: Any) -> Any:
    """The dtype in which sums over this one are taken."""
    # JAX does not promote floats of 8 bits and fewer.
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16:
        return jnp.dtype(jnp.float32)
    return jnp.promote_types(dtype, jnp.float32)


def copy_as(x: Any, dtype: Any = None) -> jax.Array:
    """A copy in ``dtype`` (by default float32 or wider), never an alias.

    Complex leaves stay complex, in complex64 at least.
    """
    x = jnp.asarray(x)
    if dtype is None or jnp.iscomplexobj(x):
        dtype = jnp.promote_types(float32_or_wider(x.dtype), dtype or jnp.float32)
    return jnp.array(x, dtype=dtype, copy=True)


def zeros_like(x: Any, dtype: Any = None) -> jax.Array:
    """Zeros (by default float32 or wider) that lie on the devices where ``x`` lies."""
    dtype = float32_or_wider(jnp.result_type(x)) if dtype is None else dtype
    if not isinstance(x, core.Tracer):
        return jnp.zeros_like(x, dtype)
    # Under jit a constant lies whole on every device; what depends on x lies as x does.
    never = jnp.isfinite(x) & jnp.isnan(x)
    return never.astype(dtype)


def hessian_product(
    gradient: Callable[[optax.Params], optax.Updates],
    x: optax.Params,
    v: optax.Params,
    instead: str = "",
) -> Any:
    """``H(x) v``, the forward derivative of the gradient at ``x`` along ``v``.

    Args:
      gradient: Function from a tree like ``x`` to the gradient there.
      x: Point at which the Hessian is taken.
      v: Direction, a tree like ``x`` in any float dtype. None stands for zero.
      instead: What to use instead if there is no forward derivative, for the message.

    Returns:
      A tree like the gradient.

    Raises:
      TypeError: If the gradient has no forward derivative. Under ``jax.jit`` JAX
        itself raises, when it compiles.
    """
    leaves, structure = jax.tree.flatten(x)
    directions = structure.flatten_up_to(v)
    moving = [i for i, d in enumerate(directions) if d is not None]

    def gradient_at(values):
        changed = list(leaves)
        for i, value in zip(moving, values, strict=True):
            changed[i] = value
        return gradient(structure.unflatten(changed))

    tangents = [directions[i].astype(leaves[i].dtype) for i in moving]
    # Inside shard_map a local direction makes the point local too.
    point = [
        _mesh.vary(leaves[i], _mesh.varying_axes(d))
        for i, d in zip(moving, tangents, strict=True)
    ]
    try:
        return jax.jvp(gradient_at, (point,), (tangents,))[1]
    except (TypeError, ValueError, NotImplementedError) as error:
        if "jvp" not in str(error).lower() and "Differentiation" not in str(error):
            raise
        way = f", or take {instead}" if instead else ""
        raise TypeError(
            "a product with the Hessian is the forward derivative of the gradient, and "
            "something in the gradient has none: often the fwd of a jax.custom_vjp "
            "that calls the function itself, or a kernel or callback. Call the plain "
            f"function in fwd, write jax.custom_jvp{way}. JAX says: {error}"
        ) from error


def wide(x: jax.Array) -> jax.Array:
    """``x`` in float32 or wider."""
    return x.astype(float32_or_wider(x.dtype))


def step_to(target: jax.Array, x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The update that leads from ``x`` to ``target``, rounded to ``dtype`` once."""
    return (wide(target) - wide(x)).astype(dtype)


def ratio_of_deviations(
    wanted: jax.Array, got: jax.Array, largest: jax.Array
) -> jax.Array:
    """``sqrt(wanted/got)`` of two variances.

    It is 1 where ``got`` may come from the rounding of numbers of square ``largest``.
    """
    rounding = 4 * jnp.finfo(got.dtype).eps
    seen = got > rounding**2 * largest
    ratio = jnp.where(seen, wanted / jnp.where(seen, got, 1), 1)
    return jnp.sqrt(jnp.maximum(ratio, 0))


def join_small(
    leaves: list[jax.Array],
) -> tuple[list[jax.Array], Callable[[list[jax.Array]], list[jax.Array]]]:
    """Small leaves of a dtype as one vector, and the way back.

    A thousand leaves take minutes to compile where each one is reduced.
    """
    groups: dict[Any, list[int]] = {}
    for i, x in enumerate(leaves):
        small = x.size < 2**12 and _mesh.is_local(x)
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


def dtype_of_norms(tree: Any) -> Any:
    """The dtype of :func:`norm` of a tree: float32, or float64 if a leaf is wider."""
    wides = [float32_or_wider(jnp.result_type(x)) for x in jax.tree.leaves(tree)]
    return jnp.finfo(jnp.result_type(jnp.float32, *wides)).dtype


def widen(x: jax.Array) -> jax.Array:
    """``x`` in float32 or wider, with exactly the value that it was rounded to.

    Without the barrier XLA may keep a bf16 value in float32 under jit.
    """
    if float32_or_wider(x.dtype) == x.dtype:
        return x
    return wide(lax.optimization_barrier(x))


def sum_and_error(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``a + b`` and what rounding took from it (Knuth's exact sum)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def count_if(condition: jax.Array, counter: jax.Array) -> jax.Array:
    """One more where the condition holds; never overflows."""
    return jnp.where(condition, optax.safe_increment(counter), counter)


def step_of(t: Any, dt: Any, first: Any = 0) -> jax.Array:
    """The optimizer step ``first + (t - 1) dt`` of iterate ``t``, int32, for schedules.

    It stops at the largest integer.
    """
    number = jnp.asarray(jnp.minimum(t, 2.0**31 - 128), jnp.int32) - 1
    room = (jnp.iinfo(jnp.int32).max - first) // dt
    return jnp.asarray(first + jnp.minimum(number, room) * dt, jnp.int32)


def advance_clock(counter: jax.Array, stride: ArrayLike = 1) -> jax.Array:
    """One more; at the largest integer it goes back by ``stride`` instead.

    What is due every ``stride`` counts so stays due every ``stride`` counts.
    """
    last = jnp.iinfo(counter.dtype).max
    back = jnp.asarray(last - (stride - 1), counter.dtype)
    return jnp.where(counter < last, optax.safe_increment(counter), back)


def common_multiple(a: Any, b: Any) -> Any:
    """One of two strides, the least if both are known; as large as a counter can be."""
    most = int(jnp.iinfo(jnp.int32).max)
    if isinstance(a, int) and isinstance(b, int):
        return min(math.lcm(a, b), most)
    a, b = jnp.asarray(a, jnp.int32), jnp.asarray(b, jnp.int32)
    return jnp.where(a > most // b, most, a * b)


def all_finite(tree: optax.Params) -> jax.Array:
    """Whether every element of every leaf is finite, also across ``shard_map``."""
    return _mesh.agreed(all_finite_here(tree))


def all_finite_here(tree: optax.Params) -> jax.Array:
    """Whether every element is finite that this device of ``shard_map`` holds."""
    leaves = [x for x in jax.tree.leaves(tree) if x.size]
    if not leaves:
        return jnp.asarray(True)
    if all(jax.typeof(x).sharding.mesh.empty for x in leaves):
        return lax.platform_dependent(
            *leaves, cpu=_all_finite_on_cpu, default=_all_finite
        )
    return _all_finite(*leaves)


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


def norm(tree: optax.Params) -> jax.Array:
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
    factors = factors.astype(plain.dtype)  # or a narrow leaf would not hold them
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


def order_statistic(leaves: list[jax.Array], below: int | jax.Array) -> jax.Array:
    """The value that stands after ``below`` others in ascending order; exact.

    Bits of non-negative floats are ordered as the floats are, so that the answer is
    found bit by bit, by counting, with no copy of the leaves.
    """
    dtype = jnp.result_type(jnp.float32, *leaves)
    integer = jnp.int64 if jnp.finfo(dtype).bits == 64 else jnp.int32
    as_float = lambda bits: lax.bitcast_convert_type(bits, dtype)
    counts = lambda bits: sum([jnp.sum(leaf < as_float(bits)) for leaf in leaves], 0)
    return as_float(_largest(lambda bits: counts(bits) <= below, integer, leaves))


def ranked_after(leaves: list[jax.Array], below: int | jax.Array) -> list[jax.Array]:
    """Marks all elements but the ``below`` smallest; exact.

    Of equal elements those count as smaller that stand first: in an earlier leaf, or
    earlier in the same one.
    """
    threshold = order_statistic(leaves, below)
    ties = [leaf == threshold for leaf in leaves]
    left = below - sum([jnp.sum(leaf < threshold) for leaf in leaves], 0)
    marks = []
    for leaf, tied in zip(leaves, ties, strict=True):
        places = place(leaf.shape)
        before = lambda i, tied=tied, places=places: jnp.sum(tied & (places < i))
        first = _largest(lambda i, n=left, f=before: f(i) <= n, jnp.int32, [leaf])
        marks.append((leaf > threshold) | (tied & (places >= first)))
        left = jnp.maximum(left - jnp.sum(tied), 0)
    return marks


def _largest(holds: Callable[[Any], Any], integer: Any, like: Any) -> jax.Array:
    """The largest non-negative integer for which a condition holds, bit by bit."""
    bits = jnp.iinfo(integer).bits - 1

    def lower_bit(i, found):
        higher = found | (jnp.ones([], integer) << (bits - 1 - i))
        return jnp.where(holds(higher), higher, found)

    axes = tuple({name for leaf in like for name in _mesh.varying_axes(leaf)})
    return lax.fori_loop(0, bits, lower_bit, _mesh.vary(jnp.zeros([], integer), axes))


def place(shape: tuple[int, ...], dtype: DTypeLike = jnp.int32) -> jax.Array:
    """The place of every element in its leaf, in row-major order.

    Args:
      shape: Shape of the leaf.
      dtype: An integer dtype, in which the place is taken modulo its range.
    """
    found, stride = jnp.zeros(shape, dtype), 1
    for axis in reversed(range(len(shape))):
        step = np.asarray(stride).astype(dtype)
        found += step * lax.broadcasted_iota(dtype, shape, axis)
        stride *= shape[axis]
    return found


def dot(a: optax.Params, b: optax.Params) -> jax.Array:
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
    return _divided(tree, norm(tree))


def _divided(tree: Any, n: jax.Array) -> Any:
    """``v/n`` in the dtypes of ``v``; ``v`` at ``n = 0``."""
    # Among float64 leaves the norm is wider than a narrow leaf.
    return jax.tree.map(lambda v: (v / jnp.where(n > 0, n, 1)).astype(v.dtype), tree)


def project_out(v: Any, w: Any) -> Any:
    """The part of ``v`` orthogonal to ``w``, ``v - (v.w/|w|^2) w``; ``v`` if w is 0."""
    square, product = dot(w, w), dot(v, w)  # over devices these are one sum
    info = jnp.finfo(square.dtype)
    safe = lambda x: (x > info.tiny / info.eps) & (x < info.max)

    def quick():
        n = jnp.sqrt(square)
        return product / n, n

    def scaled():
        n = norm(w)
        return dot(v, _divided(w, n)), n

    both = safe(square) & safe(jnp.abs(product))
    along, n = lax.cond(both, quick, scaled)
    return jax.tree.map(lambda v, u: (v - along * u).astype(v.dtype), v, _divided(w, n))
