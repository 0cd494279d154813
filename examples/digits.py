"""Four averages of a convolutional network, riding in one Optax chain.

Trains a small network (Flax nnx) on real images, by default the digits that come with
scikit-learn, with a constant learning rate or SWA's. The averages cost no extra
training: they stand last in the chain and are read out of its state. At the end come a
table of test accuracy and loss, live parameters against each average over several
seeds, a plot of the curves and a JSON file of the numbers.

    python examples/digits.py
    python examples/digits.py --schedule swa --seeds 5
    python examples/digits.py --data fashion_mnist/ --epochs 5 --out runs/fashion
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _data import Images
from _report import (
    candidates,
    draw,
    interruptible,
    legend_above,
    minus_live,
    parse_with_images,
    positive,
    print_table,
    stack,
    summarize,
    two_panels,
    write_json,
)
from flax import nnx
from rich.progress import Progress

import optax_avg as oa

EVALUATION_BATCH = 500


def make_optimizer(
    learning_rate: optax.ScalarOrSchedule, steps: int, epoch: int
) -> optax.GradientTransformationExtraArgs:
    """The chain to copy: an optimizer, then any number of averages."""
    return optax.chain(
        optax.sgd(learning_rate, momentum=0.9),
        oa.ema_params(decay=0.99),
        oa.swa(start=steps // 2, every=epoch),
        oa.window_average(k=5, every=epoch, name="lawa"),
        oa.power_ema(sigma_rel=0.10),
    )


class Network(nnx.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, shape: Sequence[int], classes: int, *, rngs: nnx.Rngs) -> None:
        height, width, channels = shape
        self.conv1 = nnx.Conv(channels, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        features = 32 * ((height + 1) // 2) * ((width + 1) // 2)
        self.head = nnx.Linear(features, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits (batch, classes)."""
        x = nnx.relu(self.conv1(x))
        x = nnx.relu(self.conv2(x))
        return self.head(x.reshape(len(x), -1))


def loss_and_accuracy(
    params: Any, graphdef: Any, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    logits = nnx.merge(graphdef, params)(x)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, jnp.mean(jnp.argmax(logits, -1) == y)


@partial(
    jax.jit,
    static_argnames=("graphdef", "tx"),
    donate_argnames=("params", "opt_state"),
)
def train_step(
    params: Any, opt_state: Any, x: jax.Array, y: jax.Array, *, graphdef: Any, tx: Any
) -> tuple[Any, Any]:
    grads, _ = jax.grad(loss_and_accuracy, has_aux=True)(params, graphdef, x, y)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


@partial(jax.jit, static_argnames="graphdef")
def evaluate_batch(
    params: Any, opt_state: Any, x: jax.Array, y: jax.Array, *, graphdef: Any
) -> dict[str, tuple[jax.Array, jax.Array]]:
    return {
        name: loss_and_accuracy(tree, graphdef, x, y)
        for name, tree in candidates(params, opt_state).items()
    }


def evaluate(
    params: Any, opt_state: Any, images: Images, graphdef: Any
) -> dict[str, np.ndarray]:
    """Test loss and accuracy of every candidate."""
    totals: dict[str, Any] = {}
    for start in range(0, len(images.test_y), EVALUATION_BATCH):
        x = images.test_x[start : start + EVALUATION_BATCH]
        y = images.test_y[start : start + EVALUATION_BATCH]
        batch = evaluate_batch(params, opt_state, x, y, graphdef=graphdef)
        for name, values in batch.items():
            totals[name] = totals.get(name, 0) + len(y) * np.array(values, float)
    return {name: total / len(images.test_y) for name, total in totals.items()}


def learning_rate_schedule(
    kind: str, peak: float, steps: int
) -> optax.ScalarOrSchedule:
    """Constant, or SWA's: high, then linearly down to a constant lower one."""
    if kind == "swa":
        return oa.schedules.swa_constant(peak, peak / 4, start=steps // 2)
    return peak


def train(
    images: Images,
    args: argparse.Namespace,
    seed: int,
    tx: optax.GradientTransformationExtraArgs,
    advance: Callable[[], Any],
) -> list[dict[str, np.ndarray]]:
    """Test loss and accuracy of every candidate after every epoch."""
    classes = int(max(images.train_y.max(), images.test_y.max())) + 1
    model = Network(images.train_x.shape[1:], classes, rngs=nnx.Rngs(seed))
    graphdef, params = nnx.split(model)
    oa.check_chain(tx, params)  # says so if a link stands at the wrong place
    opt_state = tx.init(params)
    rng = np.random.default_rng(seed)
    curve = []
    for _ in range(args.epochs):
        used = steps_per_epoch(images, args) * args.batch_size
        order = rng.permutation(len(images.train_y))[:used]
        for batch in order.reshape(-1, args.batch_size):
            params, opt_state = train_step(
                params,
                opt_state,
                shift(images.train_x[batch], rng),
                images.train_y[batch],
                graphdef=graphdef,
                tx=tx,
            )
            advance()
        curve.append(evaluate(params, opt_state, images, graphdef))
    return curve


def shift(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moves every image by up to one pixel, the usual augmentation."""
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    top, left = rng.integers(0, 3, (2, len(x), 1, 1))
    rows, columns = np.arange(height)[:, None], np.arange(width)
    return padded[np.arange(len(x))[:, None, None], top + rows, left + columns]


def steps_per_epoch(images: Images, args: argparse.Namespace) -> int:
    return len(images.train_y) // args.batch_size


def train_all(images: Images, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Curves by candidate, of shape (seeds, epochs, 2): loss and accuracy."""
    epoch = steps_per_epoch(images, args)
    steps = args.epochs * epoch
    schedule = learning_rate_schedule(args.schedule, args.learning_rate, steps)
    tx = make_optimizer(schedule, steps, epoch)
    with Progress(transient=True) as progress:
        task = progress.add_task("training", total=args.seeds * steps)
        advance = partial(progress.advance, task)
        runs = [train(images, args, seed, tx, advance) for seed in range(args.seeds)]
    return stack(runs)


def plot(path: Path, steps: Sequence[int], losses: Any, accuracies: Any) -> None:
    """Test error, and test loss less that of the live parameters."""
    figure, (left, right) = two_panels()
    errors = {name: 100 * (1 - curve) for name, curve in accuracies.items()}
    draw(left, steps, errors)
    left.set(xlabel="optimizer step", ylabel="test error, %")
    left.set_ylim(0, 2 * max(1.0, float(np.median(errors["live"]))))
    draw(right, steps, minus_live(losses))
    right.set(xlabel="optimizer step", ylabel="test loss minus live, nats")
    legend_above(figure, left)
    figure.savefig(path, dpi=100)


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Images]:
    count, rate = positive(int), positive(float)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/digits"), help="for the results")
    add("--seeds", type=count, default=3, help="runs, with seeds 0, 1, ...")
    add("--epochs", type=count, default=40, help="SWA and LAWA need 3 to differ")
    add("--learning-rate", type=rate, default=0.05)
    add("--schedule", choices=["constant", "swa"], default="constant")
    add("--batch-size", type=count, default=16)
    return parse_with_images(parser, argv)


@interruptible
def main(argv: Sequence[str] | None = None) -> None:
    args, images = parse_args(argv)
    print(f"{len(images.train_y)} images to train on, {len(images.test_y)} to test")
    began = time.perf_counter()
    curves = train_all(images, args)
    seconds = time.perf_counter() - began
    losses = {name: curve[..., 0] for name, curve in curves.items()}
    accuracies = {name: curve[..., 1] for name, curve in curves.items()}
    summaries = {
        "test accuracy": summarize(accuracies),
        "test loss": summarize(losses),
    }
    print_table(f"mean ± standard deviation over {args.seeds} seeds", summaries)
    steps = [steps_per_epoch(images, args) * (i + 1) for i in range(args.epochs)]
    plot(args.out / "digits.png", steps, losses, accuracies)
    numbers = {
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "data")}
        | {"data": str(args.data) if args.data else None},
        "seconds": seconds,
        "steps": steps,
        "loss": {name: curve.tolist() for name, curve in losses.items()},
        "accuracy": {name: curve.tolist() for name, curve in accuracies.items()},
        "final": summaries,
    }
    write_json(args.out / "digits.json", numbers)
    print(f"wrote {args.out / 'digits.png'} and {args.out / 'digits.json'}")


if __name__ == "__main__":
    main()
