"""What measures at a point and surfaces share: losses, mapped calls, progress."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

# From parameters to a scalar.
Loss = Callable[[optax.Params], jax.Array]
# Called with the amount of work done and the total amount.
Progress = Callable[[int, int], Any]


def report(progress: Progress | None, done: jax.Array, total: int) -> None:
    """Calls ``progress(done, total)`` from inside compiled code."""
    if progress is not None:
        jax.debug.callback(lambda done: progress(int(done), total), done)


def mapped(
    f: Callable[[Any], jax.Array], xs: Any, progress: Progress | None
) -> jax.Array:
    """``lax.map`` that reports its progress."""
    total = len(jax.tree.leaves(xs)[0])

    def one(numbered):
        i, x = numbered
        value = f(x)
        report(progress, i + 1, total)
        return value

    return lax.map(one, (jnp.arange(total), xs))
