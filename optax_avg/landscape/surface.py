"""Losses along segments, on slices and on planes.

L((1 - t) a + t b),    L(x + t d),    L(x + u d1 + v d2)
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_avg import _leaves, _numerics
from optax_avg._keys import key_maker

__all__ = [
    "Plane",
    "Segment",
    "Slice",
    "barrier",
    "filter_normalised",
    "plane",
    "slice_1d",
    "slice_2d",
]

# From parameters to a scalar.
Loss = Callable[[optax.Params], jax.Array]
# Called with the amount of work done and the total amount.
Progress = Callable[[int, int], Any]


def report(progress: Progress | None, done: jax.Array, total: int) -> None:
    """Calls ``progress(done, total)`` from inside compiled code."""
    if progress is not None:
        jax.debug.callback(lambda done: progress(int(done), total), done)


def mapped(
    f: Callable[[Any], jax.Array], xs: Any, progress: Progress | None
) -> jax.Array:
    """``lax.map`` that reports its progress."""
    total = len(jax.tree.leaves(xs)[0])

    def one(numbered):
        i, x = numbered
        value = f(x)
        report(progress, i + 1, total)
        return value

    return lax.map(one, (jnp.arange(total), xs))


class Segment(NamedTuple):
    """Losses along a straight line.

    Attributes:
      t: Positions from 0 at the first model to 1 at the second, shape (num,).
      losses: Loss at each position, shape (num,).
      barrier: Largest height of the loss above the straight line between the two end
        losses, a scalar in units of the loss.
    """

    t: jax.Array
    losses: jax.Array
    barrier: jax.Array


class Slice(NamedTuple):
    """Losses along a direction.

    Attributes:
      t: Positions from ``-radius`` to ``radius`` in units of the direction, shape
        (num,).
      losses: Loss at each position, shape (num,).
    """

    t: jax.Array
    losses: jax.Array


class Plane(NamedTuple):
    """Losses on a plane.

    Attributes:
      u: First coordinates, shape (num,).
      v: Second coordinates, shape (num,).
      losses: Losses, shape (num, num), with ``losses[i, j]`` at ``(u[j], v[i])``.
      models: Coordinates ``(u, v)`` of the models that span the plane, shape
        (count, 2).
    """

    u: np.ndarray
    v: np.ndarray
    losses: np.ndarray
    models: np.ndarray


def barrier(
    loss: Loss,
    a: optax.Params,
    b: optax.Params,
    num: int = 11,
    where: _leaves.Where | None = None,
    progress: Progress | None = None,
) -> Segment:
    """Losses on the segment from ``a`` to ``b`` and the barrier between them.

    ``max_t L((1-t) a + t b) - ((1-t) L(a) + t L(b))``.

    Args:
      loss: Function ``params -> scalar``.
      a: The first model.
      b: The second model, of the same structure and shapes.
      num: Number of points, the ends included; at least 3.
      where: Leaves to move: a tree of bools, or ``(key_path, leaf) -> bool``. The other
        leaves stay those of ``a``.
      progress: Called with the number of points done and their total number.

    Returns:
      A :class:`Segment`. Its barrier is negative if all losses in between are below
      the straight line.

    Raises:
      ValueError: If ``num`` is below 3, the models differ in structure or shape, or
        ``where`` selects no leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_avg import landscape
      >>> double_well = lambda x: (x**2 - 1) ** 2
      >>> found = landscape.barrier(double_well, jnp.array(-1.0), jnp.array(1.0))
      >>> float(found.barrier)
      1.0

    References:
      Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis",
      2020, 1912.05671.
    """
    if num < 3:
        raise ValueError(f"num must be at least 3, got {num}.")
    _check_alike(a, b)
    unmoved = "where is true of no leaf, so that nothing would move"
    _leaves.refuse_none_selected(a, where, unmoved)
    moving = _leaves.select(a, where)

    def at(s):
        between = lambda x, y: (
            (1 - s) * _numerics.wide(x) + s * _numerics.wide(y)
        ).astype(x.dtype)
        return jax.tree.map(
            lambda keep, x, y: x if _leaves.is_masked(keep) else between(x, y),
            moving,
            a,
            b,
            is_leaf=_leaves.is_masked,
        )

    t = jnp.linspace(0, 1, num)
    losses = mapped(lambda s: loss(at(s)), t, progress)
    line = (1 - t) * losses[0] + t * losses[-1]
    return Segment(t, losses, jnp.max((losses - line)[1:-1]))


def plane(
    loss: Loss,
    models: Sequence[optax.Params],
    num: int = 21,
    margin: float = 0.2,
    progress: Progress | None = None,
) -> Plane:
    """Losses on the plane through three models, ``L(x + u e1 + v e2)``.

    ``x`` is the first model, ``e1`` the unit vector towards the second, and ``e2`` that
    along the orthogonal part of the way to the third. The coordinates ``u`` and ``v``
    are in units of the parameters. The function compiles one row and calls it for each
    row; do not jit it.

    Args:
      loss: Function ``params -> scalar``.
      models: Three trees of the same structure and shapes, not on one line.
      num: Number of points along each axis.
      margin: Margin around the models, as a share of their extent along each axis.
      progress: Called with the number of rows done and their total number.

    Returns:
      A :class:`Plane` of NumPy arrays.

    Raises:
      ValueError: If there are not three models, they differ in structure or shape, or
        they are on one line.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_avg import landscape
      >>> corners = [jnp.array(x) for x in ([0.0, 0.0], [1.0, 0.0], [0.0, 1.0])]
      >>> drawn = landscape.plane(lambda x: x @ x, corners, num=3, margin=0.0)
      >>> drawn.losses.tolist()
      [[0.0, 0.25, 1.0], [0.25, 0.5, 1.25], [1.0, 1.25, 2.0]]

    References:
      Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs",
      2018, 1802.10026.
    """
    if len(models) != 3:
        raise ValueError(
            f"plane needs three models, got {len(models)}; between two models call "
            "landscape.barrier(loss, a, b)."
        )
    origin, second, third = models
    for other in (second, third):
        _check_alike(origin, other)
    to = lambda x: jax.tree.map(
        lambda x, o: _numerics.wide(x) - _numerics.wide(o), x, origin
    )
    first, other = to(second), to(third)
    width = float(_numerics.norm(first))
    e1 = _numerics.unit(first)
    rest = _numerics.project_out(other, first)
    height = float(_numerics.norm(rest))
    if not width or height <= 1e-6 * float(_numerics.norm(other)):
        raise ValueError(
            "the three models are on one line; call landscape.barrier(loss, a, b)."
        )
    e2 = _numerics.unit(rest)
    places = np.array([[0, 0], [width, 0], [float(_numerics.dot(other, e1)), height]])
    low, high = places.min(axis=0), places.max(axis=0)
    pad = margin * (high - low)
    u, v = np.linspace(low - pad, high + pad, num).T

    return Plane(u, v, _grid(loss, origin, (e1, e2), (u, v), progress), places)


def slice_1d(
    loss: Loss,
    params: optax.Params,
    direction: optax.Params,
    radius: float = 1.0,
    num: int = 41,
    progress: Progress | None = None,
) -> Slice:
    """Losses along a direction, ``L(x + t d)`` for ``|t| <= radius``.

    Args:
      loss: Function ``params -> scalar``.
      params: The point ``x``.
      direction: The direction ``d``, a tree like ``params``, for example from
        :func:`filter_normalised`.
      radius: Largest ``t``, in units of the direction.
      num: Number of points. Pass an odd number to have ``x`` among them.
      progress: Called with the number of points done and their total number.

    Returns:
      A :class:`Slice`.

    Raises:
      ValueError: If the direction differs from ``params`` in structure or shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_avg import landscape
      >>> x, d = jnp.array(1.0), jnp.array(2.0)
      >>> landscape.slice_1d(lambda x: x**2, x, d, num=3).losses.tolist()
      [1.0, 1.0, 9.0]

    References:
      Li et al., "Visualizing the Loss Landscape of Neural Nets", 2018, 1712.09913.
    """
    _check_alike(params, direction)
    t = jnp.linspace(-radius, radius, num)
    at = lambda s: _leaves.moved(params, _numerics.scale(s, direction))
    return Slice(t, mapped(lambda s: loss(at(s)), t, progress))


def slice_2d(
    loss: Loss,
    params: optax.Params,
    directions: tuple[optax.Params, optax.Params],
    radius: float = 1.0,
    num: int = 21,
    progress: Progress | None = None,
) -> Plane:
    """Losses on a square around a model, ``L(x + u d1 + v d2)``.

    The function compiles one row and calls it for each row; do not jit it.

    Args:
      loss: Function ``params -> scalar``.
      params: The point ``x``.
      directions: The directions ``d1`` and ``d2``, trees like ``params``, for example
        from :func:`filter_normalised`.
      radius: Largest ``u`` and ``v``, in units of the directions.
      num: Number of points along each axis. Pass an odd number to have ``x`` among
        them.
      progress: Called with the number of rows done and their total number.

    Returns:
      A :class:`Plane` of NumPy arrays with one model at (0, 0).

    Raises:
      ValueError: If a direction differs from ``params`` in structure or shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_avg import landscape
      >>> axes = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
      >>> drawn = landscape.slice_2d(lambda x: x @ x, jnp.zeros(2), axes, num=3)
      >>> drawn.losses.tolist()
      [[2.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 2.0]]

    References:
      Li et al., "Visualizing the Loss Landscape of Neural Nets", 2018, 1712.09913.
    """
    for direction in directions:
        _check_alike(params, direction)
    t = np.linspace(-radius, radius, num)
    losses = _grid(loss, params, directions, (t, t), progress)
    return Plane(t, t, losses, np.zeros((1, 2)))


def filter_normalised(key: jax.Array | int, params: optax.Params) -> optax.Params:
    """A random direction whose filters have the norms of those of the parameters.

    ``d_f = z_f |x_f|/|z_f|`` with normal ``z`` for each filter ``f``. A filter is a
    slice at one index of the last axis (an output channel of a Flax kernel) of a leaf
    with two or more dimensions. Other leaves have the direction 0.

    Args:
      key: PRNG key of the direction, or an integer seed.
      params: The model.

    Returns:
      A tree like ``params``, for :func:`slice_1d` and :func:`slice_2d`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_avg import landscape
      >>> d = landscape.filter_normalised(jax.random.key(0), jnp.ones((4, 3)))
      >>> jnp.linalg.norm(d, axis=0).round(3).tolist()
      [2.0, 2.0, 2.0]

    References:
      Li et al., "Visualizing the Loss Landscape of Neural Nets", 2018, 1712.09913.
    """
    key = key_maker(key, "filter_normalised(jax.random.key(0), params)")()
    leaves, structure = jax.tree.flatten(params)

    def one(i, x):
        if x.ndim < 2:
            return jnp.zeros_like(x)
        d = jax.random.normal(
            jax.random.fold_in(key, i), x.shape, _numerics.wide(x).dtype
        )
        axes = tuple(range(x.ndim - 1))
        size = lambda w: jnp.sqrt(
            jnp.sum(_numerics.wide(w) ** 2, axis=axes, keepdims=True)
        )
        return (d / size(d) * size(x)).astype(x.dtype)

    return structure.unflatten([one(i, x) for i, x in enumerate(leaves)])


def _grid(
    loss: Loss,
    origin: optax.Params,
    directions: tuple[optax.Params, optax.Params],
    axes: tuple[np.ndarray, np.ndarray],
    progress: Progress | None,
) -> np.ndarray:
    """The loss at every point of a grid, row by row, shape (len(v), len(u))."""
    first, second = directions
    u, v = (jnp.asarray(axis, jnp.float32) for axis in axes)

    @jax.jit
    def row(y):
        start = _leaves.moved(
            jax.tree.map(_numerics.wide, origin), _numerics.scale(y, second)
        )
        to = lambda x: jax.tree.map(
            lambda s, d, o: (s + x * d).astype(o.dtype), start, first, origin
        )
        return lax.map(lambda x: loss(to(x)), u)

    rows = []
    for i, y in enumerate(v):
        rows.append(np.asarray(row(y)))
        if progress is not None:
            progress(i + 1, len(v))
    return np.stack(rows)


def _check_alike(a: optax.Params, b: optax.Params) -> None:
    """Raises unless two models have the same structure and shapes.

    Raises:
      ValueError: If they differ.
    """
    if jax.tree.structure(a) != jax.tree.structure(b):
        raise ValueError(
            "the models differ in structure; pass trees with the same keys."
        )
    for (path, x), y in zip(
        jax.tree.flatten_with_path(a)[0], jax.tree.leaves(b), strict=True
    ):
        if jnp.shape(x) != jnp.shape(y):
            raise ValueError(
                f"the models differ in shape at params{jax.tree_util.keystr(path)}: "
                f"{jnp.shape(x)} and {jnp.shape(y)}."
            )
