"""The options that every merge has, what is checked of them, and the run itself."""

import inspect
import math
import os
from collections.abc import Callable
from typing import Annotated, NamedTuple

import typer

from optax_avg._checkpoints.huggingface import folder_of
from optax_avg._checkpoints.safetensors import SUFFIX
from optax_avg.cli._leafwise import Method, merge_checkpoints
from optax_avg.cli._output import Output, bundles, say, writes
from optax_avg.cli._shards import bytes_of, folder_like
from optax_avg.cli._targets import Format
from optax_avg.cli._writing import format_of, safetensors_with

LARGEST = "5GB"  # shards of Hugging Face folders
Models = Annotated[list[str], typer.Argument(help="The models.")]
Base = Annotated[str, typer.Option(help="The model that they were fine-tuned from.")]
Scale = Annotated[float, typer.Option(help="Factor of what is added to the base.")]
Weights = Annotated[
    str | None,
    typer.Option(help="Weights of the models, such as 0.7,0.3, that sum to one."),
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
    typer.Option(
        help="Largest shard of a Hugging Face folder, such as 500MB; "
        f"{LARGEST} by default."
    ),
]


class Common(NamedTuple):
    """Options of every merge, beside those of every command that writes."""

    only: str | None
    allow_nonfinite: bool
    max_shard_size: str | None


def merges(command: Callable[..., None]) -> Callable[..., None]:
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


def merge_models(
    method: Method, paths: list[str], output: Output, common: Common
) -> None:
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


def numbers(given: str | None, n: int, extrapolate: bool) -> list[float] | None:
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


def between(name: str, value: float, extrapolate: bool) -> float:
    """A position between two models."""
    if not math.isfinite(value) or not (0 <= value <= 1 or extrapolate):
        raise typer.BadParameter(
            f"{name} {value:g} is not between 0 and 1; pass --extrapolate to use it."
        )
    return value


def finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{name} must be finite, got {value:g}.")
    return value


def note_of_one(models: list[str]) -> None:
    """Says that nothing is merged, as where a pattern of names matched one file."""
    if len(models) == 1:
        say(f"note: {models[0]} is the only model, so that the result is a copy of it.")


def check_count(name: str, given: list[str], n: int) -> None:
    if len(given) != n:
        raise typer.BadParameter(f"{n} models need as many {name}.")
