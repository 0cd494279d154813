"""What is stored: the averages of snapshots, with their widths and mean ages."""

import math
from typing import NamedTuple

import numpy as np

from optax_avg._checkpoints.leaves import Leaf
from optax_avg._checkpoints.orbax import RECORD, anywhere
from optax_avg.posthoc import _disk
from optax_avg.posthoc._clock import Kind, Power, Window, weights_on_iterates
from optax_avg.posthoc._kinds import kinds_of
from optax_avg.posthoc._reading import records_of, without_broken
from optax_avg.posthoc._records import NoSnapshotError, Record, Records

__all__ = [
    "AverageSummary",
    "StoreSummary",
    "is_store",
    "summarize_average",
    "summarize_store",
]


class AverageSummary(NamedTuple):
    """A stored average in a few numbers.

    Attributes:
      name: Name of the average.
      iterates: Number of iterates in it.
      kind: ``"power"``, ``"window"`` or ``"recorded"``; None if it is not known.
      sigma_rel: Standard deviation of the weights over the number of iterates; None if
        they are not known.
      mean_age: Mean number of iterates since the one that is averaged; None if the
        weights are not known.
    """

    name: str
    iterates: int
    kind: str | None = None
    sigma_rel: float | None = None
    mean_age: float | None = None


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
