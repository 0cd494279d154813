"""Clips whose limit follows the norms seen so far, with the statistics in the state.

    g <- min(1, limit/|g|) g

A gradient that is not finite becomes zeros, changes no statistic and is counted. A
gradient of zero says nothing about the size of others, so that limits of norms do not
count it.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_avg import _checks, _leaves, _numerics
from optax_avg.robust import distances
from optax_avg.robust._gradients import (
    ByPosition,
    clip_factor,
    counter,
    flatten,
    positions,
    quotient,
)
from optax_avg.robust._options import INFINITY, Number, ScopeOption, with_scope
from optax_avg.robust.location import adaptive_radius, track_location

__all__ = [
    "ClipState",
    "clip_by_coordinate_quantile",
    "clip_by_ema_norm",
    "clip_by_percentile",
    "clip_by_quantile",
    "clip_by_zscore",
    "clip_redescending",
    "scale_by_clipped_adagrad_norm",
    "scale_by_induced_metric",
]

UNUSUAL = 100.0  # a norm, in units of the median, that says nothing about the others
SPIKE = 1e6  # a global norm, in units of its limit, that says nothing about the leaves

# What a clip remembers: a tree of small arrays.
Statistics = Any
# (norms of the groups, step, statistics) -> (limits of the groups, new statistics)
Limit = Callable[[jax.Array, jax.Array, Statistics], tuple[jax.Array, Statistics]]
# (gradients, norms of the groups, step, statistics) -> (new ones, new ones, was it cut)
Change = Callable[
    [ByPosition, jax.Array, jax.Array, Statistics],
    tuple[ByPosition, Statistics, jax.Array],
]
Group = Literal["global", "leaf"]


class ClipState(NamedTuple):
    """State of the clips of this module.

    Attributes:
      clip_step: Number of finite gradients so far, int32. Limits of norms count those
        that are not zero.
      clip_statistics: Statistics of their norms, small arrays.
      clipped: Number of gradients of which some part was cut, int32.
      rejected: Number of gradients that were not finite, int32.
    """

    clip_step: jax.Array
    clip_statistics: Statistics
    clipped: jax.Array
    rejected: jax.Array


def clip_by_zscore(
    z_max: Number = 2.5, decay: Number = 0.97, warmup_steps: int = 25
) -> optax.GradientTransformationExtraArgs:
    """ZClip: clips norms that lie more than ``z_max`` deviations above their mean.

    Where ``|g| - mu > z_max sigma`` the limit is ``mu + z_max^2 sigma^2/(|g| - mu)``,
    the lower the higher the spike. Then ``mu <- decay mu + (1 - decay) n`` and
    ``sigma^2 <- decay sigma^2 + (1 - decay) (n - mu)^2`` with the clipped norm ``n``
    and the new ``mu``. In the warm-up nothing is clipped, and ``mu`` and ``sigma`` are
    those of the norms so far, without norms above 100 times their median.

    As published, the rule follows slow changes of the norms only. Norms that rise at
    once by several times their deviation, and stay there, are clipped for the rest of
    the training.

    Args:
      z_max: Largest number of deviations, positive.
      decay: Decay of the statistics, in [0, 1).
      warmup_steps: Number of norms in the warm-up, at least 1. They are kept in the
        state.

    Returns:
      A transformation with the state :class:`ClipState`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.clip_by_zscore(warmup_steps=3)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 1.2, 0.8, 50.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> round(float(updates[0]), 2)
      1.0

    References:
      Kumar et al., "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", 2025,
      2504.02507.
    """
    z_max = _checks.within("z_max", z_max, 0, INFINITY, open_low=True)
    decay = _checks.within("decay", decay, 0, 1, closed_high=False)
    hint = "; inside optax.inject_hyperparams name it in static_args"
    warmup_steps = _checks.static_integer("warmup_steps", warmup_steps, 1, hint)

    def limit(n, step, statistics):
        mu, var, first = statistics
        warm = step < warmup_steps
        excess, reach = n - mu, z_max * jnp.sqrt(var)
        spike = ~warm & (excess > reach)
        high = jnp.where(spike, mu + reach * quotient(reach, excess), INFINITY)
        n = jnp.minimum(n, high)
        # A square that overflows would never leave the variance.
        n = jnp.minimum(n, 0.25 * float(jnp.finfo(n.dtype).max) ** 0.5)
        place = jnp.arange(warmup_steps)
        first = jnp.where(place == step, n[:, None], first)
        median = jnp.nanmedian(first, axis=1, keepdims=True)
        usual = jnp.where(first <= UNUSUAL * median, first, jnp.nan)
        new = jnp.where(warm, jnp.nanmean(usual, 1), mu + (1 - decay) * (n - mu))
        later = decay * var + (1 - decay) * (n - new) ** 2
        return high, (new, jnp.where(warm, jnp.nanvar(usual, 1), later), first)

    zeros = lambda groups: (
        jnp.zeros(groups),
        jnp.zeros(groups),
        jnp.full((groups, warmup_steps), jnp.nan, jnp.float32),
    )
    return _clip(limit, zeros)


def clip_by_percentile(
    percentile: Number = 10.0, window: int = 1000
) -> optax.GradientTransformationExtraArgs:
    """AutoClip: the limit is a percentile of the latest norms, this one included.

    Args:
      percentile: Percentile of the norms, in [0, 100].
      window: Number of norms that are remembered, at least 1.

    Returns:
      A transformation with the state :class:`ClipState`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.clip_by_percentile(50.0)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 2.0, 50.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> updates.tolist()
      [2.0]

    References:
      Seetharaman et al., "AutoClip: Adaptive Gradient Clipping for Source Separation
      Networks", 2020, 2007.14469.
    """
    percentile = _checks.within("percentile", percentile, 0, 100)
    _checks.check_integer("window", window, 1)

    def limit(n, step, norms):
        del step
        norms = jnp.append(norms[1:], n[0])
        return jnp.nanquantile(norms, percentile / 100)[None], norms

    return _clip(limit, lambda groups: jnp.full(window, jnp.nan, jnp.float32))


@with_scope()
def clip_by_quantile(
    quantile: Number = 0.9, rate: Number = 0.2, **options: Unpack[ScopeOption]
) -> optax.GradientTransformationExtraArgs:
    """Clips by a norm that follows a quantile of the norms in geometric steps.

    :func:`optax_avg.track_location` with an adaptive radius around zero.

    Args:
      quantile: Share of the gradients that stay as they are, in [0, 1].
      rate: Rate of the geometric steps, positive.
      **options: Groups of leaves.

    Returns:
      A transformation with the state :class:`optax_avg.LocationState`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.clip_by_quantile(0.9)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 50.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> updates.tolist()
      [1.0]

    References:
      Andrew et al., 2021, 1905.03871.
    """
    radius = adaptive_radius(quantile, rate)
    return track_location(distances.l2(), radius, init="zeros", reset=True, **options)


@with_scope("leaf")
def clip_by_coordinate_quantile(
    quantile: Number = 0.99, rate: Number = 0.2, **options: Unpack[ScopeOption]
) -> optax.GradientTransformationExtraArgs:
    """Clips every element by a bound that follows a quantile of ``|g_i|``.

    Args:
      quantile: Share of the elements that stay as they are, in [0, 1].
      rate: Rate of the geometric steps, positive.
      **options: Groups of leaves.

    Returns:
      A transformation with the state :class:`optax_avg.LocationState`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.clip_by_coordinate_quantile(0.5)
      >>> state = tx.init(jnp.zeros(2))
      >>> for g in (jnp.array([1.0, -1.0]), jnp.array([0.5, -9.0])):
      ...     updates, state = tx.update(g, state)
      >>> updates.tolist()
      [0.5, -1.0]

    References:
      Andrew et al., 2021, 1905.03871.
    """
    radius = adaptive_radius(quantile, rate)
    return track_location(distances.l1(), radius, init="zeros", reset=True, **options)


def clip_by_ema_norm(
    lambda_rel: Number = 1.05,
    decay: Number = 0.98,
    *,
    lambda_abs: Number = 1.0,
    warmup_steps: int = 100,
) -> optax.GradientTransformationExtraArgs:
    """AdaGC: clips each leaf at ``lambda_rel`` times an EMA of its clipped norms.

    In the warm-up the global norm is clipped at ``lambda_abs`` and ``gamma`` is the
    smallest norm of each leaf. After it ``limit = lambda_rel gamma`` and ``gamma <-
    decay gamma + (1 - decay) min(|g|, limit)``.

    Gradients of zero do not change ``gamma``. A leaf whose gradients have all been zero
    is not clipped; in the paper it would stay at zero for ever. In the warm-up, global
    norms above ``1e6 lambda_abs`` do not change ``gamma`` either.

    Args:
      lambda_rel: Limit of each leaf in units of ``gamma``, at least 1.
      decay: Decay of ``gamma``, in [0, 1].
      lambda_abs: Limit of the global norm in the warm-up, positive, in units of the
        gradients.
      warmup_steps: Number of steps of the warm-up, at least 1.

    Returns:
      A transformation with the state :class:`ClipState`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.clip_by_ema_norm(1.5, warmup_steps=1)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 50.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> updates.tolist()
      [1.5]

    References:
      Wang et al., "AdaGC: Improving Training Stability for Large Language Model
      Pretraining", 2025, 2502.11034.
    """
    lambda_rel = _checks.within("lambda_rel", lambda_rel, 1, INFINITY)
    decay = _checks.within("decay", decay, 0, 1)
    lambda_abs = _checks.within("lambda_abs", lambda_abs, 0, INFINITY, open_low=True)
    _checks.check_integer("warmup_steps", warmup_steps, 1)

    def limit(n, step, gamma):
        total = _numerics.norm(n)
        share = clip_factor(lambda_abs, total)
        known = gamma > 0
        relative = jnp.where(known, lambda_rel * gamma, INFINITY)
        high = jnp.where(step < warmup_steps, share * n, relative)
        n = jnp.minimum(n, high)
        smallest = jnp.minimum(gamma, n)
        ema = decay * gamma + (1 - decay) * n
        followed = jnp.where(step < warmup_steps, smallest, ema)
        followed = jnp.where(known, followed, n)
        telling = (n > 0) & ((step >= warmup_steps) | (total / SPIKE < lambda_abs))
        return high, jnp.where(telling, followed, gamma)

    return _clip(limit, jnp.zeros, scope="leaf")


def clip_redescending(
    scale: Number | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gravity's soft clip: ``g/(1 + (g/scale)^2)``, element by element.

    The result is largest at ``|g| = scale``. Beyond it, the result falls as the
    gradient grows.

    Args:
      scale: Size at which the result is largest, positive, in units of the gradients.
        The default is ``1/max|g|`` of each leaf, the formula of Gravity, which has no
        consistent unit: large gradients give small results.

    Returns:
      A transformation with the state :class:`ClipState`, which counts gradients that
      were not finite.

    Raises:
      ValueError: If ``scale`` is not positive.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.clip_redescending(2.0)
      >>> g = jnp.array([2.0, 6.0])
      >>> tx.update(g, tx.init(g))[0].round(3).tolist()
      [1.0, 0.6000000238418579]

    References:
      Bahrami and Pouriyan Zadeh, "Gravity Optimizer: a Kinematic Approach on
      Optimization in Deep Learning", 2021, 2101.09192.
    """
    if scale is not None:
        scale = _checks.within("scale", scale, 0, INFINITY, open_low=True)

    def soften(g, norms, step, statistics):
        del norms, step
        peak = {i: jnp.max(jnp.abs(x), initial=0) for i, x in g.items()}
        inverse = peak if scale is None else dict.fromkeys(g, 1 / scale)
        out = {i: x / (1 + (x * inverse[i]) ** 2) for i, x in g.items()}
        return out, statistics, jnp.asarray(False)

    return _with_statistics(soften, lambda groups: ())


def scale_by_clipped_adagrad_norm(
    max_norm: Number = 1.0, b0: Number = 1.0, *, delay: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Clipped AdaGrad-Norm: ``clip(g)/b``, where ``b^2`` sums the squared norms.

    ``u_t = clip(g_t)/b_t``, ``b_{t+1}^2 = b_t^2 + |clip(g_t)|^2``. The rounding error
    of ``b`` is kept beside it, so that ``b`` does not stall in long runs.

    Args:
      max_norm: Limit of the global norm, positive.
      b0: First ``b``, positive.
      delay: Whether ``b_t`` holds the gradients before this one, so that it does not
        depend on it. If not, ``u_t = clip(g_t)/b_{t+1}``.

    Returns:
      A transformation with the state :class:`ClipState`; follow it by a learning rate.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.scale_by_clipped_adagrad_norm(max_norm=2.5, b0=2.0)
      >>> g = jnp.array([3.0, 4.0])
      >>> tx.update(g, tx.init(g))[0].tolist()
      [0.75, 1.0]

    References:
      Chezhegov et al., "Gradient Clipping Improves AdaGrad when the Noise Is
      Heavy-Tailed", 2024, 2406.04443.
    """
    max_norm = _checks.within("max_norm", max_norm, 0, INFINITY, open_low=True)
    b0 = _checks.within("b0", b0, 0, INFINITY, open_low=True)

    def divide(g, norms, step, statistics):
        del step
        (b, rest), n = statistics, norms[0]
        kept = jnp.minimum(n, max_norm)
        # sqrt(b^2 + n^2) - b, which b alone would soon round away.
        risen = kept * (kept / 2 / (b / 2 + jnp.hypot(b, kept) / 2))
        after, left = _numerics.sum_and_error(b, rest + risen)
        factor = clip_factor(max_norm, n) / (b if delay else after)
        out = {i: factor * x for i, x in g.items()}
        return out, (after, left), n > max_norm

    start = lambda: (jnp.full([], b0, jnp.float32), jnp.zeros([], jnp.float32))
    return _with_statistics(divide, lambda groups: start())


def scale_by_induced_metric(
    xi: Number = 0.1, decay: Number = 0.1
) -> optax.GradientTransformationExtraArgs:
    """Preconditions by the metric of the loss surface: ``g/(1 + xi |g|^2)``.

    This is the inverse of ``I + xi g g'`` times ``g``, a smooth clip. ``|g|^2`` is a
    debiased exponential average.

    Args:
      xi: Squared scale of the loss axis, not negative.
      decay: Decay of the average, in [0, 1); 0 takes this gradient alone.

    Returns:
      A transformation with the state :class:`ClipState`; follow it by an optimizer.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.scale_by_induced_metric(xi=0.04, decay=0.0)
      >>> g = jnp.array([3.0, 4.0])
      >>> tx.update(g, tx.init(g))[0].tolist()
      [1.5, 2.0]

    References:
      Harvey, "The Optimiser Hidden in Plain Sight: Training with the Loss Landscape's
      Induced Metric", 2025, 2509.03594.
    """
    xi = _checks.within("xi", xi, 0, INFINITY, closed_high=False)
    decay = _checks.within("decay", decay, 0, 1, closed_high=False)

    def precondition(g, norms, step, statistics):
        del step
        total, mass = statistics
        # One huge gradient must not fill the average with infinity.
        square = jnp.minimum((xi**0.5 * norms[0]) ** 2, 1e30)
        total = decay * total + (1 - decay) * square
        mass = decay * mass + (1 - decay)
        factor = 1 / (1 + total / mass)
        return {i: factor * x for i, x in g.items()}, (total, mass), jnp.asarray(False)

    zero = lambda: jnp.zeros([], jnp.float32)
    return _with_statistics(precondition, lambda groups: (zero(), zero()))


def _clip(
    limit: Limit, init: Callable[[int], Statistics], scope: Group = "global"
) -> optax.GradientTransformationExtraArgs:
    """``g <- min(1, limit/|g|) g`` over all leaves or leaf by leaf."""

    def shorten(g, norms, step, statistics):
        high, statistics = limit(norms, step, statistics)
        factor = clip_factor(high, norms)
        group = (lambda i: i) if scope == "leaf" else (lambda i: 0)
        out = {i: factor[group(i)] * x for i, x in g.items()}
        return out, statistics, jnp.any(norms > high)

    return _with_statistics(shorten, init, scope, zeros_count=False)


def _with_statistics(
    change: Change,
    init: Callable[[int], Statistics],
    scope: Group = "global",
    zeros_count: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """A transformation of finite gradients by a function of the norms of its groups.

    Gradients are given by position among all leaves, so that leaves without a gradient
    keep their group. With ``zeros_count=False`` a gradient of zero changes nothing.
    """

    def init_fn(params: optax.Params) -> ClipState:
        leaves, _ = flatten(params)
        groups = len(leaves) if scope == "leaf" else 1
        dtype = _numerics.dtype_of_norms(_leaves.select(params, None))
        statistics = jax.tree.map(lambda s: s.astype(dtype), init(groups))
        return ClipState(counter(), statistics, counter(), counter())

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ClipState]:
        del params, extra_args
        leaves, structure = flatten(updates)
        g = {i: _numerics.wide(leaves[i]) for i in positions(leaves)}
        if scope == "leaf":
            members = [[g[i]] if i in g else [] for i in range(len(leaves))]
        else:
            members = [list(g.values())]
        norms = _numerics.norms(members)
        if kept := jax.tree.leaves(state.clip_statistics):
            # A norm that they cannot hold counts as not finite.
            norms = norms.astype(kept[0].dtype)
        finite = jnp.all(jnp.isfinite(norms))
        telling = jnp.any(norms >= jnp.finfo(norms.dtype).tiny)
        counted = finite if zeros_count else finite & telling
        out, statistics, cut = change(g, norms, state.clip_step, state.clip_statistics)
        for i, x in out.items():
            leaves[i] = jnp.where(finite, x, 0).astype(leaves[i].dtype)
        return structure.unflatten(leaves), ClipState(
            clip_step=_numerics.count_if(counted, state.clip_step),
            clip_statistics=jax.tree.map(
                lambda new, old: jnp.where(counted, new, old).astype(old.dtype),
                statistics,
                state.clip_statistics,
            ),
            clipped=_numerics.count_if(finite & cut, state.clipped),
            rejected=_numerics.count_if(~finite, state.rejected),
        )

    return optax.GradientTransformationExtraArgs(
        _leaves.shapes_for_shapes(init_fn), update_fn
    )
