"""Transformations that compute and remember in float32 or wider.

The links of this room are written for trees of such arrays alone. :func:`in_float32`
gives them the gradients of any model in this form, and gives the updates back in the
dtypes of the gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_avg import _leaves, _numerics

# A Python number, or a traced one, as from optax.inject_hyperparams.
Number = float | jax.Array


def present(tree: optax.Params) -> optax.Params:
    """The floating leaves in float32 or wider, ``MaskedNode`` for all others."""

    def one(leaf: Any) -> Any:
        there = _leaves.is_gradient(leaf)
        return _numerics.wide(jnp.asarray(leaf)) if there else optax.MaskedNode()

    return jax.tree.map(one, tree, is_leaf=_leaves.is_absent)


def remembered(tree: optax.Updates, memory: optax.Updates) -> optax.Updates:
    """A copy in the dtypes of a memory, never an alias: states may be donated."""
    copy = lambda x, old: jnp.array(x, old.dtype, copy=True)
    return jax.tree.map(copy, tree, memory)


def next_step(step: jax.Array) -> jax.Array:
    """One more; it stops at the largest integer."""
    return jnp.asarray(optax.safe_increment(step))


def in_float32(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The same transformation for gradients in any dtype.

    Leaves without a floating gradient pass through: None, ``optax.MaskedNode``,
    integers.

    Args:
      tx: A transformation of trees in float32 or wider. What it remembers of a leaf
        begins with numbers that do not depend on the value of the parameter.

    Returns:
      A transformation with the state of ``tx``.
    """
    inner = optax.with_extra_args_support(tx)

    def init_fn(params: optax.Params) -> optax.OptState:
        wide = present(params)
        return optax.tree.map_params(inner, _laid_out_like, inner.init(wide), wide)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        seen = None if params is None else present(params)
        if params is not None:
            _refuse_missing(updates, params)
        made, state = inner.update(present(updates), state, seen, **extra_args)
        return jax.tree.map(_back, updates, made, is_leaf=_leaves.is_absent), state

    return optax.GradientTransformationExtraArgs(
        _leaves.shapes_for_shapes(init_fn), update_fn
    )


def with_stacks(
    tx: optax.GradientTransformationExtraArgs, field: str
) -> optax.GradientTransformationExtraArgs:
    """The same transformation, whose stacks have a name for each of their axes.

    Args:
      tx: A transformation by :func:`in_float32`.
      field: Field of its state with a stack for each leaf. A box of Flax names the axes
        of the leaf, and a stack has one more.

    Returns:
      A transformation with the state of ``tx``.
    """

    def moved(state: Any, boxes: Any) -> Any:
        stacks = _leaves.in_boxes_of(boxes, getattr(state, field))
        return state._replace(**{field: stacks})

    def init_fn(params: optax.Params) -> Any:
        state: Any = tx.init(params)
        stacks = _leaves.with_first_axis(getattr(state, field))
        return state._replace(**{field: stacks})

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        inside = moved(state, present(updates))
        updates, new = tx.update(updates, inside, params, **extra_args)
        return updates, moved(new, getattr(state, field))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _refuse_missing(updates: optax.Updates, params: optax.Params) -> None:
    """Raises if a floating parameter has no gradient.

    Raises:
      ValueError: If one has none, naming the first.
    """
    named = jax.tree.flatten_with_path(updates, is_leaf=_leaves.is_absent)[0]
    for (path, g), x in zip(named, _leaves.parts_like(updates, params), strict=False):
        if _leaves.is_gradient(x) and not _leaves.is_gradient(g):
            raise ValueError(
                f"updates{jax.tree_util.keystr(path)} has no gradient for its floating "
                "parameter; pass zeros there, or leave it out by optax.masked."
            )


def _laid_out_like(memory: jax.Array, leaf: jax.Array) -> jax.Array:
    """A memory of a leaf, or a stack of them, on the devices where the leaf lies."""
    zeros = _numerics.zeros_like(leaf, memory.dtype)
    return memory + jnp.broadcast_to(zeros, memory.shape)


def _back(update: Any, made: Any) -> Any:
    """The update that was made, in the dtype in which the gradient came."""
    # Python numbers have no dtype of their own.
    return update if _leaves.is_masked(made) else made.astype(jnp.result_type(update))
