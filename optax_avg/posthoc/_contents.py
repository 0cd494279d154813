"""What a snapshot keeps of an optimizer state and of parameters."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from optax_avg import _leaves, weights
from optax_avg._checkpoints.leaves import Leaf, Path, path_of
from optax_avg.averages import AverageState, readout
from optax_avg.posthoc import _disk, _integrity
from optax_avg.posthoc._records import PARAMETERS, Grid, KindRecord, Record
from optax_avg.posthoc._target import TOLERANCE

# Weights of averages by name, as functions of ``(t, dt)``.
Weights = Mapping[str, weights.Weight]
# Leaves of a tree by path.
Arrays = dict[Path, jax.Array]


class Average(NamedTuple):
    """An average of an optimizer state, or parameters, that a snapshot keeps.

    Attributes:
      name: Name of the average.
      read: Returns the tree of the average.
      absorbed: Number of iterates in it.
      kind: What it is, as in a record.
      grid: Steps that its iterates come from.
      sequence: Weight of each iterate when it was the newest, float64 of shape
        (absorbed,); None if ``kind`` says it.
    """

    name: str
    read: Callable[[], optax.Params]
    absorbed: int
    kind: KindRecord
    grid: Grid
    sequence: np.ndarray | None = None


class Content(NamedTuple):
    """An average in the dtype of the snapshots.

    Attributes:
      average: The average.
      arrays: Its leaves by path, rounded.
      underflow: Relative error from numbers that are too small for the dtype.
      worst: The leaf that loses most by underflow, in words; empty if none loses much.
    """

    average: Average
    arrays: Arrays
    underflow: float
    worst: str


def averages_in(
    opt_state: optax.OptState | None, known: Weights
) -> tuple[list[Average], dict[str, str]]:
    """The averages of a state that have absorbed an iterate.

    Args:
      opt_state: Optimizer state, or None.
      known: Weights of averages whose states do not say what they are.

    Returns:
      The averages that can be kept, and reasons against the others by name.

    Raises:
      ValueError: If two averages have one name, or the members of a stacked state have
        different numbers of iterates.
    """
    found, unknown = [], {}
    seen: set[str] = set()
    for state, count in _begun(opt_state):
        for name in state.averages:
            read = lambda state=state, name=name: readout.read_average(state, name)
            if not jax.tree.leaves(jax.eval_shape(read)):
                continue
            if name in seen or name == PARAMETERS:
                raise ValueError(
                    f"two averages are named {name!r}; give one another name=."
                )
            seen.add(name)
            kind, why = _kind(name, state, known)
            if why:
                unknown[name] = why
                continue
            grid, sequence = _grid(state), None
            if "recorded" in kind:
                sequence = weights.sequence(known[name], count, every=grid.every)
            found.append(Average(name, read, count, kind, grid, sequence))
    return found, unknown


def of_parameters(
    params: optax.Params, step: int, averages: Iterable[Average]
) -> Average:
    """Parameters as an average of the newest iterate alone."""
    now = max((average.grid.step for average in averages), default=max(step, 1))
    read = lambda: _leaves.select(params, None)
    return Average(PARAMETERS, read, now, {"window": 1}, Grid(now, 0, 1))


def rounded(average: Average, dtype: DTypeLike | None) -> Content:
    """An average in the dtype of the snapshots; by default its leaves keep theirs."""
    leaves = _by_path(average.read())
    kept = {path: _cast(x, dtype) for path, x in leaves.items()}
    dtypes = [x.dtype for x in kept.values()]
    whole, shares = _integrity.underflow([*leaves.values()], dtypes)
    worst = ""
    if max(shares, default=0.0) > TOLERANCE:
        i = int(np.argmax(shares))
        place = _disk.place_of(average.name, list(kept)[i])
        worst = (
            f"{place} has numbers too small for {dtypes[i]}, which cost up to "
            f"{shares[i]:.0%} of it"
        )
    return Content(average, kept, whole, worst)


def record_of(step: int, contents: Iterable[Content]) -> tuple[Record, str]:
    """The record of a snapshot.

    Returns:
      The record without the number of the store, and which leaf is not finite, in
      words; empty if all are finite.
    """
    kept = {content.average.name: content for content in contents}
    averages = {name: content.average for name, content in kept.items()}
    leaves: dict[str, list[Leaf]] = {}
    infinite = ""
    for name, content in kept.items():
        arrays = content.arrays
        numbers, finite = jax.device_get(_integrity.signature([*arrays.values()]))
        leaves[name] = [
            Leaf(path, x.shape, str(x.dtype), int(number))
            for (path, x), number in zip(arrays.items(), numbers, strict=True)
        ]
        if not finite.all() and not infinite:
            bad = leaves[name][int(np.argmin(finite))]
            place = _disk.place_of(name, bad.path)
            infinite = f"{place} is not finite in {bad.dtype}."
    record = Record(
        step=step,
        absorbed={name: average.absorbed for name, average in averages.items()},
        kinds={name: average.kind for name, average in averages.items()},
        leaves=leaves,
        grids={name: average.grid for name, average in averages.items()},
        digests={},
        checksum="",
        underflow={name: content.underflow for name, content in kept.items()},
        store=0,
    )
    return record, infinite


NOT_BEGUN = "no average had absorbed an iterate when save was called."


def refuse_nothing(
    opt_state: optax.OptState | None, params: optax.Params | None
) -> None:
    """Raises if a call of ``save`` can never write anything.

    Raises:
      ValueError: If there are neither averages nor parameters.
    """
    if params is None and not readout.average_states(opt_state):
        raise ValueError(
            "there is no average in this optimizer state; put one last in the chain, "
            "as in optax.chain(optimizer, optax_avg.power_ema([0.05, 0.10])), or keep "
            "the parameters by save(None, step, params)."
        )


def _begun(opt_state: optax.OptState | None) -> Iterator[tuple[AverageState, int]]:
    """States of averages that have absorbed iterates, and how many."""
    for state in readout.average_states(opt_state):
        counts = np.unique(np.asarray(state.absorbed)).tolist()
        if counts == [0]:
            continue
        if len(counts) > 1:
            raise ValueError(
                f"the members of a stacked state have {counts} iterates; give each "
                "member a store of its own and save jax.tree.map(lambda x: x[i], "
                "opt_state)."
            )
        yield state, counts[0]


def _kind(name: str, state: AverageState, known: Weights) -> tuple[KindRecord, str]:
    """What an average is, or why that is not known."""
    profile = state.averages[name].profile(jnp.ndim(state.absorbed))
    if profile is None:
        return {}, "it is not a mean of iterates."
    grid = _grid(state)
    due = (grid.step - grid.start) // grid.every
    if due - _one(state.absorbed) != _one(state.rejected):
        return {}, (
            f"its iterates do not lie every {grid.every} steps after {grid.start}, "
            "as its state says; start it anew where start= or every= changes."
        )
    if profile:
        return profile, ""
    if name in known:
        return {"recorded": True}, ""
    return {}, (
        "its weights are not known; write SnapshotStore(directory, weights="
        f"{{{name!r}: optax_avg.weights.ema(0.999)}})."
    )


def _grid(state: AverageState) -> Grid:
    return Grid(_one(state.step), _one(state.start), _one(state.every))


def _one(counter: jax.Array) -> int:
    """A counter of a state; the members of a stacked state have equal ones."""
    return int(np.ravel(np.asarray(counter))[0])


def _by_path(tree: optax.Params) -> Arrays:
    found: Arrays = {}
    for keys, leaf in jax.tree.flatten_with_path(tree)[0]:
        x, path = jnp.asarray(leaf), path_of(keys)
        if path in found:
            raise ValueError(f"two leaves are named {'/'.join(path)!r}.")
        found[path] = x
    return found


def _cast(x: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    return x if dtype is None or jnp.iscomplexobj(x) else x.astype(jnp.dtype(dtype))
