"""Averages of the parameters, as the last link of an Optax chain.

    avg += w(t) * (x_t - avg),    x_t = params + updates

Every average of this module is :func:`average` with a weight of
:mod:`optax_avg.weights`; :mod:`optax_avg.averages.windows` has the two that need other
memory, and :func:`optax_avg.averaged_params` reads all of them. An average must stand
last in the chain: it averages what ``optax.apply_updates`` will make of the updates.
Inside ``optax.MultiSteps`` it moves once per real step; around it, once per call.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from optax_avg import _checks, _leaves, _numerics, weights
from optax_avg.averages._running import running_average


def average(
    weight: weights.Weight | Mapping[str, weights.Weight],
    *,
    every: int = 1,
    start: int = 0,
    name: str = "average",
    accumulator_dtype: Any = None,
    rounding: str | None = None,
    where: _leaves.Where | None = None,
    skip_nonfinite: bool = True,
    memory_kind: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Averages the parameters with any weight; the updates pass through unchanged.

    ``avg += w(t) (x_t - avg)`` with ``x_t = optax.apply_updates(params, updates)`` at
    the optimizer steps ``s > start`` (from 1) where ``s - start`` is a multiple of
    ``every``; ``t = 1, 2, ...`` numbers them. The average starts from the parameters of
    step ``start``; where these are not finite, from the first iterate. Memory is
    touched at these steps alone.

    Args:
      weight: ``w``, from :mod:`optax_avg.weights` or any function of ``t``, a float32;
        or a dict of them by name, for several averages in one pass over the parameters.
      every: optimizer steps between absorbed iterates; weights that speak of time keep
        their time constant in optimizer steps.
      start: optimizer steps to leave out.
      name: by which :func:`optax_avg.averaged_params` finds the average; a dict brings
        its own names.
      accumulator_dtype: dtype of the average, a float of 16 bits or more; by default
        float32, or the leaf's dtype where that is wider. The average of a complex leaf
        is complex64 or wider.
      rounding: ``None`` rounds to nearest, or stochastically if ``accumulator_dtype``
        is narrower than float32, where rounding to nearest would stop a slow average;
        ``"stochastic"`` is unbiased, with random bits that depend on the step, the
        name and the leaf; ``"compensated"`` keeps the rounding error in a second tree
        and adds it back.
      where: which leaves to average, a tree of bools or a predicate
        ``(key_path, leaf) -> bool``; the others are read from the parameters.
      skip_nonfinite: leave out an iterate with a NaN or inf anywhere, whole.
      memory_kind: ``"pinned_host"`` keeps the average in host memory; under explicit
        sharding this needs jax 0.10.2.

    Returns:
      A transformation whose state is an :class:`optax_avg.AverageState`.

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
    return running_average(
        "average",
        weight,
        every=every,
        start=start,
        name=name,
        accumulator_dtype=accumulator_dtype,
        rounding=rounding,
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
    where: _leaves.Where | None = None,
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
    return running_average(
        "ema_params",
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
    where: _leaves.Where | None = None,
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
    return running_average(
        "polyak_average",
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
    where: _leaves.Where | None = None,
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
    return running_average(
        "swa",
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


def tail_average(
    start: int,
    *,
    name: str = "tail_average",
    accumulator_dtype: Any = None,
    rounding: str | None = None,
    where: _leaves.Where | None = None,
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
    return running_average(
        "tail_average",
        weights.uniform(),
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
    where: _leaves.Where | None = None,
    skip_nonfinite: bool = True,
    memory_kind: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Power-function EMA of one or several widths, in one pass over the parameters.

    ``avg += (1 - (1-1/t)^(gamma+1)) (x_t - avg)``.

    Args:
      sigma_rel: relative width in (0, 12^-1/2), or a sequence or vector of them; then
        the averages are named ``f"{name}_{sigma_rel:g}"``.
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
    widths = _widths(name, sigma_rel)
    return running_average(
        "power_ema",
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
    where: _leaves.Where | None = None,
    skip_nonfinite: bool = True,
    memory_kind: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Average weighted by a power of the learning rate, ``w(t) = lr_t^p / sum lr_i^p``.

    Args:
      learning_rate: Schedule of the optimizer. Steps whose iterate was not finite, and
        so was left out, do not count.
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
            "polyak_average(), inside optax.inject_hyperparams write "
            'static_args=("learning_rate",).'
        )
    every, start = _checks.check_every(every, start)
    count = lambda t: _numerics.step_of(t, every, start + every - 1)
    return running_average(
        "lr_weighted_average",
        weights.mass(lambda t: learning_rate(count(t)) ** power),
        every=every,
        start=start,
        name=name,
        accumulator_dtype=accumulator_dtype,
        rounding=rounding,
        where=where,
        skip_nonfinite=skip_nonfinite,
        memory_kind=memory_kind,
    )


def _widths(name: str, sigma_rel: Any) -> dict[str, Any]:
    """The widths of :func:`power_ema` by the names of their averages."""
    shape = getattr(sigma_rel, "shape", ())
    if not shape and (
        not isinstance(sigma_rel, Sequence) or isinstance(sigma_rel, str)
    ):
        return {name: sigma_rel}
    if len(shape) > 1:
        raise ValueError(
            f"power_ema takes a width or a vector of them, got shape {shape}."
        )
    try:
        listed = np.asarray(sigma_rel).tolist() if shape else sigma_rel
    except jax.errors.TracerArrayConversionError:
        raise ValueError(
            "power_ema names its averages by their widths, which must be known; inside "
            'optax.inject_hyperparams write static_args=("sigma_rel",).'
        ) from None
    listed = [
        float(_checks.within("sigma_rel", width, 0, 12**-0.5)) for width in listed
    ]
    widths = {f"{name}_{width:g}": width for width in listed}
    if not listed or len(widths) != len(listed):
        raise ValueError(f"power_ema needs distinct widths, got {sigma_rel!r}.")
    return widths
