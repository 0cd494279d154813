"""Arguments that the transformations of this room share, and their checks."""

from collections.abc import Callable, Hashable
from typing import Any, Literal, ParamSpec, TypedDict, TypeVar

import jax

from optax_avg import _options
from optax_avg._options import Option

P = ParamSpec("P")
T = TypeVar("T")

INFINITY = float("inf")

# A Python number, or a traced one, as from optax.inject_hyperparams.
Number = float | jax.Array
# The name of a mesh axis or a tuple of names; None where there are no devices.
AxisName = Hashable | None
# All leaves, each leaf, or a tree of labels like a prefix of the gradients.
Scope = Literal["global", "leaf"] | Any
Start = Literal["first", "zeros"]


class ScopeOption(TypedDict, total=False):
    """Option of norms that are taken over groups of leaves."""

    scope: Scope


class LocationOptions(ScopeOption, total=False):
    """Options of every location over iterations."""

    init: Start


class RowOptions(TypedDict, total=False):
    """Options of every aggregator."""

    per_elt_axis: int | None
    axis_name: AxisName


class OnePassOptions(LocationOptions, RowOptions, total=False):
    """Options of a location over the elements."""


_OPTIONS = {
    "scope": Option(
        "global",
        """Leaves that share a norm and an adaptive radius: ``"global"`` for all,
  ``"leaf"`` for each alone, or a tree of labels like a prefix of the gradients, one
  group for each label.""",
    ),
    "init": Option(
        "first",
        """Where the location starts: ``"first"`` for the first finite gradient, or
  ``"zeros"``.""",
    ),
    "per_elt_axis": Option(
        None,
        """Axis of the elements: of examples, micro-batches, workers or objectives.
  The default is 0, or no axis with ``axis_name``, where each device holds one
  element.""",
    ),
    "axis_name": Option(
        None,
        """Name of the axis of devices, inside ``shard_map`` or ``pmap``. The gradients
  must differ over it: take them at ``jax.lax.pcast(params, axis_name,
  to="varying")``, or ``jax.grad`` sums them over the devices.""",
    ),
}
_OF_ROWS = """ValueError: In ``update``, if ``axis_name`` is not mapped, or if the
  gradients are the same on all devices of ``axis_name``. The types of ``shard_map``
  say so with ``check_vma=True``; under ``pmap`` and ``vmap`` it cannot be known. Also
  if ``update`` is called with ``params`` and the gradients do not have their shapes
  with an axis of elements; without ``params`` shapes are not checked."""


def with_scope(
    scope: Scope = "global",
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Completes a factory by :class:`ScopeOption`."""
    return _options.with_options(ScopeOption, _OPTIONS, scope=scope)


def with_location_options(factory: Callable[P, T]) -> Callable[P, T]:
    """Completes a factory by :class:`LocationOptions`."""
    return _options.with_options(LocationOptions, _OPTIONS)(factory)


def with_row_options(factory: Callable[P, T]) -> Callable[P, T]:
    """Completes a factory by :class:`RowOptions`."""
    return _options.with_options(RowOptions, _OPTIONS, raises=_OF_ROWS)(factory)


def with_one_pass_options(factory: Callable[P, T]) -> Callable[P, T]:
    """Completes a factory by :class:`OnePassOptions`."""
    return _options.with_options(OnePassOptions, _OPTIONS, raises=_OF_ROWS)(factory)
