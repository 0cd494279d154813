"""AdaHessian: Adam whose second moment is of the diagonal of the Hessian.

    D = z * H z,    m <- b1 m + (1 - b1) g,    v <- b2 v + (1 - b2) mean(D)^2,
    w <- w - learning_rate mhat/(vhat^(k/2) + eps)

``z`` has random signs, so that ``D`` is the diagonal of ``H`` on average (Hutchinson).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_avg import _checks, _leaves, _mesh, _numerics
from optax_avg._keys import key_maker
from optax_avg.optimizers import _matrices
from optax_avg.optimizers._wide import in_float32

__all__ = ["AdaHessianState", "adahessian", "scale_by_adahessian"]

# From a leaf to the axes over which its part of the diagonal is averaged.
SpatialAxes = Callable[[jax.Array], tuple[int, ...]]


class AdaHessianState(NamedTuple):
    """State of :func:`scale_by_adahessian`.

    Attributes:
      hessian_step: Number of steps so far, int32.
      hessian_key: PRNG key of the random signs.
      gradient_mean: ``m`` in float32 or wider, ``MaskedNode`` at leaves that are no
        floats.
      curvature_square: ``v``, like ``gradient_mean``.
    """

    hessian_step: jax.Array
    hessian_key: jax.Array
    gradient_mean: Any
    curvature_square: Any


def adahessian(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-4,
    weight_decay: float = 0.0,
    *,
    hessian_power: float = 1.0,
    spatial_axes: SpatialAxes | None = None,
    key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """AdaHessian: a diagonal second-order optimizer.

    ``w <- w - learning_rate (mhat/(vhat^(k/2) + eps) + weight_decay w)``, with the
    direction of :func:`scale_by_adahessian`. One step costs about as much as two.

    Args:
      learning_rate: Step size, a float or a schedule. The authors take 0.15.
      b1: Decay of the mean of the gradients, in [0, 1).
      b2: Decay of the mean of the squared diagonal, in [0, 1).
      eps: Added to the denominator. It has the unit of the diagonal to the power ``k``.
      weight_decay: Decoupled weight decay, not negative.
      hessian_power: ``k``, in [0, 1].
      spatial_axes: Axes over which the diagonal is averaged, see
        :func:`scale_by_adahessian`.
      key: PRNG key of the random signs, or an integer seed.

    Returns:
      An optimizer; ``update`` needs the parameters and one of ``hvp_fn``, ``grad_fn``
      and ``value_fn``, see :func:`scale_by_adahessian`.

    Raises:
      ValueError: As for :func:`scale_by_adahessian`.

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x: jnp.sum(jnp.array([100.0, 1.0]) * x**2) / 2
      >>> tx = oa.optimizers.adahessian(1.0, eps=0.0)
      >>> x = jnp.array([1.0, 1.0])
      >>> updates, _ = tx.update(jax.grad(loss)(x), tx.init(x), x, value_fn=loss)
      >>> updates.round(3).tolist()  # the step of Newton
      [-1.0, -1.0]

    References:
      Yao et al., "ADAHESSIAN: An Adaptive Second Order Optimizer for Machine Learning",
      2020, 2006.00719.
    """
    decay = _checks.finite("weight_decay", weight_decay)
    rate = _checks.finite_or_schedule("learning_rate", learning_rate)
    links = [
        scale_by_adahessian(
            b1,
            b2,
            eps,
            hessian_power=hessian_power,
            spatial_axes=spatial_axes,
            key=key,
        ),
        in_float32(optax.add_decayed_weights(decay)),
        in_float32(optax.scale_by_learning_rate(rate)),
    ]
    return optax.chain(*links)


def scale_by_adahessian(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-4,
    *,
    hessian_power: float = 1.0,
    spatial_axes: SpatialAxes | None = None,
    key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """The direction of AdaHessian: ``mhat/(vhat^(k/2) + eps)``.

    ``m`` is the mean of the gradients and ``v`` that of the squares of the diagonal of
    the Hessian, both exponential and debiased as in Adam. The diagonal is
    ``z * H z`` with random signs ``z``, averaged over ``spatial_axes``.

    The authors' code averages its absolute values instead, which is larger where signs
    differ.

    Args:
      b1: Decay of the mean of the gradients, in [0, 1). With 0 it is a diagonal
        preconditioner, for :func:`preconditioned_polyak`.
      b2: Decay of the mean of the squared diagonal, in [0, 1).
      eps: Added to the denominator. It has the unit of the diagonal to the power ``k``.
      hessian_power: ``k``, in [0, 1]; 0 divides by ``1 + eps``.
      spatial_axes: Function from a leaf to the axes over which the diagonal is
        averaged. The default averages over the first two axes of leaves with four, as
        Flax stores kernels of convolutions, and over none of others.
      key: PRNG key of the random signs, or an integer seed.

    Returns:
      A transformation with the state :class:`AdaHessianState`. ``update`` needs the
      parameters and one of three functions of the same batch, the first that is there:
      ``hvp_fn(v) -> H v`` on trees like the parameters, ``grad_fn(params) ->
      gradients`` or ``value_fn(params) -> loss``.

    Raises:
      ValueError: If an argument is out of range, a leaf is complex, or ``update`` gets
        no params or none of the three functions.
      TypeError: If the gradient has no forward derivative.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.optimizers.scale_by_adahessian(eps=0.0)
      >>> x, g = jnp.zeros(2), jnp.array([8.0, 8.0])
      >>> hvp_fn = lambda v: jnp.array([2.0, -4.0]) * v
      >>> tx.update(g, tx.init(x), x, hvp_fn=hvp_fn)[0].round(3).tolist()
      [4.0, 2.0]

    References:
      Yao et al., 2020, 2006.00719, algorithm 1.
    """
    b1 = _checks.within("b1", b1, 0, 1, closed_high=False)
    b2 = _checks.within("b2", b2, 0, 1, closed_high=False)
    eps = _checks.finite("eps", eps)
    k = _checks.within("hessian_power", hessian_power, 0, 1)
    axes_of = _kernel_axes if spatial_axes is None else spatial_axes
    make_key = key_maker(key, "adahessian(0.15, key=jax.random.key(0))")

    def init(params: optax.Params) -> AdaHessianState:
        _checks.refuse_complex("adahessian", params)
        zeros = lambda: _leaves.zeros_like_wide(params)
        return AdaHessianState(jnp.zeros([], jnp.int32), make_key(), zeros(), zeros())

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        hvp_fn: Any = None,
        grad_fn: Any = None,
        value_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AdaHessianState]:
        del extra_args
        _checks.require_params("adahessian", params)
        product = _product(hvp_fn, grad_fn, value_fn, params)
        step = _numerics.advance_clock(state.hessian_step)
        z = _signs(jax.random.fold_in(state.hessian_key, step), updates, params)
        debias1, debias2 = _debias(b1, step), _debias(b2, step)

        def one(g: Any, hz: Any, z: Any, m: Any, v: Any) -> tuple[Any, Any, Any]:
            if not _leaves.is_gradient(g):
                return g, m, v
            diagonal = _numerics.wide(z) * _numerics.wide(hz)
            if axes := axes_of(diagonal):
                mean = jnp.mean(diagonal, axes, keepdims=True)
                diagonal = jnp.broadcast_to(mean, diagonal.shape)
            new_m = (b1 * m + (1 - b1) * _numerics.wide(g)).astype(m.dtype)
            new_v = (b2 * v + (1 - b2) * diagonal**2).astype(v.dtype)
            scale = jnp.sqrt(new_v / debias2) ** k + eps
            # Without curvature and eps there is no step.
            direction = (new_m / debias1) / jnp.where(scale > 0, scale, jnp.inf)
            return direction.astype(g.dtype), new_m, new_v

        structure, rows = _matrices.rows(
            updates, product(z), z, state.gradient_mean, state.curvature_square
        )
        found = [one(*row) for row in rows]
        out, m, v = (structure.unflatten([row[i] for row in found]) for i in range(3))
        return out, AdaHessianState(step, state.hessian_key, m, v)

    return optax.GradientTransformationExtraArgs(
        _leaves.shapes_for_shapes(init), update
    )


def _debias(b: Any, step: jax.Array) -> jax.Array:
    """``1 - b^step``, of which no digits are lost where ``b`` is close to 1."""
    if isinstance(b, jax.Array):
        return -jnp.expm1(step * jnp.log(b))
    return -jnp.expm1(step * (math.log(b) if b else -math.inf))


def _kernel_axes(leaf: jax.Array) -> tuple[int, ...]:
    """Height and width of the kernel of a convolution."""
    return (0, 1) if leaf.ndim == 4 else ()


def _signs(key: jax.Array, updates: optax.Updates, params: Any) -> Any:
    """Random signs in the dtypes of the parameters where there is a gradient."""

    def one(i: int, g: Any, x: Any) -> Any:
        if not _leaves.is_gradient(g):
            return g if _leaves.is_absent(g) else None
        own = jax.random.fold_in(key, i)
        for name in _mesh.varying_axes(x):  # other signs for each device's part
            own = jax.random.fold_in(own, lax.axis_index(name))
        signs = jax.random.rademacher(own, x.shape, x.dtype)
        return _numerics.zeros_like(x, x.dtype) + signs  # lies where x lies

    structure, rows = _matrices.rows(updates, params)
    return structure.unflatten([one(i, *row) for i, row in enumerate(rows)])


def _product(
    hvp_fn: Any, grad_fn: Any, value_fn: Any, params: Any
) -> Callable[[Any], Any]:
    """``v -> H v`` from the first of three functions that is given.

    Raises:
      ValueError: If none is.
    """
    if hvp_fn is not None:
        return hvp_fn
    if grad_fn is not None:
        return lambda v: _numerics.hessian_product(
            grad_fn, params, v, "hvp_fn= in its place"
        )
    if value_fn is None:
        raise ValueError(
            "adahessian needs the curvature; call tx.update(grads, state, params, "
            "value_fn=loss) with a loss of the parameters alone, or pass "
            "grad_fn=jax.grad(loss), or hvp_fn=, a function from v to H v."
        )
    return lambda v: _numerics.hessian_product(
        _gradient_of(value_fn), params, v, "hvp_fn= in its place"
    )


def _gradient_of(value_fn: Any) -> Callable[[Any], Any]:
    """The gradient with respect to float leaves, None at others."""

    def gradient(params: Any) -> Any:
        leaves, structure = jax.tree.flatten(params)
        floats = {i: x for i, x in enumerate(leaves) if _leaves.is_float(x)}
        at = lambda found: structure.unflatten(
            [found.get(i, x) for i, x in enumerate(leaves)]
        )
        found = jax.grad(lambda floats: value_fn(at(floats)))(floats)
        return structure.unflatten([found.get(i) for i in range(len(leaves))])

    return gradient
