"""Averages and sharpness in the terms of a framework: Flax nnx, Flax linen, Equinox.

A module is imported when it is first asked for, as in ``oa.frameworks.nnx``. Neither
the library nor this package needs one of the frameworks.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers cannot see in __getattr__
    from optax_avg.frameworks import equinox, linen, nnx

__all__ = ["equinox", "linen", "nnx"]


def __getattr__(name: str) -> ModuleType:
    """The module of one framework."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
