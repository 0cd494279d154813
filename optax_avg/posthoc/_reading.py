"""Records of the snapshots that can be read, and what is made of them.

A snapshot that proves broken is skipped, and the rest is done again without it.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from optax_avg.posthoc import _disk
from optax_avg.posthoc._plan import Plan, planned, warn
from optax_avg.posthoc._records import Record, Records, SnapshotError
from optax_avg.posthoc._target import Request
from optax_avg.posthoc._timeline import with_grids

RENEWALS = 10  # attempts at a snapshot that is replaced while it is read

_T = TypeVar("_T")


def with_plan(
    directory: str,
    request: Request,
    use: Callable[[_disk.Reader, Records, Plan], _T],
) -> _T:
    """Plans an average and returns what ``use`` makes of the plan.

    If a snapshot proves broken on the way, plans again without it.
    """
    with _disk.reader_of(directory) as reader:

        def made(left: Records) -> _T:
            return use(reader, left, planned(reader, left, request))

        return without_broken(reader, records_of(reader), made)


def records_of(reader: _disk.Reader, steps: Sequence[int] | None = None) -> Records:
    """Records of the snapshots that can be read.

    Warnings name the snapshots that cannot be read, those without checksums, and those
    whose directory is not named by a step.

    Args:
      reader: Reader of the store.
      steps: Steps of the snapshots; by default all.
    """
    records = {}
    misnamed = _disk.misnamed(reader.directory)
    if misnamed:
        warn(
            f"{reader.directory} holds snapshots that are skipped because their "
            f"directories are not named by their steps alone: {', '.join(misnamed)}. "
            "Rename them as they were, for instance 0200 to 200.",
            RuntimeWarning,
        )
    for step in _disk.steps_of(reader.directory):
        if steps is not None and step not in steps:
            continue
        try:
            records[step] = _record_of(reader, step)
        except SnapshotError as broken:
            _report(broken)
    bare = [step for step, record in records.items() if not record.checksum]
    if bare:
        warn(
            f"the snapshots of steps {bare} were saved without checksums, and without "
            "the optimizer steps that their averages hold; damage to them is not "
            "noticed, and all steps from the first on are assumed.",
            RuntimeWarning,
        )
    return records


def _record_of(reader: _disk.Reader, step: int) -> Record:
    """The record of a snapshot, which a writer may be replacing.

    Raises:
      SnapshotError: If two attempts fail.
    """
    try:
        return with_grids(_disk.read_record(reader, step))
    except SnapshotError:
        return with_grids(_disk.read_record(reader, step))


def _report(broken: SnapshotError) -> None:
    """Warns of a snapshot that is skipped."""
    warn(
        f"the snapshot of step {broken.step} is skipped because it is damaged: "
        f"{broken}.",
        RuntimeWarning,
    )


def without_broken(
    reader: _disk.Reader, records: Records, make: Callable[[Records], _T]
) -> _T:
    """Returns ``make(records)``, without the snapshots that prove broken.

    A writer may have replaced a snapshot after its record was read. The record is
    therefore read again once, and as often as it has changed, before the snapshot is
    skipped.
    """
    failed: Counter[int] = Counter()
    while True:
        try:
            return make(records)
        except SnapshotError as broken:
            step = broken.step
            if step not in records:  # it would fail again in the same way
                raise
            failed[step] += 1
            renewed = _renewed(reader, step)
            if renewed is not None and (
                failed[step] == 1
                or (renewed != records[step] and failed[step] < RENEWALS)
            ):
                records = {**records, step: renewed}
                continue
            _report(broken)
            records = {s: r for s, r in records.items() if s != step}


def _renewed(reader: _disk.Reader, step: int) -> Record | None:
    try:
        return _record_of(reader, step)
    except SnapshotError:
        return None
