"""Images to train on: scikit-learn's digits, or any folder of IDX files."""

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

NAMES = (
    "train-images-idx3",
    "train-labels-idx1",
    "t10k-images-idx3",
    "t10k-labels-idx1",
)


class Images(NamedTuple):
    """Images (count, height, width, 1) in [0, 1] and integer labels (count,)."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def flat_digits(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Digits as rows of 64: images and labels of one half, then of the other."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    parts = train_test_split(x, y, test_size=0.5, random_state=seed, stratify=y)
    return parts[0], parts[2], parts[1], parts[3]


def batches(
    x: np.ndarray, y: np.ndarray, size: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One epoch in random order."""
    order = rng.permutation(len(x))
    for first in range(0, len(x) - size + 1, size):
        rows = order[first : first + size]
        yield x[rows], y[rows]


def read_idx(path: Path) -> np.ndarray:
    """Reads one IDX file of unsigned bytes, gzipped or not."""
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file ({error})") from None
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path}: not an IDX file of unsigned bytes")
    rank = raw[3]
    begin = 4 + 4 * rank
    if len(raw) < begin:
        raise ValueError(f"{path}: truncated in its header")
    shape = struct.unpack(f">{rank}I", raw[4:begin])
    expected, found = math.prod(shape), len(raw) - begin
    if not expected:
        raise ValueError(f"{path}: empty, its header says shape {shape}")
    if found != expected:
        wrong = "truncated" if found < expected else "too long"
        raise ValueError(
            f"{path}: {wrong}, its header says shape {shape}; {found} bytes follow"
        )
    return np.frombuffer(raw, np.uint8, offset=begin).reshape(shape)


def find(folder: Path, name: str) -> Path:
    """The file of this name, with or without .gz, with a dash or a dot before ubyte."""
    for dash in "-.":
        for end in ("", ".gz"):
            path = folder / f"{name}{dash}ubyte{end}"
            if path.is_file():
                return path
    raise ValueError(f"{folder}: no {name}-ubyte or {name}-ubyte.gz in it")


def load_images(data: Path | None) -> Images:
    """Digits of scikit-learn (80 % to train on), or the IDX files in ``data``."""
    if data is None:
        x, y = load_digits(return_X_y=True)
        x = x.reshape(-1, 8, 8, 1).astype(np.float32) / 16
        parts = train_test_split(x, y, test_size=0.2, random_state=0, stratify=y)
        return Images(parts[0], parts[2], parts[1], parts[3])
    if not data.is_dir():
        raise ValueError(f"{data}: no such folder")
    arrays = []
    for images, labels in (NAMES[:2], NAMES[2:]):
        x, y = read_idx(find(data, images)), read_idx(find(data, labels))
        if x.ndim != 3 or y.ndim != 1 or len(x) != len(y):
            raise ValueError(
                f"{data}: {images} has shape {x.shape} but {labels} {y.shape}"
            )
        arrays += [x[..., None].astype(np.float32) / 255, y.astype(np.int64)]
    if arrays[0].shape[1:] != arrays[2].shape[1:]:
        raise ValueError(f"{data}: train and test images differ in size")
    return Images(*arrays)
