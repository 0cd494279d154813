"""Leaves of a checkpoint: arrays by path, groups by bytes, differences in words."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath

# The names of a leaf's containers, from the outermost to its own.
Path = tuple[str, ...]
# Dicts in dicts, with leaves of any kind at the ends.
Nested = dict[str, Any]

_T = TypeVar("_T")


class Leaf(NamedTuple):
    """An array in a checkpoint.

    Attributes:
      path: Names of the containers, and of the array in the last one.
      shape: Shape of the array.
      dtype: Name of its dtype.
      fingerprint: Number by which a snapshot recognises the array; None elsewhere.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str
    fingerprint: int | None = None

    @property
    def name(self) -> str:
        """The path as one string, joined by dots."""
        return ".".join(self.path)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.size * jnp.dtype(self.dtype).itemsize


def path_of(keys: KeyPath) -> Path:
    """A key path of JAX as names; the one leaf that is the whole tree is ``value``."""
    names = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
    return names or ("value",)


def nested(leaves: Mapping[Path, object]) -> Nested:
    """Nested dicts of leaves by path.

    Raises:
      ValueError: If a leaf lies inside another one.
    """
    root: Nested = {}
    for path, leaf in leaves.items():
        node = root
        for name in path[:-1]:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ValueError(f"{'.'.join(path)} lies in {name}, an array.")
        if path[-1] in node:
            raise ValueError(f"{'.'.join(path)} is an array; others lie in it.")
        node[path[-1]] = leaf
    return root


def flat(tree: Nested | _T, path: Path = ()) -> dict[Path, _T]:
    """Leaves of nested dicts by path."""
    if not isinstance(tree, dict):
        return {path: tree}
    leaves = {}
    for key, part in tree.items():
        leaves |= flat(part, (*path, key))
    return leaves


def batches(sizes: Iterable[int], most: int) -> list[list[int]]:
    """Indices of neighbours in groups of at most ``most`` bytes each.

    A leaf with more bytes is a group of its own.

    Args:
      sizes: Bytes of each leaf.
      most: Largest number of bytes of a group.

    Returns:
      Groups of indices, in order.
    """
    groups: list[list[int]] = []
    total = 0
    for i, size in enumerate(sizes):
        if not groups or total + size > most:
            groups.append([])
            total = 0
        groups[-1].append(i)
        total += size
    return groups


ONLY = "the only leaf"  # name of a leaf that is the whole tree


def difference(ours: Sequence[Leaf], theirs: Sequence[Leaf], first: str) -> str:
    """Says what distinguishes the second list from the first one.

    Leaves are compared by name. Dtypes may differ, except that what is complex does not
    fit what is real.

    Args:
      ours: Leaves of the first tree.
      theirs: Leaves of the other tree.
      first: What the first tree is called.

    Returns:
      A predicate such as ``has no leaf w, which the first has``, ``""`` if the lists
      are alike.
    """
    known, found = ({leaf.name: leaf for leaf in leaves} for leaves in (ours, theirs))
    if ONLY in known and ONLY not in found:
        return f"is not a single leaf, as {first} is"
    if ONLY in found and ONLY not in known:
        return f"is a single leaf, which {first} is not"
    for name, leaf in known.items():
        if name not in found:
            return f"has no leaf {name}, which {first} has"
        other = found[name]
        if other.shape != leaf.shape:
            return f"has shape {other.shape} at {name}, where {first} has {leaf.shape}"
        if "complex" in other.dtype and "float" in leaf.dtype:
            return f"is {other.dtype} at {name}, where {first} is {leaf.dtype}"
    for name in found:
        if name not in known:
            return f"has a leaf {name}, which {first} does not have"
    return ""
