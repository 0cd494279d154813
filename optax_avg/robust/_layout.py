"""How a tree of stacked gradients becomes rows, and a combination a tree again.

The rows ``v_1 ... v_n`` lie along an axis of the leaves or on the devices. Small leaves
are joined. Across devices each one holds all rows of its share of the coordinates.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_avg import _leaves, _mesh
from optax_avg.robust._gradients import (
    ByPosition,
    Leaf,
    Tree,
    check_axis,
    check_number,
    flatten,
    flatten_with_names,
)
from optax_avg.robust._options import AxisName

SMALL = 2**14  # elements a row; smaller leaves are joined, to be one program each


class Layout(NamedTuple):
    """Where the rows of each leaf lie.

    Attributes:
      groups: Positions of the leaves that are joined, one list for each array of rows.
      shapes: Shape of one row of each of these leaves, by position.
      number: Number of leaves of the tree, absent ones included.
      axis_name: Axis of the devices that share the coordinates, or None.
    """

    groups: list[list[int]]
    shapes: dict[int, tuple[int, ...]]
    number: int
    axis_name: AxisName


def rows_of(
    updates: optax.Updates, axis: int | None, axis_name: AxisName
) -> tuple[Layout, list[jax.Array], Tree]:
    """The rows of a tree of gradients.

    Returns:
      The layout; arrays of shape (n, ...); and a tree like one row, in the dtypes of
      the gradients.

    Raises:
      NotStackedError: If a leaf has no axis of elements.
      ValueError: If a leaf has another length along it.
    """
    names = flatten_with_names(updates)
    leaves, structure = flatten(updates)
    stacked = _stacked(names, axis)
    shapes = {i: x.shape[1:] for i, x in stacked.items()}
    layout = Layout(_groups(stacked), shapes, len(leaves), axis_name)
    blank = structure.unflatten(
        x if _leaves.is_absent(x) or i in stacked else _first(name, x, axis)
        for i, (name, x) in enumerate(names)
    )
    rows = [_join([stacked[i] for i in group]) for group in layout.groups]
    if axis_name is not None:
        rows = [_exchanged(_padded(x, axis_name), axis_name) for x in rows]
    return layout, rows, blank


def arrange(layout: Layout, tree: Tree) -> list[jax.Array]:
    """A tree like one row in the layout of the rows."""
    parts = _parts(layout, tree)
    joined = [_join([parts[i][None] for i in group]) for group in layout.groups]
    if layout.axis_name is None:
        return [x[0] for x in joined]
    here = lax.axis_index(layout.axis_name)
    return [
        lax.dynamic_index_in_dim(_padded(x, layout.axis_name)[0], here, keepdims=False)
        for x in joined
    ]


def place(layout: Layout, located: list[jax.Array], tree: Tree) -> Tree:
    """Puts leaves in the layout of the rows into a tree like one row, in its dtypes."""
    new = _parts(layout, tree)
    for group, x in zip(layout.groups, located, strict=True):
        if layout.axis_name is not None:
            x = _mesh.everywhere(x, layout.axis_name).reshape(-1)
        begin = 0
        for i in group:
            shape = layout.shapes[i]
            size = math.prod(shape)
            whole = len(group) == 1 and layout.axis_name is None
            part = x if whole else x[begin : begin + size]
            part = part if part.shape == shape else part.reshape(shape)
            new[i] = part.astype(new[i].dtype)
            begin += size
    return jax.tree.structure(tree, is_leaf=_leaves.is_absent).unflatten(new)


def _stacked(names: list[tuple[str, Leaf]], axis: int | None) -> ByPosition:
    """The floating leaves by position, with the elements along the first axis."""
    found: ByPosition = {}
    for i, (name, x) in enumerate(names):
        if not _leaves.is_gradient(x):
            continue
        if axis is not None:
            check_axis(name, x, axis)
        found[i] = jnp.expand_dims(x, 0) if axis is None else jnp.moveaxis(x, axis, 0)
        n = next(iter(found.values())).shape[0]
        if found[i].shape[0] != n:
            raise ValueError(
                f"{name} has {found[i].shape[0]} elements, other leaves have {n}; pass "
                "gradients of the same elements."
            )
    return found


def _parts(layout: Layout, tree: Tree) -> list[Leaf]:
    leaves, _ = flatten(tree)
    check_number(layout.number, len(leaves))
    return leaves


def _first(name: str, x: Leaf, axis: int | None) -> Leaf:
    """The first row of a leaf that is not floating, such as a counter."""
    if axis is None:
        return x
    check_axis(name, x, axis)
    if x.dtype == jax.dtypes.float0:
        return np.take(x, 0, axis)
    return lax.index_in_dim(jnp.asarray(x), 0, axis, keepdims=False)


def _groups(stacked: ByPosition) -> list[list[int]]:
    """Positions of the leaves that are joined: the small ones of one dtype."""
    groups: dict[str | int, list[int]] = {}
    for i, x in stacked.items():
        small = _mesh.is_local(x) and x[0].size < SMALL
        groups.setdefault(str(x.dtype) if small else i, []).append(i)
    return list(groups.values())


def _join(leaves: list[jax.Array]) -> jax.Array:
    """Leaves (rows, ...) side by side, shape (rows, d); a sharded one as it is."""
    if len(leaves) == 1 and not _mesh.is_local(leaves[0]):
        return leaves[0]
    flat = [x.reshape(x.shape[0], math.prod(x.shape[1:])) for x in leaves]
    return flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=1)


def _padded(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """(rows, d) as (rows, devices, d / devices), filled up with zeros."""
    devices = lax.axis_size(axis_name)
    width = -(-x.shape[1] // devices)
    return jnp.pad(x, ((0, 0), (0, devices * width - x.shape[1]))).reshape(
        x.shape[0], devices, width
    )


def _exchanged(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Own rows of all coordinates for all rows of own coordinates, (n, width)."""
    x = _mesh.vary(x, _mesh.axis_names(axis_name))
    received = lax.all_to_all(x, axis_name, split_axis=1, concat_axis=0, tiled=True)
    return received.reshape(-1, x.shape[-1])
