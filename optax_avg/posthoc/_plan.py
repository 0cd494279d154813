"""How an average is put together from the snapshots of others."""

import os
import sys
import warnings
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from optax_avg import _numerics, _options
from optax_avg.posthoc import _disk, _timeline
from optax_avg.posthoc._records import (
    PARAMETERS,
    NoSnapshotError,
    Record,
    Records,
    averages_of,
    names_in,
)
from optax_avg.posthoc._target import TOLERANCE, Kept, Request, advice_for, combined

# What lies between a caller and this room: the room itself, and what completes options.
HERE = (os.path.dirname(__file__) + os.sep, _options.__file__)


class Part(NamedTuple):
    """A snapshot of an average in a sum.

    Attributes:
      step: Training step of the snapshot.
      name: Name of the average.
      weight: Weight of the snapshot.
      start: The iterates are those of the steps ``start + every i``, ``i = 1, 2, ...``,
        on the clock of optimizer steps that all parts share.
      every: Steps between iterates on that clock.
      iterates: Number of iterates in the average.
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
      parts: Snapshots and their weights.
      residual: Estimated relative error, as in :class:`Coefficients`.
      condition: Condition number of the problem, as in :class:`Coefficients`.
      advice: What would express the target better; empty if it is expressed.
      rounding: Part of ``residual`` that comes from the dtypes of the snapshots.
    """

    parts: list[Part]
    residual: float
    condition: float
    advice: str
    rounding: float


def planned(reader: _disk.Reader, records: Records, request: Request) -> Plan:
    """The best combination of the snapshots up to the step of a request.

    The target absorbs the iterates that the averages absorb. Its stride is the largest
    one whose steps contain the steps of all averages, from the start of the first
    average.

    Raises:
      ValueError: If there are no such snapshots.
      SnapshotError: If a snapshot is broken.
    """
    chosen = _chosen(reader.directory, records, request)
    same = without_others({record.step: record for record, _ in chosen})
    clock = _clock_of([*same.values()])
    chosen = [(record, name) for record, name in chosen if record.step in clock]
    kinds = _timeline.kinds_of(reader, chosen, clock)
    kept = Kept(
        [name for _, name in chosen],
        _timeline.on_their_grid(
            [
                _timeline.placed(record, name, clock, kinds[record.step, name])
                for record, name in chosen
            ]
        ),
        np.array([_rounding(record, name) for record, name in chosen]),
    )
    found = combined(kept, request)
    rows = zip(chosen, kept.averages, found.weights, strict=True)
    parts = [
        Part(record.step, name, float(x), a.origin, a.every, a.iterates)
        for (record, name), a, x in rows
    ]
    advice = advice_for(found, kept, request)
    return Plan(parts, found.residual, found.condition, advice, found.rounding)


def _chosen(
    directory: str, records: Records, request: Request
) -> list[tuple[Record, str]]:
    """The snapshots that a request allows, in ascending order of steps.

    Raises:
      ValueError: If there are none, or none at the step of the request.
    """
    names, step = request.names, request.step
    if not records:
        raise NoSnapshotError(f"{directory} holds no snapshot that can be read.")
    known = names_in(records)
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(
            f"there is no snapshot of {', '.join(unknown)}; there are those of {known}."
        )
    allowed = averages_of(records, names)
    have = sorted({record.step for record, _ in allowed})
    if not have:
        raise ValueError(
            f"the snapshots in {directory} hold no averages, only {PARAMETERS!r}; "
            f"store.mean() averages these, or pass names=[{PARAMETERS!r}]."
        )
    if step is not None and step not in have:
        wanted = "the averages" if names is None else str(list(names))
        raise ValueError(
            f"there is no snapshot of {wanted} at step {step}; pass one of {have}."
        )
    return [
        (record, name)
        for record, name in allowed
        if step is None or record.step <= step
    ]


def without_others(records: Records) -> Records:
    """The records of one store; a warning names snapshots that another store wrote."""
    others = _timeline.of_another_store([*records.values()])
    if others:
        warn(
            f"the snapshots of steps {others} are skipped: another store wrote them "
            f"than the newest one, so they may come from another run. "
            f"step={others[-1]} uses them instead; mean(steps=...) uses any.",
            UserWarning,
        )
    return {s: record for s, record in records.items() if s not in others}


def _clock_of(records: list[Record]) -> _timeline.Clock:
    """The clock at the snapshots of the newest run; warnings name what is doubtful."""
    clock = _timeline.clock_of(records)
    earlier = sorted({record.step for record in records} - set(clock))
    if earlier:
        warn(
            f"the snapshots of steps {earlier} are skipped: they come from an earlier "
            f"run, for the averages were created anew after step {earlier[-1]}. "
            f"step={earlier[-1]} is the newest of that run.",
            UserWarning,
        )
    odd = _timeline.out_of_step(records, clock)
    if odd:
        warn(
            f"the averages {sorted(odd)} do not count the same optimizer steps as the "
            "others, so their iterates are not at the steps that are assumed; pass "
            "names= of averages that rejected the same iterates.",
            UserWarning,
        )
    for before, after in _timeline.uneven(records, clock):
        warn(
            f"between the snapshots of steps {before} and {after} the averages did not "
            "advance as these numbers do. If the training was started anew there, the "
            "earlier snapshots do not belong to it: remove them, and number snapshots "
            "by optimizer steps.",
            UserWarning,
        )
    return clock


def _rounding(record: Record, name: str) -> float:
    """Relative error of a snapshot.

    Half the spacing of its coarsest dtype, plus the spacing of the dtype in which it
    was accumulated, float32 or wider, plus what underflowed.
    """
    found = [jnp.dtype(leaf.dtype) for leaf in record.leaves[name]]
    spacing = max(
        float(jnp.finfo(x).eps / 2 + jnp.finfo(_numerics.float32_or_wider(x)).eps)
        for x in found
    )
    return spacing + record.underflow.get(name, 0.0)


def warn_of_residual(plan: Plan) -> None:
    """Warns if the snapshots cannot express the target."""
    if plan.residual > TOLERANCE:
        warn(
            f"the snapshots miss the weights of this average by {plan.residual:.1%}, "
            f"rounding included ({plan.rounding:.1%}): {plan.advice}",
            UserWarning,
        )


def warn(message: str, category: type[Warning]) -> None:
    """Warns at the line that called the outermost function of this room."""
    level, depth = 1, 1
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(HERE):
            level = depth + 1
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, category, stacklevel=level + 1)
