"""What a snapshot says about itself: its record, in JSON, under a checksum."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from optax_avg._checkpoints.leaves import Leaf
from optax_avg.posthoc._integrity import Json, digest

# Fields of records that were written before there was a checksum.
UNSEALED = {"step", "absorbed", "kinds", "leaves"}
PARAMETERS = "parameters"  # name of parameters that are kept beside the averages

# ``{"power": gamma}``, ``{"window": k}`` or ``{"recorded": True}``.
KindRecord = dict[str, Any]


class Grid(NamedTuple):
    """The optimizer steps that the iterates of an average come from.

    Attributes:
      step: Optimizer steps that the state of the average counts at the snapshot.
      start: Steps at the beginning that the average skipped.
      every: Steps between iterates.
    """

    step: int
    start: int
    every: int


class Record(NamedTuple):
    """What a snapshot says about itself.

    Attributes:
      step: Training step of the snapshot.
      absorbed: Number of iterates in each average, by name.
      kinds: What each average is, by name.
      leaves: Leaves of each average, by name, in the order of the tree.
      grids: Steps that the iterates of each average come from, by name; empty in
        records that were written without them.
      digests: Digests of the recorded weight sequences, by name.
      checksum: Digest of all other fields; empty in records that were written without
        one.
      underflow: Relative error of each average, by name, from numbers that are too
        small for its dtypes; empty in records that were written without it.
      store: Number that all snapshots of one store share; 0 in records that were
        written without it.
    """

    step: int
    absorbed: dict[str, int]
    kinds: dict[str, KindRecord]
    leaves: dict[str, list[Leaf]]
    grids: dict[str, Grid]
    digests: dict[str, str]
    checksum: str
    underflow: dict[str, float]
    store: int


# Records by the training step of their snapshot, ascending.
Records = dict[int, Record]


class SnapshotError(Exception):
    """A snapshot that cannot be read as it was written."""

    def __init__(self, step: int, cause: str) -> None:
        super().__init__(cause)
        self.step = step


class NoSnapshotError(ValueError):
    """A directory holds no snapshot that can be read."""


def sealed(record: Record) -> dict[str, Json]:
    """The record as JSON stores it, with its checksum."""
    content = json.loads(json.dumps(record._replace(checksum="")._asdict()))
    return content | {"checksum": digest(content)}


def unsealed(found: dict[str, Any]) -> Record:
    """The record that JSON stores.

    Raises:
      AttributeError, KeyError, TypeError, ValueError: If it is not what was written.
    """
    content = found | {"checksum": ""}
    old = set(found) == UNSEALED
    if not old and found["checksum"] != digest(content):
        raise ValueError("its checksum is not the one that was written")
    leaves = {
        # Fingerprints in records without a checksum were made by another formula.
        name: [Leaf(tuple(p), tuple(s), d, None if old else n) for p, s, d, n in leaves]
        for name, leaves in found["leaves"].items()
    }
    names = set(leaves)
    if names != set(found["absorbed"]) or names != set(found["kinds"]):
        raise ValueError("its parts name different averages")
    bare = {"grids": {}, "digests": {}, "checksum": "", "underflow": {}, "store": 0}
    filled: dict[str, Any] = bare | found
    grids = {name: Grid(*grid) for name, grid in filled["grids"].items()}
    if not old and names != set(grids):
        raise ValueError("its parts name different averages")
    filled |= {"leaves": leaves, "grids": grids}
    return Record(**{name: filled[name] for name in Record._fields})


def averages_of(
    records: Records, names: Sequence[str] | None
) -> list[tuple[Record, str]]:
    """Records and names of averages; by default of all averages but parameters."""
    return [
        (record, name)
        for record in records.values()
        for name in record.leaves
        if name in (names or [n for n in record.leaves if n != PARAMETERS])
    ]


def names_in(records: Records) -> list[str]:
    """The names of all averages in the records, parameters included."""
    return sorted({name for record in records.values() for name in record.leaves})
