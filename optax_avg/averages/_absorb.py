"""When an average absorbs an iterate: counters, strides, finiteness, host memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_avg import _checks, _leaves, _numerics, _sight


def absorbing(
    name: str,
    empty: Callable[[Any], Any],
    absorb: Callable[[Any, Any, jax.Array, Any], Any],
    *,
    period: int = 1,
    every: int,
    start: int,
    where: _leaves.Where | None,
    skip_nonfinite: bool,
    memory_kind: str | None,
) -> optax.GradientTransformationExtraArgs:
    """When to absorb an iterate; how is up to ``absorb``.

    Args:
      name: of the factory that the user called, for messages.
      empty: ``iterate -> state``, a NamedTuple with the fields ``step``, ``absorbed``
        and ``rejected``.
      absorb: ``(state, iterate, t, is_base) -> state``; ``t`` is the iterate's number
        in float32. ``is_base`` marks the iterate of step ``start``, which the average
        starts from, finite or not, and does not count.
      period: iterates after which the memory comes round to the same place.
      every: optimizer steps between absorbed iterates.
      start: optimizer steps to leave out.
      where: leaves to keep.
      skip_nonfinite: whether to leave out iterates that are not finite.
      memory_kind: where the state's trees live.

    Returns:
      A transformation that leaves the updates alone.
    """
    every, start = _checks.check_every(every, start)
    if memory_kind not in (None, "device", "pinned_host"):
        raise ValueError(
            f"memory_kind must be None, 'device' or 'pinned_host', got {memory_kind!r}."
        )

    def put(state, space):
        if memory_kind != "pinned_host":
            return state
        return jax.tree.map(
            lambda leaf: jax.device_put(leaf, space) if leaf.ndim else leaf, state
        )

    def init(params):
        return put(empty(_leaves.select(params, where)), jax.memory.Space.Host)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        _checks.require_params(name, params)
        _sight.report(name, emitted=updates)
        step: Any = _numerics.advance_clock(state.step, every)
        x = _leaves.select(_leaves.new_iterate(params, updates), where)
        state = put(state._replace(step=step), jax.memory.Space.Host)
        is_base = step == start

        def take(state):
            t = jnp.asarray(optax.safe_increment(state.absorbed), jnp.float32)
            count = _numerics.advance_clock(state.absorbed, period)
            new = absorb(state, x, t, is_base)
            return new._replace(absorbed=jnp.where(is_base, state.absorbed, count))

        def reject(state):
            return state._replace(rejected=optax.safe_increment(state.rejected))

        def offer(state):
            state = put(state, jax.memory.Space.Device)
            if skip_nonfinite:
                state = lax.cond(_numerics.all_finite(x) | is_base, take, reject, state)
            else:
                state = take(state)
            return put(state, jax.memory.Space.Host)

        known = isinstance(every, int) and isinstance(start, int)
        if known and every == 1 and start == 0:
            return updates, offer(state)
        due = (step >= start) & ((step - start) % every == 0)
        return updates, lax.cond(due, offer, lambda state: state, state)

    return optax.GradientTransformationExtraArgs(
        _leaves.shapes_for_shapes(init), update
    )
