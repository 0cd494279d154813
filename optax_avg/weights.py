"""The weight w(t) that an average gives to its newest iterate.

    avg += w(t) * (x_t - avg)

``t = 1, 2, ...`` numbers the iterates absorbed, the newest included, and ``dt`` is the
number of optimizer steps between two of them (the ``every`` of
:func:`optax_avg.average`). A weight is a function of ``t`` or of ``(t, dt)``; where
``w(t) = m(t) / S(t)`` needs a sum over the past it is a :class:`Mass`, whose sum the
average carries in its state. Every name below is one equation; the rest of the module
converts between the units in which the field states horizons, and
:func:`profile` writes out the weights that an average puts on each iterate.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_avg import _checks, _numerics

__all__ = [
    "CooldownName",
    "CooldownShape",
    "Mass",
    "Profile",
    "ScalarOrSchedule",
    "Weight",
    "advance",
    "cooldown",
    "decay_from_half_life",
    "ema",
    "gamma_from_half_life",
    "gamma_from_sigma_rel",
    "gamma_of",
    "gravity",
    "half_life",
    "half_life_from_decay",
    "half_life_from_gamma",
    "half_life_linear",
    "inverse_gamma",
    "mass",
    "on_iterates",
    "polynomial",
    "power_function",
    "profile",
    "ramp",
    "scale_decay",
    "sequence",
    "sigma_rel_from_gamma",
    "uniform",
    "with_stride",
]

# A number, or a schedule of the optimizer steps since the average began.
ScalarOrSchedule = ArrayLike | optax.Schedule
# How a cooldown falls: a name, or a function from the share of it that has passed.
CooldownName = Literal["linear", "sqrt", "cosine"]
CooldownShape = CooldownName | Callable[[float], ArrayLike]
_FALLS: dict[CooldownName, Callable[[float], float]] = {
    "linear": lambda s: 1 - s,
    "sqrt": lambda s: 1 - math.sqrt(s),
    "cosine": lambda s: (1 + math.cos(math.pi * s)) / 2,
}
# A conversion makes a float of a float and an array of an array.
Number = Any
# The number of an iterate, or a stride in optimizer steps: traced, or plain numbers.
Count = jax.Array | np.ndarray | float
_LN2 = math.log(2.0)
# Conversions between horizons take arrays of several numbers too.
_each_within = functools.partial(_checks.within, elementwise=True)


class Mass(NamedTuple):
    """A weight with memory, ``w(t) = m(t)/S(t)``, ``S(t) = r(t) S(t-1) + m(t)``.

    ``S`` starts at 0, so the first iterate with a positive mass gets weight 1 and the
    weights on the iterates always sum to one.

    Attributes:
      retain: ``r(t, dt)``, the share of the past that is kept.
      add: ``m(t, dt)``, the mass of the newest iterate.
    """

    retain: Callable[[Count, Count], ArrayLike]
    add: Callable[[Count, Count], ArrayLike]


# A function of ``t`` or of ``(t, dt)``, or one with memory.
Weight = Callable[..., ArrayLike] | Mass


class Profile(NamedTuple):
    """The weights that an average puts on each iterate.

    Attributes:
      weights: Float64 array of shape (steps,), the weight on iterate ``1 ... steps``.
      initial: Weight on the initial parameters; with ``weights`` it sums to one.
      mean_age: Mean number of iterates by which the average lags behind the newest.
      relative_width: Standard deviation of the weights over ``steps`` (``sigma_rel``).
    """

    weights: np.ndarray
    initial: float
    mean_age: float
    relative_width: float


def ema(decay: ScalarOrSchedule, debias: bool = True) -> Weight:
    """Exponential moving average.

    ``w(t) = (1-d) / (1-d^t)``; with ``debias=False``, ``w(t) = 1-d`` and the initial
    parameters count. A scheduled ``d(s)`` is debiased exactly, by the product of the
    decays.

    Args:
      decay: ``d`` in [0, 1], per absorbed iterate. ``d = 1`` is the uniform mean. A
        schedule is called with the optimizer steps since the average began, an int32
        from 0. Steps whose iterate was not finite, and so was left out, do not count.
      debias: Whether the weights on the iterates sum to one.

    Returns:
      A weight.

    Raises:
      ValueError: If ``decay`` lies outside [0, 1].

    Example:
      >>> import optax_avg as oa
      >>> oa.weights.profile(oa.weights.ema(0.5), 3).weights.round(4).tolist()
      [0.1429, 0.2857, 0.5714]

    References:
      Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015, 1412.6980.
    """
    if callable(decay):
        d = _schedule(decay)
        if debias:
            return Mass(retain=d, add=lambda t, dt: 1 - d(t, dt))
        return lambda t, dt=1: 1 - d(t, dt)
    d = _checks.within("decay", decay, 0, 1)
    if not debias:
        return lambda t, dt=1: 1 - d + 0 * t
    log_d = _log(d)

    def weight(t, dt=1):
        # Written with expm1: 1 - d**t loses all digits for d near 1.
        safe = jnp.where(log_d < 0, log_d, -1.0)
        return jnp.where(log_d < 0, jnp.expm1(safe) / jnp.expm1(t * safe), 1 / t)

    return weight


def uniform() -> Weight:
    """Uniform mean of all iterates, ``w(t) = 1/t``.

    Returns:
      A weight.

    Example:
      >>> import optax_avg as oa
      >>> oa.weights.profile(oa.weights.uniform(), 4).weights.tolist()
      [0.25, 0.25, 0.25, 0.25]

    References:
      Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging",
      1992. Ruppert, "Efficient Estimations from a Slowly Convergent Robbins-Monro
      Process", 1988. Izmailov et al., "Averaging Weights Leads to Wider Optima and
      Better Generalization", 2018, 1803.05407.
    """
    return lambda t, dt=1: 1 / t


def polynomial(eta: ArrayLike) -> Weight:
    """Polynomial-decay average, ``w(t) = (eta+1) / (t+eta)``.

    Args:
      eta: At least 0; 0 is the uniform mean, larger values forget the start faster.

    Returns:
      A weight.

    Raises:
      ValueError: If ``eta`` is negative.

    Example:
      >>> import optax_avg as oa
      >>> oa.weights.profile(oa.weights.polynomial(1), 3).weights.round(4).tolist()
      [0.1667, 0.3333, 0.5]

    References:
      Shamir and Zhang, "Stochastic Gradient Descent for Non-smooth Optimization:
      Convergence Results and Optimal Averaging Schemes", 2013, 1212.1824.
    """
    eta = _checks.within("eta", eta, 0, math.inf, closed_high=False)
    return lambda t, dt=1: (eta + 1) / (t + eta)


def power_function(
    gamma: ArrayLike | None = None, *, sigma_rel: ArrayLike | None = None
) -> Weight:
    """Power-function average, ``w(t) = 1 - (1-1/t)^(gamma+1)``.

    The profile on ``[0, t]`` is proportional to ``tau^gamma``: its width is a fixed
    fraction of the training so far, whatever the stride between iterates (in optimizer
    steps ``1/t`` is ``dt/t``).

    Args:
      gamma: Exponent, above -1; 0 is the uniform mean.
      sigma_rel: Instead of ``gamma``, the standard deviation of the profile relative
        to the length of training, in (0, 12^-1/2].

    Returns:
      A weight.

    Raises:
      ValueError: If not exactly one of the two is given, or it is out of range.

    Example:
      >>> import optax_avg as oa
      >>> oa.weights.profile(oa.weights.power_function(1.0), 2).weights.tolist()
      [0.25, 0.75]

    References:
      Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion
      Models", 2024, 2312.02696.
    """
    if (gamma is None) == (sigma_rel is None):
        raise ValueError(
            "power_function takes one of gamma and sigma_rel; write "
            "power_function(sigma_rel=0.05)."
        )
    if gamma is None:
        width = _checks.within("sigma_rel", sigma_rel, 0, 12**-0.5, open_low=True)
        gamma = gamma_from_sigma_rel(width)
    g = _checks.within("gamma", gamma, -1, math.inf, open_low=True)
    return functools.partial(_power, g)


def gamma_of(weight: Weight) -> Number | None:
    """The exponent of a power function, None for other weights.

    Args:
      weight: Any weight of this module, or a function of ``t`` or ``(t, dt)``.

    Returns:
      The ``gamma`` that :func:`power_function` was given or found from ``sigma_rel``.

    Example:
      >>> import optax_avg as oa
      >>> oa.weights.gamma_of(oa.weights.power_function(1.0))
      1.0
    """
    if isinstance(weight, functools.partial) and weight.func is _power:
        return weight.args[0]
    return None


def half_life(
    h: ScalarOrSchedule = math.inf, *, fraction: ArrayLike | None = None
) -> Weight:
    """Exponential average stated by its half-life, ``w = 1 - 2^(-dt/h)``.

    The half-life is in optimizer steps and does not change with ``every``. With
    ``fraction`` the half-life is ``min(h, fraction * t * dt)``, so that early averages
    are short; without it the initial parameters count.

    Args:
      h: Half-life in optimizer steps, or a schedule of it.
      fraction: Ceiling of the half-life as a fraction of the steps since the start.

    Returns:
      A weight.

    Raises:
      ValueError: If ``h`` or ``fraction`` is not positive, or neither is given.

    Example:
      >>> import optax_avg as oa
      >>> p = oa.weights.profile(oa.weights.half_life(2), 4)
      >>> round(p.initial, 6)
      0.25

    References:
      Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion
      Models", 2024, 2312.02696 (its traditional EMA has ``fraction``).
    """
    if fraction is None and isinstance(h, float) and math.isinf(h):
        raise ValueError("half_life needs h (steps), fraction (of the steps), or both.")
    h = _checks.number_or_schedule("h", h, 0, math.inf, open_low=True)
    if fraction is not None:
        fraction = _checks.within("fraction", fraction, 0, math.inf, open_low=True)
    h_at = _schedule(h)

    def weight(t, dt=1):
        h_t = h_at(t, dt)
        if fraction is not None:
            h_t = jnp.minimum(h_t, fraction * t * dt)
        return -jnp.expm1(-_LN2 * dt / h_t) + 0 * t

    return weight


def ramp(decay: ScalarOrSchedule) -> Weight:
    """Warm-up of the decay, ``w(t) = 1 - min(d, (1+t)/(10+t))``.

    Args:
      decay: Final decay ``d`` in [0, 1], or a schedule of it.

    Returns:
      A weight.

    Raises:
      ValueError: If ``decay`` lies outside [0, 1].

    Example:
      >>> import optax_avg as oa
      >>> round(float(oa.weights.ramp(0.999)(1.0)), 4)
      0.8182

    References:
      ``tf.train.ExponentialMovingAverage`` (its ``num_updates``), T5X and Praxis.
    """
    d_at = _schedule(_checks.number_or_schedule("decay", decay, 0, 1))
    # The same number as in the summary, without its cancellation for large t.
    return lambda t, dt=1: jnp.maximum(1 - d_at(t, dt), 9 / (10 + t))


def inverse_gamma(
    gamma: ArrayLike = 1.0,
    power: ArrayLike = 2 / 3,
    max_decay: ScalarOrSchedule = 0.9999,
    min_decay: ArrayLike = 0.0,
) -> Weight:
    """Inverse-gamma warm-up, ``w = 1 - clip(1 - (1+s/gamma)^-power, min, max)``.

    ``s = t - 1``. The first iterate gets weight 1 whatever the bounds: its decay is 0.

    Args:
      gamma: Iterates over which the decay rises; positive.
      power: Exponent of the rise; positive. 2/3 suits a million steps, 3/4 less.
      max_decay: Upper bound of the decay, in [0, 1], or a schedule of it.
      min_decay: Lower bound of the decay from the second iterate on, in [0, 1]; at
        most ``max_decay``.

    Returns:
      A weight.

    Raises:
      ValueError: If an argument is out of range, or ``min_decay > max_decay``.

    Example:
      >>> import optax_avg as oa
      >>> float(oa.weights.inverse_gamma(1.0, 1.0)(4.0))
      0.25

    References:
      The warm-up of timm's ``ModelEmaV3`` and of ema-pytorch.
    """
    g = _checks.within("gamma", gamma, 0, math.inf, open_low=True)
    p = _checks.within("power", power, 0, math.inf, open_low=True)
    low = _checks.within("min_decay", min_decay, 0, 1)
    high = _checks.number_or_schedule("max_decay", max_decay, 0, 1)
    if isinstance(low, float) and isinstance(high, float) and low > high:
        raise ValueError(f"min_decay = {low:g} must not exceed max_decay = {high:g}.")
    max_at = _schedule(high)

    def weight(t, dt=1):
        w = jnp.clip((1 + (t - 1) / g) ** -p, 1 - max_at(t, dt), 1 - low)
        return jnp.where(t > 1, w, 1)

    return weight


def gravity(beta: ArrayLike) -> Weight:
    """Annealed decay of the Gravity optimizer, ``w(t) = 1 - (beta t + 1)/(t + 2)``.

    The decay goes from ``(beta+1)/3`` to ``beta``; the initial parameters count.

    Args:
      beta: Final decay, in [0, 1].

    Returns:
      A weight.

    Raises:
      ValueError: If ``beta`` lies outside [0, 1].

    Example:
      >>> import optax_avg as oa
      >>> round(float(oa.weights.gravity(0.9)(1.0)), 6)
      0.366667

    References:
      Bahrami and Pouriyan Zadeh, "Gravity Optimizer: a Kinematic Approach on
      Optimization in Deep Learning", 2021, 2101.09192.
    """
    final = _checks.within("beta", beta, 0, 1)
    return lambda t, dt=1: ((1 - final) * t + 1) / (t + 2)


def half_life_linear(
    beta_start: ArrayLike, beta_end: ArrayLike, steps: ArrayLike
) -> Weight:
    """Decay whose half-life grows linearly, ``w(t) = 1 - beta(t)``.

    ``1/ln beta(t) = (1-u)/ln beta_start + u/ln beta_end``, ``u = min(t/steps, 1)``; in
    optimizer steps, so ``beta(t dt)^dt`` when iterates are ``dt`` steps apart.

    Args:
      beta_start: Decay per step at the start, in (0, 1).
      beta_end: Decay per step from ``steps`` on, in (0, 1).
      steps: Optimizer steps until ``beta_end``; positive.

    Returns:
      A weight.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax_avg as oa
      >>> w = oa.weights.half_life_linear(0.9, 0.999, 100)
      >>> round(float(w(100.0)), 6)
      0.001

    References:
      Pagliardini et al., "The AdEMAMix Optimizer: Better, Faster, Older", 2024,
      2409.03137.
    """
    log_start = _log(_checks.within("beta_start", beta_start, 0, 1, True, False))
    log_end = _log(_checks.within("beta_end", beta_end, 0, 1, True, False))
    steps = _checks.within("steps", steps, 0, math.inf, open_low=True)

    def weight(t, dt=1):
        u = jnp.minimum(t * dt / steps, 1.0)
        return -jnp.expm1(dt / ((1 - u) / log_start + u / log_end))

    return weight


def mass(m: Callable[[Count], ArrayLike]) -> Weight:
    """Average by masses, ``w(t) = m(t) / sum_{i<=t} m(i)``.

    Args:
      m: Mass of iterate ``t = 1, 2, ...``, not negative; a learning rate or its square,
        for instance (:func:`optax_avg.lr_weighted_average`). While all masses are 0
        the average follows the newest iterate. ``t`` is a float32 as for every weight;
        a table is read as ``lambda t: table[t.astype(int) - 1]``.

    Returns:
      A weight.

    Raises:
      ValueError: If ``m`` is not callable.

    Example:
      >>> import optax_avg as oa
      >>> oa.weights.profile(oa.weights.mass(lambda t: t), 3).weights.round(4).tolist()
      [0.1667, 0.3333, 0.5]

    References:
      Defazio et al., "When, Why and How Much? Adaptive Learning Rate Scheduling by
      Refinement", 2023, 2310.07831. Defazio et al., "The Road Less Scheduled", 2024,
      2405.15682.
    """
    if not callable(m):
        raise ValueError(
            f"mass takes a function of t, not {m!r}; write mass(lambda t: 1.)."
        )
    return Mass(retain=lambda t, dt: 1.0, add=lambda t, dt: m(t))


def with_stride(weight: Weight) -> Weight:
    """Makes a weight of ``t`` alone callable as ``weight(t, dt)``.

    Args:
      weight: A :class:`Mass`, or a function of ``t`` or of ``(t, dt)``. The second
        argument gets the stride if it is called ``dt`` or has no default.

    Returns:
      ``weight``, or the same as a function of ``(t, dt)`` that ignores ``dt``.

    Raises:
      ValueError: If ``weight`` is neither, or a function of this library that has to be
        called first, such as :func:`ema`.

    Example:
      >>> import optax_avg as oa
      >>> oa.weights.with_stride(lambda t: 1 / t)(4.0, 10)
      0.25
    """
    if isinstance(weight, Mass):
        return weight
    if not callable(weight):
        raise ValueError(
            f"a weight is a function of t, not {weight!r}; write "
            "weights.ema(0.999) or lambda t: 1 / t."
        )
    _refuse_uncalled(weight)
    return weight if _takes_stride(weight) else lambda t, dt=1: weight(t)


def _takes_stride(weight: Callable[..., ArrayLike]) -> bool:
    """Whether the second argument of a weight is ``dt``.

    An argument of another name with a default is the user's own, as in the idiom
    ``lambda t, decay=decay: 1 - decay``.
    """
    try:
        parameters = inspect.signature(weight).parameters.values()
    except ValueError:  # a builtin without a signature
        return False
    by_place = "POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD"
    places = [p for p in parameters if p.kind.name in by_place]
    if len(places) < 2:
        return any(p.kind.name == "VAR_POSITIONAL" for p in parameters)
    return places[1].name == "dt" or places[1].default is inspect.Parameter.empty


def advance(
    weight: Weight, t: Count, dt: Count, total: tuple[ArrayLike, ArrayLike]
) -> tuple[jax.Array, tuple[ArrayLike, ArrayLike]]:
    """One step of a weight: the weight of the newest iterate and the carried sum.

    Args:
      weight: A weight of ``(t, dt)``.
      t: Float32 number of the iterate, from 1.
      dt: Optimizer steps between iterates.
      total: ``S(t-1)`` of a :class:`Mass` as a pair of float32 numbers whose sum it is:
        the second holds what rounding took from the first. Other weights leave it
        alone.

    Returns:
      ``(w(t), S(t))``, in the dtype of the first number of ``total``.

    Raises:
      ValueError: If the weight returns an array of several numbers.

    Example:
      >>> import optax_avg as oa
      >>> total = (3.0, 0.0)
      >>> w, total = oa.weights.advance(oa.weights.mass(lambda t: t), 3.0, 1, total)
      >>> float(w), float(total[0])
      (0.5, 6.0)
    """
    high, low = total
    dtype = jnp.result_type(high)
    if not isinstance(weight, Mass):
        return _scalar(weight(t, dt), dtype), total
    m = _scalar(weight.add(t, dt), dtype)
    r = _scalar(weight.retain(t, dt), dtype)
    # For r near 1 the product r S loses the digits that (1 - r) S has.
    near = r >= 0.5
    kept = jnp.where(near, high, r * high)
    change = jnp.where(near, low - (1 - r) * high, r * low) + m
    high, low = _numerics.sum_and_error(kept, change)
    positive = high > 0
    return jnp.where(positive, m / jnp.where(positive, high, 1), 1), (high, low)


def sequence(weight: Weight, steps: int, *, every: int = 1) -> np.ndarray:
    """The weights ``w(1), ..., w(steps)`` that an average gives to its newest iterate.

    Args:
      weight: Any weight of this module, or a function of ``t`` or ``(t, dt)``.
      steps: Number of iterates absorbed; at least 1.
      every: Optimizer steps between iterates.

    Returns:
      A float64 array of shape (steps,).

    Raises:
      ValueError: If ``steps`` or ``every`` is not an integer from 1 on.

    Example:
      >>> import optax_avg as oa
      >>> oa.weights.sequence(oa.weights.uniform(), 4).round(4).tolist()
      [1.0, 0.5, 0.3333, 0.25]
    """
    steps = _checks.static_integer("steps", steps, 1)
    every = _checks.static_integer("every", every, 1)
    weight = with_stride(weight)
    # Powers of two compile a few times only, however often this is asked for.
    t = np.arange(1, 1 + max(64, 2 ** (steps - 1).bit_length()), dtype=np.float64)

    def at(f):
        found = jax.vmap(lambda i: _scalar(f(i, every), float))(t)
        return np.asarray(found)[:steps]

    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        if not isinstance(weight, Mass):
            return at(weight)
        r, m = at(weight.retain), at(weight.add)
    w, total = np.empty(steps), 0.0
    for i in range(steps):
        total = r[i] * total + m[i]
        w[i] = m[i] / total if total > 0 else 1.0
    return w


def profile(weight: Weight, steps: int, *, every: int = 1) -> Profile:
    """Exact weights that an average puts on each of its first ``steps`` iterates.

    ``p_i = w(i) prod_{j>i} (1 - w(j))``, computed in float64.

    Args:
      weight: Any weight of this module, or a function of ``t`` or ``(t, dt)``.
      steps: Number of iterates absorbed; at least 1.
      every: Optimizer steps between iterates.

    Returns:
      A :class:`Profile`.

    Raises:
      ValueError: If ``steps`` or ``every`` is not an integer from 1 on.

    Example:
      >>> import optax_avg as oa
      >>> p = oa.weights.profile(oa.weights.power_function(sigma_rel=0.1), 1000)
      >>> round(p.relative_width, 3), round(p.mean_age)
      (0.1, 111)
    """
    return _described(on_iterates(sequence(weight, steps, every=every)))


def cooldown(shape: CooldownShape, steps: int) -> Profile:
    """The average of iterates that a cooldown of the learning rate would have reached.

    ``x_n + sum_i w_i u_i = sum_j c_j x_{n+j}`` for the updates ``u_i = x_{n+i} -
    x_{n+i-1}`` of a run at a constant rate, with ``c_0 = 1 - w_1``,
    ``c_j = w_j - w_{j+1}`` and ``c_k = w_k``. The factors are ``w_i = f((i-1)/k)``,
    ``i = 1 ... k``, those of the rate in
    :func:`optax_avg.schedules.warmup_stable_decay`: the first update counts in full. So
    the linear cooldown is the uniform mean of the last ``k`` iterates
    (:func:`optax_avg.window_average`). The average stands for a cooldown as far as
    the updates would have kept their directions.

    Args:
      shape: ``f``. ``"linear"`` is ``1 - s``, ``"sqrt"`` is ``1 - sqrt(s)``,
        ``"cosine"`` is ``(1 + cos(pi s))/2``; or a function of the share ``s`` in
        [0, 1) that has passed, which falls from at most 1 to at least 0.
      steps: ``k``, number of updates in the cooldown; at least 1.

    Returns:
      A :class:`Profile`: ``c_1 ... c_k`` are its ``weights``, and ``c_0``, the weight
      on the parameters where the cooldown begins, is its ``initial``.

    Raises:
      ValueError: If ``shape`` is unknown or not such a function, or ``steps < 1``.

    Example:
      >>> import optax_avg as oa
      >>> oa.weights.cooldown("linear", 4).weights.tolist()
      [0.25, 0.25, 0.25, 0.25]
      >>> oa.weights.cooldown("sqrt", 4).weights.round(3).tolist()
      [0.5, 0.207, 0.159, 0.134]

    References:
      Tian et al., "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for
      LLM Pre-training", 2025, 2507.17634.
    """
    k = _checks.static_integer("steps", steps, 1)
    if not callable(shape):
        _checks.one_of("shape", shape, [*_FALLS])
    f = shape if callable(shape) else _FALLS[shape]
    w = np.array([1.0, *(float(np.asarray(f(i / k))) for i in range(k)), 0.0])
    c = w[:-1] - w[1:]
    if not np.all(c >= -1e-6):  # a float32 function may rise by its rounding
        raise ValueError(
            "the shape of a cooldown must fall from at most 1 to at least 0, as "
            f"lambda s: 1 - s does; got {w[1:-1]}."
        )
    return _described(c)


def on_iterates(w: np.ndarray) -> np.ndarray:
    """Weights on the iterates from those that each had when it was the newest.

    ``p_i = w(i) prod_{j>i} (1 - w(j))`` and, first, ``prod_j (1 - w(j))``, what is left
    for the parameters from before.

    Args:
      w: Float64 of shape (..., n), as :func:`sequence` gives it.

    Returns:
      A float64 array of shape (..., n + 1) that sums to one along its last axis.

    Example:
      >>> import numpy as np, optax_avg as oa
      >>> oa.weights.on_iterates(np.array([0.5, 0.5])).tolist()
      [0.25, 0.25, 0.5]
    """
    kept = np.cumprod((1 - w)[..., ::-1], axis=-1)[..., ::-1]
    one = np.ones((*w.shape[:-1], 1))
    return np.concatenate([kept, one], axis=-1) * np.concatenate([one, w], axis=-1)


def scale_decay(decay: ArrayLike, kappa: ArrayLike) -> Number:
    """Decay for a batch ``kappa`` times as large, ``d^kappa``.

    Args:
      decay: Decay per step at the old batch size, in [0, 1].
      kappa: New batch size over the old one; positive.

    Returns:
      The decay per step with the same horizon in examples.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax_avg as oa
      >>> round(oa.weights.scale_decay(0.999, 8), 6)
      0.992028

    References:
      Busbridge et al., "How to Scale Your EMA", 2023, 2307.13813.
    """
    kappa = _each_within("kappa", kappa, 0, math.inf, open_low=True)
    return _each_within("decay", decay, 0, 1) ** kappa


def decay_from_half_life(h: ArrayLike) -> Number:
    """Decay per step of an EMA with half-life ``h`` steps, ``2^(-1/h)``.

    Args:
      h: Half-life in steps; positive.

    Returns:
      The decay, in (0, 1).

    Raises:
      ValueError: If ``h`` is not positive.

    Example:
      >>> import optax_avg as oa
      >>> oa.weights.decay_from_half_life(1)
      0.5
    """
    return 2 ** (-1 / _each_within("h", h, 0, math.inf, open_low=True))


def half_life_from_decay(decay: ArrayLike) -> Number:
    """Half-life in steps of an EMA with this decay per step, ``-ln 2 / ln d``.

    Args:
      decay: Decay per step, in (0, 1).

    Returns:
      The half-life in steps.

    Raises:
      ValueError: If ``decay`` lies outside (0, 1).

    Example:
      >>> import optax_avg as oa
      >>> round(oa.weights.half_life_from_decay(0.999), 2)
      692.8
    """
    d = _each_within("decay", decay, 0, 1, True, False)
    return -_LN2 / _log(d)


def sigma_rel_from_gamma(gamma: ArrayLike) -> Number:
    """Relative width of ``tau^gamma`` on [0, 1], ``((g+1)/((g+2)^2 (g+3)))^(1/2)``.

    Args:
      gamma: Exponent, at least 0.

    Returns:
      ``sigma_rel``, in (0, 12^-1/2].

    Raises:
      ValueError: If ``gamma`` is negative.

    Example:
      >>> import optax_avg as oa
      >>> round(oa.weights.sigma_rel_from_gamma(6.94), 4)
      0.1

    References:
      Karras et al., 2024, 2312.02696, equation 126.
    """
    g = _each_within("gamma", gamma, 0, math.inf)
    return ((g + 1) / ((g + 2) ** 2 * (g + 3))) ** 0.5


def gamma_from_sigma_rel(sigma_rel: ArrayLike) -> Number:
    """Exponent of the power function with this relative width.

    The largest real root of ``g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2) = 0``.

    Args:
      sigma_rel: ``s`` in (0, 12^-1/2]; 12^-1/2 = 0.2887 is the uniform mean.

    Returns:
      ``gamma``, in float64 for a Python float.

    Raises:
      ValueError: If ``sigma_rel`` is out of range.

    Example:
      >>> import optax_avg as oa
      >>> [round(oa.weights.gamma_from_sigma_rel(s), 2) for s in (0.05, 0.10)]
      [16.97, 6.94]

    References:
      Karras et al., 2024, 2312.02696, algorithm 2.
    """
    s = _each_within("sigma_rel", sigma_rel, 0, 12**-0.5, open_low=True)
    xp = math if isinstance(s, float) else jnp
    # Three real roots: the trigonometric solution of the depressed cubic.
    p, q = s**-2 + 1 / 3, 2 / 27 + 4 / 3 * s**-2
    r = (p / 3) ** 0.5
    return 2 * r * xp.cos(xp.acos(-q / (2 * r**3)) / 3) - 7 / 3


def half_life_from_gamma(gamma: ArrayLike, steps: ArrayLike) -> Number:
    """Age that holds half the weight of a power function, ``T (1 - 2^(-1/(g+1)))``.

    Args:
      gamma: Exponent, at least 0.
      steps: Length of training ``T``; positive.

    Returns:
      The half-life, in the unit of ``steps``.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax_avg as oa
      >>> oa.weights.half_life_from_gamma(0.0, 1000)
      500.0
    """
    g = _each_within("gamma", gamma, 0, math.inf)
    return _each_within("steps", steps, 0, math.inf, True) * (1 - 2 ** (-1 / (g + 1)))


def gamma_from_half_life(h: ArrayLike, steps: ArrayLike) -> Number:
    """Exponent of the power function whose half-life is ``h`` of ``steps``.

    ``g = -1/log2(1 - h/T) - 1``.

    Args:
      h: Half-life, in (0, steps/2].
      steps: Length of training ``T``, in the unit of ``h``.

    Returns:
      ``gamma``, at least 0.

    Raises:
      ValueError: If ``h`` lies outside (0, steps/2].

    Example:
      >>> import optax_avg as oa
      >>> round(oa.weights.gamma_from_half_life(500, 1000), 6)
      0.0
    """
    f = _each_within("h / steps", h / steps, 0, 0.5, open_low=True)
    return -_LN2 / _log(1 - f) - 1


def _described(found: np.ndarray) -> Profile:
    """Weights on the initial parameters and on the iterates, as a profile."""
    steps = found.size - 1
    t, p, initial = np.arange(1, steps + 1), found[1:], float(found[0])
    mean = float(np.sum(p * t))
    width = math.sqrt(max(float(np.sum(p * (t - mean) ** 2)) + initial * mean**2, 0.0))
    return Profile(p, initial, steps - mean, width / steps)


def _refuse_uncalled(weight: Callable[..., ArrayLike]) -> None:
    """Raises for a public function or class of this library: weights are closures."""
    module = str(getattr(weight, "__module__", None))
    name = getattr(weight, "__qualname__", "<none>")
    if module.split(".")[0] != "optax_avg" or "<" in name:
        return
    way = "call what makes a weight, as in oa.weights.ema(0.999)"
    signature = inspect.signature(weight)
    if signature.return_annotation == Weight:
        parameters = signature.parameters.values()
        needed = [p.name for p in parameters if p.default is p.empty]
        first = needed or [p.name for p in parameters][:1]
        way = f"call it first, as in oa.weights.{name}({', '.join(first)})"
    raise ValueError(f"a weight is a function of t, and {name} is none: {way}.")


def _power(gamma: ArrayLike, t: Count, dt: Count = 1) -> jax.Array:
    """``1 - (1-1/t)^(gamma+1)``, without its cancellation for large t."""
    del dt
    return -jnp.expm1((gamma + 1) * jnp.log1p(-1 / t))


def _schedule(value: ScalarOrSchedule) -> Callable[[Count, Count], Number]:
    """``value`` as a function of ``(t, dt)``; a schedule counts steps from 0."""
    if callable(value):
        return lambda t, dt: _called(value(_numerics.step_of(t, dt)))
    return lambda t, dt: value


def _called(value: Number) -> Number:
    """``value``, unless it is a function still."""
    if callable(value):
        raise ValueError(
            f"a weight or schedule must return a number, and {value!r} is a function; "
            "call what makes the weight or schedule first, and pass what it returns."
        )
    return value


def _scalar(value: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """What a weight returned, as one number."""
    if jnp.ndim(_called(value)):
        raise ValueError(
            "a weight must be one number for all parameters, got an array of shape "
            f"{jnp.shape(value)}; average several weights as a dict of them."
        )
    return jnp.asarray(value, dtype)


def _log(value: Number) -> Number:
    """Logarithm in float64 for a Python number, traced otherwise."""
    if isinstance(value, float):
        return math.log(value) if value > 0 else -math.inf
    return jnp.log(value)
