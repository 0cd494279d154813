"""What all commands do: write leaf by leaf, show progress, stop at a signal."""

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from optax_avg.cli._checkpoints import Leaf, check_free, write_checkpoint

BATCH = 2**25  # bytes of leaves that are read and merged together

Out = Annotated[
    str, typer.Option(help="The result: a directory for Orbax, or a .safetensors file.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at --out.")]
Only = Annotated[
    str | None,
    typer.Option(help="The subtree to take, such as params or state.params."),
]


class Stopped(BaseException):
    """A signal has come. Not an Exception, which the layers below would take."""


signals: list[int] = []


def note(number: int, frame: Any) -> None:
    """Stops at the next leaf, at a second signal at once.

    An exception that is raised here may be lost in a callback of another library.
    """
    del frame
    signals.append(number)
    if len(signals) > 1:
        raise Stopped


def check_signals() -> None:
    """Stops if a signal has come."""
    if signals:
        raise Stopped


def say(line: str) -> None:
    """Prints to standard error."""
    Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)


def write(
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
            check_signals()
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
