"""Links before an optimizer that reduce the variance of the gradients.

    MARS             c = g + gamma b1/(1 - b1) (g - g_before)
    multi-momentum   g - m_k + sum_j p_j m_j

What is added is zero in expectation, or nearly, and it varies with the gradient.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import core
from jax.tree_util import KeyPath

from optax_avg import _checks, _leaves, _numerics
from optax_avg.optimizers._wide import (
    Number,
    in_float32,
    next_step,
    present,
    remembered,
    with_stacks,
)

__all__ = ["ClusterState", "MarsState", "mars", "multi_momentum"]


class MarsState(NamedTuple):
    """State of :func:`mars`.

    Attributes:
      mars_step: Number of gradients so far, int32.
      mars_gradient: Newest gradient, float32 or wider.
    """

    mars_step: jax.Array
    mars_gradient: optax.Updates


def mars(
    gamma: Number = 0.025,
    b1: Number = 0.95,
    *,
    scope: Literal["global", "leaf"] = "global",
) -> optax.GradientTransformationExtraArgs:
    """MARS: gradients corrected by their last change, for any optimizer.

    ``c = g + gamma b1/(1 - b1) (g - g_before)``, then ``c <- c/max(|c|, 1)``.

    * Without an extra argument ``g_before`` is the last gradient, of the last batch
      (MARS-approx). The first gradient is not corrected: the paper begins with ``x_0 =
      x_1``, and the authors' code with a last gradient of zero.
    * In the exact form ``g_before`` is the gradient of this batch at the parameters
      before the last step: call ``tx.update(grads, state, params,
      grads_at_previous=...)``. ``optax.MultiSteps`` passes that of the last small batch
      alone; take the means of both kinds of gradients yourself instead.

    MARS-AdamW is ``optax.chain(mars(0.025, 0.95), optax.adamw(3e-3, b1=0.95,
    b2=0.99))``, both moments from ``c`` as in the authors' code. By default that code
    takes MARS for matrices alone, and plain AdamW for all other leaves. Inside
    ``shard_map`` the norm is over the parts of the leaves that a device has.

    Args:
      gamma: Strength of the correction, not negative.
      b1: Decay of the momentum of the optimizer that follows, in [0, 1).
      scope: Leaves that share a norm: ``"global"`` for all, as in the paper, or
        ``"leaf"`` for each alone, as in the authors' code.

    Returns:
      A transformation with the state :class:`MarsState` that stands before the
      optimizer.

    Raises:
      ValueError: If an argument is out of range, or if ``grads_at_previous`` is not
        like the gradient.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.optimizers.mars(gamma=1.0, b1=0.5)
      >>> state = tx.init(jnp.zeros(1))
      >>> for g in (0.25, 0.5):
      ...     updates, state = tx.update(jnp.array([g]), state)
      >>> updates.tolist()  # 0.5 + (0.5 - 0.25)
      [0.75]

    References:
      Yuan et al., "MARS: Unleashing the Power of Variance Reduction for Training Large
      Models", 2024, 2411.10438.
    """
    gamma = _checks.finite("gamma", gamma)
    b1 = _checks.within("b1", b1, 0, 1, closed_high=False)
    _checks.one_of("scope", scope, ("global", "leaf"))
    factor = gamma * b1 / (1 - b1)

    def init_fn(params: optax.Params) -> MarsState:
        return MarsState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        grads_at_previous: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MarsState]:
        del params, extra_args
        first = state.mars_step == 0
        if grads_at_previous is None:
            before = jax.tree.map(
                lambda old, g: jnp.where(first, g, old), state.mars_gradient, updates
            )
        else:
            before = _like_gradients(grads_at_previous, updates)
        c = jax.tree.map(
            lambda g, old: (g + factor * (g - old)).astype(g.dtype), updates, before
        )
        clipped = (
            _to_unit_ball(c) if scope == "global" else jax.tree.map(_to_unit_ball, c)
        )
        step = next_step(state.mars_step)
        newest = remembered(updates, state.mars_gradient)
        return clipped, MarsState(step, newest)

    return in_float32(optax.GradientTransformationExtraArgs(init_fn, update_fn))


class ClusterState(NamedTuple):
    """State of :func:`multi_momentum`.

    Attributes:
      cluster_momenta: ``m_k`` along a first axis, float32 or wider.
    """

    cluster_momenta: optax.Updates


def multi_momentum(
    num_clusters: int, beta: Number, probabilities: Sequence[float] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Multi-momentum: one momentum for each cluster of the data.

    For a batch of cluster ``k`` the gradient becomes ``g - m_k + sum_j p_j m_j``, then
    ``m_k <- beta m_k + (1 - beta) g``. If cluster ``k`` is drawn with probability
    ``p_k``, the mean of the result is that of ``g``, and what varies from cluster to
    cluster is gone as far as the momenta know it.

    With one cluster the gradient stays as it is. For the optimizers of the paper,
    follow it by ``optax.sgd`` with momentum.

    Args:
      num_clusters: Number of clusters, such as classes, at least 1. The state holds as
        many trees.
      beta: Decay of the momenta, in [0, 1).
      probabilities: ``p_k``, the share of each cluster in the data. The default is
        equal shares.

    Returns:
      A transformation with the state :class:`ClusterState` that stands before the
      optimizer; ``update`` needs ``cluster=``, the number of the batch's cluster. Under
      ``jax.jit`` a number out of range is not seen, and moves no momentum.

    Raises:
      ValueError: If an argument is out of range, or if ``update`` gets no cluster.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.optimizers.multi_momentum(2, beta=0.0)
      >>> state = tx.init(jnp.zeros(1))
      >>> for cluster, g in ((0, 5.0), (1, -3.0), (0, 5.0)):
      ...     updates, state = tx.update(jnp.array([g]), state, cluster=cluster)
      >>> updates.tolist()  # 5 - 5 + (5 - 3)/2
      [1.0]

    References:
      Tondji, Kashubin and Cisse, "Variance Reduction in Deep Learning: More Momentum is
      All You Need", 2021, 2111.11828, after Yuan, Ying and Sayed, "COVER: A
      Cluster-based Variance Reduced Method for Online Learning", 2019.
    """
    hint = "; inside optax.inject_hyperparams name it in static_args"
    num = _checks.static_integer("num_clusters", num_clusters, 1, hint)
    beta = _checks.within("beta", beta, 0, 1, closed_high=False)
    shares = _shares(num, probabilities)

    def init_fn(params: optax.Params) -> ClusterState:
        zeros = lambda x: jnp.broadcast_to(jnp.zeros_like(x), (num, *x.shape))
        return ClusterState(jax.tree.map(zeros, params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        cluster: jax.Array | int | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ClusterState]:
        del params, extra_args
        k = _number_of_cluster(cluster, num)
        column = lambda row, m: jnp.reshape(row, (num,) + (1,) * (m.ndim - 1))
        # The batch's own momentum, picked without an index: stacks may be sharded.
        own = lambda m: column(jnp.arange(num) == k, m)

        def reduced(m: jax.Array, g: jax.Array) -> jax.Array:
            p = column(jnp.asarray(shares, m.real.dtype), m)
            return g - jnp.sum(jnp.where(own(m), m, 0), 0) + jnp.sum(p * m, 0)

        def moved(m: jax.Array, g: jax.Array) -> jax.Array:
            new = beta * m + (1 - beta) * g[None]
            return jnp.where(own(m), new, m).astype(m.dtype)

        momenta = state.cluster_momenta
        out = jax.tree.map(reduced, momenta, updates)
        return out, ClusterState(jax.tree.map(moved, momenta, updates))

    tx = in_float32(optax.GradientTransformationExtraArgs(init_fn, update_fn))
    return with_stacks(tx, "cluster_momenta")


def _like_gradients(before: optax.Updates, updates: optax.Updates) -> optax.Updates:
    """The leaves of ``before`` that stand where ``updates`` has gradients.

    Raises:
      ValueError: If one is missing or has another shape.
    """
    named, structure = jax.tree.flatten_with_path(updates, is_leaf=_leaves.is_masked)
    parts = _leaves.parts_like(updates, before)
    if len(parts) != len(named):
        raise ValueError(
            f"grads_at_previous has {len(parts)} leaves and the gradient {len(named)}; "
            "pass a tree like the gradient."
        )

    def one(path: KeyPath, g: Any, part: Any) -> Any:
        if _leaves.is_masked(g):
            return g
        if _leaves.is_gradient(part) and jnp.shape(part) == g.shape:
            return part
        raise ValueError(
            f"grads_at_previous{jax.tree_util.keystr(path)} is not like the gradient, "
            f"of shape {g.shape}; pass a tree like the gradient."
        )

    places = zip(named, parts, strict=True)
    kept = [one(path, g, part) for (path, g), part in places]
    return present(jax.tree.unflatten(structure, kept))


def _to_unit_ball(tree: optax.Updates) -> optax.Updates:
    """``v/max(|v|, 1)`` over all leaves."""
    n = _numerics.norm(tree)
    factor = jnp.where(n > 1, 1 / jnp.where(n > 1, n, 1), 1)
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)


def _shares(num: int, probabilities: Sequence[float] | None) -> np.ndarray:
    """The shares of the clusters.

    Raises:
      ValueError: If they are not one share for each cluster, of sum 1.
    """
    if probabilities is None:
        return np.full(num, 1 / num)
    shares = np.asarray(probabilities, float)
    if shares.shape != (num,) or not (
        np.all(shares >= 0) and abs(shares.sum() - 1) <= 1e-5
    ):
        raise ValueError(
            f"probabilities must be {num} shares that sum to 1, got {probabilities!r}; "
            "divide the sizes of the clusters by the size of the data."
        )
    return shares


def _number_of_cluster(cluster: jax.Array | int | None, num: int) -> Any:
    """The number of the cluster, checked where it is known.

    Raises:
      ValueError: If it is not one integer, or out of range.
    """
    number = isinstance(cluster, (int, np.integer, np.ndarray, jax.Array))
    if number and jnp.issubdtype(jnp.result_type(cluster), jnp.integer):
        one = jnp.ndim(cluster) == 0
        if one and (isinstance(cluster, core.Tracer) or 0 <= cluster < num):
            return cluster
    raise ValueError(
        "multi_momentum needs the cluster of the batch, one integer from 0 to "
        f"{num - 1}, got {cluster!r}; call tx.update(updates, state, params, "
        "cluster=0)."
    )
