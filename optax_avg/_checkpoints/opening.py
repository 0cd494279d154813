"""The checkpoint at a path, read leaf by leaf, whatever its kind.

No more than the leaves that are asked for are in memory.
"""

import os

from optax_avg._checkpoints import safetensors
from optax_avg._checkpoints.orbax import is_remote, open_orbax
from optax_avg._checkpoints.sources import Checkpoint, part_of


def open_checkpoint(path: str, only: str | None = None) -> Checkpoint:
    """An Orbax checkpoint, a safetensors file or a Hugging Face folder.

    Args:
      path: Path of the checkpoint.
      only: Subtree to keep, with dots between names; by default the whole tree.

    Raises:
      ValueError: If there is no checkpoint, or no such subtree.
      PermissionError: If the checkpoint may not be read.
    """
    if not path:
        raise ValueError("the path of a checkpoint is empty.")
    if not is_remote(path) and not os.path.exists(path):
        raise ValueError(f"there is no checkpoint at {path}.")
    if not is_remote(path) and not os.access(path, os.R_OK):
        raise PermissionError(f"you may not read {path}.")
    whole = _opened(path)
    if only is None:
        return whole
    head = tuple(only.split("."))
    kept = [i for i, leaf in enumerate(whole.leaves) if leaf.path[: len(head)] == head]
    if not kept:
        tops = sorted({leaf.path[0] for leaf in whole.leaves})
        raise ValueError(f"{path} has no subtree {only!r}; at its top are {tops}.")
    leaves = [
        whole.leaves[i]._replace(path=whole.leaves[i].path[len(head) :] or ("value",))
        for i in kept
    ]
    return part_of(whole, kept, leaves)


def _opened(path: str) -> Checkpoint:
    if path.endswith(safetensors.SUFFIX) and not os.path.isdir(path):
        return safetensors.open_safetensors(path)
    if safetensors.folder_of(path):
        return safetensors.open_huggingface(path)
    found = open_orbax(path)
    if found is not None:
        return found
    path = os.path.abspath(path)
    safetensors.check_not_pickled(path)
    raise ValueError(
        f"{path} is neither an Orbax checkpoint nor a {safetensors.SUFFIX} file, nor a "
        f"folder with {safetensors.SINGLE} or {safetensors.INDEX}."
    )
