"""How the cost of a step grows, beside the time that moving its bytes takes.

    python benchmarks/growth.py [--quick] [--out FILE]

Six sweeps: parameters, leaves, horizons, rows of a window, rows of an aggregator,
devices. The bound is the number of bytes that a step must read and write over the
bandwidth that ``a + b`` on large arrays reaches in the same run. Writes JSON, and a
picture beside it. Needs 20 GB; with ``--quick`` it takes a minute and 1 GB.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure

import optax_avg as oa

DEVICES, EIGHT = "--devices", "--xla_force_host_platform_device_count=8"
FLOAT = 4  # bytes
LEAVES = 20
TURNS = 7
SHORTEST = 0.05  # seconds of a turn, so that the clock does not count

Point = dict[str, float]


def seconds_of(call: Callable[[], Any]) -> float:
    """Median time of one call, over turns that are long enough to be measured."""
    began = time.perf_counter()
    result = jax.block_until_ready(call())
    calls = max(1, round(SHORTEST / (time.perf_counter() - began)))
    times: list[float] = []
    for _ in range(TURNS):
        began = time.perf_counter()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - began) / calls)
    return statistics.median(times)


def bandwidth(numbers: int) -> float:
    """Bytes per second of ``a + b``, which reads two arrays and writes a third."""
    a, b = jnp.ones(numbers), jnp.ones(numbers)
    add = jax.jit(lambda a, b: a + b, donate_argnums=0)

    def call():
        nonlocal a
        a = add(a, b)
        return a

    return 3 * FLOAT * numbers / seconds_of(call)


def tree(numbers: int, leaves: int) -> dict[str, jax.Array]:
    """Parameters of one shape."""
    return {f"{i:05d}": jnp.ones(numbers // leaves) for i in range(leaves)}


def step_of(link: optax.GradientTransformation, params: Any) -> Callable[[], Any]:
    """A call that absorbs one iterate; the state is donated."""
    updates = jax.tree.map(jnp.zeros_like, params)
    state = jax.jit(link.init)(params)
    absorb = jax.jit(
        lambda state, updates, params: link.update(updates, state, params)[1],
        donate_argnums=0,
    )

    def call():
        nonlocal state
        state = absorb(state, updates, params)
        return state

    return call


def sweep(
    sizes: Iterable[int],
    make: Callable[[int], Callable[[], Any]],
    moved: Callable[[int], float],
    rate: float,
) -> list[Point]:
    """Time and bound, in ms, of every size.

    Args:
      sizes: What grows.
      make: The call to measure, by size.
      moved: Bytes that it must move, by size.
      rate: Bandwidth, bytes per second.
    """
    points: list[Point] = []
    for size in sizes:
        jax.clear_caches()
        ms = 1e3 * seconds_of(make(size))
        points.append({"size": size, "ms": ms, "bound_ms": 1e3 * moved(size) / rate})
        print(f"{size:14,}{ms:12.3f} ms{points[-1]['bound_ms']:12.3f} ms to move")
    return points


def horizons(count: int) -> optax.GradientTransformation:
    """So many averages in one link."""
    return oa.average({str(i): oa.weights.half_life(10.0 + i) for i in range(count)})


def aggregate(rows: int, numbers: int, aggregator: Any) -> Callable[[], Any]:
    """A call that aggregates gradients of so many examples."""
    stacked = jax.random.normal(jax.random.key(0), (rows, numbers))
    params = jnp.zeros(numbers)
    update = jax.jit(lambda v: aggregator.update(v, aggregator.init(params))[0])
    return lambda: update(stacked)


def on_devices(numbers: int, count: int) -> list[Point]:
    """Step of an average on parameters that are sharded over 1 to 8 host devices."""

    def make(devices: int) -> Callable[[], Any]:
        mesh = jax.make_mesh(
            (devices,),
            ("d",),
            axis_types=(AxisType.Auto,),
            devices=jax.devices()[:devices],
        )
        place = NamedSharding(mesh, PartitionSpec("d"))
        params = jax.device_put(tree(numbers, LEAVES), place)
        return step_of(oa.ema_params(0.999), params)

    sizes = [n for n in (1, 2, 4, 8) if n <= count]
    rate = bandwidth(numbers)
    return sweep(sizes, make, lambda _: 4 * FLOAT * numbers, rate)


def all_sweeps(quick: bool) -> dict[str, list[Point]]:
    """Points by what grows."""
    large = 10**6 if quick else 10**8
    rate = bandwidth(large)
    print(f"bandwidth of a + b: {rate / 1e9:.1f} GB/s")
    ema = lambda: oa.ema_params(0.999)
    result: dict[str, list[Point]] = {}

    def run(
        title: str,
        sizes: list[int],
        make: Callable[[int], Callable[[], Any]],
        moved: Callable[[int], float],
    ) -> None:
        print(title)
        result[title] = sweep(sizes, make, moved, rate)

    run(
        "parameters, in 20 leaves",
        [10**k for k in range(5, 7 if quick else 10)],
        lambda n: step_of(ema(), tree(n, LEAVES)),
        lambda n: 4 * FLOAT * n,
    )
    run(
        f"leaves, of {large // 10:,} parameters",
        [10, 100] if quick else [10, 100, 1000, 10_000],
        lambda n: step_of(ema(), tree(large // 10, n)),
        lambda _: 4 * FLOAT * large // 10,
    )
    run(
        f"horizons, of {large // 2:,} parameters",
        [1, 2] if quick else [1, 2, 4, 8],
        lambda n: step_of(horizons(n), tree(large // 2, LEAVES)),
        lambda n: (2 + 2 * n) * FLOAT * large // 2,
    )
    run(
        f"rows of a window, of {large // 10:,} parameters",
        [2, 8] if quick else [2, 4, 8, 16, 32, 64],
        lambda n: step_of(oa.window_average(n), tree(large // 10, LEAVES)),
        lambda _: 6 * FLOAT * large // 10,
    )
    for name, make, passes in (
        ("coordinate_median", oa.coordinate_median, 1),
        ("geometric_median", oa.geometric_median, 2),
    ):
        run(
            f"rows of {name}, of {large // 100:,} parameters",
            [4, 16] if quick else [4, 8, 16, 32, 64, 128, 256],
            functools.partial(aggregate, numbers=large // 100, aggregator=make()),
            lambda n, passes=passes: (passes * n + 1) * FLOAT * large // 100,
        )
    return result


def picture(report: dict[str, Any], path: Path) -> None:
    """Draws every sweep beside its bound."""
    figure = Figure(figsize=(16, 7), layout="constrained")
    sweeps = report["sweeps"]
    panels = figure.subplots(2, 4).ravel()
    for axes, (title, points) in zip(panels, sweeps.items(), strict=False):
        sizes = [point["size"] for point in points]
        bound = [point["bound_ms"] for point in points]
        axes.loglog(sizes, [point["ms"] for point in points], "o-", label="measured")
        axes.loglog(sizes, bound, "--", label="bytes over bandwidth")
        axes.set_xticks(
            sizes, [f"{size:,}" if size < 1e5 else f"{size:.0e}" for size in sizes]
        )
        axes.minorticks_off()
        what, _, of_what = title.partition(", ")
        axes.set(title=what, xlabel=of_what, ylabel="ms per step")
        axes.set_ylim(bottom=min(bound) / 3)
        axes.grid(alpha=0.3)
    for axes in panels[len(sweeps) :]:
        axes.set_axis_off()
    panels[0].legend()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, a minute")
    parser.add_argument("--out", type=Path, default=Path("out/benchmark_growth.json"))
    parser.add_argument(DEVICES, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.devices:
        print(json.dumps(on_devices(args.devices, len(jax.devices()))), file=sys.stderr)
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    report: dict[str, Any] = {
        "device": device.device_kind,
        "processor": platform.machine(),
        "processors": os.cpu_count(),
        "versions": {m.__name__: m.__version__ for m in (jax, optax, oa)},
        "python": platform.python_version(),
        "turns": TURNS,
        "sweeps": all_sweeps(args.quick),
    }
    numbers = 10**6 if args.quick else 10**8
    title = f"host devices, of {numbers:,} parameters"
    print(title)
    child = subprocess.run(
        [sys.executable, __file__, DEVICES, str(numbers)],
        env=os.environ | {"XLA_FLAGS": EIGHT, "JAX_PLATFORMS": "cpu"},
        stdout=None,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    report["sweeps"][title] = json.loads(child.stderr.splitlines()[-1])
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    picture(report, args.out.with_suffix(".png"))
    print(f"written to {args.out} and {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
