"""Averages from snapshots a few leaves at a time, ``sum_i x_i snapshot_i``.

:func:`stream_average` is for models larger than memory.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, Unpack

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath
from jax.typing import ArrayLike

from optax_avg import _leaves, _numerics
from optax_avg._checkpoints.leaves import Leaf, batches, difference, nested, path_of
from optax_avg.posthoc import _disk
from optax_avg.posthoc._plan import Part, Plan, warn_of_residual
from optax_avg.posthoc._reading import with_plan
from optax_avg.posthoc._records import Records
from optax_avg.posthoc._target import TargetOptions, request_of, with_target

__all__ = ["Stream", "stream_average"]

LEAST = 2**26  # bytes of leaves that are read together, if none is larger

# A tree of arrays or of ``jax.ShapeDtypeStruct`` that a result is like.
Example = optax.Params
# A leaf of such a tree, None if the result is not like a tree.
Like = Any


class Sum(NamedTuple):
    """A sum of snapshots that is computed a few leaves at a time.

    Attributes:
      leaves: Leaves of the sum; their dtypes are those of the last part.
      nbytes: Bytes that are read in all.
      compute: Takes indices of leaves and the sharding of each, and returns these
        leaves in float32 or wider.
    """

    leaves: list[Leaf]
    nbytes: int
    compute: Callable[[Sequence[int], _disk.Shardings], list[jax.Array]]


def sum_of(reader: _disk.Reader, records: Records, parts: Sequence[Part]) -> Sum:
    """The sum ``sum_i x_i snapshot_i`` of the parts of a plan.

    Raises:
      ValueError: If the parts have different leaves.
    """
    leaves = records[parts[-1].step].leaves[parts[-1].name]
    for part in parts:
        others = records[part.step].leaves[part.name]
        odd = difference(leaves, others, "the newest")
        if not odd and [x.path for x in leaves] != [x.path for x in others]:
            odd = "has its leaves in another order than the newest"
        if odd:
            raise ValueError(
                f"the snapshot of {part.name!r} at step {part.step} {odd}; pass names= "
                "of averages of one tree."
            )
    nbytes = len(parts) * sum(leaf.nbytes for leaf in leaves)

    def compute(indices: Sequence[int], shardings: _disk.Shardings) -> list[jax.Array]:
        total: list[jax.Array] = []
        for part in parts:
            record = records[part.step]
            read = _disk.read_leaves(reader, record, part.name, indices, shardings)
            x = part.weight  # a Python float, so that wide leaves keep their digits
            total = _added(x, read, total) if total else _scaled(x, read)
            del read
        return total

    return Sum(leaves, nbytes, compute)


@jax.jit
def _scaled(x: float, leaves: list[jax.Array]) -> list[jax.Array]:
    return [x * _numerics.wide(leaf) for leaf in leaves]


@functools.partial(jax.jit, donate_argnums=2)
def _added(
    x: float, leaves: list[jax.Array], total: list[jax.Array]
) -> list[jax.Array]:
    return [a + x * _numerics.wide(leaf) for a, leaf in zip(total, leaves, strict=True)]


def assembled(found: Sum, params: Example | None) -> optax.Params:
    """The whole sum, in the structure, dtypes and shardings of ``params``.

    Without ``params`` it is a tree of nested dicts in float32 or wider.

    Raises:
      ValueError: If ``params`` has other leaves.
    """
    like, place = _layout(found.leaves, params)
    sizes = [leaf.nbytes for leaf in found.leaves]
    result: dict[int, jax.Array] = {}
    for batch in batches(sizes, max([LEAST, *sizes])):
        total = found.compute(batch, [sharding_of(like[i]) for i in batch])
        for i, leaf in zip(batch, total, strict=True):
            dtype = leaf.dtype if like[i] is None else like[i].dtype
            result[i] = leaf.astype(dtype)
        del total
    return place(result)


def sharding_of(like: Like) -> jax.sharding.Sharding:
    """The sharding of ``like``; by default on the first device."""
    sharding = getattr(like, "sharding", None)
    return sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


# Puts leaves, by their index in a sum, into a tree.
_Place = Callable[[dict[int, jax.Array]], optax.Params]


def _layout(leaves: list[Leaf], params: Example | None) -> tuple[list[Like], _Place]:
    """What each leaf of the result is like, and how the leaves become a tree."""
    if params is None:
        paths = [leaf.path for leaf in leaves]
        return [None] * len(leaves), lambda found: nested(
            {paths[i]: leaf for i, leaf in found.items()}
        )
    entries, structure = jax.tree.flatten_with_path(params)
    where = _places(leaves, entries)
    for leaf, j in zip(leaves, where, strict=True):
        shape = jnp.shape(entries[j][1])
        if shape != leaf.shape:
            raise ValueError(
                f"params{jax.tree_util.keystr(entries[j][0])} has shape {shape} and "
                f"its average {leaf.shape}; pass the parameters that were averaged."
            )
    like = [entries[j][1] for j in where]
    like = [x if hasattr(x, "dtype") else jnp.asarray(x) for x in like]

    def place(found: dict[int, jax.Array]) -> optax.Params:
        new = [leaf for _, leaf in entries]
        for i, leaf in found.items():
            new[where[i]] = leaf
        return structure.unflatten(new)

    return like, place


def _places(leaves: list[Leaf], entries: list[tuple[KeyPath, ArrayLike]]) -> list[int]:
    """The place in a tree of each leaf, by its path.

    A wrapper changes all paths: if no path agrees and the tree has as many floating
    leaves, they are matched in order.

    Raises:
      ValueError: If the tree lacks a leaf.
    """
    position = {path_of(keys): j for j, (keys, _) in enumerate(entries)}
    missing = [leaf.path for leaf in leaves if leaf.path not in position]
    if not missing:
        return [position[leaf.path] for leaf in leaves]
    floats = [j for j, (_, leaf) in enumerate(entries) if _leaves.is_float(leaf)]
    if len(missing) < len(leaves) or len(floats) != len(leaves):
        raise ValueError(
            f"params has no leaf {'/'.join(missing[0])}; pass the parameters that were "
            "averaged."
        )
    return floats


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


@with_target
def stream_average(
    directory: _disk.AnyDirectory,
    use: Callable[[Stream], _T],
    **options: Unpack[TargetOptions],
) -> _T:
    """Computes an average that was not kept, a few leaves at a time.

    Does what :meth:`SnapshotStore.reconstruct` does, for averages that do not fit into
    memory. If a snapshot proves damaged while ``use`` runs, the average is planned
    again without it and ``use`` is called again, so it must begin at the first leaf.

    Args:
      directory: Directory of a :class:`SnapshotStore`.
      use: Takes a :class:`Stream` and consumes its leaves.
      **options: Which average is wanted.

    Returns:
      What ``use`` returns.

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
    request = request_of(**options)

    def streamed(reader: _disk.Reader, records: Records, plan: Plan) -> _T:
        warn_of_residual(plan)
        found = sum_of(reader, records, plan.parts)
        place = sharding_of(None)
        compute = lambda indices: found.compute(indices, [place] * len(indices))
        return use(Stream(plan, found.leaves, found.nbytes, compute))

    return with_plan(_disk.absolute(directory), request, streamed)
