"""What an average costs per optimizer step: time, compilation, bytes.

    python benchmarks/averages.py [--quick] [--out FILE]

Prints a table of ratios within this run and writes them to JSON with the versions and
the device. Every variant donates parameters and state; the variants take turns, so that
a slow spell of the machine meets all of them, and a time is the median over turns. The
order changes from turn to turn, and averages of the same shape live in the same memory:
where an array lies and what ran before it were seen to make 10 % of a step.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_avg as oa

BLOCK = 10  # steps per turn, so that every=10 absorbs once in each
DECAY = 0.999
TREES = {
    "100 M in 20 leaves": (20, (2000, 2500)),
    "10 M in 1000 leaves": (1000, (100, 100)),
}
QUICK = {"1 M in 5 leaves": (5, (400, 500))}


Pool = dict[jax.ShapeDtypeStruct, list[jax.Array]]


def hand_written(average: Any, params: Any) -> Any:
    """The EMA that one writes after ``apply_updates``."""
    return jax.tree.map(lambda a, x: DECAY * a + (1 - DECAY) * x, average, params)


def variants() -> dict[str, optax.GradientTransformationExtraArgs | None]:
    """What is compared with ``adamw`` and with ``adamw`` + hand-written EMA."""
    horizons = {str(d): oa.weights.ema(d) for d in (0.99, 0.999, 0.9999)}
    return {
        "adamw": None,
        "hand-written": None,
        "carried along, untouched": None,
        "ema_params": oa.ema_params(DECAY),
        "ema_params, nonfinite=reject": oa.ema_params(DECAY, nonfinite="reject"),
        "ema_params, nonfinite=keep": oa.ema_params(DECAY, nonfinite="keep"),
        "ema_params, every=10": oa.ema_params(DECAY, every=BLOCK),
        "bfloat16, dithered": oa.ema_params(DECAY, accumulator_dtype=jnp.bfloat16),
        "bfloat16, stochastic": oa.ema_params(
            DECAY, accumulator_dtype=jnp.bfloat16, rounding="stochastic"
        ),
        "bfloat16, compensated": oa.ema_params(
            DECAY, accumulator_dtype=jnp.bfloat16, rounding="compensated"
        ),
        "float16, dithered": oa.ema_params(DECAY, accumulator_dtype=jnp.float16),
        "three horizons": oa.average(horizons),
        "three horizons, nonfinite=keep": oa.average(horizons, nonfinite="keep"),
        "window_average(6, every=10)": oa.window_average(6, every=BLOCK),
    }


def make_step(name: str, link: Any) -> Callable[..., Any]:
    """One training step less the gradient."""
    base = optax.adamw(3e-4)

    def step(params, state, average, grads):
        updates, state = base.update(grads, state, params)
        if link is not None:
            updates, average = link.update(updates, average, params)
        params = optax.apply_updates(params, updates)
        if name == "hand-written":
            average = hand_written(average, params)
        return params, state, average

    return step


def start_of(name: str, link: Any, params: Any) -> Any:
    """The average's own state."""
    if link is not None:
        return link.init(params)
    return () if name == "adamw" else jax.tree.map(jnp.copy, params)


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays in a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def put_back(pool: Pool, average: Any) -> Any:
    """Gives the arrays of an average to all variants, and keeps its scalars."""

    def give(x: jax.Array) -> Any:
        if not x.ndim:
            return x
        kind = jax.ShapeDtypeStruct(x.shape, x.dtype)
        pool.setdefault(kind, []).append(x)
        return kind

    return jax.tree.map(give, average)


def take_out(pool: Pool, average: Any) -> Any:
    """The average with the arrays that were given back last."""
    borrow = lambda x: pool[x].pop() if isinstance(x, jax.ShapeDtypeStruct) else x
    return jax.tree.map(borrow, average)


def measure(leaves: int, shape: tuple[int, ...], turns: int) -> dict[str, Any]:
    """Times, compile times and bytes of every variant on one tree."""
    keys = jax.random.split(jax.random.key(0), leaves)
    params = {f"{i:04d}": jax.random.normal(k, shape) for i, k in enumerate(keys)}
    grads = jax.tree.map(lambda x: 0.01 * x, params)
    state = optax.adamw(3e-4).init(params)
    links, compiled, averages, report = variants(), {}, {}, {}
    pool: Pool = {}
    jax.jit(make_step("adamw", None)).lower(params, state, (), grads).compile()
    for name, link in links.items():
        average = start_of(name, link, params)
        jax.clear_caches()
        began = time.perf_counter()
        jitted = jax.jit(make_step(name, link), donate_argnums=(0, 1, 2))
        compiled[name] = jitted.lower(params, state, average, grads).compile()
        report[name] = {
            "compile_s": time.perf_counter() - began,
            "state_bytes": bytes_of((state, average)),
        }
        averages[name] = put_back(pool, average)
    names = list(links)
    turns_of: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            average = take_out(pool, averages[name])
            began = time.perf_counter()
            for _ in range(BLOCK):
                params, state, average = compiled[name](params, state, average, grads)
            jax.block_until_ready((params, average))
            turns_of[name].append((time.perf_counter() - began) / BLOCK)
            averages[name] = put_back(pool, average)
    for name, times in turns_of.items():
        report[name]["step_ms"] = 1e3 * statistics.median(times)
        for peer in ("adamw", "hand-written"):
            ratios = [a / b for a, b in zip(times, turns_of[peer], strict=True)]
            report[name][f"/ {peer}"] = statistics.median(ratios)
        report[name]["compile / adamw"] = (
            report[name]["compile_s"] / report["adamw"]["compile_s"]
        )
    return report


def show(title: str, report: dict[str, Any]) -> None:
    """Prints one table."""
    columns = ("step_ms", "/ adamw", "/ hand-written", "compile / adamw", "state_bytes")
    print(f"\n{title}\n{'':38}" + "".join(f"{c:>16}" for c in columns))
    for name, row in report.items():
        cells = [
            f"{row[c]:16,}" if c == "state_bytes" else f"{row[c]:16.3f}"
            for c in columns
        ]
        print(f"{name:38}" + "".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small tree, seconds")
    parser.add_argument("--turns", type=int, default=11, help="turns per variant")
    parser.add_argument("--out", type=Path, default=Path("out/benchmark_averages.json"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    result: dict[str, Any] = {
        "device": device.device_kind,
        "processor": platform.machine(),
        "versions": {m.__name__: m.__version__ for m in (jax, optax, np, oa)},
        "python": platform.python_version(),
        "turns": args.turns,
    }
    for title, (leaves, shape) in (QUICK if args.quick else TREES).items():
        result[title] = measure(leaves, shape, args.turns)
        show(title, result[title])
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{device.device_kind}, jax {jax.__version__}; written to {args.out}")


if __name__ == "__main__":
    main()
