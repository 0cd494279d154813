"""What the averages of snapshots are, from their records."""

from collections.abc import Sequence

import numpy as np

from optax_avg.posthoc import _disk, _integrity
from optax_avg.posthoc._clock import Kind, Power, Recorded, Window
from optax_avg.posthoc._records import Record
from optax_avg.posthoc._timeline import Clock, own_step


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
