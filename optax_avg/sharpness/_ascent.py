"""The offset that the sharpness family builds on, its radius and its leaves.

d = rho T^2 g / |T g|
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from optax_avg import _checks, _leaves, _numerics
from optax_avg.sharpness._rule import Grads, InitMemory, Memory, Probe, RuleState

# A number, a schedule of the optimizer step, or a tree of them like a prefix of params.
Radius = optax.ScalarOrSchedule | Mapping[Any, Any] | Iterable[Any]
# From parameters and their gradient to the elementwise T.
Metric = Callable[[optax.Params, optax.Updates], optax.Updates]
Scope = Literal["global", "leaf", "row"]
# From parameters, the clean gradient and the state to the offset.
Offset = Callable[[optax.Params, optax.Updates, RuleState], optax.Updates]


def ascent(
    params: optax.Params,
    grads: optax.Updates,
    radius: Any,
    *,
    where: _leaves.Where | None = None,
    metric: Metric | None = None,
    scope: Scope = "global",
) -> optax.Updates:
    """The offset ``d = rho T^2 g / |T g|``, 0 where ``|T g|`` is 0.

    Args:
      params: The parameters ``x``.
      grads: The gradient ``g``, a tree like ``params``.
      radius: The radius ``rho``, a number or a tree of numbers like a prefix of
        ``params``.
      where: Leaves to perturb, selected before the norm is taken.
      metric: Function ``(params, grads) -> T``, elementwise. None means 1.
      scope: What the norm covers: ``"global"`` all leaves, ``"leaf"`` each leaf,
        ``"row"`` each slice along the first axis of a leaf of two or more dimensions.

    Returns:
      A tree like ``params``, None where there is no offset.
    """
    g = inside(where, params, grads)
    t = None if metric is None else metric(params, grads)
    tg = g if t is None else _leaves.over(lambda g, t: t * g, params, g, t)
    direction = tg if t is None else _leaves.over(lambda g, t: t * g, params, tg, t)
    if scope == "global":
        n = _numerics.norm(tg)
        norms = _leaves.over(lambda _: n, params, g)
    else:
        norms = _leaves.over(
            _row_norm if scope == "row" else _numerics.norm, params, tg
        )
    return _leaves.over(
        lambda v, n, r: jnp.where(n > 0, r, 0) * (v / jnp.where(n > 0, n, 1)),
        params,
        direction,
        norms,
        spread(radius, params),
    )


def _row_norm(v: jax.Array) -> jax.Array:
    """Norms along the first axis, shape (rows, 1, ..., 1); of a vector its own norm."""
    if v.ndim < 2:
        return _numerics.norm(v)
    return jax.vmap(_numerics.norm)(v).reshape(-1, *[1] * (v.ndim - 1))


def inside(
    where: _leaves.Where | None, params: optax.Params, grads: optax.Updates
) -> optax.Updates:
    """The gradients of the selected leaves, None for the others."""
    if where is None:
        return grads
    return jax.tree.map(
        lambda keep, g: g if keep else None,
        is_inside(where, params),
        grads,
        is_leaf=lambda x: x is None,
    )


def is_inside(where: _leaves.Where | None, params: optax.Params) -> Any:
    """For each leaf of ``params`` whether it is selected, a tree of bools."""
    selected = _leaves.select(params, where)
    return jax.tree.map(
        lambda leaf: not _leaves.is_masked(leaf), selected, is_leaf=_leaves.is_masked
    )


UNPERTURBED = "is true of no leaf, so that nothing would be perturbed"


def check_some(
    where: _leaves.Where | None, otherwise: str, *radii: Radius
) -> InitMemory:
    """An ``init_memory`` without memory that raises if no leaf is selected.

    It also raises if a tree of radii does not fit the parameters.

    Args:
      where: The selection.
      otherwise: The message if it selects no leaf.
      *radii: Radii of the rule.

    Returns:
      A function of the parameters that returns ``()``.
    """

    def init_memory(params: optax.Params) -> Memory:
        _leaves.refuse_none_selected(params, where, otherwise)
        for radius in radii:
            spread(jax.tree.map(lambda _: 0.0, radius), params)
        return ()

    return init_memory


def spread(radius: Any, params: optax.Params) -> Any:
    """One radius per leaf of ``params``, from a number or a prefix tree.

    Raises:
      ValueError: If the tree is no prefix.
    """
    try:
        return jax.tree.map(
            lambda r, part: jax.tree.map(
                lambda _: _numerics.wide(jnp.asarray(r)), part
            ),
            radius,
            params,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the radii have {_leaves.shown(radius)} and params "
            f"{_leaves.shown(params)}; pass a number, a schedule, or a tree of these "
            "like params or a prefix of them."
        ) from error


def radius_at(radius: Radius, state: RuleState) -> Any:
    """The radius of this step: schedules are called with the optimizer step."""
    return jax.tree.map(lambda r: _checks.at_step(r, state.rule_step), radius)


def check_radius(name: str, radius: Radius) -> Radius:
    """``radius`` with every number checked.

    Raises:
      ValueError: If a number is negative or not finite, or there is no number.
    """
    if not jax.tree.leaves(radius):
        raise ValueError(
            f"{name} must be a number, a schedule, or a tree of them like a prefix of "
            f"params, got {radius!r}."
        )
    return jax.tree.map(lambda r: _checks.finite_or_schedule(name, r), radius)


def check_one_radius(
    name: str, radius: optax.ScalarOrSchedule, rule: str, open_low: bool = False
) -> optax.ScalarOrSchedule:
    """``radius`` after the check, for a rule that takes one radius for all leaves.

    Raises:
      ValueError: If it is a tree, negative or not finite, or 0 with ``open_low``.
    """
    if radius is not None and not jax.tree_util.all_leaves([radius]):
        raise ValueError(
            f"{name} of {rule} is one number or schedule for all leaves, got a tree; "
            "sam(), asam(), dnsam(), awp() and gam() take trees of radii."
        )
    return _checks.finite_or_schedule(name, radius, open_low)


def descend(
    params: optax.Params, grads: Grads, state: RuleState
) -> tuple[optax.Updates, Memory]:
    """The result of SAM: the last gradient. The memory stays as it is."""
    del params
    return grads[-1], state.rule_memory


def after_clean(offset: Offset) -> Probe:
    """A probe whose evaluation 0 is clean and whose evaluation 1 is at the offset."""

    def probe(i, params, grads, state):
        return None if i == 0 else offset(params, grads[0], state)

    return probe
