"""Requests for an average: which one, at which step, from which snapshots."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from optax_avg import _checks, weights
from optax_avg.posthoc._clock import Kind, Power, Recorded, Window
from optax_avg.posthoc._profiles import Normalization

# Takes a number of iterates and the steps between them, and returns which average of
# them is wanted.
Goal = Callable[[int, int], Kind]


class Request(NamedTuple):
    """An average that is wanted.

    Attributes:
      goal: Which average it is.
      step: Training step at which it ends, None for the last snapshot.
      names: Names of the averages to combine, None for all.
      normalize: How the weights of snapshots are normalised.
    """

    goal: Goal
    step: int | None
    names: Sequence[str] | None
    normalize: Normalization


def request_of(
    *,
    sigma_rel: float | None,
    half_life: float | None,
    window: int | None,
    weight: weights.Weight | None,
    step: int | None,
    names: Sequence[str] | None,
    normalize: Normalization,
) -> Request:
    """A request from the arguments of :meth:`SnapshotStore.plan`, which it checks.

    Raises:
      ValueError: If there is not exactly one target, or an argument is out of range.
    """
    if isinstance(names, str):
        raise ValueError(f"names must be a list of names; write names=[{names!r}].")
    goal = _goal_of(sigma_rel, half_life, window, weight)
    return Request(goal, step, names, normalize)


def _goal_of(
    sigma_rel: float | None,
    half_life: float | None,
    window: int | None,
    weight: weights.Weight | None,
) -> Goal:
    if sum(x is not None for x in (sigma_rel, half_life, window, weight)) == 1:
        if sigma_rel is not None:
            power = Power(weights.gamma_from_sigma_rel(float(sigma_rel)))
            return lambda count, every: power
        if window is not None:
            k = _checks.check_integer("window", window, 1)
            return lambda count, every: Window(-(-k // every))
        if half_life is not None:
            return _ema(half_life)
        if weight is not None:
            return lambda count, every: Recorded(
                weights.sequence(weight, count, every=every)
            )
    raise ValueError(
        "there must be one target; write reconstruct(params, sigma_rel=0.08), or "
        "half_life=, window= or weight=."
    )


def _ema(half_life: float) -> Goal:
    """The EMA whose weights halve every ``half_life`` optimizer steps."""
    half_life = _checks.within("half_life", half_life, 0, math.inf, open_low=True)
    decay = weights.decay_from_half_life(half_life)

    def goal(count: int, every: int) -> Kind:
        weight = weights.ema(weights.scale_decay(decay, every))
        return Recorded(weights.sequence(weight, count))

    return goal
