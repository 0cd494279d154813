"""Locations of gradients over iterations: clipping as an estimator of the median.

    m <- m + Proj_{tau B*}(g - m)

is the stochastic proximal point step towards the minimiser of ``E D(m - g)``: the mean
for the squared l2 norm, a median for the l2 norm. With ``m = 0`` at every step it is
ordinary clipping. A constant ``tau`` finds a location between the two: the median as
``tau`` goes to 0, the mean as it grows.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_avg import _checks, _leaves, _mesh, _numerics
from optax_avg.robust import distances
from optax_avg.robust._gradients import (
    ByPosition,
    Leaf,
    check_alike,
    counter,
    flatten,
    positions_in_both,
)
from optax_avg.robust._options import (
    INFINITY,
    LocationOptions,
    Number,
    Scope,
    with_location_options,
)
from optax_avg.robust.distances import Distance

__all__ = [
    "AdaptiveRadius",
    "LocationState",
    "adaptive_radius",
    "cclip",
    "clipped_ema",
    "track_location",
    "vclip",
]


class AdaptiveRadius(NamedTuple):
    """A radius that follows a quantile; see :func:`adaptive_radius`.

    Attributes:
      quantile: Quantile of the sizes of ``g - m`` that the radius follows.
      rate: Rate of the geometric updates.
      init: First radius, or None for the first size that is seen.
    """

    quantile: Number
    rate: Number
    init: Number | None


# A radius or a step size, by distance.
Tau = optax.ScalarOrSchedule | AdaptiveRadius


class LocationState(NamedTuple):
    """State of :func:`track_location`.

    Attributes:
      location_step: Number of samples that counted, int32; schedules are called with
        it.
      location: The location ``m`` in float32 or wider, ``()`` if it is reset at every
        step.
      location_radius: Adaptive radii, shape (groups,), 0 while unknown; or ``()``.
      accepted: Number of samples within the radius, int32.
      clipped: Number of samples that were cut, int32.
      rejected: Number of samples that were not finite, int32.
    """

    location_step: jax.Array
    location: optax.Updates
    location_radius: jax.Array | tuple[()]
    accepted: jax.Array
    clipped: jax.Array
    rejected: jax.Array


def adaptive_radius(
    quantile: Number = 0.5,
    rate: Number = 0.2,
    init: Number | None = None,
) -> AdaptiveRadius:
    """A radius that follows a quantile of the sizes of ``g - m``, whatever their scale.

    ``tau <- tau exp(-rate (1[size <= tau] - quantile))``; for element-wise distances
    the share of elements stands in place of the indicator. The first size that is seen
    sets ``tau`` unless ``init`` does. A sample equal to ``m`` does not change it.

    Args:
      quantile: Share of the samples that stay within the radius, in [0, 1]; 0.5 clips
        every other sample.
      rate: Rate of the updates, positive. At the defaults the radius grows or shrinks
        by a factor of 10 in 23 steps, ``ln(10)/(rate quantile)`` upwards and
        ``ln(10)/(rate (1 - quantile))`` downwards.
      init: First radius, positive. The default is the first size that is seen.

    Returns:
      The argument ``tau`` of :func:`track_location`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.vclip(oa.adaptive_radius(quantile=0.5), init="zeros")
      >>> state = tx.init(jnp.zeros(2))
      >>> _, state = tx.update(jnp.array([3.0, 4.0]), state)
      >>> state.location_radius.tolist()
      [5.0]

    References:
      Andrew et al., "Differentially Private Learning with Adaptive Clipping", 2021,
      1905.03871.
    """
    quantile = _checks.within("quantile", quantile, 0, 1)
    rate = _checks.within("rate", rate, 0, INFINITY, open_low=True)
    if init is not None:
        init = _checks.within("init", init, 0, INFINITY, open_low=True)
    return AdaptiveRadius(quantile, rate, init)


@with_location_options
def track_location(
    distance: Distance,
    tau: Tau,
    *,
    reset: bool = False,
    **options: Unpack[LocationOptions],
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient by a robust location ``m`` of the gradients so far.

        m <- m + step(g - m, tau)

    The step is that of the distance; see :mod:`optax_avg.distances`. A sample that is
    not finite changes nothing but a counter.

    Args:
      distance: A distance, such as ``oa.distances.l2()``. It decides what ``m``
        estimates: the mean, a median, a quantile, or a point between them.
      tau: Radius or step size, not negative: a float, a schedule of the samples so far,
        or an :func:`adaptive_radius`. At infinity ``m`` is the gradient.
      reset: Whether ``m = 0`` at every step, which is ordinary clipping. It needs
        ``init="zeros"``.
      **options: Options of every location.

    Returns:
      A transformation with the state :class:`LocationState`; it stands before the
      optimizer.

    Raises:
      TypeError: If ``distance`` is not a distance.
      ValueError: If another argument is out of range or unknown, or if ``tau`` is an
        adaptive radius and the ``tau`` of the distance is a step size.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = optax.chain(oa.track_location(oa.distances.l1(), 0.5), optax.sgd(0.1))
      >>> x = jnp.zeros(2)
      >>> state = tx.init(x)
      >>> for g in (jnp.array([1.0, 1.0]), jnp.array([9.0, 1.25])):
      ...     updates, state = tx.update(g, state, x)
      >>> state[0].location.tolist()
      [1.5, 1.25]

    References:
      Schaipp et al., "SGD with Clipping is Secretly Estimating the Median Gradient",
      2024, 2402.12828.
    """
    scope, init = options.get("scope", "global"), options.get("init", "first")
    _check_distance(distance)
    tau = _checked_radius(distance, tau)
    _check_choices(scope, init, reset)

    def init_fn(params: optax.Params) -> LocationState:
        m, radius = _leaves.zeros_like_wide(params), ()
        if isinstance(tau, AdaptiveRadius):
            count, dtype = len(_groups(scope, m)), _numerics.dtype_of_norms(m)
            radius = jnp.full(count, tau.init or 0.0, dtype)
        return LocationState(
            counter(), () if reset else m, radius, counter(), counter(), counter()
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LocationState]:
        del params, extra_args
        tree = _leaves.zeros_like_wide(updates) if reset else state.location
        check_alike(updates, tree)
        leaves, structure = flatten(updates)
        m, layout = flatten(tree)
        there = positions_in_both(leaves, m)
        delta = {i: _numerics.wide(leaves[i]) - m[i] for i in there}
        first = (state.location_step == 0) & (init == "first")
        groups = _groups(scope, tree)
        radii = _radii(tau, state.location_radius, state.location_step, len(groups))
        step, inside, sizes = _by_group(distance, groups, delta, radii)
        # Sizes are norms or means: finite if and only if all differences are.
        finite = _mesh.agreed(jnp.all(jnp.isfinite(sizes)))
        cut = jnp.any(inside < 1) & ~first
        # The first gradient is the first location.
        taken = {i: jnp.where(first, delta[i], step[i]) for i in there}
        m = _advanced(m, taken, finite)
        for i in there:
            leaves[i] = m[i].astype(leaves[i].dtype)
        radius = state.location_radius
        if isinstance(tau, AdaptiveRadius):
            # A first gradient, a repeated or a missing one say nothing about distances.
            telling = finite & ~first & (sizes > 0)
            followed = _followed(tau, radii, inside, sizes, radius.dtype)
            radius = jnp.where(telling, followed, radius)
        return structure.unflatten(leaves), LocationState(
            location_step=_numerics.count_if(finite, state.location_step),
            location=() if reset else layout.unflatten(m),
            location_radius=radius,
            accepted=_numerics.count_if(finite & ~cut, state.accepted),
            clipped=_numerics.count_if(finite & cut, state.clipped),
            rejected=_numerics.count_if(~finite, state.rejected),
        )

    return optax.GradientTransformationExtraArgs(
        _leaves.shapes_for_shapes(init_fn), update_fn
    )


@with_location_options
def vclip(
    tau: Tau, **options: Unpack[LocationOptions]
) -> optax.GradientTransformationExtraArgs:
    """VClip: ``m <- m + min(1, tau/|g - m|) (g - m)``.

    With many steps at a small ``tau``, ``m`` estimates the geometric median of the
    gradients. From ``tau >= |g - m|`` on, ``m`` is the gradient.

    Args:
      tau: Radius, not negative: a float, a schedule, or an :func:`adaptive_radius`.
      **options: Options of every location.

    Returns:
      A transformation with the state :class:`LocationState`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.vclip(2.5, init="zeros")
      >>> tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))[0].tolist()
      [1.5, 2.0]

    References:
      Schaipp et al., 2024, 2402.12828.
    """
    return track_location(distances.l2(), tau, **options)


@with_location_options
def cclip(
    tau: Tau, **options: Unpack[LocationOptions]
) -> optax.GradientTransformationExtraArgs:
    """CClip: ``m <- m + clip(g - m, -tau, tau)``.

    With many steps at a small ``tau``, ``m`` estimates the median of every element.

    Args:
      tau: Radius, not negative: a float, a schedule, or an :func:`adaptive_radius`.
      **options: Options of every location.

    Returns:
      A transformation with the state :class:`LocationState`.

    Raises:
      ValueError: If an argument is out of range, or a gradient is complex.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.cclip(0.5, init="zeros")
      >>> tx.update(jnp.array([3.0, -0.25]), tx.init(jnp.zeros(2)))[0].tolist()
      [0.5, -0.25]

    References:
      Schaipp et al., 2024, 2402.12828.
    """
    return track_location(distances.l1(), tau, **options)


@with_location_options
def clipped_ema(
    decay: Number,
    max_norm: Number,
    **options: Unpack[LocationOptions],
) -> optax.GradientTransformationExtraArgs:
    """``m <- m + (1 - decay) min(1, max_norm/|g - m|) (g - m)``, a Huber location.

    The EMA of gradients whose distance to it is clipped: ``oa.distances.huber(mu)``
    with ``tau = (1 - decay)/decay`` and ``mu = decay max_norm``.

    Args:
      decay: Decay of the EMA, in (0, 1).
      max_norm: Largest distance that counts in full, positive.
      **options: Options of every location.

    Returns:
      A transformation with the state :class:`LocationState`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.clipped_ema(0.5, max_norm=2.5, init="zeros")
      >>> tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))[0].tolist()
      [0.75, 1.0]

    References:
      Schaipp et al., 2024, 2402.12828.
    """
    decay = _checks.within("decay", decay, 0, 1, open_low=True, closed_high=False)
    max_norm = _checks.within("max_norm", max_norm, 0, INFINITY, open_low=True)
    huber = distances.huber(decay * max_norm)
    return track_location(huber, (1 - decay) / decay, **options)


def _check_distance(distance: object) -> None:
    """Raises if a distance is given by its name or by a function that returns one."""
    if isinstance(distance, Distance):
        return
    factories = {
        name: getattr(distances, name)
        for name in distances.__all__
        if name not in ("Distance", "Step")
    }
    name = distance if isinstance(distance, str) else getattr(distance, "__name__", "")
    call = f"pass oa.distances.{name}()."
    if isinstance(distance, str):
        came = f"the string {name!r}"
        if name not in factories:
            call = f"pass one of {', '.join(f'oa.distances.{n}()' for n in factories)}."
    elif not callable(distance):
        came, call = type(distance).__name__, "pass one such as oa.distances.l2()."
    elif factories.get(name) is distance:
        came = f"the function {name}, which has to be called first"
    else:
        came = f"the function {name}"
        call = "pass oa.distances.Distance(step) for a proximal step of your own."
    raise TypeError(f"distance must be an oa.distances.Distance. It is {came}; {call}")


def _checked_radius(distance: Distance, tau: Tau) -> Tau:
    """The checked ``tau``. Raises if it does not fit the distance."""
    if isinstance(tau, AdaptiveRadius):
        if not distance.tau_is_radius:
            raise ValueError(
                "tau of this distance is a step size, not a radius that can adapt; "
                "pass a float or a schedule, or a distance such as oa.distances.l2()."
            )
        return tau
    return _checks.number_or_schedule("tau", tau, 0, INFINITY)


def _check_choices(scope: Scope, init: str, reset: bool) -> None:
    _checks.one_of("init", init, ("first", "zeros"))
    if reset and init != "zeros":
        raise ValueError("reset=True has m = 0 at every step; pass init='zeros'.")
    if isinstance(scope, str) and scope not in ("global", "leaf"):
        raise ValueError(f"scope must be 'global', 'leaf' or a tree, got {scope!r}.")


def _groups(scope: Scope, tree: optax.Updates) -> list[list[int]]:
    """Positions of the leaves of each group among all, absent ones counted."""
    leaves, _ = flatten(tree)
    labels: list[Hashable] = [0] * len(leaves)
    if scope == "leaf":
        labels = list(range(len(leaves)))
    elif not isinstance(scope, str):
        spread = jax.tree.map(
            lambda label, part: jax.tree.map(
                lambda _: label, part, is_leaf=_leaves.is_absent
            ),
            scope,
            tree,
        )
        labels = jax.tree.leaves(spread)
    groups: dict[Hashable, list[int]] = {}
    for i, label in enumerate(labels):
        groups.setdefault(label, []).append(i)
    return list(groups.values())


def _radii(tau: Tau, kept: jax.Array, step: jax.Array, count: int) -> jax.Array:
    """The radius of each group; infinite while an adaptive one is not yet known."""
    if isinstance(tau, AdaptiveRadius):
        return jnp.where(kept > 0, kept, INFINITY)
    return jnp.full(count, jnp.asarray(_checks.at_step(tau, step), jnp.float32))


def _followed(
    tau: AdaptiveRadius,
    radii: jax.Array,
    inside: jax.Array,
    sizes: jax.Array,
    dtype: jnp.dtype,
) -> jax.Array:
    """``tau exp(-rate (inside - quantile))``, or the size where ``tau`` is unknown."""
    followed = radii * jnp.exp(-tau.rate * (inside - tau.quantile))
    followed = jnp.where(jnp.isfinite(radii), followed, sizes).astype(dtype)
    return jnp.maximum(followed, jnp.finfo(dtype).tiny)


def _by_group(
    distance: Distance,
    groups: list[list[int]],
    delta: ByPosition,
    radii: jax.Array,
) -> tuple[ByPosition, jax.Array, jax.Array]:
    """Steps by position, and shares inside and sizes by group."""
    step, inside, sizes = {}, [jnp.ones(0)], [jnp.ones(0)]
    for group, radius in zip(groups, radii, strict=True):
        members = [i for i in group if i in delta]
        if not members:  # no gradient in this step
            inside.append(jnp.ones(1))
            sizes.append(jnp.zeros(1))
            continue
        leaves, split = [delta[i] for i in members], lambda parts: parts
        if not distance.by_leaf:
            leaves, split = _numerics.join_small(leaves)
        found = distance.step(leaves, radius)
        step |= dict(zip(members, split(found.leaves), strict=True))
        inside.append(jnp.asarray(found.inside)[None])
        sizes.append(jnp.asarray(found.size)[None])
    return step, jnp.concatenate(inside), jnp.concatenate(sizes)


def _advanced(m: list[Leaf], step: ByPosition, finite: jax.Array) -> list[Leaf]:
    """``m + step`` where the sample is finite."""
    new = list(m)
    for i, s in step.items():
        new[i] = jnp.where(finite, m[i] + s, m[i]).astype(m[i].dtype)
    return new
