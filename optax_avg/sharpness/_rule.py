"""A sharpness rule: where to take gradients, and what to make of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_avg import _checks, _leaves, _mesh, _mixups, _numerics

Grads = Sequence[Any]


class RuleState(NamedTuple):
    """What a rule carries from step to step.

    Attributes:
      rule_step: int32, optimizer steps seen, on which radii are scheduled; at the
        largest integer it goes back by the rule's ``period``.
      rule_memory: the rule's own trees, ``()`` for most.
    """

    rule_step: jax.Array
    rule_memory: Any


class SharpnessRule(NamedTuple):
    """A method, written once.

    Gradients are in float32 or wider, structured like the parameters, None where there
    is no gradient.

    Attributes:
      num_evals: evaluations per step, static.
      probe: ``(i, params, grads[:i], state) -> offset`` of evaluation ``i``, None for
        the parameters themselves.
      combine: ``(params, grads, state) -> (gradient, memory)``.
      init_memory: ``params -> memory``.
      direction: ``(i, params, grads[:i], state) -> tree`` or None; where it is a tree,
        evaluation ``i`` is the Hessian-vector product along it.
      num_ascents: leading evaluations that make offsets and directions. An
        ``ascent_fn`` of :func:`sharpness_aware` takes them.
      in_result: which of these leading evaluations ``combine`` needs of the loss, None
        for all. With an ``ascent_fn`` each of them is taken twice: ``probe`` and
        ``direction`` get the gradient of the ascent, ``combine`` that of the loss.
      due: ``state -> bool``, whether this step takes all evaluations; None for always.
      skip: ``(params, g_0, state) -> (gradient, memory)`` of a step that is not due.
      period: steps after which what is due at some of them comes round again.
    """

    num_evals: int
    probe: Callable[[int, Any, Grads, RuleState], Any]
    combine: Callable[[Any, Grads, RuleState], tuple[Any, Any]]
    init_memory: Callable[[Any], Any] = lambda params: ()
    direction: Callable[[int, Any, Grads, RuleState], Any] = lambda *_: None
    num_ascents: int = 1
    in_result: tuple[int, ...] | None = None
    due: Callable[[RuleState], Any] | None = None
    skip: Callable[[Any, Any, RuleState], tuple[Any, Any]] | None = None
    period: Any = 1

    @property
    def init(self) -> Any:
        """Raises: Optax asks for it where a rule stands in place of a link."""
        raise AttributeError(_mixups.RULE_FOR_LINK)


def init_state(rule: SharpnessRule, params: Any) -> RuleState:
    """The state of a rule before the first step.

    Raises:
      ValueError: If a leaf is complex.
    """
    _checks.refuse_complex("a sharpness rule", params)
    init = lambda params: RuleState(jnp.zeros([], jnp.int32), rule.init_memory(params))
    state: Any = _leaves.shapes_for_shapes(init)(params)
    return state


def displaced(params: Any, offset: Any) -> Any:
    """``x + d`` in the dtype of ``x``; ``x`` itself where there is no offset."""
    if offset is None:
        return params

    def one(x, d):
        if d is None:
            return x
        return (_numerics.wide(x) + lax.stop_gradient(d)).astype(x.dtype)

    return jax.tree.map(one, params, offset)


def widened(grads: Any, params: Any) -> Any:
    """Gradients in float32 or wider, None where a leaf has none."""
    return _leaves.over(lambda g: _numerics.wide(g), params, grads)


def evaluate(
    rule: SharpnessRule,
    grad_at: Callable[[Any], Any],
    params: Any,
    state: RuleState,
    grads: Grads = (),
    ascents: Grads = (),
    ascent_at: Callable[[Any], Any] | None = None,
) -> list[Any]:
    """All gradients of a step that ``combine`` gets.

    Args:
      rule: whose step.
      grad_at: from parameters to the loss's gradient.
      params: ``x``.
      state: of the rule.
      grads: the first ones, for ``combine``.
      ascents: the first ones, for ``probe`` and ``direction``.
      ascent_at: from parameters to the gradient of the ascent, if it is another.

    Returns:
      As many gradients as the rule has evaluations.
    """
    grads, ascents = list(grads), list(ascents)
    for i in range(len(grads), rule.num_evals):
        x = displaced(params, rule.probe(i, params, ascents, state))
        along = rule.direction(i, params, ascents, state)

        def taken(at, x=x, along=along):
            g = at(x) if along is None else _hessian_product(at, x, along)
            return widened(g, params)

        if ascent_at is None or i >= rule.num_ascents:
            ascents.append(taken(grad_at))
            grads.append(ascents[-1])
        else:
            ascents.append(taken(ascent_at))
            grads.append(taken(grad_at) if _in_result(rule, i) else ascents[-1])
    return grads


def _in_result(rule: SharpnessRule, i: int) -> bool:
    return rule.in_result is None or i in rule.in_result


def advanced(
    rule: SharpnessRule, state: RuleState, memory: Any, grads: Grads
) -> RuleState:
    """The next state; memory keeps its value where a gradient is not finite."""
    step = _numerics.advance_clock(state.rule_step, rule.period)
    if jax.tree.leaves(memory):
        finite = _numerics.all_finite(list(grads))
        memory = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), memory, state.rule_memory
        )
    return RuleState(step, memory)


WITHOUT_PRODUCTS = (
    "rules of gradients alone, such as gam() in place of gam_hvp() and "
    "gradient_regularisation(scheme='central') in place of 'exact'"
)


def _hessian_product(grad_at: Callable[[Any], Any], x: Any, along: Any) -> Any:
    """``H(x) v``, forward over reverse."""
    leaves, structure = jax.tree.flatten(x)
    tangents = structure.flatten_up_to(along)
    moving = [i for i, v in enumerate(tangents) if v is not None]

    def of(values):
        changed = list(leaves)
        for i, value in zip(moving, values, strict=True):
            changed[i] = value
        return grad_at(structure.unflatten(changed))

    tangent = [tangents[i].astype(leaves[i].dtype) for i in moving]
    # Inside shard_map a local direction makes the point local too.
    primal = [
        _mesh.vary(leaves[i], _mesh.varying_axes(v))
        for i, v in zip(moving, tangent, strict=True)
    ]
    return _numerics.derivative_along(of, primal, tangent, WITHOUT_PRODUCTS)


def skipping(rule: SharpnessRule) -> Callable[[Any, Any, RuleState], tuple[Any, Any]]:
    """What a step does that is not due: the plain gradient unless the rule says."""
    return rule.skip or (lambda params, g, state: (g, state.rule_memory))


def like(gradient: Any, g: Any) -> Any:
    """The gradient in the structure and dtypes in which gradients come."""
    return jax.tree.map(
        lambda g, new: g if new is None else new.astype(g.dtype),
        g,
        gradient,
        is_leaf=lambda leaf: leaf is None,
    )


def refuse_masked(name: str, tree: Any) -> None:
    """The loss cannot be called on a masked tree."""
    leaves = jax.tree.leaves(tree, is_leaf=_leaves.is_masked)
    if any(_leaves.is_masked(leaf) for leaf in leaves):
        raise ValueError(
            f"{name} cannot stand inside optax.masked or optax.partition; pass where= "
            "to the rule, or use sharpness_aware before the chain."
        )
