"""What a checkpoint is for the commands, wherever it comes from."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

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


# From two places in a leaf, in C order, to the elements between.
Parts = Callable[[int, int], np.ndarray]


class Checkpoint(NamedTuple):
    """A checkpoint that can be read.

    Attributes:
      leaves: in the order of the tree.
      read: from indices of leaves to their arrays.
      parts: from the index of a leaf to what reads it a part at a time. The function
        makes a file for a copy, where that is what costs no more than the part.
      metadata: of a safetensors file.
    """

    leaves: list[Leaf]
    read: Callable[[list[int]], list[np.ndarray]]
    parts: Callable[[int, Callable[[], BinaryIO]], Parts]
    metadata: dict[str, str]


def part_of(source: Checkpoint, kept: list[int], leaves: list[Leaf]) -> Checkpoint:
    """Some leaves of a checkpoint, under other names."""
    return source._replace(
        leaves=leaves,
        read=lambda indices: source.read([kept[i] for i in indices]),
        parts=lambda i, scratch: source.parts(kept[i], scratch),
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
