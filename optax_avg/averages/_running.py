"""The running average: its state, and how it absorbs an iterate.

avg <- avg + w(t) (x - avg)
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_avg import _checks, _leaves, _numerics, weights
from optax_avg.averages import _rounding
from optax_avg.averages._absorb import absorbing


class AverageState(NamedTuple):
    """State of :func:`optax_avg.average`.

    Attributes:
      step: int32, optimizer steps seen; at the largest integer it goes back by
        ``every``, so that what is due stays due.
      absorbed: int32, iterates in the average.
      rejected: int32, iterates left out because a leaf was not finite.
      start: int32, optimizer steps that were left out at the beginning.
      every: int32, optimizer steps between absorbed iterates.
      averages: the averages by name, ``MaskedNode`` at leaves that are not averaged.
      compensations: what rounding took from ``averages``; empty unless compensated.
      masses: float32 sums of :class:`optax_avg.weights.Mass` by name.
      remainders: float32, what rounding took from ``masses``; of the averages that
        have such a weight alone.
      gammas: float32 exponents of the averages by name whose weight is
        :func:`optax_avg.weights.power_function`; by them snapshots are combined.
    """

    step: jax.Array
    absorbed: jax.Array
    rejected: jax.Array
    start: jax.Array
    every: jax.Array
    averages: dict[str, Any]
    compensations: dict[str, Any]
    masses: dict[str, jax.Array]
    remainders: dict[str, jax.Array]
    gammas: dict[str, jax.Array]


def running_average(
    caller: str,
    weight: weights.Weight | Mapping[str, weights.Weight],
    *,
    every: int,
    start: int,
    name: str,
    accumulator_dtype: Any,
    rounding: str | None,
    where: _leaves.Where | None,
    skip_nonfinite: bool,
    memory_kind: str | None,
) -> optax.GradientTransformationExtraArgs:
    """What :func:`optax_avg.average` and its aliases return.

    Args:
      caller: the factory that the user called, for messages.
      weight: as in :func:`optax_avg.average`, as all that follow.
      every: optimizer steps between absorbed iterates.
      start: optimizer steps to leave out.
      name: of the average.
      accumulator_dtype: of the average.
      rounding: ``None``, ``"stochastic"`` or ``"compensated"``.
      where: which leaves to average.
      skip_nonfinite: leave out iterates that are not finite.
      memory_kind: where the average lives.

    Returns:
      A transformation whose state is an :class:`AverageState`.
    """
    by_name = weight if isinstance(weight, Mapping) else {name: weight}
    if not by_name:
        raise ValueError(f"{caller} needs a weight; write average(weights.ema(0.999)).")
    by_name = {str(key): weights.with_stride(value) for key, value in by_name.items()}
    every, start = _checks.check_every(every, start)
    rounding = check_rounding(rounding, accumulator_dtype)
    compensated = rounding == "compensated"

    def empty(x):
        accumulators = {
            key: jax.tree.map(
                lambda leaf: _numerics.copy_as(leaf, accumulator_dtype), x
            )
            for key in by_name
        }
        return AverageState(
            step=jnp.zeros([], jnp.int32),
            absorbed=jnp.zeros([], jnp.int32),
            rejected=jnp.zeros([], jnp.int32),
            start=jnp.array(start, jnp.int32),
            every=jnp.array(every, jnp.int32),
            averages=accumulators,
            compensations=jax.tree.map(
                lambda a: _numerics.zeros_like(a, a.dtype), accumulators
            )
            if compensated
            else {},
            masses={key: jnp.zeros([], jnp.float32) for key in by_name},
            remainders={
                key: jnp.zeros([], jnp.float32)
                for key, w in by_name.items()
                if isinstance(w, weights.Mass)
            },
            gammas={
                key: jnp.array(gamma, jnp.float32)
                for key, w in by_name.items()
                if (gamma := weights.gamma_of(w)) is not None
            },
        )

    def absorb(state, x, t, is_base):
        averages, compensations, totals = {}, {}, {}
        for key, w_of in by_name.items():
            total = state.masses[key], state.remainders.get(key, 0)
            w, totals[key] = weights.advance(w_of, t, every, total)
            # Without the barrier XLA computes w anew for every element.
            w = lax.optimization_barrier(jnp.where(is_base, 1, w))
            avg = state.averages[key]
            if compensated:
                averages[key], compensations[key] = _rounding.compensated(
                    w, x, avg, state.compensations[key], t == 1
                )
            elif rounding == "stochastic":
                averages[key] = _rounding.stochastic(w, x, avg, t == 1, key, state.step)
            else:
                averages[key] = _rounding.nearest(w, x, avg, t == 1)
        keep_if_base = lambda old, new: jnp.where(is_base, old, new)
        masses, remainders = (
            {key: keep_if_base(old, totals[key][part]) for key, old in sums.items()}
            for part, sums in enumerate((state.masses, state.remainders))
        )
        return state._replace(
            averages=averages,
            compensations=compensations,
            masses=masses,
            remainders=remainders,
        )

    return absorbing(
        caller,
        empty,
        absorb,
        every=every,
        start=start,
        where=where,
        skip_nonfinite=skip_nonfinite,
        memory_kind=memory_kind,
    )


def check_rounding(rounding: str | None, dtype: Any) -> str | None:
    """The rounding, ``None`` resolved for the dtype of the accumulator."""
    if rounding not in (None, "stochastic", "compensated"):
        raise ValueError(
            f"rounding must be None, 'stochastic' or 'compensated', got {rounding!r}."
        )
    if dtype is None:
        return rounding
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 16:
        raise ValueError(
            "accumulator_dtype must be floating, real and of 16 bits or more, such as "
            f"jnp.bfloat16; got {jnp.dtype(dtype)}."
        )
    narrow = jnp.finfo(dtype).bits < 32
    return "stochastic" if rounding is None and narrow else rounding
