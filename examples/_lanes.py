"""Many trainings side by side in one compiled program.

Every leaf has a first axis of lanes: rates, seeds, and one more number for whatever an
optimizer has to be told. Lanes of one key see the same batches. Averages of the
parameters ride along on the stacked leaves, so that those with ``every`` cost nothing
in the steps between.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Params = Any
Batch = Any

# An optimizer of the learning rate of one step, and of a number of its own.
Make = Callable[[jax.Array, jax.Array], optax.GradientTransformation]


class Run(NamedTuple):
    """What a training step changes; states of averages have no axis of lanes.

    Attributes:
      params: Parameters of all lanes.
      state: States of the optimizers.
      averages: State of the averages that ride along.
    """

    params: Params
    state: optax.OptState
    averages: optax.OptState


def adam(rate: jax.Array, knob: jax.Array) -> optax.GradientTransformation:
    """Adam, which needs no other number."""
    del knob
    return optax.adam(rate)


def begin(
    starts: Sequence[Params],
    make: Make,
    averages: optax.GradientTransformation,
    knobs: jax.Array,
) -> Run:
    """Lanes before the first step.

    Args:
      starts: Parameters of each lane.
      make: The optimizer.
      averages: Averages that ride along.
      knobs: The optimizer's own number, for each lane.
    """
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    state = jax.vmap(lambda p, knob: make(knob, knob).init(p))(params, knobs)
    return Run(params, state, averages.init(params))


def advance(
    run: Run,
    first: jax.Array,
    rates: jax.Array,
    keys: jax.Array,
    knobs: jax.Array,
    *,
    batch: Callable[[jax.Array], Batch],
    loss: Callable[[Params, Batch], jax.Array],
    make: Make,
    averages: optax.GradientTransformation,
) -> Run:
    """Steps of all lanes.

    Args:
      run: Parameters and states.
      first: Number of the first step, which chooses the batches.
      rates: Learning rates of shape (steps, lanes).
      keys: A key for each lane.
      knobs: The optimizer's own number, for each lane.
      batch: A batch of a key.
      loss: Loss of the parameters of one lane on a batch.
      make: The optimizer.
      averages: Averages that ride along.
    """

    def step(run: Run, at: tuple[jax.Array, jax.Array]) -> tuple[Run, None]:
        number, rates = at

        def one(
            params: Params, state: Any, key: jax.Array, rate: jax.Array, knob: jax.Array
        ) -> tuple[Params, Any]:
            drawn = batch(jax.random.fold_in(key, number))
            grads = jax.grad(loss)(params, drawn)
            return make(rate, knob).update(grads, state, params)

        updates, state = jax.vmap(one)(run.params, run.state, keys, rates, knobs)
        updates, ridden = averages.update(updates, run.averages, run.params)
        return Run(optax.apply_updates(run.params, updates), state, ridden), None

    return jax.lax.scan(step, run, (first + jnp.arange(len(rates)), rates))[0]


def take(tree: Any, lanes: Sequence[int]) -> Any:
    """Some of the lanes."""
    rows = jnp.asarray(lanes)
    return jax.tree.map(lambda leaf: leaf[rows], tree)
