"""Means on the sphere: each leaf is a direction times a norm.

x_t = |x_t| u_t,    u on the sphere between the u_t
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_avg import _checks, _numerics
from optax_avg.merging._slices import Products, cosines, joined_products, products
from optax_avg.merging.trees import (
    Rule,
    Slices,
    Weights,
    checked_weights,
    merged,
    total,
    weighted_sum,
)

__all__ = ["karcher", "karcher_rule", "slerp", "slerp_rule"]


def slerp(a: optax.Params, b: optax.Params, t: float) -> optax.Params:
    """A point on the arc between two models, leaf by leaf.

    ``(sin((1 - t) w) a + sin(t w) b)/sin w`` with the angle ``w`` between their
    directions. If they are nearly parallel or opposite, it is a point on the straight
    line.

    Args:
      a: Tree that is the result at ``t = 0``.
      b: Tree of the same structure that is the result at ``t = 1``.
      t: Position on the arc.

    Returns:
      A tree like ``a``.

    Raises:
      ValueError: If the models differ.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> oa.merging.slerp(jnp.array([2.0, 0.0]), jnp.array([0.0, 2.0]), 0.5).tolist()
      [1.4142135381698608, 1.4142135381698608]

    References:
      Shoemake, "Animating Rotation with Quaternion Curves", 1985.
    """
    return merged(slerp_rule(t), [a, b])


def slerp_rule(t: float) -> Rule:
    """A point on the arc between one leaf of two models."""

    def find(slices: Slices) -> tuple[jax.Array, jax.Array]:
        sizes = total(slices, products, joined_products)
        norms, _ = cosines(sizes)
        # Half chords give small angles exactly, cosines do not.
        apart, along = total(
            slices, lambda xs: _chords(sizes.units, norms, xs), _numerics.add
        )
        w = 2 * jnp.arctan2(jnp.sqrt(apart), jnp.sqrt(along))
        sine = jnp.sin(w)
        straight = (sine < 1e-3) | jnp.any(norms == 0)
        sine = jnp.where(straight, 1, sine)
        p = jnp.where(straight, 1 - t, jnp.sin((1 - t) * w) / sine)
        q = jnp.where(straight, t, jnp.sin(t * w) / sine)
        return p, q

    def combine(found: tuple[jax.Array, jax.Array], xs: list[jax.Array]) -> jax.Array:
        p, q = found
        # If the models are nearly opposite, the terms are far larger than their sum.
        most = jnp.maximum(1, jnp.maximum(jnp.abs(p), jnp.abs(q)))
        return most * weighted_sum([p / most, q / most], xs)

    return Rule(combine, find)


@jax.jit
def _chords(
    units: jax.Array, norms: jax.Array, xs: list[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """``|u - v|^2`` and ``|u + v|^2`` of the directions of two vectors."""
    u, v = (
        x / unit / jnp.where(norm > 0, norm, 1)
        for x, unit, norm in zip(xs, units, norms, strict=True)
    )
    return jnp.sum(jnp.abs(u - v) ** 2), jnp.sum(jnp.abs(u + v) ** 2)


def karcher(
    models: Sequence[optax.Params],
    weights: Weights | None = None,
    *,
    num_iters: int = 20,
) -> optax.Params:
    """The mean direction on the sphere, times the mean norm, leaf by leaf.

    ``u <- exp_u(sum_i w_i log_u(u_i))`` starts from the normalised mean. With two
    models the result is a point on their arc. Directions have no mean if they cancel,
    or if one is opposite to the mean of all. The result is then the weighted mean of
    the models, as it is for a leaf with one element.

    Args:
      models: Trees of one structure.
      weights: One weight for each model, not negative, of sum one; by default all are
        equal.
      num_iters: Number of iterations, each on one coefficient for each model.

    Returns:
      A tree like the first.

    Raises:
      ValueError: If the models differ, a weight is negative, or the weights do not
        sum to one.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> models = [jnp.array([3.0, 0.0]), jnp.array([0.0, 1.0])]
      >>> oa.merging.karcher(models).round(3).tolist()
      [1.4140000343322754, 1.4140000343322754]

    References:
      Karcher, "Riemannian Center of Mass and Mollifier Smoothing", 1977.
    """
    _checks.check_integer("num_iters", num_iters, 1)
    return merged(karcher_rule(len(models), weights, num_iters), models)


def karcher_rule(n: int, weights: Weights | None, num_iters: int = 20) -> Rule:
    """The mean direction of one leaf of ``n`` models, times the mean norm."""
    given = checked_weights(n, weights)
    if isinstance(given, np.ndarray) and np.any(given < 0):
        raise ValueError(f"weights must not be negative, got {given.tolist()}.")

    def find(slices: Slices) -> _Direction:
        p = total(slices, products, joined_products)
        return _mean_direction(p, jnp.asarray(given, p.gram.dtype), num_iters)

    def combine(found: _Direction, xs: list[jax.Array]) -> jax.Array:
        ys = [x / u for x, u in zip(xs, found.units, strict=True)]
        return found.unit * weighted_sum(found.coefficients, ys)

    return Rule(combine, find)


class _Direction(NamedTuple):
    """A mean ``unit sum_i c_i x_i/units_i`` of ``n`` vectors.

    Attributes:
      units: Shape (n,), a power of two near the largest element of each vector.
      unit: The largest of them.
      coefficients: Shape (n,).
    """

    units: jax.Array
    unit: jax.Array
    coefficients: jax.Array


@functools.partial(jax.jit, static_argnums=2)
def _mean_direction(p: Products, given: jax.Array, num_iters: int) -> _Direction:
    """The Karcher mean of directions, times the mean norm.

    Args:
      p: Inner products of the vectors.
      given: Weights of the vectors, shape (n,).
      num_iters: Number of iterations.
    """
    norms, gram = cosines(p)
    w = given * (norms > 0)
    w = w / jnp.maximum(jnp.sum(w), jnp.finfo(norms.dtype).tiny)
    nothing = jnp.finfo(norms.dtype).tiny

    def normalised(c: jax.Array) -> jax.Array:
        return c / jnp.sqrt(jnp.maximum(c @ gram @ c, nothing))

    def cancels(c: jax.Array) -> jax.Array:
        return ~(c @ gram @ c > 1e-5 * jnp.sum(jnp.abs(c)) ** 2)

    def advance(_: int, c: jax.Array) -> jax.Array:
        cosine = jnp.clip(gram @ c, -1, 1)
        angle = jnp.arccos(cosine)
        sine = jnp.sqrt(jnp.maximum(1 - cosine**2, 0))
        # log_u(v) = angle/sine (v - cosine u)
        pull = w * jnp.where(sine > 1e-4, angle / jnp.maximum(sine, 1e-4), 1)
        step = pull - jnp.sum(pull * cosine) * c
        length = jnp.sqrt(jnp.maximum(step @ gram @ step, 0))
        along = jnp.where(length > 1e-12, jnp.sin(length) / length, 1)
        return normalised(jnp.cos(length) * c + along * step)

    first = normalised(w)
    last = lax.fori_loop(0, num_iters, advance, first)
    opposite = jnp.any((w > 0) & (gram @ first < 1e-5 - 1))
    straight = cancels(w) | opposite | cancels(last)
    unit = jnp.max(p.units)
    shares = given * (p.units / unit)
    arc = jnp.sum(shares * norms) * last / jnp.where(norms > 0, norms, 1)
    return _Direction(p.units, unit, jnp.where(straight, shares, arc))
