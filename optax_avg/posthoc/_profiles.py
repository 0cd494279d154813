"""Which combination of averages is the one that was not kept.

    min_x |p - sum_i x_i p_i|,    A x = b,  A_ij = <p_i, p_j>,  b_i = <p_i, p>

An average of iterates is linear in them: what its weights can be combined from, its
parameters can. Everything here is float64 NumPy, whatever JAX is set to.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from optax_avg import weights
from optax_avg.weights import gamma_from_sigma_rel

CONSTRAINED, SUM, NONE = "constrained", "sum", "none"
CHUNK = 2**16  # iterates whose weights are held at once


class Coefficients(NamedTuple):
    """A combination of averages.

    Attributes:
      weights: float64 of shape (n,), on the averages.
      residual: ``|p - sum_i x_i p_i|/|p|``, the relative error of the profile.
      condition: of the Gram matrix of the profiles at unit length.
    """

    weights: np.ndarray
    residual: float
    condition: float


class Power(NamedTuple):
    """The profile of a power function, ``p_i ~ i^(gamma+1) - (i-1)^(gamma+1)``."""

    gamma: float


class Window(NamedTuple):
    """The uniform mean of the latest ``k`` iterates."""

    k: int


class Recorded(NamedTuple):
    """Any running average by its sequence ``w(1), w(2), ...``, float64."""

    w: np.ndarray


Kind = Power | Window | Recorded


def power_of_name(name: str) -> Power | None:
    """What :func:`optax_avg.power_ema` calls its averages, ``power_ema_0.05``."""
    width = re.fullmatch(r"power_ema_([\d.e+-]+)", name)
    return width and Power(gamma_from_sigma_rel(float(width[1])))


def coefficients(
    times: Any,
    sigma_rels: Any,
    target_time: float,
    target_sigma_rel: float,
    *,
    normalize: str = CONSTRAINED,
) -> Coefficients:
    """The power-function average of another width from those that were kept.

    ``A x = b`` with the inner products of ``p(tau) = (g+1) tau^g / t^(g+1)`` on
    ``[0, t]``: ``(g_a+1)(g_b+1)(t_a/t_b)^e/((g_a+g_b+1) max(t_a, t_b))``, ``e = g_b``
    where ``t_a < t_b``, else ``-g_a``.

    Args:
      times: shape (n,), steps at which the averages were kept; positive.
      sigma_rels: shape (n,), their relative widths.
      target_time: step of the average that is wanted.
      target_sigma_rel: its relative width.
      normalize: ``"constrained"``: the best weights that sum to one, ``x + A^-1 1 (1 -
        1'x)/(1' A^-1 1)``; ``"sum"``: the best, divided by their sum, as the authors
        do; ``"none"``.

    Returns:
      A :class:`Coefficients`.

    Raises:
      ValueError: If shapes differ, there is nothing, or an argument is out of range.

    Example:
      >>> from optax_avg import posthoc
      >>> times, widths = [50, 100, 50, 100], [0.05, 0.05, 0.10, 0.10]
      >>> found = posthoc.coefficients(times, widths, 100, 0.1)
      >>> (found.weights.round(6) + 0.0).tolist()
      [0.0, 0.0, 0.0, 1.0]

    References:
      Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion
      Models", 2024, 2312.02696, algorithm 3.
    """
    t = np.asarray(times, np.float64)
    sigmas = np.asarray(sigma_rels, np.float64)
    if t.ndim != 1 or t.shape != sigmas.shape or not t.size:
        raise ValueError(
            f"times and sigma_rels must be vectors of one length, got shapes {t.shape} "
            f"and {sigmas.shape}."
        )
    if not (np.all(t > 0) and np.all(np.isfinite(t)) and target_time > 0):
        raise ValueError("times must be positive and finite.")
    g = np.array([gamma_from_sigma_rel(float(s)) for s in sigmas])
    goal = gamma_from_sigma_rel(float(target_sigma_rel))
    a = power_products(t[:, None], g[:, None], t[None], g[None])
    b = power_products(t, g, np.float64(target_time), goal)
    c = power_products(np.float64(target_time), goal, np.float64(target_time), goal)
    return solve(a, b, float(c), normalize)


def power_products(ta: Any, ga: Any, tb: Any, gb: Any) -> np.ndarray:
    """Inner products of the profiles of power functions, elementwise."""
    # The earlier time over the later one, to the exponent of the later.
    ratio = np.minimum(ta, tb) / np.maximum(ta, tb)
    e = np.where(ta < tb, gb, ga)
    return (ga + 1) * (gb + 1) * ratio**e / ((ga + gb + 1) * np.maximum(ta, tb))


def coefficients_of_profiles(
    profiles: Sequence[weights.Profile],
    target: weights.Profile,
    *,
    normalize: str = CONSTRAINED,
) -> Coefficients:
    """An average that was not kept from any that were, by their exact weights.

    Args:
      profiles: of the averages that were kept, as :func:`optax_avg.weights.profile`
        gives them; each over the iterates up to its own time.
      target: of the average that is wanted.
      normalize: see :func:`coefficients`.

    Returns:
      A :class:`Coefficients`.

    Raises:
      ValueError: If there are no profiles.

    Example:
      >>> import optax_avg as oa
      >>> kept = [oa.weights.profile(oa.weights.uniform(), t) for t in (5, 10)]
      >>> late = oa.weights.Profile([0.0] * 5 + [0.2] * 5, 0.0, 2.0, 0.14)
      >>> oa.posthoc.coefficients_of_profiles(kept, late).weights.round(6).tolist()
      [-1.0, 2.0]
    """
    if not profiles:
        raise ValueError("coefficients_of_profiles needs at least one profile.")
    length = 1 + max(len(p.weights) for p in (*profiles, target))
    rows = np.zeros((len(profiles) + 1, length))
    for row, p in zip(rows, (*profiles, target), strict=True):
        row[0] = p.initial
        row[1 : 1 + len(p.weights)] = p.weights
    return _solve_gram(rows @ rows.T, normalize)


def combination(
    kept: Sequence[tuple[Kind, int]],
    target: tuple[Kind, int],
    *,
    normalize: str = CONSTRAINED,
) -> Coefficients:
    """The same from kinds of averages and the numbers of iterates in them.

    Weights are written out a chunk of iterates at a time, so that a million of them and
    a hundred averages fit.
    """
    everything = [*kept, target]
    logs: dict[int, np.ndarray] = {}
    for kind, _ in everything:
        if isinstance(kind, Recorded) and id(kind.w) not in logs:
            logs[id(kind.w)] = _log_kept(kind.w)
    rows = [_by_iterate(kind, t, logs) for kind, t in everything]
    last = max(t for _, t in everything)
    gram = np.zeros((len(rows), len(rows)))
    for begin in range(0, last + 1, CHUNK):
        i = np.arange(begin, min(begin + CHUNK, last + 1))
        part = np.stack([row(i) for row in rows])
        gram += part @ part.T
    return _solve_gram(gram, normalize)


def weights_on_iterates(kind: Kind, t: int) -> np.ndarray:
    """Weights on the initial parameters and iterates ``1 ... t``, shape (t + 1,)."""
    recorded = isinstance(kind, Recorded)
    logs = {id(kind.w): _log_kept(kind.w)} if recorded else {}
    return _by_iterate(kind, t, logs)(np.arange(t + 1))


def _by_iterate(
    kind: Kind, t: int, logs: dict[int, np.ndarray]
) -> Callable[[np.ndarray], np.ndarray]:
    """The weight on iterate ``i`` of an average of ``t``, 0 the initial parameters."""
    if isinstance(kind, Power):
        g = kind.gamma + 1

        def power(i):
            inside = (i >= 1) & (i <= t)
            j = np.where(inside, i, t).astype(np.float64)
            with np.errstate(divide="ignore"):  # log 0 at the first iterate
                newest = -np.expm1(g * np.log1p(-1 / j))
            return np.where(inside, (j / t) ** g * newest, 0)

        return power
    if isinstance(kind, Window):
        k = min(kind.k, t)
        return lambda i: np.where((i > t - k) & (i <= t), 1 / k, 0)
    # p_i = w(i) prod_{j > i} (1 - w(j)); a weight of one forgets what was before.
    w, kept = np.append(1.0, kind.w[:t]), np.append(0.0, logs[id(kind.w)][:t])
    ones = np.flatnonzero(w >= 1)
    first = ones[-1]

    def recorded(i):
        j = np.clip(i, first, t)
        return np.where((i >= first) & (i <= t), w[j] * np.exp(kept[t] - kept[j]), 0)

    return recorded


def _log_kept(w: np.ndarray) -> np.ndarray:
    """``sum_{j <= i} log(1 - w(j))`` over the weights below one."""
    return np.cumsum(np.log1p(-np.where(w < 1, w, 0)))


def _solve_gram(gram: np.ndarray, normalize: str) -> Coefficients:
    """From the Gram matrix of the averages and, last, the target."""
    return solve(gram[:-1, :-1], gram[:-1, -1], float(gram[-1, -1]), normalize)


def solve(a: np.ndarray, b: np.ndarray, c: float, normalize: str) -> Coefficients:
    """``min_x c - 2 b'x + x'Ax``, what it leaves, and the condition of ``A``."""
    if normalize not in (CONSTRAINED, SUM, NONE):
        raise ValueError(
            f"normalize must be 'constrained', 'sum' or 'none', got {normalize!r}."
        )
    unit = 1 / np.sqrt(np.diagonal(a))
    scaled = unit[:, None] * a * unit
    values, vectors = np.linalg.eigh((scaled + scaled.T) / 2)
    # Averages that agree to the last digits share their weight.
    real = values > len(b) * np.finfo(float).eps * values[-1]
    inverse = np.where(real, 1 / np.where(real, values, 1), 0)

    def solved(v):
        return unit * (vectors @ (inverse * (vectors.T @ (unit * v))))

    x = solved(b)
    if normalize == CONSTRAINED:
        ones = solved(np.ones_like(b))
        x = x + ones * (1 - np.sum(x)) / np.sum(ones)
    elif normalize == SUM:
        x = x / np.sum(x)
    left = max(c - 2 * float(x @ b) + float(x @ a @ x), 0.0)
    condition = float(values[-1] / values[0]) if values[0] > 0 else math.inf
    return Coefficients(x, math.sqrt(left / c), condition)


def widths_within(
    times: Any, sigma_rels: Any, target_time: float, tolerance: float
) -> tuple[float, float] | None:
    """The least and the greatest width that can be had, None if there is none.

    Over a grid of relative widths from 0.01 to 0.285.
    """
    good = [
        float(s)
        for s in np.geomspace(0.01, 0.285, 60)
        if coefficients(times, sigma_rels, target_time, s).residual <= tolerance
    ]
    return (good[0], good[-1]) if good else None


def snapshots_within(
    sigma_rels: Any, target_sigma_rel: float, tolerance: float, most: int = 512
) -> int | None:
    """How many evenly spaced snapshots of these widths reach a width, None if too many.

    Powers of two from 2 on.
    """
    n = 2
    while n <= most:
        t = np.tile(np.arange(1, n + 1) / n, len(sigma_rels))
        s = np.repeat(np.asarray(sigma_rels, np.float64), n)
        if coefficients(t, s, 1.0, target_sigma_rel).residual <= tolerance:
            return n
        n *= 2
    return None
