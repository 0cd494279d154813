"""U-DoG: an accelerated optimizer without a learning rate, and with its own average.

    even calls, m at z:       x = y - alpha eta_x m,    xbar += (w/W) (x - xbar)
    odd calls, g at xbar:     y -= alpha eta_y g,       z = xbar + (w/W) (y - xbar)

A step is two calls, each with one gradient at the parameters that the loop holds. They
are ``z`` before an even call and ``xbar`` before an odd one. The weights are
``w_t = rbar_0 + ... + rbar_t``, ``W_t = w_0 + ... + w_t`` and
``alpha_t = w_t/rbar_t``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_avg import _checks, _leaves, _numerics, _sight
from optax_avg.averages import AverageState, memories
from optax_avg.optimizers import _matrices

__all__ = ["UDogState", "u_dog"]


class UDogState(NamedTuple):
    """State of :func:`u_dog`.

    Attributes:
      udog_step: Number of calls so far, int32; even before a gradient ``m``.
      origin: ``x_0``, the first parameters in float32 or wider; ``MaskedNode`` at
        leaves that are no floats.
      lead: ``y``, like ``origin``.
      hint: ``m``, the gradient of the last even call, like ``origin``.
      udog_average: ``xbar`` as an average of the library.
      farthest: The largest distance of an iterate ``x`` or ``y`` from ``x_0``, and at
        least ``r_eps``, float32 or wider.
      distance: ``rbar_t``, ``farthest`` at the beginning of the step.
      weight_now: ``w_t``, the sum of ``rbar``.
      weight_total: ``W_t``, the sum of ``w``.
      surprise: The square root of ``Q_t``, the sum of ``alpha^2 |g - m|^2``.
      largest_hint: The square root of ``M_t``, the largest ``alpha^2 |m|^2``.
    """

    udog_step: jax.Array
    origin: Any
    lead: Any
    hint: Any
    udog_average: AverageState
    farthest: jax.Array
    distance: jax.Array
    weight_now: jax.Array
    weight_total: jax.Array
    surprise: jax.Array
    largest_hint: jax.Array


def u_dog(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    reps_rel: float = 1e-6,
    *,
    name: str = "u_dog",
) -> optax.GradientTransformationExtraArgs:
    """U-DoG: UniXGrad with the step sizes "distance over gradients" of DoG.

    A step ``t`` takes two gradients, in two calls of ``update``: ``m`` at
    ``z = xbar + (w/W) (y - xbar)``, and ``g`` at the new average ``xbar``. With the
    largest distance so far ``rbar = max(r_eps, max |x_k - x_0|, max |y_k - x_0|)``:

    ``x = y - alpha eta_x m``, ``eta_x = c rbar/sqrt(max(M, Q))``,
    ``xbar <- xbar + (w/W) (x - xbar)``,

    ``y <- y - alpha eta_y g``, ``eta_y = c rbar/sqrt(max(M, Q'))``,

    where ``M`` is the largest ``alpha^2 |m|^2`` so far, ``Q`` the sum of
    ``alpha^2 |g - m|^2`` of all steps before and ``Q'`` that sum with this step. These
    are the step sizes of the experiments (appendix G.1). Those of the theory are
    smaller by logarithms. The method is for convex losses, and the average ``xbar`` is
    its result. On neural networks the authors found it behind DoG.

    A gradient that is not finite would stay in the sums; put ``optax.apply_if_finite``
    around the optimizer where there may be one.

    Args:
      learning_rate: ``c``, a float or a schedule of the calls; 1 is the method.
      reps_rel: First distance ``r_eps`` in units of ``1 + |x_0|``, positive.
      name: Name by which :func:`optax_avg.averaged_params` finds ``xbar``.

    Returns:
      An optimizer with the state :class:`UDogState` for the end of a chain; ``update``
      needs the parameters. They are ``xbar`` after an odd number of calls.
      :func:`optax_avg.averaged_params` returns ``xbar`` at any time.

    Raises:
      ValueError: If an argument is out of range, or if ``update`` gets no params.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_avg as oa
      >>> loss = lambda x: jnp.sum(jnp.array([1.0, 0.1]) * (x - 3) ** 2)
      >>> tx = oa.optimizers.u_dog()
      >>> x = jnp.zeros(2)
      >>> state = tx.init(x)
      >>> step = jax.jit(lambda x, s: tx.update(jax.grad(loss)(x), s, x))
      >>> for _ in range(400):
      ...     u, state = step(x, state)
      ...     x = optax.apply_updates(x, u)
      >>> bool(loss(oa.averaged_params(state, x)) < 1e-3)
      True

    References:
      Kreisler et al., "Accelerated Parameter-Free Stochastic Optimization", 2024,
      2404.00666. Kavis et al., "UniXGrad: A Universal, Adaptive Algorithm with Optimal
      Guarantees for Constrained Optimization", 2019. Ivgi et al., "DoG is SGD's Best
      Friend: A Parameter-Free Dynamic Step Size Schedule", 2023, 2302.12022.
    """
    c = _checks.finite_or_schedule("learning_rate", learning_rate)
    reps_rel = _checks.finite("reps_rel", reps_rel, open_low=True)

    def init(params: optax.Params) -> UDogState:
        chosen = _leaves.select(params, None)
        copy = lambda: jax.tree.map(_numerics.copy_as, chosen)
        dtype = _numerics.dtype_of_norms(chosen)
        number = lambda: jnp.zeros([], jnp.int32)
        total = lambda: jnp.zeros([], dtype)
        r = lambda: (reps_rel * (1 + _numerics.norm(chosen))).astype(dtype)
        kept = memories.RunningMemory(copy(), (), (), ())
        every = jnp.ones([], jnp.int32)
        average = AverageState(
            number(), number(), number(), number(), every, {name: kept}
        )
        return UDogState(
            udog_step=number(),
            origin=copy(),
            lead=copy(),
            hint=jax.tree.map(_numerics.zeros_like, chosen),
            udog_average=average,
            farthest=r(),
            distance=r(),
            weight_now=r(),
            weight_total=r(),
            surprise=total(),
            largest_hint=total(),
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, UDogState]:
        del extra_args
        _checks.require_params("u_dog", params)
        odd = state.udog_step % 2 == 1
        average: AverageState = state.udog_average
        xbar = average.averages[name].average
        structure, rows = _matrices.rows(
            updates, params, state.origin, state.lead, state.hint, xbar
        )
        there = [i for i, (g, *_) in enumerate(rows) if _leaves.is_gradient(g)]
        origins = [rows[i][2] for i in there]
        gradients = [_numerics.wide(rows[i][0]) for i in there]
        surprises = [g - rows[i][4] for i, g in zip(there, gradients)]

        alpha = state.weight_now / state.distance
        size, error = alpha * _numerics.norms([gradients, surprises])
        largest = jnp.maximum(state.largest_hint, jnp.where(odd, 0, size))
        surprise = jnp.where(odd, jnp.hypot(state.surprise, error), state.surprise)
        root = jnp.maximum(largest, surprise)  # of max(M, Q)
        eta = _checks.at_step(c, state.udog_step) * state.distance
        eta = jnp.where(root > 0, eta / jnp.where(root > 0, root, 1), 0)
        moved = [
            (rows[i][3] - alpha * eta * g).astype(rows[i][3].dtype)
            for i, g in zip(there, gradients)
        ]
        gone = _numerics.norm([x - x0 for x, x0 in zip(moved, origins)])
        dtype = state.farthest.dtype
        farthest = jnp.maximum(state.farthest, gone).astype(dtype)
        # After y has moved, the next step begins.
        distance = jnp.where(odd, farthest, state.distance)
        now = state.weight_now + jnp.where(odd, distance, 0)
        total = state.weight_total + jnp.where(odd, now, 0)

        out, y, m, mean = ([row[k] for row in rows] for k in (0, 3, 4, 5))
        for i, g, x in zip(there, gradients, moved):
            point = (mean[i] + now / total * (x - mean[i])).astype(mean[i].dtype)
            out[i] = _numerics.step_to(point, rows[i][1], out[i].dtype)
            y[i] = jnp.where(odd, x, y[i])
            m[i] = jnp.where(odd, m[i], g).astype(m[i].dtype)
            mean[i] = jnp.where(odd, mean[i], point)
        y, m, mean = (structure.unflatten(leaves) for leaves in (y, m, mean))
        kept = memories.RunningMemory(mean, (), (), ())
        average = average._replace(
            step=_numerics.advance_clock(average.step),
            absorbed=_numerics.count_if(~odd, average.absorbed),
            averages={name: kept},
        )
        steps = structure.unflatten(out)
        _sight.report("u_dog", emitted=steps)
        return steps, UDogState(
            udog_step=_numerics.advance_clock(state.udog_step, 2),
            origin=state.origin,
            lead=y,
            hint=m,
            udog_average=average,
            farthest=farthest,
            distance=distance,
            weight_now=now,
            weight_total=total,
            surprise=surprise.astype(dtype),
            largest_hint=largest.astype(dtype),
        )

    return optax.GradientTransformationExtraArgs(
        _leaves.shapes_for_shapes(init), update
    )
