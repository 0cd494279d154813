"""Norms of weights, kept as they are (LAWN) or penalised (Norm Loss, spectral norm).

    w <- c (w + u)/|w + u|,    g + lam d/dw sum_o (1 - |w_o|)^2,    g + lam sigma u v'

``w_o`` are the weights of one output, ``sigma u v'`` the leading part of the singular
value decomposition of a matrix.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_avg import _checks, _leaves, _mixups, _numerics
from optax_avg._keys import key_maker
from optax_avg.optimizers import _matrices

__all__ = [
    "NormPreservingState",
    "SpectralState",
    "norm_loss",
    "norm_preserving",
    "spectral_regularisation",
]

NONE_CHOSEN = "where is true of no leaf, so that no weight would be regularised"


class NormPreservingState(NamedTuple):
    """State of :func:`norm_preserving`.

    Attributes:
      preserving_step: Number of steps so far, int32.
      radii: ``c``, the norm of each chosen leaf at step ``start`` in float32 or wider,
        0 before; ``MaskedNode`` at other leaves.
      inner_state: State of the optimizer.
    """

    preserving_step: jax.Array
    radii: Any
    inner_state: optax.OptState


def norm_preserving(
    optimizer: optax.GradientTransformation,
    start: int = 0,
    *,
    where: _leaves.Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """LAWN: from some step on, an optimizer that keeps the norm of each weight.

    Before step ``start`` it is the optimizer alone. Then ``c = |w|`` is fixed for each
    chosen leaf, and with the projection ``P`` on the vectors orthogonal to ``w``:
    ``u = P optimizer(P g)``, ``w <- c (w + u)/|w + u|``. Logits then cannot grow by
    scaling, and the loss keeps its gradient. The paper warms the learning rate up
    again from step ``start`` on; give the optimizer such a schedule.

    Args:
      optimizer: Whole optimizer, without weight decay.
      start: Step from which norms are kept, not negative.
      where: Leaves whose norm is kept, as a tree of bools or a function of path and
        leaf. The default is all leaves with two axes or more.

    Returns:
      A transformation with the state :class:`NormPreservingState`; ``update`` needs the
      parameters. Only averages come after it.

    Raises:
      ValueError: If ``start`` is negative, ``where`` selects no leaf, or ``update``
        gets no params.
      TypeError: If ``optimizer`` is no transformation.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = oa.optimizers.norm_preserving(optax.sgd(1.0))
      >>> w = jnp.array([[3.0, 0.0]])
      >>> updates, _ = tx.update(jnp.array([[9.0, -4.0]]), tx.init(w), w)
      >>> [round(float(x), 3) for x in optax.apply_updates(w, updates)[0]]
      [1.8, 2.4]

    References:
      Gupta et al., "Logit Attenuating Weight Normalization", 2021, 2108.05839.
    """
    _mixups.refuse_no_optimizer("norm_preserving", optimizer)
    start = _checks.check_integer("start", start, 0)
    tx = optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> NormPreservingState:
        if not _leaves.has_masked(params):
            _leaves.refuse_none_selected(params, where, NONE_CHOSEN)
        radius = lambda w: jnp.zeros([], _numerics.dtype_of_norms(w))
        radii = jax.tree.map(radius, _matrices.chosen(params, where))
        return NormPreservingState(
            jnp.zeros([], jnp.int32), _leaves.unboxed(radii), tx.init(params)
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, NormPreservingState]:
        _checks.require_params("norm_preserving", params)
        step = state.preserving_step
        due = step >= start
        known = _leaves.in_boxes_of(_matrices.chosen(params, where), state.radii)
        structure, rows = _matrices.rows(updates, params, known)
        there = [i for i, row in enumerate(rows) if not _leaves.is_absent(row[2])]
        x = {i: _numerics.wide(rows[i][1]) for i in there}
        radii = {i: rows[i][2] for i in there}
        sizes = _sizes(x)
        units = {i: x[i] / jnp.where(sizes[i] > 0, sizes[i], 1) for i in there}
        for i, c in radii.items():
            radii[i] = jnp.where(step == start, sizes[i], c).astype(c.dtype)

        def tangents(leaves: list[Any]) -> dict[int, jax.Array]:
            given = [i for i in there if _leaves.is_gradient(leaves[i])]
            wide = {i: _numerics.wide(leaves[i]) for i in given}
            along = {i: _numerics.dot(wide[i], units[i]) for i in given}
            return {i: wide[i] - along[i] * units[i] for i in given}

        g = [row[0] for row in rows]
        for i, tangent in tangents(g).items():
            g[i] = jnp.where(due, tangent.astype(g[i].dtype), g[i])
        made, inner = tx.update(
            structure.unflatten(g), state.inner_state, params, **extra_args
        )
        u = structure.flatten_up_to(made)
        steps = tangents(u)
        lengths = _sizes(steps)
        for i, tangent in steps.items():
            c, size = radii[i], jnp.hypot(sizes[i], lengths[i])  # of w + u
            # A step of zero leaves the weight alone, however it was rounded.
            scaled = due & (c > 0) & (lengths[i] > 0)
            factor = c / jnp.where(size > 0, size, 1)
            to_sphere = (factor * (x[i] + tangent) - x[i]).astype(u[i].dtype)
            u[i] = jnp.where(scaled, to_sphere, u[i])
        kept = [radii.get(i, row[2]) for i, row in enumerate(rows)]
        return structure.unflatten(u), NormPreservingState(
            _numerics.advance_clock(step),
            _leaves.in_boxes_of(state.radii, kept),
            inner,
        )

    return optax.GradientTransformationExtraArgs(
        _leaves.shapes_for_shapes(init), update
    )


def norm_loss(
    lam: float = 0.01, *, out_axis: int = -1, where: _leaves.Where | None = None
) -> optax.GradientTransformationExtraArgs:
    """Norm Loss: draws the weights of each output to norm 1.

    The gradient of ``lam sum_o (1 - |w_o|)^2``, which is
    ``2 lam (1 - 1/|w_o|) w_o``, is added to that of the loss. At ``w_o = 0`` it is 0.

    Args:
      lam: Weight of the penalty, not negative.
      out_axis: Axis of the outputs; the last one, as Flax stores weights. Norms are
        over all other axes.
      where: Leaves that are penalised, as a tree of bools or a function of path and
        leaf. The default is all leaves with two axes or more.

    Returns:
      A stateless transformation that stands before the optimizer; ``update`` needs the
      parameters.

    Raises:
      ValueError: If an argument is out of range, ``where`` selects no leaf, or
        ``update`` gets no params.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.optimizers.norm_loss(0.5)
      >>> w = jnp.array([[3.0, 1.0], [4.0, 0.0]])  # one column an output
      >>> gradient, _ = tx.update(jnp.zeros((2, 2)), tx.init(w), w)
      >>> [round(float(x), 3) for x in gradient[:, 0]], gradient[:, 1].tolist()
      ([2.4, 3.2], [0.0, 0.0])

    References:
      Georgiou et al., "Norm Loss: An efficient yet effective regularization method for
      deep neural networks", 2021, 2103.06583.
    """
    lam = _checks.finite("lam", lam)
    out_axis = _checks.static_integer("out_axis", out_axis, -1)

    def init(params: optax.Params) -> optax.EmptyState:
        if not _leaves.has_masked(params):
            _leaves.refuse_none_selected(params, where, NONE_CHOSEN)
        return optax.EmptyState()

    def penalised(g: Any, w: Any) -> Any:
        if not _leaves.is_gradient(g) or _leaves.is_masked(w):
            return g
        x = _numerics.wide(w)
        axes = _matrices.other_axes(x, out_axis)
        slope = 2 * lam * (x - _matrices.unit(x, axes))
        return (_numerics.wide(g) + slope).astype(g.dtype)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        _checks.require_params("norm_loss", params)
        structure, rows = _matrices.rows(updates, _matrices.chosen(params, where))
        return structure.unflatten([penalised(*row) for row in rows]), state

    return optax.GradientTransformationExtraArgs(init, update)


class SpectralState(NamedTuple):
    """State of :func:`spectral_regularisation`.

    Attributes:
      spectral_vectors: The leading right singular vector ``v`` of each chosen leaf as
        far as it is known, of length 1 in float32 or wider. It has the axes of the
        leaf, of which all but that of the outputs have length 1. ``MaskedNode`` at
        other leaves.
    """

    spectral_vectors: Any


def spectral_regularisation(
    lam: float = 0.01,
    *,
    num_iters: int = 1,
    out_axis: int = -1,
    where: _leaves.Where | None = None,
    key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Spectral norm regularisation: penalises the largest singular value.

    The gradient of ``lam/2 sigma(W)^2``, which is ``lam sigma u v'``, is added to that
    of the loss. Power iterations ``u <- W v/|W v|``, ``v <- W'u/|W'u|`` go on from the
    ``v`` of the last step, and ``sigma = |W'u|``. A leaf with more than two axes, such
    as the kernel of a convolution, is the matrix of its outputs and all else.

    Args:
      lam: Weight of the penalty, not negative.
      num_iters: Number of power iterations a step, at least 1.
      out_axis: Axis of the outputs; the last one, as Flax stores weights.
      where: Leaves that are penalised, as a tree of bools or a function of path and
        leaf. The default is all leaves with two axes or more.
      key: PRNG key of the first ``v``, or an integer seed.

    Returns:
      A transformation with the state :class:`SpectralState` that stands before the
      optimizer; ``update`` needs the parameters.

    Raises:
      ValueError: If an argument is out of range, a leaf is complex, ``where`` selects
        no leaf, or ``update`` gets no params.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.optimizers.spectral_regularisation(0.5, num_iters=20)
      >>> w = jnp.array([[3.0, 0.0], [0.0, 1.0]])
      >>> gradient, _ = tx.update(jnp.zeros((2, 2)), tx.init(w), w)
      >>> [round(float(x), 3) for x in jnp.diag(gradient)]
      [1.5, 0.0]

    References:
      Yoshida and Miyato, "Spectral Norm Regularization for Improving the
      Generalizability of Deep Learning", 2017, 1705.10941.
    """
    lam = _checks.finite("lam", lam)
    num_iters = _checks.static_integer("num_iters", num_iters, 1)
    out_axis = _checks.static_integer("out_axis", out_axis, -1)
    make_key = key_maker(key, "spectral_regularisation(key=jax.random.key(0))")

    def init(params: optax.Params) -> SpectralState:
        if not _leaves.has_masked(params):
            _leaves.refuse_none_selected(params, where, NONE_CHOSEN)
        weights = _matrices.chosen(params, where)
        _checks.refuse_complex("spectral_regularisation", weights)
        leaves, structure = jax.tree.flatten(weights)
        first = make_key()

        def vector(i: int, w: jax.Array) -> jax.Array:
            zeros = _numerics.zeros_like(w)
            # A sum of the leaf lies on the devices where the leaf lies.
            v = jnp.sum(zeros, _matrices.other_axes(w, out_axis), keepdims=True)
            own = jax.random.fold_in(first, i)
            v += jax.random.normal(own, v.shape, v.dtype)
            return _matrices.unit(v, _matrices.all_axes(v))

        found = [vector(i, w) for i, w in enumerate(leaves)]
        return SpectralState(_leaves.unboxed(structure.unflatten(found)))

    def penalised(g: Any, w: Any, v: Any) -> tuple[Any, Any]:
        if _leaves.is_absent(w):
            return g, v
        x, across = _numerics.wide(w), _matrices.other_axes(w, out_axis)

        def left(v: jax.Array) -> jax.Array:
            return _matrices.unit(_matrices.inner(x, v, (out_axis,)), across)

        def right(v: jax.Array, scaled: jax.Array) -> jax.Array:
            size = _matrices.lengths(scaled, _matrices.all_axes(scaled))
            known = (size > 0) & jnp.isfinite(size)
            return jnp.where(known, scaled / jnp.where(known, size, 1), v)

        if num_iters > 1:
            again = lambda _, v: right(v, _matrices.inner(x, left(v), across))
            v = lax.fori_loop(1, num_iters, again, v)
        u = left(v)
        scaled = _matrices.inner(x, u, across)  # sigma v
        if _leaves.is_gradient(g):
            g = (_numerics.wide(g) + lam * u * scaled).astype(g.dtype)
        return g, right(v, scaled)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SpectralState]:
        del extra_args
        _checks.require_params("spectral_regularisation", params)
        weights = _matrices.chosen(params, where)
        known = _leaves.in_boxes_of(weights, state.spectral_vectors)
        structure, rows = _matrices.rows(updates, weights, known)
        pairs = [penalised(*row) for row in rows]
        gradients, vectors = (
            structure.unflatten([pair[i] for pair in pairs]) for i in range(2)
        )
        vectors = _leaves.in_boxes_of(state.spectral_vectors, vectors)
        return gradients, SpectralState(vectors)

    return optax.GradientTransformationExtraArgs(
        _leaves.shapes_for_shapes(init), update
    )


def _sizes(leaves: dict[int, jax.Array]) -> dict[int, jax.Array]:
    """The norm of each leaf by its position."""
    norms = _numerics.norms([[x] for x in leaves.values()])
    return {i: norms[n] for n, i in enumerate(leaves)}
