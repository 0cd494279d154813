"""How heavy are the tails of gradient noise: ``P(|x| > s) ~ s^-alpha``.

If ``alpha`` is below 2, the variance is infinite; at 1 and below there is no mean
either. A mean of more gradients is then no better than one of few. A robust location,
such as :func:`optax_avg.vclip`, is. Noise is taken as the difference of two gradients
in a row: their common part cancels, and the index stays.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_avg import _checks, _leaves, _numerics
from optax_avg.robust._gradients import (
    check_alike,
    counter,
    flatten,
    positions_in_both,
)

__all__ = [
    "TailIndices",
    "TailState",
    "alpha_stable",
    "hill",
    "pickands",
    "tail_indices",
    "track_tail_index",
]


class TailState(NamedTuple):
    """State of :func:`track_tail_index`.

    Attributes:
      tail_step: Number of finite gradients so far, int32.
      waiting: The first gradient of a pair, in float32 or wider.
      block_sum: Sum of the differences of this block, in float32 or wider.
      samples: Number of differences that are not zero, int32.
      blocks: Number of full blocks, int32.
      tail_block: Number of differences in a block, int32.
      mean_log: Mean logarithm of the norms of differences.
      mean_log_block: Mean logarithm of the norms of sums of blocks.
      largest: The largest norms in descending order, shape (num_largest,).
      left_out: Number of gradients that were not finite, int32.
      remainders: Rounding errors of the two means, which would stall in long runs.
    """

    tail_step: jax.Array
    waiting: optax.Updates
    block_sum: optax.Updates
    samples: jax.Array
    blocks: jax.Array
    tail_block: jax.Array
    mean_log: jax.Array
    mean_log_block: jax.Array
    largest: jax.Array
    left_out: jax.Array
    remainders: tuple[jax.Array, jax.Array]


class TailIndices(NamedTuple):
    """Three estimates of ``alpha``; NaN as long as there are too few samples.

    Attributes:
      hill: Estimate of :func:`hill` from the ``num_largest`` largest norms.
      pickands: Estimate of :func:`pickands` from three order statistics. It does not
        assume a Pareto tail.
      alpha_stable: Estimate of :func:`alpha_stable` from all norms. It assumes stable
        noise; 2 is Gaussian.
    """

    hill: jax.Array
    pickands: jax.Array
    alpha_stable: jax.Array


def hill(largest: jax.Array) -> jax.Array:
    """``1/alpha = mean_{i < k} log(x_(i)/x_(k))`` of the k largest, descending.

    Args:
      largest: The largest norms in descending order, shape (k,).

    Returns:
      The estimate of ``alpha``, a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_avg import tail_index
      >>> round(float(tail_index.hill(jnp.array([4.0, 2.0, 1.0]))), 3)
      0.962

    References:
      Hill, "A Simple General Approach to Inference about the Tail of a Distribution",
      1975.
    """
    return 1 / jnp.mean(jnp.log(largest[:-1] / largest[-1]))


def pickands(largest: jax.Array) -> jax.Array:
    """``1/alpha = log2((x_(k) - x_(2k))/(x_(2k) - x_(4k)))`` of the 4k largest.

    Args:
      largest: The largest norms in descending order, shape (4k,). Up to 3 more are
        ignored.

    Returns:
      The estimate of ``alpha``, a scalar. It is negative for distributions with an end.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_avg import tail_index
      >>> float(tail_index.pickands(jnp.array([4.0, 2.0, 1.5, 1.0])))
      1.0

    References:
      Pickands, "Statistical Inference Using Extreme Order Statistics", 1975.
    """
    k = len(largest) // 4
    a, b, c = largest[k - 1], largest[2 * k - 1], largest[4 * k - 1]
    return math.log(2) / jnp.log((a - b) / (b - c))


def alpha_stable(
    mean_log: jax.typing.ArrayLike,
    mean_log_block: jax.Array,
    block: jax.typing.ArrayLike,
) -> jax.Array:
    """``1/alpha = (E log|sum of a block| - E log|x|)/log(block)``.

    A sum of ``n`` stable variables is distributed as ``n^(1/alpha)`` times one.

    Args:
      mean_log: Mean logarithm of the norms of samples.
      mean_log_block: Mean logarithm of the norms of sums of ``block`` samples.
      block: Number of samples in a block.

    Returns:
      The estimate of ``alpha``, a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_avg import tail_index
      >>> round(float(tail_index.alpha_stable(0.0, jnp.log(10.0), 100)), 3)
      2.0

    References:
      Mohammadi et al., "On Estimating the Tail Index and the Spectral Measure of
      Multivariate Alpha-Stable Distributions", 2015, as in Simsekli et al., "A
      Tail-Index Analysis of Stochastic Gradient Noise in Deep Neural Networks", 2019,
      1901.06053.
    """
    return jnp.log(block) / (mean_log_block - mean_log)


def track_tail_index(
    num_largest: int = 100, block: int = 10
) -> optax.GradientTransformationExtraArgs:
    """Passes gradients on and keeps what estimates of their tail index need.

    The state holds two trees like the gradient and ``num_largest`` numbers, however
    long it runs. Parameters should change little from one gradient to the next.

    Args:
      num_largest: Number of the largest norms of differences to keep, at least 4.
      block: Number of differences in a block, at least 2.

    Returns:
      A transformation with the state :class:`TailState`, read by :func:`tail_indices`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax, optax, optax_avg as oa
      >>> tx = optax.chain(oa.track_tail_index(num_largest=50), optax.sgd(0.0))
      >>> x = jax.numpy.zeros(3)
      >>> update = jax.jit(tx.update)
      >>> state = tx.init(x)
      >>> for key in jax.random.split(jax.random.key(0), 2000):
      ...     _, state = update(jax.random.normal(key, (3,)), state, x)
      >>> 1.8 < oa.tail_indices(state).alpha_stable < 2.2
      Array(True, dtype=bool)

    References:
      Simsekli et al., 2019, 1901.06053.
    """
    _checks.check_integer("num_largest", num_largest, 4)
    _checks.check_integer("block", block, 2)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, TailState]:
        del params, extra_args
        check_alike(updates, state.waiting)
        leaves, _ = flatten(updates)
        old, structure = flatten(state.waiting)
        sums, _ = flatten(state.block_sum)
        floats = positions_in_both(leaves, old)
        finite = _numerics.all_finite([leaves[i] for i in floats])
        x = {i: _numerics.wide(leaves[i]) - old[i] for i in floats}
        total = {i: sums[i] + x[i] for i in floats}
        # Both at once, whether they count or not: over devices they are one sum.
        both = _numerics.norms([list(x.values()), list(total.values())])
        size, length = both.astype(jnp.float32)
        counts = finite & (state.tail_step % 2 == 1) & (size > 0) & jnp.isfinite(size)
        # Beyond the largest integer blocks and pairs go on as they were.
        samples = jnp.where(
            counts, _numerics.advance_clock(state.samples, block), state.samples
        )
        full = counts & (samples % block == 0)
        told = full & (length > 0) & jnp.isfinite(length)
        blocks = _numerics.count_if(told, state.blocks)
        for i in floats:
            old[i] = jnp.where(finite, leaves[i], old[i]).astype(old[i].dtype)
            total[i] = jnp.where(counts, total[i], sums[i])
            sums[i] = jnp.where(full, 0, total[i]).astype(sums[i].dtype)
        rest, rest_block = state.remainders
        log, rest = _mean_of_logs(state.mean_log, rest, samples, size, counts)
        log_block, rest_block = _mean_of_logs(
            state.mean_log_block, rest_block, blocks, length, told
        )
        largest = jnp.append(state.largest, jnp.where(counts, size, 0))
        return updates, TailState(
            tail_step=jnp.where(
                finite, _numerics.advance_clock(state.tail_step, 2), state.tail_step
            ),
            waiting=structure.unflatten(old),
            block_sum=structure.unflatten(sums),
            samples=samples,
            blocks=blocks,
            tail_block=state.tail_block,
            mean_log=log,
            mean_log_block=log_block,
            largest=lax.top_k(largest, len(state.largest))[0],
            left_out=_numerics.count_if(~finite, state.left_out),
            remainders=(rest, rest_block),
        )

    return optax.GradientTransformationExtraArgs(
        _leaves.shapes_for_shapes(
            lambda params: _first_state(params, num_largest, block)
        ),
        update_fn,
    )


def _first_state(params: optax.Params, num_largest: int, block: int) -> TailState:
    mean = lambda: jnp.zeros([], jnp.float32)
    return TailState(
        tail_step=counter(),
        waiting=_leaves.zeros_like_wide(params),
        block_sum=_leaves.zeros_like_wide(params),
        samples=counter(),
        blocks=counter(),
        tail_block=jnp.asarray(block, jnp.int32),
        mean_log=mean(),
        mean_log_block=mean(),
        largest=jnp.zeros(num_largest, jnp.float32),
        left_out=counter(),
        remainders=(mean(), mean()),
    )


def _mean_of_logs(
    mean: jax.Array,
    rest: jax.Array,
    count: jax.Array,
    size: jax.Array,
    counts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The mean with the ``count``-th logarithm if it counts, and its rounding error."""
    log = jnp.log(jnp.where(counts, size, 1))
    change = ((log - mean) - rest) / jnp.maximum(count, 1)
    new, left = _numerics.sum_and_error(mean, rest + change)
    return jnp.where(counts, new, mean), jnp.where(counts, left, rest)


def tail_indices(state: optax.OptState) -> TailIndices:
    """The estimates from what :func:`track_tail_index` has kept.

    Args:
      state: An optimizer state with one :class:`TailState` anywhere in it.

    Returns:
      A :class:`TailIndices`.

    Raises:
      ValueError: If there is no such state or more than one.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.track_tail_index()
      >>> bool(jnp.isnan(oa.tail_indices(tx.init(jnp.zeros(2))).hill))
      True
    """
    is_state = lambda node: isinstance(node, TailState)
    found = [s for s in jax.tree.leaves(state, is_leaf=is_state) if is_state(s)]
    if len(found) != 1:
        raise ValueError(
            f"{len(found)} states of track_tail_index found, need one; put "
            "oa.track_tail_index() into the chain."
        )
    kept = found[0]
    enough = kept.largest[-1] > 0
    largest = jnp.where(enough, kept.largest, jnp.nan)
    blocks = jnp.where(kept.blocks > 0, kept.mean_log_block, jnp.nan)
    return TailIndices(
        hill(largest),
        pickands(largest),
        alpha_stable(kept.mean_log, blocks, kept.tail_block),
    )
