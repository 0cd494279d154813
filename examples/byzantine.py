"""Ten workers of which three send attacks, on host devices: who still learns?

Each worker has its own images; two workers share one of five host devices. The liars
send their gradients with the sign flipped, ALIE (a little off the mean, within the
spread of the honest ones) or the mean times a small negative number. Everyone sends
gradients, or a momentum of them. All runs of one aggregator go side by side.

    python examples/byzantine.py
    python examples/byzantine.py --seeds 5 --steps 1000
"""

import argparse
import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _data import Images
from _report import (
    fail,
    interruptible,
    parse_with_images,
    positive,
    print_measures,
    write_json,
)
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from rich.progress import Progress

import optax_avg as oa

WORKERS, LIARS, DEVICES = 10, 3, 5
# Baruch et al. 2019: the quantile of (n - f - s)/(n - f), s = n // 2 + 1 - f.
ALIE_Z = 0.18
IPM_EPSILON = 0.1  # Xie et al. 2020


def sign_flip(own: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    del mean, std
    return -own


def alie(own: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    return jnp.broadcast_to(mean - ALIE_Z * std, own.shape)


def inner_product(own: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    del std
    return jnp.broadcast_to(-IPM_EPSILON * mean, own.shape)


ATTACKS: dict[str, Callable[..., jax.Array]] = {
    "none": lambda own, mean, std: own,
    "sign flip": sign_flip,
    "ALIE": alie,
    "inner product": inner_product,
}
MOMENTA = {"gradients": 0.0, "momentum": 0.9}
OVER = {"per_elt_axis": 0, "axis_name": "workers"}


def mean() -> Any:
    """The mean over workers, as an aggregator."""
    take = lambda g: lax.pmean(jnp.mean(g, axis=0), "workers")
    return optax.stateless(lambda rows, _: jax.tree.map(take, rows))


AGGREGATORS: dict[str, Callable[[], Any]] = {
    "mean": mean,
    "coordinate median": lambda: oa.coordinate_median(**OVER),
    "trimmed mean": lambda: oa.trimmed_mean(LIARS, **OVER),
    "geometric median": lambda: oa.geometric_median(**OVER),
    "Krum": lambda: oa.krum(LIARS, **OVER),
    "centered clipping": lambda: oa.centered_clip(0.3, 3, **OVER),
}


class Run(NamedTuple):
    """What tells one run of an aggregator from another."""

    attack: jax.Array
    beta: jax.Array
    key: jax.Array


def start(key: jax.Array, inputs: int, width: int, classes: int) -> Any:
    a, b = jax.random.split(key)
    return {
        "w": jax.random.normal(a, (inputs, width)) * (2 / inputs) ** 0.5,
        "v": jax.random.normal(b, (width, classes)) * width**-0.5,
    }


def logits(params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["w"]) @ params["v"]


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    each = optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)
    return jnp.mean(each)


def sent(rows: jax.Array, lies: jax.Array, attack: jax.Array) -> jax.Array:
    """What the workers of this device send, honest rows and lies."""
    honest = (~lies).reshape(-1, *[1] * (rows.ndim - 1))
    count = WORKERS - LIARS
    total = lambda x: lax.psum(jnp.sum(jnp.where(honest, x, 0), axis=0), "workers")
    mean = total(rows) / count
    std = jnp.sqrt(total((rows - mean[None]) ** 2) / count)
    false = lax.switch(attack, [*ATTACKS.values()], rows, mean[None], std[None])
    return jnp.where(honest, rows, false)


def train(
    tx: Any, args: argparse.Namespace, x: jax.Array, y: jax.Array, run: Run
) -> Any:
    """One run on the workers of this device: x has shape (2, images, pixels)."""
    here = lax.axis_index("workers")
    number = here * len(x) + jnp.arange(len(x))
    begin, later = jax.random.split(run.key)
    params = start(begin, x.shape[-1], args.width, args.classes)
    momentum = jax.tree.map(lambda p: jnp.zeros((len(x), *p.shape)), params)

    def step(carry, key):
        params, momentum, state = carry
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, number)
        pick = lambda key: jax.random.randint(key, (args.batch_size,), 0, x.shape[1])
        rows = jax.vmap(pick)(keys)
        take = lambda x, y, r: jax.grad(loss)(params, x[r], y[r])
        grads = jax.vmap(take)(x, y, rows)
        momentum = jax.tree.map(
            lambda m, g: run.beta * m + (1 - run.beta) * g, momentum, grads
        )
        attacked = jax.tree.map(lambda m: sent(m, number < LIARS, run.attack), momentum)
        updates, state = tx.update(attacked, state, params)
        return (optax.apply_updates(params, updates), momentum, state), None

    keys = jax.random.split(later, args.steps)
    carry, _ = lax.scan(step, (params, momentum, tx.init(params)), keys)
    return carry[0]


def compare(
    aggregator: Callable[[], Any], images: Images, args: argparse.Namespace
) -> dict[str, dict[str, np.ndarray]]:
    """Test accuracy in % of every seed, by what is sent and by attack."""
    tx = optax.chain(aggregator(), optax.sgd(args.learning_rate))
    flat = lambda x: jnp.asarray(x.reshape(len(x), -1))
    share = len(images.train_y) // WORKERS
    order = np.random.default_rng(0).permutation(share * WORKERS)
    x = flat(images.train_x)[order].reshape(WORKERS, share, -1)
    y = jnp.asarray(images.train_y)[order].reshape(WORKERS, share)
    shape = (len(MOMENTA), len(ATTACKS), args.seeds)
    beta, attack, seed = (a.ravel() for a in np.indices(shape))
    keys = [jax.random.key(int(s)) for s in seed]
    beta = np.array([*MOMENTA.values()])[beta]
    runs = Run(jnp.asarray(attack), jnp.asarray(beta), jnp.stack(keys))
    mesh = jax.make_mesh(
        (DEVICES,),
        ("workers",),
        devices=jax.devices()[:DEVICES],
        axis_types=(AxisType.Auto,),
    )
    all_runs = jax.vmap(functools.partial(train, tx, args), (None, None, 0))
    params = jax.jit(
        jax.shard_map(
            all_runs,
            mesh=mesh,
            in_specs=(P("workers"), P("workers"), P()),
            out_specs=P(),
            check_vma=False,
        )
    )(x, y, runs)
    outputs = jax.vmap(logits, (0, None))(params, flat(images.test_x))
    right = np.asarray(jnp.argmax(outputs, axis=-1)) == images.test_y[None]
    accuracy = (100 * right.mean(axis=1)).reshape(shape).round(6)
    return {
        name: dict(zip(ATTACKS, accuracy[i], strict=True))
        for i, name in enumerate(MOMENTA)
    }


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Images]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=positive(int), default=3)
    parser.add_argument("--steps", type=positive(int), default=400)
    parser.add_argument("--batch-size", type=positive(int), default=16)
    parser.add_argument("--width", type=positive(int), default=32)
    parser.add_argument("--learning-rate", type=positive(float), default=0.5)
    parser.add_argument("--out", type=Path, default=Path("out/byzantine"))
    args, images = parse_with_images(parser, argv)
    if len(images.train_y) < WORKERS:
        fail(parser, f"{len(images.train_y)} images are not enough for {WORKERS}")
    args.classes = int(images.train_y.max()) + 1
    return args, images


@interruptible
def main(argv: Sequence[str] | None = None) -> None:
    if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", 8)
    args, images = parse_args(argv)
    print(f"{WORKERS} workers, {LIARS} of them lie; {len(images.test_y)} test images")
    began = time.perf_counter()
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {name: {} for name in MOMENTA}
    with Progress(transient=True) as progress:
        task = progress.add_task("training", total=len(AGGREGATORS))
        for name, aggregator in AGGREGATORS.items():
            for what, values in compare(aggregator, images, args).items():
                found[what][name] = values
            progress.advance(task)
    for what, table in found.items():
        print_measures(f"test accuracy, %, of workers that send {what}", table)
    numbers = {
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "data")}
        | {"data": str(args.data) if args.data else None},
        "seconds": time.perf_counter() - began,
        "test accuracy, %": {
            what: {
                name: {attack: value.tolist() for attack, value in values.items()}
                for name, values in table.items()
            }
            for what, table in found.items()
        },
    }
    write_json(args.out / "byzantine.json", numbers)
    print(f"wrote {args.out / 'byzantine.json'}")


if __name__ == "__main__":
    main()
