"""During a run at a constant rate: the loss that a cooldown would have reached.

Trains a byte-level transformer and a convolutional network at two constant learning
rates. At every checkpoint, averages of the iterates stand for models whose rate would
have cooled down over the latest steps: windows in the chain are linear cooldowns,
power-function EMAs look back over a share of the training, and other cooldowns are made
of snapshots. Branches that really cool down, on the same batches, say how right it is.

    python examples/foresight.py
    python examples/foresight.py --tasks text --seeds 5 --out runs/foresight

Losses that fall all correlate, so the straight line in the logarithm of the step is
taken out of each curve first. The table says how well what is left agrees, and how
often a foresight, or the live loss, picks the rate whose branch is better.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _data import load_images
from _lanes import Batch, Params, adam, advance, begin
from _report import (
    check_writable,
    fail,
    half_interval,
    interruptible,
    positive,
    print_measures,
    write_json,
)
from digits import Network
from flax import nnx
from matplotlib.figure import Figure
from rich.progress import Progress
from text import Transformer, bits_per_byte, evaluation_batches, read_corpus

import optax_avg as oa

CONTEXT = 32  # bytes that the transformer sees
POINTS = 10  # iterates of a window
WIDTHS = 0.05, 0.10  # of the power-function EMAs

# What is missing of the rate after a share of a cooldown.
FALLEN = {"linear": lambda s: s, "sqrt": np.sqrt}

Cooldown = tuple[Literal["linear", "sqrt"], int]


class Task(NamedTuple):
    """Something to learn.

    Attributes:
      measure: Name of the loss.
      rates: Two learning rates of Adam.
      start: Parameters of a seed.
      batch: A batch of a key.
      loss: Loss of parameters on a batch.
      held_out: Loss of parameters on held-out data.
    """

    measure: str
    rates: tuple[float, float]
    start: Callable[[int], Params]
    batch: Callable[[jax.Array], Batch]
    loss: Callable[[Params, Batch], jax.Array]
    held_out: Callable[[Params], jax.Array]


def text() -> Task:
    """A causal transformer of two layers on the sources of Python's library."""
    corpus = read_corpus(None, CONTEXT)
    train = jnp.asarray(corpus.train)
    windows = evaluation_batches(corpus.held_out, CONTEXT)
    held_out = jnp.asarray(windows.reshape(-1, CONTEXT + 1))

    def parts(seed: int) -> tuple[Any, Params]:
        return nnx.split(Transformer(2, 32, 2, CONTEXT, rngs=nnx.Rngs(seed)))

    graphdef, _ = parts(0)

    def batch(key: jax.Array) -> Batch:
        starts = jax.random.randint(key, (8, 1), 0, len(train) - CONTEXT)
        return train[starts + jnp.arange(CONTEXT + 1)[None]]

    loss = lambda params, windows: bits_per_byte(params, graphdef, windows)
    return Task(
        "bits per byte",
        (3e-3, 1e-2),
        lambda seed: parts(seed)[1],
        batch,
        loss,
        lambda params: loss(params, held_out),
    )


def digits() -> Task:
    """A convolutional network on scikit-learn's digits."""
    images = load_images(None)
    x, y = jnp.asarray(images.train_x), jnp.asarray(images.train_y)
    test = jnp.asarray(images.test_x), jnp.asarray(images.test_y)

    def parts(seed: int) -> tuple[Any, Params]:
        return nnx.split(Network(images.train_x.shape[1:], 10, rngs=nnx.Rngs(seed)))

    graphdef, _ = parts(0)

    def batch(key: jax.Array) -> Batch:
        rows = jax.random.randint(key, (16,), 0, len(y))
        return x[rows], y[rows]

    def loss(params: Params, batch: Batch) -> jax.Array:
        logits = nnx.merge(graphdef, params)(batch[0])
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return each.mean()

    held_out = lambda params: loss(params, test)
    start = lambda seed: parts(seed)[1]
    return Task("cross-entropy", (3e-3, 1e-2), start, batch, loss, held_out)


TASKS = {"text": text, "digits": digits}


class Settings(NamedTuple):
    """Lengths in optimizer steps; snapshots are ``stride`` apart."""

    steps: int
    checkpoints: int
    stride: int
    cooldowns: tuple[Cooldown, ...]


def settings_of(steps: int, checkpoints: int) -> Settings:
    """Cooldowns of half a checkpoint's distance and of a whole one."""
    apart = steps // checkpoints
    cooldowns = (("linear", apart // 2), ("linear", apart), ("sqrt", apart))
    stride = apart // (2 * POINTS)
    return Settings(apart * checkpoints, checkpoints, stride, cooldowns)


def averages_of(settings: Settings) -> optax.GradientTransformationExtraArgs:
    """The part to copy: averages that stand last in the chain."""
    windows = [
        oa.window_average(POINTS, every=k // POINTS, name=f"window {k}")
        for shape, k in settings.cooldowns
        if shape == "linear"
    ]
    return optax.chain(*windows, oa.power_ema(list(WIDTHS)))


class Losses(NamedTuple):
    """Held-out losses, each of shape (checkpoints, seeds, rates).

    Attributes:
      live: Of the run at a constant rate.
      foreseen: Of its averages, by kind and by the cooldown that they stand for.
      cooled: Of branches that cool down, by cooldown.
    """

    live: np.ndarray
    foreseen: dict[tuple[str, Cooldown], np.ndarray]
    cooled: dict[Cooldown, np.ndarray]


def train(
    task: Task, settings: Settings, seeds: int, tick: Callable[[int], Any]
) -> Losses:
    """One run, its averages, and branches from it."""
    starts = [task.start(seed) for seed in range(seeds) for _ in task.rates]
    averages, none = averages_of(settings), optax.identity()
    rates = jnp.tile(jnp.asarray(task.rates), seeds)
    options = {
        "keys": jnp.repeat(jax.random.split(jax.random.key(0), seeds), len(task.rates)),
        "knobs": rates,
        "batch": task.batch,
        "loss": task.loss,
        "make": adam,
    }
    onwards = jax.jit(partial(advance, averages=averages, **options))
    branch = jax.jit(partial(advance, averages=none, **options))
    score = jax.jit(jax.vmap(task.held_out))
    shaped = lambda p: np.asarray(score(p), float).reshape(seeds, len(task.rates))

    run = begin(starts, adam, averages, rates)
    kept = {0: run}
    apart = settings.steps // settings.checkpoints
    rows: list[dict[Any, np.ndarray]] = []

    def cooled(cooldown: Cooldown, end: int) -> Params:
        shape, k = cooldown
        begins = kept[end - k]._replace(averages=none.init(run.params))
        factors = jnp.asarray(1 - FALLEN[shape](np.arange(k) / k))
        return branch(begins, jnp.asarray(end - k), jnp.outer(factors, rates)).params

    def foreseen(store: oa.posthoc.SnapshotStore) -> dict[Any, Params]:
        read = partial(oa.averaged_params, run.averages, run.params)
        found = {}
        for cooldown in settings.cooldowns:
            shape, k = cooldown
            if shape == "linear":
                found["window", cooldown] = read(f"window {k}")
            if cooldown == ("linear", apart):
                for width in WIDTHS:
                    name = f"power_ema_{width}"
                    found[name, cooldown] = read(name)
            found["snapshots", cooldown] = store.reconstruct(
                run.params, cooldown=cooldown, names=["parameters"]
            )
        return found

    with (
        tempfile.TemporaryDirectory() as folder,
        oa.posthoc.SnapshotStore(folder) as store,
    ):
        for step in range(settings.stride, settings.steps + 1, settings.stride):
            begun = jnp.asarray(step - settings.stride)
            run = onwards(run, begun, jnp.tile(rates, (settings.stride, 1)))
            kept[step] = run._replace(averages=None)
            kept.pop(step - apart - settings.stride, None)
            store.save(None, step, run.params)
            tick(settings.stride)
            if step % apart == 0:
                models = {("live", None): run.params} | foreseen(store)
                for cooldown in settings.cooldowns:
                    models["cooled", cooldown] = cooled(cooldown, step)
                    tick(cooldown[1])
                rows.append({name: shaped(model) for name, model in models.items()})
    curves = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    live = curves.pop(("live", None))
    branches = {c: curves.pop(("cooled", c)) for c in settings.cooldowns}
    return Losses(live, curves, branches)


def detrended(curve: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """A curve of each lane without its straight line in ``log(step)``."""
    lanes = curve.reshape(len(steps), -1)
    basis = np.stack([np.ones(len(steps)), np.log(steps)], axis=1)
    return lanes - basis @ np.linalg.lstsq(basis, lanes, rcond=None)[0]


def correlation(a: np.ndarray, b: np.ndarray, steps: np.ndarray) -> float:
    """Correlation of what is left of two sets of curves."""
    left = [detrended(curve, steps).ravel() for curve in (a, b)]
    return float(np.corrcoef(*left)[0, 1])


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Share of checkpoints and seeds at which both prefer the same rate."""
    return float(np.mean(a.argmin(axis=2) == b.argmin(axis=2)))


def gap(foreseen: np.ndarray, cooled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean gap at each checkpoint, and half of its 95 % interval over seeds."""
    each = (foreseen - cooled).mean(axis=2)
    return each.mean(axis=1), half_interval(each.T)


def label(kind: str, cooldown: Cooldown) -> str:
    shape, k = cooldown
    return f"{kind}: {shape} over {k}"


def judged(losses: Losses, steps: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """One row for each foresight; gaps by seed, the rest one number."""
    rows = {}
    for (kind, cooldown), foreseen in losses.foreseen.items():
        cooled = losses.cooled[cooldown]
        rows[label(kind, cooldown)] = {
            "gap": (foreseen - cooled).mean(axis=(0, 2)),
            "live gap": (losses.live - cooled).mean(axis=(0, 2)),
            "correlation": np.array([correlation(foreseen, cooled, steps)]),
            "of live": np.array([correlation(losses.live, cooled, steps)]),
            "rate picked": np.array([agreement(foreseen, cooled)]),
            "by live": np.array([agreement(losses.live, cooled)]),
        }
    return rows


def plot(path: Path, found: dict[str, tuple[Task, np.ndarray, Losses]]) -> None:
    """For each task: the curves of the longer linear cooldown, and all gaps."""
    figure = Figure(figsize=(11, 4 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 2, squeeze=False)
    for (left, right), (title, (task, steps, losses)) in zip(
        panels, found.items(), strict=True
    ):
        longest = [c for c in losses.cooled if c[0] == "linear"][-1]
        for i, rate in enumerate(task.rates):
            mean = lambda curve, i=i: curve[:, :, i].mean(axis=1)
            (line,) = left.plot(steps, mean(losses.live), "--", label=f"live, {rate:g}")
            color = line.get_color()
            window = mean(losses.foreseen["window", longest])
            left.plot(steps, window, color=color, label="foreseen by a window")
            truth = mean(losses.cooled[longest])
            left.plot(steps, truth, "o", color=color, label="really cooled down")
        left.set(title=title, xlabel="optimizer step", ylabel=task.measure)
        left.legend(ncols=2)
        for (kind, cooldown), foreseen in losses.foreseen.items():
            mean, half = gap(foreseen, losses.cooled[cooldown])
            (line,) = right.plot(steps, mean, "o-", label=label(kind, cooldown))
            color = line.get_color()
            right.fill_between(steps, mean - half, mean + half, color=color, alpha=0.15)
        right.axhline(0, color="black", lw=0.8)
        right.set(xlabel="optimizer step", ylabel="foreseen minus cooled down")
        right.set_title("band: 95 % interval of the mean over seeds")
        right.legend()
    figure.savefig(path, dpi=100)


def numbers_of(steps: np.ndarray, losses: Losses) -> dict[str, Any]:
    gaps = {
        label(kind, cooldown): gap(foreseen, losses.cooled[cooldown])
        for (kind, cooldown), foreseen in losses.foreseen.items()
    }
    return {
        "steps": steps.tolist(),
        "live": losses.live.tolist(),
        "foreseen": {label(*k): v.tolist() for k, v in losses.foreseen.items()},
        "cooled": {label("branch", k): v.tolist() for k, v in losses.cooled.items()},
        "gap": {k: mean.tolist() for k, (mean, _) in gaps.items()},
        "half interval": {k: half.tolist() for k, (_, half) in gaps.items()},
    }


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/foresight"), help="for .png and .json")
    add("--seeds", type=positive(int), default=3, help="runs, with seeds 0, 1, ...")
    add("--steps", type=positive(int), default=800)
    add("--checkpoints", type=positive(int), default=10)
    add("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    args = parser.parse_args(argv)
    # Windows of POINTS iterates over half of the distance need such a distance.
    apart = args.steps // args.checkpoints // (2 * POINTS) * 2 * POINTS
    if args.checkpoints < 3 or not apart:
        fail(
            parser,
            f"--steps {args.steps} --checkpoints {args.checkpoints}: pass at least 3 "
            f"checkpoints, {2 * POINTS} steps apart",
        )
    args.steps = apart * args.checkpoints
    try:
        check_writable(args.out)
    except OSError as error:
        fail(parser, f"cannot write to --out {args.out}: {error}")
    return args


@interruptible
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    settings = settings_of(args.steps, args.checkpoints)
    began = time.perf_counter()
    apart = settings.steps // settings.checkpoints
    steps = np.arange(1, settings.checkpoints + 1) * apart
    branches = settings.checkpoints * sum(k for _, k in settings.cooldowns)
    found: dict[str, tuple[Task, np.ndarray, Losses]] = {}
    with Progress(transient=True) as progress:
        for title in args.tasks:
            bar = progress.add_task(title, total=settings.steps + branches)
            task = TASKS[title]()
            tick = partial(progress.advance, bar)
            found[title] = task, steps, train(task, settings, args.seeds, tick)
    for title, (task, _, losses) in found.items():
        print_measures(f"{title}: {task.measure}", judged(losses, steps))
    plot(args.out / "foresight.png", found)
    numbers = {
        "settings": settings._asdict() | {"seeds": args.seeds},
        "seconds": time.perf_counter() - began,
        "tasks": {
            title: {"rates": list(task.rates), **numbers_of(steps, losses)}
            for title, (task, _, losses) in found.items()
        },
    }
    write_json(args.out / "foresight.json", numbers)
    print(f"wrote {args.out / 'foresight.png'} and {args.out / 'foresight.json'}")


if __name__ == "__main__":
    main()
