"""The one writer of a directory of snapshots: its lock, and what it replaces.

A snapshot of a step that is there already is written beside it, as ``<step>.new``, and
takes its place when it is complete. At any moment one of the two can be read.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from optax_avg.posthoc import _disk, _integrity
from optax_avg.posthoc._disk import LEFT_OVER, NEW, REMOVED

LOCK = "writer.lock"
LONGEST = 2000  # bytes of an error that all processes raise


class Writer(NamedTuple):
    """What writes to a directory, the lock on it, and the number of its store."""

    directory: str
    checkpointer: Any
    lock: Any
    number: int


def filelock() -> Any:
    """The package filelock, which only the store needs."""
    try:
        import filelock
    except ImportError as error:
        raise ImportError(
            'snapshots need filelock; write pip install "optax_avg[posthoc]".'
        ) from error
    return filelock


def open_writer(directory: str) -> Writer:
    """The one writer of a directory, which is made where there is none.

    What earlier writers left unfinished is finished or removed.

    Raises:
      RuntimeError: If there is another one; in all processes.
    """
    ocp, lock = _disk.orbax(), None
    if not _disk.is_remote(directory):
        path = os.path.join(directory, LOCK)
        lock = None if jax.process_index() else filelock().FileLock(path, timeout=0)
    number = _agreed(lambda: _prepare(directory, lock))
    checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
    return Writer(directory, checkpointer, lock, number)


def close_writer(writer: Writer) -> None:
    """Lets others write to the directory."""
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
    record: _disk.Record,
    averages: dict[str, dict[_disk.Path, jax.Array]],
    sequences: dict[str, np.ndarray],
) -> None:
    """Begins to write a snapshot; one of the same step stays until this one is whole.

    Raises:
      FileExistsError: If what has the name of the step is not a snapshot.
    """
    ocp = _disk.orbax()
    taken = _agreed(lambda: _is_taken(writer.directory, record.step))
    # Orbax does not write arrays without elements.
    tree = {
        name: _disk.nested({path: x for path, x in leaves.items() if x.size})
        for name, leaves in averages.items()
    }
    items = {_disk.TREE: ocp.args.PyTreeSave(tree)}
    if sequences:
        items[_disk.SEQUENCES] = ocp.args.PyTreeSave(sequences)
        digests = {name: _integrity.digest(x) for name, x in sequences.items()}
        record = record._replace(digests=digests)
    record = record._replace(store=writer.number)
    items[_disk.RECORD] = ocp.args.JsonSave(_disk.sealed(record))
    path = f"{writer.directory}/{record.step}{NEW if taken else ''}"
    writer.checkpointer.save(path, args=ocp.args.Composite(**items))


def wait(writer: Writer) -> None:
    """Waits for the snapshot in flight.

    It takes its place then, or at the next save where there are several processes.
    """
    writer.checkpointer.wait_until_finished()
    # One of several must not rename what another one may be reading.
    if jax.process_count() == 1:
        _settle(writer.directory)


def remove_after(writer: Writer, step: int) -> None:
    """Removes the snapshots of later steps."""

    def remove() -> int:
        _settle(writer.directory)
        later = [s for s in _disk.steps_of(writer.directory) if s > step]
        for s in reversed(later):
            _remove(_disk.folder(writer.directory) / str(s))
        return len(later)

    _agreed(remove)


def _prepare(directory: str, lock: Any) -> int:
    """Takes the lock, clears up after writers that were killed; the store's number."""
    _disk.folder(directory).mkdir(parents=True, exist_ok=True)
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
        for entry in _disk.folder(directory).iterdir():
            if LEFT_OVER.fullmatch(entry.name) and _is_ours(entry):
                entry.rmtree()
        return _disk.number_of(directory)
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def _is_ours(entry: Any) -> bool:
    """Whether a directory holds a part of a snapshot, not of another checkpoint."""
    ours = (_disk.TREE, _disk.RECORD, _disk.SEQUENCES)
    return entry.is_dir() and any(x.name.startswith(ours) for x in entry.iterdir())


def _is_taken(directory: str, step: int) -> int:
    """Whether there is a snapshot of this step."""
    _settle(directory)
    path = _disk.folder(directory) / str(step)
    if path.exists() and not _disk.is_snapshot(path):
        raise FileExistsError(
            f"{path} is not a snapshot; give the store a directory of its own."
        )
    return int(path.exists())


def _settle(directory: str) -> int:
    """Puts complete snapshots of ``<step>.new`` in the place of ``<step>``."""
    for entry in list(_disk.folder(directory).iterdir()):
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
    return 0


def _remove(path: Any) -> None:
    """Removes a snapshot; a kill on the way leaves no half of it under its name."""
    _set_aside(path).rmtree()


def _set_aside(path: Any) -> Any:
    aside = path.parent / (path.name + REMOVED)
    if aside.exists():
        aside.rmtree()
    path.rename(aside)
    return aside


def _agreed(action: Callable[[], int]) -> int:
    """What ``action`` returns in the first process, in all processes.

    Raises:
      Exception: What it raises; in the others RuntimeError or OSError with its message.
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
