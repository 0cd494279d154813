"""Momentum of several kinds: many decays at once, an annealed one, a semi-implicit one.

aggregated   v_i <- b_i v_i + g,  x <- x - lr mean_i v_i
Gravity      V <- V + w(t) (zeta(g) - V)
NAG-GS       x <- (x + lr v)/(1 + lr),  with v drawn to x and down the gradient
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_avg import _checks, _keys, weights
from optax_avg.optimizers._wide import Number, in_float32, next_step
from optax_avg.robust.clipping import clip_redescending

__all__ = [
    "AggregatedState",
    "GravityState",
    "NagGsState",
    "aggregated_momentum",
    "gravity",
    "nag_gs",
    "scale_by_aggregated_momentum",
]


class AggregatedState(NamedTuple):
    """State of :func:`scale_by_aggregated_momentum`.

    Attributes:
      velocities: Sum of the gradients with each decay, float32 or wider; as many trees
        as there are decays.
    """

    velocities: tuple[optax.Updates, ...]


def scale_by_aggregated_momentum(
    betas: Iterable[Number] = (0.0, 0.9, 0.99),
) -> optax.GradientTransformationExtraArgs:
    """Aggregated momentum without its learning rate.

    The link of :func:`aggregated_momentum`.

    Args:
      betas: Decays, each in [0, 1). The state holds as many trees.

    Returns:
      A transformation with the state :class:`AggregatedState`; follow it by a learning
      rate.

    Raises:
      ValueError: If there is no decay or one is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.optimizers.scale_by_aggregated_momentum((0.0, 0.5))
      >>> g = jnp.array([4.0])
      >>> state = tx.init(g)
      >>> for _ in range(2):
      ...     updates, state = tx.update(g, state)
      >>> updates.tolist()  # the mean of 4 and 6
      [5.0]

    References:
      Lucas et al., "Aggregated Momentum: Stability Through Passive Damping", 2018,
      1804.00325.
    """
    given = [] if isinstance(betas, (int, float)) else list(betas)
    if not given:
        raise ValueError(
            f"betas must hold at least one decay, got {betas!r}; pass (0.0, 0.9, 0.99)."
        )
    decays = [_checks.within("betas", b, 0, 1, closed_high=False) for b in given]

    def init_fn(params: optax.Params) -> AggregatedState:
        return AggregatedState(tuple(optax.tree.zeros_like(params) for _ in decays))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AggregatedState]:
        del params
        velocities = tuple(
            jax.tree.map(lambda v, g, b=b: (b * v + g).astype(v.dtype), old, updates)
            for b, old in zip(decays, state.velocities, strict=True)
        )
        out = jax.tree.map(lambda *v: sum(v) / len(v), *velocities)
        return out, AggregatedState(velocities)

    return in_float32(optax.GradientTransformation(init_fn, update_fn))


def aggregated_momentum(
    learning_rate: optax.ScalarOrSchedule, betas: Iterable[Number] = (0.0, 0.9, 0.99)
) -> optax.GradientTransformationExtraArgs:
    """Aggregated momentum (AggMo): the mean of several velocities.

    ``v_i <- b_i v_i + g``, ``x <- x - learning_rate mean_i v_i``. Velocities with small
    decays damp the oscillations of those with large ones. With one decay it is
    ``optax.sgd`` with momentum.

    Args:
      learning_rate: Learning rate, not negative: a float or a schedule.
      betas: Decays ``b_i``, each in [0, 1). The authors take ``1 - 0.1^i`` from ``i =
        0``.

    Returns:
      An optimizer with the state :class:`AggregatedState`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.optimizers.aggregated_momentum(0.5, (0.0, 0.5))
      >>> g = jnp.array([4.0])
      >>> state = tx.init(g)
      >>> for _ in range(2):
      ...     updates, state = tx.update(g, state)
      >>> updates.tolist()
      [-2.5]

    References:
      Lucas et al., "Aggregated Momentum: Stability Through Passive Damping", 2018,
      1804.00325.
    """
    rate = _checks.finite_or_schedule("learning_rate", learning_rate)
    tx = scale_by_aggregated_momentum(betas)
    return in_float32(optax.chain(tx, optax.scale_by_learning_rate(rate)))


class GravityState(NamedTuple):
    """State of the velocity of :func:`gravity`.

    Attributes:
      gravity_step: Number of gradients so far, int32.
      gravity_velocity: ``V``, float32 or wider.
    """

    gravity_step: jax.Array
    gravity_velocity: optax.Updates


def gravity(
    learning_rate: optax.ScalarOrSchedule = 0.1,
    beta: Number = 0.9,
    alpha: Number = 0.01,
    key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Gravity: a soft clip and a velocity whose decay is annealed.

    ``zeta = g/(1 + (g max|g|)^2)`` with the maximum of each leaf,
    ``V <- b_t V + (1 - b_t) zeta`` with ``b_t = (beta t + 1)/(t + 2)`` from ``t = 0``,
    ``x <- x - learning_rate V``. ``V`` begins with random normal numbers of the
    standard deviation ``alpha/learning_rate``, so that the first steps differ by about
    ``alpha`` whatever the gradient is.

    ``zeta`` is :func:`optax_avg.clip_redescending` and ``1 - b_t`` is
    :func:`optax_avg.weights.gravity`. Where ``max|g|`` is large the steps are small:
    gradients far above 1 hardly move the parameters. The authors' PyTorch code begins
    at ``t = 1``, their Keras code at ``t = 0``.

    Args:
      learning_rate: Learning rate, not negative: a float or a schedule. If it begins at
        zero, so does ``V``.
      beta: Final decay of the velocity, in [0, 1].
      alpha: Size of the random first steps, not negative, in units of the parameters.
      key: PRNG key of the first velocity, or an integer to make one of.

    Returns:
      An optimizer; its velocity is in a :class:`GravityState`. A gradient that is not
      finite counts as zeros.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.optimizers.gravity(1.0, alpha=0.0)
      >>> g = jnp.array([1.0, 0.5])
      >>> tx.update(g, tx.init(g))[0].tolist()  # half of 1/2 and of 0.5/1.25
      [-0.25, -0.20000000298023224]

    References:
      Bahrami and Pouriyan Zadeh, "Gravity Optimizer: a Kinematic Approach on
      Optimization in Deep Learning", 2021, 2101.09192.
    """
    rate = _checks.finite_or_schedule("learning_rate", learning_rate)
    alpha = _checks.finite("alpha", alpha)
    weight = weights.gravity(beta)
    make_key = _keys.key_maker(key, "oa.optimizers.gravity(0.1, key=0)")

    def init_fn(params: optax.Params) -> GravityState:
        first = jnp.asarray(_checks.at_step(rate, jnp.zeros([], jnp.int32)))
        std = jnp.where(first > 0, alpha / jnp.where(first > 0, first, 1), 0)
        noise = optax.tree.random_like(make_key(), params)
        velocity = jax.tree.map(lambda n: (std * n).astype(n.dtype), noise)
        return GravityState(jnp.zeros([], jnp.int32), velocity)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, GravityState]:
        del params
        w, _ = weights.advance(weight, state.gravity_step, 1, (0.0, 0.0))
        velocity = jax.tree.map(
            lambda v, zeta: (v + w * (zeta - v)).astype(v.dtype),
            state.gravity_velocity,
            updates,
        )
        step = next_step(state.gravity_step)
        return velocity, GravityState(step, velocity)

    mean = optax.GradientTransformation(init_fn, update_fn)
    descent = optax.scale_by_learning_rate(rate)
    return in_float32(optax.chain(clip_redescending(), mean, descent))


class NagGsState(NamedTuple):
    """State of :func:`nag_gs`.

    Attributes:
      nag_step: Number of gradients so far, int32; schedules are called with it.
      nag_gamma: ``gamma``, float32.
      nag_ahead: ``v - x``, float32 or wider.
    """

    nag_step: jax.Array
    nag_gamma: jax.Array
    nag_ahead: optax.Updates


def nag_gs(
    learning_rate: optax.ScalarOrSchedule = 0.05, mu: Number = 1.0, gamma: Number = 1.5
) -> optax.GradientTransformationExtraArgs:
    """NAG-GS: Nesterov's accelerated flow in semi-implicit (Gauss-Seidel) steps.

    With the learning rate ``a``, from ``v = x``:

        gamma <- (gamma + a mu)/(1 + a)
        v <- (v + (a mu/gamma) x - (a/gamma) g)/(1 + a mu/gamma)
        x <- (x + a v)/(1 + a)

    These are the lines of the paper in the order in which a gradient at ``x`` can take
    them. The paper begins with the third line, which changes nothing while ``v = x``.
    The authors' JAX code spends its first gradient on it, and their PyTorch code takes
    ``v`` with ``gamma`` before its update.

    For ``gamma = mu`` it is ``optax.sgd`` with the learning rate ``c^2/mu`` and the
    momentum ``(1 - c)^2``, where ``c = a/(1 + a)``. The state holds ``v - x``, which
    does not round with ``x``.

    Args:
      learning_rate: ``a``, the step of time, positive: a float or a schedule.
      mu: ``mu``, the value to which ``gamma`` tends, positive, in units of the
        curvature of the loss.
      gamma: First ``gamma``, positive, in the same units.

    Returns:
      An optimizer with the state :class:`NagGsState`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = oa.optimizers.nag_gs(1.0, mu=1.0, gamma=1.0)
      >>> x = jnp.array([8.0])
      >>> state = tx.init(x)
      >>> for _ in range(2):  # v is 4, then (4 + 6 - 6)/2
      ...     updates, state = tx.update(x, state)
      ...     x = optax.apply_updates(x, updates)
      >>> x.tolist()
      [4.0]

    References:
      Leplat et al., "NAG-GS: Semi-Implicit, Accelerated and Robust Stochastic
      Optimizer", 2022, 2209.14937.
    """
    rate = _checks.finite_or_schedule("learning_rate", learning_rate, open_low=True)
    mu = _checks.finite("mu", mu, open_low=True)
    gamma = _checks.finite("gamma", gamma, open_low=True)

    def init_fn(params: optax.Params) -> NagGsState:
        first = jnp.array(gamma, jnp.float32, copy=True)
        zeros = optax.tree.zeros_like(params)
        return NagGsState(jnp.zeros([], jnp.int32), first, zeros)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, NagGsState]:
        del params
        a = jnp.asarray(_checks.at_step(rate, state.nag_step), jnp.float32)
        new_gamma = ((state.nag_gamma + a * mu) / (1 + a)).astype(jnp.float32)
        b = a / new_gamma
        # v - x, with x as it is: the pull of x on v then needs no term.
        ahead = jax.tree.map(
            lambda d, g: ((d - b * g) / (1 + b * mu)).astype(d.dtype),
            state.nag_ahead,
            updates,
        )
        steps = jax.tree.map(lambda d: (a / (1 + a) * d).astype(d.dtype), ahead)
        left = jax.tree.map(jnp.subtract, ahead, steps)
        step = next_step(state.nag_step)
        return steps, NagGsState(step, new_gamma, left)

    return in_float32(optax.GradientTransformation(init_fn, update_fn))
