"""Gradients as lists of leaves, and the factors that they are multiplied by."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_avg import _leaves
from optax_avg.robust._options import Number

# An array, None or optax.MaskedNode.
Leaf = Any
# A tree of arrays, such as gradients or one row of stacked gradients.
Tree = Any
# A jax.tree_util.PyTreeDef, which type checkers take for a variable.
Structure = Any
# Arrays by the position of their leaf among all leaves of a tree.
ByPosition = dict[int, jax.Array]


def flatten(tree: Tree) -> tuple[list[Leaf], Structure]:
    """The leaves of a tree, absent ones included, and its structure."""
    return jax.tree.flatten(tree, is_leaf=_leaves.is_absent)


def flatten_with_names(tree: Tree) -> list[tuple[str, Leaf]]:
    """The leaves of updates, absent ones included, with names for messages."""
    paths = jax.tree.flatten_with_path(tree, is_leaf=_leaves.is_absent)[0]
    return [(f"updates{jax.tree_util.keystr(path)}", leaf) for path, leaf in paths]


def positions(leaves: list[Leaf]) -> list[int]:
    """Where there is a floating gradient."""
    return [i for i, leaf in enumerate(leaves) if _leaves.is_gradient(leaf)]


def positions_in_both(gradients: list[Leaf], kept: list[Leaf]) -> list[int]:
    """Where neither a gradient nor what a state keeps of it is absent.

    Raises:
      ValueError: If the numbers of leaves differ.
    """
    check_number(len(gradients), len(kept))
    return [
        i
        for i, pair in enumerate(zip(gradients, kept, strict=True))
        if not any(_leaves.is_absent(leaf) for leaf in pair)
    ]


def check_number(gradients: int, kept: int) -> None:
    """Raises unless there are as many gradients as leaves in the state.

    Raises:
      ValueError: If there are not.
    """
    if gradients != kept:
        raise ValueError(
            f"{gradients} gradients for a state of {kept} leaves; pass gradients like "
            "the parameters of init."
        )


def counter() -> jax.Array:
    """A counter at zero."""
    return jnp.zeros([], jnp.int32)


def check_alike(gradients: Tree, kept: Tree) -> None:
    """Raises unless gradients have the names and shapes of what a state keeps.

    Raises:
      ValueError: If they do not, naming the first leaf that differs.
    """
    named, old = (
        jax.tree.flatten_with_path(tree, is_leaf=_leaves.is_absent)[0]
        for tree in (gradients, kept)
    )
    check_number(len(named), len(old))
    for (path, x), (theirs, y) in zip(named, old, strict=True):
        ours, other = (jax.tree_util.keystr(p) for p in (path, theirs))
        if not _leaves.same_names(path, theirs):
            raise ValueError(
                f"updates{ours} stands where the state has {other}; pass gradients "
                "like the parameters of init."
            )
        if _leaves.is_absent(x) or _leaves.is_absent(y):
            continue
        if jnp.shape(x) != jnp.shape(y):
            raise ValueError(
                f"updates{ours} has shape {jnp.shape(x)} and the state {jnp.shape(y)}; "
                "pass gradients like the parameters of init."
            )


def quotient(a: Number, b: jax.Array, otherwise: float = 0) -> jax.Array:
    """``a/b`` where ``b > 0``, and a given number elsewhere."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), otherwise)


def clip_factor(limit: Number, size: jax.Array) -> jax.Array:
    """``min(1, limit/size)``, 1 at size 0."""
    return jnp.where(size > limit, limit / jnp.where(size > 0, size, 1), 1)


def equal_weights(valid: jax.Array) -> jax.Array:
    """Weights of the mean over the valid rows; zeros if there are none."""
    return valid / jnp.maximum(jnp.sum(valid), 1)
