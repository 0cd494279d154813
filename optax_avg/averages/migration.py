"""Loading a checkpoint from before an average was added to the chain.

What both chains hold is carried over unchanged or refused by name; nothing is fitted.
"""

import warnings
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optax_avg import _leaves
from optax_avg.averages.readout import is_average_state

__all__ = ["migrate_state"]

State = TypeVar("State")
INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
# Fields that the averages of one link have in common.
SHARED = ("step", "absorbed", "rejected", "start", "every")
# Fields that count updates, here and in Optax, from zero on.
COUNTERS = ("count", "step", "gradient_step", "rule_step")
AFRESH = "to start it afresh, give it another name="


def migrate_state(new_state: State, old_state: optax.OptState) -> State:
    """Moves an old optimizer state into a chain to which averages were added.

    Checkpoint libraries refuse a state whose structure has changed. Restore the old one
    with the old optimizer as its template, then carry it over. The optimizer's part
    comes from ``old_state``, and so do the averages that both chains have under the
    same name, with their counters, wherever in the chain they stand. Averages that only
    the new chain has start from ``new_state``. Averages that only the old chain has are
    dropped, with a warning that names them; a renamed average is one of each.

    The averages of one link share their counters. A link that gains a name is therefore
    refused: give the new average a link of its own. A state does not hold the decay or
    the formula of a weight, so an average that changes these under its old name is
    carried over as it is.

    Args:
      new_state: ``new_tx.init(params)``.
      old_state: The restored state of the old optimizer.

    Returns:
      A state for the new chain.

    Raises:
      ValueError: If the two are swapped, as far as their counters tell; if an average
        that both have differs in its kind, the shape or dtype
        of a leaf, the length of its window, its leaves, ``every`` or ``start``; if a
        link gains a name; or if the states differ in more than averages. The message
        names the first place.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> params = jnp.ones(2)
      >>> old_tx = optax.adam(1e-3)
      >>> _, old_state = old_tx.update(params, old_tx.init(params), params)
      >>> new_tx = optax.chain(old_tx, oa.ema_params(0.999))
      >>> state = oa.migrate_state(new_tx.init(params), old_state)
      >>> int(optax.tree.get(state, "count"))
      1
    """
    if _has_counted(new_state) and not _has_counted(old_state, if_unknown=True):
        raise ValueError(
            "new_state has been trained and old_state has not: they are swapped. Call "
            "migrate_state(new_tx.init(params), old_state)."
        )
    new, structure = jax.tree.flatten_with_path(new_state, is_leaf=_is_average)
    old = jax.tree.flatten_with_path(old_state, is_leaf=_is_average)[0]
    averages = [node for _, node in old if _is_average(node)]
    rest = [(path, leaf) for path, leaf in old if not _is_average(leaf)]
    moved: list[Any] = []
    taken: dict[str, list[Any]] = {}
    for path, leaf in new:
        where = f"new_state{jax.tree_util.keystr(path)}"
        if _is_average(leaf):
            found = _namesakes(where, leaf, averages)
            for name, node in found.items():
                if _is_in(node, taken.setdefault(name, [])):
                    raise ValueError(
                        f"{where} is the second link with the average {name!r} of the "
                        "old state; give one of them another name=."
                    )
                taken[name].append(node)
            moved.append(_carried(where, leaf, found) if found else leaf)
            continue
        kind = _kind(new_state, path, leaf)
        if not rest or kind != _kind(old_state, *rest[0]):
            there = (
                f"old_state{jax.tree_util.keystr(rest[0][0])}"
                f"{_of(_owner(old_state, rest[0][0]))} is {_type(rest[0][1])}"
                if rest
                else "the old state ends before it"
            )
            raise ValueError(
                f"the states differ in more than averages, first at {where}"
                f"{_of(kind[0])}: it is {_type(leaf)} and {there}; pass the state of "
                "the same optimizer without the added averages."
            )
        moved.append(rest.pop(0)[1])
    if rest:
        raise ValueError(
            "the old state has more than the new one, first "
            f"old_state{jax.tree_util.keystr(rest[0][0])}."
        )
    dropped = [
        name
        for node in averages
        for name in _inner(node).averages
        if not _is_in(node, taken.get(name, []))
    ]
    if dropped:
        warnings.warn(
            f"the averages {sorted(dropped)} of the old state are dropped: the new "
            "chain has no such averages; to keep one, give the new one its old name=.",
            UserWarning,
            stacklevel=2,
        )
    return structure.unflatten(moved)


def _has_counted(state: Any, if_unknown: bool = False) -> bool:
    """Whether a counter of steps is above zero, where there are any with a value."""
    counters = [
        leaf
        for path, leaf in jax.tree.flatten_with_path(state)[0]
        if path
        and isinstance(path[-1], jax.tree_util.GetAttrKey)
        and path[-1].name in COUNTERS
    ]
    if not counters or any(map(_is_unknown, counters)):
        return if_unknown
    return any(np.any(np.asarray(counter) > 0) for counter in counters)


def _is_unknown(leaf: object) -> bool:
    """Whether a leaf has no value, or not all of it in this process."""
    if isinstance(leaf, (jax.ShapeDtypeStruct, Tracer)):
        return True
    return isinstance(leaf, jax.Array) and not (
        leaf.is_fully_addressable or leaf.is_fully_replicated
    )


def _is_average(node: object) -> bool:
    """Whether a node is the state of an average, bare or with injected arguments."""
    return is_average_state(_inner(node))


def _inner(node: Any) -> Any:
    """The state inside that of ``optax.inject_hyperparams``."""
    return node.inner_state if isinstance(node, INJECTED) else node


def _is_in(node: object, nodes: list[Any]) -> bool:
    return any(node is other for other in nodes)


def _namesakes(where: str, node: Any, averages: list[Any]) -> dict[str, Any]:
    """The old states that hold the averages of a new link, by name; all or none."""
    new = _inner(node).averages
    found = {name: _namesake(where, name, tree, averages) for name, tree in new.items()}
    missing = [name for name, source in found.items() if source is None]
    if missing and len(missing) < len(new):
        raise ValueError(
            f"{where} holds the averages {list(new)}, of which the old state lacks "
            f"{missing}: they would share the counters of the others. Give those a "
            "link of their own, a second average(...) in the chain."
        )
    return {} if missing else found


def _namesake(where: str, name: str, tree: Any, averages: list[Any]) -> Any:
    """The old state that holds an average of this name; None if there is none."""
    trees = [(node, _inner(node).averages) for node in averages]
    same = [(node, held) for node, held in trees if name in held]
    if len(same) < 2:
        return same[0][0] if same else None
    # Averages of parts of the parameters, as in optax.partition.
    places = _types(tree).keys()
    parts = [node for node, held in same if _types(held[name]).keys() == places]
    if len(parts) != 1:
        raise ValueError(
            f"the old state has {len(same)} averages named {name!r}, of which "
            f"{len(parts)} hold the leaves of the one in {where}; there must be one."
        )
    return parts[0]


def _carried(where: str, node: Any, found: dict[str, Any]) -> Any:
    """A new link's state with what the old links hold under its names."""
    new = _inner(node)
    sources = {name: _inner(source) for name, source in found.items()}
    first, *others = sources
    for name, source in sources.items():
        _check_alike(where, name, new, source)
    for name in others:
        _check_counters(where, first, name, sources)
    inner = _put_together(new, sources)
    _check_leaves(where, new, inner)
    return _in_wrapper(node, found[first], inner)


def _put_together(new: Any, sources: dict[str, Any]) -> Any:
    """A state like ``new`` whose averages come from ``sources``, by name."""
    first = next(iter(sources.values()))

    def counter(field):
        value = getattr(first, field)
        # Two new links may come from one old one, and both be donated.
        return value if _leaves.is_abstract(value) else jnp.array(value, copy=True)

    averages = {name: state.averages[name] for name, state in sources.items()}
    return new._replace(
        averages=averages, **{field: counter(field) for field in SHARED}
    )


def _in_wrapper(node: Any, source: Any, inner: Any) -> Any:
    """The state back in that of ``optax.inject_hyperparams``, if it was in one.

    The hyper-parameters are the old ones where both have the same.
    """
    if not isinstance(node, INJECTED):
        return inner
    alike = type(source) is type(node) and _types(
        source._replace(inner_state=None)
    ) == _types(node._replace(inner_state=None))
    return (source if alike else node)._replace(inner_state=inner)


def _check_alike(where: str, name: str, new: Any, old: Any) -> None:
    """Raises if two averages of a name are not of one kind, stride and start."""
    ours, theirs = new.averages[name], old.averages[name]
    if type(ours) is not type(theirs):
        raise ValueError(
            f"the average {name!r} in {where} has the memory {type(ours).__name__} and "
            f"had {type(theirs).__name__}; {AFRESH}."
        )
    for field in ("start", "every"):
        before, now = getattr(old, field), getattr(new, field)
        if not _equal(before, now):
            raise ValueError(
                f"the average {name!r} in {where} has {field}={now} and had "
                f"{field}={before}; {AFRESH}."
            )
    if not _leaves.is_abstract([ours, theirs]) and ours.profile() != theirs.profile():
        raise ValueError(
            f"the average {name!r} in {where} has the weights {ours.profile()} and had "
            f"{theirs.profile()}; {AFRESH}."
        )


def _check_counters(where: str, a: str, b: str, sources: dict[str, Any]) -> None:
    """Raises if averages that are to share counters have counted differently."""
    for field in SHARED:
        first, second = getattr(sources[a], field), getattr(sources[b], field)
        if first is not second and not _equal(first, second):
            raise ValueError(
                f"{where} holds the averages {a!r} and {b!r} in one link, but in the "
                f"old state their {field} are {first} and {second}; keep a link for "
                "each."
            )


def _check_leaves(where: str, new: Any, old: Any) -> None:
    """Raises at the first leaf that is missing or has another shape or dtype."""
    now, before = _types(new), _types(old)
    for place in [*now, *before]:
        if now.get(place) != before.get(place):
            raise ValueError(
                f"{where}{place} is {now.get(place, 'absent')} and was "
                f"{before.get(place, 'absent')} in the old state; {AFRESH}."
            )


def _types(tree: optax.OptState) -> dict[str, str]:
    """The types of the leaves by path."""
    leaves = jax.tree.flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): _type(leaf) for path, leaf in leaves}


def _type(leaf: Any) -> str:
    return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"


def _equal(a: Any, b: Any) -> bool:
    """Whether two arrays are the same; shapes without values are taken to be."""
    if _leaves.is_abstract([a, b]):
        return True
    return np.array_equal(np.asarray(a), np.asarray(b))


def _kind(state: Any, path: Any, leaf: Any) -> tuple[Any, ...]:
    """What must agree: state, field, parameter, shape, dtype; not chain positions."""
    names = [key for key in path if not isinstance(key, jax.tree_util.SequenceKey)]
    return _owner(state, path), jax.tree_util.keystr(tuple(names)), _type(leaf)


def _of(owner: str) -> str:
    """The state that holds a leaf, in words; a chain has no name."""
    return f" of {owner}" if owner else ""


def _owner(node: Any, path: Any) -> str:
    """The type of the innermost NamedTuple on a path, such as ``ScaleByAdamState``."""
    owner = ""
    for key in path:
        if hasattr(node, "_fields"):
            owner = type(node).__name__
        if isinstance(key, jax.tree_util.GetAttrKey):
            node = getattr(node, key.name)
        elif isinstance(key, jax.tree_util.SequenceKey):
            node = node[key.idx]
        elif isinstance(key, jax.tree_util.DictKey):
            node = node[key.key]
        else:
            break
    return owner
