"""Four averages of a byte-level transformer, riding in one Optax chain.

Trains a small causal transformer (Flax nnx) on real text, by default the source files
of the running Python's standard library, with a constant learning rate. The averages
cost no extra training: they stand last in the chain and are read out of its state.
At the end come a table of bits per byte on held-out files, live parameters against
each average over several seeds, a plot of the curves and a JSON file of the numbers.

    python examples/text.py
    python examples/text.py --data my_project/ --steps 5000 --out runs/text
    python examples/text.py --schedule linear --seeds 5

The default run takes a minute or two on two CPU cores.
"""

import argparse
import sysconfig
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _report import (
    candidates,
    check_writable,
    draw,
    fail,
    interruptible,
    legend_above,
    minus_live,
    positive,
    print_table,
    stack,
    summarize,
    two_panels,
    write_json,
)
from flax import nnx
from rich.progress import Progress

import optax_avg as oa

NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
TABLES = {"encodings", "pydoc_data"}  # tables rather than text
MAX_BYTES = 4_000_000
HELD_OUT = 0.1  # of the files; of the bytes where there is one file
EVALUATION_WINDOWS = 128
EVALUATION_BATCH = 32


def make_optimizer(
    learning_rate: optax.ScalarOrSchedule, steps: int
) -> optax.GradientTransformationExtraArgs:
    """The chain to copy: an optimizer, then any number of averages."""
    return optax.chain(
        optax.adamw(learning_rate),
        oa.ema_params(decay=0.99),
        oa.swa(start=3 * steps // 4, every=max(1, steps // 100)),
        oa.window_average(k=5, every=max(1, steps // 50), name="lawa"),
        oa.power_ema(sigma_rel=0.10),
    )


class Block(nnx.Module):
    """Causal self-attention and an MLP, each on a normalised residual stream."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.mix = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, context, width) to the same shape."""
        qkv = self.qkv(self.norm1(x)).reshape(*x.shape[:-1], 3, self.heads, -1)
        q, k, v = jnp.moveaxis(qkv, -3, 0)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(attended.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """A causal transformer over bytes."""

    def __init__(
        self, layers: int, width: int, heads: int, context: int, *, rngs: nnx.Rngs
    ) -> None:
        self.embed = nnx.Embed(256, width, rngs=rngs)
        self.position = nnx.Embed(context, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 256, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        """Maps bytes (batch, context) to logits (batch, context, 256)."""
        x = self.embed(text) + self.position(jnp.arange(text.shape[-1])[None])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def bits_per_byte(params: Any, graphdef: Any, windows: jax.Array) -> jax.Array:
    windows = windows.astype(jnp.int32)
    logits = nnx.merge(graphdef, params)(windows[:, :-1])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    return nats.mean() / jnp.log(2)


@partial(
    jax.jit,
    static_argnames=("graphdef", "tx"),
    donate_argnames=("params", "opt_state"),
)
def train_step(
    params: Any, opt_state: Any, windows: jax.Array, *, graphdef: Any, tx: Any
) -> tuple[Any, Any]:
    grads = jax.grad(bits_per_byte)(params, graphdef, windows)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


@partial(jax.jit, static_argnames="graphdef")
def evaluate(
    params: Any, opt_state: Any, batches: jax.Array, *, graphdef: Any
) -> dict[str, jax.Array]:
    def loss(params: Any) -> jax.Array:
        return jax.lax.map(partial(bits_per_byte, params, graphdef), batches).mean()

    return {name: loss(tree) for name, tree in candidates(params, opt_state).items()}


class Corpus(NamedTuple):
    """Bytes to train on and bytes held out."""

    train: np.ndarray
    held_out: np.ndarray
    files: int


def source_files(data: Path | None) -> list[Path]:
    """The files below ``data``, or the standard library's sources, sorted."""
    if data is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = NOT_SOURCE | TABLES
        return sorted(
            path
            for path in root.rglob("*.py")
            if not skip & set(path.relative_to(root).parts)
        )
    if data.is_dir():
        return sorted(path for path in data.rglob("*") if path.is_file())
    if data.is_file():
        return [data]
    raise ValueError(f"--data {data}: neither a file nor a folder")


def read_corpus(data: Path | None, context: int) -> Corpus:
    """Reads shuffled files up to ``MAX_BYTES`` and splits them, always the same way."""
    paths = source_files(data)
    np.random.default_rng(0).shuffle(paths)
    texts: list[bytes] = []
    room = MAX_BYTES
    for path in paths:
        with path.open("rb") as file:
            texts.append(file.read(room))
        room -= len(texts[-1])
        if room == 0:
            break
    files = len(texts)
    if files == 1:
        cut = int(len(texts[0]) * HELD_OUT)
        texts = [texts[0][:cut], texts[0][cut:]]
    held_out_files = max(1, int(len(texts) * HELD_OUT))
    held_out, train = (
        np.frombuffer(b"\n".join(part), np.uint8)
        for part in (texts[:held_out_files], texts[held_out_files:])
    )
    if min(len(held_out), len(train)) <= context:
        raise ValueError(
            f"{data or 'the standard library'}: {len(train)} bytes to train on and "
            f"{len(held_out)} held out, but a window takes {context + 1}; "
            "pass more text with --data or a smaller --context"
        )
    return Corpus(train, held_out, files)


def windows_at(text: np.ndarray, starts: np.ndarray, context: int) -> np.ndarray:
    return text[starts[:, None] + np.arange(context + 1)]


def evaluation_batches(text: np.ndarray, context: int) -> np.ndarray:
    """Windows spread evenly over the held-out text, the same at every call."""
    starts = np.linspace(0, len(text) - context - 1, EVALUATION_WINDOWS).astype(int)
    windows = windows_at(text, starts, context)
    return windows.reshape(-1, EVALUATION_BATCH, context + 1)


def learning_rate_schedule(
    kind: str, peak: float, steps: int
) -> optax.ScalarOrSchedule:
    if kind == "linear":
        return optax.linear_schedule(peak, 0.0, steps)
    if kind == "cosine":
        return optax.cosine_decay_schedule(peak, steps)
    return peak


def train(
    corpus: Corpus,
    args: argparse.Namespace,
    seed: int,
    tx: optax.GradientTransformationExtraArgs,
    advance: Callable[[], Any],
) -> list[dict[str, float]]:
    """Held-out bits per byte of every candidate at every evaluation."""
    model = Transformer(
        args.layers, args.width, args.heads, args.context, rngs=nnx.Rngs(seed)
    )
    graphdef, params = nnx.split(model)
    oa.check_chain(tx, params)  # says so if a link stands at the wrong place
    opt_state = tx.init(params)
    held_out = evaluation_batches(corpus.held_out, args.context)
    rng = np.random.default_rng(seed)
    at = set(evaluation_steps(args))
    curve = []
    for step in range(1, args.steps + 1):
        starts = rng.integers(0, len(corpus.train) - args.context, args.batch_size)
        windows = windows_at(corpus.train, starts, args.context)
        params, opt_state = train_step(
            params, opt_state, windows, graphdef=graphdef, tx=tx
        )
        if step in at:
            losses = evaluate(params, opt_state, held_out, graphdef=graphdef)
            curve.append({name: float(loss) for name, loss in losses.items()})
        advance()
    return curve


def evaluation_steps(args: argparse.Namespace) -> list[int]:
    steps = np.linspace(0, args.steps, args.evaluations + 1)[1:]
    return sorted({max(1, round(step)) for step in steps})


def train_all(corpus: Corpus, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Curves by candidate, of shape (seeds, evaluations)."""
    schedule = learning_rate_schedule(args.schedule, args.learning_rate, args.steps)
    tx = make_optimizer(schedule, args.steps)
    with Progress(transient=True) as progress:
        task = progress.add_task("training", total=args.seeds * args.steps)
        advance = partial(progress.advance, task)
        runs = [train(corpus, args, seed, tx, advance) for seed in range(args.seeds)]
    return stack(runs)


def plot(path: Path, steps: Sequence[int], curves: dict[str, np.ndarray]) -> None:
    """Loss, and loss minus that of the live parameters."""
    figure, (left, right) = two_panels()
    draw(left, steps, curves)
    left.set(xlabel="optimizer step", ylabel="held-out bits per byte")
    draw(right, steps, minus_live(curves))
    right.set(xlabel="optimizer step", ylabel="minus live parameters, same seed")
    legend_above(figure, left)
    figure.savefig(path, dpi=100)


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Corpus]:
    count, rate = positive(int), positive(float)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, help="a file or a folder; default: Python's sources")
    add("--out", type=Path, default=Path("out/text"), help="for text.png, text.json")
    add("--seeds", type=count, default=3, help="runs, with seeds 0, 1, ...")
    add("--steps", type=count, default=1000)
    add("--evaluations", type=count, default=10, help="points on the curves")
    add("--learning-rate", type=rate, default=3e-3)
    add("--schedule", choices=["constant", "linear", "cosine"], default="constant")
    add("--batch-size", type=count, default=8)
    add("--context", type=count, default=64, help="bytes that the model sees")
    add("--layers", type=count, default=2)
    add("--width", type=count, default=64)
    add("--heads", type=count, default=2)
    args = parser.parse_args(argv)
    if args.width % args.heads:
        fail(parser, f"--width {args.width} is not a multiple of --heads {args.heads}")
    try:
        corpus = read_corpus(args.data, args.context)
    except (OSError, ValueError) as error:
        fail(parser, f"cannot read the text: {error}")
    try:
        check_writable(args.out)
    except OSError as error:
        fail(parser, f"cannot write to --out {args.out}: {error}")
    return args, corpus


@interruptible
def main(argv: Sequence[str] | None = None) -> None:
    args, corpus = parse_args(argv)
    print(
        f"{corpus.files} files: {len(corpus.train)} bytes to train on, "
        f"{len(corpus.held_out)} held out"
    )
    began = time.perf_counter()
    curves = train_all(corpus, args)
    seconds = time.perf_counter() - began
    summary = summarize(curves)
    title = f"held-out text, mean ± standard deviation over {args.seeds} seeds"
    print_table(title, {"bits per byte": summary})
    steps = evaluation_steps(args)
    plot(args.out / "text.png", steps, curves)
    numbers = {
        "settings": {key: value for key, value in vars(args).items() if key != "out"}
        | {"data": str(args.data) if args.data else None},
        "data": corpus._asdict()
        | {"train": len(corpus.train), "held_out": len(corpus.held_out)},
        "seconds": seconds,
        "steps": steps,
        "curves": {name: curve.tolist() for name, curve in curves.items()},
        "final": summary,
    }
    write_json(args.out / "text.json", numbers)
    print(f"wrote {args.out / 'text.png'} and {args.out / 'text.json'}")


if __name__ == "__main__":
    main()
