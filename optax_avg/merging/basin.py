"""Permutations of channels that bring two models into one basin.

The channels of a network can be permuted without changing its function:

    W_l <- P_l W_l P_{l-1}^T,    b_l <- P_l b_l
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_avg.merging.trees import check_alike

__all__ = ["permute"]

# A key in the paths of the leaves of a layer, or several keys.
Layer = str | tuple[str, ...]
# An array on the host or on a device.
_Array = TypeVar("_Array", np.ndarray, jax.Array)


class _Place(NamedTuple):
    """Axis of a leaf along which the channels of a layer lie.

    Attributes:
      leaf: Index of the leaf.
      axis: Its axis, from the end.
      blocks: How often all channels follow each other along the axis.
    """

    leaf: int
    axis: int
    blocks: int


def permute(
    model: optax.Params,
    reference: optax.Params,
    layers: Sequence[Layer],
    *,
    max_sweeps: int = 100,
) -> optax.Params:
    """Git Re-Basin by matching weights: permutes channels to match a reference.

    Finds permutations that maximise ``sum_l <W_l, P_l W'_l P_{l-1}^T>`` over all
    layers. It solves a linear assignment for one layer after another until none gains.
    The result computes the same function as ``model`` but lies near ``reference``, so
    that the two can be averaged. The computation runs on the host, in float64.

    Args:
      model: Tree whose channels are permuted. The inputs and the channels of the last
        layer stay in place.
      reference: Tree of the same structure.
      layers: Layers from input to output. Each is a key in the paths of its leaves, as
        ``"Dense_0"``, or several keys for a layer and its normalisation, as
        ``("Conv_0", "BatchNorm_0")``. Leaves have the layout of Flax: the channels of a
        layer are the last axis of its leaves, and those of the layer before are the
        last axis but one of its kernels. They are repeated there after flattening.
      max_sweeps: Largest number of sweeps over the layers.

    Returns:
      A tree like ``model``.

    Raises:
      ValueError: If the trees differ, a layer is not in them, two layers do not fit
        each other, or a leaf is not finite.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> a = {"in": jnp.array([[1.0, 2.0]]), "out": jnp.array([[3.0], [4.0]])}
      >>> b = {"in": jnp.array([[2.5, 0.5]]), "out": jnp.array([[4.1], [3.1]])}
      >>> oa.merging.permute(b, a, ["in", "out"])["in"].tolist()
      [[0.5, 2.5]]

    References:
      Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging Models modulo Permutation
      Symmetries", 2022, 2209.04836, section 3.2.
    """
    # Imported here because it takes long.
    from scipy.optimize import linear_sum_assignment

    check_alike([reference, model])
    paths, structure = jax.tree.flatten_with_path(model)
    keys = [
        [jax.tree_util.keystr((k,), simple=True) for k in path] for path, _ in paths
    ]
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    leaves = [x for _, x in paths]
    places = _places(keys, names, [jnp.shape(x) for x in leaves], layers)
    used = {place.leaf for channels in places for place in channels}
    ours = {i: _float64(leaves[i], names[i]) for i in used}
    theirs = jax.tree.leaves(reference)
    theirs = {i: _float64(theirs[i], names[i]) for i in used}
    orders = [np.arange(_width(ours, channels)) for channels in places]
    for _ in range(max_sweeps):
        moved = False
        for channels, order in zip(places, orders, strict=True):
            products = [
                _rows(theirs[p.leaf], p) @ np.conj(_rows(ours[p.leaf], p)).T
                for p in channels
            ]
            gain = np.real(np.sum(products, axis=0))
            _, new = linear_sum_assignment(gain, maximize=True)
            better = gain[np.arange(len(new)), new].sum() - np.trace(gain)
            if better <= 1e-12 * np.abs(gain).max(initial=0):
                continue
            moved = True
            order[:] = order[new]
            for p in channels:
                ours[p.leaf] = _take(ours[p.leaf], p, new)
        if not moved:
            break
    for channels, order in zip(places, orders, strict=True):
        for p in channels:
            leaves[p.leaf] = _take(jnp.asarray(leaves[p.leaf]), p, order)
    return structure.unflatten(leaves)


def _places(
    keys: list[list[str]],
    names: list[str],
    shapes: list[tuple[int, ...]],
    layers: Sequence[Layer],
) -> list[list[_Place]]:
    """The places of the channels of each layer but the last.

    Args:
      keys: Keys in the path of each leaf.
      names: Name of each leaf, for messages.
      shapes: Shape of each leaf.
      layers: Layers from input to output.

    Raises:
      ValueError: If a layer is not in the tree, or two layers do not fit each other.
    """
    members = _members(keys, names, shapes, layers)
    return [
        _channels(names, shapes, here, after)
        for here, after in itertools.pairwise(members)
    ]


def _members(
    keys: list[list[str]],
    names: list[str],
    shapes: list[tuple[int, ...]],
    layers: Sequence[Layer],
) -> list[list[int]]:
    """The leaves of each layer."""
    if len(layers) < 2:
        raise ValueError(f"layers must name at least two, got {list(layers)}.")
    members = []
    for layer in layers:
        wanted = {layer} if isinstance(layer, str) else set(layer)
        found = [i for i, path in enumerate(keys) if wanted & set(path) and shapes[i]]
        missing = wanted - {key for i in found for key in keys[i]}
        if missing:
            raise ValueError(
                f"no leaf has {sorted(missing)[0]!r} in its path: {names}."
            )
        members.append(found)
    return members


def _channels(
    names: list[str], shapes: list[tuple[int, ...]], here: list[int], after: list[int]
) -> list[_Place]:
    """The places of the channels of a layer, in itself and in the next one."""
    width = shapes[here[0]][-1]
    for i in here:
        if shapes[i][-1] != width:
            raise ValueError(
                f"{names[here[0]]} has {width} channels and {names[i]} "
                f"{shapes[i][-1]}; leaves of a layer must have as many."
            )
    channels = [_Place(i, -1, 1) for i in here]
    for i in after:
        if len(shapes[i]) < 2:
            continue
        blocks, rest = divmod(shapes[i][-2], max(width, 1))
        if rest or not blocks:
            raise ValueError(
                f"{names[i]} takes {shapes[i][-2]} inputs, which is no multiple of "
                f"the {width} channels of {names[here[0]]}."
            )
        channels.append(_Place(i, -2, blocks))
    return channels


def _float64(x: ArrayLike, name: str) -> np.ndarray:
    """An array in float64 or complex128.

    Raises:
      ValueError: If an element is not finite.
    """
    wide = np.asarray(x)
    wide = wide.astype(np.complex128 if np.iscomplexobj(wide) else np.float64)
    if not np.all(np.isfinite(wide)):
        raise ValueError(f"{name} is not finite; its channels cannot be matched.")
    return wide


def _width(arrays: dict[int, np.ndarray], channels: list[_Place]) -> int:
    """Number of channels."""
    first = channels[0]
    return arrays[first.leaf].shape[first.axis]


def _rows(x: np.ndarray, place: _Place) -> np.ndarray:
    """A matrix with a row for each channel."""
    x = np.moveaxis(x, place.axis, 0)
    x = np.moveaxis(x.reshape(place.blocks, -1, *x.shape[1:]), 1, 0)
    return x.reshape(len(x), -1)


def _take(x: _Array, place: _Place, order: np.ndarray) -> _Array:
    """An array with its channels in another order."""
    n = len(order)
    whole = np.concatenate([b * n + order for b in range(place.blocks)])
    return x.take(whole, axis=place.axis)
