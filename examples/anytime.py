"""One training without an end against schedules that were tuned for theirs.

Trains a byte-level transformer and a convolutional network to four horizons, the
longest eight times the shortest. Constant and horizon-free learning rates with averages
of the parameters, Schedule-Free and GPA are trained once and read at every horizon. A
warmup-stable-decay and a cosine are made for each horizon, with a rate, a cooldown and
a shape of their own.

    python examples/anytime.py
    python examples/anytime.py --resume  # goes on where it was stopped
    python examples/anytime.py --tasks digits --quick --out runs/anytime

Rates, widths and all else are chosen by the mean over other seeds and on other data
than what is reported. Every method tries the same rates, and more of the same sequence
as long as its best one is an end of it. An anytime method has one rate and one width
for all horizons. The table and the pictures show differences from the tuned
warmup-stable-decay within each seed, with 95 % intervals.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import _anytime as trainings
import _anytime_report as pages
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _anytime import COOLDOWNS, METHODS, RIDING, Lab, Losses, Task
from _anytime_report import Phase, Row, Settings
from _data import load_images
from _report import (
    check_writable,
    fail,
    interruptible,
    positive,
    write_json,
)
from digits import Network
from flax import nnx
from rich.progress import Progress
from text import Transformer, bits_per_byte, evaluation_batches, read_corpus

REPORTED_SEEDS = 0  # the first of them
TUNING_SEEDS = 1000

CONTEXT = 32  # bytes that the transformer sees
LAYERS, WIDTH, HEADS = 2, 32, 2
WINDOWS = 8  # of text in a batch
IMAGES = 16  # in a batch
WRONG = 0.2  # of the labels


def text_parts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sources of Python's library: to train on, to choose by, and to report."""
    corpus = read_corpus(None, CONTEXT)
    half = len(corpus.held_out) // 2
    return corpus.train, corpus.held_out[:half], corpus.held_out[half:]


def text() -> Task:
    """A causal transformer over bytes."""
    train, *held_out = text_parts()
    train = jnp.asarray(train)
    valid, test = (
        jnp.asarray(evaluation_batches(part, CONTEXT).reshape(-1, CONTEXT + 1))
        for part in held_out
    )

    def parts(seed: int) -> tuple[Any, Any]:
        model = Transformer(LAYERS, WIDTH, HEADS, CONTEXT, rngs=nnx.Rngs(seed))
        return nnx.split(model)

    graphdef, _ = parts(0)

    def batch(key: jax.Array) -> jax.Array:
        starts = jax.random.randint(key, (WINDOWS, 1), 0, len(train) - CONTEXT)
        return train[starts + jnp.arange(CONTEXT + 1)[None]]

    rates = tuple(2.0**k for k in range(-10, -4))
    start = lambda seed: parts(seed)[1]
    loss = lambda params, windows: jnp.log(2) * bits_per_byte(params, graphdef, windows)
    return Task(rates, start, batch, loss, valid, test)


def digit_parts() -> list[tuple[np.ndarray, np.ndarray]]:
    """Images and labels: to train on, to choose by, and to report."""
    images = load_images(None)
    x, y, n = images.train_x, images.train_y, len(images.test_y)
    return [(x[n:], y[n:]), (x[:n], y[:n]), (images.test_x, images.test_y)]


def digits() -> Task:
    """A convolutional network; images are shifted, and labels are wrong at random.

    The held-out loss is the mean over the wrong labels as well, so its floor is the
    entropy of a label, 0.87 nats.
    """
    (x, y), *held_out = digit_parts()
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    places = [(i, j) for i in range(3) for j in range(3)]
    moved = jnp.stack([padded[:, i : i + height, j : j + width] for i, j in places])
    labels = jnp.asarray(y)

    def parts(seed: int) -> tuple[Any, Any]:
        return nnx.split(Network(x.shape[1:], 10, rngs=nnx.Rngs(seed)))

    graphdef, _ = parts(0)

    def batch(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(key, 4)
        place = jax.random.randint(keys[0], (IMAGES,), 0, len(places))
        row = jax.random.randint(keys[1], (IMAGES,), 0, len(y))
        wrong = jax.random.bernoulli(keys[2], WRONG, (IMAGES,))
        other = jax.random.randint(keys[3], (IMAGES,), 0, 10)
        return moved[place, row], jax.nn.one_hot(
            jnp.where(wrong, other, labels[row]), 10
        )

    def loss(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = nnx.merge(graphdef, params)(batch[0])
        return optax.softmax_cross_entropy(logits, batch[1]).mean()

    def whole(x: np.ndarray, y: np.ndarray) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(x), optax.smooth_labels(jax.nn.one_hot(y, 10), WRONG)

    rates = tuple(2.0**k for k in range(-11, -5))
    valid, test = (whole(*part) for part in held_out)
    return Task(rates, lambda seed: parts(seed)[1], batch, loss, valid, test)


TASKS = {"text": text, "digits": digits}


def rates_of(task: Task, settings: Settings) -> tuple[float, ...]:
    """The grid that all methods begin with."""
    return task.rates[1::2] if settings.thin else task.rates


def tune(lab: Lab, name: str, settings: Settings) -> Phase:
    """Validation losses of a method at all rates and knobs."""
    seeds = range(TUNING_SEEDS, TUNING_SEEDS + settings.tuning_seeds)
    readings = METHODS[name].readings if name in METHODS else []
    rates, losses = trainings.widened(
        rates_of(lab.task, settings),
        partial(trainings.explored, lab, name, seeds),
        lambda losses: trainings.choices(losses, readings),
    )
    return {"rates": rates, "losses": losses}


def report(lab: Lab, name: str, settings: Settings, tuned: Phase) -> Phase:
    """Test losses of what was chosen."""
    picked = pages.chosen(name, tuned)
    ends = [(picked.rates[c.rate], c.other[0]) for c in picked.ends]
    configs = set()
    if name in METHODS:
        knobs = METHODS[name].knobs
        configs |= {
            (picked.rates[c.rate], knobs[c.other[0]]) for c in picked.anytime.values()
        }
        configs |= {(rate, knobs[0]) for rate, _ in ends}
    seeds = range(REPORTED_SEEDS, REPORTED_SEEDS + settings.seeds)
    losses = trainings.reported(lab, name, seeds, sorted(configs), ends)
    return {"configs": sorted(configs), "losses": losses}


def phases_of(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Tuning comes first, so that a look at it is worth while early."""
    names = ["constant", "cosine", *(name for name in methods if name != "constant")]
    return [(kind, name) for kind in ("tune", "report") for name in names]


def steps_of(kind: str, name: str, task: Task, settings: Settings) -> int:
    """About how many steps of lanes a phase takes, without continued grids."""
    total = settings.horizon * sum(trainings.TIMES)
    longest = settings.horizon * max(trainings.TIMES)
    cooldowns = sum(share for _, share in COOLDOWNS)
    lanes = settings.seeds
    if kind == "tune":
        lanes = settings.tuning_seeds * len(rates_of(task, settings))
    if name == "cosine":
        return lanes * total
    if name == "constant":
        share = cooldowns if kind == "tune" else cooldowns / len(COOLDOWNS)
        return int(lanes * (longest + share * total))
    return lanes * longest * (len(METHODS[name].knobs) if kind == "tune" else 1)


def to_lists(phase: Phase) -> Phase:
    return phase | {"losses": {k: x.tolist() for k, x in phase["losses"].items()}}


def to_arrays(phase: Phase) -> Phase:
    """The same back from JSON, where null stands for what is not finite."""
    losses: Losses = {k: np.array(x, float) for k, x in phase["losses"].items()}
    return phase | {"losses": losses}


class Store(NamedTuple):
    """A file of all phases that are done, written anew after each of them."""

    path: Path
    settings: dict[str, Any]
    phases: dict[str, dict[str, Phase]]
    summaries: dict[str, Any]


def save(store: Store) -> None:
    """A stop while writing leaves the file from before."""
    done = [phase for found in store.phases.values() for phase in found.values()]
    numbers = {
        "settings": store.settings,
        "device": {
            "platform": jax.default_backend(),
            "kind": jax.devices()[0].device_kind,
            "processors": os.cpu_count(),
        },
        "seconds": sum(phase["seconds"] for phase in done),
        "tasks": {
            title: {
                "summary": store.summaries.get(title),
                "phases": {name: to_lists(phase) for name, phase in found.items()},
            }
            for title, found in store.phases.items()
        },
    }
    new = store.path.with_suffix(".new")
    write_json(new, numbers)
    new.replace(store.path)


def opened(path: Path, settings: Settings, resume: bool) -> Store:
    """An empty store, or what an earlier run with these settings left.

    Raises:
      ValueError: If the earlier run had other settings.
    """
    named = settings._asdict() | {
        "horizons": trainings.horizons_of(settings.horizon),
        "averages": [list(reading) for reading in RIDING],
        "cooldowns": [list(cooldown) for cooldown in COOLDOWNS],
        "knobs": {name: list(method.knobs) for name, method in METHODS.items()},
    }
    if not (resume and path.is_file()):
        return Store(path, named, {}, {})
    old = json.loads(path.read_text())
    if old["settings"] != json.loads(json.dumps(named)):
        raise ValueError(
            f"{path} was made with other settings; leave out --resume to begin anew"
        )
    phases = {
        title: {name: to_arrays(phase) for name, phase in task["phases"].items()}
        for title, task in old["tasks"].items()
    }
    summaries = {title: task["summary"] for title, task in old["tasks"].items()}
    return Store(path, named, phases, summaries)


def complete(
    found: dict[str, Phase],
    lab: Lab,
    todo: Sequence[tuple[str, str]],
    settings: Settings,
    begun: Callable[[str], None],
    done: Callable[[], None],
) -> None:
    """Adds all phases that are not there yet, and says so after each of them."""
    for kind, name in todo:
        phase = f"{kind} {name}"
        begun(phase)
        if phase in found:
            lab.tick(steps_of(kind, name, lab.task, settings))
            continue
        began = time.perf_counter()
        if kind == "tune":
            new = tune(lab, name, settings)
        else:
            new = report(lab, name, settings, found[f"tune {name}"])
        # As the file has them, so that nothing changes where a run is resumed.
        losses = {key: np.round(x, 6) for key, x in new["losses"].items()}
        seconds = time.perf_counter() - began
        found[phase] = new | {"losses": losses, "seconds": seconds}
        done()


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/anytime"), help="for .png and .json")
    add("--horizon", type=positive(int), default=240, help="steps of the shortest")
    add("--seeds", type=positive(int), default=5, help="to report: 0, 1, ...")
    add("--tuning-seeds", type=positive(int), default=2, help="to choose by, others")
    add("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    add("--resume", action="store_true", help="go on from the phases that are done")
    add("--quick", action="store_true", help="few steps, rates and seeds")
    args = parser.parse_args(argv)
    if args.quick:
        args.horizon, args.seeds, args.tuning_seeds = 40, 2, 1
    grain = trainings.CHUNKS * trainings.EVERY
    if args.horizon % grain:
        fail(parser, f"--horizon {args.horizon} is not a multiple of {grain}")
    args.methods = list(dict.fromkeys(["constant", *args.methods]))
    args.settings = Settings(args.horizon, args.seeds, args.tuning_seeds, args.quick)
    try:
        check_writable(args.out)
        args.store = opened(args.out / "anytime.json", args.settings, args.resume)
    except OSError as error:
        fail(parser, f"cannot write to --out {args.out}: {error}")
    except (ValueError, KeyError) as error:
        fail(parser, f"cannot resume: {error}")
    return args


@interruptible
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    settings, store = args.settings, args.store
    horizons = trainings.horizons_of(settings.horizon)
    tables: dict[str, tuple[list[Row], Any]] = {}
    todo = phases_of(args.methods)
    with Progress(transient=True) as progress:
        tasks = {title: TASKS[title]() for title in args.tasks}
        lengths = [
            steps_of(*p, task, settings) for task in tasks.values() for p in todo
        ]
        bar = progress.add_task("", total=sum(lengths))
        for title, task in tasks.items():
            lab = trainings.laboratory(
                task, settings.horizon, partial(progress.advance, bar)
            )
            found = store.phases.setdefault(title, {})
            begun = lambda p, t=title: progress.update(bar, description=f"{t}: {p}")
            complete(found, lab, todo, settings, begun, lambda: save(store))
            rows = pages.rows_of(found, args.methods, settings)
            tables[title] = rows, pages.widths_of(found, settings)
            store.summaries[title] = pages.summary_of(*tables[title])
            save(store)
    for title, (rows, widths) in tables.items():
        pages.print_rows(title, rows, horizons)
        pages.print_widths(title, widths, horizons)
    points = trainings.curve_points(settings.horizon)
    curves = {title: rows for title, (rows, _) in tables.items()}
    pages.plot(args.out / "anytime.png", curves, points, horizons)
    by_width = {title: widths for title, (_, widths) in tables.items()}
    pages.plot_widths(args.out / "anytime_widths.png", by_width, horizons)
    names = ("anytime.json", "anytime.png", "anytime_widths.png")
    print("wrote", ", ".join(str(args.out / name) for name in names))


if __name__ == "__main__":
    main()
