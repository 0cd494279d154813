"""Where arrays lie: meshes, ``shard_map``, axes over which values differ."""

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

AxisName = Hashable | Sequence[Hashable]  # one mapped axis, or several


def axis_names(axes: AxisName | None) -> tuple[Hashable, ...]:
    """The names of mapped axes as a tuple, empty if there is none."""
    if axes is None:
        return ()
    return tuple(axes) if isinstance(axes, (tuple, list)) else (axes,)


def require_mapped(axes: Sequence[Any]) -> None:
    """Raises unless all axes are mapped where this is called.

    Raises:
      ValueError: If one is not, naming it.
    """
    for name in axes:
        try:
            lax.axis_index(name)
        except NameError as error:
            raise ValueError(
                f"axis_name={name!r} is not mapped here; call this inside "
                "jax.shard_map, jax.pmap or jax.vmap over this axis, or leave "
                "axis_name out."
            ) from error


def is_local(x: jax.Array) -> bool:
    """Whether reshaping moves nothing between devices."""
    return bool(jax.typeof(x).sharding.mesh.empty) or bool(
        jax.sharding.get_abstract_mesh().manual_axes
    )


def agreed(condition: jax.Array) -> jax.Array:
    """Whether it holds on all devices of ``shard_map`` over which it differs."""
    axes = varying_axes(condition)
    return lax.pmin(condition.astype(jnp.int32), axes) > 0 if axes else condition


def varying_axes(x: jax.Array) -> tuple[str, ...]:
    """Mesh axes over which ``x`` differs inside ``shard_map(check_vma=True)``."""
    kind: Any = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):
        return tuple(kind.manual_axis_type.varying)
    return tuple(getattr(kind, "vma", ()))  # before jax 0.10


def vary(x: Any, axes: tuple[Hashable, ...]) -> Any:
    """A value that is replicated over axes of ``shard_map`` as each device's own."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    have = varying_axes(x)
    missing = tuple(name for name in axes if name in manual and name not in have)
    if not missing:
        return x
    namespace: Any = lax
    if hasattr(lax, "pcast"):
        return namespace.pcast(x, missing, to="varying")
    return namespace.pvary(x, missing)  # before jax 0.9


def everywhere(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """``x`` of every device on every device, alike on all: shape (devices, ...)."""
    x = vary(x, axis_names(axis_name))
    namespace: Any = lax
    if not varying_axes(x):
        return lax.all_gather(x, axis_name)
    if hasattr(lax, "all_gather_invariant"):  # before jax 0.10
        return namespace.all_gather_invariant(x, axis_name)
    return namespace.all_gather(x, axis_name, to="invarying")


def require_own(gradients: Sequence[tuple[str, Any]], axes: Sequence[Hashable]) -> None:
    """Raises if a gradient is the same on all devices, by its type in ``shard_map``.

    Types say nothing with ``check_vma=False`` and under ``vmap`` or ``pmap``. In these
    cases the index of the device does not vary either.

    Args:
      gradients: Names for the message, and arrays.
      axes: Names of mapped axes.

    Raises:
      ValueError: If there is one, naming it.
    """
    typed = [a for a in axes if a in varying_axes(lax.axis_index(a))]
    for name, x in gradients:
        same = [a for a in typed if a not in varying_axes(jnp.asarray(x))]
        if same:
            over = repr(same[0] if len(same) == 1 else tuple(same))
            raise ValueError(
                f"{name} does not vary over {over}: jax.grad has summed it over the "
                "devices, so that there is nothing left to choose from. Take gradients "
                f"at jax.lax.pcast(params, {over}, to='varying'), or pass "
                "check_vma=False to shard_map."
            )


def require_memory(kind: str) -> None:
    """Raises unless the devices of this process have a kind of memory.

    Raises:
      ValueError: If they do not, naming those that they have.
    """
    device = jax.local_devices()[0]
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if kind not in kinds:
        raise ValueError(
            f"memory_kind={kind!r}: devices of the backend {device.platform!r} do not "
            f"have it, they have {kinds}; leave memory_kind out."
        )


def unsharded(x: jax.Array) -> jax.Array:
    """A copy on every device under explicit sharding, for what takes no other."""
    return jax.sharding.reshard(x, PartitionSpec()) if any(_spec(x)) else x


def sharded_like(x: jax.Array, y: jax.Array) -> jax.Array:
    """``y`` in the explicit sharding of ``x``."""
    return jax.sharding.reshard(y, PartitionSpec(*_spec(x))) if any(_spec(x)) else y


def _spec(x: jax.Array) -> tuple[Any, ...]:
    sharding: Any = jax.typeof(x).sharding
    return tuple(sharding.spec)
