"""Gradients at perturbed parameters, from one rule in three forms.

    g_i = gradient at x + probe(i, g_0, ..., g_{i-1}),
    result = combine(g_0, g_1, ...)

:func:`sharpness_aware` wraps a ``value_and_grad`` function; it suits most training
loops. :func:`as_link` makes a rule the first link of an Optax chain.
:func:`optax_avg.multi_call` serves trainers that compute one gradient per call. The
rules are in :mod:`optax_avg.rules`.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, Literal, Protocol

import jax
import optax
from jax import lax

from optax_avg import _checks, _leaves, _mesh, _mixups, _sight
from optax_avg.sharpness._rule import (
    GradientAt,
    Mean,
    RuleState,
    SharpnessRule,
    displaced,
    evaluate,
    finish,
    finish_plain,
    in_result,
    init_state,
    is_due,
    refuse_masked,
    when_due,
    widened,
)

__all__ = ["SharpnessAware", "as_link", "sharpness_aware"]

Out = Any  # the value, a scalar, or (value, aux) with has_aux
ValueAndGradFn = Callable[..., tuple[Out, optax.Updates]]
Perturbation = Literal["local", "global"] | _mesh.AxisName

_Evaluation = Callable[[optax.Params], tuple[Out, optax.Updates]]


class SharpnessAware(Protocol):
    """What :func:`sharpness_aware` returns: a function with three attributes.

    Attributes:
      init: ``params -> state``, the state before the first step.
      due: ``state -> bool``, whether the next step takes all evaluations of the rule.
      given: ``due -> function``, the same function for steps of which it is known
        whether they are due: without ``lax.cond``, for a program of its own.
    """

    init: Callable[[optax.Params], RuleState]
    due: Callable[[RuleState], jax.Array | bool]
    given: Callable[[bool], "SharpnessAware"]

    def __call__(
        self, params: optax.Params, state: RuleState, *args: Any, **kwargs: Any
    ) -> tuple[Out, optax.Updates, RuleState]:
        """Returns the value (with aux), the gradient and the next state."""
        ...


def sharpness_aware(
    value_and_grad_fn: ValueAndGradFn,
    rule: SharpnessRule,
    *,
    has_aux: bool = False,
    ascent_fn: ValueAndGradFn | None = None,
    axis_name: _mesh.AxisName | None = None,
    perturbation: Perturbation = "local",
) -> SharpnessAware:
    """Makes a drop-in for ``jax.value_and_grad`` whose gradient follows a rule.

    Value and aux are those of the first evaluation. It is at the clean parameters,
    except for ``momentum_sam``, which has no clean evaluation.

    With an ``ascent_fn``, rules whose result is the last gradient cost as much as
    without. ``gsam``, ``gnp``, ``wsam``, ``cr_sam``, ``gradient_regularisation``,
    ``gam_hvp`` and the SAM steps of ``look_sam`` take one gradient more, ``gam`` takes
    three more. A step that is not due costs one gradient of the loss and the value of
    ``ascent_fn``.

    Args:
      value_and_grad_fn: ``(params, *args, **kwargs) -> (value, grads)``, or
        ``((value, aux), grads)`` with ``has_aux``, as from ``jax.value_and_grad``.
      rule: A rule from :mod:`optax_avg.rules`.
      has_aux: Whether the functions return an aux.
      ascent_fn: Function like ``value_and_grad_fn`` for the ascent, such as the loss
        without L2 or on part of the batch. Offsets are made from its gradients, the
        result from those of the loss. Value and aux are then those of ``ascent_fn`` at
        the clean parameters.
      axis_name: Mapped axis or axes over which gradients and value are averaged.
      perturbation: ``"local"``: each device ascends along its own gradient
        (m-sharpness). ``"global"``: all ascend along the average over all axes. Names
        of axes: the ascent is averaged over these. Only ``"local"`` is possible without
        ``axis_name``: gradients are then used as they come, and under plain ``jit``
        they are those of the whole batch.

    Returns:
      A function with an attribute ``init``: ``state = sharp.init(params)``; ``out,
      grads, state = sharp(params, state, *args, **kwargs)``. ``out`` is the value, or
      ``(value, aux)`` with ``has_aux``. ``grads`` has the structure and dtypes of the
      gradients of ``value_and_grad_fn``. The attributes ``due`` and ``given`` choose
      between two programs outside of ``jit``, see the second example.

    Raises:
      ValueError: If ``perturbation`` names no axis, or ``ascent_fn`` is given to a rule
        of one evaluation. The returned function raises it if ``value_and_grad_fn`` does
        not return what it should, or ``axis_name`` is not mapped.
      TypeError: If ``rule`` is no rule, or a function cannot be called. The returned
        function raises it if its second argument is no state.

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x: 0.5 * x**2
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(loss), oa.rules.sam(0.5))
      >>> x = jnp.array(2.0)
      >>> value, grad, state = sharp(x, sharp.init(x))
      >>> float(value), float(grad)
      (2.0, 2.5)

      Two programs for a rule that is not always due. On CPU, gradients of convolutions
      are slow in one program with ``lax.cond``. ``bool`` waits for the step before; a
      loop that counts its steps may choose by its own count.

      >>> rule = oa.rules.look_sam(0.5, k=3)
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(loss), rule)
      >>> steps = {due: jax.jit(sharp.given(due)) for due in (True, False)}
      >>> state, taken = sharp.init(x), []
      >>> for _ in range(4):
      ...     taken.append(bool(sharp.due(state)))
      ...     value, grad, state = steps[taken[-1]](x, state)
      >>> taken
      [True, False, False, True]

    References:
      Foret et al., "Sharpness-Aware Minimization for Efficiently Improving
      Generalization", 2021, 2010.01412. Each rule names its own paper.
    """
    call = "oa.sharpness_aware(jax.value_and_grad(loss), rule)"
    _mixups.refuse_swapped("sharpness_aware", rule, value_and_grad_fn, call)
    _mixups.refuse_no_rule("sharpness_aware", rule)
    _mixups.refuse_no_function("value_and_grad_fn", value_and_grad_fn)
    if ascent_fn is not None:
        _mixups.refuse_no_function("ascent_fn", ascent_fn)
    axes = _mesh.axis_names(axis_name)
    ascent_axes = _ascent_axes(perturbation, axes)
    if ascent_fn is not None and rule.num_evals < 2:
        raise ValueError(
            "this rule has one evaluation and takes no ascent_fn; leave ascent_fn out."
        )
    rest_axes = tuple(name for name in axes if name not in ascent_axes)
    mean = functools.partial(_mean, axes=rest_axes) if rest_axes else None

    def sharp(params, state: Any = None, *args, **kwargs):
        _mixups.refuse_no_rule_state(state)
        _mesh.require_mapped(axes)

        def evaluation(name, fn):
            def at(x):
                # Of replicated parameters shard_map would sum the gradients itself.
                x = jax.tree.map(lambda leaf: _mesh.vary(leaf, axes), x)
                found = fn(x, *args, **kwargs)
                _mixups.refuse_no_pair(name, found, params, has_aux)
                return found[0], _mean(found[1], ascent_axes)

            return at

        loss_at = evaluation("value_and_grad_fn", value_and_grad_fn)
        if ascent_fn is None:
            stepped = _step_of_one(rule, params, state, loss_at, mean)
        else:
            ascent_at = evaluation("ascent_fn", ascent_fn)
            stepped = _step_of_two(rule, params, state, loss_at, ascent_at, mean)
        out, gradient, state = stepped
        value, aux = out if has_aux else (out, None)
        value = _mean(value, axes)
        return ((value, aux) if has_aux else value), gradient, state

    def given(due):
        known = rule._replace(due=lambda state: bool(due))
        return sharpness_aware(
            value_and_grad_fn,
            known,
            has_aux=has_aux,
            ascent_fn=ascent_fn,
            axis_name=axis_name,
            perturbation=perturbation,
        )

    named: Any = sharp
    named.init = lambda params: init_state(rule, params)
    named.due = lambda state: is_due(rule, state)
    named.given = given
    return named


def _step_of_one(
    rule: SharpnessRule,
    params: optax.Params,
    state: RuleState,
    loss_at: _Evaluation,
    mean: Mean | None,
) -> tuple[Out, optax.Updates, RuleState]:
    """Value, gradient and next state of a step whose ascent is on the loss."""
    out, g = loss_at(_first_point(rule, params, state))

    def full(g):
        first = [widened(g, params)]
        grads = evaluate(rule, _gradient_of(loss_at), params, state, first, first)
        return finish(rule, params, state, grads, g, mean)

    def skip(g):
        return finish_plain(rule, params, state, g, mean)

    return out, *when_due(rule, state, full, skip, g)


def _step_of_two(
    rule: SharpnessRule,
    params: optax.Params,
    state: RuleState,
    loss_at: _Evaluation,
    ascent_at: _Evaluation,
    mean: Mean | None,
) -> tuple[Out, optax.Updates, RuleState]:
    """Value, gradient and next state of a step whose ascent is on another function."""
    start = _first_point(rule, params, state)

    def full(_):
        out, ascent = ascent_at(start)
        g = loss_at(start)[1] if in_result(rule, 0) else ascent
        grads = evaluate(
            rule,
            _gradient_of(loss_at),
            params,
            state,
            [widened(g, params)],
            [widened(ascent, params)],
            _gradient_of(ascent_at),
        )
        return out, *finish(rule, params, state, grads, g, mean)

    def skip(_):
        g = loss_at(start)[1]
        return ascent_at(start)[0], *finish_plain(rule, params, state, g, mean)

    return when_due(rule, state, full, skip, ())


def _first_point(
    rule: SharpnessRule, params: optax.Params, state: RuleState
) -> optax.Params:
    return displaced(params, rule.probe(0, params, (), state))


def _gradient_of(evaluation: _Evaluation) -> GradientAt:
    return lambda x: evaluation(x)[1]


def as_link(
    rule: SharpnessRule, name: str = "sharpness"
) -> optax.GradientTransformationExtraArgs:
    """Makes the first link of an Optax chain, which replaces the gradient.

    Args:
      rule: A rule from :mod:`optax_avg.rules`.
      name: Name of the link in error messages.

    Returns:
      A transformation whose ``update`` needs ``grad_fn=``, a function from parameters
      to gradients on the same batch. Inside ``optax.MultiSteps`` it must cover all
      micro-batches, because Optax calls the inner update at the last one only.

    Raises:
      ValueError: If ``update`` gets no ``params``, no ``grad_fn``, a masked tree, or
        something other than gradients.
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

    def init(params: optax.Params) -> RuleState:
        refuse_masked(name, params)
        return init_state(rule, params)

    def update(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        grad_fn: Any = None,  # checked below
        **extra_args: Any,
    ) -> tuple[optax.Updates, RuleState]:
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
            # The one gradient of momentum_sam is not at the clean parameters.
            first = () if rule.num_evals == 1 else [widened(g, params)]
            grads = evaluate(rule, grad_at, params, state, first, first)
            return finish(rule, params, state, grads, updates)

        def skip(g):
            return finish_plain(rule, params, state, g)

        return when_due(rule, state, full, skip, updates)

    return optax.GradientTransformationExtraArgs(init, update)


def _ascent_axes(
    perturbation: Perturbation, axes: tuple[Hashable, ...]
) -> tuple[Hashable, ...]:
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
    found = axes if perturbation == "global" else _mesh.axis_names(perturbation)
    if not found or not set(found) <= set(axes):
        raise ValueError(
            f"perturbation must be 'local', 'global' or axes out of axis_name={axes}, "
            f"got {perturbation!r}."
        )
    return found


def _mean(tree: Any, axes: tuple[Hashable, ...]) -> Any:
    """The mean of the float leaves over mapped axes."""
    if not axes:
        return tree
    return jax.tree.map(
        lambda g: lax.pmean(g, axes) if _leaves.is_float(g) else g, tree
    )
