"""Averages, sharpness and statistics of normalisation for models of Flax nnx.

    grads of value_and_grad(loss_fn, rule) = combine(g_0, g_1, ...),
    g_i = gradient at x + probe(i, g_0, ..., g_{i-1})

The functions take and give whole models, where :mod:`optax_avg` has trees of
parameters.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
from flax import nnx

from optax_avg import _mesh, _mixups
from optax_avg.averages.readout import averaged_params
from optax_avg.frameworks import _memory, _pooling
from optax_avg.sharpness import SharpnessRule
from optax_avg.sharpness.forms import Perturbation, sharpness_aware

__all__ = [
    "RuleVariable",
    "ValueAndGrad",
    "averaged_model",
    "recompute_batch_stats",
    "value_and_grad",
]

Model = TypeVar("Model", bound=nnx.Module)
Out = Any  # the value, a scalar, or (value, aux) with has_aux


class RuleVariable(nnx.Variable):
    """One array of the state of a sharpness rule."""


class ValueAndGrad(Protocol):
    """What :func:`value_and_grad` returns: a function with one attribute.

    Attributes:
      init: ``model -> rule_state``, the variables of the rule before the first step.
    """

    init: Callable[[Any], tuple[RuleVariable, ...]]

    def __call__(
        self,
        model: Any,
        *args: Any,
        rule_state: tuple[RuleVariable, ...] | None = None,
        **kwargs: Any,
    ) -> tuple[Out, Any]:
        """Returns the value (with aux) and the gradient."""
        ...


def averaged_model(model: Model, optimizer: Any, name: str | None = None) -> Model:
    """A copy of a model that has the averaged parameters.

    What the optimizer does not train is copied from the model: statistics of
    normalisation, keys of random numbers, frozen parameters, and whether it is in the
    mode of training. The statistics belong to the parameters of training; see
    :func:`recompute_batch_stats`. Nothing is shared with the model, which stays as it
    is. Works inside ``nnx.jit``.

    Args:
      model: The model that is trained.
      optimizer: Its ``nnx.Optimizer``, whose ``wrt`` says which variables it trains.
      name: Name of the average. It may be left out if there is just one.

    Returns:
      The model to evaluate.

    Raises:
      TypeError: If ``optimizer`` is no ``nnx.Optimizer``.
      ValueError: If there is no such average, or several and no ``name``.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> from flax import nnx
      >>> model = nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))
      >>> model.kernel[...] = jnp.array([[4.0]])
      >>> tx = optax.chain(optax.sgd(1.0), oa.polyak_average())
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> for _ in range(3):  # to 3, 2 and 1
      ...     grads = nnx.grad(lambda model: model.kernel[...].sum())(model)
      ...     _ = optimizer.update(model, grads)
      >>> average = oa.frameworks.nnx.averaged_model(model, optimizer)
      >>> float(average.kernel[0, 0]), float(model.kernel[0, 0])
      (2.0, 1.0)
    """
    if not hasattr(optimizer, "wrt"):
        raise TypeError(
            "averaged_model needs the nnx.Optimizer, which knows the variables that it "
            f"trains. It got {type(optimizer).__name__}; of an optimizer state call "
            "oa.averaged_params(opt_state, nnx.state(model, nnx.Param))."
        )
    graphdef, params, rest = nnx.split(model, optimizer.wrt, ...)
    averages = averaged_params(optimizer, params, name)
    # Parameters that the average leaves out come from the model.
    averages, rest = jax.tree.map(_copied, (averages, rest))
    return nnx.merge(graphdef, averages, rest, copy=True)


def _copied(leaf: Any) -> Any:
    """An array of its own, so that the other one may be donated."""
    return leaf.copy() if hasattr(leaf, "copy") else leaf


def value_and_grad(
    loss_fn: Callable[..., Any],
    rule: SharpnessRule,
    *,
    has_aux: bool = False,
    wrt: Any = nnx.Param,
    axis_name: _mesh.AxisName | None = None,
    perturbation: Perturbation = "local",
) -> ValueAndGrad:
    """A drop-in for ``nnx.value_and_grad`` whose gradient follows a sharpness rule.

    All passes of a step start from the same model, and so draw the same numbers in
    Dropout. What the first pass changes in the model and in other modules among the
    arguments is kept: statistics of normalisation and counts of keys. That pass is at
    the clean parameters, except for ``momentum_sam``. What the other passes change is
    forgotten, and so are variables that a pass creates.

    Args:
      loss_fn: ``(model, *args, **kwargs) -> value``, or ``(value, aux)`` with
        ``has_aux``.
      rule: A rule from :mod:`optax_avg.rules`. Radii and ``where`` can be trees like
        ``nnx.state(model, wrt)``.
      has_aux: Whether ``loss_fn`` returns an aux.
      wrt: Filter of the variables to differentiate, as for ``nnx.Optimizer``.
      axis_name: Mapped axis or axes over which gradients and value are averaged.
      perturbation: Over which of them the ascent is averaged, as in
        :func:`optax_avg.sharpness_aware`.

    Returns:
      A function: ``value, grads = sharp(model, *args)``; then
      ``optimizer.update(model, grads)``. A rule with a memory or a schedule has
      variables, which a step changes in place: ``rule_state = sharp.init(model)``,
      ``sharp(model, *args, rule_state=rule_state)``.

    Raises:
      TypeError: If ``rule`` is no rule, or ``loss_fn`` cannot be called.
      ValueError: If ``perturbation`` names no axis. The returned function raises it if
        a rule that needs its variables gets none, or those of another rule.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> from flax import nnx
      >>> model = nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))
      >>> model.kernel[...] = jnp.array([[2.0]])
      >>> loss_fn = lambda model: 0.5 * model.kernel[0, 0] ** 2
      >>> sharp = oa.frameworks.nnx.value_and_grad(loss_fn, oa.rules.sam(0.5))
      >>> value, grads = sharp(model)
      >>> float(value), float(grads["kernel"][0, 0])
      (2.0, 2.5)

    References:
      Foret et al., "Sharpness-Aware Minimization for Efficiently Improving
      Generalization", 2021, 2010.01412.
    """
    call = "oa.frameworks.nnx.value_and_grad(loss_fn, rule)"
    _mixups.refuse_swapped("value_and_grad", rule, loss_fn, call)
    _mixups.refuse_no_rule("value_and_grad", rule)
    _mixups.refuse_no_function("loss_fn", loss_fn)

    def at(params, rest, pieces):
        def loss(params):
            nodes = nnx.merge(pieces.graphdef, nnx.State({0: params}), rest, copy=True)
            args, kwargs = _arguments(pieces, nodes[1:])
            out = loss_fn(nodes[0], *args, **kwargs)
            value, aux = out if has_aux else (out, None)
            return value, (aux, nnx.state(nodes, pieces.is_rest))

        return jax.value_and_grad(loss, has_aux=True)(params)

    inner = sharpness_aware(
        at, rule, has_aux=True, axis_name=axis_name, perturbation=perturbation
    )

    def sharp(model, *args, rule_state=None, **kwargs):
        pieces, params, rest = _taken_apart(model, args, kwargs, wrt)
        start = inner.init(params)
        if rule_state is None:
            _memory.refuse_forgetting(
                rule,
                params,
                "rule_state = sharp.init(model) before training, and "
                "sharp(model, *args, rule_state=rule_state)",
            )
        else:
            start = _given(rule_state, start)
        (value, (aux, after)), grads, state = inner(params, start, rest, pieces)
        nnx.update(pieces.nodes, _known(after, rest))
        if rule_state is not None:
            for variable, leaf in zip(rule_state, jax.tree.leaves(state), strict=True):
                variable[...] = leaf
        return ((value, aux) if has_aux else value), grads

    def init(model):
        state = inner.init(nnx.state(model, wrt))
        return tuple(RuleVariable(leaf) for leaf in jax.tree.leaves(state))

    named: Any = sharp
    named.init = init
    return named


def _given(rule_state: Any, start: Any) -> Any:
    """The state in variables, in the structure of one before the first step.

    Raises:
      ValueError: If the variables are not those of this rule.
    """
    leaves, structure = jax.tree.flatten(start)
    given = jax.tree.leaves(rule_state, is_leaf=_is_node)
    _memory.refuse_other_state(given, leaves)
    return structure.unflatten([variable[...] for variable in given])


class _Pieces(NamedTuple):
    """A call ``(model, *args, **kwargs)`` whose modules are taken out.

    Attributes:
      nodes: The model and all modules among the arguments.
      graphdef: Their structure.
      is_rest: Filter of ``nodes`` for all but the variables to differentiate.
      leaves: Leaves of ``(args, kwargs)``, modules among them.
      structure: Structure of ``(args, kwargs)``.
    """

    nodes: tuple[Any, ...]
    graphdef: Any
    is_rest: Any
    leaves: list[Any]
    structure: Any


def _taken_apart(model: Any, args: Any, kwargs: Any, wrt: Any) -> tuple[Any, Any, Any]:
    """The pieces of a call, the variables to differentiate, and all others.

    Raises:
      ValueError: If there is nothing to differentiate.
    """
    leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=_is_node)
    nodes = (model, *filter(_is_node, leaves))
    chosen = nnx.filterlib.to_predicate(wrt)
    is_param = lambda path, leaf: path[0] == 0 and chosen(path[1:], leaf)
    graphdef, params, rest = nnx.split(nodes, is_param, ...)
    if not jax.tree.leaves(params):
        raise ValueError(
            f"the model has no variable of wrt={wrt}; pass the filter that the "
            "nnx.Optimizer has."
        )
    pieces = _Pieces(nodes, graphdef, nnx.Not(is_param), leaves, structure)
    return pieces, params[0], rest


def _arguments(pieces: _Pieces, modules: Iterable[Any]) -> tuple[Any, Any]:
    """``(args, kwargs)`` with other modules in place of those of the call."""
    others = iter(modules)
    return pieces.structure.unflatten(
        [next(others) if _is_node(leaf) else leaf for leaf in pieces.leaves]
    )


def _is_node(x: Any) -> bool:
    """Whether something holds variables of Flax nnx, or is one."""
    return isinstance(x, (nnx.Pytree, nnx.Variable))


def _known(state: Any, before: Any) -> Any:
    """The entries of a state that were there before."""
    known = {path for path, _ in nnx.to_flat_state(before)}
    kept = [(path, x) for path, x in nnx.to_flat_state(state) if path in known]
    return nnx.from_flat_state(kept)


def recompute_batch_stats(
    model: Model,
    batches: Iterable[Any],
    forward: Callable[[Model, Any], Any] | None = None,
    *,
    exact: bool = False,
) -> Model:
    """Computes the running statistics of normalisation anew, from data.

        mean = sum_b n_b mean_b / n,
        var = sum_b n_b (var_b + (mean_b - mean)^2) / n

    These are mean and variance of the values of all batches together, whatever the
    sizes of the batches and the momentum of the layers. Averaged parameters need them:
    the statistics that training leaves belong to the live parameters.

    A layer of normalisation is a module with ``mean`` and ``var`` of type
    ``nnx.BatchStat``. Its first array argument is what it normalises. It normalises by
    its batch, and so the layers after it depend on how the data are cut into batches;
    the rest of the model is as ``model.eval()`` makes it, without Dropout. Values that
    an argument ``mask`` of the layer leaves out do not count; a layer that is called
    several times sees the values of all calls. Layers with an ``axis_name`` join these
    axes, if ``forward`` maps them.

    Args:
      model: The model. Its statistics are changed in place, nothing else is.
      batches: One pass of data; an iterator will do. They go through ``jax.jit``.
      forward: ``(model, batch) -> anything``, which calls the model; ``model(batch)``
        by default. For batches ``(x, y)`` it is ``lambda model, batch:
        model(batch[0])``.
      exact: Whether every layer sees its inputs as in evaluation, where the layers
        before it normalise by the statistics of the population. Takes as many passes
        and compilations as there are layers, and ``batches`` that can be read again.
        Needs layers that have ``use_running_average``.
        Layers that ``nnx.scan`` or ``nnx.vmap`` have stacked count as one.

    Returns:
      The same model.

    Raises:
      TypeError: If it is called under ``jax.jit``.
      ValueError: If there is no batch, a batch passes no layer of normalisation, or a
        layer does not follow its batch.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> from flax import nnx
      >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> batches = [jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[10.0], [20.0]])]
      >>> model = oa.frameworks.nnx.recompute_batch_stats(model, batches)
      >>> round(float(model.mean[0]), 4), round(float(model.var[0]), 4)
      (7.2, 50.96)
    """
    forward = (lambda model, batch: model(batch)) if forward is None else forward
    layers = _norm_layers(model)

    def sweep(stats, names, start, batches):
        copy = nnx.clone(model)
        copy.eval()
        order: list[Any] = []
        for name, layer in _norm_layers(copy).items():
            _start_to_record(layer, stats[name], name in names, start)
            layer.pool_call = functools.partial(order.append, name)
        step = nnx.jit(lambda copy, batch: _nothing(forward(copy, batch)))
        for batch in batches:
            step(copy, batch)
        recorded = _norm_layers(copy)
        return {name: _pool_of(recorded[name]) for name in names}, order

    stats = {name: (layer.mean[...], layer.var[...]) for name, layer in layers.items()}
    for name, found in _pooling.population(sweep, stats, batches, exact).items():
        layers[name].mean[...], layers[name].var[...] = found
    return model


def _norm_layers(model: Any) -> dict[Any, Any]:
    """The layers of normalisation by their paths."""
    return {
        path: module
        for path, module in nnx.iter_modules(model)
        if all(
            isinstance(getattr(module, name, None), nnx.BatchStat)
            for name in ("mean", "var")
        )
    }


def _start_to_record(layer: Any, stats: Any, record: bool, start: float) -> None:
    """Makes a layer record what it sees, or use the statistics that it has."""
    for variable, value in zip((layer.mean, layer.var), stats, strict=True):
        # An assignment to [...] would keep the dtype.
        variable.set_value(_pooling.started(value, start) if record else value)
    if record:
        for name, zeros in _pooling.empty_pool(stats[0])._asdict().items():
            setattr(layer, name, nnx.BatchStat(zeros))
    object.__setattr__(layer, "__class__", _recording(type(layer)))


@functools.cache
def _recording(kind: Any) -> Any:
    """The class of a layer, of which a call goes through :func:`_call_recorded`."""

    def call(self, *args, **kwargs):
        return _call_recorded(
            self, functools.partial(kind.__call__, self), args, kwargs
        )

    return type(kind)(kind.__name__, (kind,), {"__call__": call})


def _call_recorded(layer: Any, fn: Any, args: Any, kwargs: Any) -> Any:
    """Calls a layer; its pool absorbs the batch, its statistics stay as they are."""
    layer.pool_call()
    record = hasattr(layer, "pool_count")
    start = layer.mean[...], layer.var[...]
    out = _pooling.call_in_mode(layer, fn, args, kwargs, running=not record)
    if record:
        features = start[0].size
        count = _pooling.number_of_values(layer, fn, args, kwargs, features)
        seen = layer.mean[...], layer.var[...]
        pool = _pooling.absorbed(_pool_of(layer), count, *seen)
        for name, value in pool._asdict().items():
            getattr(layer, name)[...] = value
    layer.mean[...], layer.var[...] = start
    return out


def _pool_of(layer: Any) -> _pooling.Pool:
    return _pooling.Pool(*(getattr(layer, name)[...] for name in _pooling.Pool._fields))


def _nothing(_: Any) -> None:
    """What a step returns whose result is not needed."""
