"""An average of the parameters in an Equinox training loop.

The chain ends in an average. To evaluate, read the averaged arrays in place of the
live ones and combine them with the static part of the model.

    python examples/equinox_loop.py
    python examples/equinox_loop.py --epochs 40 --decay 0.995 --seed 1
"""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_avg as oa


def make_optimizer(
    learning_rate: float, decay: float
) -> optax.GradientTransformationExtraArgs:
    return optax.chain(
        optax.adamw(learning_rate),
        oa.ema_params(decay),  # last: it averages what the step arrives at
    )


@partial(jax.jit, static_argnames=("static", "tx"), donate_argnames=("params", "state"))
def train_step(
    params: Any, state: Any, x: jax.Array, y: jax.Array, *, static: Any, tx: Any
) -> tuple[Any, Any]:
    def loss(params: Any) -> jax.Array:
        logits = jax.vmap(eqx.combine(params, static))(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


@eqx.filter_jit
def accuracy(model: eqx.Module, x: jax.Array, y: jax.Array) -> jax.Array:
    return (jax.vmap(model)(x).argmax(-1) == y).mean()


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
    model = eqx.nn.MLP(64, 10, width_size=64, depth=2, key=jax.random.key(args.seed))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    tx = make_optimizer(args.learning_rate, args.decay)
    oa.check_chain(tx, params)  # says so if a link stands at the wrong place
    state = tx.init(params)
    print("epoch  live    averaged")
    for epoch in range(1, args.epochs + 1):
        for x, y in batches(x_train, y_train, 32, rng):
            params, state = train_step(params, state, x, y, static=static, tx=tx)
        live = eqx.combine(params, static)
        averaged = eqx.combine(oa.averaged_params(state, params), static)
        test = [accuracy(each, x_test, y_test) for each in (live, averaged)]
        print(f"{epoch:5d}  {test[0]:.4f}  {test[1]:.4f}")


if __name__ == "__main__":
    main()
