"""Wrappers that make the updates of an optimizer agree in sign with the gradient.

    cautious:   u <- u 1[u g < 0] / mean(1[u g < 0])
    grams:      u <- -sign(g) |u|

Updates ``u`` are what Optax adds to the parameters: they agree with the gradient ``g``
where their signs differ.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_avg import _checks, _leaves, _mixups, _numerics

__all__ = ["cautious", "grams"]

# (gradient, update) -> new update, of one leaf
Change = Callable[[jax.Array, jax.Array], jax.Array]

LEAST_SHARE = 1e-3  # of elements that agree, in the rescaling of the others


def cautious(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Drops updates that oppose the gradient, and enlarges the others instead.

    ``u <- phi u/max(mean(phi), 1e-3)`` with ``phi = 1`` where ``-u`` and ``g`` have the
    same sign and 0 elsewhere; the mean is over the elements of a leaf. Inside
    ``shard_map`` it is over the part of the leaf that a device has.

    The first version of the authors' code divided by ``(sum(phi) + 1)/n`` instead.

    Decoupled weight decay inside ``inner`` is a part of ``u``. To leave it out, as the
    authors do, write ``optax.chain(cautious(optax.adam(1.0)),
    optax.add_decayed_weights(-1e-2), optax.scale(learning_rate))``.

    Args:
      inner: A whole optimizer, whose updates descend.

    Returns:
      A transformation with the state of ``inner``, in its place.

    Raises:
      TypeError: If ``inner`` is no transformation.
      ValueError: In ``init``, if a parameter is complex.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = oa.optimizers.cautious(optax.sgd(1.0, momentum=0.5))
      >>> state = tx.init(jnp.zeros(2))
      >>> for g in (jnp.array([4.0, 1.0]), jnp.array([-1.0, 1.0])):
      ...     updates, state = tx.update(g, state)
      >>> updates.tolist()
      [0.0, -3.0]

    References:
      Liang et al., "Cautious Optimizers: Improving Training with One Line of Code",
      2024, 2411.16085.
    """

    def one(g: jax.Array, u: jax.Array) -> jax.Array:
        # Signs, since a product may underflow; the negation keeps NaN.
        agrees = ~(jnp.sign(u) * jnp.sign(g).astype(u.dtype) >= 0)
        wide = _numerics.wide(u)
        share = jnp.mean(agrees, dtype=wide.dtype)
        return jnp.where(agrees, wide / jnp.maximum(share, LEAST_SHARE), 0)

    return _changed("cautious", inner, one)


def grams(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Takes the size of a step from an optimizer and its direction from the gradient.

    ``u <- -sign(g) |u|``, element by element. The authors' Grams is
    ``grams(optax.adam(1e-3))``. Decoupled weight decay inside ``inner`` is a part of
    ``u``; :func:`cautious` says how to leave it out. Where ``u`` is zero it stays zero,
    even if the gradient is NaN, as when ``inner`` is ``optax.apply_if_finite``.

    Args:
      inner: A whole optimizer, or its last link.

    Returns:
      A transformation with the state of ``inner``, in its place.

    Raises:
      TypeError: If ``inner`` is no transformation.
      ValueError: In ``init``, if a parameter is complex.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = oa.optimizers.grams(optax.sgd(1.0, momentum=0.5))
      >>> state = tx.init(jnp.zeros(2))
      >>> for g in (jnp.array([4.0, 1.0]), jnp.array([-1.0, 1.0])):
      ...     updates, state = tx.update(g, state)
      >>> updates.tolist()
      [1.0, -1.5]

    References:
      Cao et al., "Grams: Gradient Descent with Adaptive Momentum Scaling", 2024,
      2412.17107.
    """

    def one(g: jax.Array, u: jax.Array) -> jax.Array:
        turned = -jnp.sign(g).astype(u.dtype) * jnp.abs(u)
        return jnp.where(u == 0, u, turned)

    return _changed("grams", inner, one)


def _changed(
    name: str, inner: optax.GradientTransformation, change: Change
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose updates are changed leaf by leaf, given the gradient."""
    _mixups.refuse_no_optimizer(name, inner)
    optimizer = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> optax.OptState:
        _checks.refuse_complex(name, params)
        return optimizer.init(params)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        made, state = optimizer.update(updates, state, params, **extra_args)

        def one(g: Any, u: Any) -> Any:
            there = _leaves.is_gradient(g) and _leaves.is_gradient(u)
            return change(g, u).astype(u.dtype) if there else u

        return jax.tree.map(one, updates, made, is_leaf=_leaves.is_absent), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
