"""Checkpoints written leaf by leaf: Orbax directories and safetensors files.

Memory holds at most two leaves.
"""

import collections
import contextlib
import functools
import itertools
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_avg._checkpoints import sources
from optax_avg._checkpoints.leaves import Leaf, nested
from optax_avg._checkpoints.opening import open_checkpoint
from optax_avg._checkpoints.orbax import METADATA as ORBAX_METADATA
from optax_avg._checkpoints.orbax import orbax
from optax_avg._checkpoints.orbax_parts import WRITTEN, chunk_of, write_parts
from optax_avg._checkpoints.safetensors import METADATA, SUFFIX, TYPES
from optax_avg.cli._commit import commit, partial
from optax_avg.cli._targets import Format, Load, Target

# Names of all files that Orbax writes to the directory of a checkpoint of arrays.
OF_ORBAX = re.compile(
    r"_METADATA|_CHECKPOINT_METADATA|_sharding|commit_success\.txt|manifest\.ocdbt|"
    r"d(/\w{32})?|ocdbt\.process_\d+(/manifest\.ocdbt|/d(/\w{32})?)?|"
    r"array_metadatas(/process_\d+)?"
)


def format_of(path: str) -> Format:
    """The kind of checkpoint that is written to a path."""
    return SAFETENSORS if path.endswith(SUFFIX) else ORBAX


def write_checkpoint(target: Target, leaves: list[Leaf], load: Load) -> None:
    """Writes leaves one by one; the target appears when all are written.

    Raises:
      FileExistsError: If something has appeared there meanwhile.
      OSError: If the disk refuses to write.
    """
    failed: list[BaseException] = []

    def parts(i: int) -> Iterator[np.ndarray]:
        try:
            yield from _checked(load(i), leaves[i])
        except GeneratorExit:  # the disk failed, not the leaf
            raise
        except BaseException as error:
            failed.append(error)  # Orbax would raise another error instead
            raise

    with partial(target) as folder:
        new = os.path.join(folder, "new")  # the name may be too long for a suffix
        try:
            target.format.write(new, leaves, parts)
        except Exception as error:
            if failed:
                raise failed[0] from None
            raise OSError(f"{target.shown} was not written: {_cause(error)}") from error
        commit(new, target)


def _checked(parts: Iterable[np.ndarray], leaf: Leaf) -> Iterator[np.ndarray]:
    """The parts of a leaf, which must have its dtype and number of elements."""
    size = 0
    for part in parts:
        size += part.size
        if str(part.dtype) != leaf.dtype:
            raise RuntimeError(f"{leaf.name} came out as {part.dtype}.")
        yield part
    if size != leaf.size:
        raise RuntimeError(f"{leaf.name} came out with {size} elements.")


def _cause(error: Exception) -> str:
    """The message of the disk, without those of the libraries in between."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return f"{os.strerror(int(code[1]))}."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}."
    return str(error)


def _check_names(leaves: list[Leaf]) -> None:
    """Raises a ValueError if two leaves have one name, which joins a path by dots."""
    counts = collections.Counter(leaf.name for leaf in leaves)
    for name, count in counts.items():
        if count > 1:
            raise ValueError(f"{count} leaves would be called {name}; rename one.")


def check_safetensors(leaves: list[Leaf]) -> None:
    """Raises a ValueError for leaves that safetensors cannot hold."""
    _check_names(leaves)
    for leaf in leaves:
        if leaf.dtype not in TYPES.values():
            raise ValueError(f"{leaf.name}: safetensors has no {leaf.dtype}.")


def _check_orbax(leaves: list[Leaf]) -> None:
    _check_names(leaves)
    nested({leaf.path: leaf for leaf in leaves})
    for leaf in leaves:
        if not leaf.nbytes:
            raise ValueError(
                f"Orbax holds no arrays without elements, as {leaf.name} is; write to "
                f"a {SUFFIX} file."
            )


def _stranger_to_safetensors(path: str) -> str:
    try:
        open_checkpoint(path)
    except ValueError:
        return "is not a safetensors file"
    return ""


def _stranger_to_orbax(path: str) -> str:
    for root, folders, files in os.walk(path):
        for name in (*folders, *files):
            found = os.path.join(root, name)
            inner = os.path.relpath(found, path).replace(os.sep, "/")
            if not OF_ORBAX.fullmatch(inner) or os.path.islink(found):
                return f"holds {inner}, which is not of an Orbax checkpoint"
    if os.path.exists(os.path.join(path, ORBAX_METADATA)):
        return ""
    return "is not an Orbax checkpoint of arrays"


def write_safetensors(
    path: str, leaves: list[Leaf], load: Load, metadata: dict[str, str]
) -> None:
    """Writes one file; the writer of safetensors itself needs all arrays at once."""
    names = {dtype: kind for kind, dtype in TYPES.items()}
    header: dict[str, Any] = {METADATA: metadata} if metadata else {}
    end = 0
    for leaf in leaves:
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
            for part in load(i):
                file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _write_orbax(path: str, leaves: list[Leaf], load: Load) -> None:
    ocp = orbax()

    class Unmade:
        def __init__(self, i: int) -> None:
            self.i = i

    class Opened:
        """A large array that Orbax creates and whose parts are written here."""

        store: Any = None

        def __init__(self, leaf: Leaf) -> None:
            self.shape, self.dtype = leaf.shape, jnp.dtype(leaf.dtype)
            self.size, self.nbytes = leaf.size, leaf.nbytes
            most = min(WRITTEN, sources.BATCH) // self.dtype.itemsize
            self.chunk = chunk_of(leaf.shape, max(1, most))

        def __deepcopy__(self, memo: Any) -> Any:
            return self

    class OneByOne(ocp.type_handlers.NumpyHandler):
        async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
            args = args or [None] * len(values)
            written: Any = []
            try:
                for value, info, arg in zip(values, infos, args, strict=True):
                    leaf, parts = leaves[value.i], load(value.i)
                    own = [info], arg and [arg]
                    if leaf.nbytes <= sources.BATCH:
                        array = [_whole(parts, leaf)]  # while the last one is written
                        for done in written:
                            done.result()
                        written = await super().serialize(array, *own)
                        continue
                    opened = Opened(leaf)
                    for done in [*written, *await super().serialize([opened], *own)]:
                        done.result()
                    written = []
                    write_parts(opened.store, opened.chunk, parts)
            except BaseException:
                for done in written:  # or it would write to deleted files
                    with contextlib.suppress(Exception):
                        done.result()
                raise
            return written

        async def _open_and_write(self, value: Any, tspec: Any, context: Any) -> None:
            if not isinstance(value, Opened):
                await super()._open_and_write(value, tspec, context)
                return
            import tensorstore

            if "chunks" in tspec.get("metadata", {}):
                tspec["metadata"]["chunks"] = value.chunk
            spec = tensorstore.Spec(tspec)
            value.store = await tensorstore.open(
                spec, create=True, open=True, context=context
            )

        def memory_size(self, values: Any) -> Any:
            return [(leaves[v.i].nbytes, leaves[v.i].nbytes) for v in values]

    tree = nested({leaf.path: Unmade(i) for i, leaf in enumerate(leaves)})
    registry = ocp.type_handlers.create_type_handler_registry((Unmade, OneByOne()))
    # Compression takes most of the time and hardly shrinks trained weights.
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, use_compression=False
    )
    with ocp.Checkpointer(handler) as writer:
        writer.save(Path(path), args=ocp.args.PyTreeSave(tree))


def _whole(parts: Iterable[np.ndarray], leaf: Leaf) -> np.ndarray:
    """A leaf as one array, from its parts."""
    parts = iter(parts)
    first = next(parts)
    if first.size == leaf.size:
        return first.reshape(leaf.shape)
    whole, begin = np.empty(leaf.size, first.dtype), 0
    for part in itertools.chain([first], parts):
        whole[begin : begin + part.size] = part.reshape(-1)
        begin += part.size
    return whole.reshape(leaf.shape)


def safetensors_with(metadata: dict[str, str]) -> Format:
    """The format of a safetensors file with metadata."""
    write = functools.partial(write_safetensors, metadata=metadata)
    return SAFETENSORS._replace(write=write)


SAFETENSORS = Format(
    "a safetensors file",
    False,
    _stranger_to_safetensors,
    check_safetensors,
    functools.partial(write_safetensors, metadata={}),
)
ORBAX = Format(
    "an Orbax checkpoint", True, _stranger_to_orbax, _check_orbax, _write_orbax
)
