"""The state of an average, and when it absorbs an iterate.

    x_t = params + updates,    memory <- absorb(memory, x_t)

at the optimizer steps ``s > start`` where ``s - start`` is a multiple of ``every``. How
an iterate is absorbed is up to the memories of :mod:`optax_avg.memories`.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_avg import _checks, _leaves, _mesh, _mixups, _numerics, _sight, weights
from optax_avg.averages.memories import Memory, Turn, running

# One average, or several by name.
Weights = weights.Weight | Memory | Mapping[str, weights.Weight | Memory]

UNAVERAGED = "where is true of no leaf, so that nothing would be averaged"


class AverageState(NamedTuple):
    """State of every average.

    Attributes:
      step: Optimizer steps seen, int32. Before it overflows it goes back by ``every``.
      absorbed: Number of iterates absorbed, int32. Before it overflows it goes back by
        the period of the memories.
      rejected: Number of iterates left out whole because an element was not finite,
        int32; 0 unless ``nonfinite="reject"``.
      start: Optimizer steps that were left out at the beginning, int32.
      every: Optimizer steps between absorbed iterates, int32.
      averages: What each memory keeps, by the name of the average.
    """

    step: jax.Array
    absorbed: jax.Array
    rejected: jax.Array
    start: jax.Array
    every: jax.Array
    averages: dict[str, Any]


def every_and_start(every: Any, start: Any) -> tuple[Any, Any]:
    """Both options as integers, with their defaults filled in.

    Raises:
      ValueError: If one is not an integer in its range.
    """
    every = _checks.check_integer("every", 1 if every is None else every, 1)
    return every, _checks.check_integer("start", 0 if start is None else start, 0)


def _named_memories(
    caller: str, weight: Weights, name: str, accumulator_dtype: Any, rounding: Any
) -> dict[str, Memory]:
    """The memory of every average, by name."""
    by_name = weight if isinstance(weight, Mapping) else {name: weight}
    for value in by_name.values():
        _mixups.refuse_transformation(caller, value)
    if not by_name:
        raise ValueError(f"{caller} needs a weight; write average(weights.ema(0.999)).")
    options = {"accumulator_dtype": accumulator_dtype, "rounding": rounding}
    is_given = any(value is not None for value in options.values())
    if is_given and all(isinstance(x, Memory) for x in by_name.values()):
        raise ValueError(
            "accumulator_dtype and rounding are for averages that are given by a "
            "weight; pass them to the memory, as in memories.running(weight, "
            "accumulator_dtype=jnp.bfloat16)."
        )
    return {
        str(key): value if isinstance(value, Memory) else running(value, **options)
        for key, value in by_name.items()
    }


def averaging(
    caller: str,
    weight: Weights,
    *,
    every: Any = None,
    start: Any = None,
    name: str = "average",
    accumulator_dtype: Any = None,
    rounding: Any = None,
    where: _leaves.Where | None = None,
    nonfinite: Literal["skip", "reject", "keep"] = "skip",
    memory_kind: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes the transformation of all averages.

    Args:
      caller: Name of the factory that the user called, for messages.
      weight: A weight, a memory, or a dict of them by name.
      every: See :class:`optax_avg.AverageOptions`, as all that follow.
      start: Steps to leave out.
      name: Name of the average.
      accumulator_dtype: Dtype of averages that are given by a weight.
      rounding: Rounding of averages that are given by a weight.
      where: Leaves to average.
      nonfinite: What to do with iterates that are not finite.
      memory_kind: Where the average lives.

    Returns:
      A transformation with the state :class:`AverageState`.

    Raises:
      ValueError: If an argument is out of range.
      TypeError: If a weight is a transformation.
    """
    memories = _named_memories(caller, weight, name, accumulator_dtype, rounding)
    every, start = every_and_start(every, start)
    periods = (memory.period for memory in memories.values())
    period = functools.reduce(_numerics.common_multiple, periods, 1)
    _checks.one_of("nonfinite", nonfinite, ("skip", "reject", "keep"))
    _checks.one_of("memory_kind", memory_kind, (None, "device", "pinned_host"))

    def put(state, space):
        if memory_kind != "pinned_host":
            return state
        return jax.tree.map(
            lambda leaf: jax.device_put(leaf, space) if leaf.ndim else leaf, state
        )

    def init(params: Any) -> AverageState:
        if memory_kind == "pinned_host":
            _mesh.require_memory(memory_kind)
        if not _leaves.has_masked(params):  # a part may have none of the leaves
            _leaves.refuse_none_selected(params, where, UNAVERAGED)
        x = _leaves.select(params, where)
        zero = lambda: jnp.zeros([], jnp.int32)
        state = AverageState(
            step=zero(),
            absorbed=zero(),
            rejected=zero(),
            start=jnp.array(start, jnp.int32),
            every=jnp.array(every, jnp.int32),
            averages={key: memory.init(x) for key, memory in memories.items()},
        )
        return put(state, jax.memory.Space.Host)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        _checks.require_params(caller, params)
        _sight.report(caller, emitted=updates)
        step: Any = _numerics.advance_clock(state.step, every)
        x = _leaves.select(_leaves.new_iterate(params, updates), where)
        state = put(state._replace(step=step), jax.memory.Space.Host)
        is_base = step == start

        def take(state):
            t = jnp.asarray(optax.safe_increment(state.absorbed), jnp.float32)
            skip = ~is_base if nonfinite == "skip" else False
            turn = Turn(state.absorbed, t, every, is_base, state.step, "", skip)
            averages = {
                key: memory.absorb(state.averages[key], x, turn._replace(name=key))
                for key, memory in memories.items()
            }
            count = _numerics.advance_clock(state.absorbed, period)
            absorbed = jnp.where(is_base, state.absorbed, count)
            return state._replace(absorbed=absorbed, averages=averages)

        def reject(state):
            return state._replace(rejected=optax.safe_increment(state.rejected))

        def offer(state):
            state = put(state, jax.memory.Space.Device)
            if nonfinite == "reject":
                finite = _numerics.all_finite(x)
                state = lax.cond(finite | is_base, take, reject, state)
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
