"""Closed forms of the proximal step that :mod:`optax_avg.robust.location` is made of.

    step = argmin_s D(s - delta) + |s|^2 / (2 tau),    delta = g - m

By Moreau's identity it is ``Proj_{tau B*}(delta)`` where ``D`` is a norm with the dual
unit ball ``B*``. Each function maps the leaves of one group to a :class:`Step`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from optax_avg import _mesh, _numerics

Leaves = list[jax.Array]


class Step(NamedTuple):
    """A proximal step.

    Attributes:
      leaves: the step.
      inside: share of the differences that lie within the radius, 1 if none is cut.
      size: of the differences, in units of the radius.
    """

    leaves: Leaves
    inside: jax.Array
    size: jax.Array


def share(tau: Any) -> Any:
    """``tau/(1 + tau)``, 1 at infinity."""
    return 1 / (1 + 1 / tau)


def mean(delta: Leaves, tau: Any) -> Step:
    """Half the squared l2 norm: ``tau/(1 + tau) delta``."""
    return Step([share(tau) * d for d in delta], jnp.ones([]), _numerics.norm(delta))


def l2(delta: Leaves, tau: Any) -> Step:
    """``min(1, tau/|delta|) delta``."""
    n = _numerics.norm(delta)
    inside = n <= tau
    factor = jnp.where(inside, 1, tau / jnp.where(n > 0, n, 1))
    return Step([factor * d for d in delta], inside.astype(n.dtype), n)


def interval(delta: Leaves, low: Any, high: Any) -> Step:
    """``clip(delta, low, high)``, element by element.

    Raises:
      ValueError: If a leaf is complex.
    """
    if any(jnp.iscomplexobj(d) for d in delta):
        raise ValueError("complex numbers have no order to clip in; use 'l2'.")
    count = sum(d.size for d in delta)
    if not count:
        return Step(delta, jnp.ones([]), jnp.zeros([]))
    within = sum(jnp.sum((low <= d) & (d <= high)) for d in delta)
    size = sum(jnp.sum(jnp.abs(d) / count) for d in delta)
    clipped = [jnp.clip(d, low, high) for d in delta]
    return Step(clipped, jnp.asarray(within / count), jnp.asarray(size))


def linf(delta: Leaves, tau: Any) -> Step:
    """Projection onto the l1 ball: ``sign(delta) max(|delta| - theta, 0)``.

    ``sum max(|delta| - theta, 0) = tau`` by Newton's method, which is monotone and ends
    after finitely many steps; no sort, no copy of the leaves side by side.
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


def spectral(delta: Leaves, tau: Any) -> Step:
    """Nuclear norm: ``U min(S, tau) V'`` of every matrix ``delta = U S V'``.

    Leaves of more dimensions are matrices with their last axis as columns, vectors are
    matrices of one column.
    """
    steps, largest = [], [jnp.zeros([])]
    for d in delta:
        if not d.size:
            steps.append(d)
            continue
        matrix = _unsharded(d).reshape(-1, d.shape[-1] if d.ndim > 1 else 1)
        u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
        cut = jnp.where(jnp.all(s <= tau), matrix, (u * jnp.minimum(s, tau)[None]) @ vt)
        steps.append(_sharded_like(d, cut.reshape(d.shape)))
        largest.append(jnp.max(s))
    tops = jnp.stack(largest[1:] or largest)
    return Step(steps, jnp.mean((tops <= tau).astype(tops.dtype)), jnp.mean(tops))


def _unsharded(x: jax.Array) -> jax.Array:
    """A copy on every device, where sharding is explicit: SVD takes no other."""
    return jax.sharding.reshard(x, PartitionSpec()) if any(_spec(x)) else x


def _sharded_like(x: jax.Array, y: jax.Array) -> jax.Array:
    return jax.sharding.reshard(y, PartitionSpec(*_spec(x))) if any(_spec(x)) else y


def _spec(x: jax.Array) -> tuple[Any, ...]:
    sharding: Any = jax.typeof(x).sharding
    return tuple(sharding.spec)


def _huber(norm: Callable[[Leaves, Any], Step]) -> Callable[..., Step]:
    """Huber's function of a norm: its step for ``mu (1 + tau)``, times the share."""

    def step(delta, tau, mu):
        found = norm(delta, mu * (1 + tau))
        return found._replace(leaves=[share(tau) * d for d in found.leaves])

    return step


huber = _huber(l2)
huber_elementwise = _huber(lambda delta, radius: interval(delta, -radius, radius))


def step_of(distance: str, mu: Any, quantile: Any) -> Callable[[Leaves, Any], Step]:
    """The step of a distance by its name.

    Raises:
      ValueError: If there is no such distance.
    """
    steps = {
        "mean": mean,
        "l2": l2,
        "l1": lambda delta, tau: interval(delta, -tau, tau),
        "linf": linf,
        "huber": lambda delta, tau: huber(delta, tau, mu),
        "huber_elementwise": lambda delta, tau: huber_elementwise(delta, tau, mu),
        "pinball": lambda delta, tau: interval(
            delta, -tau * (1 - quantile), tau * quantile
        ),
        "spectral": spectral,
    }
    if distance not in steps:
        raise ValueError(f"distance must be one of {[*steps]}, got {distance!r}.")
    return steps[distance]
