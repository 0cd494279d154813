"""Models of one function, brought into one basin before they are averaged.

Channels inside a network can change places without changing what it computes:

    W_l <- P_l W_l P_{l-1}^T,    b_l <- P_l b_l
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_avg.merging._trees import check_alike


class _Place(NamedTuple):
    """Where channels of a layer stand: a leaf's axis, ``blocks`` times over."""

    leaf: int
    axis: int
    blocks: int


def permute(
    model: Any,
    reference: Any,
    layers: Sequence[str | tuple[str, ...]],
    *,
    max_sweeps: int = 100,
) -> Any:
    """Git Re-Basin by matching weights: the channels of a chain in another's order.

    Finds permutations that maximise ``sum_l <W_l, P_l W'_l P_{l-1}^T>`` over all
    layers, one layer after another as a linear assignment until none gains, so that
    ``model``, whose function stays as it is, lies near ``reference`` and can be
    averaged with it. On the host, in float64.

    Args:
      model: a tree; the channels of its last layer, and its inputs, stay in place.
      reference: one like it.
      layers: the chain from input to output, each a key in the paths of its leaves, as
        ``"Dense_0"``; a layer and its normalisation together, as ``("Conv_0",
        "BatchNorm_0")``. Leaves are as Flax has them: channels are the last axis of
        each, and those of the layer before the last axis but one of kernels, several
        times over after flattening.
      max_sweeps: over the layers.

    Returns:
      A tree like ``model``.

    Raises:
      ValueError: If the trees differ, a layer is not in them, two layers do not fit or
        a leaf is not finite.

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
    # JAX needs SciPy but loads this part only when it is asked for.
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


def _places(keys, names, shapes, layers) -> list[list[_Place]]:
    """Where the channels of each layer but the last stand."""
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
    places = []
    for here, after in itertools.pairwise(members):
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
        places.append(channels)
    return places


def _float64(x: Any, name: str) -> np.ndarray:
    wide = np.asarray(x)
    wide = wide.astype(np.complex128 if np.iscomplexobj(wide) else np.float64)
    if not np.all(np.isfinite(wide)):
        raise ValueError(f"{name} is not finite; its channels cannot be matched.")
    return wide


def _width(arrays: dict[int, np.ndarray], channels: list[_Place]) -> int:
    first = channels[0]
    return arrays[first.leaf].shape[first.axis]


def _rows(x: np.ndarray, place: _Place) -> np.ndarray:
    """A row for each channel."""
    x = np.moveaxis(x, place.axis, 0)
    x = np.moveaxis(x.reshape(place.blocks, -1, *x.shape[1:]), 1, 0)
    return x.reshape(len(x), -1)


def _take(x: Any, place: _Place, order: np.ndarray) -> Any:
    """The channels in another order."""
    n = len(order)
    whole = np.concatenate([b * n + order for b in range(place.blocks)])
    return x.take(whole, axis=place.axis)
