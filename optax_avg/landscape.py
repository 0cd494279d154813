"""Is it flatter? Curvature, sharpness, barriers and planes of a loss, matrix-free.

    H v = d/dt grad L(x + t v) at t = 0

Every function takes ``loss: params -> scalar`` on any pytree of float leaves and, where
nothing else is said, can be jitted.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from optax_avg import _tree

Loss = Callable[[Any], jax.Array]
Progress = Callable[[int, int], Any]


class Segment(NamedTuple):
    """Losses along a straight line.

    Attributes:
      t: shape (num,), from 0 at the first model to 1 at the second.
      losses: shape (num,).
      barrier: highest loss above the straight line between the two end losses.
    """

    t: jax.Array
    losses: jax.Array
    barrier: jax.Array


class Plane(NamedTuple):
    """Losses on a plane.

    Attributes:
      u: shape (num,), first coordinates, in units of length of the parameters.
      v: shape (num,), second coordinates.
      losses: shape (num, num), ``losses[i, j]`` at ``(u[j], v[i])``.
      models: shape (3, 2), coordinates of the three models.
    """

    u: np.ndarray
    v: np.ndarray
    losses: np.ndarray
    models: np.ndarray


def hessian_product(loss: Loss, params: Any, v: Any) -> Any:
    """``H v``, forward over reverse.

    Args:
      loss: ``params -> scalar``.
      params: ``x``.
      v: a tree like ``params``.

    Returns:
      A tree like ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_avg import landscape
      >>> hv = landscape.hessian_product(lambda x: x @ x, jnp.ones(2), jnp.ones(2))
      >>> hv.tolist()
      [2.0, 2.0]
    """
    return jax.jvp(jax.grad(loss), (params,), (v,))[1]


def top_eigenvalues(
    loss: Loss, params: Any, key: jax.Array, k: int = 1, num_iters: int = 30
) -> jax.Array:
    """Largest eigenvalues of the Hessian by Lanczos with full reorthogonalisation.

    Exact (to rounding) once ``num_iters`` reaches the number of parameters. The basis
    takes ``num_iters`` times the memory of the parameters in float32.

    Args:
      loss: ``params -> scalar``.
      params: where.
      key: of the random start.
      k: how many.
      num_iters: Hessian-vector products; at least ``k``.

    Returns:
      Shape (k,), largest first.

    Raises:
      ValueError: If ``k`` is not between 1 and ``num_iters``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_avg import landscape
      >>> loss = lambda x: jnp.sum(jnp.arange(1.0, 5.0) * x**2) / 2
      >>> top = landscape.top_eigenvalues(loss, jnp.ones(4), jax.random.key(0), 2, 4)
      >>> [round(float(value), 3) for value in top]
      [4.0, 3.0]

    References:
      Lanczos, "An Iteration Method for the Solution of the Eigenvalue Problem of Linear
      Differential and Integral Operators", 1950.
    """
    flat, unravel = ravel_pytree(jax.tree.map(_tree.wide, params))
    num_iters = min(num_iters, flat.size)
    if not 1 <= k <= num_iters:
        raise ValueError(f"k must lie between 1 and num_iters = {num_iters}, got {k}.")

    def product(v):
        tangent = jax.tree.map(lambda t, x: t.astype(x.dtype), unravel(v), params)
        hv = hessian_product(loss, params, tangent)
        return ravel_pytree(jax.tree.map(_tree.wide, hv))[0]

    def orthogonal(w, basis):
        # Twice is enough: the second pass removes what rounding left of the first.
        for _ in range(2):
            w = w - basis.T @ (basis @ w)
        return w

    def step(carry, i):
        basis, q = carry
        basis = basis.at[i].set(q)
        w = product(q)
        alpha = w @ q
        w = orthogonal(w, basis)
        beta = jnp.linalg.norm(w)
        # An invariant subspace is exhausted: go on from another direction.
        tiny = beta <= 1e-6 * jnp.maximum(jnp.abs(alpha), 1e-30)
        fresh = jax.random.normal(jax.random.fold_in(key, i + 1), q.shape, q.dtype)
        fresh = orthogonal(fresh, basis)
        direction = jnp.where(tiny, fresh, w)
        length = jnp.linalg.norm(direction)
        q = direction / jnp.where(length > 0, length, 1)
        return (basis, q), (alpha, jnp.where(tiny, 0, beta))

    q = jax.random.normal(key, flat.shape, flat.dtype)
    start = jnp.zeros((num_iters, flat.size), flat.dtype), q / jnp.linalg.norm(q)
    _, (alphas, betas) = lax.scan(step, start, jnp.arange(num_iters))
    tridiagonal = jnp.diag(alphas) + jnp.diag(betas[:-1], 1) + jnp.diag(betas[:-1], -1)
    return jnp.linalg.eigvalsh(tridiagonal)[::-1][:k]


def hessian_trace(
    loss: Loss, params: Any, key: jax.Array, num_samples: int = 64
) -> tuple[jax.Array, jax.Array]:
    """Trace of the Hessian, Hutchinson's estimator: mean of ``z' H z``, random signs z.

    Args:
      loss: ``params -> scalar``.
      params: where.
      key: of the signs.
      num_samples: Hessian-vector products; at least 2.

    Returns:
      The estimate and its standard error.

    Raises:
      ValueError: If ``num_samples`` is below 2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_avg import landscape
      >>> loss = lambda x: jnp.sum(jnp.arange(1.0, 5.0) * x**2) / 2
      >>> trace, error = landscape.hessian_trace(loss, jnp.ones(4), jax.random.key(0))
      >>> float(trace), float(error)
      (10.0, 0.0)

    References:
      Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix for
      Laplacian Smoothing Splines", 1990.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2, got {num_samples}.")

    def sample(key):
        z = _signs(key, params)
        return _tree.dot(z, hessian_product(loss, params, z))

    values = lax.map(sample, jax.random.split(key, num_samples))
    return values.mean(), values.std(ddof=1) / num_samples**0.5


def sharpness(loss: Loss, params: Any, rho: Any = 0.05) -> jax.Array:
    """Ascent-based sharpness ``L(x + rho u(grad L(x))) - L(x)``.

    m-sharpness is the mean of it over batches of m examples.

    Args:
      loss: ``params -> scalar``.
      params: ``x``.
      rho: radius.

    Returns:
      A scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_avg import landscape
      >>> float(landscape.sharpness(lambda x: x**2, jnp.array(1.0), 0.5))
      1.25

    References:
      Foret et al., "Sharpness-Aware Minimization for Efficiently Improving
      Generalization", 2021, 2010.01412.
    """
    value, grads = jax.value_and_grad(loss)(params)
    return loss(_moved(params, rho, _tree.unit(grads))) - value


def gradient_norm_in_ball(
    loss: Loss, params: Any, rho: Any = 0.05, num_steps: int = 1
) -> jax.Array:
    """First-order flatness ``rho max |grad L|`` over a ball, by ascent on the norm.

    ``num_steps`` times ``d <- Proj(d + rho/num_steps u(H g/|g|))`` onto the ball; the
    largest norm on the way counts, that at ``x`` included.

    Args:
      loss: ``params -> scalar``.
      params: centre of the ball.
      rho: radius of the ball.
      num_steps: ascent steps.

    Returns:
      A scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_avg import landscape
      >>> float(landscape.gradient_norm_in_ball(lambda x: x**2, jnp.array(1.0), 0.5))
      1.5

    References:
      Zhang et al., "Gradient Norm Aware Minimization Seeks First-Order Flatness and
      Improves Generalization", 2023, 2303.03108.
    """
    gradient = jax.grad(loss)
    d = jax.tree.map(lambda x: jnp.zeros_like(_tree.wide(x)), params)
    g = gradient(params)
    largest = _tree.norm(g)
    for _ in range(num_steps):
        at = _moved(params, 1.0, d)
        along = jax.tree.map(lambda u, x: u.astype(x.dtype), _tree.unit(g), params)
        up = _tree.unit(hessian_product(loss, at, along))
        d = jax.tree.map(lambda d, u: d + rho / num_steps * u, d, up)
        n = _tree.norm(d)
        d = _tree.scale(jnp.where(n > rho, rho / jnp.maximum(n, 1e-30), 1), d)
        g = gradient(_moved(params, 1.0, d))
        largest = jnp.maximum(largest, _tree.norm(g))
    return rho * largest


def barrier(
    loss: Loss, a: Any, b: Any, num: int = 11, where: _tree.Where | None = None
) -> Segment:
    """Losses on the segment from ``a`` to ``b`` and the barrier between them.

    ``max_t L((1-t) a + t b) - ((1-t) L(a) + t L(b))``.

    Args:
      loss: ``params -> scalar``.
      a: a model.
      b: another of the same structure.
      num: points, the ends included; at least 3.
      where: leaves to move, a tree of bools or ``(key_path, leaf) -> bool``; the others
        stay those of ``a``.

    Returns:
      A :class:`Segment`; a negative barrier means that the middle is lower.

    Raises:
      ValueError: If ``num`` is below 3 or the models differ in structure or shape.

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
    moving = _tree.select(a, where)
    end = jax.tree.map(
        lambda keep, x, y: x if _tree.is_masked(keep) else y,
        moving,
        a,
        b,
        is_leaf=_tree.is_masked,
    )
    t = jnp.linspace(0, 1, num)
    losses = lax.map(lambda s: loss(_between(a, end, s)), t)
    line = (1 - t) * losses[0] + t * losses[-1]
    return Segment(t, losses, jnp.max((losses - line)[1:-1]))


def plane(
    loss: Loss,
    models: Sequence[Any],
    num: int = 21,
    margin: float = 0.2,
    progress: Progress | None = None,
) -> Plane:
    """Losses on the plane through three models, as the papers of SWA draw it.

    ``u`` points from the first model to the second, ``v`` is the orthogonal part of the
    way to the third. Runs row by row, so that it can report; not to be jitted itself.

    Args:
      loss: ``params -> scalar``.
      models: three trees of one structure, not on one line.
      num: points along each axis.
      margin: beyond the models, as a share of their extent.
      progress: called with the rows done and the number of rows.

    Returns:
      A :class:`Plane` of NumPy arrays.

    Raises:
      ValueError: If there are not three models, they differ in structure or shape, or
        stand on one line.

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
        raise ValueError(f"plane needs three models, got {len(models)}.")
    origin, second, third = models
    for other in (second, third):
        _check_alike(origin, other)
    to = lambda x: jax.tree.map(lambda x, o: _tree.wide(x) - _tree.wide(o), x, origin)
    first, other = to(second), to(third)
    width = float(_tree.norm(first))
    e1 = _tree.unit(first)
    rest = _tree.project_out(other, first)
    height = float(_tree.norm(rest))
    if not width or height <= 1e-6 * float(_tree.norm(other)):
        raise ValueError("the three models stand on one line; see landscape.barrier.")
    e2 = _tree.unit(rest)
    places = np.array([[0, 0], [width, 0], [float(_tree.dot(other, e1)), height]])
    low, high = places.min(axis=0), places.max(axis=0)
    pad = margin * (high - low)
    u, v = np.linspace(low - pad, high + pad, num).T

    def at(x, y):
        offset = jax.tree.map(lambda a, b: x * a + y * b, e1, e2)
        return loss(_moved(origin, 1.0, offset))

    row = jax.jit(lambda y: lax.map(lambda x: at(x, y), jnp.asarray(u, jnp.float32)))
    losses = []
    for i, y in enumerate(v):
        losses.append(np.asarray(row(jnp.float32(y))))
        if progress is not None:
            progress(i + 1, num)
    return Plane(u, v, np.stack(losses), places)


def filter_normalised(key: jax.Array, params: Any) -> Any:
    """A random direction with the norm of every filter of the parameters.

    A filter is a slice along the last axis (the output channels of a Flax kernel) of a
    leaf with two or more dimensions; other leaves get no direction.

    Args:
      key: of the direction.
      params: the model.

    Returns:
      A tree like ``params``; a slice along it is ``loss(params + t * direction)``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_avg import landscape
      >>> d = landscape.filter_normalised(jax.random.key(0), jnp.ones((4, 3)))
      >>> jnp.linalg.norm(d, axis=0).round(3).tolist()
      [2.0, 2.0, 2.0]

    References:
      Li et al., "Visualizing the Loss Landscape of Neural Nets", 2018, 1712.09913.
    """
    leaves, structure = jax.tree.flatten(params)

    def one(i, x):
        if x.ndim < 2:
            return jnp.zeros_like(x)
        d = jax.random.normal(jax.random.fold_in(key, i), x.shape, _tree.wide(x).dtype)
        axes = tuple(range(x.ndim - 1))
        size = lambda w: jnp.sqrt(jnp.sum(_tree.wide(w) ** 2, axis=axes, keepdims=True))
        return (d / size(d) * size(x)).astype(x.dtype)

    return structure.unflatten([one(i, x) for i, x in enumerate(leaves)])


def _moved(params: Any, factor: Any, direction: Any) -> Any:
    """``x + c d`` in the dtype of ``x``."""
    return jax.tree.map(
        lambda x, d: (_tree.wide(x) + factor * d).astype(x.dtype), params, direction
    )


def _between(a: Any, b: Any, t: Any) -> Any:
    return jax.tree.map(
        lambda x, y: ((1 - t) * _tree.wide(x) + t * _tree.wide(y)).astype(x.dtype), a, b
    )


def _signs(key: jax.Array, params: Any) -> Any:
    leaves, structure = jax.tree.flatten(params)
    return structure.unflatten(
        [
            jax.random.rademacher(jax.random.fold_in(key, i), x.shape, x.dtype)
            for i, x in enumerate(leaves)
        ]
    )


def _check_alike(a: Any, b: Any) -> None:
    """Raises unless two models have one structure and the same shapes."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        raise ValueError("the models differ in structure.")
    for (path, x), y in zip(
        jax.tree.flatten_with_path(a)[0], jax.tree.leaves(b), strict=True
    ):
        if jnp.shape(x) != jnp.shape(y):
            raise ValueError(
                f"the models differ in shape at params{jax.tree_util.keystr(path)}: "
                f"{jnp.shape(x)} and {jnp.shape(y)}."
            )
