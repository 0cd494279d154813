"""``optax-avg reconstruct`` and ``optax-avg inspect``."""

import math
import os
from collections.abc import Iterable
from typing import Annotated, get_args

import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from optax_avg import posthoc, weights
from optax_avg._checkpoints.leaves import Leaf
from optax_avg._checkpoints.opening import open_checkpoint
from optax_avg._checkpoints.orbax import is_remote
from optax_avg._checkpoints.sources import Checkpoint
from optax_avg.cli._output import Only, Output, check, write, writes

SHAPES: tuple[weights.CooldownName, ...] = get_args(weights.CooldownName)


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
        int | None,
        typer.Option(help="Number of latest optimizer steps for a uniform mean."),
    ] = None,
    cooldown: Annotated[
        str | None,
        typer.Option(
            help="Shape of a cooldown (linear, sqrt or cosine) and its length in "
            "optimizer steps, such as sqrt:2000."
        ),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(
            help="Training step at which the average ends; by default the last."
        ),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(help="Average to combine; repeat it for several. By default all."),
    ] = None,
    normalize: Annotated[
        posthoc.Normalization,
        typer.Option(
            help="constrained: the best weights of snapshots that sum to one. "
            "sum: the best weights, divided by their sum. none: the best weights."
        ),
    ] = "constrained",
    dtype: Annotated[str, typer.Option(help="Dtype of the result.")] = "float32",
) -> None:
    """Build an average of any width from snapshots of other averages.

    Damaged snapshots are skipped with a warning that names them. A second warning
    states the error if the snapshots can give the average only with an error of more
    than 5 %. The half-life is that of a debiased EMA. A cooldown is what a cooldown of
    the learning rate would have led to. Of plain parameters (--name parameters) that
    were saved every so many steps, all targets are made as if there were no others.
    """
    kind = _dtype(dtype)
    targets = {
        "sigma-rel": sigma_rel,
        "half-life": half_life,
        "window": window,
        "cooldown": cooldown,
    }
    given = {name: x for name, x in targets.items() if x is not None}
    if len(given) != 1:
        raise typer.BadParameter(
            "pass one of --sigma-rel, --half-life, --window and --cooldown, got "
            f"{len(given)}."
        )
    cooled = None if cooldown is None else _cooldown(cooldown)
    check(output, [store])
    _check_directory(store)

    def summed(stream: posthoc.Stream) -> None:
        def make(batch: list[int]) -> list[list[np.ndarray]]:
            return [[np.asarray(x).astype(kind)] for x in stream.compute(batch)]

        leaves = [Leaf(leaf.path, leaf.shape, str(kind)) for leaf in stream.leaves]
        parts = stream.plan.parts
        wanted = ", ".join(f"--{name} {x}" for name, x in given.items())
        count = len({part.step for part in parts})  # each holds one average or more
        what = f"{wanted} at step {parts[-1].step} of {count} snapshots"
        write(output, [(store, stream.nbytes)], leaves, make, what)

    try:
        posthoc.stream_average(
            store,
            summed,
            sigma_rel=sigma_rel,
            half_life=half_life,
            window=window,
            cooldown=cooled,
            step=step,
            names=name or None,
            normalize=normalize,
        )
    except posthoc.NoSnapshotError:
        if posthoc.SnapshotStore(store).steps():
            raise
        raise ValueError(f"{store} holds no snapshots; {_wanted(store)}") from None


def _cooldown(given: str) -> tuple[weights.CooldownShape, int]:
    """The shape and the number of steps that an option gives, as in ``sqrt:2000``."""
    shape, _, steps = given.partition(":")
    for known in SHAPES:
        if shape == known and steps.isdecimal():
            return known, int(steps)
    raise typer.BadParameter(
        f"--cooldown {given} is not a shape ({', '.join(SHAPES)}) and a number of "
        "steps; write --cooldown sqrt:2000."
    )


def _check_directory(store: str) -> None:
    """Raises a ValueError unless there is a directory, which may be that of a store."""
    if is_remote(store) or os.path.isdir(store):
        return
    said = "is not a directory" if os.path.exists(store) else "does not exist"
    raise ValueError(f"{store} {said}; {_wanted(store)}")


def _wanted(store: str) -> str:
    """What to pass instead, for error messages."""
    return (
        "reconstruct takes the directory to which a SnapshotStore saved. The mean of "
        f"finished checkpoints is: optax-avg merge soup {store} OTHER --out RESULT"
    )


def _dtype(name: str) -> np.dtype:
    """The floating point type that an option names."""
    try:
        kind = jnp.dtype(name)
    except TypeError as error:
        raise typer.BadParameter(
            f"--dtype {name} is not a dtype; pass float32, bfloat16 or float16."
        ) from error
    if not jnp.issubdtype(kind, jnp.floating) or kind.itemsize > 8:
        raise typer.BadParameter(
            f"--dtype {name} is not a floating point type; pass float32, "
            "bfloat16 or float16."
        )
    return kind


def inspect(
    path: Annotated[
        str, typer.Argument(help="Checkpoint, or directory of a SnapshotStore.")
    ],
    only: Only = None,
) -> None:
    """Show the leaves of a checkpoint, and the averages in it with their widths."""
    shown = Console()
    if path and posthoc.is_store(path):
        found = posthoc.summarize_store(path)
        steps, leaves, averages = found.steps, found.leaves, found.averages
        shown.print(f"{len(steps)} snapshots, steps {steps[0]} to {steps[-1]}")
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


def _averages_in(source: Checkpoint) -> list[posthoc.AverageSummary]:
    """Averages in a checkpoint of an optimizer state, by the names of its fields."""
    where = {leaf.path: i for i, leaf in enumerate(source.leaves)}
    found: dict[tuple[int, str], posthoc.AverageSummary] = {}
    for leaf in source.leaves:
        for depth, field in enumerate(leaf.path[:-1]):
            count = where.get((*leaf.path[:depth], "absorbed"))
            if field != "averages" or count is None or len(leaf.path) < depth + 3:
                continue
            name, part = leaf.path[depth + 1 : depth + 3]
            if (count, name) not in found:
                gamma = where.get((*leaf.path[:depth], "averages", name, "gamma"))
                window = leaf.shape[0] if part == "ring" else None
                if window is not None or gamma is None:
                    power = None
                else:
                    power = _largest(source, gamma)
                found[count, name] = posthoc.summarize_average(
                    name, int(_largest(source, count)), gamma=power, window=window
                )
    return [*found.values()]


def _largest(source: Checkpoint, i: int) -> float:
    """The largest element of a leaf; a stacked state has several equal ones."""
    return float(np.max(source.read([i])[0]))


def _table(averages: Iterable[posthoc.AverageSummary]) -> Table:
    names = Column("average", overflow="fold")
    table = Table(names, "iterates", "sigma_rel", "mean age", "kind")
    for average in averages:
        cells = [escape(average.name), str(average.iterates)]
        if average.sigma_rel is not None and average.mean_age is not None:
            cells += [f"{average.sigma_rel:.3g}", f"{average.mean_age:.4g}"]
            cells.append(average.kind or "")
        table.add_row(*cells)
    return table
