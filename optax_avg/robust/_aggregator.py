"""Aggregators of Optax from rules on the rows.

    (rows, memory, step) -> (leaves, memory)

Rows whose norm is not finite are invalid and are counted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.experimental import aggregating

from optax_avg import _leaves, _numerics
from optax_avg.robust import _layout, _stack
from optax_avg.robust._gradients import counter
from optax_avg.robust._options import AxisName
from optax_avg.robust._row_checks import check_rows
from optax_avg.robust._stack import Stack

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
