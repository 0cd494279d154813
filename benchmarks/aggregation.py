"""What robust aggregation costs: 32 gradients of 10 M parameters, and 8 devices.

    python benchmarks/aggregation.py [--quick] [--out FILE]

Ratios within this run: rounds in the Gram space against rounds on the stack, the
sorting network against ``jnp.median``, chunks by ``all_to_all`` against ``all_gather``.
The variants take turns. Needs 8 GB.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import optax_avg as oa

DEVICES, EIGHT = "--devices", "--xla_force_host_platform_device_count=8"
ROWS, LEAVES, SHAPE = 32, 50, (400, 500)
ROUNDS = 32


def weiszfeld_on_the_stack(rows: list[jax.Array]) -> list[jax.Array]:
    """The direct loop: every round reads the whole stack twice."""

    def advance(_, z):
        squares = [jnp.sum((v - m[None]) ** 2, axis=(1, 2)) for v, m in zip(rows, z)]
        beta = 1 / jnp.maximum(1e-6, jnp.sqrt(sum(squares[1:], squares[0])))
        return [jnp.tensordot(beta / jnp.sum(beta), v, axes=1) for v in rows]

    return jax.lax.fori_loop(0, ROUNDS, advance, mean(rows))


def mean(rows: list[jax.Array]) -> list[jax.Array]:
    """As a product, which XLA's CPU backend runs faster than ``jnp.mean``."""
    return [jnp.tensordot(jnp.full(ROWS, 1 / ROWS), v, axes=1) for v in rows]


def aggregated(tx: Any) -> Callable[[list[jax.Array]], list[jax.Array]]:
    """The update of an aggregator from its initial state."""

    def update(rows):
        params = [jnp.zeros(x.shape[1:]) for x in rows]
        return tx.update(rows, tx.init(params))[0]

    return update


def take_turns(
    variants: dict[str, tuple[Callable[..., Any], Any]], turns: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]], dict[str, Any]]:
    """Seconds of every turn, compile time and temporary memory, and results."""
    compiled, report, results = {}, {}, {}
    for name, (f, rows) in variants.items():
        began = time.perf_counter()
        compiled[name] = jax.jit(f).lower(rows).compile()
        report[name] = {
            "compile_s": time.perf_counter() - began,
            "temporary_mb": compiled[name].memory_analysis().temp_size_in_bytes / 1e6,
        }
        results[name] = jax.block_until_ready(compiled[name](rows))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for _ in range(turns):
        random.Random(0).shuffle(order)
        for name in order:
            began = time.perf_counter()
            jax.block_until_ready(compiled[name](variants[name][1]))
            seconds[name].append(time.perf_counter() - began)
    for name, times in seconds.items():
        report[name]["ms"] = 1e3 * statistics.median(times)
    return seconds, report, results


def ratio(seconds: dict[str, list[float]], a: str, b: str) -> float:
    """Median over turns of a / b."""
    return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))


def one_device(turns: int) -> dict[str, Any]:
    """32 gradients of 10 M parameters in 50 leaves."""
    rng = np.random.default_rng(0)
    draw = lambda: jnp.asarray(rng.standard_normal((ROWS, *SHAPE), np.float32) + 0.1)
    rows = [draw() for _ in range(LEAVES)]
    few = rows[:5]
    variants = {
        "mean": (mean, rows),
        "Weiszfeld on the stack, 32 rounds": (weiszfeld_on_the_stack, rows),
        "geometric_median, 32 rounds": (
            aggregated(oa.geometric_median(num_iters=ROUNDS)),
            rows,
        ),
        "geometric_median, 8 rounds": (aggregated(oa.geometric_median()), rows),
        "median_of_means(8)": (aggregated(oa.median_of_means(8)), rows),
        "centered_clip": (aggregated(oa.centered_clip(1.0)), rows),
        "centered_clip, 3 rounds": (aggregated(oa.centered_clip(1.0, 3)), rows),
        "krum(5)": (aggregated(oa.krum(5)), rows),
        "flag_aggregator(3)": (aggregated(oa.flag_aggregator(3)), rows),
        "upgrad": (aggregated(oa.upgrad()), rows),
        "jnp.median, 5 leaves": (lambda r: [jnp.median(v, axis=0) for v in r], few),
        "coordinate_median, 5 leaves": (aggregated(oa.coordinate_median()), few),
        "trimmed_mean(3), 5 leaves": (aggregated(oa.trimmed_mean(3)), few),
    }
    seconds, report, results = take_turns(variants, turns)
    direct, ours = (
        "Weiszfeld on the stack, 32 rounds",
        "geometric_median, 32 rounds",
    )
    apart = max(
        float(jnp.max(jnp.abs(a - b)))
        for a, b in zip(results[direct], results[ours], strict=True)
    )
    gradient = LEAVES * SHAPE[0] * SHAPE[1] * 4 / 1e6
    return {
        "variants": report,
        "stack over gram, 32 rounds": ratio(seconds, direct, ours),
        "gram, 32 rounds over 8": ratio(seconds, ours, "geometric_median, 8 rounds"),
        "gram over mean": ratio(seconds, ours, "mean"),
        "temporary memory of gram / one gradient": (
            report[ours]["temporary_mb"] / gradient
        ),
        "greatest difference of the two": apart,
        "jnp.median over coordinate_median": ratio(
            seconds, "jnp.median, 5 leaves", "coordinate_median, 5 leaves"
        ),
    }


def eight_devices(turns: int) -> dict[str, Any]:
    """One gradient of 10 M parameters on each of 8 host devices."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(0)
    sharding = jax.sharding.NamedSharding(mesh, P("d"))
    draw = lambda: jax.device_put(
        rng.standard_normal((8, *SHAPE), np.float32), sharding
    )
    rows = [draw() for _ in range(LEAVES)]

    def local(f):
        return jax.shard_map(
            lambda rows: f([v[0] for v in rows]),
            mesh=mesh,
            in_specs=P("d"),
            out_specs=P(),
            check_vma=False,
        )

    def gathered(rows):
        return [jnp.median(jax.lax.all_gather(v, "d"), axis=0) for v in rows]

    def gathered_network(rows):
        return aggregated(oa.coordinate_median())(
            [jax.lax.all_gather(v, "d") for v in rows]
        )

    variants = {
        "pmean": lambda rows: jax.lax.pmean(rows, "d"),
        "all_gather + jnp.median": gathered,
        "all_gather + network": gathered_network,
        "coordinate_median": aggregated(oa.coordinate_median(axis_name="d")),
        "geometric_median, 32 rounds": aggregated(
            oa.geometric_median(num_iters=ROUNDS, axis_name="d")
        ),
    }
    seconds, report, results = take_turns(
        {name: (local(f), rows) for name, f in variants.items()}, turns
    )
    ours = "coordinate_median"
    out: dict[str, Any] = {"variants": report}
    for peer in ("all_gather + jnp.median", "all_gather + network"):
        out[f"{peer} over coordinate_median, time"] = ratio(seconds, peer, ours)
        out[f"{peer} over coordinate_median, memory"] = (
            report[peer]["temporary_mb"] / report[ours]["temporary_mb"]
        )
    out["greatest difference"] = max(
        float(jnp.max(jnp.abs(a - b)))
        for a, b in zip(results[ours], results["all_gather + jnp.median"], strict=True)
    )
    return out


def show(title: str, found: dict[str, Any]) -> None:
    """Prints one table and the ratios."""
    print(f"\n{title}\n{'':36}{'ms':>12}{'temporary MB':>16}{'compile s':>12}")
    for name, row in found["variants"].items():
        print(
            f"{name:36}{row['ms']:12.1f}{row['temporary_mb']:16.1f}"
            f"{row['compile_s']:12.1f}"
        )
    for name, value in found.items():
        if name != "variants":
            print(f"{name}: {value:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one turn")
    parser.add_argument("--turns", type=int, default=5, help="turns per variant")
    parser.add_argument(
        "--out", type=Path, default=Path("out/benchmark_aggregation.json")
    )
    parser.add_argument(DEVICES, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    turns = 1 if args.quick else args.turns
    if args.devices:
        print(json.dumps(eight_devices(turns)))
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    result: dict[str, Any] = {
        "device": device.device_kind,
        "processor": platform.machine(),
        "versions": {m.__name__: m.__version__ for m in (jax, optax, np, oa)},
        "python": platform.python_version(),
        "turns": turns,
    }
    title = f"{ROWS} gradients of 10 M parameters in {LEAVES} leaves"
    result[title] = one_device(turns)
    show(title, result[title])
    jax.clear_caches()
    command = [sys.executable, __file__, DEVICES, "--turns", str(turns)]
    flags = f"{os.environ.get('XLA_FLAGS', '')} {EIGHT}"
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    result["8 host devices"] = json.loads(done.stdout)
    show("one gradient on each of 8 host devices", result["8 host devices"])
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{device.device_kind}, jax {jax.__version__}; written to {args.out}")


if __name__ == "__main__":
    main()
