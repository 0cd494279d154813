"""Gradients at perturbed parameters, from one rule in three forms.

    g_i = gradient at x + probe(i, g_0, ..., g_{i-1}),
    result = combine(g_0, g_1, ...)

:func:`sharpness_aware` wraps a ``value_and_grad`` function and is the form to take;
:func:`as_link` makes a rule the first link of an Optax chain;
:func:`optax_avg.multi_call` serves trainers that compute one gradient a call. The rules
are in :mod:`optax_avg.rules`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_avg import _checks, _leaves, _mesh, _mixups, _numerics, _sight
from optax_avg.sharpness._rule import (
    RuleState,
    SharpnessRule,
    _in_result,
    advanced,
    displaced,
    evaluate,
    init_state,
    like,
    refuse_masked,
    skipping,
    widened,
)


class SharpnessAware(Protocol):
    """What :func:`sharpness_aware` returns."""

    init: Callable[[Any], RuleState]

    def __call__(
        self, params: Any, state: RuleState, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, RuleState]:
        """Returns the value (with aux), the gradient and the next state."""
        ...


def sharpness_aware(
    value_and_grad_fn: Callable[..., tuple[Any, Any]],
    rule: SharpnessRule,
    *,
    has_aux: bool = False,
    ascent_fn: Callable[..., tuple[Any, Any]] | None = None,
    axis_name: str | Sequence[str] | None = None,
    perturbation: str | Sequence[str] = "local",
) -> SharpnessAware:
    """Makes a drop-in for ``jax.value_and_grad`` whose gradient follows a rule.

    Value and aux are those of the first evaluation: the clean parameters, but for
    ``momentum_sam``, which has no clean evaluation.

    Args:
      value_and_grad_fn: ``(params, *args, **kwargs) -> (value, grads)``, or
        ``((value, aux), grads)`` with ``has_aux``, as from ``jax.value_and_grad``.
      rule: from :mod:`optax_avg.rules`.
      has_aux: whether there is an aux.
      ascent_fn: like ``value_and_grad_fn``, for the ascent (a loss without L2, or on
        part of the batch). Offsets are made of its gradients alone, the result of the
        loss's alone. Value and aux are then those of ``ascent_fn`` at the clean
        parameters, at every step. Rules whose result is the last gradient cost as much
        as before; ``gsam``, ``gnp``, ``wsam``, ``cr_sam``, ``gradient_regularisation``,
        ``gam_hvp`` and the SAM steps of ``look_sam`` take one gradient more, ``gam``
        takes three more. A step on which nothing is due costs one gradient of the loss
        and the value of ``ascent_fn``.
      axis_name: mapped axis or axes over which gradients and value are averaged.
      perturbation: ``"local"``: every device ascends along its own gradient
        (m-sharpness); ``"global"``: along the average over all axes; or the axes over
        which the ascent is averaged. Without ``axis_name`` there is ``"local"`` alone:
        gradients are taken as they come, under plain ``jit`` those of the whole batch.

    Returns:
      A function with an attribute ``init``: ``state = sharp.init(params)``; ``out,
      grads, state = sharp(params, state, *args, **kwargs)``. ``out`` is the value, or
      ``(value, aux)`` with ``has_aux``.

    Raises:
      ValueError: If ``perturbation`` names no axis, or ``ascent_fn`` is given to a rule
        of one evaluation. The function itself raises if ``value_and_grad_fn`` returns
        something else than it should.
      TypeError: If ``rule`` is no rule, or a function cannot be called.

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x: 0.5 * x**2
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(loss), oa.rules.sam(0.5))
      >>> x = jnp.array(2.0)
      >>> value, grad, state = sharp(x, sharp.init(x))
      >>> float(value), float(grad)
      (2.0, 2.5)

    References:
      See the rules.
    """
    _mixups.refuse_no_rule("sharpness_aware", rule)
    _mixups.refuse_no_function("value_and_grad_fn", value_and_grad_fn)
    if ascent_fn is not None:
        _mixups.refuse_no_function("ascent_fn", ascent_fn)
    axes = _names(axis_name)
    ascent_axes = _ascent_axes(perturbation, axes)
    if ascent_fn is not None and rule.num_evals < 2:
        raise ValueError("this rule has one evaluation and takes no ascent_fn.")
    rest_axes = tuple(name for name in axes if name not in ascent_axes)

    def sharp(params, state, *args, **kwargs):
        def taken(name, fn):
            def out_and_grads(x):
                # Of replicated parameters shard_map would sum the gradients itself.
                x = jax.tree.map(lambda leaf: _mesh.vary(leaf, axes), x)
                found = fn(x, *args, **kwargs)
                _mixups.refuse_no_pair(name, found, params, has_aux)
                return found[0], _mean(found[1], ascent_axes)

            return out_and_grads

        loss_at = taken("value_and_grad_fn", value_and_grad_fn)
        ascent_at = None if ascent_fn is None else taken("ascent_fn", ascent_fn)
        start = displaced(params, rule.probe(0, params, (), state))

        def full(ascent, g):
            grads = evaluate(
                rule,
                lambda x: loss_at(x)[1],
                params,
                state,
                [widened(g, params)],
                [widened(ascent, params)],
                None if ascent_at is None else lambda x, at=ascent_at: at(x)[1],
            )
            gradient, memory = rule.combine(params, grads, state)
            if rest_axes:
                gradient, grads = _mean(gradient, rest_axes), _mean(grads, rest_axes)
                memory = rule.combine(params, grads, state)[1]
            return like(gradient, g), advanced(rule, state, memory, grads)

        def skip(g):
            first = _mean(widened(g, params), rest_axes)
            gradient, memory = skipping(rule)(params, first, state)
            return like(gradient, g), advanced(rule, state, memory, [first])

        if ascent_at is None:
            out, g = loss_at(start)
            gradient, state = _when_due(rule, state, lambda g: full(g, g), skip, g)
        else:

            def ascend(_):
                out, ascent = ascent_at(start)
                g = loss_at(start)[1] if _in_result(rule, 0) else ascent
                return out, *full(ascent, g)

            def descend(_):
                return ascent_at(start)[0], *skip(loss_at(start)[1])

            out, gradient, state = _when_due(rule, state, ascend, descend, ())
        value, aux = out if has_aux else (out, None)
        value = _mean(value, axes)
        return ((value, aux) if has_aux else value), gradient, state

    named: Any = sharp
    named.init = lambda params: init_state(rule, params)
    return named


def as_link(
    rule: SharpnessRule, name: str = "sharpness"
) -> optax.GradientTransformationExtraArgs:
    """Makes the first link of an Optax chain, which replaces the gradient.

    Args:
      rule: from :mod:`optax_avg.rules`.
      name: for messages.

    Returns:
      A transformation whose ``update`` needs ``grad_fn=``, a function from parameters
      to gradients on the same batch. Inside ``optax.MultiSteps`` it must be over all
      micro-batches: Optax calls the inner update with the last one's.

    Raises:
      ValueError: If ``update`` gets no ``params`` or ``grad_fn``, a masked tree, or
        something else than gradients.
      TypeError: If ``rule`` is no rule, or ``grad_fn`` no function.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = optax.chain(oa.as_link(oa.rules.sam(0.5)), optax.sgd(1.0))
      >>> grad_fn = jax.grad(lambda x: 0.5 * x**2)
      >>> x = jnp.array(2.0)
      >>> float(tx.update(grad_fn(x), tx.init(x), x, grad_fn=grad_fn)[0])
      -2.5
    """
    _mixups.refuse_no_rule("as_link", rule)

    def init(params: Any) -> RuleState:
        refuse_masked(name, params)
        return init_state(rule, params)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        grad_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        del extra_args
        _checks.require_params(name, params)
        _sight.report(name, received=updates)
        refuse_masked(name, updates)
        _mixups.refuse_no_grad_fn(name, grad_fn)
        _mixups.refuse_no_gradient("the first argument of update", updates, params)

        def grad_at(x):
            found = grad_fn(x)
            _mixups.refuse_no_gradient("what grad_fn returns", found, params)
            return found

        def full(g):
            first = () if rule.num_evals == 1 else [widened(g, params)]
            grads = evaluate(rule, grad_at, params, state, first, first)
            gradient, memory = rule.combine(params, grads, state)
            return like(gradient, updates), advanced(rule, state, memory, grads)

        def skip(g):
            first = widened(g, params)
            gradient, memory = skipping(rule)(params, first, state)
            return like(gradient, updates), advanced(rule, state, memory, [first])

        return _when_due(rule, state, full, skip, updates)

    return optax.GradientTransformationExtraArgs(init, update)


def trajectory_loss(
    student_logits: jax.Array, teacher_logits: jax.Array, temperature: float = 5.0
) -> jax.Array:
    """MESA's trajectory loss: ``T^2 KL(teacher/T || student/T)``, mean over examples.

    Added to the training loss with the logits of averaged parameters as the teacher's,
    it flattens at the cost of one more forward pass. No gradient flows to the teacher.

    Args:
      student_logits: ``(..., classes)``.
      teacher_logits: of the same shape.
      temperature: ``T``, positive.

    Returns:
      A scalar in nats, float32 or wider.

    Raises:
      ValueError: If the shapes differ or ``temperature`` is not positive.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> float(oa.trajectory_loss(jnp.zeros((4, 3)), jnp.ones((4, 3))))
      0.0

    References:
      Du et al., "Sharpness-Aware Training for Free", 2022, 2205.14083.
    """
    if jnp.shape(student_logits) != jnp.shape(teacher_logits):
        raise ValueError(
            f"logits differ in shape: {jnp.shape(student_logits)} of the student, "
            f"{jnp.shape(teacher_logits)} of the teacher."
        )
    t = _checks.within(
        "temperature", temperature, 0, float("inf"), open_low=True, closed_high=False
    )
    student = jax.nn.log_softmax(_numerics.wide(student_logits) / t)
    teacher = jax.nn.log_softmax(_numerics.wide(lax.stop_gradient(teacher_logits)) / t)
    # A class of probability 0 counts nothing, though its logit is infinite.
    apart = jnp.where(teacher > -jnp.inf, teacher - student, 0)
    kl = jnp.sum(jnp.exp(teacher) * apart, axis=-1)
    return t**2 * jnp.mean(kl)


def _when_due(
    rule: SharpnessRule,
    state: RuleState,
    full: Callable[[Any], Any],
    skip: Callable[[Any], Any],
    g: Any,
) -> Any:
    """All evaluations where they are due, one elsewhere."""
    if rule.due is None:
        return full(g)
    return lax.cond(rule.due(state), full, skip, g)


def _names(axes: str | Sequence[str] | None) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _ascent_axes(perturbation: Any, axes: tuple[str, ...]) -> tuple[str, ...]:
    """The axes over which the ascent is averaged.

    Raises:
      ValueError: If there is none, or one that is not mapped.
    """
    if perturbation == "local":
        return ()
    if perturbation == "global" and not axes:
        raise ValueError(
            "perturbation='global' averages the ascent over axis_name, and there is "
            "none; pass axis_name= inside shard_map or pmap. Under plain jit leave "
            "perturbation out: there gradients are those of the whole batch."
        )
    found = axes if perturbation == "global" else _names(perturbation)
    if not found or not set(found) <= set(axes):
        raise ValueError(
            f"perturbation must be 'local', 'global' or axes out of axis_name={axes}, "
            f"got {perturbation!r}."
        )
    return found


def _mean(tree: Any, axes: tuple[str, ...]) -> Any:
    """The mean over mapped axes."""
    if not axes:
        return tree
    return jax.tree.map(
        lambda g: lax.pmean(g, axes) if _leaves.is_float(g) else g, tree
    )
