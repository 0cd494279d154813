"""Means of models weighted by curvature, element by element.

x = x_0 + (H_0 + sum_t a H_t)^-1 sum_t a (H_t + H_0)(x_t - x_0)
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_avg import _checks, _leaves, _numerics
from optax_avg.merging.trees import Rule, Weights, checked_weights, merged

__all__ = [
    "ExampleLoss",
    "Examples",
    "fisher",
    "fisher_rule",
    "gradient_matching",
    "gradient_matching_rule",
    "squared_gradients",
]

# A tree of arrays with the examples along the first axis, or one example of it.
Examples = Any
# Takes parameters and one example, and returns minus the log likelihood.
ExampleLoss = Callable[[optax.Params, Examples], jax.Array]


def fisher(
    models: Sequence[optax.Params],
    fishers: Sequence[optax.Params],
    weights: Weights | None = None,
) -> optax.Params:
    """Fisher merging: ``sum_t w_t F_t x_t/sum_t w_t F_t``, element by element.

    An element without information in any model is the weighted mean. Under ``jit``,
    which allows no error, it is also the weighted mean if the sum of the information is
    negative or not finite.

    Args:
      models: Trees of one structure.
      fishers: Diagonals of Fisher matrices, trees like the models, not negative;
        :func:`squared_gradients` computes them.
      weights: One weight for each model, of sum one; by default all are equal.

    Returns:
      A tree like the first model.

    Raises:
      ValueError: If the trees differ, the weights do not sum to one, or an element of
        a Fisher matrix or of their sum is negative or not finite.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> models = [jnp.array([1.0, 1.0]), jnp.array([5.0, 3.0])]
      >>> fishers = [jnp.array([3.0, 0.0]), jnp.array([1.0, 0.0])]
      >>> oa.merging.fisher(models, fishers).tolist()
      [2.0, 2.0]

    References:
      Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", 2022,
      2111.09832.
    """
    n = len(models)
    _check_count("fishers", fishers, n)
    return merged(fisher_rule(n, weights), [*models, *fishers])


def fisher_rule(n: int, weights: Weights | None) -> Rule:
    """Fisher merging of one leaf of ``n`` models and as many Fisher matrices."""
    w = checked_weights(n, weights)

    def sums(fs: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
        # In units of the largest, because products of tiny values would vanish.
        most = functools.reduce(jnp.maximum, fs)
        shares = [f / jnp.where(most > 0, most, 1) for f in fs]
        weighted = [a * f for a, f in zip(w, shares, strict=True)]
        return shares, functools.reduce(jnp.add, weighted)

    def combine(_: None, xs: list[jax.Array]) -> jax.Array:
        xs, fs = xs[:n], xs[n:]
        shares, total = sums(fs)
        known = (total > 0) & jnp.isfinite(total)
        total = jnp.where(known, total, 1)
        parts = zip(w, shares, xs, strict=True)
        means = (jnp.where(known, a * f / total, a) * x for a, f, x in parts)
        return functools.reduce(jnp.add, means)

    def fault(xs: list[jax.Array]) -> jax.Array:
        _, total = sums(xs[n:])
        return _unfit([*xs[n:], total])

    return Rule(
        combine,
        fault=fault,
        complaint="Fisher matrices, and their weighted sum, must be finite and not "
        "negative",
    )


def gradient_matching(
    models: Sequence[optax.Params],
    hessians: Sequence[optax.Params],
    base: optax.Params,
    base_hessian: optax.Params,
    scale: float = 1.0,
    damping: float = 0.0,
) -> optax.Params:
    """Merges fine-tuned models so that gradients match, with diagonal Hessians.

    The result is near a stationary point of the sum of their losses. In contrast to
    :func:`fisher` it takes the change from ``base``, and what ``base`` knows, into
    account.

    ``x_0 + a sum_t Hbar^-1 (H_t + H_0 + damping)(x_t - x_0)`` with ``Hbar = H_0 +
    damping + a sum_t H_t``. An element whose ``Hbar`` is zero stays at ``x_0``. Under
    ``jit``, which allows no error, it also stays there if ``Hbar`` is negative or not
    finite.

    Args:
      models: Trees fine-tuned from ``base``.
      hessians: Diagonals of Hessians, trees like the models;
        :func:`squared_gradients` approximates them.
      base: Tree before fine-tuning.
      base_hessian: Diagonal of the Hessian at ``base``, a tree like it.
      scale: Factor ``a`` of every task vector.
      damping: Number that is added to ``H_0``, not negative.

    Returns:
      A tree like the first model.

    Raises:
      ValueError: If the trees differ, ``damping`` is negative, or an element of
        ``Hbar`` is negative or not finite.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> models, h = [jnp.array(1.0), jnp.array(4.0)], [jnp.array(2.0), jnp.array(1.0)]
      >>> base, h0 = jnp.array(0.0), jnp.array(1.0)
      >>> oa.merging.gradient_matching(models, h, base, h0).item()
      2.75

    References:
      Daheim et al., "Model Merging by Uncertainty-Based Gradient Matching", 2024,
      2310.12808.
    """
    n = len(models)
    _check_count("hessians", hessians, n)
    rule = gradient_matching_rule(n, scale, damping)
    return merged(rule, [*models, *hessians, base, base_hessian])


def gradient_matching_rule(n: int, scale: float, damping: float) -> Rule:
    """Gradient matching of one leaf.

    Args:
      n: Number of models. The rule takes ``n`` models, ``n`` Hessians, the base and its
        Hessian.
      scale: Factor of every task vector.
      damping: Number that is added to the Hessian of the base.
    """
    damping = _checks.within("damping", damping, 0, math.inf, closed_high=False)

    def sums(xs: list[jax.Array]) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        hs, h0 = xs[n : 2 * n], xs[-1] + damping
        # In units of the largest, because a sum of huge values would overflow.
        most = functools.reduce(jnp.maximum, [jnp.abs(h) for h in (*hs, h0)])
        most = jnp.where(most > 0, most, 1)
        hs, h0 = [h / most for h in hs], h0 / most
        return hs, h0, h0 + scale * sum(hs)

    def combine(_: None, xs: list[jax.Array]) -> jax.Array:
        x0 = xs[-2]
        hs, h0, bar = sums(xs)
        known = (bar > 0) & jnp.isfinite(bar)
        bar = jnp.where(known, bar, 1)
        moves = zip(xs, hs, strict=False)
        move = sum(jnp.where(known, (h + h0) / bar, 0) * (x - x0) for x, h in moves)
        return x0 + scale * move

    def fault(xs: list[jax.Array]) -> jax.Array:
        *_, bar = sums(xs)
        return _unfit([bar])

    return Rule(
        combine,
        fault=fault,
        complaint="the sum of the Hessians must be finite and not negative",
    )


@jax.jit
def _unfit(xs: list[jax.Array]) -> jax.Array:
    """Whether an element is negative or not finite."""
    return functools.reduce(
        jnp.logical_or, [~jnp.all((x >= 0) & jnp.isfinite(x)) for x in xs]
    )


def squared_gradients(
    loss: ExampleLoss, params: optax.Params, examples: Examples, *, batch: int = 1
) -> optax.Params:
    """The mean of squared per-example gradients, a diagonal of a Fisher matrix.

    ``1/n sum_i g_i^2``. Labels of the data give the empirical Fisher matrix, labels
    drawn from the model the true one. Memory holds at most ``batch`` gradients.

    Args:
      loss: Takes the parameters and one example, and returns minus the log likelihood.
      params: Parameters at which the gradients are taken.
      examples: A tree of arrays with the examples along the first axis.
      batch: Number of examples whose gradients are computed together. It need not
        divide the number of examples.

    Returns:
      A tree like ``params``, float32 or wider; zeros for leaves that are not floats.

    Raises:
      ValueError: If there are no examples, or the arrays differ in their number.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x, y: (x - y) ** 2 / 2
      >>> examples = jnp.array([1.0, 2.0, 4.0])
      >>> oa.merging.squared_gradients(loss, jnp.array(0.0), examples).item()
      7.0

    References:
      Kunstner et al., "Limitations of the Empirical Fisher Approximation for Natural
      Gradient Descent", 2019, 1905.12558, on the limits of the empirical Fisher matrix.
    """
    _checks.check_integer("batch", batch, 1)
    counts = {jnp.shape(x)[:1] for x in jax.tree.leaves(examples)}
    n = next(iter(counts))[0] if len(counts) == 1 and () not in counts else 0
    if not n:
        raise ValueError(
            f"examples must be arrays of one length, got {sorted(counts)}."
        )
    leaves, structure = jax.tree.flatten(params)
    floats = [i for i, x in enumerate(leaves) if _leaves.is_float(x)]

    def of_floats(some: list[jax.Array], example: Examples) -> jax.Array:
        whole = list(leaves)
        for i, x in zip(floats, some, strict=True):
            whole[i] = x
        return loss(structure.unflatten(whole), example)

    total = _sum_of_squares(
        of_floats, [jnp.asarray(leaves[i]) for i in floats], examples, n, batch
    )
    out = [jnp.zeros(jnp.shape(x)) for x in leaves]
    for i, x in zip(floats, total, strict=True):
        out[i] = x / n
    return structure.unflatten(out)


def _sum_of_squares(
    loss: Callable[[list[jax.Array], Examples], jax.Array],
    leaves: list[jax.Array],
    examples: Examples,
    n: int,
    batch: int,
) -> list[jax.Array]:
    """``sum_i g_i^2`` over ``n`` examples, ``batch`` of them at once."""

    def squares(example: Examples) -> list[jax.Array]:
        grads = jax.grad(loss)(leaves, example)
        wide = [_numerics.wide(g) for g in grads]
        return [jnp.real(g * jnp.conj(g)) for g in wide]

    def advance(
        total: list[jax.Array], some: tuple[Examples, jax.Array]
    ) -> tuple[list[jax.Array], None]:
        example, counts = some
        found = jax.vmap(squares)(example)
        kept = [
            jnp.where(counts.reshape(-1, *[1] * (x.ndim - 1)), x, 0).sum(axis=0)
            for x in found
        ]
        return [a + x for a, x in zip(total, kept, strict=True)], None

    rounds = -(-n // batch)
    place = jnp.arange(rounds * batch)
    spread = jax.tree.map(
        lambda x: jnp.asarray(x)[jnp.minimum(place, n - 1)].reshape(
            rounds, batch, *jnp.shape(x)[1:]
        ),
        examples,
    )
    zeros = [jnp.zeros_like(jnp.real(_numerics.wide(x))) for x in leaves]
    counts = (place < n).reshape(rounds, batch)
    return lax.scan(advance, zeros, (spread, counts))[0]


def _check_count(name: str, trees: Sequence[optax.Params], n: int) -> None:
    if len(trees) != n:
        raise ValueError(f"{n} models need as many {name}, got {len(trees)}.")
