"""What an average inside the optimizer costs per step, beside Optax's Schedule-Free.

    python benchmarks/primal.py [--quick] [--out FILE]

Prints ratios within this run and writes them to JSON. All variants wrap the same Adam
without momentum and donate parameters and state. They take turns, so that a slow spell
of the machine meets all of them, and a ratio is the median over turns.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import schedule_free

import optax_avg as oa

BLOCK = 10  # steps per turn
PEER = "schedule_free"


def variants() -> dict[str, optax.GradientTransformation]:
    """Adam alone, under Schedule-Free and under ours."""
    adam = optax.adam(3e-4, b1=0.0)
    uniform, ema = oa.weights.uniform(), oa.weights.ema(0.99, debias=False)
    return {
        "adam": adam,
        PEER: schedule_free(adam, 3e-4, b1=0.9),
        "primal_average, uniform": oa.primal_average(adam, uniform, 0.9),
        "primal_average, nonfinite=keep": oa.primal_average(
            adam, uniform, 0.9, nonfinite="keep"
        ),
        "primal_average, decay_at=z": oa.primal_average(
            adam, uniform, 0.9, decay_at="z"
        ),
        "primal_average, ema (GPA)": oa.primal_average(adam, ema, 0.9),
    }


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays in a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def measure(leaves: int, size: int, dtype: Any, turns: int) -> dict[str, Any]:
    """Times and bytes of every variant on one tree."""
    keys = jax.random.split(jax.random.key(0), leaves)
    start = {f"{i}": jax.random.normal(k, (size,), dtype) for i, k in enumerate(keys)}
    grads = jax.tree.map(lambda x: (0.01 * x).astype(dtype), start)
    steps, states, report = {}, {}, {}
    for name, tx in variants().items():

        def step(params: Any, state: Any, grads: Any, tx: Any = tx) -> Any:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params = jax.tree.map(jnp.copy, start)
        states[name] = params, tx.init(params)
        report[name] = {"state_bytes": bytes_of(states[name][1])}
        jitted = jax.jit(step, donate_argnums=(0, 1))
        steps[name] = jitted.lower(*states[name], grads).compile()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, run in steps.items():
            began = time.perf_counter()
            for _ in range(BLOCK):
                states[name] = run(*states[name], grads)
            jax.block_until_ready(states[name])
            times[name].append((time.perf_counter() - began) / BLOCK)
    for name, found in times.items():
        ratios = [a / b for a, b in zip(found, times[PEER], strict=True)]
        report[name]["step_ms"] = 1e3 * statistics.median(found)
        report[name][f"/ {PEER}"] = statistics.median(ratios)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small tree, seconds")
    parser.add_argument("--turns", type=int, default=11, help="turns per variant")
    parser.add_argument("--out", type=Path, default=Path("out/benchmark_primal.json"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "processor": platform.machine(),
        "versions": {m.__name__: m.__version__ for m in (jax, optax, np, oa)},
        "turns": args.turns,
    }
    leaves, size = (4, 50_000) if args.quick else (10, 1_000_000)
    for dtype in (jnp.float32, jnp.bfloat16):
        title = f"{leaves * size:,} in {leaves} leaves, {jnp.dtype(dtype)}"
        result[title] = measure(leaves, size, dtype, args.turns)
        print(f"\n{title}\n{'':32}{'step_ms':>12}{f'/ {PEER}':>18}{'state_bytes':>16}")
        for name, row in result[title].items():
            print(
                f"{name:32}{row['step_ms']:12.3f}{row[f'/ {PEER}']:18.3f}"
                f"{row['state_bytes']:16,}"
            )
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{result['device']}, jax {jax.__version__}; written to {args.out}")


if __name__ == "__main__":
    main()
