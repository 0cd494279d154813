"""Flatness without a rule: a sharpness after the optimizer, and one in the loss.

decoupled WSAM   x <- x + optimizer(g0) - lr gamma/(1 - gamma) (gd - g0)
MESA             loss + T^2 KL(teacher/T || student/T)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_avg import _checks, _leaves, _mixups, _numerics, _sight
from optax_avg.sharpness import offsets
from optax_avg.sharpness._ascent import Radius
from optax_avg.sharpness._rule import RuleState
from optax_avg.sharpness.forms import as_link

__all__ = ["DecoupledState", "decoupled_wsam", "trajectory_loss"]


class DecoupledState(NamedTuple):
    """State of :func:`decoupled_wsam`.

    Attributes:
      rule_state: State of SAM.
      inner_state: State of the optimizer.
    """

    rule_state: RuleState
    inner_state: optax.OptState


def decoupled_wsam(
    optimizer: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    rho: Radius = 0.05,
    gamma: float = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """Weighted SAM with the sharpness outside of the optimizer, like weight decay.

    ``x <- x + optimizer(g0) - lr gamma/(1 - gamma) (gd - g0)``, ``d = rho g0/|g0|``.

    Args:
      optimizer: The transformation that gets the plain gradient ``g0`` alone.
      learning_rate: Learning rate ``lr`` of ``optimizer``, a number or a schedule of
        the optimizer step.
      rho: Radius; a number, a schedule, or a tree of them like a prefix of params.
      gamma: Weight of the sharpness, in [0, 1). With plain SGD as ``optimizer`` this
        is :func:`wsam`.

    Returns:
      A transformation for the end of a chain; only averages come after it. ``update``
      needs ``grad_fn=``, see :func:`optax_avg.as_link`.

    Raises:
      ValueError: If ``rho`` or ``learning_rate`` is negative or not finite, or
        ``gamma`` is not in [0, 1).
      TypeError: If ``optimizer`` is no transformation.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = oa.decoupled_wsam(optax.sgd(1.0), 1.0, rho=0.5, gamma=0.5)
      >>> grad_fn = jax.grad(lambda x: 0.5 * x**2)
      >>> x = jnp.array(2.0)
      >>> float(tx.update(grad_fn(x), tx.init(x), x, grad_fn=grad_fn)[0])
      -2.5

    References:
      Yue et al., "Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
      Regularization Term", 2023, 2305.15817, algorithm 1.
    """
    _mixups.refuse_no_optimizer("decoupled_wsam", optimizer)
    gamma = _checks.within("gamma", gamma, 0, 1, closed_high=False)
    learning_rate = _checks.finite_or_schedule("learning_rate", learning_rate)
    inner = optax.with_extra_args_support(optimizer)
    perturbed = as_link(offsets.sam(rho), "decoupled_wsam")

    def init(params: optax.Params) -> DecoupledState:
        rule_state: Any = perturbed.init(params)
        return DecoupledState(rule_state, inner.init(params))

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, DecoupledState]:
        with _sight.collected(None):  # it reports for both
            found: Any = perturbed.update(
                updates, state.rule_state, params, **extra_args
            )
        gd, rule_state = found
        lr = _checks.at_step(learning_rate, state.rule_state.rule_step)
        steps, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )

        def add(step, g0, gd):
            if step is None or not _leaves.is_float(step):
                return step
            sharpness = _numerics.wide(gd) - _numerics.wide(g0)
            return (_numerics.wide(step) - lr * gamma / (1 - gamma) * sharpness).astype(
                step.dtype
            )

        steps = jax.tree.map(add, steps, updates, gd, is_leaf=lambda x: x is None)
        _sight.report("decoupled_wsam", received=updates, emitted=steps)
        return steps, DecoupledState(rule_state, inner_state)

    return optax.GradientTransformationExtraArgs(
        _leaves.shapes_for_shapes(init), update
    )


def trajectory_loss(
    student_logits: jax.Array, teacher_logits: jax.Array, temperature: float = 5.0
) -> jax.Array:
    """MESA's trajectory loss: ``T^2 KL(teacher/T || student/T)``, mean over examples.

    Add it to the training loss, with logits of the averaged parameters as the
    teacher's. This finds flatter minima at the cost of one more forward pass. No
    gradient flows to the teacher.

    Args:
      student_logits: Logits of the parameters in training, shape (..., classes).
      teacher_logits: Logits of the averaged parameters, of the same shape.
      temperature: Temperature ``T``, positive.

    Returns:
      A scalar in nats, float32 or wider.

    Raises:
      ValueError: If the shapes differ or ``temperature`` is not positive.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> teacher = jnp.array([[0.0, 10.0]])
      >>> round(float(oa.trajectory_loss(jnp.zeros((1, 2)), teacher)), 2)
      8.2

    References:
      Du et al., "Sharpness-Aware Training for Free", 2022, 2205.14083.
    """
    if jnp.shape(student_logits) != jnp.shape(teacher_logits):
        raise ValueError(
            f"logits differ in shape: {jnp.shape(student_logits)} of the student, "
            f"{jnp.shape(teacher_logits)} of the teacher; compute both on one batch."
        )
    t = _checks.within(
        "temperature", temperature, 0, float("inf"), open_low=True, closed_high=False
    )
    student = jax.nn.log_softmax(_numerics.wide(student_logits) / t)
    teacher = jax.nn.log_softmax(_numerics.wide(lax.stop_gradient(teacher_logits)) / t)
    # A class of probability 0 adds nothing, though its logit is infinite.
    apart = jnp.where(teacher > -jnp.inf, teacher - student, 0)
    kl = jnp.sum(jnp.exp(teacher) * apart, axis=-1)
    return t**2 * jnp.mean(kl)
