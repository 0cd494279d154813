"""Sharpness rules for trainers that compute one gradient a call.

Between calls the parameters stand where the rule wants its next gradient,
``x + probe(i, g_0, ..., g_{i-1})``; the clean ``x`` is in the state.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_avg import _tree
from optax_avg.sharpness import (
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
      rule_state: the rule's own.
      inner_state: the optimizer's.
    """

    evaluation: jax.Array
    clean_params: Any
    probe_grads: tuple[Any, ...]
    rule_state: RuleState
    inner_state: Any


def multi_call(
    rule: SharpnessRule, optimizer: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Makes an optimizer for trainers that compute one gradient a call.

    Every call gets the gradient at the parameters that the last call led to. The first
    ``num_evals - 1`` calls move them to the next place where the rule wants a gradient;
    the last one moves them to where ``optimizer`` steps from the clean ones. Evaluate
    and save :func:`eval_params`, not the parameters in between.

    Args:
      rule: from :mod:`optax_avg.rules`, but those with Hessian-vector products.
      optimizer: what follows the rule, averages included.

    Returns:
      A transformation with the state :class:`MultiCallState`.

    Raises:
      ValueError: If the rule needs a Hessian-vector product, or ``update`` gets no
        params.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = oa.multi_call(oa.rules.sam(0.5), optax.sgd(1.0))
      >>> x = jnp.array(2.0)
      >>> state = tx.init(x)
      >>> for _ in range(2):
      ...     updates, state = tx.update(x, state, x)  # the gradient of x**2 / 2 is x
      ...     x = optax.apply_updates(x, updates)
      >>> float(x), float(oa.eval_params(state, x))
      (-0.5, -0.5)
    """
    inner = optax.with_extra_args_support(optimizer)
    last = rule.num_evals - 1

    def init(params: Any) -> MultiCallState:
        refuse_masked("multi_call", params)
        zeros = _tree.over(
            lambda x: jnp.zeros_like(_tree.wide(jnp.asarray(x))), params, params
        )
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
            rule_state=state,
            inner_state=inner.init(params),
        )

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        _tree.require_params("multi_call", params)
        refuse_masked("multi_call", updates)
        clean_first = rule.probe(0, params, (), state.rule_state) is None

        def finish(state, gradient, rule_state):
            clean, at = state.clean_params, like(gradient, updates)
            step, inner_state = inner.update(at, state.inner_state, clean, **extra_args)
            clean = _tree.new_iterate(clean, step)
            target = displaced(clean, rule.probe(0, clean, (), rule_state))
            return target, state._replace(
                evaluation=jnp.zeros([], jnp.int32),
                clean_params=clean,
                rule_state=rule_state,
                inner_state=inner_state,
            )

        def move(i, state):
            grads = [*state.probe_grads[:i], widened(updates, params)]
            offset = rule.probe(i + 1, state.clean_params, grads, state.rule_state)
            probes = list(state.probe_grads)
            probes[i] = jax.tree.map(
                lambda old, g: g.astype(old.dtype), probes[i], grads[i]
            )
            return displaced(state.clean_params, offset), state._replace(
                evaluation=jnp.asarray(i + 1, jnp.int32), probe_grads=tuple(probes)
            )

        def full(state):
            grads = [*state.probe_grads, widened(updates, params)]
            gradient, memory = rule.combine(state.clean_params, grads, state.rule_state)
            return finish(state, gradient, advanced(state.rule_state, memory, grads))

        def first(state):
            if clean_first:
                state = state._replace(clean_params=params)
            advance = full if last == 0 else lambda state: move(0, state)
            if rule.due is None:
                return advance(state)
            return lax.cond(rule.due(state.rule_state), advance, skip, state)

        def skip(state):
            g = widened(updates, params)
            gradient, memory = skipping(rule)(params, g, state.rule_state)
            return finish(state, gradient, advanced(state.rule_state, memory, [g]))

        calls = [first]
        for i in range(1, last):
            calls.append(lambda state, i=i: move(i, state))
        if last:
            calls.append(full)
        target, state = lax.switch(state.evaluation, calls, state)
        steps = jax.tree.map(_step_to, params, target, updates)
        return steps, state

    return optax.GradientTransformationExtraArgs(init, update)


def eval_params(state: Any, params: Any) -> Any:
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
      >>> float(oa.eval_params(tx.init(jnp.array(2.0)), jnp.array(2.5)))
      2.0
    """
    is_ours = lambda node: isinstance(node, MultiCallState)
    found = [x for x in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(x)]
    if len(found) != 1:
        raise ValueError(
            f"eval_params needs a state with one multi_call in it, found {len(found)}."
        )
    return jax.tree.map(lambda x, clean: clean, params, found[0].clean_params)


def _step_to(x: Any, target: Any, u: Any) -> Any:
    """The update from ``x`` to ``target`` in the dtype of ``u``."""
    if u is None or not _tree.is_float(x):
        return u
    return (_tree.wide(target) - _tree.wide(x)).astype(u.dtype)
