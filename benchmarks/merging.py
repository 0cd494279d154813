"""What merging checkpoints larger than memory costs, against copying their bytes.

    python benchmarks/merging.py [--quick] [--gigabytes 2] [--out FILE]

Three models of two gigabytes in 50 leaves and a base, as safetensors files and as Orbax
checkpoints. Every merge is a process of its own, of which the greatest resident memory
is taken; the time to import JAX and Orbax is within. Copying reads and writes three
models. All write through to the disk, and take turns. Needs nine times the size of a
model on disk.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

WRITE = "--write"
VERSIONS = ("jax", "numpy", "orbax-checkpoint", "safetensors", "optax_avg")
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
    import numpy as np
    import orbax.checkpoint as ocp
    import safetensors.numpy

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
    """Seconds and greatest resident gigabytes of a process.

    This process stays small: a child counts as large as its parent was.
    """
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert child.stdout is not None
    said = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    if status:
        raise RuntimeError(f"{' '.join(command)}: {said.decode()}")
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
        run([sys.executable, __file__, WRITE, name, suffix, str(gigabytes)])
        models = [str(folder / f"{model}{suffix}") for model in MODELS]
        out = folder / f"out{suffix}"
        commands = {}
        for merge, options in MERGES.items():
            base = [*options, str(folder / f"base{suffix}")] if options else []
            commands[merge] = [*COMMAND, merge, *models, *base, "--out", str(out)]
        copy = lambda some: [
            "sh",
            "-c",
            f"cp -r {' '.join(some)} {out} && sync -f {out}",
        ]
        commands["copy of three"] = copy(models)
        commands["copy of one"] = copy(models[:1])
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
    if sys.argv[1:2] == [WRITE]:
        write_models(Path(sys.argv[2]), sys.argv[3], float(sys.argv[4]))
        return
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
        "versions": {name: version(name) for name in VERSIONS},
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
    print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    main()
