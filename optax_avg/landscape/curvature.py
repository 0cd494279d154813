"""Curvature and sharpness of a loss at one point, matrix-free.

H v = d/dt grad L(x + t v) at t = 0
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from optax_avg import _leaves, _mixups, _numerics
from optax_avg._keys import key_maker
from optax_avg.landscape.surface import Loss, Progress, mapped, report

__all__ = [
    "gradient_norm_in_ball",
    "hessian_product",
    "hessian_trace",
    "m_sharpness",
    "sharpness",
    "top_eigenvalues",
]


def hessian_product(loss: Loss, params: optax.Params, v: optax.Params) -> optax.Params:
    """Hessian-vector product ``H v``, forward over reverse.

    Args:
      loss: Function ``params -> scalar``.
      params: Point at which the Hessian is taken.
      v: Direction, a tree like ``params``.

    Returns:
      A tree like ``params``, in units of the loss per squared unit of the parameters
      times the unit of ``v``.

    Raises:
      ValueError: If a leaf is complex or no float, or ``v`` is not like ``params``.
      TypeError: If the gradient has no forward derivative. An example is a
        ``jax.custom_vjp`` whose ``fwd`` calls the function itself.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_avg import landscape
      >>> hv = landscape.hessian_product(lambda x: x @ x, jnp.ones(2), jnp.ones(2))
      >>> hv.tolist()
      [2.0, 2.0]
    """
    _mixups.refuse_no_loss("hessian_product", loss, params)
    _mixups.refuse_no_direction(v, params)
    return _numerics.hessian_product(jax.grad(loss), params, v)


_Product = Callable[[jax.Array], jax.Array]


def _flat_product(
    name: str, loss: Loss, params: optax.Params
) -> tuple[_Product, jax.Array]:
    """``v -> H v`` on vectors of shape (d,) in float32 or wider, and such zeros."""
    _mixups.refuse_no_loss(name, loss, params)
    flat, unravel = ravel_pytree(jax.tree.map(_numerics.wide, params))

    def product(v):
        hv = hessian_product(loss, params, unravel(v))
        return ravel_pytree(jax.tree.map(_numerics.wide, hv))[0]

    return product, jnp.zeros_like(flat)


def top_eigenvalues(
    loss: Loss,
    params: optax.Params,
    key: jax.Array | int,
    k: int = 1,
    num_iters: int = 30,
    progress: Progress | None = None,
) -> jax.Array:
    """Largest eigenvalues of the Hessian by Lanczos with full reorthogonalisation.

    ``H Q = Q T`` with orthonormal columns ``Q`` and a tridiagonal ``T``, whose
    eigenvalues are the estimates. They are exact up to rounding if ``num_iters`` is at
    least the number of parameters, whatever the scale of the spectrum. With fewer
    iterations a repeated eigenvalue may be found only once, and the next smaller one
    then takes the place of its other copies. The basis takes ``num_iters`` times the
    memory of the parameters in float32.

    Args:
      loss: Function ``params -> scalar``.
      params: Point at which the Hessian is taken.
      key: PRNG key of the start vector, or an integer seed.
      k: Number of eigenvalues.
      num_iters: Number of Hessian-vector products, at least ``k``.
      progress: Called with the number of products done and their total number.

    Returns:
      The eigenvalues, largest first, shape (k,), in units of the loss per squared unit
      of the parameters.

    Raises:
      ValueError: If ``k`` is not between 1 and ``num_iters`` (or the number of
        parameters, if that is smaller), or a leaf is complex.
      TypeError: If the gradient has no forward derivative, as for
        :func:`hessian_product`.

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
    key = key_maker(key, "top_eigenvalues(loss, params, jax.random.key(0))")()
    product, zeros = _flat_product("top_eigenvalues", loss, params)
    num_iters = min(num_iters, zeros.size)
    if not 1 <= k <= num_iters:
        raise ValueError(f"k must lie between 1 and num_iters = {num_iters}, got {k}.")
    alphas, betas = _lanczos(product, zeros, key, num_iters, progress)
    # A solver may lose what is far from 1.
    size = jnp.maximum(jnp.max(jnp.abs(alphas)), jnp.max(betas))
    size = jnp.where(size > 0, size, 1)
    alphas, betas = alphas / size, betas[:-1] / size
    tridiagonal = jnp.diag(alphas) + jnp.diag(betas, 1) + jnp.diag(betas, -1)
    return size * jnp.linalg.eigvalsh(tridiagonal)[::-1][:k]


def _lanczos(
    product: _Product,
    zeros: jax.Array,
    key: jax.Array,
    num_iters: int,
    progress: Progress | None,
) -> tuple[jax.Array, jax.Array]:
    """The diagonal of ``T`` and the entries below it, each of shape (num_iters,).

    ``beta_i q_{i+1} = H q_i - alpha_i q_i - beta_{i-1} q_{i-1}``. The last ``beta``
    belongs to a further row.
    """

    def orthogonal(w, basis):
        # Twice is enough: the second pass removes what rounding left of the first.
        for _ in range(2):
            w = w - basis.T @ (basis @ w)
        return w

    eps = jnp.finfo(zeros.dtype).eps

    def step(carry, i):
        basis, q, scale = carry
        basis = basis.at[i].set(q)
        w = product(q)
        alpha = w @ q
        scale = jnp.maximum(scale, _numerics.norm(w))
        w = orthogonal(w, basis)
        beta = _numerics.norm(w)
        # Only rounding is left: the Krylov space is exhausted, so start from elsewhere.
        spent = beta <= 10 * eps * scale
        fresh = jax.random.normal(jax.random.fold_in(key, i + 1), q.shape, q.dtype)
        q = _numerics.unit(jnp.where(spent, orthogonal(fresh, basis), w))
        q = _numerics.unit(orthogonal(q, basis))
        report(progress, i + 1, num_iters)
        return (basis, q, scale), (alpha, jnp.where(spent, 0, beta))

    q = jax.random.normal(key, zeros.shape, zeros.dtype)
    basis = jnp.zeros((num_iters, zeros.size), zeros.dtype)
    start = basis, _numerics.unit(q), jnp.zeros([], zeros.dtype)
    _, entries = lax.scan(step, start, jnp.arange(num_iters))
    return entries


def hessian_trace(
    loss: Loss,
    params: optax.Params,
    key: jax.Array | int,
    num_samples: int = 64,
    *,
    sketch: int = 0,
    progress: Progress | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Trace of the Hessian: Hutchinson's estimator, or Hutch++ with a sketch.

    ``tr(Q' H Q) + mean of z' P H P z`` with ``P = I - Q Q'``, random signs ``z`` and
    an orthonormal basis ``Q`` of ``H S``, where ``S`` has ``sketch`` columns of random
    signs. Without a sketch ``P = I``, which is Hutchinson's estimator. Hutch++ spends
    a third of its products on each of sketch, basis and samples: pass
    ``sketch=num_samples``.

    Args:
      loss: Function ``params -> scalar``.
      params: Point at which the Hessian is taken.
      key: PRNG key of the random signs, or an integer seed.
      num_samples: Number of vectors ``z``, at least 2. Each takes one Hessian-vector
        product.
      sketch: Number of columns of ``Q``. Each takes two products, and together they
        take ``sketch`` times the memory of the parameters in float32.
      progress: Called with the number of samples done and their total number.

    Returns:
      The estimate and its standard error for the given ``Q``, two scalars in units of
      the loss per squared unit of the parameters.

    Raises:
      ValueError: If ``num_samples`` is below 2, ``sketch`` is negative, or a leaf is
        complex.
      TypeError: If the gradient has no forward derivative, as for
        :func:`hessian_product`.

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
      Meyer et al., "Hutch++: Optimal Stochastic Trace Estimation", 2021, 2010.09649.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2, got {num_samples}.")
    if sketch < 0:
        raise ValueError(f"sketch must not be negative, got {sketch}.")
    key = key_maker(key, "hessian_trace(loss, params, jax.random.key(0))")()
    product, zeros = _flat_product("hessian_trace", loss, params)
    of_sketch, of_samples = jax.random.split(key)
    columns = min(sketch, zeros.size)
    signs = lambda key: jax.random.rademacher(key, zeros.shape, zeros.dtype)
    basis, inside = None, jnp.zeros([], zeros.dtype)
    if columns:
        seen = lax.map(
            lambda k: product(signs(k)), jax.random.split(of_sketch, columns)
        )
        basis = jnp.linalg.qr(seen.T)[0]
        inside = lax.map(lambda q: q @ product(q), basis.T).sum()

    def sample(key):
        z = signs(key)
        if basis is not None:
            z = z - basis @ (basis.T @ z)
        return z @ product(z)

    values = mapped(sample, jax.random.split(of_samples, num_samples), progress)
    return inside + values.mean(), values.std(ddof=1) / num_samples**0.5


def sharpness(
    loss: Loss, params: optax.Params, rho: float | jax.Array = 0.05
) -> jax.Array:
    """Ascent-based sharpness ``L(x + rho g/|g|) - L(x)`` with ``g = grad L(x)``.

    Pass float32 parameters, because a small radius is below the spacing of bfloat16.

    Args:
      loss: Function ``params -> scalar``.
      params: The point ``x``.
      rho: Radius, in units of the parameters.

    Returns:
      A scalar in units of the loss.

    Raises:
      ValueError: If a leaf is complex.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_avg import landscape
      >>> float(landscape.sharpness(lambda x: x**2, jnp.array(1.0), 0.5))
      1.25

    References:
      Foret et al., "Sharpness-Aware Minimization for Efficiently Improving
      Generalization", 2021, 2010.01412.
    """
    _mixups.refuse_no_loss("sharpness", loss, params)
    value, grads = jax.value_and_grad(loss)(params)
    d = _numerics.scale(rho, _numerics.unit(grads))
    return loss(_leaves.moved(params, d)) - value


def m_sharpness(
    loss: Callable[[optax.Params, Any], jax.Array],
    params: optax.Params,
    examples: Any,
    m: int,
    rho: float | jax.Array = 0.05,
    progress: Progress | None = None,
) -> jax.Array:
    """m-sharpness: the mean of :func:`sharpness` over groups of ``m`` examples.

    Args:
      loss: Function ``(params, examples) -> scalar``, a mean over the examples.
      params: The point ``x``.
      examples: A tree of arrays of shape (n, ...) with one example per row.
      m: Number of examples in a group; it divides ``n``.
      rho: Radius, in units of the parameters.
      progress: Called with the number of groups done and their total number.

    Returns:
      A scalar in units of the loss.

    Raises:
      ValueError: If ``m`` does not divide the number of examples, or a leaf of
        ``params`` is complex.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_avg import landscape
      >>> loss = lambda x, y: jnp.mean((x - y) ** 2)
      >>> y = jnp.array([-1.0, 1.0])
      >>> x = jnp.array(0.0)
      >>> [float(landscape.m_sharpness(loss, x, y, m, 0.5)) for m in (1, 2)]
      [1.25, 0.0]

    References:
      Foret et al., "Sharpness-Aware Minimization for Efficiently Improving
      Generalization", 2021, 2010.01412.
      Andriushchenko and Flammarion, "Towards Understanding Sharpness-Aware
      Minimization", 2022, 2206.06232.
    """
    count = len(jax.tree.leaves(examples)[0])
    if m < 1 or count % m:
        raise ValueError(
            f"m must divide the {count} examples, got {m}; leave some examples out."
        )
    groups = jax.tree.map(
        lambda a: jnp.reshape(a, (count // m, m, *a.shape[1:])), examples
    )
    of_group = lambda group: sharpness(lambda x: loss(x, group), params, rho)
    return mapped(of_group, groups, progress).mean()


def gradient_norm_in_ball(
    loss: Loss,
    params: optax.Params,
    rho: float | jax.Array = 0.05,
    num_steps: int = 1,
) -> jax.Array:
    """First-order flatness ``rho max |grad L|`` over a ball, by ascent on the norm.

    ``d <- Proj(d + rho/num_steps f/|f|)`` onto ``|d| <= rho``, ``num_steps`` times,
    with ``f = H g/|g|`` at ``x + d``. The maximum is over all points on the way, ``x``
    included.

    Args:
      loss: Function ``params -> scalar``.
      params: Centre ``x`` of the ball.
      rho: Radius of the ball, in units of the parameters.
      num_steps: Number of ascent steps.

    Returns:
      A scalar in units of the loss.

    Raises:
      ValueError: If a leaf is complex.
      TypeError: If the gradient has no forward derivative, as for
        :func:`hessian_product`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_avg import landscape
      >>> float(landscape.gradient_norm_in_ball(lambda x: x**2, jnp.array(1.0), 0.5))
      1.5

    References:
      Zhang et al., "Gradient Norm Aware Minimization Seeks First-Order Flatness and
      Improves Generalization", 2023, 2303.03108.
    """
    _mixups.refuse_no_loss("gradient_norm_in_ball", loss, params)
    gradient = jax.grad(loss)
    d = jax.tree.map(lambda x: jnp.zeros_like(_numerics.wide(x)), params)
    g = gradient(params)
    largest = _numerics.norm(g)
    for _ in range(num_steps):
        at = _leaves.moved(params, d)
        up = _numerics.unit(hessian_product(loss, at, _numerics.unit(g)))
        d = jax.tree.map(lambda d, u: d + rho / num_steps * u, d, up)
        n = _numerics.norm(d)
        d = _numerics.scale(jnp.where(n > rho, rho / jnp.maximum(n, 1e-30), 1), d)
        g = gradient(_leaves.moved(params, d))
        largest = jnp.maximum(largest, _numerics.norm(g))
    return rho * largest
