"""A small ResNet in Flax nnx: an average, and the BatchNorm statistics that it needs.

Four ways to read the same training: the live parameters; the averaged ones with the
statistics that training left, which belong to the live ones; with an average of the
statistics; with statistics that one pass over the training images recomputes.

    python examples/resnet_nnx.py
    python examples/resnet_nnx.py --epochs 8 --learning-rate 0.2 --seed 1
"""

import argparse
from typing import Any

import jax
import numpy as np
import optax
from _data import batches, load_images
from flax import nnx

import optax_avg as oa


class Block(nnx.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, width_in: int, width: int, stride: int, rngs: nnx.Rngs) -> None:
        size = {"kernel_size": (3, 3), "use_bias": False, "rngs": rngs}
        self.conv1 = nnx.Conv(width_in, width, strides=stride, **size)
        self.norm1 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(width, width, **size)
        self.norm2 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.shortcut = nnx.Conv(
            width_in, width, (1, 1), strides=stride, use_bias=False, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (batch, height, width, channels) to smaller ones."""
        y = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nnx.Module):
    """Two blocks, the mean over space, ten classes."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.block1 = Block(1, width, 1, rngs)
        self.block2 = Block(width, 2 * width, 2, rngs)
        self.head = nnx.Linear(2 * width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (batch, height, width, 1) to logits (batch, 10)."""
        return self.head(self.block2(self.block1(x)).mean((1, 2)))


def loss_fn(model: ResNet, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def train_step(
    model: ResNet, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array
) -> None:
    optimizer.update(model, nnx.grad(loss_fn)(model, x, y))


@nnx.jit
def logits(model: ResNet, x: jax.Array) -> jax.Array:
    return model(x)


def accuracy(model: ResNet, x: np.ndarray, y: np.ndarray) -> float:
    model.eval()
    found = float((logits(model, x).argmax(-1) == y).mean())
    model.train()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--images", type=int, default=None, help="to train on, of all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    images = load_images(None)
    x_train, y_train = images.train_x[: args.images], images.train_y[: args.images]
    rng = np.random.default_rng(args.seed)
    model = ResNet(args.width, nnx.Rngs(args.seed))
    tx = optax.chain(optax.sgd(args.learning_rate, 0.9), oa.ema_params(0.98))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    # An average of the statistics with the same weights: nothing is added to them.
    stats_average = oa.ema_params(0.98)
    stats_state = stats_average.init(nnx.state(model, nnx.BatchStat))

    @nnx.jit
    def absorb(model: ResNet, state: Any) -> Any:
        stats = nnx.state(model, nnx.BatchStat)
        zeros = jax.tree.map(lambda x: 0 * x, stats)
        return stats_average.update(zeros, state, stats)[1]

    print("epoch  live    stale   averaged  recomputed")
    for epoch in range(1, args.epochs + 1):
        for x, y in batches(x_train, y_train, 64, rng):
            train_step(model, optimizer, x, y)
            stats_state = absorb(model, stats_state)
        average = oa.frameworks.nnx.averaged_model(model, optimizer)
        test = images.test_x, images.test_y
        found = [accuracy(each, *test) for each in (model, average)]
        stats = nnx.state(model, nnx.BatchStat)
        nnx.update(average, oa.averaged_params(stats_state, stats))
        found.append(accuracy(average, *test))
        pieces = (x for x, _ in batches(x_train, y_train, 64, rng))
        oa.frameworks.nnx.recompute_batch_stats(average, pieces)
        found.append(accuracy(average, *test))
        print(f"{epoch:5d}  " + "  ".join(f"{x:.4f}" for x in found))


if __name__ == "__main__":
    main()
