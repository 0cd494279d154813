"""Numbers by which data that comes back from a disk is recognised."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from optax_avg import _numerics

NEGLIGIBLE = 1e-30  # underflow is not claimed for dtypes that hold smaller numbers

# Data that JSON can express, and objects of it that are read field by field.
Json = Any


def digest(content: np.ndarray | Json) -> str:
    """SHA-256 of an array, as little-endian float64, or of data in JSON."""
    if isinstance(content, np.ndarray):
        return hashlib.sha256(content.astype("<f8").tobytes()).hexdigest()
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@jax.jit
def signature(leaves: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """A fingerprint of each leaf, and whether the leaf is finite.

    ``sum_i h(bits_i + i c) mod 2^32`` with a bijection ``h``. Every change of one word
    changes the number, and so does an exchange of places. Changes of several words
    cancel no more often than by chance, also if the words are round numbers. Sharded
    leaves stay on their devices.

    Args:
      leaves: Arrays of any shapes.

    Returns:
      Fingerprints, uint32 of shape (leaves,), and whether each leaf is finite, bool of
      shape (leaves,).

    References:
      The constants of ``h`` are those of MurmurHash3's last step (Appleby, 2011, public
      domain).
    """
    numbers = [_fingerprint(x) for x in leaves]
    finite = [jnp.all(jnp.isfinite(x)) for x in leaves]
    return jnp.stack(numbers), jnp.stack(finite)


def underflow(
    leaves: list[jax.Array], dtypes: Sequence[DTypeLike]
) -> tuple[float, np.ndarray]:
    """Relative error from numbers that are too small for the dtype of a snapshot.

    ``(sum_i min(|x_i|, s/2)^2 / sum_i x_i^2)^(1/2)`` with the smallest positive number
    ``s`` of the dtype.

    Args:
      leaves: Arrays before they are rounded.
      dtypes: Dtype to which each array is rounded.

    Returns:
      The error relative to all leaves together, and relative to each leaf, float64 of
      shape (leaves,).
    """
    halves = [float(jnp.finfo(dtype).smallest_subnormal) / 2 for dtype in dtypes]
    if max(halves, default=0.0) < NEGLIGIBLE:
        return 0.0, np.zeros(len(leaves))
    found = np.asarray(jax.device_get(_lost_and_whole(leaves, halves)), np.float64)
    found = np.where(np.isfinite(found), found, 0)
    largest = max(found[1].max(), np.finfo(float).tiny)  # whose square may be zero
    total = np.linalg.norm(found / largest, axis=1)
    shares = found[0] / np.where(found[1] > 0, found[1], 1)
    return float(total[0] / total[1]) if total[1] else 0.0, shares


@jax.jit
def _lost_and_whole(leaves: list[jax.Array], halves: list[float]) -> jax.Array:
    """Norms of what rounding may take from the leaves, and of the leaves.

    Returns:
      An array of shape (2, leaves).
    """
    sizes = [_numerics.wide(jnp.abs(x)) for x in leaves]
    lost = [jnp.minimum(x, half) for x, half in zip(sizes, halves, strict=True)]
    norms = _numerics.norms([[x] for x in (*lost, *leaves)])
    return norms.reshape(2, len(leaves))


def _fingerprint(x: jax.Array) -> jax.Array:
    """``sum_i h(bits_i + i c) mod 2^32``, uint32 of shape ()."""
    if jnp.iscomplexobj(x):
        return _fingerprint(jnp.real(x)) + 3 * _fingerprint(jnp.imag(x))
    unsigned: Any = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    place, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        along = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place = place + jnp.uint32(stride % 2**32) * along
        stride *= bits.shape[axis]
    return jnp.sum(_mixed(bits + place * jnp.uint32(0x9E3779B9)), dtype=jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit words in which each bit moves about half of the others."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
