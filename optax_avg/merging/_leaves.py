"""What merges share: leaf by leaf, in float32 or wider, with one check."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_avg import _tree


def checked_weights(models: Sequence[Any], weights: Any) -> Any:
    """Weights of sum one, float64; traced ones as they are.

    Raises:
      ValueError: If their number or their sum is another.
    """
    if len(weights) != len(models):
        raise ValueError(f"{len(models)} models need as many weights, got {weights}.")
    try:
        w = np.asarray(weights, np.float64)
    except (
        jax.errors.TracerArrayConversionError,
        jax.errors.ConcretizationTypeError,
    ):
        return jnp.stack([jnp.asarray(w) for w in weights])
    if len(w) and not abs(w.sum() - 1) < 1e-6:
        raise ValueError(f"weights must sum to one, got a sum of {w.sum():g}.")
    return w


def check_alike(models: Sequence[Any]) -> None:
    """Raises where models differ, naming the first leaf that does."""
    if not models:
        raise ValueError("there are no models; pass a list with at least one.")
    first, structure = jax.tree.flatten_with_path(models[0])
    names = [jax.tree_util.keystr(path) for path, _ in first]
    for t, model in enumerate(models[1:], start=1):
        found, other = jax.tree.flatten_with_path(model)
        theirs = [jax.tree_util.keystr(path) for path, _ in found]
        if names != theirs:
            odd = [n for n in names if n not in theirs]
            extra = [n for n in theirs if n not in names]
            where = f"has no leaf {odd[0]}" if odd else f"has a leaf {extra[0]} more"
            raise ValueError(f"tree {t} {where}; the trees must be alike.")
        if structure != other:
            raise ValueError(f"tree {t} is of another structure: {other}.")
        for name, (_, a), (_, b) in zip(names, first, found, strict=True):
            if jnp.shape(a) != jnp.shape(b):
                raise ValueError(
                    f"tree {t} has shape {jnp.shape(b)} at {name or 'its leaf'}, the "
                    f"first {jnp.shape(a)}; the trees must be alike."
                )


def over(
    rule: Callable[..., Any],
    models: Sequence[Any],
    *bases: Any,
    with_path: bool = False,
) -> Any:
    """Applies ``rule(leaves of the models, leaf of each base)`` leaf by leaf."""
    check_alike([*models, *bases])

    def one(path, *leaves):
        first = leaves[0]
        if not _tree.is_float(first):
            return first
        wide = [_tree.wide(jnp.asarray(x)) for x in leaves]
        xs, rest = wide[: len(models)], wide[len(models) :]
        merged = rule(xs, *rest, path) if with_path else rule(xs, *rest)
        return merged.astype(jnp.result_type(first))

    return jax.tree_util.tree_map_with_path(one, *models, *bases)


def weighted_sum(w: Any, xs: list[jax.Array]) -> Any:
    """``sum_t w_t x_t``."""
    return sum(jnp.asarray(a, x.dtype) * x for a, x in zip(w, xs, strict=True))


def inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """``<a, b>`` over all elements."""
    return jnp.sum(jnp.real(jnp.conj(a) * b))


# Compiled once a shape, not once a call, where merges are not themselves compiled.
@jax.jit
def size(x: jax.Array) -> jax.Array:
    """``|x|``, without overflow."""
    return _tree.norm([x])


@jax.jit
def unit(x: jax.Array) -> jax.Array:
    """``x/|x|``, 0 at 0."""
    return _tree.unit([x])[0]
