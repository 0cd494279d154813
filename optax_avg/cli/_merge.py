"""``optax-avg merge``: the methods of :mod:`optax_avg.merging` over checkpoints."""

import inspect
import math
import os
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import typer

from optax_avg import merging
from optax_avg.cli._huggingface import folder_of
from optax_avg.cli._leafwise import Method, as_a_whole, by_rule, merge_checkpoints
from optax_avg.cli._output import Output, bundles, example, say, writes
from optax_avg.cli._safetensors import SUFFIX
from optax_avg.cli._shards import bytes_of, folder_like
from optax_avg.cli._targets import Format
from optax_avg.cli._writing import format_of, safetensors_with
from optax_avg.merging import curvature, soups, spheres, task_vectors

merge = typer.Typer(
    help="Merge finished models of the same leaves into one. A model is an Orbax "
    "checkpoint, a .safetensors file or a Hugging Face folder of such files. The "
    "result has the dtypes, integers and metadata of the first model, of the base for "
    "wise-ft. If that is a Hugging Face folder, --out is one too, with its "
    "configuration and tokenizer, unless it ends with .safetensors.",
    no_args_is_help=True,
    epilog=example("merge soup a.safetensors b.safetensors --out soup.safetensors"),
)
LARGEST = "5GB"  # shards of Hugging Face folders
Models = Annotated[list[str], typer.Argument(help="The models.")]
Base = Annotated[str, typer.Option(help="The model that they were fine-tuned from.")]
Scale = Annotated[float, typer.Option(help="Of what is added to the base.")]
Weights = Annotated[
    str | None, typer.Option(help="Of the models, such as 0.7,0.3; their sum is one.")
]
Extrapolate = Annotated[
    bool, typer.Option("--extrapolate", help="Allow what does not lie between models.")
]
Only = Annotated[
    str | None,
    typer.Option(help="The subtree to take, such as params or state.params."),
]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Merge models with NaN or inf.")
]
MaxShardSize = Annotated[
    str | None,
    typer.Option(help=f"Of a Hugging Face folder, such as 500MB; default {LARGEST}."),
]


class Common(NamedTuple):
    """Options of every merge, beside those of every command that writes."""

    only: str | None
    allow_nonfinite: bool
    max_shard_size: str | None


def _merges(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of :class:`Common` and :class:`Output`."""
    kind = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter("only", kind, annotation=Only, default=None),
        inspect.Parameter(
            "allow_nonfinite", kind, annotation=AllowNonfinite, default=False
        ),
        inspect.Parameter(
            "max_shard_size", kind, annotation=MaxShardSize, default=None
        ),
    ]
    return writes(bundles(command, "common", Common, options))


def _merge(method: Method, paths: list[str], output: Output, common: Common) -> None:
    """Merges the models and what else a method takes."""
    size = common.max_shard_size
    try:
        max_bytes = bytes_of(LARGEST if size is None else size)
    except ValueError as error:
        raise typer.BadParameter(f"--max-shard-size: {error}") from error
    folder = (
        None if os.path.normpath(output.out).endswith(SUFFIX) else folder_of(paths[0])
    )
    if folder is None and size is not None:
        raise typer.BadParameter(
            "--max-shard-size is for Hugging Face folders; the first model is none, or "
            f"--out names a {SUFFIX} file."
        )
    if folder is not None and common.only is not None:
        raise typer.BadParameter(
            f"--only takes a part, no Hugging Face model; pass --out NAME{SUFFIX}."
        )

    def kind(path: str, metadata: dict[str, str]) -> Format:
        if folder is not None:
            return folder_like(folder, max_bytes, metadata)
        return safetensors_with(metadata) if path.endswith(SUFFIX) else format_of(path)

    merge_checkpoints(
        method,
        paths,
        output,
        only=common.only,
        allow_nonfinite=common.allow_nonfinite,
        format_of=kind,
    )


def _numbers(given: str | None, n: int, extrapolate: bool) -> list[float] | None:
    """Weights of the models; None for equal ones."""
    if given is None:
        return None
    try:
        found = [float(x) for x in given.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--weights {given} are not numbers.") from error
    if len(found) != n or not abs(sum(found) - 1) <= 1e-6:
        raise typer.BadParameter(
            f"--weights must be {n} numbers of sum one, got {given}."
        )
    if min(found) < 0 and not extrapolate:
        raise typer.BadParameter(
            f"--weights {given} are not all between 0 and 1; pass --extrapolate to "
            "use them."
        )
    return found


def _between(name: str, value: float, extrapolate: bool) -> float:
    """A position between two models."""
    if not math.isfinite(value) or not (0 <= value <= 1 or extrapolate):
        raise typer.BadParameter(
            f"{name} {value:g} is not between 0 and 1; pass --extrapolate to use it."
        )
    return value


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{name} must be finite, got {value:g}.")
    return value


def _note_of_one(models: list[str]) -> None:
    """Says that nothing is merged, as where a pattern of names matched one file."""
    if len(models) == 1:
        say(f"note: {models[0]} is the only model, so that the result is a copy of it.")


def _check_count(name: str, given: list[str], n: int) -> None:
    if len(given) != n:
        raise typer.BadParameter(f"{n} models need as many {name}.")


@merge.command(
    epilog=example(
        "merge soup a.safetensors b.safetensors --weights 0.7,0.3 --out "
        "soup.safetensors"
    ),
)
@_merges
def soup(
    models: Models,
    output: Output,
    common: Common,
    weights: Weights = None,
    extrapolate: Extrapolate = False,
) -> None:
    """Take the weighted mean, by default the uniform one."""
    n = len(models)
    rule = soups.weighted_rule(n, _numbers(weights, n, extrapolate))
    _merge(by_rule(rule), models, output, common)
    _note_of_one(models)


@merge.command(
    "wise-ft",
    epilog=example(
        "merge wise-ft tuned.safetensors --base base.safetensors --alpha "
        "0.5 --out mixed"
    ),
)
@_merges
def wise_ft(
    tuned: Annotated[str, typer.Argument(help="The fine-tuned model.")],
    base: Base,
    output: Output,
    common: Common,
    alpha: Annotated[float, typer.Option(help="0: the base; 1: fine-tuned.")] = 0.5,
    extrapolate: Extrapolate = False,
) -> None:
    """Interpolate between a model and what it was fine-tuned from."""
    alpha = _between("--alpha", alpha, extrapolate)
    rule = soups.wise_ft_rule(alpha)
    _merge(by_rule(rule), [base, tuned], output, common)


@merge.command(
    "model-stock",
    epilog=example(
        "merge model-stock a.safetensors b.safetensors --base "
        "base.safetensors --out stock"
    ),
)
@_merges
def model_stock(models: Models, base: Base, output: Output, common: Common) -> None:
    """Go from the mean towards the base, as far as the angle between models says."""
    rule = task_vectors.model_stock_rule(len(models))
    _merge(by_rule(rule), [*models, base], output, common)


@merge.command(
    "task-arithmetic",
    epilog=example(
        "merge task-arithmetic a.safetensors b.safetensors --base "
        "base.safetensors --scale 0.4 --out sum"
    ),
)
@_merges
def task_arithmetic(
    models: Models, base: Base, output: Output, common: Common, scale: Scale = 1.0
) -> None:
    """Add what fine-tuning changed to the base."""
    rule = task_vectors.task_arithmetic_rule(_finite("--scale", scale))
    _merge(by_rule(rule), [*models, base], output, common)


@merge.command(
    epilog=example(
        "merge ties a.safetensors b.safetensors --base base.safetensors "
        "--density 0.2 --out ties"
    ),
)
@_merges
def ties(
    models: Models,
    base: Base,
    output: Output,
    common: Common,
    density: Annotated[float, typer.Option(help="Share of a leaf that stays.")] = 0.2,
    scale: Scale = 1.0,
    drop: Annotated[
        bool, typer.Option("--dare", help="Keep the share at random, rescaled (DARE).")
    ] = False,
    seed: Annotated[
        int, typer.Option(help="Random seed of --dare.", min=-(2**63), max=2**63 - 1)
    ] = 0,
) -> None:
    """Trim task vectors, elect signs, average who agree; --dare drops instead.

    Large leaves are merged in parts; with --dare they are merged whole.
    """
    n, scale = len(models), _finite("--scale", scale)
    rule = task_vectors.ties_rule(n, density, scale)

    @jax.jit
    def dropped(number: Any, xs: list[jax.Array]) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), number)
        kept = merging.dare(xs[:n], xs[n], density, key)
        return merging.ties(kept, xs[n], 1.0, scale=scale).astype(xs[0].dtype)

    method = by_rule(rule)
    if drop:
        number = lambda leaf: jax.numpy.uint32(task_vectors.number_of(leaf.name))
        method = as_a_whole(lambda leaf, xs: dropped(number(leaf), xs))
    _merge(method, [*models, base], output, common)


@merge.command(
    epilog=example(
        "merge slerp a.safetensors b.safetensors --t 0.3 --out between.safetensors"
    ),
)
@_merges
def slerp(
    a: Annotated[str, typer.Argument(help="The model at 0.")],
    b: Annotated[str, typer.Argument(help="The model at 1.")],
    output: Output,
    common: Common,
    t: Annotated[float, typer.Option(help="Position on the arc.")] = 0.5,
    extrapolate: Extrapolate = False,
) -> None:
    """Interpolate along the arc between two models."""
    rule = spheres.slerp_rule(_between("--t", t, extrapolate))
    _merge(by_rule(rule), [a, b], output, common)


@merge.command(
    epilog=example("merge karcher a.safetensors b.safetensors --out k.safetensors"),
)
@_merges
def karcher(
    models: Models, output: Output, common: Common, weights: Weights = None
) -> None:
    """Take the mean direction on the sphere, times the mean norm."""
    n = len(models)
    rule = spheres.karcher_rule(n, _numbers(weights, n, extrapolate=True))
    _merge(by_rule(rule), models, output, common)
    _note_of_one(models)


@merge.command(
    "variance-corrected",
    epilog=example(
        "merge variance-corrected a.safetensors b.safetensors --out corrected"
    ),
)
@_merges
def variance_corrected(
    models: Models,
    output: Output,
    common: Common,
    weights: Weights = None,
    extrapolate: Extrapolate = False,
) -> None:
    """Take the mean and rescale each leaf to the variance of its inputs."""
    n = len(models)
    rule = soups.variance_rule(n, _numbers(weights, n, extrapolate))
    _merge(by_rule(rule), models, output, common)
    _note_of_one(models)


@merge.command(
    epilog=example(
        "merge fisher a.safetensors b.safetensors --fisher fa.safetensors "
        "--fisher fb.safetensors --out by_fisher"
    ),
)
@_merges
def fisher(
    models: Models,
    output: Output,
    common: Common,
    fishers: Annotated[
        list[str],
        typer.Option(
            "--fisher", help="Diagonal Fisher matrix; once a model, in order."
        ),
    ],
    weights: Weights = None,
    extrapolate: Extrapolate = False,
) -> None:
    """Weigh every element by its Fisher information."""
    n = len(models)
    _check_count("--fisher", fishers, n)
    rule = curvature.fisher_rule(n, _numbers(weights, n, extrapolate))
    _merge(by_rule(rule), [*models, *fishers], output, common)
    _note_of_one(models)


@merge.command(
    "gradient-matching",
    epilog=example(
        "merge gradient-matching a.safetensors b.safetensors --base "
        "base.safetensors --hessian ha.safetensors --hessian hb.safetensors "
        "--base-hessian h_base.safetensors --out matched"
    ),
)
@_merges
def gradient_matching(
    models: Models,
    base: Base,
    output: Output,
    common: Common,
    hessians: Annotated[
        list[str],
        typer.Option("--hessian", help="Diagonal Hessian; once a model, in order."),
    ],
    base_hessian: Annotated[str, typer.Option(help="Diagonal Hessian of the base.")],
    scale: Scale = 1.0,
    damping: Annotated[float, typer.Option(help="Added to the base's Hessian.")] = 0.0,
) -> None:
    """Merge so that gradients match, by diagonal Hessians."""
    n, scale = len(models), _finite("--scale", scale)
    _check_count("--hessian", hessians, n)
    rule = curvature.gradient_matching_rule(n, scale, damping)
    paths = [*models, *hessians, base, base_hessian]
    _merge(by_rule(rule), paths, output, common)
