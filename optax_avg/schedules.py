"""Learning-rate schedules that belong with averaging.

    rate(count) = f(u) begin + (1 - f(u)) end,    u in [0, 1] the share of a phase left

An average wants a rate that is high, constant or cyclic while it absorbs iterates; a
rate that decays to zero does without an average. Each function returns an Optax
schedule: ``count = 0, 1, ...`` to a float32 rate, under ``jit`` and ``vmap``, for
scalars and arrays of counts, and for counts past the end. ``s = count + 1`` is the
optimizer step of the same update as :func:`optax_avg.average` counts it.
"""

import bisect
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_avg import _checks

__all__ = [
    "follow_learning_rate",
    "from_gradient_norms",
    "horizon_free",
    "linear_to_zero",
    "swa_constant",
    "swa_cyclic",
    "warmup_stable_decay",
]

# A function of the share of a phase that is left.
Shape = Callable[[jax.Array], jax.Array]
_ANNEALS: dict[str, Shape] = {
    "linear": lambda left: left,
    "cosine": lambda left: (1 - jnp.cos(jnp.pi * left)) / 2,
}
_COOLDOWNS: dict[str, Shape] = {
    "linear": lambda left: left,
    "1-sqrt": lambda left: 1 - jnp.sqrt(1 - left),
}


def swa_cyclic(
    alpha_1: ArrayLike,
    alpha_2: ArrayLike,
    cycle: int,
    start: int = 0,
    before: ArrayLike | optax.Schedule | None = None,
) -> optax.Schedule:
    """Cyclical schedule of stochastic weight averaging: a saw-tooth of linear decays.

    ``alpha(i) = (1 - t(i)) alpha_1 + t(i) alpha_2``,
    ``t(i) = (mod(i - 1, c) + 1) / c``, ``i = s - start = 1, 2, ...``

    The lowest rate, ``alpha_2``, falls on the last step of each cycle. These are the
    steps that ``oa.swa(every=cycle, start=start)`` absorbs.

    Args:
      alpha_1: Highest rate of the cycle, at least ``alpha_2``. The first step of a
        cycle is already ``1/c`` of the way down.
      alpha_2: Lowest rate of the cycle.
      cycle: ``c``, optimizer steps in a cycle; 1 is the constant rate ``alpha_2``.
      start: Optimizer steps before the first cycle.
      before: Rate, or schedule of the same count, for the steps ``1 ... start``; by
        default ``alpha_1``.

    Returns:
      A schedule; the cycles go on for ever.

    Raises:
      ValueError: If a rate is negative or not finite, ``alpha_1 < alpha_2``,
        ``cycle < 1`` or ``start < 0``.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> rate = oa.schedules.swa_cyclic(1.0, 0.0, cycle=4, start=2)
      >>> rate(jnp.arange(8)).tolist()
      [1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.75, 0.5]

    References:
      Izmailov et al., "Averaging Weights Leads to Wider Optima and Better
      Generalization", 2018, 1803.05407.
    """
    high, low = _checks.finite("alpha_1", alpha_1), _checks.finite("alpha_2", alpha_2)
    if isinstance(high, float) and isinstance(low, float) and high < low:
        raise ValueError(
            f"alpha_1 is the highest rate of a cycle, but {high:g} < alpha_2 = {low:g};"
            " swap them."
        )
    c = _steps("cycle", cycle, low=1)
    start = _steps("start", start)
    if not callable(before):
        before = optax.constant_schedule(
            high if before is None else _checks.finite("before", before)
        )

    def cycles(count):
        return _between(low, high, (c - 1 - jnp.mod(count, c)) / c)

    return _schedule(optax.join_schedules([before, cycles], [start]))


def swa_constant(
    init_value: ArrayLike,
    swa_value: ArrayLike,
    start: int,
    anneal_steps: int | None = None,
    *,
    anneal: Literal["linear", "cosine"] = "linear",
) -> optax.Schedule:
    """High constant rate, one annealing, then the constant rate of SWA.

    ``rate = (1 - f(u)) init_value + f(u) swa_value``,
    ``u = clip((count - a) / n, 0, 1)``, ``f(u) = u`` or ``(1 - cos(pi u)) / 2``

    By default the annealing ends before averaging starts, as in the authors' code:
    from 50% to 90% of ``start`` (``a = start/2``, ``n = 0.4 start``). With
    ``anneal_steps`` it begins at ``start`` (``a = start``, ``n = anneal_steps``), as in
    PyTorch's ``SWALR``. Ordinary training without averaging is the default with the
    whole budget as ``start`` and ``swa_value = 0.01 init_value``.

    Args:
      init_value: Rate at first.
      swa_value: Rate while averaging, and after the end.
      start: Optimizer steps before averaging, the ``start`` of ``oa.swa``.
      anneal_steps: Steps that the annealing takes from ``start`` on; 0 is a jump.
      anneal: ``"linear"`` or ``"cosine"``.

    Returns:
      A schedule.

    Raises:
      ValueError: If a rate is negative or not finite, a number of steps is negative,
        or ``anneal`` is unknown.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> rate = oa.schedules.swa_constant(1.0, 0.5, start=10)
      >>> rate(jnp.array([0, 5, 7, 9, 10, 99])).tolist()
      [1.0, 1.0, 0.75, 0.5, 0.5, 0.5]

    References:
      Izmailov et al., "Averaging Weights Leads to Wider Optima and Better
      Generalization", 2018, 1803.05407.
    """
    init = _checks.finite("init_value", init_value)
    swa = _checks.finite("swa_value", swa_value)
    start = _steps("start", start)
    _checks.one_of("anneal", anneal, [*_ANNEALS])
    f = _ANNEALS[anneal]
    if anneal_steps is None:
        end, n = 0.9 * start, 0.4 * start
    else:
        n = _steps("anneal_steps", anneal_steps)
        end = start + n

    def rate(count):
        left = jnp.clip((end - count) / n, 0, 1) if n else 1.0 * (count < end)
        return _between(swa, init, f(left))

    return _schedule(rate)


def warmup_stable_decay(
    peak_value: ArrayLike,
    warmup_steps: int,
    stable_steps: int,
    decay_steps: int,
    *,
    init_value: ArrayLike = 0.0,
    end_value: ArrayLike = 0.0,
    cooldown: Literal["linear", "1-sqrt"] = "linear",
) -> optax.Schedule:
    """Warm-up, constant rate, cooldown (WSD, the trapezoid).

    ``init_value + count/W (peak_value - init_value)`` while ``count < W``, then
    ``peak_value`` for ``S`` steps, then
    ``end_value + f(u) (peak_value - end_value)``, ``u = (count - W - S)/D``, with
    ``f(u) = 1 - u`` or ``1 - sqrt(u)``

    Averages of the iterates along the constant rate stand in for the cooldown, which
    can be added later from any point.

    Args:
      peak_value: Rate of the constant phase.
      warmup_steps: ``W``; 0 starts at the peak.
      stable_steps: ``S``.
      decay_steps: ``D``; 0 leaves the cooldown out and stays at the peak.
      init_value: Rate at count 0 if there is a warm-up.
      end_value: Rate from count ``W + S + D`` on.
      cooldown: ``"linear"`` or ``"1-sqrt"``.

    Returns:
      A schedule.

    Raises:
      ValueError: If a rate is negative or not finite, a number of steps is negative,
        or ``cooldown`` is unknown.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> rate = oa.schedules.warmup_stable_decay(1.0, 2, 3, 4, cooldown="1-sqrt")
      >>> rate(jnp.arange(10)).round(2).tolist()[:6]
      [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]
      >>> rate(jnp.array([5, 6, 9, 1000])).tolist()
      [1.0, 0.5, 0.0, 0.0]

    References:
      Hu et al., "MiniCPM: Unveiling the Potential of Small Language Models with
      Scalable Training Strategies", 2024, 2404.06395. Hägele et al., "Scaling Laws and
      Compute-Optimal Training Beyond Fixed Training Durations", 2024, 2405.18392.
    """
    peak = _checks.finite("peak_value", peak_value)
    init, end = (
        _checks.finite("init_value", init_value),
        _checks.finite("end_value", end_value),
    )
    W = _steps("warmup_steps", warmup_steps)
    S = _steps("stable_steps", stable_steps)
    D = _steps("decay_steps", decay_steps)
    _checks.one_of("cooldown", cooldown, [*_COOLDOWNS])
    f = _COOLDOWNS[cooldown]

    def decay(count):
        return _between(end, peak, f(jnp.clip((D - count) / D, 0, 1)) if D else 1.0)

    # The decay is at the peak until its clock starts: no phase of its own for S.
    phases = [optax.linear_schedule(init, peak, W), lambda count: decay(count - S)]
    return _schedule(optax.join_schedules(phases, [W]))


def horizon_free(
    peak_value: ArrayLike,
    alpha: ArrayLike,
    *,
    power: ArrayLike = 0.5,
    warmup_steps: int = 0,
) -> optax.Schedule:
    """Polynomial decay that needs no horizon, for a training that may end any time.

    ``rate = peak_value (alpha/(t + alpha))^power``, ``t = count - W``, after
    ``peak_value count/W`` while ``count < W``

    The rate stays near the peak for ``alpha`` steps, and falls as ``t^-power`` after
    that. It never reaches zero: an average whose width is a fraction of the training so
    far takes out the noise that is left, such as
    ``oa.average(oa.weights.half_life(fraction=0.1))`` or ``oa.power_ema(0.1)``.

    Args:
      peak_value: Rate at the end of the warm-up.
      alpha: Steps after which the rate is ``2^-power`` of the peak; positive.
      power: Exponent, at least 0; 0 is a constant rate.
      warmup_steps: ``W``; 0 starts at the peak.

    Returns:
      A schedule.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> rate = oa.schedules.horizon_free(1.0, 10, warmup_steps=2)
      >>> rate(jnp.array([0, 1, 2, 32, 992])).tolist()
      [0.0, 0.5, 1.0, 0.5, 0.10000000149011612]

    References:
      Meterez et al., "Anytime Pretraining: Horizon-Free Learning-Rate Schedules with
      Weight Averaging", 2026, 2602.03702.
    """
    peak = _checks.finite("peak_value", peak_value)
    alpha = _checks.finite("alpha", alpha, open_low=True)
    power = _checks.finite("power", power)
    W = _steps("warmup_steps", warmup_steps)

    def decay(count):
        return peak * (alpha / (jnp.maximum(count, 0) + alpha)) ** power

    warmup = optax.linear_schedule(0.0, peak, W)
    return _schedule(optax.join_schedules([warmup, decay], [W]))


def linear_to_zero(
    peak_value: ArrayLike, steps: int, warmup_steps: int = 0
) -> optax.Schedule:
    """Linear decay to zero, the worst-case optimal schedule for the last iterate.

    ``rate(s) = peak_value (1 - s/T)`` at the steps ``s = count + 1 = 1 ... T``; with a
    warm-up, ``peak_value min(s/W, (T - s)/(T - W))``

    The rate of step ``T`` is zero: the theory speaks of the iterate before it. Optax's
    ``linear_schedule(peak_value, 0, steps)`` is this schedule one step later.

    Args:
      peak_value: Rate at the end of the warm-up. Without a warm-up the first rate is
        ``peak_value (1 - 1/T)``.
      steps: ``T``, all optimizer steps of the run, the warm-up included.
      warmup_steps: ``W``, less than ``steps``.

    Returns:
      A schedule, zero from step ``T`` on.

    Raises:
      ValueError: If the rate is negative or not finite, ``steps < 1``, or
        ``warmup_steps`` lies outside [0, steps).

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> oa.schedules.linear_to_zero(1.0, 4)(jnp.arange(6)).tolist()
      [0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
      >>> oa.schedules.linear_to_zero(1.0, 6, 2)(jnp.arange(6)).tolist()
      [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]

    References:
      Defazio et al., "When, Why and How Much? Adaptive Learning Rate Scheduling by
      Refinement", 2023, 2310.07831.
    """
    peak = _checks.finite("peak_value", peak_value)
    T = _steps("steps", steps, low=1)
    W = _steps("warmup_steps", warmup_steps)
    if W >= T:
        raise ValueError(
            f"warmup_steps = {W} leaves no step to decay; pass steps > {W}, the length"
            " of the whole run."
        )

    def rate(count):
        s = jnp.minimum(count, T - 1) + 1
        decay = (T - s) / (T - W)
        return peak * (jnp.minimum(s / W, decay) if W else decay)

    return _schedule(rate)


def from_gradient_norms(
    grad_norms: ArrayLike,
    peak_value: ArrayLike,
    *,
    power: float = 2.0,
    smoothing: float = 0.1,
    steps: int | None = None,
    warmup_steps: int = 0,
) -> optax.Schedule:
    """Refined schedule: the best one for the gradient norms of an earlier run.

    ``w_t = G_t^-power``, ``eta_t = w_t sum_(p = t+1 ... T) w_p``,
    ``rate(t) = peak_value eta_t / max(eta)``, with ``G`` the median-filtered norms

    Constant norms give the linear decay. Large norms early on give a warm-up, norms
    that fall towards the end a later and steeper decay. The filter is centred and
    ``2 floor(floor(smoothing T) / 2) + 1`` norms wide; the first norm is repeated
    before the start, and the norms are mirrored about the last one past the end.

    Args:
      grad_norms: Shape (T,), ``|g_t|`` at ``t = 1 ... T``, evenly spaced over the run:
        l2 norms for SGD (``power=2``), l1 norms for Adam (``power=1``). A thinned
        record will do (say 10 000 norms, with ``steps``).
      peak_value: Highest rate.
      power: 2 for SGD, 1 for Adam.
      smoothing: Width of the median filter as a share of the run, in [0, 1]; 0
        leaves the norms as they are.
      steps: Optimizer steps of the run to come; by default ``T``. The schedule is
        stretched linearly, its two ends kept.
      warmup_steps: Number of steps on which the rate is multiplied by ``s /
        warmup_steps``, ``s = count + 1``. The paper's algorithm has no warm-up.

    Returns:
      A schedule, zero from step ``steps`` on.

    Raises:
      ValueError: If the norms are not a vector of two or more finite positive numbers,
        or another argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> rate = oa.schedules.from_gradient_norms([7.0] * 5, 1.0)
      >>> rate(jnp.arange(5)).tolist()
      [1.0, 0.75, 0.5, 0.25, 0.0]
      >>> norms = [2.0, 1.0, 1.0]
      >>> rate = oa.schedules.from_gradient_norms(norms, 1.0, power=1, smoothing=0)
      >>> rate(jnp.arange(4)).tolist()
      [1.0, 1.0, 0.0, 0.0]

    References:
      Defazio et al., "When, Why and How Much? Adaptive Learning Rate Scheduling by
      Refinement", 2023, 2310.07831, Algorithm 1.
    """
    norms = _check_norms(grad_norms)
    peak = _checks.finite("peak_value", peak_value)
    power = float(_checks.within("power", power, 0, math.inf, True, False))
    smoothing = float(_checks.within("smoothing", smoothing, 0, 1))
    N = norms.size if steps is None else _steps("steps", steps, low=2)
    W = _steps("warmup_steps", warmup_steps)
    if W >= N:
        raise ValueError(
            f"warmup_steps = {W} must be less than the {N} steps of the schedule."
        )
    # Logarithms, because G^-power leaves the range of floats.
    log_w = -power * np.log(_median_filter(norms, smoothing))
    log_tail = np.logaddexp.accumulate(log_w[::-1])[::-1]
    log_eta = log_w[:-1] + log_tail[1:]
    eta = np.append(np.exp(log_eta - log_eta.max()), 0.0)
    table = np.interp(np.linspace(0, 1, N), np.linspace(0, 1, eta.size), eta)

    def rate(count):
        i = jnp.clip(count, 0, N - 1).astype(jnp.int32)
        ramp = jnp.minimum((i + 1) / W, 1.0) if W else 1.0
        return ramp * peak * jnp.asarray(table, jnp.float32)[i]

    return _schedule(rate)


def follow_learning_rate(
    learning_rate: optax.Schedule,
    rho_max: ArrayLike,
    lr_max: ArrayLike,
    *,
    rho_min: ArrayLike = 0.0,
    lr_min: ArrayLike = 0.0,
) -> optax.Schedule:
    """A radius for SAM that follows the learning rate.

    ``rho_t = max(0, rho_min + (rho_max - rho_min) (lr_t - lr_min)/(lr_max - lr_min))``

    Args:
      learning_rate: The optimizer's schedule.
      rho_max: Radius at ``lr_max``.
      lr_max: Learning rate of the largest radius; above ``lr_min``.
      rho_min: Radius at ``lr_min``.
      lr_min: Learning rate of the smallest radius.

    Returns:
      A schedule of the radius.

    Raises:
      ValueError: If a number is negative or not finite, or ``lr_max <= lr_min``.

    Example:
      >>> import optax, optax_avg as oa
      >>> lr = optax.linear_schedule(0.5, 0.0, 4)
      >>> rho = oa.schedules.follow_learning_rate(lr, rho_max=0.25, lr_max=0.5)
      >>> [float(rho(count)) for count in (0, 2, 4)]
      [0.25, 0.125, 0.0]

    References:
      Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training",
      2022, 2203.08065.
    """
    high, low = _checks.finite("rho_max", rho_max), _checks.finite("rho_min", rho_min)
    top, bottom = _checks.finite("lr_max", lr_max), _checks.finite("lr_min", lr_min)
    if isinstance(top, float) and isinstance(bottom, float) and top <= bottom:
        raise ValueError(f"lr_max = {top:g} must be above lr_min = {bottom:g}.")

    def rate(count):
        share = (learning_rate(count) - bottom) / (top - bottom)
        return jnp.maximum(0.0, low + (high - low) * share)

    return _schedule(rate)


def _schedule(rate: Callable[[jax.Array], ArrayLike]) -> optax.Schedule:
    """``rate`` for anything array-like, in float32 and the shape of the counts."""

    def schedule(count):
        count = jnp.asarray(count)
        return jnp.broadcast_to(jnp.asarray(rate(count), jnp.float32), count.shape)

    return schedule


def _between(end: Any, begin: Any, left: Any) -> Any:
    """``end`` plus the share that is left of the way from ``begin`` to it."""
    # Counted down, because XLA's n * (1/n) may miss 1 and 0/n does not miss 0.
    return (1 - left) * end + left * begin


def _steps(name: str, value: int, low: int = 0) -> int:
    return _checks.static_integer(name, value, low, "; it counts optimizer steps")


def _check_norms(grad_norms: ArrayLike) -> np.ndarray:
    """Gradient norms as a float64 vector that a schedule can be made of."""
    norms = np.asarray(grad_norms)
    if norms.ndim != 1 or norms.size < 2:
        raise ValueError(
            "grad_norms must be a vector of two or more norms, one for each step of an"
            f" earlier run; got shape {norms.shape}."
        )
    norms = norms.astype(np.float64)
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if bad.size:
        raise ValueError(
            f"grad_norms must be finite and positive, but {bad.size} of {norms.size}"
            f" are not; the first is grad_norms[{bad[0]}] = {norms[bad[0]]}. Leave such"
            " steps out, or fill them in from their neighbours."
        )
    return norms


def _median_filter(x: np.ndarray, smoothing: float) -> np.ndarray:
    """Centred running median; ``x`` is held before the start, mirrored past the end."""
    half = int(smoothing * x.size) // 2
    padded = np.pad(np.pad(x, (half, 0), mode="edge"), (0, half), mode="reflect")
    values = padded.tolist()
    window = sorted(values[: 2 * half + 1])
    medians = [window[half]]
    for old, new in zip(values, values[2 * half + 1 :]):
        del window[bisect.bisect_left(window, old)]
        bisect.insort(window, new)
        medians.append(window[half])
    return np.asarray(medians)
