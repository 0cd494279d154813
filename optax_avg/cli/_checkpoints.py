"""Checkpoints read leaf by leaf: Orbax, safetensors files, Hugging Face folders.

No more than the leaves that are asked for is in memory.
"""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_avg.cli._huggingface import (
    INDEX,
    SINGLE,
    check_not_pickled,
    folder_of,
    open_huggingface,
)
from optax_avg.cli._orbax_reads import parts_of, parts_of_copy
from optax_avg.cli._safetensors import SUFFIX, open_safetensors
from optax_avg.cli._sources import Checkpoint, Leaf, named, part_of
from optax_avg.posthoc import _disk


def open_checkpoint(path: str, only: str | None = None) -> Checkpoint:
    """A checkpoint at a path; ``only`` is the subtree to keep, with dots.

    Raises:
      ValueError: If there is none, or no such subtree.
    """
    if not path:
        raise ValueError("the path of a checkpoint is empty.")
    if not _disk.is_remote(path) and not os.path.exists(path):
        raise ValueError(f"there is no checkpoint at {path}.")
    if not _disk.is_remote(path) and not os.access(path, os.R_OK):
        raise PermissionError(f"you may not read {path}.")
    whole = _opened(path)
    if only is None:
        return whole
    head = tuple(only.split("."))
    kept = [i for i, leaf in enumerate(whole.leaves) if leaf.path[: len(head)] == head]
    if not kept:
        tops = sorted({leaf.path[0] for leaf in whole.leaves})
        raise ValueError(f"{path} has no subtree {only!r}; at its top are {tops}.")
    leaves = [
        whole.leaves[i]._replace(path=whole.leaves[i].path[len(head) :] or ("value",))
        for i in kept
    ]
    return part_of(whole, kept, leaves)


def _opened(path: str) -> Checkpoint:
    if path.endswith(SUFFIX) and not os.path.isdir(path):
        return open_safetensors(path)
    if folder_of(path):
        return open_huggingface(path)
    return _orbax(path)


def _orbax(path: str) -> Checkpoint:
    ocp = _disk.orbax()
    path = _item_of(path)
    with named(path), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        found = reader.metadata(path)
        found = getattr(found, "item_metadata", found)
        tree = getattr(found, "tree", found)
    if not jax.tree.leaves(tree):
        raise ValueError(f"{path} is not an Orbax checkpoint of arrays.")
    entries, structure = jax.tree.flatten_with_path(tree)
    leaves = [
        Leaf(_disk.path_of(keys), tuple(x.shape), str(jnp.dtype(x.dtype)))
        for keys, x in entries
    ]

    def read(indices):
        if not indices:
            return []
        item: list[Any] = [ocp.PLACEHOLDER] * len(leaves)
        how = [ocp.RestoreArgs(restore_type=np.ndarray)] * len(leaves)
        for i in indices:
            item[i] = np.empty(leaves[i].shape, jnp.dtype(leaves[i].dtype))
        args = ocp.args.PyTreeRestore(
            item=structure.unflatten(item), restore_args=structure.unflatten(how)
        )
        with named(path), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            restored = structure.flatten_up_to(reader.restore(path, args=args))
        return [np.asarray(restored[i]) for i in indices]

    def parts(i, scratch):
        if _disk.is_remote(path):
            return parts_of_copy(read([i])[0], scratch())
        return parts_of(path, entries[i][1].name, scratch)

    return Checkpoint(leaves, read, parts, metadata={})


def _item_of(path: str) -> str:
    """The directory of the arrays: the path itself, or the one item in it."""
    path = path if _disk.is_remote(path) else os.path.abspath(path)
    if _disk.is_remote(path) or os.path.exists(os.path.join(path, "_METADATA")):
        return path
    items = sorted(p.parent.name for p in Path(path).glob("*/_METADATA"))
    if len(items) == 1:
        return os.path.join(path, items[0])
    if items:
        raise ValueError(f"{path} holds several items; pass one of {path}/{items}.")
    check_not_pickled(path)
    raise ValueError(
        f"{path} is neither an Orbax checkpoint nor a {SUFFIX} file, nor a folder with "
        f"{SINGLE} or {INDEX}."
    )
