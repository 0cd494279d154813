"""What fine-tuning added to a base: scaled, trimmed, dropped, shortened.

x = x_0 + f(x_1 - x_0, ..., x_n - x_0)
"""

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_avg import _checks, _leaves
from optax_avg._checkpoints.rules import Rule
from optax_avg._keys import key_maker
from optax_avg.merging._largest import (
    Largest,
    after,
    is_among,
    largest_in,
    largest_on_host,
)
from optax_avg.merging._products import cosines, joined_products, products
from optax_avg.merging._trees import check_alike, merged, total, weighted_sum


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
    return merged(task_arithmetic_rule(scale), [*models, base])


def task_arithmetic_rule(scale: Any) -> Rule:
    """Task arithmetic of a leaf of models and their base."""

    def combine(_, leaves):
        *xs, x0 = leaves
        return x0 + sum(scale * (x - x0) for x in xs)

    return Rule(combine)


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
    the share ``density`` of largest magnitude, ``s = sign(sum_t tau_t)``. Of ``n``
    elements exactly ``max(1, round(density n))`` stay in each task vector; among equal
    magnitudes those that come first.

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
    if scope not in ("leaf", "global"):
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
        found |= zip(group, largest_in(columns, density), strict=True)
    return merged(rule, trees, found)


def ties_rule(n: int, density: Any, scale: Any) -> Rule:
    """TIES of a leaf of ``n`` models and their base."""
    density = _checks.within("density", density, 0, 1, open_low=True)
    return Rule(
        lambda found, leaves: _elect(leaves[:n], leaves[n], found, scale),
        lambda slices: largest_on_host(slices, n, density),
        lambda found, start: [after(some, start) for some in found],
    )


@jax.jit  # compiled once a shape
def _elect(xs: list[Any], x0: Any, largest: list[Largest], scale: Any) -> jax.Array:
    """The mean of the task vectors that agree, of their largest elements."""
    taus = [x - x0 for x in xs]
    kept = [
        jnp.where(is_among(some, jnp.abs(tau)), tau, 0)
        for some, tau in zip(largest, taus, strict=True)
    ]
    elected = jnp.sign(sum(kept[1:], kept[0]))
    agree = [(jnp.sign(tau) == elected) & (tau != 0) for tau in kept]
    count = jnp.maximum(sum(a.astype(x0.dtype) for a in agree), 1)
    # Each over the count: a sum of huge ones would overflow.
    parts = zip(agree, kept, strict=True)
    return x0 + scale * sum(jnp.where(a, tau / count, 0) for a, tau in parts)


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
      A list of trees like the models, in the dtypes of the base where these are wider:
      a dropped element is exactly that of the base.

    Raises:
      ValueError: If the models differ, ``density`` is out of range, or ``key`` is
        neither.

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

    def one(found, leaves):
        (x, x0), (own, t) = leaves, found
        kept = jax.random.bernoulli(jax.random.fold_in(own, t), share, x.shape)
        return x0 + jnp.where(kept, (x - x0) / density, 0)

    # By name, so that the other leaves do not matter to a leaf.
    paths = [path for path, _ in jax.tree.flatten_with_path(base)[0]]
    owns = [
        jax.random.fold_in(key, number_of(_tree_name(path))) if path else key
        for path in paths
    ]

    def as_wide(x, x0):
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
    """What tells leaves of other names apart in :func:`dare`: parts joined by dots."""
    return zlib.crc32(name.encode())


def _tree_name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


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
    return merged(model_stock_rule(len(models)), [*models, base])


def model_stock_rule(n: int) -> Rule:
    """Model Stock of a leaf of ``n`` models and their base."""
    if n < 2:
        raise ValueError(f"model_stock needs at least two models, got {n}.")

    def halves(leaves):
        # Of half the size, for differences of huge numbers overflow.
        *xs, x0 = leaves
        return products([x / 2 - x0 / 2 for x in xs])

    def find(slices):
        p = total(slices, halves, joined_products)
        norms, gram = cosines(p)
        pairs = jnp.sum(gram) - jnp.sum(norms > 0)
        c = jnp.clip(pairs / (n * (n - 1)), 0, 1)
        return n * c / (1 + (n - 1) * c)

    def combine(t, leaves):
        *xs, x0 = leaves
        return (1 - t) * x0 + t * weighted_sum([1 / n] * n, xs)

    return Rule(combine, find)
