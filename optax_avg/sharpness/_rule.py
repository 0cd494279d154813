"""A sharpness rule: where to take gradients, and how to combine them.

    g_i = gradient at x + probe(i, g_0, ..., g_{i-1}),
    result = combine(g_0, g_1, ...)

The functions here are the steps that all three forms are made of.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_avg import _checks, _leaves, _mixups, _numerics

Grads = Sequence[optax.Updates]
Memory = Any  # trees of arrays that a rule keeps, in a structure of its own
GradientAt = Callable[[optax.Params], optax.Updates]
Mean = Callable[[Any], Any]  # the mean of a tree over mapped axes

Operand = TypeVar("Operand")
Result = TypeVar("Result")


class RuleState(NamedTuple):
    """What a rule carries from step to step.

    Attributes:
      rule_step: Number of optimizer steps so far, int32. Schedules are called with it.
        At the largest integer it goes back by the rule's ``period``.
      rule_memory: What the rule remembers, ``()`` for most rules.
    """

    rule_step: jax.Array
    rule_memory: Memory


Probe = Callable[[int, optax.Params, Grads, RuleState], optax.Updates | None]
Direction = Callable[[int, optax.Params, Grads, RuleState], optax.Updates | None]
Combine = Callable[[optax.Params, Grads, RuleState], tuple[optax.Updates, Memory]]
Skip = Callable[[optax.Params, optax.Updates, RuleState], tuple[optax.Updates, Memory]]
InitMemory = Callable[[optax.Params], Memory]
Due = Callable[[RuleState], jax.Array | bool]


class SharpnessRule(NamedTuple):
    """A method of the sharpness family, independent of how it is used.

    All gradients are trees like the parameters in float32 or wider. Leaves without a
    gradient are None.

    Attributes:
      num_evals: Number of evaluations per step, a Python integer.
      probe: ``(i, params, grads[:i], state) -> offset`` from the parameters at which
        evaluation ``i`` takes place. None means at the parameters themselves.
      combine: ``(params, grads, state) -> (gradient, memory)``, the result of a step.
      init_memory: ``params -> memory`` before the first step.
      direction: ``(i, params, grads[:i], state) -> tree``. If it returns a tree,
        evaluation ``i`` is the Hessian-vector product along it; if None, a gradient.
      num_ascents: Number of leading evaluations from which offsets and directions are
        made. An ``ascent_fn`` of :func:`sharpness_aware` takes these.
      in_result: Indices of those leading evaluations that ``combine`` uses; None for
        all. SAM's result is its last gradient, so its ``in_result`` is ``()``; GSAM's
        contains ``g0``, so it is None. Only an ``ascent_fn`` makes a difference:
        each index costs a gradient of the loss beside that of the ascent.
      due: ``state -> bool``, whether this step takes all evaluations. None means every
        step does. An array is a choice at run time, a Python bool one for all steps.
      skip: ``(params, g_0, state) -> (gradient, memory)``, the result of a step that
        is not due. None means the plain gradient.
      period: Number of steps after which ``due`` repeats itself.
    """

    num_evals: int
    probe: Probe
    combine: Combine
    init_memory: InitMemory = lambda params: ()
    direction: Direction = lambda i, params, grads, state: None
    num_ascents: int = 1
    in_result: tuple[int, ...] | None = None
    due: Due | None = None
    skip: Skip | None = None
    period: int | jax.Array = 1

    @property
    def init(self) -> Any:
        """Raises, because Optax asks for ``init`` if a rule is used as a link."""
        raise AttributeError(_mixups.RULE_FOR_LINK)


def init_state(rule: SharpnessRule, params: optax.Params) -> RuleState:
    """The state of a rule before the first step.

    Raises:
      ValueError: If a leaf is complex.
    """
    _checks.refuse_complex("a sharpness rule", params)
    init = lambda params: RuleState(jnp.zeros([], jnp.int32), rule.init_memory(params))
    state: Any = _leaves.shapes_for_shapes(init)(params)
    return state


def displaced(params: optax.Params, offset: optax.Updates | None) -> optax.Params:
    """``x + d`` in the dtype of ``x``. No gradient flows through ``d``."""
    return _leaves.moved(params, lax.stop_gradient(offset))


def widened(grads: optax.Updates, params: optax.Params) -> optax.Updates:
    """Gradients in float32 or wider, None where a leaf has none."""
    return _leaves.over(_numerics.wide, params, grads)


def evaluate(
    rule: SharpnessRule,
    grad_at: GradientAt,
    params: optax.Params,
    state: RuleState,
    grads: Grads = (),
    ascents: Grads = (),
    ascent_at: GradientAt | None = None,
) -> list[optax.Updates]:
    """All gradients of a step, as ``combine`` takes them.

    Args:
      rule: The rule.
      grad_at: Function from parameters to the gradient of the loss.
      params: The parameters ``x``.
      state: State of the rule.
      grads: Gradients known already, as ``combine`` takes them.
      ascents: Gradients known already, as ``probe`` and ``direction`` take them.
      ascent_at: Function from parameters to the gradient of the ascent, if the ascent
        is on another function than the loss.

    Returns:
      As many gradients as the rule has evaluations.
    """
    grads, ascents = list(grads), list(ascents)
    for i in range(len(grads), rule.num_evals):
        x = displaced(params, rule.probe(i, params, ascents, state))
        along = rule.direction(i, params, ascents, state)

        def taken(at, x=x, along=along):
            if along is None:
                return widened(at(x), params)
            hv = _numerics.hessian_product(at, x, along, _WITHOUT_PRODUCTS)
            return widened(hv, params)

        if ascent_at is None or i >= rule.num_ascents:
            ascents.append(taken(grad_at))
            grads.append(ascents[-1])
        else:
            ascents.append(taken(ascent_at))
            grads.append(taken(grad_at) if in_result(rule, i) else ascents[-1])
    return grads


_WITHOUT_PRODUCTS = (
    "rules of gradients alone, such as gam() in place of gam_hvp() and "
    "gradient_regularisation(scheme='central') in place of 'exact'"
)


def in_result(rule: SharpnessRule, i: int) -> bool:
    """Whether ``combine`` uses evaluation ``i``."""
    return rule.in_result is None or i in rule.in_result


def when_due(
    rule: SharpnessRule,
    state: RuleState,
    full: Callable[[Operand], Result],
    skip: Callable[[Operand], Result],
    operand: Operand,
) -> Result:
    """``full(operand)`` if all evaluations are due, ``skip(operand)`` if not."""
    due = is_due(rule, state)
    if isinstance(due, bool):
        return full(operand) if due else skip(operand)
    return lax.cond(due, full, skip, operand)


def is_due(rule: SharpnessRule, state: RuleState) -> jax.Array | bool:
    """Whether this step takes all evaluations; a Python bool where all steps agree."""
    return True if rule.due is None else rule.due(state)


def finish(
    rule: SharpnessRule,
    params: optax.Params,
    state: RuleState,
    grads: Grads,
    like: optax.Updates,
    mean: Mean | None = None,
) -> tuple[optax.Updates, RuleState]:
    """Result and next state of a step with all its gradients.

    Args:
      rule: The rule.
      params: The parameters ``x``.
      state: State of the rule.
      grads: All gradients of the step, ``g_0, g_1, ...``
      like: A gradient in the structure and dtypes of the result.
      mean: Mean over devices that have gradients of their own. The result is the mean
        of their results, and the memory is made of the mean gradients.

    Returns:
      The gradient and the next state.
    """
    gradient, memory = rule.combine(params, grads, state)
    if mean is not None:
        gradient, grads = mean(gradient), mean(grads)
        memory = rule.combine(params, grads, state)[1]
    return _like(gradient, like), advanced(rule, state, memory, grads)


def finish_plain(
    rule: SharpnessRule,
    params: optax.Params,
    state: RuleState,
    g: optax.Updates,
    mean: Mean | None = None,
) -> tuple[optax.Updates, RuleState]:
    """Result and next state of a step that is not due, from its one gradient ``g``."""
    first = widened(g, params)
    first = first if mean is None else mean(first)
    gradient, memory = first, state.rule_memory
    if rule.skip is not None:
        gradient, memory = rule.skip(params, first, state)
    return _like(gradient, g), advanced(rule, state, memory, [first])


def advanced(
    rule: SharpnessRule, state: RuleState, memory: Memory, grads: Grads
) -> RuleState:
    """The next state. The memory stays as it was if a gradient is not finite."""
    step = _numerics.advance_clock(state.rule_step, rule.period)
    if jax.tree.leaves(memory):
        finite = _numerics.all_finite(list(grads))
        memory = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), memory, state.rule_memory
        )
    return RuleState(step, memory)


def _like(gradient: optax.Updates, g: optax.Updates) -> optax.Updates:
    """``gradient`` in the structure and dtypes of ``g``."""
    return jax.tree.map(
        lambda g, new: g if new is None else new.astype(g.dtype),
        g,
        gradient,
        is_leaf=lambda leaf: leaf is None,
    )


def refuse_masked(name: str, tree: optax.Params) -> None:
    """Raises if a tree is masked, because the loss cannot be called on it.

    Raises:
      ValueError: If a leaf is ``optax.MaskedNode``.
    """
    leaves = jax.tree.leaves(tree, is_leaf=_leaves.is_masked)
    if any(_leaves.is_masked(leaf) for leaf in leaves):
        raise ValueError(
            f"{name} cannot be used inside optax.masked or optax.partition; pass "
            "where= to the rule, or use sharpness_aware before the chain."
        )
