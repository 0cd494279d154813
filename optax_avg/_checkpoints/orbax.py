"""Orbax checkpoints, on a local disk or in a bucket."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_avg._checkpoints._orbax_reads import parts_of, parts_of_copy
from optax_avg._checkpoints.leaves import Leaf, path_of
from optax_avg._checkpoints.sources import Checkpoint, Parts, Scratch, imported, named

METADATA = "_METADATA"  # file in the directory of a checkpoint of arrays
MARKS = ("_CHECKPOINT_METADATA", METADATA)  # files in a directory that Orbax wrote
RECORD = "record"  # item of each snapshot of a SnapshotStore

# A path on a disk or in a bucket, of the package etils that Orbax brings.
AnyPath = Any
# What saves and restores in Orbax, which has no stable type for it.
Checkpointer = Any


def orbax() -> Any:
    """The package Orbax, which is an optional dependency.

    Raises:
      ImportError: If it is not installed.
    """
    return imported("orbax.checkpoint", "snapshots need Orbax", "posthoc")


def is_remote(path: str) -> bool:
    """Whether a path is an address such as ``gs://bucket/run``."""
    return "://" in path


def anywhere(path: str) -> AnyPath:
    """A path with the methods of ``pathlib.Path``, on a disk or in a bucket."""
    orbax()
    from etils import epath  # Orbax takes and returns such paths

    return epath.Path(path)


def open_orbax(path: str) -> Checkpoint | None:
    """An Orbax checkpoint of arrays, None if there is none at the path.

    Args:
      path: Directory of the arrays, or of a checkpoint with one item.

    Raises:
      ValueError: If there are several items, or no arrays.
    """
    ocp = orbax()
    item = _item_of(path)
    if item is None:
        return None
    with named(item), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        found = reader.metadata(item)
        found = getattr(found, "item_metadata", found)
        tree = getattr(found, "tree", found)
    if not jax.tree.leaves(tree):
        raise ValueError(f"{item} is not an Orbax checkpoint of arrays.")
    entries, structure = jax.tree.flatten_with_path(tree)
    leaves = [
        Leaf(path_of(keys), tuple(x.shape), str(jnp.dtype(x.dtype)))
        for keys, x in entries
    ]

    def read(indices: list[int]) -> list[np.ndarray]:
        if not indices:
            return []
        wanted: list[Any] = [ocp.PLACEHOLDER] * len(leaves)
        how = [ocp.RestoreArgs(restore_type=np.ndarray)] * len(leaves)
        for i in indices:
            wanted[i] = np.empty(leaves[i].shape, jnp.dtype(leaves[i].dtype))
        args = ocp.args.PyTreeRestore(
            item=structure.unflatten(wanted), restore_args=structure.unflatten(how)
        )
        with named(item), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            restored = structure.flatten_up_to(reader.restore(item, args=args))
        return [np.asarray(restored[i]) for i in indices]

    def parts(i: int, scratch: Scratch) -> Parts:
        if is_remote(item):
            return parts_of_copy(read([i])[0], scratch())
        return parts_of(item, entries[i][1].name, scratch)

    return Checkpoint(leaves, read, parts, metadata={})


def _item_of(path: str) -> str | None:
    """The directory of the arrays: the path itself, or the one item in it."""
    if is_remote(path):
        return path
    path = os.path.abspath(path)
    if os.path.exists(os.path.join(path, METADATA)):
        return path
    items = sorted(p.parent.name for p in Path(path).glob(f"*/{METADATA}"))
    if len(items) > 1:
        raise ValueError(f"{path} holds several items; pass one of {path}/{items}.")
    return os.path.join(path, items[0]) if items else None
