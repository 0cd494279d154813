"""Averages with a memory of their own: the mean of a sliding window, and BEMA."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_avg import _checks, _leaves, _numerics
from optax_avg.averages import _rounding
from optax_avg.averages._absorb import absorbing
from optax_avg.averages._running import check_rounding


class WindowState(NamedTuple):
    """State of :func:`window_average`.

    Attributes:
      step: int32, optimizer steps seen.
      absorbed: int32, iterates absorbed, those that have left the window included; at
        the largest integer it goes back by k.
      rejected: int32, iterates left out because a leaf was not finite.
      start: int32, optimizer steps that were left out at the beginning.
      every: int32, optimizer steps between absorbed iterates.
      windows: by name, the latest iterates in their own dtype, along a new first axis
        of length k; iterate ``t`` is in row ``(t - 1) % k``. Where a box of Flax names
        the axes of a leaf, the new axis has the name None.
    """

    step: jax.Array
    absorbed: jax.Array
    rejected: jax.Array
    start: jax.Array
    every: jax.Array
    windows: dict[str, Any]


class BemaState(NamedTuple):
    """State of :func:`bema`.

    Attributes:
      step: int32, optimizer steps seen.
      absorbed: int32, iterates in the average.
      rejected: int32, iterates left out because a leaf was not finite.
      start: int32, optimizer steps that were left out at the beginning.
      every: int32, optimizer steps between absorbed iterates.
      corrected: by name, ``ema + a (x - x_0)`` at the newest absorbed iterate.
      uncorrected: ``ema``.
      base: ``x_0``.
    """

    step: jax.Array
    absorbed: jax.Array
    rejected: jax.Array
    start: jax.Array
    every: jax.Array
    corrected: dict[str, Any]
    uncorrected: Any
    base: Any


def window_average(
    k: int,
    every: int = 1,
    *,
    start: int = 0,
    name: str = "window",
    where: _leaves.Where | None = None,
    skip_nonfinite: bool = True,
    memory_kind: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Latest weight averaging (LAWA): the uniform mean of the ``k`` latest iterates.

    ``avg_t = 1/min(t,k) sum_{i=max(1,t-k+1)}^t x_i``. The iterates are kept as they are
    in a ring buffer, ``k`` times the parameters, and the mean is taken when it is read:
    an update costs one write, and nothing drifts.

    Args:
      k: iterates in the window; at least 1.
      every: optimizer steps between absorbed iterates.
      start: optimizer steps to leave out.
      name: of the average.
      where: which leaves to average.
      skip_nonfinite: leave out iterates that are not finite.
      memory_kind: where the window lives.

    Returns:
      A transformation; the last link of a chain.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax, optax_avg as oa
      >>> tx = optax.chain(optax.adamw(3e-4), oa.window_average(k=6, every=100))

    References:
      Kaddour, "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with
      Latest Weight Averaging", 2022, 2209.14981.
    """
    hint = "; inside optax.inject_hyperparams name it in static_args"
    k = _checks.static_integer("k", k, 1, hint)
    every, start = _checks.check_every(every, start)

    def empty(x):
        return WindowState(
            step=jnp.zeros([], jnp.int32),
            absorbed=jnp.zeros([], jnp.int32),
            rejected=jnp.zeros([], jnp.int32),
            start=jnp.array(start, jnp.int32),
            every=jnp.array(every, jnp.int32),
            windows={name: _rings(x, k)},
        )

    def absorb(state, x, t, is_base):
        del t, is_base  # the first iterate overwrites the row of the base
        row = state.absorbed % k
        # By leaves: boxes of a ring have one axis more than those of the iterate.
        rings, structure = jax.tree.flatten(state.windows[name])
        written = [
            lax.dynamic_update_index_in_dim(ring, leaf, row, 0)
            for ring, leaf in zip(rings, jax.tree.leaves(x), strict=True)
        ]
        return state._replace(windows={name: structure.unflatten(written)})

    return absorbing(
        "window_average",
        empty,
        absorb,
        period=k,
        every=every,
        start=start,
        where=where,
        skip_nonfinite=skip_nonfinite,
        memory_kind=memory_kind,
    )


def bema(
    kappa: float = 0.5,
    eta: float = 0.2,
    rho: float = 10.0,
    gamma: float = 1.0,
    *,
    every: int = 1,
    start: int = 0,
    name: str = "bema",
    accumulator_dtype: Any = None,
    where: _leaves.Where | None = None,
    skip_nonfinite: bool = True,
    memory_kind: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Bias-corrected EMA: an average whose lag behind training is corrected.

    ``ema_t = (1-b_t) ema_{t-1} + b_t x_t``, result ``ema_t + a_t (x_t - x_0)``, with
    ``b_t = (rho + gamma t)^-kappa`` and ``a_t = (rho + gamma t)^-eta``. ``x_0``, from
    which ``ema`` starts as well, is the iterate of step ``start``.

    Args:
      kappa: power of the EMA weight, in [0, 1].
      eta: power of the correction, at least 0.
      rho: lag; not negative.
      gamma: rate; positive.
      every: optimizer steps between absorbed iterates.
      start: optimizer steps to leave out.
      name: of the average.
      accumulator_dtype: Dtype of the three trees in the state, a float of 16 bits or
        more, by default float32 or wider. The EMA of a narrower one is rounded
        stochastically.
      where: which leaves to average.
      skip_nonfinite: leave out iterates that are not finite.
      memory_kind: where the trees live.

    Returns:
      A transformation; the last link of a chain.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax, optax_avg as oa
      >>> tx = optax.chain(optax.adamw(3e-4), oa.bema())

    References:
      Block and Zhang, "EMA Without the Lag: Bias-Corrected Iterate Averaging Schemes",
      2025, 2508.00180.
    """
    kappa = _checks.within("kappa", kappa, 0, 1)
    eta = _checks.within("eta", eta, 0, float("inf"), closed_high=False)
    rho = _checks.within("rho", rho, 0, float("inf"), closed_high=False)
    at_random = check_rounding(None, accumulator_dtype) == "stochastic"
    gamma = _checks.within("gamma", gamma, 0, float("inf"), open_low=True)
    every, start = _checks.check_every(every, start)

    def empty(x):
        copies = lambda: jax.tree.map(
            lambda leaf: _numerics.copy_as(leaf, accumulator_dtype), x
        )
        return BemaState(
            step=jnp.zeros([], jnp.int32),
            absorbed=jnp.zeros([], jnp.int32),
            rejected=jnp.zeros([], jnp.int32),
            start=jnp.array(start, jnp.int32),
            every=jnp.array(every, jnp.int32),
            corrected={name: copies()},
            uncorrected=copies(),
            base=copies(),
        )

    def absorb(state, x, t, is_base):
        s = rho + gamma * t
        b, a = jnp.where(is_base, 1, s**-kappa), s**-eta
        is_new = lambda x0: is_base | ((t == 1) & ~jnp.isfinite(x0))
        base = jax.tree.map(
            lambda x0, x: jnp.where(is_new(x0), x.astype(x0.dtype), x0), state.base, x
        )
        old, first = state.uncorrected, t == 1
        if at_random:
            ema = _rounding.stochastic(b, x, old, first, name, state.step)
        else:
            ema = _rounding.nearest(b, x, old, first)
        correct = lambda ema, x, x0: (ema + a * (_numerics.widen(x) - x0)).astype(
            x0.dtype
        )
        return state._replace(
            corrected={name: jax.tree.map(correct, ema, x, base)},
            uncorrected=ema,
            base=base,
        )

    return absorbing(
        "bema",
        empty,
        absorb,
        every=every,
        start=start,
        where=where,
        skip_nonfinite=skip_nonfinite,
        memory_kind=memory_kind,
    )


def _rings(tree: Any, k: int) -> Any:
    """Every leaf ``k`` times along a new first axis, which its box learns of."""
    repeated = jax.tree.map(lambda leaf: _repeat(leaf, k), tree)
    return jax.tree.map(_with_first_axis, repeated, is_leaf=_names_axes)


def _names_axes(node: Any) -> bool:
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


def _repeat(x: jax.Array, k: int) -> jax.Array:
    x = jnp.asarray(x)
    return jnp.array(jnp.broadcast_to(x[None], (k, *x.shape)), copy=True)
