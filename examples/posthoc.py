"""The width of an EMA, chosen after training.

Trains a small network on digits once per seed with two power-function averages in the
chain and snapshots of them on disk, then makes averages of a dozen other widths out of
the snapshots and tests them. True averages of three widths ride along, only to see how
close the ones made afterwards come, from 8, 16, 32 and 64 snapshots.

    python examples/posthoc.py
    python examples/posthoc.py --steps 4096 --learning-rate 0.02 --seeds 5
    python examples/posthoc.py --data fashion_mnist/ --out runs/fashion
    optax-avg inspect out/posthoc/snapshots/0
"""

import argparse
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from _data import Images
from _report import (
    draw,
    fail,
    interruptible,
    parse_with_images,
    positive,
    print_measures,
    spread,
    two_panels,
    write_json,
)
from digits import Network, evaluate, shift, train_step
from flax import nnx
from rich.progress import Progress

import optax_avg as oa

KEPT = [0.05, 0.10]
TRUE = (0.03, 0.08, 0.15)
COUNTS = (8, 16, 32, 64)
SWEPT = tuple(np.geomspace(0.02, 0.25, 12).round(4).tolist())


def make_optimizer(learning_rate: float) -> optax.GradientTransformationExtraArgs:
    """The chain to copy is the first two lines; the third is here to compare with."""
    return optax.chain(
        optax.sgd(learning_rate, momentum=0.9),
        oa.power_ema(KEPT),
        oa.power_ema(list(TRUE), name="true"),
    )


def relative_distance(a: Any, b: Any) -> float:
    difference = jax.tree.map(lambda x, y: x - y, a, b)
    return float(optax.tree.norm(difference) / optax.tree.norm(b))


def train(
    images: Images, args: argparse.Namespace, seed: int, advance: Callable[[], Any]
) -> tuple[Any, Any, Any]:
    """Network, final parameters and state; 64 snapshots are in the store."""
    classes = int(max(images.train_y.max(), images.test_y.max())) + 1
    model = Network(images.train_x.shape[1:], classes, rngs=nnx.Rngs(seed))
    graphdef, params = nnx.split(model)
    tx = make_optimizer(args.learning_rate)
    oa.check_chain(tx, params)  # says so if a link stands at the wrong place
    opt_state = tx.init(params)
    rng = np.random.default_rng(seed)
    with open_store(args, seed) as store:
        store.delete_after(0)  # of an earlier run
        for step in range(1, args.steps + 1):
            batch = rng.integers(len(images.train_y), size=args.batch_size)
            params, opt_state = train_step(
                params,
                opt_state,
                shift(images.train_x[batch], rng),
                images.train_y[batch],
                graphdef=graphdef,
                tx=tx,
            )
            if step % (args.steps // max(COUNTS)) == 0:
                store.save(opt_state[1], step)
            advance()
    return graphdef, params, opt_state


def open_store(args: argparse.Namespace, seed: int) -> oa.posthoc.SnapshotStore:
    return oa.posthoc.SnapshotStore(args.out / "snapshots" / str(seed))


def thinned(
    store: oa.posthoc.SnapshotStore, count: int, folder: str
) -> oa.posthoc.SnapshotStore:
    """The store that evenly fewer saves would have made: a snapshot is a directory."""
    steps = store.steps()
    every = len(steps) // count
    for step in steps[every - 1 :: every]:
        shutil.copytree(Path(store.directory) / str(step), Path(folder) / str(step))
    return oa.posthoc.SnapshotStore(folder)


def run(
    images: Images, args: argparse.Namespace, seed: int, advance: Callable[[], Any]
) -> dict[str, Any]:
    """Test losses by width, of averages made afterwards and of true ones; distances."""
    graphdef, params, opt_state = train(images, args, seed, advance)
    test = lambda tree: float(evaluate(tree, None, images, graphdef)["live"][0])
    true = {
        width: oa.averaged_params(opt_state, params, f"true_{width:g}")
        for width in TRUE
    }
    store = open_store(args, seed)
    swept = []
    for width in SWEPT:
        swept.append(test(store.reconstruct(params, sigma_rel=width)))
        advance()
    distances = {}
    for count in COUNTS:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            # Few snapshots miss a width by far, and say so: that is what is measured.
            warnings.simplefilter("ignore", UserWarning)
            fewer = thinned(store, count, folder)
            for width, tree in true.items():
                made = fewer.reconstruct(params, sigma_rel=width)
                distances[width, count] = relative_distance(made, tree)
    return {
        "live": test(params),
        "swept": swept,
        "true": {width: test(tree) for width, tree in true.items()},
        "distances": distances,
    }


def plot(path: Path, runs: Sequence[dict[str, Any]], distances: Any) -> None:
    """Test loss by width, and how close the averages are to true ones."""
    figure, (left, right) = two_panels()
    swept = np.array([found["swept"] for found in runs])
    draw(left, SWEPT, {"made after training, of 0.05 and 0.10": swept})
    for i, width in enumerate(TRUE):
        losses = np.array([found["true"][width] for found in runs])
        label = "true average" if i == 0 else None
        left.errorbar(width, losses.mean(), spread(losses), fmt="kx", label=label)
    live = np.mean([found["live"] for found in runs])
    left.axhline(live, color="gray", ls="--", label="live parameters")
    left.set(xlabel="sigma_rel", ylabel="test loss, nats", xscale="log", yscale="log")
    left.set_xticks([0.02, 0.05, 0.1, 0.2], ["0.02", "0.05", "0.1", "0.2"])
    left.set_xticks([], minor=True)
    left.legend()
    for width, row in distances.items():
        means = [row[str(count)].mean() for count in COUNTS]
        errors = [spread(row[str(count)]) for count in COUNTS]
        right.errorbar(COUNTS, means, errors, marker="o", label=width)
    right.set(xlabel="snapshots", ylabel="|made - true| / |true|")
    right.set(xscale="log", yscale="log")
    right.set_xticks(COUNTS, [str(count) for count in COUNTS])
    right.minorticks_off()
    right.grid(alpha=0.3)
    right.legend()
    figure.savefig(path, dpi=100)


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Images]:
    count, rate = positive(int), positive(float)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/posthoc"), help="for the results")
    add("--seeds", type=count, default=3, help="runs, with seeds 0, 1, ...")
    add("--steps", type=count, default=2048, help="a multiple of 64")
    add("--learning-rate", type=rate, default=0.05)
    add("--batch-size", type=count, default=16)
    args, images = parse_with_images(parser, argv)
    if args.steps % max(COUNTS):
        fail(parser, f"--steps must be a multiple of {max(COUNTS)}, got {args.steps}")
    return args, images


@interruptible
def main(argv: Sequence[str] | None = None) -> None:
    args, images = parse_args(argv)
    print(f"{len(images.train_y)} images to train on, {len(images.test_y)} to test")
    began = time.perf_counter()
    with Progress(transient=True) as progress:
        total = args.seeds * (args.steps + len(SWEPT))
        advance = partial(progress.advance, progress.add_task("training", total=total))
        runs = [run(images, args, seed, advance) for seed in range(args.seeds)]
    distances = {
        f"sigma_rel {width:g}": {
            str(count): np.array([found["distances"][width, count] for found in runs])
            for count in COUNTS
        }
        for width in TRUE
    }
    print_measures("relative distance to a true average, by snapshots", distances)
    swept = np.array([found["swept"] for found in runs])
    losses = {
        "live parameters": np.array([found["live"] for found in runs]),
        **{
            f"true average, {width:g}": np.array(
                [found["true"][width] for found in runs]
            )
            for width in TRUE
        },
        **{f"made afterwards, {width:g}": swept[:, i] for i, width in enumerate(SWEPT)},
    }
    print_measures("test loss", {name: {"nats": v} for name, v in losses.items()})
    plot(args.out / "posthoc.png", runs, distances)
    numbers = {
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "data")}
        | {"data": str(args.data) if args.data else None},
        "seconds": time.perf_counter() - began,
        "distances": {
            name: {count: v.tolist() for count, v in row.items()}
            for name, row in distances.items()
        },
        "loss": {name: values.tolist() for name, values in losses.items()},
    }
    write_json(args.out / "posthoc.json", numbers)
    print(f"wrote {args.out / 'posthoc.png'} and {args.out / 'posthoc.json'}")


if __name__ == "__main__":
    main()
