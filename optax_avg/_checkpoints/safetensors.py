"""Safetensors files, read leaf by leaf or a part of a leaf at a time.

A file has the length of its header, the header in JSON, and one array after another.
"""

import functools
import json
import struct

import jax.numpy as jnp
import numpy as np

from optax_avg._checkpoints.leaves import Leaf
from optax_avg._checkpoints.sources import Checkpoint, imported, named

SUFFIX = ".safetensors"
METADATA = "__metadata__"
# Names of dtypes in NumPy, by their names in safetensors.
TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def open_safetensors(path: str) -> Checkpoint:
    """Opens a safetensors file.

    The library safetensors checks the file, but it can read neither float8 nor parts of
    an array other than rows. Arrays are therefore read from the offsets in the header.

    Raises:
      ValueError: If it is not a safetensors file, or has an unknown dtype.
    """
    safetensors = imported("safetensors", "this needs safetensors", "cli")
    with named(path), safetensors.safe_open(path, "np") as file:
        metadata = dict(file.metadata() or {})
    with named(path), open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop(METADATA, None)
    leaves, begins = [], []
    for name, entry in header.items():
        if entry["dtype"] not in TYPES:
            raise ValueError(f"{path}: {name} is of the unknown type {entry['dtype']}.")
        shape = tuple(entry["shape"])
        leaves.append(Leaf(tuple(name.split(".")), shape, TYPES[entry["dtype"]]))
        begins.append(8 + length + entry["data_offsets"][0])

    def read_part(i: int, begin: int, end: int) -> np.ndarray:
        dtype = jnp.dtype(leaves[i].dtype)
        with named(path):
            offset = begins[i] + begin * dtype.itemsize
            found = np.fromfile(path, dtype, end - begin, offset=offset)
        if found.size != end - begin:
            raise ValueError(f"{path} ends within {leaves[i].name}.")
        return found

    def read(indices: list[int]) -> list[np.ndarray]:
        return [
            read_part(i, 0, leaves[i].size).reshape(leaves[i].shape) for i in indices
        ]

    parts = lambda i, scratch: functools.partial(read_part, i)
    return Checkpoint(leaves, read, parts, metadata)
