"""Robust locations of gradients across examples, micro-batches and workers.

    z = sum_i w_i v_i,    w from the Gram matrix G of the rows v_i - z_0

Rules of the Gram matrix need one product for ``G``, rounds on ``n`` coefficients and
one weighted sum: two passes over the gradients whatever the number of rounds.
:func:`coordinate_median` and :func:`trimmed_mean` go coordinate by coordinate.

Each is an ``optax.experimental.aggregating.Aggregator`` over an axis of elements, or
inside ``shard_map`` over the devices of ``axis_name``. There each device gathers its
share of the coordinates of all elements, so that memory does not grow with their
number. A row whose norm is not finite is left out and counted. If none remains, the
result is zero, or the location so far.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jax import lax
from optax.experimental import aggregating

from optax_avg import _checks, _leaves, _numerics
from optax_avg.robust import _gram_rules, _layout, _ranks, _stack
from optax_avg.robust._gradients import (
    Tree,
    check_rows,
    clip_factor,
    counter,
    equal_weights,
)
from optax_avg.robust._options import (
    INFINITY,
    AxisName,
    OnePassOptions,
    RowOptions,
    with_one_pass_options,
    with_row_options,
)
from optax_avg.robust._stack import Stack
from optax_avg.robust.distances import Distance
from optax_avg.robust.location import Tau, track_location

__all__ = [
    "AggregationState",
    "centered_clip",
    "coordinate_median",
    "flag_aggregator",
    "geometric_median",
    "krum",
    "median_of_means",
    "one_pass_location",
    "trimmed_mean",
]

# What a rule keeps from one step to the next: a tree of arrays.
Memory = Any
Rule = Callable[[Stack, Memory, jax.Array], tuple[list[jax.Array], Memory]]


class AggregationState(NamedTuple):
    """State of an aggregator.

    Attributes:
      aggregation_step: Number of calls of ``update``, int32; schedules are called with
        it.
      left_out: Number of rows that were not finite so far, int32.
      aggregation_memory: ``()``, the location of :func:`optax_avg.centered_clip` in
        float32 or wider, or the PRNG key of :func:`optax_avg.pcgrad`.
    """

    aggregation_step: jax.Array
    left_out: jax.Array
    aggregation_memory: Memory


def aggregator(
    rule: Rule,
    remember: Callable[[optax.Params], Memory] = lambda params: (),
    *,
    per_elt_axis: int | None = None,
    axis_name: AxisName = None,
) -> aggregating.Aggregator:
    """An aggregator from a rule and its first memory, a function of the parameters."""
    axis = element_axis(per_elt_axis, axis_name)

    def init_fn(params: optax.Params) -> AggregationState:
        return AggregationState(counter(), counter(), remember(params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AggregationState]:
        del extra_args
        check_rows(updates, params, axis, axis_name)
        stack = _stack.stack_of(updates, axis, axis_name)
        leaves, memory = [], state.aggregation_memory
        if stack.rows:
            leaves, memory = rule(stack, memory, state.aggregation_step)
        bad = jnp.sum(~stack.valid).astype(jnp.int32)
        top = jnp.iinfo(jnp.int32).max
        return _layout.place(stack.layout, leaves, stack.blank), AggregationState(
            _numerics.count_if(jnp.asarray(True), state.aggregation_step),
            jnp.where(state.left_out > top - bad, top, state.left_out + bad),
            memory,
        )

    return aggregating.Aggregator(_leaves.shapes_for_shapes(init_fn), update_fn)


def memoryless(rule: Callable[[Stack], list[jax.Array]]) -> Rule:
    """A rule that depends on the rows alone."""
    return lambda stack, memory, step: (rule(stack), memory)


def element_axis(per_elt_axis: int | None, axis_name: AxisName) -> int | None:
    """Axis of the elements: 0 by default, none if each device holds one element."""
    return 0 if per_elt_axis is None and axis_name is None else per_elt_axis


@with_row_options
def coordinate_median(**options: Unpack[RowOptions]) -> aggregating.Aggregator:
    """The median of each coordinate.

    For an even number of rows it is the mean of the two middle values.

    If most elements have a zero in a coordinate, so has the median. Rows of an
    embedding table that few elements use are therefore not trained.

    Args:
      **options: Options of every aggregator.

    Returns:
      An aggregator with the state :class:`AggregationState`.

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

    def rule(stack):
        trim = (len(stack.valid) - 1) // 2
        return _ranks.rank_weighted(stack, _ranks.trimmed(stack.valid, trim))

    return aggregator(memoryless(rule), **options)


@with_row_options
def trimmed_mean(trim: int, **options: Unpack[RowOptions]) -> aggregating.Aggregator:
    """The mean of each coordinate without its ``trim`` smallest and largest values.

    If at most ``trim`` rows are bad, each coordinate lies between those of good rows.

    Args:
      trim: Number of values to drop at each end. Falls back to the median if at most
        ``2 * trim`` rows are finite.
      **options: Options of every aggregator.

    Returns:
      An aggregator with the state :class:`AggregationState`.

    Raises:
      ValueError: If ``trim`` is negative. In ``update``, if there are fewer than
        ``2 * trim + 1`` elements.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.trimmed_mean(1)
      >>> float(tx.update(jnp.array([1.0, 2.0, 4.0, 99.0]), tx.init(jnp.zeros([])))[0])
      3.0

    References:
      Yin et al., 2018, 1803.01498.
    """
    _checks.check_integer("trim", trim, 0)

    def rule(stack):
        _check_count(stack, 2 * trim + 1, f"trimmed_mean({trim})")
        return _ranks.rank_weighted(stack, _ranks.trimmed(stack.valid, trim))

    return aggregator(memoryless(rule), **options)


@with_row_options
def geometric_median(
    *, nu: float = 1e-6, num_iters: int = 8, **options: Unpack[RowOptions]
) -> aggregating.Aggregator:
    """``argmin_z sum_i |v_i - z|`` by the smoothed Weiszfeld algorithm.

    ``z <- sum_i beta_i v_i / sum_i beta_i``, ``beta_i = 1/max(nu, |v_i - z|)``. It
    starts at the mean of the ``n/2`` rows that are nearest to the most central row.
    Rounds are on ``n`` coefficients and cost next to nothing.

    With ``f < n/2`` bad rows, whatever they are, the distance of the geometric median
    from any point is at most ``2 (n - f)/(n - 2 f)`` times that of the farthest good
    row.

    Args:
      nu: Distance below which all distances count alike, positive, in units of the
        gradients. It is lowered automatically for gradients that are smaller.
      num_iters: Number of rounds, at least 1.
      **options: Options of every aggregator.

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
    median = _geometric_median(nu, num_iters)
    return aggregator(memoryless(median), **options)


@with_row_options
def median_of_means(
    groups: int,
    *,
    nu: float = 1e-6,
    num_iters: int = 8,
    **options: Unpack[RowOptions],
) -> aggregating.Aggregator:
    """The geometric median of the means of contiguous groups.

    While bad rows lie in fewer than half of the groups, it stays as close to the means
    of the others as :func:`geometric_median` stays to good rows.

    Args:
      groups: Number of groups, a divisor of the number of elements. Across devices the
        elements are counted device by device.
      nu: Smallest distance that counts, as in :func:`geometric_median`.
      num_iters: Number of rounds, at least 1.
      **options: Options of every aggregator.

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
    median = _geometric_median(nu, num_iters)
    rule = lambda stack: median(_gram_rules.group_means(stack, groups))
    return aggregator(memoryless(rule), **options)


def _geometric_median(nu: float, num_iters: int) -> Callable[[Stack], list[jax.Array]]:
    nu = _checks.within("nu", nu, 0, INFINITY, open_low=True, closed_high=False)
    _checks.check_integer("num_iters", num_iters, 1)

    def rule(stack):
        found = _gram_rules.centred(stack, lambda count: count // 2)
        least = jnp.maximum(
            jnp.minimum(nu, found.typical) / found.unit, 1 / _gram_rules.FAR
        )
        return found.combine(
            _gram_rules.weiszfeld(found.gram, found.valid, least, num_iters)
        )

    return rule


@with_row_options
def centered_clip(
    tau: optax.ScalarOrSchedule, num_iters: int = 1, **options: Unpack[RowOptions]
) -> aggregating.Aggregator:
    """``m <- m + mean_i min(1, tau/|v_i - m|) (v_i - m)``, with ``m`` carried over.

    The location ``m`` starts at zero. With one element this is
    ``oa.vclip(tau, init="zeros")``. While ``f < n/2`` of the rows are bad, whatever
    they are, its norm stays below about ``max(R + tau, R/(1 - q^2)^(1/2)) + tau``,
    where ``R`` is the norm of the largest good row and ``q = f/(n - f)``.

    Args:
      tau: Radius, not negative, in units of the gradients: a float, or a schedule of
        the step.
      num_iters: Number of rounds per step, at least 1.
      **options: Options of every aggregator.

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
    tau = _checks.number_or_schedule("tau", tau, 0, INFINITY)
    _checks.check_integer("num_iters", num_iters, 1)

    def rule(stack, memory, step):
        radius = jnp.asarray(_checks.at_step(tau, step), jnp.float32)
        m = _layout.arrange(stack.layout, memory)
        size = _stack.row_norms(stack.rows, stack.layout.axis_name, m)
        stack = stack._replace(valid=stack.valid & jnp.isfinite(size))
        share = equal_weights(stack.valid)
        size = jnp.where(stack.valid, size, 0)
        unit = _gram_rules.invertible(radius)
        scale = _gram_rules.scales(size, unit)
        c = share * clip_factor(radius / unit, scale * size)
        if num_iters > 1:
            matrix = _stack.gram(stack, scale, m)
            c = _gram_rules.clipped_rounds(matrix, share, radius / unit, c, num_iters)
        weights, factors, total = _gram_rules.factored(c, size, unit)
        pulled = _stack.combine(stack, weights, factors)
        leaves = [(1 - total) * a + b for a, b in zip(m, pulled, strict=True)]
        return leaves, _layout.place(stack.layout, leaves, memory)

    return aggregator(rule, _leaves.zeros_like_wide, **options)


@with_row_options
def krum(
    num_byzantine: int, num_selected: int = 1, **options: Unpack[RowOptions]
) -> aggregating.Aggregator:
    """The row whose ``n - f - 2`` nearest other rows are the closest.

    The score of a row is the sum of its squared distances to these rows. Multi-Krum
    averages several rows of the lowest scores. For ``n >= 2 f + 3`` the result is no
    longer than ``1 + 2 sqrt(n - f - 2)`` times the largest good row.

    Args:
      num_byzantine: Number ``f`` of rows that may be anything. The paper's guarantee
        holds for ``n >= 2 f + 3``.
      num_selected: Number of rows to average, from 1 to ``n - f``.
      **options: Options of every aggregator.

    Returns:
      An aggregator with the state :class:`AggregationState`.

    Raises:
      ValueError: If an argument is out of range. In ``update``, if there are too few
        elements.

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

    def rule(stack):
        least = num_byzantine + max(3, num_selected)
        _check_count(stack, least, f"krum({num_byzantine}, {num_selected})")
        # So many rows are neighbours of the best one, or are averaged.
        rank = max(len(stack.valid) - num_byzantine - 2, num_selected - 1)
        found = _gram_rules.centred(stack, lambda _: rank)
        score = _gram_rules.krum_scores(found.gram, found.valid, num_byzantine)
        place = jnp.argsort(jnp.argsort(score))
        chosen = (place < num_selected) & found.valid
        return _stack.combine(stack, equal_weights(chosen))

    return aggregator(memoryless(rule), **options)


@with_row_options
def flag_aggregator(
    rank: int, *, num_iters: int = 5, **options: Unpack[RowOptions]
) -> aggregating.Aggregator:
    """Mean of the rows projected on the subspace that explains their directions best.

    ``mean_i Y Y' v_i``, ``Y = argmin sum_i sqrt(1 - |Y' v_i|^2/|v_i|^2)`` over
    orthonormal ``Y`` of ``rank`` columns, by iteratively reweighted least squares from
    equal weights. The authors' code sums projections of normalised rows instead.

    The subspace depends on directions alone: a bad row inside it counts with its whole
    length. If rows can be of any size, clip them before.

    Args:
      rank: Dimension of the subspace, at least 1. The paper takes ``ceil((n + 1)/2)``.
      num_iters: Number of rounds, at least 1.
      **options: Options of every aggregator.

    Returns:
      An aggregator with the state :class:`AggregationState`.

    Raises:
      ValueError: If an argument is out of range. In ``update``, if there are fewer than
        ``rank`` elements.

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

    def rule(stack):
        _check_count(stack, rank, f"flag_aggregator({rank})")
        return _gram_rules.flag_mean(stack, rank, num_iters)

    return aggregator(memoryless(rule), **options)


def _check_count(stack: Stack, least: int, call: str) -> None:
    """Raises if there are fewer elements than a rule needs."""
    if len(stack.valid) < least:
        raise ValueError(
            f"{call} needs at least {least} elements, got {len(stack.valid)}; pass "
            "more, or a smaller number."
        )


@with_one_pass_options
def one_pass_location(
    distance: Distance, tau: Tau, **options: Unpack[OnePassOptions]
) -> aggregating.Aggregator:
    """One proximal step per element from the location so far: no sort, no rounds.

    :func:`optax_avg.track_location` over the elements in their order; the location is
    carried over to the next call. With ``axis_name`` each element goes to all devices
    in turn. If the first element may be anything, start with ``init="zeros"``. Each
    element then moves the location by at most ``tau`` in the l2 distance.

    Args:
      distance: A distance, such as ``oa.distances.l2()``.
      tau: Radius or step size: a float, a schedule of the elements so far, or an
        :func:`optax_avg.adaptive_radius`.
      **options: Options of every aggregator.

    Returns:
      An aggregator with the state :class:`optax_avg.LocationState`.

    Raises:
      TypeError: If ``distance`` is not a distance.
      ValueError: If another argument is out of range or unknown.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.one_pass_location(oa.distances.l2(), 0.5)
      >>> stacked = jnp.array([1.0, 2.0, 99.0])
      >>> float(tx.update(stacked, tx.init(jnp.zeros([])))[0])
      2.0

    References:
      Schaipp et al., 2024, 2402.12828.
    """
    scope, init = options.get("scope", "global"), options.get("init", "first")
    tracker = track_location(distance, tau, scope=scope, init=init)
    axis_name = options.get("axis_name")
    axis = element_axis(options.get("per_elt_axis"), axis_name)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        check_rows(updates, params, axis, axis_name)
        move = lambda x: x[None] if axis is None else jnp.moveaxis(x, axis, 0)
        rows = jax.tree.map(move, updates)
        count = jax.tree.leaves(rows)[0].shape[0] if jax.tree.leaves(rows) else 0
        devices = 1 if axis_name is None else lax.axis_size(axis_name)
        advance = lambda carry, i: (
            tracker.update(_element(rows, i, count, axis_name), carry[1]),
            None,
        )
        blank = jax.tree.map(lambda x: _blank_row(x, axis_name), rows)
        return lax.scan(advance, (blank, state), jnp.arange(count * devices))[0]

    return aggregating.Aggregator(tracker.init, update_fn)


def _element(rows: Tree, i: jax.Array, count: int, axis_name: AxisName) -> Tree:
    """Element ``i`` of all devices, each of which has ``count`` rows."""
    own = jax.tree.map(lambda x: x[i % count], rows)
    if axis_name is None:
        return own
    here = lax.axis_index(axis_name) == i // count
    masked = jax.tree.map(lambda x: jnp.where(here, x, jnp.zeros_like(x)), own)
    return jax.tree.map(lambda x: lax.psum(x, axis_name), masked)


def _blank_row(x: jax.Array, axis_name: AxisName) -> jax.Array:
    if axis_name is not None:  # the same on all devices, as the result
        return jnp.zeros(x.shape[1:], x.dtype)
    # Of a sum: it has the sharding of one row, also where there is none.
    return jnp.zeros_like(x.sum(axis=0), x.dtype)
