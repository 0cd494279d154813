"""Gradient surgery: links of a chain that take a direction out of the gradient.

    v - <v, w>/|w|^2 w

:func:`project_out` is this projection. :func:`perp_grad` takes the parameters for
``w``, :func:`bloop` an average of the main gradient.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_avg import _checks, _leaves, _numerics
from optax_avg.robust._gradients import (
    ByPosition,
    Leaf,
    Tree,
    counter,
    flatten,
    positions,
    quotient,
)
from optax_avg.robust._options import (
    INFINITY,
    Start,
)

__all__ = ["BloopState", "bloop", "perp_grad", "project_out"]


def project_out(v: Tree, w: Tree) -> Tree:
    """The part of ``v`` orthogonal to ``w``: ``v - <v, w>/|w|^2 w``, or ``v`` at w = 0.

    Args:
      v: A tree of arrays.
      w: A tree like ``v``. Inner products are over all leaves.

    Returns:
      A tree like ``v``, in float32 or wider.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_avg import surgery
      >>> surgery.project_out(jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0])).tolist()
      [3.0, 0.0]
    """
    return _numerics.project_out(
        jax.tree.map(_numerics.wide, v), jax.tree.map(_numerics.wide, w)
    )


def perp_grad(
    *, scope: Literal["global", "leaf"] = "global", rescale: bool = False
) -> optax.GradientTransformationExtraArgs:
    """The part of the gradient that does not scale the parameters.

    ``g - <g, x>/|x|^2 x``. The part along ``x`` lowers the loss of a classifier by
    scaling its logits up, without a change of its predictions.

    Args:
      scope: Leaves that share an inner product: ``"global"`` for all, as in the paper,
        or ``"leaf"`` for each alone.
      rescale: Whether the result gets the norm of ``g``. The authors' code has
        ``scope="leaf", rescale=True``.

    Returns:
      A stateless transformation that stands before the optimizer; ``update`` needs the
      parameters.

    Raises:
      ValueError: If the scope is unknown, or if ``update`` gets no parameters.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.perp_grad()
      >>> x, g = jnp.array([0.0, 2.0]), jnp.array([3.0, 4.0])
      >>> tx.update(g, tx.init(x), x)[0].tolist()
      [3.0, 0.0]

    References:
      Prieto et al., "Grokking at the Edge of Numerical Stability", 2025, 2501.04697.
    """
    _checks.one_of("scope", scope, ("global", "leaf"))

    def one(g: list[jax.Array], x: list[jax.Array]) -> list[jax.Array]:
        perpendicular = project_out(g, x)
        if not rescale:
            return perpendicular
        factor = quotient(_numerics.norm(g), _numerics.norm(perpendicular), 1)
        return [factor * p for p in perpendicular]

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        _checks.require_params("perp_grad", params)
        leaves, structure = flatten(updates)
        xs, _ = flatten(params)
        there = positions(leaves)
        for group in [there] if scope == "global" else [[i] for i in there]:
            found = one([leaves[i] for i in group], [jnp.asarray(xs[i]) for i in group])
            for i, p in zip(group, found, strict=True):
                leaves[i] = p.astype(leaves[i].dtype)
        return structure.unflatten(leaves), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


class BloopState(NamedTuple):
    """State of :func:`bloop`.

    Attributes:
      bloop_step: Number of finite main gradients so far, int32; schedules are called
        with it.
      main_ema: EMA of the main gradient in float32 or wider.
      left_out: Number of main and auxiliary gradients that were not finite, int32.
    """

    bloop_step: jax.Array
    main_ema: optax.Updates
    left_out: jax.Array


def bloop(
    lam: optax.ScalarOrSchedule,
    ema_rate: optax.ScalarOrSchedule = 0.01,
    *,
    project_on: Literal["previous", "updated"] = "previous",
    init: Start = "first",
) -> optax.GradientTransformationExtraArgs:
    """Adds auxiliary gradients after removing their component along the main one.

    ``g + lam sum_k (a_k - <a_k, m>/|m|^2 m)``, ``m <- (1 - ema_rate) m + ema_rate g``.
    The auxiliary losses fall without a change of the main loss, to first order.

    A main gradient that is not finite gives zeros and leaves ``m`` alone. An auxiliary
    gradient that is not finite is left out.

    Args:
      lam: Weight of the auxiliary gradients, not negative: a float or a schedule.
      ema_rate: Rate of the EMA, in [0, 1]: a float or a schedule.
      project_on: The EMA on which gradients are projected: the ``"previous"`` one, or
        the one ``"updated"`` with this gradient, as in the authors' code.
      init: Where the EMA starts: ``"first"`` for the first gradient, at which nothing
        is projected, or ``"zeros"``. Nothing is projected while the EMA is zero.

    Returns:
      A transformation with the state :class:`BloopState` that stands before the
      optimizer; ``update`` needs ``aux_grads=``, a tuple of trees like the gradient.

    Raises:
      ValueError: If an argument is out of range, or if ``update`` gets no tuple of
        auxiliary gradients.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = optax.chain(oa.bloop(1.0), optax.sgd(1.0))
      >>> x = jnp.zeros(2)
      >>> state = tx.init(x)
      >>> main, aux = jnp.array([1.0, 0.0]), jnp.array([-9.0, 2.0])
      >>> for _ in range(2):
      ...     updates, state = tx.update(main, state, x, aux_grads=(aux,))
      >>> updates.tolist()
      [-1.0, -2.0]

    References:
      Hsieh et al., "Careful with that Scalpel: Improving Gradient Surgery with an EMA",
      2024, 2402.02998.
    """
    lam = _checks.number_or_schedule("lam", lam, 0, INFINITY, closed_high=False)
    ema_rate = _checks.number_or_schedule("ema_rate", ema_rate, 0, 1)
    _checks.one_of("project_on", project_on, ("previous", "updated"))
    _checks.one_of("init", init, ("first", "zeros"))

    def init_fn(params: optax.Params) -> BloopState:
        return BloopState(counter(), _leaves.zeros_like_wide(params), counter())

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        aux_grads: Sequence[optax.Updates] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, BloopState]:
        del params, extra_args
        if not isinstance(aux_grads, (tuple, list)):
            raise ValueError(
                "bloop needs a tuple of auxiliary gradients; call tx.update(updates, "
                "state, params, aux_grads=(gradient,))."
            )
        leaves, structure = flatten(updates)
        old, layout = flatten(state.main_ema)
        there = positions(leaves)
        g = {i: _numerics.wide(leaves[i]) for i in there}
        m = {i: old[i] for i in there}
        first = (state.bloop_step == 0) & (init == "first")
        rate = jnp.where(first, 1, _checks.at_step(ema_rate, state.bloop_step))
        new = {i: m[i] + rate * (g[i] - m[i]) for i in there}
        reference = m if project_on == "previous" else new
        # Zero has no direction: nothing is projected.
        reference = {i: jnp.where(first, 0, r) for i, r in reference.items()}
        auxiliary = [_like_main(aux, g, len(leaves)) for aux in aux_grads]
        weight = _checks.at_step(lam, state.bloop_step)
        direction, bad = _with_auxiliary(g, auxiliary, reference, weight)
        finite = _numerics.all_finite(list(g.values()))
        left_out = _numerics.count_if(~finite, state.left_out)
        for not_finite in bad:
            left_out = _numerics.count_if(not_finite, left_out)
        for i in there:
            leaves[i] = jnp.where(finite, direction[i], 0).astype(leaves[i].dtype)
            old[i] = jnp.where(finite, new[i], m[i]).astype(old[i].dtype)
        return structure.unflatten(leaves), BloopState(
            _numerics.count_if(finite, state.bloop_step),
            layout.unflatten(old),
            left_out,
        )

    return optax.GradientTransformationExtraArgs(
        _leaves.shapes_for_shapes(init_fn), update_fn
    )


def _like_main(aux: optax.Updates, g: ByPosition, number: int) -> ByPosition:
    """An auxiliary gradient at the positions of the main one, zeros if it has none.

    Raises:
      ValueError: If the numbers of leaves differ.
    """
    parts, _ = flatten(aux)
    if len(parts) != number:
        raise ValueError(
            f"an auxiliary gradient has {len(parts)} leaves, the main one {number}; "
            "pass trees like the main gradient as aux_grads."
        )

    def part(leaf: Leaf, main: jax.Array) -> jax.Array:
        there = _leaves.is_gradient(leaf)
        return _numerics.wide(leaf) if there else jnp.zeros_like(main)

    return {i: part(parts[i], main) for i, main in g.items()}


def _with_auxiliary(
    g: ByPosition,
    auxiliary: list[ByPosition],
    reference: ByPosition,
    weight: jax.typing.ArrayLike,
) -> tuple[ByPosition, list[jax.Array]]:
    """``g + weight sum_k (a_k - <a_k, m>/|m|^2 m)``, and which are not finite."""
    direction, bad = g, []
    for a in auxiliary:
        good = _numerics.all_finite(list(a.values()))
        bad.append(~good)
        added = project_out(a, reference)
        direction = {
            i: d + jnp.where(good, weight * added[i], 0) for i, d in direction.items()
        }
    return direction, bad
