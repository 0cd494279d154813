"""Averages and statistics of normalisation for Flax linen.

state.apply_gradients(grads=grads, grad_fn=grad_fn) hands ``grad_fn`` on:
updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import jax
import optax
from flax import core
from flax import linen as nn
from flax.training import train_state

from optax_avg.averages import readout
from optax_avg.frameworks import _pooling

__all__ = ["TrainState", "recompute_batch_stats"]

_STATS = "batch_stats"


class TrainState(train_state.TrainState):
    """Flax's ``TrainState`` that hands extra arguments on to the optimizer.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_avg as oa
      >>> loss = lambda params: 0.5 * params["w"] ** 2
      >>> tx = optax.chain(oa.sam(0.5), optax.sgd(1.0), oa.polyak_average())
      >>> state = oa.frameworks.linen.TrainState.create(
      ...     apply_fn=None, params={"w": jnp.array(2.0)}, tx=tx
      ... )
      >>> for _ in range(2):  # to 2 - 2.5, and from -0.5 to -0.5 + 1
      ...     grads = jax.grad(loss)(state.params)
      ...     state = state.apply_gradients(grads=grads, grad_fn=jax.grad(loss))
      >>> float(state.params["w"]), float(state.averaged_params()["w"])
      (0.5, 0.0)
    """

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> Self:
        """One step of the optimizer.

        Args:
          grads: Gradients like ``params``.
          **kwargs: Fields of the state to replace, such as ``batch_stats``. All others
            go to ``tx.update``, such as ``grad_fn`` and ``value``.

        Returns:
          The state after the step.

        Raises:
          TypeError: If there are extra arguments, and ``tx`` takes none, or
            ``batch_stats``, and the state has no such field.
        """
        fields = {field.name for field in dataclasses.fields(self)}
        extra = {name: x for name, x in kwargs.items() if name not in fields}
        replaced = {name: x for name, x in kwargs.items() if name in fields}
        tx = self.tx
        if not extra:
            return super().apply_gradients(grads=grads, **replaced)
        if _STATS in extra:
            raise TypeError(
                f"this state has no field {_STATS}, and an optimizer would forget it; "
                "derive a class from TrainState with a line batch_stats: Any."
            )
        if not isinstance(tx, optax.GradientTransformationExtraArgs):
            raise TypeError(
                f"{sorted(extra)} are no fields of the state, and this tx takes no "
                "extra arguments; leave them out, or put a link that takes them into "
                "optax.chain(...)."
            )
        given = optax.GradientTransformation(
            tx.init, functools.partial(tx.update, **extra)
        )
        stepped: Any = train_state.TrainState.apply_gradients(
            self.replace(tx=given), grads=grads, **replaced
        )
        return stepped.replace(tx=tx)

    def averaged_params(self, name: str | None = None) -> Any:
        """The averaged parameters, as :func:`optax_avg.averaged_params` finds them.

        Args:
          name: Name of the average. It may be left out if there is just one.

        Returns:
          A tree like ``params``.

        Raises:
          ValueError: If there is no such average, or several and no ``name``.
        """
        return readout.averaged_params(self.opt_state, self.params, name)


def recompute_batch_stats(
    apply_fn: Callable[..., Any],
    variables: Any,
    batches: Iterable[Any],
    *,
    exact: bool = False,
    **kwargs: Any,
) -> Any:
    """Computes the running statistics of normalisation anew, from data.

        mean = sum_b n_b mean_b / n,
        var = sum_b n_b (var_b + (mean_b - mean)^2) / n

    These are mean and variance of the values of all batches together, whatever the
    sizes of the batches and the momentum of the layers. Averaged parameters need them:
    the statistics that training leaves belong to the live parameters.

    A layer of normalisation is a module with variables ``mean`` and ``var`` in the
    collection ``batch_stats``. Its first array argument is what it normalises. It
    normalises by its batch, and so the layers after it depend on how the data are cut
    into batches. Layers that have ``use_running_average`` are switched to this
    whatever ``kwargs`` say; others must do so by ``kwargs``. Values that an argument
    ``mask`` of the layer leaves out do not count; a layer that is called several times
    sees the values of all calls. Layers with an ``axis_name`` join these axes, if
    ``apply_fn`` maps them.

    Args:
      apply_fn: ``model.apply``, or a function that is called like it:
        ``(variables, batch, mutable=["batch_stats"], **kwargs) -> (out, updated)``.
        For batches ``(x, y)`` it is ``lambda variables, batch, **kwargs:
        model.apply(variables, batch[0], **kwargs)``.
      variables: All variables, such as ``{"params": oa.averaged_params(opt_state,
        params), "batch_stats": batch_stats}``.
      batches: One pass of data; an iterator will do. They go through ``jax.jit``.
      exact: Whether every layer sees its inputs as in evaluation, where the layers
        before it normalise by the statistics of the population. Takes as many passes
        and compilations as there are layers, and ``batches`` that can be read again.
        Needs layers that have ``use_running_average``.
        Layers that ``nn.scan`` or ``nn.vmap`` have stacked count as one.
      **kwargs: Named arguments of the model, such as ``train=False``, with which it
        leaves out Dropout.

    Returns:
      The variables with new ``batch_stats``.

    Raises:
      TypeError: If it is called under ``jax.jit``.
      ValueError: If there is no batch, a batch passes no layer of normalisation, or a
        layer does not follow its batch.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> from flax import linen as nn
      >>> model = nn.BatchNorm(use_running_average=True)
      >>> batches = [jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[10.0], [20.0]])]
      >>> stats = {"mean": jnp.zeros(1), "var": jnp.ones(1)}
      >>> affine = {"scale": jnp.ones(1), "bias": jnp.zeros(1)}
      >>> variables = oa.frameworks.linen.recompute_batch_stats(
      ...     model.apply, {"params": affine, "batch_stats": stats}, batches
      ... )
      >>> stats = variables["batch_stats"]
      >>> round(float(stats["mean"][0]), 4), round(float(stats["var"][0]), 4)
      (7.2, 50.96)
    """
    collection = core.unfreeze(variables.get(_STATS, {}))

    def sweep(stats, names, start, batches):
        order: list[Any] = []

        def step(variables, recorded, batch):
            given = {**variables, _STATS: recorded}
            _, updated = apply_fn(given, batch, mutable=[_STATS], **kwargs)
            return core.unfreeze(updated[_STATS])

        step = jax.jit(step)
        recorded = _to_record(collection, stats, names, start)
        with nn.intercept_methods(_recorder(order)):
            for batch in batches:
                recorded = step(variables, recorded, batch)
        return {name: _pool_of(_at(recorded, name)) for name in names}, order

    found = _pooling.population(sweep, _norm_layers(collection), batches, exact)
    return core.copy(variables, {_STATS: _replaced(collection, found)} if found else {})


def _norm_layers(tree: Any, path: tuple[str, ...] = ()) -> dict[Any, Any]:
    """Mean and variance of the layers of normalisation, by their paths."""
    if not isinstance(tree, Mapping):
        return {}
    here = {}
    if all(hasattr(tree.get(name), "dtype") for name in ("mean", "var")):
        here[path] = (tree["mean"], tree["var"])
    below = [_norm_layers(part, (*path, name)) for name, part in tree.items()]
    return functools.reduce(lambda a, b: a | b, below, here)


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda part, name: part[name], path, tree)


def _replaced(tree: Any, stats: Any, path: tuple[str, ...] = ()) -> Any:
    """The collection with other statistics."""
    new = {
        name: _replaced(part, stats, (*path, name))
        if isinstance(part, Mapping)
        else part
        for name, part in tree.items()
    }
    if path in stats:
        new["mean"], new["var"] = stats[path]
    return new


def _to_record(tree: Any, stats: Any, names: Any, start: float) -> Any:
    """The collection in which some layers have a pool, and start from a number."""
    started = {
        name: tuple(_pooling.started(x, start) for x in found)
        if name in names
        else found
        for name, found in stats.items()
    }
    tree = _replaced(tree, started)
    for name in names:
        _at(tree, name).update(_pooling.empty_pool(stats[name][0])._asdict())
    return tree


def _pool_of(variables: Any) -> _pooling.Pool:
    return _pooling.Pool(*(variables[name] for name in _pooling.Pool._fields))


def _recorder(order: list[Any]) -> Callable[..., Any]:
    """An interceptor of calls: the pool of a layer absorbs what the layer sees.

    Layers without a pool normalise by the statistics that they have.
    """
    inside: list[Any] = []  # a call may call that of a base class

    def intercept(next_fun, args, kwargs, context):
        layer = context.module
        if (
            context.method_name != "__call__"
            or layer.path in inside
            or not all(layer.has_variable(_STATS, name) for name in ("mean", "var"))
        ):
            return next_fun(*args, **kwargs)
        order.append(layer.path)
        inside.append(layer.path)
        try:
            return _call_recorded(layer, next_fun, args, kwargs)
        finally:
            inside.pop()

    return intercept


def _call_recorded(layer: Any, fn: Any, args: Any, kwargs: Any) -> Any:
    """Calls a layer; its pool absorbs the batch, its statistics stay as they are."""
    record = layer.has_variable(_STATS, "pool_count")
    if not record:
        return _pooling.call_in_mode(layer, fn, args, kwargs, running=True)
    variables = lambda names: [layer.get_variable(_STATS, name) for name in names]
    start = variables(("mean", "var"))
    out = _pooling.call_in_mode(layer, fn, args, kwargs, running=False)
    count = _pooling.number_of_values(layer, fn, args, kwargs, start[0].size)
    pool = _pooling.Pool(*variables(_pooling.Pool._fields))
    pool = _pooling.absorbed(pool, count, *variables(("mean", "var")))
    kept = {"mean": start[0], "var": start[1], **pool._asdict()}
    for name, value in kept.items():
        layer.put_variable(_STATS, name, value)
    return out
