"""Averages on one clock, that of optimizer steps, and combinations of them.

    p_s = (1 - w(s)) p_{s-1} + w(s) e_s

``p_s`` are the weights on the iterates of all steps, ``e_s`` is the iterate of step
``s``, and ``w(s)`` is 0 at the steps that an average does not absorb. Averages with
different starts and strides therefore have their weights in one space, and their inner
products follow from the same recursion:

    <p_s, q_s> = (1 - w(s)) (1 - v(s)) <p_{s-1}, q_{s-1}> + w(s) v(s),
    <p_s, q_t> = <p_s, q_s> prod_{s < r <= t} (1 - v(r))    for s < t.

Time is linear in the steps. No array has the size snapshots times steps.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from optax_avg import weights
from optax_avg.posthoc._profiles import Coefficients, Normalization, solve

CHUNK = 2**16  # steps whose weights are held at once
ROWS = 256  # averages whose inner products are made at once


class Power(NamedTuple):
    """A power function, ``w(i) = 1 - (1-1/i)^(gamma+1)``."""

    gamma: float


class Window(NamedTuple):
    """The uniform mean of the latest ``k`` iterates."""

    k: int


class Recorded(NamedTuple):
    """Any running average, by its weights ``w(1), ..., w(n)``, float64."""

    w: np.ndarray


Kind = Power | Window | Recorded


class Placed(NamedTuple):
    """An average on the clock.

    Attributes:
      kind: Which average it is.
      iterates: Number of iterates in it, at least 1.
      origin: Step whose parameters it starts from, before the first iterate.
      every: Steps between iterates, which come from the steps ``origin + every i``.
    """

    kind: Kind
    iterates: int
    origin: int = 0
    every: int = 1


class _Term(NamedTuple):
    """``factor`` times the running average with the index ``average``, at a step."""

    average: int
    step: int
    factor: float


def newest(average: Placed) -> int:
    """The step of the newest iterate."""
    return average.origin + average.every * average.iterates


def common_stride(averages: Sequence[Placed]) -> int:
    """The largest stride of regular steps that contain the iterates of all averages."""
    first = averages[0].origin
    return math.gcd(*(x for a in averages for x in (a.every, a.origin - first)))


def combination(
    kept: Sequence[Placed],
    target: Placed,
    *,
    normalize: Normalization = "constrained",
    rounding: ArrayLike = 0.0,
) -> Coefficients:
    """The combination of averages that is closest to another one.

    Args:
      kept: Averages that were kept.
      target: Average that is wanted.
      normalize: How the weights are normalised, as in
        :func:`optax_avg.posthoc.coefficients`.
      rounding: Relative error of the averages that were kept, a number or of shape
        (n,).

    Returns:
      A :class:`Coefficients`.
    """
    averages, terms = _expanded([*kept, target])
    step = np.array([term.step for row in terms for term in row])
    ends = np.union1d(step, np.arange(CHUNK, step.max(), CHUNK))
    gram = _gram(averages, terms, ends)
    found = solve(gram[:-1, :-1], gram[:-1, -1], gram[-1, -1], normalize, rounding)
    left = _norm(averages, terms, ends, np.append(found.weights, -1.0))
    # Sums of the Gram matrix's entries would lose the digits of small residuals.
    profile = left / math.sqrt(gram[-1, -1])
    return found._replace(residual=math.hypot(profile, found.rounding))


def weights_on_iterates(kind: Kind, count: int) -> np.ndarray:
    """Weights on what an average starts from, and on its iterates.

    Args:
      kind: Which average it is.
      count: Number of iterates.

    Returns:
      A float64 array of shape (count + 1,).
    """
    if isinstance(kind, Window):
        k = min(kind.k, count)
        return np.repeat([0, 1 / k], [count + 1 - k, k])
    return weights.on_iterates(_newest_weights(kind, np.arange(1, count + 1)))


def _newest_weights(kind: Kind, i: np.ndarray) -> np.ndarray:
    """``w(i)`` of a running average; 0 after the end of a recorded sequence."""
    if isinstance(kind, Window):
        raise TypeError("a window is not a running average.")
    if isinstance(kind, Recorded):
        known = i <= len(kind.w)
        return np.where(known, kind.w[np.where(known, i, 1) - 1], 0)
    with np.errstate(divide="ignore"):  # log 0 at the first iterate
        return -np.expm1((kind.gamma + 1) * np.log1p(-1 / i))


def _expanded(rows: Sequence[Placed]) -> tuple[list[Placed], list[list[_Term]]]:
    """Running averages, and each row as a sum of them, in units of the common stride.

    A window is a difference of two means of all iterates,
    ``(n mean_n - (n-k) mean_{n-k})/k``.
    """
    unit, zero = common_stride(rows), min(row.origin for row in rows)
    running: dict[tuple[Power | int, int, int], Placed] = {}
    numbers: dict[tuple[Power | int, int, int], int] = {}
    terms = []
    for row in rows:
        origin, every = (row.origin - zero) // unit, row.every // unit
        kind, n, parts = row.kind, row.iterates, [(row.iterates, 1.0)]
        if isinstance(kind, Window):
            k = min(kind.k, n)
            kind, parts = Power(0.0), [(n, n / k)]
            if n > k:
                parts.append((n - k, -(n - k) / k))
        same = kind if isinstance(kind, Power) else id(kind.w)
        key = same, origin, every
        number = numbers.setdefault(key, len(numbers))
        running[key] = Placed(kind, n, origin, every)
        terms.append([_Term(number, origin + every * i, x) for i, x in parts])
    return [*running.values()], terms


def _segments(
    averages: list[Placed], ends: np.ndarray, *, backwards: bool = False
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields ``(j, kept, p)`` for the steps after ``ends[j - 1]`` up to ``ends[j]``.

    ``p`` of shape (averages, steps) holds the weights of the averages at ``ends[j]`` on
    these steps. ``kept`` of shape (averages,) is what remains of the weights before.
    """
    order = range(len(ends))
    for j in reversed(order) if backwards else order:
        begin = ends[j - 1] + 1 if j else 0
        steps = np.arange(begin, ends[j] + 1)
        found = weights.on_iterates(np.stack([_on_clock(a, steps) for a in averages]))
        yield j, found[:, 0], found[:, 1:]


def _on_clock(average: Placed, steps: np.ndarray) -> np.ndarray:
    """``w`` at some steps; it is 1 at the origin, whose parameters are taken whole."""
    i, between = np.divmod(steps - average.origin, average.every)
    absorbed = (between == 0) & (i >= 1)
    w = np.where(steps == average.origin, 1.0, 0.0)
    w[absorbed] = _newest_weights(average.kind, i[absorbed])
    return w


def _gram(
    averages: list[Placed], terms: list[list[_Term]], ends: np.ndarray
) -> np.ndarray:
    """Inner products of all rows, float64 of shape (rows, rows)."""
    n = len(averages)
    inner, logs = np.zeros((len(ends), n, n)), np.zeros((len(ends), n))
    resets = np.zeros((len(ends), n), int)
    last, log, reset = np.zeros((n, n)), np.zeros(n), np.zeros(n, int)
    for j, kept, p in _segments(averages, ends):
        last = kept[:, None] * kept * last + p @ p.T
        forgot = kept == 0
        log = np.where(forgot, 0, log + np.log(np.where(forgot, 1, kept)))
        reset = reset + forgot
        inner[j], logs[j], resets[j] = last, log, reset
    flat = [term for row in terms for term in row]
    a = np.array([term.average for term in flat])
    at = np.searchsorted(ends, [term.step for term in flat])
    factor = np.array([term.factor for term in flat])
    first = np.cumsum([0, *map(len, terms)])
    gram = np.empty((len(terms), len(terms)))
    for row in range(0, len(terms), ROWS):
        part = slice(first[row], first[min(row + ROWS, len(terms))])
        a_i, at_i = a[part, None], at[part, None]
        early = np.minimum(at_i, at)
        # One of the two averages ends at the earlier step and does not decay.
        decay = logs[at_i, a_i] - logs[early, a_i] + logs[at, a] - logs[early, a]
        whole = (resets[at_i, a_i] == resets[early, a_i]) & (
            resets[at, a] == resets[early, a]
        )
        product = np.where(whole, inner[early, a_i, a] * np.exp(decay), 0)
        product *= factor[part, None] * factor
        product = np.add.reduceat(product, first[:-1], axis=1)
        inside = first[row : row + ROWS]
        inside = inside[inside < part.stop] - part.start
        gram[row : row + len(inside)] = np.add.reduceat(product, inside, axis=0)
    return gram


def _norm(
    averages: list[Placed], terms: list[list[_Term]], ends: np.ndarray, x: np.ndarray
) -> float:
    """``|sum_i x_i p_i|`` over the rows, summed step by step."""
    begun = np.zeros((len(ends), len(averages)))
    for value, row in zip(x, terms, strict=True):
        for term in row:
            at = np.searchsorted(ends, term.step)
            begun[at, term.average] += value * term.factor
    carried, total = np.zeros(len(averages)), 0.0
    for j, kept, p in _segments(averages, ends, backwards=True):
        carried = carried + begun[j]
        total += float(np.sum((carried @ p) ** 2))
        carried = kept * carried
    return math.sqrt(total)
