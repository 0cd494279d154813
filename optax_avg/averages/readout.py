"""Reading averages out of an optimizer state, wherever in it they are."""

from typing import Any, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import optax

from optax_avg import _leaves, _numerics
from optax_avg.averages._rule import AverageState

__all__ = ["average_names", "averaged_params"]

Params = TypeVar("Params")


def averaged_params(
    state: optax.OptState, params: Params, name: str | None = None
) -> Params:
    """The averaged parameters, in the structure and dtypes of ``params``.

    Finds averages in any nesting of ``optax.chain``, ``MultiSteps``, ``masked``,
    ``partition``, ``inject_hyperparams``, ``apply_if_finite`` and other wrappers.
    Leaves that are not averaged come from ``params``, and so does everything before the
    first iterate has been absorbed. The result never aliases the state, so that the
    state may be donated afterwards. Works under jit and vmap. A state that is stacked
    along the first axis of all its leaves, as by ``jax.vmap(tx.init)``, is read member
    by member.

    Args:
      state: An optimizer state, or an object with an ``opt_state`` (a Flax
        ``TrainState``, an ``nnx.Optimizer``).
      params: The current parameters, structured as the optimizer was initialised.
      name: Name of the average. It may be left out if there is just one.

    Returns:
      A tree like ``params``.

    Raises:
      ValueError: If there is no such average, several and no ``name``, two of the same
        name on one leaf, or ``params`` does not match.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = optax.chain(optax.sgd(0.5), oa.ema_params(0.9), oa.polyak_average())
      >>> params = {"w": jnp.ones(2)}
      >>> oa.averaged_params(tx.init(params), params, "ema")["w"].tolist()
      [1.0, 1.0]
    """
    found = read_leaves(state, params, name)
    leaves, structure = jax.tree.flatten(params)
    return structure.unflatten(
        [
            leaf if average is None else jnp.where(average[0], average[1], leaf)
            for average, leaf in zip(found, leaves, strict=True)
        ]
    )


def average_names(state: optax.OptState) -> list[str]:
    """Names of the averages in an optimizer state, sorted.

    :func:`optax_avg.summarize_averages` says as well how far they look back.

    Args:
      state: An optimizer state, or an object with an ``opt_state``.

    Returns:
      The names, without repetition.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> oa.average_names(oa.power_ema([0.05, 0.10]).init(jnp.zeros(1)))
      ['power_ema_0.05', 'power_ema_0.1']
    """
    return sorted({name for node in average_states(state) for name in node.averages})


def is_average_state(node: object) -> TypeGuard[AverageState]:
    """Whether a node of an optimizer state is the state of an average."""
    return isinstance(node, AverageState)


def read_leaves(
    state: optax.OptState, params: Any, name: str | None
) -> list[tuple[jax.Array, jax.Array] | None]:
    """For each leaf of ``params``, ``(is there an iterate, average)`` or None.

    Args:
      state: An optimizer state, or an object with an ``opt_state``.
      params: The current parameters.
      name: Name of the average. None stands for the only one.

    Returns:
      A list as long as ``params`` has leaves; averages have the dtypes of ``params``.
    """
    names = average_names(state)
    if not names and average_names(params):
        raise ValueError(
            "the parameters and the optimizer state are swapped; call "
            "averaged_params(opt_state, params)."
        )
    if not names:
        raise ValueError(
            "there is no average in this optimizer state; put one last in the chain, "
            "as in optax.chain(optimizer, optax_avg.ema_params(0.999))."
        )
    if name is None and len(names) > 1:
        raise ValueError(
            f"the state holds several averages; pass name=, one of {names}."
        )
    name = names[0] if name is None else name
    if name not in names:
        raise ValueError(f"there is no average named {name!r}; there is {names}.")
    paths = jax.tree.flatten_with_path(params)[0]
    found: list[tuple[jax.Array, jax.Array] | None] = [None] * len(paths)
    for node in average_states(state):
        if name not in node.averages:
            continue
        begun = jax.tree.leaves(node.absorbed)[0] > 0
        is_offset = getattr(node.averages[name], "is_offset", False)
        aligned = _leaves.align(read_average(node, name), params)
        for i, (value, (path, leaf)) in enumerate(zip(aligned, paths, strict=True)):
            if value is None:
                continue
            if found[i] is not None:
                raise ValueError(
                    f"two averages named {name!r} hold params"
                    f"{jax.tree_util.keystr(path)}; give one of them another name=."
                )
            if is_offset:
                value = _numerics.widen(jnp.asarray(leaf)) + value
            found[i] = _over(begun, value), value.astype(jnp.result_type(leaf))
    return found


def average_states(state: optax.OptState | None) -> list[AverageState]:
    """The states of averages, in the order of the chain."""
    return _leaves.states_of(AverageState, state)


def read_average(node: AverageState, name: str) -> optax.Params:
    """The average itself, from what the state keeps; stacked as the state is.

    Raises:
      ValueError: If the state is stacked along other axes than the first.
    """
    absorbed = jax.tree.leaves(node.absorbed)[0]
    if jnp.ndim(absorbed):
        sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(node)}
        if len(sizes) > 1:
            raise ValueError(
                f"the state of the average {name!r} is not stacked along the first "
                "axis of all its leaves; write jax.vmap(averaged_params, in_axes=...)"
                "(state, params) with the axes of the stack."
            )
        return jax.vmap(lambda member: read_average(member, name))(node)
    kept = jax.tree.map(_on_device, node.averages[name])
    return kept.read(absorbed)


def _over(begun: jax.Array, value: jax.Array) -> jax.Array:
    """One bool a member of a stack, with as many axes as the values."""
    if not begun.ndim:
        return begun
    return begun.reshape(*begun.shape, *[1] * (value.ndim - begun.ndim))


def _on_device(leaf: jax.Array) -> jax.Array:
    """Brings an average that lives in host memory to the device."""
    host = getattr(jax.typeof(leaf), "memory_space", None) == jax.memory.Space.Host
    return jax.device_put(leaf, jax.memory.Space.Device) if host else leaf
