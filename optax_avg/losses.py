"""Losses that leave examples out, and weights of the examples of a batch.

    loss = sum_i c_i L_i

with weights ``c`` that are made of the losses and are constants for the gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_avg import _checks, _numerics

__all__ = [
    "AdaptiveKMemory",
    "adaptive_k",
    "adaptive_k_start",
    "cvar_weights",
    "z_error_loss",
    "z_error_mask",
]


class AdaptiveKMemory(NamedTuple):
    """What :func:`adaptive_k` remembers of earlier batches.

    Attributes:
      loss_mean: ``m``, the exponential mean of the mean losses, float32.
      loss_square: ``v``, that of their squares, float32.
    """

    loss_mean: jax.Array
    loss_square: jax.Array


def adaptive_k_start() -> AdaptiveKMemory:
    """The memory before the first batch: zeros.

    Returns:
      A memory.

    Example:
      >>> from optax_avg import losses
      >>> float(losses.adaptive_k_start().loss_mean)
      0.0
    """
    return AdaptiveKMemory(jnp.zeros([], jnp.float32), jnp.zeros([], jnp.float32))


def adaptive_k(
    losses: jax.Array,
    memory: AdaptiveKMemory,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> tuple[jax.Array, AdaptiveKMemory]:
    """Adaptive-k: leaves out examples whose loss is above an adaptive threshold.

    With the mean loss ``l`` of the batch: ``m <- beta1 m + (1 - beta1) l``,
    ``v <- beta2 v + (1 - beta2) l^2``. The ``k`` examples with a loss of at most
    ``m/(sqrt(v) + eps)`` get the weight ``1/k``, the others 0. If no example is left,
    all weights are 0, so that the batch changes nothing.

    The threshold is that of the authors' code. It starts near 3, tends to 1 while the
    losses change slowly, and has no unit: it is made for the cross entropy. Divide
    losses of another scale by their usual size. The authors train by the plain mean
    for the first epochs (30 of 80 on MNIST), in which labels that are wrong have not
    been learned yet. The memory is not updated in these epochs; do the same here.

    There are two differences. The authors' code evaluates the chosen examples a second
    time, with a new draw of dropout; here the losses of one pass serve for both. If no
    example is left, their code goes on with the loss of an earlier batch.

    Args:
      losses: Loss of each example, shape (n,).
      memory: What was remembered before, at first :func:`adaptive_k_start`.
      beta1: Decay of ``m``, in [0, 1).
      beta2: Decay of ``v``, in [0, 1).
      eps: Added to the denominator, in units of the losses.

    Returns:
      The weights, shape (n,), float32 or wider, constants for the gradient; and the new
      memory. Losses that are not finite get the weight 0 and are not remembered.

    Raises:
      ValueError: If an argument is out of range, or ``losses`` has not one axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_avg import losses
      >>> start = losses.adaptive_k_start()
      >>> weights, _ = losses.adaptive_k(jnp.array([0.5, 1.5, 7.0]), start)
      >>> weights.tolist()
      [0.5, 0.5, 0.0]

    References:
      Dedeoglu et al., "A Robust Optimization Method for Label Noisy Datasets Based on
      Adaptive Threshold: Adaptive-k", 2022, 2203.14165.
    """
    values = _examples("adaptive_k", losses)
    beta1 = _checks.within("beta1", beta1, 0, 1, closed_high=False)
    beta2 = _checks.within("beta2", beta2, 0, 1, closed_high=False)
    eps = _checks.finite("eps", eps)
    finite = jnp.isfinite(values)
    count = jnp.sum(finite)
    mean = jnp.sum(jnp.where(finite, values, 0)) / jnp.maximum(count, 1)
    m = beta1 * memory.loss_mean + (1 - beta1) * mean
    v = beta2 * memory.loss_square + (1 - beta2) * mean**2
    new = jax.tree.map(
        lambda fresh, old: jnp.where(count > 0, fresh, old).astype(old.dtype),
        AdaptiveKMemory(m, v),
        memory,
    )
    threshold = new.loss_mean / (jnp.sqrt(new.loss_square) + eps)
    return _shares(finite & (values <= threshold), values.dtype), new


def cvar_weights(losses: jax.Array, beta: float = 0.9) -> jax.Array:
    """Weights with which a batch has the mean of its largest losses (CVaR).

    ``sum_i c_i L_i = min_a a + mean_i (L_i - a)_+/(1 - beta)``, the mean of the share
    ``1 - beta`` of the losses that are largest. With ``k = (1 - beta) n`` the ``k``
    largest losses have the weight ``1/k``; where ``k`` is no integer, the next one has
    the rest.

    Args:
      losses: Loss of each example, shape (n,).
      beta: Share of the losses that are left out, in [0, 1). With 0 it is the mean, and
        from ``1 - 1/n`` on the largest loss.

    Returns:
      The weights, shape (n,), float32 or wider, not negative and of sum 1; constants
      for the gradient.

    Raises:
      ValueError: If ``beta`` is out of range, or ``losses`` has not one axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_avg import losses
      >>> losses.cvar_weights(jnp.array([1.0, 9.0, 5.0, 7.0]), 0.5).tolist()
      [0.0, 0.5, 0.0, 0.5]

    References:
      Rockafellar and Uryasev, "Optimization of Conditional Value-at-Risk", 2000.
    """
    values = _examples("cvar_weights", losses)
    beta = _checks.within("beta", beta, 0, 1, closed_high=False)
    n = values.shape[0]
    # With k < 1 the largest loss has all the weight.
    k = jnp.maximum((1 - beta) * n, 1.0)
    place = jnp.argsort(jnp.argsort(-values)).astype(values.dtype)
    return jnp.clip(k - place, 0, 1) / k


def z_error_mask(
    scores: jax.Array, z_max: float = 2.0, labels: jax.Array | None = None
) -> jax.Array:
    """Marks the examples whose score lies within some deviations of the mean.

    ``|s_i - mu| <= z_max sigma`` with the mean ``mu`` and the deviation ``sigma``
    (divided by ``n - 1``) of the batch, or of the examples with the same label. Where
    ``sigma`` is 0 all are within.

    Args:
      scores: One number an example, shape (n,): the loss, or for classes the logit.
      z_max: Largest number of deviations, positive.
      labels: The class of each example, integers of shape (n,). The default is one
        class. It takes memory of ``n^2`` bools.

    Returns:
      Bools, shape (n,). Scores that are not finite are outside, and do not count.

    Raises:
      ValueError: If ``z_max`` is not positive, or an array has not one axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_avg import losses
      >>> scores = jnp.array([0.1, 0.2, 0.1, 0.2, 0.1, 0.2, 0.1, 9.0])
      >>> losses.z_error_mask(scores).tolist()
      [True, True, True, True, True, True, True, False]

    References:
      Godin, "Z-Error Loss for Training Neural Networks", 2025, 2506.02154.
    """
    values = _examples("z_error_mask", scores)
    z_max = _checks.within("z_max", z_max, 0, float("inf"), open_low=True)
    finite = jnp.isfinite(values)
    values = jnp.where(finite, values, 0)
    if labels is None:
        alike = finite[None, :]
    else:
        labels = jnp.asarray(labels)
        if labels.shape != values.shape:
            raise ValueError(
                f"labels of z_error_mask must have the shape {values.shape} of the "
                f"scores, got {labels.shape}; pass the class of each example."
            )
        alike = (labels[:, None] == labels[None, :]) & finite[None, :]
    count = jnp.sum(alike, 1)
    mean = jnp.sum(jnp.where(alike, values[None, :], 0), 1) / jnp.maximum(count, 1)
    apart = jnp.where(alike, values[None, :] - mean[:, None], 0)
    sigma = jnp.sqrt(jnp.sum(apart**2, 1) / jnp.maximum(count - 1, 1))
    return finite & ((jnp.abs(values - mean) <= z_max * sigma) | (sigma == 0))


def z_error_loss(
    losses: jax.Array,
    z_max: float = 2.0,
    *,
    scores: jax.Array | None = None,
    labels: jax.Array | None = None,
) -> jax.Array:
    """Z-Error Loss: the mean loss of the examples that are no outliers of the batch.

    ``sum_i k_i L_i/sum_i k_i``, where ``k`` is :func:`z_error_mask` of the losses, as
    for a regression, or of other scores. For two classes pass the logits as ``scores``
    with their ``labels``: each class has a mean and a deviation of its own.

    Args:
      losses: Loss of each example, shape (n,).
      z_max: Largest number of deviations, positive.
      scores: One number an example, shape (n,). The default is the losses. For a
        regression the residuals, with their signs, can be passed: examples far from the
        mean residual are then left out.
      labels: The class of each example, shape (n,).

    Returns:
      The loss, a scalar in float32 or wider; 0 if no loss is finite. The mask is a
      constant for the gradient.

    Raises:
      ValueError: If ``z_max`` is not positive, or an array has not one axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_avg import losses
      >>> batch = jnp.array([1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 90.0])
      >>> float(losses.z_error_loss(batch))
      1.5

    References:
      Godin, 2025, 2506.02154.
    """
    values = _numerics.wide(jnp.asarray(losses))
    kept = z_error_mask(losses if scores is None else scores, z_max, labels)
    kept &= jnp.isfinite(values)
    return jnp.sum(jnp.where(kept, values, 0)) / jnp.maximum(jnp.sum(kept), 1)


def _examples(name: str, losses: jax.Array) -> jax.Array:
    """One number an example in float32 or wider, a constant for the gradient.

    Raises:
      ValueError: If there is not one axis.
    """
    values = jnp.asarray(losses)
    if values.ndim != 1:
        raise ValueError(
            f"{name} needs one number for each example, got an array of shape "
            f"{values.shape}; take the mean of each example over its other axes."
        )
    return lax.stop_gradient(_numerics.wide(values))


def _shares(kept: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """``1/k`` for each of ``k`` examples, zeros if there are none."""
    return kept.astype(dtype) / jnp.maximum(jnp.sum(kept), 1)
