"""Mean and variance of a population, from those of its batches.

    n' = n + k,  w = k/n',  e = b - mean
    mean' = mean + w e
    within' = within + w (v - within)
    between' = (1 - w) (between + w e^2)
    variance = within + between

``b`` and ``v`` are mean and variance of a batch of ``k`` values. This is the pairwise
update of Chan, Golub and LeVeque with its two parts kept apart: a layer of
normalisation shows ``s b`` and ``s v`` only, where ``s = 1 - momentum``, and then
``mean`` and ``within`` are off by ``s`` and ``between`` by ``s^2``.

A layer moves its statistics by ``new = momentum old + s batch``. Calls start from
``old = 0``, so that what they leave is ``s batch``. One batch starts from a number that
is so large that the batch does not matter beside it: it leaves ``momentum old``.

References:
  Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
  Sample Variances", 1979.
"""

import inspect
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from optax_avg import _numerics

__all__ = [
    "Pool",
    "absorbed",
    "call_in_mode",
    "empty_pool",
    "number_of_values",
    "population",
    "started",
]

_PROBE = 2.0**100
_MODE = "use_running_average"  # what Flax calls the choice between the statistics


class Pool(NamedTuple):
    """What is known of the values that one layer has seen.

    Attributes:
      pool_count: Number of values per feature.
      pool_mean: Their mean, times ``s``.
      pool_within: Mean of the variances of the batches, times ``s``.
      pool_between: Variance of the means of the batches, times ``s^2``.
    """

    pool_count: Any
    pool_mean: Any
    pool_within: Any
    pool_between: Any


Stats = Mapping[Hashable, tuple[jax.Array, jax.Array]]  # mean and variance by layer

# (statistics, layers to record, value that their calls start from, batches)
# -> (pools of these layers, layers in the order of their calls)
Sweep = Callable[
    [Stats, Sequence[Hashable], float, Iterable[Any]],
    tuple[Mapping[Hashable, Pool], Sequence[Hashable]],
]


def empty_pool(like: jax.Array) -> Pool:
    """The pool of a layer that has seen nothing, in the shape of its mean."""
    zeros = started(like, 0.0)
    return Pool(zeros, zeros, zeros, zeros)


def started(like: jax.Array, start: float) -> jax.Array:
    """What the calls of a layer start from, in float32 or wider."""
    return jnp.full(jnp.shape(like), start, _numerics.float32_or_wider(like.dtype))


def absorbed(pool: Pool, count: Any, mean: jax.Array, var: jax.Array) -> Pool:
    """The pool with one batch more.

    Args:
      pool: The pool so far.
      count: Number of values per feature. A batch without values changes nothing.
      mean: What the layer shows as the mean of the batch.
      var: What it shows as the variance.

    Returns:
      The pool of all values.
    """
    n = pool.pool_count + count
    w = jnp.where(n > 0, count / jnp.where(n > 0, n, 1), 0)
    e = mean - pool.pool_mean
    new = Pool(
        n,
        pool.pool_mean + w * e,
        pool.pool_within + w * (var - pool.pool_within),
        # e^2 overflows at _PROBE; in this order 0 does not meet infinity.
        (1 - w) * pool.pool_between + (1 - w) * w * e * e,
    )
    return jax.tree.map(
        lambda new, old: jnp.where(w > 0, new, old).astype(old.dtype), new, pool
    )


def number_of_values(
    layer: object, fn: Callable[..., Any], args: Any, kwargs: Any, features: int
) -> Any:
    """How many values per feature one call of a layer normalises.

    Args:
      layer: The layer. Its ``axis_name``, if any, names the mapped axes that it joins.
      fn: The call, for the names of the arguments.
      args: Arguments. The first array is the input.
      kwargs: Named arguments. ``mask`` chooses the values that count.
      features: Number of features.

    Returns:
      The number, a Python float where nothing is traced.
    """
    given = inspect.signature(fn).bind(*args, **kwargs).arguments
    mask = given.pop("mask", None)
    leaves = jax.tree.leaves(list(given.values()))
    x = next(leaf for leaf in leaves if getattr(leaf, "ndim", 0))
    seen = x.size if mask is None else jnp.sum(jnp.broadcast_to(mask, x.shape))
    count = seen / features
    axes = getattr(layer, "axis_name", None)
    return count if axes is None else lax.psum(count, axes)


def call_in_mode(
    layer: object, fn: Callable[..., Any], args: Any, kwargs: Any, running: bool
) -> Any:
    """Calls a layer of Flax with running statistics or with those of the batch.

    The attribute ``use_running_average`` of the layer says which, or else the argument
    of that name. A layer without both is called as it is.

    Args:
      layer: The layer.
      fn: Its call, bound to it.
      args: Arguments.
      kwargs: Named arguments.
      running: Whether to normalise by the running statistics.

    Returns:
      What the call returns.
    """
    signature = inspect.signature(fn)
    by_attribute = hasattr(layer, _MODE)
    if _MODE in signature.parameters:
        given = signature.bind(*args, **kwargs)
        given.arguments[_MODE] = None if by_attribute else running
        args, kwargs = given.args, given.kwargs
    if not by_attribute:
        return fn(*args, **kwargs)
    before = getattr(layer, _MODE)
    object.__setattr__(layer, _MODE, running)  # linen's modules are frozen
    try:
        return fn(*args, **kwargs)
    finally:
        object.__setattr__(layer, _MODE, before)


def population(
    sweep: Sweep, stats: Stats, batches: Iterable[Any], exact: bool
) -> dict[Hashable, tuple[jax.Array, jax.Array]]:
    """The statistics of all layers over all batches.

    Args:
      sweep: Runs a model over batches, see ``Sweep``.
      stats: The statistics before, by layer.
      batches: The batches.
      exact: Whether to go layer by layer, in the order of their calls.

    Returns:
      The statistics of the population. Layers that are not called keep theirs.

    Raises:
      TypeError: If it is called under ``jax.jit``.
      ValueError: If there is no batch, a batch passes no layer, a layer cannot be
        read, or ``exact`` meets batches that can be read once only.
    """
    stats = dict(stats)
    if not stats:
        return stats
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(stats)):
        raise TypeError(
            "recompute_batch_stats compiles the model itself and reads results between "
            "its batches; call it outside of jax.jit."
        )
    first, batches = _first(batches, exact)
    pools, order = sweep(stats, list(stats), _PROBE, [first])
    called = _called(pools, order, exact)
    momenta = {name: _momenta(name, pools[name]) for name in called}
    if not called:
        raise ValueError(
            "the first batch passes no layer of normalisation, so that all would keep "
            "their statistics; let forward or apply_fn call the model that it is given."
        )
    for group in [[name] for name in called] if exact else [called]:
        pools, _ = sweep(stats, group, 0.0, batches)
        for name in group:
            stats[name] = _moments(pools[name], momenta[name], stats[name])
    return stats


def _called(
    pools: Mapping[Hashable, Pool], order: Sequence[Hashable], exact: bool
) -> list[Hashable]:
    """The layers that were called, in the order of their first calls.

    Raises:
      ValueError: If the order is needed, and a program that was compiled before hides
        it.
    """
    called = [name for name in dict.fromkeys(order) if name in pools]
    hidden = [
        name
        for name, pool in pools.items()
        if name not in called and np.any(np.asarray(pool.pool_count) > 0)
    ]
    if hidden and exact:
        raise ValueError(
            f"exact=True needs the order of the layers, and that of {hidden} is hidden "
            "in a function that was compiled before; pass one without jax.jit."
        )
    return called + hidden


def _first(batches: Iterable[Any], exact: bool) -> tuple[Any, Iterable[Any]]:
    """The first batch, and all of them."""
    iterator: Iterator[Any] = iter(batches)
    if exact and iterator is batches:
        raise ValueError(
            "exact=True reads the batches once a layer, and these can be read only "
            "once; pass a list, or leave exact out."
        )
    try:
        first = next(iterator)
    except StopIteration:
        raise ValueError(
            "there is no batch to compute statistics from; an iterator that was read "
            "before is empty, so pass a new one or a list."
        ) from None
    again = itertools.chain([first], iterator) if iterator is batches else batches
    return first, again


def _momenta(name: Hashable, probe: Pool) -> tuple[np.ndarray, np.ndarray]:
    """The momenta of mean and variance, from calls that started at ``_PROBE``.

    Raises:
      ValueError: If the layer had no values, or left its statistics as they were.
    """
    if not np.all(np.asarray(probe.pool_count) > 0):
        raise ValueError(
            f"the mask of the first batch leaves no value for the layer {name}; start "
            "with another batch."
        )
    found = np.asarray(probe.pool_mean), np.asarray(probe.pool_within)
    momenta = _as_written(found[0] / _PROBE), _as_written(found[1] / _PROBE)
    for momentum in momenta:
        if not np.all(np.isfinite(momentum) & (np.abs(momentum) < 1)):
            raise ValueError(
                f"the layer {name} did not move its statistics towards those of the "
                "batch; call the model as in training, with the statistics of the "
                "batch."
            )
    return momenta


def _as_written(momentum: np.ndarray) -> np.ndarray:
    """The shortest decimals that round to these numbers, in float64.

    ``1 - momentum`` magnifies the rounding of the momentum to float32. The program has
    0.99 and computes ``1 - 0.99`` in float64.
    """
    numbers, places = np.unique(momentum, return_inverse=True)
    decimals = np.array([float(str(number)) for number in numbers], np.float64)
    return decimals[places].reshape(momentum.shape)


def _moments(
    pool: Pool,
    momenta: tuple[np.ndarray, np.ndarray],
    before: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of a pool in the dtypes of ``before``; that, if it is empty."""
    scale, var_scale = (1 - momentum for momentum in momenta)
    mean = pool.pool_mean / scale
    var = pool.pool_within / var_scale + pool.pool_between / scale**2
    return (
        jnp.where(pool.pool_count > 0, mean, before[0]).astype(before[0].dtype),
        jnp.where(pool.pool_count > 0, var, before[1]).astype(before[1].dtype),
    )
