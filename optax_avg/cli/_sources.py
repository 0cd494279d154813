"""What a checkpoint is for the commands, wherever it comes from."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from optax_avg.posthoc import _disk

BATCH = 2**25  # bytes of leaves that are read, merged or written together


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
    def size(self) -> int:
        """Elements of the array."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return self.size * jnp.dtype(self.dtype).itemsize


class Checkpoint(NamedTuple):
    """A checkpoint that can be read.

    Attributes:
      leaves: in the order of the tree.
      read: from indices of leaves to their arrays.
      read_part: from the index of a leaf and two places in it to the elements between.
      by_parts: from the index of a leaf to whether reading a part of it costs no more
        than the part.
      metadata: of a safetensors file.
    """

    leaves: list[Leaf]
    read: Callable[[list[int]], list[np.ndarray]]
    read_part: Callable[[int, int, int], np.ndarray]
    by_parts: Callable[[int], bool]
    metadata: dict[str, str]


def part_of(source: Checkpoint, kept: list[int], leaves: list[Leaf]) -> Checkpoint:
    """Some leaves of a checkpoint, under other names."""
    return source._replace(
        leaves=leaves,
        read=lambda indices: source.read([kept[i] for i in indices]),
        read_part=lambda i, begin, end: source.read_part(kept[i], begin, end),
        by_parts=lambda i: source.by_parts(kept[i]),
    )


@contextlib.contextmanager
def named(path: str) -> Iterator[None]:
    """Names the file in what the layers below complain about."""
    try:
        yield
    except ValueError as error:
        raise error if path in str(error) else ValueError(f"{path}: {error}") from error
    except Exception as error:  # whatever a broken file makes of the layers below
        raise ValueError(f"{path} cannot be read: {error}") from error


def imported(name: str) -> Any:
    """A package of the extra ``cli``."""
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError(
            f'this needs {name}; write pip install "optax_avg[cli]".'
        ) from error
