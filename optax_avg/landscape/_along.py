"""What measures at a point and surfaces share: losses, moves, progress."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_avg import _numerics

Loss = Callable[[Any], jax.Array]
Progress = Callable[[int, int], Any]


def moved(params: Any, factor: Any, direction: Any) -> Any:
    """``x + c d`` in the dtype of ``x``."""
    return jax.tree.map(
        lambda x, d: (_numerics.wide(x) + factor * d).astype(x.dtype), params, direction
    )


def report(progress: Progress | None, done: jax.Array, total: int) -> None:
    """Calls ``progress(done, total)`` from inside compiled code."""
    if progress is not None:
        jax.debug.callback(lambda done: progress(int(done), total), done)


def mapped(f: Callable[[Any], Any], xs: Any, progress: Progress | None) -> Any:
    """``lax.map`` that reports."""
    total = len(jax.tree.leaves(xs)[0])

    def one(numbered):
        i, x = numbered
        value = f(x)
        report(progress, i + 1, total)
        return value

    return lax.map(one, (jnp.arange(total), xs))
