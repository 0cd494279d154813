"""Sums of snapshots, leaf by leaf."""

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_avg import _leaves, _numerics
from optax_avg.posthoc import _disk
from optax_avg.posthoc._plan import Part
from optax_avg.posthoc._timeline import with_grids

RENEWALS = 10  # of a snapshot that is replaced again and again while it is read


def records_of(
    reader: _disk.Reader, steps: Sequence[int] | None = None
) -> dict[int, _disk.Record]:
    """Records of the snapshots that can be read, of some steps or all; by step.

    The others are reported, and so are those without checksums, and what looks like a
    snapshot but has no step for its name.
    """
    records = {}
    misnamed = _disk.misnamed(reader.directory)
    if misnamed:
        warnings.warn(
            f"{reader.directory} holds snapshots that are left out because their "
            f"directories are not named by their steps alone: {', '.join(misnamed)}. "
            "Rename them as they were, for instance 0200 to 200.",
            RuntimeWarning,
            stacklevel=3,
        )
    for step in _disk.steps_of(reader.directory):
        if steps is not None and step not in steps:
            continue
        try:
            records[step] = _record_of(reader, step)
        except _disk.SnapshotError as broken:
            report(broken)
    bare = [step for step, record in records.items() if not record.checksum]
    if bare:
        warnings.warn(
            f"the snapshots of steps {bare} were saved without checksums, and without "
            "the optimizer steps that their averages hold; damage to them is not "
            "noticed, and all steps from the first on are assumed.",
            RuntimeWarning,
            stacklevel=3,
        )
    return records


def _record_of(reader: _disk.Reader, step: int) -> _disk.Record:
    """The record of a snapshot, which a writer may replace at this moment.

    Raises:
      SnapshotError: If it cannot be read at the second attempt either.
    """
    try:
        return with_grids(_disk.read_record(reader, step))
    except _disk.SnapshotError:
        return with_grids(_disk.read_record(reader, step))


def report(broken: _disk.SnapshotError) -> None:
    """Names a snapshot that is left out."""
    warnings.warn(
        f"the snapshot of step {broken.step} is left out because it is damaged: "
        f"{broken}.",
        RuntimeWarning,
        stacklevel=4,
    )


def without_broken(
    reader: _disk.Reader,
    records: dict[int, _disk.Record],
    make: Callable[[dict[int, _disk.Record]], Any],
) -> Any:
    """``make(records)``, again without a snapshot that proves broken on the way.

    A writer may have replaced the snapshot after its record was read. So it is read
    anew once, and as often as its record has changed, before it is left out.
    """
    failed: Counter[int] = Counter()
    while True:
        try:
            return make(records)
        except _disk.SnapshotError as broken:
            step = broken.step
            if step not in records:  # without it the same would happen again
                raise
            failed[step] += 1
            renewed = _renewed(reader, step)
            if renewed is not None and (
                failed[step] == 1
                or (renewed != records[step] and failed[step] < RENEWALS)
            ):
                records = {**records, step: renewed}
                continue
            report(broken)
            records = {s: r for s, r in records.items() if s != step}


def _renewed(reader: _disk.Reader, step: int) -> _disk.Record | None:
    try:
        return _record_of(reader, step)
    except _disk.SnapshotError:
        return None


def summed(
    reader: _disk.Reader,
    records: dict[int, _disk.Record],
    parts: list[Part],
    params: Any,
) -> Any:
    """``sum_i x_i snapshot_i``, like ``params``."""
    leaves = leaves_of(records, parts)
    like, place = _layout(leaves, params)
    result: dict[int, jax.Array] = {}
    for batch in _disk.batches(leaves):
        shardings = [sharding_of(like[i]) for i in batch]
        total = summed_leaves(reader, records, parts, batch, shardings)
        for i, leaf in zip(batch, total, strict=True):
            dtype = leaf.dtype if like[i] is None else like[i].dtype
            result[i] = leaf.astype(dtype)
        del total
    return place(result)


def leaves_of(records: dict[int, _disk.Record], parts: list[Part]) -> list[_disk.Leaf]:
    """The leaves that all parts of a sum have.

    Raises:
      ValueError: If they differ.
    """
    leaves = records[parts[-1].step].leaves[parts[-1].name]
    for part in parts:
        _check_alike(leaves, records[part.step].leaves[part.name], part)
    return leaves


def summed_leaves(
    reader: _disk.Reader,
    records: dict[int, _disk.Record],
    parts: list[Part],
    indices: list[int],
    shardings: list[Any],
) -> list[jax.Array]:
    """Some leaves of a sum of snapshots, in float32 or wider.

    Raises:
      SnapshotError: If a snapshot is broken.
    """
    total = None
    for part in parts:
        record = records[part.step]
        read = _disk.read_leaves(reader, record, part.name, indices, shardings)
        x = part.weight  # of no dtype, so that wide leaves keep their digits
        total = _scaled(x, read) if total is None else _added(x, read, total)
        del read
    return total or []


@jax.jit
def _scaled(x: float, leaves: list[jax.Array]) -> list[jax.Array]:
    return [x * _numerics.wide(leaf) for leaf in leaves]


@functools.partial(jax.jit, donate_argnums=2)
def _added(
    x: float, leaves: list[jax.Array], total: list[jax.Array]
) -> list[jax.Array]:
    return [a + x * _numerics.wide(leaf) for a, leaf in zip(total, leaves, strict=True)]


def _check_alike(
    leaves: list[_disk.Leaf], others: list[_disk.Leaf], part: Part
) -> None:
    ours = [(leaf.path, leaf.shape) for leaf in leaves]
    theirs = [(leaf.path, leaf.shape) for leaf in others]
    if ours != theirs:
        odd = next((b for a, b in zip(ours, theirs) if a != b), theirs[-1])
        raise ValueError(
            f"the snapshot of {part.name!r} at step {part.step} has other leaves, "
            f"first {'/'.join(odd[0])} of shape {odd[1]}; pass names= of averages of "
            "one tree."
        )


def _layout(
    leaves: list[_disk.Leaf], params: Any
) -> tuple[list[Any], Callable[[dict[int, jax.Array]], Any]]:
    """What each leaf of the result is like, and how to put them into a tree."""
    if params is None:
        paths = [leaf.path for leaf in leaves]
        return [None] * len(leaves), lambda found: _disk.nested(
            {paths[i]: leaf for i, leaf in found.items()}
        )
    entries, structure = jax.tree.flatten_with_path(params)
    position = {_disk.path_of(keys): j for j, (keys, _) in enumerate(entries)}
    floats = [j for j, (_, leaf) in enumerate(entries) if _leaves.is_float(leaf)]
    if any(leaf.path not in position for leaf in leaves):
        # A wrapper renames all paths; leaves that match one to one keep their order.
        known = any(leaf.path in position for leaf in leaves)
        if known or len(floats) != len(leaves):
            missing = next(x.path for x in leaves if x.path not in position)
            raise ValueError(
                f"params has no leaf {'/'.join(missing)}; pass the parameters that "
                "were averaged."
            )
        position = {leaf.path: j for leaf, j in zip(leaves, floats, strict=True)}
    where = [position[leaf.path] for leaf in leaves]
    for leaf, j in zip(leaves, where, strict=True):
        shape = jnp.shape(entries[j][1])
        if shape != leaf.shape:
            raise ValueError(
                f"params{jax.tree_util.keystr(entries[j][0])} has shape {shape} and "
                f"its average {leaf.shape}; pass the parameters that were averaged."
            )
    like = [entries[j][1] for j in where]
    like = [x if hasattr(x, "dtype") else jnp.asarray(x) for x in like]

    def place(found):
        new = [leaf for _, leaf in entries]
        for i, leaf in found.items():
            new[where[i]] = leaf
        return structure.unflatten(new)

    return like, place


def sharding_of(like: Any) -> Any:
    """Where a leaf of the result goes: as in ``like``, else the first device."""
    sharding = getattr(like, "sharding", None)
    return sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
