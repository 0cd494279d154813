"""Robust locations of gradients across examples, micro-batches and workers.

    z = sum_i w_i v_i,    w from the Gram matrix G of the rows v_i - z_0

One product for ``G``, rounds on ``n`` coefficients, one weighted sum: two passes over
the gradients whatever the number of rounds. The others go coordinate by coordinate.

Each is an ``optax.experimental.aggregating.Aggregator`` over an axis of elements, or
inside ``shard_map`` over the devices of ``axis_name``. A row whose norm is not finite
is left out and counted; if none remains, the result is zero (or the location so far).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from optax.experimental import aggregating

from optax_avg import _checks, _leaves, _numerics
from optax_avg.robust import _stack
from optax_avg.robust._centred import (
    FAR,
    centred,
    distances,
    factored,
    invertible,
    scales,
)
from optax_avg.robust._row_checks import check_rows
from optax_avg.robust._stack import Stack
from optax_avg.robust.distances import Distance
from optax_avg.robust.location import AdaptiveRadius, track_location

INFINITY = float("inf")
# From a stack, what the rule remembers and the step to leaves, and what it remembers.
Rule = Callable[[Stack, Any, jax.Array], tuple[list[jax.Array], Any]]


class AggregationState(NamedTuple):
    """State of an aggregator.

    Attributes:
      aggregation_step: int32, calls of ``update``; schedules are called with it.
      left_out: int32, rows that were not finite so far.
      aggregation_memory: ``()``, the location of :func:`centered_clip` in float32 or
        wider, or the PRNG key of :func:`optax_avg.pcgrad`.
    """

    aggregation_step: jax.Array
    left_out: jax.Array
    aggregation_memory: Any


def aggregator(
    rule: Rule,
    per_elt_axis: int | None,
    axis_name: Any,
    remember: Callable[[Any], Any] = lambda params: (),
) -> aggregating.Aggregator:
    """An aggregator of Optax from a rule on the rows."""
    if per_elt_axis is None and axis_name is None:
        per_elt_axis = 0

    def init_fn(params: Any) -> AggregationState:
        zero = jnp.zeros([], jnp.int32)
        return AggregationState(zero, zero.copy(), remember(params))

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        check_rows(updates, params, per_elt_axis, axis_name)
        stack = _stack.stack_of(updates, per_elt_axis, axis_name)
        step = state.aggregation_step
        if stack.rows:
            leaves, memory = rule(stack, state.aggregation_memory, step)
        else:
            leaves, memory = [], state.aggregation_memory
        bad = jnp.sum(~stack.valid).astype(jnp.int32)
        top = jnp.iinfo(jnp.int32).max
        return stack.place(leaves, stack.blank), AggregationState(
            _numerics.count_if(jnp.asarray(True), step),
            jnp.where(state.left_out > top - bad, top, state.left_out + bad),
            memory,
        )

    return aggregating.Aggregator(_leaves.shapes_for_shapes(init_fn), update_fn)


def coordinate_median(
    *, per_elt_axis: int | None = None, axis_name: Any = None
) -> aggregating.Aggregator:
    """The median of each coordinate, the mean of the two middle ones of an even number.

    Where most elements have a zero, as in the rows of an embedding table, so has the
    median: such rows are not trained.

    Args:
      per_elt_axis: axis of the elements; by default 0, or none with ``axis_name``:
        then every device holds one element.
      axis_name: of the devices, inside ``shard_map`` or ``pmap``; each gathers its
        share of the coordinates of all, memory does not grow with their number. The
        gradients must differ over it: take them at ``jax.lax.pcast(params, axis_name,
        to="varying")``, or ``jax.grad`` sums them over the devices.

    Returns:
      An aggregator with the state :class:`AggregationState`.

    Raises:
      ValueError: In ``update``, if gradients do not differ over ``axis_name``, or do
        not have the shapes of ``params``, where these are passed, and an axis of
        elements.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.coordinate_median()
      >>> stacked = jnp.array([[1.0, 5.0], [2.0, -9.0], [99.0, 6.0]])
      >>> tx.update(stacked, tx.init(jnp.zeros(2)))[0].tolist()
      [2.0, 5.0]

    References:
      Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical
      Rates", 2018, 1803.01498.
    """

    def rule(stack, memory, step):
        del step
        n = len(stack.valid)
        return _stack.rank_weighted(stack, trimmed(stack.valid, (n - 1) // 2)), memory

    return aggregator(rule, per_elt_axis, axis_name)


def trimmed_mean(
    trim: int, *, per_elt_axis: int | None = None, axis_name: Any = None
) -> aggregating.Aggregator:
    """The mean of each coordinate without its ``trim`` least and greatest values.

    Args:
      trim: left out at each end; where no more than ``2 trim`` elements are finite, the
        median. If at most so many rows are bad, each coordinate lies between those of
        good rows.
      per_elt_axis: axis of the elements, see :func:`coordinate_median`.
      axis_name: of the devices, see :func:`coordinate_median`.

    Returns:
      An aggregator with the state :class:`AggregationState`.

    Raises:
      ValueError: If ``trim`` is negative or leaves nothing.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.trimmed_mean(1)
      >>> float(tx.update(jnp.array([1.0, 2.0, 4.0, 99.0]), tx.init(jnp.zeros([])))[0])
      3.0

    References:
      Yin et al., 2018, 1803.01498.
    """
    _checks.check_integer("trim", trim, 0)

    def rule(stack, memory, step):
        del step
        _check_count(stack, 2 * trim + 1, f"trimmed_mean({trim})")
        return _stack.rank_weighted(stack, trimmed(stack.valid, trim)), memory

    return aggregator(rule, per_elt_axis, axis_name)


def trimmed(valid: jax.Array, trim: int) -> jax.Array:
    """Weights by rank of the trimmed mean; that of the median where it trims all."""
    count = jnp.sum(valid)
    end = jnp.minimum(trim, (jnp.maximum(count, 1) - 1) // 2)
    rank = jnp.arange(len(valid))
    inside = (rank >= end) & (rank < count - end)
    return inside / jnp.maximum(jnp.sum(inside), 1)


def _check_count(stack: Stack, least: int, what: str) -> None:
    if len(stack.valid) < least:
        raise ValueError(
            f"{what} needs at least {least} elements, got {len(stack.valid)}."
        )


def geometric_median(
    *,
    nu: float = 1e-6,
    num_iters: int = 8,
    per_elt_axis: int | None = None,
    axis_name: Any = None,
) -> aggregating.Aggregator:
    """``argmin_z sum_i |v_i - z|`` by the smoothed Weiszfeld algorithm.

    ``z <- sum_i beta_i v_i / sum_i beta_i``, ``beta_i = 1/max(nu, |v_i - z|)``, from
    the mean of the half of the rows that is closest to one of them. Rounds are on
    ``n`` coefficients and cost next to nothing.

    With ``f < n/2`` bad rows, whatever they are, the distance of the geometric median
    from any point is at most ``2 (n - f)/(n - 2 f)`` times that of the farthest good
    row.

    Args:
      nu: least distance, in units of the gradients. No more of it counts than the
        median distance of the rows from the middle one, or it would move small rows.
      num_iters: rounds.
      per_elt_axis: axis of the elements, see :func:`coordinate_median`.
      axis_name: of the devices, see :func:`coordinate_median`.

    Returns:
      An aggregator with the state :class:`AggregationState`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.geometric_median(num_iters=100)
      >>> stacked = jnp.array([[3.0, 0.0], [0.0, 1.0], [-9.0, 0.0], [0.0, -5.0]])
      >>> z, _ = tx.update(stacked, tx.init(jnp.zeros(2)))
      >>> bool(jnp.linalg.norm(z) < 0.01)
      True

    References:
      Pillutla et al., "Robust Aggregation for Federated Learning", 2022, 1912.13445.
    """
    return _geometric_median(None, nu, num_iters, per_elt_axis, axis_name)


def median_of_means(
    groups: int,
    *,
    nu: float = 1e-6,
    num_iters: int = 8,
    per_elt_axis: int | None = None,
    axis_name: Any = None,
) -> aggregating.Aggregator:
    """The geometric median of the means of contiguous groups.

    Bad rows must lie in fewer than half of the groups; then it stays as close to the
    means of the others as :func:`geometric_median` to good rows.

    Args:
      groups: their number, a divisor of that of the elements.
      nu: least distance, see :func:`geometric_median`.
      num_iters: rounds.
      per_elt_axis: axis of the elements, see :func:`coordinate_median`.
      axis_name: of the devices, see :func:`coordinate_median`; elements are counted
        device by device.

    Returns:
      An aggregator with the state :class:`AggregationState`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.median_of_means(3)
      >>> stacked = jnp.array([0.0, 2.0, 1.0, 1.0, 99.0, 99.0])
      >>> round(float(tx.update(stacked, tx.init(jnp.zeros([])))[0]), 2)
      1.0

    References:
      Minsker, "Geometric Median and Robust Estimation in Banach Spaces", 2015,
      1308.1334.
    """
    _checks.check_integer("groups", groups, 1)
    return _geometric_median(groups, nu, num_iters, per_elt_axis, axis_name)


def _geometric_median(
    groups: int | None, nu: Any, num_iters: int, axis: int | None, axis_name: Any
) -> aggregating.Aggregator:
    nu = _checks.within("nu", nu, 0, INFINITY, open_low=True, closed_high=False)
    _checks.check_integer("num_iters", num_iters, 1)

    def rule(stack, memory, step):
        del step
        if groups is not None:
            stack = group_means(stack, groups, axis_name)
        found = centred(stack, axis_name, lambda count: count // 2)
        least = jnp.maximum(jnp.minimum(nu, found.typical) / found.unit, 1 / FAR)
        c = weiszfeld(found.gram, found.valid, least, num_iters)
        return found.combine(c), memory

    return aggregator(rule, axis, axis_name)


def weiszfeld(
    gram: jax.Array, valid: jax.Array, nu: jax.Array, num_iters: int
) -> jax.Array:
    """Coefficients of the geometric median of rows with this Gram matrix."""
    size = jnp.diagonal(gram)
    near = valid & (size <= size[_stack.middle(size, valid)])

    def normalised(beta):
        return beta / jnp.maximum(jnp.sum(beta), jnp.finfo(beta.dtype).tiny)

    def advance(_, c):
        return normalised(valid / jnp.maximum(nu, distances(gram, c)))

    return lax.fori_loop(0, num_iters, advance, normalised(near.astype(gram.dtype)))


def group_means(stack: Stack, groups: int, axis_name: Any) -> Stack:
    """The means of contiguous groups of rows; groups without a valid row are invalid.

    Raises:
      ValueError: If the groups cannot be of one size.
    """
    n = len(stack.valid)
    if n % groups:
        raise ValueError(f"{n} elements do not make {groups} groups of one size.")
    member = (jnp.arange(groups)[:, None] == jnp.arange(n)[None] // (n // groups)) & (
        stack.valid[None]
    )
    weights = member / jnp.maximum(jnp.sum(member, axis=1, keepdims=True), 1)
    rows = _stack.combine(stack, weights)
    norms = _stack.row_norms(rows, axis_name)
    valid = jnp.any(member, axis=1) & jnp.isfinite(norms)
    return stack._replace(rows=rows, norms=norms, valid=valid)


def centered_clip(
    tau: Any,
    num_iters: int = 1,
    *,
    per_elt_axis: int | None = None,
    axis_name: Any = None,
) -> aggregating.Aggregator:
    """``m <- m + mean_i min(1, tau/|v_i - m|) (v_i - m)``, with m carried over.

    The location starts at zero. With one element this is
    ``oa.vclip(tau, init="zeros")``. While ``f < n/2`` of the rows are bad, whatever
    they are, its norm stays below about ``max(R + tau, R/(1 - q^2)^(1/2)) + tau``,
    where ``R`` is the norm of the largest good row and ``q = f/(n - f)``.

    Args:
      tau: a float or a schedule of the step.
      num_iters: rounds per step.
      per_elt_axis: axis of the elements, see :func:`coordinate_median`.
      axis_name: of the devices, see :func:`coordinate_median`.

    Returns:
      An aggregator with the state :class:`AggregationState`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.centered_clip(1.0)
      >>> float(tx.update(jnp.array([0.5, 0.5, 99.0]), tx.init(jnp.zeros([])))[0])
      0.6666666865348816

    References:
      Karimireddy et al., "Learning from History for Byzantine Robust Optimization",
      2021, 2012.10333.
    """
    if not callable(tau):
        tau = _checks.within("tau", tau, 0, INFINITY)
    _checks.check_integer("num_iters", num_iters, 1)

    def rule(stack, memory, step):
        radius = jnp.asarray(tau(step) if callable(tau) else tau, jnp.float32)
        m = stack.arrange(memory)
        size = _stack.row_norms(stack.rows, axis_name, m)
        valid = stack.valid & jnp.isfinite(size)
        stack = stack._replace(valid=valid)
        share = valid / jnp.maximum(jnp.sum(valid), 1)
        size = jnp.where(valid, size, 0)
        unit = invertible(radius)
        scale = scales(size, unit)
        c = share * clip_factor(radius / unit, scale * size)
        if num_iters > 1:
            matrix = _stack.gram(stack, scale, m)

            def advance(_, c):
                pull = share * clip_factor(radius / unit, distances(matrix, c))
                return (1 - jnp.sum(pull)) * c + pull

            c = lax.fori_loop(1, num_iters, advance, c)
        weights, factors, total = factored(c, size, unit)
        pulled = _stack.combine(stack, weights, factors)
        leaves = [(1 - total) * a + b for a, b in zip(m, pulled, strict=True)]
        return leaves, stack.place(leaves, memory)

    return aggregator(rule, per_elt_axis, axis_name, _leaves.zeros_like_wide)


def clip_factor(tau: jax.Array, size: jax.Array) -> jax.Array:
    """``min(1, tau/size)``, 1 at size 0."""
    return jnp.where(size > tau, tau / jnp.where(size > 0, size, 1), 1)


def krum(
    num_byzantine: int,
    num_selected: int = 1,
    *,
    per_elt_axis: int | None = None,
    axis_name: Any = None,
) -> aggregating.Aggregator:
    """The row whose ``n - f - 2`` nearest rows are the closest; multi-Krum.

    For ``n >= 2 f + 3`` it is no longer than ``1 + 2 sqrt(n - f - 2)`` times the
    largest good row.

    Args:
      num_byzantine: ``f``, how many rows may be anything; the paper's guarantee holds
        for ``n >= 2 f + 3``.
      num_selected: so many rows with the least sums of squared distances are averaged,
        at most ``n - f``.
      per_elt_axis: axis of the elements, see :func:`coordinate_median`.
      axis_name: of the devices, see :func:`coordinate_median`.

    Returns:
      An aggregator with the state :class:`AggregationState`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.krum(num_byzantine=1)
      >>> stacked = jnp.array([0.0, 1.0, 1.25, 1.5, 99.0])
      >>> float(tx.update(stacked, tx.init(jnp.zeros([])))[0])
      1.25

    References:
      Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient
      Descent", 2017, 1703.02757.
    """
    _checks.check_integer("num_byzantine", num_byzantine, 0)
    _checks.check_integer("num_selected", num_selected, 1)

    def rule(stack, memory, step):
        del step
        least = num_byzantine + max(3, num_selected)
        _check_count(stack, least, f"krum({num_byzantine}, {num_selected})")
        # So many rows are neighbours of the best one, or are averaged.
        rank = max(len(stack.valid) - num_byzantine - 2, num_selected - 1)
        found = centred(stack, axis_name, lambda _: rank)
        score = krum_scores(found.gram, found.valid, num_byzantine)
        place = jnp.argsort(jnp.argsort(score))
        chosen = (place < num_selected) & found.valid
        return _stack.combine(stack, chosen / jnp.maximum(jnp.sum(chosen), 1)), memory

    return aggregator(rule, per_elt_axis, axis_name)


def krum_scores(gram: jax.Array, valid: jax.Array, num_byzantine: int) -> jax.Array:
    """Sums of the ``n - f - 2`` smallest squared distances to other valid rows."""
    n = len(valid)
    size = jnp.diagonal(gram)
    squared = jnp.maximum(size[:, None] + size[None] - 2 * gram, 0)
    others = valid[None] & ~jnp.eye(n, dtype=bool)
    nearest = jnp.sort(jnp.where(others, squared, INFINITY), axis=1)
    nearest = nearest[:, : n - num_byzantine - 2]
    total = jnp.sum(jnp.where(jnp.isfinite(nearest), nearest, 0), axis=1)
    return jnp.where(valid, total, INFINITY)


def flag_aggregator(
    rank: int,
    *,
    num_iters: int = 5,
    per_elt_axis: int | None = None,
    axis_name: Any = None,
) -> aggregating.Aggregator:
    """Mean of the rows projected on the subspace that explains their directions best.

    ``mean_i Y Y' v_i``, ``Y = argmin sum_i sqrt(1 - |Y' v_i|^2/|v_i|^2)`` over
    orthonormal ``Y`` of ``rank`` columns, by iteratively reweighted least squares from
    equal weights. The authors' code sums projections of normalised rows instead.

    The subspace knows directions alone: a bad row inside it counts with its whole
    length. Clip the rows before where they can be of any size.

    Args:
      rank: of the subspace; the paper takes ``ceil((n + 1)/2)``.
      num_iters: rounds.
      per_elt_axis: axis of the elements, see :func:`coordinate_median`.
      axis_name: of the devices, see :func:`coordinate_median`.

    Returns:
      An aggregator with the state :class:`AggregationState`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.flag_aggregator(rank=1)
      >>> stacked = jnp.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 4.0]])
      >>> z, _ = tx.update(stacked, tx.init(jnp.zeros(2)))
      >>> [round(x, 2) + 0.0 for x in z.tolist()]
      [0.75, 0.0]

    References:
      Almasi et al., "Flag Aggregator: Scalable Distributed Training under Failures and
      Augmented Losses using Convex Optimization", 2023, 2302.05865.
    """
    _checks.check_integer("rank", rank, 1)
    _checks.check_integer("num_iters", num_iters, 1)

    def rule(stack, memory, step):
        del step
        _check_count(stack, rank, f"flag_aggregator({rank})")
        size = jnp.where(stack.valid, stack.norms, 0)
        least = 64 * jnp.finfo(size.dtype).tiny
        # Rows of length 4: the inverse of the largest number is not a full one.
        inverse = jnp.where(size > 0, 4 / jnp.maximum(size, least), 0)
        matrix = _stack.gram(stack, inverse) / 16
        basis = flag_basis(matrix, rank, num_iters)
        unit = jnp.maximum(jnp.max(size), jnp.finfo(size.dtype).tiny)
        mean = (size / unit) @ matrix @ basis / jnp.maximum(jnp.sum(stack.valid), 1)
        c = basis @ mean / 4
        small = (size > 0) & (size < unit / FAR)
        weights = jnp.where(small, unit, unit * jnp.where(small, 0, inverse)) * c
        factors = jnp.where(small, inverse, 1)
        return _stack.combine(stack, weights, factors), memory

    return aggregator(rule, per_elt_axis, axis_name)


def flag_basis(gram: jax.Array, rank: int, num_iters: int) -> jax.Array:
    """Coefficients (n, rank) of ``Y`` in unit rows with this Gram matrix."""
    present = jnp.diagonal(gram) > 0

    def fitted(a):
        values, vectors = jnp.linalg.eigh(a[:, None] * gram * a[None])
        values, vectors = values[-rank:], vectors[:, -rank:]
        real = values > len(a) * jnp.finfo(values.dtype).eps * values[-1]
        inverse = jnp.where(real, 1 / jnp.sqrt(jnp.where(real, values, 1)), 0)
        return a[:, None] * vectors * inverse[None]

    def advance(_, basis):
        explained = jnp.sum((gram @ basis) ** 2, axis=1)
        # The authors' regularised weight of the square of the sine.
        weight = (jnp.abs(1 - explained) + 1e-7) ** -0.25
        return fitted(jnp.where(present, weight, 0))

    return lax.fori_loop(0, num_iters, advance, fitted(present.astype(gram.dtype)))


def one_pass_location(
    distance: Distance,
    tau: optax.ScalarOrSchedule | AdaptiveRadius,
    *,
    scope: Any = "global",
    init: str = "first",
    per_elt_axis: int | None = None,
    axis_name: Any = None,
) -> aggregating.Aggregator:
    """One proximal step per element from the location so far: no sort, no rounds.

    :func:`optax_avg.track_location` over the elements in their order; the location is
    carried over to the next call. If the first element may be anything, start with
    ``init="zeros"``. Each element then moves it by at most ``tau`` in the l2 distance.

    Args:
      distance: see :func:`optax_avg.track_location`.
      tau: a float, a schedule of the elements so far, or an
        :func:`optax_avg.adaptive_radius`.
      scope: see :func:`optax_avg.track_location`.
      init: ``"first"`` or ``"zeros"``.
      per_elt_axis: axis of the elements, see :func:`coordinate_median`.
      axis_name: of the devices; each element goes to all of them in turn.

    Returns:
      An aggregator with the state :class:`optax_avg.LocationState`.

    Raises:
      ValueError: If an argument is out of range or a name unknown.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.one_pass_location(oa.distances.l2(), 0.5)
      >>> stacked = jnp.array([1.0, 2.0, 99.0])
      >>> float(tx.update(stacked, tx.init(jnp.zeros([])))[0])
      2.0

    References:
      Schaipp et al., 2024, 2402.12828.
    """
    tracker = track_location(distance, tau, scope=scope, init=init)
    axis = 0 if per_elt_axis is None and axis_name is None else per_elt_axis

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        check_rows(updates, params, axis, axis_name)
        move = lambda x: x[None] if axis is None else jnp.moveaxis(x, axis, 0)
        rows = jax.tree.map(move, updates)
        count = jax.tree.leaves(rows)[0].shape[0] if jax.tree.leaves(rows) else 0
        devices = 1 if axis_name is None else lax.axis_size(axis_name)

        def element(i):
            own = jax.tree.map(lambda x: x[i % count], rows)
            if axis_name is None:
                return own
            here = lax.axis_index(axis_name) == i // count
            return jax.tree.map(
                lambda x: lax.psum(jnp.where(here, x, jnp.zeros_like(x)), axis_name),
                own,
            )

        def advance(carry, i):
            return tracker.update(element(i), carry[1]), None

        def blank_row(x):
            if axis_name is not None:  # the same on all devices, as the result
                return jnp.zeros(x.shape[1:], x.dtype)
            # Of a sum: it has the sharding of one row, also where there is none.
            return jnp.zeros_like(x.sum(axis=0), x.dtype)

        blank = jax.tree.map(blank_row, rows)
        return lax.scan(advance, (blank, state), jnp.arange(count * devices))[0]

    return aggregating.Aggregator(tracker.init, update_fn)
