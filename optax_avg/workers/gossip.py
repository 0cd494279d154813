"""Gossip on a ring: every worker averages with its two neighbours.

x_i <- (1 - 2 s) x_i + s (x_{i-1} + x_{i+1})
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_avg import _checks, _leaves, _mesh, _numerics, _sight
from optax_avg.workers import _rounds

__all__ = ["GossipState", "gossip_params"]


class GossipState(NamedTuple):
    """State of :func:`gossip_params` on one worker.

    Attributes:
      gossip_step: Optimizer steps seen, int32. Before it overflows it goes back by
        ``every``.
      gossip_left_out: Number of rounds in which this worker was not finite, int32.
    """

    gossip_step: jax.Array
    gossip_left_out: jax.Array


def gossip_params(
    axis_name: _mesh.AxisName | None,
    every: int = 1,
    share: float = 1 / 3,
    *,
    correct_variance: bool = False,
    where: _leaves.Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Every worker averages its parameters with those of its neighbours on a ring.

    ``x_i <- (1 - 2 s) x_i + s (x_{i-1} + x_{i+1})`` every ``every`` steps: D-PSGD on a
    ring, after the local step. D-PSGD itself adds the step to the mean of the
    parameters before it. Each worker sends its parameters twice, whatever the number of
    workers, and none waits for all. The mean over the workers stays as it is; their
    differences shrink in each round.

    Workers never meet at one point, so that each keeps its own parameters. How to place
    them is said at :func:`sync_params`. All workers take a round at the same step.

    With ``correct_variance`` each leaf ``z`` of mean ``m`` becomes ``m + sqrt(V/var z)
    (z - m)``. ``V`` is the mean of the variances of the three that were averaged, with
    the same shares.

    A neighbour that is not finite is left out, and its share goes to the worker's own
    parameters. A worker that has become infinite or NaN in this step takes the mean of
    its neighbours.

    Args:
      axis_name: Mapped axis over the workers, inside ``shard_map`` or ``pmap``. None
        for one worker, where nothing happens.
      every: Optimizer steps between two rounds, at least 1.
      share: ``s``, share of each neighbour, in [0, 1/2].
      correct_variance: Whether to restore the variance of each leaf, which the mean of
        models that are not aligned has lost.
      where: Leaves to average: a tree of bools like a prefix of the parameters, or a
        predicate ``(key_path, leaf) -> bool``. The others stay each worker's own.

    Returns:
      A transformation with the state :class:`GossipState`; it stands after the
      optimizer and before averages of the parameters.

    Raises:
      ValueError: If an argument is out of range. In ``update``, if ``axis_name`` is not
        mapped, or if the parameters are the same on all workers by their type in
        ``shard_map``.

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.gossip_params("workers", share=0.25)
      >>> x = jnp.array([4.0, 0.0, 0.0, 0.0])
      >>> state = jax.vmap(tx.init)(x)
      >>> updates, state = jax.vmap(tx.update, axis_name="workers")(0 * x, state, x)
      >>> x + updates
      Array([2., 1., 0., 1.], dtype=float32)

    References:
      Lian et al., "Can Decentralized Algorithms Outperform Centralized Algorithms? A
      Case Study for Decentralized Parallel Stochastic Gradient Descent", 2017,
      1705.09056.
      Tian et al., "Vanishing Variance Problem in Fully Decentralized Neural-Network
      Systems", 2024, 2404.04616.
    """
    axes = _mesh.axis_names(axis_name)
    every = _checks.check_integer("every", every, 1)
    share = _checks.within("share", share, 0, 0.5)

    def init(params: Any) -> GossipState:
        if not _leaves.has_masked(params):
            _leaves.refuse_none_selected(
                params,
                where,
                "where is true of no leaf, so that nothing would be mixed",
            )
        return GossipState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))

    def meet(updates: Any, state: GossipState, params: Any, x: Any) -> Any:
        finite = _rounds.is_finite(x, axes)
        own = {
            "x": jax.tree.map(lambda v: jnp.where(finite, v, 0), x),
            "finite": finite.astype(float),
        }
        if correct_variance:
            own["variance"] = _rounds.variances(own["x"], axes)
        left, right = (_received(own, axes, shift) for shift in (1, -1))
        kept = 1 - share * (left["finite"] + right["finite"])
        shares = [
            jnp.where(finite, kept, 0),
            share * left["finite"],
            share * right["finite"],
        ]
        whole = jnp.asarray(sum(shares))
        shares = [s / jnp.where(whole > 0, whole, 1) for s in shares]

        def mixed(part: str) -> Any:
            def one(*leaves):
                wides = [_numerics.wide(v) for v in leaves]
                return sum(s.astype(v.real.dtype) * v for s, v in zip(shares, wides))

            return jax.tree.map(one, own[part], left[part], right[part])

        z = mixed("x")
        if correct_variance:
            z = _rounds.with_variances(z, mixed("variance"), axes)
        target = _rounds.chosen(whole > 0, z, x)
        left_out = _numerics.count_if(~finite, state.gossip_left_out)
        return (
            _rounds.typed_like(_rounds.arriving(updates, params, target), updates),
            _rounds.typed_like(state._replace(gossip_left_out=left_out), state),
        )

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        _checks.require_params("gossip_params", params)
        _mesh.require_mapped(axes)
        step: Any = _numerics.advance_clock(state.gossip_step, every)
        state = state._replace(gossip_step=step)
        if axes:
            updates, state = _rounds.taken(
                "gossip_params",
                lambda u, s, x: meet(u, s, params, x),
                step % every == 0,
                updates,
                state,
                params,
                where,
                axes,
            )
        _sight.report("gossip_params", emitted=updates, rewrites=True, is_average=False)
        return updates, state

    return optax.GradientTransformationExtraArgs(
        _leaves.shapes_for_shapes(init), update
    )


def _received(tree: Any, axes: _rounds.Axes, shift: int) -> Any:
    """The tree of the worker ``shift`` places before this one."""
    n = _rounds.number(axes)
    pairs = [(i, (i + shift) % n) for i in range(n)]
    return jax.tree.map(lambda x: lax.ppermute(_mesh.vary(x, axes), axes, pairs), tree)
