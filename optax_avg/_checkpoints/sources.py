"""What a checkpoint is for those who read it, wherever it comes from."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import BinaryIO, Literal, NamedTuple

import numpy as np

from optax_avg._checkpoints.leaves import Leaf

BATCH = 2**25  # bytes of leaves that are read, merged or written together

# Reads the elements from one place in a leaf to another, in C order.
Parts = Callable[[int, int], np.ndarray]
# Makes a file for a copy of a leaf.
Scratch = Callable[[], BinaryIO]


class Checkpoint(NamedTuple):
    """A checkpoint that can be read.

    Attributes:
      leaves: Leaves in the order of the tree.
      read: Takes indices of leaves and returns their arrays.
      parts: Takes the index of a leaf and returns what reads it a part at a time. It
        makes a file for a copy if parts are expensive to read in place.
      metadata: Metadata of a safetensors file, empty for other kinds.
    """

    leaves: list[Leaf]
    read: Callable[[list[int]], list[np.ndarray]]
    parts: Callable[[int, Scratch], Parts]
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
    """Adds the path of the checkpoint to the errors of the libraries that read it."""
    try:
        yield
    except ValueError as error:
        raise error if path in str(error) else ValueError(f"{path}: {error}") from error
    except Exception as error:  # a broken file may raise anything in these libraries
        raise ValueError(f"{path} cannot be read: {error}") from error


def imported(module: str, need: str, extra: Literal["cli", "posthoc"]) -> ModuleType:
    """A module of a package that is installed with an extra of this one.

    Args:
      module: Name of the module.
      need: What needs the package, a clause for the message.
      extra: Extra that installs the package.

    Raises:
      ImportError: If the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{need}; write pip install "optax_avg[{extra}]".') from error
