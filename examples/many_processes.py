"""One training in many processes, which may be killed and restarted at any moment.

Parameters lie over a mesh of data and model axes (FSDP and tensor parallelism). Each
part of the batch gives a gradient, of which the median is taken; SAM takes it twice.
All processes together write an Orbax checkpoint and a snapshot of the average. A
restarted training goes on from the last checkpoint, with more or fewer processes.

    python examples/many_processes.py                    # one process, eight devices
    python examples/many_processes.py --processes 4      # four on this machine

On a cluster each process calls ``jax.distributed.initialize()`` and nothing else
changes: see docs/many_processes.md.
"""

import argparse
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_avg as oa

WIDTH, HIDDEN, ROWS = 16, 32, 32
SPECS = {"w_in": P("data", "model"), "b": P("model"), "w_out": P("model", "data")}
TX = optax.chain(oa.sam(0.05), optax.adamw(1e-2), oa.power_ema([0.05, 0.10]))
MEDIAN = oa.coordinate_median(axis_name="data")


def first_params() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"w_in": (WIDTH, HIDDEN), "b": (HIDDEN,), "w_out": (HIDDEN, WIDTH)}
    return {k: rng.normal(0, 0.3, s).astype(np.float32) for k, s in shapes.items()}


def batch_of(step: int) -> np.ndarray:
    """The batch of a step, the same in every process and after a restart."""
    return np.random.default_rng(step).normal(size=(ROWS, WIDTH)).astype(np.float32)


def placed(x: Any, sharding: NamedSharding) -> jax.Array:
    """A global array, of which each process makes its own parts."""
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def loss(params: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["w_in"] + params["b"][None])
    return jnp.mean((hidden @ params["w_out"] - jnp.sin(x)) ** 2)


def training(mesh: jax.sharding.Mesh) -> tuple[Any, Any, Any]:
    """``init``, a jitted ``step`` and the shapes and shardings of the state."""

    # Without check_vma each part of the batch keeps a gradient of its own.
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=False,
    )
    def robust(params: Any, x: jax.Array) -> Any:
        return MEDIAN.update(jax.grad(loss)(params, x), MEDIAN.init(params))[0]

    def init() -> tuple[Any, Any]:
        params = {
            name: placed(x, NamedSharding(mesh, SPECS[name]))
            for name, x in first_params().items()
        }
        return params, jax.jit(TX.init)(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, x: jax.Array) -> tuple[Any, Any]:
        grad_fn = lambda params: robust(params, x)
        updates, state = TX.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    return init, step, NamedSharding(mesh, P("data"))


def train(out: Path, steps: int, every: int) -> None:
    mesh = jax.make_mesh(
        (jax.device_count() // 2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2
    )
    init, step, rows = training(mesh)
    params, state = init()
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        {"params": params, "state": state},
    )
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with (
        ocp.CheckpointManager(out / "checkpoints", options=options) as manager,
        oa.posthoc.SnapshotStore(out / "averages") as store,
    ):
        done = manager.latest_step() or 0
        if done:
            restored = manager.restore(done, args=ocp.args.StandardRestore(like))
            params, state = restored["params"], restored["state"]
        store.delete_after(done)  # snapshots that the training will write again
        report(f"begin {done}")
        for t in range(done + 1, steps + 1):
            params, state = step(params, state, placed(batch_of(t), rows))
            if t % every == 0:
                # First the snapshot, so that none is missing before a checkpoint.
                store.save(state, t)
                store.wait()
                report(f"save {t}")
                content = {"params": params, "state": state}
                manager.save(t, args=ocp.args.StandardSave(content))
        manager.wait_until_finished()
        average = store.reconstruct(like["params"], sigma_rel=0.08)
    gathered = multihost_utils.process_allgather(
        {"live": params, "average": average}, tiled=True
    )
    if jax.process_index() == 0:
        np.savez(out / "result.npz", **flat(gathered))
        error = loss(jax.device_get(gathered["average"]), batch_of(0))
        report(f"loss of the average {error:.4f}")


def flat(trees: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{kind} {k}": tree[k] for kind, tree in trees.items() for k in tree}


def report(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


def start(processes: int, args: list[str], devices: int = 8) -> list[subprocess.Popen]:
    """Starts all processes of a training on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={devices // processes}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return [
        subprocess.Popen(
            [
                *(sys.executable, __file__, *args, "--coordinator", address),
                *("--processes", str(processes), "--process-id", str(i)),
            ],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("many_processes"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10, help="steps between saves")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--coordinator", help="address of process 0")
    parser.add_argument("--process-id", type=int)
    parser.add_argument("--cluster", action="store_true", help="Slurm, GKE, TPU pods")
    args = parser.parse_args(argv)
    if args.cluster:
        jax.distributed.initialize()
    elif args.coordinator:
        jax.distributed.initialize(args.coordinator, args.processes, args.process_id)
    elif args.processes > 1:
        own = ["--out", str(args.out), "--steps", str(args.steps)]
        started = start(args.processes, [*own, "--every", str(args.every)])
        for process in started:
            said, errors = process.communicate()
            print(said, end="")
            if process.returncode:
                print(errors, end="", file=sys.stderr)
        sys.exit(any(process.returncode for process in started))
    train(args.out.resolve(), args.steps, args.every)


if __name__ == "__main__":
    main()
