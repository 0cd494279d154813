"""Weighted means of models.

x = sum_t w_t x_t,    sum_t w_t = 1
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_avg import _checks, _numerics
from optax_avg.merging._slices import unit_of
from optax_avg.merging.trees import (
    Rule,
    Slices,
    Weights,
    check_alike,
    checked_weights,
    merged,
    total,
    weighted_sum,
)
from optax_avg.weights import CooldownShape
from optax_avg.weights import cooldown as profile_of

__all__ = [
    "Score",
    "Soup",
    "cooldown",
    "cooldown_rule",
    "dawin",
    "diwa",
    "greedy_soup",
    "uniform",
    "variance_corrected",
    "variance_rule",
    "weighted",
    "weighted_rule",
    "wise_ft",
    "wise_ft_rule",
]

# Scores a model on held-out data; larger is better.
Score = Callable[[optax.Params], jax.Array | float]


def uniform(models: Sequence[optax.Params]) -> optax.Params:
    """The uniform soup, ``1/n sum_t x_t``.

    Args:
      models: Trees of one structure.

    Returns:
      A tree like the first.

    Raises:
      ValueError: If there are no models or they differ in structure or shapes.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> oa.merging.uniform([jnp.array([1.0, 3.0]), jnp.array([3.0, 3.0])]).tolist()
      [2.0, 3.0]

    References:
      Wortsman et al., "Model Soups: Averaging Weights of Multiple Fine-Tuned Models
      Improves Accuracy without Increasing Inference Time", 2022, 2203.05482.
    """
    return merged(weighted_rule(len(models), None), models)


def weighted(models: Sequence[optax.Params], weights: Weights) -> optax.Params:
    """``sum_t w_t x_t`` with weights that sum to one.

    Args:
      models: Trees of one structure.
      weights: One weight for each model; weights may be negative.

    Returns:
      A tree like the first.

    Raises:
      ValueError: If the models differ, or the weights do not sum to one.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> oa.merging.weighted([jnp.array(1.0), jnp.array(5.0)], [0.25, 0.75]).item()
      4.0
    """
    return merged(weighted_rule(len(models), weights), models)


def weighted_rule(n: int, weights: Weights | None) -> Rule:
    """The weighted mean of one leaf of ``n`` models, with equal weights for None."""
    w = checked_weights(n, weights)
    return Rule(lambda _, xs: weighted_sum(w, xs))


def cooldown(
    checkpoints: Sequence[optax.Params], shape: CooldownShape = "sqrt"
) -> optax.Params:
    """What a cooldown of the learning rate would have led to, ``sum_j c_j x_j``.

    ``c_j = f((j-1)/n) - f(j/n)`` and ``c_n = f((n-1)/n)``, as in
    :func:`optax_avg.weights.cooldown`: the checkpoints ``x_1 ... x_n`` come from a
    training at a constant rate. The cooldown begins one interval before ``x_1`` and
    ends at ``x_n``.

    Args:
      checkpoints: Trees of one structure, at equal intervals, the oldest first.
      shape: ``f``: ``"linear"``, ``"sqrt"``, ``"cosine"``, or a function that falls
        from ``f(0) = 1``.

    Returns:
      A tree like the first.

    Raises:
      ValueError: If the checkpoints differ in structure or shapes, or ``shape`` is
        unknown or does not begin at 1.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> trained = [jnp.array(x) for x in (1.0, 2.0, 3.0, 4.0)]
      >>> oa.merging.cooldown(trained, "linear").item()
      2.5
      >>> round(oa.merging.cooldown(trained, "sqrt").item(), 3)
      1.927

    References:
      Tian et al., "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for
      LLM Pre-training", 2025, 2507.17634.
    """
    return merged(cooldown_rule(len(checkpoints), shape), checkpoints)


def cooldown_rule(n: int, shape: CooldownShape) -> Rule:
    """The cooldown over one leaf of ``n`` checkpoints."""
    found = profile_of(shape, max(n, 1))
    if found.initial > 1e-6:
        raise ValueError(
            "the shape must begin at 1, for the parameters before the first checkpoint "
            f"are not given; f(0) is {1 - found.initial:g}."
        )
    return weighted_rule(n, found.weights[:n])


def wise_ft(base: optax.Params, tuned: optax.Params, alpha: float) -> optax.Params:
    """WiSE-FT: ``(1 - alpha) x_0 + alpha x_1``.

    Args:
      base: Model before fine-tuning.
      tuned: Model after fine-tuning.
      alpha: Position on the line through both models; those in [0, 1] lie between them.

    Returns:
      A tree like ``base``.

    Raises:
      ValueError: If the models differ.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> oa.merging.wise_ft(jnp.array(1.0), jnp.array(5.0), 0.5).item()
      3.0

    References:
      Wortsman et al., "Robust Fine-Tuning of Zero-Shot Models", 2022, 2109.01903.
    """
    return merged(wise_ft_rule(alpha), [base, tuned])


def wise_ft_rule(alpha: float) -> Rule:
    """The line through one leaf of a base and of a fine-tuned model."""
    return weighted_rule(2, [1 - alpha, alpha])


class Soup(NamedTuple):
    """A soup and its ingredients.

    Attributes:
      params: Uniform mean of the models that were chosen.
      chosen: Indices of these models, in the order in which they were added.
      score: Score of ``params``.
    """

    params: optax.Params
    chosen: list[int]
    score: float


def greedy_soup(models: Sequence[optax.Params], score: Score) -> Soup:
    """Adds models in the order of their scores, unless the mean gets worse.

    The restricted selection of DiWA is the same algorithm: ``diwa`` is another name of
    this function.

    Args:
      models: Trees of one structure.
      score: Takes a model and returns its score on held-out data. Larger is better; a
        score that is not finite is the worst.

    Returns:
      A :class:`Soup`.

    Raises:
      ValueError: If the models differ, a score is not one number, or none is finite.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> models = [jnp.array(x) for x in (9.0, 1.0, -2.0)]
      >>> oa.merging.greedy_soup(models, lambda x: -abs(x)).chosen
      [1, 2]

    References:
      Wortsman et al., 2022, 2203.05482, recipe 1. Rame et al., "Diverse Weight
      Averaging for Out-of-Distribution Generalization", 2022, 2205.09739.
    """
    check_alike(models)

    def finite(params: optax.Params) -> float:
        return _checks.rank(_checks.one_score(score(params)))

    scores = [finite(model) for model in models]
    order = sorted(range(len(models)), key=lambda i: -scores[i])
    if scores[order[0]] == -math.inf:
        raise ValueError(
            "no score is finite; pass a score that returns a number, larger is better."
        )
    chosen, params, best = [order[0]], models[order[0]], scores[order[0]]
    for i in order[1:]:
        tried = uniform([models[j] for j in [*chosen, i]])
        found = finite(tried)
        if found >= best:
            chosen, params, best = [*chosen, i], tried, found
    return Soup(params, chosen, best)


diwa = greedy_soup


def variance_corrected(
    models: Sequence[optax.Params], weights: Weights | None = None
) -> optax.Params:
    """The weighted mean, with each leaf rescaled to the variance of its inputs.

    ``m + (x - m) sqrt(sum_t w_t var x_t/var x)`` with ``x = sum_t w_t x_t`` of mean
    ``m``. The mean of models that are not aligned has a smaller variance than they
    have, and its layers have smaller outputs.

    Args:
      models: Trees of one structure.
      weights: One weight for each model, of sum one; by default all are equal.

    Returns:
      A tree like the first.

    Raises:
      ValueError: If the models differ, or the weights do not sum to one.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> a, b = jnp.array([1.0, -1.0, 1.0, -1.0]), jnp.array([1.0, 1.0, -1.0, -1.0])
      >>> oa.merging.variance_corrected([a, b]).round(3).tolist()
      [1.4140000343322754, 0.0, 0.0, -1.4140000343322754]

    References:
      Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation
      Repair", 2023, 2211.08403, describes the collapse of variance that this undoes.
    """
    return merged(variance_rule(len(models), weights), models)


class _Moments(NamedTuple):
    """Means and sums of squared deviations of ``k`` vectors.

    Attributes:
      size: Number of elements of each vector.
      unit: A power of two near the largest magnitude.
      means: Shape (k,), means in this unit.
      squares: Shape (k,), sums of squared deviations, in the square of the unit.
    """

    size: jax.Array
    unit: jax.Array
    means: jax.Array
    squares: jax.Array


def variance_rule(n: int, weights: Weights | None) -> Rule:
    """The weighted mean of one leaf of ``n`` models, rescaled to their variance."""
    w = checked_weights(n, weights)

    def find(slices: Slices) -> tuple[jax.Array, jax.Array]:
        found = total(slices, lambda xs: _moments([*xs, weighted_sum(w, xs)]), _joined)
        variances = found.squares / jnp.maximum(found.size, 1)
        wanted, got = jnp.sum(jnp.asarray(w) * variances[:-1]), variances[-1]
        largest = jnp.max(variances + jnp.abs(found.means) ** 2)
        factor = _numerics.ratio_of_deviations(wanted, got, largest)
        return found.unit * found.means[-1], factor

    def combine(found: tuple[jax.Array, jax.Array], xs: list[jax.Array]) -> jax.Array:
        mean, factor = found
        x = weighted_sum(w, xs)
        moved = mean + (x - mean) * jnp.asarray(factor, x.real.dtype)
        # An element that is zero in all models stays zero.
        pruned = functools.reduce(jnp.logical_and, [v == 0 for v in xs])
        return jnp.where(pruned, 0, moved)

    return Rule(combine, find)


@jax.jit
def _moments(xs: list[jax.Array]) -> _Moments:
    unit = functools.reduce(jnp.maximum, [unit_of(x) for x in xs])
    size = jnp.asarray(xs[0].size, unit.dtype)
    ys = [x / unit for x in xs]
    means = [jnp.sum(y) / jnp.maximum(size, 1) for y in ys]
    squares = [jnp.sum(jnp.abs(y - m) ** 2) for y, m in zip(ys, means, strict=True)]
    return _Moments(size, unit, jnp.stack(means), jnp.stack(squares))


@jax.jit
def _joined(a: _Moments, b: _Moments) -> _Moments:
    """Moments over two slices, as moments over both together."""
    unit, size = jnp.maximum(a.unit, b.unit), a.size + b.size
    p, q = a.unit / unit, b.unit / unit
    apart = q * b.means - p * a.means
    share = b.size / jnp.maximum(size, 1)
    squares = p**2 * a.squares + q**2 * b.squares
    squares += a.size * share * jnp.abs(apart) ** 2
    return _Moments(size, unit, p * a.means + share * apart, squares)


def dawin(logits: Sequence[ArrayLike]) -> jax.Array:
    """DaWin: coefficients of an interpolation for each sample, from entropies.

    ``w_t = exp(-H_t)/sum_s exp(-H_s)`` with the entropy ``H_t`` of the prediction of
    model ``t``. A model has more weight if its prediction is more certain.

    Args:
      logits: Arrays of shape (..., classes), one for each model, on the same samples.

    Returns:
      Coefficients of shape (models, ...), float32 or wider. Pass those of one sample,
      or of a cluster of similar samples, to :func:`weighted`.

    Raises:
      ValueError: If there are no arrays, or their shapes differ.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> sure, unsure = jnp.array([9.0, -9.0]), jnp.array([0.0, 0.0])
      >>> [round(w, 3) for w in oa.merging.dawin([sure, unsure]).tolist()]
      [0.667, 0.333]

    References:
      Oh et al., "DaWin: Training-Free Dynamic Weight Interpolation for Robust
      Adaptation", 2025, 2410.03782.
    """
    shapes = {jnp.shape(x) for x in logits}
    if len(shapes) != 1 or not next(iter(shapes)):
        raise ValueError(f"logits must be arrays of one shape, got {sorted(shapes)}.")
    logs = [jax.nn.log_softmax(_numerics.wide(jnp.asarray(x)), axis=-1) for x in logits]
    # p log p is 0 if p is.
    entropies = [
        -jnp.sum(jnp.where(p > -1e9, jnp.exp(p) * p, 0), axis=-1) for p in logs
    ]
    return jax.nn.softmax(-jnp.stack(entropies), axis=0)
