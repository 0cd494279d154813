"""The output of commands: its options, its checks, dry runs and progress."""

import collections
import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from optax_avg._checkpoints import sources
from optax_avg._checkpoints.leaves import Leaf, batches
from optax_avg._checkpoints.safetensors import folder_of
from optax_avg.cli._commit import warn_of_leftovers
from optax_avg.cli._signals import check_signals
from optax_avg.cli._targets import Format, Target, check_room, room, target_of
from optax_avg.cli._writing import format_of, write_checkpoint

Out = Annotated[
    str,
    typer.Option(
        help="Path of the result: a directory for Orbax, or a .safetensors file."
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace the checkpoint at --out.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be done, and write nothing.")
]
Only = Annotated[
    str | None,
    typer.Option(help="Subtree to take, such as params or state.params."),
]


class Output(NamedTuple):
    """The options of every command that writes.

    Attributes:
      command: Name of the command.
      out: Path of the result.
      force: Whether a checkpoint at that path is replaced.
      dry_run: Whether nothing is written.
    """

    command: str
    out: str
    force: bool
    dry_run: bool


def writes(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of :class:`Output` for its argument ``output``."""
    kind = inspect.Parameter.KEYWORD_ONLY
    name = command.__name__.replace("_", "-")
    shared = [
        inspect.Parameter("out", kind, annotation=Out),
        inspect.Parameter("force", kind, annotation=Force, default=False),
        inspect.Parameter("dry_run", kind, annotation=DryRun, default=False),
    ]
    return bundles(command, "output", functools.partial(Output, name), shared)


def bundles(
    command: Callable[..., None],
    argument: str,
    bundle: Callable[..., NamedTuple],
    options: list[inspect.Parameter],
) -> Callable[..., None]:
    """A command whose argument is replaced by the options that make it.

    Args:
      command: Function of the command.
      argument: Name of the argument to replace.
      bundle: Makes the argument from the values of the options.
      options: Options, as parameters of a function.
    """
    given = inspect.signature(command)
    kind = inspect.Parameter.KEYWORD_ONLY
    own = [x for x in given.parameters.values() if x.name != argument]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        found = bundle(**{x.name: values.pop(x.name) for x in options})
        command(**{argument: found}, **values)

    parameters = [x.replace(kind=kind) for x in own] + options
    return _signed(run, given.replace(parameters=parameters))


def _signed(function: Any, signature: inspect.Signature) -> Any:
    function.__signature__ = signature
    return function


def example(arguments: str) -> str:
    """The last line of the help of a command."""
    return f"Example: optax-avg {arguments}"


def check(
    output: Output,
    inputs: Sequence[str],
    format_of: Callable[[str], Format] = format_of,
) -> Target:
    """The target of a command, checked before anything is read.

    Raises:
      ValueError: If a path is empty, or the result cannot have its path.
      FileExistsError: If there is something at the path that may not be replaced.
    """
    if "" in inputs:
        raise ValueError("the path of an input is empty.")
    # The path of an index means the folder of the model.
    read = [folder_of(path) or path for path in inputs]
    return target_of(output.out, format_of, read, output.force)


def say(line: str) -> None:
    """Prints to standard error, unless it was closed."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        # Otherwise the rest of the buffer would fail at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def write(
    output: Output,
    reads: list[tuple[str, int]],
    leaves: list[Leaf],
    make: Callable[[list[int]], Sequence[Iterable[np.ndarray]]],
    what: str,
    format_of: Callable[[str], Format] = format_of,
) -> None:
    """Writes leaves that are made a batch at a time.

    Args:
      output: Options of the command.
      reads: Inputs, and the number of bytes that are read of each.
      leaves: Leaves of the result.
      make: Takes indices of leaves and returns the elements of each, in one or several
        arrays.
      what: Description of the result for ``--dry-run``.
      format_of: Takes a path and returns the kind of checkpoint to write there.
    """
    target = check(output, [path for path, _ in reads], format_of)
    target.format.check(leaves)
    total = sum(leaf.nbytes for leaf in leaves)
    check_room(target, total)
    warn_of_leftovers(target)
    if output.dry_run:
        print(_plan(target, reads, leaves, what))
        return
    order = sorted(range(len(leaves)), key=lambda i: leaves[i].path)
    groups = batches([leaves[i].nbytes for i in order], sources.BATCH)
    batch_of = {j: [order[k] for k in group] for group in groups for j in group}
    made: dict[int, Iterable[np.ndarray]] = {}
    with _progress(target.shown, total) as advance:

        def load(j: int) -> Iterator[np.ndarray]:
            check_signals()
            if order[j] not in made:
                made.clear()
                made.update(zip(batch_of[j], make(batch_of[j]), strict=True))
            for part in made.pop(order[j]):
                check_signals()
                advance(part.nbytes)
                yield part

        write_checkpoint(target, [leaves[i] for i in order], load)


def _plan(
    target: Target, reads: list[tuple[str, int]], leaves: list[Leaf], what: str
) -> str:
    """The report of a dry run: what would be read, computed and written."""
    lines = [f"read     {path}: {nbytes:,} bytes" for path, nbytes in reads]
    by_dtype = collections.Counter(leaf.dtype for leaf in leaves)
    dtypes = ", ".join(f"{count} of {dtype}" for dtype, count in by_dtype.items())
    lines.append(f"compute  {what}: {len(leaves)} leaves, {dtypes}")
    total = sum(leaf.nbytes for leaf in leaves)
    free, _ = room(target)
    lines.append(
        f"write    {target.path}, {target.format.noun}: {total:,} bytes"
        + ("" if free is None else f"; {free:,} are free on its disk")
        + ("" if target.found is None else "; what is there is replaced")
    )
    lines.append("Nothing was written, and no values were read: only the run itself")
    lines.append("finds NaN and inf among them.")
    return "\n".join(lines)


@contextlib.contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, drawn when the first leaves are made."""
    bar = Progress(
        "{task.description}",
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task = bar.add_task(escape(name), total=total)

    # Rich raises SystemExit if a terminal or a pipe was closed.
    unseen = contextlib.suppress(OSError, SystemExit)

    def advance(nbytes: int) -> None:
        with unseen:
            bar.start()
        bar.advance(task, nbytes)

    try:
        yield advance
    finally:
        with unseen:
            if bar.live.is_started:
                bar.stop()
