"""Whether a sharpness rule can be used without keeping a state between steps."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_avg import _leaves, _numerics
from optax_avg.sharpness import RuleState, SharpnessRule

__all__ = ["refuse_forgetting", "refuse_other_state"]


def refuse_forgetting(rule: SharpnessRule, params: optax.Params, call: str) -> None:
    """Raises if a rule has to remember something, or follows the number of steps.

    Args:
      rule: The rule.
      params: The parameters.
      call: The call that keeps the state of the rule, for the message.

    Raises:
      ValueError: If the rule needs a state.
    """
    if _remembers(rule, params):
        raise ValueError(
            "this rule has a memory or a schedule, and so its state has to be kept "
            f"from step to step; call {call}."
        )


def refuse_other_state(given: list[Any], wanted: list[Any]) -> None:
    """Raises if the arrays of a state are not those of this rule and model.

    Args:
      given: Leaves of the state that came.
      wanted: Leaves of one before the first step.

    Raises:
      ValueError: If their number or shapes differ.
    """
    if [getattr(x, "shape", None) for x in given] != [x.shape for x in wanted]:
        raise ValueError(
            "rule_state is not that of this rule and model; call rule_state = "
            "sharp.init(model)."
        )


def _remembers(rule: SharpnessRule, params: optax.Params) -> bool:
    """Whether a step depends on the steps before."""
    memory: Any = rule.init_memory(params)
    if rule.due is not None or jax.tree.leaves(memory):
        return True
    grads = _leaves.over(_numerics.wide, params, params)

    def step(clock):
        state, found = RuleState(clock, memory), [grads] * rule.num_evals
        asked = [
            (function(i, params, found[:i], state))
            for i in range(rule.num_evals)
            for function in (rule.probe, rule.direction)
        ]
        return asked, rule.combine(params, found, state)

    traced = jax.make_jaxpr(step)(jnp.zeros([], jnp.int32)).jaxpr
    clock = traced.invars[0]
    return any(x is clock for line in traced.eqns for x in line.invars)
