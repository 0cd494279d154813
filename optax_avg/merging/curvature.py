"""Means weighted by curvature, element by element.

x = x_0 + (H_0 + sum_t a H_t)^-1 sum_t a (H_t + H_0)(x_t - x_0)
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_avg import _checks, _leaves, _numerics
from optax_avg._checkpoints.rules import Rule
from optax_avg.merging._trees import checked_weights, merged


def fisher(
    models: Sequence[Any],
    fishers: Sequence[Any],
    weights: Sequence[float] | None = None,
) -> Any:
    """Fisher merging: ``sum_t w_t F_t x_t/sum_t w_t F_t``, element by element.

    Where no model has any information it is the weighted mean; under ``jit``, where no
    error can be raised, also where the sum is negative or not finite.

    Args:
      models: trees of one structure.
      fishers: trees like them, diagonals of Fisher matrices, see
        :func:`squared_gradients`; not negative.
      weights: of sum one; by default equal.

    Returns:
      A tree like the first model.

    Raises:
      ValueError: If trees differ, the weights do not sum to one, or an element of a
        Fisher matrix or the sum of all is negative or not finite.

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


def fisher_rule(n: int, weights: Sequence[float] | None) -> Rule:
    """Fisher merging of a leaf of ``n`` models and as many Fisher matrices."""
    w = checked_weights(n, weights)

    def sums(fs):
        # In units of the largest: products of tiny ones would vanish.
        most = functools.reduce(jnp.maximum, fs)
        shares = [f / jnp.where(most > 0, most, 1) for f in fs]
        return shares, sum(a * f for a, f in zip(w, shares, strict=True))

    def combine(_, xs):
        xs, fs = xs[:n], xs[n:]
        shares, total = sums(fs)
        known = (total > 0) & jnp.isfinite(total)
        total = jnp.where(known, total, 1)
        parts = zip(w, shares, xs, strict=True)
        means = (jnp.where(known, a * f / total, a) * x for a, f, x in parts)
        return functools.reduce(jnp.add, means)

    def fault(xs):
        _, total = sums(xs[n:])
        return _unfit([*xs[n:], total])

    return Rule(
        combine,
        fault=fault,
        complaint="Fisher matrices, and their weighted sum, must be finite and not "
        "negative",
    )


def gradient_matching(
    models: Sequence[Any],
    hessians: Sequence[Any],
    base: Any,
    base_hessian: Any,
    scale: float = 1.0,
    damping: float = 0.0,
) -> Any:
    """Merging that matches gradients, by diagonal Hessians.

    ``x_0 + a sum_t Hbar^-1 (H_t + H_0 + damping)(x_t - x_0)``, ``Hbar = H_0 + damping +
    a sum_t H_t``. Where ``Hbar`` is zero nothing is known, and ``x_0`` stays; under
    ``jit``, where no error can be raised, also where it is negative or not finite.

    Args:
      models: trees fine-tuned from ``base``.
      hessians: trees like them, diagonals, see :func:`squared_gradients`.
      base: the tree that they were fine-tuned from.
      base_hessian: a tree like it.
      scale: ``a``, of every task vector.
      damping: added to ``H_0``; not negative.

    Returns:
      A tree like the first model.

    Raises:
      ValueError: If trees differ, ``damping`` is negative, or an element of ``Hbar`` is
        negative or not finite.

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


def gradient_matching_rule(n: int, scale: Any, damping: Any) -> Rule:
    """Gradient matching of a leaf of ``n`` models, their Hessians, a base and its."""
    damping = _checks.within("damping", damping, 0, float("inf"), closed_high=False)

    def sums(xs):
        hs, h0 = xs[n : 2 * n], xs[-1] + damping
        # In units of the largest: a sum of huge ones would overflow.
        most = functools.reduce(jnp.maximum, [jnp.abs(h) for h in (*hs, h0)])
        most = jnp.where(most > 0, most, 1)
        hs, h0 = [h / most for h in hs], h0 / most
        return hs, h0, h0 + scale * sum(hs)

    def combine(_, xs):
        x0 = xs[-2]
        hs, h0, bar = sums(xs)
        known = (bar > 0) & jnp.isfinite(bar)
        bar = jnp.where(known, bar, 1)
        moves = zip(xs, hs, strict=False)
        move = sum(jnp.where(known, (h + h0) / bar, 0) * (x - x0) for x, h in moves)
        return x0 + scale * move

    def fault(xs):
        *_, bar = sums(xs)
        return _unfit([bar])

    return Rule(
        combine,
        fault=fault,
        complaint="the sum of the Hessians must be finite and not negative",
    )


@jax.jit
def _unfit(xs: list[jax.Array]) -> jax.Array:
    return functools.reduce(
        jnp.logical_or, [~jnp.all((x >= 0) & jnp.isfinite(x)) for x in xs]
    )


def squared_gradients(
    loss: Callable[[Any, Any], jax.Array], params: Any, examples: Any, *, batch: int = 1
) -> Any:
    """The mean of the squares of per-example gradients, a diagonal Fisher matrix.

    ``1/n sum_i g_i^2``: with the labels of the data the empirical Fisher, with labels
    drawn from the model the true one. At most ``batch`` gradients are held at once.

    Args:
      loss: of one example, ``loss(params, example)``, minus the log likelihood.
      params: a tree.
      examples: a tree of arrays with the examples along the first axis.
      batch: examples at once; their number need not be a multiple.

    Returns:
      A tree like ``params``, float32 or wider; zeros for leaves that are not floats.

    Raises:
      ValueError: If there are no examples or they differ in number.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x, y: (x - y) ** 2 / 2
      >>> examples = jnp.array([1.0, 2.0, 4.0])
      >>> oa.merging.squared_gradients(loss, jnp.array(0.0), examples).item()
      7.0

    References:
      Kunstner et al., "Limitations of the Empirical Fisher Approximation for Natural
      Gradient Descent", 2019, 1905.12558, on what it is not.
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

    def of_floats(some, example):
        whole = list(leaves)
        for i, x in zip(floats, some, strict=True):
            whole[i] = x
        return loss(structure.unflatten(whole), example)

    def squares(example):
        grads = jax.grad(of_floats)([jnp.asarray(leaves[i]) for i in floats], example)
        wide = [_numerics.wide(g) for g in grads]
        return [jnp.real(g * jnp.conj(g)) for g in wide]

    def advance(total, some):
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
    real = [jnp.real(_numerics.wide(jnp.asarray(leaves[i]))) for i in floats]
    zeros = [jnp.zeros_like(x) for x in real]
    total, _ = lax.scan(advance, zeros, (spread, (place < n).reshape(rounds, batch)))
    out = [jnp.zeros(jnp.shape(x)) for x in leaves]
    for i, x in zip(floats, total, strict=True):
        out[i] = x / n
    return structure.unflatten(out)


def _check_count(name: str, trees: Sequence[Any], n: int) -> None:
    if len(trees) != n:
        raise ValueError(f"{n} models need as many {name}, got {len(trees)}.")
