"""Curvature and sharpness of a loss at one point, matrix-free.

H v = d/dt grad L(x + t v) at t = 0
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from optax_avg import _checks, _numerics
from optax_avg.landscape._along import Loss, Progress, mapped, moved, report


def hessian_product(loss: Loss, params: Any, v: Any) -> Any:
    """``H v``, forward over reverse.

    Args:
      loss: ``params -> scalar``.
      params: ``x``.
      v: a tree like ``params``.

    Returns:
      A tree like ``params``.

    Raises:
      ValueError: If a leaf is complex.
      TypeError: If the gradient has no forward derivative, as where the ``fwd`` of a
        ``jax.custom_vjp`` calls the function itself.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_avg import landscape
      >>> hv = landscape.hessian_product(lambda x: x @ x, jnp.ones(2), jnp.ones(2))
      >>> hv.tolist()
      [2.0, 2.0]
    """
    _checks.refuse_complex("curvature", params)
    return _numerics.derivative_along(jax.grad(loss), params, v)


def _flat_product(loss: Loss, params: Any) -> tuple[Any, jax.Array]:
    """``v -> H v`` on flat vectors in float32 or wider, and one of zeros."""
    _checks.refuse_complex("curvature", params)
    flat, unravel = ravel_pytree(jax.tree.map(_numerics.wide, params))

    def product(v):
        tangent = jax.tree.map(lambda t, x: t.astype(x.dtype), unravel(v), params)
        hv = hessian_product(loss, params, tangent)
        return ravel_pytree(jax.tree.map(_numerics.wide, hv))[0]

    return product, jnp.zeros_like(flat)


def top_eigenvalues(
    loss: Loss,
    params: Any,
    key: jax.Array,
    k: int = 1,
    num_iters: int = 30,
    progress: Progress | None = None,
) -> jax.Array:
    """Largest eigenvalues of the Hessian by Lanczos with full reorthogonalisation.

    Exact (to rounding) once ``num_iters`` reaches the number of parameters, for a
    spectrum of any size. With fewer a repeated eigenvalue may be found only once: one
    start leads to one copy of it, further copies come last, and until then a smaller
    eigenvalue stands in their place. The basis takes ``num_iters`` times the memory of
    the parameters in float32.

    Args:
      loss: ``params -> scalar``.
      params: where.
      key: of the random start.
      k: how many.
      num_iters: Hessian-vector products; at least ``k``.
      progress: called with the products done and their number.

    Returns:
      Shape (k,), largest first.

    Raises:
      ValueError: If ``k`` is not between 1 and ``num_iters``, or a leaf is complex.
      TypeError: As :func:`hessian_product`.

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
    product, zeros = _flat_product(loss, params)
    num_iters = min(num_iters, zeros.size)
    if not 1 <= k <= num_iters:
        raise ValueError(f"k must lie between 1 and num_iters = {num_iters}, got {k}.")

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
        # What is left is rounding: the Krylov space is exhausted, go on from elsewhere.
        spent = beta <= 10 * eps * scale
        fresh = jax.random.normal(jax.random.fold_in(key, i + 1), q.shape, q.dtype)
        q = _numerics.unit(jnp.where(spent, orthogonal(fresh, basis), w))
        q = _numerics.unit(orthogonal(q, basis))
        report(progress, i + 1, num_iters)
        return (basis, q, scale), (alpha, jnp.where(spent, 0, beta))

    q = jax.random.normal(key, zeros.shape, zeros.dtype)
    basis = jnp.zeros((num_iters, zeros.size), zeros.dtype)
    start = basis, _numerics.unit(q), jnp.zeros([], zeros.dtype)
    _, (alphas, betas) = lax.scan(step, start, jnp.arange(num_iters))
    # A solver may lose what is far from 1.
    size = jnp.maximum(jnp.max(jnp.abs(alphas)), jnp.max(betas))
    size = jnp.where(size > 0, size, 1)
    alphas, betas = alphas / size, betas[:-1] / size
    tridiagonal = jnp.diag(alphas) + jnp.diag(betas, 1) + jnp.diag(betas, -1)
    return size * jnp.linalg.eigvalsh(tridiagonal)[::-1][:k]


def hessian_trace(
    loss: Loss,
    params: Any,
    key: jax.Array,
    num_samples: int = 64,
    *,
    sketch: int = 0,
    progress: Progress | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Trace of the Hessian: Hutchinson's estimator, or Hutch++ with a sketch.

    ``tr(Q' H Q) + mean of z' P H P z`` with ``P = I - Q Q'``, random signs ``z`` and
    ``Q`` an orthonormal basis of ``H S``, ``S`` of ``sketch`` columns of random signs.
    Without a sketch ``P = I`` and this is Hutchinson's. Hutch++ spends a third of its
    products on each of sketch, basis and samples: ``sketch = num_samples``.

    Args:
      loss: ``params -> scalar``.
      params: where.
      key: of the signs.
      num_samples: of ``z``, a Hessian-vector product each; at least 2.
      sketch: columns of ``Q``, two products each; ``sketch`` times the memory of the
        parameters in float32.
      progress: called with the samples done and their number.

    Returns:
      The estimate and its standard error, given ``Q``.

    Raises:
      ValueError: If ``num_samples`` is below 2 or ``sketch`` is negative.

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
    product, zeros = _flat_product(loss, params)
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


def sharpness(loss: Loss, params: Any, rho: Any = 0.05) -> jax.Array:
    """Ascent-based sharpness ``L(x + rho u(grad L(x))) - L(x)``.

    Pass float32 parameters: a small radius is below the spacing of bfloat16.

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
    _checks.refuse_complex("sharpness", params)
    value, grads = jax.value_and_grad(loss)(params)
    return loss(moved(params, rho, _numerics.unit(grads))) - value


def m_sharpness(
    loss: Callable[[Any, Any], jax.Array],
    params: Any,
    examples: Any,
    m: int,
    rho: Any = 0.05,
    progress: Progress | None = None,
) -> jax.Array:
    """m-sharpness: the mean of :func:`sharpness` over groups of ``m`` examples.

    Args:
      loss: ``(params, examples) -> scalar``, a mean over examples.
      params: ``x``.
      examples: a tree of arrays with the examples along the first axis.
      m: examples in a group.
      rho: radius.
      progress: called with the groups done and their number.

    Returns:
      A scalar.

    Raises:
      ValueError: If ``m`` does not divide the number of examples.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_avg import landscape
      >>> loss = lambda x, y: jnp.mean((x - y) ** 2)
      >>> y = jnp.array([-1.0, 1.0])
      >>> x = jnp.array(0.0)
      >>> [float(landscape.m_sharpness(loss, x, y, m, 0.5)) for m in (1, 2)]
      [1.25, 0.0]

    References:
      Foret et al., 2021, 2010.01412; Andriushchenko and Flammarion, "Towards
      Understanding Sharpness-Aware Minimization", 2022, 2206.06232.
    """
    count = len(jax.tree.leaves(examples)[0])
    if m < 1 or count % m:
        raise ValueError(f"m must divide the {count} examples, got {m}.")
    groups = jax.tree.map(
        lambda a: jnp.reshape(a, (count // m, m, *a.shape[1:])), examples
    )
    of_group = lambda group: sharpness(lambda x: loss(x, group), params, rho)
    return mapped(of_group, groups, progress).mean()


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
    _checks.refuse_complex("gradient_norm_in_ball", params)
    gradient = jax.grad(loss)
    d = jax.tree.map(lambda x: jnp.zeros_like(_numerics.wide(x)), params)
    g = gradient(params)
    largest = _numerics.norm(g)
    for _ in range(num_steps):
        at = moved(params, 1.0, d)
        along = jax.tree.map(lambda u, x: u.astype(x.dtype), _numerics.unit(g), params)
        up = _numerics.unit(hessian_product(loss, at, along))
        d = jax.tree.map(lambda d, u: d + rho / num_steps * u, d, up)
        n = _numerics.norm(d)
        d = _numerics.scale(jnp.where(n > rho, rho / jnp.maximum(n, 1e-30), 1), d)
        g = gradient(moved(params, 1.0, d))
        largest = jnp.maximum(largest, _numerics.norm(g))
    return rho * largest
