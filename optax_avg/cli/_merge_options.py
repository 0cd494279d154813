"""The options that every merge has, their checks, and the run of a merge."""

import inspect
import math
import os
import re
import warnings
from collections.abc import Callable
from typing import Annotated, NamedTuple

import typer

from optax_avg._checkpoints.safetensors import SUFFIX, folder_of
from optax_avg.cli._leafwise import Method, merge_checkpoints
from optax_avg.cli._output import Only, Output, bundles, say, writes
from optax_avg.cli._shards import bytes_of, folder_like
from optax_avg.cli._targets import Format
from optax_avg.cli._writing import format_of, safetensors_with

LARGEST = "5GB"  # default size of a shard of a Hugging Face folder
Models = Annotated[list[str], typer.Argument(help="Models to merge.")]
Base = Annotated[str, typer.Option(help="Model before fine-tuning.")]
Scale = Annotated[
    float, typer.Option(help="Factor of the change that is added to the base.")
]
Weights = Annotated[
    str | None,
    typer.Option(help="Weights of the models, of sum one, such as 0.7,0.3."),
]
Extrapolate = Annotated[
    bool,
    typer.Option(
        "--extrapolate", help="Allow positions and weights outside of [0, 1]."
    ),
]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Merge models that hold NaN or inf.")
]
MaxShardSize = Annotated[
    str | None,
    typer.Option(
        help="Largest shard of a Hugging Face folder, such as 500MB; "
        f"{LARGEST} by default."
    ),
]


class Common(NamedTuple):
    """Options of every merge.

    Attributes:
      only: Subtree to take, None for the whole tree.
      allow_nonfinite: Whether NaN and inf may be merged.
      max_shard_size: Largest size of a shard, such as ``5GB``; None for the default.
    """

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
    """Merges checkpoints into one.

    Args:
      method: Merge of one leaf.
      paths: Models and the other checkpoints that the method takes.
      output: Options of the output.
      common: Options of every merge.

    Raises:
      typer.BadParameter: If an option does not fit the others.
    """
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
            "--max-shard-size is for Hugging Face folders; the first model is not one, "
            f"or --out names a {SUFFIX} file."
        )
    if folder is not None and common.only is not None:
        raise typer.BadParameter(
            f"--only takes a part of a model, which is not a Hugging Face model; pass "
            f"--out NAME{SUFFIX}."
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
    """The weights that an option gives, None if it is absent."""
    if given is None:
        return None
    try:
        found = [float(x) for x in given.split(",")]
    except ValueError as error:
        raise typer.BadParameter(
            f"--weights {given} are not numbers; write --weights 0.7,0.3."
        ) from error
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
    """A position, which must lie between two models unless that is waived."""
    if not math.isfinite(value) or not (0 <= value <= 1 or extrapolate):
        raise typer.BadParameter(
            f"{name} {value:g} is not between 0 and 1; pass --extrapolate to use it."
        )
    return value


def finite(name: str, value: float) -> float:
    """The value of an option, which must be finite."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{name} must be finite, got {value:g}.")
    return value


def note_of_one(models: list[str]) -> None:
    """Prints a note if there is one model only, as if a pattern matched one file."""
    if len(models) == 1:
        say(f"note: {models[0]} is the only model, so the result is a copy of it.")


def check_count(name: str, given: list[str], n: int) -> None:
    """Raises unless an option is given once for each model."""
    if len(given) != n:
        raise typer.BadParameter(
            f"{n} models need as many {name}, got {len(given)}; repeat {name}."
        )


def check_order(models: list[str]) -> None:
    """Warns if the numbers in the names of checkpoints do not ascend.

    A shell puts step_1000 before step_200.
    """
    numbers = [[int(x) for x in re.findall(r"\d+", path)] for path in models]
    if numbers != sorted(numbers):
        warnings.warn(
            "the numbers in the names of the checkpoints do not ascend, and the oldest "
            f"must come first; they are taken in this order: {', '.join(models)}.",
            UserWarning,
            stacklevel=2,
        )
