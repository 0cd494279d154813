"""Locations of gradients over iterations: clipping as an estimator of the median.

    m <- m + Proj_{tau B*}(g - m)

is the stochastic proximal point step towards the minimiser of ``E D(m - g)``: the mean
for the squared l2 norm, a median for the l2 norm. With ``m = 0`` at every step it is
ordinary clipping. A constant ``tau`` finds a location between the two: the median as
``tau`` goes to 0, the mean as it grows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_avg import _checks, _leaves, _mesh, _numerics
from optax_avg.robust import distances
from optax_avg.robust.distances import Distance

INFINITY = float("inf")


class AdaptiveRadius(NamedTuple):
    """A radius that follows a quantile, see :func:`adaptive_radius`.

    Attributes:
      quantile: of the sizes of ``g - m``.
      rate: of the geometric updates.
      init: first radius, None for the first size that is seen.
    """

    quantile: Any
    rate: Any
    init: Any


class LocationState(NamedTuple):
    """State of :func:`track_location`.

    Attributes:
      location_step: int32, samples that counted; schedules are called with it.
      location: ``m`` in float32 or wider, ``()`` where it is reset at every step.
      location_radius: shape (groups,), adaptive radii (0: not yet known), or ``()``.
      accepted: int32, samples within the radius.
      clipped: int32, samples that were cut.
      rejected: int32, samples that were not finite.
    """

    location_step: jax.Array
    location: Any
    location_radius: Any
    accepted: jax.Array
    clipped: jax.Array
    rejected: jax.Array


def adaptive_radius(
    quantile: float = 0.5, rate: float = 0.2, init: float | None = None
) -> AdaptiveRadius:
    """A radius that follows a quantile of the sizes of ``g - m``, whatever their scale.

    ``tau <- tau exp(-rate (1[size <= tau] - quantile))``; for element-wise distances
    the share of elements stands in place of the indicator.

    Args:
      quantile: in [0, 1]; 0.5 clips every other sample.
      rate: of the updates; a factor of 10^4 takes ``ln(10^4)/(rate quantile)`` steps
        upwards, and ``ln(10^4)/(rate (1 - quantile))`` downwards.
      init: first radius; by default the first size that is seen.

    Returns:
      For the argument ``tau`` of :func:`track_location`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax_avg as oa
      >>> tx = oa.vclip(oa.adaptive_radius(quantile=0.9))

    References:
      Andrew et al., "Differentially Private Learning with Adaptive Clipping", 2021,
      1905.03871.
    """
    quantile = _checks.within("quantile", quantile, 0, 1)
    rate = _checks.within("rate", rate, 0, INFINITY, open_low=True)
    if init is not None:
        init = _checks.within("init", init, 0, INFINITY, open_low=True)
    return AdaptiveRadius(quantile, rate, init)


def track_location(
    distance: Distance,
    tau: optax.ScalarOrSchedule | AdaptiveRadius,
    *,
    scope: Any = "global",
    init: str = "first",
    reset: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient by a robust location ``m`` of the gradients so far.

        m <- m + step(g - m, tau)

    The step is that of the distance, see :mod:`optax_avg.distances`. A sample that is
    not finite changes nothing but a counter.

    Args:
      distance: A distance, such as ``oa.distances.l2()``. It decides of what ``m`` is
        an estimate: the mean, a median, a quantile, or what lies between.
      tau: Radius or step size, not negative: a float, a schedule of the samples so far,
        or an :func:`adaptive_radius`. At infinity ``m`` is the gradient.
      scope: Leaves that share a norm and an adaptive radius: ``"global"`` for all,
        ``"leaf"`` for each alone, or a tree of labels like a prefix of the gradients,
        for one group a label.
      init: Start of ``m``: ``"first"`` for the first finite gradient, or ``"zeros"``.
      reset: Whether ``m = 0`` at every step, which is ordinary clipping. It needs
        ``init="zeros"``.

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
    _check_distance(distance)
    tau = _checked_radius(distance, tau)
    _check_choices(scope, init, reset)

    def init_fn(params: Any) -> LocationState:
        m, radius = _leaves.zeros_like_wide(params), ()
        if isinstance(tau, AdaptiveRadius):
            first = tau.init or 0.0
            radius = jnp.full(
                len(_groups(scope, m)), first, _numerics.dtype_of_norms(m)
            )
        count = lambda: jnp.zeros([], jnp.int32)
        return LocationState(
            count(), () if reset else m, radius, count(), count(), count()
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del params, extra_args
        leaves, structure = jax.tree.flatten(updates, is_leaf=_leaves.is_absent)
        tree = _leaves.zeros_like_wide(updates) if reset else state.location
        old, _ = jax.tree.flatten(tree, is_leaf=_leaves.is_absent)
        if len(old) != len(leaves):
            raise ValueError(
                f"{len(leaves)} gradients for a location of {len(old)} leaves; pass "
                "gradients like the parameters of init."
            )
        delta = {
            i: _numerics.wide(g) - m
            for i, (g, m) in enumerate(zip(leaves, old, strict=True))
            if not (_leaves.is_absent(g) or _leaves.is_absent(m))
        }
        first = (state.location_step == 0) & (init == "first")
        groups = _groups(scope, tree)
        radii = _radii(tau, state, len(groups))
        step, inside, sizes = _by_group(distance, groups, delta, radii)
        # Sizes are norms or means: finite if and only if all differences are.
        finite = _mesh.agreed(jnp.all(jnp.isfinite(sizes)))
        cut = jnp.any(inside < 1) & ~first
        new = list(old)
        for i, d in delta.items():
            taken = jnp.where(first, d, step[i])
            new[i] = jnp.where(finite, old[i] + taken, old[i]).astype(old[i].dtype)
            leaves[i] = new[i].astype(leaves[i].dtype)
        radius = state.location_radius
        if isinstance(tau, AdaptiveRadius):
            followed = radii * jnp.exp(-tau.rate * (inside - tau.quantile))
            followed = jnp.where(jnp.isfinite(radii), followed, sizes)
            followed = followed.astype(radius.dtype)
            followed = jnp.maximum(followed, jnp.finfo(followed.dtype).tiny)
            # A first gradient, a repeated or a missing one say nothing about distances.
            telling = finite & ~first & (sizes > 0)
            radius = jnp.where(telling, followed, radius)
        located = jax.tree.structure(tree, is_leaf=_leaves.is_absent).unflatten(new)
        return structure.unflatten(leaves), LocationState(
            location_step=_numerics.count_if(finite, state.location_step),
            location=() if reset else located,
            location_radius=radius,
            accepted=_numerics.count_if(finite & ~cut, state.accepted),
            clipped=_numerics.count_if(finite & cut, state.clipped),
            rejected=_numerics.count_if(~finite, state.rejected),
        )

    return optax.GradientTransformationExtraArgs(
        _leaves.shapes_for_shapes(init_fn), update_fn
    )


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


def _checked_radius(distance: Distance, tau: Any) -> Any:
    """``tau`` as it is used; raises where it does not fit the distance."""
    if isinstance(tau, AdaptiveRadius):
        if not distance.tau_is_radius:
            raise ValueError(
                "tau of this distance is a step size, not a radius that can adapt; "
                "pass a float or a schedule, or a distance such as oa.distances.l2()."
            )
        return tau
    return tau if callable(tau) else _checks.within("tau", tau, 0, INFINITY)


def _check_choices(scope: Any, init: str, reset: bool) -> None:
    if init not in ("first", "zeros"):
        raise ValueError(f"init must be 'first' or 'zeros', got {init!r}.")
    if reset and init != "zeros":
        raise ValueError("reset=True has m = 0 at every step; pass init='zeros'.")
    if isinstance(scope, str) and scope not in ("global", "leaf"):
        raise ValueError(f"scope must be 'global', 'leaf' or a tree, got {scope!r}.")


def vclip(
    tau: Any, *, scope: Any = "global", init: str = "first"
) -> optax.GradientTransformationExtraArgs:
    """VClip: ``m <- m + min(1, tau/|g - m|) (g - m)``, a median of gradient vectors.

    Args:
      tau: a float, a schedule, or an :func:`adaptive_radius`.
      scope: of the norm, see :func:`track_location`.
      init: ``"first"`` or ``"zeros"``.

    Returns:
      A transformation with the state :class:`LocationState`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax, optax_avg as oa
      >>> tx = optax.chain(oa.vclip(oa.adaptive_radius(0.5)), optax.sgd(0.1))

    References:
      Schaipp et al., 2024, 2402.12828.
    """
    return track_location(distances.l2(), tau, scope=scope, init=init)


def cclip(
    tau: Any, *, scope: Any = "global", init: str = "first"
) -> optax.GradientTransformationExtraArgs:
    """CClip: ``m <- m + clip(g - m, -tau, tau)``, a median element by element.

    Args:
      tau: a float, a schedule, or an :func:`adaptive_radius`.
      scope: of an adaptive radius, see :func:`track_location`.
      init: ``"first"`` or ``"zeros"``.

    Returns:
      A transformation with the state :class:`LocationState`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax, optax_avg as oa
      >>> tx = optax.chain(oa.cclip(0.01), optax.sgd(0.1))

    References:
      Schaipp et al., 2024, 2402.12828.
    """
    return track_location(distances.l1(), tau, scope=scope, init=init)


def clipped_ema(
    decay: float, max_norm: float, *, scope: Any = "global", init: str = "first"
) -> optax.GradientTransformationExtraArgs:
    """``m <- m + (1 - decay) min(1, max_norm/|g - m|) (g - m)``, a Huber location.

    The EMA of gradients whose distance to it is clipped: ``distances.huber(mu)``
    with ``tau = (1 - decay)/decay`` and ``mu = decay max_norm``.

    Args:
      decay: of the EMA, in (0, 1).
      max_norm: largest distance that counts in full; positive.
      scope: of the norm, see :func:`track_location`.
      init: ``"first"`` or ``"zeros"``.

    Returns:
      A transformation with the state :class:`LocationState`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax, optax_avg as oa
      >>> tx = optax.chain(oa.clipped_ema(0.9, max_norm=1.0), optax.sgd(0.1))

    References:
      Schaipp et al., 2024, 2402.12828.
    """
    decay = _checks.within("decay", decay, 0, 1, open_low=True, closed_high=False)
    max_norm = _checks.within("max_norm", max_norm, 0, INFINITY, open_low=True)
    huber = distances.huber(decay * max_norm)
    return track_location(huber, (1 - decay) / decay, scope=scope, init=init)


def _groups(scope: Any, tree: Any) -> list[list[int]]:
    """Positions of the leaves of each group among all, absent ones counted."""
    leaves = jax.tree.leaves(tree, is_leaf=_leaves.is_absent)
    labels: list[Any] = [0] * len(leaves)
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
    groups: dict[Any, list[int]] = {}
    for i, label in enumerate(labels):
        groups.setdefault(label, []).append(i)
    return list(groups.values())


def _radii(tau: Any, state: LocationState, count: int) -> jax.Array:
    """The radius of each group; infinite while an adaptive one is not yet known."""
    if isinstance(tau, AdaptiveRadius):
        known = state.location_radius > 0
        return jnp.where(known, state.location_radius, INFINITY)
    now = tau(state.location_step) if callable(tau) else tau
    return jnp.full(count, jnp.asarray(now, jnp.float32))


def _by_group(
    distance: Distance,
    groups: list[list[int]],
    delta: dict[int, jax.Array],
    radii: jax.Array,
) -> tuple[dict[int, jax.Array], jax.Array, jax.Array]:
    """Steps by position, and shares inside and sizes by group."""
    step, inside, sizes = {}, [jnp.ones(0)], [jnp.ones(0)]
    for group, radius in zip(groups, radii, strict=True):
        members = [i for i in group if i in delta]
        if not members:  # no gradient today
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
