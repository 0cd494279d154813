"""Snapshots as Orbax checkpoints: one directory a step, leaf by leaf on the way back.

A snapshot has a tree of averages, the weight sequences of averages without a closed
form, and a record in JSON, with numbers by which leaves and sequences are known again.
The record has a checksum of itself.
"""

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_avg.posthoc import _integrity

TREE, SEQUENCES, RECORD = "averages", "sequences", "record"
FILE = "metadata"  # in the directory of the record; Orbax calls it so
NEW = ".new"  # ends the name of a snapshot that replaces one
REMOVED = ".removed"  # and that of one that is replaced or removed
STEP = re.compile(rf"(0|[1-9]\d*)({re.escape(NEW)})?")
LEFT_OVER = re.compile(rf"\d+({NEW})?(\.orbax-checkpoint-tmp.*|{REMOVED})")
UNSEALED = {"step", "absorbed", "kinds", "leaves"}  # in records without a checksum
Path = tuple[str, ...]


class Leaf(NamedTuple):
    """An array in a snapshot, and the number by which it is known again, if any."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    fingerprint: int | None


class Grid(NamedTuple):
    """Which optimizer steps the iterates of an average come from.

    Attributes:
      step: optimizer steps that its state counts at the snapshot.
      start: of these, left out at the beginning.
      every: between iterates.
    """

    step: int
    start: int
    every: int


class Record(NamedTuple):
    """What a snapshot says about itself.

    Attributes:
      step: of the training.
      absorbed: iterates in each average, by name.
      kinds: what each average is: ``{"power": gamma}``, ``{"window": k}`` or
        ``{"recorded": True}``.
      leaves: of each average, in the order of the tree.
      grids: where the iterates of each average come from, by name; empty in records
        that were written without them.
      digests: of the weight sequences, by name.
      checksum: of all the rest; empty in records that were written without one.
      underflow: relative error of each average, by name, from numbers that are too
        small for its dtypes; empty in records that were written without it.
      store: a number that all snapshots of one store share; 0 in records that were
        written without it.
    """

    step: int
    absorbed: dict[str, int]
    kinds: dict[str, dict[str, Any]]
    leaves: dict[str, list[Leaf]]
    grids: dict[str, Grid]
    digests: dict[str, str]
    checksum: str
    underflow: dict[str, float]
    store: int


class Reader(NamedTuple):
    """A directory and what restores from it."""

    directory: str
    checkpointer: Any


class SnapshotError(Exception):
    """A snapshot that cannot be read as it was written."""

    def __init__(self, step: int, cause: str) -> None:
        super().__init__(cause)
        self.step = step


def orbax() -> Any:
    """Orbax, which only snapshots need."""
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError(
            'snapshots need Orbax; write pip install "optax_avg[posthoc]".'
        ) from error
    return orbax.checkpoint


def is_remote(directory: str) -> bool:
    """Whether a directory is an address such as ``gs://bucket/run``."""
    return "://" in directory


def absolute(directory: Any) -> str:
    """The directory as Orbax wants it."""
    path = os.fspath(directory)
    if is_remote(path):
        return path
    if not path or (os.sep != "\\" and "\\" in path):
        # Orbax would take a backslash for the end of a directory's name.
        raise ValueError(f"{path!r} cannot be the directory of a store; pass another.")
    return os.path.abspath(path)


def folder(directory: str) -> Any:
    """The directory as a path that may be on a disk or in a bucket."""
    orbax()
    from etils import epath  # a part of Orbax's interface

    return epath.Path(directory)


def is_store(directory: str) -> bool:
    """Whether there are snapshots in a directory."""
    path = absolute(directory)
    return any((folder(path) / str(s) / RECORD).exists() for s in steps_of(path))


@contextlib.contextmanager
def reader_of(directory: str) -> Iterator[Reader]:
    """What reads the snapshots of a directory.

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
    if not folder(directory).is_dir():
        return []
    entries = [x for x in folder(directory).iterdir() if STEP.fullmatch(x.name)]
    return sorted({int(x.name.removesuffix(NEW)) for x in entries if is_snapshot(x)})


def misnamed(directory: str) -> list[str]:
    """Names of snapshots that have other names than those of their steps."""
    return sorted(
        entry.name
        for entry in folder(directory).iterdir()
        if not STEP.fullmatch(entry.name)
        and not LEFT_OVER.fullmatch(entry.name)
        and is_snapshot(entry)
    )


def number_of(directory: str) -> int:
    """The number of a store: that of its newest snapshot, or else a new one."""
    for step in reversed(steps_of(directory)):
        try:
            text = (folder(directory) / str(step) / RECORD / FILE).read_text()
            number = _unsealed(json.loads(text)).store
        except (OSError, AttributeError, KeyError, TypeError, ValueError):
            continue  # the one before may be whole
        if number:
            return number
    return 1 + secrets.randbelow(2**31 - 1)


def is_snapshot(path: Any) -> bool:
    """Whether a directory is a finished snapshot, which may have been damaged."""
    if not path.is_dir() or not orbax().utils.is_checkpoint_finalized(path):
        return False
    return (path / TREE).exists() or (path / RECORD).exists()


def sealed(record: Record) -> dict[str, Any]:
    """The record as JSON has it, with its checksum."""
    content = json.loads(json.dumps(record._replace(checksum="")._asdict()))
    return content | {"checksum": _integrity.digest(content)}


def read_record(reader: Reader, step: int) -> Record:
    """The record of a snapshot.

    Raises:
      SnapshotError: If it cannot be read or is not what was written.
    """
    found = _restore(reader, step, RECORD, orbax().args.JsonRestore())
    try:
        record = _unsealed(found)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        cause = str(error) if isinstance(error, ValueError) else repr(error)
        raise SnapshotError(step, f"its record was changed ({cause})") from error
    if record.step != step:
        raise SnapshotError(
            step, f"its record is that of step {record.step}, as if it were renamed"
        )
    return record


def _unsealed(found: dict[str, Any]) -> Record:
    """The record that JSON holds, if it is what was written."""
    content = found | {"checksum": ""}
    old = set(found) == UNSEALED
    if not old and found["checksum"] != _integrity.digest(content):
        raise ValueError("its checksum is not the one that was written")
    leaves = {
        # Numbers of records without a checksum were made by another formula.
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


def read_sequence(reader: Reader, record: Record, name: str) -> np.ndarray:
    """The weights that an average gave to its newest iterates, float64.

    Raises:
      SnapshotError: If they cannot be read or are not what was written.
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
    reader: Reader, record: Record, name: str, indices: list[int], shardings: list[Any]
) -> list[jax.Array]:
    """Some leaves of an average.

    Raises:
      SnapshotError: If one cannot be read or is not what was written.
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
                step, f"{_where(name, leaf)} has not the shape and dtype of its record"
            )
    numbers = np.asarray(_integrity.signature(arrays)[0]).tolist()
    for leaf, number in zip(leaves, numbers, strict=True):
        if leaf.fingerprint not in (None, number):
            raise SnapshotError(
                step, f"the numbers of {_where(name, leaf)} are not those of its record"
            )


def _where(name: str, leaf: Leaf) -> str:
    return "/".join((name, *leaf.path))


def _restore(
    reader: Reader, step: int, item: str, args: Any, name: str | None = None
) -> Any:
    """An item of a snapshot, or what it has of one average."""
    composite = orbax().args.Composite(**{item: args})
    try:
        path = folder(reader.directory) / f"{step}{NEW}"
        if not is_snapshot(path):
            path = folder(reader.directory) / str(step)
        found = reader.checkpointer.restore(path, args=composite)[item]
        return found if name is None else found[name]
    except Exception as error:  # whatever a broken file makes of the layers below
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise SnapshotError(step, f"it cannot be read ({lines[0]})") from error


def path_of(keys: Any) -> Path:
    """A key path as names."""
    names = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
    return names or ("value",)


def nested(leaves: dict[Path, Any]) -> dict[str, Any]:
    """Nested dicts of leaves by path."""
    root: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = root
        for name in path[:-1]:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ValueError(f"{'.'.join(path)} lies in {name}, an array.")
        if path[-1] in node:
            raise ValueError(f"{'.'.join(path)} is an array; others lie in it.")
        node[path[-1]] = leaf
    return root


def flat(tree: Any, path: Path = ()) -> dict[Path, Any]:
    """Leaves of nested dicts by path."""
    if not isinstance(tree, dict):
        return {path: tree}
    leaves = {}
    for key, part in tree.items():
        leaves |= flat(part, (*path, key))
    return leaves


def batches(leaves: list[Leaf]) -> Iterator[list[int]]:
    """Leaves in groups no larger than the largest one, or a megabyte."""
    sizes = [
        int(np.prod(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves
    ]
    most, total = max([2**20, *sizes]), 0
    group: list[int] = []
    for i, size in enumerate(sizes):
        if group and total + size > most:
            yield group
            group, total = [], 0
        group.append(i)
        total += size
    if group:
        yield group
