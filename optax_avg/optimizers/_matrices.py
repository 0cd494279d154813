"""Matrices among the leaves: which they are, and norms over some of their axes."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_avg import _leaves, _numerics

# All axes of a leaf, or all but that of its channels.
Axes = tuple[int, ...]


def is_matrix(path: Any, leaf: Any) -> bool:
    """Whether a leaf has two axes or more."""
    del path
    return jnp.ndim(leaf) >= 2


def chosen(params: Any, where: _leaves.Where | None) -> Any:
    """The leaves inside ``where``, by default the matrices; others are masked."""
    return _leaves.select(params, is_matrix if where is None else where)


def rows(updates: optax.Updates, *trees: Any) -> tuple[Any, list[tuple[Any, ...]]]:
    """The structure of updates, and for each leaf what stands there in all trees.

    Absent leaves of the updates are counted.
    """
    leaves, structure = jax.tree.flatten(updates, is_leaf=_leaves.is_absent)
    parts = [structure.flatten_up_to(tree) for tree in trees]
    return structure, list(zip(leaves, *parts, strict=True))


def all_axes(x: jax.Array) -> Axes:
    """All axes of a leaf."""
    return tuple(range(x.ndim))


def other_axes(x: jax.Array, axis: int) -> Axes:
    """All axes of a leaf but one."""
    return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


def inner(a: jax.Array, b: jax.Array, axes: Axes) -> jax.Array:
    """Inner products over axes, which stay with length 1."""
    return jnp.sum(jnp.real(a * jnp.conj(b)), axes, keepdims=True)


def lengths(x: jax.Array, axes: Axes) -> jax.Array:
    """Norms over axes, which stay with length 1; no overflow, no underflow."""

    def squares(factors):
        y = x if factors is None else x * factors
        return inner(y, y, axes)

    return _numerics.square_roots(squares)


def unit(x: jax.Array, axes: Axes) -> jax.Array:
    """``x/|x|`` with norms over axes, 0 where ``x`` is 0."""
    size = lengths(x, axes)
    return x / jnp.where(size > 0, size, 1)
