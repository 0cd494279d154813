"""Snapshots as Orbax checkpoints: one directory for each step, read leaf by leaf.

A snapshot has a tree of averages, the weight sequences of averages without a closed
form, and a record in JSON, with numbers by which leaves and sequences are recognised.
"""

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_avg._checkpoints.leaves import Leaf, Path, flat, nested
from optax_avg._checkpoints.orbax import (
    RECORD,
    AnyPath,
    Checkpointer,
    anywhere,
    is_remote,
    orbax,
)
from optax_avg.posthoc import _integrity
from optax_avg.posthoc._records import Record, SnapshotError, unsealed

TREE, SEQUENCES = "averages", "sequences"  # items of a snapshot beside its record
FILE = "metadata"  # name that Orbax gives the file in the directory of the record
NEW = ".new"  # suffix of a snapshot that will replace another one
REMOVED = ".removed"  # suffix of a snapshot that is replaced or removed
STEP = re.compile(rf"(0|[1-9]\d*)({re.escape(NEW)})?")
LEFT_OVER = re.compile(rf"\d+({NEW})?(\.orbax-checkpoint-tmp.*|{REMOVED})")

# Path of a directory as users pass it.
AnyDirectory = str | os.PathLike[str]
Shardings = Sequence[jax.sharding.Sharding]


class Reader(NamedTuple):
    """A directory of snapshots, and the Orbax checkpointer that restores from it."""

    directory: str
    checkpointer: Checkpointer


def absolute(directory: AnyDirectory) -> str:
    """The path of a store in the form that Orbax needs.

    Raises:
      ValueError: If it cannot be the path of a store.
    """
    path = os.fspath(directory)
    if is_remote(path):
        return path
    if not path or (os.sep != "\\" and "\\" in path):
        # Orbax would take a backslash for the end of a directory's name.
        raise ValueError(f"{path!r} cannot be the directory of a store; pass another.")
    return os.path.abspath(path)


@contextlib.contextmanager
def reader_of(directory: str) -> Iterator[Reader]:
    """A reader of the snapshots in a directory.

    Raises:
      ValueError: If there is no such directory.
    """
    ocp = orbax()
    if not is_remote(directory) and not os.path.isdir(directory):
        raise ValueError(f"there is no directory {directory}; save a snapshot first.")
    checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    try:
        yield Reader(directory, checkpointer)
    finally:
        checkpointer.close()


def steps_of(directory: str) -> list[int]:
    """Steps of the finished snapshots, in ascending order."""
    if not anywhere(directory).is_dir():
        return []
    entries = [x for x in anywhere(directory).iterdir() if STEP.fullmatch(x.name)]
    return sorted({int(x.name.removesuffix(NEW)) for x in entries if is_snapshot(x)})


def misnamed(directory: str) -> list[str]:
    """Names of directories that hold a snapshot but are not named by its step."""
    return sorted(
        entry.name
        for entry in anywhere(directory).iterdir()
        if not STEP.fullmatch(entry.name)
        and not LEFT_OVER.fullmatch(entry.name)
        and is_snapshot(entry)
    )


def number_of(directory: str) -> int:
    """The number of a store: that of its newest snapshot, or a new one."""
    for step in reversed(steps_of(directory)):
        try:
            text = (anywhere(directory) / str(step) / RECORD / FILE).read_text()
            number = unsealed(json.loads(text)).store
        except (OSError, AttributeError, KeyError, TypeError, ValueError):
            continue  # an earlier record may be undamaged
        if number:
            return number
    return 1 + secrets.randbelow(2**31 - 1)


def is_snapshot(path: AnyPath) -> bool:
    """Whether a directory is a finished snapshot, which may have been damaged."""
    if not path.is_dir() or not orbax().utils.is_checkpoint_finalized(path):
        return False
    return (path / TREE).exists() or (path / RECORD).exists()


def read_record(reader: Reader, step: int) -> Record:
    """The record of a snapshot.

    Raises:
      SnapshotError: If it cannot be read or is not what was written.
    """
    found = _restore(reader, step, RECORD, orbax().args.JsonRestore())
    try:
        record = unsealed(found)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        cause = str(error) if isinstance(error, ValueError) else repr(error)
        raise SnapshotError(step, f"its record was changed ({cause})") from error
    if record.step != step:
        raise SnapshotError(
            step, f"its record is that of step {record.step}, as if it were renamed"
        )
    return record


def read_sequence(reader: Reader, record: Record, name: str) -> np.ndarray:
    """The weight that each iterate had when it was the newest, float64, shape (n,).

    Raises:
      SnapshotError: If the weights cannot be read or are not what was written.
    """
    ocp = orbax()
    args = ocp.args.PyTreeRestore(
        item={name: np.zeros(record.absorbed[name])},
        restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)},
        partial_restore=True,
    )
    found = _restore(reader, record.step, SEQUENCES, args, name)
    whole = isinstance(found, np.ndarray) and found.shape == (record.absorbed[name],)
    if whole and record.checksum:
        whole = record.digests.get(name) == _integrity.digest(found)
    if not whole:
        raise SnapshotError(
            record.step, f"the recorded weights of {name!r} were changed"
        )
    return found


def read_leaves(
    reader: Reader,
    record: Record,
    name: str,
    indices: Sequence[int],
    shardings: Shardings,
) -> list[jax.Array]:
    """Some leaves of an average.

    Args:
      reader: Reader of the store.
      record: Record of the snapshot.
      name: Name of the average.
      indices: Places of the leaves in the record.
      shardings: Sharding of each of these leaves.

    Raises:
      SnapshotError: If a leaf cannot be read or is not what was written.
    """
    ocp = orbax()
    leaves = [record.leaves[name][i] for i in indices]
    item, how = {}, {}
    for leaf, sharding in zip(leaves, shardings, strict=True):
        if 0 not in leaf.shape:
            item[leaf.path] = jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype))
            how[leaf.path] = ocp.ArrayRestoreArgs(
                restore_type=jax.Array, sharding=sharding
            )
    found: dict[Path, Any] = {
        leaf.path: jnp.zeros(leaf.shape, leaf.dtype)
        for leaf in leaves
        if leaf.path not in item
    }
    if item:
        args = ocp.args.PyTreeRestore(
            item={name: nested(item)},
            restore_args={name: nested(how)},
            partial_restore=True,
        )
        found |= flat(_restore(reader, record.step, TREE, args, name))
    arrays: list[Any] = [found.get(leaf.path) for leaf in leaves]
    _check(record.step, name, leaves, arrays)
    return arrays


def _check(step: int, name: str, leaves: list[Leaf], arrays: list[Any]) -> None:
    """Raises a SnapshotError if an array is not the leaf that was written."""
    for leaf, x in zip(leaves, arrays, strict=True):
        alike = isinstance(x, jax.Array) and x.shape == leaf.shape
        if not alike or str(x.dtype) != leaf.dtype:
            raise SnapshotError(
                step,
                f"{place_of(name, leaf.path)} has not the shape and dtype of its "
                "record",
            )
    numbers = np.asarray(_integrity.signature(arrays)[0]).tolist()
    for leaf, number in zip(leaves, numbers, strict=True):
        if leaf.fingerprint not in (None, number):
            raise SnapshotError(
                step,
                f"the numbers of {place_of(name, leaf.path)} are not those of its "
                "record",
            )


def place_of(name: str, path: Path) -> str:
    """An average and the path of a leaf in it, for messages."""
    return "/".join((name, *path))


def _restore(
    reader: Reader, step: int, item: str, args: Any, name: str | None = None
) -> Any:
    """An item of a snapshot, or the part of it that belongs to one average."""
    composite = orbax().args.Composite(**{item: args})
    try:
        path = anywhere(reader.directory) / f"{step}{NEW}"
        if not is_snapshot(path):
            path = anywhere(reader.directory) / str(step)
        found = reader.checkpointer.restore(path, args=composite)[item]
        return found if name is None else found[name]
    except Exception as error:  # a broken file may raise anything in Orbax
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise SnapshotError(step, f"it cannot be read ({lines[0]})") from error
