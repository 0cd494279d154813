"""Means of directions: each leaf a vector, on the sphere of its length."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_avg import _checks, _numerics
from optax_avg._checkpoints.rules import Rule
from optax_avg.merging._products import Products, cosines, joined_products, products
from optax_avg.merging._trees import checked_weights, merged, total, weighted_sum


def slerp(a: Any, b: Any, t: float) -> Any:
    """Along the arc between two models, leaf by leaf.

    ``(sin((1 - t) w) a + sin(t w) b)/sin w`` with the angle ``w`` between their
    directions; a straight line where they are near parallel or opposite.

    Args:
      a: a tree, the result at 0.
      b: one like it, the result at 1.
      t: position.

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


def slerp_rule(t: Any) -> Rule:
    """The arc between a leaf of two models."""

    def find(slices):
        sizes = total(slices, products, joined_products)
        norms, _ = cosines(sizes)
        # The angle from half chords: exact where the cosine is not.
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

    def combine(found, xs):
        p, q = found
        # Near opposite models the terms are far larger than their sum.
        most = jnp.maximum(1, jnp.maximum(jnp.abs(p), jnp.abs(q)))
        return most * weighted_sum([p / most, q / most], xs)

    return Rule(combine, find)


@jax.jit
def _chords(units: jax.Array, norms: jax.Array, xs: list[jax.Array]) -> Any:
    """``|u - v|^2`` and ``|u + v|^2`` of the directions of two vectors."""
    u, v = (
        x / unit / jnp.where(norm > 0, norm, 1)
        for x, unit, norm in zip(xs, units, norms, strict=True)
    )
    return jnp.sum(jnp.abs(u - v) ** 2), jnp.sum(jnp.abs(u + v) ** 2)


def karcher(
    models: Sequence[Any],
    weights: Sequence[float] | None = None,
    *,
    num_iters: int = 20,
) -> Any:
    """The mean direction on the sphere, times the mean norm, leaf by leaf.

    ``u <- exp_u(sum_i w_i log_u(u_i))`` from the normalised mean; with two models it is
    a point of their arc. The result is the weighted mean of the models, a straight line
    as in :func:`slerp`, where directions have no mean: where they cancel, or where one
    is opposite to the mean of all. So a leaf of one element has its weighted mean.

    Args:
      models: trees of one structure.
      weights: not negative, of sum one; by default equal.
      num_iters: rounds, on ``n`` coefficients each.

    Returns:
      A tree like the first.

    Raises:
      ValueError: If the models differ, or the weights do not sum to one.

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


def karcher_rule(n: int, weights: Sequence[float] | None, num_iters: int = 20) -> Rule:
    """The mean direction of a leaf of ``n`` models."""
    given = checked_weights(n, weights)
    if isinstance(given, np.ndarray) and np.any(given < 0):
        raise ValueError(f"weights must not be negative, got {list(weights or [])}.")

    def find(slices):
        p = total(slices, products, joined_products)
        return _mean_direction(p, jnp.asarray(given, p.gram.dtype), num_iters)

    def combine(found, xs):
        units, unit, c = found
        return unit * weighted_sum(c, [x / u for x, u in zip(xs, units, strict=True)])

    return Rule(combine, find)


@functools.partial(jax.jit, static_argnums=2)
def _mean_direction(p: Products, given: jax.Array, num_iters: int) -> Any:
    """The Karcher mean of directions, times the mean norm.

    Returns:
      The units of the vectors, that of the result, and coefficients between them.
    """
    norms, gram = cosines(p)
    w = given * (norms > 0)
    w = w / jnp.maximum(jnp.sum(w), jnp.finfo(norms.dtype).tiny)
    nothing = jnp.finfo(norms.dtype).tiny

    def normalised(c):
        return c / jnp.sqrt(jnp.maximum(c @ gram @ c, nothing))

    def cancels(c):
        return ~(c @ gram @ c > 1e-5 * jnp.sum(jnp.abs(c)) ** 2)

    def advance(_, c):
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
    return p.units, unit, jnp.where(straight, shares, arc)
