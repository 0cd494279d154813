"""What the averages of snapshots are, and their places on the clock of optimizer steps.

Every state counts its own optimizer steps since it was created. The states of one
snapshot were saved at the same moment. If two snapshots share a state, it says how many
steps passed between them. This puts all states on one clock.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from optax_avg.posthoc import _disk, _integrity
from optax_avg.posthoc._clock import Kind, Placed, Power, Recorded, Window, newest
from optax_avg.posthoc._records import PARAMETERS, Grid, Record

# Optimizer steps on the clock at each snapshot, by training step.
Clock = dict[int, int]


def clock_of(records: Sequence[Record]) -> Clock:
    """The clock at each snapshot of the newest run.

    Args:
      records: Records of the snapshots, at least one.

    Returns:
      Optimizer steps since the oldest state of the newest snapshot was created, by
      training step; negative at earlier snapshots. Snapshots of earlier runs, after
      which the states of all averages were created anew, are not in it.
    """
    *before, record = sorted(records, key=lambda record: record.step)
    clock = {record.step: max(own_step(record, name) for name in record.leaves)}
    for earlier in reversed(before):
        passed = _passed(earlier, record)
        if passed is None:
            break
        clock[earlier.step] = clock[record.step] - passed
        record = earlier
    return clock


def of_another_store(records: Sequence[Record]) -> list[int]:
    """Steps of the snapshots that another store wrote than that of the newest one.

    Records without a number come from an earlier version and belong to any store.
    """
    numbered = [r for r in sorted(records, key=lambda r: r.step) if r.store]
    return [r.step for r in numbered if r.store != numbered[-1].store]


def own_step(record: Record, name: str) -> int:
    """Optimizer steps that the state of an average counts at a snapshot.

    Steps whose iterates were rejected because they were not finite do not count:
    averages of one stride reject the same iterates.
    """
    grid = record.grids[name]
    due = (grid.step - grid.start) // grid.every
    return grid.step - grid.every * (due - record.absorbed[name])


def with_grids(record: Record) -> Record:
    """The record with grids; if it has none, every step from the first on is taken."""
    every_step = {n: Grid(t, 0, 1) for n, t in record.absorbed.items()}
    return record._replace(grids=record.grids or every_step)


def placed(record: Record, name: str, clock: Clock, kind: Kind) -> Placed:
    """An average of a snapshot, with its place on the clock."""
    grid = record.grids[name]
    origin = clock[record.step] - own_step(record, name) + grid.start
    return Placed(kind, record.absorbed[name], origin, grid.every)


def on_their_grid(averages: Sequence[Placed]) -> list[Placed]:
    """Single iterates, as the iterates of the widest stride that contains them all.

    So parameters that were kept every 100 steps stand for a training of 100 times fewer
    iterates, as in an average with ``every=100``. Other averages stay as they are.
    """
    steps = sorted({newest(a) for a in averages})
    single = [isinstance(a.kind, Window) and a.kind.k == 1 for a in averages]
    if len(steps) == 1 or not all(single):
        return [*averages]
    every = math.gcd(*(step - steps[0] for step in steps))
    origin = steps[0] - every
    placed = [(newest(a) - origin) // every for a in averages]
    return [Placed(Window(1), i, origin, every) for i in placed]


def out_of_step(records: Sequence[Record], clock: Clock) -> set[str]:
    """Names of averages whose states do not count the steps that passed.

    They rejected other iterates than the rest, or another wrapper drives them. A state
    that was created anew in between counts fewer steps, and is in step.
    """
    run = [r for r in sorted(records, key=lambda r: r.step) if r.step in clock]
    found = set()
    for before, after in itertools.pairwise(run):
        passed = clock[after.step] - clock[before.step]
        for name in set(before.leaves) & set(after.leaves) - {PARAMETERS}:
            own = own_step(after, name)
            if own > passed and own - own_step(before, name) != passed:
                found.add(name)
    return found


def uneven(records: Sequence[Record], clock: Clock) -> list[tuple[int, int]]:
    """Neighbouring snapshots between which training steps and states advance unevenly.

    A state that was created anew in between, and has counted more steps since than the
    old one had, looks like one that went on. The training steps reveal it, unless they
    advance by as many steps, in proportion to them, or at a pace that also occurs
    between other snapshots.
    """
    pairs = [*itertools.pairwise(sorted(records, key=lambda r: r.step))]
    paces, doubted = [], []
    for before, after in pairs:
        found, alike = set(), False
        for name in set(before.leaves) & set(after.leaves) - {PARAMETERS}:
            old, new = before.grids[name].step, after.grids[name].step
            if new > old and not _made_anew(before, after, name):
                pace = Fraction(after.step - before.step, new - old)
                alike |= pace == 1 or pace * old == before.step
                found.add(pace)
        paces.append(found)
        doubted.append(bool(found) and not alike and before.step in clock)
    often = Counter(itertools.chain(*paces))
    return [
        (before.step, after.step)
        for (before, after), found, doubt in zip(pairs, paces, doubted, strict=True)
        if doubt and all(often[pace] == 1 for pace in found)
    ]


def _passed(before: Record, after: Record) -> int | None:
    """Optimizer steps between two snapshots, None if they share no state."""
    shared = [name for name in before.leaves if name in after.leaves]
    shared = [name for name in shared if name != PARAMETERS] or shared
    passed = [
        own_step(after, name) - own_step(before, name)
        for name in shared
        if not _made_anew(before, after, name)
    ]
    return max(passed, default=None)


def _made_anew(before: Record, after: Record, name: str) -> bool:
    """Whether the state of an average was created anew before a later snapshot."""
    # These counters include steps whose iterates were rejected.
    old, new = before.grids[name].step, after.grids[name].step
    if new == old:
        return before.leaves[name] != after.leaves[name]
    # If training steps are the state's own steps, both advance together.
    together = old == before.step and new != after.step
    return new < old or (together and new <= after.step - before.step)


def kinds_of(
    reader: _disk.Reader, chosen: Sequence[tuple[Record, str]], clock: Clock
) -> dict[tuple[int, str], Kind]:
    """What each snapshot of an average is, by its step and name.

    Args:
      reader: Reader of the store.
      chosen: Records and names of averages, in ascending order of steps.
      clock: Clock at each of these snapshots.

    Raises:
      SnapshotError: If the weights of a recorded average cannot be read.
      ValueError: If the weights differ from those of a later snapshot.
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
            # The weights of a later snapshot begin with those of an earlier one, unless
            # the average was created anew in between.
            life = name, clock[record.step] - own_step(record, name)
            if life not in sequences:
                sequences[life] = _disk.read_sequence(reader, record, name)
            _check_begins(reader, record, name, sequences[life])
            kinds[record.step, name] = Recorded(sequences[life])
    return kinds


def _check_begins(
    reader: _disk.Reader, record: Record, name: str, later: np.ndarray
) -> None:
    """Raises a ValueError unless later weights begin with those of a snapshot."""
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
