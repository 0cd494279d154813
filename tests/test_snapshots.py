"""Snapshots on disk: what comes back, in which form, and after which accidents."""

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import chex
import flax.nnx as nnx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_avg as oa
from optax_avg import _numerics
from optax_avg.posthoc import SnapshotStore, _disk, _integrity, _writer, streaming

WIDTHS = [0.05, 0.10]
KEPT = ["power_ema_0.05", "power_ema_0.1"]


def walk(steps, tx, params, seed=0, each=None):
    """A random walk of the parameters under averages; ``each(step, state, params)``."""

    @jax.jit
    def advance(state, params, key):
        keys = jax.random.split(key, len(jax.tree.leaves(params)))
        grads = jax.tree.unflatten(
            jax.tree.structure(params),
            [
                jax.random.normal(k, x.shape).astype(x.dtype)
                for k, x in zip(keys, jax.tree.leaves(params), strict=True)
            ],
        )
        updates, state = tx.update(grads, state, params)
        return state, optax.apply_updates(params, updates)

    state, trace = tx.init(params), []
    for step in range(1, steps + 1):
        state, params = advance(state, params, jax.random.key(seed * 1000 + step))
        trace.append(params)
        if each is not None:
            each(step, state, params)
    return state, params, trace


def small():
    return {
        "dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)},
        "s": jnp.ones([]),
    }


def filled(directory, steps=32, every=4, tx=None, params=None, **options):
    """A store with snapshots of a walk, the last state, parameters and the trace."""
    tx = tx or optax.chain(optax.sgd(0.1), oa.power_ema(WIDTHS))
    store = SnapshotStore(directory, **options)

    def each(step, state, params):
        if step % every == 0:
            assert store.save(state, step, params)

    params = small() if params is None else params
    state, params, trace = walk(steps, tx, params, each=each)
    store.wait()
    return store, state, params, trace


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """The store of the defaults, which every test gets a copy of."""
    directory = tmp_path_factory.mktemp("once")
    store, *rest = filled(directory)
    store.close()
    return directory, rest


@pytest.fixture
def ready(once, tmp_path):
    directory, rest = once
    copy = tmp_path / "store"
    shutil.copytree(directory, copy)
    return SnapshotStore(copy), *rest


@pytest.fixture
def open_stores():
    with contextlib.ExitStack() as stack:
        yield stack.enter_context


def test_a_kept_average_comes_back(ready, open_stores):
    store, state, params, _ = ready
    open_stores(store)
    assert store.steps() == [4, 8, 12, 16, 20, 24, 28, 32]
    for width, name in zip(WIDTHS, KEPT, strict=True):
        wanted = oa.averaged_params(state, params, name)
        found = store.reconstruct(params, sigma_rel=width)
        chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)
        nested = store.reconstruct(sigma_rel=width)
        chex.assert_trees_all_close(nested, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("target", "weight"),
    [
        ({"sigma_rel": 0.15}, oa.weights.power_function(sigma_rel=0.15)),
        ({"sigma_rel": 0.07}, oa.weights.power_function(sigma_rel=0.07)),
        ({"half_life": 6.0}, oa.weights.ema(0.5 ** (1 / 6))),
        ({"weight": oa.weights.polynomial(3)}, oa.weights.polynomial(3)),
        ({"window": 12}, None),
    ],
)
def test_the_error_is_within_the_residual(target, weight, ready, open_stores):
    """By Cauchy and Schwarz: ``|p - sum x_i p_i| |x_k|`` for each coordinate ``k``."""
    store, _, params, trace = ready
    open_stores(store)
    if weight is None:
        p = np.repeat([0, 1 / 12], [20, 12])
    else:
        p = oa.weights.profile(weight, 32).weights
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the residual
        found = store.reconstruct(params, **target)
    plan = store.plan(**target)
    assert plan.residual < 0.5
    for leaf, *iterates in zip(
        jax.tree.leaves(found), *map(jax.tree.leaves, trace), strict=True
    ):
        x = np.stack(iterates).astype(np.float64)
        true = np.tensordot(p, x, axes=1)
        bound = plan.residual * np.linalg.norm(p) * np.linalg.norm(x, axis=0)
        assert (np.abs(np.asarray(leaf) - true) <= bound + 1e-4).all()


def test_more_snapshots_come_closer(tmp_path, open_stores):
    tx = optax.chain(
        optax.sgd(0.1), oa.power_ema(WIDTHS), oa.power_ema(0.2, name="true")
    )
    weight = {"true": oa.weights.power_function(sigma_rel=0.2)}
    errors = []
    for every in (16, 8, 4):
        store, state, params, _ = filled(
            tmp_path / str(every), 64, every, tx, weights=weight
        )
        open_stores(store)
        wanted = oa.averaged_params(state, params, "true")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the residual
            found = store.reconstruct(params, sigma_rel=0.2, names=KEPT)
        difference = jax.tree.map(jnp.subtract, found, wanted)
        errors.append(float(_numerics.norm(difference)))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


def test_recorded_averages_of_any_kind(tmp_path, open_stores):
    """An EMA, one that counts its start, and windows, each exactly by its weights."""
    averages = {"fast": oa.weights.ema(0.8), "start": oa.weights.ema(0.9, debias=False)}
    tx = optax.chain(
        optax.sgd(0.1), oa.average(averages), oa.window_average(5, name="lawa")
    )
    store, state, params, _ = filled(tmp_path, 24, 3, tx, weights=averages)
    open_stores(store)
    for name, target in (
        ("fast", {"half_life": oa.weights.half_life_from_decay(0.8)}),
        ("start", {"weight": averages["start"]}),
        ("lawa", {"window": 5}),
    ):
        found = store.reconstruct(params, **target)
        wanted = oa.averaged_params(state, params, name)
        chex.assert_trees_all_close(found, wanted, rtol=1e-4, atol=1e-5)
    # Windows of five every three steps make windows of eight: 5 + 5 - the overlap.
    eight = store.plan(window=8, names=["lawa"])
    assert 0 < eight.residual < 0.5


def test_stacked_states(tmp_path, open_stores):
    """An ensemble of three, with windows of two: each member has its own mean."""
    tx = oa.window_average(2)
    params = {"w": jnp.arange(9.0).reshape(3, 3)}
    state = jax.vmap(tx.init)(params)
    for _ in range(3):
        ones = jax.tree.map(jnp.ones_like, params)
        state = jax.vmap(tx.update)(ones, state, params)[1]
        params = optax.apply_updates(params, ones)
    store = open_stores(SnapshotStore(tmp_path))
    store.save(state, 3)
    found = store.reconstruct(params, window=2)
    wanted = {"w": jnp.arange(9.0).reshape(3, 3) + 2.5}
    chex.assert_trees_all_close(found, wanted)
    one = jax.tree.map(lambda x: x[0], state)
    first = jax.tree.map(lambda x: x[0], params)
    late = jax.tree.map(lambda *x: jnp.stack(x), one, tx.init(first))
    with pytest.raises(ValueError, match=r"have \[0, 3\] iterates; give each member"):
        store.save(late, 4)


def test_an_earlier_step(tmp_path, open_stores):
    states = {}
    store = open_stores(SnapshotStore(tmp_path))
    tx = optax.chain(optax.sgd(0.1), oa.power_ema(WIDTHS))

    def each(step, state, params):
        if step % 4 == 0:
            store.save(state, step)
            states[step] = oa.averaged_params(state, params, KEPT[1]), params

    walk(24, tx, small(), each=each)
    wanted, params = states[12]
    found = store.reconstruct(params, sigma_rel=0.1, step=12)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert max(part.step for part in store.plan(sigma_rel=0.1, step=12).parts) == 12


def test_means_of_parameters(ready, open_stores):
    store, _, params, trace = ready
    open_stores(store)
    losses = [9, 8, 3, 1, 1.1, 1.2, 8, 8]
    steps = [store.steps()[i] for i in oa.posthoc.swad_window(losses, n_tolerance=2)]
    assert steps == [16, 20, 24]
    wanted = jax.tree.map(lambda *x: sum(x) / 3, *(trace[s - 1] for s in steps))
    found = store.mean(params, steps=steps)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)
    everything = jax.tree.map(lambda *x: sum(x) / 8, *trace[3::4])
    chex.assert_trees_all_close(store.mean(), everything, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"no snapshot of 'parameters' at steps \[5\]"):
        store.mean(params, steps=[4, 5])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_on_disk(dtype, ready, tmp_path, open_stores):
    store, _, params, _ = filled(tmp_path / "half", dtype=dtype)
    full, *_ = ready
    open_stores(store)
    open_stores(full)
    found = store.reconstruct(params, sigma_rel=0.08)
    wanted = full.reconstruct(params, sigma_rel=0.08)
    size = sum(abs(part.weight) for part in store.plan(sigma_rel=0.08).parts)
    eps = float(jnp.finfo(dtype).eps)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == jnp.float32
        assert float(jnp.max(jnp.abs(a - b))) <= size * eps * 4
    assert not jax.tree.all(jax.tree.map(jnp.array_equal, found, wanted))
    # What was rounded is the snapshots alone: their sum is one of float32.
    import orbax.checkpoint as ocp

    like = {
        name: jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), params)
        for name in [*KEPT, "parameters"]
    }
    total = jax.tree.map(lambda x: np.zeros(x.shape), params)
    for part in store.plan(sigma_rel=0.08).parts:
        path = tmp_path / "half" / str(part.step) / "averages"
        with ocp.StandardCheckpointer() as reader:
            kept = reader.restore(path, like)[part.name]
        total = jax.tree.map(
            lambda a, x, w=part.weight: a + w * np.float64(x), total, kept
        )
    chex.assert_trees_all_close(found, total, rtol=1e-5, atol=size * 1e-6)


def test_what_overflows_on_disk_is_not_kept(tmp_path, open_stores):
    store = open_stores(SnapshotStore(tmp_path, dtype=jnp.float16))
    with pytest.warns(RuntimeWarning, match=r"no snapshot of step 1.*w.*float16"):
        assert not store.save(None, 1, {"a": jnp.ones(2), "w": jnp.full(2, 1e6)})
    assert store.save(None, 2, {"a": jnp.ones(2), "w": jnp.ones(2)})
    assert store.steps() == [2]


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(jnp.float16, 1e-7), (jnp.float16, 1e-30), (jnp.float8_e4m3fn, 1e-2)],
)
def test_what_underflows_on_disk_is_claimed(dtype, scale, tmp_path, open_stores):
    params = {"a": jnp.full(50, scale), "b": jnp.zeros(3)}
    updates = {"a": scale * jnp.sin(jnp.arange(50.0)), "b": jnp.zeros(3)}
    tx = oa.power_ema(WIDTHS)
    state = tx.init(params)
    store = open_stores(SnapshotStore(tmp_path / "narrow", dtype=dtype))
    full = open_stores(SnapshotStore(tmp_path / "full"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(1, 4):
            state = tx.update(updates, state, params)[1]
            params = optax.apply_updates(params, updates)
            assert store.save(state, step)
            assert full.save(state, step)
        plan = store.plan(sigma_rel=0.08)
        found = store.reconstruct(sigma_rel=0.08)["a"]
    wanted = full.reconstruct(sigma_rel=0.08)["a"]
    unit = float(jnp.max(wanted))
    error, size = (
        jnp.linalg.norm((found - wanted) / unit),
        jnp.linalg.norm(wanted / unit),
    )
    assert float(error / size) <= 2 * plan.rounding
    assert plan.rounding <= 1 + float(jnp.finfo(dtype).eps)


def test_a_leaf_that_is_too_small_for_the_disk_is_named(tmp_path, open_stores):
    store = open_stores(SnapshotStore(tmp_path, dtype=jnp.float16))
    params = {"a": jnp.ones(2), "b": jnp.full(3, 1e-9), "z": jnp.zeros(2)}
    with pytest.warns(
        RuntimeWarning, match="parameters/b .* for float16, .* 100% of it"
    ):
        assert store.save(None, 1, params)
    assert store.save(None, 2, params)  # it is said once


def test_small_averages_are_said_to_be_out_of_reach(tmp_path, open_stores):
    store = open_stores(SnapshotStore(tmp_path, dtype=jnp.float16))
    params = {"w": jnp.full(4, 1e-7)}
    tx = oa.power_ema(WIDTHS)
    state = tx.update(params, tx.init(params), params)[1]
    with pytest.warns(RuntimeWarning, match="keep averages and snapshots in bfloat16"):
        store.save(state, 1)
    with pytest.warns(UserWarning, match="too coarse for these numbers; keep averages"):
        store.reconstruct(sigma_rel=0.08)


def test_averages_that_are_not_finite_are_not_kept(tmp_path, open_stores):
    tx = oa.power_ema([0.1], nonfinite="keep")
    params = {"b": jnp.ones(2), "w": jnp.array([1.0, jnp.nan])}
    state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)[1]
    store = open_stores(SnapshotStore(tmp_path))
    with pytest.warns(RuntimeWarning, match="power_ema_0.1/w is not finite"):
        assert not store.save(state, 1)
    with pytest.raises(ValueError, match=r"nothing could be saved: .*/w is not fin"):
        store.reconstruct(sigma_rel=0.1)


def test_nothing_before_the_averages_begin(tmp_path, open_stores):
    tx = oa.power_ema(WIDTHS, start=5)
    store = open_stores(SnapshotStore(tmp_path))
    assert store.steps() == []
    assert not store.save(tx.init(small()), 0)
    assert store.steps() == []


class Pair(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.rest = nnx.List([nnx.Linear(4, 2, rngs=rngs)])


def test_flax_nnx(tmp_path, open_stores):
    model = Pair(nnx.Rngs(0))
    tx = optax.chain(optax.sgd(0.1), oa.power_ema(WIDTHS))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    store = open_stores(SnapshotStore(tmp_path))
    for step in (1, 2, 3):
        optimizer.update(
            model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
        )
        store.save(optimizer, step)
    params = nnx.state(model, nnx.Param)
    found = store.reconstruct(params, sigma_rel=0.1)
    wanted = oa.averaged_params(optimizer, params, KEPT[1])
    assert jax.tree.structure(found) == jax.tree.structure(params)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)


TREES = {
    "one array": lambda: jnp.ones(3),
    "keys with marks": lambda: {"a/b.c": jnp.ones(2), "~": {"0": jnp.ones(1)}},
    "sequences": lambda: [(jnp.ones(2), jnp.zeros(2)), jnp.ones(3)],
    "bf16": lambda: {"w": jnp.ones((3, 2), jnp.bfloat16)},
    "complex": lambda: {"w": jnp.ones(3, jnp.complex64) * (1 + 2j)},
    "no elements": lambda: {"w": jnp.ones(3), "e": jnp.ones((0, 4))},
    "scalars": lambda: {"w": jnp.ones([]), "v": jnp.zeros([])},
}


@pytest.mark.parametrize("name", TREES)
def test_trees(name, tmp_path, open_stores):
    store, state, params, _ = filled(tmp_path, 8, 2, params=TREES[name]())
    open_stores(store)
    found = store.reconstruct(params, sigma_rel=0.1)
    wanted = oa.averaged_params(state, params, KEPT[1])
    chex.assert_trees_all_equal_shapes_and_dtypes(found, params)
    chex.assert_trees_all_close(found, wanted, rtol=1e-2 if name == "bf16" else 1e-5)


def test_leaves_that_are_not_averaged_come_from_params(tmp_path, open_stores):
    params = {"w": jnp.ones(2), "count": jnp.arange(3), "frozen": jnp.zeros(2)}
    tx = oa.power_ema(WIDTHS, where=lambda path, leaf: "frozen" not in str(path))
    state = tx.init(params)
    zeros = {"w": jnp.ones(2), "count": jnp.zeros(3, int), "frozen": jnp.zeros(2)}
    state = tx.update(zeros, state, params)[1]
    store = open_stores(SnapshotStore(tmp_path))
    store.save(state, 1)
    found = store.reconstruct(params | {"frozen": jnp.full(2, 7.0)}, sigma_rel=0.1)
    wanted = {"w": jnp.full(2, 2.0), "count": jnp.arange(3), "frozen": jnp.full(2, 7.0)}
    chex.assert_trees_all_close(found, wanted)
    assert set(store.reconstruct(sigma_rel=0.1)) == {"w"}


def test_state_may_be_donated_at_once(tmp_path, open_stores):
    tx = oa.power_ema(WIDTHS)
    params = {"w": jnp.arange(1_000_000.0)}
    step = jax.jit(lambda s, p: tx.update(p, s, p)[1], donate_argnums=0)
    state = step(tx.init(params), params)
    wanted = np.asarray(oa.averaged_params(state, params, KEPT[0])["w"]).copy()
    store = open_stores(SnapshotStore(tmp_path))
    store.save(state, 1)
    later = step(state, jax.tree.map(lambda x: -9 * x, params))
    jax.block_until_ready(later)
    found = store.reconstruct(params, sigma_rel=0.05)
    # After one step both widths hold the same: a sum of parts of it, rounded once.
    np.testing.assert_allclose(found["w"], wanted, rtol=float(jnp.finfo("f4").eps))


@pytest.mark.parametrize("explicit", [True, False])
def test_sharded_arrays_stay_sharded(explicit, tmp_path, open_stores):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    rows, columns = NamedSharding(mesh, P("d", None)), NamedSharding(mesh, P(None, "d"))
    params = {"w": jax.device_put(jnp.arange(128.0).reshape(16, 8), rows)}
    tx = oa.power_ema(WIDTHS)
    state = tx.update(params, tx.init(params), params)[1]
    store = open_stores(SnapshotStore(tmp_path))
    store.save(state, 1)
    like = {"w": jax.ShapeDtypeStruct((16, 8), jnp.bfloat16, sharding=columns)}
    for target, sharding in ((params, rows), (like, columns)):
        found = store.reconstruct(target, sigma_rel=0.05)["w"]
        assert found.sharding.is_equivalent_to(sharding, 2)
        assert found.dtype == target["w"].dtype
        wanted = np.arange(128.0).reshape(16, 8) * 2
        np.testing.assert_allclose(np.float32(found), wanted, rtol=1e-2)
    assert {d for s in found.addressable_shards for d in [s.device]} == set(
        mesh.devices.flat
    )


def test_memory_is_the_result_and_two_leaves(tmp_path, open_stores, monkeypatch):
    leaf = 270_000  # over a megabyte, below which leaves are read together here
    params = {f"l{i}": jnp.ones(leaf) for i in range(12)} | {"s": jnp.ones(10)}
    store, *_ = filled(tmp_path, 6, 2, params=params)
    open_stores(store)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    del params
    before = sum(x.nbytes for x in jax.live_arrays())
    most = []
    read = _disk.read_leaves

    def seen(*args):
        found = read(*args)
        most.append(sum(x.nbytes for x in jax.live_arrays()) - before)
        return found

    monkeypatch.setattr(_disk, "read_leaves", seen)
    monkeypatch.setattr(streaming, "LEAST", 2**20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the residual
        result = store.reconstruct(shapes, sigma_rel=0.2)
    whole = sum(x.nbytes for x in jax.tree.leaves(result))
    assert max(most) <= whole + 2 * leaf * 4 + 1000
    # The first leaf is there long before the rest: nothing is read whole.
    assert most[0] <= 2 * leaf * 4 + 1000


# --- accidents ---


def files_of(directory, step, item):
    folder = Path(directory) / str(step) / item
    return [path for path in folder.rglob("*") if path.is_file()]


def flip(path):
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4] = bytes(b ^ 0xFF for b in data[middle : middle + 4])
    path.write_bytes(bytes(data))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("item", ["averages", "record"])
@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
def test_broken_snapshots_are_named_and_left_out(item, harm, tmp_path, open_stores):
    params = {"w": jax.random.normal(jax.random.key(0), (100, 100)), "v": jnp.ones(3)}
    store, state, params, _ = filled(tmp_path, 24, 4, params=params)
    open_stores(store)
    for path in files_of(tmp_path, 12, item):
        harm(path)
    with pytest.warns(RuntimeWarning, match="snapshot of step 12 is skipped") as seen:
        found = store.reconstruct(params, sigma_rel=0.08)
    assert len([w for w in seen if w.category is RuntimeWarning]) == 1
    # As if it had never been written.
    shutil.rmtree(tmp_path / "12")
    chex.assert_trees_all_equal(found, store.reconstruct(params, sigma_rel=0.08))
    wanted = oa.averaged_params(state, params, KEPT[1])
    difference = jax.tree.map(jnp.subtract, found, wanted)
    assert float(_numerics.norm(difference)) < 0.2 * float(_numerics.norm(wanted))


def test_numbers_of_another_step_are_noticed(tmp_path, open_stores):
    """Orbax reads them without complaint."""
    store, _, params, _ = filled(tmp_path, 24, 4)
    open_stores(store)
    shutil.rmtree(tmp_path / "12" / "averages")
    shutil.copytree(tmp_path / "8" / "averages", tmp_path / "12" / "averages")
    with pytest.warns(RuntimeWarning, match="step 12 is skipped.*not those of"):
        found = store.reconstruct(params, sigma_rel=0.08)
    shutil.rmtree(tmp_path / "12")
    chex.assert_trees_all_equal(found, store.reconstruct(params, sigma_rel=0.08))


@pytest.mark.parametrize("name", ["004", "4.old", "step_4"])
def test_snapshots_under_other_names_are_named(name, tmp_path, open_stores):
    store = open_stores(SnapshotStore(tmp_path))
    for step in (2, 4):
        store.save(None, step, {"w": jnp.full(2, float(step))})
    store.wait()
    (tmp_path / "4").rename(tmp_path / name)
    (tmp_path / "notes").mkdir()
    with pytest.warns(
        RuntimeWarning, match=f"their steps alone: {name}. Rename"
    ) as seen:
        assert store.mean()["w"][0] == 2
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: oa.ema_params(0.9), r"average 'ema' .* weights=\{'ema': optax_avg."),
        (lambda: oa.power_ema(0.1, start=9), "no average had absorbed an iterate"),
    ],
)
def test_why_nothing_was_saved(make, said, tmp_path, open_stores):
    store, tx = open_stores(SnapshotStore(tmp_path / "store")), make()
    params = small()
    state = tx.update(params, tx.init(params), params)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert not store.save(state, 1)
    for query in (lambda: store.reconstruct(sigma_rel=0.1), store.mean):
        with pytest.raises(ValueError, match=f"for nothing could be saved: .*{said}"):
            query()
    # Once there is a snapshot, it is about that.
    store.save(None, 2, params)
    with pytest.raises(ValueError, match="hold no averages, only 'parameters'"):
        store.reconstruct(sigma_rel=0.1)


@pytest.mark.parametrize(
    "state", [None, optax.adam(0.1).init(jnp.ones(2)), {"w": jnp.ones(2)}]
)
def test_what_can_never_be_saved(state, tmp_path, open_stores):
    store = open_stores(SnapshotStore(tmp_path))
    with pytest.raises(ValueError, match="no average in this optimizer state; put one"):
        store.save(state, 1)
    assert store.save(state, 1, {"w": jnp.ones(2)})


def test_messages_of_means_name_what_there_is(tmp_path, open_stores):
    store = open_stores(SnapshotStore(tmp_path))
    with pytest.raises(ValueError, match="holds no snapshots; save one first"):
        store.mean()
    store.save(None, 4, small())
    with pytest.raises(ValueError, match=r"hold no 'ema'; pass .* of \['parameters'\]"):
        store.mean(name="ema")
    with pytest.raises(ValueError, match=r"at steps \[5\]; pass some of \[4\]"):
        store.mean(steps=[5])


def test_one_flipped_bit_anywhere_is_noticed():
    rng = np.random.default_rng(0)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.complex64):
        x = np.asarray(jnp.asarray(rng.normal(size=(7, 5)), dtype))
        known = int(_integrity.signature([jnp.asarray(x)])[0][0])
        raw = x.view(np.uint8).reshape(-1)
        for bit in range(8 * raw.size):
            changed = raw.copy()
            changed[bit // 8] ^= 1 << (bit % 8)
            y = jnp.asarray(changed.view(x.dtype).reshape(x.shape))
            assert int(_integrity.signature([y])[0][0]) != known


@hypothesis.given(st.integers(0, 34), st.integers(0, 34))
def test_exchanged_elements_are_noticed(i, j):
    x = np.random.default_rng(1).normal(size=35).astype(np.float32)
    y = x.copy()
    y[[i, j]] = y[[j, i]]
    numbers = [int(_integrity.signature([jnp.asarray(v)])[0][0]) for v in (x, y)]
    assert (numbers[0] == numbers[1]) == (i == j)


def test_half_written_snapshots_are_not_there(tmp_path, open_stores):
    store, _, params, _ = filled(tmp_path, 12, 4)
    open_stores(store)
    wanted = store.reconstruct(params, sigma_rel=0.1)
    unfinished = tmp_path / "16.orbax-checkpoint-tmp-1"
    unfinished.mkdir()
    (unfinished / "averages").write_text("half")
    assert store.steps() == [4, 8, 12]
    chex.assert_trees_all_equal(store.reconstruct(params, sigma_rel=0.1), wanted)


def test_one_writer(tmp_path, open_stores):
    first = open_stores(SnapshotStore(tmp_path))
    second = open_stores(SnapshotStore(tmp_path))
    first.save(None, 1, small())
    first.wait()
    with pytest.raises(RuntimeError, match="already has a writer"):
        second.save(None, 2, small())
    assert second.steps() == [1]  # reading is free
    first.close()
    assert second.save(None, 2, small())
    assert second.steps() == [1, 2]


def test_a_step_is_replaced_and_later_ones_removed(tmp_path, open_stores):
    store = open_stores(SnapshotStore(tmp_path))
    for step, value in ((1, 1.0), (2, 2.0), (2, 20.0), (3, 3.0)):
        store.save(None, step, {"w": jnp.full(2, value)})
    assert store.steps() == [1, 2, 3]
    with pytest.raises(ValueError, match=r"than 2, up to 3; .*delete_after\(2\)"):
        store.save(None, 2, small())
    np.testing.assert_array_equal(store.mean(steps=[2])["w"], [20.0, 20.0])
    store.delete_after(1)
    assert store.steps() == [1]
    assert store.save(None, 2, {"w": jnp.ones(2)})


def rewritten(directory, store_in):
    """Snapshots of ones and of twos at step 2, in a store that has step 1 too."""
    folders = {}
    for value in (1.0, 2.0):
        with SnapshotStore(directory / f"of {value}") as store:
            store.save(None, 2, {"w": jnp.full(3, value)})
        folders[value] = directory / f"of {value}" / "2"
    with SnapshotStore(store_in) as store:
        store.save(None, 1, {"w": jnp.zeros(3)})
    return folders


@pytest.mark.parametrize(
    ("names", "value"),
    [
        ({"2": 1.0, "2.new.orbax-checkpoint-tmp": 2.0}, 1.0),
        ({"2": 1.0, "2.new": 2.0}, 2.0),
        ({"2.removed": 1.0, "2.new": 2.0}, 2.0),
        ({"2": 2.0, "2.removed": 1.0}, 2.0),
        ({"2.orbax-checkpoint-tmp": 1.0}, None),
        ({"2.removed": 1.0}, None),
    ],
)
def test_a_kill_while_a_step_is_replaced(names, value, tmp_path):
    """Each state on the way is read well, and the next writer clears it up."""
    made = tmp_path / "made"
    made.mkdir()
    store_in = tmp_path / "store"
    folders = rewritten(made, store_in)
    for name, content in names.items():
        shutil.copytree(folders[content], store_in / name)
    for action in (lambda store: None, lambda store: store.save(None, 3, small())):
        with SnapshotStore(store_in) as store:
            action(store)
            there = [1] if value is None else [1, 2]
            assert [s for s in store.steps() if s < 3] == there
            if value is not None:
                np.testing.assert_array_equal(store.mean(steps=[2])["w"], [value] * 3)
    kept = {path.name for path in store_in.iterdir()}
    assert kept == {"writer.lock", "3", *map(str, there)}


def test_a_step_is_replaced_by_another_process(tmp_path, open_stores):
    """A reader that was there before, while the new one is not yet in its place."""
    reader = open_stores(SnapshotStore(tmp_path))
    with SnapshotStore(tmp_path) as store:
        for value in (1.0, 2.0):
            store.save(None, 2, {"w": jnp.full(3, value)})
        store._writer.checkpointer.wait_until_finished()
        assert (tmp_path / "2").exists()
        assert (tmp_path / "2.new").exists()
        np.testing.assert_array_equal(reader.mean()["w"], [2.0] * 3)
    assert not (tmp_path / "2.new").exists()
    np.testing.assert_array_equal(reader.mean()["w"], [2.0] * 3)


def test_what_is_not_a_snapshot_is_left_alone(tmp_path, open_stores):
    """A directory with models by step, of Orbax and of others, beside our snapshots."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.StandardSave({"w": jnp.ones(2)}))
    (tmp_path / "model_4").mkdir()
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "weights.bin").write_text("mine")
    (tmp_path / "6").write_text("mine")
    (tmp_path / "007").mkdir()
    store = open_stores(SnapshotStore(tmp_path))
    store.save(None, 1, {"w": jnp.ones(2)})
    assert store.steps() == [1]
    for step in (3, 5, 6):
        with pytest.raises(OSError, match=f"{step} is not a snapshot; give the store"):
            store.save(None, step, {"w": jnp.ones(2)})
    store.save(None, 8, {"w": jnp.ones(2)})
    assert store.steps() == [1, 8]
    store.delete_after(1)
    assert store.steps() == [1]
    assert (tmp_path / "5" / "weights.bin").read_text() == "mine"
    assert (tmp_path / "6").read_text() == "mine"
    assert (tmp_path / "model_4").is_dir()
    assert (tmp_path / "007").is_dir()
    with ocp.CheckpointManager(tmp_path) as manager:
        found = manager.restore(3, args=ocp.args.StandardRestore({"w": jnp.zeros(2)}))
    np.testing.assert_array_equal(found["w"], [1.0, 1.0])


def test_reading_leaves_no_trace(ready, monkeypatch, open_stores):
    """It takes no lock, makes no file, and finishes nothing."""
    store, _, params, _ = ready
    open_stores(store)
    Path(store.directory, "2.orbax-checkpoint-tmp").mkdir()
    monkeypatch.setattr(_writer, "open_writer", None)
    stamps = lambda: {
        path: path.stat().st_mtime_ns for path in Path(store.directory).rglob("*")
    }
    before = stamps()
    store.reconstruct(params, sigma_rel=0.08)
    store.plan(sigma_rel=0.08)
    store.mean()
    store.steps()
    store.wait()
    store.close()
    assert stamps() == before


FULL_DISK = """
    import resource, sys, jax.numpy as jnp, numpy as np, warnings
    from optax_avg.posthoc import SnapshotStore
    store = SnapshotStore(sys.argv[1])
    small, large = {"w": jnp.ones(10)}, {"w": jnp.asarray(np.random.rand(300_000))}
    store.save(None, 1, small); store.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in 1, 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            store.save(None, step, large); store.wait()
        except OSError as error:
            print("said:", str(error)[:300].replace(chr(10), " "))
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        print("steps", store.steps(), store.mean()["w"].sum())
    store.save(None, 2, small); store.save(None, 2, large); store.close()
    print("steps", SnapshotStore(sys.argv[1]).steps())
    print("sizes", [store.mean(steps=[s])["w"].size for s in (1, 2)])
"""


def run(script, *args):
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
        timeout=240,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_full_disk(tmp_path):
    code, out, errors = run(FULL_DISK, tmp_path)
    assert code == 0, errors
    assert "said: the snapshot of step 2 could not be written" in out
    assert "said: the snapshot of step 1 could not be written" in out
    assert out.count("steps [1] 10.0") == 2
    assert "steps [1, 2]" in out
    assert "sizes [10, 300000]" in out
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "writer.lock"}


@pytest.mark.parametrize("module", ["orbax.checkpoint", "filelock"])
def test_without_what_the_extra_installs(module, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "optax_avg\[posthoc\]"'):
        SnapshotStore(tmp_path)


@pytest.mark.parametrize("module", ["typer", "rich.console", "rich.progress"])
def test_the_command_without_what_the_extra_installs(module, monkeypatch):
    for name in [n for n in sys.modules if n.startswith("optax_avg.cli")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "optax_avg\[cli\]"'):
        importlib.import_module("optax_avg.cli")


def test_out_of_reach_is_said_with_what_would_do(ready, open_stores):
    store, _, params, _ = ready
    open_stores(store)
    with pytest.warns(
        UserWarning, match=r"miss .* by \d+.*sigma_rel from .* to"
    ) as seen:
        store.reconstruct(params, sigma_rel=0.02)
    assert "snapshots would do" in str(seen[0].message)
    plan = store.plan(sigma_rel=0.1)
    assert plan.residual < 1e-6
    assert plan.advice == ""


def test_a_snapshot_is_an_ordinary_orbax_checkpoint(tmp_path, open_stores):
    store, state, params, _ = filled(tmp_path, 4, 4)
    open_stores(store)
    import orbax.checkpoint as ocp

    path = tmp_path / "4" / "averages"
    like = {
        name: jax.tree.map(jnp.zeros_like, params) for name in [*KEPT, "parameters"]
    }
    found = ocp.StandardCheckpointer().restore(path, like)
    chex.assert_trees_all_equal(found["parameters"], params)
    wanted = oa.averaged_params(state, params, KEPT[0])
    chex.assert_trees_all_equal(found[KEPT[0]], wanted)
    record = json.loads((tmp_path / "4" / "record" / "metadata").read_text())
    assert record["absorbed"][KEPT[0]] == 4


def test_bad_arguments(tmp_path, open_stores):
    store, state, params, _ = filled(tmp_path, 8, 4)
    open_stores(store)
    twice = (oa.polyak_average().init(params), oa.polyak_average().init(params))
    begun = jax.tree.map(lambda x: x + 1, twice)
    named = SnapshotStore(tmp_path / "other", weights={"polyak": oa.weights.uniform()})
    other = dict(params, dense={"kernel": jnp.ones((4, 3))})
    cases = [
        (lambda: store.reconstruct(params), "one target"),
        (lambda: store.plan(sigma_rel=0.1, window=3), "one target"),
        (lambda: store.plan(sigma_rel=0.3), "sigma_rel must lie in"),
        (lambda: store.plan(window=0), "window must be an integer"),
        (lambda: store.plan(half_life=-1.0), r"^half_life must lie in \(0"),
        (lambda: store.plan(weight=oa.weights.ema), "ema is none: call it first"),
        (
            lambda: SnapshotStore(tmp_path / "new", weights=oa.weights.ema(0.9)),
            r"must be a dict of weights by .* got function; write SnapshotStore\(",
        ),
        (
            lambda: SnapshotStore(tmp_path / "new", weights=[oa.weights.ema(0.9)]),
            "must be a dict of weights .* got list",
        ),
        (lambda: store.plan(sigma_rel=0.1, step=5), r"at step 5; pass one of \[4, 8\]"),
        (lambda: store.plan(sigma_rel=0.1, names=["x"]), "no snapshot of x"),
        (lambda: store.reconstruct(other, sigma_rel=0.1), "no leaf dense/bias"),
        (
            lambda: store.reconstruct(dict(params, s=jnp.ones(4)), sigma_rel=0.1),
            r"params\['s'\] has shape \(4,\)",
        ),
        (lambda: store.save(state, -1), "step must be an integer"),
        (lambda: store.save(state, 1.5), "step must be an integer"),
        (lambda: store.save(state, True), "step must be an integer"),
        (lambda: named.save(begun, 1), "two averages are named 'polyak'"),
        (lambda: store.save(state, 7), r"up to 8; .* store.delete_after\(7\)"),
        (lambda: SnapshotStore(tmp_path, dtype=jnp.int8), "floating point"),
        (lambda: SnapshotStore(tmp_path / "none").mean(), "there is no directory"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("step", [True, -5, 100.5, None, "100"])
def test_what_deletes_wants_a_step(step, tmp_path):
    params = small()
    tx = oa.power_ema(WIDTHS)
    with SnapshotStore(tmp_path) as store:
        walk(4, tx, params, each=lambda s, state, _: store.save(state, s))
        with pytest.raises(ValueError, match="step must be an integer"):
            store.delete_after(step)
        assert store.steps() == [1, 2, 3, 4]


def test_leaves_of_other_names_are_not_mixed_up(tmp_path):
    """By their order leaves are told only where no name agrees."""
    params = {"a": jnp.zeros(3), "b": jnp.ones(3)}
    with SnapshotStore(tmp_path) as store:
        tx = oa.power_ema(WIDTHS)
        walk(8, tx, params, each=lambda s, state, _: store.save(state, s))
        wanted = store.reconstruct(params, sigma_rel=0.08)
        with pytest.raises(ValueError, match="params has no leaf a"):
            store.reconstruct({"b": params["b"], "c": params["a"]}, sigma_rel=0.08)
        wrapped = store.reconstruct({"model": params}, sigma_rel=0.08)
    chex.assert_trees_all_equal(wrapped["model"], wanted)


@pytest.mark.parametrize("directory", ["", "a\\b"])
def test_directories_that_no_store_can_have(directory):
    with pytest.raises(ValueError, match="cannot be the directory of a store"):
        SnapshotStore(directory)


def test_a_snapshot_that_is_replaced_while_it_is_read(
    tmp_path, monkeypatch, open_stores
):
    """Its record was read before, its numbers come after."""
    store = open_stores(SnapshotStore(tmp_path))
    store.save(None, 1, {"w": jnp.ones(3)})
    store.wait()
    read_leaves, again = _disk.read_leaves, [2.0, 3.0]

    def late(*args):
        if again:
            store.save(None, 1, {"w": jnp.full(3, again.pop(0))})
            store.wait()
        return read_leaves(*args)

    monkeypatch.setattr(_disk, "read_leaves", late)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = SnapshotStore(tmp_path).mean()
    np.testing.assert_array_equal(found["w"], [3.0] * 3)


def test_a_snapshot_whose_reading_fails_once(tmp_path, monkeypatch, open_stores):
    """It was moved to its place while it was read."""
    store = open_stores(SnapshotStore(tmp_path))
    store.save(None, 1, {"w": jnp.ones(3)})
    store.wait()
    read_leaves, failures = _disk.read_leaves, [_disk.SnapshotError(1, "moved")]

    def failing(*args):
        if failures:
            raise failures.pop()
        return read_leaves(*args)

    monkeypatch.setattr(_disk, "read_leaves", failing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(store.mean()["w"], [1.0] * 3)


def test_checkpoints_of_others_that_are_being_written_are_left_alone(
    tmp_path, open_stores
):
    theirs = {"7.orbax-checkpoint-tmp-1": "default", "8.removed": "mine"}
    for name, child in theirs.items():
        (tmp_path / name / child).mkdir(parents=True)
    (tmp_path / "9.removed").write_text("mine")
    ours = tmp_path / "5.orbax-checkpoint-tmp-1"
    (ours / "averages.orbax-checkpoint-tmp-2").mkdir(parents=True)
    store = open_stores(SnapshotStore(tmp_path))
    store.save(None, 1, small())
    store.wait()
    for name, child in theirs.items():
        assert (tmp_path / name / child).is_dir()
    assert (tmp_path / "9.removed").read_text() == "mine"
    assert not ours.exists()


@pytest.mark.parametrize("mask", [lambda params: {"w": False}, {"w": False}])
def test_averages_without_leaves_are_not_saved(mask, tmp_path, open_stores):
    empty = optax.masked(oa.window_average(3), mask)
    tx = optax.chain(empty, oa.power_ema([0.05, 0.1]))
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    store = open_stores(SnapshotStore(tmp_path))
    assert store.save(state, 1)
    assert store.mean(name="power_ema_0.05")["w"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("steps", [1, np.int64(1), [1], np.array([1])])
def test_steps_of_a_mean_may_be_one(steps, tmp_path, open_stores):
    store = open_stores(SnapshotStore(tmp_path))
    store.save(None, 1, {"w": jnp.ones(2)})
    store.save(None, 2, {"w": jnp.zeros(2)})
    assert store.mean(steps=steps)["w"].tolist() == [1.0, 1.0]
