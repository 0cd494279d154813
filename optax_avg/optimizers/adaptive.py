"""Relatives of Adam: what its two moments are taken of, and when.

LaProp        momentum of g/sqrt(v)
AdaMomentum   second moment of the momentum
diffGrad      Adam, slowed down where the gradient does not change
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_avg import _checks
from optax_avg.optimizers._wide import Number, in_float32, next_step, remembered

__all__ = [
    "AdamomentumState",
    "FrictionState",
    "adamomentum",
    "diffgrad",
    "laprop",
    "scale_by_adamomentum",
    "scale_by_diffgrad",
    "scale_by_laprop",
]


def scale_by_laprop(
    b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-15
) -> optax.GradientTransformationExtraArgs:
    """LaProp without its learning rate: the link of :func:`laprop`.

    It is a chain of two links of Optax, ``optax.scale_by_rms`` and ``optax.ema``, whose
    memories are float32 here.

    Args:
      b1: Decay of the momentum, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Summand of the denominator, positive, in units of the gradients.

    Returns:
      A transformation whose state is that of the two links; follow it by a learning
      rate.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.optimizers.scale_by_laprop()
      >>> g = jnp.array([3.0, -0.01])
      >>> tx.update(g, tx.init(g))[0].round(3).tolist()
      [1.0, -1.0]

    References:
      Ziyin, Wang and Ueda, "LaProp: Separating Momentum and Adaptivity in Adam", 2020,
      2002.04839.
    """
    b1, b2, eps = _moments(b1, b2, eps)
    normalised = optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True)
    return in_float32(optax.chain(normalised, optax.ema(b1, debias=True)))


def laprop(
    learning_rate: optax.ScalarOrSchedule = 4e-4,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-15,
) -> optax.GradientTransformationExtraArgs:
    """LaProp: the momentum of gradients that are normalised first.

    ``v <- b2 v + (1 - b2) g^2``,
    ``m <- b1 m + (1 - b1) g/(sqrt(v/(1 - b2^t)) + eps)``,
    ``x <- x - learning_rate m/(1 - b1^t)``.

    Adam divides the momentum by the newest ``sqrt(v)``, LaProp each gradient by that of
    its own time. The authors' code takes the learning rate into ``m``, which differs
    where the learning rate changes.

    Args:
      learning_rate: Learning rate, not negative: a float or a schedule.
      b1: Decay of the momentum, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Summand of the denominator, positive, in units of the gradients.

    Returns:
      An optimizer.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.optimizers.laprop(0.1, b1=0.5, b2=0.0)
      >>> state = tx.init(jnp.zeros(1))
      >>> for g in (1.0, -2.0, -3.0):
      ...     updates, state = tx.update(jnp.array([g]), state)
      >>> round(float(updates[0]), 4)  # 0.1 (4 + 2 - 1)/7
      0.0714

    References:
      Ziyin, Wang and Ueda, "LaProp: Separating Momentum and Adaptivity in Adam", 2020,
      2002.04839.
    """
    return _with_rate(scale_by_laprop(b1, b2, eps), learning_rate)


class AdamomentumState(NamedTuple):
    """State of :func:`scale_by_adamomentum`.

    Attributes:
      adamomentum_step: Number of gradients so far, int32.
      momentum: EMA of the gradients, float32 or wider.
      momentum_square: EMA of the squares of ``momentum``, float32 or wider.
    """

    adamomentum_step: jax.Array
    momentum: optax.Updates
    momentum_square: optax.Updates


def scale_by_adamomentum(
    b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """AdaMomentum without its learning rate: the link of :func:`adamomentum`.

    Args:
      b1: Decay of the momentum, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Summand of the second moment at every step, positive, in units of the squared
        gradients.

    Returns:
      A transformation with the state :class:`AdamomentumState`; follow it by a learning
      rate.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.optimizers.scale_by_adamomentum(b1=0.0)
      >>> g = jnp.array([30.0, -10.0])
      >>> tx.update(g, tx.init(g))[0].round(3).tolist()
      [1.0, -1.0]

    References:
      Wang et al., "Rethinking Adam: A Twofold Exponential Moving Average Approach",
      2021, 2106.11514.
    """
    b1, b2, eps = _moments(b1, b2, eps)

    def init_fn(params: optax.Params) -> AdamomentumState:
        zeros = lambda: optax.tree.zeros_like(params)
        return AdamomentumState(jnp.zeros([], jnp.int32), zeros(), zeros())

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AdamomentumState]:
        del params
        t = next_step(state.adamomentum_step)
        m = optax.tree.update_moment(updates, state.momentum, b1, 1)
        v = optax.tree.update_moment_per_elem_norm(m, state.momentum_square, b2, 2)
        v = jax.tree.map(lambda x: x + eps, v)
        m_hat = optax.tree.bias_correction(m, b1, t)
        v_hat = optax.tree.bias_correction(v, b2, t)
        out = jax.tree.map(lambda a, b: a / jnp.sqrt(b), m_hat, v_hat)
        return out, AdamomentumState(t, m, v)

    return in_float32(optax.GradientTransformation(init_fn, update_fn))


def adamomentum(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """AdaMomentum: Adam with the second moment of the momentum.

    ``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) m^2 + eps``,
    ``x <- x - learning_rate (m/(1 - b1^t))/sqrt(v/(1 - b2^t))``.

    ``m`` is squared without its bias correction, so that the first steps are up to
    ``1/(1 - b1)`` times as long as those of Adam.

    Args:
      learning_rate: Learning rate, not negative: a float or a schedule.
      b1: Decay of the momentum, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Summand of the second moment at every step, positive, in units of the squared
        gradients.

    Returns:
      An optimizer with the state :class:`AdamomentumState`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.optimizers.adamomentum(0.1, b1=0.5, b2=0.0)
      >>> state = tx.init(jnp.zeros(1))
      >>> for g in (4.0, -1.0):  # m is 2, then 0.5
      ...     updates, state = tx.update(jnp.array([g]), state)
      >>> round(float(updates[0]), 4)  # -0.1 (0.5/0.75)/0.5
      -0.1333

    References:
      Wang et al., "Rethinking Adam: A Twofold Exponential Moving Average Approach",
      2021, 2106.11514.
    """
    return _with_rate(scale_by_adamomentum(b1, b2, eps), learning_rate)


class FrictionState(NamedTuple):
    """State of :func:`scale_by_diffgrad`.

    Attributes:
      damped_state: State of ``optax.scale_by_adam``.
      last_gradient: Newest gradient, float32 or wider.
    """

    damped_state: optax.OptState
    last_gradient: optax.Updates


def scale_by_diffgrad(
    b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """The diffGrad method without its learning rate: the link of :func:`diffgrad`.

    Args:
      b1: Decay of the momentum, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Summand of the denominator, positive, in units of the gradients.

    Returns:
      A transformation with the state :class:`FrictionState`; follow it by a learning
      rate.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.optimizers.scale_by_diffgrad()
      >>> g = jnp.array([100.0, 0.0])
      >>> state = tx.init(g)
      >>> first, state = tx.update(g, state)
      >>> second, state = tx.update(g, state)
      >>> first.round(2).tolist(), second.round(2).tolist()
      ([1.0, 0.0], [0.5, 0.0])

    References:
      Dubey et al., "diffGrad: An Optimization Method for Convolutional Neural
      Networks", 2019, 1909.11015.
    """
    b1, b2, eps = _moments(b1, b2, eps)
    adam = optax.scale_by_adam(b1, b2, eps)

    def init_fn(params: optax.Params) -> FrictionState:
        return FrictionState(adam.init(params), optax.tree.zeros_like(params))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, FrictionState]:
        del params
        made, adam_state = adam.update(updates, state.damped_state)
        xi = jax.tree.map(
            lambda old, g: jax.nn.sigmoid(jnp.abs(old - g)),
            state.last_gradient,
            updates,
        )
        out = jax.tree.map(jnp.multiply, xi, made)
        newest = remembered(updates, state.last_gradient)
        return out, FrictionState(adam_state, newest)

    return in_float32(optax.GradientTransformation(init_fn, update_fn))


def diffgrad(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """The diffGrad method: Adam with friction where the gradient does not change.

    ``xi_t = 1/(1 + exp(-|g_{t-1} - g_t|))``, from 1/2 to 1, with ``g_0 = 0``, and
    ``x <- x - learning_rate xi_t m_t/(sqrt(v_t) + eps)`` with the moments of Adam after
    their bias correction.

    The authors' second code, ``diffGrad_v2``, computes this with ``eps`` added before
    the bias correction of ``v``. In their first the last gradient is an alias of the
    newest, so that ``xi`` is 1/2 at every step but the first.

    Args:
      learning_rate: Learning rate, not negative: a float or a schedule.
      b1: Decay of the momentum, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Summand of the denominator, positive, in units of the gradients.

    Returns:
      An optimizer with the state :class:`FrictionState`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.optimizers.diffgrad(0.1, b1=0.0, b2=0.0)
      >>> g = jnp.array([1.0])
      >>> updates, _ = tx.update(g, tx.init(g))
      >>> round(float(updates[0]), 4)  # -0.1/(1 + 1/e)
      -0.0731

    References:
      Dubey et al., "diffGrad: An Optimization Method for Convolutional Neural
      Networks", 2019, 1909.11015.
    """
    return _with_rate(scale_by_diffgrad(b1, b2, eps), learning_rate)


def _moments(b1: Number, b2: Number, eps: Number) -> tuple[Any, Any, Any]:
    """The decays of two moments and the summand of a denominator, checked."""
    b1 = _checks.within("b1", b1, 0, 1, closed_high=False)
    b2 = _checks.within("b2", b2, 0, 1, closed_high=False)
    return b1, b2, _checks.finite("eps", eps, open_low=True)


def _with_rate(
    tx: optax.GradientTransformation, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """A link with its learning rate, an optimizer."""
    rate = _checks.finite_or_schedule("learning_rate", learning_rate)
    return in_float32(optax.chain(tx, optax.scale_by_learning_rate(rate)))
