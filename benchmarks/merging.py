"""What merging checkpoints larger than memory costs, against copying their bytes.

    python benchmarks/merging.py [--quick] [--gigabytes 2] [--out FILE]

Three models of two gigabytes in 50 leaves and a base, as safetensors files and as Orbax
checkpoints; every merge is a process of its own, of which the greatest resident memory
is taken. Copying reads and writes three of them. The variants take turns. Needs five
times the size of a model on disk for either format.
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy

import optax_avg as oa

LEAVES = 50
MODELS = ("a", "b", "c")
COMMAND = [sys.executable, "-c", "from optax_avg.cli import main; main()", "merge"]
MERGES = {
    "soup": [],
    "model-stock": ["--base"],
    "ties": ["--base"],
    "karcher": [],
}


def write_models(folder: Path, suffix: str, gigabytes: float) -> None:
    """Models a, b, c and a base; one at a time in memory."""
    side = int((gigabytes * 1e9 / 4 / LEAVES) ** 0.5)
    for seed, name in enumerate((*MODELS, "base")):
        rng = np.random.default_rng(seed)
        leaves = {
            f"layer_{i:02}": rng.standard_normal((side, side), np.float32)
            for i in range(LEAVES)
        }
        path = folder / f"{name}{suffix}"
        if suffix:
            safetensors.numpy.save_file(leaves, path)
        else:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
                writer.save(path, args=ocp.args.PyTreeSave(leaves))


def run(command: list[str]) -> tuple[float, float]:
    """Seconds and greatest resident gigabytes of a process."""
    began = time.perf_counter()
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    said = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise RuntimeError(f"{' '.join(command)}: {said}")
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, usage.ru_maxrss * unit / 1e9


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def measure(suffix: str, gigabytes: float, turns: int, where: Path) -> dict[str, Any]:
    """Every merge and the copy of three models, in turn."""
    with tempfile.TemporaryDirectory(dir=where) as name:
        folder = Path(name)
        write_models(folder, suffix, gigabytes)
        models = [str(folder / f"{model}{suffix}") for model in MODELS]
        out = folder / f"out{suffix}"
        commands = {}
        for merge, options in MERGES.items():
            base = [*options, str(folder / f"base{suffix}")] if options else []
            commands[merge] = [*COMMAND, merge, *models, *base, "--out", str(out)]
        commands["copy of three"] = ["cp", "-r", *models, str(out)]
        commands["copy of one"] = ["cp", "-r", models[0], str(out)]
        commands["imports alone"] = [*COMMAND, "--help"]
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        memory = dict.fromkeys(commands, 0.0)
        order = list(commands)
        for _ in range(turns):
            random.Random(0).shuffle(order)
            for name in order:
                if name == "copy of three":
                    out.mkdir()
                taken, peak = run(commands[name])
                seconds[name].append(taken)
                memory[name] = max(memory[name], peak)
                remove(out)
    copy = seconds["copy of three"]
    return {
        name: {
            "s": statistics.median(times),
            "of a copy": statistics.median(
                a / b for a, b in zip(times, copy, strict=True)
            ),
            "resident GB": memory[name],
        }
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one turn of 0.2 GB")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of a model")
    parser.add_argument("--turns", type=int, default=3, help="turns per variant")
    parser.add_argument("--where", type=Path, help="for the files; default: temporary")
    parser.add_argument("--out", type=Path, default=Path("out/benchmark_merging.json"))
    args = parser.parse_args()
    turns = 1 if args.quick else args.turns
    gigabytes = 0.2 if args.quick else args.gigabytes
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "processor": platform.machine(),
        "versions": {
            m.__name__: m.__version__ for m in (jax, np, ocp, safetensors, oa)
        },
        "python": platform.python_version(),
        "gigabytes of a model": gigabytes,
        "turns": turns,
    }
    for title, suffix in (("safetensors", ".safetensors"), ("Orbax", "")):
        result[title] = measure(suffix, gigabytes, turns, args.where)
        print(f"\n{title:16}{'s':>10}{'of a copy':>12}{'resident GB':>14}")
        for name, row in result[title].items():
            print(
                f"{name:16}{row['s']:10.2f}{row['of a copy']:12.2f}"
                f"{row['resident GB']:14.2f}"
            )
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\njax {jax.__version__}; written to {args.out}")


if __name__ == "__main__":
    main()
