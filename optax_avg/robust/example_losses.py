"""Means of gradients that leave rows out by their losses.

z = sum_i c_i v_i,    c from the losses L_i of the rows
"""

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax
from optax.experimental import aggregating

from optax_avg import _checks, _mesh, losses
from optax_avg.robust import _stack
from optax_avg.robust._options import AxisName, RowOptions, with_row_options
from optax_avg.robust._stack import Stack
from optax_avg.robust.aggregation import Memory, aggregator

__all__ = ["adaptive_k_mean"]


@with_row_options
def adaptive_k_mean(
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    **options: Unpack[RowOptions],
) -> aggregating.Aggregator:
    """Adaptive-k: the mean of the gradients whose loss is below an adaptive threshold.

    ``z = 1/k sum_{L_i <= theta} v_i`` with the weights of
    :func:`optax_avg.losses.adaptive_k`: ``theta = m/(sqrt(v) + eps)`` from the
    exponential means ``m`` and ``v`` of the mean loss and of its square. If no row is
    left, the result is zero.

    Where the gradients of single examples are not needed, the weights in the loss give
    the same result from one gradient: ``jnp.sum(c * loss_of_each)``.

    Args:
      beta1: Decay of ``m``, in [0, 1).
      beta2: Decay of ``v``, in [0, 1).
      eps: Added to the denominator, in units of the losses.
      **options: Options of every aggregator.

    Returns:
      An aggregator with the state :class:`optax_avg.AggregationState`, whose memory is
      a :class:`optax_avg.losses.AdaptiveKMemory`. ``update`` needs ``losses``, the loss
      of each row, shape (n,). With ``axis_name`` these are those of the rows of this
      device, a number if it has one row; the threshold is that of all rows. A row with
      a gradient or a loss that is not finite is left out of the mean and of the
      threshold.

    Raises:
      ValueError: If an argument is out of range. In ``update``, if there are no
        ``losses``, or more or fewer than rows.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.adaptive_k_mean()
      >>> grads, state = jnp.array([1.0, 2.0, 99.0]), tx.init(jnp.zeros([]))
      >>> z, state = tx.update(grads, state, losses=jnp.array([0.5, 1.5, 7.0]))
      >>> float(z)
      1.5

    References:
      Dedeoglu et al., "A Robust Optimization Method for Label Noisy Datasets Based on
      Adaptive Threshold: Adaptive-k", 2022, 2203.14165.
    """
    beta1 = _checks.within("beta1", beta1, 0, 1, closed_high=False)
    beta2 = _checks.within("beta2", beta2, 0, 1, closed_high=False)
    eps = _checks.finite("eps", eps)
    start = losses.adaptive_k_start
    axis_name = options.get("axis_name")

    def of(own: Any) -> aggregating.Aggregator:
        def rule(stack: Stack, memory: Memory, step: jax.Array) -> Any:
            del step
            given = _of_all_rows(own, stack.valid.shape[0], axis_name)
            given = jnp.where(stack.valid, given, jnp.nan)
            weights, memory = losses.adaptive_k(given, memory, beta1, beta2, eps)
            return _stack.combine(stack, weights), memory

        return aggregator(rule, lambda params: start(), **options)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        losses: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        if losses is None:
            raise ValueError(
                "adaptive_k_mean needs the loss of each row; call tx.update(grads, "
                "state, params, losses=losses) with losses of shape (n,)."
            )
        return of(losses).update(updates, state, params, **extra_args)

    return aggregating.Aggregator(of(None).init, update_fn)


def _of_all_rows(own: Any, n: int, axis_name: AxisName) -> jax.Array:
    """The losses of all rows, shape (n,), in float32 or wider.

    Raises:
      ValueError: If there are more or fewer than rows.
    """
    own = jnp.asarray(own)
    found = own if axis_name is None else _mesh.everywhere(own, axis_name).reshape(-1)
    if found.shape != (n,):
        raise ValueError(
            f"{found.size} losses of shape {own.shape} for {n} rows; pass one loss for "
            "each row of the gradients, as jax.vmap(loss, (None, 0)) gives them."
        )
    return found.astype(jnp.promote_types(found.dtype, jnp.float32))
