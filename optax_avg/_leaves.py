"""Which leaves of a tree are there, and trees that are made leaf by leaf."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from optax_avg import _numerics

State = TypeVar("State")

# A tree of bools like (a prefix of) params, or a predicate on (key_path, leaf).
Where = Callable[[Any, Any], Any] | Any


def is_masked(node: object) -> bool:
    """Whether a node is Optax's placeholder for a leaf that is left out."""
    return isinstance(node, optax.MaskedNode)


def is_absent(node: object) -> bool:
    """Whether there is no array: None, or left out."""
    return node is None or is_masked(node)


def is_float(leaf: Any) -> bool:
    """Whether a leaf can be averaged: real or complex floating point."""
    dtype = getattr(leaf, "dtype", None)
    return jnp.issubdtype(
        jnp.result_type(leaf) if dtype is None else dtype, jnp.inexact
    )


def is_gradient(leaf: Any) -> bool:
    """Whether a leaf is there and floating."""
    return not is_absent(leaf) and is_float(leaf)


def is_abstract(tree: optax.Params) -> bool:
    """Whether a leaf is a ``jax.ShapeDtypeStruct``, a shape without values."""
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def shapes_for_shapes(init: optax.TransformInitFn) -> optax.TransformInitFn:
    """``init``, which for ``jax.ShapeDtypeStruct`` leaves gives a state of the same."""

    def either(params: Any) -> Any:
        return jax.eval_shape(init, params) if is_abstract(params) else init(params)

    return either


def select(tree: Any, where: Where | None) -> Any:
    """Keeps the float leaves inside ``where``; the others become ``MaskedNode``."""
    if isinstance(where, str):
        raise ValueError(
            f"leaves are chosen by a tree of bools or a function of path and leaf, got "
            f"{where!r}; write lambda path, leaf: {where!r} in "
            "jax.tree_util.keystr(path)."
        )
    if not jax.tree.leaves(tree):
        return tree

    def keep(leaf):
        return leaf if is_float(leaf) else optax.MaskedNode()

    if where is None:
        return jax.tree.map(keep, tree)
    if callable(where):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: keep(leaf) if where(path, leaf) else optax.MaskedNode(),
            tree,
        )
    return jax.tree.map(
        lambda inside, part: jax.tree.map(
            keep if inside else lambda _: optax.MaskedNode(), part
        ),
        where,
        tree,
    )


def zeros_like_wide(tree: Any) -> Any:
    """Zeros in float32 or wider for float leaves, ``MaskedNode`` for the others."""
    return jax.tree.map(_numerics.zeros_like, select(tree, None))


def align(tree: Any, params: Any) -> list[Any]:
    """Leaves of ``tree`` in the order of those of ``params``, None at ``MaskedNode``.

    A ``MaskedNode`` may stand for a whole subtree, and containers may differ (Flax nnx
    wraps the leaves in another variable type) where the leaves match one to one.

    Raises:
      ValueError: If leaves do not match, naming the first offending one.
    """
    values, structure = jax.tree.flatten(tree, is_leaf=is_masked)
    try:
        parts = structure.flatten_up_to(params)
    except (ValueError, TypeError):
        parts = jax.tree.leaves(params)
    sizes = [len(jax.tree.leaves(part)) for part in parts]
    aligned = []
    for value, size in zip(values, sizes, strict=False):
        aligned += [None] * size if is_masked(value) else [value]
    paths = jax.tree.flatten_with_path(params)[0]
    if len(values) != len(parts) or len(aligned) != len(paths):
        raise ValueError(
            f"params has {len(paths)} leaves and the average {len(values)}; pass the "
            "parameters that are trained."
        )
    for value, (path, leaf) in zip(aligned, paths, strict=True):
        if value is not None and value.shape != jnp.shape(leaf):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)} and "
                f"its average {value.shape}; pass the parameters that are trained."
            )
    return aligned


def parts_like(tree: Any, other: Any) -> list[Any]:
    """What of ``other`` stands where ``tree`` has its leaves, absent ones counted.

    Its own leaves in their order where the containers differ.
    """
    structure = jax.tree.structure(tree, is_leaf=is_absent)
    try:
        return structure.flatten_up_to(other)
    except (ValueError, TypeError):
        return jax.tree.leaves(other, is_leaf=is_absent)


def states_of(kind: type[State], state: optax.OptState | None) -> list[State]:
    """All states of one type in an optimizer state, however deep, in their order.

    Args:
      kind: Type of the states, a ``NamedTuple``.
      state: An optimizer state, or an object that has one as ``opt_state``.

    Returns:
      The states that were found.
    """
    state = getattr(state, "opt_state", state)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def moved(params: optax.Params, offset: Any) -> optax.Params:
    """``x + d`` in the dtype of ``x``; ``x`` itself where ``d`` is None."""
    if offset is None:
        return params

    def one(x, d):
        return x if d is None else (_numerics.wide(x) + d).astype(x.dtype)

    return jax.tree.map(one, params, offset)


def new_iterate(params: optax.Params, updates: optax.Updates) -> optax.Params:
    """``x_t = params + updates`` as training will hold it, rounding included."""

    def one(x, u):
        return x if u is None or not is_float(x) else optax.apply_updates(x, u)

    return jax.tree.map(one, params, updates)


def over(f: Callable[..., Any], params: Any, *trees: Any) -> Any:
    """Maps leaves that have a float gradient in all ``trees``; None elsewhere."""

    def one(_, *leaves):
        missing = any(leaf is None or not is_float(leaf) for leaf in leaves)
        return None if missing else f(*leaves)

    return jax.tree.map(one, params, *trees, is_leaf=lambda leaf: leaf is None)
