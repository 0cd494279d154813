"""Whether the gradients of elements are what they should be, before they are combined.

Each device or element must have its own, of the shape of the parameters.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_avg import _leaves, _mesh
from optax_avg.robust._stack import NotStackedError, axis_names


def check_rows(updates: Any, params: Any, axis: int | None, axis_name: Any) -> None:
    """Raises where the gradients of the elements cannot be what they should be.

    Raises:
      ValueError: If a leaf does not vary over ``axis_name``, or has another shape than
        its parameter with the axis of elements.
      NotStackedError: If it has the shape of its parameter, without such an axis.
    """
    leaves = [
        (f"updates{jax.tree_util.keystr(path)}", x)
        for path, x in jax.tree.flatten_with_path(updates, is_leaf=_leaves.is_absent)[0]
    ]
    gradients = [(name, x) for name, x in leaves if _leaves.is_gradient(x)]
    if axis_name is not None:
        _check_varying(gradients, axis_names(axis_name))
    if params is None:
        return
    parts = _leaves.parts_like(updates, params)
    if len(parts) != len(leaves):
        raise ValueError(
            f"updates has {len(leaves)} leaves and params {len(parts)}; pass gradients "
            "of these parameters."
        )
    advice = (
        "pass each device's own gradient, or per_elt_axis=0 for several elements."
        if axis is None
        else f"axis {axis} must number the elements: take gradients by jax.vmap(jax."
        "grad(loss), (None, 0)) or the like."
    )
    for (name, x), part in zip(leaves, parts, strict=True):
        if not (_leaves.is_gradient(x) and _leaves.is_gradient(part)):
            continue
        shape = list(jnp.shape(x))
        if axis is not None and -len(shape) <= axis < len(shape):
            del shape[axis]
        elif axis is not None:
            continue  # without the axis there is no stack
        if tuple(shape) != jnp.shape(part):
            alike = axis is not None and jnp.shape(x) == jnp.shape(part)
            raise (NotStackedError if alike else ValueError)(
                f"{name} has shape {jnp.shape(x)} for a parameter of shape "
                f"{jnp.shape(part)}; {advice}"
            )


def _check_varying(gradients: list[tuple[str, Any]], names: tuple[Any, ...]) -> None:
    """Raises if a gradient is the same on all devices, by its type in ``shard_map``.

    Types say nothing with ``check_vma=False`` and under ``vmap`` or ``pmap``: then the
    index of the device does not vary either.
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
