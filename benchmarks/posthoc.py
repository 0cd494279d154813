"""What an average after the fact costs: the solver, and reading the snapshots.

    python benchmarks/posthoc.py [--quick] [--turns 5] [--out FILE]

The solver combines 1,000 snapshots of two widths over 100,000 and 1,000,000 optimizer
steps, each in a process of its own, whose resident memory is taken. Reading goes over
12 snapshots of 4, 16 and 64 MB a leaf, through the store, against a sequential read of
the same files. Both read from the disk: ``posix_fadvise(POSIX_FADV_DONTNEED)`` drops
the files from the page cache before each turn. A host below a virtual machine may still
hold them. The two take turns. Needs 4 GB of disk.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

SOLVE = "--solve"
VERSIONS = ("jax", "numpy", "orbax-checkpoint", "tensorstore", "optax_avg")
MEGABYTE = 10**6
SNAPSHOTS = 12
LEAVES = {"4 MB": (16, 1024), "16 MB": (6, 2048), "64 MB": (2, 4096)}
PIECE = 2**23  # bytes of one call of the sequential read


def solve(steps: int, snapshots: int) -> dict[str, float]:
    """Seconds, and resident memory that the solver adds to that of the imports."""
    import resource

    from optax_avg import weights
    from optax_avg.posthoc import _clock

    gamma = weights.gamma_from_sigma_rel
    ends = [steps * (i + 1) // snapshots for i in range(snapshots)]
    kept = [
        _clock.Placed(_clock.Power(gamma(s)), t) for t in ends for s in (0.05, 0.10)
    ]
    target = _clock.Placed(_clock.Power(gamma(0.08)), steps)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, began_cpu = time.perf_counter(), time.process_time()
    found = _clock.combination(kept, target, rounding=6e-8)
    return {
        "s": time.perf_counter() - began,
        "processor_s": time.process_time() - began_cpu,
        "mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3,
        "residual": found.residual,
    }


def solved(steps: int, snapshots: int) -> dict[str, float]:
    """:func:`solve` in a process of its own."""
    command = [sys.executable, __file__, SOLVE, str(steps), str(snapshots)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def write_snapshots(folder: Path, leaves: int, side: int) -> int:
    """Snapshots of leaves of random numbers; returns the bytes of their numbers."""
    import jax
    import jax.numpy as jnp

    import optax_avg as oa

    with oa.posthoc.SnapshotStore(folder) as store:
        for step in range(1, SNAPSHOTS + 1):
            keys = jax.random.split(jax.random.key(step), leaves)
            params = {
                f"{i}": jax.random.normal(k, (side, side))
                for i, k in zip(range(leaves), keys)
            }
            store.save(None, step, params)
    return SNAPSHOTS * leaves * side * side * jnp.dtype(jnp.float32).itemsize


def files_in(folder: Path) -> list[Path]:
    """All files, in the order of their names."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def forget(files: list[Path]) -> None:
    """Drops files from the page cache, after they are on the disk."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_sequentially(files: list[Path]) -> None:
    """Reads files one after another, with one thread."""
    into = bytearray(PIECE)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(into):
                pass


def read_average(folder: Path) -> None:
    """The mean of all snapshots, checked against their fingerprints."""
    import jax

    from optax_avg import posthoc

    with posthoc.SnapshotStore(folder) as store:
        jax.block_until_ready(store.mean())


def reading(leaves: int, side: int, turns: int) -> dict[str, float]:
    """Bandwidths of both ways from a cold cache, and of ours from a warm one."""
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        nbytes = write_snapshots(folder, leaves, side)
        files = files_in(folder)
        stored = sum(path.stat().st_size for path in files)
        ways: dict[str, Callable[[], None]] = {
            "sequential": lambda: read_sequentially(files),
            "store": lambda: read_average(folder),
        }
        read_average(folder)  # compiles
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(turns):
            for way, read in ways.items():
                forget(files)
                began = time.perf_counter()
                read()
                seconds[way].append(time.perf_counter() - began)
        began = time.perf_counter()
        read_average(folder)
        warm = time.perf_counter() - began
    pairs = zip(seconds["sequential"], seconds["store"], strict=True)
    return {
        "mb": nbytes / MEGABYTE,
        "stored / numbers": stored / nbytes,
        "sequential, mb/s": stored
        / MEGABYTE
        / statistics.median(seconds["sequential"]),
        "store, mb/s": nbytes / MEGABYTE / statistics.median(seconds["store"]),
        "store from a warm cache, mb/s": nbytes / MEGABYTE / warm,
        "store / sequential": statistics.median(
            nbytes / b / (stored / a) for a, b in pairs
        ),
    }


def show(title: str, found: dict[str, Any]) -> None:
    """Prints one row."""
    cells = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
    print(f"{title}: {cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer snapshots, a turn")
    parser.add_argument("--turns", type=int, default=5, help="turns of reading")
    parser.add_argument("--out", type=Path, default=Path("out/benchmark_posthoc.json"))
    parser.add_argument(SOLVE, type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.solve:
        print(json.dumps(solve(*args.solve)))
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    turns = 1 if args.quick else args.turns
    snapshots = 100 if args.quick else 1000
    result: dict[str, Any] = {
        "processor": platform.machine(),
        "versions": {name: version(name) for name in VERSIONS},
        "python": platform.python_version(),
        "turns": turns,
        "cache": "dropped by posix_fadvise(POSIX_FADV_DONTNEED) before each turn",
    }
    for steps in (10**5, 10**6):
        title = f"solver, {snapshots} snapshots of two widths, {steps} steps"
        result[title] = solved(steps, snapshots)
        show(title, result[title])
    for title, (leaves, side) in list(LEAVES.items())[: 1 if args.quick else None]:
        title = f"reading {SNAPSHOTS} snapshots of {leaves} leaves of {title}"
        result[title] = reading(leaves, side, turns)
        show(title, result[title])
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
