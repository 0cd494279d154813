"""Sums of snapshots, leaf by leaf."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_avg import _tree, weights
from optax_avg.posthoc import _disk
from optax_avg.posthoc._profiles import (
    Kind,
    Power,
    Recorded,
    Window,
    combination,
    snapshots_within,
    widths_within,
)

TOLERANCE = 0.05  # relative error of a profile above which a reconstruction warns


class Part(NamedTuple):
    """A snapshot of an average in a sum.

    Attributes:
      step: of the snapshot.
      name: of the average.
      weight: on it.
    """

    step: int
    name: str
    weight: float


class Plan(NamedTuple):
    """How an average is put together.

    Attributes:
      parts: snapshots and their weights.
      residual: relative error of the profile, see :class:`Coefficients`.
      condition: of the problem.
      advice: what would express the target better, empty where it is expressed.
    """

    parts: list[Part]
    residual: float
    condition: float
    advice: str


def target_of(
    sigma_rel: Any = None,
    half_life: Any = None,
    window: Any = None,
    weight: Any = None,
    every: int = 1,
) -> Callable[[int], Kind]:
    """From a number of iterates to the average that is wanted."""
    if sum(x is not None for x in (sigma_rel, half_life, window, weight)) != 1:
        raise ValueError(
            "there must be one target; write reconstruct(params, sigma_rel=0.08), or "
            "half_life=, window= or weight=."
        )
    if sigma_rel is not None:
        power = Power(weights.gamma_from_sigma_rel(float(sigma_rel)))
        return lambda t: power
    if window is not None:
        _tree.check_integer("window", window, 1)
        return lambda t: Window(window)
    if half_life is not None:
        weight, every = weights.ema(weights.decay_from_half_life(float(half_life))), 1
    return lambda t: Recorded(weights.sequence(weight, t, every=every))


def records_of(
    reader: _disk.Reader, steps: Sequence[int] | None = None
) -> dict[int, _disk.Record]:
    """Records of the snapshots that can be read, of some steps or all; by step.

    The others are reported.
    """
    records = {}
    for step in _disk.steps_of(reader.directory):
        if steps is not None and step not in steps:
            continue
        try:
            records[step] = _disk.read_record(reader, step)
        except _disk.SnapshotError as broken:
            report(broken)
    return records


def report(broken: _disk.SnapshotError) -> None:
    """Names a snapshot that is left out."""
    warnings.warn(
        f"the snapshot of step {broken.step} is left out: {broken}",
        RuntimeWarning,
        stacklevel=4,
    )


def planned(
    reader: _disk.Reader,
    records: dict[int, _disk.Record],
    goal: Callable[[int], Kind],
    step: int | None,
    names: Sequence[str] | None,
    normalize: str,
) -> Plan:
    """The best combination of the snapshots up to ``step``.

    Raises:
      ValueError: If there are none.
    """
    chosen = [
        (record, name)
        for record in records.values()
        for name in record.leaves
        if name in (names or [n for n in record.leaves if n != "parameters"])
        and (step is None or record.step <= step)
    ]
    kinds = kinds_of(reader, chosen)
    chosen = [(record, name) for record, name in chosen if (record.step, name) in kinds]
    if not chosen or step not in (None, chosen[-1][0].step):
        have = sorted({record.step for record in records.values()})
        wanted = "the averages" if names is None else f"{list(names)} "
        at = "" if step is None else f" at step {step}"
        raise ValueError(f"there is no snapshot of {wanted}{at}; there are {have}.")
    last = chosen[-1][0].step
    times = [record.absorbed[name] for record, name in chosen]
    end = max(t for t, (record, _) in zip(times, chosen) if record.step == last)
    kept = [(kinds[record.step, name], t) for t, (record, name) in zip(times, chosen)]
    target = goal(end)
    found = combination(kept, (target, end), normalize=normalize)
    parts = [
        Part(record.step, name, float(x))
        for (record, name), x in zip(chosen, found.weights, strict=True)
    ]
    advice = ""
    if found.residual > TOLERANCE:
        advice = _advice(kept, target, end)
    return Plan(parts, found.residual, found.condition, advice)


def kinds_of(
    reader: _disk.Reader, chosen: list[tuple[_disk.Record, str]]
) -> dict[tuple[int, str], Kind]:
    """What each snapshot of an average is, without those that cannot be told."""
    kinds: dict[tuple[int, str], Kind] = {}
    sequences: dict[str, np.ndarray] = {}
    for record, name in reversed(chosen):
        kind = record.kinds[name]
        if "power" in kind:
            kinds[record.step, name] = Power(kind["power"])
        elif "window" in kind:
            kinds[record.step, name] = Window(kind["window"])
        else:
            # The weights of an earlier snapshot begin those of a later one.
            try:
                if name not in sequences:
                    sequences[name] = _disk.read_sequence(reader, record, name)
                kinds[record.step, name] = Recorded(sequences[name])
            except _disk.SnapshotError as broken:
                report(broken)
    return kinds


def _advice(kept: list[tuple[Kind, int]], target: Kind, end: int) -> str:
    """What else would do: a width, or more snapshots."""
    powers = [(kind.gamma, t) for kind, t in kept if isinstance(kind, Power)]
    if not isinstance(target, Power) or not powers:
        return "keep more snapshots, or averages closer to the target."
    widths = [weights.sigma_rel_from_gamma(gamma) for gamma, _ in powers]
    said = []
    span = widths_within([t for _, t in powers], widths, end, TOLERANCE)
    if span:
        said.append(f"sigma_rel from {span[0]:.2g} to {span[1]:.2g} can be had")
    wanted = weights.sigma_rel_from_gamma(target.gamma)
    count = snapshots_within(sorted(set(widths)), wanted, TOLERANCE)
    if count:
        said.append(f"{count} evenly spaced snapshots would do")
    return "; ".join(said) + "." if said else "no number of such snapshots would do."


def warn_of_residual(plan: Plan) -> None:
    """Says so where the target is out of reach."""
    if plan.residual > TOLERANCE:
        warnings.warn(
            f"the snapshots miss the weights of this average by {plan.residual:.1%}: "
            f"{plan.advice}",
            UserWarning,
            stacklevel=5,
        )


def without_broken(
    records: dict[int, _disk.Record], make: Callable[[dict[int, _disk.Record]], Any]
) -> Any:
    """``make(records)``, again without a snapshot that proves broken on the way."""
    while True:
        try:
            return make(records)
        except _disk.SnapshotError as broken:
            report(broken)
            records = {s: r for s, r in records.items() if s != broken.step}


def summed(
    reader: _disk.Reader,
    records: dict[int, _disk.Record],
    parts: list[Part],
    params: Any,
) -> Any:
    """``sum_i x_i snapshot_i``, like ``params``."""
    leaves = leaves_of(records, parts)
    like, place = _layout(leaves, params)
    result: dict[int, jax.Array] = {}
    for batch in _disk.batches(leaves):
        shardings = [sharding_of(like[i]) for i in batch]
        total = summed_leaves(reader, records, parts, batch, shardings)
        for i, leaf in zip(batch, total, strict=True):
            dtype = leaf.dtype if like[i] is None else like[i].dtype
            result[i] = leaf.astype(dtype)
        del total
    return place(result)


def leaves_of(records: dict[int, _disk.Record], parts: list[Part]) -> list[_disk.Leaf]:
    """The leaves that all parts of a sum have.

    Raises:
      ValueError: If they differ.
    """
    leaves = records[parts[-1].step].leaves[parts[-1].name]
    for part in parts:
        _check_alike(leaves, records[part.step].leaves[part.name], part)
    return leaves


def summed_leaves(
    reader: _disk.Reader,
    records: dict[int, _disk.Record],
    parts: list[Part],
    indices: list[int],
    shardings: list[Any],
) -> list[jax.Array]:
    """Some leaves of a sum of snapshots, in float32 or wider.

    Raises:
      SnapshotError: If a snapshot is broken.
    """
    total = None
    for part in parts:
        record = records[part.step]
        read = _disk.read_leaves(reader, record, part.name, indices, shardings)
        x = jnp.asarray(part.weight, jnp.float32)
        total = _scaled(x, read) if total is None else _added(x, read, total)
        del read
    return total or []


@jax.jit
def _scaled(x: jax.Array, leaves: list[jax.Array]) -> list[jax.Array]:
    return [x * _tree.wide(leaf) for leaf in leaves]


@functools.partial(jax.jit, donate_argnums=2)
def _added(
    x: jax.Array, leaves: list[jax.Array], total: list[jax.Array]
) -> list[jax.Array]:
    return [a + x * _tree.wide(leaf) for a, leaf in zip(total, leaves, strict=True)]


def _check_alike(
    leaves: list[_disk.Leaf], others: list[_disk.Leaf], part: Part
) -> None:
    ours = [(leaf.path, leaf.shape) for leaf in leaves]
    theirs = [(leaf.path, leaf.shape) for leaf in others]
    if ours != theirs:
        odd = next((b for a, b in zip(ours, theirs) if a != b), theirs[-1])
        raise ValueError(
            f"the snapshot of {part.name!r} at step {part.step} has other leaves, "
            f"first {'/'.join(odd[0])} of shape {odd[1]}; pass names= of averages of "
            "one tree."
        )


def _layout(
    leaves: list[_disk.Leaf], params: Any
) -> tuple[list[Any], Callable[[dict[int, jax.Array]], Any]]:
    """What each leaf of the result is like, and how to put them into a tree."""
    if params is None:
        paths = [leaf.path for leaf in leaves]
        return [None] * len(leaves), lambda found: _disk.nested(
            {paths[i]: leaf for i, leaf in found.items()}
        )
    entries, structure = jax.tree.flatten_with_path(params)
    position = {_disk.path_of(keys): j for j, (keys, _) in enumerate(entries)}
    floats = [j for j, (_, leaf) in enumerate(entries) if _tree.is_float(leaf)]
    if any(leaf.path not in position for leaf in leaves):
        # Wrappers rename paths; leaves that match one to one keep their order.
        if len(floats) != len(leaves):
            missing = next(x.path for x in leaves if x.path not in position)
            raise ValueError(
                f"params has no leaf {'/'.join(missing)}; pass the parameters that "
                "were averaged."
            )
        position = {leaf.path: j for leaf, j in zip(leaves, floats, strict=True)}
    where = [position[leaf.path] for leaf in leaves]
    for leaf, j in zip(leaves, where, strict=True):
        shape = jnp.shape(entries[j][1])
        if shape != leaf.shape:
            raise ValueError(
                f"params{jax.tree_util.keystr(entries[j][0])} has shape {shape} and "
                f"its average {leaf.shape}; pass the parameters that were averaged."
            )
    like = [entries[j][1] for j in where]
    like = [x if hasattr(x, "dtype") else jnp.asarray(x) for x in like]

    def place(found):
        new = [leaf for _, leaf in entries]
        for i, leaf in found.items():
            new[where[i]] = leaf
        return structure.unflatten(new)

    return like, place


def sharding_of(like: Any) -> Any:
    """Where a leaf of the result goes: as in ``like``, else the first device."""
    sharding = getattr(like, "sharding", None)
    return sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
