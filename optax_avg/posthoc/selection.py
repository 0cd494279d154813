"""Which snapshots to average, chosen by validation loss after training."""

from typing import Any

import numpy as np

from optax_avg import _checks


def swad_window(
    losses: Any, n_converge: int = 3, n_tolerance: int = 6, ratio: float = 1.3
) -> range:
    """The valley of the validation loss, by SWAD's overfit-aware rule.

    It starts at the first loss that is the least of itself and the ``n_converge - 1``
    after it, and ends before ``n_tolerance`` in a row exceed ``ratio`` times the mean
    of these ``n_converge``. Where it never starts, it is the least loss alone.

    Args:
      losses: shape (n,), validation loss at each snapshot, in order.
      n_converge: patience of the start; at least 1.
      n_tolerance: patience of the end; at least 1.
      ratio: tolerance; at least 1.

    Returns:
      Indices of snapshots, a range.

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
    ratio = _checks.within("ratio", ratio, 1, float("inf"))
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
