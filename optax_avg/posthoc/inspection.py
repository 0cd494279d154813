"""What is stored, with widths and mean ages, and which snapshots to average."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from optax_avg import _checks
from optax_avg._checkpoints.leaves import Leaf
from optax_avg._checkpoints.orbax import RECORD, anywhere
from optax_avg.averages.overview import AverageSummary
from optax_avg.posthoc import _disk
from optax_avg.posthoc._clock import Kind, Power, Window, weights_on_iterates
from optax_avg.posthoc._reading import records_of, without_broken
from optax_avg.posthoc._records import NoSnapshotError, Record, Records
from optax_avg.posthoc._timeline import kinds_of

__all__ = [
    "AverageSummary",
    "StoreSummary",
    "is_store",
    "summarize_average",
    "summarize_store",
    "swad_window",
]


class StoreSummary(NamedTuple):
    """What a store holds.

    Attributes:
      steps: Training steps of the snapshots that can be read, ascending.
      averages: Averages in the newest snapshot.
      leaves: Leaves of the newest snapshot; the first part of a path is the name of the
        average.
    """

    steps: list[int]
    averages: list[AverageSummary]
    leaves: list[Leaf]


def is_store(directory: _disk.AnyDirectory) -> bool:
    """Whether there are snapshots in a directory.

    Args:
      directory: Any path.

    Raises:
      ValueError: If the path cannot be that of a store.
      ImportError: If Orbax is not installed.

    Example:
      >>> import jax.numpy as jnp, tempfile
      >>> from optax_avg import posthoc
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     before = posthoc.is_store(directory)
      ...     with posthoc.SnapshotStore(directory) as store:
      ...         saved = store.save(None, 1, {"w": jnp.ones(2)})
      ...     (before, posthoc.is_store(directory))
      (False, True)
    """
    path = _disk.absolute(directory)
    return any(
        (anywhere(path) / str(step) / RECORD).exists() for step in _disk.steps_of(path)
    )


def summarize_store(directory: _disk.AnyDirectory) -> StoreSummary:
    """The averages and leaves in the newest snapshot of a store.

    Damaged snapshots are skipped with a warning that names them.

    Args:
      directory: Directory of a :class:`SnapshotStore`.

    Returns:
      A :class:`StoreSummary`.

    Raises:
      NoSnapshotError: If no snapshot can be read.

    Example:
      >>> import jax.numpy as jnp, tempfile
      >>> from optax_avg import posthoc
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     with posthoc.SnapshotStore(directory) as store:
      ...         saved = store.save(None, 1, {"w": jnp.ones(2)})
      ...     posthoc.summarize_store(directory).leaves[0].name
      'parameters.w'
    """
    with _disk.reader_of(_disk.absolute(directory)) as reader:

        def newest(left: Records) -> tuple[Records, Record, list[tuple[str, Kind]]]:
            if not left:
                raise NoSnapshotError(f"{directory} has no snapshot that can be read.")
            last = left[max(left)]
            chosen = [(last, name) for name in last.leaves]
            kinds = kinds_of(reader, chosen, {last.step: 0})
            return left, last, [(name, kind) for (_, name), kind in kinds.items()]

        records, last, kinds = without_broken(reader, records_of(reader), newest)
    averages = [_summary(name, last.absorbed[name], kind) for name, kind in kinds]
    leaves = [
        Leaf((name, *leaf.path), leaf.shape, leaf.dtype)
        for name, found in last.leaves.items()
        for leaf in found
    ]
    return StoreSummary(sorted(records), averages, leaves)


def summarize_average(
    name: str, iterates: int, *, gamma: float | None = None, window: int | None = None
) -> AverageSummary:
    """Relative width and mean age of an average.

    Args:
      name: Name of the average.
      iterates: Number of iterates in it.
      gamma: Exponent, if it is a power function.
      window: Number of iterates, if it is the uniform mean of the latest ones.

    Returns:
      An :class:`AverageSummary`, without numbers if neither is given.

    Example:
      >>> from optax_avg import posthoc
      >>> posthoc.summarize_average("late", 10, window=5).mean_age
      2.0
    """
    if not iterates or (gamma is None and window is None):
        return AverageSummary(name, iterates)
    kind = Window(window) if window is not None else Power(float(gamma or 0))
    return _summary(name, iterates, kind)


def _summary(name: str, iterates: int, kind: Kind) -> AverageSummary:
    if not iterates:
        return AverageSummary(name, iterates)
    p, t = weights_on_iterates(kind, iterates), np.arange(iterates + 1)
    mean = float(p @ t)
    width = math.sqrt(max(float(p @ (t - mean) ** 2), 0)) / iterates
    said = type(kind).__name__.lower()
    return AverageSummary(name, iterates, said, width, iterates - mean)


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
