"""Is it flatter? SGD, SAM, ASAM, GAM, SAM with an average, and SWA, measured.

Trains one small network (Flax nnx) in all these ways, on true labels and with a share
of wrong ones, all seeds at once under ``vmap``. Beside the test accuracy stand measures
of the training loss where each method ends: top eigenvalue and trace of the Hessian,
SAM's sharpness, and the barrier on the straight line to SGD's solution of the same
seed. A picture shows the plane through SGD, SAM and SWA.

    python examples/sharpness.py
    python examples/sharpness.py --seeds 10 --wrong-labels 0.4
    python examples/sharpness.py --data fashion_mnist/ --epochs 10 --out runs/fashion
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _data import Images
from _report import (
    fail,
    interruptible,
    parse_with_images,
    positive,
    print_measures,
    write_json,
)
from flax import nnx
from matplotlib.figure import Figure
from rich.progress import Progress

import optax_avg as oa
from optax_avg import landscape
from optax_avg.landscape import pictures

MEASURED_IMAGES = 2000  # at most, for the measures of the training loss
PLANE = ("SGD", "SAM", "SWA")
MEASURES = (
    "test accuracy, %",
    "training loss",
    "top eigenvalue",
    "trace",
    "sharpness",
    "barrier to SGD",
)


class Method(NamedTuple):
    """A rule for the gradient (None: the plain one), an average, its schedule."""

    rule: oa.SharpnessRule | None = None
    average: Callable[[int, int], Any] | None = None


# The radii did best for both kinds of labels together among 5 of SAM, 4 of ASAM and 10
# of GAM, on a quarter of the training images and with other seeds.
METHODS = {
    "SGD": Method(),
    "SAM": Method(oa.rules.sam(rho=0.4)),
    "ASAM": Method(oa.rules.asam(rho=2.0)),
    "GAM": Method(oa.rules.gam(rho=0.2, rho_prime=0.2)),
    "SAM + EMA": Method(
        oa.rules.sam(rho=0.4), lambda steps, epoch: oa.ema_params(0.99)
    ),
    "SWA": Method(None, lambda steps, epoch: oa.swa(start=steps // 2, every=epoch)),
}


class Network(nnx.Module):
    """Two hidden layers."""

    def __init__(self, inputs: int, classes: int, width: int, rngs: nnx.Rngs) -> None:
        self.layer1 = nnx.Linear(inputs, width, rngs=rngs)
        self.layer2 = nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits (batch, classes)."""
        x = nnx.gelu(self.layer1(x.reshape(len(x), -1)))
        return self.head(nnx.gelu(self.layer2(x)))


def make_loss(graphdef: Any) -> Callable[..., jax.Array]:
    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss


def make_error(graphdef: Any) -> Callable[..., jax.Array]:
    def error(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean(nnx.merge(graphdef, params)(x).argmax(-1) != y)

    return error


def make_optimizer(method: Method, peak: float, steps: int, epoch: int) -> Any:
    """SGD with momentum; averages ride last, on a rate that stays high for them."""
    if method.average is None:
        rate = optax.cosine_decay_schedule(peak, steps)
        return optax.sgd(rate, momentum=0.9)
    rate = oa.schedules.swa_constant(peak, peak / 4, start=steps // 2)
    return optax.chain(optax.sgd(rate, momentum=0.9), method.average(steps, epoch))


def wrong_labels(
    labels: np.ndarray, share: float, classes: int, rng: np.random.Generator
) -> np.ndarray:
    """Exactly this share of the labels replaced by another class."""
    labels = labels.copy()
    chosen = rng.choice(len(labels), round(share * len(labels)), replace=False)
    labels[chosen] = (labels[chosen] + rng.integers(1, classes, len(chosen))) % classes
    return labels


def train(
    method: Method,
    loss: Callable[..., jax.Array],
    params: Any,
    images: Images,
    labels: np.ndarray,
    args: argparse.Namespace,
    report: Callable[..., Any],
) -> Any:
    """Trains all seeds; ``params`` and ``labels`` have a leading axis of seeds.

    Returns what the method would deploy: the average if it has one.
    """
    seeds, count = labels.shape
    epoch = count // args.batch_size
    tx = make_optimizer(method, args.learning_rate, args.epochs * epoch, epoch)
    oa.check_chain(tx, params)  # says so if a link stands at the wrong place
    value_and_grad = jax.value_and_grad(loss)
    # The one line that a method changes: a gradient function with a state.
    sharp = method.rule and oa.sharpness_aware(value_and_grad, method.rule)

    def step(carry, batch):
        params, rule_state, opt_state, labels = carry
        x, y = jnp.asarray(images.train_x)[batch], labels[batch]
        if sharp is None:
            _, grads = value_and_grad(params, x, y)
        else:
            _, grads, rule_state = sharp(params, rule_state, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, rule_state, opt_state, labels), None

    def start(params, labels):
        rule_state = () if sharp is None else sharp.init(params)
        return params, rule_state, tx.init(params), labels

    one_epoch = jax.jit(
        jax.vmap(lambda carry, order: jax.lax.scan(step, carry, order)[0])
    )
    carry = jax.vmap(start)(params, jnp.asarray(labels))
    rngs = [np.random.default_rng(seed) for seed in range(seeds)]
    for _ in range(args.epochs):
        orders = [rng.permutation(count)[: epoch * args.batch_size] for rng in rngs]
        shape = (seeds, epoch, args.batch_size)
        carry = one_epoch(carry, np.stack(orders).reshape(shape))
        report(advance=1)
    params, _, opt_state, _ = jax.block_until_ready(carry)
    if method.average is None:
        return params
    return jax.vmap(oa.averaged_params)(opt_state, params)


def measure(
    loss: Callable[..., jax.Array],
    error: Callable[..., jax.Array],
    images: Images,
    labels: np.ndarray,
    rho: float,
) -> Callable[[Any, Any], dict[str, jax.Array]]:
    """A function of (params, SGD's params), seeds leading, to arrays of (seeds,)."""
    x, key = images.train_x[:MEASURED_IMAGES], jax.random.key(0)
    y = labels[:, :MEASURED_IMAGES]

    def one(params, sgd, y):
        on_train = lambda params: loss(params, x, y)
        values = (
            100 * (1 - error(params, images.test_x, images.test_y)),
            on_train(params),
            landscape.top_eigenvalues(on_train, params, key)[0],
            landscape.hessian_trace(on_train, params, key, 50)[0],
            landscape.sharpness(on_train, params, rho),
            landscape.barrier(on_train, sgd, params, 21).barrier,
        )
        return dict(zip(MEASURES, values, strict=True))

    compiled = jax.jit(jax.vmap(one))
    return lambda params, sgd: compiled(params, sgd, y)


def compare(
    images: Images, share: float, args: argparse.Namespace, report: Callable[..., Any]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, landscape.Plane]]:
    """All methods at one share of wrong labels: measures by name, planes of seed 0."""
    classes = int(max(images.train_y.max(), images.test_y.max())) + 1
    inputs = int(np.prod(images.train_x.shape[1:]))
    made = [
        nnx.split(Network(inputs, classes, args.width, nnx.Rngs(seed)))
        for seed in range(args.seeds)
    ]
    graphdef = made[0][0]
    loss, error = make_loss(graphdef), make_error(graphdef)
    initial = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[p for _, p in made])
    labels = np.stack(
        [
            wrong_labels(images.train_y, share, classes, np.random.default_rng(seed))
            for seed in range(args.seeds)
        ]
    )
    solutions, found = {}, {}
    evaluate = measure(loss, error, images, labels, args.rho)
    for name, method in METHODS.items():
        report(description=f"training {name}")
        solutions[name] = train(method, loss, initial, images, labels, args, report)
        report(description=f"measuring {name}")
        values = evaluate(solutions[name], solutions["SGD"])
        found[name] = {key: np.asarray(values[key], float) for key in MEASURES}
    found["SGD"]["barrier to SGD"] *= np.nan
    report(description="drawing")
    corners = [jax.tree.map(lambda leaf: leaf[0], solutions[name]) for name in PLANE]
    x, y = images.train_x[:MEASURED_IMAGES], labels[0, :MEASURED_IMAGES]
    surfaces = {
        "training loss": lambda p: loss(p, x, y),
        "test error, %": lambda p: 100 * error(p, images.test_x, images.test_y),
    }
    planes = {
        title: landscape.plane(surface, corners, num=31, margin=0.6)
        for title, surface in surfaces.items()
    }
    return found, planes


def plot(path: Path, planes: dict[str, dict[str, landscape.Plane]]) -> None:
    """A row for each share of wrong labels, a column for each surface."""
    titles = list(next(iter(planes.values())))
    figure = Figure(figsize=(10, 4 * len(planes)), layout="constrained")
    grid = figure.subplots(len(planes), len(titles), squeeze=False)
    for row, (setting, drawn) in zip(grid, planes.items(), strict=True):
        for ax, title in zip(row, titles, strict=True):
            pictures.draw_plane(drawn[title], PLANE, ax, title=title)
            ax.set_title(setting)
    figure.savefig(path, dpi=100)


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Images]:
    count, rate = positive(int), positive(float)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/sharpness"), help="for the results")
    add("--seeds", type=count, default=5, help="runs, with seeds 0, 1, ...")
    add("--epochs", type=count, default=60)
    add("--learning-rate", type=rate, default=0.1)
    add("--batch-size", type=count, default=64)
    add("--width", type=count, default=128, help="of the hidden layers")
    add("--rho", type=rate, default=0.1, help="radius of the measured sharpness")
    add("--wrong-labels", type=rate, default=0.2, help="share, in the second half")
    args, images = parse_with_images(parser, argv)
    if args.wrong_labels >= 1:
        fail(parser, f"--wrong-labels {args.wrong_labels}: must be below 1")
    return args, images


@interruptible
def main(argv: Sequence[str] | None = None) -> None:
    args, images = parse_args(argv)
    print(f"{len(images.train_y)} images to train on, {len(images.test_y)} to test")
    began = time.perf_counter()
    shares = {"true labels": 0.0, f"{args.wrong_labels:.0%} wrong": args.wrong_labels}
    measures, planes = {}, {}
    with Progress(transient=True) as progress:
        total = len(shares) * len(METHODS) * args.epochs
        task = progress.add_task("training", total=total)
        for setting, share in shares.items():
            measures[setting], planes[setting] = compare(
                images, share, args, partial(progress.update, task)
            )
    seconds = time.perf_counter() - began
    for setting, found in measures.items():
        print_measures(f"{setting}: mean ± standard deviation over seeds", found)
    plot(args.out / "sharpness.png", planes)
    numbers = {
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "data")}
        | {"data": str(args.data) if args.data else None},
        "seconds": seconds,
        "measures": {
            setting: {
                name: {key: value.tolist() for key, value in values.items()}
                for name, values in found.items()
            }
            for setting, found in measures.items()
        },
    }
    write_json(args.out / "sharpness.json", numbers)
    print(f"wrote {args.out / 'sharpness.png'} and {args.out / 'sharpness.json'}")


if __name__ == "__main__":
    main()
