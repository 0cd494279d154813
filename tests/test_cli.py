"""The command: results equal to the library's, streams, interruptions, bad input."""

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

import optax_avg as oa
from optax_avg import merging
from optax_avg._checkpoints import opening, sources
from optax_avg.cli import _leafwise
from optax_avg.merging import soups

ROOT = Path(__file__).resolve().parent.parent
TYPES = {
    "layer.w": np.float32,
    "layer.b": np.float64,
    "emb": ml_dtypes.bfloat16,
    "half": np.float16,
}


def model(seed):
    """Leaves of several dtypes, scalars, integers of 64 bits."""
    rng = np.random.default_rng(seed)
    shapes = {"layer.w": (30, 20), "layer.b": (20,), "emb": (7, 5), "half": ()}
    flat = {n: rng.normal(size=s).astype(TYPES[n]) for n, s in shapes.items()}
    return flat | {"n": np.arange(3) + 2**40}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """``a``, ``b``, ``c`` and ``base`` in the working directory."""
    monkeypatch.chdir(tmp_path)
    models = {name: model(seed) for seed, name in enumerate(("a", "b", "c", "base"))}
    for name, flat in models.items():
        safetensors.numpy.save_file(flat, f"{name}.safetensors")
        safetensors.numpy.save_file(square(flat), f"{name}2.safetensors")
    return models


def square(tree):
    return jax.tree.map(lambda x: np.asarray(x**2, x.dtype), tree)


def checked(result):
    code, out, errors = result
    assert code == 0, errors
    return out


def names(*stems):
    return [f"{stem}.safetensors" for stem in stems]


MERGES = {
    "soup": ([], lambda xs, x0: merging.uniform(xs)),
    "soup weighted": (
        ["--weights", "0.5,0.2,0.3"],
        lambda xs, x0: merging.weighted(xs, [0.5, 0.2, 0.3]),
    ),
    "model-stock": (["--base"], merging.model_stock),
    "task-arithmetic": (
        ["--scale", "0.3", "--base"],
        lambda xs, x0: merging.task_arithmetic(xs, x0, 0.3),
    ),
    "ties": (["--density", "0.5", "--base"], lambda xs, x0: merging.ties(xs, x0, 0.5)),
    "ties dare": (
        ["--dare", "--seed", "3", "--density", "0.5", "--base"],
        lambda xs, x0: merging.ties(merging.dare(xs, x0, 0.5, 3), x0, 1.0),
    ),
    "karcher": ([], lambda xs, x0: merging.karcher(xs)),
    "variance-corrected": ([], lambda xs, x0: merging.variance_corrected(xs)),
    "fisher": (
        [x for name in "cab" for x in ("--fisher", f"{name}2.safetensors")],
        lambda xs, x0: merging.fisher(xs, [square(xs[t]) for t in (2, 0, 1)]),
    ),
    "gradient-matching": (
        [x for name in "abc" for x in ("--hessian", f"{name}.safetensors")]
        + ["--base-hessian", "base.safetensors", "--damping", "30", "--base"],
        lambda xs, x0: merging.gradient_matching(xs, xs, x0, x0, damping=30.0),
    ),
}


def nested(flat):
    """As the command names leaves: by the parts between dots."""
    tree = {"layer": {"w": flat["layer.w"], "b": flat["layer.b"]}}
    return tree | {n: x for n, x in flat.items() if "." not in n}


@pytest.mark.parametrize("name", MERGES)
def test_merges_equal_those_in_memory(name, files, run):
    options, rule = MERGES[name]
    options = [*options, "base.safetensors"] if "--base" in options[-1:] else options
    args = ["merge", name.split()[0], *names("a", "b", "c"), *options]
    checked(run(*args, "--out", "out.safetensors"))
    found = safetensors.numpy.load_file("out.safetensors")
    trees = [nested(files[n]) for n in "abc"], nested(files["base"])
    plain = rule(*trees)
    with jax.enable_x64(True):
        double = rule(*trees)
    for leaf, x in files["a"].items():
        wanted = double if x.dtype in (np.float64, np.int64) else plain
        part = wanted["layer"][leaf[6:]] if "." in leaf else wanted[leaf]
        assert found[leaf].dtype == x.dtype
        assert found[leaf].shape == x.shape
        eps = float(jnp.finfo(x.dtype).eps) if leaf in TYPES else 0
        # A sum of another order may round another way, at the size of the largest.
        np.testing.assert_allclose(
            np.float64(found[leaf]),
            np.float64(part),
            rtol=max(2 * eps, 1e-6),
            atol=eps * max(1.0, np.abs(np.float64(x)).max(initial=0)),
        )


@pytest.mark.parametrize("name", ["wise-ft", "slerp"])
def test_merges_of_two(name, files, run):
    args = {
        "wise-ft": ["a.safetensors", "--base", "b.safetensors", "--alpha", "0.25"],
        "slerp": [*names("b", "a"), "--t", "0.25"],
    }[name]
    checked(run("merge", name, *args, "--out", "out.safetensors"))
    found = safetensors.numpy.load_file("out.safetensors")["layer.w"]
    rule = {"wise-ft": merging.wise_ft, "slerp": merging.slerp}[name]
    wanted = rule(files["b"]["layer.w"], files["a"]["layer.w"], 0.25)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def save_orbax(path, flat, only=None):
    tree = {
        k: jnp.asarray(x) for k, x in flat.items() if x.size and x.dtype != np.int64
    }
    tree = nested(tree)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(path).absolute(), tree if only is None else {only: tree})
    return tree


@pytest.mark.parametrize("batch", [1, 2**25])
def test_orbax_in_and_out(batch, files, run, monkeypatch):
    monkeypatch.setattr(sources, "BATCH", batch)
    trees = [save_orbax(f"{name}_dir", files[name], "params") for name in "ab"]
    out = ["--out", "merged", "--only", "params"]
    checked(run("merge", "soup", "a_dir", "b_dir", *out))
    like = jax.tree.map(jnp.zeros_like, trees[0])
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(Path("merged").absolute(), like)
    chex.assert_trees_all_close(found, merging.uniform(trees), rtol=1e-2, atol=1e-6)
    np.testing.assert_allclose(
        found["layer"]["w"], merging.uniform(trees)["layer"]["w"], rtol=1e-6
    )
    assert "params" not in checked(run("inspect", "merged"))
    assert "layer.w" in checked(run("inspect", "a_dir", "--only", "params"))


def store_of_averages(directory):
    tx = optax.chain(optax.sgd(0.1), oa.power_ema([0.05, 0.10]), oa.ema_params(0.9))
    params = {"w": jnp.ones((20, 30)), "b": jnp.zeros(4)}
    state = tx.init(params)
    with oa.posthoc.SnapshotStore(
        directory, weights={"ema": oa.weights.ema(0.9)}
    ) as store:
        for step in range(1, 33):
            grads = jax.tree.map(lambda x, i=step: jnp.sin(x + i), params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            if step % 4 == 0:
                store.save(state, step)
    return params


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    directory = tmp_path_factory.mktemp("once")
    return directory, store_of_averages(directory)


@pytest.fixture
def params(once, tmp_path):
    """Of a store that is copied to ``tmp_path / "store"``."""
    shutil.copytree(once[0], tmp_path / "store")
    return once[1]


def test_reconstruct(tmp_path, params, run):
    out = tmp_path / "out.safetensors"
    widths = ["--sigma-rel", "0.08", "--step", "28", "--name", "power_ema_0.1"]
    widths += ["--name", "power_ema_0.05", "--out", out]
    checked(run("reconstruct", tmp_path / "store", *widths))
    store = oa.posthoc.SnapshotStore(tmp_path / "store")
    kept = ["power_ema_0.05", "power_ema_0.1"]
    wanted = store.reconstruct(params, sigma_rel=0.08, step=28, names=kept)
    found = safetensors.numpy.load_file(out)
    chex.assert_trees_all_close(found, wanted, rtol=1e-6)
    half = ["--half-life", "6.5", "--dtype", "bfloat16", "--out", tmp_path / "half"]
    checked(run("reconstruct", tmp_path / "store", *half))
    assert "bfloat16" in checked(run("inspect", tmp_path / "half"))


@pytest.mark.usefixtures("params")
def test_reconstruct_in_wider_types(tmp_path, run):
    args = ["reconstruct", tmp_path / "store", "--window", "8"]
    out = tmp_path / "out.safetensors"
    checked(run(*args, "--dtype", "float64", "--out", out))
    found = safetensors.numpy.load_file(out)
    assert {x.dtype for x in found.values()} == {np.dtype("float64")}
    code, _, errors = run(*args, "--dtype", "longdouble", "--out", tmp_path / "no")
    assert code == 2
    assert "longdouble is not a floating point type; pass float32" in errors
    code, _, errors = run(*args, "--dtype", "bf16", "--out", tmp_path / "no")
    assert code == 2
    assert "bf16 is not a dtype; pass float32, bfloat16 or float16" in errors


@pytest.mark.usefixtures("params")
def test_a_window_longer_than_the_training(tmp_path, run):
    args = [
        "reconstruct",
        tmp_path / "store",
        "--window",
        "20000",
        "--name",
        "power_ema_0.05",
        "--step",
        "8",
    ]
    code, _, errors = run(*args, "--out", tmp_path / "x")
    assert code == 0
    assert "longer than the training, which has 8 optimizer steps here" in errors


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("suffix", ["npz", "pt", "MSGPACK"])
def test_suffixes_of_other_kinds_of_files_are_refused(suffix, run):
    code, _, errors = run("merge", "soup", *names("a", "b"), "--out", f"x.{suffix}")
    assert code == 1
    assert f"x.{suffix} would be a directory" in errors
    assert "NAME.safetensors" in errors


def test_the_command_without_its_extra_prints_one_line():
    made = "import sys; sys.modules['typer'] = None; sys.argv = ['{}']; "
    for name, lines in (("/bin/optax-avg", 1), ("other", 2)):
        code = made.format(name) + "import optax_avg.cli"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert 'pip install "optax_avg[cli]"' in done.stderr
        assert (len(done.stderr.splitlines()) == 1) == (lines == 1)


@pytest.mark.usefixtures("params")
def test_a_dry_run_of_reconstruct(tmp_path, run):
    before = sorted(tmp_path.rglob("*"))
    store, args = tmp_path / "store", ["--window", "8", "--dry-run", "--out"]
    lines = checked(run("reconstruct", store, *args, tmp_path / "x")).splitlines()
    # Three averages of 604 numbers at eight steps.
    assert lines[0] == f"read     {store}: {24 * 604 * 4:,} bytes"
    said = "--window 8 at step 32 of 8 snapshots: 2 leaves, 2 of float32"
    assert lines[1] == f"compute  {said}"
    assert f"{tmp_path}/x, an Orbax checkpoint: {604 * 4:,} bytes" in lines[2]
    code, _, errors = run("reconstruct", store, *args, store / "x")
    assert code == 1
    assert f"{store}/x lies in {store}, an input" in errors
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("params")
def test_reconstruct_names_what_is_broken_and_out_of_reach(tmp_path, run):
    for path in (tmp_path / "store" / "16" / "averages").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    for target, said in (
        (["--sigma-rel", "0.08"], "snapshot of step 16 is skipped"),
        (["--sigma-rel", "0.01"], "miss the weights"),
    ):
        out = ["--out", tmp_path / f"{target[1]}.safetensors"]
        code, _, errors = run("reconstruct", tmp_path / "store", *target, *out)
        assert code == 0
        assert f"warning: the snapshot{'s' if 'miss' in said else ''} " in errors
        assert said in errors
        assert out[1].exists()


@pytest.mark.usefixtures("params")
def test_inspect_a_store(tmp_path, run):
    out = checked(run("inspect", tmp_path / "store"))
    assert "8 snapshots, steps 4 to 32" in out
    rows = {line.split()[1]: line.split() for line in out.splitlines() if "│ " in line}
    # Mean ages T/(gamma + 2), and of the EMA by its weights.
    gamma = oa.weights.gamma_from_sigma_rel(0.1)
    assert abs(float(rows["power_ema_0.1"][7]) - 32 / (gamma + 2)) < 0.6
    assert abs(float(rows["power_ema_0.1"][5]) - 0.1) < 0.005
    age = oa.weights.profile(oa.weights.ema(0.9), 32).mean_age
    assert abs(float(rows["ema"][7]) - age) < 1e-2
    assert "604 numbers" not in out  # three averages of 604
    assert "1,812 numbers" in out


def test_inspect_an_optimizer_state(tmp_path, run):
    params = {"w": jnp.ones((20, 30))}
    tx = optax.chain(
        optax.adam(0.1),
        oa.power_ema([0.05, 0.10]),
        oa.window_average(5),
        oa.ema_params(0.9),
    )
    state = tx.init(params)
    for _ in range(7):
        _, state = tx.update(params, state, params)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        tree = {"params": params, "opt_state": state}
        writer.save(tmp_path / "state", args=ocp.args.PyTreeSave(tree))
    out = checked(run("inspect", tmp_path / "state"))
    rows = {line.split()[1]: line.split() for line in out.splitlines() if "│ " in line}
    wanted = oa.weights.profile(oa.weights.power_function(sigma_rel=0.1), 7)
    row = rows["power_ema_0.1"]
    assert row[3] == "7"
    assert float(row[5]) == pytest.approx(wanted.relative_width, rel=1e-2)
    assert float(row[7]) == pytest.approx(wanted.mean_age, rel=1e-2)
    assert rows["window"][3] == "7"
    assert rows["window"][7] == "2"  # ages 0 to 4
    assert rows["ema"][3:] == ["7", *"││││"]  # its weights are not in the state
    assert "opt_state.1.averages.power_ema_0.05.average.w" in rows


# --- nothing is lost, nothing is half written ---


def test_nothing_is_replaced_without_force(files, run):
    mine = {"mine": np.ones(3)}
    safetensors.numpy.save_file(mine, "out.safetensors")
    soup = ["merge", "soup", *names("a", "b"), "--out", "out.safetensors"]
    code, _, errors = run(*soup)
    assert code == 1
    assert "error: out.safetensors exists; pass --force" in errors
    assert list(safetensors.numpy.load_file("out.safetensors")) == ["mine"]
    checked(run(*soup, "--force"))
    assert len(safetensors.numpy.load_file("out.safetensors")) == 5


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_what_fails_on_the_way_leaves_nothing(out, files, run, monkeypatch):
    def broken(trees):
        raise RuntimeError("no such luck")

    before = sorted(os.listdir())
    monkeypatch.setattr(soups, "weighted_sum", lambda w, xs: broken(xs))
    code, _, errors = run("merge", "soup", *names("a", "b"), "--out", out)
    assert code == 1
    assert "no such luck" in errors
    assert sorted(os.listdir()) == before
    shutil.copy("c.safetensors", "out.safetensors")
    code, *_ = run("merge", "soup", *names("a", "b"), "--out", out, "--force")
    assert code == 1
    assert Path("out.safetensors").read_bytes() == Path("c.safetensors").read_bytes()


SLOW = """
import sys, time
from optax_avg import cli
from optax_avg.cli import _merge, _output, _writing
write = _writing.write_checkpoint

def slowly(target, leaves, load):
    def one(i):
        print("writing", flush=True)
        time.sleep(0.2)
        return load(i)
    write(target, leaves, one)

_output.write_checkpoint = slowly
cli.main()
"""


@pytest.mark.parametrize(
    ("number", "out"),
    [
        (signal.SIGINT, "out.safetensors"),
        (signal.SIGTERM, "out"),
        (signal.SIGKILL, "out"),
        (signal.SIGKILL, "out.safetensors"),
    ],
)
def test_interrupted(number, out, files, tmp_path):
    before = sorted(os.listdir())
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "merge", "soup", *names("a", "b"), "--out", out],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    time.sleep(0.3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (
        process.returncode
        == {
            signal.SIGINT: 130,
            signal.SIGTERM: 143,
            signal.SIGKILL: -9,
        }[number]
    ), errors
    left = [name for name in sorted(os.listdir()) if name not in before]
    if number == signal.SIGKILL:  # what cannot clean up leaves no result by its name
        assert all(n.startswith(".out") and n.endswith(".partial") for n in left)
    else:
        assert left == []
        assert "Traceback" not in errors


def test_a_few_leaves_at_a_time(files, run, monkeypatch):
    """No more than two batches of arrays are alive while sixteen are merged."""
    for name in "xy":
        leaves = {f"l{i:02}": np.ones(1000, np.float32) for i in range(16)}
        safetensors.numpy.save_file(leaves, f"{name}.safetensors")
    monkeypatch.setattr(sources, "BATCH", 4000)
    sizes = []
    read = opening.open_checkpoint

    def counted(path, only):
        source = read(path, only)

        def seen(indices):
            sizes.append(sum(source.leaves[i].nbytes for i in indices))
            return source.read(indices)

        return source._replace(read=seen)

    monkeypatch.setattr(_leafwise, "open_checkpoint", counted)
    for out in ("out.safetensors", "out"):
        sizes.clear()
        checked(run("merge", "soup", "x.safetensors", "y.safetensors", "--out", out))
        assert max(sizes) == 4000
        assert sum(sizes) == 2 * 16 * 4000  # each leaf is read once


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ("merge soup a.safetensors nope.safetensors", 1, "no checkpoint at nope"),
        ("merge soup a.safetensors empty", 1, "neither an Orbax checkpoint nor"),
        ("merge soup a.safetensors text.safetensors", 1, "text.safetensors cannot be"),
        (
            "merge soup a.safetensors odd.safetensors",
            1,
            "odd.safetensors has shape (2,) at layer.w, where a",
        ),
        ("merge soup a.safetensors less.safetensors", 1, "has no leaf emb, which a"),
        ("merge soup less.safetensors a.safetensors", 1, "has a leaf emb, which less"),
        ("merge soup a.safetensors --only x", 1, "has no subtree 'x'; at its top are"),
        ("merge soup a.safetensors --weights 1,2", 2, "must be 1 numbers of sum one"),
        ("merge soup a.safetensors --weights x", 2, "are not numbers"),
        ("merge soup", 2, "Missing argument"),
        ("merge model-stock a.safetensors", 2, "Missing option '--base'"),
        (
            "merge model-stock a.safetensors --base b.safetensors",
            1,
            "at least two models",
        ),
        ("merge fisher a.safetensors", 2, "Missing option '--fisher'"),
        (
            "merge fisher a.safetensors --fisher b.safetensors --fisher c.safetensors",
            2,
            "as many --fisher",
        ),
        (
            "reconstruct nope --sigma-rel 0.1",
            1,
            "nope does not exist; reconstruct takes the directory to which a Snapshot",
        ),
        ("reconstruct empty --sigma-rel 0.1", 1, "empty holds no snapshots; reconstr"),
        (
            "reconstruct a.safetensors --sigma-rel 0.1",
            1,
            "is: optax-avg merge soup a.safetensors OTHER --out RESULT",
        ),
        (
            "reconstruct empty",
            2,
            "pass one of --sigma-rel, --half-life, --window and --cooldown",
        ),
        ("reconstruct empty --window 2 --half-life 3", 2, "got 2"),
        ("reconstruct empty --sigma-rel 0.5", 1, "sigma_rel must lie in"),
        ("reconstruct empty --sigma-rel 0.1 --dtype int8", 2, "not a floating point"),
        ("reconstruct empty --sigma-rel 0.1 --dtype x", 2, "not a dtype"),
        ("inspect nope", 1, "no checkpoint at"),
    ],
)
def test_bad_input(args, code, message, files, run):
    Path("empty").mkdir()
    Path("text.safetensors").write_text("no tensors here")
    less = {k: v for k, v in files["a"].items() if k != "emb"}
    safetensors.numpy.save_file(less, "less.safetensors")
    odd = files["a"] | {"layer.w": np.ones(2, np.float32)}
    safetensors.numpy.save_file(odd, "odd.safetensors")
    out = [] if args.startswith("inspect") else ["--out", "out"]
    found, _, errors = run(*args.split(), *out)
    assert found == code, errors
    assert message in errors
    assert "Traceback" not in errors
    assert not Path("out").exists()


def test_an_array_within_an_array(files, run):
    odd = {"a": np.ones(2, np.float32), "a.b": np.ones(3, np.float32)}
    for name in "xy":
        safetensors.numpy.save_file(odd, f"{name}.safetensors")
    code, _, errors = run("merge", "soup", *names("x", "y"), "--out", "out")
    assert code == 1
    assert "error: a.b lies in a, an array" in errors


def test_several_items_are_named(files, run):
    for item in ("state", "ema"):
        save_orbax(f"run/{item}", files["a"])
    code, _, errors = run("inspect", "run")
    assert code == 1
    assert "['ema', 'state']" in errors
    assert "layer.w" in checked(run("inspect", "run/ema"))


def test_leaves_without_elements(files, run):
    leaves = {"e": np.zeros((0, 4), np.float32), "x": np.ones(2, np.float32)}
    safetensors.numpy.save_file(leaves, "x.safetensors")
    soup = ["merge", "soup", "x.safetensors", "x.safetensors", "--out"]
    checked(run(*soup, "out.safetensors"))
    assert safetensors.numpy.load_file("out.safetensors")["e"].shape == (0, 4)
    code, _, errors = run(*soup, "out")
    assert code == 1
    assert "without elements, as e is" in errors
    assert not Path("out").exists()


def test_help(run):
    assert "merge" in checked(run("--help"))
    for args in (["reconstruct"], ["inspect"], ["merge"], ["merge", "ties"]):
        assert "--help" in checked(run(*args, "--help"))


def test_warnings_go_back_to_what_they_were(files, run):
    shown = warnings.showwarning
    checked(run("inspect", "a.safetensors"))
    assert warnings.showwarning is shown
