"""Averages that are wanted: the closest combination, and advice if it is not close."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, ParamSpec, TypedDict, TypeVar

import numpy as np

from optax_avg import _checks, _options, weights
from optax_avg._options import Option
from optax_avg.posthoc._clock import (
    Kind,
    Placed,
    Power,
    Recorded,
    Window,
    combination,
    common_stride,
    newest,
)
from optax_avg.posthoc._profiles import (
    Coefficients,
    Normalization,
    snapshots_within,
    widths_within,
)

P = ParamSpec("P")
T = TypeVar("T")

# Takes a number of iterates and the steps between them, and returns which average of
# them is wanted.
Goal = Callable[[int, int], Kind]


# The shape of a cooldown and its length in optimizer steps.
Cooldown = tuple[weights.CooldownShape, int]


class Request(NamedTuple):
    """An average that is wanted.

    Attributes:
      goal: Which average it is.
      step: Training step at which it ends, None for the last snapshot.
      names: Names of the averages to combine, None for all.
      normalize: How the weights of snapshots are normalised.
    """

    goal: Goal
    step: int | None
    names: Sequence[str] | None
    normalize: Normalization


class TargetOptions(TypedDict, total=False):
    """Options that say which average is wanted."""

    sigma_rel: float | None
    half_life: float | None
    window: int | None
    weight: weights.Weight | None
    cooldown: Cooldown | None
    step: int | None
    names: Sequence[str] | None
    normalize: Normalization


_OPTIONS = {
    "sigma_rel": Option(None, "Relative width of a power function, in (0, 12^-1/2]."),
    "half_life": Option(
        None,
        """Half-life of an EMA in optimizer steps, as in
  :func:`optax_avg.weights.half_life`. Its weights on the iterates sum to one, as in
  ``weights.ema``; the initial parameters have no weight.""",
    ),
    "window": Option(None, "Number of latest optimizer steps for a uniform mean."),
    "weight": Option(
        None, "Any other weight ``w(t)`` or ``w(t, dt)`` of :mod:`optax_avg.weights`."
    ),
    "cooldown": Option(
        None,
        """``(shape, steps)``: what a cooldown of the learning rate over the latest
  ``steps`` optimizer steps would have led to, as far as the updates would have kept
  their directions; see :func:`optax_avg.weights.cooldown`.""",
    ),
    "step": Option(
        None,
        """Training step at which the average ends, one of
  :meth:`SnapshotStore.steps`; by default the last.""",
    ),
    "names": Option(None, "Names of the averages to combine; by default all."),
    "normalize": Option(
        "constrained",
        """How the weights of snapshots are normalised, as in
  :func:`optax_avg.posthoc.coefficients`.""",
    ),
}


def with_target(function: Callable[P, T]) -> Callable[P, T]:
    """Completes a function by :class:`TargetOptions`."""
    return _options.with_options(
        TargetOptions,
        _OPTIONS,
        raises="""ValueError: If not exactly one target is given, or there are no
  snapshots.""",
    )(function)


def request_of(
    *,
    sigma_rel: float | None = None,
    half_life: float | None = None,
    window: int | None = None,
    weight: weights.Weight | None = None,
    cooldown: Cooldown | None = None,
    step: int | None = None,
    names: Sequence[str] | None = None,
    normalize: Normalization = "constrained",
) -> Request:
    """A request from :class:`TargetOptions`, which it checks.

    Raises:
      ValueError: If there is not exactly one target, or an argument is out of range.
    """
    if isinstance(names, str):
        raise ValueError(f"names must be a list of names; write names=[{names!r}].")
    goal = _goal_of(sigma_rel, half_life, window, weight, cooldown)
    return Request(goal, step, names, normalize)


def _goal_of(
    sigma_rel: float | None,
    half_life: float | None,
    window: int | None,
    weight: weights.Weight | None,
    cooldown: Cooldown | None,
) -> Goal:
    targets = sigma_rel, half_life, window, weight, cooldown
    if sum(x is not None for x in targets) == 1:
        if sigma_rel is not None:
            power = Power(weights.gamma_from_sigma_rel(float(sigma_rel)))
            return lambda count, every: power
        if window is not None:
            k = _checks.check_integer("window", window, 1)
            return lambda count, every: Window(-(-k // every))
        if half_life is not None:
            return _ema(half_life)
        if weight is not None:
            return lambda count, every: Recorded(
                weights.sequence(weight, count, every=every)
            )
        if cooldown is not None:
            return _cooled(cooldown)
    raise ValueError(
        "there must be one target; write reconstruct(params, sigma_rel=0.08), or "
        "half_life=, window=, weight= or cooldown=('sqrt', 2000)."
    )


def _ema(half_life: float) -> Goal:
    """The EMA whose weights halve every ``half_life`` optimizer steps."""
    half_life = _checks.within("half_life", half_life, 0, math.inf, open_low=True)
    decay = weights.decay_from_half_life(half_life)

    def goal(count: int, every: int) -> Kind:
        weight = weights.ema(weights.scale_decay(decay, every))
        return Recorded(weights.sequence(weight, count))

    return goal


def _cooled(cooldown: Cooldown) -> Goal:
    """The cooldown over the latest optimizer steps."""
    if not isinstance(cooldown, (tuple, list)) or len(cooldown) != 2:
        raise ValueError(
            "cooldown must be a shape and a number of optimizer steps, as in "
            f"cooldown=('sqrt', 2000); got {cooldown!r}."
        )
    shape, steps = cooldown
    steps = _checks.static_integer("steps of the cooldown", steps, 1)
    weights.cooldown(shape, 1)  # an error that does not wait for the disk

    def goal(count: int, every: int) -> Kind:
        k = -(-steps // every)
        if k > count:
            raise ValueError(
                f"the cooldown is longer than the training, which has {count * every} "
                f"optimizer steps here; pass cooldown=({shape!r}, {count * every}) or "
                "fewer."
            )
        c = weights.cooldown(shape, k)
        # Its weights as those of a running average: p_i = w(i) prod_{j>i} (1 - w(j)).
        p = np.concatenate([np.zeros(count - k), [c.initial], c.weights])
        total = np.cumsum(p)
        return Recorded(np.where(total > 0, p / np.where(total > 0, total, 1), 0)[1:])

    return goal


TOLERANCE = 0.05  # relative error above which a reconstruction warns
MOST = 128  # most snapshots whose reach is computed


class Kept(NamedTuple):
    """Averages that were kept.

    Attributes:
      names: Name of each average.
      averages: Averages on the clock.
      rounding: Relative error of each average, shape (n,).
    """

    names: list[str]
    averages: list[Placed]
    rounding: np.ndarray


def target_of(kept: Sequence[Placed], goal: Goal) -> Placed:
    """The average that is wanted, over the steps of those that were kept."""
    origin, every = min(a.origin for a in kept), common_stride(kept)
    count = (max(newest(a) for a in kept) - origin) // every
    return Placed(goal(count, every), count, origin, every)


def combined(kept: Kept, request: Request) -> Coefficients:
    """The combination of averages that is closest to the one that is wanted."""
    return combination(
        kept.averages,
        target_of(kept.averages, request.goal),
        normalize=request.normalize,
        rounding=kept.rounding,
    )


def advice_for(found: Coefficients, kept: Kept, request: Request) -> str:
    """What would express the target better; empty if it is expressed well enough."""
    if found.rounding > TOLERANCE:
        return (
            "their dtype is too coarse for these numbers; keep averages and snapshots "
            "in bfloat16 or float32."
        )
    if found.residual <= TOLERANCE:
        return ""
    target = target_of(kept.averages, request.goal)
    if isinstance(target.kind, Window) and target.kind.k > target.iterates:
        steps = target.iterates * target.every
        return (
            f"the window is longer than the training, which has {steps} optimizer "
            f"steps here; pass window={steps} for the mean of all, or fewer."
        )
    if len({(a.origin, a.every) for a in kept.averages}) > 1:
        return _advice_on_grids(kept, request)
    return _advice_on_widths(kept, request)


def _advice_on_widths(kept: Kept, request: Request) -> str:
    """Names widths within reach, and a number of snapshots that would be enough."""
    target = target_of(kept.averages, request.goal)
    loss = float(kept.rounding.max())
    powers = [
        (a.kind.gamma, a.iterates) for a in kept.averages if isinstance(a.kind, Power)
    ]
    if not isinstance(target.kind, Power) or not powers:
        return "keep more snapshots, or averages closer to the target."
    # Of many snapshots some, evenly spaced from the newest: a subset reaches no more.
    times = sorted({count for _, count in powers}, reverse=True)
    some = times[:: -(-len(powers) // MOST)]
    powers = [(gamma, count) for gamma, count in powers if count in some]
    widths = [weights.sigma_rel_from_gamma(gamma) for gamma, _ in powers]
    advice = []
    counts = [count for _, count in powers]
    span = widths_within(counts, widths, target.iterates, TOLERANCE, loss)
    if span:
        advice.append(f"sigma_rel from {span[0]:.2g} to {span[1]:.2g} can be had")
    wanted = weights.sigma_rel_from_gamma(target.kind.gamma)
    more = snapshots_within(sorted(set(widths)), wanted, TOLERANCE, rounding=loss)
    if more:
        advice.append(f"{more} evenly spaced snapshots would do")
    if not advice:
        return "no number of such snapshots would do."
    return "; ".join(advice) + "."


def _advice_on_grids(kept: Kept, request: Request) -> str:
    """Names the averages of the same iterates that express the target best."""
    grids: dict[tuple[int, int], list[int]] = {}
    for i, a in enumerate(kept.averages):
        grids.setdefault((a.origin, a.every), []).append(i)
    missed = []
    for indices in grids.values():
        names = [kept.names[i] for i in indices]
        averages = [kept.averages[i] for i in indices]
        found = combined(Kept(names, averages, kept.rounding[indices]), request)
        missed.append((found.residual, sorted(set(names))))
    least, best = min(missed)
    return (
        f"the averages hold iterates of different steps; names={best} alone miss those "
        f"weights on their own iterates by {least:.1%}."
    )
