"""``optax-avg merge``: the methods of :mod:`optax_avg.merging` over checkpoints."""

from typing import Annotated

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
    check_order,
    finite,
    merge_models,
    merges,
    note_of_one,
    numbers,
)
from optax_avg.cli._output import Output, example
from optax_avg.merging import curvature, soups, spheres, task_vectors
from optax_avg.weights import CooldownName

merge = typer.Typer(
    help="Merge finished models of the same leaves into one. A model is an Orbax "
    "checkpoint, a .safetensors file or a Hugging Face folder of such files. The "
    "result has the dtypes, integers and metadata of the first model (for wise-ft, of "
    "the base). If the first model is a Hugging Face folder, --out becomes one too, "
    "with its configuration and tokenizer, unless --out ends with .safetensors.",
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
    """Take the weighted mean of the models, by default the uniform one."""
    n = len(models)
    rule = soups.weighted_rule(n, numbers(weights, n, extrapolate))
    merge_models(by_rule(rule), models, output, common)
    note_of_one(models)


@merge.command(
    epilog=example("merge cooldown step_1000 step_2000 step_3000 --out cooled"),
)
@merges
def cooldown(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoints of one training, evenly spaced, oldest first."
        ),
    ],
    output: Output,
    common: Common,
    shape: Annotated[
        CooldownName,
        typer.Option(
            help="How the learning rate falls: linear (the uniform mean), sqrt or "
            "cosine."
        ),
    ] = "sqrt",
) -> None:
    """Take the mean that a cooldown of the learning rate would have led to.

    The checkpoints come from a training at a constant rate. The cooldown begins one
    interval before the first and ends at the last.
    """
    check_order(models)
    rule = soups.cooldown_rule(len(models), shape)
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
    alpha: Annotated[
        float,
        typer.Option(
            help="Position between the base (0) and the fine-tuned model (1)."
        ),
    ] = 0.5,
    extrapolate: Extrapolate = False,
) -> None:
    """Interpolate between a base and a model that was fine-tuned from it."""
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
    """Move the mean towards the base, by the angles between the models."""
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
    """Add the changes of all fine-tuned models to the base."""
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
    density: Annotated[
        float, typer.Option(help="Share of the elements of a leaf that stay.")
    ] = 0.2,
    scale: Scale = 1.0,
    drop: Annotated[
        bool,
        typer.Option(
            "--dare",
            help="Choose the elements that stay at random, and rescale them (DARE).",
        ),
    ] = False,
    seed: Annotated[
        int, typer.Option(help="Random seed for --dare.", min=-(2**63), max=2**63 - 1)
    ] = 0,
) -> None:
    """Trim task vectors, elect signs and average the values that agree (TIES).

    With --dare elements are dropped at random instead of the smallest ones, and large
    leaves are merged whole instead of in parts.
    """
    n, scale = len(models), finite("--scale", scale)
    rule = task_vectors.ties_rule(n, density, scale)

    @jax.jit
    def dropped(number: jax.Array, xs: list[jax.Array]) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), number)
        kept = merging.dare(xs[:n], xs[n], density, key)
        (tied,) = jax.tree.leaves(merging.ties(kept, xs[n], 1.0, scale=scale))
        return tied.astype(xs[0].dtype)

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
    a: Annotated[str, typer.Argument(help="Model that is the result at --t 0.")],
    b: Annotated[str, typer.Argument(help="Model that is the result at --t 1.")],
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
    """Take the mean direction on the sphere, times the mean norm, leaf by leaf."""
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
            "--fisher",
            help="Diagonal Fisher matrix of a model; once for each model, in order.",
        ),
    ],
    weights: Weights = None,
    extrapolate: Extrapolate = False,
) -> None:
    """Take the mean with every element weighted by its Fisher information."""
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
        typer.Option(
            "--hessian",
            help="Diagonal Hessian of a model; once for each model, in order.",
        ),
    ],
    base_hessian: Annotated[str, typer.Option(help="Diagonal Hessian of the base.")],
    scale: Scale = 1.0,
    damping: Annotated[
        float, typer.Option(help="Number that is added to the Hessian of the base.")
    ] = 0.0,
) -> None:
    """Merge so that gradients match, with diagonal Hessians."""
    n, scale = len(models), finite("--scale", scale)
    check_count("--hessian", hessians, n)
    rule = curvature.gradient_matching_rule(n, scale, damping)
    paths = [*models, *hessians, base, base_hessian]
    merge_models(by_rule(rule), paths, output, common)
