"""Means weighted by curvature, element by element.

x = x_0 + (H_0 + sum_t a H_t)^-1 sum_t a (H_t + H_0)(x_t - x_0)
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_avg import _tree
from optax_avg.merging._leaves import check_alike, checked_weights, over


def fisher(
    models: Sequence[Any],
    fishers: Sequence[Any],
    weights: Sequence[float] | None = None,
) -> Any:
    """Fisher merging: ``sum_t w_t F_t x_t/sum_t w_t F_t``, element by element.

    Where no model has any information it is the weighted mean.

    Args:
      models: trees of one structure.
      fishers: trees like them, diagonals of Fisher matrices, see
        :func:`squared_gradients`; not negative.
      weights: of sum one; by default equal.

    Returns:
      A tree like the first model.

    Raises:
      ValueError: If trees differ, or the weights do not sum to one.

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
    w = checked_weights(models, [1 / max(n, 1)] * n if weights is None else weights)
    _check_count("fishers", fishers, n)

    def one(xs):
        xs, fs = xs[:n], xs[n:]
        # In units of the largest: products of tiny ones would vanish.
        most = jnp.max(jnp.stack(fs), axis=0)
        shares = [f / jnp.where(most > 0, most, 1) for f in fs]
        total = sum(a * f for a, f in zip(w, shares, strict=True))
        known = total > 0
        total = jnp.where(known, total, 1)
        parts = zip(w, shares, xs, strict=True)
        return sum(jnp.where(known, a * f / total, a) * x for a, f, x in parts)

    check_alike([*models, *fishers])
    return over(one, [*models, *fishers])


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
    a sum_t H_t``. Where ``Hbar`` is zero nothing is known, and ``x_0`` stays.

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
      ValueError: If trees differ or ``damping`` is negative.

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
    damping = _tree.within("damping", damping, 0, float("inf"), closed_high=False)
    n = len(models)
    _check_count("hessians", hessians, n)

    def one(xs, x0, h0):
        xs, hs = xs[:n], xs[n:]
        h0 = h0 + damping
        bar = h0 + scale * sum(hs)
        known = bar > 0
        bar = jnp.where(known, bar, 1)
        moves = zip(xs, hs, strict=True)
        move = sum(jnp.where(known, (h + h0) / bar, 0) * (x - x0) for x, h in moves)
        return x0 + scale * move

    return over(one, [*models, *hessians], base, base_hessian)


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
    _tree.check_integer("batch", batch, 1)
    counts = {jnp.shape(x)[:1] for x in jax.tree.leaves(examples)}
    n = next(iter(counts))[0] if len(counts) == 1 and () not in counts else 0
    if not n:
        raise ValueError(
            f"examples must be arrays of one length, got {sorted(counts)}."
        )
    leaves, structure = jax.tree.flatten(params)
    floats = [i for i, x in enumerate(leaves) if _tree.is_float(x)]

    def of_floats(some, example):
        whole = list(leaves)
        for i, x in zip(floats, some, strict=True):
            whole[i] = x
        return loss(structure.unflatten(whole), example)

    def squares(example):
        grads = jax.grad(of_floats)([jnp.asarray(leaves[i]) for i in floats], example)
        wide = [_tree.wide(g) for g in grads]
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
    real = [jnp.real(_tree.wide(jnp.asarray(leaves[i]))) for i in floats]
    zeros = [jnp.zeros_like(x) for x in real]
    total, _ = lax.scan(advance, zeros, (spread, (place < n).reshape(rounds, batch)))
    out = [jnp.zeros(jnp.shape(x)) for x in leaves]
    for i, x in zip(floats, total, strict=True):
        out[i] = x / n
    return structure.unflatten(out)


def _check_count(name: str, trees: Sequence[Any], n: int) -> None:
    if len(trees) != n:
        raise ValueError(f"{n} models need as many {name}, got {len(trees)}.")
