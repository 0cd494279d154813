"""Every optimizer of this library, and five of Optax, on three small tasks.

Trains a network on scikit-learn's digits, a byte-level transformer on the sources of
Python's standard library, and a badly scaled quadratic whose gradients are noisy. All
optimizers try the same learning rates. An EMA of the parameters rides in each chain.
The rate of each row is chosen on validation data, for the live parameters and for the
average apart; the table shows the mean over seeds on test data, with 95 % intervals.

    python examples/optimizers.py
    python examples/optimizers.py --tasks digits quadratic --methods adamw laprop
    python examples/optimizers.py --quick --out runs/optimizers

All rates and seeds of a row run side by side in one compiled program.
"""

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _data import flat_digits
from _report import (
    check_writable,
    fail,
    half_interval,
    interruptible,
    positive,
    write_json,
)
from flax import nnx
from optax import contrib
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from text import Transformer, bits_per_byte, evaluation_batches, read_corpus

import optax_avg as oa

RATES = tuple(float(10 ** (k / 2)) for k in range(-8, 3))  # 1e-4 to 10
DECAY = 0.98
NOTES = """\
* The best learning rate is an end of the grid: another beyond it may be better still.
u_dog has no learning rate: it finds its step sizes by itself. What is tried for it is a
factor on them, 1 by default."""
CONTEXT = 32  # bytes that the transformer sees

Params = Any
Batch = Any


class Task(NamedTuple):
    """Something to minimise.

    Attributes:
      measure: What is reported; smaller is better.
      start: Parameters of a seed.
      batch: A batch of a key.
      loss: Loss of parameters on a batch.
      chosen_by: What learning rates are chosen by, of parameters.
      reported: What is reported, of parameters.
      examples: Number of training examples.
    """

    measure: str
    start: Callable[[int], Params]
    batch: Callable[[jax.Array], Batch]
    loss: Callable[[Params, Batch], jax.Array]
    chosen_by: Callable[[Params], jax.Array]
    reported: Callable[[Params], jax.Array]
    examples: int


def digits() -> Task:
    """A network with one hidden layer; half of the images are test data."""
    x, y, test_x, test_y = (jnp.asarray(part) for part in flat_digits(0))
    valid_x, valid_y, x, y = x[:200], y[:200], x[200:], y[200:]

    def start(seed: int) -> Params:
        draw = jax.nn.initializers.he_normal()
        first, last = jax.random.split(jax.random.key(seed))
        return {
            "hidden": {"w": draw(first, (64, 64)), "b": jnp.zeros(64)},
            "out": {"w": draw(last, (64, 10)), "b": jnp.zeros(10)},
        }

    def logits(params: Params, images: jax.Array) -> jax.Array:
        layer = lambda x, w, b: x @ w + b[None]
        return layer(jax.nn.relu(layer(images, **params["hidden"])), **params["out"])

    def loss(params: Params, batch: Batch) -> jax.Array:
        images, labels = batch
        scores = logits(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    def batch(key: jax.Array) -> Batch:
        rows = jax.random.choice(key, len(y), (64,))
        return x[rows], y[rows]

    def error(params: Params) -> jax.Array:
        return 100 * jnp.mean(logits(params, test_x).argmax(1) != test_y)

    chosen_by = lambda params: loss(params, (valid_x, valid_y))
    return Task("test error, %", start, batch, loss, chosen_by, error, len(y))


def text() -> Task:
    """A causal transformer of one layer."""
    corpus = read_corpus(None, CONTEXT)
    train = jnp.asarray(corpus.train)
    held_out = evaluation_batches(corpus.held_out, CONTEXT)
    valid, test = (
        held_out[::2].reshape(-1, CONTEXT + 1),
        held_out[1::2].reshape(-1, CONTEXT + 1),
    )

    def parts(seed: int) -> tuple[Any, Params]:
        return nnx.split(Transformer(1, 32, 2, CONTEXT, rngs=nnx.Rngs(seed)))

    graphdef, _ = parts(0)

    def batch(key: jax.Array) -> Batch:
        starts = jax.random.randint(key, (8,), 0, len(train) - CONTEXT)
        return train[starts[:, None] + jnp.arange(CONTEXT + 1)[None]]

    loss = lambda params, windows: bits_per_byte(params, graphdef, windows)
    return Task(
        "test bits per byte",
        lambda seed: parts(seed)[1],
        batch,
        loss,
        lambda params: loss(params, jnp.asarray(valid)),
        lambda params: loss(params, jnp.asarray(test)),
        len(corpus.train) // CONTEXT,
    )


def quadratic() -> Task:
    """``sum_i c_i x_i^2/2`` with ``c`` from 1e-3 to 1, and noise in the gradients."""
    curvature = jnp.logspace(-3, 0, 100).reshape(10, 10)
    value = lambda params: jnp.sum(curvature * params["x"] ** 2) / 2

    def loss(params: Params, noise: Batch) -> jax.Array:
        return value(params) + jnp.sum(noise * params["x"])

    return Task(
        "log10 of the loss",
        lambda seed: {"x": 3 * jax.random.normal(jax.random.key(seed), (10, 10))},
        lambda key: 0.1 * jnp.sqrt(curvature) * jax.random.normal(key, (10, 10)),
        loss,
        value,
        lambda params: jnp.log10(value(params)),
        1000,
    )


TASKS = {"digits": digits, "text": text, "quadratic": quadratic}


class Method(NamedTuple):
    """An optimizer.

    Attributes:
      make: The optimizer, of a learning rate and a task.
      own: Parameters to evaluate, of its state and the live parameters.
    """

    make: Callable[[jax.Array, Task], optax.GradientTransformation]
    own: Callable[[Any, Params], Params] = lambda state, params: params


def then(
    link: optax.GradientTransformation,
    optimizer: Callable[[jax.Array], optax.GradientTransformation],
) -> Callable[[jax.Array, Task], optax.GradientTransformation]:
    """A link before an optimizer."""
    return lambda rate, task: optax.chain(link, optimizer(rate))


def plain(
    optimizer: Callable[[jax.Array], optax.GradientTransformation],
) -> Callable[[jax.Array, Task], optax.GradientTransformation]:
    """An optimizer that needs to know nothing of the task."""
    return lambda rate, task: optimizer(rate)


def momentum(rate: jax.Array) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=0.9)


def schedule_free(rate: jax.Array) -> optax.GradientTransformation:
    return contrib.schedule_free(optax.adamw(rate, b1=0.0), rate, b1=0.9)


METHODS = {
    "adamw": Method(plain(optax.adamw)),
    "nadamw": Method(plain(optax.nadamw)),
    "lion": Method(plain(optax.lion)),
    "muon": Method(plain(contrib.muon)),
    "schedule-free adamw": Method(
        plain(schedule_free), contrib.schedule_free_eval_params
    ),
    "sgd with momentum": Method(plain(momentum)),
    "adahessian": Method(plain(oa.optimizers.adahessian)),
    "adamomentum": Method(plain(oa.optimizers.adamomentum)),
    "adamp": Method(plain(oa.optimizers.adamp)),
    "aggregated_momentum": Method(plain(oa.optimizers.aggregated_momentum)),
    "bsam": Method(lambda rate, task: oa.optimizers.bsam(rate, task.examples)),
    "cautious, adamw": Method(
        lambda rate, task: oa.optimizers.cautious(optax.adamw(rate))
    ),
    "diffgrad": Method(plain(oa.optimizers.diffgrad)),
    "error_feedback of 10 %, sgd": Method(
        then(oa.optimizers.error_feedback(oa.optimizers.top_k(0.1)), optax.sgd)
    ),
    "grams, adamw": Method(lambda rate, task: oa.optimizers.grams(optax.adamw(rate))),
    "gravity": Method(plain(oa.optimizers.gravity)),
    "laprop": Method(plain(oa.optimizers.laprop)),
    "mars, adamw": Method(then(oa.optimizers.mars(), optax.adamw)),
    "nag_gs": Method(plain(oa.optimizers.nag_gs)),
    "norm_loss, sgd": Method(then(oa.optimizers.norm_loss(), momentum)),
    "norm_preserving, adam": Method(
        lambda rate, task: oa.optimizers.norm_preserving(optax.adam(rate))
    ),
    "optimistic_amsgrad": Method(plain(oa.optimizers.optimistic_amsgrad)),
    "preconditioned_polyak": Method(
        lambda rate, task: oa.optimizers.preconditioned_polyak(
            optax.scale_by_rms(bias_correction=True), rate
        )
    ),
    "sgdp": Method(plain(oa.optimizers.sgdp)),
    "spectral_regularisation, sgd": Method(
        then(oa.optimizers.spectral_regularisation(), momentum)
    ),
    "u_dog": Method(plain(oa.optimizers.u_dog), oa.averaged_params),
}


class Scores(NamedTuple):
    """Scores of live and of averaged parameters, each of shape (rates, seeds)."""

    live_choice: np.ndarray
    live: np.ndarray
    ema_choice: np.ndarray
    ema: np.ndarray


def trained(task: Task, method: Method, rates: Any, seeds: int, steps: int) -> Scores:
    """Scores of all rates and seeds, at the end of training."""

    def run(rate: jax.Array, params: Params, seed: jax.Array) -> Scores:
        tx = optax.with_extra_args_support(method.make(rate, task))
        ema = oa.ema_params(DECAY, name="ema")

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, state, average = carry
            batch = task.batch(key)
            of = lambda p: task.loss(p, batch)
            value, grads = jax.value_and_grad(of)(params)
            updates, state = tx.update(
                grads,
                state,
                params,
                value=value,
                grad=grads,
                value_fn=of,
                grad_fn=jax.grad(of),
            )
            updates, average = ema.update(updates, average, params)
            return (optax.apply_updates(params, updates), state, average), None

        keys = jax.random.split(jax.random.key(seed), steps)
        start = (params, tx.init(params), ema.init(params))
        (params, state, average), _ = jax.lax.scan(step, start, keys)
        scored = [method.own(state, params), oa.averaged_params(average, params)]
        return Scores(*(f(x) for x in scored for f in (task.chosen_by, task.reported)))

    starts = [task.start(seed) for seed in range(seeds)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    over_seeds = jax.vmap(run, in_axes=(None, 0, 0))
    over_rates = jax.jit(jax.vmap(over_seeds, in_axes=(0, None, None)))
    found = over_rates(jnp.asarray(rates), stacked, jnp.arange(seeds))
    return Scores(*(np.asarray(x, np.float64) for x in found))


class Row(NamedTuple):
    """What is reported of one kind of parameters."""

    mean: float
    half_interval: float
    rate: float
    at_end_of_grid: bool


def best(choice: np.ndarray, score: np.ndarray, rates: Sequence[float]) -> Row:
    """The scores at the rate that has the best mean choice over seeds."""
    means = np.where(np.isfinite(choice).all(1), choice.mean(1), np.inf)
    i = int(means.argmin())
    half = float(half_interval(score[i]))
    ends = i in (0, len(rates) - 1)
    return Row(float(score[i].mean()), half, float(rates[i]), ends)


def cell(row: Row) -> str:
    """A mean with its interval; a star where the best rate is an end of the grid."""
    star = "*" if row.at_end_of_grid else ""
    return f"{row.mean:.3f} ± {row.half_interval:.3f}{star}"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/optimizers"), help="for optimizers.json")
    add("--seeds", type=positive(int), default=3, help="runs, with seeds 0, 1, ...")
    add("--steps", type=positive(int), default=400)
    add("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    add("--quick", action="store_true", help="40 steps, 2 seeds, 3 rates")
    args = parser.parse_args(argv)
    args.rates = RATES
    if args.quick:
        args.steps, args.seeds, args.rates = 40, 2, RATES[2:8:2]
    try:
        check_writable(args.out)
    except OSError as error:
        fail(parser, f"cannot write to --out {args.out}: {error}")
    return args


@interruptible
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    began = time.perf_counter()
    table = Table(title=f"mean and 95 % interval over {args.seeds} seeds")
    table.add_column("optimizer", no_wrap=True)
    found: dict[str, dict[str, Any]] = {name: {} for name in args.methods}
    with Progress(transient=True) as progress:
        bar = progress.add_task("", total=len(args.tasks) * len(args.methods))
        for title in args.tasks:
            task = TASKS[title]()
            table.add_column(f"{title}: {task.measure}", justify="right")
            table.add_column("+ ema_params", justify="right")
            for name in args.methods:
                progress.update(bar, description=f"{title}, {name}")
                run = functools.partial(trained, task, METHODS[name], args.rates)
                scores = run(args.seeds, args.steps)
                found[name][title] = {
                    "live": best(scores.live_choice, scores.live, args.rates),
                    "ema": best(scores.ema_choice, scores.ema, args.rates),
                    "scores": scores,
                }
                jax.clear_caches()
                progress.advance(bar)
    for name, tasks in found.items():
        rows = [tasks[title][kind] for title in args.tasks for kind in ("live", "ema")]
        table.add_row(name, *map(cell, rows))
    Console(width=None if Console().is_terminal else 180).print(table)
    print(NOTES)
    numbers = {
        "settings": {
            "rates": list(args.rates),
            "seeds": args.seeds,
            "steps": args.steps,
            "decay": DECAY,
        },
        "seconds": time.perf_counter() - began,
        "found": {
            name: {
                title: {
                    "live": kinds["live"]._asdict(),
                    "ema": kinds["ema"]._asdict(),
                    "scores": {
                        field: values.tolist()
                        for field, values in kinds["scores"]._asdict().items()
                    },
                }
                for title, kinds in tasks.items()
            }
            for name, tasks in found.items()
        },
    }
    write_json(args.out / "optimizers.json", numbers)
    print(f"wrote {args.out / 'optimizers.json'}")


if __name__ == "__main__":
    main()
