"""Error feedback: workers send compressed gradients and remember what they left out.

    s_i = eta e_i + g_i - h_i,      worker i sends C(s_i)
    e_i <- e_i + g_i - h_i - C(s_i)
    h_i <- h_i + C(s_i)

The variants keep parts of these memories: EF has ``h_i = 0`` and ``eta = 1``, EF21 has
``eta = 0``, and EControl has both memories and ``eta`` in between.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_avg import _checks, _leaves, _mesh, _numerics
from optax_avg.optimizers.compressors import Compressor, Key, Message

__all__ = ["ErrorFeedbackState", "error_feedback"]

Variant = Literal["ef", "ef21", "econtrol"]
# A tree of arrays, or () where a variant does not keep it.
Memory = Any


class ErrorFeedbackState(NamedTuple):
    """State of :func:`error_feedback`.

    With ``axis_name``, what belongs to a worker has a first axis of length 1 inside
    ``shard_map``. With ``w = P("data")`` the specs of the state for workers along the
    axis ``"data"`` are ``ErrorFeedbackState(P(), w, w, P(), P(), w)``.

    Attributes:
      feedback_step: Number of calls of ``update``, int32; schedules are called with it.
      compression_error: ``e_i`` of each worker in float32 or wider, ``()`` for EF21.
      estimate: ``h_i`` of each worker in float32 or wider, ``()`` for EF.
      mean_estimate: Mean of ``h_i`` over the workers, ``()`` for EF and without
        ``axis_name``.
      compressor_key: PRNG key of the compressor, ``()`` for none.
      left_out: Number of gradients of each worker that were not finite or so large that
        sums of them could overflow, int32.
    """

    feedback_step: jax.Array
    compression_error: Memory
    estimate: Memory
    mean_estimate: Memory
    compressor_key: Key
    left_out: jax.Array


def error_feedback(
    compressor: Compressor,
    variant: Variant = "ef21",
    *,
    eta: optax.ScalarOrSchedule | None = None,
    axis_name: _mesh.AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The mean of compressed gradients of workers, with the error fed back.

    Worker ``i`` has the gradient ``g_i`` and sends ``c_i``, from which all compute the
    same result:

    - ``"ef"``, the classic one: ``c_i = C(g_i + e_i)``, ``e_i <- g_i + e_i - c_i``;
      result ``mean_i c_i``.
    - ``"ef21"``: ``c_i = C(g_i - h_i)``, ``h_i <- h_i + c_i``; result ``mean_i h_i``.
    - ``"econtrol"``: ``c_i = C(eta e_i + g_i - h_i)``, then ``e_i <- e_i + g_i - h_i -
      c_i`` and ``h_i <- h_i + c_i``; result ``mean_i h_i``.

    Memories start at zero, so that the first message is compressed as all others are.
    The code of the authors of EF21 sends the first gradient whole instead.
    ``"econtrol"`` with ``eta = 0`` is EF21.

    Inside ``shard_map`` with ``axis_name`` the compressed messages really travel:
    values and places of :func:`top_k`, bits of :func:`sign`, factors of
    :func:`low_rank` are gathered from all workers, values of :func:`random_k` and
    :func:`identity` are averaged in an all-reduce. There is no server: every worker
    computes what it would broadcast, so that the way back is not compressed and not
    counted by :func:`bytes_sent`. Call ``init`` inside ``shard_map`` as well, because
    each worker has a memory of its own; :class:`ErrorFeedbackState` names the specs.
    Under ``jax.vmap`` with an ``axis_name`` workers are simulated on one device, and
    nothing travels.

    Parameters that are sharded over a further axis of ``shard_map`` have memories that
    are sharded alike, and ``k`` and ``rank`` are those of a shard.

    Without ``axis_name`` there is one worker. ``"ef"`` with :func:`top_k` before Adam
    is the compression of MicroAdam. MicroAdam saves memory by two further means, which
    are not built here: it keeps the error in 4 bits, and a window of sparse gradients
    in place of Adam's statistics.

    EF and EF21 keep one tree like the parameters, EControl two. With ``axis_name`` EF21
    and EControl keep one more, the mean of the estimates.

    Learning rates stand behind this link, so that errors are in units of the gradient.
    In the classic algorithm they are in units of the step: for a learning rate that
    changes put the link behind it, ``optax.chain(optax.sgd(schedule),
    error_feedback(compressor, "ef"))``.

    A worker whose gradient is not finite, or so large that sums of it could overflow,
    sends zeros in that step and keeps its memory.

    Args:
      compressor: A compressor, such as ``oa.optimizers.top_k(0.01)``.
      variant: ``"ef"``, ``"ef21"`` or ``"econtrol"``.
      eta: Strength of the feedback of EControl, in [0, 1], a number or a schedule. Its
        theory takes ``delta/400`` where the compressor keeps a share ``delta``, for
        instance ``k/d``; the experiments tune it. The other variants take none.
      axis_name: Mapped axis or axes over the workers, inside ``shard_map`` or ``pmap``.
        The gradients must differ over it: take them at ``jax.lax.pcast(params,
        axis_name, to="varying")``, or ``jax.grad`` sums them over the devices.

    Returns:
      A transformation with the state :class:`ErrorFeedbackState` that stands before
      the optimizer.

    Raises:
      ValueError: If ``variant`` is unknown, or ``eta`` is out of range, missing for
        EControl or given to another variant. In ``init``, if a leaf is complex. In
        ``init`` and ``update``, if ``axis_name`` is not mapped; in ``update`` also if a
        gradient is the same on all devices of it, or if a memory has another shape.
      TypeError: If ``compressor`` is none.

    Example:
      The second element is too small to be sent, until its error has grown.

      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.optimizers.error_feedback(oa.optimizers.top_k(1), "ef")
      >>> g = jnp.array([3.0, 2.0])
      >>> state = tx.init(g)
      >>> for _ in range(3):
      ...     sent, state = tx.update(g, state)
      ...     print(sent)
      [3. 0.]
      [0. 4.]
      [6. 0.]

    References:
      Seide et al., "1-Bit Stochastic Gradient Descent and its Application to
      Data-Parallel Distributed Training of Speech DNNs", 2014.
      Richtarik et al., "EF21: A New, Simpler, Theoretically Better, and Practically
      Faster Error Feedback", 2021, 2106.05203.
      Gao et al., "EControl: Fast Distributed Optimization with Compression and Error
      Control", 2023, 2311.05645.
      Modoranu et al., "MicroAdam: Accurate Adaptive Optimization with Low Space
      Overhead and Provable Convergence", 2024, 2405.15593.
    """
    if not isinstance(compressor, Compressor):
        raise TypeError(
            "error_feedback needs a compressor, such as oa.optimizers.top_k(0.01). It "
            f"got {getattr(compressor, '__name__', type(compressor).__name__)}."
        )
    _checks.one_of("variant", variant, get_args(Variant))
    if (eta is not None) != (variant == "econtrol"):
        raise ValueError(
            f"eta belongs to EControl, got eta={eta!r} for {variant!r}; call "
            "error_feedback(compressor, 'econtrol', eta=...), where its theory takes "
            "delta/400, or leave eta out."
        )
    if eta is not None:
        eta = _checks.number_or_schedule("eta", eta, 0, 1)
    axes = _mesh.axis_names(axis_name)

    def init_fn(params: optax.Params) -> ErrorFeedbackState:
        _mesh.require_mapped(axes)
        _checks.refuse_complex("error_feedback", params)

        def own(tree: Any) -> Any:
            if not axes:
                return tree
            return jax.tree.map(lambda x: _mesh.vary(x[None], axes), tree)

        zeros = lambda kept: _leaves.zeros_like_wide(params) if kept else ()
        return ErrorFeedbackState(
            feedback_step=jnp.zeros([], jnp.int32),
            compression_error=own(zeros(variant != "ef21")),
            estimate=own(zeros(variant != "ef")),
            mean_estimate=zeros(variant != "ef" and bool(axes)),
            compressor_key=compressor.make_key(),
            left_out=own(jnp.zeros([], jnp.int32)),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ErrorFeedbackState]:
        del params, extra_args
        _mesh.require_mapped(axes)
        leaves, structure = _flatten(updates)
        there = [i for i, leaf in enumerate(leaves) if _leaves.is_gradient(leaf)]
        if axes:
            named = jax.tree.flatten_with_path(updates)[0]
            _mesh.require_own(
                [
                    (f"updates{jax.tree_util.keystr(path)}", leaf)
                    for path, leaf in named
                    if _leaves.is_gradient(leaf)
                ],
                axes,
            )
        errors = _opened(state.compression_error, axes)
        estimates = _opened(state.estimate, axes)
        means = _opened(state.mean_estimate, ())
        strength = 1 if eta is None else _checks.at_step(eta, state.feedback_step)
        for memory in (errors, estimates):
            _require_shapes([(leaves[i], memory[i]) for i in there if memory])
        wides = [_numerics.wide(leaves[i]) for i in there]
        drifts = [g - estimates[i] if estimates else g for i, g in zip(there, wides)]
        signals = [
            (drift + strength * errors[i] if errors else drift).astype(drift.dtype)
            for i, drift in zip(there, drifts)
        ]
        workers = lax.psum(1, axes) if axes else 1
        finite = _numerics.all_finite_here([_or_infinite(v, workers) for v in signals])
        for i, drift, signal in zip(there, drifts, signals):
            signal = jnp.where(finite, signal, 0)
            key = _key_of(state.compressor_key, state.feedback_step, i)
            sent, result = _exchange(compressor, signal, key, axes)
            if errors:
                error = errors[i] + drift - sent
                errors[i] = jnp.where(finite, error, errors[i])
            if estimates:
                estimates[i] = estimates[i] + sent
            if means:
                means[i] = means[i] + result
                result = means[i]
            elif estimates:
                result = estimates[i]
            leaves[i] = result.astype(leaves[i].dtype)
        return structure.unflatten(leaves), ErrorFeedbackState(
            feedback_step=_numerics.count_if(jnp.asarray(True), state.feedback_step),
            compression_error=_closed(errors, state.compression_error, axes),
            estimate=_closed(estimates, state.estimate, axes),
            mean_estimate=_closed(means, state.mean_estimate, ()),
            compressor_key=state.compressor_key,
            left_out=_numerics.count_if(~finite, state.left_out),
        )

    return optax.GradientTransformationExtraArgs(
        _leaves.shapes_for_shapes(init_fn), update_fn
    )


def _exchange(
    compressor: Compressor, v: jax.Array, key: Key, axes: Sequence[Any]
) -> tuple[jax.Array, jax.Array]:
    """``C(v)`` of this worker, and the mean of all workers'."""
    whole = _mesh.unsharded(v)
    message = compressor.compress(whole, key)

    def total(messages: Message) -> jax.Array:
        return compressor.total(messages, whole, key)

    sent = _mesh.sharded_like(v, total(tuple(x[None] for x in message)))
    if not axes:
        return sent, sent
    if compressor.adds_up(v.shape):
        return sent, total(tuple(lax.pmean(x, axes)[None] for x in message))
    messages = tuple(_mesh.everywhere(x, axes) for x in message)
    return sent, total(messages) / messages[0].shape[0]


def _or_infinite(v: jax.Array, workers: int) -> jax.Array:
    """Infinity in place of elements of which sums could overflow.

    Sums over elements and workers, times a Gaussian number of at most 16.
    """
    limit = float(jnp.finfo(v.dtype).max) / (16 * workers * max(v.size, 1))
    return jnp.where(jnp.abs(v) < limit, v, jnp.inf)


def _key_of(key: Key, step: jax.Array, leaf: int) -> Key:
    """The key of one leaf in one step, the same for all workers."""
    if isinstance(key, tuple):
        return key
    return jax.random.fold_in(jax.random.fold_in(key, step), leaf)


def _flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of a tree, absent ones included, and its structure."""
    return jax.tree.flatten(tree, is_leaf=_leaves.is_absent)


def _opened(memory: Memory, axes: Sequence[Any]) -> list[Any]:
    """The leaves of a memory without the axis of workers; none if it is not kept.

    Raises:
      ValueError: If a device has the memory of several workers.
    """
    leaves, _ = _flatten(memory)
    if not axes:
        return leaves
    for leaf in leaves:
        if not _leaves.is_absent(leaf) and leaf.shape[:1] != (1,):
            raise ValueError(
                f"a memory of error_feedback has shape {leaf.shape} on this device, "
                "where the first axis must number one worker; call init inside "
                "shard_map and keep the state by specs such as ErrorFeedbackState(P(), "
                "P('data'), P('data'), P(), P(), P('data')). Memories of another "
                "number of workers do not fit: call init anew."
            )
    return [x if _leaves.is_absent(x) else x[0] for x in leaves]


def _require_shapes(pairs: Sequence[tuple[Any, Any]]) -> None:
    """Raises unless each gradient has the shape of its memory.

    Raises:
      ValueError: If one has another, which NumPy's rules might broadcast.
    """
    for g, memory in pairs:
        if jnp.shape(g) != jnp.shape(memory):
            raise ValueError(
                f"a gradient has shape {jnp.shape(g)}, and its memory in the state of "
                f"error_feedback has {jnp.shape(memory)}; call init anew. A state of "
                "several workers has a first axis of them and needs axis_name."
            )


def _closed(leaves: list[Any], memory: Memory, axes: Sequence[Any]) -> Memory:
    """The memory with new leaves, in the structure of the old one."""
    if axes:
        leaves = [x if _leaves.is_absent(x) else x[None] for x in leaves]
    return _flatten(memory)[1].unflatten(leaves)
