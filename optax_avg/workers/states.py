"""States of optimizers when workers meet, and when their number changes."""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_avg import _checks, _leaves, _mesh, _mixups, _numerics
from optax_avg.workers import _rounds
from optax_avg.workers.participation import FedAUState, fedau

__all__ = ["SyncedState", "resize", "sync_state"]

How = Literal["mean", "reset"]


class SyncedState(NamedTuple):
    """State of :func:`sync_state` on one worker.

    Attributes:
      synced_step: Optimizer steps seen, int32. Before it overflows it goes back by
        ``every``.
      synced: State of the optimizer.
    """

    synced_step: jax.Array
    synced: Any


def sync_state(
    optimizer: optax.GradientTransformation,
    axis_name: _mesh.AxisName | None,
    every: int,
    how: How = "mean",
) -> optax.GradientTransformationExtraArgs:
    """An optimizer of workers whose state is averaged or begins anew every few steps.

    - ``"mean"``: every ``every`` steps each float in the state becomes its mean over
      the workers, as for the momentum of parallel restarted SGD. Counters and keys stay
      each worker's own, which count alike.
    - ``"reset"``: every ``every`` steps the state is that of ``init``, as for clients
      of FedAvg, which know nothing of earlier rounds. Its step counter begins anew as
      well, and with it a schedule of the learning rate.

    DiLoCo keeps the state of each worker: it needs no wrapper. Workers whose state is
    not finite are left out of the mean and take that of the others.

    Args:
      optimizer: Optimizer of the local steps.
      axis_name: Mapped axis or axes over the workers, as for :func:`sync_params`.
      every: Optimizer steps between two rounds, the same as for :func:`sync_params`.
      how: ``"mean"`` or ``"reset"``.

    Returns:
      A transformation with the state :class:`SyncedState`, for the place of
      ``optimizer`` in a chain with :func:`sync_params`.

    Raises:
      ValueError: If an argument is out of range. In ``update``, if ``axis_name`` is not
        mapped.
      TypeError: If ``optimizer`` is no transformation.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = oa.sync_state(optax.trace(0.5), "workers", 2)
      >>> x, grads = jnp.zeros(2), jnp.array([2.0, 6.0])
      >>> state = jax.vmap(tx.init)(x)
      >>> for _ in range(2):
      ...     _, state = jax.vmap(tx.update, axis_name="workers")(grads, state, x)
      ...     print(state.synced.trace)
      [2. 6.]
      [6. 6.]

    References:
      Yu et al., "On the Linear Speedup Analysis of Communication Efficient Momentum SGD
      for Distributed Non-Convex Optimization", 2019, 1905.03817.
      McMahan et al., "Communication-Efficient Learning of Deep Networks from
      Decentralized Data", 2016, 1602.05629.
    """
    _mixups.refuse_no_transformation("sync_state", optimizer, "an optimizer")
    axes = _mesh.axis_names(axis_name)
    every = _checks.check_integer("every", every, 1)
    _checks.one_of("how", how, get_args(How))
    inner: Any = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> SyncedState:
        return SyncedState(jnp.zeros([], jnp.int32), inner.init(params))

    def meet(state: Any) -> Any:
        floats = _leaves.select(state, None)
        finite = _rounds.is_finite(floats, axes)
        divisor = _rounds.total(finite.astype(float), axes)
        share = 1 / jnp.where(divisor > 0, divisor, 1)
        means = _rounds.combined(floats, share, finite, axes)
        leaves, structure = jax.tree.flatten(state)

        def one(x, z):
            if _leaves.is_absent(z):
                return x
            return jnp.where(divisor > 0, z.astype(x.dtype), x)

        parts = zip(leaves, structure.flatten_up_to(means))
        return structure.unflatten([one(*pair) for pair in parts])

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        _mesh.require_mapped(axes)
        step: Any = _numerics.advance_clock(state.synced_step, every)
        updates, kept = inner.update(updates, state.synced, params, **extra_args)

        def due(kept: Any) -> Any:
            if how == "mean":
                return _rounds.typed_like(meet(kept), kept)
            _checks.require_params("sync_state(how='reset')", params)
            return _rounds.typed_like(inner.init(params), kept)

        kept = lax.cond(step % every == 0, due, lambda kept: kept, kept)
        return updates, SyncedState(step, kept)

    return optax.GradientTransformationExtraArgs(
        _leaves.shapes_for_shapes(init), update
    )


def resize(tree: Any, workers: int) -> Any:
    """Parameters and states of workers, for another number of them.

    Of fewer workers the first remain. Further ones are copies, in turn, with their
    optimizer states; for :func:`optax_avg.workers.fedau` they have no past. Call it
    after a round, when all workers are at the common point. In between the mean of the
    copies is not that of the workers.

    Args:
      tree: A tree whose leaves have a first axis of the workers, shape (workers, ...).
      workers: Number of workers to come, at least 1.

    Returns:
      A tree like the first, whose leaves have the shape (new workers, ...).

    Raises:
      ValueError: If ``workers`` is below 1, or if leaves have first axes of several
        lengths.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> oa.workers.resize({"w": jnp.array([[1.0], [2.0]])}, 3)["w"].tolist()
      [[1.0], [2.0], [1.0]]
    """
    workers = _checks.static_integer("workers", workers, 1)
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)}
    if len(lengths) > 1 or () in lengths:
        raise ValueError(
            "every leaf must have a first axis of the workers, got first axes of "
            f"{sorted(lengths)}; call resize on parameters and states of one number of "
            "workers."
        )
    before = next(iter(lengths), (1,))[0]
    rows = jnp.arange(workers) % before
    is_new = jnp.arange(workers) >= before
    is_past = lambda node: isinstance(node, FedAUState)

    def one(node: Any) -> Any:
        grown = jax.tree.map(lambda x: x[rows], node)
        if not is_past(node):
            return grown
        return jax.tree.map(
            lambda x, first: jnp.where(is_new, first, x), grown, fedau().init()
        )

    return jax.tree.map(one, tree, is_leaf=is_past)
