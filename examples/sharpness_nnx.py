"""SAM in a Flax nnx loop with BatchNorm and Dropout.

``nnx.split`` takes the model apart into parameters and the rest: running statistics and
the state of the dropout keys. Every pass of a step starts from the same rest, so that
all of them drop the same units; the rest that is kept is the one that the pass at the
parameters themselves left behind.

    python examples/sharpness_nnx.py
    python examples/sharpness_nnx.py --rho 0 --epochs 40
"""

import argparse
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from _data import batches, flat_digits
from flax import nnx

import optax_avg as oa


class Network(nnx.Module):
    """Two hidden layers with BatchNorm and Dropout, on 8x8 images."""

    def __init__(self, width: int = 64, *, rngs: nnx.Rngs) -> None:
        self.layer1 = nnx.Linear(64, width, rngs=rngs)
        self.norm1 = nnx.BatchNorm(width, rngs=rngs)
        self.layer2 = nnx.Linear(width, width, rngs=rngs)
        self.norm2 = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (batch, 64) to logits (batch, 10)."""
        x = self.dropout(nnx.relu(self.norm1(self.layer1(x))))
        x = self.dropout(nnx.relu(self.norm2(self.layer2(x))))
        return self.head(x)


def loss(
    params: Any, rest: Any, x: jax.Array, y: jax.Array, graphdef: Any
) -> tuple[jax.Array, Any]:
    """The loss and, as aux, the rest of the model after this pass."""
    model = nnx.merge(graphdef, params, rest, copy=True)  # it is changed in here
    logits = model(x)
    value = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return value, nnx.state(model, nnx.Not(nnx.Param))


def make_gradient(rho: float) -> oa.SharpnessAware:
    """In place of ``jax.value_and_grad(loss, has_aux=True)``."""
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    return oa.sharpness_aware(value_and_grad, oa.rules.sam(rho), has_aux=True)


@partial(
    jax.jit,
    static_argnames=("sharp", "tx", "graphdef"),
    donate_argnames=("params", "rest", "states"),
)
def train_step(
    params: Any,
    rest: Any,
    states: Any,
    x: jax.Array,
    y: jax.Array,
    *,
    sharp: Any,
    tx: Any,
    graphdef: Any,
) -> tuple[Any, Any, Any, jax.Array]:
    rule_state, opt_state = states
    (value, rest), grads, rule_state = sharp(params, rule_state, rest, x, y, graphdef)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return params, rest, (rule_state, opt_state), value


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--rho", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    x_train, y_train, x_test, y_test = flat_digits(args.seed)
    rng = np.random.default_rng(args.seed)
    model = Network(rngs=nnx.Rngs(args.seed))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    sharp, tx = make_gradient(args.rho), optax.adamw(args.learning_rate)
    states = sharp.init(params), tx.init(params)
    step = partial(train_step, sharp=sharp, tx=tx, graphdef=graphdef)
    print("epoch  loss    test accuracy")
    for epoch in range(1, args.epochs + 1):
        losses = []
        for x, y in batches(x_train, y_train, 32, rng):
            params, rest, states, value = step(params, rest, states, x, y)
            losses.append(value)
        nnx.update(model, params, rest)
        model.eval()  # for the test; training goes on with graphdef
        test = (model(x_test).argmax(-1) == y_test).mean()
        print(f"{epoch:5d}  {np.mean(losses):.4f}  {test:.4f}")


if __name__ == "__main__":
    main()
