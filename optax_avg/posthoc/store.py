"""Snapshots of averages on disk, and other averages made from them.

    average = sum_i x_i snapshot_i,    x from optax_avg.posthoc.coefficients

Each snapshot is an ordinary Orbax checkpoint in a directory named by its step. Each
leaf has a fingerprint in the record of the snapshot. Snapshots that do not come back as
they were saved are skipped with a warning that names them.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_avg import weights as weights_
from optax_avg._checkpoints.orbax import orbax
from optax_avg.posthoc import _contents, _disk, _writer
from optax_avg.posthoc._plan import Part, Plan, warn, warn_of_residual, without_others
from optax_avg.posthoc._reading import records_of, with_plan, without_broken
from optax_avg.posthoc._records import PARAMETERS, Records, names_in
from optax_avg.posthoc._target import TargetOptions, request_of, with_target
from optax_avg.posthoc.streaming import Example, assembled, sum_of

__all__ = ["SnapshotStore"]


class SnapshotStore:
    """Snapshots of averages in a directory.

    Args:
      directory: A local path, or any other that Orbax can write to. The first snapshot
        creates it.
      weights: Weights of averages by name, as given to :func:`optax_avg.average`. They
        are needed for all averages but :func:`optax_avg.power_ema` and
        :func:`optax_avg.window_average`, whose states say what they are.
      dtype: Dtype of the snapshots; by default that of the averages. ``jnp.bfloat16``
        and ``jnp.float16`` take half the disk. Sums are float32 or wider. Numbers near
        the smallest of float16, 6e-8, lose their digits in it; a warning names the
        leaf.

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
        directory: _disk.AnyDirectory,
        *,
        weights: Mapping[str, weights_.Weight] | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        orbax()
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
        self._unknown: dict[str, str] = {}  # averages that were named by a warning
        self._why = ""  # why the last call of save wrote nothing
        self._coarse = False  # whether a warning has named a leaf that underflows
        self._dtype = dtype
        self._writer: _writer.Writer | None = None
        self._in_flight: int | None = None
        self._last = -1

    def __enter__(self) -> "SnapshotStore":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def save(
        self,
        opt_state: optax.OptState | None,
        step: int,
        params: optax.Params | None = None,
    ) -> bool:
        """Begins to write a snapshot and returns; the disk works in the background.

        A snapshot of the same step is replaced when this one is complete. State and
        parameters may be donated as soon as this returns. Averages whose weights are
        not known are skipped; a warning names them once.

        Args:
          opt_state: Optimizer state with averages, as for
            :func:`optax_avg.averaged_params`, or None.
          step: Training step, not negative. Number snapshots by optimizer steps: with
            other numbers a training that is started anew may not be noticed.
          params: Parameters to keep beside the averages, for :meth:`mean`.

        Returns:
          Whether there was anything to write. It is False before the averages have
          absorbed an iterate. It is False, with a warning, if an average is not finite.

        Raises:
          ValueError: If there are snapshots of later steps, or ``step`` is not an
            integer, or there is no average in ``opt_state`` and no ``params``.
          RuntimeError: If another store writes to this directory.
          OSError: If this snapshot or the one before could not be written, or if the
            directory of the step holds something else.

        Example:
          >>> import jax.numpy as jnp, tempfile
          >>> from optax_avg import posthoc
          >>> with tempfile.TemporaryDirectory() as directory:
          ...     with posthoc.SnapshotStore(directory) as store:
          ...         store.save(None, 100, params={"w": jnp.ones(2)})
          True
        """
        step = _whole_step(step)
        _contents.refuse_nothing(opt_state, params)
        contents = self._contents_of(opt_state, step, params)
        record, infinite = _contents.record_of(step, contents)
        if infinite:
            self._why = f"no snapshot of step {step}: {infinite}"
            warn(self._why, RuntimeWarning)
        elif not contents:
            self._why = "" if self._unknown else _contents.NOT_BEGUN
        if infinite or not contents:
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
        arrays = {content.average.name: content.arrays for content in contents}
        sequences = {
            content.average.name: content.average.sequence
            for content in contents
            if content.average.sequence is not None
        }
        with self._reported():
            _writer.write(writer, record, arrays, sequences)
        return True

    def wait(self) -> None:
        """Waits for the snapshot in flight.

        Raises:
          OSError: If it could not be written; earlier snapshots are complete.
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
        """Removes the snapshots after ``step``, for a training that resumes there.

        Args:
          step: Step of the last snapshot that stays, not negative.

        Raises:
          ValueError: If ``step`` is not an integer, or negative.
          RuntimeError: If another store writes to this directory.

        Example:
          >>> import jax.numpy as jnp, tempfile
          >>> from optax_avg import posthoc
          >>> with tempfile.TemporaryDirectory() as directory:
          ...     with posthoc.SnapshotStore(directory) as store:
          ...         for step in (100, 200, 300):
          ...             saved = store.save(None, step, params={"w": jnp.ones(2)})
          ...         store.delete_after(200)
          ...         store.steps()
          [100, 200]
        """
        step = _whole_step(step)
        self.wait()
        _writer.remove_after(self._opened(), step)
        self._last = max(_disk.steps_of(self.directory), default=-1)

    def steps(self) -> list[int]:
        """Steps of the finished snapshots, ascending; empty before the first."""
        self.wait()
        return _disk.steps_of(self.directory)

    @with_target
    def plan(
        self,
        **options: Unpack[TargetOptions],
    ) -> Plan:
        """How an average would be put together.

        Averages are combined on one clock, that of optimizer steps. It counts the steps
        of the oldest state in the newest snapshot, without those whose iterates were
        left out whole (``nonfinite="reject"``). Single elements that were left out
        (``nonfinite="skip"``) count as if the average had stood in their place. The
        result is an average of the steps
        ``start + every i``, ``i = 1, 2, ...``, on this clock: ``start`` is the earliest
        start of the averages, and ``every`` is the largest stride whose steps contain
        the iterates of all: 2 if one average took every 4th and another every 6th step.
        If averages of one stride are combined, it is the average that
        ``oa.average(weight, every=every, start=start)`` would have made.

        Only snapshots of the newest run are used. A run ends where the states of all
        averages were created anew, so that their steps fell back while those of the
        training went on.

        Args:
          **options: Which average is wanted.

        Returns:
          A :class:`Plan`.
        """
        request = request_of(**options)
        self._check_saved()
        return with_plan(self.directory, request, lambda reader, left, plan: plan)

    @with_target
    def reconstruct(
        self,
        params: Example | None = None,
        **options: Unpack[TargetOptions],
    ) -> optax.Params:
        """An average that was not kept, combined from the snapshots.

        Leaves are computed a few at a time: memory holds the result and at most two
        more leaves, or two groups of smaller ones of 32 MB each. Damaged snapshots are
        skipped with a warning that names them. A second warning states the residual if
        the snapshots cannot express the target; it includes the rounding of their
        dtypes.

        Args:
          params: A tree of arrays or of ``jax.ShapeDtypeStruct``. The result has its
            structure, dtypes and shardings, and takes leaves that were not averaged
            from it. By default the result consists of nested dicts in float32 or wider.
          **options: Which average is wanted.

        Returns:
          A tree like ``params``.

        Raises:
          ValueError: If ``params`` has other leaves.
        """
        request = request_of(**options)
        self._check_saved()

        def made(reader: _disk.Reader, left: Records, plan: Plan) -> optax.Params:
            warn_of_residual(plan)
            return assembled(sum_of(reader, left, plan.parts), params)

        return with_plan(self.directory, request, made)

    def mean(
        self,
        params: Example | None = None,
        *,
        steps: Sequence[int] | np.ndarray | None = None,
        name: str = PARAMETERS,
    ) -> optax.Params:
        """The uniform mean of snapshots: SWA, LAWA and SWAD after the fact.

        Args:
          params: A tree that the result is like, as in :meth:`reconstruct`.
          steps: Training steps of the snapshots, for instance those that
            :func:`swad_window` chooses; by default all.
          name: Name of what is averaged; by default the parameters.

        Returns:
          A tree like ``params``.

        Raises:
          ValueError: If there is no such snapshot.

        Example:
          >>> import jax.numpy as jnp, tempfile
          >>> from optax_avg import posthoc
          >>> with tempfile.TemporaryDirectory() as directory:
          ...     with posthoc.SnapshotStore(directory) as store:
          ...         for step in (100, 200, 300):
          ...             params = {"w": jnp.array([float(step)])}
          ...             saved = store.save(None, step, params)
          ...         store.mean(steps=[200, 300])["w"].tolist()
          [250.0]
        """
        if steps is not None:
            steps = [_whole_step(step) for step in np.ravel(np.asarray(steps))]
        self._check_saved()
        with _disk.reader_of(self.directory) as reader:
            records = records_of(reader, steps)
            wanted = _steps_with(name, records, reader.directory, steps)
            if steps is None:  # steps that the user chose are used as they are
                records = without_others(records)
                wanted = [s for s in wanted if s in records]

            def made(left: Records) -> optax.Params:
                whole = [s for s in wanted if s in left]
                if not whole:
                    raise ValueError(f"no snapshot of {name!r} could be read.")
                parts = [Part(s, name, 1 / len(whole)) for s in whole]
                return assembled(sum_of(reader, left, parts), params)

            return without_broken(reader, records, made)

    def _contents_of(
        self, opt_state: optax.OptState | None, step: int, params: optax.Params | None
    ) -> list[_contents.Content]:
        """What a snapshot keeps; warnings name what it cannot keep, once each."""
        averages, unknown = _contents.averages_in(opt_state, self._weights)
        for name, why in unknown.items():
            if name not in self._unknown:
                said = f"no snapshots of the average {name!r} are kept: {why}"
                self._unknown[name] = said
                warn(said, UserWarning)
        if params is not None:
            averages.append(_contents.of_parameters(params, step, averages))
        contents = []
        for average in averages:
            content = _contents.rounded(average, self._dtype)
            if content.worst and not self._coarse:
                self._coarse = True
                warn(
                    f"{content.worst}; keep averages and snapshots in bfloat16 or "
                    "float32.",
                    RuntimeWarning,
                )
            if content.arrays:
                contents.append(content)
        return contents

    def _check_saved(self) -> None:
        """Waits for the snapshot in flight.

        Raises:
          ValueError: If nothing was saved and this store knows why.
        """
        self.wait()
        whys = [*self._unknown.values(), *([self._why] if self._why else [])]
        if whys and not _disk.steps_of(self.directory):
            raise ValueError(
                f"there are no snapshots in {self.directory}, for nothing could be "
                f"saved: {' '.join(whys)}"
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


def _whole_step(step: ArrayLike) -> int:
    """A training step as a Python integer.

    Raises:
      ValueError: If it is not an integer, or negative.
    """
    whole = isinstance(step, (int, np.integer)) and not isinstance(step, bool)
    if isinstance(step, jax.Array) and step.ndim == 0:
        whole = bool(jnp.issubdtype(step.dtype, jnp.integer))
    if not whole or (number := int(np.asarray(step))) < 0:
        raise ValueError(f"step must be an integer >= 0, got {step!r}.")
    return number


def _steps_with(
    name: str, records: Records, directory: str, steps: Sequence[int] | None
) -> list[int]:
    """The steps that are asked for, ascending; by default all that hold a name.

    Raises:
      ValueError: If there is no snapshot of the name at a step.
    """
    lack = [s for s, record in records.items() if name not in record.leaves]
    there = _disk.steps_of(directory)
    have = [s for s in there if s not in lack]
    wanted = have if steps is None else sorted(set(steps))
    missing = [s for s in wanted if s not in have]
    if not there:
        raise ValueError(f"{directory} holds no snapshots; save one first.")
    if not have:
        raise ValueError(
            f"the snapshots in {directory} hold no {name!r}; pass name=, one of "
            f"{names_in(records)}, or save parameters by save(opt_state, step, params)."
        )
    if missing or not wanted:
        raise ValueError(
            f"{directory} has no snapshot of {name!r} at steps {missing}; pass some of "
            f"{have}."
        )
    return wanted
