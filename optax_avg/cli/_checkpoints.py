"""Checkpoints on disk leaf by leaf: Orbax directories and safetensors files.

No more than the leaves that are asked for is in memory, on the way in and out.
"""

import contextlib
import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_avg.posthoc import _disk

SUFFIX = ".safetensors"
# What safetensors calls its types, and what NumPy does.
TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


class Leaf(NamedTuple):
    """An array in a checkpoint."""

    path: _disk.Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def name(self) -> str:
        """The path as one string."""
        return ".".join(self.path)

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


class Checkpoint(NamedTuple):
    """A checkpoint that can be read.

    Attributes:
      leaves: in the order of the tree.
      read: from indices of leaves to their arrays.
    """

    leaves: list[Leaf]
    read: Callable[[list[int]], list[np.ndarray]]


def open_checkpoint(path: str, only: str | None = None) -> Checkpoint:
    """A checkpoint at a path; ``only`` is the subtree to keep, with dots.

    Raises:
      ValueError: If there is none, or no such subtree.
    """
    if not os.path.exists(path) and not _disk.is_remote(path):
        raise ValueError(f"there is no checkpoint at {path}.")
    whole = _safetensors(path) if path.endswith(SUFFIX) else _orbax(path)
    if only is None:
        return whole
    head = tuple(only.split("."))
    kept = [i for i, leaf in enumerate(whole.leaves) if leaf.path[: len(head)] == head]
    if not kept:
        tops = sorted({leaf.path[0] for leaf in whole.leaves})
        raise ValueError(f"{path} has no subtree {only!r}; at its top are {tops}.")
    leaves = [
        whole.leaves[i]._replace(path=whole.leaves[i].path[len(head) :] or ("value",))
        for i in kept
    ]
    return Checkpoint(leaves, lambda indices: whole.read([kept[i] for i in indices]))


def _safetensors(path: str) -> Checkpoint:
    safetensors = _import("safetensors")
    with _named(path), safetensors.safe_open(path, "np") as file:
        leaves = []
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            kind = part.get_dtype()
            if kind not in TYPES:
                raise ValueError(f"{path}: {name} is of the unknown type {kind}.")
            shape = tuple(part.get_shape())
            leaves.append(Leaf(tuple(name.split(".")), shape, TYPES[kind]))

    def read(indices):
        # Opened anew: pages of a mapped file count as memory as long as it is open.
        with _named(path), safetensors.safe_open(path, "np") as file:
            return [file.get_tensor(leaves[i].name) for i in indices]

    return Checkpoint(leaves, read)


def _orbax(path: str) -> Checkpoint:
    ocp = _disk.orbax()
    path = _item_of(path)
    with _named(path), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        found = reader.metadata(path)
        found = getattr(found, "item_metadata", found)
        tree = getattr(found, "tree", found)
    if not jax.tree.leaves(tree):
        raise ValueError(f"{path} is not an Orbax checkpoint of arrays.")
    entries, structure = jax.tree.flatten_with_path(tree)
    leaves = [
        Leaf(_disk.path_of(keys), tuple(x.shape), str(jnp.dtype(x.dtype)))
        for keys, x in entries
    ]

    def read(indices):
        if not indices:
            return []
        item: list[Any] = [ocp.PLACEHOLDER] * len(leaves)
        how = [ocp.RestoreArgs(restore_type=np.ndarray)] * len(leaves)
        for i in indices:
            item[i] = np.empty(leaves[i].shape, jnp.dtype(leaves[i].dtype))
        args = ocp.args.PyTreeRestore(
            item=structure.unflatten(item), restore_args=structure.unflatten(how)
        )
        with _named(path), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            restored = structure.flatten_up_to(reader.restore(path, args=args))
        return [np.asarray(restored[i]) for i in indices]

    return Checkpoint(leaves, read)


def _item_of(path: str) -> str:
    """The directory of the arrays: the path itself, or the one item in it."""
    path = path if _disk.is_remote(path) else os.path.abspath(path)
    if _disk.is_remote(path) or os.path.exists(os.path.join(path, "_METADATA")):
        return path
    items = sorted(p.parent.name for p in Path(path).glob("*/_METADATA"))
    if len(items) == 1:
        return os.path.join(path, items[0])
    if items:
        raise ValueError(f"{path} holds several items; pass one of {path}/{items}.")
    raise ValueError(f"{path} is neither an Orbax checkpoint nor a {SUFFIX} file.")


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Names the file in what the layers below complain about."""
    try:
        yield
    except ValueError as error:
        raise error if path in str(error) else ValueError(f"{path}: {error}") from error
    except Exception as error:  # whatever a broken file makes of the layers below
        raise ValueError(f"{path} cannot be read: {error}") from error


def _import(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError(
            f"this needs {name}; pip install 'optax_avg[cli]'."
        ) from error


def check_free(out: str, force: bool) -> None:
    """Raises if there is something at a path that is not to be replaced."""
    if os.path.lexists(out) and not force:
        raise FileExistsError(f"{out} exists; pass --force to replace it.")


def write_checkpoint(
    out: str,
    leaves: list[Leaf],
    load: Callable[[int], np.ndarray],
    *,
    force: bool = False,
) -> None:
    """Writes leaves one by one; there is nothing at ``out`` before all are there.

    Raises:
      FileExistsError: If there is something, without ``force``.
    """
    check_free(out, force)
    target = Path(os.path.abspath(out))
    target.parent.mkdir(parents=True, exist_ok=True)

    def whole(i: int) -> np.ndarray:
        array, leaf = load(i), leaves[i]
        if array.shape != leaf.shape or str(array.dtype) != leaf.dtype:
            raise RuntimeError(
                f"{leaf.name} came out as {array.dtype}{array.shape}, not as "
                f"{leaf.dtype}{leaf.shape}."
            )
        return array

    with tempfile.TemporaryDirectory(
        prefix=f".{target.name}.", suffix=".partial", dir=target.parent
    ) as folder:
        new = Path(folder) / target.name
        if out.endswith(SUFFIX):
            _write_safetensors(new, leaves, whole)
        else:
            _write_orbax(new, leaves, whole)
        if target.exists():
            target.rename(Path(folder) / "old")
        new.rename(target)


def _write_safetensors(
    path: Path, leaves: list[Leaf], load: Callable[[int], np.ndarray]
) -> None:
    """The library's own writer wants all arrays at once."""
    names = {dtype: kind for kind, dtype in TYPES.items()}
    header, end = {}, 0
    for leaf in leaves:
        if leaf.dtype not in names:
            raise ValueError(f"{leaf.name}: safetensors has no {leaf.dtype}.")
        header[leaf.name] = {
            "dtype": names[leaf.dtype],
            "shape": list(leaf.shape),
            "data_offsets": [end, end + leaf.nbytes],
        }
        end += leaf.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for i in range(len(leaves)):
            file.write(np.ascontiguousarray(load(i)).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _write_orbax(
    path: Path, leaves: list[Leaf], load: Callable[[int], np.ndarray]
) -> None:
    ocp = _disk.orbax()
    for leaf in leaves:
        if not leaf.nbytes:
            raise ValueError(
                f"Orbax holds no arrays without elements, as {leaf.name} is; write to "
                f"a {SUFFIX} file."
            )

    class Unmade:
        def __init__(self, i: int) -> None:
            self.i = i

    class OneByOne(ocp.type_handlers.NumpyHandler):
        async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
            args = args or [None] * len(values)
            written: Any = []
            for value, info, arg in zip(values, infos, args, strict=True):
                array = [load(value.i)]  # while the last one is written
                for done in written:
                    done.result()
                written = await super().serialize(array, [info], arg and [arg])
            return written

        def memory_size(self, values: Any) -> Any:
            return [(leaves[v.i].nbytes, leaves[v.i].nbytes) for v in values]

    tree = _disk.nested({leaf.path: Unmade(i) for i, leaf in enumerate(leaves)})
    registry = ocp.type_handlers.create_type_handler_registry((Unmade, OneByOne()))
    # Trained weights hardly shrink, and squeezing them takes most of the time.
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, use_compression=False
    )
    with ocp.Checkpointer(handler) as writer:
        writer.save(path, args=ocp.args.PyTreeSave(tree))
