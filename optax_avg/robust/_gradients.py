"""Gradients as lists of leaves: their checks, and the factors they are multiplied by.

Of stacked gradients each device or element must have its own, of the shape of the
parameters.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_avg import _leaves, _mesh
from optax_avg.robust._options import AxisName, Number

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


class NotStackedError(ValueError):
    """Gradients that should be those of several elements have no axis of elements."""


def check_axis(name: str, x: Leaf, axis: int) -> None:
    """Raises if a leaf has no axis of elements.

    Raises:
      NotStackedError: If it has none.
    """
    if not -jnp.ndim(x) <= axis < jnp.ndim(x):
        raise NotStackedError(
            f"{name} of shape {jnp.shape(x)} has no axis {axis} of elements; pass "
            "stacked gradients, as from jax.vmap, or per_elt_axis=None with an "
            "axis_name."
        )


def check_rows(
    updates: optax.Updates,
    params: optax.Params | None,
    axis: int | None,
    axis_name: AxisName,
) -> None:
    """Raises if gradients cannot be those of the elements.

    Raises:
      ValueError: If ``axis_name`` is not mapped, if a leaf does not vary over it, or if
        its shape is not that of its parameter with the axis of elements.
      NotStackedError: If it has the shape of its parameter, without such an axis.
    """
    leaves = flatten_with_names(updates)
    if axis_name is not None:
        _mesh.require_mapped(_mesh.axis_names(axis_name))
        gradients = [(name, x) for name, x in leaves if _leaves.is_gradient(x)]
        _mesh.require_own(gradients, _mesh.axis_names(axis_name))
    if params is None:
        return
    parts = _leaves.parts_like(updates, params)
    if len(parts) != len(leaves):
        raise ValueError(
            f"updates has {len(leaves)} leaves and params {len(parts)}; pass gradients "
            "of these parameters."
        )
    for (name, x), part in zip(leaves, parts, strict=True):
        if _leaves.is_gradient(x) and _leaves.is_gradient(part):
            _check_shape(name, jnp.shape(x), jnp.shape(part), axis)


def _check_shape(
    name: str, stacked: tuple[int, ...], shape: tuple[int, ...], axis: int | None
) -> None:
    """Raises unless the shape is that of the parameter with the axis of elements."""
    row = list(stacked)
    if axis is None:
        advice = "pass each device's own gradient, or per_elt_axis=0 for several."
    elif -len(row) <= axis < len(row):
        advice = (
            f"axis {axis} must number the elements: take gradients by jax.vmap("
            "jax.grad(loss), (None, 0)) or the like."
        )
        del row[axis]
    else:
        return  # without the axis there is no stack
    if tuple(row) != shape:
        kind = NotStackedError if axis is not None and stacked == shape else ValueError
        raise kind(
            f"{name} has shape {stacked} for a parameter of shape {shape}; {advice}"
        )
