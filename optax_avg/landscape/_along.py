"""What measures at a point and surfaces share: losses, moves, progress."""

from collections.abc import Callable
from typing import Any

import jax

from optax_avg import _tree

Loss = Callable[[Any], jax.Array]
Progress = Callable[[int, int], Any]


def moved(params: Any, factor: Any, direction: Any) -> Any:
    """``x + c d`` in the dtype of ``x``."""
    return jax.tree.map(
        lambda x, d: (_tree.wide(x) + factor * d).astype(x.dtype), params, direction
    )


def report(progress: Progress | None, done: jax.Array, total: int) -> None:
    """Calls ``progress(done, total)`` from inside compiled code."""
    if progress is not None:
        jax.debug.callback(lambda done: progress(int(done), total), done)
