"""Inner products of vectors that may come slice by slice, with no overflow.

<x_i, x_j> = u_i u_j <x_i/u_i, x_j/u_j>,    u_i a power of two near max |x_i|
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Products(NamedTuple):
    """Inner products of ``n`` vectors, each in a unit of its own size.

    Attributes:
      units: Shape (n,), a power of two near the largest element of each vector.
      gram: Shape (n, n), the inner products in these units.
    """

    units: jax.Array
    gram: jax.Array


def unit_of(x: jax.Array) -> jax.Array:
    """The power of two at or below the largest magnitude in ``x``."""
    most = jnp.max(jnp.abs(x), initial=0)
    info = jnp.finfo(most.dtype)
    most = jnp.clip(most, info.tiny, info.max)
    mantissa, _ = jnp.frexp(most)
    return most / (2 * mantissa)


# Compiled once per shape, not once per call, if merges are not themselves compiled.
@jax.jit
def products(xs: list[jax.Array]) -> Products:
    """All inner products of vectors, with no overflow and no underflow."""
    units = [unit_of(x) for x in xs]
    ys = [x / u for x, u in zip(xs, units, strict=True)]
    n = len(ys)
    # The matrix is symmetric: half of it is computed.
    half = {
        (i, j): jnp.sum(jnp.real(jnp.conj(ys[i]) * ys[j]))
        for i in range(n)
        for j in range(i + 1)
    }
    rows = [[half[max(i, j), min(i, j)] for j in range(n)] for i in range(n)]
    return Products(jnp.stack(units), jnp.stack([jnp.stack(row) for row in rows]))


@jax.jit
def joined_products(a: Products, b: Products) -> Products:
    """Products over two slices, as products over both."""
    units = jnp.maximum(a.units, b.units)

    def moved(p: Products) -> jax.Array:
        ratio = p.units / units
        return p.gram * jnp.outer(ratio, ratio)

    return Products(units, moved(a) + moved(b))


def cosines(p: Products) -> tuple[jax.Array, jax.Array]:
    """Norms of the vectors in their units, and inner products of their directions."""
    norms = jnp.sqrt(jnp.diagonal(p.gram))
    safe = jnp.where(norms > 0, norms, 1)
    return norms, p.gram / jnp.outer(safe, safe)
