"""Snapshots of averages on disk, and averages of other widths made of them.

    average = sum_i x_i snapshot_i,    x from optax_avg.posthoc.coefficients

A snapshot is an ordinary Orbax checkpoint, a directory by step. Each leaf carries a
number by which it is known again: what does not come back as it was saved is reported
by name and left out.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_avg import _leaves
from optax_avg import weights as weights_
from optax_avg.averages import readout
from optax_avg.posthoc import (
    _disk,
    _integrity,
    _plan,
    _profiles,
    _reconstruct,
    _writer,
)
from optax_avg.posthoc._plan import TOLERANCE, Part, Plan
from optax_avg.posthoc._timeline import PARAMETERS


class SnapshotStore:
    """Snapshots of averages in a directory.

    Args:
      directory: a local path, or any that Orbax writes to; made by the first snapshot.
      weights: of the averages by name, as given to :func:`optax_avg.average`; needed
        for all but :func:`optax_avg.power_ema` and :func:`optax_avg.window_average`,
        whose states say what they are.
      dtype: of the snapshots, ``jnp.bfloat16`` or ``jnp.float16`` for half the disk;
        by default that of the averages. Sums are float32 or wider. Numbers near the
        smallest of float16, 6e-8, lose their digits in it; a warning names the leaf.

    Raises:
      ValueError: If an argument is out of range.
      ImportError: If Orbax or filelock is not installed.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa, tempfile
      >>> tx = optax.chain(optax.sgd(1.0), oa.power_ema([0.05, 0.10]))
      >>> params = {"w": jnp.zeros(2)}
      >>> opt_state = tx.init(params)
      >>> grads = {"w": -jnp.ones(2)}
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     with oa.posthoc.SnapshotStore(directory) as store:
      ...         for step in range(1, 33):
      ...             updates, opt_state = tx.update(grads, opt_state, params)
      ...             params = optax.apply_updates(params, updates)
      ...             if step % 4 == 0:
      ...                 saved = store.save(opt_state, step)
      ...         average = store.reconstruct(params, sigma_rel=0.15)
      >>> [round(x, 1) for x in average["w"].tolist()]
      [26.7, 26.7]

    References:
      Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion
      Models", 2024, 2312.02696.
    """

    def __init__(
        self,
        directory: Any,
        *,
        weights: Mapping[str, weights_.Weight] | None = None,
        dtype: Any = None,
    ) -> None:
        _disk.orbax()
        _writer.filelock()
        if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"dtype must be a floating point type, got {dtype!r}.")
        self.directory = _disk.absolute(directory)
        if weights is not None and not isinstance(weights, Mapping):
            raise ValueError(
                "weights must be a dict of weights by the names of their averages, got "
                f"{type(weights).__name__}; write SnapshotStore(directory, weights="
                "{'ema': optax_avg.weights.ema(0.999)})."
            )
        self._weights = {
            name: weights_.with_stride(weight)
            for name, weight in (weights or {}).items()
        }
        self._unknown: dict[str, str] = {}
        self._why = ""  # nothing was saved the last time
        self._coarse = False
        self._dtype = dtype
        self._writer: _writer.Writer | None = None
        self._in_flight: int | None = None
        self._last = -1

    def __enter__(self) -> "SnapshotStore":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def save(self, opt_state: Any, step: int, params: Any = None) -> bool:
        """Begins to write a snapshot and returns; the disk works in the background.

        A snapshot of the same step is replaced once this one is whole. State and
        parameters may be donated as soon as this returns. An average whose weights are
        not known is left out, and named once by a warning.

        Args:
          opt_state: an optimizer state with averages, as for
            :func:`optax_avg.averaged_params`, or None.
          step: of the training; not negative. Number snapshots by optimizer steps:
            with other numbers a training that is begun anew may not be noticed.
          params: parameters to keep beside the averages, for :meth:`mean`.

        Returns:
          Whether there was anything to write: False before the averages have begun
          and, with a warning, where one is not finite.

        Raises:
          ValueError: If there are snapshots of later steps, or ``step`` is not an
            integer.
          RuntimeError: If another store writes to this directory.
          OSError: If this snapshot, or the one before, could not be written, or what
            has the name of the step is not a snapshot.
        """
        step = _whole_step(step)
        kept, absorbed, kinds, grids, sequences = {}, {}, {}, {}, {}
        underflow = {}
        for name, tree, count, kind, grid in self._averages(opt_state):
            kept[name], underflow[name] = self._rounded(name, tree)
            absorbed[name] = count
            kinds[name], grids[name] = kind, grid
            if "recorded" in kind:
                weight = self._weights[name]
                sequences[name] = weights_.sequence(weight, count, every=grid.every)
        if params is not None:
            floats = _leaves.select(params, None)
            kept[PARAMETERS], underflow[PARAMETERS] = self._rounded(PARAMETERS, floats)
            now = max((grid.step for grid in grids.values()), default=max(step, 1))
            grids[PARAMETERS] = _disk.Grid(now, 0, 1)
            absorbed[PARAMETERS], kinds[PARAMETERS] = now, {"window": 1}
        kept = {name: leaves for name, leaves in kept.items() if leaves}
        underflow = {name: underflow[name] for name in kept}
        leaves, infinite = _signed(kept)
        if infinite:
            self._why = f"no snapshot of step {step}: {infinite}"
            warnings.warn(self._why, RuntimeWarning, stacklevel=2)
        elif not kept:
            self._why = "" if self._unknown else _why_empty(opt_state)
        if infinite or not kept:
            return False
        self.wait()
        writer = self._opened()
        if step < self._last:
            raise ValueError(
                f"{self.directory} has snapshots of later steps than {step}, up to "
                f"{self._last}; where training resumes, remove them by store."
                f"delete_after({step}), or give this run a directory of its own."
            )
        self._in_flight = self._last = step
        with self._reported():
            record = _disk.Record(
                step, absorbed, kinds, leaves, grids, {}, "", underflow, 0
            )
            _writer.write(writer, record, kept, sequences)
        return True

    def wait(self) -> None:
        """Waits for the snapshot in flight.

        Raises:
          OSError: If it could not be written; those before it are whole.
        """
        if self._writer is not None:
            with self._reported():
                _writer.wait(self._writer)

    def close(self) -> None:
        """Waits for the snapshot in flight and lets others write to the directory.

        Raises:
          OSError: If it could not be written.
        """
        self.wait()
        self._let_go()

    def delete_after(self, step: int) -> None:
        """Removes the snapshots after ``step``, where training resumes.

        Args:
          step: Step of the last snapshot that stays; an integer, not negative.

        Raises:
          ValueError: If ``step`` is not such an integer.
          RuntimeError: If another store writes to this directory.
        """
        step = _whole_step(step)
        self.wait()
        _writer.remove_after(self._opened(), step)
        self._last = max(_disk.steps_of(self.directory), default=-1)

    truncate = delete_after  # its old name

    def steps(self) -> list[int]:
        """Steps of the finished snapshots, ascending; none before the first."""
        self.wait()
        return _disk.steps_of(self.directory)

    def plan(
        self,
        *,
        sigma_rel: float | None = None,
        half_life: float | None = None,
        window: int | None = None,
        weight: weights_.Weight | None = None,
        step: int | None = None,
        names: Sequence[str] | None = None,
        normalize: str = _profiles.CONSTRAINED,
    ) -> Plan:
        """How an average would be put together.

        Averages are combined on one clock, that of optimizer steps: it counts the steps
        of the oldest state in the newest snapshot, without those whose iterates were
        left out because they were not finite. What is made is an average of the steps
        ``start + every i`` on it, ``i = 1, 2, ...``: ``start`` is the earliest of the
        averages, ``every`` the coarsest stride that holds the iterates of all. Where
        averages of one stride are combined, that is the average that
        ``oa.average(weight, every=every, start=start)`` would have made.

        Of the snapshots, those of the newest run count. A run ends where the states of
        all averages were made anew, so that their steps fell back while those of the
        training went on.

        Args:
          sigma_rel: relative width of a power function, in (0, 12^-1/2).
          half_life: of an EMA, in optimizer steps, as in
            :func:`optax_avg.weights.half_life`; its weights on the iterates sum to one,
            as in ``weights.ema``, so that the initial parameters are left out.
          window: optimizer steps whose iterates a uniform mean takes, the latest.
          weight: or any weight ``w(t)`` or ``w(t, dt)`` of :mod:`optax_avg.weights`.
          step: at which the average ends, one of :meth:`steps`; by default the last.
          names: of averages to make it of; by default all.
          normalize: see :func:`optax_avg.posthoc.coefficients`.

        Returns:
          A :class:`Plan`.

        Raises:
          ValueError: If not exactly one target is given, or there are no snapshots.
        """
        goal = _plan.target_of(sigma_rel, half_life, window, weight)
        with self._reading() as reader:
            records = _reconstruct.records_of(reader)
            return _reconstruct.without_broken(
                reader,
                records,
                lambda left: _plan.planned(reader, left, goal, step, names, normalize),
            )

    def reconstruct(
        self,
        params: Any = None,
        *,
        sigma_rel: float | None = None,
        half_life: float | None = None,
        window: int | None = None,
        weight: weights_.Weight | None = None,
        step: int | None = None,
        names: Sequence[str] | None = None,
        normalize: str = _profiles.CONSTRAINED,
    ) -> Any:
        """An average that was not kept, from the snapshots.

        Goes leaf by leaf: no more is in memory than the result and two leaves. A
        snapshot that cannot be read, or not as it was written, is reported by a warning
        and left out. Another warning says how much the snapshots lack to express the
        target, the rounding of their dtypes included.

        Args:
          params: a tree of arrays or of ``jax.ShapeDtypeStruct`` that the result is
            like in structure, dtypes and shardings; leaves that were not averaged come
            from it. By default nested dicts in float32 or wider.
          sigma_rel: see :meth:`plan`, as all that follow.
          half_life: of an EMA, in optimizer steps.
          window: optimizer steps whose iterates a uniform mean takes.
          weight: or any weight of :mod:`optax_avg.weights`.
          step: at which the average ends.
          names: of averages to make it of.
          normalize: see :func:`optax_avg.posthoc.coefficients`.

        Returns:
          A tree like ``params``.

        Raises:
          ValueError: If there is nothing to make it of, or ``params`` has other leaves.
        """
        goal = _plan.target_of(sigma_rel, half_life, window, weight)
        with self._reading() as reader:
            records = _reconstruct.records_of(reader)

            def made(left):
                plan = _plan.planned(reader, left, goal, step, names, normalize)
                _plan.warn_of_residual(plan)
                return _reconstruct.summed(reader, left, plan.parts, params)

            return _reconstruct.without_broken(reader, records, made)

    def mean(
        self,
        params: Any = None,
        *,
        steps: Sequence[int] | None = None,
        name: str = PARAMETERS,
    ) -> Any:
        """The uniform mean of snapshots: SWA, LAWA and SWAD after the fact.

        Args:
          params: see :meth:`reconstruct`.
          steps: of the snapshots; by default all. See :func:`swad_window`.
          name: of what is averaged.

        Returns:
          A tree like ``params``.

        Raises:
          ValueError: If there is no such snapshot.
        """
        if steps is not None:
            steps = [_whole_step(step) for step in np.ravel(np.asarray(steps))]
        with self._reading() as reader:
            records = _reconstruct.records_of(reader, steps)
            lack = [s for s, record in records.items() if name not in record.leaves]
            there = _disk.steps_of(reader.directory)
            have = [s for s in there if s not in lack]
            wanted = have if steps is None else sorted(set(steps))
            missing = [s for s in wanted if s not in have]
            if not there:
                raise ValueError(
                    f"{self.directory} holds no snapshots; save one first."
                )
            if not have:
                known = sorted(
                    {n for record in records.values() for n in record.leaves}
                )
                raise ValueError(
                    f"the snapshots in {self.directory} hold no {name!r}; pass name=, "
                    f"one of {known}, or save parameters by save(opt_state, step, "
                    "params)."
                )
            if missing or not wanted:
                raise ValueError(
                    f"{self.directory} has no snapshot of {name!r} at steps "
                    f"{missing}; pass some of {have}."
                )
            if steps is None:  # those that were chosen by hand are taken as they are
                records = _plan.without_others(records, 3)
                wanted = [s for s in wanted if s in records]

            def made(left):
                whole = [s for s in wanted if s in left]
                if not whole:
                    raise ValueError(f"no snapshot of {name!r} could be read.")
                parts = [Part(s, name, 1 / len(whole)) for s in whole]
                return _reconstruct.summed(reader, left, parts, params)

            return _reconstruct.without_broken(reader, records, made)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[_disk.Reader]:
        """What reads the snapshots, once they are all on the disk.

        Raises:
          ValueError: If nothing was saved, with the reason if this store knows it.
        """
        self.wait()
        whys = [*self._unknown.values(), *([self._why] if self._why else [])]
        if whys and not _disk.steps_of(self.directory):
            raise ValueError(
                f"there are no snapshots in {self.directory}, for nothing could be "
                f"saved: {' '.join(whys)}"
            )
        with _disk.reader_of(self.directory) as reader:
            yield reader

    def _rounded(
        self, name: str, tree: Any
    ) -> tuple[dict[_disk.Path, jax.Array], float]:
        """Leaves as they are kept, and the relative error of what underflows."""
        leaves = _by_path(tree)
        kept = {path: _cast(x, self._dtype) for path, x in leaves.items()}
        dtypes = [x.dtype for x in kept.values()]
        whole, shares = _integrity.underflow([*leaves.values()], dtypes)
        if not self._coarse and max(shares, default=0.0) > TOLERANCE:
            self._coarse = True
            worst = int(np.argmax(shares))
            path, dtype = list(kept)[worst], dtypes[worst]
            warnings.warn(
                f"{'/'.join((name, *path))} has numbers too small for {dtype}, which "
                f"cost up to {shares[worst]:.0%} of it; keep averages and snapshots in "
                "bfloat16 or float32.",
                RuntimeWarning,
                stacklevel=3,
            )
        return kept, whole

    def _averages(
        self, opt_state: Any
    ) -> Iterator[tuple[str, Any, int, dict[str, Any], _disk.Grid]]:
        """The averages that have begun, with what a record says of them.

        Name, tree, number of iterates, kind and where the iterates come from.
        """
        seen, unknown = set(), {}
        for node in readout.average_states(opt_state):
            counts = np.unique(np.asarray(node.absorbed)).tolist()
            if counts == [0]:
                continue
            if len(counts) > 1:
                raise ValueError(
                    f"the members of a stacked state have {counts} iterates; give each "
                    "member a store of its own and save jax.tree.map(lambda x: x[i], "
                    "opt_state)."
                )
            for name in node.averages:
                read = lambda node=node, name=name: readout.read_average(node, name)
                if not jax.tree.leaves(jax.eval_shape(read)):
                    continue
                if name in seen or name == PARAMETERS:
                    raise ValueError(
                        f"two averages are named {name!r}; give one another name=."
                    )
                seen.add(name)
                kind, why = self._kind(name, node)
                if why:
                    unknown[name] = why
                    continue
                yield name, read(), counts[0], kind, _grid(node)
        for name, why in unknown.items():
            if name not in self._unknown:
                said = f"no snapshots of the average {name!r} are kept: {why}"
                self._unknown[name] = said
                warnings.warn(said, UserWarning, stacklevel=3)

    def _kind(self, name: str, node: Any) -> tuple[dict[str, Any], str]:
        """What an average is, or why that cannot be told."""
        profile = node.averages[name].profile(jnp.ndim(node.absorbed))
        if profile is None:
            return {}, "it is not a mean of iterates."
        grid, absorbed, rejected = _grid(node), _one(node.absorbed), _one(node.rejected)
        missing = (grid.step - grid.start) // grid.every - absorbed
        if missing != rejected:
            return {}, (
                f"its iterates do not lie every {grid.every} steps after {grid.start}, "
                "as its state says; start it anew where start= or every= changes."
            )
        if profile:
            return profile, ""
        if name in self._weights:
            return {"recorded": True}, ""
        return {}, (
            "its weights are not known; write SnapshotStore(directory, weights="
            f"{{{name!r}: optax_avg.weights.ema(0.999)}})."
        )

    def _opened(self) -> _writer.Writer:
        if self._writer is None:
            self._writer = _writer.open_writer(self.directory)
            self._last = max(_disk.steps_of(self.directory), default=-1)
        return self._writer

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Names the snapshot that failed, and leaves the store usable."""
        try:
            yield
        except Exception as error:
            with contextlib.suppress(Exception):
                self._let_go()
            raise OSError(
                f"the snapshot of step {self._in_flight} could not be written to "
                f"{self.directory}; those before it are whole. {error}"
            ) from error

    def _let_go(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            _writer.close_writer(writer)


def _whole_step(step: Any) -> int:
    whole = isinstance(step, (int, np.integer)) and not isinstance(step, bool)
    if isinstance(step, jax.Array) and step.ndim == 0:
        whole = bool(jnp.issubdtype(step.dtype, jnp.integer))
    if not whole or int(step) < 0:
        raise ValueError(f"step must be an integer >= 0, got {step!r}.")
    return int(step)


def _one(counter: Any) -> int:
    """A counter of a state, one of equals where states are stacked."""
    return int(np.ravel(np.asarray(counter))[0])


def _grid(node: Any) -> _disk.Grid:
    return _disk.Grid(_one(node.step), _one(node.start), _one(node.every))


def _why_empty(opt_state: Any) -> str:
    """Why there was nothing to save."""
    if readout.average_states(opt_state):
        return "no average had absorbed an iterate when save was called."
    return (
        "there was no average in the optimizer state; put one last in the chain, as in "
        "optax.chain(optimizer, optax_avg.power_ema([0.05, 0.10]))."
    )


def _by_path(tree: Any) -> dict[_disk.Path, jax.Array]:
    found: dict[_disk.Path, jax.Array] = {}
    for keys, leaf in jax.tree.flatten_with_path(tree)[0]:
        x, path = jnp.asarray(leaf), _disk.path_of(keys)
        if path in found:
            raise ValueError(f"two leaves are named {'/'.join(path)!r}.")
        found[path] = x
    return found


def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    return x if dtype is None or jnp.iscomplexobj(x) else x.astype(jnp.dtype(dtype))


def _signed(
    kept: dict[str, dict[_disk.Path, jax.Array]],
) -> tuple[dict[str, list[_disk.Leaf]], str]:
    """What is recorded of the leaves, and which of them is not finite, if one is."""
    signed = {}
    for name, leaves in kept.items():
        numbers, finite = jax.device_get(_integrity.signature(list(leaves.values())))
        signed[name] = [
            _disk.Leaf(path, x.shape, str(x.dtype), int(number))
            for (path, x), number in zip(leaves.items(), numbers, strict=True)
        ]
        if not finite.all():
            bad = signed[name][int(np.argmin(finite))]
            return {}, f"{'/'.join((name, *bad.path))} is not finite in {bad.dtype}."
    return signed, ""
