"""The command ``optax-avg``: averages and merges of checkpoints larger than memory.

Exit codes: 0 done, 1 not done (the reason is printed), 2 wrong usage, 130 and 143
stopped by a signal.
"""

import logging
import math
import signal
import sys
import warnings
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from rich.table import Table

from optax_avg import merging
from optax_avg._checkpoints import (
    Leaf,
    check_free,
    open_checkpoint,
    write_checkpoint,
)
from optax_avg.posthoc import _disk, _profiles, _reconstruct
from optax_avg.posthoc._reconstruct import target_of

app = typer.Typer(
    help="Averages and merges of checkpoints, a few leaves in memory at a time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
merge = typer.Typer(
    help="Merge finished models of the same leaves into one. A model is an Orbax "
    "checkpoint or a .safetensors file; the result has the dtypes of the first.",
    no_args_is_help=True,
)
app.add_typer(merge, name="merge")
BATCH = 2**25  # bytes of leaves that are read and merged together

Models = Annotated[list[str], typer.Argument(help="The models.")]
Out = Annotated[
    str, typer.Option(help="The result: a directory for Orbax, or a .safetensors file.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at --out.")]
Only = Annotated[
    str | None,
    typer.Option(help="The subtree to take, such as params or state.params."),
]
Base = Annotated[str, typer.Option(help="The model that they were fine-tuned from.")]
Scale = Annotated[float, typer.Option(help="Of what is added to the base.")]
Weights = Annotated[
    str | None, typer.Option(help="Of the models, such as 0.7,0.3; their sum is one.")
]


class Normalize(StrEnum):
    """How the weights of snapshots are normalised."""

    constrained = "constrained"
    sum = "sum"
    none = "none"


class Stopped(BaseException):
    """A signal has come. Not an Exception, which the layers below would take."""


signals: list[int] = []


def main() -> None:
    """Runs the command; what goes wrong is one line, and nothing is half written."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    before = {n: signal.signal(n, _note) for n in (signal.SIGINT, signal.SIGTERM)}
    signals.clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
            app()
    except Stopped:
        _say("stopped; nothing was written.")
        sys.exit(128 + signals[0])
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        _say(f"error: {error}")
        sys.exit(1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _note(number: int, frame: Any) -> None:
    """Stops at the next leaf, at a second signal at once.

    An exception that is raised here may be lost in a callback of another library.
    """
    del frame
    signals.append(number)
    if len(signals) > 1:
        raise Stopped


def _check_signals() -> None:
    if signals:
        raise Stopped


def _say(line: str) -> None:
    Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
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
            _write(out, leaves, make, force)

        _reconstruct.without_broken(records, summed)


def _dtype(name: str) -> Any:
    try:
        kind = jnp.dtype(name)
    except TypeError as error:
        raise typer.BadParameter(f"--dtype {name} is not a dtype.") from error
    if not jnp.issubdtype(kind, jnp.floating):
        raise typer.BadParameter(f"--dtype {name} is not a floating point type.")
    return kind


def _write(
    out: str,
    leaves: list[Leaf],
    make: Callable[[list[int]], list[np.ndarray]],
    force: bool,
) -> None:
    """Writes leaves that are made a batch at a time."""
    check_free(out, force)
    order = sorted(range(len(leaves)), key=lambda i: leaves[i].path)
    batch_of: dict[int, list[int]] = {}
    batch, total = [], 0
    for i in order:
        if batch and total + leaves[i].nbytes > BATCH:
            batch, total = [], 0
        batch.append(i)
        batch_of[i] = batch
        total += leaves[i].nbytes
    made: dict[int, np.ndarray] = {}
    with _progress() as progress:
        task = progress.add_task(out, total=sum(leaf.nbytes for leaf in leaves))

        def load(j: int) -> np.ndarray:
            _check_signals()
            i = order[j]
            if i not in made:
                made.clear()
                made.update(zip(batch_of[i], make(batch_of[i]), strict=True))
            progress.advance(task, leaves[i].nbytes)
            return made.pop(i)

        write_checkpoint(out, [leaves[i] for i in order], load, force=force)


def _progress() -> Progress:
    return Progress(
        "{task.description}",
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _merge(
    rule: Callable[..., Any],
    models: list[str],
    others: list[str],
    out: str,
    only: str | None,
    force: bool,
) -> None:
    """Merges ``rule(models, *others)`` a batch of leaves at a time."""
    paths = [*models, *others]
    sources = [open_checkpoint(path, only) for path in paths]
    leaves = sources[0].leaves
    places = []
    for path, source in zip(paths, sources, strict=True):
        where = {leaf.path: i for i, leaf in enumerate(source.leaves)}
        _check_alike(leaves, [source.leaves[i] for i in where.values()], path, paths[0])
        places.append([where[leaf.path] for leaf in leaves])
    compiled = jax.jit(lambda trees: rule(trees[: len(models)], *trees[len(models) :]))

    # What JAX would make 32 bits of, it gets as it is.
    double = any(leaf.dtype in ("float64", "complex128") for leaf in leaves)

    def make(batch: list[int]) -> list[np.ndarray]:
        floats = [
            i for i in batch if jnp.issubdtype(jnp.dtype(leaves[i].dtype), jnp.inexact)
        ]
        others = [i for i in batch if i not in floats]
        made = dict(zip(others, sources[0].read(others), strict=True))
        trees = []
        for source, place in zip(sources, places, strict=True):
            arrays = source.read([place[i] for i in floats])
            named = zip(floats, arrays, strict=True)
            trees.append(_disk.nested({leaves[i].path: x for i, x in named}))
        with jax.enable_x64(double):
            merged = _disk.flat(jax.device_get(compiled(trees)))
        made |= {i: merged[leaves[i].path] for i in floats}
        return [made[i] for i in batch]

    _write(out, leaves, make, force)


def _check_alike(leaves: list[Leaf], others: list[Leaf], path: str, first: str) -> None:
    theirs = {leaf.path: leaf.shape for leaf in others}
    ours = {leaf.path: leaf.shape for leaf in leaves}
    for name, shape in ours.items():
        if name not in theirs:
            raise ValueError(f"{path} has no leaf {'.'.join(name)}, which {first} has.")
        if theirs[name] != shape:
            raise ValueError(
                f"{'.'.join(name)} has shape {theirs[name]} in {path}, {shape} in "
                f"{first}."
            )
    for name in theirs:
        if name not in ours:
            raise ValueError(f"{path} has a leaf {'.'.join(name)}, {first} has not.")


def _numbers(given: str | None, models: list[str]) -> list[float]:
    if given is None:
        return [1 / len(models)] * len(models)
    try:
        found = [float(x) for x in given.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--weights {given} are not numbers.") from error
    if len(found) != len(models) or abs(sum(found) - 1) > 1e-6:
        raise typer.BadParameter(
            f"--weights must be {len(models)} numbers of sum one, got {given}."
        )
    return found


@merge.command()
def soup(
    models: Models,
    out: Out,
    weights: Weights = None,
    only: Only = None,
    force: Force = False,
) -> None:
    """Take the weighted mean, by default the uniform one."""
    w = _numbers(weights, models)
    _merge(lambda xs: merging.weighted(xs, w), models, [], out, only, force)


@merge.command("wise-ft")
def wise_ft(
    tuned: Annotated[str, typer.Argument(help="The fine-tuned model.")],
    base: Base,
    out: Out,
    alpha: Annotated[float, typer.Option(help="0: the base; 1: fine-tuned.")] = 0.5,
    only: Only = None,
    force: Force = False,
) -> None:
    """Interpolate between a model and what it was fine-tuned from."""
    rule = lambda xs, x0: merging.wise_ft(x0, xs[0], alpha)
    _merge(rule, [tuned], [base], out, only, force)


@merge.command("model-stock")
def model_stock(
    models: Models, base: Base, out: Out, only: Only = None, force: Force = False
) -> None:
    """Go from the mean towards the base, as far as the angle between models says."""
    _merge(merging.model_stock, models, [base], out, only, force)


@merge.command("task-arithmetic")
def task_arithmetic(
    models: Models,
    base: Base,
    out: Out,
    scale: Scale = 1.0,
    only: Only = None,
    force: Force = False,
) -> None:
    """Add what fine-tuning changed to the base."""
    rule = lambda xs, x0: merging.task_arithmetic(xs, x0, scale)
    _merge(rule, models, [base], out, only, force)


@merge.command()
def ties(
    models: Models,
    base: Base,
    out: Out,
    density: Annotated[float, typer.Option(help="Share of a leaf that stays.")] = 0.2,
    scale: Scale = 1.0,
    drop: Annotated[
        bool, typer.Option("--dare", help="Keep the share at random, rescaled (DARE).")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of --dare.")] = 0,
    only: Only = None,
    force: Force = False,
) -> None:
    """Trim task vectors, elect signs, average who agree; --dare drops instead."""

    def rule(xs: Any, x0: Any) -> Any:
        if drop:
            return merging.ties(
                merging.dare(xs, x0, density, seed), x0, 1.0, scale=scale
            )
        return merging.ties(xs, x0, density, scale=scale)

    _merge(rule, models, [base], out, only, force)


@merge.command()
def slerp(
    a: Annotated[str, typer.Argument(help="The model at 0.")],
    b: Annotated[str, typer.Argument(help="The model at 1.")],
    out: Out,
    t: Annotated[float, typer.Option(help="Position on the arc.")] = 0.5,
    only: Only = None,
    force: Force = False,
) -> None:
    """Interpolate along the arc between two models."""
    rule = lambda xs: merging.slerp(xs[0], xs[1], t)
    _merge(rule, [a, b], [], out, only, force)


@merge.command()
def karcher(
    models: Models,
    out: Out,
    weights: Weights = None,
    only: Only = None,
    force: Force = False,
) -> None:
    """Take the mean direction on the sphere, times the mean norm."""
    w = _numbers(weights, models)
    _merge(lambda xs: merging.karcher(xs, w), models, [], out, only, force)


@merge.command("variance-corrected")
def variance_corrected(
    models: Models,
    out: Out,
    weights: Weights = None,
    only: Only = None,
    force: Force = False,
) -> None:
    """Take the mean and rescale each leaf to the variance of its inputs."""
    w = _numbers(weights, models)
    _merge(lambda xs: merging.variance_corrected(xs, w), models, [], out, only, force)


@merge.command()
def fisher(
    models: Models,
    out: Out,
    fishers: Annotated[
        list[str],
        typer.Option(
            "--fisher", help="Diagonal Fisher matrix; once a model, in order."
        ),
    ],
    weights: Weights = None,
    only: Only = None,
    force: Force = False,
) -> None:
    """Weigh every element by its Fisher information."""
    if len(fishers) != len(models):
        raise typer.BadParameter(f"{len(models)} models need as many --fisher.")
    w = _numbers(weights, models)
    rule = lambda xs, *fs: merging.fisher(xs, list(fs), w)
    _merge(rule, models, fishers, out, only, force)


@merge.command("gradient-matching")
def gradient_matching(
    models: Models,
    base: Base,
    out: Out,
    hessians: Annotated[
        list[str],
        typer.Option("--hessian", help="Diagonal Hessian; once a model, in order."),
    ],
    base_hessian: Annotated[str, typer.Option(help="Diagonal Hessian of the base.")],
    scale: Scale = 1.0,
    damping: Annotated[float, typer.Option(help="Added to the base's Hessian.")] = 0.0,
    only: Only = None,
    force: Force = False,
) -> None:
    """Merge so that gradients match, by diagonal Hessians."""
    if len(hessians) != len(models):
        raise typer.BadParameter(f"{len(models)} models need as many --hessian.")

    def rule(xs: Any, x0: Any, h0: Any, *hs: Any) -> Any:
        return merging.gradient_matching(xs, list(hs), x0, h0, scale, damping)

    _merge(rule, models, [base, base_hessian, *hessians], out, only, force)


@app.command()
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
            shown.print(_averages(reader, last))
            leaves = [
                Leaf((name, *leaf.path), leaf.shape, leaf.dtype)
                for name, found in last.leaves.items()
                for leaf in found
            ]
    else:
        leaves = open_checkpoint(path, only).leaves
    table = Table("leaf", "shape", "dtype", "bytes")
    for leaf in leaves:
        table.add_row(leaf.name, str(leaf.shape), leaf.dtype, f"{leaf.nbytes:,}")
    shown.print(table)
    total = sum(leaf.nbytes for leaf in leaves)
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    shown.print(f"{len(leaves)} leaves, {count:,} numbers, {total:,} bytes")


def _averages(reader: Any, record: Any) -> Table:
    table = Table("average", "iterates", "sigma_rel", "mean age", "kind")
    chosen = [(record, name) for name in record.leaves]
    for (_, name), kind in _reconstruct.kinds_of(reader, chosen).items():
        t = record.absorbed[name]
        p = _profiles.weights_on_iterates(kind, t)
        mean = float(p @ np.arange(t + 1))
        width = math.sqrt(max(float(p @ (np.arange(t + 1) - mean) ** 2), 0)) / t
        described = next(iter(record.kinds[name]))
        table.add_row(name, str(t), f"{width:.3g}", f"{t - mean:.4g}", described)
    return table
