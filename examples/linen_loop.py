"""An average of the parameters in a Flax linen training loop.

The chain ends in an average, the TrainState carries it along, and
``oa.averaged_params(state, state.params)`` reads it. Nothing else in the loop changes.

    python examples/linen_loop.py
    python examples/linen_loop.py --epochs 40 --decay 0.995 --seed 1
"""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_avg as oa


class MLP(nn.Module):
    """Two hidden layers on 8x8 images."""

    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (batch, 64) to logits (batch, 10)."""
        x = nn.relu(nn.Dense(self.width)(x))
        x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


def create_state(seed: int, learning_rate: float, decay: float) -> TrainState:
    model = MLP()
    tx = optax.chain(
        optax.adamw(learning_rate),
        oa.ema_params(decay),  # last: it averages what the step arrives at
    )
    params = model.init(jax.random.key(seed), jnp.zeros((1, 64)))["params"]
    oa.check_chain(tx, params)  # says so if a link stands at the wrong place
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


@partial(jax.jit, donate_argnames="state")
def train_step(state: TrainState, x: jax.Array, y: jax.Array) -> TrainState:
    def loss(params: Any) -> jax.Array:
        logits = state.apply_fn({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


@jax.jit
def accuracies(state: TrainState, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
    def accuracy(params: Any) -> jax.Array:
        return (state.apply_fn({"params": params}, x).argmax(-1) == y).mean()

    return {
        "live": accuracy(state.params),
        "averaged": accuracy(oa.averaged_params(state, state.params)),
    }


def batches(
    x: np.ndarray, y: np.ndarray, size: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    order = rng.permutation(len(x))
    for first in range(0, len(x) - size + 1, size):
        rows = order[first : first + size]
        yield x[rows], y[rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--decay", type=float, default=0.98)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    images, labels = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        (images / 16).astype(np.float32),
        labels,
        test_size=0.5,
        random_state=args.seed,
        stratify=labels,
    )
    rng = np.random.default_rng(args.seed)
    state = create_state(args.seed, args.learning_rate, args.decay)
    print("epoch  live    averaged")
    for epoch in range(1, args.epochs + 1):
        for x, y in batches(x_train, y_train, 32, rng):
            state = train_step(state, x, y)
        test = accuracies(state, x_test, y_test)
        print(f"{epoch:5d}  {test['live']:.4f}  {test['averaged']:.4f}")


if __name__ == "__main__":
    main()
