"""Which leaves of a tree are there, and trees that are made leaf by leaf."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import FlattenedIndexKey, GetAttrKey, KeyPath

from optax_avg import _numerics

State = TypeVar("State")

# A tree of bools like (a prefix of) params, or a predicate on (key_path, leaf).
Where = Callable[[Any, Any], Any] | Any

FILTER = "pass the arrays alone, as in eqx.filter(model, eqx.is_inexact_array)"


def is_masked(node: object) -> bool:
    """Whether a node is Optax's placeholder for a leaf that is left out."""
    return isinstance(node, optax.MaskedNode)


def has_masked(tree: object) -> bool:
    """Whether some leaf of a tree is left out."""
    return any(map(is_masked, jax.tree.leaves(tree, is_leaf=is_masked)))


def is_absent(node: object) -> bool:
    """Whether there is no array: None, or left out."""
    return node is None or is_masked(node)


def is_float(leaf: Any) -> bool:
    """Whether a leaf can be averaged: real or complex floating point."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None and callable(leaf):
        name = getattr(leaf, "__name__", type(leaf).__name__)
        raise TypeError(f"a leaf is the function {name}, not an array; {FILTER}.")
    return jnp.issubdtype(
        jnp.result_type(leaf) if dtype is None else dtype, jnp.inexact
    )


def is_gradient(leaf: Any) -> bool:
    """Whether a leaf is there and floating."""
    return not is_absent(leaf) and is_float(leaf)


def is_abstract(tree: optax.Params) -> bool:
    """Whether a leaf is a ``jax.ShapeDtypeStruct``, a shape without values."""
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def shapes_for_shapes(init: optax.TransformInitFn) -> optax.TransformInitFn:
    """``init``, which for ``jax.ShapeDtypeStruct`` leaves gives a state of the same."""

    def either(params: Any) -> Any:
        return jax.eval_shape(init, params) if is_abstract(params) else init(params)

    return either


def select(tree: Any, where: Where | None) -> Any:
    """Keeps the float leaves inside ``where``; the others become ``MaskedNode``."""
    if isinstance(where, str):
        raise ValueError(
            f"leaves are chosen by a tree of bools or a function of path and leaf, got "
            f"{where!r}; write lambda path, leaf: {where!r} in "
            "jax.tree_util.keystr(path)."
        )
    if not jax.tree.leaves(tree):
        return tree

    def keep(leaf):
        return leaf if is_float(leaf) else optax.MaskedNode()

    if where is None:
        return jax.tree.map(keep, tree)
    if _is_predicate(where):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: keep(leaf) if where(path, leaf) else optax.MaskedNode(),
            tree,
        )
    try:
        return jax.tree.map(
            lambda inside, part: jax.tree.map(
                keep if inside else lambda _: optax.MaskedNode(), part
            ),
            where,
            tree,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"where has {shown(where)} and params {shown(tree)}; pass bools for a "
            "prefix of params, or a function (key_path, leaf) -> bool."
        ) from error


def _is_predicate(where: Any) -> bool:
    """Whether it is a function. A model of Equinox that holds bools is a tree."""
    leaves = jax.tree.leaves(where)
    is_tree = bool(leaves) and all(isinstance(leaf, bool) for leaf in leaves)
    return callable(where) and not is_tree


def refuse_none_selected(tree: Any, where: Where | None, otherwise: str) -> None:
    """Raises if ``where`` selects no leaf of a tree that has leaves.

    Args:
      tree: The tree.
      where: The selection.
      otherwise: Start of the message.

    Raises:
      ValueError: If no leaf is selected.
    """
    if where is None or not jax.tree.leaves(tree):
        return
    if not jax.tree.leaves(select(tree, where)):
        if jax.tree_util.all_leaves([tree]):
            raise ValueError(f"{otherwise}. There is one leaf.")
        hint = (
            " A path is a tuple of keys; write lambda path, leaf: 'name' in "
            "jax.tree_util.keystr(path)."
        )
        given = callable(where) and otherwise.startswith("where")  # by the user
        raise ValueError(
            f"{otherwise}. The leaves are {shown(tree)}.{hint if given else ''}"
        )


def shown(tree: Any) -> str:
    """The paths of a few leaves, for messages."""
    paths = [path for path, _ in jax.tree.flatten_with_path(tree)[0]]
    names = [jax.tree_util.keystr(path) or "one array" for path in paths]
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "no leaf"


def zeros_like_wide(tree: Any) -> Any:
    """Zeros in float32 or wider for float leaves, ``MaskedNode`` for the others."""
    return jax.tree.map(_numerics.zeros_like, select(tree, None))


def align(tree: Any, params: Any, what: str = "average") -> list[Any]:
    """Leaves of ``tree`` in the order of those of ``params``, None at ``MaskedNode``.

    A ``MaskedNode`` may stand for a whole subtree, and containers may differ (Flax nnx
    wraps the leaves in another variable type) where the names of the leaves agree.

    Raises:
      ValueError: If leaves do not match, naming the first offending one. ``what`` says
        in the message what ``tree`` is.
    """
    named, structure = jax.tree.flatten_with_path(tree, is_leaf=is_masked)
    try:
        parts = structure.flatten_up_to(params)
    except (ValueError, TypeError):
        parts = jax.tree.leaves(params)
    sizes = [len(jax.tree.leaves(part)) for part in parts]
    aligned: list[Any] = []
    for (path, value), size in zip(named, sizes, strict=False):
        aligned += [None] * size if is_masked(value) else [(path, value)]
    paths = jax.tree.flatten_with_path(params)[0]
    if len(named) != len(parts) or len(aligned) != len(paths):
        static = any(callable(leaf) for _, leaf in paths)
        hint = FILTER if static else _way_out(params)
        raise ValueError(
            f"params has {len(paths)} leaves and the {what} {len(named)}; {hint}."
        )
    for found, (path, leaf) in zip(aligned, paths, strict=True):
        if found is None:
            continue
        theirs, value = found
        if not same_names(path, theirs):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} stands where the {what} has "
                f"{jax.tree_util.keystr(theirs)}; pass the parameters that are trained."
            )
        if value.shape != jnp.shape(leaf):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)} and "
                f"its {what} {value.shape}; pass the parameters that are trained."
            )
    return [found and found[1] for found in aligned]


def _way_out(params: Any) -> str:
    """What to pass as parameters, in the terms of the framework that they come from."""
    origins = {base.__module__.partition(".")[0] for base in type(params).__mro__}
    if "equinox" in origins:
        return FILTER
    if "flax" in origins and not hasattr(params, "unfreeze"):
        return (
            "pass nnx.state(model, nnx.Param), with the filter that the optimizer has "
            "as wrt=, or call oa.frameworks.nnx.averaged_model(model, optimizer)"
        )
    if isinstance(params, Mapping) and "params" in params:
        return "pass variables['params'], without the other collections"
    return "pass the parameters that are trained"


def same_names(a: KeyPath, b: KeyPath) -> bool:
    """Whether two paths name the same leaf, whatever the containers are.

    An attribute and a key of a dict may have one name. Boxes of Flax add a ``value``.
    Containers without names, and a tree that is one array, agree with any other.
    """
    ours, theirs = _names(a), _names(b)
    if not ours or not theirs:
        return True
    return len(ours) == len(theirs) and all(
        x is None or y is None or x == y for x, y in zip(ours, theirs)
    )


def _names(path: KeyPath) -> list[str | None]:
    """The names on a path without those of boxes; None where there is no name."""
    if path and isinstance(path[-1], GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return [
        None
        if isinstance(key, FlattenedIndexKey)
        else jax.tree_util.keystr((key,), simple=True)
        for key in path
    ]


def parts_like(tree: Any, other: Any) -> list[Any]:
    """What of ``other`` stands where ``tree`` has its leaves, absent ones counted.

    Its own leaves in their order where the containers differ.
    """
    structure = jax.tree.structure(tree, is_leaf=is_absent)
    try:
        return structure.flatten_up_to(other)
    except (ValueError, TypeError):
        return jax.tree.leaves(other, is_leaf=is_absent)


def states_of(kind: type[State], state: optax.OptState | None) -> list[State]:
    """All states of one type in an optimizer state, however deep, in their order.

    Args:
      kind: Type of the states, a ``NamedTuple``.
      state: An optimizer state, or an object that has one as ``opt_state``.

    Returns:
      The states that were found.
    """
    state = getattr(state, "opt_state", state)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def moved(params: optax.Params, offset: Any) -> optax.Params:
    """``x + d`` in the dtype of ``x``; ``x`` itself where ``d`` is None."""
    if offset is None:
        return params

    def one(x, d):
        return x if d is None else (_numerics.wide(x) + d).astype(x.dtype)

    return jax.tree.map(one, params, offset)


def new_iterate(params: optax.Params, updates: optax.Updates) -> optax.Params:
    """``x_t = params + updates`` as training will hold it, rounding included."""

    def one(x, u):
        return x if u is None or not is_float(x) else optax.apply_updates(x, u)

    return jax.tree.map(one, params, updates)


def over(f: Callable[..., Any], params: Any, *trees: Any) -> Any:
    """Maps leaves that have a float gradient in all ``trees``; None elsewhere."""

    def one(_, *leaves):
        missing = any(leaf is None or not is_float(leaf) for leaf in leaves)
        return None if missing else f(*leaves)

    return jax.tree.map(one, params, *trees, is_leaf=lambda leaf: leaf is None)


def with_first_axis(tree: Any) -> Any:
    """Leaves that have a new first axis, in boxes of Flax that have a name for it."""
    return jax.tree.map(_with_first_axis, tree, is_leaf=_names_axes)


def unboxed(tree: Any) -> Any:
    """Arrays that have other axes than their leaves, out of the boxes of Flax."""

    def one(node: Any) -> Any:
        inside = (
            jax.tree.leaves(node, is_leaf=is_absent) if _names_axes(node) else [node]
        )
        return inside[0]

    return jax.tree.map(one, tree, is_leaf=lambda x: is_absent(x) or _names_axes(x))


def in_boxes_of(like: Any, tree: Any) -> Any:
    """The leaves of ``tree`` in the structure of ``like``, which has as many."""
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(tree))


def _names_axes(node: object) -> bool:
    """Whether a node is one of Flax's boxes: a leaf with names for its axes."""
    return hasattr(node, "add_axis")


def _with_first_axis(node: Any) -> Any:
    """The box with a new first axis without a name, so that no mesh axis splits it."""
    if not _names_axes(node):
        return node
    if hasattr(node, "set_metadata"):  # a variable of NNX, made new by the tree map
        for key, names in _shifted(node.get_metadata()).items():
            node.set_metadata(key, names)
        node.add_axis(0, None)  # runs the user's hooks, changes nothing else
        return node
    if hasattr(node, "metadata"):  # one of NNX in Linen: its add_axis does nothing
        return node.replace(metadata={**node.metadata, **_shifted(node.metadata)})
    return node.add_axis(0, {"partition_name": None})


def _shifted(metadata: dict[str, Any]) -> dict[str, Any]:
    """The names of axes in the metadata of NNX, with one more in front."""
    keys = ("out_sharding", "sharding_names", "optimizer_sharding")
    return {key: (None, *metadata[key]) for key in keys if metadata.get(key)}
