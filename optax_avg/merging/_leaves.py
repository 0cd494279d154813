"""What merges share: leaf by leaf, in float32 or wider, with one check.

x = combine(find(x_1, ..., x_n), x_1, ..., x_n),    element by element in ``combine``
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_avg import _leaves, _numerics

# Slices of the leaves of all trees, from the first element to the last; anew each call.
Slices = Callable[[], Iterator[list[Any]]]

ONLY = "the only leaf"  # of a tree that is an array itself


class Rule(NamedTuple):
    """A merge of one leaf of several trees, which may come slice by slice.

    Attributes:
      combine: from what was found and a slice of each tree to the merged slice.
      find: from all slices to what ``combine`` must know of the whole leaf.
      after: what was found, for a slice that begins after a number of elements.
      fault: whether a slice holds what cannot be merged; None where nothing does.
      complaint: what must hold of every leaf, and does not then.
    """

    combine: Callable[[Any, list[jax.Array]], jax.Array]
    find: Callable[[Slices], Any] = lambda slices: None
    after: Callable[[Any, int], Any] = lambda found, start: found
    fault: Callable[[list[jax.Array]], jax.Array] | None = None
    complaint: str = ""


class Products(NamedTuple):
    """Inner products of vectors, each in a unit of its own size.

    Attributes:
      units: (n,), a power of two near the largest element of each vector.
      gram: (n, n), the inner products in these units.
    """

    units: jax.Array
    gram: jax.Array


def checked_weights(n: int, weights: Any) -> Any:
    """Weights of sum one, float64; traced ones as they are; equal ones for None.

    Raises:
      ValueError: If their number or their sum is another.
    """
    weights = [1 / max(n, 1)] * n if weights is None else weights
    if len(weights) != n:
        raise ValueError(f"{n} models need as many weights, got {weights}.")
    try:
        w = np.asarray(weights, np.float64)
    except (
        jax.errors.TracerArrayConversionError,
        jax.errors.ConcretizationTypeError,
    ):
        return jnp.stack([jnp.asarray(w) for w in weights])
    if len(w) and not abs(w.sum() - 1) < 1e-6 * max(1, np.abs(w).sum()):
        raise ValueError(f"weights must sum to one, got a sum of {w.sum():g}.")
    return w


def check_alike(models: Sequence[Any]) -> None:
    """Raises where models differ, naming the first leaf that does."""
    if not models:
        raise ValueError("there are no models; pass a list with at least one.")
    first, structure = jax.tree.flatten_with_path(models[0])
    names = [_name(path) for path, _ in first]
    for t, model in enumerate(models[1:], start=1):
        found, other = jax.tree.flatten_with_path(model)
        theirs = [_name(path) for path, _ in found]
        if names != theirs:
            odd = [n for n in names if n not in theirs]
            extra = [n for n in theirs if n not in names]
            where = f"has no leaf {odd[0]}" if odd else f"has a leaf {extra[0]} more"
            if ONLY in odd:
                where = "is not a single leaf, as the first tree is"
            elif ONLY in extra:
                where = "is a single leaf, the first tree is not"
            raise ValueError(f"tree {t} {where}; the trees must be alike.")
        if structure != other:
            raise ValueError(f"tree {t} is of another structure: {other}.")
        for name, (_, a), (_, b) in zip(names, first, found, strict=True):
            if jnp.shape(a) != jnp.shape(b):
                raise ValueError(
                    f"tree {t} has shape {jnp.shape(b)} at {name}, the first "
                    f"{jnp.shape(a)}; the trees must be alike."
                )
            if jnp.iscomplexobj(b) and _leaves.is_float(a) and not jnp.iscomplexobj(a):
                raise ValueError(
                    f"tree {t} is complex at {name}, the first is not; cast one of "
                    "them."
                )


def over(rule: Rule, trees: Sequence[Any], found: Any = None) -> Any:
    """Merges trees leaf by leaf; leaves that are not floats come from the first.

    Args:
      rule: of a leaf.
      trees: models and what else the rule takes.
      found: by leaf, what the rule would find; by default it looks for it.

    Raises:
      ValueError: If the trees differ, or the rule finds fault with a leaf.
    """
    check_alike(trees)
    paths, structure = jax.tree.flatten_with_path(trees[0])
    columns = zip(*(jax.tree.leaves(tree) for tree in trees), strict=True)
    merged = []
    for i, ((path, first), leaves) in enumerate(zip(paths, columns, strict=True)):
        if not _leaves.is_float(first):
            merged.append(first)
            continue
        xs = widened(leaves)
        if rule.fault is not None:
            check(rule, rule.fault(xs), _name(path))
        known = rule.find(lambda xs=xs: iter([xs])) if found is None else found[i]
        merged.append(rule.combine(known, xs).astype(jnp.result_type(first)))
    return structure.unflatten(merged)


def _name(path: Any) -> str:
    """A key path, in words where the leaf is the whole tree."""
    return jax.tree_util.keystr(path) or ONLY


def check(rule: Rule, fault: Any, name: str) -> None:
    """Raises if the rule found fault with a leaf; never under ``jit``."""
    if not isinstance(fault, Tracer) and bool(fault):
        raise ValueError(f"{rule.complaint}; this does not hold at {name}.")


def widened(leaves: Sequence[Any]) -> list[jax.Array]:
    """The leaves in float32 or wider."""
    return [_numerics.wide(jnp.asarray(x)) for x in leaves]


def total(
    slices: Slices,
    of: Callable[[list[jax.Array]], Any],
    join: Callable[[Any, Any], Any],
) -> Any:
    """What ``of`` finds in each slice, joined over all slices."""
    return functools.reduce(join, (of(widened(xs)) for xs in slices()))


def added(a: Any, b: Any) -> Any:
    """Sums over two slices, as sums over both."""
    return jax.tree.map(jnp.add, a, b)


def weighted_sum(w: Any, xs: list[jax.Array]) -> Any:
    """``sum_t w_t x_t``."""
    return sum(jnp.asarray(a, x.dtype) * x for a, x in zip(w, xs, strict=True))


def unit_of(x: jax.Array) -> jax.Array:
    """The power of two at or below the largest magnitude in ``x``."""
    most = jnp.max(jnp.abs(x), initial=0)
    info = jnp.finfo(most.dtype)
    most = jnp.clip(most, info.tiny, info.max)
    mantissa, _ = jnp.frexp(most)
    return most / (2 * mantissa)


# Compiled once a shape, not once a call, where merges are not themselves compiled.
@jax.jit
def products(xs: list[jax.Array]) -> Products:
    """All inner products of vectors; no overflow, no underflow."""
    units = [unit_of(x) for x in xs]
    ys = [x / u for x, u in zip(xs, units, strict=True)]
    n = len(ys)
    # Half of them: the matrix is symmetric.
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

    def moved(p):
        ratio = p.units / units
        return p.gram * jnp.outer(ratio, ratio)

    return Products(units, moved(a) + moved(b))


def cosines(p: Products) -> tuple[jax.Array, jax.Array]:
    """The norms of vectors in their units, and inner products of their directions."""
    norms = jnp.sqrt(jnp.diagonal(p.gram))
    safe = jnp.where(norms > 0, norms, 1)
    return norms, p.gram / jnp.outer(safe, safe)
