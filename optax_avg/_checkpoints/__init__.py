"""Checkpoints on disk, for the rooms that read, combine or write them.

Modules without an underscore are for every room:

- ``leaves``: the leaves of a checkpoint by path, and groups of them by bytes.
- ``alike``: how two lists of leaves differ.
- ``sources``: a checkpoint that can be read leaf by leaf, or by parts of a leaf.
- ``orbax``, ``safetensors``, ``huggingface``: the kinds of checkpoints.
- ``opening``: the checkpoint at a path, whatever its kind.
- ``rules``: a merge of one leaf, which may come slice by slice.
"""
