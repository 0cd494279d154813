"""Where the averages of snapshots lie on the clock of optimizer steps.

Every state counts its own optimizer steps from the moment at which it was made. The
states of one snapshot were read at one moment, and a state that two snapshots share
says how many steps passed between them: this puts all states on one clock.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from optax_avg.posthoc import _disk
from optax_avg.posthoc._clock import Kind, Placed

PARAMETERS = "parameters"  # the name of parameters beside the averages


def clock_of(records: Sequence[_disk.Record]) -> dict[int, int]:
    """The clock at each snapshot of the newest run, by step of the training.

    Args:
      records: of the snapshots; at least one.

    Returns:
      Optimizer steps since the oldest state of the newest snapshot was made; negative
      at snapshots from before. Earlier runs, after which the states of all averages
      were made anew, are not in it.
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


def of_another_store(records: Sequence[_disk.Record]) -> list[int]:
    """Steps of the snapshots that were not written by the store of the newest one.

    A record without a number is of an earlier version, and belongs to any store.
    """
    numbered = [r for r in sorted(records, key=lambda r: r.step) if r.store]
    return [r.step for r in numbered if r.store != numbered[-1].store]


def own_step(record: _disk.Record, name: str) -> int:
    """Optimizer steps that the state of an average counts at a snapshot.

    Steps whose iterates the average left out, because they were not finite, do not
    count: averages of one stride leave out the same ones.
    """
    grid = record.grids[name]
    due = (grid.step - grid.start) // grid.every
    return grid.step - grid.every * (due - record.absorbed[name])


def with_grids(record: _disk.Record) -> _disk.Record:
    """A record as it is, or one from before with every step from the first on."""
    every_step = {n: _disk.Grid(t, 0, 1) for n, t in record.absorbed.items()}
    return record._replace(grids=record.grids or every_step)


def placed(
    record: _disk.Record, name: str, clock: dict[int, int], kind: Kind
) -> Placed:
    """An average of a snapshot on the clock."""
    grid = record.grids[name]
    origin = clock[record.step] - own_step(record, name) + grid.start
    return Placed(kind, record.absorbed[name], origin, grid.every)


def out_of_step(records: Sequence[_disk.Record], clock: dict[int, int]) -> set[str]:
    """Names of averages whose states do not count the steps that passed.

    They left out other iterates than the rest, or another wrapper drives them. A state
    that was made anew in between counts fewer steps than passed, and is in step.
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


def uneven(
    records: Sequence[_disk.Record], clock: dict[int, int]
) -> list[tuple[int, int]]:
    """Neighbouring snapshots between which labels and states did not advance alike.

    A state that was made anew in between, and has counted more steps since than the old
    one had, looks like one that went on. Labels give it away, unless they advance by as
    many steps, in proportion to them, or at a pace that is seen elsewhere.
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


def _passed(before: _disk.Record, after: _disk.Record) -> int | None:
    """Optimizer steps between two snapshots, None if no state lived through them."""
    shared = [name for name in before.leaves if name in after.leaves]
    shared = [name for name in shared if name != PARAMETERS] or shared
    passed = [
        own_step(after, name) - own_step(before, name)
        for name in shared
        if not _made_anew(before, after, name)
    ]
    return max(passed, default=None)


def _made_anew(before: _disk.Record, after: _disk.Record, name: str) -> bool:
    """Whether the state of an average is another one at a later snapshot."""
    # Of its own steps it counts those, too, whose iterates were not finite.
    old, new = before.grids[name].step, after.grids[name].step
    if new == old:
        return before.leaves[name] != after.leaves[name]
    # Where the training's steps are the state's own, they go on together.
    together = old == before.step and new != after.step
    return new < old or (together and new <= after.step - before.step)
