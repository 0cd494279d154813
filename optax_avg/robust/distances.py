"""Distances from a gradient to its location, each given by its proximal step.

    step(delta, tau) = argmin_s D(delta - s) + |s|^2 / (2 tau),    delta = g - m

By Moreau's identity the step is ``Proj_{tau B*}(delta)`` if ``D`` is a norm with the
dual unit ball ``B*``. :func:`optax_avg.track_location` adds these steps to ``m``. A
distance is a value: :class:`Distance` takes the step of your own.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_avg import _checks, _mesh, _numerics
from optax_avg.robust._gradients import clip_factor
from optax_avg.robust._options import INFINITY, Number

__all__ = [
    "Distance",
    "Step",
    "huber",
    "huber_elementwise",
    "l1",
    "l2",
    "linf",
    "mean",
    "pinball",
    "spectral",
]

# The arrays of one group, in float32 or wider, and the radius of the group.
Leaves = list[jax.Array]


class Step(NamedTuple):
    """A proximal step of one group of leaves.

    Attributes:
      leaves: The step, arrays of the shapes of the differences.
      inside: Share of the differences within the radius, a scalar in [0, 1]. It is 1
        if the step equals the differences, or if the distance has no radius.
      size: Size of the differences in units of the radius, a scalar. It must not be
        finite if an element is not, because such samples are rejected by it.
    """

    leaves: Leaves
    inside: jax.Array
    size: jax.Array


# (differences of one group of leaves, tau) -> step; tau is a scalar.
ProximalStep = Callable[[Leaves, Number], Step]


class Distance(NamedTuple):
    """A distance, given by its proximal step.

    Attributes:
      step: Function ``(delta, tau) -> Step`` of the differences ``g - m`` of one group
        of leaves, a list of arrays in float32 or wider, and of ``tau``, a scalar.
      tau_is_radius: Whether ``tau`` bounds the step in a dual norm, so that an adaptive
        radius can follow the sizes. For ``mean`` and Huber's functions it is a step
        size instead.
      by_leaf: Whether the step depends on the shapes of the leaves or on their order.
        If not, small leaves of a group arrive joined to one vector.

    Example:
      The l2 norm in a diagonal metric, ``|z|^2 = sum_i w_i z_i^2`` in both terms.

      >>> import jax.numpy as jnp, optax_avg as oa
      >>> w = jnp.array([1.0, 4.0])
      >>> def step(delta, tau):
      ...     size = jnp.sqrt(sum(jnp.sum(w * d**2) for d in delta))
      ...     factor = jnp.minimum(1, tau / jnp.maximum(size, 1e-30))
      ...     return oa.distances.Step([factor * d for d in delta], size <= tau, size)
      >>> weighted_l2 = oa.distances.Distance(step, by_leaf=True)
      >>> tx = oa.track_location(weighted_l2, tau=2.5, init="zeros")
      >>> m, _ = tx.update(jnp.array([3.0, 2.0]), tx.init(jnp.zeros(2)))
      >>> m.tolist()
      [1.5, 1.0]
    """

    step: ProximalStep
    tau_is_radius: bool = True
    by_leaf: bool = False


def mean() -> Distance:
    """Half the squared l2 norm ``|z|^2/2``, whose location is the mean.

        step = tau/(1 + tau) delta

    The location is an exponential average of decay ``1/(1 + tau)``.

    Returns:
      A distance for :func:`optax_avg.track_location`.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> found = oa.distances.mean().step([jnp.array([3.0, 4.0])], 1.0)
      >>> found.leaves[0].tolist()
      [1.5, 2.0]

    References:
      Schaipp et al., "SGD with Clipping is Secretly Estimating the Median Gradient",
      2024, 2402.12828.
    """
    return Distance(_mean, tau_is_radius=False)


def l2() -> Distance:
    """The norm ``|z|``, whose location is the geometric median.

        step = min(1, tau/|delta|) delta

    Returns:
      A distance for :func:`optax_avg.track_location`.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> found = oa.distances.l2().step([jnp.array([3.0, 4.0])], 2.5)
      >>> found.leaves[0].tolist()
      [1.5, 2.0]

    References:
      Schaipp et al., 2024, 2402.12828.
    """
    return Distance(_l2)


def l1() -> Distance:
    """The norm ``sum_i |z_i|``, whose location is the median of each element.

        step = clip(delta, -tau, tau)

    Returns:
      A distance for :func:`optax_avg.track_location`.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> found = oa.distances.l1().step([jnp.array([3.0, -0.5])], 1.0)
      >>> found.leaves[0].tolist()
      [1.0, -0.5]

    References:
      Schaipp et al., 2024, 2402.12828.
    """
    return Distance(_l1)


def linf() -> Distance:
    """The norm ``max_i |z_i|``. The step is the projection onto the l1 ball.

        step = sign(delta) max(|delta| - theta, 0)

    ``theta`` solves ``sum_i max(|delta_i| - theta, 0) = tau``. A ``delta`` inside the
    ball is its own step.

    Returns:
      A distance for :func:`optax_avg.track_location`.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> found = oa.distances.linf().step([jnp.array([3.0, 4.0])], 1.0)
      >>> found.leaves[0].tolist()
      [0.0, 1.0]

    References:
      Held et al., "Validation of Subgradient Optimization", 1974.
    """
    return Distance(_linf)


def huber(mu: Number = 1.0) -> Distance:
    """Huber's function of ``|z|``: ``|z|^2/2`` up to ``mu``, then ``mu (|z| - mu/2)``.

        step = tau mu/max(|delta|, mu (1 + tau)) delta

    Args:
      mu: Width of the quadratic part, positive, in units of the gradients.

    Returns:
      A distance for :func:`optax_avg.track_location`.

    Raises:
      ValueError: If ``mu`` is not positive.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> found = oa.distances.huber(mu=2.5).step([jnp.array([6.0, 8.0])], 1.0)
      >>> found.leaves[0].tolist()
      [1.5, 2.0]

    References:
      Huber, "Robust Estimation of a Location Parameter", 1964. Schaipp et al., 2024,
      2402.12828.
    """
    return Distance(_huber(_l2, mu), tau_is_radius=False)


def huber_elementwise(mu: Number = 1.0) -> Distance:
    """The sum of Huber's function of each element.

        step = tau/(1 + tau) clip(delta, -mu (1 + tau), mu (1 + tau))

    Args:
      mu: Width of the quadratic part, positive, in units of the gradients.

    Returns:
      A distance for :func:`optax_avg.track_location`.

    Raises:
      ValueError: If ``mu`` is not positive.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> found = oa.distances.huber_elementwise().step([jnp.array([3.0, -0.5])], 1.0)
      >>> found.leaves[0].tolist()
      [1.0, -0.25]

    References:
      Huber, 1964. Schaipp et al., 2024, 2402.12828.
    """
    return Distance(_huber(_l1, mu), tau_is_radius=False)


def pinball(quantile: Number = 0.5) -> Distance:
    """The sum of ``max(q z_i, (q - 1) z_i)``, whose location is a quantile.

        step = clip(delta, -tau (1 - q), tau q)

    Args:
      quantile: The quantile ``q`` of each element, in (0, 1).

    Returns:
      A distance for :func:`optax_avg.track_location`.

    Raises:
      ValueError: If ``quantile`` is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> found = oa.distances.pinball(0.75).step([jnp.array([3.0, -0.5])], 1.0)
      >>> found.leaves[0].tolist()
      [0.75, -0.25]

    References:
      Koenker and Bassett, "Regression Quantiles", 1978.
    """
    q = _checks.within("quantile", quantile, 0, 1, open_low=True, closed_high=False)
    return Distance(lambda delta, tau: _interval(delta, -tau * (1 - q), tau * q))


def spectral() -> Distance:
    """The nuclear norm of each matrix. The step is a projection onto the spectral ball.

        step = U min(S, tau) V',    delta = U S V'

    Leaves of more than two dimensions are matrices with their last axis as columns.
    Vectors are matrices of one column.

    Returns:
      A distance for :func:`optax_avg.track_location`.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> delta = jnp.array([[0.0, 4.0], [0.5, 0.0]])
      >>> found = oa.distances.spectral().step([delta], 1.0)
      >>> (found.leaves[0].round(3) + 0.0).tolist()
      [[0.0, 1.0], [0.5, 0.0]]

    References:
      Watson, "Characterization of the Subdifferential of Some Matrix Norms", 1992.
    """
    return Distance(_spectral, by_leaf=True)


def _share(tau: Number) -> jax.Array:
    """``tau/(1 + tau)``, 1 at infinity."""
    return 1 / (1 + 1 / jnp.asarray(tau))


def _mean(delta: Leaves, tau: Number) -> Step:
    return Step([_share(tau) * d for d in delta], jnp.ones([]), _numerics.norm(delta))


def _l2(delta: Leaves, tau: Number) -> Step:
    n = _numerics.norm(delta)
    inside = n <= tau
    factor = clip_factor(tau, n)
    return Step([factor * d for d in delta], inside.astype(n.dtype), n)


def _l1(delta: Leaves, tau: Number) -> Step:
    return _interval(delta, -tau, tau)


def _interval(delta: Leaves, low: Number, high: Number) -> Step:
    """Clips element by element; the size is the mean absolute value.

    Raises:
      ValueError: If a leaf is complex.
    """
    if any(jnp.iscomplexobj(d) for d in delta):
        raise ValueError(
            "complex numbers have no order to clip in; pass oa.distances.l2()."
        )
    count = sum(d.size for d in delta)
    if not count:
        return Step(delta, jnp.ones([]), jnp.zeros([]))
    # Floats, like the sizes: over devices both are one sum.
    beyond = sum(jnp.sum(~((low <= d) & (d <= high)), dtype=d.dtype) for d in delta)
    size = sum(jnp.sum(jnp.abs(d) / count) for d in delta)
    clipped = [jnp.clip(d, low, high) for d in delta]
    return Step(clipped, jnp.asarray(1 - beyond / count), jnp.asarray(size))


def _linf(delta: Leaves, tau: Number) -> Step:
    """The threshold by Newton's method, with no sort and no joined copy of the leaves.

    It is monotone and ends after finitely many steps.
    """
    sizes = [jnp.abs(d) for d in delta]
    total = jnp.asarray(sum((jnp.sum(a) for a in sizes), 0.0))
    inside = total <= tau
    top = jnp.max(jnp.stack([jnp.max(a, initial=0) for a in sizes]))
    # Below the largest: theta would be rounded at its size, which may dwarf tau.
    depths = [a - top for a in sizes]

    def newton(theta):
        above = sum(jnp.sum(jnp.where(a > theta, a, 0)) for a in depths)
        count = sum(jnp.sum(a > theta) for a in depths)
        return (above - tau) / jnp.maximum(count, 1)

    def ascend(pair):
        return pair[1], jnp.maximum(pair[1], newton(pair[1]))

    first = jnp.broadcast_to(jnp.asarray(-tau, top.dtype), top.shape)
    first = _mesh.vary(first, _mesh.varying_axes(top))
    start = first, jnp.maximum(first, newton(first))
    theta = lax.while_loop(lambda pair: pair[1] > pair[0], ascend, start)[1]
    shrunk = [jnp.sign(d) * jnp.maximum(a - theta, 0) for d, a in zip(delta, depths)]
    kept = [jnp.where(inside, d, s) for d, s in zip(delta, shrunk)]
    # A sum that overflows is no sign of an element that is not finite.
    size = jnp.where(
        jnp.isinf(top), top, jnp.minimum(total, jnp.finfo(total.dtype).max)
    )
    return Step(kept, inside.astype(top.dtype), size)


def _huber(norm: ProximalStep, mu: Number) -> ProximalStep:
    """Huber's function of a norm: its step for ``mu (1 + tau)``, times the share."""
    mu = _checks.within("mu", mu, 0, INFINITY, open_low=True)

    def step(delta: Leaves, tau: Number) -> Step:
        found = norm(delta, mu * (1 + tau))
        return found._replace(leaves=[_share(tau) * d for d in found.leaves])

    return step


def _spectral(delta: Leaves, tau: Number) -> Step:
    steps, largest = [], [jnp.zeros([])]
    for d in delta:
        if not d.size:
            steps.append(d)
            continue
        matrix = _mesh.unsharded(d).reshape(-1, d.shape[-1] if d.ndim > 1 else 1)
        u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
        cut = jnp.where(jnp.all(s <= tau), matrix, (u * jnp.minimum(s, tau)[None]) @ vt)
        steps.append(_mesh.sharded_like(d, cut.reshape(d.shape)))
        largest.append(jnp.max(s))
    tops = jnp.stack(largest[1:] or largest)
    return Step(steps, jnp.mean((tops <= tau).astype(tops.dtype)), jnp.mean(tops))
