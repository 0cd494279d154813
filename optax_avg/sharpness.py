"""Gradients at perturbed parameters, from one rule in three forms.

    g_i = gradient at x + probe(i, g_0, ..., g_{i-1}),
    result = combine(g_0, g_1, ...)

:func:`sharpness_aware` wraps a ``value_and_grad`` function and is the form to take;
:func:`as_link` makes a rule the first link of an Optax chain;
:func:`optax_avg.multi_call` serves trainers that compute one gradient a call. The rules
are in :mod:`optax_avg.rules`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_avg import _mixups, _sight, _tree

Grads = Sequence[Any]


class RuleState(NamedTuple):
    """What a rule carries from step to step.

    Attributes:
      rule_step: int32, optimizer steps seen, on which radii are scheduled; at the
        largest integer it goes back by the rule's ``period``.
      rule_memory: the rule's own trees, ``()`` for most.
    """

    rule_step: jax.Array
    rule_memory: Any


class SharpnessRule(NamedTuple):
    """A method, written once.

    Gradients are in float32 or wider, structured like the parameters, None where there
    is no gradient.

    Attributes:
      num_evals: evaluations per step, static.
      probe: ``(i, params, grads[:i], state) -> offset`` of evaluation ``i``, None for
        the parameters themselves.
      combine: ``(params, grads, state) -> (gradient, memory)``.
      init_memory: ``params -> memory``.
      direction: ``(i, params, grads[:i], state) -> tree`` or None; where it is a tree,
        evaluation ``i`` is the Hessian-vector product along it.
      num_ascents: leading evaluations that make offsets and directions. An
        ``ascent_fn`` of :func:`sharpness_aware` takes them.
      in_result: which of these leading evaluations ``combine`` needs of the loss, None
        for all. With an ``ascent_fn`` each of them is taken twice: ``probe`` and
        ``direction`` get the gradient of the ascent, ``combine`` that of the loss.
      due: ``state -> bool``, whether this step takes all evaluations; None for always.
      skip: ``(params, g_0, state) -> (gradient, memory)`` of a step that is not due.
      period: steps after which what is due at some of them comes round again.
    """

    num_evals: int
    probe: Callable[[int, Any, Grads, RuleState], Any]
    combine: Callable[[Any, Grads, RuleState], tuple[Any, Any]]
    init_memory: Callable[[Any], Any] = lambda params: ()
    direction: Callable[[int, Any, Grads, RuleState], Any] = lambda *_: None
    num_ascents: int = 1
    in_result: tuple[int, ...] | None = None
    due: Callable[[RuleState], Any] | None = None
    skip: Callable[[Any, Any, RuleState], tuple[Any, Any]] | None = None
    period: Any = 1

    @property
    def init(self) -> Any:
        """Raises: Optax asks for it where a rule stands in place of a link."""
        raise AttributeError(_mixups.RULE_FOR_LINK)


class SharpnessAware(Protocol):
    """What :func:`sharpness_aware` returns."""

    init: Callable[[Any], RuleState]

    def __call__(
        self, params: Any, state: RuleState, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, RuleState]:
        """Returns the value (with aux), the gradient and the next state."""
        ...


def init_state(rule: SharpnessRule, params: Any) -> RuleState:
    """The state of a rule before the first step.

    Raises:
      ValueError: If a leaf is complex.
    """
    _tree.refuse_complex("a sharpness rule", params)
    init = lambda params: RuleState(jnp.zeros([], jnp.int32), rule.init_memory(params))
    state: Any = _tree.shapes_for_shapes(init)(params)
    return state


def displaced(params: Any, offset: Any) -> Any:
    """``x + d`` in the dtype of ``x``; ``x`` itself where there is no offset."""
    if offset is None:
        return params

    def one(x, d):
        if d is None:
            return x
        return (_tree.wide(x) + lax.stop_gradient(d)).astype(x.dtype)

    return jax.tree.map(one, params, offset)


def widened(grads: Any, params: Any) -> Any:
    """Gradients in float32 or wider, None where a leaf has none."""
    return _tree.over(lambda g: _tree.wide(g), params, grads)


def evaluate(
    rule: SharpnessRule,
    grad_at: Callable[[Any], Any],
    params: Any,
    state: RuleState,
    grads: Grads = (),
    ascents: Grads = (),
    ascent_at: Callable[[Any], Any] | None = None,
) -> list[Any]:
    """All gradients of a step that ``combine`` gets.

    Args:
      rule: whose step.
      grad_at: from parameters to the loss's gradient.
      params: ``x``.
      state: of the rule.
      grads: the first ones, for ``combine``.
      ascents: the first ones, for ``probe`` and ``direction``.
      ascent_at: from parameters to the gradient of the ascent, if it is another.

    Returns:
      As many gradients as the rule has evaluations.
    """
    grads, ascents = list(grads), list(ascents)
    for i in range(len(grads), rule.num_evals):
        x = displaced(params, rule.probe(i, params, ascents, state))
        along = rule.direction(i, params, ascents, state)

        def taken(at, x=x, along=along):
            g = at(x) if along is None else _hessian_product(at, x, along)
            return widened(g, params)

        if ascent_at is None or i >= rule.num_ascents:
            ascents.append(taken(grad_at))
            grads.append(ascents[-1])
        else:
            ascents.append(taken(ascent_at))
            grads.append(taken(grad_at) if _in_result(rule, i) else ascents[-1])
    return grads


def _in_result(rule: SharpnessRule, i: int) -> bool:
    return rule.in_result is None or i in rule.in_result


def advanced(
    rule: SharpnessRule, state: RuleState, memory: Any, grads: Grads
) -> RuleState:
    """The next state; memory keeps its value where a gradient is not finite."""
    step = _tree.advance_clock(state.rule_step, rule.period)
    if jax.tree.leaves(memory):
        finite = _tree.all_finite(list(grads))
        memory = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), memory, state.rule_memory
        )
    return RuleState(step, memory)


WITHOUT_PRODUCTS = (
    "rules of gradients alone, such as gam() in place of gam_hvp() and "
    "gradient_regularisation(scheme='central') in place of 'exact'"
)


def _hessian_product(grad_at: Callable[[Any], Any], x: Any, along: Any) -> Any:
    """``H(x) v``, forward over reverse."""
    leaves, structure = jax.tree.flatten(x)
    tangents = structure.flatten_up_to(along)
    moving = [i for i, v in enumerate(tangents) if v is not None]

    def of(values):
        changed = list(leaves)
        for i, value in zip(moving, values, strict=True):
            changed[i] = value
        return grad_at(structure.unflatten(changed))

    tangent = [tangents[i].astype(leaves[i].dtype) for i in moving]
    # Inside shard_map a local direction makes the point local too.
    primal = [
        _tree.vary(leaves[i], _tree.varying_axes(v))
        for i, v in zip(moving, tangent, strict=True)
    ]
    return _tree.derivative_along(of, primal, tangent, WITHOUT_PRODUCTS)


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
                x = jax.tree.map(lambda leaf: _tree.vary(leaf, axes), x)
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
        _tree.require_params(name, params)
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
    t = _tree.within(
        "temperature", temperature, 0, float("inf"), open_low=True, closed_high=False
    )
    student = jax.nn.log_softmax(_tree.wide(student_logits) / t)
    teacher = jax.nn.log_softmax(_tree.wide(lax.stop_gradient(teacher_logits)) / t)
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


def skipping(rule: SharpnessRule) -> Callable[[Any, Any, RuleState], tuple[Any, Any]]:
    """What a step does that is not due: the plain gradient unless the rule says."""
    return rule.skip or (lambda params, g, state: (g, state.rule_memory))


def like(gradient: Any, g: Any) -> Any:
    """The gradient in the structure and dtypes in which gradients come."""
    return jax.tree.map(
        lambda g, new: g if new is None else new.astype(g.dtype),
        g,
        gradient,
        is_leaf=lambda leaf: leaf is None,
    )


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
    return jax.tree.map(lambda g: lax.pmean(g, axes) if _tree.is_float(g) else g, tree)


def refuse_masked(name: str, tree: Any) -> None:
    """The loss cannot be called on a masked tree."""
    leaves = jax.tree.leaves(tree, is_leaf=_tree.is_masked)
    if any(_tree.is_masked(leaf) for leaf in leaves):
        raise ValueError(
            f"{name} cannot stand inside optax.masked or optax.partition; pass mask= "
            "to the rule, or use sharpness_aware before the chain."
        )
