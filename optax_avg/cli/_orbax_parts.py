"""Large arrays of Orbax checkpoints, read and written a part at a time.

A part is a range of the elements in C order. Orbax itself reads and writes an array as
a whole; TensorStore, in which it keeps arrays, reads and writes boxes of them.
"""

import collections
import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from optax_avg.cli._sources import Leaf

WRITTEN = 2**22  # bytes of the chunks that we write
LARGEST = 2**25  # bytes of a chunk that may be decoded for a part that it is in
AT_ONCE = 4  # chunks that are being written at the same time
Box = tuple[int | slice, ...]


def boxes(shape: tuple[int, ...], begin: int, end: int) -> Iterator[Box]:
    """The boxes that make a range of the elements in C order, in this order."""
    if begin >= end:
        return
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    first, last = -(-begin // row), end // row
    if first > last:  # the range lies within one row
        i = last
        for box in boxes(shape[1:], begin - i * row, end - i * row):
            yield (i, *box)
        return
    for box in boxes(shape[1:], begin - (first - 1) * row, row):
        if begin < first * row:
            yield (first - 1, *box)
    if first < last:
        yield (slice(first, last),)
    for box in boxes(shape[1:], 0, end - last * row):
        yield (last, *box)


def chunk_of(shape: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The shape of chunks of at most so many elements, each a range in C order."""
    chunk = [1] * len(shape)
    for axis in reversed(range(len(shape))):
        chunk[axis] = max(1, min(shape[axis], most))
        most //= chunk[axis]
        if chunk[axis] < shape[axis]:
            break
    return tuple(chunk)


def in_chunks(
    shape: tuple[int, ...], chunk: tuple[int, ...], parts: Iterable[np.ndarray]
) -> Iterator[tuple[Box, np.ndarray]]:
    """Boxes of whole chunks and their elements, which come in C order in any parts."""
    axis = next((i for i, n in enumerate(chunk) if n > 1), max(len(shape) - 1, 0))
    row = math.prod(shape[axis + 1 :])
    waiting: list[np.ndarray] = []
    begin = have = 0
    total = math.prod(shape)

    def wanted() -> int:
        if not shape:
            return 1
        left = shape[axis] - begin // row % shape[axis]
        return min(chunk[axis], left) * row

    for part in parts:
        waiting.append(part.reshape(-1))
        have += part.size
        while begin < total and have >= wanted():
            n = wanted()
            whole = waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
            (box,) = boxes(shape, begin, begin + n)
            yield box, whole[:n]
            waiting, begin, have = [whole[n:]], begin + n, have - n


def write_parts(
    store: Any, chunk: tuple[int, ...], parts: Iterable[np.ndarray]
) -> None:
    """Writes all elements of a TensorStore, given in C order in any parts."""
    writing: collections.deque[Any] = collections.deque()
    for box, elements in in_chunks(tuple(store.shape), chunk, parts):
        if len(writing) == AT_ONCE:
            writing.popleft().result()
        place = store[box]
        writing.append(place.write(elements.reshape(place.shape)))
    for written in writing:
        written.result()


def open_array(path: str, leaf: Leaf) -> Any:
    """The TensorStore of an array, or None where a part costs more than the part.

    Orbax saves an array as one compressed chunk unless ``chunk_byte_size`` says
    otherwise. It has to be decoded as a whole, whichever part is wanted.
    """
    import tensorstore

    with contextlib.suppress(OSError, ValueError):
        with open(os.path.join(path, "_METADATA")) as file:
            metadata = json.load(file)
        kvstore: dict[str, Any] = {"driver": "file", "path": f"{path}/{leaf.name}/"}
        if metadata.get("use_ocdbt", os.path.exists(f"{path}/manifest.ocdbt")):
            kvstore = {"driver": "ocdbt", "base": f"file://{path}/"}
            kvstore["path"] = f"{leaf.name}/"
        spec = {
            "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
            "kvstore": kvstore,
        }
        store = tensorstore.open(spec, open=True, read=True).result()
        alike = store.shape == leaf.shape and store.dtype.name == leaf.dtype
        chunk: Any = store.chunk_layout.read_chunk.shape or leaf.shape
        nbytes = math.prod(chunk) * store.dtype.numpy_dtype.itemsize
        if alike and nbytes <= LARGEST:
            # The chunk in which one part ends waits for the next one.
            pool = {"cache_pool": {"total_bytes_limit": 2 * nbytes}}
            cached = tensorstore.Context(pool)
            return tensorstore.open(spec, context=cached, open=True, read=True).result()
    return None


def read_part(store: Any, begin: int, end: int) -> np.ndarray:
    """The elements of a TensorStore from ``begin`` to ``end`` in C order."""
    read = [store[box].read() for box in boxes(tuple(store.shape), begin, end)]
    found = [np.asarray(part.result()).reshape(-1) for part in read]
    none = np.empty(0, store.dtype.numpy_dtype)
    return found[0] if len(found) == 1 else np.concatenate([none, *found])
