"""Renames a complete result to its target, where it replaces only what it may.

The result is written to a directory beside its target whose name ends with
``.partial``.
"""

import contextlib
import errno
import glob
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from optax_avg.cli._signals import held
from optax_avg.cli._targets import Target, aside_of, identity, odd_at, shortened


def warn_of_leftovers(target: Target) -> None:
    """Warns of directories that a killed run left."""
    parent, name = os.path.split(target.path)
    name = glob.escape(shortened(name))
    pattern = os.path.join(glob.escape(parent), f".{name}.*.partial")
    for path in sorted(glob.glob(pattern)):
        warnings.warn(
            f"{path} belongs to a run that was killed, or to one that still writes "
            f"{target.shown}; delete it if no run is active.",
            RuntimeWarning,
            stacklevel=2,
        )


@contextlib.contextmanager
def partial(target: Target) -> Iterator[str]:
    """A directory beside a target, deleted at the end of the block."""
    parent, name = os.path.split(target.path)
    missing = [p for p in Path(target.path).parents if not p.exists()]
    try:
        os.makedirs(parent, exist_ok=True)
        prefix = f".{shortened(name)}."
        folder = tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=parent)
        try:
            yield folder
        finally:
            with held():
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        for place in missing:
            with contextlib.suppress(OSError):  # the result is in it
                place.rmdir()


def commit(new: str, target: Target) -> None:
    """Renames a complete result to its target.

    A checkpoint that it replaces moves to the former path of the result.

    Raises:
      FileExistsError: If the target has changed since it was checked.
    """
    now = identity(target.path)
    with held():
        try:
            if now is None:
                _put(new, target.path)
            elif now != target.found or odd_at(target.path, target.format):
                raise FileExistsError
            elif target.format.folder:
                _exchange(new, target.path)
            else:
                os.replace(new, target.path)
        except FileExistsError:
            happened = "appeared" if target.found is None else "changed"
            raise FileExistsError(
                f"{target.shown} {happened} while this was made; it was left as it is, "
                "and nothing was written."
            ) from None


def _put(new: str, path: str) -> None:
    """Renames a result to a path that must be free."""
    if os.path.isdir(new):
        _put_folder(new, path)
        return
    try:
        os.link(new, path)
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(new, path)


def _put_folder(new: str, path: str) -> None:
    """Renames a directory to a path that must be free."""
    if os.name == "posix":  # a rename replaces an empty directory there
        os.mkdir(path)
    try:
        os.rename(new, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.rmdir(path)
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError from error
        raise


@contextlib.contextmanager
def _someone_else() -> Iterator[None]:
    """Raises a FileExistsError if another run exchanges the same directory."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError from error
        raise


def _exchange(new: str, path: str) -> None:
    """Replaces a directory, which has another name for a moment."""
    for root, _, files in os.walk(new):
        for name in files:  # the new one must be on the disk before the old one goes
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
    aside = aside_of(path)
    with _someone_else():
        os.rename(path, aside)
    try:
        with _someone_else():
            os.rename(new, path)
    except OSError:
        try:
            os.rename(aside, path)
        except OSError as error:
            warnings.warn(
                f"what was at {path} is now at {aside}: {error}.",
                RuntimeWarning,
                stacklevel=3,
            )
        raise
    try:
        os.rename(aside, new)
    except OSError as error:
        warnings.warn(
            f"{path} was written; delete {aside}, which it replaced: {error}.",
            RuntimeWarning,
            stacklevel=3,
        )
