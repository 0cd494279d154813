"""Checkpoints on disk, for the rooms that read, combine or write them.

Modules without an underscore are for every room:

- ``leaves``: the leaves of a checkpoint by path, groups of them by bytes, and how two
  lists of leaves differ.
- ``sources``: a checkpoint that can be read leaf by leaf, or by parts of a leaf.
- ``orbax``, ``safetensors``: the kinds of checkpoints; folders of Hugging Face are with
  the second.
- ``opening``: the checkpoint at a path, whatever its kind.
"""
