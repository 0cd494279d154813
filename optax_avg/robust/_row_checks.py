"""Checks of the gradients of elements before they are combined.

Each device or element must have its own gradient, of the shape of the parameters.
"""

from typing import Any

import jax.numpy as jnp
import optax
from jax import lax

from optax_avg import _leaves, _mesh
from optax_avg.robust._gradients import Leaf, flatten_with_names
from optax_avg.robust._options import AxisName


class NotStackedError(ValueError):
    """Gradients that should be those of several elements have no axis of elements."""


def axis_names(axis_name: AxisName) -> tuple[Any, ...]:
    """One name or several as a tuple."""
    return tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)


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
        _mesh.require_mapped(axis_names(axis_name))
        gradients = [(name, x) for name, x in leaves if _leaves.is_gradient(x)]
        _check_varying(gradients, axis_names(axis_name))
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


def _check_varying(gradients: list[tuple[str, Leaf]], names: tuple[Any, ...]) -> None:
    """Raises if a gradient is the same on all devices, by its type in ``shard_map``.

    Types say nothing with ``check_vma=False`` and under ``vmap`` or ``pmap``. In these
    cases the index of the device does not vary either.
    """
    typed = [a for a in names if a in _mesh.varying_axes(lax.axis_index(a))]
    for name, x in gradients:
        same = [a for a in typed if a not in _mesh.varying_axes(jnp.asarray(x))]
        if same:
            over = repr(same[0] if len(same) == 1 else tuple(same))
            raise ValueError(
                f"{name} does not vary over {over}: jax.grad has summed it over the "
                "devices, so that there is nothing left to choose from. Take gradients "
                f"at jax.lax.pcast(params, {over}, to='varying'), or pass "
                "check_vma=False to shard_map."
            )
