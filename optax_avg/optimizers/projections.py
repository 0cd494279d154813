"""AdamP and SGDP: updates of scale-invariant weights without their radial part.

    q = p - <w, p>/|w|^2 w    if |cos(w, g)| < delta/sqrt(dim w),    else q = p

If a loss does not depend on the size of a weight ``w``, its gradient ``g`` is
orthogonal to ``w``. Momentum has a part along ``w`` all the same, which lets the weight
grow and the effective step size fall.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_avg import _checks, _leaves, _mixups, _numerics
from optax_avg.optimizers import _matrices
from optax_avg.optimizers._wide import in_float32

__all__ = ["adamp", "project_radial", "sgdp"]


def project_radial(
    optimizer: optax.GradientTransformation,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    *,
    weight_decay: float = 0.0,
    channel_axis: int = -1,
) -> optax.GradientTransformationExtraArgs:
    """Takes the radial part out of what an optimizer makes for scale-invariant weights.

    With the gradient ``g``, the update ``p`` of the optimizer and the weight ``w``:
    ``q = p - <u, p> u``, ``u = w/|w|``, if ``|cos(w, g)| < delta/sqrt(dim w)``. The
    test is made channel by channel, and the projection too if all channels of a leaf
    pass it. If not, the whole leaf is tested. If that fails, ``q = p``. Leaves with
    fewer than two axes are never projected.

    The result is ``q + r weight_decay w`` with ``r = wd_ratio`` where ``p`` was
    projected and ``r = 1`` elsewhere. Put the learning rate after it.

    Args:
      optimizer: Transformation that makes a direction of ascent of the gradient, such
        as ``optax.scale_by_adam()``.
      delta: Threshold of the cosine, not negative. 0 projects nothing.
      wd_ratio: Share of the weight decay that remains where ``p`` was projected, in
        [0, 1].
      weight_decay: Decoupled weight decay, not negative, in units of one over the
        learning rate.
      channel_axis: Axis of the output channels; the last one, as Flax stores weights.

    Returns:
      A transformation with the state of ``optimizer``; ``update`` needs the parameters.

    Raises:
      ValueError: If an argument is out of range, or if ``update`` gets no params.
      TypeError: If ``optimizer`` is no transformation.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = oa.optimizers.project_radial(optax.trace(0.5))
      >>> w = jnp.array([[0.0], [2.0]])
      >>> state = tx.init(w)
      >>> _, state = tx.update(jnp.array([[0.0], [8.0]]), state, w)  # along w
      >>> tx.update(jnp.array([[3.0], [0.0]]), state, w)[0].tolist()
      [[3.0], [0.0]]

    References:
      Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on
      Scale-invariant Weights", 2021, 2006.08217.
    """
    _mixups.refuse_no_optimizer("project_radial", optimizer)
    delta = _checks.finite("delta", delta)
    wd_ratio = _checks.within("wd_ratio", wd_ratio, 0, 1)
    weight_decay = _checks.finite("weight_decay", weight_decay)
    channel_axis = _checks.static_integer("channel_axis", channel_axis, -1)
    tx = optax.with_extra_args_support(optimizer)

    def one(p: Any, g: Any, w: Any) -> Any:
        if not (_leaves.is_gradient(p) and _leaves.is_gradient(g)):
            return p
        wide_p, wide_w = _numerics.wide(p), _numerics.wide(w)
        q, ratio = wide_p, jnp.ones([], wide_w.dtype)
        if w.ndim >= 2 and w.size:
            wide_g = _numerics.wide(g)
            q, is_radial = _projected(wide_p, wide_g, wide_w, delta, channel_axis)
            ratio = jnp.where(is_radial, wd_ratio, ratio)
        return (q + ratio * weight_decay * wide_w).astype(g.dtype)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        _checks.require_params("project_radial", params)
        made, state = tx.update(updates, state, params, **extra_args)
        structure, rows = _matrices.rows(made, updates, params)
        return structure.unflatten([one(*row) for row in rows]), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def adamp(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    channel_axis: int = -1,
) -> optax.GradientTransformationExtraArgs:
    """AdamP: Adam without the radial part of its updates to scale-invariant weights.

    ``w <- w - learning_rate (q + r weight_decay w)``, where ``q`` is Adam's direction
    ``p = m/(sqrt(v) + eps)`` after :func:`project_radial`. The authors' code has a
    Nesterov variant as well: ``project_radial(optax.scale_by_adam(nesterov=True))``.

    Args:
      learning_rate: Step size, a float or a schedule.
      b1: Decay of the mean of the gradients, in [0, 1).
      b2: Decay of the mean of their squares, in [0, 1).
      eps: Added to the denominator, in units of the gradients.
      weight_decay: Decoupled weight decay, as in :func:`project_radial`.
      delta: Threshold of the cosine, as in :func:`project_radial`.
      wd_ratio: Share of the weight decay that remains on projected weights.
      channel_axis: Axis of the output channels.

    Returns:
      An optimizer; ``update`` needs the parameters.

    Raises:
      ValueError: If an argument is out of range, or if ``update`` gets no params.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.optimizers.adamp(0.5)
      >>> w = jnp.array([[0.0], [2.0]])
      >>> tx.update(jnp.array([[3.0], [0.0]]), tx.init(w), w)[0].round(3).tolist()
      [[-0.5], [-0.0]]

    References:
      Heo et al., 2021, 2006.08217, algorithm 2.
    """
    b1 = _checks.within("b1", b1, 0, 1, closed_high=False)
    b2 = _checks.within("b2", b2, 0, 1, closed_high=False)
    eps = _checks.finite("eps", eps)
    adam = in_float32(optax.scale_by_adam(b1, b2, eps))
    rate = _checks.finite_or_schedule("learning_rate", learning_rate)
    return optax.chain(
        project_radial(
            adam,
            delta,
            wd_ratio,
            weight_decay=weight_decay,
            channel_axis=channel_axis,
        ),
        in_float32(optax.scale_by_learning_rate(rate)),
    )


def sgdp(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    *,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    channel_axis: int = -1,
) -> optax.GradientTransformationExtraArgs:
    """SGDP: momentum without the radial part of updates to scale-invariant weights.

    ``p <- momentum p + g``, ``w <- w - learning_rate (q + r weight_decay w)``, where
    ``q`` is ``p`` after :func:`project_radial`. The authors' code divides
    ``weight_decay`` by ``1 - momentum``. It projects in place, so that the momentum
    which it keeps is projected as well; here it is not, as in the paper.

    Args:
      learning_rate: Step size, a float or a schedule.
      momentum: Decay of the sum of the gradients, in [0, 1).
      weight_decay: Decoupled weight decay, as in :func:`project_radial`.
      delta: Threshold of the cosine, as in :func:`project_radial`.
      wd_ratio: Share of the weight decay that remains on projected weights.
      channel_axis: Axis of the output channels.

    Returns:
      An optimizer; ``update`` needs the parameters.

    Raises:
      ValueError: If an argument is out of range, or if ``update`` gets no params.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.optimizers.sgdp(0.5)
      >>> w = jnp.array([[0.0], [2.0]])
      >>> tx.update(jnp.array([[3.0], [0.0]]), tx.init(w), w)[0].tolist()
      [[-1.5], [-0.0]]

    References:
      Heo et al., 2021, 2006.08217, algorithm 1.
    """
    momentum = _checks.within("momentum", momentum, 0, 1, closed_high=False)
    rate = _checks.finite_or_schedule("learning_rate", learning_rate)
    return optax.chain(
        project_radial(
            in_float32(optax.trace(momentum)),
            delta,
            wd_ratio,
            weight_decay=weight_decay,
            channel_axis=channel_axis,
        ),
        in_float32(optax.scale_by_learning_rate(rate)),
    )


def _projected(
    p: jax.Array, g: jax.Array, w: jax.Array, delta: Any, channel_axis: int
) -> tuple[jax.Array, jax.Array]:
    """``q``, and whether the radial part was taken out: by channel, else by leaf."""
    x, y = _with_largest_one(w), _with_largest_one(g)
    axes = _matrices.other_axes(w, channel_axis)
    by_channel = [
        _matrices.inner(a, b, axes) for a, b in ((x, x), (y, y), (x, y), (p, x))
    ]
    by_leaf = [jnp.sum(products, keepdims=True) for products in by_channel]
    q, is_radial = p, jnp.asarray(False)
    for xx, yy, xy, px in (by_channel, by_leaf):
        size = jnp.sqrt(xx) * jnp.sqrt(yy)
        cosine = jnp.abs(xy) / jnp.where(size > 0, size, 1)
        invariant = jnp.max(cosine) < delta / math.sqrt(w.size // xx.size)
        tangent = p - px / jnp.where(xx > 0, xx, 1) * x
        q = jnp.where(invariant & ~is_radial, tangent, q)
        is_radial |= invariant
    return q, is_radial


def _with_largest_one(x: jax.Array) -> jax.Array:
    """``x/max|x|``, of which no square overflows; 0 at 0."""
    largest = jnp.max(jnp.abs(x))
    return x / jnp.where(largest > 0, largest, 1)
