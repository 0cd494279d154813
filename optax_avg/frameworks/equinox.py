"""Averages, sharpness and statistics of normalisation for models of Equinox.

    grads of value_and_grad(loss, rule) = combine(g_0, g_1, ...),
    g_i = gradient at x + probe(i, g_0, ..., g_{i-1})

The functions take and give whole models, where :mod:`optax_avg` has trees of
parameters.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from optax_avg import _mesh, _mixups
from optax_avg.averages.readout import averaged_params
from optax_avg.frameworks import _memory, _pooling
from optax_avg.sharpness import RuleState, SharpnessRule
from optax_avg.sharpness.forms import Perturbation, sharpness_aware

__all__ = [
    "ValueAndGrad",
    "averaged_model",
    "recompute_batch_stats",
    "value_and_grad",
]

Model = TypeVar("Model")
Out = Any  # the value, a scalar, or (value, aux) with has_aux


class ValueAndGrad(Protocol):
    """What :func:`value_and_grad` returns: a function with one attribute.

    Attributes:
      init: ``model -> rule_state``, the state of the rule before the first step.
    """

    init: Callable[[Any], RuleState]

    def __call__(
        self,
        model: Any,
        *args: Any,
        rule_state: RuleState | None = None,
        **kwargs: Any,
    ) -> Any:
        """Returns the value (with aux) and the gradient, and the state if one came."""
        ...


def averaged_model(
    model: Model,
    opt_state: Any,
    name: str | None = None,
    *,
    filter_spec: Any = eqx.is_inexact_array,
) -> Model:
    """The model with the averaged parameters in place of its own.

    Args:
      model: The model that is trained.
      opt_state: State of the optimizer.
      name: Name of the average. It may be left out if there is just one.
      filter_spec: What the optimizer trains, as in ``tx.init(eqx.filter(model,
        filter_spec))``.

    Returns:
      The model to evaluate. All that is not averaged comes from ``model``.

    Raises:
      ValueError: If there is no such average, or several and no ``name``.

    Example:
      >>> import equinox as eqx, jax, jax.numpy as jnp, optax, optax_avg as oa
      >>> model = eqx.nn.Linear(1, 1, use_bias=False, key=jax.random.key(0))
      >>> model = eqx.tree_at(lambda m: m.weight, model, jnp.array([[4.0]]))
      >>> tx = optax.chain(optax.sgd(1.0), oa.polyak_average())
      >>> state = tx.init(eqx.filter(model, eqx.is_inexact_array))
      >>> for _ in range(3):  # to 3, 2 and 1
      ...     grads = eqx.filter_grad(lambda model: model.weight.sum())(model)
      ...     params = eqx.filter(model, eqx.is_inexact_array)
      ...     updates, state = tx.update(grads, state, params)
      ...     model = eqx.apply_updates(model, updates)
      >>> average = oa.frameworks.equinox.averaged_model(model, state)
      >>> float(average.weight[0, 0]), float(model.weight[0, 0])
      (2.0, 1.0)
    """
    params, rest = eqx.partition(model, filter_spec)
    return eqx.combine(averaged_params(opt_state, params, name), rest)


def value_and_grad(
    loss: Callable[..., Any],
    rule: SharpnessRule,
    *,
    has_aux: bool = False,
    axis_name: _mesh.AxisName | None = None,
    perturbation: Perturbation = "local",
) -> ValueAndGrad:
    """A drop-in for ``eqx.filter_value_and_grad`` whose gradient follows a rule.

    All passes of a step get the same arguments, keys and ``eqx.nn.State`` among them.
    Value and aux are those of the first pass, at the clean parameters (except for
    ``momentum_sam``): a state that the loss returns as aux has seen that pass only.

    Args:
      loss: ``(model, *args, **kwargs) -> value``, or ``(value, aux)`` with ``has_aux``.
      rule: A rule from :mod:`optax_avg.rules`. Radii and ``where`` can be trees like
        ``eqx.filter(model, eqx.is_inexact_array)``.
      has_aux: Whether ``loss`` returns an aux.
      axis_name: Mapped axis or axes over which gradients and value are averaged.
      perturbation: Over which of them the ascent is averaged, as in
        :func:`optax_avg.sharpness_aware`.

    Returns:
      A function: ``value, grads = sharp(model, *args)``. A rule with a memory or a
      schedule has a state, which then comes third: ``rule_state = sharp.init(model)``,
      ``value, grads, rule_state = sharp(model, *args, rule_state=rule_state)``.

    Raises:
      TypeError: If ``rule`` is no rule, or ``loss`` cannot be called.
      ValueError: If ``perturbation`` names no axis. The returned function raises it if
        a rule that needs its state gets none, or that of another rule.

    Example:
      >>> import equinox as eqx, jax, jax.numpy as jnp, optax_avg as oa
      >>> model = eqx.nn.Linear(1, 1, use_bias=False, key=jax.random.key(0))
      >>> model = eqx.tree_at(lambda m: m.weight, model, jnp.array([[2.0]]))
      >>> loss = lambda model: 0.5 * model.weight[0, 0] ** 2
      >>> sharp = oa.frameworks.equinox.value_and_grad(loss, oa.rules.sam(0.5))
      >>> value, grads = sharp(model)
      >>> float(value), float(grads.weight[0, 0])
      (2.0, 2.5)

    References:
      Foret et al., "Sharpness-Aware Minimization for Efficiently Improving
      Generalization", 2021, 2010.01412.
    """
    call = "oa.frameworks.equinox.value_and_grad(loss, rule)"
    _mixups.refuse_swapped("value_and_grad", rule, loss, call)
    _mixups.refuse_no_rule("value_and_grad", rule)
    _mixups.refuse_no_function("loss", loss)

    def at(params, rest, args, kwargs):
        # A pass uses up an eqx.nn.State, so that each gets its own.
        args, kwargs = jax.tree.map(lambda x: x, (args, kwargs))
        whole = lambda params: loss(eqx.combine(params, rest), *args, **kwargs)
        return eqx.filter_value_and_grad(whole, has_aux=has_aux)(params)

    inner = sharpness_aware(
        at, rule, has_aux=has_aux, axis_name=axis_name, perturbation=perturbation
    )

    def sharp(model, *args, rule_state=None, **kwargs):
        params, rest = eqx.partition(model, eqx.is_inexact_array)
        if rule_state is not None:
            wanted = jax.eval_shape(inner.init, params)
            _memory.refuse_other_state(*map(jax.tree.leaves, (rule_state, wanted)))
            return inner(params, rule_state, rest, args, kwargs)
        _memory.refuse_forgetting(
            rule,
            params,
            "rule_state = sharp.init(model) before training, and "
            "value, grads, rule_state = sharp(model, *args, rule_state=rule_state)",
        )
        return inner(params, inner.init(params), rest, args, kwargs)[:2]

    named: Any = sharp
    named.init = lambda model: inner.init(eqx.filter(model, eqx.is_inexact_array))
    return named


def recompute_batch_stats(
    model: Any,
    state: eqx.nn.State,
    batches: Iterable[Any],
    forward: Callable[[Any, eqx.nn.State, Any], eqx.nn.State] | None = None,
    *,
    exact: bool = False,
) -> eqx.nn.State:
    """Computes the running statistics of ``eqx.nn.BatchNorm`` anew, from data.

        mean = sum_b n_b mean_b / n,
        var = sum_b n_b (var_b + (mean_b - mean)^2) / n

    These are mean and variance of the values of all batches together, whatever the
    sizes of the batches and the momentum of the layers. Averaged parameters need them:
    the statistics that training leaves belong to the live parameters.

    Layers normalise by their batch, in both modes, and so the layers after them depend
    on how the data are cut into batches; the rest of the model is as
    ``eqx.nn.inference_mode`` makes it. A layer that is called several times sees the
    values of all calls. Layers join all axes that their ``axis_name`` names.

    Args:
      model: The model.
      state: Its state. It stays valid.
      batches: One pass of data; an iterator will do. They go through ``jax.jit``.
      forward: ``(model, state, batch) -> state`` after the call. By default the model
        is called as ``model(x, state)`` on each example of the batch. For batches
        ``(x, y)`` pass the ``x`` alone, such as ``(x for x, y in batches)``.
      exact: Whether every layer sees its inputs as in evaluation, where the layers
        before it normalise by the statistics of the population. Takes as many passes
        and compilations as there are layers, and ``batches`` that can be read again.

    Returns:
      The state with new statistics. Training can go on from it.

    Raises:
      TypeError: If it is called under ``jax.jit``, or ``forward`` returns something
        else than a state.
      ValueError: If there is no batch, a batch passes no layer of normalisation, or
        ``forward`` is needed.

    Example:
      >>> import equinox as eqx, jax.numpy as jnp, optax_avg as oa
      >>> model, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
      ...     1, axis_name="batch", mode="batch"
      ... )
      >>> batches = [jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[10.0], [20.0]])]
      >>> state = oa.frameworks.equinox.recompute_batch_stats(model, state, batches)
      >>> mean, var = state.get(model.batch_state_index)
      >>> round(float(mean[0]), 4), round(float(var[0]), 4)
      (7.2, 50.96)
    """
    layers = {_index(layer).marker: layer for layer in _norm_layers(model)}
    run = _over_examples(layers.values()) if forward is None else forward
    still = eqx.nn.inference_mode(model)

    def sweep(stats, names, start, batches):
        order: list[Any] = []
        pools = {
            name: eqx.nn.StateIndex(_pooling.empty_pool(stats[name][0]))
            for name in names
        }
        entries = _entries(state)
        for name, layer in layers.items():
            record = name in names
            entries[name] = (
                tuple(_pooling.started(x, start) for x in stats[name])
                if record
                else stats[name]
            )
            entries |= _settled(layer, entries, to_record=record)
        entries |= {index.marker: index.init for index in pools.values()}
        recording = jax.tree.map(
            lambda node: _recording(node, pools, order) if _is_norm(node) else node,
            still,
            is_leaf=_is_norm,
        )
        step = eqx.filter_jit(run)
        moving = _state_of(entries)
        for batch in batches:
            moving = step(recording, moving, batch)
            if not isinstance(moving, eqx.nn.State):
                raise TypeError(
                    "forward must return the state after the call alone. It returned "
                    f"{type(moving).__name__}; of (out, state) take the second."
                )
        return {name: moving.get(index) for name, index in pools.items()}, order

    before = _entries(state)
    stats = {name: before[name] for name in layers}
    found = _pooling.population(sweep, stats, batches, exact)
    for name, layer in layers.items():
        before |= {name: found[name], **_settled(layer, before, to_record=False)}
    return _state_of(before)


@functools.cache
def _recording_kind(kind: Any) -> Any:
    """The class of a layer whose pool absorbs what it sees, while its statistics stay.

    It may be one of the user's, derived from ``eqx.nn.BatchNorm``.
    """

    class Recording(kind):
        pool: Any  # where in the state its pool is; None: it uses the statistics it has
        called: Callable[[], None] = eqx.field(static=True)

        def __call__(self, x, state, *args, **kwargs):
            kwargs.pop("inference", None)  # the attribute says it
            self.called()
            if self.pool is None:
                return super().__call__(x, state, *args, **kwargs)
            index = _index(self)
            start = state.get(index)
            out, state = super().__call__(x, state, *args, **kwargs)
            count = x.size / self.input_size * lax.psum(1, self.axis_name)
            seen = _pooling.absorbed(state.get(self.pool), count, *state.get(index))
            state = state.set(self.pool, seen).set(index, start)
            if self.ema_first_time_index is not None:
                state = state.set(self.ema_first_time_index, jnp.array(True))
            return out, state

    return Recording


def _recording(layer: Any, pools: Any, order: list[Any]) -> Any:
    """The same layer, which records if it has a pool."""
    marker = _index(layer).marker
    new = object.__new__(_recording_kind(type(layer)))
    pool = pools.get(marker)
    fields = {
        **vars(layer),
        "inference": pool is None,
        "pool": pool,
        "called": functools.partial(order.append, marker),
    }
    for name, value in fields.items():
        object.__setattr__(new, name, value)
    return new


def _is_norm(node: Any) -> bool:
    return isinstance(node, eqx.nn.BatchNorm)


def _norm_layers(model: Any) -> list[Any]:
    return [node for node in jax.tree.leaves(model, is_leaf=_is_norm) if _is_norm(node)]


def _index(layer: Any) -> Any:
    """Where in the state the statistics of a layer are."""
    if layer.ema_state_index is None:
        return layer.batch_state_index
    return layer.ema_state_index


def _settled(layer: Any, entries: Any, to_record: bool) -> dict[Any, jax.Array]:
    """What a layer keeps beside its statistics so that these are taken as they are."""
    if layer.ema_first_time_index is not None:
        marker = layer.ema_first_time_index.marker
        return {marker: jnp.full_like(entries[marker], to_record)}
    # Inference divides by 1 - momentum^counter, which is 1 then, and stays so.
    marker = layer.batch_counter.marker
    return {marker: jnp.full_like(entries[marker], 2**30)}


def _entries(state: eqx.nn.State) -> dict[Any, Any]:
    values, markers = state.tree_flatten()
    return dict(zip(markers, values, strict=True))


def _state_of(entries: dict[Any, Any]) -> eqx.nn.State:
    return eqx.nn.State.tree_unflatten(tuple(entries), tuple(entries.values()))


def _over_examples(layers: Iterable[Any]) -> Callable[[Any, Any, Any], Any]:
    """Calls a model on each example, over the axis that its layers name.

    Raises:
      ValueError: If they name several.
    """
    names = {layer.axis_name for layer in layers if isinstance(layer.axis_name, str)}
    if len(names) > 1 or any(not isinstance(each.axis_name, str) for each in layers):
        raise ValueError(
            "the layers join several axes; pass forward=, a function (model, state, "
            "batch) -> state that maps them by jax.vmap(..., axis_name=...)."
        )
    (name,) = names or {None}

    def forward(model, state, batch):
        each = jax.vmap(model, axis_name=name, in_axes=(0, None), out_axes=(0, None))
        return each(batch, state)[1]

    return forward
