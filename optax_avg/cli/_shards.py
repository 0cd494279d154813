"""Hugging Face folders that are written: shards, an index and companion files.

Configuration and tokenizer are copied from the folder of the first model.
"""

import filecmp
import fnmatch
import functools
import json
import math
import os
import re
import shutil

from optax_avg._checkpoints.leaves import Leaf, batches
from optax_avg._checkpoints.safetensors import INDEX, PICKLED, SINGLE, SUFFIX
from optax_avg.cli._targets import Format, Load
from optax_avg.cli._writing import check_safetensors, write_safetensors

UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
# Files that are not copied: weights of any library, and the card of another model.
LEFT = [f"*{x}" for x in (SUFFIX, ".index.json", *PICKLED)]
LEFT += ["*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.ot", "*.npz", "README.md", ".*"]
SHARD = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors|" + re.escape(INDEX))


def bytes_of(size: str) -> int:
    """Number of bytes of a size such as 5GB, 500MB, 2GiB or 1000.

    Raises:
      ValueError: If it is not a size, or zero.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
    unit = UNITS.get(found[2].upper()) if found else None
    nbytes = float(found[1]) * unit if found and unit else 0
    if nbytes < 1 or not math.isfinite(nbytes):
        raise ValueError(f"a size is a number and a unit such as 5GB, got {size}.")
    return math.floor(nbytes)


def folder_like(model: str, max_bytes: int, metadata: dict[str, str]) -> Format:
    """The format of a Hugging Face folder with the files of another one.

    Args:
      model: Folder whose configuration and tokenizer are copied.
      max_bytes: Largest number of bytes of a shard, unless one leaf has more.
      metadata: Metadata of every shard.
    """
    write = functools.partial(
        _write, model=model, max_bytes=max_bytes, metadata=metadata
    )
    stranger = functools.partial(_stranger, model=model)
    return Format("a Hugging Face folder", True, stranger, check_safetensors, write)


def _write(
    path: str,
    leaves: list[Leaf],
    load: Load,
    *,
    model: str,
    max_bytes: int,
    metadata: dict[str, str],
) -> None:
    os.mkdir(path)
    for name in _companions(model):
        shutil.copyfile(os.path.join(model, name), os.path.join(path, name))
    shards = batches([leaf.nbytes for leaf in leaves], max_bytes) or [[]]
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}{SUFFIX}"
        name = name if len(shards) > 1 else SINGLE
        own = [leaves[i] for i in shard]
        weight_map |= {leaf.name: name for leaf in own}
        write_safetensors(
            os.path.join(path, name), own, lambda j, s=shard: load(s[j]), metadata
        )
    if len(shards) > 1:
        total = sum(leaf.nbytes for leaf in leaves)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        with open(os.path.join(path, INDEX), "w", encoding="utf-8") as file:
            json.dump(index, file, indent=2, sort_keys=True)
            file.write("\n")


def _companions(folder: str) -> list[str]:
    """Names of the files beside the weights of a model, without subfolders."""
    return [
        name
        for name in sorted(os.listdir(folder))
        if os.path.isfile(os.path.join(folder, name))
        and not any(fnmatch.fnmatch(name, pattern) for pattern in LEFT)
    ]


def _stranger(path: str, *, model: str) -> str:
    """Says what in a folder does not belong to a model like another one."""
    copied = _companions(model)
    for name in sorted(os.listdir(path)):
        found = os.path.join(path, name)
        own = SHARD.fullmatch(name) or name in copied
        if not own or os.path.islink(found) or not os.path.isfile(found):
            return f"holds {name}, which is not of a model like {model}"
        if name in copied and not filecmp.cmp(found, os.path.join(model, name), False):
            return f"holds {name}, which differs from that of {model}"
    if not any(os.path.exists(os.path.join(path, n)) for n in (SINGLE, INDEX)):
        return "is not a Hugging Face folder"
    return ""
