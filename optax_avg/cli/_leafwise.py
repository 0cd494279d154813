"""Merges leaf by leaf: small leaves in batches, large leaves in parts."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_avg._checkpoints import sources
from optax_avg._checkpoints.leaves import Leaf, difference
from optax_avg._checkpoints.opening import open_checkpoint
from optax_avg._checkpoints.sources import Checkpoint
from optax_avg.cli import _output
from optax_avg.cli._signals import check_signals
from optax_avg.cli._targets import Format
from optax_avg.merging.trees import Rule, Slices, check_fault, widened

READERS = 2  # models that are read at the same time
PARTS = 4  # parts of a large leaf, in all trees together, that make one batch
WIDE = ("float64", "complex128", "int64", "uint64")
# Takes a leaf and its slices in all trees, and yields the merged slices.
Method = Callable[[Leaf, Slices], Iterator[jax.Array]]


class Column(NamedTuple):
    """A leaf in all trees.

    Attributes:
      leaf: The leaf in the first tree.
      places: Index of the leaf in each tree.
      itemsize: Largest number of bytes of an element.
      wide: Whether a dtype has 64 bits, which JAX must be told.
    """

    leaf: Leaf
    places: list[int]
    itemsize: int
    wide: bool


class Job(NamedTuple):
    """A merge of checkpoints.

    Attributes:
      method: Merge of one leaf.
      paths: Paths of all trees.
      sources: Checkpoints of all trees.
      allow_nonfinite: Whether NaN and inf may be merged, and may be in the result.
      readers: Threads that read.
      scratch: Directory for copies of leaves that are expensive to read by parts.
    """

    method: Method
    paths: Sequence[str]
    sources: list[Checkpoint]
    allow_nonfinite: bool
    readers: ThreadPoolExecutor
    scratch: str


def by_rule(rule: Rule) -> Method:
    """A method that merges each slice by itself, after a search through all slices."""

    @jax.jit
    def combine(found, xs):
        wide = widened(xs)
        made = rule.combine(found, wide).astype(xs[0].dtype)
        return made, False if rule.fault is None else rule.fault(wide)

    def merged(leaf: Leaf, slices: Slices) -> Iterator[jax.Array]:
        found, start = rule.find(slices), 0
        for xs in slices():
            made, fault = combine(rule.after(found, start), xs)
            check_fault(rule, fault, leaf.name)
            start += made.size
            yield made

    return merged


def as_a_whole(merge: Callable[[Leaf, list[jax.Array]], jax.Array]) -> Method:
    """A method that needs all elements of a leaf at once."""

    def merged(leaf: Leaf, slices: Slices) -> Iterator[jax.Array]:
        first, *rest = slices()
        if rest:
            columns = zip(first, *rest, strict=True)
            first = [jnp.concatenate(parts) for parts in columns]
        yield merge(leaf, [jnp.asarray(x) for x in first])

    return merged


def merge_checkpoints(
    method: Method,
    paths: Sequence[str],
    output: _output.Output,
    *,
    only: str | None,
    allow_nonfinite: bool,
    format_of: Callable[[str, dict[str, str]], Format],
) -> None:
    """Merges checkpoints into one with the leaves and dtypes of the first.

    Args:
      method: Merge of one leaf.
      paths: Models and the other checkpoints that the method takes.
      output: Options of the command.
      only: Subtree to take, None for the whole tree.
      allow_nonfinite: Whether NaN and inf may be merged, and may be in the result.
      format_of: Takes the path of the result and the metadata of the first model, and
        returns the kind of checkpoint to write.

    Raises:
      ValueError: If the checkpoints differ, or an element is not finite.
    """
    target = _output.check(output, paths, lambda path: format_of(path, {}))
    trees = [open_checkpoint(path, only) for path in paths]
    columns = _columns(trees, paths)
    leaves = [column.leaf for column in columns]
    sizes = [0] * len(paths)
    for column in columns:
        for t in range(len(paths) if _is_inexact(column.leaf) else 1):
            sizes[t] += trees[t].leaves[column.places[t]].nbytes
    what = (
        f"{output.command} from {len(paths)} checkpoint{'s' if len(paths) > 1 else ''}"
    )
    final = lambda path: format_of(path, trees[0].metadata)
    with ThreadPoolExecutor(READERS) as readers:
        scratch = os.path.dirname(target.path)
        job = Job(method, paths, trees, allow_nonfinite, readers, scratch)
        make = lambda batch: _made(job, [columns[i] for i in batch])
        reads = list(zip(paths, sizes, strict=True))
        _output.write(output, reads, leaves, make, what, final)


def _made(job: Job, columns: list[Column]) -> list[Iterable[np.ndarray]]:
    """The merged elements of some leaves; integers come from the first tree."""
    if len(columns) == 1 and columns[0].leaf.nbytes > sources.BATCH:
        return [_merged_by_parts(job, columns[0])]
    floats = [column for column in columns if _is_inexact(column.leaf)]
    kept = [column for column in columns if not _is_inexact(column.leaf)]
    found = dict(
        zip(
            [column.leaf for column in kept],
            job.sources[0].read([column.places[0] for column in kept]),
            strict=True,
        )
    )
    read = job.readers.map(
        lambda source, t: source.read([column.places[t] for column in floats]),
        job.sources,
        range(len(job.sources)),
    )
    arrays = list(read)
    made: dict[Leaf, list[np.ndarray]] = {leaf: [x] for leaf, x in found.items()}
    for column in reversed(floats):
        xs = [own.pop() for own in arrays]
        made[column.leaf] = list(_merged(job, column, lambda xs=xs: iter([xs])))
    return [made[column.leaf] for column in columns]


def _merged_by_parts(job: Job, column: Column) -> Iterator[np.ndarray]:
    """The merged elements of a leaf that never lies in memory as a whole."""
    is_float = _is_inexact(column.leaf)
    trees = job.sources if is_float else job.sources[:1]
    size = sources.BATCH // PARTS // len(trees)
    step = max(1, size // max(4, column.itemsize))
    with contextlib.ExitStack() as files:
        reads = [
            source.parts(place, lambda: _unnamed_file(job.scratch, files))
            for source, place in zip(trees, column.places, strict=False)
        ]

        def parts() -> Iterator[list[np.ndarray]]:
            for begin in range(0, column.leaf.size, step):
                check_signals()
                end = min(begin + step, column.leaf.size)
                part = lambda read, begin=begin, end=end: read(begin, end)
                yield list(job.readers.map(part, reads))

        if is_float:
            yield from _merged(job, column, parts)
        else:
            yield from (part for (part,) in parts())


def _unnamed_file(folder: str, files: contextlib.ExitStack) -> BinaryIO:
    """A file without a name, so that nothing is left of it after a kill."""
    with tempfile.TemporaryFile(dir=folder) as made:
        return files.enter_context(os.fdopen(os.dup(made.fileno()), "rb+"))


def _merged(
    job: Job, column: Column, arrays: Callable[[], Iterator[list[np.ndarray]]]
) -> Iterator[np.ndarray]:
    """The merged slices of a leaf of floats."""
    finite = job.allow_nonfinite

    def slices() -> Iterator[list[jax.Array]]:
        nonlocal finite
        for own in arrays():
            xs = [jnp.asarray(x) for x in own]
            if not finite:
                _check_finite(xs, column.leaf, job.paths)
            yield xs
        finite = True

    parts = job.method(column.leaf, slices)
    while True:
        with jax.enable_x64(column.wide):
            made = next(parts, None)
            if made is None:
                return
            if not job.allow_nonfinite and not all(_finite([made])):
                raise ValueError(
                    f"{column.leaf.name} leaves the range of {made.dtype} when it is "
                    "merged; cast the first model to a wider dtype, or pass "
                    "--allow-nonfinite."
                )
            array = np.asarray(made)
        yield array


@jax.jit
def _finite(xs: list[jax.Array]) -> list[jax.Array]:
    return [jnp.all(jnp.isfinite(x)) for x in widened(xs)]


def _check_finite(xs: list[jax.Array], leaf: Leaf, paths: Sequence[str]) -> None:
    """Raises a ValueError that names the first checkpoint with NaN or inf."""
    for path, finite in zip(paths, _finite(xs), strict=True):
        if not finite:
            raise ValueError(
                f"{leaf.name} holds NaN or inf in {path}; merge without this model, or "
                "pass --allow-nonfinite."
            )


def _is_inexact(leaf: Leaf) -> bool:
    return jnp.issubdtype(jnp.dtype(leaf.dtype), jnp.inexact)


def _columns(trees: list[Checkpoint], paths: Sequence[str]) -> list[Column]:
    """The leaves of the first tree with their places in all trees.

    Raises:
      ValueError: If the trees differ.
    """
    first = trees[0].leaves
    for path, source in zip(paths[1:], trees[1:], strict=True):
        odd = difference(first, source.leaves, paths[0])
        if odd:
            raise ValueError(f"{path} {odd}; the checkpoints must be alike.")
    where = [{x.name: i for i, x in enumerate(source.leaves)} for source in trees]
    columns = []
    for leaf in first:
        own = [places[leaf.name] for places in where]
        found = zip(trees, own, strict=True)
        dtypes = [jnp.dtype(source.leaves[i].dtype) for source, i in found]
        size = max(dtype.itemsize for dtype in dtypes)
        wide = any(dtype.name in WIDE for dtype in dtypes)
        columns.append(Column(leaf, own, size, wide))
    return columns
