"""What fine-tuning added to a base: scaled, trimmed, dropped, shortened.

x = x_0 + f(x_1 - x_0, ..., x_n - x_0)
"""

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_avg import _tree
from optax_avg.merging._leaves import check_alike, inner, over, unit


def task_arithmetic(models: Sequence[Any], base: Any, scale: float = 1.0) -> Any:
    """``x_0 + scale sum_t (x_t - x_0)``.

    Args:
      models: trees fine-tuned from ``base``.
      base: the tree that they were fine-tuned from.
      scale: of the task vectors; negative ones make a model forget.

    Returns:
      A tree like the first model.

    Raises:
      ValueError: If the models differ.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> models, base = [jnp.array(2.0), jnp.array(4.0)], jnp.array(1.0)
      >>> oa.merging.task_arithmetic(models, base, 0.5).item()
      3.0

    References:
      Ilharco et al., "Editing Models with Task Arithmetic", 2023, 2212.04089.
    """
    check_alike(models)

    def one(xs, x0):
        return x0 + scale * sum(x - x0 for x in xs)

    return over(one, models, base)


def ties(
    models: Sequence[Any],
    base: Any,
    density: float,
    *,
    scale: float = 1.0,
    scope: str = "leaf",
) -> Any:
    """TIES: trims task vectors, elects a sign for each element, averages who agree.

    ``x_0 + scale mean_{t : sign tau_t = s} tau_t`` over the task vectors ``tau_t`` of
    the share ``density`` of largest magnitude, ``s = sign(sum_t tau_t)``.

    Args:
      models: trees fine-tuned from ``base``.
      base: the tree that they were fine-tuned from.
      density: share of the elements that stays, in (0, 1]; the paper takes 0.2.
      scale: of what is added; about 1 in the paper.
      scope: over which magnitudes are compared, ``"leaf"``, or ``"global"`` as in the
        authors' code.

    Returns:
      A tree like the first model.

    Raises:
      ValueError: If the models differ or an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> models = [jnp.array([4.0, 1.0, -3.0]), jnp.array([2.0, -1.0, 5.0])]
      >>> oa.merging.ties(models, jnp.zeros(3), 2 / 3).tolist()
      [3.0, 0.0, 5.0]

    References:
      Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", 2023,
      2306.01708.
    """
    density = _tree.within("density", density, 0, 1, open_low=True)
    if scope not in ("leaf", "global"):
        raise ValueError(f"scope must be 'leaf' or 'global', got {scope!r}.")
    check_alike([*models, base])
    limits: list[Any] = [None] * len(models)
    if scope == "global":
        limits = [_limit_of(density, model, base) for model in models]

    def one(xs, x0):
        least = [
            _nth_largest([_size(x, x0)], density) if limit is None else limit
            for x, limit in zip(xs, limits, strict=True)
        ]
        return _elect(xs, x0, least, scale)

    return over(one, models, base)


@jax.jit  # as below: compiled once a shape
def _elect(xs: list[Any], x0: Any, limits: list[Any], scale: Any) -> jax.Array:
    """The mean of the task vectors that agree, of elements at or above the limits."""
    taus = [x - x0 for x in xs]
    kept = [
        jnp.where(jnp.abs(tau) >= limit, tau, 0)
        for tau, limit in zip(taus, limits, strict=True)
    ]
    elected = jnp.sign(sum(kept[1:], kept[0]))
    agree = [(jnp.sign(tau) == elected) & (tau != 0) for tau in kept]
    count = sum(a.astype(x0.dtype) for a in agree)
    total = sum(jnp.where(a, tau, 0) for a, tau in zip(agree, kept, strict=True))
    return x0 + scale * total / jnp.maximum(count, 1)


@jax.jit
def _size(x: Any, x0: Any) -> jax.Array:
    return jnp.abs(_tree.wide(jnp.asarray(x)) - _tree.wide(jnp.asarray(x0)))


def _limit_of(density: float, model: Any, base: Any) -> jax.Array:
    """The least magnitude that stays, over all leaves."""
    sizes = [
        _size(x, x0)
        for x, x0 in zip(jax.tree.leaves(model), jax.tree.leaves(base), strict=True)
        if _tree.is_float(x)
    ]
    return _nth_largest(sizes, density)


def _nth_largest(sizes: list[jax.Array], density: float) -> Any:
    count = sum(size.size for size in sizes)
    if density == 1 or not count:
        return 0.0
    below = count - max(1, round(density * count))
    if len(sizes) == 1 and _at_hand(sizes[0]):
        # Selecting on the host takes a tenth of the time of counting.
        return np.partition(np.ravel(sizes[0]), below)[below]
    return _order_statistic(sizes, below)


def _at_hand(x: jax.Array) -> bool:
    return not isinstance(x, Tracer) and x.is_fully_addressable


_order_statistic = jax.jit(_tree.order_statistic)


def dare(models: Sequence[Any], base: Any, density: float, key: Any) -> list[Any]:
    """DARE: drops elements of task vectors at random and rescales the others.

    ``x_0 + b (x_t - x_0)/density``, ``b`` Bernoulli of mean ``density``; the
    expectation is ``x_t``. The models that come out go to :func:`ties`,
    :func:`task_arithmetic` or another merge.

    Args:
      models: trees fine-tuned from ``base``.
      base: the tree that they were fine-tuned from.
      density: share of the elements that stays, in (0, 1].
      key: a PRNG key, or an integer to make one of.

    Returns:
      A list of trees like the models.

    Raises:
      ValueError: If the models differ or ``density`` is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> (model,) = oa.merging.dare([jnp.ones(1000)], jnp.zeros(1000), 0.5, key=0)
      >>> sorted(set(model.tolist()))
      [0.0, 2.0]

    References:
      Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous
      Models as a Free Lunch", 2024, 2311.03099.
    """
    density = _tree.within("density", density, 0, 1, open_low=True)
    check_alike([*models, base])
    key = jax.random.key(key) if isinstance(key, int) else key
    share = jnp.float32(density)  # the same draws with 64-bit types on
    dropped = []
    for t, model in enumerate(models):

        def one(xs, x0, path, t=t):
            # By name, so that the other leaves do not matter to a leaf.
            name = zlib.crc32(jax.tree_util.keystr(path).encode())
            own = jax.random.fold_in(key, name) if path else key
            fate = jax.random.fold_in(own, t)
            kept = jax.random.bernoulli(fate, share, xs[0].shape)
            return x0 + jnp.where(kept, (xs[0] - x0) / density, 0)

        dropped.append(over(one, [model], base, with_path=True))
    return dropped


def model_stock(models: Sequence[Any], base: Any) -> Any:
    """Model Stock: from the mean towards the base, as far as the angle says.

    ``t mean_i x_i + (1 - t) x_0``, ``t = n c/(1 + (n - 1) c)`` with ``c`` the mean
    cosine between two of the ``x_i - x_0`` of a leaf, not below 0.

    Args:
      models: at least two trees fine-tuned from ``base``.
      base: the tree that they were fine-tuned from.

    Returns:
      A tree like the first model.

    Raises:
      ValueError: If the models differ or there are fewer than two.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> models = [jnp.array([2.0, 0.0]), jnp.array([1.0, 3**0.5])]
      >>> oa.merging.model_stock(models, jnp.zeros(2)).round(3).tolist()
      [1.0, 0.5770000219345093]

    References:
      Jang et al., "Model Stock: All We Need Is Just a Few Fine-Tuned Models", 2024,
      2403.19522, equation 4.
    """
    if len(models) < 2:
        raise ValueError(f"model_stock needs at least two models, got {len(models)}.")
    n = len(models)

    def one(xs, x0):
        units = [unit(x - x0) for x in xs]
        total = sum(units[1:], units[0])
        # |sum u_i|^2 = sum |u_i|^2 + 2 sum_{i < j} <u_i, u_j>
        pairs = inner(total, total) - sum(inner(u, u) for u in units)
        c = jnp.clip(pairs / (n * (n - 1)), 0, 1)
        t = n * c / (1 + (n - 1) * c)
        return x0 + t * (sum(xs) / n - x0)

    return over(one, models, base)
