"""Memories of averages: what is kept of the iterates, and how the average is read.

    running     kept <- kept + w(t) (x_t - kept)
    window      the k latest iterates, read as their mean
    corrected   ema_t + a_t (x_t - x_0)

A memory is a value. :func:`optax_avg.average` takes one wherever it takes a weight, and
several in one dict. To add one, write a function that returns a :class:`Memory`; what
its ``init`` returns must have the two methods of :class:`Kept`.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_avg import _checks, _leaves, _numerics, weights
from optax_avg.averages import _rounding

__all__ = [
    "CorrectedMemory",
    "Kept",
    "Memory",
    "RunningMemory",
    "Turn",
    "WindowMemory",
    "corrected",
    "running",
    "window",
]

Params = optax.Params
Rounding = Literal["dithered", "stochastic", "compensated"]


class Kept(Protocol):
    """What a memory keeps in the optimizer state: a NamedTuple with two methods.

    Where it has a property ``is_offset`` that is true, what ``read`` returns has to be
    added to the parameters.
    """

    def read(self, absorbed: jax.Array) -> Params:
        """Returns the average.

        Args:
          absorbed: Number of iterates in it, int32; at least 1.
        """
        ...

    def profile(self, stacked: int = 0) -> dict[str, Any] | None:
        """Returns how the average weighs its iterates, for snapshots.

        ``{"power": gamma}`` or ``{"window": k}``. An empty dict says that the state
        does not know; None says that the average is no mean of iterates.

        Args:
          stacked: Number of leading axes along which states are stacked.
        """
        ...


class Turn(NamedTuple):
    """The moment at which an iterate is absorbed.

    Attributes:
      absorbed: Number of iterates before this one, int32.
      number: Number ``t`` of the iterate, a float32 from 1.
      stride: Optimizer steps between two iterates.
      is_base: Whether this is the iterate of step ``start``. The average starts from
        it, finite or not, and does not count it.
      step: Optimizer steps seen, int32.
      name: Name of the average.
      skip: Whether elements that are not finite are left out: where ``x`` is NaN or
        infinite, what is kept stays as it is. The Python value False if they never are.
    """

    absorbed: jax.Array
    number: jax.Array
    stride: Any
    is_base: jax.Array
    step: jax.Array
    name: str
    skip: _rounding.Skip


class Memory(NamedTuple):
    """How an average remembers iterates.

    Attributes:
      init: ``x -> kept``, what is kept before the first iterate.
      absorb: ``(kept, x, turn) -> kept``.
      period: Number of iterates after which ``absorb`` comes round to the same place.
    """

    init: Callable[[Params], Any]
    absorb: Callable[[Any, Params, Turn], Any]
    period: int = 1


class RunningMemory(NamedTuple):
    """What :func:`running` keeps.

    Attributes:
      average: The average, ``MaskedNode`` at leaves that are not averaged.
      compensation: What rounding took from ``average``; empty unless compensated.
      mass: Sum of a :class:`optax_avg.weights.Mass` in two float32 numbers, of which
        the second holds what rounding took from the first; empty for other weights.
      gamma: Exponent of :func:`optax_avg.weights.power_function`, float32; empty for
        other weights.
    """

    average: Any
    compensation: Any
    mass: Any
    gamma: Any

    def read(self, absorbed: jax.Array) -> Params:
        """Returns the average with its compensation added."""
        del absorbed
        if not jax.tree.leaves(self.compensation):
            return self.average
        both = lambda a, c: _numerics.wide(a) + _numerics.wide(c)
        return jax.tree.map(both, self.average, self.compensation)

    def profile(self, stacked: int = 0) -> dict[str, Any]:
        """Returns ``{"power": gamma}`` for a power function."""
        del stacked
        found = set(np.ravel(np.asarray(self.gamma)).tolist())
        return {"power": found.pop()} if len(found) == 1 else {}


class WindowMemory(NamedTuple):
    """What :func:`window` keeps.

    Attributes:
      ring: The latest iterates in their own dtype, along a new first axis of length
        ``k``. Iterate ``t`` is in row ``(t - 1) % k``. Where a box of Flax names the
        axes of a leaf, the new axis has the name None.
    """

    ring: Any

    def read(self, absorbed: jax.Array) -> Params:
        """Returns the mean of the rows that have been written."""
        return jax.tree.map(lambda ring: _mean_of_rows(ring, absorbed), self.ring)

    def profile(self, stacked: int = 0) -> dict[str, Any]:
        """Returns ``{"window": k}``."""
        return {"window": jax.tree.leaves(self.ring)[0].shape[stacked]}


class CorrectedMemory(NamedTuple):
    """What :func:`corrected` keeps.

    Attributes:
      corrected: ``ema + a (x - x_0)`` at the newest iterate.
      ema: The average without the correction.
      base: ``x_0``.
    """

    corrected: Any
    ema: Any
    base: Any

    def read(self, absorbed: jax.Array) -> Params:
        """Returns the corrected average."""
        del absorbed
        return self.corrected

    def profile(self, stacked: int = 0) -> None:
        """Returns None: the correction is not a mean of iterates."""
        del stacked


def running(
    weight: weights.Weight,
    *,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
    rounding: Rounding | None = None,
) -> Memory:
    """Remembers one average that moves by a weight: ``kept += w(t) (x_t - kept)``.

    Args:
      weight: ``w``, from :mod:`optax_avg.weights` or any function of ``t`` or
        ``(t, dt)``.
      accumulator_dtype: Dtype of the average, see :func:`optax_avg.average`.
      rounding: How the average is rounded, see :func:`optax_avg.average`.

    Returns:
      A memory.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> oa.average(oa.memories.running(lambda t: 1 / t)).init(jnp.ones(2)).averages
      {'average': RunningMemory(average=Array([1., 1.], dtype=float32), ...
    """
    w_of = weights.with_stride(weight)
    rounding = _checked(rounding, accumulator_dtype)
    compensated = rounding == "compensated"
    gamma = weights.gamma_of(w_of)

    def init(x: Params) -> RunningMemory:
        average = _copies(x, accumulator_dtype)
        like = lambda a: _numerics.zeros_like(a, a.dtype)
        zero = lambda: jnp.zeros([], jnp.float32)
        return RunningMemory(
            average=average,
            compensation=jax.tree.map(like, average) if compensated else (),
            mass=(zero(), zero()) if isinstance(w_of, weights.Mass) else (),
            gamma=() if gamma is None else jnp.array(gamma, jnp.float32),
        )

    def absorb(kept: RunningMemory, x: Params, turn: Turn) -> RunningMemory:
        first = turn.number == 1
        zero = jnp.zeros([], jnp.float32)
        w, mass = weights.advance(
            w_of, turn.number, turn.stride, kept.mass or (zero, zero)
        )
        # Without the barrier XLA computes w anew for every element.
        w = lax.optimization_barrier(jnp.where(turn.is_base, 1, w))
        average, compensation = kept.average, kept.compensation
        if compensated:
            average, compensation = _rounding.compensated(
                w, x, average, compensation, first, turn.skip
            )
        elif rounding == "dithered":
            average = _rounding.dithered(
                w, x, average, first, turn.skip, turn.name, turn.absorbed
            )
        elif rounding == "stochastic":
            average = _rounding.stochastic(
                w, x, average, first, turn.skip, turn.name, turn.step
            )
        else:
            average = _rounding.nearest(w, x, average, first, turn.skip)
        if kept.mass:
            keep = lambda old, new: jnp.where(turn.is_base, old, new)
            mass = jax.tree.map(keep, kept.mass, mass)
        else:
            mass = ()
        return RunningMemory(average, compensation, mass, kept.gamma)

    return Memory(init, absorb)


def window(k: int) -> Memory:
    """Remembers the ``k`` latest iterates as they are; the average is their mean.

    ``avg_t = 1/min(t,k) sum_{i=max(1,t-k+1)}^t x_i``. The iterates lie in a ring
    buffer, ``k`` times the parameters, and the mean is taken when it is read. An update
    costs one write, and nothing drifts. Where an element of an iterate is left out,
    that of the iterate ``k`` before stays in its place.

    Args:
      k: Number of iterates in the window; at least 1.

    Returns:
      A memory.

    Raises:
      ValueError: If ``k`` is out of range.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = oa.average({"ema": oa.weights.ema(0.9), "lawa": oa.memories.window(2)})
      >>> x = jnp.array(0.0)
      >>> state = tx.init(x)
      >>> for _ in range(4):
      ...     u, state = tx.update(jnp.array(1.0), state, x)
      ...     x = optax.apply_updates(x, u)
      >>> float(oa.averaged_params(state, x, "lawa"))
      3.5
    """
    k = _checks.static_integer(
        "k", k, 1, "; inside optax.inject_hyperparams name it in static_args"
    )

    def absorb(kept: WindowMemory, x: Params, turn: Turn) -> WindowMemory:
        # The first iterate overwrites the row of the base.
        row = turn.absorbed % k

        def write(ring, leaf):
            if turn.skip is not False:
                old = lax.dynamic_index_in_dim(ring, row, 0, keepdims=False)
                leaf = jnp.where(jnp.isfinite(leaf) | ~turn.skip, leaf, old)
            return lax.dynamic_update_index_in_dim(ring, leaf, row, 0)

        # By leaves: boxes of a ring have one axis more than those of the iterate.
        rings, structure = jax.tree.flatten(kept.ring)
        written = [
            write(ring, leaf)
            for ring, leaf in zip(rings, jax.tree.leaves(x), strict=True)
        ]
        return WindowMemory(structure.unflatten(written))

    return Memory(lambda x: WindowMemory(_rings(x, k)), absorb, period=k)


def corrected(
    kappa: float = 0.5,
    eta: float = 0.2,
    rho: float = 10.0,
    gamma: float = 1.0,
    *,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> Memory:
    """Remembers an EMA whose lag behind training is corrected.

    ``ema_t = (1-b_t) ema_{t-1} + b_t x_t``, read as ``ema_t + a_t (x_t - x_0)``, with
    ``b_t = (rho + gamma t)^-kappa`` and ``a_t = (rho + gamma t)^-eta``. ``x_0``, from
    which ``ema`` starts as well, is the iterate of step ``start``.

    Args:
      kappa: Exponent of the EMA's weight ``b_t``, in [0, 1].
      eta: Exponent of the correction's factor ``a_t``, at least 0.
      rho: Number that keeps both below 1 at the beginning, at least 0.
      gamma: Factor of the number of absorbed iterates, positive.
      accumulator_dtype: Dtype of the three trees that are kept.

    Returns:
      A memory.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> state = oa.average(oa.memories.corrected()).init(jnp.ones(2))
      >>> state.averages["average"].base.tolist()
      [1.0, 1.0]

    References:
      Block and Zhang, "EMA Without the Lag: Bias-Corrected Iterate Averaging Schemes",
      2025, 2508.00180.
    """
    kappa = _checks.within("kappa", kappa, 0, 1)
    eta = _checks.within("eta", eta, 0, float("inf"), closed_high=False)
    rho = _checks.within("rho", rho, 0, float("inf"), closed_high=False)
    narrow = _checked(None, accumulator_dtype) == "dithered"
    gamma = _checks.within("gamma", gamma, 0, float("inf"), open_low=True)

    def init(x: Params) -> CorrectedMemory:
        return CorrectedMemory(*(_copies(x, accumulator_dtype) for _ in range(3)))

    def absorb(kept: CorrectedMemory, x: Params, turn: Turn) -> CorrectedMemory:
        first = turn.number == 1
        s = rho + gamma * turn.number
        b, a = jnp.where(turn.is_base, 1, s**-kappa), s**-eta
        skip = turn.skip

        def renew(x0, x):
            broken = ~jnp.isfinite(x0)
            heals = first & broken if skip is False else broken & jnp.isfinite(x)
            return jnp.where(turn.is_base | heals, x.astype(x0.dtype), x0)

        base = jax.tree.map(renew, kept.base, x)
        if narrow:
            ema = _rounding.dithered(
                b, x, kept.ema, first, skip, turn.name, turn.absorbed
            )
        else:
            ema = _rounding.nearest(b, x, kept.ema, first, skip)

        def correct(old, ema, x, x0):
            new = (ema + a * (_numerics.widen(x) - x0)).astype(x0.dtype)
            if skip is False:
                return new
            return jnp.where(skip & ~jnp.isfinite(x), old, new)

        newest = jax.tree.map(correct, kept.corrected, ema, x, base)
        return CorrectedMemory(newest, ema, base)

    return Memory(init, absorb)


def _copies(tree: Params, dtype: jax.typing.DTypeLike | None) -> Params:
    return jax.tree.map(lambda leaf: _numerics.copy_as(leaf, dtype), tree)


def _checked(
    rounding: Rounding | None, dtype: jax.typing.DTypeLike | None
) -> Rounding | None:
    """The rounding, ``None`` resolved for the dtype of the accumulator."""
    _checks.one_of("rounding", rounding, (None, *get_args(Rounding)))
    if dtype is None:
        return rounding
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 16:
        raise ValueError(
            "accumulator_dtype must be floating, real and of 16 bits or more, such as "
            f"jnp.bfloat16; got {jnp.dtype(dtype)}. In 8 bits an average would be "
            "wrong by 3 % and more."
        )
    narrow = jnp.finfo(dtype).bits < 32
    return "dithered" if rounding is None and narrow else rounding


def _mean_of_rows(ring: jax.Array, absorbed: jax.Array) -> jax.Array:
    """Mean of the rows that have been written."""
    row = jnp.arange(ring.shape[0]).reshape(-1, *[1] * (ring.ndim - 1))
    written = jnp.where(row < absorbed, _numerics.wide(ring), 0)
    return written.sum(axis=0) / jnp.clip(absorbed, 1, ring.shape[0])


def _rings(tree: optax.Params, k: int) -> optax.Params:
    """Every leaf ``k`` times along a new first axis, which its box learns of."""
    return _leaves.with_first_axis(jax.tree.map(lambda leaf: _repeat(leaf, k), tree))


def _repeat(x: jax.Array, k: int) -> jax.Array:
    x = jnp.asarray(x)
    return jnp.array(jnp.broadcast_to(x[None], (k, *x.shape)), copy=True)
