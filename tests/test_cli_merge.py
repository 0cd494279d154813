"""The command merges as the functions do: any tree, by parts, and what it refuses."""

import json
import os
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
import safetensors.numpy

from optax_avg import merging
from optax_avg._checkpoints import sources
from optax_avg._checkpoints.leaves import Leaf
from optax_avg._checkpoints.opening import open_checkpoint
from optax_avg.cli import _leafwise
from optax_avg.cli._leafwise import by_rule
from optax_avg.merging import curvature, soups, spheres, task_vectors
from optax_avg.merging.trees import merged

W = [0.5, 0.3, 0.2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checked(result):
    code, out, errors = result
    assert code == 0, errors
    return out


def refused(result, *messages, code=1):
    found, _, errors = result
    assert found == code, errors
    for message in messages:
        assert message in errors
    assert "Traceback" not in errors


def save(name, leaves, metadata=None):
    leaves = {k: np.asarray(x) for k, x in leaves.items()}
    safetensors.numpy.save_file(leaves, f"{name}.safetensors", metadata)


def load(path="out.safetensors"):
    source = open_checkpoint(path)
    return {leaf.name: source.read([i])[0] for i, leaf in enumerate(source.leaves)}


# --- the command and the function, over all methods ---

# Arguments of the command, and the function of models, curvatures, a base and its own.
METHODS = {
    "soup": ("", lambda xs, hs, b, h: merging.weighted(xs, W)),
    "wise-ft": ("--alpha 0.3 --base b", lambda xs, hs, b, h: wise_ft(b, xs[0])),
    "model-stock": ("--base b", lambda xs, hs, b, h: merging.model_stock(xs, b)),
    "task-arithmetic": (
        "--scale 0.4 --base b",
        lambda xs, hs, b, h: merging.task_arithmetic(xs, b, 0.4),
    ),
    "ties": (
        "--density 0.4 --scale 1.5 --base b",
        lambda xs, hs, b, h: merging.ties(xs, b, 0.4, scale=1.5),
    ),
    "ties --dare": (
        "--density 0.5 --seed 7 --base b",
        lambda xs, hs, b, h: merging.ties(merging.dare(xs, b, 0.5, 7), b, 1.0),
    ),
    "cooldown": (
        "--shape cosine",
        lambda xs, hs, b, h: merging.cooldown(xs, "cosine"),
    ),
    "slerp": ("--t 0.3", lambda xs, hs, b, h: merging.slerp(xs[0], xs[1], 0.3)),
    "karcher": ("", lambda xs, hs, b, h: merging.karcher(xs, W)),
    "variance-corrected": (
        "",
        lambda xs, hs, b, h: merging.variance_corrected(xs, W),
    ),
    "fisher": (
        "--fisher h0 --fisher h1 --fisher h2",
        lambda xs, hs, b, h: merging.fisher(xs, hs, W),
    ),
    "gradient-matching": (
        "--scale 0.6 --damping 0.1 --base b --base-hessian h "
        "--hessian h0 --hessian h1 --hessian h2",
        lambda xs, hs, b, h: merging.gradient_matching(xs, hs, b, h, 0.6, 0.1),
    ),
}
WEIGHTED = ("soup", "karcher", "variance-corrected", "fisher")
FILES = ("b", "h", "h0", "h1", "h2")
every_method = pytest.mark.parametrize("method", METHODS)


def wise_ft(base, tuned):
    return merging.wise_ft(base, tuned, 0.3)


def command(method, suffix=".safetensors"):
    options, count = METHODS[method][0].split(), {"wise-ft": 1, "slerp": 2}
    models = [f"x{t}" for t in range(count.get(method, 3))]
    name, *flags = method.split()
    weights = ["--weights", "0.5,0.3,0.2"] if method in WEIGHTED else []
    with_suffix = [o + suffix if o in FILES else o for o in [*models, *options]]
    files = [m + suffix for m in models]
    return ["merge", name, *files, *with_suffix[len(models) :], *flags, *weights]


DTYPES = [
    np.float32,
    np.float64,
    ml_dtypes.bfloat16,
    np.float16,
    np.int32,
    np.int64,
    np.bool_,
]
NAMES = ["w", "layer.w", "layer.b", "a.b.c", "z"]


@st.composite
def trees(draw):
    """Seven trees of one structure, whose leaves are each of any dtype."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    shapes = st.sampled_from([(), (1,), (0, 3), (3, 4)])
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    found = [{} for _ in range(8)]
    for name in names:
        shape = draw(shapes)
        kind = draw(st.sampled_from(DTYPES))
        for tree in found:
            other = draw(st.sampled_from([kind, kind, *DTYPES[:4]]))
            # Curvature is never negative.
            value = np.abs(rng.normal(size=shape) * 3) + 0.1
            sign = rng.choice([-1, 1], size=shape) if tree in found[:4] else 1
            if jnp.issubdtype(kind, jnp.inexact) and not jnp.issubdtype(
                other, jnp.inexact
            ):
                other = kind
            tree[name] = np.asarray(value * sign).astype(other)
    return found


def nested(flat):
    """As the command names leaves: by the parts between dots."""
    tree = {}
    for name, x in flat.items():
        *parents, last = name.split(".")
        place = tree
        for part in parents:
            place = place.setdefault(part, {})
        place[last] = x
    return tree


@every_method
@hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    max_examples=3,
)
@hypothesis.given(trees())
def test_the_command_and_the_function_agree(method, run, found):
    """On mixed types of floats, integers, bools, scalars, empty leaves, dots."""
    files = ["x0", "x1", "x2", "b", "h0", "h1", "h2", "h"]
    for name, leaves in zip(files, found, strict=True):
        save(name, leaves)
    checked(run(*command(method), "--out", "out.safetensors", "--force"))
    merge = METHODS[method][1]
    # JAX knows 64 bits where it is told; the command tells it where they occur.
    with jax.enable_x64(True):
        xs, b, hs, h = found[:3], found[3], found[4:7], found[7]
        flat = merge(xs, hs, b, h)
        deep = merge(
            [nested(x) for x in xs], [nested(x) for x in hs], *map(nested, (b, h))
        )
    got = load()
    assert set(got) == set(flat)
    first = b if method == "wise-ft" else xs[0]
    for name, wanted in flat.items():
        assert got[name].dtype == first[name].dtype
        assert got[name].shape == first[name].shape
        if not jnp.issubdtype(first[name].dtype, jnp.inexact):
            np.testing.assert_array_equal(got[name], first[name])
            continue
        eps = float(jnp.finfo(first[name].dtype).eps)
        close = max(eps, 2e-6)  # one rounding, or sums of float32 in another order
        size = max(np.abs(np.float64(x[name])).max(initial=1) for x in found)
        np.testing.assert_allclose(
            np.float64(got[name]), np.float64(wanted), rtol=close, atol=close * size
        )
        part = deep
        for key in name.split("."):
            part = part[key]
        np.testing.assert_array_equal(np.asarray(part), np.asarray(wanted))


# --- by parts ---

RULES = {
    "soup": (soups.weighted_rule(3, W), 3, True),
    "wise-ft": (soups.wise_ft_rule(0.3), 2, True),
    "task-arithmetic": (task_vectors.task_arithmetic_rule(0.4), 4, True),
    "ties": (task_vectors.ties_rule(3, 0.3, 1.5), 4, True),
    "fisher": (curvature.fisher_rule(3, W), 6, True),
    "gradient-matching": (curvature.gradient_matching_rule(3, 0.6, 0.1), 8, True),
    "slerp": (spheres.slerp_rule(0.3), 2, False),
    "karcher": (spheres.karcher_rule(3, W), 3, False),
    "variance-corrected": (soups.variance_rule(3, W), 3, False),
    "model-stock": (task_vectors.model_stock_rule(3), 4, False),
}


def in_parts(xs, step):
    flat = [x.reshape(-1) for x in xs]
    return lambda: (
        [x[begin : begin + step] for x in flat]
        for begin in range(0, flat[0].size, step)
    )


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(jnp.float32, 1.0), (jnp.float32, 1e30), (jnp.bfloat16, 1e-30)],
)
@pytest.mark.parametrize("name", RULES)
def test_parts_make_the_whole(name, dtype, scale):
    """Bit for bit where a method is elementwise, to rounding where it sums."""
    rule, count, elementwise = RULES[name]
    rng = np.random.default_rng(0)
    shape = (29, 7)
    # Of one sign for curvatures, coarse for ties, sizes that differ between parts.
    xs = [np.abs(rng.normal(size=shape)).round(1) + 0.1 for _ in range(count)]
    signs = [rng.choice([-1, 1], size=shape) if t < 3 else 1 for t in range(count)]
    grown = np.where(np.arange(29)[:, None] < 9, 1e-3, 1.0)
    grown[20:] = 0
    xs = [
        jnp.asarray(x * s * grown * scale, dtype)
        for x, s in zip(xs, signs, strict=True)
    ]
    leaf = Leaf(("w",), shape, str(jnp.dtype(dtype)))
    method = by_rule(rule)
    (whole,) = method(leaf, lambda: iter([xs]))
    for step in (29, 64):
        parts = list(method(leaf, in_parts(xs, step)))
        found = np.concatenate([np.asarray(x) for x in parts]).reshape(shape)
        if elementwise:
            np.testing.assert_array_equal(found, whole)
        else:
            eps = float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(
                np.float64(found) / scale, np.float64(whole) / scale, 16 * eps, 1e-6
            )
    np.testing.assert_allclose(
        np.float64(merged(rule, xs)) / scale, np.float64(whole) / scale, 1e-2, 1e-6
    )


@every_method
@pytest.mark.parametrize("suffix", [".safetensors", ""])
def test_a_leaf_larger_than_a_batch(method, suffix, run, monkeypatch):
    """The same file comes out, and no more than a part of a leaf is read at once."""
    rng = np.random.default_rng(1)
    for name in ("x0", "x1", "x2", "b", "h0", "h1", "h2", "h"):
        x = np.abs(rng.normal(size=(40, 30))).astype(np.float32)
        x *= rng.choice([-1, 1], size=x.shape) if name[0] in "xb" else 1
        leaves = {"w": x, "n": np.arange(5000, dtype=np.int32), "s": x[0, :3]}
        if suffix:
            save(name, leaves)
        else:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
                writer.save(Path(name).absolute(), args=ocp.args.PyTreeSave(leaves))
    checked(run(*command(method, suffix), "--out", "whole" + suffix))
    monkeypatch.setattr(sources, "BATCH", 1000)
    sizes = []
    read = _leafwise.open_checkpoint

    def counted(path, only):
        source = read(path, only)

        def parts(i, scratch):
            found = source.parts(i, scratch)

            def part(begin, end):
                sizes.append(4 * (end - begin))
                return found(begin, end)

            return part

        return source._replace(parts=parts)

    monkeypatch.setattr(_leafwise, "open_checkpoint", counted)
    checked(run(*command(method, suffix), "--out", "parts" + suffix))
    whole, parts = load("whole" + suffix), load("parts" + suffix)
    for name, x in whole.items():
        np.testing.assert_allclose(parts[name], x, rtol=1e-5, atol=1e-6)
    if suffix:
        assert 0 < max(sizes) <= 1000
    assert not [name for name in os.listdir() if name.startswith(".")]


# --- what is not finite, and what lies outside ---


@every_method
@pytest.mark.parametrize(("batch", "value"), [(1000, np.nan), (2**25, np.inf)])
def test_a_model_that_is_not_finite_is_named(method, batch, value, run, monkeypatch):
    monkeypatch.setattr(sources, "BATCH", batch)
    good = {"a": np.ones(9, np.float32), "layer.w": np.ones(500, np.float32)}
    for name in ("x0", "x1", "x2", *FILES):
        save(name, good)
    bad = "b" if method == "wise-ft" else "x1"
    w = good["layer.w"].copy()
    w[499] = value
    save(bad, good | {"layer.w": w})
    args = [*command(method), "--out", "out.safetensors"]
    refused(run(*args), f"layer.w holds NaN or inf in {bad}.safetensors", "--allow-non")
    assert not Path("out.safetensors").exists()
    if method != "fisher":
        checked(run(*args, "--allow-nonfinite"))
        np.testing.assert_allclose(load()["a"], 1, rtol=1e-6)


def test_a_result_beyond_its_type_is_refused(run):
    save("x0", {"w": np.full(3, 6e4, np.float16)})
    save("b", {"w": np.full(3, -6e4, np.float16)})
    args = [
        "merge",
        "task-arithmetic",
        "x0.safetensors",
        "--base",
        "b.safetensors",
        "--scale",
        "2",
    ]
    args += ["--out", "out.safetensors"]
    refused(run(*args), "w leaves the range of float16", "a wider dtype")
    assert sorted(os.listdir()) == ["b.safetensors", "x0.safetensors"]
    checked(run(*args, "--allow-nonfinite"))
    assert np.isinf(load()["w"]).all()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (
            "slerp x0 x1 --t 1.5",
            2,
            "--t 1.5 is not between 0 and 1; pass --extrapolate",
        ),
        ("slerp x0 x1 --t nan --extrapolate", 2, "--t nan is not between"),
        ("wise-ft x0 --base x1 --alpha -0.1", 2, "--alpha -0.1 is not between 0 and 1"),
        ("soup x0 x1 --weights 1.5,-0.5", 2, "not all between 0 and 1"),
        ("soup x0 x1 --weights nan,1", 2, "numbers of sum one"),
        ("variance-corrected x0 x1 --weights 2,-1", 2, "not all between 0 and 1"),
        ("karcher x0 x1 --weights 2,-1", 1, "weights must not be negative"),
        ("task-arithmetic x0 --base x1 --scale inf", 2, "--scale must be finite"),
        ("ties x0 --base x1 --density 0", 1, "density must lie in"),
        ("ties x0 --base x1 --density 1.1 --dare", 1, "density must lie in"),
        (
            "gradient-matching x0 --base x1 --hessian x1 --base-hessian x1 "
            "--damping -1",
            1,
            "damping must lie in",
        ),
        ("fisher x0 x1 --fisher x0 --fisher n", 1, "must be finite and not negative"),
        (
            "gradient-matching x0 --base x1 --base-hessian n --hessian n",
            1,
            "must be finite and not negative; this does not hold at w",
        ),
        ("soup x0 x1 --max-shard-size 1GB", 2, "is for Hugging Face folders"),
        ("soup x0 x1 --max-shard-size 1XB", 2, "a number and a unit such as 5GB"),
    ],
)
def test_what_is_out_of_range_is_refused(args, code, message, run):
    for name, value in (("x0", 1.0), ("x1", 2.0), ("n", -3.0)):
        save(name, {"w": np.full(3, value, np.float32)})
    before = sorted(os.listdir())
    files = [f"{a}.safetensors" if a in ("x0", "x1", "n") else a for a in args.split()]
    result = run("merge", *files, "--out", "out.safetensors")
    refused(result, message, code=code)
    assert sorted(os.listdir()) == before


def test_extrapolation_when_it_is_asked_for(run):
    save("x0", {"w": np.float32([1.0, 0.0])})
    save("x1", {"w": np.float32([0.0, 1.0])})
    for args, wanted in (
        ("slerp x0 x1 --t 1.5", [-np.sqrt(0.5), np.sqrt(0.5)]),
        ("wise-ft x1 --base x0 --alpha 2", [-1, 2]),
        ("soup x0 x1 --weights 1.5,-0.5", [1.5, -0.5]),
    ):
        files = [f"{a}.safetensors" if a in ("x0", "x1") else a for a in args.split()]
        out = ["--out", "out.safetensors", "--force"]
        checked(run("merge", *files, "--extrapolate", *out))
        np.testing.assert_allclose(load()["w"], wanted, rtol=1e-5)


# --- safetensors and Hugging Face ---


def test_metadata_of_the_first_model_is_kept(run):
    save("x0", {"w": np.ones(3, np.float32)}, {"format": "pt", "note": "mine"})
    save("x1", {"w": np.ones(3, np.float32)}, {"format": "np"})
    checked(
        run(
            "merge",
            "soup",
            "x0.safetensors",
            "x1.safetensors",
            "--out",
            "o.safetensors",
        )
    )
    with safetensors.safe_open("o.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt", "note": "mine"}


def test_float8(run):
    """Which the library's own reader does not know in NumPy."""
    x = np.asarray([1.0, 2.0, -4.0]).astype(ml_dtypes.float8_e4m3fn)
    save("x0", {"w": x})
    save("x1", {"w": x * 2})
    args = ["x0.safetensors", "x1.safetensors", "--out", "out.safetensors"]
    checked(run("merge", "soup", *args))
    assert load()["w"].dtype == x.dtype
    np.testing.assert_array_equal(np.float32(load()["w"]), [1.5, 3, -6])


COMPANIONS = {
    "config.json": '{"model_type": "of the first"}',
    "generation_config.json": "{}",
    "tokenizer.json": '{"a": 1}',
    "merges.txt": "a b",
    "chat_template.jinja": "{{ x }}",
}
OTHERS = ["README.md", ".gitattributes", "pytorch_model.bin", "flax_model.msgpack"]


def hugging_face(name, seed, shards):
    """A folder as ``save_pretrained`` writes it, with what else lies in one."""
    rng = np.random.default_rng(seed)
    leaves = {
        f"model.{i}.weight": np.float32(rng.normal(size=(5, 4))) for i in range(6)
    }
    leaves["lm_head.bias"] = rng.normal(size=7).astype(ml_dtypes.bfloat16)
    folder = Path(name)
    (folder / ".git").mkdir(parents=True)
    (folder / "checkpoint-1").mkdir()
    for file, text in COMPANIONS.items():
        (folder / file).write_text(text if seed == 0 else "of another")
    for file in OTHERS:
        (folder / file).write_text("x")
    weight_map = {}
    for t in range(shards):
        shard = f"model-{t + 1:05}-of-{shards:05}" if shards > 1 else "model"
        own = {k: leaves[k] for k in list(leaves)[t::shards]}
        save(f"{name}/{shard}", own, {"format": "pt"})
        weight_map |= dict.fromkeys(own, f"{shard}.safetensors")
    if shards > 1:
        index = {"metadata": {"total_size": 494}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return leaves


@pytest.mark.parametrize("as_index", [False, True])
def test_hugging_face_folders(as_index, run):
    models = [hugging_face(name, seed, 3 - 2 * seed) for seed, name in enumerate("ab")]
    first = "a/model.safetensors.index.json" if as_index else "a"
    args = ["merge", "soup", first, "b", "--max-shard-size", "0.2KB", "--out"]
    checked(run(*args, "out"))
    index = json.loads(Path("out/model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{t:05}-of-00003.safetensors" for t in (1, 2, 3)]
    assert index["metadata"] == {"total_size": 6 * 80 + 7 * 2}
    found = {}
    for shard in shards:
        own = safetensors.numpy.load_file(f"out/{shard}")
        assert sum(x.nbytes for x in own.values()) <= 200
        assert all(index["weight_map"][name] == shard for name in own)
        found |= own
        with safetensors.safe_open(f"out/{shard}", "np") as file:
            assert file.metadata() == {"format": "pt"}
    wanted = merging.uniform(models)
    assert set(found) == set(wanted)
    for name, x in wanted.items():
        np.testing.assert_allclose(np.float32(found[name]), np.float32(x), rtol=1e-6)
    assert sorted(os.listdir("out")) == sorted(
        [*COMPANIONS, *shards, "model.safetensors.index.json"]
    )
    for file, text in COMPANIONS.items():
        assert Path("out", file).read_text() == text
    # It may be replaced, but not once there is something of the user's in it.
    checked(run(*args, "out", "--force"))
    Path("out/notes.txt").write_text("mine")
    refused(run(*args, "out", "--force"), "out holds notes.txt")
    assert Path("out/notes.txt").read_text() == "mine"


def test_one_shard_has_no_index(run):
    for seed, name in enumerate("ab"):
        hugging_face(name, seed, 2)
    checked(run("merge", "soup", "a", "b", "--out", "out"))
    assert sorted(os.listdir("out")) == sorted([*COMPANIONS, "model.safetensors"])
    checked(run("merge", "soup", "a", "b", "--out", "one.safetensors"))
    assert load("one.safetensors").keys() == load("out").keys()
    checked(run("inspect", "out"))


@pytest.mark.parametrize(
    ("size", "wanted"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2**31), ("1.5kb", 1500)],
)
def test_sizes(size, wanted):
    from optax_avg.cli._shards import bytes_of

    assert bytes_of(size) == wanted


def change_index(change):
    path = Path("a/model.safetensors.index.json")
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def second_home():
    own = safetensors.numpy.load_file("a/model-00002-of-00003.safetensors")
    save("a/model-00002-of-00003", own | {"model.0.weight": np.ones(2, np.float32)})


BROKEN = {
    "missing": (
        lambda: Path("a/model-00002-of-00003.safetensors").unlink(),
        "names model-00002-of-00003.safetensors, which is not in its folder",
    ),
    "unlisted": (
        lambda: change_index(lambda m: m.pop("model.0.weight")),
        "model.0.weight in model-00001-of-00003.safetensors is not in the weight_map",
    ),
    "nowhere": (
        lambda: change_index(lambda m: m.update(x="model-00001-of-00003.safetensors")),
        "has x in model-00001-of-00003.safetensors, where it is not",
    ),
    "twice": (second_home, "model.0.weight is in two shards"),
    "outside": (
        lambda: change_index(lambda m: m.update(x="../b/model.safetensors")),
        "a shard must be a file in the folder",
    ),
    "absolute": (
        lambda: change_index(lambda m: m.update(x="/tmp/model.safetensors")),
        "a shard must be a file in the folder",
    ),
    "not safetensors": (
        lambda: change_index(lambda m: m.update(x="pytorch_model.bin")),
        "is not a .safetensors file",
    ),
    "no index": (
        lambda: Path("a/model.safetensors.index.json").write_text("[]"),
        "has no weight_map",
    ),
    "no JSON": (
        lambda: Path("a/model.safetensors.index.json").write_text("{"),
        "error: a/model.safetensors.index.json: ",
    ),
    "both": (
        lambda: save("a/model", {"w": np.ones(2)}),
        "holds both model.safetensors and model.safetensors.index.json",
    ),
    "truncated": (
        lambda: os.truncate("a/model-00002-of-00003.safetensors", 300),
        "model-00002-of-00003.safetensors",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_folders(kind, run):
    change, message = BROKEN[kind]
    for seed, name in enumerate("ab"):
        hugging_face(name, seed, 3)
    change()
    refused(run("merge", "soup", "a", "b", "--out", "out"), message)
    assert sorted(os.listdir()) == ["a", "b"]


@pytest.mark.parametrize(
    "path", ["m.bin", "m.pt", "m.pth", "m.ckpt", "folder", "m.bin.index.json"]
)
def test_pickled_weights_are_refused_with_a_way_out(path, run):
    Path("folder").mkdir()
    Path("folder/pytorch_model.bin").write_text("x")
    if path != "folder":
        Path(path).write_text("x")
    refused(
        run("merge", "soup", path, path, "--out", "out"),
        "safetensors.torch.save_file",
        "safe_serialization=True",
        "folder holds pytorch_model.bin, which PyTorch pickled"
        if path == "folder"
        else f"{path} is a file that PyTorch pickled; this is not read",
    )


@pytest.mark.parametrize("method", ["soup", "karcher", "variance-corrected", "fisher"])
def test_a_single_model_is_noted(method, run):
    """A pattern of names may match one file only."""
    leaves = {"w": np.float32([1.0, 2.0])}
    for name in "ab":
        save(name, leaves)
    fisher = ["--fisher", "a.safetensors"] if method == "fisher" else []
    args = ["merge", method, "a.safetensors", *fisher, "--out", "out.safetensors"]
    code, _, errors = run(*args)
    assert code == 0
    said = "note: a.safetensors is the only model, so the result is a copy of it."
    assert said in errors
    np.testing.assert_allclose(load()["w"], leaves["w"], rtol=1e-6)
    more = fisher * 2
    args = [*args[:2], "b.safetensors", "a.safetensors", *more, *args[-2:], "--force"]
    code, _, errors = run(*args)
    assert code == 0
    assert "note" not in errors


def test_a_part_of_a_folder_is_no_folder(run):
    hugging_face("a", 0, 1)
    args = ["merge", "soup", "a", "a", "--only", "model", "--out"]
    refused(run(*args, "out"), "--out NAME.safetensors", code=2)
    checked(run(*args, "out.safetensors"))
    assert "0.weight" in load()


# --- what a user may type, and names that a checkpoint may have ---


def test_names_with_brackets_are_shown_whole(run):
    long = "model.layers.0.self_attn.q_proj.weight" * 6
    save("odd", {"w[/x]": np.ones(2), "w[kernel]": np.ones(2), long: np.ones(2)})
    out = checked(run("inspect", "odd.safetensors"))
    assert "w[/x]" in out
    assert "w[kernel]" in out
    assert long in "".join(line[1:].split("│")[0].strip() for line in out.splitlines())


def test_seeds_beyond_64_bits_are_refused(run):
    save("x0", {"w": np.ones(2, np.float32)})
    args = "merge ties x0.safetensors --base x0.safetensors --dare --out o.safetensors"
    code, _, errors = run(*args.split(), "--seed", 10**30)
    assert code == 2
    assert "--seed" in errors
    assert "Traceback" not in errors


def test_a_directory_named_like_an_index(run, folder):
    (folder / "x.safetensors.index.json").mkdir()
    refused(
        run("inspect", "x.safetensors.index.json"), "is neither an Orbax checkpoint"
    )


def test_directories_that_were_made_for_a_result_go_with_it(run, folder):
    save("x0", {"w": np.ones(2, np.float32)})
    out = f"q/r/{'x' * 300}/o.safetensors"
    refused(run("merge", "soup", "x0.safetensors", "--out", out), "name too long")
    assert os.listdir(folder) == ["x0.safetensors"]


def test_dare_of_narrow_models_keeps_what_one_model_has(run):
    """What the other one drops is exactly the base, and is not counted in the mean."""
    base = np.random.default_rng(0).normal(size=2000).astype(np.float32)
    save("base", {"w": base})
    for i in range(2):
        save(f"x{i}", {"w": jnp.asarray(base + 0.5).astype(jnp.bfloat16)})
    args = "x0.safetensors x1.safetensors --base base.safetensors --density 0.5 --dare"
    checked(run("merge", "ties", *args.split(), "--out", "out.safetensors"))
    found = load()["w"]
    assert found.dtype == jnp.bfloat16
    moved = np.float32(found) - base
    halves = (np.abs(moved - 0.5) < 0.2).sum()
    assert halves == 0
    assert 1400 < (np.abs(moved - 1) < 0.2).sum() < 1600
