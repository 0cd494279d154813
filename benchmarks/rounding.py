"""How accurate an average is in narrow accumulators.

    python benchmarks/rounding.py [--quick] [--out FILE]

Feeds made-up parameters to averages that differ in their accumulators, and compares
each with the average in float64. Prints the rms error over elements and the second half
of the steps, relative to the rms of the parameters, and writes it to JSON with the mean
error. The last rows round the exact average once, to nearest.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

import optax_avg as oa

ELEMENTS = 1000
DECAYS = (0.99, 0.999, 0.9999)
ACCUMULATORS = {
    "float32": {},
    "bfloat16, dithered": {"accumulator_dtype": jnp.bfloat16},
    "bfloat16, stochastic": {
        "accumulator_dtype": jnp.bfloat16,
        "rounding": "stochastic",
    },
    "bfloat16, compensated": {
        "accumulator_dtype": jnp.bfloat16,
        "rounding": "compensated",
    },
    "float16, dithered": {"accumulator_dtype": jnp.float16},
    "float16, stochastic": {"accumulator_dtype": jnp.float16, "rounding": "stochastic"},
}
STORED = {
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
    "float8_e4m3fn": jnp.float8_e4m3fn,
    "float8_e5m2": jnp.float8_e5m2,
}
NAMES = [*ACCUMULATORS, *(f"stored in {name}" for name in STORED)]
# Parameters of step t from those of the step before, the first ones and new noise.
Stream = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
STREAMS: dict[str, Stream] = {
    "random walk of 0.03 a step": lambda x, x0, z, t: x + 0.03 * z,
    "new noise of 0.1 at every step": lambda x, x0, z, t: x0 + 0.1 * z,
    "ramp of 1e-5 a step": lambda x, x0, z, t: x0 + 1e-5 * t,
    "oscillation of 0.1 with period 2": lambda x, x0, z, t: (
        x0 + 0.1 * jnp.cos(jnp.pi * t)
    ),
    "oscillation of 0.1 with period 144": lambda x, x0, z, t: (
        x0 + 0.1 * jnp.cos(2 * jnp.pi * (t % 144) / 144)
    ),
    "constant": lambda x, x0, z, t: x0,
}


def scale_of(dtype: DTypeLike) -> int:
    """A scale that spares numbers of 8 bits from becoming subnormal."""
    return 16 if jnp.finfo(dtype).bits < 16 else 1


def errors(stream: Stream, decay: float, steps: int) -> dict[str, Any]:
    """Errors of every accumulator on one stream, relative to the parameters."""
    weight = oa.weights.ema(decay)
    average = oa.average(
        {name: oa.memories.running(weight, **how) for name, how in ACCUMULATORS.items()}
    )
    exact = oa.average({"exact": weight}, accumulator_dtype=jnp.float64)
    x0 = jax.random.normal(jax.random.key(0), (ELEMENTS,), jnp.float32)

    def step(carry, t):
        x, state, wide, squares, sums = carry
        z = jax.random.normal(jax.random.key(t + 1), x.shape, jnp.float32)
        x = stream(x, x0, z, t.astype(jnp.float32)).astype(jnp.float32)
        still = jnp.zeros_like(x)
        _, state = average.update(still, state, x)
        _, wide = exact.update(still, wide, x)
        true = wide.averages["exact"].read(wide.absorbed)
        found = {
            name: kept.read(state.absorbed) for name, kept in state.averages.items()
        }
        for name, dtype in STORED.items():
            scale = scale_of(dtype)
            found[f"stored in {name}"] = (true * scale).astype(dtype) / scale
        counts = t >= steps // 2
        e = {
            k: jnp.where(counts, v.astype(true.dtype) - true, 0)
            for k, v in found.items()
        }
        squares = jax.tree.map(lambda s, e: s + e**2, squares, e)
        return (x, state, wide, squares, jax.tree.map(jnp.add, sums, e)), None

    @jax.jit
    def run():
        zeros = {name: jnp.zeros(ELEMENTS, jnp.float64) for name in NAMES}
        start = (x0, average.init(x0), exact.init(x0), zeros, zeros)
        (_, _, wide, squares, sums), _ = jax.lax.scan(step, start, jnp.arange(steps))
        size = jnp.sqrt(jnp.mean(wide.averages["exact"].average ** 2))
        counted = steps - steps // 2
        rms = lambda s: jnp.sqrt(jnp.mean(s) / counted) / size
        mean = lambda s: jnp.mean(s) / counted / size
        return jax.tree.map(rms, squares), jax.tree.map(mean, sums)

    rms, mean = jax.tree.map(float, run())
    return {name: {"rms": rms[name], "mean": mean[name]} for name in NAMES}


def bytes_per_element(how: dict[str, Any]) -> int:
    """Bytes of the average in the state, for every element."""
    memory = oa.memories.running(oa.weights.ema(0.9), **how)
    kept = jax.eval_shape(memory.init, jnp.zeros(ELEMENTS, jnp.float32))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept)) // ELEMENTS


def show(title: str, report: dict[str, Any]) -> None:
    """Prints one table."""
    print(f"\n{title}\n{'rms error at decay':28}" + "".join(f"{d:>10}" for d in report))
    for name in next(iter(report.values())):
        cells = "".join(f"{report[d][name]['rms']:10.1e}" for d in report)
        print(f"{name:28}{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="2000 steps, seconds")
    parser.add_argument("--out", type=Path, default=Path("out/benchmark_rounding.json"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_enable_x64", True)
    steps = 2000 if args.quick else 20_000
    result: dict[str, Any] = {
        "versions": {m.__name__: m.__version__ for m in (jax, optax, np, oa)},
        "elements": ELEMENTS,
        "steps": steps,
        "bytes": {name: bytes_per_element(how) for name, how in ACCUMULATORS.items()},
    }
    for title, stream in STREAMS.items():
        result[title] = {str(d): errors(stream, d, steps) for d in DECAYS}
        show(title, result[title])
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    main()
