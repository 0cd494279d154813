"""Per-example gradients, aggregated: mean, clipping, medians, with bad data.

Trains one small network on digits with true labels, with a share of wrong ones, and
with wrong ones and a few images of 256 times the brightness. Learning rates, radii are
chosen for every method and setting on held-out training images (as bad as the others)
with other seeds; all runs of a method go side by side under ``vmap``.

    python examples/robust.py
    python examples/robust.py --seeds 10 --wrong-labels 0.4
    python examples/robust.py --data fashion_mnist/ --steps 3000 --out runs/fashion
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
    spread,
    write_json,
)
from matplotlib.figure import Figure
from optax.experimental import aggregating
from rich.progress import Progress

import optax_avg as oa

RATES = (0.05, 0.15, 0.5)
RADII = (0.3, 1.0, 3.0)
SEARCHED = 2  # seeds of the search, apart from those of the results
BRIGHTNESS = 256.0


def mean_of_clipped(tau: Any) -> optax.GradientTransformation:
    """Clips every gradient around zero, then takes the mean."""

    def update(rows, _):
        size = jax.vmap(optax.tree.norm)(rows)
        factor = jnp.minimum(1, tau / jnp.maximum(size, 1e-30))
        return jax.tree.map(lambda g: jnp.tensordot(factor, g, axes=1) / len(g), rows)

    return optax.stateless(update)


def mean() -> Any:
    return aggregating.average_per_element_updates(0)


def clipped_mean(tau: Any) -> Any:
    return optax.chain(mean(), optax.clip_by_global_norm(tau))


# What turns the gradients of a batch into one, and whether it has a radius.
METHODS: dict[str, tuple[Callable[..., Any], bool]] = {
    "mean": (mean, False),
    "batch clipping": (clipped_mean, True),
    "per-example clipping": (mean_of_clipped, True),
    "trimmed mean": (lambda: oa.trimmed_mean(4), False),
    "coordinate median": (oa.coordinate_median, False),
    "geometric median": (oa.geometric_median, False),
    "centered clipping": (oa.centered_clip, True),
}


def start(key: jax.Array, inputs: int, width: int, classes: int) -> Any:
    """Weights of two layers."""
    a, b = jax.random.split(key)
    return {
        "w": jax.random.normal(a, (inputs, width)) * (2 / inputs) ** 0.5,
        "b": jnp.zeros(width),
        "v": jax.random.normal(b, (width, classes)) * width**-0.5,
        "c": jnp.zeros(classes),
    }


def logits(params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["w"] + params["b"]) @ params["v"] + params["c"]


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)


def train(
    make: Callable[[Any, Any], Any],
    settings: dict[str, int],
    data: dict[str, jax.Array],
    key: jax.Array,
    lr: jax.Array,
    tau: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Accuracy on the held-out and on the test images, of one run."""
    tx = make(lr, tau)
    begin, later = jax.random.split(key)
    keys = jax.random.split(later, settings["steps"])
    inputs, classes = data["x"].shape[1], settings["classes"]
    params = start(begin, inputs, settings["width"], classes)

    def step(carry, key):
        params, state = carry
        batch = (settings["batch_size"],)
        rows = jax.random.randint(key, batch, 0, len(data["x"]))
        each = jax.vmap(jax.grad(loss), (None, 0, 0))
        grads = each(params, data["x"][rows], data["y"][rows])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
    outputs = jax.vmap(logits, (None, 0))
    right = lambda x, y: jnp.mean(jnp.argmax(outputs(params, x), axis=-1) == y)
    return (
        right(data["held_x"], data["held_y"]),
        right(data["test_x"], data["test_y"]),
    )


def spoiled(
    images: Images, seed: int, wrong: float, bright: float
) -> dict[str, np.ndarray]:
    """Three quarters to train on and one held out, with bad labels and images."""
    rng = np.random.default_rng(seed)
    flat = lambda x: x.reshape(len(x), -1)
    classes = int(images.train_y.max()) + 1
    order = rng.permutation(len(images.train_y))
    x, y = flat(images.train_x)[order].copy(), images.train_y[order].copy()
    bad = rng.random(len(y)) < wrong
    y[bad] = (y[bad] + rng.integers(1, classes, bad.sum())) % classes
    x[rng.random(len(y)) < bright] *= BRIGHTNESS
    cut = 3 * len(y) // 4
    return {
        "x": x[:cut],
        "y": y[:cut],
        "held_x": x[cut:],
        "held_y": y[cut:],
        "test_x": flat(images.test_x),
        "test_y": images.test_y,
    }


@functools.cache
def runner(method: str, *settings: tuple[str, int]) -> Callable[..., Any]:
    """All seeds and the whole grid of one method, compiled once per shape."""
    factory, has_radius = METHODS[method]

    def make(lr, tau):
        return optax.chain(factory(tau) if has_radius else factory(), optax.sgd(lr))

    one = functools.partial(train, make, dict(settings))
    over_seeds = jax.vmap(one, (0, 0, None, None))
    return jax.jit(jax.vmap(over_seeds, (None, None, 0, 0)))


def run(
    method: str, images: Images, bad: tuple[float, float], args: argparse.Namespace
) -> dict[str, Any]:
    """The best of the grid on held-out images, then the seeds that count."""
    has_radius = METHODS[method][1]
    settings = {
        "steps": args.steps,
        "width": args.width,
        "batch_size": args.batch_size,
        "classes": int(images.train_y.max()) + 1,
    }

    def all_runs(seeds, grid):
        data = [spoiled(images, seed, *bad) for seed in seeds]
        stacked = {k: jnp.asarray(np.stack([d[k] for d in data])) for k in data[0]}
        keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        lr, tau = jnp.asarray(grid).T
        return runner(method, *settings.items())(stacked, keys, lr, tau)

    grid = [*itertools.product(RATES, RADII if has_radius else (1.0,))]
    held, _ = all_runs(range(1000, 1000 + SEARCHED), grid)
    best = grid[int(jnp.argmax(jnp.nanmean(held, axis=1)))]
    _, test = all_runs(range(args.seeds), [best])
    return {
        "test accuracy, %": 100 * np.asarray(test[0], float),
        "learning rate": best[0],
        "radius": best[1] if has_radius else None,
    }


def plot(path: Path, found: dict[str, dict[str, dict[str, Any]]]) -> None:
    """One panel per setting, one line per method with its spread over seeds."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (setting, rows) in zip(
        figure.subplots(1, len(found), sharey=True), found.items(), strict=True
    ):
        for i, values in enumerate(rows.values()):
            accuracy = values["test accuracy, %"]
            color = "black" if i == 0 else f"C{i}"
            axes.errorbar(accuracy.mean(), i, xerr=spread(accuracy), fmt="o", c=color)
        axes.set_title(setting)
        axes.set_xlabel("test accuracy, %")
        axes.grid(alpha=0.3)
        axes.set_yticks(range(len(rows)), [*rows])
    figure.axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Images]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=positive(int), default=5)
    parser.add_argument("--steps", type=positive(int), default=1500)
    parser.add_argument("--batch-size", type=positive(int), default=32)
    parser.add_argument("--width", type=positive(int), default=32)
    parser.add_argument("--wrong-labels", type=float, default=0.2, help="their share")
    parser.add_argument("--bright", type=float, default=0.02, help="share of images")
    parser.add_argument("--out", type=Path, default=Path("out/robust"))
    args, images = parse_with_images(parser, argv)
    if not (0 <= args.wrong_labels < 1 and 0 <= args.bright < 1):
        fail(parser, "--wrong-labels and --bright must be in [0, 1)")
    if args.batch_size < 9:
        fail(parser, "--batch-size must be at least 9: the trimmed mean leaves out 8")
    return args, images


@interruptible
def main(argv: Sequence[str] | None = None) -> None:
    args, images = parse_args(argv)
    print(f"{len(images.train_y)} images to train on, {len(images.test_y)} to test")
    began = time.perf_counter()
    wrong = args.wrong_labels
    settings = {
        "true labels": (0.0, 0.0),
        f"{wrong:.0%} wrong": (wrong, 0.0),
        f"{wrong:.0%} wrong, {args.bright:.0%} bright": (wrong, args.bright),
    }
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in settings}
    with Progress(transient=True) as progress:
        task = progress.add_task("training", total=len(settings) * len(METHODS))
        for (setting, bad), method in itertools.product(settings.items(), METHODS):
            found[setting][method] = run(method, images, bad, args)
            progress.advance(task)
    table = {
        method: {
            setting: found[setting][method]["test accuracy, %"] for setting in found
        }
        for method in METHODS
    }
    print_measures("test accuracy, %: mean ± standard deviation over seeds", table)
    plot(args.out / "robust.png", found)
    numbers = {
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "data")}
        | {"data": str(args.data) if args.data else None},
        "seconds": time.perf_counter() - began,
        "found": {
            setting: {
                method: {
                    key: value.tolist() if isinstance(value, np.ndarray) else value
                    for key, value in values.items()
                }
                for method, values in rows.items()
            }
            for setting, rows in found.items()
        },
    }
    write_json(args.out / "robust.json", numbers)
    print(f"wrote {args.out / 'robust.png'} and {args.out / 'robust.json'}")


if __name__ == "__main__":
    main()
