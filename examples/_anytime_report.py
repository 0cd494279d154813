"""Rows, tables and pictures of anytime.py, made of the phases that it saves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import _anytime as trainings
import numpy as np
from _anytime import COOLDOWNS, METHODS, RIDING, Choice
from _report import half_interval
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

CLOSE = 0.01  # nats


class Settings(NamedTuple):
    """What a run depends on.

    Attributes:
      horizon: The shortest horizon, in steps.
      seeds: Number of seeds to report.
      tuning_seeds: Number of seeds to choose by.
      thin: Whether every other rate is tried.
    """

    horizon: int
    seeds: int
    tuning_seeds: int
    thin: bool


Phase = dict[str, Any]


class Chosen(NamedTuple):
    """What tuning chose for a method.

    Attributes:
      anytime: For each kind of reading, one choice.
      ends: For each horizon, one choice.
      rates: The grid of rates.
    """

    anytime: dict[str, Choice]
    ends: list[Choice]
    rates: list[float]


def chosen(name: str, phase: Phase) -> Chosen:
    losses = phase["losses"]
    readings = METHODS[name].readings if name in METHODS else []
    return Chosen(
        trainings.choose_anytime(losses["anytime"], readings) if readings else {},
        trainings.choose_ends(losses["ends"]) if "ends" in losses else [],
        phase["rates"],
    )


class Row(NamedTuple):
    """What is reported of one training, or of one for each horizon.

    Attributes:
      label: Its name.
      choice: What was chosen; a star follows what is an end of its grid.
      losses: Test losses of shape (seeds, horizons).
      curve: Test losses of shape (seeds, points), where there is one.
      method: Name of the method.
      kind: Kind of the reading.
      valid: Mean validation loss by which it was chosen, NaN of several choices.
    """

    label: str
    choice: str
    losses: np.ndarray
    curve: np.ndarray | None
    method: str
    kind: str
    valid: float = float("nan")


def starred(value: float, place: int, length: int) -> str:
    """A value, with a star if it is an end of a grid of several."""
    return f"{value:.3g}" + ("*" if length > 1 and place in (0, length - 1) else "")


def chosen_ends(name: str, picked: Chosen) -> str:
    """Rates and cooldowns of all horizons."""
    rates = picked.rates
    lines = []
    for rate, (option, *_) in picked.ends:
        words = [f"rate {starred(rates[rate], rate, len(rates))}"]
        if name == "constant":
            shape, share = COOLDOWNS[option]
            place = trainings.SHARES.index(share)
            words.append(f"{shape} {starred(share, place, len(trainings.SHARES))}")
        lines.append(" ".join(words))
    return ", ".join(lines)


def chosen_anytime(name: str, choice: Choice, rates: Sequence[float]) -> str:
    """Rate, knob and width."""
    method = METHODS[name]
    knob, reading = choice.other
    kind, width = method.readings[reading]
    words = [f"rate {starred(rates[choice.rate], choice.rate, len(rates))}"]
    if method.knob:
        value = starred(method.knobs[knob], knob, len(method.knobs))
        words.append(f"{method.knob} {value}")
    widths = trainings.WIDTHS.get(kind, ())
    if len(widths) > 1:
        words.append(f"width {starred(width, widths.index(width), len(widths))}")
    return ", ".join(words)


def rows_of(
    phases: Mapping[str, Phase], methods: Sequence[str], settings: Settings
) -> list[Row]:
    """The tuned warmup-stable-decay, the cosine, and all anytime methods."""
    points = trainings.curve_points(settings.horizon)
    at = [points.index(h) for h in trainings.horizons_of(settings.horizon)]
    rows, anytime = [], []
    for name in dict.fromkeys(["constant", "cosine", *methods]):
        picked = chosen(name, phases[f"tune {name}"])
        found = phases[f"report {name}"]
        if picked.ends:
            label = "warmup-stable-decay" if name == "constant" else name
            ends = found["losses"]["ends"]
            choice = chosen_ends(name, picked)
            rows.append(Row(label, choice, ends, None, label, "end"))
        for kind, choice in picked.anytime.items():
            knob, reading = choice.other
            config = picked.rates[choice.rate], METHODS[name].knobs[knob]
            i = [tuple(config) for config in found["configs"]].index(config)
            curve = found["losses"]["curves"][i, :, :, reading]
            label = name if kind == "inside" else f"{name}, {kind}"
            words = chosen_anytime(name, choice, picked.rates)
            tuned = phases[f"tune {name}"]["losses"]["anytime"].mean(axis=(2, 3))
            valid = float(tuned[choice.rate, knob, reading])
            anytime.append(Row(label, words, curve[:, at], curve, name, kind, valid))
    return rows + anytime


class Gap(NamedTuple):
    """Mean difference at each horizon, and half of its 95 % interval."""

    mean: np.ndarray
    half: np.ndarray


def gap(losses: np.ndarray, base: np.ndarray) -> Gap:
    """Differences within each seed, the first axis."""
    each = losses - base
    return Gap(each.mean(axis=0), half_interval(each))


def verdict(found: Gap) -> str:
    """Whether a difference is below ``CLOSE`` at every horizon, as far as is known."""
    if np.all(found.mean + found.half <= CLOSE):
        return "yes"
    return "no" if np.any(found.mean - found.half > CLOSE) else "open"


def widths_of(
    phases: Mapping[str, Phase], settings: Settings
) -> dict[str, tuple[list[float], Gap]]:
    """Differences by the width of an average, at a constant rate tuned for its kind."""
    points = trainings.curve_points(settings.horizon)
    at = [points.index(h) for h in trainings.horizons_of(settings.horizon)]
    found = phases["report constant"]
    base = found["losses"]["ends"]
    picked = chosen("constant", phases["tune constant"])
    configs = [rate for rate, _ in found["configs"]]
    by_kind = {}
    for kind in ("power EMA", "window"):
        rate = picked.rates[picked.anytime[kind].rate]
        columns = [i for i, (other, _) in enumerate(RIDING) if other == kind]
        curves = found["losses"]["curves"][configs.index(rate)][:, at][..., columns]
        widths = [RIDING[i][1] for i in columns]
        by_kind[kind] = widths, gap(curves, base[..., None])
    return by_kind


def print_rows(title: str, rows: Sequence[Row], horizons: Sequence[int]) -> None:
    """Losses of the first row, differences from it in all others."""
    table = Table(title=f"{title}: test loss in nats, minus warmup-stable-decay")
    table.add_column("training")
    for horizon in horizons:
        table.add_column(f"{horizon} steps", justify="right")
    table.add_column(f"within {CLOSE:g}")
    table.add_column("chosen (* an end of its grid)")
    base = rows[0].losses
    for row in rows:
        if row is rows[0]:
            halves = half_interval(base)
            cells = [f"{m:.4f} ± {h:.4f}" for m, h in zip(base.mean(axis=0), halves)]
            table.add_row(row.label, *cells, "", row.choice)
            continue
        found = gap(row.losses, base)
        cells = [f"{m:+.4f} ± {h:.4f}" for m, h in zip(*found)]
        table.add_row(row.label, *cells, verdict(found), row.choice)
    Console(width=None if Console().is_terminal else 200).print(table)


def print_widths(
    title: str,
    widths: Mapping[str, tuple[list[float], Gap]],
    horizons: Sequence[int],
) -> None:
    table = Table(title=f"{title}: a constant rate by the width of its average")
    for name in ("average", "width", *(f"{horizon} steps" for horizon in horizons)):
        table.add_column(name, justify="left" if name == "average" else "right")
    for kind, (values, found) in widths.items():
        for i, width in enumerate(values):
            column = zip(found.mean[:, i], found.half[:, i])
            cells = [f"{m:+.4f} ± {h:.4f}" for m, h in column]
            table.add_row(kind, f"{width:g}", *cells)
    Console(width=None if Console().is_terminal else 140).print(table)


def drawn(rows: Sequence[Row]) -> list[Row]:
    """Ends, the live constant rate, and the best kind of each anytime method."""
    found = [row for row in rows if row.curve is None]
    found += [row for row in rows if row.label == "constant, live"]
    for method in dict.fromkeys(row.method for row in rows if row.curve is not None):
        own = [row for row in rows if row.method == method and row.kind != "live"]
        found.append(min(own, key=lambda row: row.valid))
    return found


def band(axes: Axes, x: Sequence[float], found: Gap, **style: Any) -> None:
    """A line with its 95 % interval."""
    (line,) = axes.plot(x, found.mean, **style)
    low, high = found.mean - found.half, found.mean + found.half
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, lw=0)


def log_steps(axes: Axes, horizons: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(horizons, [str(horizon) for horizon in horizons])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("optimizer step")
    axes.grid(alpha=0.3)


def plot(
    path: Path, found: Mapping[str, Sequence[Row]], points: Sequence[int], ends: Any
) -> None:
    """For each task, test losses over steps, and differences at the horizons."""
    figure = Figure(figsize=(11, 4.2 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 2, squeeze=False)
    for (left, right), (title, rows) in zip(panels, found.items(), strict=True):
        base = rows[0].losses
        for i, row in enumerate(drawn(rows)):
            color = "black" if i == 0 else f"C{i - 1}"
            zero = np.zeros((1, 1))
            if row.curve is not None:
                band(left, points, gap(row.curve, zero), color=color, label=row.label)
            else:
                mean, half = gap(row.losses, zero)
                style = {"color": color, "label": f"{row.label}, tuned for each end"}
                marker = "o" if i == 0 else "s"
                left.errorbar(ends, mean, half, fmt=marker, ms=5, zorder=3, **style)
            if i:
                style = {"color": color, "marker": "o", "ms": 4, "label": row.label}
                band(right, ends, gap(row.losses, base), **style)
        right.axhline(0, color="black", lw=1)
        right.axhspan(-CLOSE, CLOSE, color="black", alpha=0.07, lw=0)
        left.set(title=title, ylabel="test loss, nats")
        right.set(title="minus the tuned warmup-stable-decay", ylabel="nats")
        shown = [row.losses - base for row in drawn(rows) if row.kind != "live"]
        top = max(3 * CLOSE, 1.3 * float(np.nanmax([x.mean(axis=0) for x in shown])))
        low = min(-3 * CLOSE, 1.3 * float(np.nanmin([x.mean(axis=0) for x in shown])))
        right.set_ylim(low, top)
        for axes in (left, right):
            log_steps(axes, ends)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=4,
        title="mean over seeds with its 95 % interval; grey: "
        f"within {CLOSE:g} nats of the tuned schedule",
    )
    figure.savefig(path, dpi=100)


def plot_widths(
    path: Path,
    found: Mapping[str, Mapping[str, tuple[list[float], Gap]]],
    horizons: Sequence[int],
) -> None:
    """For each task, differences by width at each horizon."""
    figure = Figure(figsize=(9.5, 3.8 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 2, squeeze=False)
    names = {"power EMA": "relative width (sigma_rel)", "window": "share of training"}
    for row, (title, kinds) in zip(panels, found.items(), strict=True):
        for axes, (kind, (widths, gaps)) in zip(row, kinds.items(), strict=True):
            for i, horizon in enumerate(horizons):
                one = Gap(gaps.mean[i], gaps.half[i])
                style = {"marker": "o", "ms": 4, "label": f"{horizon} steps"}
                band(axes, widths, one, color=f"C{i}", **style)
            axes.axhline(0, color="black", lw=1)
            axes.axhspan(-CLOSE, CLOSE, color="black", alpha=0.07, lw=0)
            axes.set_xscale("log")
            axes.set_xticks(widths, [f"{width:g}" for width in widths])
            axes.set_xticks([], minor=True)
            axes.set(title=f"{title}, constant rate, {kind}", xlabel=names[kind])
            axes.set_ylabel("minus the tuned schedule, nats")
            axes.grid(alpha=0.3)
    panels[0][0].legend()
    figure.savefig(path, dpi=100)


def summary_of(
    rows: Sequence[Row], widths: Mapping[str, tuple[list[float], Gap]]
) -> dict[str, Any]:
    """The figures of the tables."""
    base = rows[0].losses

    def entry(row: Row) -> dict[str, Any]:
        found = gap(row.losses, base)
        return {
            "chosen": row.choice,
            "loss": row.losses.mean(axis=0).tolist(),
            "minus warmup-stable-decay": found.mean.tolist(),
            "half interval": found.half.tolist(),
            f"within {CLOSE:g}": verdict(found),
        }

    by_width = {
        kind: {
            "widths": values,
            "minus warmup-stable-decay": found.mean.T.tolist(),
            "half interval": found.half.T.tolist(),
        }
        for kind, (values, found) in widths.items()
    }
    return {"rows": {row.label: entry(row) for row in rows}, "widths": by_width}
