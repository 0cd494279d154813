"""How heavy are the tails of gradient noise: ``P(|x| > s) ~ s^-alpha``.

Below 2 the variance is infinite, at 1 the mean goes: there a mean of gradients does not
get better with their number, and locations of :mod:`optax_avg.robust.location` do.
Noise is the difference of two gradients in a row: what they share cancels, the index
stays.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_avg import _checks, _leaves, _numerics


class TailState(NamedTuple):
    """State of :func:`track_tail_index`.

    Attributes:
      tail_step: int32, finite gradients so far.
      waiting: the first gradient of a pair, in float32 or wider.
      block_sum: sum of the differences of this block.
      samples: int32, differences that are not zero.
      blocks: int32, full blocks.
      tail_block: int32, differences in a block.
      mean_log: of the norms of differences.
      mean_log_block: of the norms of sums of blocks.
      largest: shape (num_largest,), the largest norms in descending order.
      left_out: int32, gradients that were not finite.
      remainders: what rounding took from the two means, which would stall in long runs.
    """

    tail_step: jax.Array
    waiting: Any
    block_sum: Any
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
      hill: from the ``num_largest`` largest norms.
      pickands: from three order statistics; does not suppose a Pareto tail.
      alpha_stable: supposes stable noise, uses all norms; 2 is Gaussian.
    """

    hill: jax.Array
    pickands: jax.Array
    alpha_stable: jax.Array


def hill(largest: jax.Array) -> jax.Array:
    """``1/alpha = mean_{i < k} log(x_(i)/x_(k))`` of the k largest, descending.

    Args:
      largest: shape (k,), in descending order.

    Returns:
      ``alpha``.

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
      largest: shape (4k or up to 3 more,), in descending order.

    Returns:
      ``alpha``; negative for distributions with an end.

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
    mean_log: jax.Array, mean_log_block: jax.Array, block: Any
) -> jax.Array:
    """``1/alpha = (E log|sum of a block| - E log|x|)/log(block)``.

    A sum of ``n`` stable variables is distributed as ``n^(1/alpha)`` times one.

    Args:
      mean_log: of the norms of samples.
      mean_log_block: of the norms of sums of ``block`` samples.
      block: samples in a block.

    Returns:
      ``alpha``.

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

    Two trees like the gradient and ``num_largest`` numbers, however long it runs.
    Parameters should change little from one gradient to the next.

    Args:
      num_largest: norms of differences that are kept, at least 4.
      block: differences in a block, at least 2.

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

    def init_fn(params: Any) -> TailState:
        count = lambda: jnp.zeros([], jnp.int32)
        mean = lambda: jnp.zeros([], jnp.float32)
        return TailState(
            count(),
            _leaves.zeros_like_wide(params),
            _leaves.zeros_like_wide(params),
            count(),
            count(),
            jnp.asarray(block, jnp.int32),
            mean(),
            mean(),
            jnp.zeros(num_largest, jnp.float32),
            count(),
            (mean(), mean()),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del params, extra_args
        leaves = jax.tree.leaves(updates, is_leaf=_leaves.is_absent)
        old, structure = jax.tree.flatten(state.waiting, is_leaf=_leaves.is_absent)
        sums = jax.tree.leaves(state.block_sum, is_leaf=_leaves.is_absent)
        floats = [
            i
            for i, (u, w) in enumerate(zip(leaves, old, strict=True))
            if not (_leaves.is_absent(u) or _leaves.is_absent(w))
        ]
        finite = _numerics.all_finite([leaves[i] for i in floats])
        x = {i: _numerics.wide(leaves[i]) - old[i] for i in floats}
        size = _numerics.norm(x).astype(jnp.float32)
        counts = finite & (state.tail_step % 2 == 1) & (size > 0) & jnp.isfinite(size)
        # Beyond the largest integer blocks and pairs go on as they were.
        samples = jnp.where(
            counts, _numerics.advance_clock(state.samples, block), state.samples
        )
        total = {i: jnp.where(counts, sums[i] + x[i], sums[i]) for i in floats}
        length = _numerics.norm(total).astype(jnp.float32)
        full = counts & (samples % block == 0)
        told = full & (length > 0) & jnp.isfinite(length)
        blocks = _numerics.count_if(told, state.blocks)
        for i in floats:
            old[i] = jnp.where(finite, leaves[i], old[i]).astype(old[i].dtype)
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
        _leaves.shapes_for_shapes(init_fn), update_fn
    )


def _mean_of_logs(
    mean: jax.Array,
    rest: jax.Array,
    count: jax.Array,
    size: jax.Array,
    counts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The mean with one more, the ``count``-th, where it counts, and its remainder."""
    log = jnp.log(jnp.where(counts, size, 1))
    change = ((log - mean) - rest) / jnp.maximum(count, 1)
    new, left = _numerics.sum_and_error(mean, rest + change)
    return jnp.where(counts, new, mean), jnp.where(counts, left, rest)


def tail_indices(state: Any) -> TailIndices:
    """The estimates from what :func:`track_tail_index` has kept.

    Args:
      state: an optimizer state with one :class:`TailState` anywhere in it.

    Returns:
      A :class:`TailIndices`.

    Raises:
      ValueError: If there is none or more than one.

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
