"""Snapshots to average, chosen by validation loss after training."""

import math

import numpy as np
from numpy.typing import ArrayLike

from optax_avg import _checks

__all__ = ["swad_window"]


def swad_window(
    losses: ArrayLike, n_converge: int = 3, n_tolerance: int = 6, ratio: float = 1.3
) -> range:
    """The valley of the validation loss, by the overfit-aware rule of SWAD.

    The valley starts at the first loss that is the smallest of itself and the next
    ``n_converge - 1`` losses. It ends before ``n_tolerance`` losses in a row exceed
    ``ratio`` times the mean of these ``n_converge`` losses. If it never starts, it is
    the smallest loss alone.

    Args:
      losses: Validation loss at each snapshot, in order, shape (n,). Losses that are
        not finite count as infinite.
      n_converge: Number of losses that decide about the start; at least 1.
      n_tolerance: Number of losses that decide about the end; at least 1.
      ratio: Factor that losses of the valley do not exceed; at least 1.

    Returns:
      A range of the indices of the snapshots.

    Raises:
      ValueError: If there are no losses or an argument is out of range.

    Example:
      >>> from optax_avg import posthoc
      >>> losses = [5, 3, 1, 1.1, 1.2, 1, 1.1, 9, 9]
      >>> window = posthoc.swad_window(losses, n_tolerance=2)
      >>> window
      range(2, 7)
      >>> steps = range(100, 1000, 100)
      >>> [steps[i] for i in window]
      [300, 400, 500, 600, 700]

    References:
      Cha et al., "SWAD: Domain Generalization by Seeking Flat Minima", 2021,
      2102.08604, algorithm 2.
    """
    _checks.check_integer("n_converge", n_converge, 1)
    _checks.check_integer("n_tolerance", n_tolerance, 1)
    ratio = _checks.within("ratio", ratio, 1, math.inf)
    loss = np.asarray(losses, np.float64)
    if loss.ndim != 1 or not loss.size:
        raise ValueError(f"losses must be a vector, got shape {loss.shape}.")
    loss = np.where(np.isfinite(loss), loss, np.inf)
    for start in range(len(loss) - n_converge + 1):
        patience = loss[start : start + n_converge]
        if patience[0] == patience.min() and np.isfinite(patience[0]):
            break
    else:
        best = int(np.argmin(loss))
        return range(best, best + 1)
    limit = ratio * patience.mean()
    first = max(start + 1, start + n_converge + 1 - n_tolerance)
    for end in range(first, len(loss) - n_tolerance + 1):
        if loss[end : end + n_tolerance].min() > limit:
            return range(start, end)
    return range(start, len(loss))
