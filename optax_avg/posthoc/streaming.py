"""Averages from snapshots a few leaves at a time, for models larger than memory."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax

from optax_avg import weights
from optax_avg._checkpoints.leaves import Leaf
from optax_avg.posthoc import _disk
from optax_avg.posthoc._plan import Plan, warn_of_residual
from optax_avg.posthoc._profiles import Normalization
from optax_avg.posthoc._reading import with_plan
from optax_avg.posthoc._records import Records
from optax_avg.posthoc._request import request_of
from optax_avg.posthoc._sums import sharding_of, sum_of

__all__ = ["Stream", "stream_average"]

_T = TypeVar("_T")


class Stream(NamedTuple):
    """An average that is computed a few leaves at a time.

    Attributes:
      plan: How the average is put together.
      leaves: Path, shape and stored dtype of each leaf.
      nbytes: Bytes that are read in all.
      compute: Takes indices of leaves and returns these leaves, on the first device, in
        float32 or wider.
    """

    plan: Plan
    leaves: list[Leaf]
    nbytes: int
    compute: Callable[[Sequence[int]], list[jax.Array]]


def stream_average(
    directory: _disk.AnyDirectory,
    use: Callable[[Stream], _T],
    *,
    sigma_rel: float | None = None,
    half_life: float | None = None,
    window: int | None = None,
    weight: weights.Weight | None = None,
    step: int | None = None,
    names: Sequence[str] | None = None,
    normalize: Normalization = "constrained",
) -> _T:
    """Computes an average that was not kept, a few leaves at a time.

    Does what :meth:`SnapshotStore.reconstruct` does, for averages that do not fit into
    memory. If a snapshot proves damaged while ``use`` runs, the average is planned
    again without it and ``use`` is called again, so it must begin at the first leaf.

    Args:
      directory: Directory of a :class:`SnapshotStore`.
      use: Takes a :class:`Stream` and consumes its leaves.
      sigma_rel: Relative width of a power function, in (0, 12^-1/2).
      half_life: Half-life of an EMA, in optimizer steps.
      window: Number of latest optimizer steps for a uniform mean.
      weight: Any other weight of :mod:`optax_avg.weights`.
      step: Training step at which the average ends; by default the last snapshot.
      names: Names of the averages to combine; by default all.
      normalize: How the weights of snapshots are normalised, as in
        :func:`optax_avg.posthoc.coefficients`.

    Returns:
      What ``use`` returns.

    Raises:
      ValueError: If not exactly one target is given, or there are no snapshots.

    Example:
      >>> import jax.numpy as jnp, tempfile
      >>> from optax_avg import posthoc
      >>> def largest(stream):
      ...     return max(float(stream.compute([i])[0].max()) for i in range(2))
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     with posthoc.SnapshotStore(directory) as store:
      ...         for step in (1, 2, 3, 4):
      ...             params = {"a": jnp.full(3, step), "b": -step * jnp.ones(2)}
      ...             params = {k: x.astype(jnp.float32) for k, x in params.items()}
      ...             saved = store.save(None, step, params)
      ...     posthoc.stream_average(
      ...         directory, largest, window=2, names=["parameters"]
      ...     )
      3.5
    """
    request = request_of(
        sigma_rel=sigma_rel,
        half_life=half_life,
        window=window,
        weight=weight,
        step=step,
        names=names,
        normalize=normalize,
    )

    def streamed(reader: _disk.Reader, records: Records, plan: Plan) -> _T:
        warn_of_residual(plan)
        found = sum_of(reader, records, plan.parts)
        place = sharding_of(None)
        compute = lambda indices: found.compute(indices, [place] * len(indices))
        return use(Stream(plan, found.leaves, found.nbytes, compute))

    return with_plan(_disk.absolute(directory), request, streamed)
