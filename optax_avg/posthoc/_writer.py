"""The one writer of a directory of snapshots, its lock and its replacements.

A snapshot that replaces one of the same step is written to ``<step>.new`` and renamed
when it is complete. At any moment one of the two can be read.
"""

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from optax_avg._checkpoints.leaves import Path, nested
from optax_avg._checkpoints.orbax import (
    RECORD,
    AnyPath,
    Checkpointer,
    anywhere,
    is_remote,
    orbax,
)
from optax_avg._checkpoints.sources import imported
from optax_avg.posthoc import _disk, _integrity
from optax_avg.posthoc._disk import LEFT_OVER, NEW, REMOVED, SEQUENCES, TREE
from optax_avg.posthoc._records import Record, sealed

LOCK = "writer.lock"
LONGEST = 2000  # bytes of an error message that all processes raise


# A lock of the package filelock, which is an optional dependency.
Lock = Any


class Writer(NamedTuple):
    """The one writer of a directory.

    Attributes:
      directory: Absolute path of the store.
      checkpointer: Orbax checkpointer that writes in the background.
      lock: Lock on the directory, None for a remote one and in later processes.
      number: Number of the store, which each record carries.
    """

    directory: str
    checkpointer: Checkpointer
    lock: Lock | None
    number: int


def filelock() -> ModuleType:
    """The package filelock, which is an optional dependency.

    Raises:
      ImportError: If it is not installed.
    """
    return imported("filelock", "snapshots need filelock", "posthoc")


def open_writer(directory: str) -> Writer:
    """Takes the lock of a directory, which is created if necessary.

    Finishes or removes what earlier writers left unfinished.

    Raises:
      RuntimeError: If the directory already has a writer; in all processes.
    """
    ocp, lock = orbax(), None
    if not is_remote(directory):
        path = os.path.join(directory, LOCK)
        lock = None if jax.process_index() else filelock().FileLock(path, timeout=0)
    number = _agreed(lambda: _prepare(directory, lock))
    checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
    return Writer(directory, checkpointer, lock, number)


def close_writer(writer: Writer) -> None:
    """Waits for the snapshot in flight and releases the lock."""
    try:
        wait(writer)
        if jax.process_index() == 0:
            _settle(writer.directory)
        writer.checkpointer.close()
    finally:
        if writer.lock is not None:
            writer.lock.release()


def write(
    writer: Writer,
    record: Record,
    averages: dict[str, dict[Path, jax.Array]],
    sequences: dict[str, np.ndarray],
) -> None:
    """Begins to write a snapshot.

    A snapshot of the same step stays until the new one is complete.

    Args:
      writer: Writer of the store.
      record: Record of the snapshot, without the number of the store and digests.
      averages: Leaves of each average by path.
      sequences: Weights of recorded averages, float64 of shape (absorbed,).

    Raises:
      FileExistsError: If the directory of the step holds something else.
    """
    ocp = orbax()
    taken = _agreed(lambda: _is_taken(writer.directory, record.step))
    # Orbax does not write arrays without elements.
    tree = {
        name: nested({path: x for path, x in leaves.items() if x.size})
        for name, leaves in averages.items()
    }
    items = {TREE: ocp.args.PyTreeSave(tree)}
    if sequences:
        items[SEQUENCES] = ocp.args.PyTreeSave(sequences)
        digests = {name: _integrity.digest(x) for name, x in sequences.items()}
        record = record._replace(digests=digests)
    record = record._replace(store=writer.number)
    items[RECORD] = ocp.args.JsonSave(sealed(record))
    path = f"{writer.directory}/{record.step}{NEW if taken else ''}"
    writer.checkpointer.save(path, args=ocp.args.Composite(**items))


def wait(writer: Writer) -> None:
    """Waits for the snapshot in flight.

    With one process the snapshot then takes its place. With several processes it does
    so at the next save.
    """
    writer.checkpointer.wait_until_finished()
    # A process must not rename a directory that another one may be reading.
    if jax.process_count() == 1:
        _settle(writer.directory)


def remove_after(writer: Writer, step: int) -> None:
    """Removes the snapshots of later steps."""

    def remove() -> int:
        _settle(writer.directory)
        later = [s for s in _disk.steps_of(writer.directory) if s > step]
        for s in reversed(later):
            _remove(anywhere(writer.directory) / str(s))
        return len(later)

    _agreed(remove)


def _prepare(directory: str, lock: Lock | None) -> int:
    """Takes the lock and cleans up after writers that were killed.

    Returns:
      The number of the store.
    """
    anywhere(directory).mkdir(parents=True, exist_ok=True)
    if lock is not None:
        try:
            lock.acquire()
        except filelock().Timeout as error:
            raise RuntimeError(
                f"{directory} already has a writer; give each run a directory of its "
                "own, or close the other store."
            ) from error
    try:
        _settle(directory)
        for entry in anywhere(directory).iterdir():
            if LEFT_OVER.fullmatch(entry.name) and _is_ours(entry):
                entry.rmtree()
        return _disk.number_of(directory)
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def _is_ours(entry: AnyPath) -> bool:
    """Whether a directory holds a part of a snapshot, and not of another checkpoint."""
    ours = (TREE, RECORD, SEQUENCES)
    return entry.is_dir() and any(x.name.startswith(ours) for x in entry.iterdir())


def _is_taken(directory: str, step: int) -> int:
    """Whether there is a snapshot of this step, 0 or 1.

    Raises:
      FileExistsError: If the directory of the step holds something else.
    """
    _settle(directory)
    path = anywhere(directory) / str(step)
    if path.exists() and not _disk.is_snapshot(path):
        raise FileExistsError(
            f"{path} is not a snapshot; give the store a directory of its own."
        )
    return int(path.exists())


def _settle(directory: str) -> None:
    """Moves complete snapshots of ``<step>.new`` to ``<step>``."""
    for entry in list(anywhere(directory).iterdir()):
        step = entry.name.removesuffix(NEW)
        if step == entry.name or not step.isdecimal() or not _disk.is_snapshot(entry):
            continue
        place = entry.parent / step
        if place.exists():
            old = _set_aside(place)
            entry.rename(place)
            old.rmtree()
        else:
            entry.rename(place)


def _remove(path: AnyPath) -> None:
    """Removes a snapshot; a kill leaves no half of it under its name."""
    _set_aside(path).rmtree()


def _set_aside(path: AnyPath) -> AnyPath:
    """Renames a snapshot that is replaced or removed, and returns its new path."""
    aside = path.parent / (path.name + REMOVED)
    if aside.exists():
        aside.rmtree()
    path.rename(aside)
    return aside


def _agreed(action: Callable[[], int]) -> int:
    """Runs ``action`` in the first process and returns its result in all processes.

    Raises:
      Exception: The error of ``action``. The other processes raise a RuntimeError or
        an OSError with its message.
    """
    if jax.process_count() == 1:
        return action()
    value, failed, text, error = 0, 0, b"", None
    if jax.process_index() == 0:
        try:
            value = action()
        except Exception as raised:
            error, text = raised, str(raised).encode()[:LONGEST]
            failed = 2 if isinstance(raised, OSError) else 1
    sent = np.frombuffer(text.ljust(LONGEST, b"\0"), np.uint8)
    value, failed, sent = multihost_utils.broadcast_one_to_all(
        (np.int32(value), np.int32(failed), sent)
    )
    if error is not None:
        raise error
    if failed:
        said = np.asarray(sent).tobytes().rstrip(b"\0").decode(errors="replace")
        raise (OSError if failed == 2 else RuntimeError)(said)
    return int(value)
