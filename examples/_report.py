"""Table, picture and numbers of a run: live parameters against their averages.

Curves are arrays of shape (seeds, evaluations) by candidate; "live" is one of them.
"""

import argparse
import functools
import json
import math
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import flax
import jax
import numpy as np
import optax
from _data import Images, load_images
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy import stats

import optax_avg as oa

Curves = Mapping[str, np.ndarray]


def candidates(params: Any, opt_state: Any) -> dict[str, Any]:
    """The readout to copy: live parameters and every average, by name."""
    return {"live": params} | {
        name: oa.averaged_params(opt_state, params, name)
        for name in oa.average_names(opt_state)
    }


def stack(runs: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, np.ndarray]:
    """Curves from one list of evaluations per seed, live first."""
    names = sorted(runs[0][0], key=lambda name: (name != "live", name))
    return {
        name: np.array([[values[name] for values in run] for run in runs])
        for name in names
    }


def spread(values: np.ndarray) -> float:
    """Standard deviation over seeds, NaN of one seed."""
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def half_interval(values: np.ndarray) -> np.ndarray:
    """Half of the 95 % interval of the mean over seeds, the first axis; NaN of one."""
    n = len(values)
    if n == 1:
        return np.full(values.shape[1:], np.nan)
    return stats.t.ppf(0.975, n - 1) * values.std(axis=0, ddof=1) / np.sqrt(n)


def summarize(curves: Curves) -> dict[str, dict[str, float]]:
    """At the end of training; differences are taken within each seed."""
    final = {name: curve[:, -1] for name, curve in curves.items()}
    return {
        name: {
            "mean": float(values.mean()),
            "std": spread(values),
            "minus_live_mean": float((values - final["live"]).mean()),
            "minus_live_std": spread(values - final["live"]),
        }
        for name, values in final.items()
    }


def print_table(
    title: str, summaries: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> None:
    """One row a candidate; two columns a measure: value, and difference from live."""
    table = Table(title=title)
    table.add_column("parameters")
    for measure in summaries:
        table.add_column(measure, justify="right")
        table.add_column("minus live", justify="right")
    for name in next(iter(summaries.values())):
        cells = []
        for summary in summaries.values():
            row = summary[name]
            difference = with_spread(row["minus_live_mean"], row["minus_live_std"], "+")
            cells += [
                with_spread(row["mean"], row["std"]),
                "" if name == "live" else difference,
            ]
        table.add_row(name, *cells)
    Console(width=None if Console().is_terminal else 100).print(table)


def print_measures(title: str, found: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """One row a method, one column a measure: mean and spread over seeds."""
    table = Table(title=title)
    table.add_column("method")
    for measure in next(iter(found.values())):
        table.add_column(measure, justify="right")
    for name, values in found.items():
        cells = [
            ""
            if np.isnan(v).all()
            else f"{v.mean():.3g}" + (f" ± {spread(v):.1g}" if len(v) > 1 else "")
            for v in values.values()
        ]
        table.add_row(name, *cells)
    Console(width=None if Console().is_terminal else 140).print(table)


def with_spread(mean: float, std: float, sign: str = "") -> str:
    return f"{mean:{sign}.4f}" + ("" if math.isnan(std) else f" ± {std:.4f}")


def draw(axes: Axes, steps: Sequence[int], curves: Curves) -> None:
    """Means over seeds, one standard deviation as a band, live dashed."""
    for name, curve in curves.items():
        style = {"color": "black", "ls": "--", "zorder": 3} if name == "live" else {}
        mean = curve.mean(axis=0)
        (line,) = axes.plot(steps, mean, label=name, **style)
        std = np.array([spread(column) for column in curve.T])
        low, high = mean - std, mean + std
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, lw=0)
    axes.grid(alpha=0.3)


def minus_live(curves: Curves) -> dict[str, np.ndarray]:
    """Every curve less that of the live parameters of the same seed."""
    return {name: curve - curves["live"] for name, curve in curves.items()}


def two_panels() -> tuple[Figure, Sequence[Axes]]:
    """A figure of two plots side by side."""
    figure = Figure(figsize=(9.5, 4), layout="constrained")
    return figure, figure.subplots(1, 2)


def legend_above(figure: Figure, axes: Axes) -> None:
    """One legend for both plots."""
    lines, names = axes.get_legend_handles_labels()
    figure.legend(
        lines,
        names,
        loc="outside upper center",
        ncols=len(names),
        title="mean over seeds, band: ± 1 standard deviation",
    )


def write_json(path: Path, numbers: Mapping[str, Any]) -> None:
    """Numbers with the versions that made them; null where one is not finite."""
    modules = (jax, optax, flax, np, oa)
    versions = {module.__name__: module.__version__ for module in modules}
    versions["python"] = platform.python_version()
    content = finite_or_none({"versions": versions, **numbers})
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def finite_or_none(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_writable(folder: Path) -> None:
    """Raises OSError now rather than after the training."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def parse_with_images(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, Images]:
    """Adds --data, reads the images; whatever is wrong ends the program now."""
    parser.add_argument(
        "--data", type=Path, help="a folder of IDX files; default: digits"
    )
    args = parser.parse_args(argv)
    try:
        images = load_images(args.data)
    except (OSError, ValueError) as error:
        fail(parser, f"cannot read the images: {error}")
    if args.batch_size > len(images.train_y):
        fail(
            parser,
            f"--batch-size {args.batch_size}: only {len(images.train_y)} images",
        )
    try:
        check_writable(args.out)
    except OSError as error:
        fail(parser, f"cannot write to --out {args.out}: {error}")
    return args, images


def fail(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Ends the program with code 2 and one line, without the usage."""
    parser.exit(2, f"{parser.prog}: error: {message}\n")


def interruptible(main: Callable[..., None]) -> Callable[..., None]:
    """Lets Ctrl-C end a command with one line and code 130."""

    @functools.wraps(main)
    def wrapped(*args: Any) -> None:
        try:
            main(*args)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return wrapped


def positive(kind: type) -> Callable[[str], Any]:
    """An argparse type: a finite number of this kind above zero."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a positive number")
        return value

    convert.__name__ = kind.__name__
    return convert
