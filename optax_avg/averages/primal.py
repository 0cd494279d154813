"""The average inside the optimizer: gradients between it and the fast parameters.

    z <- z + optimizer(gradient at y),   x <- x + w(t) (z - x),
    y = beta x + (1 - beta) z

The loop trains at ``y``, and ``x`` is the average. What is kept is ``m``, how far the
newest ``z`` was ahead of ``x`` before ``x`` moved. With ``d = z - x = (1 - w) m`` both
follow from ``y``, well conditioned for every ``beta``: ``x = y - (1 - beta) d`` and
``z = y + beta d``. A step needs neither:

    m' = d + u,   y' = y + (1 - beta) u + beta w' m'

``u`` is taken as ``m' - d``, so that the optimizer's update is used once and nothing
has to be stored between the two lines.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_avg import _checks, _leaves, _mixups, _numerics, _sight, weights
from optax_avg.averages._rule import UNAVERAGED, AverageState, averaging

__all__ = ["PrimalMemory", "PrimalState", "primal_average"]


class PrimalMemory(NamedTuple):
    """What :func:`primal_average` keeps beside the parameters ``y``.

    Attributes:
      ahead: ``m``, the fast parameters minus the average before it moved, in float32
        or wider; ``MaskedNode`` at leaves that are not averaged.
      weight: ``w`` of the newest step, float32.
      rest: What rounding took from ``y``, float32, where the parameters are narrower;
        ``MaskedNode`` elsewhere.
      beta: ``beta`` of the newest step, float32.
      mass: Sum of a :class:`optax_avg.weights.Mass`, as in
        :class:`optax_avg.memories.RunningMemory`; empty for other weights.
    """

    ahead: Any
    weight: jax.Array
    rest: Any
    beta: jax.Array
    mass: Any

    @property
    def is_offset(self) -> bool:
        """True: the average is found from the parameters."""
        return True

    def read(self, absorbed: jax.Array) -> Any:
        """Returns ``x - y``, which has to be added to the parameters."""
        del absorbed
        return jax.tree.map(
            lambda m, r: _plus(r, (self.beta - 1) * _gap(self, m)),
            self.ahead,
            self.rest,
        )

    def profile(self, stacked: int = 0) -> None:
        """Returns None: it averages ``z``, which the parameters never are."""
        del stacked


class PrimalState(NamedTuple):
    """State of :func:`primal_average`.

    Attributes:
      inner_state: State of the optimizer.
      primal: State of the average; what it keeps is a :class:`PrimalMemory`.
    """

    inner_state: optax.OptState
    primal: AverageState


def primal_average(
    optimizer: optax.GradientTransformation,
    weight: weights.Weight,
    beta: optax.ScalarOrSchedule,
    *,
    decay_at: Literal["y", "z"] = "y",
    name: str = "primal",
    where: _leaves.Where | None = None,
    nonfinite: Literal["skip", "keep"] = "skip",
) -> optax.GradientTransformationExtraArgs:
    """Averages inside the optimizer: Schedule-Free, GPA and their relatives.

    ``z += u``, ``x += w(t) (z - x)``, ``y = beta x + (1 - beta) z`` with the updates
    ``u`` that ``optimizer`` makes of gradients at ``y``. The training loop holds ``y``;
    :func:`optax_avg.averaged_params` returns ``x``, given the current ``y``.

    * Schedule-Free is ``weights.uniform()``, or ``weights.mass(lambda t: lr(t) ** 2)``
      after a warm-up, with ``beta = 0.9``. Switch off the momentum of the optimizer.
    * Generalized Primal Averaging is ``weights.ema(mu_x, debias=False)`` with ``beta =
      mu_y`` and ``decay_at="z"``, around an optimizer with its momentum.
    * ``beta = 0`` is the plain optimizer with the average beside it, and ``beta = 1``
      is primal averaging: gradients at the average itself.

    To begin within a training, write ``state = tx.init(params)._replace(
    inner_state=old_state)`` with the state of the optimizer so far.

    The state holds one float32 copy of the parameters beside that of the optimizer, and
    a second one for parameters narrower than float32: ``x``, ``y`` and ``z`` then do
    not round to the narrow dtype.

    Args:
      optimizer: Any Optax transformation that makes updates of gradients.
      weight: ``w``, from :mod:`optax_avg.weights` or any function of ``t = 1, 2, ...``.
      beta: Place of ``y`` between ``z`` (0) and ``x`` (1), in [0, 1], or a schedule of
        the optimizer step.
      decay_at: Which parameters the optimizer sees: ``"y"``, where the gradient is
        taken, or ``"z"``. Decoupled weight decay shrinks towards zero from there.
      name: Name by which :func:`optax_avg.averaged_params` finds the average.
      where: Leaves to average, as in :class:`optax_avg.AverageOptions`. The others are
        trained by the optimizer alone.
      nonfinite: ``"skip"`` leaves out the elements of an update that are not finite:
        ``z`` stays as it is there. The optimizer's own moments stay broken, unless
        ``optax.apply_if_finite`` around all keeps such gradients from them. ``"keep"``
        does not check.
        With ``beta = 0`` the parameters take such an element, and the average leaves
        it out, as in :func:`optax_avg.average`.

    Returns:
      A transformation with the state :class:`PrimalState`, for the end of a chain; only
      averages come after it. With ``beta = 0`` it is a chain of the optimizer and
      :func:`optax_avg.average`.

    Raises:
      ValueError: If an argument is out of range, or ``where`` selects no leaf. In
        ``update``, if it gets no params.
      TypeError: If ``optimizer`` is no transformation, or ``weight`` is one.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = oa.primal_average(optax.sgd(0.5), oa.weights.uniform(), beta=0.9)
      >>> y = jnp.array(2.0)
      >>> state = tx.init(y)
      >>> for _ in range(3):
      ...     u, state = tx.update(y, state, y)  # the gradient of y^2/2
      ...     y = optax.apply_updates(y, u)
      >>> round(float(oa.averaged_params(state, y)), 4)
      0.5458

    References:
      Defazio et al., "The Road Less Scheduled", 2024, 2405.15682. Defazio et al.,
      "Smoothing DiLoCo with Primal Averaging for Faster Training of LLMs", 2025,
      2512.17131.
    """
    _mixups.refuse_no_optimizer("primal_average", optimizer)
    _mixups.refuse_transformation("primal_average", weight)
    w_of = weights.with_stride(weight)
    beta = _checks.number_or_schedule("beta", beta, 0, 1)
    _checks.one_of("decay_at", decay_at, ("y", "z"))
    _checks.one_of("nonfinite", nonfinite, ("skip", "keep"))
    inner = optax.with_extra_args_support(optimizer)
    if isinstance(beta, float) and beta == 0:
        beside = averaging(
            "primal_average", weight, name=name, where=where, nonfinite=nonfinite
        )
        return optax.chain(inner, beside)
    beta_at = lambda step: jnp.asarray(_checks.at_step(beta, step), jnp.float32)

    def init(params: Any) -> PrimalState:
        if not _leaves.has_masked(params):
            _leaves.refuse_none_selected(params, where, UNAVERAGED)
        chosen = _leaves.select(params, where)
        zero = lambda: jnp.zeros([], jnp.int32)
        total = lambda: jnp.zeros([], jnp.float32)
        kept = PrimalMemory(
            ahead=jax.tree.map(_numerics.zeros_like, chosen),
            weight=total(),
            rest=jax.tree.map(_rest_of, chosen),
            beta=jnp.array(beta_at(zero()), copy=True),
            mass=(total(), total()) if isinstance(w_of, weights.Mass) else (),
        )
        every = jnp.ones([], jnp.int32)
        average = AverageState(zero(), zero(), zero(), zero(), every, {name: kept})
        return PrimalState(inner.init(params), average)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, PrimalState]:
        _checks.require_params("primal_average", params)
        average: AverageState = state.primal
        kept: PrimalMemory = average.averages[name]
        seen = params if decay_at == "y" else _fast(params, kept)
        made: tuple[Any, Any] = inner.update(
            updates, state.inner_state, seen, **extra_args
        )
        t = jnp.asarray(optax.safe_increment(average.absorbed), jnp.float32)
        zero = jnp.zeros([], jnp.float32)
        w, mass = weights.advance(w_of, t, 1, kept.mass or (zero, zero))
        # Without the barrier XLA computes these anew for every element.
        b = beta_at(average.step)
        b, w = lax.optimization_barrier((b, w))
        bw = b * w
        shift = None if isinstance(beta, float) else kept.beta - b

        def one(y, u, m, r):
            if u is None or _leaves.is_masked(m):
                return u, m, r
            wide = _numerics.wide(u).astype(m.dtype)
            if nonfinite == "skip":
                wide = jnp.where(jnp.isfinite(wide), wide, 0)
            d = _gap(kept, m)
            new = (d + wide).astype(m.dtype)
            step = (1 - b) * (new - d) + bw * new
            if shift is not None:  # where beta changes, so does the place of y
                step = step + shift * d
            if _leaves.is_masked(r):
                return step.astype(u.dtype), new, r
            whole = r + step
            out = whole.astype(u.dtype)
            held: Any = _leaves.new_iterate(y, out)
            lost = (_numerics.widen(y) - _numerics.widen(held)) + whole
            lost = jnp.where(jnp.isfinite(lost), lost, 0)  # a NaN in y may be mended
            return out, new, lost.astype(r.dtype)

        leaves, structure = jax.tree.flatten(params)
        parts = [structure.flatten_up_to(x) for x in (made[0], kept.ahead, kept.rest)]
        rows = [one(*row) for row in zip(leaves, *parts, strict=True)]
        steps, ahead, rest = (
            structure.unflatten([row[i] for row in rows]) for i in range(3)
        )
        kept = PrimalMemory(ahead, w, rest, b, mass if kept.mass else ())
        average = average._replace(
            step=_numerics.advance_clock(average.step),
            absorbed=_numerics.advance_clock(average.absorbed),
            averages={name: kept},
        )
        _sight.report("primal_average", emitted=steps)
        return steps, PrimalState(made[1], average)

    return optax.GradientTransformationExtraArgs(
        _leaves.shapes_for_shapes(init), update
    )


def _rest_of(x: jax.Array) -> Any:
    """Room for what rounding takes from a leaf that is narrower than float32."""
    wide = _numerics.float32_or_wider(x.dtype)
    return optax.MaskedNode() if wide == x.dtype else _numerics.zeros_like(x)


def _gap(kept: PrimalMemory, m: jax.Array) -> jax.Array:
    """``d = z - x = (1 - w) m``; ``1 - w`` itself would round to one side."""
    return m - kept.weight * m


def _plus(rest: Any, x: jax.Array) -> jax.Array:
    return x if _leaves.is_masked(rest) else rest + x


def _fast(params: Any, kept: PrimalMemory) -> Any:
    """``z = y + beta d`` in the dtype of the parameters."""

    def one(y, m, r):
        if _leaves.is_masked(m):
            return y
        ahead = kept.beta * _gap(kept, m)
        return (_numerics.widen(y) + _plus(r, ahead)).astype(y.dtype)

    return jax.tree.map(one, params, kept.ahead, kept.rest)
