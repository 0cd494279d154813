"""One training read at several horizons, and trainings that are made for each of them.

Losses are arrays: (rates, knobs, seeds, horizons, readings) of an anytime method, whose
one training is read at all horizons in several ways, and (rates, options, seeds,
horizons) of a schedule that has to know its horizon. Whatever is chosen, is chosen by
means over seeds.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _lanes import Batch, Make, Params, Run, adam, advance, begin, take

import optax_avg as oa

CHUNKS = 20  # of the shortest horizon; whatever is kept or read lies between chunks
WARMUP = 10  # warm-ups in the shortest horizon
TIMES = 1, 2, 4, 8  # the horizons, in shortest ones
EVERY = 2  # steps between the iterates that the averages take
FACTOR = 2  # from one learning rate to the next
EXTENSIONS = 3  # times that a grid of rates is continued at its ends

SHARES = 0.05, 0.1, 0.2, 0.4, 0.8  # of the training: cooldowns and windows
COOLDOWNS: list[tuple[Literal["linear", "1-sqrt"], float]] = [
    *(("linear", share) for share in SHARES),
    *(("1-sqrt", share) for share in SHARES),
]
# Widths of each kind of average: relative standard deviations, shares, half-lives.
WIDTHS = {
    "live": (0.0,),
    "power EMA": (0.0125, 0.025, 0.05, 0.1, 0.2),
    "window": SHARES,
    "EMA": (4, 16, 64, 256),
}

Reading = tuple[str, float]
RIDING: list[Reading] = [(kind, w) for kind, widths in WIDTHS.items() for w in widths]
INSIDE: list[Reading] = [("inside", 0.0)]


class Task(NamedTuple):
    """Something to learn.

    Attributes:
      rates: Learning rates to try, ``FACTOR`` apart.
      start: Parameters of a seed.
      batch: A batch of a key.
      loss: Loss of parameters on a batch, in nats.
      valid: A batch by which everything is chosen.
      test: Another, on which it is reported.
    """

    rates: tuple[float, ...]
    start: Callable[[int], Params]
    batch: Callable[[jax.Array], Batch]
    loss: Callable[[Params, Batch], jax.Array]
    valid: Batch
    test: Batch


def horizons_of(shortest: int) -> list[int]:
    return [shortest * n for n in TIMES]


class Method(NamedTuple):
    """A training that does not know when it ends.

    Attributes:
      make: The optimizer.
      schedule: Learning rate by step, of the shortest horizon, a rate and a knob.
      readings: What can be read at any time.
      knob: Name of the method's own number.
      knobs: Its values.
    """

    make: Make
    schedule: Callable[[int, float, float], optax.Schedule]
    readings: list[Reading]
    knob: str = ""
    knobs: tuple[float, ...] = (0.0,)


def constant(shortest: int, rate: float, knob: float) -> optax.Schedule:
    """A warm-up, then a constant rate."""
    del knob
    return oa.schedules.warmup_stable_decay(rate, shortest // WARMUP, 0, 0)


def horizon_free(shortest: int, rate: float, knob: float) -> optax.Schedule:
    """The knob is ``alpha`` in shortest horizons."""
    warmup = shortest // WARMUP
    return oa.schedules.horizon_free(rate, knob * shortest, warmup_steps=warmup)


def schedule_free(
    rate: jax.Array, beta: jax.Array
) -> optax.GradientTransformationExtraArgs:
    squared = oa.weights.mass(lambda t: rate**2 + 0 * t)
    inner = optax.adam(rate, b1=0.0)
    return oa.primal_average(inner, squared, beta, nonfinite="keep")


def gpa(rate: jax.Array, mu: jax.Array) -> optax.GradientTransformationExtraArgs:
    weight = oa.weights.ema(mu, debias=False)
    return oa.primal_average(optax.adam(rate), weight, 0.9, nonfinite="keep")


def primal_power(
    rate: jax.Array, width: jax.Array
) -> optax.GradientTransformationExtraArgs:
    weight = oa.weights.power_function(sigma_rel=width)
    return oa.primal_average(optax.adam(rate), weight, 0.9, nonfinite="keep")


METHODS = {
    "constant": Method(adam, constant, RIDING),
    "horizon-free": Method(adam, horizon_free, RIDING, "alpha/T", (0.25, 1.0, 4.0)),
    "schedule-free": Method(schedule_free, constant, INSIDE, "beta", (0.9, 0.95, 0.98)),
    "gpa": Method(gpa, constant, INSIDE, "mu_x", (0.95, 0.98, 0.99)),
    "primal power EMA": Method(
        primal_power, constant, INSIDE, "width", (0.025, 0.05, 0.1)
    ),
}


def riding() -> optax.GradientTransformationExtraArgs:
    """All averages but windows, which are differences of the uniform mean."""
    power = {
        f"power EMA {width:g}": oa.weights.power_function(sigma_rel=width)
        for width in WIDTHS["power EMA"]
    }
    fixed = {
        f"EMA {steps:g}": oa.weights.ema(0.5 ** (EVERY / steps))
        for steps in WIDTHS["EMA"]
    }
    mean = {"mean": oa.weights.uniform()}
    # A lane that has diverged has diverged averages as well.
    return oa.average({**power, **fixed, **mean}, every=EVERY, nonfinite="keep")


class Lane(NamedTuple):
    """One training among those side by side."""

    rate: float
    knob: float
    seed: int


class Lab(NamedTuple):
    """A task with its compiled programs.

    Attributes:
      task: What is learned.
      shortest: The shortest horizon, in steps.
      program: Steps of an optimizer, with or without averages.
      score: Loss of the parameters of each lane on one batch.
      tick: Told how many steps of lanes were made.
    """

    task: Task
    shortest: int
    program: Callable[[Make, bool], Callable[..., Run]]
    score: Callable[[Params, Batch], jax.Array]
    tick: Callable[[int], Any]


def laboratory(task: Task, shortest: int, tick: Callable[[int], Any]) -> Lab:
    @functools.cache
    def program(make: Make, rides: bool) -> Callable[..., Run]:
        averages = riding() if rides else optax.identity()
        of = {"batch": task.batch, "loss": task.loss, "make": make}
        return jax.jit(partial(advance, averages=averages, **of))

    # One lane after the other: all logits together would take much memory.
    each = lambda params, data: jax.lax.map(lambda p: task.loss(p, data), params)
    return Lab(task, shortest, program, jax.jit(each), tick)


def trained(
    lab: Lab,
    make: Make,
    schedule: Callable[[float, float], optax.Schedule],
    lanes: Sequence[Lane],
    stop: int,
    *,
    rides: bool = False,
    since: int = 0,
    run: Run | None = None,
) -> Iterator[tuple[int, Run]]:
    """Trains lanes up to ``stop``; yields the step and the run after each chunk."""
    counts = jnp.arange(since, stop)
    by_lane = [schedule(lane.rate, lane.knob)(counts) for lane in lanes]
    rates = jnp.stack(by_lane, axis=1)
    keys = jax.vmap(jax.random.key)(jnp.array([lane.seed for lane in lanes]))
    knobs = jnp.array([lane.knob for lane in lanes])
    onwards = lab.program(make, rides)
    if run is None:
        starts = [lab.task.start(lane.seed) for lane in lanes]
        run = begin(starts, make, riding() if rides else optax.identity(), knobs)
    chunk = lab.shortest // CHUNKS
    for step in range(since, stop, chunk):
        now = rates[step - since : step - since + chunk]
        run = onwards(run, jnp.asarray(step), now, keys, knobs)
        lab.tick(chunk * len(lanes))
        yield step + chunk, run


def begins(step: int, share: float, shortest: int) -> int:
    """Where the last share of a training up to ``step`` begins, between two chunks."""
    chunk = shortest // CHUNKS
    return step - chunk * max(1, round(share * step / chunk))


@jax.jit
def since_then(newer: Params, older: Params, n: int, m: int) -> Params:
    """The mean of iterates ``m + 1 ... n`` from the means of the first n and m."""
    return jax.tree.map(lambda a, b: (n * a - m * b) / (n - m), newer, older)


def read(
    run: Run, step: int, means: dict[int, Params], shortest: int
) -> dict[Reading, Params]:
    """Every reading of a training; ``means`` holds uniform means of earlier steps."""
    if isinstance(run.averages, optax.EmptyState):
        return {INSIDE[0]: oa.averaged_params(run.state, run.params)}
    named = partial(oa.averaged_params, run.averages, run.params)
    mean = named("mean")

    def one(kind: str, width: float) -> Params:
        if kind == "live":
            return run.params
        if kind != "window":
            return named(f"{kind} {width:g}")
        first = begins(step, width, shortest)
        older = means[first] if first else mean
        return since_then(mean, older, step // EVERY, first // EVERY)

    return {reading: one(*reading) for reading in RIDING}


def measured(
    lab: Lab,
    method: Method,
    lanes: Sequence[Lane],
    points: Sequence[int],
    data: Batch,
    branches: Sequence[int] = (),
) -> tuple[np.ndarray, dict[int, Run]]:
    """Losses of shape (lanes, points, readings), and the runs at some steps."""
    shortest, rides = lab.shortest, method.readings is RIDING
    wanted = {begins(point, share, shortest) for point in points for share in SHARES}
    schedule = partial(method.schedule, shortest)
    means: dict[int, Params] = {}
    kept: dict[int, Run] = {}
    rows = []
    for step, run in trained(
        lab, method.make, schedule, lanes, max(points), rides=rides
    ):
        if rides and step in wanted:
            means[step] = oa.averaged_params(run.averages, run.params, "mean")
        if step in branches:
            kept[step] = run._replace(averages=optax.EmptyState())
        if step in points:
            found = read(run, step, means, shortest).values()
            rows.append([np.asarray(lab.score(params, data)) for params in found])
    return np.moveaxis(np.array(rows, float), -1, 0), kept


def branches_of(shortest: int) -> list[int]:
    """Steps at which cooldowns begin."""
    return [
        begins(horizon, share, shortest)
        for horizon in horizons_of(shortest)
        for share in SHARES
    ]


def cooled(
    lab: Lab,
    kept: dict[int, Run],
    lanes: Sequence[Lane],
    horizon: int,
    option: int,
    data: Batch,
) -> np.ndarray:
    """Losses of branches from a constant rate, whose rate goes to zero."""
    shape, share = COOLDOWNS[option]
    since = begins(horizon, share, lab.shortest)
    warmup = lab.shortest // WARMUP

    def schedule(rate: float, knob: float) -> optax.Schedule:
        del knob
        lengths = warmup, since - warmup, horizon - since
        return oa.schedules.warmup_stable_decay(rate, *lengths, cooldown=shape)

    *_, (_, run) = trained(
        lab, adam, schedule, lanes, horizon, since=since, run=kept[since]
    )
    return np.asarray(lab.score(run.params, data), float)


def annealed(lab: Lab, lanes: Sequence[Lane], horizon: int, data: Batch) -> np.ndarray:
    """Losses at the end of a cosine."""
    warmup = lab.shortest // WARMUP

    def schedule(rate: float, knob: float) -> optax.Schedule:
        del knob
        return optax.warmup_cosine_decay_schedule(0.0, rate, warmup, horizon)

    *_, (_, run) = trained(lab, adam, schedule, lanes, horizon)
    return np.asarray(lab.score(run.params, data), float)


Losses = dict[str, np.ndarray]


def explored(
    lab: Lab, name: str, seeds: Sequence[int], rates: Sequence[float]
) -> Losses:
    """Validation losses of a method, or of ``"cosine"``, at all rates and knobs."""
    horizons = horizons_of(lab.shortest)
    data = lab.task.valid
    if name == "cosine":
        lanes = [Lane(rate, 0.0, seed) for rate in rates for seed in seeds]
        ends = np.stack([annealed(lab, lanes, h, data) for h in horizons])
        ends = ends.reshape(1, len(horizons), len(rates), len(seeds))
        return {"ends": ends.transpose(2, 0, 3, 1)}
    method = METHODS[name]
    lanes = [Lane(*lane) for lane in itertools.product(rates, method.knobs, seeds)]
    branches = branches_of(lab.shortest) if name == "constant" else []
    losses, kept = measured(lab, method, lanes, horizons, data, branches)
    shape = len(rates), len(method.knobs), len(seeds), *losses.shape[1:]
    found = {"anytime": losses.reshape(shape)}
    if branches:
        ends = np.array(
            [
                [cooled(lab, kept, lanes, h, i, data) for h in horizons]
                for i in range(len(COOLDOWNS))
            ]
        )
        ends = ends.reshape(*ends.shape[:2], len(rates), len(seeds))
        found["ends"] = ends.transpose(2, 0, 3, 1)
    return found


class Choice(NamedTuple):
    """Where the least mean is: places on the grids of rates, and of all else."""

    rate: int
    other: tuple[int, ...]


def least(means: np.ndarray) -> Choice:
    """The place of the least number; what is not finite is never chosen."""
    flat = np.where(np.isfinite(means), means, np.inf).argmin()
    rate, *other = (int(i) for i in np.unravel_index(flat, means.shape))
    return Choice(rate, tuple(other))


def choose_ends(losses: np.ndarray) -> list[Choice]:
    """For each horizon, the rate and the option of a schedule that knows it."""
    means = losses.mean(axis=2)
    return [least(means[..., h]) for h in range(means.shape[-1])]


def choose_anytime(losses: np.ndarray, readings: list[Reading]) -> dict[str, Choice]:
    """For each kind of reading, one rate, knob and width for all horizons together."""
    means = losses.mean(axis=(2, 3))
    found = {}
    for kind in dict.fromkeys(kind for kind, _ in readings):
        columns = [i for i, (other, _) in enumerate(readings) if other == kind]
        rate, (knob, width) = least(means[..., columns])
        found[kind] = Choice(rate, (knob, columns[width]))
    return found


def choices(losses: Losses, readings: list[Reading]) -> list[Choice]:
    """All choices that a phase of tuning makes."""
    found = choose_ends(losses["ends"]) if "ends" in losses else []
    if "anytime" in losses:
        found += choose_anytime(losses["anytime"], readings).values()
    return found


def widened(
    rates: Sequence[float],
    explore: Callable[[Sequence[float]], Losses],
    choose: Callable[[Losses], Sequence[Choice]],
) -> tuple[list[float], Losses]:
    """Losses at all rates, and at more of them while a choice is an end of the grid."""
    rates = list(rates)
    losses = explore(rates)
    for _ in range(EXTENSIONS):
        chosen = {choice.rate for choice in choose(losses)}
        lower = [rates[0] / FACTOR] if 0 in chosen else []
        higher = [rates[-1] * FACTOR] if len(rates) - 1 in chosen else []
        if not lower + higher:
            break
        more = explore(lower + higher)
        n = len(lower)
        losses = {
            key: np.concatenate([more[key][:n], old, more[key][n:]])
            for key, old in losses.items()
        }
        rates = lower + rates + higher
    return rates, losses


def curve_points(shortest: int) -> list[int]:
    """Three steps for each doubling, all horizons among them, between chunks."""
    chunk = shortest // CHUNKS
    powers = np.arange(-3, 3 * np.log2(max(TIMES)) + 1) / 3
    return sorted({chunk * round(CHUNKS * 2**p) for p in powers})


def reported(
    lab: Lab,
    name: str,
    seeds: Sequence[int],
    configs: Sequence[tuple[float, float]],
    ends: Sequence[tuple[float, int]],
) -> Losses:
    """Test losses of what was chosen.

    Args:
      lab: A task with its programs.
      name: A method, or ``"cosine"``.
      seeds: Seeds of the trainings.
      configs: Rates and knobs of anytime trainings.
      ends: Rate and option for each horizon, of cosines or of branches of them.

    Returns:
      ``"curves"`` of shape (configs, seeds, points, readings), and ``"ends"`` of shape
      (seeds, horizons).
    """
    data, horizons = lab.task.test, horizons_of(lab.shortest)
    if name == "cosine":
        found = [
            annealed(lab, [Lane(rate, 0.0, seed) for seed in seeds], h, data)
            for h, (rate, _) in zip(horizons, ends, strict=True)
        ]
        return {"ends": np.stack(found, axis=1)}
    lanes = [Lane(*config, seed) for config in configs for seed in seeds]
    branches = branches_of(lab.shortest) if ends else []
    points = curve_points(lab.shortest)
    losses, kept = measured(lab, METHODS[name], lanes, points, data, branches)
    curves = losses.reshape(len(configs), len(seeds), *losses.shape[1:])
    if not ends:
        return {"curves": curves}
    found = []
    for horizon, (rate, option) in zip(horizons, ends, strict=True):
        own = [i for i, lane in enumerate(lanes) if lane.rate == rate]
        some = {step: take(run, own) for step, run in kept.items()}
        some_lanes = [lanes[i] for i in own]
        found.append(cooled(lab, some, some_lanes, horizon, option, data))
    return {"curves": curves, "ends": np.stack(found, axis=1)}
