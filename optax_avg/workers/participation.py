"""Weights for workers that take part in some rounds only.

    x <- x + 1/N sum_n w_n I_n d_n

``d_n`` is the displacement of worker ``n`` of ``N``, and ``I_n`` is 1 if it takes part
in this round, 0 otherwise. The weight ``w_n`` estimates the inverse of how often the
worker takes part, so that those that come rarely are not underrepresented.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_avg import _checks, _numerics

__all__ = ["FedAUState", "Participation", "fedau"]

# What a worker knows of its past rounds: a tree of scalars.
Memory = Any


class Participation(NamedTuple):
    """Weights for :func:`optax_avg.sync_params` from the rounds of each worker.

    Attributes:
      init: Makes the first memory of a worker.
      weigh: From the memory and whether the worker takes part in this round to the
        weight of this round and the next memory.
    """

    init: Callable[[], Memory]
    weigh: Callable[[Memory, jax.Array], tuple[jax.Array, Memory]]


class FedAUState(NamedTuple):
    """Memory of :func:`fedau` of one worker.

    Attributes:
      intervals: Number of intervals so far, int32.
      rounds: Rounds in all of these intervals, int32.
      waited: Rounds since the last interval ended, int32.
    """

    intervals: jax.Array
    rounds: jax.Array
    waited: jax.Array


def fedau(cutoff: int = 50) -> Participation:
    """FedAU: the weight is the mean number of rounds between two participations.

    ``w_n`` is the mean length of the intervals that ended before this round, 1 at
    first. An interval ends when the worker takes part, and after ``cutoff`` rounds.

    Args:
      cutoff: ``K``, rounds after which an interval ends in any case, at least 1. A
        worker that comes more rarely counts for less than its share.

    Returns:
      A value for ``weights`` of :func:`optax_avg.sync_params`, whose ``update`` then
      takes ``participates``.

    Raises:
      ValueError: If ``cutoff`` is no integer from 1 on.

    Example:
      A worker takes part in the second round, and then in every round.

      >>> import optax_avg as oa
      >>> weights = oa.workers.fedau()
      >>> memory = weights.init()
      >>> for takes_part in (False, True, True, True):
      ...     weight, memory = weights.weigh(memory, takes_part)
      ...     print(weight)
      1.0
      1.0
      2.0
      1.5

    References:
      Wang & Ji, "A Lightweight Method for Tackling Unknown Participation Statistics in
      Federated Averaging", 2023, 2306.03401.
    """
    cutoff = _checks.static_integer("cutoff", cutoff, 1)

    def init() -> FedAUState:
        return FedAUState(*(jnp.zeros([], jnp.int32) for _ in range(3)))

    def weigh(memory: Any, takes_part: Any) -> tuple[jax.Array, FedAUState]:
        known = memory.intervals > 0
        mean = memory.rounds / jnp.maximum(memory.intervals, 1)
        waited = memory.waited + 1
        ends = takes_part | (waited >= cutoff)
        return jnp.where(known, mean, 1), FedAUState(
            intervals=_numerics.count_if(ends, memory.intervals),
            rounds=jnp.where(ends, memory.rounds + waited, memory.rounds),
            waited=jnp.where(ends, 0, waited),
        )

    return Participation(init, weigh)
