"""One step of a running average on a tree, in four roundings.

    a <- a + w (x - a)

Two things are decided element by element, in the same pass. Where ``skip`` is set, an
element of the iterate that is not finite is left out: the average stays as it is. An
element of the average that is not finite is replaced by the iterate's: always where
``skip`` is set, otherwise by the first iterate (``first``), which meets what the
average starts from.
"""

import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import DTypeLike

from optax_avg import _numerics
from optax_avg.averages import _dither

# Whether elements that are not finite are left out; False if they never are.
Skip = jax.Array | Literal[False]


def nearest(
    w: jax.Array, x: optax.Params, a: optax.Params, first: jax.Array, skip: Skip
) -> optax.Params:
    """The step, rounded to nearest."""
    one = _nearest if skip is False else _nearest_or_left
    return jax.tree.map(lambda a, x: one(w, x, a, first, skip), a, x)


def _rounded(
    w: jax.Array, x: jax.Array, a: jax.Array, first: jax.Array, skip: Skip
) -> jax.Array:
    return _lerp(w, x, a, first, skip).astype(a.dtype)


# Leaves of one shape are traced once: a thousand of them are a thousand calls.
_nearest_or_left = jax.jit(_rounded)
_nearest = jax.jit(_rounded, static_argnames="skip")


def stochastic(
    w: jax.Array,
    x: Any,
    a: Any,
    first: jax.Array,
    skip: Skip,
    name: str,
    step: jax.Array,
) -> Any:
    """The step, rounded up or down at random so that the mean is exact.

    The random bits are a function of ``step``, the average's name and the leaf's path.
    """
    old, structure = jax.tree.flatten_with_path(a)
    seeds = jnp.asarray([_seed(name, path) for path, _ in old], jnp.uint32)
    key = jax.random.fold_in(jax.random.key(0), step)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, seeds)
    one = _stochastic if skip is False else _stochastic_or_left
    new = [
        one(w, x, a, first, skip, key)
        for (_, a), x, (key,) in zip(
            old, structure.flatten_up_to(x), _for_leaves(step, keys), strict=True
        )
    ]
    return structure.unflatten(new)


def _at_random(
    w: jax.Array,
    x: jax.Array,
    a: jax.Array,
    first: jax.Array,
    skip: Skip,
    key: jax.Array,
) -> jax.Array:
    return _round_at_random(_lerp(w, x, a, first, skip), a.dtype, key)


_stochastic_or_left = jax.jit(_at_random)
_stochastic = jax.jit(_at_random, static_argnames="skip")


def dithered(
    w: jax.Array,
    x: Any,
    a: Any,
    first: jax.Array,
    skip: Skip,
    name: str,
    absorbed: jax.Array,
) -> Any:
    """The step, rounded up or down as the sequence of :mod:`_dither` says.

    The sequence is a function of ``absorbed``, the average's name, the leaf's path and
    the element's place in the leaf.
    """
    old, structure = jax.tree.flatten_with_path(a)
    seeds = jnp.asarray([_seed(name, path) for path, _ in old], jnp.uint32)
    times = jax.vmap(_dither.digits_of_time, in_axes=(None, 0))(absorbed, seeds)
    one = _dithered if skip is False else _dithered_or_left
    new = [
        one(w, x, a, first, skip, time, seed)
        for (_, a), x, (time, seed) in zip(
            old,
            structure.flatten_up_to(x),
            _for_leaves(absorbed, times, seeds),
            strict=True,
        )
    ]
    return structure.unflatten(new)


def _raised(
    w: jax.Array,
    x: jax.Array,
    a: jax.Array,
    first: jax.Array,
    skip: Skip,
    time: jax.Array,
    seed: jax.Array,
) -> jax.Array:
    u = time ^ _dither.digits_of_place(a.shape, seed)
    return _dither.raise_and_cut(_lerp(w, x, a, first, skip), a.dtype, u)


_dithered_or_left = jax.jit(_raised)
_dithered = jax.jit(_raised, static_argnames="skip")


def compensated(
    w: jax.Array, x: Any, a: Any, c: Any, first: jax.Array, skip: Skip
) -> tuple[Any, Any]:
    """The step on the unevaluated sum ``a + c``, ``c`` holding what rounding took.

    ``y = c + w ((x - a) - c)``, ``a' = a + y``, ``c' = y - (a' - a)`` (Kahan).
    """

    def one(a, c, x):
        wide, x = _wide(a, x)
        # Where x replaces a + c, the same lines start from 0 + x.
        stays = _left_out(x, skip)
        replaced = _replaced(w, a, first, skip) & jnp.logical_not(stays)
        a_wide = jnp.where(replaced, 0, a.astype(wide))
        y = c.astype(wide)
        moved = jnp.where(replaced, x, y + w * ((x - a_wide) - y))
        y = jnp.where(stays, y, moved)
        new = (a_wide + y).astype(a.dtype)
        return new, (y - (new.astype(wide) - a_wide)).astype(c.dtype)

    old, structure = jax.tree.flatten(a)
    pairs = [
        one(a, c, x)
        for a, c, x in zip(
            old, structure.flatten_up_to(c), structure.flatten_up_to(x), strict=True
        )
    ]
    return (
        structure.unflatten([a for a, _ in pairs]),
        structure.unflatten([c for _, c in pairs]),
    )


def _seed(name: str, path: Any = ()) -> int:
    """A number below 2^32 for a leaf of an average."""
    return zlib.crc32(f"{name}{jax.tree_util.keystr(path)}".encode())


def _for_leaves(step: jax.Array, *values: jax.Array) -> list[tuple[jax.Array, ...]]:
    """Scalars for each leaf, from arrays of shape (leaves,).

    Were they constants, or computed where they are used, the code of each leaf would be
    another. XLA compiles one code for leaves of one shape if these numbers come out of
    a branch. The other branch is never taken, because no step is negative.
    """
    leaves = range(len(values[0]))

    def apart() -> list[tuple[jax.Array, ...]]:
        return [tuple(x[i] for x in values) for i in leaves]

    def never() -> list[tuple[jax.Array, ...]]:
        return [tuple(x[0] for x in values)] * len(leaves)

    return lax.cond(step >= 0, apart, never)


def _lerp(
    w: jax.Array, x: jax.Array, a: jax.Array, first: jax.Array, skip: Skip
) -> jax.Array:
    wide, x = _wide(a, x)
    a_wide = a.astype(wide)
    x = jnp.where(_left_out(x, skip), a_wide, x)  # a + w (a - a) is a
    # a + (x - a) is not x in floating point, and keeps a NaN of a.
    return jnp.where(_replaced(w, a, first, skip), x, a_wide + w * (x - a_wide))


def _left_out(x: jax.Array, skip: Skip) -> jax.Array | Literal[False]:
    """Where the average stays as it is."""
    return False if skip is False else ~(jnp.isfinite(x) | ~skip)


def _replaced(w: jax.Array, a: jax.Array, first: jax.Array, skip: Skip) -> jax.Array:
    """Where the result is the iterate itself, if it is not left out."""
    broken = ~jnp.isfinite(a)
    return (w >= 1) | (broken if skip is not False else first & broken)


def _wide(a: jax.Array, x: jax.Array) -> tuple[Any, jax.Array]:
    x = _numerics.widen(x)
    wide = jnp.promote_types(_numerics.float32_or_wider(a.dtype), x.dtype)
    return wide, x.astype(wide)


def _round_at_random(x: jax.Array, dtype: DTypeLike, key: jax.Array) -> jax.Array:
    """Rounds to one of the two neighbours in ``dtype``, the nearer one more often."""
    if x.dtype == dtype:  # so for complex leaves, which have no narrow dtype
        return x
    near = x.astype(dtype)
    error = x - near.astype(x.dtype)
    towards = jnp.where(error < 0, -jnp.inf, jnp.inf).astype(dtype)
    far = jnp.nextafter(near, towards)
    gap = far.astype(x.dtype) - near.astype(x.dtype)
    p = jnp.where(error == 0, 0, error / gap)
    return jnp.where(jax.random.uniform(key, x.shape, p.dtype) < p, far, near)
