"""Large arrays of Orbax checkpoints, written a part at a time.

A part is a range of the elements in C order. Orbax itself reads and writes whole
arrays. TensorStore, with which it stores them, reads and writes boxes.
"""

import collections
import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

WRITTEN = 2**22  # bytes of the chunks of large arrays
AT_ONCE = 4  # chunks that are written at the same time
# Range of each axis.
Box = tuple[slice, ...]
# An array of the package tensorstore, which says nothing of its types.
Store = Any


def boxes(shape: tuple[int, ...], begin: int, end: int) -> Iterator[Box]:
    """Yields the boxes that make a range of the elements in C order, in this order."""
    if begin >= end:
        return
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    first, last = -(-begin // row), end // row
    if first > last:  # the range lies within one row
        yield from _in_row(shape, last, begin - last * row, end - last * row)
        return
    yield from _in_row(shape, first - 1, begin - (first - 1) * row, row)
    if first < last:
        yield (slice(first, last), *(slice(0, n) for n in shape[1:]))
    yield from _in_row(shape, last, 0, end - last * row)


def _in_row(shape: tuple[int, ...], row: int, begin: int, end: int) -> Iterator[Box]:
    for box in boxes(shape[1:], begin, end):
        yield (slice(row, row + 1), *box)


def chunk_of(shape: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The shape of chunks of at most ``most`` elements, each a range in C order."""
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
    """Yields whole chunks, as boxes and elements, from parts of any size in C order."""
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
    store: Store, chunk: tuple[int, ...], parts: Iterable[np.ndarray]
) -> None:
    """Writes all elements of a TensorStore, from parts of any size in C order."""
    writing: collections.deque[Any] = collections.deque()
    try:
        for box, elements in in_chunks(tuple(store.shape), chunk, parts):
            if len(writing) == AT_ONCE:
                writing.popleft().result()
            place = store[box]
            writing.append(place.write(elements.reshape(place.shape)))
        while writing:
            writing.popleft().result()
    except BaseException:
        for written in writing:  # or it would write to deleted files
            with contextlib.suppress(Exception):
                written.result()
        raise
