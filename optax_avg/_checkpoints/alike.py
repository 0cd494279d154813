"""How one list of leaves differs from another, in words for error messages."""

from collections.abc import Sequence

from optax_avg._checkpoints.leaves import Leaf

ONLY = "the only leaf"  # name of a leaf that is the whole tree


def difference(ours: Sequence[Leaf], theirs: Sequence[Leaf], first: str) -> str:
    """Says what distinguishes the second list from the first one.

    Leaves are compared by name. Dtypes may differ, except that what is complex does not
    fit what is real.

    Args:
      ours: Leaves of the first tree.
      theirs: Leaves of the other tree.
      first: What the first tree is called.

    Returns:
      A predicate such as ``has no leaf w, which the first has``, ``""`` if the lists
      are alike.
    """
    known, found = ({leaf.name: leaf for leaf in leaves} for leaves in (ours, theirs))
    if ONLY in known and ONLY not in found:
        return f"is not a single leaf, as {first} is"
    if ONLY in found and ONLY not in known:
        return f"is a single leaf, which {first} is not"
    for name, leaf in known.items():
        if name not in found:
            return f"has no leaf {name}, which {first} has"
        other = found[name]
        if other.shape != leaf.shape:
            return f"has shape {other.shape} at {name}, where {first} has {leaf.shape}"
        if "complex" in other.dtype and "float" in leaf.dtype:
            return f"is {other.dtype} at {name}, where {first} is {leaf.dtype}"
    for name in found:
        if name not in known:
            return f"has a leaf {name}, which {first} does not have"
    return ""
