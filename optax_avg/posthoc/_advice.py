"""Advice if the snapshots cannot express the average that is wanted."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from optax_avg import weights
from optax_avg.posthoc._clock import (
    Placed,
    Power,
    combination,
    common_stride,
    newest,
)
from optax_avg.posthoc._profiles import (
    Coefficients,
    snapshots_within,
    widths_within,
)
from optax_avg.posthoc._request import Goal, Request

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
