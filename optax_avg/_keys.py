"""PRNG keys from what users pass for one: a key, or an integer to make one of."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def key_maker(key: Any, call: str) -> Callable[[], jax.Array]:
    """A function that makes a key of its own each time: a state may be donated.

    Args:
      key: A PRNG key, new or raw, or an integer of any kind.
      call: To write instead, for the message.

    Raises:
      ValueError: If it is neither a key nor an integer.
    """
    dtype, shape = getattr(key, "dtype", None), np.shape(key)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return lambda: jax.random.clone(key)
    if dtype == jnp.uint32 and len(shape) == 1:
        return lambda: jnp.array(key, copy=True)
    if isinstance(key, jax.Array) and not shape and dtype != jnp.bool_:
        # A seed that inject_hyperparams holds is an array, perhaps of floats.
        return lambda: jax.random.key(key.astype(jnp.int32))
    try:
        seed = None if isinstance(key, (bool, np.bool_)) else operator.index(key)
    except TypeError:
        seed = None
    if seed is None or not -(2**63) <= seed < 2**63:
        raise ValueError(
            "key must be a PRNG key or an integer seed of 64 bits at most, got "
            f"{key!r}; call {call}."
        )
    return lambda: jax.random.key(seed)
