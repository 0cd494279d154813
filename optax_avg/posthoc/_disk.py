"""Snapshots as Orbax checkpoints: one directory a step, leaf by leaf on the way back.

A snapshot has a tree of averages, the weight sequences of averages without a closed
form, and a record in JSON, with numbers by which leaves are known again.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_avg.posthoc import _integrity

TREE, SEQUENCES, RECORD = "averages", "sequences", "record"
LOCK = "writer.lock"
Path = tuple[str, ...]


class Leaf(NamedTuple):
    """An array in a snapshot, and the number by which it is known again."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    fingerprint: int


class Record(NamedTuple):
    """What a snapshot says about itself.

    Attributes:
      step: of the training.
      absorbed: iterates in each average, by name.
      kinds: what each average is: ``{"power": gamma}``, ``{"window": k}`` or
        ``{"recorded": True}``.
      leaves: of each average, in the order of the tree.
    """

    step: int
    absorbed: dict[str, int]
    kinds: dict[str, dict[str, Any]]
    leaves: dict[str, list[Leaf]]


class Writer(NamedTuple):
    """Orbax's manager of a directory, and the lock that is held on it."""

    manager: Any
    lock: Any


class Reader(NamedTuple):
    """A directory and what restores from it."""

    directory: str
    checkpointer: Any


class SnapshotError(Exception):
    """A snapshot that cannot be read as it was written."""

    def __init__(self, step: int, cause: Any) -> None:
        lines = str(cause).strip().splitlines()
        super().__init__(lines[0] if lines else type(cause).__name__)
        self.step = step


def orbax() -> Any:
    """Orbax, which only snapshots need."""
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError(
            "snapshots need Orbax; pip install 'optax_avg[posthoc]'."
        ) from error
    return orbax.checkpoint


def is_remote(directory: str) -> bool:
    """Whether a directory is an address such as ``gs://bucket/run``."""
    return "://" in directory


def absolute(directory: Any) -> str:
    """The directory as Orbax wants it."""
    path = os.fspath(directory)
    return path if is_remote(path) else os.path.abspath(path)


def is_store(directory: str) -> bool:
    """Whether there are snapshots in a directory."""
    path = absolute(directory)
    steps = steps_of(path) if is_remote(path) or os.path.isdir(path) else []
    return any(os.path.isdir(os.path.join(path, str(s), RECORD)) for s in steps[:1])


def _manager(directory: str) -> Any:
    ocp = orbax()
    return ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions())


def open_writer(directory: str) -> Writer:
    """The one writer of a directory, which is made where there is none.

    Raises:
      RuntimeError: If there is another one.
    """
    orbax()
    if is_remote(directory) or jax.process_index():
        return Writer(_manager(directory), None)
    import filelock

    os.makedirs(directory, exist_ok=True)
    lock = filelock.FileLock(os.path.join(directory, LOCK), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise RuntimeError(
            f"{directory} already has a writer; give each run a directory of its own, "
            "or close the other store."
        ) from error
    try:
        return Writer(_manager(directory), lock)
    except BaseException:
        lock.release()
        raise


def close_writer(writer: Writer) -> None:
    """Lets others write to the directory."""
    try:
        writer.manager.close()
    finally:
        if writer.lock is not None:
            writer.lock.release()


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
    return sorted(orbax().utils.checkpoint_steps(directory))


def write(
    manager: Any,
    record: Record,
    averages: dict[str, dict[Path, jax.Array]],
    sequences: dict[str, np.ndarray],
) -> None:
    """Begins to write a snapshot; one of the same step is replaced."""
    ocp = orbax()
    if record.step in manager.all_steps():
        manager.delete(record.step)
    # Orbax does not write arrays without elements.
    tree = {
        name: nested({path: x for path, x in leaves.items() if x.size})
        for name, leaves in averages.items()
    }
    items = {TREE: ocp.args.PyTreeSave(tree)}
    if sequences:
        items[SEQUENCES] = ocp.args.PyTreeSave(sequences)
    items[RECORD] = ocp.args.JsonSave(record._asdict())
    # Orbax would pass over a step before the last one.
    manager.save(record.step, args=ocp.args.Composite(**items), force=True)


def read_record(reader: Reader, step: int) -> Record:
    """The record of a snapshot.

    Raises:
      SnapshotError: If it cannot be read.
    """
    found = _restore(reader, step, RECORD, orbax().args.JsonRestore())
    try:
        leaves = {
            name: [Leaf(tuple(p), tuple(s), d, n) for p, s, d, n in leaves]
            for name, leaves in found["leaves"].items()
        }
        return Record(found["step"], found["absorbed"], found["kinds"], leaves)
    except (KeyError, TypeError, ValueError) as error:
        raise SnapshotError(step, f"its record is not one: {error!r}") from error


def read_sequence(reader: Reader, record: Record, name: str) -> np.ndarray:
    """The weights that an average gave to its newest iterates, float64.

    Raises:
      SnapshotError: If they cannot be read.
    """
    ocp = orbax()
    args = ocp.args.PyTreeRestore(
        item={name: np.zeros(record.absorbed[name])},
        restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)},
        partial_restore=True,
    )
    return _restore(reader, record.step, SEQUENCES, args)[name]


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
    found: dict[Path, jax.Array] = {}
    if item:
        args = ocp.args.PyTreeRestore(
            item={name: nested(item)},
            restore_args={name: nested(how)},
            partial_restore=True,
        )
        found = flat(_restore(reader, record.step, TREE, args)[name])
    arrays = [
        found[leaf.path] if leaf.path in found else jnp.zeros(leaf.shape, leaf.dtype)
        for leaf in leaves
    ]
    numbers = np.asarray(_integrity.signature(arrays)[0]).tolist()
    for leaf, number in zip(leaves, numbers, strict=True):
        if number != leaf.fingerprint:
            where = "/".join((name, *leaf.path))
            raise SnapshotError(record.step, f"{where} is not what was written")
    return arrays


def _restore(reader: Reader, step: int, item: str, args: Any) -> Any:
    composite = orbax().args.Composite(**{item: args})
    try:
        path = f"{reader.directory}/{step}"
        return reader.checkpointer.restore(path, args=composite)[item]
    except Exception as error:  # whatever a broken file makes of the layers below
        raise SnapshotError(step, error) from error


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
