"""One round of workers: who counts in it, and means over those who do.

    z = sum_i s_i x_i,    s_i = w_i / sum_j w_j over the workers that count

A worker counts if it takes part and all of its elements are finite.
"""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_avg import _leaves, _mesh, _numerics

Axes = tuple[Hashable, ...]
# A tree of arrays.
Tree = Any


def selected(
    params: Tree, updates: Tree, where: _leaves.Where | None
) -> tuple[Tree, Tree]:
    """The updates, typed as each worker's own, and the selected new iterates."""
    updates = jax.tree.map(
        lambda x, u: u if u is None else _mesh.vary(u, _mesh.varying_axes(x)),
        params,
        updates,
    )
    return updates, _leaves.select(_leaves.new_iterate(params, updates), where)


def taken(
    name: str,
    meet: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]],
    due: jax.Array,
    updates: Tree,
    state: Tree,
    params: Tree,
    where: _leaves.Where | None,
    axes: Axes,
) -> tuple[Tree, Tree]:
    """Updates and state after ``meet(updates, state, x)`` in the steps that are due.

    ``x`` are the selected new iterates.
    """
    updates, x = selected(params, updates, where)
    refuse_shared(name, x, axes)
    stay = lambda updates, state, x: (updates, state)
    return lax.cond(due, meet, stay, updates, state, x)


def refuse_shared(name: str, x: Tree, axes: Axes) -> None:
    """Raises if parameters are the same on all workers, by their type in ``shard_map``.

    Raises:
      ValueError: If a leaf is, naming it.
    """
    typed = [a for a in axes if a in _mesh.varying_axes(lax.axis_index(a))]
    for path, leaf in jax.tree.flatten_with_path(x)[0]:
        if any(a not in _mesh.varying_axes(leaf) for a in typed):
            raise ValueError(
                f"{name} needs parameters of each worker's own, and params"
                f"{jax.tree_util.keystr(path)} is the same on all of them, so that "
                "jax.grad has summed its gradient. Keep parameters and state with a "
                f"first axis of the workers, with the spec P({axes[0]!r}), and take "
                "x[0] inside shard_map."
            )


def is_finite(tree: Tree, axes: Axes) -> jax.Array:
    """Whether all elements of this worker are finite, on all devices that it has."""
    finite = _numerics.all_finite_here(tree)
    others = tuple(a for a in _mesh.varying_axes(finite) if a not in axes)
    return lax.pmin(finite.astype(jnp.int32), others) > 0 if others else finite


def total(x: jax.Array, axes: Axes) -> jax.Array:
    """The sum over the workers, alike on all."""
    return lax.psum(_mesh.vary(x, axes), axes) if axes else x


def number(axes: Axes) -> int:
    """The number of workers."""
    return lax.axis_size(axes) if axes else 1


def combined(tree: Tree, share: jax.Array, counts: jax.Array, axes: Axes) -> Tree:
    """``sum_i s_i x_i`` over the workers that count, in float32 or wider."""

    def one(x):
        x = _numerics.wide(x)
        return total(jnp.where(counts, share.astype(x.real.dtype) * x, 0), axes)

    return jax.tree.map(one, tree)


def variances(tree: Tree, axes: Axes) -> Tree:
    """The variance of the elements of each leaf, over all parts of a leaf."""
    return jax.tree.map(lambda x: _moments(x, axes)[1], tree)


def with_variances(tree: Tree, wanted: Tree, axes: Axes) -> Tree:
    """``m + sqrt(V/var z) (z - m)`` of each leaf ``z`` of mean ``m``; ``z`` at 0."""

    def one(z, target):
        m, got = _moments(z, axes)
        largest = jnp.maximum(jnp.maximum(got, target), jnp.abs(m) ** 2)
        return m + _numerics.ratio_of_deviations(target, got, largest) * (z - m)

    return jax.tree.map(one, tree, wanted)


def _moments(x: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of a leaf in float32 or wider."""
    x = _numerics.wide(x)
    if not x.size:
        return jnp.zeros([], x.dtype), jnp.zeros([], x.real.dtype)
    others = tuple(a for a in _mesh.varying_axes(x) if a not in axes)
    average = lambda v: lax.pmean(jnp.mean(v), others) if others else jnp.mean(v)
    m = average(x)
    return m, average(jnp.abs(x - m) ** 2)


def arriving(updates: Tree, params: Tree, targets: Tree) -> Tree:
    """Updates that lead to the targets, rounded as the parameters are.

    Where there is no target the update stays as it is.
    """
    leaves, structure = jax.tree.flatten(params)

    def one(x, u, target):
        if u is None or _leaves.is_absent(target):
            return u
        x = jnp.asarray(x)
        goal = _numerics.widen(target.astype(x.dtype))
        return _numerics.step_to(goal, x, u.dtype)

    parts = (structure.flatten_up_to(tree) for tree in (updates, targets))
    return structure.unflatten([one(*leaf) for leaf in zip(leaves, *parts)])


def chosen(condition: jax.Array, new: Tree, old: Tree) -> Tree:
    """One of two trees."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def typed_like(new: Tree, old: Tree) -> Tree:
    """What is common to all workers, typed as the old value in ``shard_map``."""
    return jax.tree.map(lambda a, b: _mesh.vary(a, _mesh.varying_axes(b)), new, old)
