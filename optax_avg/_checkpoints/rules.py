"""A merge of one leaf of several trees, which may come slice by slice.

x = combine(find(x_1, ..., x_n), x_1, ..., x_n),    element by element in ``combine``
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike

from optax_avg import _numerics

# Slices of one leaf in all trees, in order, as arrays of any dtype. Each call begins
# again at the first element.
Slices = Callable[[], Iterator[Sequence[ArrayLike]]]
# What a rule must know of a whole leaf: None, arrays, or a tuple of them.
Found = Any


class Rule(NamedTuple):
    """A merge of one leaf of several trees.

    Attributes:
      combine: Takes what was found and a slice of each tree, and returns the merged
        slice.
      find: Takes all slices and returns what ``combine`` must know of the whole leaf.
      after: Takes what was found and a number of elements, and returns what ``combine``
        must know of a slice that begins after so many.
      fault: Whether a slice holds what cannot be merged; None if there is no such
        thing.
      complaint: What must hold of every leaf, for the error if ``fault`` is true.
    """

    combine: Callable[[Found, list[jax.Array]], jax.Array]
    find: Callable[[Slices], Found] = lambda slices: None
    after: Callable[[Found, int], Found] = lambda found, start: found
    fault: Callable[[list[jax.Array]], jax.Array] | None = None
    complaint: str = ""


def check_fault(rule: Rule, fault: jax.Array | bool, name: str) -> None:
    """Raises a ValueError if the rule found fault with a leaf; never under ``jit``."""
    if not isinstance(fault, Tracer) and bool(fault):
        raise ValueError(f"{rule.complaint}; this does not hold at {name}.")


def widened(leaves: Sequence[ArrayLike]) -> list[jax.Array]:
    """The leaves in float32 or wider."""
    return [_numerics.wide(jnp.asarray(x)) for x in leaves]
