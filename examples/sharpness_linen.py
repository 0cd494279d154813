"""SAM in a Flax linen loop with BatchNorm and Dropout.

Two things go wrong when SAM meets such a network, and the gradient function below does
neither: the running statistics come from the pass at the parameters themselves, never
from the perturbed one, and one dropout key serves every pass of a step.

    python examples/sharpness_linen.py
    python examples/sharpness_linen.py --rho 0 --epochs 40
"""

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _data import batches, flat_digits
from flax import linen as nn
from flax.training import train_state

import optax_avg as oa


class Network(nn.Module):
    """Two hidden layers with BatchNorm and Dropout, on 8x8 images."""

    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images (batch, 64) to logits (batch, 10)."""
        for _ in range(2):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(self.width)(x))
            x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
        return nn.Dense(10)(x)


class TrainState(train_state.TrainState):
    """Parameters and optimizer, running statistics, the rule's state."""

    batch_stats: Any
    rule_state: Any


def loss(
    params: Any, batch_stats: Any, x: jax.Array, y: jax.Array, dropout_key: jax.Array
) -> tuple[jax.Array, Any]:
    """The loss and, as aux, the statistics that this pass would leave behind."""
    logits, updated = Network().apply(
        {"params": params, "batch_stats": batch_stats},
        x,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": dropout_key},
    )
    value = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return value, updated["batch_stats"]


def make_gradient(rho: float) -> oa.SharpnessAware:
    """In place of ``jax.value_and_grad(loss, has_aux=True)``."""
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    return oa.sharpness_aware(value_and_grad, oa.rules.sam(rho), has_aux=True)


def create_state(seed: int, learning_rate: float, sharp: Any) -> TrainState:
    variables = Network().init(jax.random.key(seed), jnp.zeros((2, 64)), train=False)
    params = variables["params"]
    return TrainState.create(
        apply_fn=Network().apply,
        params=params,
        tx=optax.adamw(learning_rate),
        batch_stats=variables["batch_stats"],
        rule_state=sharp.init(params),
    )


@partial(jax.jit, static_argnames="sharp", donate_argnames="state")
def train_step(
    state: TrainState, x: jax.Array, y: jax.Array, key: jax.Array, *, sharp: Any
) -> tuple[TrainState, jax.Array]:
    dropout_key = jax.random.fold_in(key, state.step)  # one a step, for all its passes
    (value, batch_stats), grads, rule_state = sharp(
        state.params, state.rule_state, state.batch_stats, x, y, dropout_key
    )
    state = state.apply_gradients(
        grads=grads, batch_stats=batch_stats, rule_state=rule_state
    )
    return state, value


@jax.jit
def accuracy(state: TrainState, x: jax.Array, y: jax.Array) -> jax.Array:
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return (state.apply_fn(variables, x, train=False).argmax(-1) == y).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--rho", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    x_train, y_train, x_test, y_test = flat_digits(args.seed)
    rng, key = np.random.default_rng(args.seed), jax.random.key(args.seed)
    sharp = make_gradient(args.rho)
    state = create_state(args.seed, args.learning_rate, sharp)
    print("epoch  loss    test accuracy")
    for epoch in range(1, args.epochs + 1):
        losses = []
        for x, y in batches(x_train, y_train, 32, rng):
            state, value = train_step(state, x, y, key, sharp=sharp)
            losses.append(value)
        test = accuracy(state, x_test, y_test)
        print(f"{epoch:5d}  {np.mean(losses):.4f}  {test:.4f}")


if __name__ == "__main__":
    main()
