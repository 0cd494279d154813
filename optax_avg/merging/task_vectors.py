"""Merges of task vectors, the differences that fine-tuning added to a base.

x = x_0 + f(x_1 - x_0, ..., x_n - x_0)
"""

import zlib
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_avg import _checks, _leaves
from optax_avg._keys import key_maker
from optax_avg.merging import _slices
from optax_avg.merging.trees import (
    Rule,
    Slices,
    check_alike,
    merged,
    total,
    weighted_sum,
)

__all__ = [
    "Scope",
    "dare",
    "model_stock",
    "model_stock_rule",
    "number_of",
    "task_arithmetic",
    "task_arithmetic_rule",
    "ties",
    "ties_rule",
]

# Elements whose magnitudes TIES compares: those of a leaf, or of the whole tree.
Scope = Literal["leaf", "global"]


def task_arithmetic(
    models: Sequence[optax.Params], base: optax.Params, scale: float = 1.0
) -> optax.Params:
    """The base plus all task vectors, ``x_0 + scale sum_t (x_t - x_0)``.

    Args:
      models: Trees fine-tuned from ``base``.
      base: Tree before fine-tuning.
      scale: Factor of the task vectors; with a negative one the model forgets tasks.

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
    return merged(task_arithmetic_rule(scale), [*models, base])


def task_arithmetic_rule(scale: float) -> Rule:
    """Task arithmetic of one leaf of models and their base, which comes last."""

    def combine(_: None, leaves: list[jax.Array]) -> jax.Array:
        *xs, x0 = leaves
        return x0 + sum(scale * (x - x0) for x in xs)

    return Rule(combine)


def ties(
    models: Sequence[optax.Params],
    base: optax.Params,
    density: float,
    *,
    scale: float = 1.0,
    scope: Scope = "leaf",
) -> optax.Params:
    """TIES: trims task vectors, elects signs, and averages the values that agree.

    ``x_0 + scale mean_{t : sign tau_t = s} tau_t`` with ``s = sign(sum_t tau_t)``. The
    task vectors ``tau_t`` keep the share ``density`` of largest magnitude: of ``n``
    elements exactly ``max(1, round(density n))``. Among equal magnitudes the first ones
    stay.

    Args:
      models: Trees fine-tuned from ``base``.
      base: Tree before fine-tuning.
      density: Share of the elements that stay, in (0, 1]. The paper takes 0.2.
      scale: Factor of the mean task vector, about 1 in the paper.
      scope: Elements whose magnitudes are compared: those of a ``"leaf"``, or of the
        whole tree (``"global"``), as in the authors' code.

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
    if scope not in get_args(Scope):
        raise ValueError(f"scope must be 'leaf' or 'global', got {scope!r}.")
    rule = ties_rule(len(models), density, scale)
    trees = [*models, base]
    check_alike(trees)
    leaves = [jax.tree.leaves(tree) for tree in trees]
    floats = [i for i, x in enumerate(leaves[0]) if _leaves.is_float(x)]
    groups = [floats] if scope == "global" else [[i] for i in floats]
    found = {}
    for group in groups:
        columns = [[xs[i] for xs in leaves] for i in group]
        found |= zip(group, _slices.largest_in(columns, density), strict=True)
    return merged(rule, trees, found)


def ties_rule(n: int, density: float, scale: float) -> Rule:
    """TIES of one leaf of ``n`` models and their base, which comes last."""
    density = _checks.within("density", density, 0, 1, open_low=True)
    return Rule(
        lambda found, leaves: _elect(leaves[:n], leaves[n], found, scale),
        lambda slices: _slices.largest_on_host(slices, n, density),
        lambda found, start: [_slices.after(some, start) for some in found],
    )


@jax.jit  # compiled once a shape
def _elect(
    xs: list[jax.Array], x0: jax.Array, largest: list[_slices.Largest], scale: float
) -> jax.Array:
    """The base plus the mean of the largest elements whose signs agree."""
    taus = [x - x0 for x in xs]
    kept = [
        jnp.where(_slices.is_among(some, jnp.abs(tau)), tau, 0)
        for some, tau in zip(largest, taus, strict=True)
    ]
    elected = jnp.sign(sum(kept[1:], kept[0]))
    agree = [(jnp.sign(tau) == elected) & (tau != 0) for tau in kept]
    count = jnp.maximum(sum(a.astype(x0.dtype) for a in agree), 1)
    # Each term is divided by the count: a sum of huge terms would overflow.
    parts = zip(agree, kept, strict=True)
    return x0 + scale * sum(jnp.where(a, tau / count, 0) for a, tau in parts)


def dare(
    models: Sequence[optax.Params],
    base: optax.Params,
    density: float,
    key: ArrayLike,
) -> list[optax.Params]:
    """DARE: drops elements of task vectors at random and rescales the others.

    ``x_0 + b (x_t - x_0)/density`` with ``b`` Bernoulli of mean ``density``; the
    expectation is ``x_t``. Pass the models that it returns to :func:`ties`,
    :func:`task_arithmetic` or another merge.

    Args:
      models: Trees fine-tuned from ``base``.
      base: Tree before fine-tuning.
      density: Share of the elements that stay, in (0, 1].
      key: A PRNG key, or an integer seed.

    Returns:
      A list of trees like the models, in the dtypes of the base if these are wider. An
      element whose change is dropped is exactly that of the base.

    Raises:
      ValueError: If the models differ, ``density`` is out of range, or ``key`` is
        neither a key nor an integer.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> (model,) = oa.merging.dare([jnp.ones(1000)], jnp.zeros(1000), 0.5, key=0)
      >>> sorted(set(model.tolist()))
      [0.0, 2.0]

    References:
      Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous
      Models as a Free Lunch", 2024, 2311.03099.
    """
    density = _checks.within("density", density, 0, 1, open_low=True)
    check_alike([*models, base])
    key = key_maker(key, "dare(models, base, density, jax.random.key(0))")()
    share = jnp.float32(density)  # the same draws with 64-bit types on

    def one(found: tuple[jax.Array, int], leaves: list[jax.Array]) -> jax.Array:
        (x, x0), (own, t) = leaves, found
        kept = jax.random.bernoulli(jax.random.fold_in(own, t), share, x.shape)
        return x0 + jnp.where(kept, (x - x0) / density, 0)

    # Keys depend on names, so that the draws of a leaf do not depend on other leaves.
    paths = [path for path, _ in jax.tree.flatten_with_path(base)[0]]
    named = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    owns = [
        jax.random.fold_in(key, number_of(named(path))) if path else key
        for path in paths
    ]

    def as_wide(x: ArrayLike, x0: ArrayLike) -> ArrayLike:
        if not _leaves.is_float(x):
            return x
        own, of_base = jnp.result_type(x), jnp.result_type(x0)
        return jnp.asarray(x, jnp.promote_types(own, of_base))

    return [
        merged(
            Rule(one),
            [jax.tree.map(as_wide, model, base), base],
            {i: (own, t) for i, own in enumerate(owns)},
        )
        for t, model in enumerate(models)
    ]


def number_of(name: str) -> int:
    """The number that :func:`dare` gives a leaf, by its names joined by dots."""
    return zlib.crc32(name.encode())


def model_stock(models: Sequence[optax.Params], base: optax.Params) -> optax.Params:
    """Model Stock: a point between the mean and the base that the angles determine.

    ``t mean_i x_i + (1 - t) x_0`` with ``t = n c/(1 + (n - 1) c)``. In each leaf ``c``
    is the mean cosine between two task vectors ``x_i - x_0``, or 0 if it is negative.

    Args:
      models: At least two trees fine-tuned from ``base``.
      base: Tree before fine-tuning.

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
    return merged(model_stock_rule(len(models)), [*models, base])


def model_stock_rule(n: int) -> Rule:
    """Model Stock of one leaf of ``n`` models and their base, which comes last."""
    if n < 2:
        raise ValueError(f"model_stock needs at least two models, got {n}.")

    def halves(leaves: list[jax.Array]) -> _slices.Products:
        # Differences of huge numbers would overflow; those of their halves do not.
        *xs, x0 = leaves
        return _slices.products([x / 2 - x0 / 2 for x in xs])

    def find(slices: Slices) -> jax.Array:
        p = total(slices, halves, _slices.joined_products)
        norms, gram = _slices.cosines(p)
        pairs = jnp.sum(gram) - jnp.sum(norms > 0)
        c = jnp.clip(pairs / (n * (n - 1)), 0, 1)
        return n * c / (1 + (n - 1) * c)

    def combine(t: jax.Array, leaves: list[jax.Array]) -> jax.Array:
        *xs, x0 = leaves
        return (1 - t) * x0 + t * weighted_sum([1 / n] * n, xs)

    return Rule(combine, find)
