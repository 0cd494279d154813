"""How an average is put together from the snapshots of others."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from optax_avg import _checks, _numerics, weights
from optax_avg.posthoc import _disk, _integrity
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
from optax_avg.posthoc._profiles import snapshots_within, widths_within
from optax_avg.posthoc._timeline import (
    PARAMETERS,
    clock_of,
    of_another_store,
    out_of_step,
    own_step,
    placed,
    uneven,
)

TOLERANCE = 0.05  # relative error above which a reconstruction warns
MOST = 128  # snapshots from which advice is taken


class Part(NamedTuple):
    """A snapshot of an average in a sum.

    Attributes:
      step: of the snapshot.
      name: of the average.
      weight: on it.
      start: its iterates are those of the steps ``start + every i``, ``i = 1, 2, ...``,
        on the clock of optimizer steps that all parts share.
      every: see ``start``.
      iterates: how many there are.
    """

    step: int
    name: str
    weight: float
    start: int = 0
    every: int = 1
    iterates: int = 1


class Plan(NamedTuple):
    """How an average is put together.

    Attributes:
      parts: snapshots and their weights.
      residual: relative error that is claimed, see :class:`Coefficients`.
      condition: of the problem.
      advice: what would express the target better, empty where it is expressed.
      rounding: the part of ``residual`` that comes from the dtypes of the snapshots.
    """

    parts: list[Part]
    residual: float
    condition: float
    advice: str
    rounding: float


def target_of(
    sigma_rel: Any = None,
    half_life: Any = None,
    window: Any = None,
    weight: Any = None,
) -> Callable[[int, int], Kind]:
    """From a number of iterates and the steps between them to what is wanted."""
    if sum(x is not None for x in (sigma_rel, half_life, window, weight)) != 1:
        raise ValueError(
            "there must be one target; write reconstruct(params, sigma_rel=0.08), or "
            "half_life=, window= or weight=."
        )
    if sigma_rel is not None:
        power = Power(weights.gamma_from_sigma_rel(float(sigma_rel)))
        return lambda count, every: power
    if window is not None:
        _checks.check_integer("window", window, 1)
        return lambda count, every: Window(-(-window // every))
    if half_life is not None:
        half_life = _checks.within("half_life", half_life, 0, math.inf, open_low=True)
        decay = weights.decay_from_half_life(half_life)
        return lambda count, every: Recorded(
            weights.sequence(weights.ema(weights.scale_decay(decay, every)), count)
        )
    return lambda count, every: Recorded(weights.sequence(weight, count, every=every))


def planned(
    reader: _disk.Reader,
    records: dict[int, _disk.Record],
    goal: Callable[[int, int], Kind],
    step: int | None,
    names: Sequence[str] | None,
    normalize: str,
) -> Plan:
    """The best combination of the snapshots up to ``step``.

    The target absorbs the iterates that the averages absorb: its stride is the coarsest
    that holds the steps of all, from where the first of them starts.

    Raises:
      ValueError: If there are none.
      SnapshotError: If a snapshot is broken.
    """
    if isinstance(names, str):
        raise ValueError(f"names must be a list of names; write names=[{names!r}].")
    if not records:
        raise ValueError(f"{reader.directory} holds no snapshot that can be read.")
    known = sorted({name for record in records.values() for name in record.leaves})
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(
            f"there is no snapshot of {', '.join(unknown)}; there are those of {known}."
        )
    chosen = [
        (record, name)
        for record, name in chosen_of(records, names)
        if step is None or record.step <= step
    ]
    if not chosen or step not in (None, chosen[-1][0].step):
        have = sorted({record.step for record, _ in chosen_of(records, names)})
        if not have:
            raise ValueError(
                f"the snapshots in {reader.directory} hold no averages, only "
                f"{PARAMETERS!r}; store.mean() averages these, or pass "
                f"names=[{PARAMETERS!r}]."
            )
        wanted = "the averages" if names is None else str(list(names))
        raise ValueError(
            f"there is no snapshot of {wanted} at step {step}; pass one of {have}."
        )
    same = without_others({record.step: record for record, _ in chosen})
    clock = _clock_of([*same.values()])
    chosen = [(record, name) for record, name in chosen if record.step in clock]
    kinds = kinds_of(reader, chosen, clock)
    kept = [
        placed(record, name, clock, kinds[record.step, name]) for record, name in chosen
    ]
    rounding = np.array([_rounding(record, name) for record, name in chosen])
    target = _target(kept, goal)
    found = combination(kept, target, normalize=normalize, rounding=rounding)
    parts = [
        Part(record.step, name, float(x), a.origin, a.every, a.iterates)
        for (record, name), a, x in zip(chosen, kept, found.weights, strict=True)
    ]
    advice = ""
    if found.rounding > TOLERANCE:
        advice = (
            "their dtype is too coarse for these numbers; keep averages and snapshots "
            "in bfloat16 or float32."
        )
    elif found.residual > TOLERANCE:
        advice = _advice([name for _, name in chosen], kept, goal, rounding, normalize)
    return Plan(parts, found.residual, found.condition, advice, found.rounding)


def chosen_of(
    records: dict[int, _disk.Record], names: Sequence[str] | None
) -> list[tuple[_disk.Record, str]]:
    """The snapshots of some averages, by default of all."""
    return [
        (record, name)
        for record in records.values()
        for name in record.leaves
        if name in (names or [n for n in record.leaves if n != PARAMETERS])
    ]


def without_others(
    records: dict[int, _disk.Record], stacklevel: int = 6
) -> dict[int, _disk.Record]:
    """The records of one store; snapshots that were copied from another are named."""
    others = of_another_store([*records.values()])
    if others:
        warnings.warn(
            f"the snapshots of steps {others} are left out: another store wrote them "
            f"than the newest one, so that they may be of another run. "
            f"step={others[-1]} takes them instead; mean(steps=...) takes any.",
            UserWarning,
            stacklevel=stacklevel,
        )
    return {s: record for s, record in records.items() if s not in others}


def _clock_of(records: list[_disk.Record]) -> dict[int, int]:
    """The clock at the snapshots of the newest run; the others are named."""
    clock = clock_of(records)
    earlier = sorted({record.step for record in records} - set(clock))
    if earlier:
        warnings.warn(
            f"the averages were begun anew after step {earlier[-1]}: the snapshots of "
            f"steps {earlier} are of an earlier run and left out. step={earlier[-1]} "
            "is the newest of that run.",
            UserWarning,
            stacklevel=6,
        )
    odd = out_of_step(records, clock)
    if odd:
        warnings.warn(
            f"the averages {sorted(odd)} do not count the same optimizer steps as the "
            "others, so that their iterates are not where they are taken to be; pass "
            "names= of averages that left out the same iterates.",
            UserWarning,
            stacklevel=6,
        )
    for before, after in uneven(records, clock):
        warnings.warn(
            f"between the snapshots of steps {before} and {after} the averages did not "
            "advance as these numbers do. If the training was begun anew there, the "
            "earlier snapshots do not belong to it: remove them, and number snapshots "
            "by optimizer steps.",
            UserWarning,
            stacklevel=6,
        )
    return clock


def _target(kept: list[Placed], goal: Callable[[int, int], Kind]) -> Placed:
    """The average that is wanted, over the steps of those that there are."""
    origin, every = min(a.origin for a in kept), common_stride(kept)
    count = (max(newest(a) for a in kept) - origin) // every
    return Placed(goal(count, every), count, origin, every)


def _rounding(record: _disk.Record, name: str) -> float:
    """Relative error of a snapshot: half the spacing of its coarsest dtype.

    And the spacing of float32, or a wider dtype, in which it was accumulated, and what
    was too small for the dtype.
    """
    found = [jnp.dtype(leaf.dtype) for leaf in record.leaves[name]]
    spacing = max(
        float(jnp.finfo(x).eps / 2 + jnp.finfo(_numerics.float32_or_wider(x)).eps)
        for x in found
    )
    return spacing + record.underflow.get(name, 0.0)


def kinds_of(
    reader: _disk.Reader,
    chosen: list[tuple[_disk.Record, str]],
    clock: dict[int, int],
) -> dict[tuple[int, str], Kind]:
    """What each snapshot of an average is, by its step and name.

    Raises:
      SnapshotError: If the weights of a recorded average cannot be read.
    """
    kinds: dict[tuple[int, str], Kind] = {}
    sequences: dict[tuple[str, int], np.ndarray] = {}
    for record, name in reversed(chosen):
        kind = record.kinds[name]
        if "power" in kind:
            kinds[record.step, name] = Power(kind["power"])
        elif "window" in kind:
            kinds[record.step, name] = Window(kind["window"])
        else:
            # The weights of an earlier snapshot begin those of a later one, as long as
            # the average was not made anew in between.
            life = name, clock[record.step] - own_step(record, name)
            if life not in sequences:
                sequences[life] = _disk.read_sequence(reader, record, name)
            _check_begins(reader, record, name, sequences[life])
            kinds[record.step, name] = Recorded(sequences[life])
    return kinds


def _check_begins(
    reader: _disk.Reader, record: _disk.Record, name: str, later: np.ndarray
) -> None:
    """Raises unless the weights of a snapshot begin those of a later one."""
    begun = later[: record.absorbed[name]]
    if record.digests.get(name) == _integrity.digest(begun):
        return
    own = _disk.read_sequence(reader, record, name)
    if own.shape != begun.shape or not np.allclose(own, begun, rtol=1e-6, atol=1e-12):
        raise ValueError(
            f"the weights of {name!r} that were recorded at step {record.step} differ "
            "from those of a later snapshot: weights= of the store was changed. Pass "
            "names= of other averages, or the step of an earlier snapshot as step=."
        )


def _advice(
    names: list[str],
    kept: list[Placed],
    goal: Callable[[int, int], Kind],
    rounding: np.ndarray,
    normalize: str,
) -> str:
    """What else would do: averages of one stride, a width, or more snapshots."""
    grids = {(a.origin, a.every) for a in kept}
    if len(grids) > 1:
        return _advice_of_grids(names, kept, goal, rounding, normalize)
    target, loss = _target(kept, goal), float(rounding.max())
    powers = [(a.kind.gamma, a.iterates) for a in kept if isinstance(a.kind, Power)]
    if not isinstance(target.kind, Power) or not powers:
        return "keep more snapshots, or averages closer to the target."
    # The latest of many, evenly spaced: fewer never reach further.
    times = sorted({count for _, count in powers}, reverse=True)
    some = times[:: -(-len(powers) // MOST)]
    powers = [(gamma, count) for gamma, count in powers if count in some]
    widths = [weights.sigma_rel_from_gamma(gamma) for gamma, _ in powers]
    said = []
    counts = [count for _, count in powers]
    span = widths_within(counts, widths, target.iterates, TOLERANCE, loss)
    if span:
        said.append(f"sigma_rel from {span[0]:.2g} to {span[1]:.2g} can be had")
    wanted = weights.sigma_rel_from_gamma(target.kind.gamma)
    more = snapshots_within(sorted(set(widths)), wanted, TOLERANCE, rounding=loss)
    if more:
        said.append(f"{more} evenly spaced snapshots would do")
    return "; ".join(said) + "." if said else "no number of such snapshots would do."


def _advice_of_grids(
    names: list[str],
    kept: list[Placed],
    goal: Callable[[int, int], Kind],
    rounding: np.ndarray,
    normalize: str,
) -> str:
    """Which averages of the same iterates make the target best."""
    grids: dict[tuple[int, int], list[int]] = {}
    for i, a in enumerate(kept):
        grids.setdefault((a.origin, a.every), []).append(i)
    missed = []
    for same in grids.values():
        some = [kept[i] for i in same]
        found = combination(
            some, _target(some, goal), normalize=normalize, rounding=rounding[same]
        )
        missed.append((found.residual, sorted({names[i] for i in same})))
    least, best = min(missed)
    return (
        f"the averages hold iterates of different steps; names={best} alone miss those "
        f"weights on their own iterates by {least:.1%}."
    )


def warn_of_residual(plan: Plan) -> None:
    """Says so where the target is out of reach."""
    if plan.residual > TOLERANCE:
        warnings.warn(
            f"the snapshots miss the weights of this average by {plan.residual:.1%}, "
            f"rounding included ({plan.rounding:.1%}): {plan.advice}",
            UserWarning,
            stacklevel=5,
        )
