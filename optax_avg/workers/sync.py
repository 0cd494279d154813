"""Local steps, then a mean of the workers: local SGD, FedAvg, FedAU, DiLoCo.

every k-th step:  z = mean_i (x_i - a),  a <- a + outer(-z),  x_i <- a

``a`` is the last common point and ``x_i`` the parameters of worker ``i``. Without
``outer`` this is ``x_i <- mean_i x_i``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_avg import _checks, _leaves, _mesh, _mixups, _numerics, _sight
from optax_avg.workers import _rounds
from optax_avg.workers.participation import Participation

__all__ = ["SyncState", "sync_params"]

# A tree of arrays, or () where it is not needed.
Kept = Any


class SyncState(NamedTuple):
    """State of :func:`sync_params` on one worker.

    All workers have the same, but for ``participation``.

    Attributes:
      sync_step: Optimizer steps seen, int32. Before it overflows it goes back by
        ``every``.
      left_out: Number of displacements that were not finite so far, over all workers,
        int32.
      anchor: The last common point in float32 or wider, ``()`` where it is not needed.
      outer_state: State of ``outer``, ``()`` without it.
      mean_state: State of ``mean``, ``()`` without it.
      participation: What ``weights`` remembers of this worker, ``()`` without it.
    """

    sync_step: jax.Array
    left_out: jax.Array
    anchor: Kept
    outer_state: Kept
    mean_state: Kept
    participation: Kept


def sync_params(
    axis_name: _mesh.AxisName | None,
    every: int,
    weights: Sequence[float] | Participation | None = None,
    outer: optax.GradientTransformation | None = None,
    *,
    mean: optax.GradientTransformation | None = None,
    correct_variance: bool = False,
    where: _leaves.Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Local steps of each worker, then a mean of their parameters.

    Every ``every`` steps the update leads each worker to one common point:

    - local SGD and FedAvg: ``x_i <- sum_j w_j x_j / sum_j w_j``, all ``w_j = 1`` by
      default;
    - with ``outer``: ``a <- a + outer(-z)``, ``x_i <- a``, where ``z`` is the mean of
      the displacements ``x_j - a`` from the last common point ``a``.
      ``outer=optax.sgd(0.7, momentum=0.9, nesterov=True)`` is DiLoCo, for which the
      optimizer before this link is AdamW; ``outer=optax.adam(...)`` is FedAdam;
    - with ``weights=oa.workers.fedau()``: ``z = 1/N sum_j w_j I_j (x_j - a)``, FedAU;
    - with ``mean``: ``z`` is a robust location of the displacements;
    - with ``correct_variance``: a leaf ``z`` of the mean parameters, of mean element
      ``m``, becomes ``m + sqrt(sum_j w_j var x_j / sum_j w_j / var z) (z - m)``.

    In between no worker waits for another: the collectives are in a branch of
    ``jax.lax.cond``. All workers take it at the same step, since they count alike. A
    state that several workers do not share step by step must not be mixed.

    With ``outer``, ``mean`` or ``fedau()`` all workers must start at one point, the
    first ``a``: displacements from different points have no common target.

    Each worker has parameters and an optimizer state of its own. Keep both with a first
    axis of the workers, sharded over ``axis_name``, and take ``x[0]`` inside
    ``shard_map``; ``pmap`` does so itself. Under ``jax.vmap`` with an ``axis_name``
    workers are simulated on one device; ``cond`` then computes both branches in every
    step. Without an axis name there is one worker: with ``outer`` this is a Lookahead
    with another optimizer for its slow weights.

    The state of the optimizer before this link is left alone, as in DiLoCo.
    :func:`sync_state` averages it or begins it anew, as other papers say.

    Workers agree after a round up to the rounding of ``apply_updates``. The common
    point is kept in float32 and rounded once, so that these roundings do not add up.

    A worker that is not finite is left out of the round and counted. If it was finite
    before this step, it is led to the common point of the others. Parameters that are
    NaN already stay NaN, since an update is added to them:
    ``optax.apply_if_finite(optimizer, n)`` as the optimizer before this link keeps
    local steps finite. If no worker is left, ``outer`` and the common point stay as
    they are, and without a common point every worker keeps its own.

    For another number of workers call :func:`optax_avg.workers.resize` on parameters
    and state after a round.

    Args:
      axis_name: Mapped axis or axes over the workers, inside ``shard_map`` or ``pmap``;
        None for one worker.
      every: Optimizer steps between two rounds, at least 1.
      weights: One weight for each worker, such as its number of examples; their scale
        does not matter. Or :func:`optax_avg.workers.fedau`.
      outer: Optimizer of the common point. It sees ``-z`` as the gradient.
      mean: An aggregator over ``axis_name`` in place of the mean, such as
        ``oa.trimmed_mean(1, axis_name="workers")``.
      correct_variance: Whether to restore the variance of each leaf, which the mean of
        models that are not aligned has lost.
      where: Leaves to average: a tree of bools like a prefix of the parameters, or a
        predicate ``(key_path, leaf) -> bool``. The others stay each worker's own.

    Returns:
      A transformation with the state :class:`SyncState`; it stands after the optimizer
      and before averages of the parameters. ``update`` takes ``participates``, whether
      this worker takes part in the round, True by default.

    Raises:
      ValueError: If an argument is out of range, or if two do not go together. In
        ``update``, if ``axis_name`` is not mapped, if there are more or fewer weights
        than workers, or if the parameters are the same on all workers by their type in
        ``shard_map``.
      TypeError: If ``outer`` or ``mean`` is no transformation.

    Example:
      Two workers take a step each, then meet half-way.

      >>> import jax, jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = optax.chain(optax.sgd(1.0), oa.sync_params("workers", 2))
      >>> x, grads = jnp.zeros(2), jnp.array([-1.0, -3.0])
      >>> state = jax.vmap(tx.init)(x)
      >>> step = jax.vmap(tx.update, axis_name="workers")
      >>> for _ in range(2):
      ...     updates, state = step(grads, state, x)
      ...     x = optax.apply_updates(x, updates)
      ...     print(x)
      [1. 3.]
      [4. 4.]

    References:
      McMahan et al., "Communication-Efficient Learning of Deep Networks from
      Decentralized Data", 2016, 1602.05629.
      Stich, "Local SGD Converges Fast and Communicates Little", 2018, 1805.09767.
      Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language
      Models", 2023, 2311.08105.
      Wang & Ji, "A Lightweight Method for Tackling Unknown Participation Statistics in
      Federated Averaging", 2023, 2306.03401.
      Tian et al., "Vanishing Variance Problem in Fully Decentralized Neural-Network
      Systems", 2024, 2404.04616.
    """
    axes = _mesh.axis_names(axis_name)
    every = _checks.check_integer("every", every, 1)
    if outer is not None:
        wanted = (
            "an outer optimizer, such as optax.sgd(0.7, momentum=0.9, nesterov=True)"
        )
        _mixups.refuse_no_transformation("sync_params", outer, wanted)
    if mean is not None:
        wanted = "an aggregator, such as oa.coordinate_median(axis_name='workers')"
        _mixups.refuse_no_transformation("sync_params", mean, wanted)
    participation = weights if isinstance(weights, Participation) else None
    fixed = None if participation else _checked_weights(weights)
    if mean is not None and (not axes or weights is not None):
        raise ValueError(
            "mean is a location of several workers that all count alike; call "
            "sync_params('workers', every, mean=oa.coordinate_median("
            "axis_name='workers')) without weights."
        )
    has_anchor = any(x is not None for x in (outer, mean, participation))
    if correct_variance and has_anchor:
        raise ValueError(
            "correct_variance is for means of parameters; outer, mean and fedau() "
            "average displacements. Call sync_params(axis_name, every, "
            "correct_variance=True)."
        )
    outer_tx: Any = None if outer is None else optax.with_extra_args_support(outer)
    mean_tx: Any = mean

    def init(params: Any) -> SyncState:
        if not _leaves.has_masked(params):
            _leaves.refuse_none_selected(
                params,
                where,
                "where is true of no leaf, so that nothing would be synced",
            )
        x = _leaves.select(params, where)
        anchor = jax.tree.map(_numerics.copy_as, x) if has_anchor else ()
        return SyncState(
            sync_step=jnp.zeros([], jnp.int32),
            left_out=jnp.zeros([], jnp.int32),
            anchor=anchor,
            outer_state=() if outer is None else outer_tx.init(anchor),
            mean_state=() if mean is None else mean_tx.init(anchor),
            participation=participation.init() if participation else (),
        )

    def displacement(x: Any, anchor: Any) -> Any:
        """``x - a``, from the point where workers started, rounded as they are."""
        return jax.tree.map(
            lambda p, a: _numerics.widen(p) - _numerics.widen(a.astype(p.dtype)),
            x,
            anchor,
        )

    def weight_of(state: SyncState, counts: jax.Array) -> tuple[Any, Any, Any]:
        """Weight of this worker, what weights are divided by, and the next memory."""
        if participation:
            weight, memory = participation.weigh(state.participation, counts)
            return weight, jnp.asarray(_rounds.number(axes)), memory
        weight = jnp.asarray(1.0) if fixed is None else _own(fixed, axes)
        return weight, _rounds.total(jnp.where(counts, weight, 0), axes), ()

    def meet(
        updates: Any, state: SyncState, params: Any, x: Any, participates: Any
    ) -> tuple[Any, SyncState]:
        moved = displacement(x, state.anchor) if has_anchor else x
        finite = _rounds.is_finite(moved, axes)
        takes_part = jnp.asarray(participates, bool)
        counts = finite & takes_part
        weight, divisor, memory = weight_of(state, counts)
        share = weight / jnp.where(divisor > 0, divisor, 1)
        present = _rounds.total(jnp.where(counts & (weight > 0), 1, 0), axes) > 0
        mean_state = state.mean_state
        if mean is None:
            z = _rounds.combined(moved, share, counts, axes)
        else:
            rows = jax.tree.map(lambda v: jnp.where(counts, v, jnp.nan), moved)
            z, mean_state = mean_tx.update(rows, mean_state)
            _refuse_other_shapes(z, moved, axis_name)
        if correct_variance:
            spread = _rounds.variances(moved, axes)
            wanted = _rounds.combined(spread, share, counts, axes)
            z = _rounds.with_variances(z, wanted, axes)
        anchor, outer_state = state.anchor, state.outer_state
        if outer is not None:
            steps, outer_state = outer_tx.update(
                jax.tree.map(jnp.negative, z), outer_state, anchor
            )
            anchor = optax.apply_updates(anchor, steps)
        elif has_anchor:
            anchor = jax.tree.map(jnp.add, anchor, z)
        after = state._replace(
            anchor=anchor, outer_state=outer_state, mean_state=mean_state
        )
        after = _rounds.chosen(present, after, state)
        target = after.anchor if has_anchor else _rounds.chosen(present, z, x)
        bad = _rounds.total(jnp.where(takes_part & ~finite, 1, 0), axes)
        after = after._replace(
            left_out=state.left_out + bad.astype(jnp.int32), participation=memory
        )
        return (
            _rounds.typed_like(_rounds.arriving(updates, params, target), updates),
            _rounds.typed_like(after, state),
        )

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        participates: Any = True,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        del extra_args
        _checks.require_params("sync_params", params)
        _mesh.require_mapped(axes)
        step: Any = _numerics.advance_clock(state.sync_step, every)
        state = state._replace(sync_step=step)
        updates, state = _rounds.taken(
            "sync_params",
            lambda u, s, x: meet(u, s, params, x, participates),
            step % every == 0,
            updates,
            state,
            params,
            where,
            axes,
        )
        _sight.report("sync_params", emitted=updates, rewrites=True, is_average=False)
        return updates, state

    return optax.GradientTransformationExtraArgs(
        _leaves.shapes_for_shapes(init), update
    )


def _checked_weights(weights: Any) -> np.ndarray | None:
    """Weights as an array of one axis.

    Raises:
      ValueError: If they are none.
    """
    if weights is None:
        return None
    try:
        found = np.asarray(weights, float)
    except (TypeError, ValueError):
        found = np.zeros([])
    fine = found.ndim == 1 and np.all(np.isfinite(found)) and np.all(found >= 0)
    if not (fine and found.sum() > 0):
        raise ValueError(
            "weights must be one number from 0 on for each worker, not all 0, or "
            f"oa.workers.fedau(). Got {weights!r}; write weights=[120, 80] for two "
            "workers with 120 and 80 examples."
        )
    return found


def _own(weights: np.ndarray, axes: _rounds.Axes) -> jax.Array:
    """The weight of this worker.

    Raises:
      ValueError: If there are more or fewer weights than workers.
    """
    workers = _rounds.number(axes)
    if len(weights) != workers:
        raise ValueError(
            f"{len(weights)} weights for {workers} workers; call sync_params with one "
            "weight for each worker of axis_name, or without weights."
        )
    values = jnp.asarray(weights)
    return values[lax.axis_index(axes)] if axes else values[0]


def _refuse_other_shapes(z: Any, moved: Any, axis_name: Any) -> None:
    """Raises unless ``mean`` has gone over the workers.

    Raises:
      ValueError: If it has taken an axis of the leaves for the workers.
    """
    pairs = zip(jax.tree.leaves(z), jax.tree.leaves(moved))
    if any(jnp.shape(a) != jnp.shape(b) for a, b in pairs):
        raise ValueError(
            "mean has not gone over the workers but over an axis of the leaves; pass "
            f"it the name of their axis, as in oa.coordinate_median(axis_name="
            f"{axis_name!r})."
        )
