"""What gradients at perturbed parameters cost per training step: time, memory, compile.

    python benchmarks/sharpness.py [--quick] [--out FILE]

A convolutional network and a transformer; ratios within this run, to the plain gradient
and to ``optax.contrib.sam(opaque_mode=True)``. Parameters and state are donated, and
the variants take turns.
"""

import argparse
import itertools
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import optax_avg as oa

BLOCK = 5  # steps per turn, so that LookSAM with k = 5 ascends once in each
CALLS = {"LookSAM, k=5, multi-call": 6}  # of the step function for so many steps
RHO = 0.05


class Convolutional(nnx.Module):
    """Three convolutions and a linear layer on 32 x 32 images."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        widths = [3, 32, 64, 64]
        self.layers = nnx.List(
            [nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in itertools.pairwise(widths)]
        )
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, 3) to logits."""
        for layer in self.layers:
            x = nnx.avg_pool(nnx.relu(layer(x)), (2, 2), (2, 2))
        return self.head(self.norm(x.mean(axis=(1, 2))))


class Transformer(nnx.Module):
    """Two blocks of attention and MLP, width 128."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List(
            [
                nnx.Dict(
                    norm1=nnx.LayerNorm(128, rngs=rngs),
                    mix=nnx.MultiHeadAttention(4, 128, decode=False, rngs=rngs),
                    norm2=nnx.LayerNorm(128, rngs=rngs),
                    up=nnx.Linear(128, 512, rngs=rngs),
                    down=nnx.Linear(512, 128, rngs=rngs),
                )
                for _ in range(2)
            ]
        )
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, context, 128) to logits."""
        for block in self.blocks:
            x = x + block["mix"](block["norm1"](x))
            x = x + block["down"](nnx.gelu(block["up"](block["norm2"](x))))
        return self.head(x.mean(axis=1))


MODELS = {
    "convolutional, 32 images": (Convolutional, (32, 32, 32, 3)),
    "transformer, 16 x 64 tokens": (Transformer, (16, 64, 128)),
}


class Chosen(NamedTuple):
    """Steps of which one is chosen, outside of ``jit``, by the state."""

    choose: Callable[[Any], Callable[..., Any]]
    steps: tuple[Callable[..., Any], ...]


def variants(loss: Callable[..., Any]) -> dict[str, tuple[Any, Callable[..., Any]]]:
    """By name, the initial state and one step of each variant."""
    value_and_grad, base = jax.value_and_grad(loss), optax.sgd(0.01, momentum=0.9)

    def finish(grads, opt_state, params):
        updates, opt_state = base.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def plain(params, state, batch):
        return finish(value_and_grad(params, batch)[1], state, params)

    def wrapped(rule):
        sharp = oa.sharpness_aware(value_and_grad, rule)

        def step(params, state, batch):
            _, grads, rule_state = sharp(params, state[0], batch)
            params, opt_state = finish(grads, state[1], params)
            return params, (rule_state, opt_state)

        return lambda params: (sharp.init(params), base.init(params)), step

    def two_programs(rule):
        sharp = oa.sharpness_aware(value_and_grad, rule)

        def taken(due):
            def step(params, state, batch):
                _, grads, rule_state = sharp.given(due)(params, state[0], batch)
                params, opt_state = finish(grads, state[1], params)
                return params, (rule_state, opt_state)

            return step

        def choose(state):
            return taken_if[bool(sharp.due(state[0]))]

        taken_if = {due: taken(due) for due in (True, False)}
        init = lambda params: (sharp.init(params), base.init(params))
        return init, Chosen(choose, tuple(taken_if.values()))

    def called(rule):
        tx = oa.multi_call(rule, base)

        def step(params, state, batch):
            updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
            return optax.apply_updates(params, updates), state

        return tx.init, step

    def chained(tx):
        def step(params, state, batch):
            grad_fn = lambda p, *_: jax.grad(loss)(p, batch)
            updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
            return optax.apply_updates(params, updates), state

        return tx.init, step

    ascend = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    rules = {
        "SAM": oa.rules.sam(RHO),
        "SAM-ON": oa.rules.sam_on(RHO),
        "LookSAM, k=5": oa.rules.look_sam(RHO, 5),
        "momentum SAM": oa.rules.momentum_sam(RHO),
        "GAM": oa.rules.gam(),
    }
    return {
        "plain gradient": (base.init, plain),
        "optax.contrib.sam": chained(optax.contrib.sam(base, ascend, opaque_mode=True)),
        "SAM, link": chained(optax.chain(oa.sam(RHO), base)),
        **{name: wrapped(rule) for name, rule in rules.items()},
        "LookSAM, k=5, two programs": two_programs(oa.rules.look_sam(RHO, 5)),
        "LookSAM, k=5, multi-call": called(oa.rules.look_sam(RHO, 5)),
        "MESA": mesa(loss, base),
    }


def mesa(loss: Any, base: Any) -> Any:
    """A forward pass of the averaged parameters instead of a second gradient."""
    average = oa.ema_params(0.999)

    def with_teacher(params, teacher, batch):
        student, targets = loss.logits(params, batch), loss.logits(teacher, batch)
        return loss.of(student, batch) + 0.3 * oa.trajectory_loss(student, targets)

    def step(params, state, batch):
        teacher = oa.averaged_params(state[1], params)
        grads = jax.grad(with_teacher)(params, teacher, batch)
        updates, opt_state = base.update(grads, state[0], params)
        updates, averages = average.update(updates, state[1], params)
        return optax.apply_updates(params, updates), (opt_state, averages)

    return lambda params: (base.init(params), average.init(params)), step


def make_loss(graphdef: Any) -> Any:
    """Cross entropy of a model, with its logits at hand."""

    def logits(params, batch):
        return nnx.merge(graphdef, params)(batch[0])

    def of(z, batch):
        return optax.softmax_cross_entropy_with_integer_labels(z, batch[1]).mean()

    def loss(params, batch):
        return of(logits(params, batch), batch)

    named: Any = loss
    named.logits, named.of = logits, of
    return named


def running(step: Any, programs: dict[Any, Any]) -> Callable[..., Any]:
    """What runs a step: its one program, or the one that the state chooses."""
    if not isinstance(step, Chosen):
        return programs[step]
    return lambda params, state, batch: programs[step.choose(state)](
        params, state, batch
    )


def measure(model: Any, shape: tuple[int, ...], turns: int) -> dict[str, Any]:
    """Times, temporary memory and compile times of every variant on one model."""
    graphdef, params = nnx.split(model(rngs=nnx.Rngs(0)))
    batch = (
        jax.random.normal(jax.random.key(1), shape),
        jnp.arange(shape[0]) % 10,
    )
    compiled, states, report = {}, {}, {}
    links = variants(make_loss(graphdef))
    jax.jit(links["plain gradient"][1]).lower(
        params, links["plain gradient"][0](params), batch
    ).compile()
    for name, (init, step) in links.items():
        own = jax.tree.map(jnp.copy, params)
        states[name] = own, init(own)
        seconds = []
        for _ in range(3):
            jax.clear_caches()
            began = time.perf_counter()
            programs = {
                one: jax.jit(one, donate_argnums=(0, 1))
                .lower(*states[name], batch)
                .compile()
                for one in (step.steps if isinstance(step, Chosen) else [step])
            }
            seconds.append(time.perf_counter() - began)
        compiled[name] = running(step, programs)
        memory = [p.memory_analysis().temp_size_in_bytes for p in programs.values()]
        report[name] = {
            "compile_s": statistics.median(seconds),
            "temporary_bytes": max(memory),
        }
    turns_of: dict[str, list[float]] = {name: [] for name in links}
    order, shuffle = list(compiled), random.Random(0).shuffle
    for _ in range(turns):
        shuffle(
            order
        )  # a variant also pays for what its predecessor left in the caches
        for name in order:
            run = compiled[name]
            began = time.perf_counter()
            for _ in range(CALLS.get(name, BLOCK)):
                states[name] = run(*states[name], batch)
            jax.block_until_ready(states[name])
            turns_of[name].append((time.perf_counter() - began) / BLOCK)
    for name, times in turns_of.items():
        row = report[name]
        row["step_ms"] = 1e3 * statistics.median(times)
        for peer, label in (
            ("plain gradient", "plain"),
            ("optax.contrib.sam", "optax"),
        ):
            ratios = [a / b for a, b in zip(times, turns_of[peer], strict=True)]
            row[f"/ {label}"] = statistics.median(ratios)
            row[f"memory / {label}"] = (
                row["temporary_bytes"] / report[peer]["temporary_bytes"]
            )
        row["compile / plain"] = (
            row["compile_s"] / report["plain gradient"]["compile_s"]
        )
    return report


def show(title: str, report: dict[str, Any]) -> None:
    """Prints one table."""
    columns = ("step_ms", "/ plain", "/ optax", "memory / optax", "compile / plain")
    print(f"\n{title}\n{'':26}" + "".join(f"{c:>17}" for c in columns))
    for name, row in report.items():
        print(f"{name:26}" + "".join(f"{row[c]:17.3f}" for c in columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two turns")
    parser.add_argument("--turns", type=int, default=15, help="turns per variant")
    parser.add_argument(
        "--out", type=Path, default=Path("out/benchmark_sharpness.json")
    )
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    result: dict[str, Any] = {
        "device": device.device_kind,
        "processor": platform.machine(),
        "versions": {m.__name__: m.__version__ for m in (jax, optax, np, oa)},
        "python": platform.python_version(),
        "turns": 2 if args.quick else args.turns,
    }
    for title, (model, shape) in MODELS.items():
        result[title] = measure(model, shape, result["turns"])
        show(title, result[title])
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{device.device_kind}, jax {jax.__version__}; written to {args.out}")


if __name__ == "__main__":
    main()
