"""``optax-avg merge``: the methods of :mod:`optax_avg.merging` over checkpoints."""

from typing import Annotated, Any

import jax
import typer

from optax_avg import merging
from optax_avg.cli._leafwise import as_a_whole, by_rule
from optax_avg.cli._merge_options import (
    Base,
    Common,
    Extrapolate,
    Models,
    Scale,
    Weights,
    between,
    check_count,
    finite,
    merge_models,
    merges,
    note_of_one,
    numbers,
)
from optax_avg.cli._output import Output, example
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


@merge.command(
    epilog=example(
        "merge soup a.safetensors b.safetensors --weights 0.7,0.3 --out "
        "soup.safetensors"
    ),
)
@merges
def soup(
    models: Models,
    output: Output,
    common: Common,
    weights: Weights = None,
    extrapolate: Extrapolate = False,
) -> None:
    """Take the weighted mean, by default the uniform one."""
    n = len(models)
    rule = soups.weighted_rule(n, numbers(weights, n, extrapolate))
    merge_models(by_rule(rule), models, output, common)
    note_of_one(models)


@merge.command(
    "wise-ft",
    epilog=example(
        "merge wise-ft tuned.safetensors --base base.safetensors --alpha "
        "0.5 --out mixed"
    ),
)
@merges
def wise_ft(
    tuned: Annotated[str, typer.Argument(help="The fine-tuned model.")],
    base: Base,
    output: Output,
    common: Common,
    alpha: Annotated[float, typer.Option(help="0: the base; 1: fine-tuned.")] = 0.5,
    extrapolate: Extrapolate = False,
) -> None:
    """Interpolate between a model and what it was fine-tuned from."""
    alpha = between("--alpha", alpha, extrapolate)
    rule = soups.wise_ft_rule(alpha)
    merge_models(by_rule(rule), [base, tuned], output, common)


@merge.command(
    "model-stock",
    epilog=example(
        "merge model-stock a.safetensors b.safetensors --base "
        "base.safetensors --out stock"
    ),
)
@merges
def model_stock(models: Models, base: Base, output: Output, common: Common) -> None:
    """Go from the mean towards the base, as far as the angle between models says."""
    rule = task_vectors.model_stock_rule(len(models))
    merge_models(by_rule(rule), [*models, base], output, common)


@merge.command(
    "task-arithmetic",
    epilog=example(
        "merge task-arithmetic a.safetensors b.safetensors --base "
        "base.safetensors --scale 0.4 --out sum"
    ),
)
@merges
def task_arithmetic(
    models: Models, base: Base, output: Output, common: Common, scale: Scale = 1.0
) -> None:
    """Add what fine-tuning changed to the base."""
    rule = task_vectors.task_arithmetic_rule(finite("--scale", scale))
    merge_models(by_rule(rule), [*models, base], output, common)


@merge.command(
    epilog=example(
        "merge ties a.safetensors b.safetensors --base base.safetensors "
        "--density 0.2 --out ties"
    ),
)
@merges
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
    n, scale = len(models), finite("--scale", scale)
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
    merge_models(method, [*models, base], output, common)


@merge.command(
    epilog=example(
        "merge slerp a.safetensors b.safetensors --t 0.3 --out between.safetensors"
    ),
)
@merges
def slerp(
    a: Annotated[str, typer.Argument(help="The model at 0.")],
    b: Annotated[str, typer.Argument(help="The model at 1.")],
    output: Output,
    common: Common,
    t: Annotated[float, typer.Option(help="Position on the arc.")] = 0.5,
    extrapolate: Extrapolate = False,
) -> None:
    """Interpolate along the arc between two models."""
    rule = spheres.slerp_rule(between("--t", t, extrapolate))
    merge_models(by_rule(rule), [a, b], output, common)


@merge.command(
    epilog=example("merge karcher a.safetensors b.safetensors --out k.safetensors"),
)
@merges
def karcher(
    models: Models, output: Output, common: Common, weights: Weights = None
) -> None:
    """Take the mean direction on the sphere, times the mean norm."""
    n = len(models)
    rule = spheres.karcher_rule(n, numbers(weights, n, extrapolate=True))
    merge_models(by_rule(rule), models, output, common)
    note_of_one(models)


@merge.command(
    "variance-corrected",
    epilog=example(
        "merge variance-corrected a.safetensors b.safetensors --out corrected"
    ),
)
@merges
def variance_corrected(
    models: Models,
    output: Output,
    common: Common,
    weights: Weights = None,
    extrapolate: Extrapolate = False,
) -> None:
    """Take the mean and rescale each leaf to the variance of its inputs."""
    n = len(models)
    rule = soups.variance_rule(n, numbers(weights, n, extrapolate))
    merge_models(by_rule(rule), models, output, common)
    note_of_one(models)


@merge.command(
    epilog=example(
        "merge fisher a.safetensors b.safetensors --fisher fa.safetensors "
        "--fisher fb.safetensors --out by_fisher"
    ),
)
@merges
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
    check_count("--fisher", fishers, n)
    rule = curvature.fisher_rule(n, numbers(weights, n, extrapolate))
    merge_models(by_rule(rule), [*models, *fishers], output, common)
    note_of_one(models)


@merge.command(
    "gradient-matching",
    epilog=example(
        "merge gradient-matching a.safetensors b.safetensors --base "
        "base.safetensors --hessian ha.safetensors --hessian hb.safetensors "
        "--base-hessian h_base.safetensors --out matched"
    ),
)
@merges
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
    n, scale = len(models), finite("--scale", scale)
    check_count("--hessian", hessians, n)
    rule = curvature.gradient_matching_rule(n, scale, damping)
    paths = [*models, *hessians, base, base_hessian]
    merge_models(by_rule(rule), paths, output, common)
