"""Paths to which a result may be written.

A result replaces neither an input nor anything that is not a checkpoint. Dots and links
are resolved before a path is checked.
"""

import hashlib
import os
import re
import shutil
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from optax_avg._checkpoints.leaves import Leaf
from optax_avg._checkpoints.orbax import MARKS, RECORD, is_remote
from optax_avg._checkpoints.safetensors import SUFFIX
from optax_avg.cli._signals import check_signals

INDEX_SUFFIX = f"{SUFFIX}.index.json"  # suffix of the list of the shards of a model
LONGEST = 120  # bytes of a name that is not shortened before a suffix is added
EXACT = ("ext2", "ext3", "ext4", "xfs", "tmpfs")  # disks that do not compress


# Takes the index of a leaf and returns its elements, in order, in one or more arrays.
Load = Callable[[int], Iterable[np.ndarray]]


class Format(NamedTuple):
    """A kind of checkpoint.

    Attributes:
      noun: Name of the kind, with an article.
      folder: Whether it is a directory.
      stranger: Says what at a path does not belong to this kind, ``""`` if all does.
      check: Raises a ValueError for leaves that it cannot hold.
      write: Writes leaves to a new path, one by one, each in parts from its first
        element to its last.
    """

    noun: str
    folder: bool
    stranger: Callable[[str], str]
    check: Callable[[list[Leaf]], None]
    write: Callable[[str, list[Leaf], Load], None]


class Target(NamedTuple):
    """The path of a result and what is there.

    Attributes:
      path: Absolute path without dots and links.
      shown: Path as messages show it.
      format: Kind of checkpoint to write.
      found: Identity of the file or directory that is there, None if there is none.
    """

    path: str
    shown: str
    format: Format
    found: tuple[int, int, int] | None


# Suffixes of kinds of files that are neither safetensors nor directories of Orbax.
FOREIGN = (".npz", ".npy", ".pt", ".pth", ".bin", ".h5", ".msgpack", ".ckpt", ".pkl")


def target_of(
    out: str, format_of: Callable[[str], Format], inputs: Sequence[str], force: bool
) -> Target:
    """The target that ``--out`` names.

    Raises:
      ValueError: If the path cannot be that of a result.
      FileExistsError: If there is something that may not be replaced.
    """
    path, shown = _normalised(out)
    form = format_of(path)
    if form.folder and "\\" in path:
        raise ValueError(
            f"{shown} has a backslash, which Orbax takes for the end of a directory's "
            "name; pass another --out."
        )
    suffix = os.path.splitext(path)[1].lower()
    if form.folder and suffix in FOREIGN:
        raise ValueError(
            f"{shown} would be a directory, and {suffix} is the suffix of a file that "
            "is not written here; pass a name without it, or NAME.safetensors."
        )
    _check_place(path, shown, inputs)
    found = identity(path)
    if found is not None:
        _check_replaced(path, shown, form, force)
    aside = aside_of(path)
    if form.folder and os.path.lexists(aside):
        raise FileExistsError(
            f"{aside} is what was at {shown} before a run that was killed; rename it "
            f"to {shown}, or delete it."
        )
    return Target(path, shown, form, found)


def _normalised(out: str) -> tuple[str, str]:
    """A path without dots and links, and the path that messages show."""
    if not out:
        raise ValueError("--out is empty; pass the path of the result.")
    if is_remote(out):
        raise ValueError(
            f"--out {out} is not on a local disk; write to one and copy the result."
        )
    path = os.path.realpath(out)
    if os.path.islink(out.rstrip(os.sep)):
        raise ValueError(f"{out} is a symbolic link; pass --out {path} itself.")
    return path, os.path.normpath(out) if os.path.abspath(out) == path else path


def _check_place(path: str, shown: str, inputs: Sequence[str]) -> None:
    """Raises if a result may not have a path, with or without --force."""
    if _holds(path, os.path.realpath(os.curdir)):
        raise ValueError(
            f"{shown} is, or holds, the current directory; pass a path within it."
        )
    for given in inputs:
        if is_remote(given) or not os.path.exists(given):
            continue
        if os.path.exists(path) and os.path.samefile(given, path):
            raise ValueError(f"{shown} is an input, which is read; pass another --out.")
        if _holds(given, path):
            raise ValueError(f"{shown} lies in {given}, an input; pass another --out.")
        if any(_holds(path, part) for part in _all_of(given)):
            raise ValueError(
                f"{shown} is, or holds, a part of the input {given}; pass another "
                "--out."
            )
    _check_model_around(path, shown)
    if os.path.ismount(path):
        raise ValueError(f"{shown} is where a disk is mounted; pass a path within it.")
    for folder in Path(path).parents:
        if any((folder / mark).exists() for mark in MARKS):
            raise ValueError(f"{shown} lies in {folder}, a checkpoint.")
    if any(Path(path).parent.glob(f"[0-9]*/{RECORD}")):
        raise ValueError(f"{shown} lies in {Path(path).parent}, a SnapshotStore.")
    parent = next(p for p in Path(path).parents if os.path.lexists(p))
    if not parent.is_dir():
        raise NotADirectoryError(f"{parent} is not a directory.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"you may not write to {parent}.")


def _check_model_around(path: str, shown: str) -> None:
    """Raises if a file would be a second model in a Hugging Face folder."""
    folder, name = os.path.split(path)
    if name.endswith(INDEX_SUFFIX):
        raise ValueError(
            f"{shown} is the name of an index of shards; pass the folder as --out, or "
            f"a name that ends with {SUFFIX}."
        )
    if not name.endswith(SUFFIX) or not os.path.isdir(folder):
        return
    for other in sorted(os.listdir(folder)):
        stem = other.removesuffix(INDEX_SUFFIX)
        if stem == other:
            continue
        own = re.fullmatch(rf"{re.escape(stem)}(-\d+-of-\d+)?{re.escape(SUFFIX)}", name)
        if own or name in _words(os.path.join(folder, other)):
            raise ValueError(
                f"{shown} would spoil the model in {folder}, whose shards {other} "
                "lists: programs would load one of the two, or a mixture. Pass an "
                "--out in another folder, or of another name."
            )


def _words(index: str) -> set[str]:
    """The text between quotation marks in a file that may be damaged."""
    try:
        return set(Path(index).read_text(encoding="utf-8").split('"'))
    except (OSError, ValueError):
        return set()


def _all_of(given: str) -> Iterator[str]:
    """Yields an input and the files in it, with links resolved."""
    yield os.path.realpath(given)
    seen = set()
    for root, folders, files in os.walk(given, followlinks=True):
        check_signals()
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()  # a link led back
            continue
        seen.add(real)
        yield from (os.path.realpath(os.path.join(root, name)) for name in files)


def _holds(folder: str, path: str) -> bool:
    """Whether a path without links is a directory or lies in it."""
    if not os.path.exists(folder):
        return False
    places = [Path(path), *Path(path).parents]
    return any(place.exists() and place.samefile(folder) for place in places)


def _check_replaced(path: str, shown: str, form: Format, force: bool) -> None:
    """Raises a FileExistsError unless what is at a path may be replaced."""
    odd = odd_at(path, form)
    if odd:
        raise FileExistsError(
            f"{shown} {odd}; only {form.noun} may be replaced. Pass another --out."
        )
    if not force:
        raise FileExistsError(f"{shown} exists; pass --force to replace it.")


def odd_at(path: str, form: Format) -> str:
    """Says what at a path is not of a kind of checkpoint, ``""`` if all of it is."""
    mode = os.lstat(path).st_mode
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        return "is neither a file nor a directory"
    if stat.S_ISDIR(mode) != form.folder:
        return "is a file" if form.folder else "is a directory"
    if form.folder and not os.access(path, os.W_OK | os.X_OK):
        return "is a directory that you may not delete from"
    empty = not (os.listdir(path) if form.folder else os.path.getsize(path))
    return "" if empty else form.stranger(path)


def identity(path: str) -> tuple[int, int, int] | None:
    """Numbers by which a file or directory differs from another of the same name."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def aside_of(path: str) -> str:
    """The path of a directory while another one takes its place."""
    parent, name = os.path.split(path)
    return os.path.join(parent, f"{shortened(name)}.replaced")


def shortened(name: str) -> str:
    """A name that is short enough for a suffix; disks allow 255 bytes or less."""
    if len(os.fsencode(name)) <= LONGEST:
        return name
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return f"{name[: LONGEST // 8]}-{digest}"


def room(target: Target) -> tuple[int | None, bool]:
    """Free bytes for a target.

    Returns:
      The number of bytes, None if unknown, and whether it is certainly exact.
    """
    parent = next(p for p in Path(target.path).parents if p.exists())
    if not hasattr(os, "statvfs"):
        return shutil.disk_usage(parent).free, False
    disk = os.statvfs(parent)
    if not disk.f_blocks:  # some network disks do not know
        return None, False
    blocks = disk.f_bfree if os.geteuid() == 0 else disk.f_bavail
    return blocks * disk.f_frsize, _is_exact(parent)


def _is_exact(path: Path) -> bool:
    """Whether a disk is known to neither compress nor share data."""
    number = os.stat(path).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    kinds = [
        line.partition(" - ")[2].split()[0]
        for line in mounts
        if line.split()[2] == device
    ]
    return bool(kinds) and all(kind in EXACT for kind in kinds)


def check_room(target: Target, nbytes: int) -> None:
    """Raises an OSError if there is certainly too little room, warns if probably."""
    free, certain = room(target)
    if free is None or nbytes <= free:
        return
    said = f"{target.shown} needs {nbytes:,} bytes, and its disk has {free:,} free."
    if certain:
        raise OSError(said)
    warnings.warn(said, RuntimeWarning, stacklevel=2)
