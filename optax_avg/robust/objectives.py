"""Several objectives: directions from the gradients of all of them.

    d = sum_i w_i g_i,    w from the Gram matrix G_ij = <g_i, g_j>

:func:`mgda`, :func:`cagrad`, :func:`upgrad` and :func:`pcgrad` are aggregators over the
axis of the objectives, see :mod:`optax_avg.robust.aggregation`. :func:`bloop` and
:func:`perp_grad` are links of a chain; all projections are :func:`project_out`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from optax.experimental import aggregating

from optax_avg import _checks, _leaves, _numerics
from optax_avg._keys import key_maker
from optax_avg.robust import _stack
from optax_avg.robust.aggregation import aggregator

INFINITY = float("inf")


def project_out(v: Any, w: Any) -> Any:
    """The part of ``v`` orthogonal to ``w``: ``v - <v, w>/|w|^2 w``; ``v`` if w is 0.

    Args:
      v: a tree of arrays.
      w: one like it; inner products are over all leaves.

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
    *, scope: str = "global", rescale: bool = False
) -> optax.GradientTransformationExtraArgs:
    """The part of the gradient that does not scale the parameters.

    ``g - <g, x>/|x|^2 x``: along ``x`` the loss falls by naive scaling of the logits.

    Args:
      scope: of the inner products, ``"global"`` as in the paper, or ``"leaf"``.
      rescale: gives the result the norm of ``g``; the authors' code has
        ``scope="leaf", rescale=True``.

    Returns:
      A stateless transformation that stands before the optimizer; ``update`` needs the
      parameters.

    Raises:
      ValueError: If the scope is unknown.

    Example:
      >>> import optax, optax_avg as oa
      >>> tx = optax.chain(oa.perp_grad(), optax.adamw(1e-3))

    References:
      Prieto et al., "Grokking at the Edge of Numerical Stability", 2025, 2501.04697.
    """
    if scope not in ("global", "leaf"):
        raise ValueError(f"scope must be 'global' or 'leaf', got {scope!r}.")

    def one(g: list[jax.Array], x: list[jax.Array]) -> list[jax.Array]:
        perpendicular = project_out(g, x)
        if not rescale:
            return perpendicular
        size, left = _numerics.norm(g), _numerics.norm(perpendicular)
        factor = jnp.where(left > 0, size / jnp.where(left > 0, left, 1), 1)
        return [factor * p for p in perpendicular]

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        _checks.require_params("perp_grad", params)
        leaves, structure = jax.tree.flatten(updates, is_leaf=_leaves.is_absent)
        xs = jax.tree.leaves(params, is_leaf=_leaves.is_absent)
        floats = [i for i, g in enumerate(leaves) if _leaves.is_gradient(g)]
        for group in [floats] if scope == "global" else [[i] for i in floats]:
            found = one([leaves[i] for i in group], [jnp.asarray(xs[i]) for i in group])
            for i, p in zip(group, found, strict=True):
                leaves[i] = p.astype(leaves[i].dtype)
        return structure.unflatten(leaves), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


class BloopState(NamedTuple):
    """State of :func:`bloop`.

    Attributes:
      bloop_step: int32, finite main gradients so far; schedules are called with it.
      main_ema: EMA of the main gradient in float32 or wider.
      left_out: int32, main and auxiliary gradients that were not finite.
    """

    bloop_step: jax.Array
    main_ema: Any
    left_out: jax.Array


def bloop(
    lam: Any,
    ema_rate: Any = 0.01,
    *,
    project_on: str = "previous",
    init: str = "first",
) -> optax.GradientTransformationExtraArgs:
    """The main gradient plus what of the auxiliary ones does not oppose its EMA.

    ``g + lam sum_k (a_k - <a_k, m>/|m|^2 m)``, ``m <- (1 - ema_rate) m + ema_rate g``:
    to first order the auxiliary losses are minimised among the minimisers of the main.

    A main gradient that is not finite gives zeros and leaves ``m`` alone; an auxiliary
    one is left out.

    Args:
      lam: weight of the auxiliary gradients, a float or a schedule.
      ema_rate: in [0, 1], a float or a schedule.
      project_on: the EMA ``"previous"`` to this gradient, or ``"updated"`` with it as
        in the authors' code.
      init: ``"first"``: the EMA starts at the first gradient, and nothing is projected
        then; or ``"zeros"``: nothing is projected while it is zero.

    Returns:
      A transformation with the state :class:`BloopState` that stands before the
      optimizer; ``update`` needs ``aux_grads=``, a tuple of trees like the gradient.

    Raises:
      ValueError: If an argument is out of range.

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
    if not callable(lam):
        lam = _checks.within("lam", lam, 0, INFINITY, closed_high=False)
    if not callable(ema_rate):
        ema_rate = _checks.within("ema_rate", ema_rate, 0, 1)
    if project_on not in ("previous", "updated"):
        raise ValueError(
            f"project_on must be 'previous' or 'updated', got {project_on!r}."
        )
    if init not in ("first", "zeros"):
        raise ValueError(f"init must be 'first' or 'zeros', got {init!r}.")

    def init_fn(params: Any) -> BloopState:
        count = lambda: jnp.zeros([], jnp.int32)
        return BloopState(count(), _leaves.zeros_like_wide(params), count())

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        aux_grads: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        del params, extra_args
        if not isinstance(aux_grads, (tuple, list)):
            raise ValueError(
                "bloop needs a tuple of auxiliary gradients; call tx.update(updates, "
                "state, params, aux_grads=(gradient,))."
            )

        def at(value: Any) -> Any:
            return value(state.bloop_step) if callable(value) else value

        first = (state.bloop_step == 0) & (init == "first")
        leaves, structure = jax.tree.flatten(updates, is_leaf=_leaves.is_absent)
        old, layout = jax.tree.flatten(state.main_ema, is_leaf=_leaves.is_absent)
        floats = [i for i, g in enumerate(leaves) if _leaves.is_gradient(g)]
        g = {i: _numerics.wide(leaves[i]) for i in floats}
        m = {i: old[i] for i in floats}
        rate = jnp.where(first, 1, at(ema_rate))
        new = {i: m[i] + rate * (g[i] - m[i]) for i in floats}
        reference = m if project_on == "previous" else new
        # Zero has no direction: nothing is projected.
        reference = {i: jnp.where(first, 0, r) for i, r in reference.items()}
        finite = _numerics.all_finite(list(g.values()))
        direction, left_out = g, _numerics.count_if(~finite, state.left_out)
        for aux in aux_grads:
            parts = jax.tree.leaves(aux, is_leaf=_leaves.is_absent)
            if len(parts) != len(leaves):
                raise ValueError(
                    f"an auxiliary gradient has {len(parts)} leaves, the main one "
                    f"{len(leaves)}."
                )
            a = {
                i: _numerics.wide(parts[i])
                for i in floats
                if _leaves.is_gradient(parts[i])
            }
            a = {i: a.get(i, jnp.zeros_like(g[i])) for i in floats}
            good = _numerics.all_finite(list(a.values()))
            left_out = _numerics.count_if(~good, left_out)
            added = project_out(a, reference)
            direction = {
                i: d + jnp.where(good, at(lam) * added[i], 0)
                for i, d in direction.items()
            }
        for i in floats:
            emitted = jnp.where(finite, direction[i], 0)
            leaves[i] = emitted.astype(leaves[i].dtype)
            old[i] = jnp.where(finite, new[i], m[i]).astype(old[i].dtype)
        return structure.unflatten(leaves), BloopState(
            _numerics.count_if(finite, state.bloop_step),
            layout.unflatten(old),
            left_out,
        )

    return optax.GradientTransformationExtraArgs(
        _leaves.shapes_for_shapes(init_fn), update_fn
    )


def mgda(
    *, per_elt_axis: int | None = None, axis_name: Any = None
) -> aggregating.Aggregator:
    """The shortest convex combination of the gradients, ``min_w |sum_i w_i g_i|``.

    No objective gets worse along it; zero where none can do better without another.
    Where gradients are zero, or below 1e-18 of the greatest, it is the mean of these.

    Args:
      per_elt_axis: axis of the objectives, see :func:`optax_avg.coordinate_median`.
      axis_name: of the devices, see :func:`optax_avg.coordinate_median`.

    Returns:
      An aggregator with the state :class:`optax_avg.AggregationState`.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.mgda()
      >>> stacked = jnp.array([[2.0, 0.0], [0.0, 2.0]])
      >>> tx.update(stacked, tx.init(jnp.zeros(2)))[0].tolist()
      [1.0, 1.0]

    References:
      Désidéri, "Multiple-Gradient Descent Algorithm (MGDA) for Multiobjective
      Optimization", 2012.
    """
    return _weighted(shortest, per_elt_axis, axis_name)


def upgrad(
    *, per_elt_axis: int | None = None, axis_name: Any = None
) -> aggregating.Aggregator:
    """The mean of the gradients, each projected on the cone where no objective rises.

    ``mean_i argmin_{d : <g_j, d> >= 0 for all j} |d - g_i|``. Gradients below 1e-18 of
    the greatest count in the mean and put no bound on ``d``.

    Args:
      per_elt_axis: axis of the objectives, see :func:`optax_avg.coordinate_median`.
      axis_name: of the devices, see :func:`optax_avg.coordinate_median`.

    Returns:
      An aggregator with the state :class:`optax_avg.AggregationState`.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.upgrad()
      >>> stacked = jnp.array([[1.0, 0.0], [-2.0, 2.0]])
      >>> [round(x, 3) for x in tx.update(stacked, tx.init(jnp.zeros(2)))[0].tolist()]
      [0.25, 1.25]

    References:
      Quinton & Rey, "Jacobian Descent for Multi-Objective Optimization", 2024,
      2406.16232.
    """

    def weights(matrix, valid):
        # d = g_i + sum_j v_j g_j with the multipliers v of the constraints.
        v = jax.vmap(lambda row: nonnegative_minimiser(matrix, -row))(matrix)
        mean = valid / jnp.maximum(jnp.sum(valid), 1)
        return mean + mean @ v

    return _weighted(weights, per_elt_axis, axis_name)


def cagrad(
    c: float = 0.5, *, per_elt_axis: int | None = None, axis_name: Any = None
) -> aggregating.Aggregator:
    """The direction near the mean gradient that is best for the worst objective.

    ``argmax_{|d - g_0| <= c |g_0|} min_i <g_i, d> = g_0 + c |g_0| g_w/|g_w|``, where
    ``w`` on the simplex minimises ``<g_w, g_0> + c |g_0| |g_w|``; not rescaled. It
    keeps to ``|d - g_0| <= c |g_0|`` to rounding, however nearly gradients cancel.

    Where ``g_w = 0``, at points that are Pareto-stationary, many directions are as
    good: ``d`` is the one closest to ``g_0``. For ``c < 1`` it is zero only where
    ``g_0`` is, so that descent goes on to a stationary point of the mean loss. For ``c
    >= 1`` it may rest at any Pareto-stationary point. Gradients that are zero, or 1e-18
    of the greatest, ask for nothing.

    Args:
      c: at least 0, which gives the mean.
      per_elt_axis: axis of the objectives, see :func:`optax_avg.coordinate_median`.
      axis_name: of the devices, see :func:`optax_avg.coordinate_median`.

    Returns:
      An aggregator with the state :class:`optax_avg.AggregationState`.

    Raises:
      ValueError: If ``c`` is negative.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.cagrad(0.5)
      >>> stacked = jnp.array([[1.0, 0.0], [-0.5, 0.0]])
      >>> [round(x, 4) for x in tx.update(stacked, tx.init(jnp.zeros(2)))[0].tolist()]
      [0.125, 0.0]

    References:
      Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", 2021,
      2110.14048.
    """
    c = _checks.within("c", c, 0, INFINITY, closed_high=False)

    def weights(matrix, valid):
        """Those of ``g_0`` and those of what is added to it."""
        mean = valid / jnp.maximum(jnp.sum(valid), 1)
        along = matrix @ mean
        g0 = jnp.sqrt(jnp.maximum(mean @ along, 0))
        radius = c * g0
        lengths = jnp.sqrt(jnp.diagonal(matrix))
        bound = valid & (lengths > 0)  # a zero gradient asks for nothing

        # The shortest q = sum_i v_i g_i with <g_i, g_0 + q> >= level for all i.
        def pull(level, rounds):
            asked = jnp.where(bound, level - along, 0)
            return nonnegative_minimiser(matrix, asked, rounds)

        # One round has a ridge: any level can be met, at a length that rises with it.
        def halve(_, levels):
            low, high = levels
            level = (low + high) / 2
            v = pull(level, 1)
            short = v @ jnp.where(bound, level - along, 0) < radius**2
            return jnp.where(short, level, low), jnp.where(short, high, level)

        least = lambda x: jnp.min(jnp.where(bound, x, INFINITY))
        levels = least(along), least(along + radius * lengths)
        level, _ = lax.fori_loop(0, 32, halve, levels)

        def within(v):
            size = jnp.sqrt(jnp.maximum(v @ matrix @ v, 0))
            beyond = size > radius
            return ~beyond, v * jnp.where(
                beyond, radius / jnp.where(beyond, size, 1), 1
            )

        slopes = lambda v: along + matrix @ v
        # What the ridge has shifted comes back, but where the level can't be met.
        _, ridged = within(pull(level, 1))
        _, exact = within(pull(level, PROXIMAL_ROUNDS))
        better = least(slopes(exact)) > least(slopes(ridged))
        best = jnp.where(better, exact, ridged)
        near, closest = within(pull(jnp.zeros_like(level), PROXIMAL_ROUNDS))
        # The best common descent does not depend on the lengths of the gradients.
        unit = jnp.where(bound, 1 / jnp.where(bound, lengths, 1), 0)
        cosines = unit[:, None] * matrix * unit[None]
        w = shortest(cosines, bound)
        stationary = w @ cosines @ w <= STATIONARY**2
        return jnp.stack([mean, jnp.where(near & stationary, closest, best)])

    def rule(stack, memory, step):
        del step
        both = _stack.combine(stack, weights(gram(stack), stack.valid))
        # Where rows cancel, G has lost the lengths of their sums.
        g0, pull = _stack.row_norms(both, axis_name)
        beyond = pull > c * g0
        factor = jnp.where(beyond, c * (g0 / jnp.where(beyond, pull, 1)), 1)
        return [x[0] + factor.astype(x.real.dtype) * x[1] for x in both], memory

    return aggregator(rule, per_elt_axis, axis_name)


def pcgrad(
    key: Any, *, per_elt_axis: int | None = None, axis_name: Any = None
) -> aggregating.Aggregator:
    """The sum of the gradients, each without what opposes the others.

    For each ``g_i``, for the others ``g_j`` in random order: where ``<g_i, g_j> < 0``,
    ``g_i <- g_i - <g_i, g_j>/|g_j|^2 g_j``. Gradients ``g_j`` below 1e-18 of the
    greatest count in the sum and take nothing from others.

    Args:
      key: a PRNG key, or an integer to make one of.
      per_elt_axis: axis of the objectives, see :func:`optax_avg.coordinate_median`.
      axis_name: of the devices, see :func:`optax_avg.coordinate_median`.

    Returns:
      An aggregator with the state :class:`optax_avg.AggregationState`.

    Raises:
      ValueError: If ``key`` is neither.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.pcgrad(0)
      >>> stacked = jnp.array([[1.0, 0.0], [-2.0, 2.0]])
      >>> [round(x, 3) for x in tx.update(stacked, tx.init(jnp.zeros(2)))[0].tolist()]
      [0.5, 2.5]

    References:
      Yu et al., "Gradient Surgery for Multi-Task Learning", 2020, 2001.06782.
    """
    make_key = key_maker(key, "pcgrad(jax.random.key(0))")

    def rule(stack, memory, step):
        del step
        now, later = jax.random.split(memory)
        matrix = gram(stack)
        n = len(stack.valid)
        order = jax.vmap(lambda k: jax.random.permutation(k, n))(
            jax.random.split(now, n)
        )

        def projected(i, order):
            def without(coefficients, j):
                along = coefficients @ matrix[j]
                opposed = (along < 0) & (j != i)
                size = jnp.where(matrix[j, j] > 0, matrix[j, j], 1)
                off = jnp.where(opposed, along / size, 0)
                return coefficients.at[j].add(-off), None

            return lax.scan(without, jnp.eye(n, dtype=matrix.dtype)[i], order)[0]

        each = jax.vmap(projected)(jnp.arange(n), order)
        total = jnp.sum(jnp.where(stack.valid[:, None], each, 0), axis=0)
        return _stack.combine(stack, total), later

    return aggregator(rule, per_elt_axis, axis_name, lambda _: make_key())


def _weighted(
    weights: Callable[[jax.Array, jax.Array], jax.Array],
    axis: int | None,
    axis_name: Any,
) -> aggregating.Aggregator:
    """An aggregator from weights of the Gram matrix and the valid rows."""

    def rule(stack, memory, step):
        del step
        return _stack.combine(stack, weights(gram(stack), stack.valid)), memory

    return aggregator(rule, axis, axis_name)


def gram(stack: _stack.Stack) -> jax.Array:
    """The Gram matrix in units of the squared greatest norm."""
    most = jnp.max(jnp.where(stack.valid, stack.norms, 0))
    scale = jnp.where(stack.valid, 1 / jnp.where(most > 0, most, 1), 0)
    return _stack.gram(stack, scale)


def shortest(gram: jax.Array, valid: jax.Array) -> jax.Array:
    """``argmin w' G w`` on the simplex of the valid rows.

    On its ray ``v' G v/2 - sum_i v_i`` is least at ``v = w/(w' G w)``; where that is
    infinite, rows of length zero are as short as can be.
    """
    v = nonnegative_minimiser(gram, valid.astype(gram.dtype))
    zero = (valid & (jnp.diagonal(gram) == 0)).astype(v.dtype)
    v = jnp.where(jnp.any(zero > 0), zero, v)
    return v / jnp.where(jnp.sum(v) > 0, jnp.sum(v), 1)


RIDGE = 1e-6  # of a correlation matrix, for rows that depend on each other
PROXIMAL_ROUNDS = 3  # each takes away most of what the ridge has shifted
STATIONARY = 1e-3  # a common descent of gradients of length 1 that float32 can't tell


def nonnegative_minimiser(
    a: jax.Array, b: jax.Array, rounds: int = PROXIMAL_ROUNDS
) -> jax.Array:
    """``argmin_{v >= 0} v' A v/2 - b' v`` for a small positive semidefinite ``A``.

    Block principal pivoting: all coordinates with the wrong sign change sides; where
    that does not make them fewer, only the last one, which ends after finitely many.
    Rows that depend on each other have no single answer: the proximal point method,
    ``v <- argmin v' A v/2 - b' v + r |v - v_last|^2/2``, comes to one of them. One of
    its rounds is the minimiser with a ridge.

    References:
      Júdice & Pires, "A Block Principal Pivoting Algorithm for Large-Scale Strictly
      Monotone Linear Complementarity Problems", 1994.
    """
    n = len(b)
    diagonal = jnp.diagonal(a)
    unit = jnp.where(
        diagonal > 0, 1 / jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1)), 1
    )
    a = unit[:, None] * a * unit[None] + RIDGE * jnp.eye(n, dtype=a.dtype)
    size = jnp.max(jnp.abs(unit * b))
    b = unit * b / jnp.where(size > 0, size, 1)
    tolerance = 4 * n * jnp.finfo(a.dtype).eps

    def regularised(_, before):
        c = b + RIDGE * before

        def solution(free):
            both = free[:, None] & free[None]
            fixed = jnp.where(both, a, jnp.eye(n, dtype=a.dtype))
            v = jnp.linalg.solve(fixed, jnp.where(free, c, 0))
            # Of dependent rows v can be 1/RIDGE, and what is rounded away with it.
            length = jnp.max(jnp.abs(v))
            slope, most = a @ v - c, jnp.abs(a) @ jnp.abs(v) + jnp.abs(c)
            low = jnp.where(free, v < -tolerance * length, slope < -tolerance * most)
            return v, low

        def pivot(carry):
            free, _, wrong, fewest, patience, left = carry
            count = jnp.sum(wrong)
            better = count < fewest
            patience = jnp.where(better, 3, patience - 1)
            last = jnp.arange(n) == jnp.max(jnp.where(wrong, jnp.arange(n), -1))
            free = free ^ jnp.where(better | (patience >= 0), wrong, last)
            v, wrong = solution(free)
            return free, v, wrong, jnp.minimum(count, fewest), patience, left - 1

        free = c > 0
        v, wrong = solution(free)
        start = (
            free,
            v,
            wrong,
            jnp.asarray(n + 1),
            jnp.asarray(3),
            jnp.asarray(20 + 5 * n),
        )
        done = lax.while_loop(
            lambda carry: jnp.any(carry[2]) & (carry[-1] > 0), pivot, start
        )
        return jnp.maximum(done[1], 0)

    v = lax.fori_loop(0, rounds, regularised, jnp.zeros_like(b))
    return unit * v * jnp.where(size > 0, size, 0)
