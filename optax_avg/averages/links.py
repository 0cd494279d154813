"""Averages of the parameters, as the last link of an Optax chain.

    avg += w(t) * (x_t - avg),    x_t = params + updates

Every average is :func:`average` with a weight of :mod:`optax_avg.weights` or a memory
of :mod:`optax_avg.memories`; :func:`optax_avg.averaged_params` reads all of them. An
average must stand last in the chain, because it averages what ``optax.apply_updates``
will make of the updates that it sees. Inside ``optax.MultiSteps`` it moves once per
real step; around it, once per call.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import jax
import numpy as np
import optax

from optax_avg import _checks, _numerics, weights
from optax_avg.averages import memories
from optax_avg.averages._options import (
    AccumulatorOptions,
    AverageOptions,
    CommonOptions,
    MemoryOptions,
    with_options,
)
from optax_avg.averages._rule import averaging, every_and_start

__all__ = [
    "average",
    "bema",
    "ema_params",
    "lr_weighted_average",
    "polyak_average",
    "power_ema",
    "swa",
    "tail_average",
    "window_average",
]


@with_options(AverageOptions)
def average(
    weight: weights.Weight
    | memories.Memory
    | Mapping[str, weights.Weight | memories.Memory],
    **options: Unpack[AverageOptions],
) -> optax.GradientTransformationExtraArgs:
    """Averages the parameters with any weight; the updates pass through unchanged.

    ``avg += w(t) (x_t - avg)`` with ``x_t = optax.apply_updates(params, updates)`` at
    the optimizer steps ``s > start`` (from 1) where ``s - start`` is a multiple of
    ``every``; ``t = 1, 2, ...`` numbers them. Other steps leave the average unchanged.

    Most weights have ``w(1) = 1``: the first iterate replaces what was there. Weights
    with ``w(1) < 1``, such as ``ema(decay, debias=False)``, start from the parameters
    of step ``start``, or from the first iterate where these are not finite.

    Args:
      weight: The weight ``w``, from :mod:`optax_avg.weights` or any function of ``t``,
        a float32. It is used as it is: outside [0, 1] the average leaves the range of
        the iterates, and may diverge. Or a memory of :mod:`optax_avg.memories`; or a
        dict of weights and memories by name, for several averages in one pass over the
        parameters.
      **options: Options of every average, see :class:`optax_avg.AverageOptions`.

    Returns:
      A transformation with the state :class:`optax_avg.AverageState`.

    Raises:
      ValueError: If ``name`` is given with a dict. In ``update``, if it gets no params.
      TypeError: If ``weight`` is a transformation, such as ``ema_params(0.999)``.

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
    if isinstance(weight, Mapping) and options.get("name", "average") != "average":
        raise ValueError(
            "a dict of weights gives each average its name, so name= says nothing; "
            "write average({'fast': weight, 'slow': other}) without name=."
        )
    return averaging("average", weight, **options)


@with_options(AverageOptions, name="ema")
def ema_params(
    decay: weights.ScalarOrSchedule,
    *,
    debias: bool = True,
    **options: Unpack[AverageOptions],
) -> optax.GradientTransformationExtraArgs:
    """Exponential moving average of the parameters.

    ``avg += (1-d)/(1-d^t) (x_t - avg)``; with ``debias=False``, ``avg += (1-d) (x_t -
    avg)`` from the initial parameters.

    Args:
      decay: The decay ``d`` in [0, 1] per absorbed iterate, or a schedule of it. The
        values of a schedule are not checked.
      debias: Whether the initial parameters have no weight, by the bias correction of
        Adam.
      **options: Options of every average, see :class:`optax_avg.AverageOptions`.

    Returns:
      A transformation with the state :class:`optax_avg.AverageState`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = optax.chain(optax.sgd(1.0), oa.ema_params(0.5))
      >>> params = jnp.array(0.0)
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(jnp.array(-3.0), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> float(params), float(oa.averaged_params(state, params))
      (6.0, 5.0)

    References:
      See :func:`optax_avg.weights.ema`.
    """
    return averaging("ema_params", weights.ema(decay, debias), **options)


@with_options(AverageOptions, name="polyak")
def polyak_average(
    **options: Unpack[AverageOptions],
) -> optax.GradientTransformationExtraArgs:
    """Polyak-Ruppert average, the uniform mean of the iterates: ``w(t) = 1/t``.

    Args:
      **options: Options of every average, see :class:`optax_avg.AverageOptions`.

    Returns:
      A transformation with the state :class:`optax_avg.AverageState`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = optax.chain(optax.sgd(1.0), oa.polyak_average())
      >>> x = jnp.array(0.0)
      >>> state = tx.init(x)
      >>> for _ in range(4):  # 1, 2, 3, 4
      ...     u, state = tx.update(jnp.array(-1.0), state, x)
      ...     x = optax.apply_updates(x, u)
      >>> round(float(oa.averaged_params(state, x)), 4)
      2.5

    References:
      See :func:`optax_avg.weights.uniform`.
    """
    return averaging("polyak_average", weights.uniform(), **options)


@with_options(AccumulatorOptions, name="swa")
def swa(
    start: int, every: int = 1, **options: Unpack[AccumulatorOptions]
) -> optax.GradientTransformationExtraArgs:
    """Stochastic weight averaging: the uniform mean of every ``every``-th iterate.

    ``avg += (x_t - avg)/t`` at the steps ``start + every``, ``start + 2 every``, ...
    With :func:`optax_avg.schedules.swa_cyclic` and ``every`` its cycle, these are the
    steps of the lowest learning rate. Models with BatchNorm need their statistics
    recomputed at the average.

    Args:
      start: Number of optimizer steps to leave out at the beginning.
      every: Number of optimizer steps between absorbed iterates.
      **options: Options of every average, see :class:`optax_avg.AverageOptions`.

    Returns:
      A transformation with the state :class:`optax_avg.AverageState`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = optax.chain(optax.sgd(1.0), oa.swa(start=1, every=2))
      >>> x = jnp.array(0.0)
      >>> state = tx.init(x)
      >>> for _ in range(4):  # of 1, 2, 3 and 4, it takes 3
      ...     u, state = tx.update(jnp.array(-1.0), state, x)
      ...     x = optax.apply_updates(x, u)
      >>> round(float(oa.averaged_params(state, x)), 4)
      3.0

    References:
      Izmailov et al., "Averaging Weights Leads to Wider Optima and Better
      Generalization", 2018, 1803.05407.
    """
    return averaging("swa", weights.uniform(), start=start, every=every, **options)


@with_options(AccumulatorOptions, name="tail_average")
def tail_average(
    start: int, **options: Unpack[AccumulatorOptions]
) -> optax.GradientTransformationExtraArgs:
    """Tail (suffix) average: the uniform mean of all iterates after step ``start``.

    Args:
      start: Number of optimizer steps to leave out; half of the training is customary.
      **options: Options of every average, see :class:`optax_avg.AverageOptions`.

    Returns:
      A transformation with the state :class:`optax_avg.AverageState`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = optax.chain(optax.sgd(1.0), oa.tail_average(start=2))
      >>> x = jnp.array(0.0)
      >>> state = tx.init(x)
      >>> for _ in range(4):  # of 1, 2, 3 and 4, it takes the last two
      ...     u, state = tx.update(jnp.array(-1.0), state, x)
      ...     x = optax.apply_updates(x, u)
      >>> round(float(oa.averaged_params(state, x)), 4)
      3.5

    References:
      Rakhlin, Shamir and Sridharan, "Making Gradient Descent Optimal for Strongly
      Convex Stochastic Optimization", 2012, 1109.5647.
    """
    return averaging("tail_average", weights.uniform(), start=start, **options)


@with_options(AverageOptions, name="power_ema")
def power_ema(
    sigma_rel: float | Sequence[float] = (0.05, 0.10),
    **options: Unpack[AverageOptions],
) -> optax.GradientTransformationExtraArgs:
    """Power-function EMA of one or several widths, in one pass over the parameters.

    ``avg += (1 - (1-1/t)^(gamma+1)) (x_t - avg)``.

    Args:
      sigma_rel: Relative width in (0, 12^-1/2], or a sequence or vector of widths. The
        averages of a sequence are named ``f"{name}_{sigma_rel:g}"``.
      **options: Options of every average, see :class:`optax_avg.AverageOptions`.

    Returns:
      A transformation with the state :class:`optax_avg.AverageState`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = optax.chain(optax.sgd(1.0), oa.power_ema([0.05, 0.10]))
      >>> x = jnp.array(0.0)
      >>> state = tx.init(x)
      >>> for _ in range(4):  # 1, 2, 3, 4
      ...     u, state = tx.update(jnp.array(-1.0), state, x)
      ...     x = optax.apply_updates(x, u)
      >>> round(float(oa.averaged_params(state, x, "power_ema_0.1")), 4)
      3.894

    References:
      Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion
      Models", 2024, 2312.02696.
    """
    widths = _widths(options.pop("name", "power_ema"), sigma_rel)
    by_name = {key: weights.power_function(sigma_rel=s) for key, s in widths.items()}
    return averaging("power_ema", by_name, **options)


@with_options(AverageOptions, name="lr_weighted")
def lr_weighted_average(
    learning_rate: optax.Schedule,
    power: float = 1.0,
    **options: Unpack[AverageOptions],
) -> optax.GradientTransformationExtraArgs:
    """Average weighted by a power of the learning rate, ``w(t) = lr_t^p / sum lr_i^p``.

    Args:
      learning_rate: Schedule of the optimizer, a function of the optimizer step. Steps
        whose iterate was not finite, and so was left out, do not count.
      power: The power ``p``; 1 is the average of the analysis of SGD, 2 that of
        schedule-free.
      **options: Options of every average, see :class:`optax_avg.AverageOptions`.

    Returns:
      A transformation with the state :class:`optax_avg.AverageState`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> lr = optax.linear_schedule(1.0, 0.0, 5)
      >>> tx = optax.chain(optax.sgd(1.0), oa.lr_weighted_average(lr))
      >>> x = jnp.array(0.0)
      >>> state = tx.init(x)
      >>> for _ in range(4):  # 1, 2, 3, 4
      ...     u, state = tx.update(jnp.array(-1.0), state, x)
      ...     x = optax.apply_updates(x, u)
      >>> round(float(oa.averaged_params(state, x)), 4)
      2.1429

    References:
      See :func:`optax_avg.weights.mass`.
    """
    if not callable(learning_rate):
        raise ValueError(
            "lr_weighted_average needs a schedule; for a constant rate write "
            "polyak_average(), inside optax.inject_hyperparams write "
            'static_args=("learning_rate",).'
        )
    every, start = every_and_start(options.get("every"), options.get("start"))
    count = lambda t: _numerics.step_of(t, every, start + every - 1)
    weight = weights.mass(lambda t: learning_rate(count(t)) ** power)
    return averaging("lr_weighted_average", weight, **options)


@with_options(CommonOptions, name="window")
def window_average(
    k: int, every: int = 1, *, start: int = 0, **options: Unpack[CommonOptions]
) -> optax.GradientTransformationExtraArgs:
    """Latest weight averaging (LAWA): the uniform mean of the ``k`` latest iterates.

    ``avg_t = 1/min(t,k) sum_{i=max(1,t-k+1)}^t x_i``, the memory
    :func:`optax_avg.memories.window`.

    Args:
      k: Number of iterates in the window; at least 1.
      every: Number of optimizer steps between absorbed iterates.
      start: Number of optimizer steps to leave out at the beginning.
      **options: Options of every average, see :class:`optax_avg.AverageOptions`.

    Returns:
      A transformation with the state :class:`optax_avg.AverageState`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = optax.chain(optax.sgd(1.0), oa.window_average(k=2))
      >>> x = jnp.array(0.0)
      >>> state = tx.init(x)
      >>> for _ in range(4):  # of 1, 2, 3 and 4, it takes the last two
      ...     u, state = tx.update(jnp.array(-1.0), state, x)
      ...     x = optax.apply_updates(x, u)
      >>> round(float(oa.averaged_params(state, x)), 4)
      3.5

    References:
      Kaddour, "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with
      Latest Weight Averaging", 2022, 2209.14981.
    """
    return averaging(
        "window_average", memories.window(k), every=every, start=start, **options
    )


@with_options(MemoryOptions, name="bema")
def bema(
    kappa: float = 0.5,
    eta: float = 0.2,
    rho: float = 10.0,
    gamma: float = 1.0,
    *,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
    **options: Unpack[MemoryOptions],
) -> optax.GradientTransformationExtraArgs:
    """Bias-corrected EMA: an average whose lag behind training is corrected.

    ``ema_t + a_t (x_t - x_0)``, the memory :func:`optax_avg.memories.corrected`.

    Args:
      kappa: Exponent of the EMA's weight ``b_t = (rho + gamma t)^-kappa``, in [0, 1].
      eta: Exponent of the correction ``a_t = (rho + gamma t)^-eta``, at least 0.
      rho: Number that keeps both below 1 at the beginning, at least 0.
      gamma: Factor of the number of absorbed iterates, positive.
      accumulator_dtype: Dtype of the three trees in the state, a float of 16 bits or
        more. The default is float32, or the dtype of the leaf if that is wider. The
        EMA of a narrower one is rounded with dither.
      **options: Options of every average, see :class:`optax_avg.AverageOptions`.

    Returns:
      A transformation with the state :class:`optax_avg.AverageState`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = optax.chain(optax.sgd(1.0), oa.bema())
      >>> x = jnp.array(0.0)
      >>> state = tx.init(x)
      >>> for _ in range(4):  # 1, 2, 3, 4
      ...     u, state = tx.update(jnp.array(-1.0), state, x)
      ...     x = optax.apply_updates(x, u)
      >>> round(float(oa.averaged_params(state, x)), 4)
      4.4576

    References:
      Block and Zhang, "EMA Without the Lag: Bias-Corrected Iterate Averaging Schemes",
      2025, 2508.00180.
    """
    memory = memories.corrected(
        kappa, eta, rho, gamma, accumulator_dtype=accumulator_dtype
    )
    return averaging("bema", memory, **options)


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
