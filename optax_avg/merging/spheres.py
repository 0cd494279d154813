"""Means of directions: each leaf a vector, on the sphere of its length."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_avg import _tree
from optax_avg.merging._leaves import (
    checked_weights,
    inner,
    over,
    size,
    unit,
    weighted_sum,
)


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

    def one(xs):
        a, b = xs
        u, v = unit(a), unit(b)
        # The angle from half chords: exact where the cosine is not.
        w = 2 * jnp.arctan2(size(u - v), size(u + v))
        sine = jnp.sin(w)
        straight = (sine < 1e-3) | (size(a) == 0) | (size(b) == 0)
        sine = jnp.where(straight, 1, sine)
        p = jnp.where(straight, 1 - t, jnp.sin((1 - t) * w) / sine)
        q = jnp.where(straight, t, jnp.sin(t * w) / sine)
        return p * a + q * b

    return over(one, [a, b])


def karcher(
    models: Sequence[Any],
    weights: Sequence[float] | None = None,
    *,
    num_iters: int = 20,
) -> Any:
    """The mean direction on the sphere, times the mean norm, leaf by leaf.

    ``u <- exp_u(sum_i w_i log_u(u_i))`` from the normalised mean; with two models it is
    the middle of their arc.

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
    _tree.check_integer("num_iters", num_iters, 1)
    n = len(models)
    given = checked_weights(models, [1 / max(n, 1)] * n if weights is None else weights)
    if isinstance(given, np.ndarray) and np.any(given < 0):
        raise ValueError(f"weights must not be negative, got {list(weights or [])}.")

    def one(xs):
        norms = jnp.stack([size(x) for x in xs])
        w = given * (norms > 0)
        w = w / jnp.maximum(jnp.sum(w), jnp.finfo(norms.dtype).tiny)
        units = [unit(x) for x in xs]
        gram = jnp.stack([jnp.stack([inner(a, b) for b in units]) for a in units])
        direction = weighted_sum(_mean_direction(gram, w, num_iters), units)
        return jnp.sum(given * norms) * direction

    return over(one, models)


@functools.partial(jax.jit, static_argnums=2)
def _mean_direction(gram: jax.Array, w: jax.Array, num_iters: int) -> jax.Array:
    """Coefficients on unit vectors of their Karcher mean, from their inner products."""

    def normalised(c):
        return c / jnp.sqrt(jnp.maximum(c @ gram @ c, 1e-30))

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

    return lax.fori_loop(0, num_iters, advance, normalised(w))
