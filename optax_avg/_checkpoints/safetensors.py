"""Safetensors files, and Hugging Face folders of one or several of them with an index.

A file is read leaf by leaf or a part of a leaf at a time. It has the length of its
header, the header in JSON, and one array after another.
"""

import functools
import json
import os
import struct

import jax.numpy as jnp
import numpy as np

from optax_avg._checkpoints.leaves import Leaf
from optax_avg._checkpoints.sources import Checkpoint, Parts, Scratch, imported, named

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


SINGLE = f"model{SUFFIX}"
INDEX = f"{SINGLE}.index.json"
PICKLED = (".bin", ".bin.index.json", ".pt", ".pth", ".ckpt")


def folder_of(path: str) -> str | None:
    """The Hugging Face folder at a path, which may also be that of its index."""
    if path.endswith(f"{SUFFIX}.index.json") and not os.path.isdir(path):
        return os.path.dirname(path) or os.curdir
    if os.path.isdir(path) and _models_in(path):
        return path
    return None


def _models_in(folder: str) -> list[str]:
    return [n for n in (SINGLE, INDEX) if os.path.isfile(os.path.join(folder, n))]


def open_huggingface(path: str) -> Checkpoint:
    """Opens a Hugging Face folder, or the index in one.

    Raises:
      ValueError: If the index and the shards disagree.
    """
    if not os.path.isdir(path):
        return _open_shards(path)
    found = _models_in(path)
    if len(found) > 1:
        raise ValueError(
            f"{path} holds both {SINGLE} and {INDEX}; pass the path of one of them."
        )
    file = os.path.join(path, found[0])
    return open_safetensors(file) if found[0] == SINGLE else _open_shards(file)


def check_not_pickled(path: str) -> None:
    """Raises a ValueError for weights that PyTorch pickled: reading them runs code."""
    odd = [os.path.basename(path)] if path.endswith(PICKLED) else []
    if os.path.isdir(path):
        odd = [name for name in sorted(os.listdir(path)) if name.endswith(PICKLED)]
    if odd:
        where = f"holds {odd[0]}, which" if os.path.isdir(path) else "is a file that"
        raise ValueError(
            f"{path} {where} PyTorch pickled; this is not read. Convert it with "
            "model.save_pretrained(folder, safe_serialization=True) or "
            "safetensors.torch.save_file(model.state_dict(), file)."
        )


def _open_shards(index: str) -> Checkpoint:
    folder, shard_of = os.path.dirname(index), _read_index(index)
    shards: dict[str, Checkpoint] = {}
    for shard in sorted(set(shard_of.values())):
        path = os.path.join(folder, shard)
        if not os.path.isfile(path):
            raise ValueError(f"{index} names {shard}, which is not in its folder.")
        shards[shard] = open_safetensors(path)
    places = [(shard, i) for shard in shards for i in range(len(shards[shard].leaves))]
    leaves = [shards[shard].leaves[i] for shard, i in places]
    _check_index(index, shard_of, [p[0] for p in places], [x.name for x in leaves])

    def parts(i: int, scratch: Scratch) -> Parts:
        shard, own = places[i]
        return shards[shard].parts(own, scratch)

    def read(indices: list[int]) -> list[np.ndarray]:
        found = [places[i] for i in indices]
        return [shards[shard].read([own])[0] for shard, own in found]

    metadata = {k: v for shard in shards.values() for k, v in shard.metadata.items()}
    return Checkpoint(leaves, read, parts, metadata)


def _check_index(
    index: str, shard_of: dict[str, str], shards: list[str], names: list[str]
) -> None:
    """Raises a ValueError unless each tensor is once in the shard of the index."""
    found: dict[str, str] = {}
    for shard, name in zip(shards, names, strict=True):
        if name in found:
            raise ValueError(f"{name} is in two shards of {index}.")
        if name not in shard_of:
            raise ValueError(f"{name} in {shard} is not in the weight_map of {index}.")
        found[name] = shard
    for name, shard in shard_of.items():
        if found.get(name) != shard:
            raise ValueError(f"{index} has {name} in {shard}, where it is not.")


def _read_index(path: str) -> dict[str, str]:
    """The name of the shard of each tensor, by the name of the tensor."""
    with named(path), open(path, encoding="utf-8") as file:
        found = json.load(file)
    found = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} has no weight_map; it is not an index of shards.")
    for name, shard in found.items():
        if not isinstance(shard, str) or os.path.basename(shard) != shard or not shard:
            raise ValueError(
                f"{path} names the shard {shard!r} of {name}; a shard must be a file "
                "in the folder of the index."
            )
        if not shard.endswith(SUFFIX):
            raise ValueError(f"{path}: the shard {shard} is not a {SUFFIX} file.")
    return dict(found)
