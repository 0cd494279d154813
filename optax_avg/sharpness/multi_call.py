"""Sharpness rules for trainers that compute one gradient per call.

Between calls the parameters are where the rule needs its next gradient,
``x + probe(i, g_0, ..., g_{i-1})``. The clean ``x`` is in the state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_avg import _checks, _leaves, _mixups, _numerics, _sight
from optax_avg.sharpness._rule import (
    Grads,
    RuleState,
    SharpnessRule,
    displaced,
    finish,
    finish_plain,
    init_state,
    refuse_masked,
    when_due,
    widened,
)

__all__ = ["MultiCallState", "clean_params", "multi_call"]

Params = TypeVar("Params")


class MultiCallState(NamedTuple):
    """State of :func:`multi_call`.

    Attributes:
      evaluation: Index of the evaluation that the next gradient belongs to, int32.
      clean_params: The parameters without offset.
      probe_grads: Gradients of this step so far, zeros for those still to come.
      sound: Whether all gradients of this step so far are finite.
      rejected: Number of steps left out because a gradient was not finite, int32.
      rule_state: State of the rule.
      inner_state: State of the optimizer.
    """

    evaluation: jax.Array
    clean_params: optax.Params
    probe_grads: tuple[optax.Updates, ...]
    sound: jax.Array
    rejected: jax.Array
    rule_state: RuleState
    inner_state: optax.OptState


_InnerUpdate = Callable[..., tuple[optax.Updates, optax.OptState]]
_Moved = tuple[optax.Params, MultiCallState]  # where to go, and the next state


def multi_call(
    rule: SharpnessRule, optimizer: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Makes an optimizer for trainers that compute one gradient per call.

    A step of SAM then takes two calls. Every call gets the gradient at the parameters
    that the last call led to. The first ``num_evals - 1`` calls move them to the next
    place where the rule needs a gradient. The last call moves them to where
    ``optimizer`` steps from the clean parameters. Evaluate and save
    :func:`clean_params`, not the parameters in between.

    The clean parameters are kept in the state, and ``optimizer`` changes them exactly
    as it would without a rule. The updates lead to the parameters of the next call, in
    the wider dtype of gradients and parameters. If an offset is larger than a weight,
    the way back is rounded, and the parameters may differ from the clean ones by one
    rounding of the offset. Such differences do not accumulate.

    Anything else that changes the parameters between calls (a write-back, clipping, a
    restored checkpoint) is undone by the next call: make it part of ``optimizer``, or
    change ``state._replace(clean_params=...)`` as well. Leaves without a gradient are
    left alone and follow the parameters.

    If a gradient of any evaluation is not finite, the step is void: the parameters are
    the clean ones until the last call of the step, which counts it in ``rejected`` and
    leaves everything else as it was, ``optimizer`` included.

    Args:
      rule: A rule from :mod:`optax_avg.rules` without Hessian-vector products.
      optimizer: The transformation that follows the rule, averages included.

    Returns:
      A transformation with the state :class:`MultiCallState`.

    Raises:
      ValueError: In ``init``, if the rule needs a Hessian-vector product or a leaf is
        complex. In ``update``, if it gets no params or something other than gradients.
      TypeError: If ``rule`` is no rule or ``optimizer`` no transformation.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = oa.multi_call(oa.rules.sam(0.5), optax.sgd(1.0))
      >>> x = jnp.array(2.0)
      >>> state = tx.init(x)
      >>> for _ in range(2):
      ...     updates, state = tx.update(x, state, x)  # the gradient of x**2 / 2 is x
      ...     x = optax.apply_updates(x, updates)
      >>> float(x), float(oa.clean_params(state, x))
      (-0.5, -0.5)
    """
    call = "oa.multi_call(rule, optimizer)"
    _mixups.refuse_swapped("multi_call", rule, optimizer, call)
    _mixups.refuse_no_rule("multi_call", rule)
    _mixups.refuse_no_optimizer("multi_call", optimizer)
    inner = optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> MultiCallState:
        refuse_masked("multi_call", params)
        zeros = _leaves.over(_numerics.zeros_like, params, params)
        rule_state = init_state(rule, params)
        _refuse_products(rule, params, rule_state, zeros)
        return MultiCallState(
            evaluation=jnp.zeros([], jnp.int32),
            clean_params=jax.tree.map(lambda x: jnp.array(x, copy=True), params),
            probe_grads=tuple(
                jax.tree.map(jnp.copy, zeros) for _ in range(rule.num_evals - 1)
            ),
            sound=jnp.asarray(True),
            rejected=jnp.zeros([], jnp.int32),
            rule_state=rule_state,
            inner_state=inner.init(params),
        )

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, MultiCallState]:
        _checks.require_params("multi_call", params)
        refuse_masked("multi_call", updates)
        _mixups.refuse_no_gradient("the first argument of update", updates, params)

        def inner_update(gradient, inner_state, clean):
            with _sight.collected(None):  # its links have another first and last
                return inner.update(gradient, inner_state, clean, **extra_args)

        clean = jax.tree.map(_newest, params, state.clean_params, updates)
        state = _with_dtypes(inner_update, updates, state._replace(clean_params=clean))
        calls = _calls(rule, inner_update, updates, params)
        target, state = lax.switch(state.evaluation, calls, state)
        steps = jax.tree.map(_step_to, params, target, updates)
        _sight.report("multi_call", received=updates, emitted=steps, perturbs=True)
        return steps, state

    return optax.GradientTransformationExtraArgs(
        _leaves.shapes_for_shapes(init), update
    )


def _refuse_products(
    rule: SharpnessRule, params: optax.Params, state: RuleState, zeros: optax.Updates
) -> None:
    """Raises if an evaluation of the rule is a product with the Hessian."""
    for i in range(rule.num_evals):
        if rule.direction(i, params, (zeros,) * i, state) is not None:
            raise ValueError(
                "multi_call has gradients alone and this rule needs products with "
                "the Hessian; use sharpness_aware."
            )


def _calls(
    rule: SharpnessRule,
    inner_update: _InnerUpdate,
    updates: optax.Updates,
    params: optax.Params,
) -> list[Callable[[MultiCallState], _Moved]]:
    """What each call of a step does, one function for each evaluation."""
    last = rule.num_evals - 1

    def move(i, state):
        return _move(rule, state, i, _gradients(state, i, updates, params), updates)

    def full(state):
        grads = _gradients(state, last, updates, params)
        finished = finish(rule, state.clean_params, state.rule_state, grads, updates)
        return _step(rule, inner_update, state, *finished, updates)

    def skip(state):
        finished = finish_plain(rule, state.clean_params, state.rule_state, updates)
        return _step(rule, inner_update, state, *finished, updates)

    def first(state):
        advance = full if last == 0 else lambda state: move(0, state)
        return when_due(rule, state.rule_state, advance, skip, state)

    between = [lambda state, i=i: move(i, state) for i in range(1, last)]
    return [first, *between, full] if last else [first]


def _gradients(
    state: MultiCallState, i: int, updates: optax.Updates, params: optax.Params
) -> list[optax.Updates]:
    """The gradients ``g_0, ..., g_i``, the last of which is at hand."""
    g = widened(updates, params)
    absent = lambda old, g: None if g is None else old
    return [*(jax.tree.map(absent, old, g) for old in state.probe_grads[:i]), g]


def _start(rule: SharpnessRule, state: MultiCallState) -> _Moved:
    """Begins a step at the clean parameters."""
    clean = state.clean_params
    target, _ = _reached(clean, rule.probe(0, clean, (), state.rule_state))
    return target, state._replace(
        evaluation=jnp.zeros([], jnp.int32), sound=jnp.asarray(True)
    )


def _move(
    rule: SharpnessRule,
    state: MultiCallState,
    i: int,
    grads: Grads,
    updates: optax.Updates,
) -> _Moved:
    """Keeps gradient ``i`` and goes to where evaluation ``i + 1`` takes place."""
    clean = state.clean_params
    offset = rule.probe(i + 1, clean, grads, state.rule_state)
    target, reached = _reached(clean, offset)
    sound = state.sound & reached & _finite(updates)
    target = _choose(sound, target, clean)
    probes = list(state.probe_grads)
    probes[i] = jax.tree.map(
        lambda old, g: old if g is None else g.astype(old.dtype), probes[i], grads[i]
    )
    return target, state._replace(
        evaluation=jnp.asarray(i + 1, jnp.int32),
        probe_grads=tuple(probes),
        sound=sound,
    )


def _step(
    rule: SharpnessRule,
    inner_update: _InnerUpdate,
    state: MultiCallState,
    gradient: optax.Updates,
    rule_state: RuleState,
    updates: optax.Updates,
) -> _Moved:
    """Steps from the clean parameters if all gradients are finite, and begins again."""

    def step(state):
        clean = state.clean_params
        steps, inner_state = inner_update(gradient, state.inner_state, clean)
        return state._replace(
            clean_params=_leaves.new_iterate(clean, steps),
            rule_state=rule_state,
            inner_state=inner_state,
        )

    def void(state):
        return state._replace(rejected=optax.safe_increment(state.rejected))

    sound = state.sound & _finite(gradient, updates)
    return _start(rule, lax.cond(sound, step, void, state))


def clean_params(state: optax.OptState, params: Params) -> Params:
    """The parameters without offset, from the state of :func:`multi_call`.

    Args:
      state: An optimizer state that contains a :class:`MultiCallState`, or an object
        that has one as ``opt_state`` (a Flax ``TrainState``, an ``nnx.Optimizer``).
      params: The current parameters, perhaps perturbed. They give the structure, and
        the leaves that are not floats.

    Returns:
      A tree like ``params``.

    Raises:
      ValueError: If there is no such state, or more than one, or ``params`` has other
        leaves.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = oa.multi_call(oa.rules.sam(0.5), optax.sgd(1.0))
      >>> float(oa.clean_params(tx.init(jnp.array(2.0)), jnp.array(2.5)))
      2.0
    """
    found = _leaves.states_of(MultiCallState, state)
    if len(found) != 1:
        raise ValueError(
            f"clean_params needs a state with one multi_call in it, found {len(found)};"
            " pass the state of oa.multi_call(rule, optimizer)."
        )
    kept = _leaves.align(found[0].clean_params, params, "state of multi_call")
    leaves, structure = jax.tree.flatten(params)
    return structure.unflatten(
        [c if _leaves.is_float(x) else x for x, c in zip(leaves, kept, strict=True)]
    )


def _with_dtypes(
    inner_update: _InnerUpdate, updates: optax.Updates, state: MultiCallState
) -> MultiCallState:
    """The state with the dtypes that the optimizer gives its own after a step.

    Optimizers may take the dtype of the first gradient, and all branches must agree.
    """
    clean = state.clean_params
    dtypes = lambda tree: jax.tree.map(jnp.result_type, tree)
    if dtypes(clean) == dtypes(updates):
        return state
    after = jax.eval_shape(
        lambda inner_state, x: inner_update(updates, inner_state, x)[1],
        state.inner_state,
        clean,
    )
    return state._replace(inner_state=jax.tree.map(_as_dtype, state.inner_state, after))


def _as_dtype(x: Any, like: jax.ShapeDtypeStruct) -> Any:
    same = jnp.result_type(x) == jnp.result_type(like)
    return x if same else jnp.asarray(x, like.dtype)


def _newest(x: Any, clean: jax.Array, u: jax.Array | None) -> jax.Array:
    """The clean leaf, or a copy of ``x`` if it has no gradient."""
    return clean if _trained(x, u) else jnp.array(x, copy=True)


def _step_to(x: Any, target: jax.Array, u: jax.Array | None) -> jax.Array | None:
    """The update from ``x`` to ``target``, no narrower than ``u`` and ``x``."""
    if u is None or not _trained(x, u):
        return u
    return _numerics.step_to(target, x, jnp.promote_types(u.dtype, x.dtype))


def _trained(x: Any, u: jax.Array | None) -> bool:
    return u is not None and _leaves.is_float(x)


def _reached(
    clean: optax.Params, offset: optax.Updates | None
) -> tuple[optax.Params, jax.Array]:
    """``clean + offset`` and whether it is finite; ``clean`` if it is not."""
    if offset is None:
        return clean, jnp.asarray(True)
    target = displaced(clean, offset)
    finite = _finite(target)
    return _choose(finite, target, clean), finite


def _choose(condition: jax.Array, new: optax.Params, old: optax.Params) -> optax.Params:
    return jax.tree.map(
        lambda a, b: a if a is b else jnp.where(condition, a, b), new, old
    )


def _finite(*trees: optax.Params) -> jax.Array:
    """Whether all floats in all trees are finite."""
    return _numerics.all_finite(
        [x for x in jax.tree.leaves(trees) if _leaves.is_float(x)]
    )
