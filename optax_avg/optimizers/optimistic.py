"""AMSGrad that steps ahead with a prediction of the next gradient.

    w~ <- w~ - lr theta/sqrt(v_max),  w = w~ - lr h/sqrt(v_max)

``h`` is the momentum that the predicted gradient would give.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import optax

from optax_avg import _checks
from optax_avg.optimizers._wide import Number, in_float32, next_step, with_stacks

__all__ = ["OptimisticState", "optimistic_amsgrad"]


class OptimisticState(NamedTuple):
    """State of :func:`optimistic_amsgrad`.

    Attributes:
      optimistic_step: Number of gradients so far, int32; schedules are called with it.
      theta: EMA of the gradients, float32 or wider.
      theta_square: EMA of the squared gradients, float32 or wider.
      largest_square: Largest ``theta_square`` so far, float32 or wider.
      past_gradients: The ``r`` newest gradients along a first axis, the newest last,
        float32 or wider.
      step_ahead: ``w~ - w``, float32 or wider.
    """

    optimistic_step: jax.Array
    theta: optax.Updates
    theta_square: optax.Updates
    largest_square: optax.Updates
    past_gradients: optax.Updates
    step_ahead: optax.Updates


def optimistic_amsgrad(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    r: int = 5,
    reg: Number = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """OPT-AMSGrad: AMSGrad with a prediction of the next gradient.

    With the gradient ``g_t`` and the prediction ``m_{t+1}`` of the next:

        theta_t = b1 theta_{t-1} + (1 - b1) g_t
        v_t = b2 v_{t-1} + (1 - b2) g_t^2,   v_0 = eps
        vmax_t = max(vmax_{t-1}, v_t)
        w~_{t+1} = w~_t - learning_rate theta_t/sqrt(vmax_t)
        w_{t+1} = w~_{t+1} - learning_rate h_{t+1}/sqrt(vmax_t)
        h_{t+1} = b1 theta_{t-1} + (1 - b1) m_{t+1}

    The prediction is ``sum_i c_i g_i`` over the ``r`` newest gradients, with ``c =
    z/sum(z)``, ``(U'U + reg I) z = 1`` and the ``r`` newest differences ``g_i -
    g_{i-1}`` as the columns of ``U``, over all leaves together. Until ``r + 1``
    gradients are known, and where the system has no solution in this precision, the
    prediction is the newest gradient. With ``r = 1`` it always is. Inside ``shard_map``
    each device predicts from the parts of the leaves that it has.

    The authors' code predicts otherwise: it extrapolates the parameters, leaf by leaf,
    and takes the gradient of a second model there. It also squares ``g - m`` in place
    of ``g``, and corrects biases.

    Args:
      learning_rate: Learning rate, not negative: a float or a schedule.
      b1: Decay of the momentum, in [0, 1).
      b2: Decay of the second moment, in [0, 1].
      eps: First second moment, positive, in units of the squared gradients. The
        denominators have no other summand.
      r: Number of gradients in the prediction, at least 1. The state holds as many.
      reg: Regularisation of the prediction, positive, in units of the squared
        gradients. The default is that of the authors' code. It is raised to ``10 r``
        times the rounding of the largest squared difference (``1.2e-7`` of it in
        float32), since dependent gradients would make the prediction noise below that.

    Returns:
      An optimizer with the state :class:`OptimisticState`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.optimizers.optimistic_amsgrad(0.1, b1=0.0, b2=0.0, r=1)
      >>> state = tx.init(jnp.zeros(1))
      >>> for g in (2.0, 1.0):  # steps of -0.2, then of 0.1 - 0.1
      ...     updates, state = tx.update(jnp.array([g]), state)
      ...     print(abs(round(float(updates[0]), 4)))
      0.2
      0.0

    References:
      Wang et al., "An Optimistic Acceleration of AMSGrad for Nonconvex Optimization",
      2019, 1903.01435.
    """
    rate = _checks.finite_or_schedule("learning_rate", learning_rate)
    b1 = _checks.within("b1", b1, 0, 1, closed_high=False)
    b2 = _checks.within("b2", b2, 0, 1)
    eps = _checks.finite("eps", eps, open_low=True)
    reg = _checks.finite("reg", reg, open_low=True)
    hint = "; inside optax.inject_hyperparams name it in static_args"
    r = _checks.static_integer("r", r, 1, hint)

    def init_fn(params: optax.Params) -> OptimisticState:
        zeros = lambda: optax.tree.zeros_like(params)
        first = lambda: jax.tree.map(lambda x: jnp.full_like(x.real, eps), params)
        past = jax.tree.map(
            lambda x: jnp.broadcast_to(jnp.zeros_like(x), (r, *x.shape)), params
        )
        step = jnp.zeros([], jnp.int32)
        return OptimisticState(step, zeros(), first(), first(), past, zeros())

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, OptimisticState]:
        del params
        t = state.optimistic_step
        theta = optax.tree.update_moment(updates, state.theta, b1, 1)
        v = optax.tree.update_moment_per_elem_norm(updates, state.theta_square, b2, 2)
        largest = jax.tree.map(jnp.maximum, state.largest_square, v)
        known = jax.tree.map(
            lambda past, g: jnp.concatenate([past, g[None]]),
            state.past_gradients,
            updates,
        )
        c = _coefficients(jax.tree.leaves(known), r, reg, t >= r)
        m = jax.tree.map(lambda gs: jnp.sum(_along_first(c, gs) * gs[1:], 0), known)
        h = optax.tree.update_moment(m, state.theta, b1, 1)
        eta = _checks.at_step(rate, t)
        scaled = lambda x, v: (eta * x / jnp.sqrt(v)).astype(x.dtype)
        ahead = jax.tree.map(scaled, h, largest)
        out = jax.tree.map(
            lambda old, step, new: old - step - new,
            state.step_ahead,
            jax.tree.map(scaled, theta, largest),
            ahead,
        )
        newest = jax.tree.map(lambda gs: gs[1:], known)
        step = next_step(t)
        return out, OptimisticState(step, theta, v, largest, newest, ahead)

    tx = in_float32(optax.GradientTransformation(init_fn, update_fn))
    return with_stacks(tx, "past_gradients")


def _coefficients(
    known: list[jax.Array], r: int, reg: Number, enough: jax.Array
) -> jax.Array:
    """``c`` of the ``r`` newest gradients, from leaves that hold ``r + 1`` of them."""
    gram = jnp.zeros((r, r), jnp.float32)
    for gs in known:
        u = gs[1:] - gs[:-1]
        axes = tuple(range(2, u.ndim + 1))
        gram = gram + jnp.sum(jnp.real(u[:, None] * jnp.conj(u[None])), axes)
    # c does not depend on the scale of the system.
    scale = jnp.maximum(jnp.max(jnp.diagonal(gram)), reg)
    # Below this the rounding of the products would decide.
    least = 10 * r * jnp.finfo(gram.dtype).eps * scale
    eye = jnp.eye(r, dtype=gram.dtype)
    system = (gram + jnp.maximum(reg, least) * eye) / scale
    ones = jnp.ones(r, system.dtype)
    z = jax.scipy.linalg.solve(system, ones, assume_a="pos")
    c = z / jnp.sum(z)
    solved = enough & jnp.all(jnp.isfinite(c))
    return jnp.where(solved, c, (jnp.arange(r) == r - 1).astype(c.dtype))


def _along_first(c: jax.Array, gs: jax.Array) -> jax.Array:
    """``c`` in the shape in which it multiplies stacked gradients."""
    return c.reshape((-1,) + (1,) * (gs.ndim - 1)).astype(gs.real.dtype)
