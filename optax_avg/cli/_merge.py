"""``optax-avg merge``: the functions of :mod:`optax_avg.merging` over checkpoints."""

import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from optax_avg import merging
from optax_avg.cli._checkpoints import Leaf, open_checkpoint
from optax_avg.cli._output import Force, Only, Out, write

merge = typer.Typer(
    help="Merge finished models of the same leaves into one. A model is an Orbax "
    "checkpoint or a .safetensors file; the result has the dtypes of the first.",
    no_args_is_help=True,
)
READERS = 2  # models that are read at the same time
Models = Annotated[list[str], typer.Argument(help="The models.")]
Base = Annotated[str, typer.Option(help="The model that they were fine-tuned from.")]
Scale = Annotated[float, typer.Option(help="Of what is added to the base.")]
Weights = Annotated[
    str | None, typer.Option(help="Of the models, such as 0.7,0.3; their sum is one.")
]


def _merge(
    rule: Callable[..., Any],
    models: list[str],
    others: list[str],
    out: str,
    only: str | None,
    force: bool,
    compiles: Callable[..., Any] = jax.jit,
) -> None:
    """Merges ``rule(name, models, *others)`` leaf by leaf.

    A name is the number that :func:`optax_avg.merging.dare` makes of it.
    """
    paths = [*models, *others]
    sources = [open_checkpoint(path, only) for path in paths]
    leaves = sources[0].leaves
    places = []
    for path, source in zip(paths, sources, strict=True):
        where = {leaf.path: i for i, leaf in enumerate(source.leaves)}
        _check_alike(leaves, [source.leaves[i] for i in where.values()], path, paths[0])
        places.append([where[leaf.path] for leaf in leaves])
    n = len(models)
    compiled = compiles(lambda name, xs: rule(name, xs[:n], *xs[n:]))

    def merged(i: int, arrays: list[np.ndarray]) -> np.ndarray:
        path, dtype = leaves[i].path, leaves[i].dtype
        name = zlib.crc32("".join(f"[{part!r}]" for part in path).encode())
        # What JAX would make 32 bits of, it gets as it is.
        with jax.enable_x64(dtype in ("float64", "complex128")):
            return np.asarray(compiled(np.uint32(name), arrays))

    def make(batch: list[int]) -> list[np.ndarray]:
        floats = [
            i for i in batch if jnp.issubdtype(jnp.dtype(leaves[i].dtype), jnp.inexact)
        ]
        kept = [i for i in batch if i not in floats]
        made = dict(zip(kept, sources[0].read(kept), strict=True))
        columns = list(
            readers.map(
                lambda source, place: source.read([place[i] for i in floats]),
                sources,
                places,
            )
        )
        for i in reversed(floats):
            made[i] = merged(i, [column.pop() for column in columns])
        return [made[i] for i in batch]

    with ThreadPoolExecutor(READERS) as readers:
        write(out, leaves, make, force)


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
    _merge(lambda _, xs: merging.weighted(xs, w), models, [], out, only, force)


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
    rule = lambda _, xs, x0: merging.wise_ft(x0, xs[0], alpha)
    _merge(rule, [tuned], [base], out, only, force)


@merge.command("model-stock")
def model_stock(
    models: Models, base: Base, out: Out, only: Only = None, force: Force = False
) -> None:
    """Go from the mean towards the base, as far as the angle between models says."""
    _merge(lambda _, *xs: merging.model_stock(*xs), models, [base], out, only, force)


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
    rule = lambda _, xs, x0: merging.task_arithmetic(xs, x0, scale)
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

    def rule(name: Any, xs: Any, x0: Any) -> Any:
        if drop:
            key = jax.random.fold_in(jax.random.key(seed), name)
            dropped = merging.dare(xs, x0, density, key)
            return merging.ties(dropped, x0, 1.0, scale=scale)
        return merging.ties(xs, x0, density, scale=scale)

    # Its threshold is found on the host, the rest is compiled in it.
    compiles = jax.jit if drop else (lambda rule: rule)
    _merge(rule, models, [base], out, only, force, compiles)


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
    rule = lambda _, xs: merging.slerp(xs[0], xs[1], t)
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
    _merge(lambda _, xs: merging.karcher(xs, w), models, [], out, only, force)


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
    rule = lambda _, xs: merging.variance_corrected(xs, w)
    _merge(rule, models, [], out, only, force)


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
    rule = lambda _, xs, *fs: merging.fisher(xs, list(fs), w)
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

    def rule(name: Any, xs: Any, x0: Any, h0: Any, *hs: Any) -> Any:
        return merging.gradient_matching(xs, list(hs), x0, h0, scale, damping)

    _merge(rule, models, [base, base_hessian, *hessians], out, only, force)
