"""Sharpness rules for trainers that compute one gradient a call.

Between calls the parameters stand where the rule wants its next gradient,
``x + probe(i, g_0, ..., g_{i-1})``; the clean ``x`` is in the state.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_avg import _checks, _leaves, _mixups, _numerics, _sight
from optax_avg.sharpness._rule import (
    RuleState,
    SharpnessRule,
    advanced,
    displaced,
    init_state,
    like,
    refuse_masked,
    skipping,
    widened,
)


class MultiCallState(NamedTuple):
    """State of :func:`multi_call`.

    Attributes:
      evaluation: int32, the evaluation that the next gradient belongs to.
      clean_params: the parameters without offset.
      probe_grads: gradients of this step so far, zeros where there is none yet.
      sound: whether all gradients of this step so far are finite.
      rejected: int32, steps left out because a gradient was not finite.
      rule_state: the rule's own.
      inner_state: the optimizer's.
    """

    evaluation: jax.Array
    clean_params: Any
    probe_grads: tuple[Any, ...]
    sound: jax.Array
    rejected: jax.Array
    rule_state: RuleState
    inner_state: Any


def multi_call(
    rule: SharpnessRule, optimizer: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Makes an optimizer for trainers that compute one gradient a call.

    Every call gets the gradient at the parameters that the last call led to. The first
    ``num_evals - 1`` calls move them to the next place where the rule wants a gradient;
    the last one moves them to where ``optimizer`` steps from the clean ones. Evaluate
    and save :func:`clean_params`, not the parameters in between.

    The clean parameters are in the state, and what ``optimizer`` makes of them is
    exactly what it would make without a rule. The updates lead to the parameters of
    the next call, in the wider dtype of gradients and parameters; where an offset is
    larger than a weight, the way back is rounded and the two may differ by one rounding
    of the offset, which no later call inherits.

    What else changes the parameters between calls (a write-back, clipping, a restored
    checkpoint) is undone by the next call: put it into ``optimizer``, or change
    ``state._replace(clean_params=...)`` as well. Leaves without a gradient are not
    touched and follow the parameters.

    A gradient that is not finite, of any evaluation, makes this step void: the
    parameters stand at the clean ones until its last call, which counts it in
    ``rejected`` and leaves everything else as it was, ``optimizer`` included.

    Args:
      rule: from :mod:`optax_avg.rules`, but those with Hessian-vector products.
      optimizer: what follows the rule, averages included.

    Returns:
      A transformation with the state :class:`MultiCallState`.

    Raises:
      ValueError: If the rule needs a Hessian-vector product, a leaf is complex, or
        ``update`` gets no params or something else than gradients.
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
    _mixups.refuse_no_rule("multi_call", rule)
    _mixups.refuse_no_optimizer("multi_call", optimizer)
    inner = optax.with_extra_args_support(optimizer)

    def inner_update(*args: Any, **extra_args: Any) -> Any:
        with _sight.collected(None):  # its links have another first and last
            return inner.update(*args, **extra_args)

    last = rule.num_evals - 1

    def init(params: Any) -> MultiCallState:
        refuse_masked("multi_call", params)
        zeros = _leaves.over(_numerics.zeros_like, params, params)
        state = init_state(rule, params)
        probes = tuple(jax.tree.map(jnp.copy, zeros) for _ in range(last))
        for i in range(rule.num_evals):
            if rule.direction(i, params, (zeros,) * i, state) is not None:
                raise ValueError(
                    "multi_call has gradients alone and this rule needs products with "
                    "the Hessian; use sharpness_aware."
                )
        return MultiCallState(
            evaluation=jnp.zeros([], jnp.int32),
            clean_params=jax.tree.map(lambda x: jnp.array(x, copy=True), params),
            probe_grads=probes,
            sound=jnp.asarray(True),
            rejected=jnp.zeros([], jnp.int32),
            rule_state=state,
            inner_state=inner.init(params),
        )

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        _checks.require_params("multi_call", params)
        refuse_masked("multi_call", updates)
        _mixups.refuse_no_gradient("the first argument of update", updates, params)

        def gradients(before):
            g = widened(updates, params)
            absent = lambda old, g: None if g is None else old
            return [*(jax.tree.map(absent, old, g) for old in before), g]

        def start(state):
            clean, rule_state = state.clean_params, state.rule_state
            target, _ = _reached(clean, rule.probe(0, clean, (), rule_state))
            return target, state._replace(
                evaluation=jnp.zeros([], jnp.int32), sound=jnp.asarray(True)
            )

        def finish(state, gradient, rule_state):
            at = like(gradient, updates)

            def step(state):
                clean = state.clean_params
                steps, inner_state = inner_update(
                    at, state.inner_state, clean, **extra_args
                )
                return state._replace(
                    clean_params=_leaves.new_iterate(clean, steps),
                    rule_state=rule_state,
                    inner_state=inner_state,
                )

            def void(state):
                rejected: Any = optax.safe_increment(state.rejected)
                return state._replace(rejected=rejected)

            sound = state.sound & _finite(at, updates)
            return start(lax.cond(sound, step, void, state))

        def move(i, state):
            grads = gradients(state.probe_grads[:i])
            clean = state.clean_params
            offset = rule.probe(i + 1, clean, grads, state.rule_state)
            target, reached = _reached(clean, offset)
            sound = state.sound & reached & _finite(updates)
            target = _choose(sound, target, clean)
            probes = list(state.probe_grads)
            probes[i] = jax.tree.map(
                lambda old, g: old if g is None else g.astype(old.dtype),
                probes[i],
                grads[i],
            )
            return target, state._replace(
                evaluation=jnp.asarray(i + 1, jnp.int32),
                probe_grads=tuple(probes),
                sound=sound,
            )

        def full(state):
            grads = gradients(state.probe_grads)
            gradient, memory = rule.combine(state.clean_params, grads, state.rule_state)
            return finish(
                state, gradient, advanced(rule, state.rule_state, memory, grads)
            )

        def first(state):
            advance = full if last == 0 else lambda state: move(0, state)
            if rule.due is None:
                return advance(state)
            return lax.cond(rule.due(state.rule_state), advance, skip, state)

        def skip(state):
            g = widened(updates, params)
            gradient, memory = skipping(rule)(state.clean_params, g, state.rule_state)
            return finish(
                state, gradient, advanced(rule, state.rule_state, memory, [g])
            )

        calls = [first]
        for i in range(1, last):
            calls.append(lambda state, i=i: move(i, state))
        if last:
            calls.append(full)
        clean = jax.tree.map(_newest, params, state.clean_params, updates)
        state = state._replace(clean_params=clean)
        if jax.tree.map(jnp.result_type, clean) != jax.tree.map(
            jnp.result_type, updates
        ):
            after = jax.eval_shape(
                lambda s, x: inner_update(updates, s, x, **extra_args)[1],
                state.inner_state,
                clean,
            )
            # Optimizers may take the dtype of the first gradient, all branches alike.
            inner_state = jax.tree.map(_as_dtype, state.inner_state, after)
            state = state._replace(inner_state=inner_state)
        target, state = lax.switch(state.evaluation, calls, state)
        steps = jax.tree.map(_step_to, params, target, updates)
        _sight.report("multi_call", received=updates, emitted=steps, perturbs=True)
        return steps, state

    return optax.GradientTransformationExtraArgs(
        _leaves.shapes_for_shapes(init), update
    )


def clean_params(state: Any, params: Any) -> Any:
    """The parameters without offset, from the state of :func:`multi_call`.

    Args:
      state: an optimizer state that contains a :class:`MultiCallState`.
      params: the current parameters, perhaps perturbed; for their structure.

    Returns:
      A tree like ``params``.

    Raises:
      ValueError: If there is no such state.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = oa.multi_call(oa.rules.sam(0.5), optax.sgd(1.0))
      >>> float(oa.clean_params(tx.init(jnp.array(2.0)), jnp.array(2.5)))
      2.0
    """
    is_ours = lambda node: isinstance(node, MultiCallState)
    found = [x for x in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(x)]
    if len(found) != 1:
        raise ValueError(
            f"clean_params needs a state with one multi_call in it, found {len(found)}."
        )
    return jax.tree.map(
        lambda x, clean: clean if _leaves.is_float(x) else x,
        params,
        found[0].clean_params,
    )


def _as_dtype(x: Any, like: Any) -> Any:
    same = jnp.result_type(x) == jnp.result_type(like)
    return x if same else jnp.asarray(x, like.dtype)


def _newest(x: Any, clean: Any, u: Any) -> Any:
    """The clean leaf; a copy of ``x`` where it has no gradient."""
    return clean if _trained(x, u) else jnp.array(x, copy=True)


def _step_to(x: Any, target: Any, u: Any) -> Any:
    """The update from ``x`` to ``target``, no narrower than either."""
    if not _trained(x, u):
        return u
    step = _numerics.wide(target) - _numerics.wide(x)
    return step.astype(jnp.promote_types(u.dtype, x.dtype))


def _trained(x: Any, u: Any) -> bool:
    return u is not None and _leaves.is_float(x)


def _reached(clean: Any, offset: Any) -> tuple[Any, Any]:
    """``clean + offset``, or ``clean`` where that is not finite; and which it is."""
    if offset is None:
        return clean, jnp.asarray(True)
    target = displaced(clean, offset)
    finite = _finite(target)
    return _choose(finite, target, clean), finite


def _choose(condition: Any, new: Any, old: Any) -> Any:
    return jax.tree.map(
        lambda a, b: a if a is b else jnp.where(condition, a, b), new, old
    )


def _finite(*trees: Any) -> Any:
    """Whether all floats of trees are finite."""
    return _numerics.all_finite(
        [x for x in jax.tree.leaves(trees) if _leaves.is_float(x)]
    )
