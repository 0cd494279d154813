"""Merges of trees, leaf by leaf, in float32 or wider.

    x = combine(find(x_1, ..., x_n), x_1, ..., x_n)

A :class:`Rule` is such a merge of one leaf, which may come slice by slice: ``combine``
goes element by element.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.tree_util import KeyPath
from jax.typing import ArrayLike

from optax_avg import _leaves, _numerics
from optax_avg._checkpoints.leaves import ONLY, Leaf, difference

__all__ = [
    "Found",
    "Rule",
    "Slices",
    "Weights",
    "check_alike",
    "check_fault",
    "checked_weights",
    "merged",
    "total",
    "weighted_sum",
    "widened",
]

# Slices of one leaf in all trees, in order, as arrays of any dtype. Each call begins
# again at the first element.
Slices = Callable[[], Iterator[Sequence[ArrayLike]]]
# What a rule must know of a whole leaf: None, arrays, or a tuple of them.
Found = Any
# What JAX knows of the containers of a tree.
Structure = Any
# One weight for each model.
Weights = Sequence[float] | np.ndarray | jax.Array

_T = TypeVar("_T")


class Rule(NamedTuple):
    """A merge of one leaf of several trees.

    Attributes:
      combine: Takes what was found and a slice of each tree, and returns the merged
        slice.
      find: Takes all slices and returns what ``combine`` must know of the whole leaf.
      after: Takes what was found and a number of elements, and returns what ``combine``
        must know of a slice that begins after so many.
      fault: Whether a slice holds what cannot be merged; None if there is no such
        thing.
      complaint: What must hold of every leaf, for the error if ``fault`` is true.
    """

    combine: Callable[[Found, list[jax.Array]], jax.Array]
    find: Callable[[Slices], Found] = lambda slices: None
    after: Callable[[Found, int], Found] = lambda found, start: found
    fault: Callable[[list[jax.Array]], jax.Array] | None = None
    complaint: str = ""


def check_fault(rule: Rule, fault: jax.Array | bool, name: str) -> None:
    """Raises a ValueError if the rule found fault with a leaf; never under ``jit``."""
    if not isinstance(fault, Tracer) and bool(fault):
        raise ValueError(f"{rule.complaint}; this does not hold at {name}.")


def widened(leaves: Sequence[ArrayLike]) -> list[jax.Array]:
    """The leaves in float32 or wider."""
    return [_numerics.wide(jnp.asarray(x)) for x in leaves]


def checked_weights(n: int, weights: Weights | None) -> np.ndarray | jax.Array:
    """Weights that sum to one.

    Args:
      n: Number of models.
      weights: One for each model; by default all are equal.

    Returns:
      The weights, float64 of shape (n,); traced ones as they are.

    Raises:
      ValueError: If there are not ``n`` weights, or their sum is not one.
    """
    weights = [1 / max(n, 1)] * n if weights is None else weights
    if len(weights) != n:
        raise ValueError(f"{n} models need as many weights, got {weights}.")
    try:
        w = np.asarray(weights, np.float64)
    except (
        jax.errors.TracerArrayConversionError,
        jax.errors.ConcretizationTypeError,
    ):
        return jnp.stack([jnp.asarray(w) for w in weights])
    if len(w) and not abs(w.sum() - 1) < 1e-6 * max(1, np.abs(w).sum()):
        raise ValueError(f"weights must sum to one, got a sum of {w.sum():g}.")
    return w


def check_alike(models: Sequence[optax.Params]) -> None:
    """Raises a ValueError that names the first leaf in which two models differ."""
    if not isinstance(models, Sequence) or any(isinstance(m, str) for m in models):
        raise ValueError(
            "models are passed as a list of trees, such as uniform([a, b]) or "
            f"uniform(list(models.values())), not as {type(models).__name__}."
        )
    if not models:
        raise ValueError("there are no models; pass a list with at least one.")
    first, structure = _described(models[0])
    for t, model in enumerate(models[1:], start=1):
        found, other = _described(model)
        odd = difference(first, found, "the first tree")
        if odd:
            raise ValueError(f"tree {t} {odd}; the trees must be alike.")
        if structure != other:
            raise ValueError(
                f"tree {t} has another structure than the first tree: {other}; the "
                "trees must be alike."
            )


def merged(
    rule: Rule, trees: Sequence[optax.Params], found: Mapping[int, Found] | None = None
) -> optax.Params:
    """Merges trees leaf by leaf; leaves that are not floats come from the first.

    Args:
      rule: Merge of a leaf.
      trees: Models and the other trees that the rule takes.
      found: What the rule would find in each leaf, by the index of the leaf; by default
        it searches for it.

    Returns:
      A tree like the first.

    Raises:
      ValueError: If the trees differ, or the rule finds fault with a leaf.
    """
    check_alike(trees)
    paths, structure = jax.tree.flatten_with_path(trees[0])
    columns = zip(*(jax.tree.leaves(tree) for tree in trees), strict=True)
    made = []
    for i, ((path, first), leaves) in enumerate(zip(paths, columns, strict=True)):
        if not _leaves.is_float(first):
            made.append(first)
            continue
        xs = widened(leaves)
        if rule.fault is not None:
            check_fault(rule, rule.fault(xs), _name(path))
        known = rule.find(lambda xs=xs: iter([xs])) if found is None else found[i]
        made.append(rule.combine(known, xs).astype(jnp.result_type(first)))
    return structure.unflatten(made)


def _described(tree: optax.Params) -> tuple[list[Leaf], Structure]:
    """The leaves of a tree as those of a checkpoint, with the names that JAX gives."""
    entries, structure = jax.tree.flatten_with_path(tree)
    leaves = [
        Leaf((_name(path),), jnp.shape(x), str(jnp.result_type(x)))
        for path, x in entries
    ]
    return leaves, structure


def _name(path: KeyPath) -> str:
    """A key path, in words if the leaf is the whole tree."""
    return jax.tree_util.keystr(path) or ONLY


def total(
    slices: Slices,
    of: Callable[[list[jax.Array]], _T],
    join: Callable[[_T, _T], _T],
) -> _T:
    """What ``of`` finds in each slice, joined over all slices."""
    return functools.reduce(join, (of(widened(xs)) for xs in slices()))


def weighted_sum(
    w: Weights | Sequence[jax.Array], xs: Sequence[jax.Array]
) -> jax.Array:
    """``sum_t w_t x_t`` with one weight for each vector."""
    terms = (jnp.asarray(a, x.dtype) * x for a, x in zip(w, xs, strict=True))
    return jnp.asarray(sum(terms))
