"""``optax-avg reconstruct`` and ``optax-avg inspect``."""

import math
import os
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from optax_avg.cli._checkpoints import open_checkpoint
from optax_avg.cli._output import Only, Output, check, write, writes
from optax_avg.cli._sources import Checkpoint, Leaf
from optax_avg.posthoc import _clock, _disk, _plan, _reconstruct
from optax_avg.posthoc._plan import target_of

Row = tuple[str, int, Any]  # name, iterates, and which average it is, if known


class Normalize(StrEnum):
    """How the weights of snapshots are normalised."""

    constrained = "constrained"
    sum = "sum"
    none = "none"


@writes
def reconstruct(
    store: Annotated[str, typer.Argument(help="Directory of a SnapshotStore.")],
    output: Output,
    sigma_rel: Annotated[
        float | None, typer.Option(help="Relative width of a power function.")
    ] = None,
    half_life: Annotated[
        float | None, typer.Option(help="Half-life of an EMA, in optimizer steps.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Latest optimizer steps to take the mean of.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Where the average ends; by default the last.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="Averages to make it of; by default all.")
    ] = None,
    normalize: Annotated[Normalize, typer.Option()] = Normalize.constrained,
    dtype: Annotated[str, typer.Option(help="Of the result.")] = "float32",
) -> None:
    """Make an average that was not kept, from the snapshots of others.

    Snapshots that cannot be read are named and left out, and a width that the snapshots
    cannot express is said, with those that they can. A half-life is that of an EMA
    whose weights on the iterates sum to one.
    """
    kind = _dtype(dtype)
    targets = {"sigma-rel": sigma_rel, "half-life": half_life, "window": window}
    given = {name: x for name, x in targets.items() if x is not None}
    if len(given) != 1:
        raise typer.BadParameter(
            f"pass one of --sigma-rel, --half-life and --window, got {len(given)}."
        )
    goal = target_of(sigma_rel, half_life, window)
    check(output, [store])
    _check_directory(store)
    with _disk.reader_of(_disk.absolute(store)) as reader:
        records = _reconstruct.records_of(reader)
        if not _disk.steps_of(reader.directory):
            raise ValueError(f"{store} holds no snapshots; {_wanted(store)}")

        def summed(left: dict[int, _disk.Record]) -> None:
            plan = _plan.planned(
                reader, left, goal, step, name or None, normalize.value
            )
            _plan.warn_of_residual(plan)
            stored = _reconstruct.leaves_of(left, plan.parts)
            place = _reconstruct.sharding_of(None)

            def make(batch: list[int]) -> list[list[np.ndarray]]:
                found = _reconstruct.summed_leaves(
                    reader, left, plan.parts, batch, [place] * len(batch)
                )
                return [[np.asarray(x).astype(kind)] for x in found]

            leaves = [Leaf(leaf.path, leaf.shape, str(kind)) for leaf in stored]
            size = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in stored)
            reads = [(store, size * len(plan.parts))]
            wanted = ", ".join(f"--{name} {x}" for name, x in given.items())
            what = (
                f"{wanted} at step {plan.parts[-1].step} of {len(plan.parts)} snapshots"
            )
            write(output, reads, leaves, make, what)

        _reconstruct.without_broken(reader, records, summed)


def _check_directory(store: str) -> None:
    """Raises unless there is a directory, which may be that of a store."""
    if _disk.is_remote(store) or os.path.isdir(store):
        return
    said = "is not a directory" if os.path.exists(store) else "does not exist"
    raise ValueError(f"{store} {said}; {_wanted(store)}")


def _wanted(store: str) -> str:
    return (
        "reconstruct takes the directory to which a SnapshotStore saved. The mean of "
        f"finished checkpoints is: optax-avg merge soup {store} OTHER --out RESULT"
    )


def _dtype(name: str) -> Any:
    try:
        kind = jnp.dtype(name)
    except TypeError as error:
        raise typer.BadParameter(f"--dtype {name} is not a dtype.") from error
    if not jnp.issubdtype(kind, jnp.floating) or kind.itemsize > 8:
        raise typer.BadParameter(f"--dtype {name} is not a floating point type.")
    return kind


def inspect(
    path: Annotated[str, typer.Argument(help="A checkpoint, or a SnapshotStore.")],
    only: Only = None,
) -> None:
    """Show leaves, dtypes and bytes; of a store, its averages, widths and mean ages."""
    shown = Console()
    if path and _disk.is_store(path):
        with _disk.reader_of(_disk.absolute(path)) as reader:

            def newest(left: dict[int, _disk.Record]) -> tuple[Any, ...]:
                if not left:
                    raise ValueError(f"{path} has no snapshot that can be read.")
                last = left[max(left)]
                chosen = [(last, name) for name in last.leaves]
                return left, last, _plan.kinds_of(reader, chosen, {last.step: 0})

            records, last, kinds = _reconstruct.without_broken(
                reader, _reconstruct.records_of(reader), newest
            )
            shown.print(
                f"{len(records)} snapshots, steps {min(records)} to {max(records)}"
            )
            shown.print(
                _table((name, last.absorbed[name], k) for (_, name), k in kinds.items())
            )
            leaves = [
                Leaf((name, *leaf.path), leaf.shape, leaf.dtype)
                for name, found in last.leaves.items()
                for leaf in found
            ]
    else:
        source = open_checkpoint(path, only)
        leaves, averages = source.leaves, _averages_in(source)
        if averages:
            shown.print(_table(averages))
    table = Table(Column("leaf", overflow="fold"), "shape", "dtype", "bytes")
    for leaf in leaves:
        table.add_row(
            escape(leaf.name), str(leaf.shape), leaf.dtype, f"{leaf.nbytes:,}"
        )
    shown.print(table)
    total = sum(leaf.nbytes for leaf in leaves)
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    shown.print(f"{len(leaves)} leaves, {count:,} numbers, {total:,} bytes")


def _averages_in(source: Checkpoint) -> list[Row]:
    """Averages in a checkpoint of an optimizer state, by the names of its fields."""
    where = {leaf.path: i for i, leaf in enumerate(source.leaves)}
    rows: dict[tuple[int, str], Row] = {}
    for leaf in source.leaves:
        for depth, field in enumerate(leaf.path[:-1]):
            count = where.get((*leaf.path[:depth], "absorbed"))
            if field != "averages" or count is None or len(leaf.path) < depth + 3:
                continue
            name, part = leaf.path[depth + 1 : depth + 3]
            if (count, name) not in rows:
                gamma = where.get((*leaf.path[:depth], "averages", name, "gamma"))
                kind: Any = None
                if part == "ring":
                    kind = _clock.Window(leaf.shape[0])
                elif gamma is not None:
                    kind = _clock.Power(float(np.max(source.read([gamma])[0])))
                rows[count, name] = (name, int(np.max(source.read([count])[0])), kind)
    return [*rows.values()]


def _table(rows: Iterable[Row]) -> Table:
    names = Column("average", overflow="fold")
    table = Table(names, "iterates", "sigma_rel", "mean age", "kind")
    for bare, t, kind in rows:
        name = escape(bare)
        if kind is None or not t:
            table.add_row(name, str(t))
            continue
        p = _clock.weights_on_iterates(kind, t)
        mean = float(p @ np.arange(t + 1))
        width = math.sqrt(max(float(p @ (np.arange(t + 1) - mean) ** 2), 0)) / t
        described = type(kind).__name__.lower()
        table.add_row(
            escape(name), str(t), f"{width:.3g}", f"{t - mean:.4g}", described
        )
    return table
