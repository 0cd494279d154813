"""Training that continues from the average: write-back, Switch EMA, Lookahead.

every k-th step:  params <- avg,   otherwise:  params <- params + updates
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_avg import _checks, _mixups, _numerics, _sight, weights
from optax_avg.averages.links import ema_params
from optax_avg.averages.readout import average_names, is_average_state, read_leaves

__all__ = ["lookahead", "switch_ema", "write_back"]


def write_back(
    average: optax.GradientTransformation, every: int
) -> optax.GradientTransformationExtraArgs:
    """Replaces the parameters by their average every ``every`` steps.

    The update becomes ``avg - params``, in the dtype of the update, so that
    ``optax.apply_updates`` arrives at ``avg`` to rounding. The optimizer's own state
    (moments, momentum) is left alone, and so is the average; before its first iterate
    nothing is written.

    Args:
      average: A transformation of this library with one average, such as
        ``ema_params(0.999)``.
      every: Optimizer steps between write-backs; at least 1.

    Returns:
      A transformation with the state of ``average``; the last link of a chain.

    Raises:
      ValueError: If ``every`` is below 1, or (at ``init``) ``average`` does not hold
        exactly one average, or is a chain with one.
      TypeError: If ``average`` is no transformation.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = optax.chain(optax.sgd(1.0), oa.write_back(oa.window_average(2), 2))
      >>> x = jnp.array(0.0)
      >>> state = tx.init(x)
      >>> for _ in range(2):  # to 1, then to 2 and back to the mean of both
      ...     u, state = tx.update(jnp.array(-1.0), state, x)
      ...     x = optax.apply_updates(x, u)
      >>> float(x)
      1.5
    """
    return _write_back("write_back", average, _checks.check_integer("every", every, 1))


def switch_ema(
    decay: weights.ScalarOrSchedule, every: int, *, debias: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Switch EMA: the EMA replaces the parameters every ``every`` steps.

    Args:
      decay: Decay of the EMA, in [0, 1], or a schedule of it.
      every: Optimizer steps between switches, at least 1; the paper takes an epoch.
      debias: Whether the EMA leaves out the initial parameters.

    Returns:
      A transformation; the last link of a chain.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = optax.chain(optax.sgd(1.0), oa.switch_ema(0.5, every=2))
      >>> x = jnp.array(0.0)
      >>> state = tx.init(x)
      >>> for _ in range(2):  # to 3, then to 6 and back to the EMA of both
      ...     u, state = tx.update(jnp.array(-3.0), state, x)
      ...     x = optax.apply_updates(x, u)
      >>> float(x)
      5.0

    References:
      Li et al., "Switch EMA: A Free Lunch for Better Flatness and Sharpness", 2024,
      2402.09240.
    """
    every = _checks.check_integer("every", every, 1)
    return _write_back("switch_ema", ema_params(decay, debias=debias), every)


def lookahead(
    sync_period: int, slow_step_size: float
) -> optax.GradientTransformationExtraArgs:
    """Lookahead on plain parameters: k steps forward, 1 step back.

    Every ``sync_period`` steps ``slow += alpha (fast - slow)``, then ``fast <- slow``.
    ``slow`` starts at the initial parameters. The iterates are those of
    ``optax.lookahead``, without its ``LookaheadParams``.

    Args:
      sync_period: ``k``, fast steps between synchronisations; at least 1.
      slow_step_size: ``alpha`` in [0, 1].

    Returns:
      A transformation; the last link of a chain, after the fast optimizer.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = optax.chain(optax.sgd(1.0), oa.lookahead(2, 0.5))
      >>> x = jnp.array(0.0)
      >>> state = tx.init(x)
      >>> for _ in range(2):  # to 1, then to 2 and half of the way back to 0
      ...     u, state = tx.update(jnp.array(-1.0), state, x)
      ...     x = optax.apply_updates(x, u)
      >>> float(x)
      1.0

    References:
      Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back", 2019,
      1907.08610.
    """
    sync_period = _checks.check_integer("sync_period", sync_period, 1)
    alpha = _checks.within("slow_step_size", slow_step_size, 0, 1)
    slow = ema_params(1 - alpha, debias=False, every=sync_period, name="lookahead")
    return _write_back("lookahead", slow, sync_period)


def _write_back(
    caller: str, average: optax.GradientTransformation, every: int
) -> optax.GradientTransformationExtraArgs:
    """:func:`write_back`, with the name of the factory that the user called."""
    wanted = "an average, such as oa.ema_params(0.999)"
    _mixups.refuse_no_transformation(caller, average, wanted)
    inner = optax.with_extra_args_support(average)

    def init(params: optax.Params) -> optax.OptState:
        state: Any = inner.init(params)
        if len(names := average_names(state)) != 1:
            raise ValueError(
                f"{caller} needs a transformation with one average, such as "
                f"ema_params(0.999); this one has {names or 'none'}."
            )
        if not is_average_state(state):
            raise ValueError(
                f"{caller} needs the average {names[0]!r} itself, not a chain or "
                f"another wrapper around it; write optax.chain(optimizer, {caller}("
                "average, every))."
            )
        return state

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        _checks.require_params(caller, params)
        before = state
        with _sight.collected(None):  # it reports for both
            averaged: tuple[Any, Any] = inner.update(
                updates, state, params, **extra_args
            )
        updates, state = averaged
        # The average's own clock goes back by its stride alone.
        stride = _numerics.common_multiple(state.every, every)
        step = _numerics.advance_clock(before.step, stride)
        state = state._replace(step=step)

        def replace(updates):
            found = read_leaves(state, params, None)
            leaves, structure = jax.tree.flatten(params)
            steps = [
                u if average is None or u is None else _step_to(average, x, u)
                for average, x, u in zip(
                    found, leaves, structure.flatten_up_to(updates), strict=True
                )
            ]
            return structure.unflatten(steps)

        updates = lax.cond(state.step % every == 0, replace, lambda u: u, updates)
        _sight.report(caller, emitted=updates, rewrites=True)
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


def _step_to(found: tuple[jax.Array, jax.Array], x: jax.Array, u: Any) -> jax.Array:
    """The update from ``x`` to the average, or ``u`` while there is none."""
    is_there, average = found
    step = _numerics.step_to(average, jnp.asarray(x), u.dtype)
    return jnp.where(is_there, step, u)
