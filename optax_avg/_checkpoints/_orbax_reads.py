"""Large arrays of Orbax checkpoints, read a part at a time.

Orbax stores arrays with TensorStore, which decodes a chunk as a whole. Arrays in small
chunks are read through it. If chunks are large, or each has a piece of every row, a
part would need many chunks, and each would be decoded many times. Such an array is
copied chunk by chunk to a file and read from there.

Orbax makes one chunk, compressed by Zstandard, of an array on one device unless
``chunk_byte_size`` says otherwise. A large chunk of this kind is decoded as a stream
and never held in memory. Of other kinds, memory holds the plain and the compressed
bytes of one chunk.
"""

import itertools
import json
import math
import os
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from optax_avg._checkpoints.orbax_parts import Box, Store, boxes
from optax_avg._checkpoints.sources import Parts, Scratch, imported, named

SLAB = 2**23  # most bytes that are decoded for one element of a part
COPIED = 2**24  # bytes that are copied at once
# What TensorStore says of an array.
Metadata = dict[str, Any]
# Takes two places in a chunk as it is stored and returns the bytes between.
Stored = Callable[[int, int | None], bytes]


class _Frames(NamedTuple):
    """Chunks that are frames of Zstandard: their shape, and where they are."""

    chunk: tuple[int, ...]
    separator: str
    sharded: bool


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
        for piece in _read(path, store, whole, most):
            _append(file, piece)  # its errors are not those of the checkpoint
    begins = itertools.accumulate([math.prod(_extent(x)) for x in groups], initial=0)
    places = list(zip(groups, begins, strict=False))

    def read(begin: int, end: int) -> np.ndarray:
        found = [_box_of(box, places, file, dtype) for box in boxes(shape, begin, end)]
        return _joined(found, dtype)

    return read


def _read(path: str, store: Store, whole: Box, most: int) -> Iterator[np.ndarray]:
    """Yields what is in a group of chunks, a part at a time."""
    with named(path):
        streamed = _streamed(store, whole) if math.prod(_extent(whole)) > most else None
        yield from streamed or _pieces(store, whole, most)


def _pieces(store: Store, whole: Box, most: int) -> Iterator[np.ndarray]:
    """Yields the elements of a box in C order, at most ``most`` at a time."""
    own = _extent(whole)
    for begin in range(0, math.prod(own), most):
        for box in boxes(own, begin, min(begin + most, math.prod(own))):
            yield np.asarray(store[_moved(box, whole)].read().result())


def _streamed(store: Store, whole: Box) -> Iterator[np.ndarray] | None:
    """The bytes of a chunk, a part at a time; None if it is not a frame in C order."""
    spec = store.spec().to_json()
    frames_of = {"zarr": _zarr2_frames, "zarr3": _zarr3_frames}[spec["driver"]]
    frames = frames_of(spec["metadata"])
    # A chunk that the end of the array cuts off is stored with all its elements.
    if frames is None or _extent(whole) != frames.chunk:
        return None
    index = [str(s.start // n) for s, n in zip(whole, frames.chunk, strict=True)]
    key = frames.separator.join(["c", *index] if frames.sharded else index)

    read = lambda begin, end: store.kvstore.read(key, byte_range=slice(begin, end))
    now = read(0, 0).result()
    # TensorStore knows whether a chunk that is not there was lost.
    if now.state == "missing":
        return None

    def stored(begin: int, end: int | None) -> bytes:
        found = read(begin, end).result()
        if found.stamp.generation != now.stamp.generation:
            raise ValueError("an array was replaced while it was read.")
        return found.value

    begin, end = 0, None
    if frames.sharded:  # an index of one place and number of bytes ends with a checksum
        begin, length = np.frombuffer(stored(-20, None), "<u8", 2).tolist()
        end = begin + length
        if end >= 2**62:  # damaged, or the mark of a missing chunk
            return None
    count = math.prod(frames.chunk) * store.dtype.numpy_dtype.itemsize
    return _decoded(stored, begin, end, count)


def _zarr2_frames(metadata: Metadata) -> _Frames | None:
    codec = metadata["compressor"] or {"id": None}
    in_order = metadata["order"] == "C" and not metadata["filters"]
    if codec["id"] != "zstd" or not in_order or metadata["dtype"].startswith(">"):
        return None
    return _Frames(tuple(metadata["chunks"]), metadata["dimension_separator"], False)


def _zarr3_frames(metadata: Metadata) -> _Frames | None:
    """Each in a shard of its own, as Orbax writes them."""
    chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    codec, *others = metadata["codecs"]
    if codec["name"] != "sharding_indexed" or others:
        return None
    shard = codec["configuration"]
    codecs = [
        (x["name"], x.get("configuration", {}).get("endian", "little"))
        for x in shard["codecs"]
    ]
    one = shard["chunk_shape"] == chunk and shard["index_location"] == "end"
    default = metadata["chunk_key_encoding"] == {"name": "default"}
    if codecs != [("bytes", "little"), ("zstd", "little")] or not (one and default):
        return None
    return _Frames(tuple(chunk), "/", True)


def _decoded(
    stored: Stored, begin: int, end: int | None, count: int
) -> Iterator[np.ndarray]:
    """Yields the ``count`` bytes of a frame of Zstandard, a part at a time."""
    zstandard = imported("zstandard", "large Orbax arrays need zstandard", "posthoc")

    def compressed(size: int) -> bytes:
        nonlocal begin
        try:
            found = stored(
                begin, begin + size if end is None else min(begin + size, end)
            )
        except ValueError:  # the value ends before
            found = stored(begin, None)
        begin += len(found)
        return found

    source = types.SimpleNamespace(read=compressed)
    with zstandard.ZstdDecompressor().stream_reader(source) as frame:
        while count:
            piece = frame.read(min(count, COPIED))
            if not piece:
                raise ValueError(f"a chunk ends {count:,} bytes early.")
            count -= len(piece)
            yield np.frombuffer(piece, np.uint8)
        if frame.read(1):
            raise ValueError("a chunk has more bytes than its elements.")


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
