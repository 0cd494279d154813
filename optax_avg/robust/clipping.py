"""Clips whose limit follows the norms seen so far, with the statistics in the state.

    g <- min(1, limit/|g|) g

A gradient that is not finite becomes zeros, changes no statistic and is counted. One
that is zero says nothing of the size of others: limits of norms do not count it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_avg import _checks, _leaves, _numerics
from optax_avg.robust import distances
from optax_avg.robust.location import adaptive_radius, track_location

INFINITY = float("inf")
UNUSUAL = 100.0  # a norm, in units of the median, that says nothing of the others
SPIKE = 1e6  # a global norm, in units of its limit, that says nothing of the leaves

# (norms of the groups, step, statistics) -> (limits, new statistics)
Limit = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class ClipState(NamedTuple):
    """State of the clips of this module.

    Attributes:
      clip_step: int32, finite gradients so far; for limits of norms those that are not
        zero.
      clip_statistics: of their norms, small arrays.
      clipped: int32, gradients of which some part was cut.
      rejected: int32, gradients that were not finite.
    """

    clip_step: jax.Array
    clip_statistics: Any
    clipped: jax.Array
    rejected: jax.Array


def clip_by_zscore(
    z_max: float = 2.5, decay: float = 0.97, warmup_steps: int = 25
) -> optax.GradientTransformationExtraArgs:
    """ZClip: clips norms that lie more than ``z_max`` deviations above their mean.

    Where ``|g| - mu > z_max sigma`` the limit is ``mu + z_max^2 sigma^2/(|g| - mu)``,
    the lower the higher the spike. Then ``mu <- decay mu + (1 - decay) n`` and
    ``sigma^2 <- decay sigma^2 + (1 - decay) (n - mu)^2`` with the clipped norm ``n``
    and the new ``mu``. In the warm-up nothing is clipped, and ``mu`` and ``sigma`` are
    those of the norms so far. Norms above 100 times their median are left out of these.

    As published, the rule follows slow changes of the norms only. Norms that rise at
    once by several times their deviation, and stay there, are clipped for good.

    Args:
      z_max: positive.
      decay: of the statistics, in [0, 1).
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
        high = jnp.where(
            spike, mu + reach * (reach / jnp.where(spike, excess, 1)), INFINITY
        )
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
    percentile: float = 10.0, window: int = 1000
) -> optax.GradientTransformationExtraArgs:
    """AutoClip: the limit is a percentile of the latest norms, this one included.

    Args:
      percentile: in [0, 100].
      window: norms that are remembered; at least 1.

    Returns:
      A transformation with the state :class:`ClipState`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax, optax_avg as oa
      >>> tx = optax.chain(oa.clip_by_percentile(10.0), optax.adam(1e-3))

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


def clip_by_quantile(
    quantile: float = 0.9, rate: float = 0.2, *, scope: Any = "global"
) -> optax.GradientTransformationExtraArgs:
    """Clips by a norm that follows a quantile of the norms in geometric steps.

    :func:`optax_avg.track_location` with an adaptive radius around zero.

    Args:
      quantile: share of the gradients that stays as it is, in [0, 1].
      rate: of the geometric steps.
      scope: of the norm, see :func:`optax_avg.track_location`.

    Returns:
      A transformation with the state :class:`optax_avg.LocationState`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax, optax_avg as oa
      >>> tx = optax.chain(oa.clip_by_quantile(0.9), optax.adam(1e-3))

    References:
      Andrew et al., 2021, 1905.03871.
    """
    radius = adaptive_radius(quantile, rate)
    return track_location(distances.l2(), radius, scope=scope, init="zeros", reset=True)


def clip_by_coordinate_quantile(
    quantile: float = 0.99, rate: float = 0.2, *, scope: Any = "leaf"
) -> optax.GradientTransformationExtraArgs:
    """Clips every element by a bound that follows a quantile of ``|g_i|``.

    Args:
      quantile: share of the elements that stays as it is, in [0, 1].
      rate: of the geometric steps.
      scope: elements that share a bound, see :func:`optax_avg.track_location`.

    Returns:
      A transformation with the state :class:`optax_avg.LocationState`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax, optax_avg as oa
      >>> tx = optax.chain(oa.clip_by_coordinate_quantile(0.99), optax.sgd(0.1))

    References:
      Andrew et al., 2021, 1905.03871.
    """
    radius = adaptive_radius(quantile, rate)
    return track_location(distances.l1(), radius, scope=scope, init="zeros", reset=True)


def clip_by_ema_norm(
    lambda_rel: float = 1.05,
    decay: float = 0.98,
    *,
    lambda_abs: float = 1.0,
    warmup_steps: int = 100,
) -> optax.GradientTransformationExtraArgs:
    """AdaGC: clips each leaf at ``lambda_rel`` times an EMA of its clipped norms.

    In the warm-up the global norm is clipped at ``lambda_abs`` and ``gamma`` is the
    smallest norm of each leaf; then ``limit = lambda_rel gamma`` and ``gamma <- decay
    gamma + (1 - decay) min(|g|, limit)``. A leaf whose gradients have all been zero has
    no ``gamma`` yet and is not clipped (in the paper it would stay at zero for ever);
    later ones of zero leave it alone, as does a global norm of ``1e6 lambda_abs`` in
    the warm-up.

    Args:
      lambda_rel: at least 1.
      decay: of ``gamma``, in [0, 1].
      lambda_abs: positive.
      warmup_steps: at least 1.

    Returns:
      A transformation with the state :class:`ClipState`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax, optax_avg as oa
      >>> tx = optax.chain(oa.clip_by_ema_norm(), optax.adamw(3e-4))

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
        share = jnp.minimum(1, lambda_abs / jnp.where(total > 0, total, 1))
        known = gamma > 0
        relative = jnp.where(known, lambda_rel * gamma, INFINITY)
        high = jnp.where(step < warmup_steps, share * n, relative)
        n = jnp.minimum(n, high)
        smallest = jnp.minimum(gamma, n)
        ema = decay * gamma + (1 - decay) * n
        followed = jnp.where(step < warmup_steps, smallest, ema)
        followed = jnp.where(known, followed, n)
        telling = (n > 0) & ((step >= warmup_steps) | (total < SPIKE * lambda_abs))
        return high, jnp.where(telling, followed, gamma)

    return _clip(limit, jnp.zeros, scope="leaf")


def clip_redescending(
    scale: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gravity's soft clip: ``g/(1 + (g/scale)^2)``, element by element.

    Largest at ``|g| = scale``, beyond it the larger the gradient the smaller the
    result.

    Args:
      scale: positive; by default ``1/max|g|`` of each leaf, as in Gravity.

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
      Bahrami and Pourkamali-Anaraki, "Gravity Optimizer: a Kinematic Approach on
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
    max_norm: float = 1.0, b0: float = 1.0, *, delay: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Clipped AdaGrad-Norm: ``clip(g, max_norm)/b``, ``b^2`` sums its squared norms.

    With the delay ``b`` holds the gradients before this one, so that it does not depend
    on it: ``u_t = clip(g_t)/b_t``, ``b_{t+1}^2 = b_t^2 + |clip(g_t)|^2``. What rounding
    takes from ``b`` is kept beside it, so that it does not stall in long runs.

    Args:
      max_norm: limit of the global norm; positive.
      b0: first ``b``; positive.
      delay: False: this gradient counts in its own ``b``.

    Returns:
      A transformation with the state :class:`ClipState`; follow it by a learning rate.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax, optax_avg as oa
      >>> tx = optax.chain(oa.scale_by_clipped_adagrad_norm(), optax.sgd(0.1))

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
        factor = jnp.where(n > 0, kept / jnp.where(n > 0, n, 1), 1)
        factor = factor / (b if delay else after)
        out = {i: factor * x for i, x in g.items()}
        return out, (after, left), n > max_norm

    start = lambda: (jnp.full([], b0, jnp.float32), jnp.zeros([], jnp.float32))
    return _with_statistics(divide, lambda groups: start())


def scale_by_induced_metric(
    xi: float = 0.1, decay: float = 0.1
) -> optax.GradientTransformationExtraArgs:
    """Preconditions by the metric of the loss surface: ``g/(1 + xi |g|^2)``.

    The inverse of ``I + xi g g'`` times ``g``, a smooth clip. ``|g|^2`` is a debiased
    exponential average.

    Args:
      xi: squared scale of the loss axis; not negative.
      decay: of the average, in [0, 1); 0 takes this gradient alone.

    Returns:
      A transformation with the state :class:`ClipState`; follow it by an optimizer.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax, optax_avg as oa
      >>> tx = optax.chain(oa.scale_by_induced_metric(), optax.sgd(0.1, momentum=0.9))

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
    limit: Limit, init: Callable[[int], Any], scope: str = "global"
) -> optax.GradientTransformationExtraArgs:
    """``g <- min(1, limit/|g|) g`` over all leaves or leaf by leaf."""

    def shorten(g, norms, step, statistics):
        high, statistics = limit(norms, step, statistics)
        cut = norms > high
        factor = jnp.where(cut, high / jnp.where(cut, norms, 1), 1)
        group = (lambda i: i) if scope == "leaf" else (lambda i: 0)
        out = {i: factor[group(i)] * x for i, x in g.items()}
        return out, statistics, jnp.any(cut)

    return _with_statistics(shorten, init, scope, zeros_count=False)


def _with_statistics(
    change: Callable[..., tuple[Any, Any, jax.Array]],
    init: Callable[[int], Any],
    scope: str = "global",
    zeros_count: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """A transformation of finite gradients, from the norms of its groups.

    ``change(g, norms, step, statistics) -> (g, statistics, cut)`` with ``g`` by
    position among all leaves, so that leaves without a gradient keep their group.
    """

    def init_fn(params: Any) -> ClipState:
        leaves = jax.tree.leaves(params, is_leaf=_leaves.is_absent)
        count = lambda: jnp.zeros([], jnp.int32)
        groups = len(leaves) if scope == "leaf" else 1
        dtype = _numerics.dtype_of_norms(_leaves.select(params, None))
        statistics = jax.tree.map(lambda s: s.astype(dtype), init(groups))
        return ClipState(count(), statistics, count(), count())

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del params, extra_args
        leaves, structure = jax.tree.flatten(updates, is_leaf=_leaves.is_absent)
        g = {
            i: _numerics.wide(leaf)
            for i, leaf in enumerate(leaves)
            if not _leaves.is_absent(leaf) and _leaves.is_float(leaf)
        }
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
