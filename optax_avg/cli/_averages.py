"""``optax-avg reconstruct`` and ``optax-avg inspect``."""

import math
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from optax_avg.cli._checkpoints import Checkpoint, Leaf, open_checkpoint
from optax_avg.cli._output import Force, Only, Out, write
from optax_avg.posthoc import _disk, _profiles, _reconstruct
from optax_avg.posthoc._reconstruct import target_of

Row = tuple[str, int, Any]  # name, iterates, and which average it is, if known


class Normalize(StrEnum):
    """How the weights of snapshots are normalised."""

    constrained = "constrained"
    sum = "sum"
    none = "none"


def reconstruct(
    store: Annotated[str, typer.Argument(help="Directory of a SnapshotStore.")],
    out: Out,
    sigma_rel: Annotated[
        float | None, typer.Option(help="Relative width of a power function.")
    ] = None,
    half_life: Annotated[
        float | None, typer.Option(help="Half-life of an EMA, in iterates.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Iterates in a mean of the latest.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Where the average ends; by default the last.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="Averages to make it of; by default all.")
    ] = None,
    normalize: Annotated[Normalize, typer.Option()] = Normalize.constrained,
    dtype: Annotated[str, typer.Option(help="Of the result.")] = "float32",
    force: Force = False,
) -> None:
    """Make an average that was not kept, from the snapshots of others.

    Snapshots that cannot be read are named and left out, and a width that the snapshots
    cannot express is said, with those that they can.
    """
    kind = _dtype(dtype)
    goal = target_of(sigma_rel, half_life, window)
    with _disk.reader_of(_disk.absolute(store)) as reader:
        records = _reconstruct.records_of(reader)

        def summed(left: dict[int, _disk.Record]) -> None:
            plan = _reconstruct.planned(
                reader, left, goal, step, name or None, normalize.value
            )
            _reconstruct.warn_of_residual(plan)
            stored = _reconstruct.leaves_of(left, plan.parts)
            place = _reconstruct.sharding_of(None)

            def make(batch: list[int]) -> list[np.ndarray]:
                found = _reconstruct.summed_leaves(
                    reader, left, plan.parts, batch, [place] * len(batch)
                )
                return [np.asarray(x.astype(kind)) for x in found]

            leaves = [Leaf(leaf.path, leaf.shape, str(kind)) for leaf in stored]
            write(out, leaves, make, force)

        _reconstruct.without_broken(records, summed)


def _dtype(name: str) -> Any:
    try:
        kind = jnp.dtype(name)
    except TypeError as error:
        raise typer.BadParameter(f"--dtype {name} is not a dtype.") from error
    if not jnp.issubdtype(kind, jnp.floating):
        raise typer.BadParameter(f"--dtype {name} is not a floating point type.")
    return kind


def inspect(
    path: Annotated[str, typer.Argument(help="A checkpoint, or a SnapshotStore.")],
    only: Only = None,
) -> None:
    """Show leaves, dtypes and bytes; of a store, its averages, widths and mean ages."""
    shown = Console()
    if _disk.is_store(path):
        with _disk.reader_of(path) as reader:
            records = _reconstruct.records_of(reader)
            if not records:
                raise ValueError(f"{path} has no snapshot that can be read.")
            last = records[max(records)]
            shown.print(
                f"{len(records)} snapshots, steps {min(records)} to {max(records)}"
            )
            chosen = [(last, name) for name in last.leaves]
            kinds = _reconstruct.kinds_of(reader, chosen)
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
    table = Table("leaf", "shape", "dtype", "bytes")
    for leaf in leaves:
        table.add_row(leaf.name, str(leaf.shape), leaf.dtype, f"{leaf.nbytes:,}")
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
            if field not in ("averages", "windows") or count is None:
                continue
            name = leaf.path[depth + 1]
            if (count, name) not in rows:
                kind: Any = _profiles.power_of_name(name)
                if field == "windows":
                    kind = _profiles.Window(leaf.shape[0])
                rows[count, name] = (name, int(np.max(source.read([count])[0])), kind)
    return [*rows.values()]


def _table(rows: Iterable[Row]) -> Table:
    table = Table("average", "iterates", "sigma_rel", "mean age", "kind")
    for name, t, kind in rows:
        if kind is None or not t:
            table.add_row(name, str(t))
            continue
        p = _profiles.weights_on_iterates(kind, t)
        mean = float(p @ np.arange(t + 1))
        width = math.sqrt(max(float(p @ (np.arange(t + 1) - mean) ** 2), 0)) / t
        described = type(kind).__name__.lower()
        table.add_row(name, str(t), f"{width:.3g}", f"{t - mean:.4g}", described)
    return table
