"""Averages of the parameters, as the last link of an Optax chain.

    avg += w(t) * (x_t - avg),    x_t = params + updates

Every average of this module is :func:`average` with a weight of
:mod:`optax_avg.weights`; :mod:`optax_avg.windows` has the two that need other memory,
and :func:`optax_avg.averaged_params` reads all of them. An average must stand last in
the chain: it averages what ``optax.apply_updates`` will make of the updates it sees.
Inside ``optax.MultiSteps`` it moves once per real step; around it, once per call.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_avg import _accumulate, _tree, weights
from optax_avg._absorb import absorbing


class AverageState(NamedTuple):
    """State of :func:`average`.

    Attributes:
      step: int32, optimizer steps seen.
      absorbed: int32, iterates in the average.
      rejected: int32, iterates left out because a leaf was not finite.
      averages: the averages by name, ``MaskedNode`` at leaves that are not averaged.
      compensations: what rounding took from ``averages``; empty unless compensated.
      masses: float32 sums of :class:`optax_avg.weights.Mass` by name.
    """

    step: jax.Array
    absorbed: jax.Array
    rejected: jax.Array
    averages: dict[str, Any]
    compensations: dict[str, Any]
    masses: dict[str, jax.Array]


def average(
    weight: weights.Weight | Mapping[str, weights.Weight],
    *,
    every: int = 1,
    start: int = 0,
    name: str = "average",
    accumulator_dtype: Any = None,
    rounding: str | None = None,
    where: _tree.Where | None = None,
    skip_nonfinite: bool = True,
    memory_kind: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Averages the parameters with any weight; the updates pass through unchanged.

    ``avg += w(t) (x_t - avg)`` with ``x_t = optax.apply_updates(params, updates)`` at
    the optimizer steps ``s > start`` (from 1) where ``s - start`` is a multiple of
    ``every``; ``t = 1, 2, ...`` numbers them. The average starts from the parameters of
    step ``start``. Memory is touched at these steps alone.

    Args:
      weight: ``w``, from :mod:`optax_avg.weights` or any function of ``t``; or a dict
        of them by name, for several averages in one pass over the parameters.
      every: optimizer steps between absorbed iterates; weights that speak of time keep
        their time constant in optimizer steps.
      start: optimizer steps to leave out.
      name: by which :func:`optax_avg.averaged_params` finds the average; a dict brings
        its own names.
      accumulator_dtype: dtype of the average; by default float32, or the leaf's dtype
        where that is wider.
      rounding: ``None`` rounds to nearest, or stochastically if ``accumulator_dtype``
        is narrower than float32, where rounding to nearest would stop a slow average;
        ``"stochastic"`` is unbiased; ``"compensated"`` keeps the rounding error in a
        second tree and adds it back.
      where: which leaves to average, a tree of bools or a predicate
        ``(key_path, leaf) -> bool``; the others are read from the parameters.
      skip_nonfinite: leave out an iterate with a NaN or inf anywhere, whole.
      memory_kind: ``"pinned_host"`` keeps the average in host memory; under explicit
        sharding this needs jax 0.10.2.

    Returns:
      A transformation whose state is an :class:`AverageState`.

    Raises:
      ValueError: If an argument is out of range, or ``update`` gets no params.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = optax.chain(optax.sgd(1.0), oa.average(lambda t: 1 / t))
      >>> params = jnp.array(0.0)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update(jnp.array(-1.0), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> float(params), float(oa.averaged_params(state, params))
      (3.0, 2.0)
    """
    by_name = weight if isinstance(weight, Mapping) else {name: weight}
    if not by_name:
        raise ValueError("average needs a weight; write average(weights.ema(0.999)).")
    by_name = {str(key): weights.with_stride(value) for key, value in by_name.items()}
    rounding = _check_rounding(rounding, accumulator_dtype)
    compensated = rounding == "compensated"

    def empty(x):
        accumulators = {
            key: jax.tree.map(lambda leaf: _tree.copy_as(leaf, accumulator_dtype), x)
            for key in by_name
        }
        return AverageState(
            step=jnp.zeros([], jnp.int32),
            absorbed=jnp.zeros([], jnp.int32),
            rejected=jnp.zeros([], jnp.int32),
            averages=accumulators,
            compensations=jax.tree.map(jnp.zeros_like, accumulators)
            if compensated
            else {},
            masses={key: jnp.zeros([], jnp.float32) for key in by_name},
        )

    def absorb(state, x, is_base):
        t = (state.absorbed + 1).astype(jnp.float32)
        new = {}
        for seed, (key, w_of) in enumerate(by_name.items()):
            w, mass = weights.advance(w_of, t, every, state.masses[key])
            # Without the barrier XLA computes w anew for every element.
            w = lax.optimization_barrier(jnp.where(is_base, 1, w))
            avg, rest = state.averages[key], state.compensations.get(key, {})
            if compensated:
                avg, rest = _accumulate.compensated(w, x, avg, rest)
            elif rounding == "stochastic":
                avg = _accumulate.stochastic(w, x, avg, seed, state.step)
            else:
                avg = _accumulate.nearest(w, x, avg)
            new[key] = avg, rest, jnp.where(is_base, state.masses[key], mass)
        return state._replace(
            averages={key: avg for key, (avg, _, _) in new.items()},
            compensations={
                key: rest for key, (_, rest, _) in new.items() if compensated
            },
            masses={key: mass for key, (_, _, mass) in new.items()},
        )

    return absorbing(
        "average",
        empty,
        absorb,
        every=every,
        start=start,
        where=where,
        skip_nonfinite=skip_nonfinite,
        memory_kind=memory_kind,
    )


def ema_params(
    decay: weights.ScalarOrSchedule,
    *,
    debias: bool = True,
    every: int = 1,
    start: int = 0,
    name: str = "ema",
    accumulator_dtype: Any = None,
    rounding: str | None = None,
    where: _tree.Where | None = None,
    skip_nonfinite: bool = True,
    memory_kind: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Exponential moving average of the parameters.

    ``avg += (1-d)/(1-d^t) (x_t - avg)``; with ``debias=False``, ``avg += (1-d) (x_t -
    avg)`` from the initial parameters.

    Args:
      decay: ``d`` in [0, 1] per absorbed iterate, or a schedule of it.
      debias: whether the initial parameters are left out.
      every: optimizer steps between absorbed iterates.
      start: optimizer steps to leave out.
      name: of the average.
      accumulator_dtype: see :func:`average`, as all that follow.
      rounding: ``None``, ``"stochastic"`` or ``"compensated"``.
      where: which leaves to average.
      skip_nonfinite: leave out iterates that are not finite.
      memory_kind: where the average lives.

    Returns:
      A transformation; the last link of a chain.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax, optax_avg as oa
      >>> tx = optax.chain(optax.adamw(3e-4), oa.ema_params(0.999))

    References:
      See :func:`optax_avg.weights.ema`.
    """
    return average(
        weights.ema(decay, debias),
        every=every,
        start=start,
        name=name,
        accumulator_dtype=accumulator_dtype,
        rounding=rounding,
        where=where,
        skip_nonfinite=skip_nonfinite,
        memory_kind=memory_kind,
    )


def polyak_average(
    *,
    every: int = 1,
    start: int = 0,
    name: str = "polyak",
    accumulator_dtype: Any = None,
    rounding: str | None = None,
    where: _tree.Where | None = None,
    skip_nonfinite: bool = True,
    memory_kind: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Polyak-Ruppert average, the uniform mean of the iterates: ``w(t) = 1/t``.

    Args:
      every: optimizer steps between absorbed iterates.
      start: optimizer steps to leave out.
      name: of the average.
      accumulator_dtype: see :func:`average`, as all that follow.
      rounding: ``None``, ``"stochastic"`` or ``"compensated"``.
      where: which leaves to average.
      skip_nonfinite: leave out iterates that are not finite.
      memory_kind: where the average lives.

    Returns:
      A transformation; the last link of a chain.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax, optax_avg as oa
      >>> tx = optax.chain(optax.sgd(0.1), oa.polyak_average())

    References:
      See :func:`optax_avg.weights.uniform`.
    """
    return average(
        weights.uniform(),
        every=every,
        start=start,
        name=name,
        accumulator_dtype=accumulator_dtype,
        rounding=rounding,
        where=where,
        skip_nonfinite=skip_nonfinite,
        memory_kind=memory_kind,
    )


def swa(
    start: int,
    every: int = 1,
    *,
    name: str = "swa",
    accumulator_dtype: Any = None,
    rounding: str | None = None,
    where: _tree.Where | None = None,
    skip_nonfinite: bool = True,
    memory_kind: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Stochastic weight averaging: the uniform mean of every ``every``-th iterate.

    ``avg += (x_t - avg)/t`` at the steps ``start + every``, ``start + 2 every``, ...
    With :func:`optax_avg.schedules.swa_cyclic` and ``every`` its cycle, these are the
    steps of the lowest learning rate. Models with BatchNorm need their statistics
    recomputed at the average.

    Args:
      every: optimizer steps between absorbed iterates.
      start: optimizer steps to leave out.
      name: of the average.
      accumulator_dtype: see :func:`average`, as all that follow.
      rounding: ``None``, ``"stochastic"`` or ``"compensated"``.
      where: which leaves to average.
      skip_nonfinite: leave out iterates that are not finite.
      memory_kind: where the average lives.

    Returns:
      A transformation; the last link of a chain.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax, optax_avg as oa
      >>> tx = optax.chain(optax.sgd(0.1), oa.swa(start=750, every=50))

    References:
      Izmailov et al., "Averaging Weights Leads to Wider Optima and Better
      Generalization", 2018, 1803.05407.
    """
    return polyak_average(
        every=every,
        start=start,
        name=name,
        accumulator_dtype=accumulator_dtype,
        rounding=rounding,
        where=where,
        skip_nonfinite=skip_nonfinite,
        memory_kind=memory_kind,
    )


def tail_average(
    start: int,
    *,
    name: str = "tail_average",
    accumulator_dtype: Any = None,
    rounding: str | None = None,
    where: _tree.Where | None = None,
    skip_nonfinite: bool = True,
    memory_kind: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Tail (suffix) average: the uniform mean of all iterates after step ``start``.

    Args:
      start: optimizer steps to leave out; half of the training is customary.
      name: of the average.
      accumulator_dtype: see :func:`average`, as all that follow.
      rounding: ``None``, ``"stochastic"`` or ``"compensated"``.
      where: which leaves to average.
      skip_nonfinite: leave out iterates that are not finite.
      memory_kind: where the average lives.

    Returns:
      A transformation; the last link of a chain.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax, optax_avg as oa
      >>> tx = optax.chain(optax.sgd(0.1), oa.tail_average(start=500))

    References:
      Rakhlin, Shamir and Sridharan, "Making Gradient Descent Optimal for Strongly
      Convex Stochastic Optimization", 2012, 1109.5647.
    """
    return polyak_average(
        every=1,
        start=start,
        name=name,
        accumulator_dtype=accumulator_dtype,
        rounding=rounding,
        where=where,
        skip_nonfinite=skip_nonfinite,
        memory_kind=memory_kind,
    )


def power_ema(
    sigma_rel: float | Sequence[float] = (0.05, 0.10),
    *,
    every: int = 1,
    start: int = 0,
    name: str = "power_ema",
    accumulator_dtype: Any = None,
    rounding: str | None = None,
    where: _tree.Where | None = None,
    skip_nonfinite: bool = True,
    memory_kind: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Power-function EMA of one or several widths, in one pass over the parameters.

    ``avg += (1 - (1-1/t)^(gamma+1)) (x_t - avg)``.

    Args:
      sigma_rel: relative width in (0, 12^-1/2), or a sequence of them; then the
        averages are named ``f"{name}_{sigma_rel:g}"``.
      every: optimizer steps between absorbed iterates.
      start: optimizer steps to leave out.
      name: of the average.
      accumulator_dtype: see :func:`average`, as all that follow.
      rounding: ``None``, ``"stochastic"`` or ``"compensated"``.
      where: which leaves to average.
      skip_nonfinite: leave out iterates that are not finite.
      memory_kind: where the average lives.

    Returns:
      A transformation; the last link of a chain.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax, optax_avg as oa
      >>> tx = optax.chain(optax.adam(1e-3), oa.power_ema([0.05, 0.10]))

    References:
      Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion
      Models", 2024, 2312.02696.
    """
    widths = {name: sigma_rel}
    if isinstance(sigma_rel, Sequence):
        widths = {f"{name}_{width:g}": width for width in sigma_rel}
        if len(widths) != len(sigma_rel):
            raise ValueError(f"power_ema needs distinct widths, got {sigma_rel!r}.")
    return average(
        {key: weights.power_function(sigma_rel=width) for key, width in widths.items()},
        every=every,
        start=start,
        name=name,
        accumulator_dtype=accumulator_dtype,
        rounding=rounding,
        where=where,
        skip_nonfinite=skip_nonfinite,
        memory_kind=memory_kind,
    )


def lr_weighted_average(
    learning_rate: optax.Schedule,
    power: float = 1.0,
    *,
    every: int = 1,
    start: int = 0,
    name: str = "lr_weighted",
    accumulator_dtype: Any = None,
    rounding: str | None = None,
    where: _tree.Where | None = None,
    skip_nonfinite: bool = True,
    memory_kind: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Average weighted by a power of the learning rate, ``w(t) = lr_t^p / sum lr_i^p``.

    Args:
      learning_rate: the optimizer's schedule.
      power: ``p``; 1 is the average of the analysis of SGD, 2 that of schedule-free.
      every: optimizer steps between absorbed iterates.
      start: optimizer steps to leave out.
      name: of the average.
      accumulator_dtype: see :func:`average`, as all that follow.
      rounding: ``None``, ``"stochastic"`` or ``"compensated"``.
      where: which leaves to average.
      skip_nonfinite: leave out iterates that are not finite.
      memory_kind: where the average lives.

    Returns:
      A transformation; the last link of a chain.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax, optax_avg as oa
      >>> lr = optax.linear_schedule(0.1, 0.0, 1000)
      >>> tx = optax.chain(optax.sgd(lr), oa.lr_weighted_average(lr))

    References:
      See :func:`optax_avg.weights.mass`.
    """
    if not callable(learning_rate):
        raise ValueError(
            "lr_weighted_average needs a schedule; for a constant rate write "
            "polyak_average()."
        )
    return average(
        weights.mass(lambda t: learning_rate(start + t * every - 1) ** power),
        every=every,
        start=start,
        name=name,
        accumulator_dtype=accumulator_dtype,
        rounding=rounding,
        where=where,
        skip_nonfinite=skip_nonfinite,
        memory_kind=memory_kind,
    )


def _check_rounding(rounding: str | None, dtype: Any) -> str | None:
    """The rounding, ``None`` resolved for the dtype of the accumulator."""
    if rounding not in (None, "stochastic", "compensated"):
        raise ValueError(
            f"rounding must be None, 'stochastic' or 'compensated', got {rounding!r}."
        )
    if dtype is not None and not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(f"accumulator_dtype must be floating, got {dtype}.")
    narrow = dtype is not None and jnp.finfo(dtype).bits < 32
    return "stochastic" if rounding is None and narrow else rounding
