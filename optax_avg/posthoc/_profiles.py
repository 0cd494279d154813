"""Combinations of averages that are closest to an average that was not kept.

    min_x |p - sum_i x_i p_i|^2 + sum_i (d_i x_i)^2,
    (A + diag d^2) x = b,  A_ij = <p_i, p_j>,  b_i = <p_i, p>

An average is linear in the iterates: if its weights are a combination of the weights of
other averages, its parameters are the same combination of their parameters. ``d`` is
the rounding error of the averages that were kept. Without it, large weights of both
signs would multiply that error. Everything here is float64 NumPy, whatever the settings
of JAX.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import cho_solve, cholesky, get_lapack_funcs

from optax_avg import weights
from optax_avg.weights import gamma_from_sigma_rel

# How the weights of averages are normalised.
Normalization = Literal["constrained", "sum", "none"]
CHUNK = 2**16  # iterates whose weights are held at once
MANY = 256  # averages whose eigenvalues are computed
ROUNDS = 3  # solutions with a ridge, each of what the others left


class Coefficients(NamedTuple):
    """A combination of averages.

    Attributes:
      weights: Weights of the averages, float64 of shape (n,).
      residual: Estimated relative error, ``(|p - sum_i x_i p_i|^2/|p|^2 +
        rounding^2)^(1/2)``.
      condition: Condition number of the Gram matrix of the profiles at unit length,
        with the terms of rounding. Above 256 averages it is an estimate in the 1-norm.
      rounding: Part of ``residual`` that comes from rounding.
    """

    weights: np.ndarray
    residual: float
    condition: float
    rounding: float


def coefficients(
    times: ArrayLike,
    sigma_rels: ArrayLike,
    target_time: float,
    target_sigma_rel: float,
    *,
    normalize: Normalization = "constrained",
    rounding: ArrayLike = 0.0,
) -> Coefficients:
    """A power-function average of any width, combined from those that were kept.

    Solves ``A x = b`` with the inner products of the profiles ``p(tau) = (g+1) tau^g /
    t^(g+1)`` on ``[0, t]``: ``(g_a+1)(g_b+1)(t_a/t_b)^e/((g_a+g_b+1) max(t_a, t_b))``
    with ``e = g_b`` if ``t_a < t_b``, else ``-g_a``.

    Args:
      times: Steps at which the averages were kept, positive, shape (n,).
      sigma_rels: Relative widths of these averages, shape (n,).
      target_time: Step of the average that is wanted.
      target_sigma_rel: Relative width of the average that is wanted.
      normalize: How the weights are normalised. ``"constrained"`` gives the best
        weights that sum to one, ``x + A^-1 1 (1 - 1'x)/(1' A^-1 1)``. ``"sum"`` divides
        the best weights by their sum, as the authors do. ``"none"`` leaves the best
        weights as they are.
      rounding: Relative error of the averages that were kept, a number or of shape
        (n,); ``2^-9`` for bfloat16.

    Returns:
      A :class:`Coefficients`.

    Raises:
      ValueError: If the shapes differ or are empty, or an argument is out of range.

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
    return solve(a, b, float(c), normalize, rounding)


def power_products(
    ta: np.ndarray | float,
    ga: np.ndarray | float,
    tb: np.ndarray | float,
    gb: np.ndarray | float,
) -> np.ndarray:
    """Inner products of the profiles of power functions, elementwise.

    ``(g_a+1)(g_b+1) r^e/((g_a+g_b+1) max(t_a, t_b))`` with the earlier time over the
    later one ``r`` and the exponent ``e`` of the later one.
    """
    ratio = np.minimum(ta, tb) / np.maximum(ta, tb)
    e = np.where(ta < tb, gb, ga)
    return (ga + 1) * (gb + 1) * ratio**e / ((ga + gb + 1) * np.maximum(ta, tb))


def coefficients_of_profiles(
    profiles: Sequence[weights.Profile],
    target: weights.Profile,
    *,
    normalize: Normalization = "constrained",
) -> Coefficients:
    """Any average, combined from those that were kept, by their exact weights.

    Args:
      profiles: Profiles of the averages that were kept, as
        :func:`optax_avg.weights.profile` gives them, each over the iterates up to its
        own time.
      target: Profile of the average that is wanted.
      normalize: How the weights are normalised, as in :func:`coefficients`.

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
    rows = [np.append(p.initial, p.weights) for p in (*profiles, target)]
    gram = np.zeros((len(rows), len(rows)))
    for begin in range(0, max(map(len, rows)), CHUNK):
        part = np.zeros((len(rows), CHUNK))
        for into, row in zip(part, rows, strict=True):
            found = row[begin : begin + CHUNK]
            into[: len(found)] = found
        gram += part @ part.T
    return solve(gram[:-1, :-1], gram[:-1, -1], gram[-1, -1], normalize)


def solve(
    a: np.ndarray,
    b: np.ndarray,
    c: float,
    normalize: Normalization,
    rounding: ArrayLike = 0.0,
) -> Coefficients:
    """Solves ``min_x c - 2 b'x + x'Ax + sum_i (d_i x_i)^2``.

    ``d_i = u_i max(c, A_ii)^(1/2)`` with the relative error ``u_i`` of average ``i``.
    The error is claimed relative to the size of the result. How that compares with the
    size of an average depends on the iterates. If they are independent, the average has
    size ``|p_i|`` and the result ``|p|``, and rounding costs ``u_i |p_i|/|p|``. If they
    hardly move, all averages have the size of the result, and rounding costs ``u_i``.
    The larger of the two is taken. Rounding errors of different averages are taken as
    independent, so that their squares add up. They are not independent if all averages
    underflow: ``|sum_i u_i x_i|`` is claimed if it is larger.

    Args:
      a: Inner products of the profiles that were kept, shape (n, n).
      b: Inner products of these profiles with the target, shape (n,).
      c: Inner product of the target with itself.
      normalize: How the weights are normalised, as in :func:`coefficients`.
      rounding: Relative errors ``u``, a number or of shape (n,).

    Returns:
      A :class:`Coefficients`.

    Raises:
      ValueError: If ``normalize`` is unknown.
    """
    if normalize not in get_args(Normalization):
        raise ValueError(
            f"normalize must be 'constrained', 'sum' or 'none', got {normalize!r}."
        )
    squares = np.asarray(rounding) ** 2 * np.maximum(np.diagonal(a), c)
    unit = 1 / np.sqrt(np.diagonal(a) + squares)
    scaled = unit[:, None] * a * unit
    scaled[np.diag_indices_from(scaled)] = 1
    inverse, condition = (_by_eigenvalues if len(b) <= MANY else _by_ridge)(scaled)

    def solved(v: np.ndarray) -> np.ndarray:
        return unit * inverse(unit * v)

    x = solved(b)
    if normalize == "constrained":
        ones = solved(np.ones_like(b))
        x = x + ones * (1 - np.sum(x)) / np.sum(ones)
    elif normalize == "sum":
        x = x / np.sum(x)
    together = float(np.sum(np.asarray(rounding) * x)) ** 2 * c
    lost = max(float(squares @ x**2), together)
    left = max(c - 2 * float(x @ b) + float(x @ a @ x), 0.0) + lost
    return Coefficients(x, math.sqrt(left / c), condition, math.sqrt(lost / c))


# Maps ``b`` to the solution ``x`` of ``S x = b``.
Inverse = Callable[[np.ndarray], np.ndarray]


def _by_eigenvalues(s: np.ndarray) -> tuple[Inverse, float]:
    """The pseudo-inverse of a positive semidefinite matrix, and its condition number.

    Averages that agree to the last digits share one weight.
    """
    values, vectors = np.linalg.eigh(s)
    real = values > len(s) * np.finfo(float).eps * values[-1]
    inverse = np.where(real, 1 / np.where(real, values, 1), 0)
    condition = float(values[-1] / values[0]) if values[0] > 0 else math.inf
    return lambda b: vectors @ (inverse * (vectors.T @ b)), condition


def _by_ridge(s: np.ndarray) -> tuple[Inverse, float]:
    """The inverse but for eigenvalues below ``r = n eps |S|_1``, and the condition.

    ``x <- x + (S + r I)^-1 (b - S x)``, ``ROUNDS`` times from 0, which leaves
    ``(r/(r + lambda))^ROUNDS`` of the part of ``b`` that belongs to an eigenvalue. It
    takes a twentieth of the time that the eigenvalues take. The condition number is
    LAPACK's estimate in the 1-norm for ``S + r I``.
    """
    norm = float(np.max(np.sum(np.abs(s), axis=0)))
    ridge = len(s) * np.finfo(float).eps * norm
    factor = cholesky(s + np.diag(np.full(len(s), ridge)), lower=True)

    def inverse(b: np.ndarray) -> np.ndarray:
        x = np.zeros_like(b)
        for _ in range(ROUNDS):
            x = x + cho_solve((factor, True), b - s @ x)
        return x

    (pocon,) = get_lapack_funcs(("pocon",), (factor,))
    reciprocal, _ = pocon(factor, norm, uplo="L")
    return inverse, float(1 / reciprocal)


def widths_within(
    times: ArrayLike,
    sigma_rels: ArrayLike,
    target_time: float,
    tolerance: float,
    rounding: float = 0.0,
) -> tuple[float, float] | None:
    """The smallest and the largest relative width within reach, None if there is none.

    Tries a grid of relative widths from 0.01 to 0.285.
    """

    def reached(s: float) -> bool:
        found = coefficients(times, sigma_rels, target_time, s, rounding=rounding)
        return found.residual <= tolerance

    good = [float(s) for s in np.geomspace(0.01, 0.285, 60) if reached(s)]
    return (good[0], good[-1]) if good else None


def snapshots_within(
    sigma_rels: Sequence[float],
    target_sigma_rel: float,
    tolerance: float,
    most: int = 512,
    rounding: float = 0.0,
) -> int | None:
    """Number of evenly spaced snapshots that bring a width within reach.

    Tries powers of two from 2 to ``most``.

    Returns:
      The smallest number that is enough, None if there is none.
    """
    n = 2
    while n <= most:
        t = np.tile(np.arange(1, n + 1) / n, len(sigma_rels))
        s = np.repeat(np.asarray(sigma_rels, np.float64), n)
        found = coefficients(t, s, 1.0, target_sigma_rel, rounding=rounding)
        if found.residual <= tolerance:
            return n
        n *= 2
    return None
