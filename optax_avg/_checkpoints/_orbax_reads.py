"""Large arrays of Orbax checkpoints, read a part at a time.

Orbax stores arrays with TensorStore, which decodes a chunk as a whole. Arrays in small
chunks are read through it. If chunks are large, or each has a piece of every row, a
part would need many chunks, and each would be decoded many times. Such an array is
copied chunk by chunk to a file and read from there.

Memory then holds the plain bytes of at least one chunk, and its compressed bytes while
it is decoded. Orbax makes one compressed chunk of an array on one device unless
``chunk_byte_size`` says otherwise, so a leaf of 600 MB once takes 1.2 GB.
"""

import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from optax_avg._checkpoints.orbax_parts import Box, Store, boxes
from optax_avg._checkpoints.sources import Parts, Scratch, named

SLAB = 2**23  # most bytes that are decoded for one element of a part
COPIED = 2**24  # bytes that are copied at once


def parts_of(path: str, name: str, scratch: Scratch) -> Parts:
    """Reads ranges of the elements of an array, in C order.

    Args:
      path: Path of a checkpoint on a local disk.
      name: Name of the array in it.
      scratch: Makes a file for the copy, if one is needed.
    """
    with named(path):
        # The cache keeps the chunks in which one part ends for the next part.
        store = _opened(path, name, 2 * SLAB)
    dtype = store.dtype.numpy_dtype
    if _slab(store) * dtype.itemsize > SLAB:
        return _copied(path, name, store, scratch())

    def read(begin: int, end: int) -> np.ndarray:
        with named(path):
            found = [store[box].read() for box in boxes(store.shape, begin, end)]
            return _joined([np.asarray(x.result()) for x in found], dtype)

    return read


def parts_of_copy(whole: np.ndarray, file: BinaryIO) -> Parts:
    """Reads ranges of the elements of an array from a copy of it in a file."""
    _append(file, whole)
    dtype = whole.dtype
    return lambda begin, end: _at(file, begin, end - begin, dtype)


def _opened(path: str, name: str, cached: int) -> Store:
    """The TensorStore of an array; ``cached`` bytes of decoded chunks are kept."""
    import tensorstore

    with open(os.path.join(path, "_METADATA"), encoding="utf-8") as file:
        metadata = json.load(file)
    # A dict, because a percent sign has another meaning in an address.
    kvstore: Any = {"driver": "file", "path": f"{path}/{name}/"}
    if metadata.get("use_ocdbt", os.path.exists(f"{path}/manifest.ocdbt")):
        base = {"driver": "file", "path": f"{path}/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    spec = {
        "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
        "kvstore": kvstore,
        # A missing chunk was lost, unless Orbax did not write chunks of zeros.
        "fill_missing_data_reads": not metadata.get(
            "store_array_data_equal_to_fill_value", False
        ),
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
    }
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": cached}})
    return tensorstore.open(spec, open=True, read=True, context=context).result()


def _chunk(store: Store) -> tuple[int, ...]:
    stored = store.chunk_layout.read_chunk.shape or ()  # None of a number
    pairs = zip(stored, store.shape, strict=True)
    return tuple(min(n, most) for n, most in pairs)


def _slab(store: Store) -> int:
    """Number of elements of the shortest range in C order of whole chunks."""
    chunk = _chunk(store)
    axis = next((i for i, n in enumerate(chunk) if n > 1), len(chunk))
    return math.prod(chunk[axis : axis + 1]) * math.prod(store.shape[axis + 1 :])


def _copied(path: str, name: str, store: Store, file: BinaryIO) -> Parts:
    """Reads ranges from a copy in which groups of chunks follow each other."""
    shape, dtype = tuple(store.shape), store.dtype.numpy_dtype
    most = max(1, COPIED // dtype.itemsize)
    group = _group(_chunk(store), shape, most)
    size = math.prod(group)
    # A chunk that is copied in several pieces is decoded once and cached.
    cached = 0 if size <= most else size * dtype.itemsize + 2**20
    with named(path):
        store = _opened(path, name, cached)
    groups = list(_grid(shape, group))
    for whole in groups:
        own = _extent(whole)
        for begin in range(0, math.prod(own), most):
            for box in boxes(own, begin, min(begin + most, math.prod(own))):
                with named(path):
                    piece = np.asarray(store[_moved(box, whole)].read().result())
                _append(file, piece)
    begins = itertools.accumulate([math.prod(_extent(x)) for x in groups], initial=0)
    places = list(zip(groups, begins, strict=False))

    def read(begin: int, end: int) -> np.ndarray:
        found = [_box_of(box, places, file, dtype) for box in boxes(shape, begin, end)]
        return _joined(found, dtype)

    return read


def _box_of(
    box: Box, places: list[tuple[Box, int]], file: BinaryIO, dtype: np.dtype
) -> np.ndarray:
    """A box that is a range in C order, from the groups that overlap it."""
    made = np.empty(_extent(box), dtype)
    for whole, begin in places:
        pairs = zip(box, whole, strict=True)
        both = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in pairs]
        if all(s.start < s.stop for s in both):
            # The overlap of a range with a group is a range in the group.
            own = _extent(both)
            at = [s.start - b.start for s, b in zip(both, whole, strict=True)]
            first = begin + int(np.ravel_multi_index(at, _extent(whole)))
            pairs = zip(both, box, strict=True)
            to = tuple(slice(s.start - b.start, s.stop - b.start) for s, b in pairs)
            made[to] = _at(file, first, math.prod(own), dtype).reshape(own)
    return made


def _extent(box: Sequence[slice]) -> tuple[int, ...]:
    return tuple(s.stop - s.start for s in box)


def _moved(box: Box, whole: Box) -> Box:
    pairs = zip(box, whole, strict=True)
    return tuple(slice(a.start + b.start, a.stop + b.start) for a, b in pairs)


def _group(
    chunk: tuple[int, ...], shape: tuple[int, ...], most: int
) -> tuple[int, ...]:
    """The shape of one chunk, or of neighbours with at most ``most`` elements."""
    group = list(chunk)
    for axis in reversed(range(len(shape))):
        times = max(1, most // math.prod(group))
        group[axis] = min(group[axis] * times, shape[axis])
    return tuple(group)


def _grid(shape: tuple[int, ...], group: tuple[int, ...]) -> Iterator[Box]:
    ranges = [range(0, n, step) for n, step in zip(shape, group, strict=True)]
    for start in itertools.product(*ranges):
        steps = zip(start, group, shape, strict=True)
        yield tuple(slice(i, min(i + step, n)) for i, step, n in steps)


def _joined(found: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    flat = [x.reshape(-1) for x in found]
    return flat[0] if len(flat) == 1 else np.concatenate([np.empty(0, dtype), *flat])


def _append(file: BinaryIO, x: np.ndarray) -> None:
    file.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
    file.flush()


def _at(file: BinaryIO, begin: int, count: int, dtype: np.dtype) -> np.ndarray:
    file.seek(begin * dtype.itemsize)
    return np.fromfile(file, dtype, count)
