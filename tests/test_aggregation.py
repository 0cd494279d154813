"""Aggregators against float64, their identities, bad rows, and many devices."""

import functools
import inspect
import itertools
import re

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_aggregation as reference
from jax import shard_map
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.experimental import aggregating

import optax_avg as oa
from optax_avg import _mesh
from optax_avg.robust import _layout, _ranks, _stack
from optax_avg.robust._gram_rules import krum_scores

N = 8
# A factory of the aggregator, and the same on the rows of a float64 matrix.
CASES = {
    "coordinate_median": (oa.coordinate_median, reference.coordinate_median),
    "trimmed_mean": (
        functools.partial(oa.trimmed_mean, 2),
        lambda v: reference.trimmed_mean(v, 2),
    ),
    "geometric_median": (
        oa.geometric_median,
        lambda v: reference.geometric_median(v, 1e-6, 8),
    ),
    "median_of_means": (
        functools.partial(oa.median_of_means, 4),
        lambda v: reference.median_of_means(v, 4, 1e-6, 8),
    ),
    "centered_clip": (
        functools.partial(oa.centered_clip, 1.5),
        lambda v: reference.centered_clip(v, np.zeros(v.shape[1]), 1.5, 1),
    ),
    "centered_clip_rounds": (
        functools.partial(oa.centered_clip, 1.5, 4),
        lambda v: reference.centered_clip(v, np.zeros(v.shape[1]), 1.5, 4),
    ),
    "krum": (functools.partial(oa.krum, 2), lambda v: reference.krum(v, 2, 1)),
    "multi_krum": (functools.partial(oa.krum, 2, 3), lambda v: reference.krum(v, 2, 3)),
    "flag": (
        functools.partial(oa.flag_aggregator, 3),
        lambda v: reference.flag(v, 3, 5),
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# Reweighting where a direction is all but explained amplifies rounding.
ROUNDING = {"flag": 2e-5}
every_named_case = pytest.mark.parametrize("name", CASES)
# Those that see distances alone, so that a shift of all rows shifts the result.
AROUND = [
    "coordinate_median",
    "trimmed_mean",
    "geometric_median",
    "median_of_means",
    "krum",
]


def stacked(seed=0, n=N, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=(n, *shape)) + 0.5, dtype)
    return {"w": draw(8, 3), "b": draw(5), "scale": draw()}


def like_one(tree):
    return jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), tree)


def matrix(tree):
    """Rows as (n, d) in float64."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def flat(tree):
    return matrix(jax.tree.map(lambda x: x[None], tree))[0]


@functools.cache
def jitted(update):
    return jax.jit(update)


def once(tx, tree):
    state = tx.init(like_one(tree))
    return jitted(tx.update)(tree, state)


@every_case
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_definition(case, seed):
    make, wanted = case
    tree = stacked(seed)
    found, state = once(make(), tree)
    np.testing.assert_allclose(flat(found), wanted(matrix(tree)), rtol=2e-5, atol=2e-6)
    assert int(state.aggregation_step) == 1
    assert int(state.left_out) == 0


@every_case
def test_outliers_do_not_matter_how_far(case):
    make, wanted = case
    tree = stacked(2)
    for size in (1e4, 1e15, 1e30):
        far = jax.tree.map(lambda x, size=size: x.at[3].set(size), tree)
        found, _ = once(make(), far)
        expected = wanted(matrix(far))
        if case is CASES["median_of_means"] or case is CASES["flag"]:
            assert np.all(np.isfinite(flat(found)))
            continue
        scale = np.abs(expected).max()
        np.testing.assert_allclose(flat(found), expected, rtol=1e-3, atol=1e-4 * scale)
        assert scale < 1e3


def test_median_of_means_survives_a_group_of_outliers():
    tree = stacked(2)
    near, _ = once(oa.median_of_means(4, num_iters=64), tree)
    far = jax.tree.map(lambda x: x.at[3].set(1e30), tree)
    found, _ = once(oa.median_of_means(4, num_iters=64), far)
    assert np.linalg.norm(flat(found) - flat(near)) < 3


@every_named_case
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_rows_are_left_out_and_counted(name, bad):
    make, wanted = CASES[name]
    tree = stacked(3)
    tree["b"] = tree["b"].at[1, 2].set(bad).at[6, 0].set(-bad)
    found, state = once(make(), tree)
    assert int(state.left_out) == 2
    kept = np.delete(matrix(tree), [1, 6], axis=0)
    if name == "median_of_means":
        means = [kept[0], kept[1:3].mean(0), kept[3:5].mean(0), kept[5]]
        expected = reference.geometric_median(np.array(means), 1e-6, 8)
    elif name in ("krum", "multi_krum"):
        # The bad ones are the byzantine ones: n - f - 2 stays the same.
        expected = reference.krum(kept, 0, 1 if name == "krum" else 3)
    else:
        expected = wanted(kept)
    atol = ROUNDING.get(name, 2e-6)
    np.testing.assert_allclose(flat(found), expected, rtol=2e-5, atol=atol)


@every_case
def test_only_bad_rows_give_zero_or_the_location_so_far(case):
    tx = case[0]()
    good, bad = stacked(4), jax.tree.map(lambda x: jnp.nan * x, stacked(4))
    first, state = once(tx, good)
    found, state = jax.jit(tx.update)(bad, state)
    if case in (CASES["centered_clip"], CASES["centered_clip_rounds"]):
        chex.assert_trees_all_equal(found, first)
    else:
        chex.assert_trees_all_equal(found, like_one(good))
    assert int(state.left_out) == N


@every_case
def test_equal_rows_give_that_row(case):
    row = like_one(stacked(5))
    row = jax.tree.map(lambda x: x + 0.25, row)
    tree = jax.tree.map(lambda x: jnp.stack([x] * N), row)
    found, _ = once(case[0](), tree)
    wanted = case[1](matrix(tree))
    np.testing.assert_allclose(flat(found), wanted, rtol=1e-5)
    if case not in (CASES["centered_clip"], CASES["centered_clip_rounds"]):
        np.testing.assert_allclose(flat(found), flat(row), rtol=1e-5)


@every_case
def test_zero_rows_give_zero(case):
    tree = jax.tree.map(jnp.zeros_like, stacked(0, dtype=jnp.float16))
    found, state = once(case[0](), tree)
    chex.assert_trees_all_equal(found, like_one(tree))
    assert int(state.left_out) == 0


@functools.cache
def scale_free(name):
    smoothed = name in ("geometric_median", "median_of_means")
    return CASES[name][0](**({"nu": 1e-30} if smoothed else {}))


@pytest.mark.parametrize("name", AROUND)
@hypothesis.given(seed=st.integers(0, 99), log_scale=st.integers(-28, 28))
def test_shift_and_scale(name, seed, log_scale):
    tx = scale_free(name)
    tree = stacked(seed % 7)
    scale = 10.0**log_scale
    plain, _ = once(tx, tree)
    scaled, _ = once(tx, jax.tree.map(lambda x: scale * x, tree))
    np.testing.assert_allclose(flat(scaled) / scale, flat(plain), rtol=1e-4, atol=1e-5)
    shifted, _ = once(tx, jax.tree.map(lambda x: x + 3.0, tree))
    # The norms choose where the rounds of the medians start.
    atol = 0.2 if name in ("geometric_median", "median_of_means") else 2e-5
    np.testing.assert_allclose(flat(shifted) - 3, flat(plain), atol=atol)


@pytest.mark.parametrize("spread", [1e-3, 1e-5])
def test_near_identical_gradients_do_not_cancel(spread):
    """At distances of 1e-5 of the norm squares cancel to 1e-10: below float32."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=400)
    v = np.float32(common + spread * rng.normal(size=(9, 400)))
    v[0] = np.float32(-common)  # of the same norm
    z, _ = once(oa.geometric_median(nu=1e-12, num_iters=40), jnp.asarray(v))
    wanted = reference.geometric_median(v.astype(np.float64), 1e-12, 40)
    # The result is rounded to float32; a mean that ignores distances is off by this.
    naive = np.linalg.norm(v[1:].mean(axis=0) - wanted)
    rounding = np.finfo(np.float32).eps * np.linalg.norm(common)
    assert np.linalg.norm(np.asarray(z) - wanted) < 0.05 * naive + 2 * rounding
    chosen, _ = once(oa.krum(1), jnp.asarray(v))
    expected = reference.krum(v.astype(np.float64), 1, 1)
    np.testing.assert_array_equal(np.asarray(chosen), np.float32(expected))


@every_case
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision(case, dtype):
    make, wanted = case
    tree = stacked(6, dtype=dtype)
    found, _ = once(make(), tree)
    chex.assert_trees_all_equal_dtypes(found, like_one(tree))
    np.testing.assert_allclose(flat(found), wanted(matrix(tree)), rtol=0.01, atol=0.01)


def test_float16_squares_do_not_overflow():
    tree = jnp.full((N, 2), 300.0, jnp.float16)
    found, state = once(oa.geometric_median(), tree)
    assert int(state.left_out) == 0
    np.testing.assert_array_equal(np.asarray(found, float), 300)


@every_case
def test_leaves_that_are_not_float(case):
    tree = {
        **stacked(7),
        "none": None,
        "count": jnp.arange(N),
        "masked": optax.MaskedNode(),
    }
    params = {**like_one(stacked(7)), "none": None, "count": 0}
    params["masked"] = optax.MaskedNode()
    tx = case[0]()
    found, state = jax.jit(tx.update)(tree, tx.init(params))
    found, _ = jax.jit(tx.update)(tree, state)
    assert found["none"] is None
    assert int(found["count"]) == 0
    assert found["masked"] == optax.MaskedNode()


@every_case
@pytest.mark.parametrize("tree", [{}, {"a": None}, {"a": jnp.zeros((N, 0, 3))}])
def test_empty_trees(case, tree):
    tx = case[0]()
    params = jax.tree.map(lambda x: x[0], tree)
    found, state = jax.jit(tx.update)(tree, tx.init(params))
    chex.assert_trees_all_equal(found, params)
    assert int(state.aggregation_step) == 1


def test_another_axis():
    tree = stacked(8)
    del tree["scale"]
    moved = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), tree)
    found, _ = once(oa.geometric_median(), tree)
    tx = oa.geometric_median(per_elt_axis=1)
    chex.assert_trees_all_close(tx.update(moved, tx.init(like_one(tree)))[0], found)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 31, 32, 33, 70])
def test_coordinate_median_of_any_number(n):
    v = np.float32(np.random.default_rng(n).normal(size=(n, 6)))
    found, _ = once(oa.coordinate_median(), jnp.asarray(v))
    np.testing.assert_allclose(found, np.median(v, axis=0), rtol=1e-6)
    if n > 2:
        found, _ = once(oa.trimmed_mean(1), jnp.asarray(v))
        np.testing.assert_allclose(found, reference.trimmed_mean(v, 1), rtol=2e-5)


@pytest.mark.parametrize("n", range(1, 12))
def test_the_network_sorts_all_zeros_and_ones(n):
    """Knuth's zero-one principle: it then sorts everything."""
    rows = np.array(list(itertools.product([0, 1], repeat=n))).T.copy()
    for stage in _ranks.merge_exchange(n):
        assert len({i for pair in stage for i in pair}) == 2 * len(stage)
        for a, b in stage:
            rows[a], rows[b] = (
                np.minimum(rows[a], rows[b]),
                np.maximum(rows[a], rows[b]),
            )
    assert (np.diff(rows, axis=0) >= 0).all()


def test_chunks_cover_all_columns(monkeypatch):
    tree = stacked(9)
    tree["b"] = tree["b"].at[1, 2].set(jnp.nan)
    wanted, _ = once(oa.geometric_median(), tree)
    monkeypatch.setattr(_stack, "CHUNK", 7 * N)
    monkeypatch.setattr(_layout, "SMALL", 4)
    found, _ = once(oa.geometric_median(), tree)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("d", [7, 11, 15])
@pytest.mark.parametrize("centre", ["none", "row", "vector"])
def test_chunks_count_each_column_once(d, centre, monkeypatch):
    monkeypatch.setattr(_stack, "CHUNK", 4 * 5)
    v = np.random.default_rng(d).normal(size=(5, d))
    stack = _stack.stack_of(jnp.float32(v), 0, None)
    middle = {"none": None, "row": jnp.asarray(3), "vector": [jnp.float32(v[1])]}
    around = v - {"none": 0, "row": v[3], "vector": v[1]}[centre]
    gram = _stack.gram(stack, jnp.ones(5), middle[centre])
    np.testing.assert_allclose(gram, around @ around.T, rtol=1e-4, atol=1e-5)
    norms = _stack.row_norms(stack.rows, None, middle[centre])
    wanted = np.linalg.norm(around, axis=1)
    np.testing.assert_allclose(norms, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("f", [0, 1, 3])
def test_krum_scores(f):
    v = np.random.default_rng(f).normal(size=(8, 3))
    squared = np.sum((v[:, None] - v[None]) ** 2, axis=-1)
    wanted = [
        np.sort(np.delete(row, i))[: 6 - f].sum() for i, row in enumerate(squared)
    ]
    found = krum_scores(jnp.float32(v @ v.T), jnp.ones(8, bool), f)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_geometric_median_and_centered_clip_share_a_fixed_point():
    """Weiszfeld smoothed at ``nu`` is centered clipping with ``tau = nu``."""
    tree = stacked(10)
    median, _ = once(oa.geometric_median(nu=1.0, num_iters=500), tree)
    clip = oa.centered_clip(1.0, 2000)
    chex.assert_trees_all_close(once(clip, tree)[0], median, rtol=1e-4, atol=1e-4)


def test_one_worker_of_centered_clip_is_vclip():
    clip, tracker = oa.centered_clip(0.7), oa.vclip(0.7, init="zeros")
    params = like_one(stacked())
    a, b = clip.init(params), tracker.init(params)
    for seed in range(6):
        tree = stacked(seed, n=1)
        if seed == 3:
            tree["b"] = tree["b"].at[0, 0].set(jnp.nan)
        m, a = clip.update(tree, a)
        wanted, b = tracker.update(jax.tree.map(lambda x: x[0], tree), b)
        chex.assert_trees_all_close(m, wanted, rtol=1e-5, atol=1e-6)
    assert int(a.left_out) == int(b.rejected) == 1


def test_centered_clip_without_radius_is_the_mean_and_takes_schedules():
    tree = stacked(11)
    mean = jax.tree.map(lambda x: x.mean(axis=0), tree)
    found, _ = once(oa.centered_clip(float("inf"), 2), tree)
    chex.assert_trees_all_close(found, mean, rtol=1e-5, atol=1e-6)
    tx = oa.centered_clip(lambda step: jnp.where(step == 0, 0.0, jnp.inf))
    zero, state = tx.update(tree, tx.init(like_one(tree)))
    chex.assert_trees_all_equal(zero, like_one(tree))
    chex.assert_trees_all_close(tx.update(tree, state)[0], mean, rtol=1e-5, atol=1e-6)


def test_median_of_as_many_means_is_the_geometric_median():
    tree = stacked(12)
    chex.assert_trees_all_close(
        once(oa.median_of_means(N), tree)[0],
        once(oa.geometric_median(), tree)[0],
        rtol=1e-6,
    )


def test_one_pass_location_is_a_tracker_over_the_elements():
    tx = oa.one_pass_location(oa.distances.huber(), 0.3, init="zeros")
    tracker = oa.track_location(oa.distances.huber(), 0.3, init="zeros")
    params = like_one(stacked())
    a, b = tx.init(params), tracker.init(params)
    for seed in range(2):
        tree = stacked(seed)
        tree["b"] = tree["b"].at[2, 0].set(jnp.inf)
        found, a = jax.jit(tx.update)(tree, a)
        for i in range(N):
            wanted, b = tracker.update(jax.tree.map(lambda x, i=i: x[i], tree), b)
        chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-6)
    assert int(a.rejected) == 2


DISTRIBUTED = {name: case[0] for name, case in CASES.items()} | {
    "one_pass_location": functools.partial(
        oa.one_pass_location, oa.distances.l2(), 0.5
    ),
    "upgrad": oa.upgrad,
}


def devices(count):
    return jax.make_mesh(
        (count,), ("d",), devices=jax.devices()[:count], axis_types=(AxisType.Auto,)
    )


@functools.cache
def alone_of(make):
    """The aggregator on one device, compiled once for the tests of its copies."""
    tx = make()
    return tx, jax.jit(tx.update)


@pytest.mark.parametrize("name", DISTRIBUTED)
@pytest.mark.parametrize("check_vma", [True, False])
def test_one_element_per_device(name, check_vma):
    make, atol = DISTRIBUTED[name], ROUNDING.get(name, 2e-6)
    tree = stacked(13)
    tree["b"] = tree["b"].at[5, 1].set(jnp.nan)
    params = like_one(tree)
    tx = make(axis_name="d")
    take = lambda x: x[0]

    def local(rows, state):
        return tx.update(jax.tree.map(take, rows), state, params)

    update = jax.jit(
        shard_map(
            local,
            mesh=devices(8),
            in_specs=(P("d"), P()),
            out_specs=P(),
            check_vma=check_vma,
        )
    )
    alone, alone_update = alone_of(make)
    # Where the results of a step lie, or the second would be compiled anew.
    state = jax.device_put(tx.init(params), NamedSharding(devices(8), P()))
    wanted = alone.init(params)
    for _ in range(2):
        found, state = update(tree, state)
        expected, wanted = alone_update(tree, wanted)
        chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=atol)
    chex.assert_trees_all_close(state, wanted, rtol=2e-5, atol=atol)


def test_several_elements_per_device():
    tree = stacked(14, n=10)
    tx = oa.krum(3, per_elt_axis=0, axis_name="d")
    state = tx.init(like_one(tree))
    update = shard_map(
        lambda rows: tx.update(rows, state)[0],
        mesh=devices(5),
        in_specs=P("d"),
        out_specs=P(),
    )
    wanted, _ = once(oa.krum(3), tree)
    chex.assert_trees_all_close(jax.jit(update)(tree), wanted)


def test_named_axis_of_vmap_and_pmap():
    tree = stacked(15)
    tx = oa.geometric_median(axis_name="d")
    state = tx.init(like_one(tree))
    wanted, _ = once(oa.geometric_median(), tree)
    local = lambda row: tx.update(row, state)[0]
    for mapped in (jax.vmap(local, axis_name="d"), jax.pmap(local, axis_name="d")):
        found = jax.tree.map(lambda x: x[3], mapped(tree))
        chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)


@every_case
@pytest.mark.parametrize(
    "kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)
def test_sharded_coordinates(case, kind):
    tree = stacked(16)
    tree["b"] = tree["b"].at[5, 1].set(jnp.nan)
    alone, alone_update = alone_of(case[0])
    wanted, _ = alone_update(tree, alone.init(like_one(tree)))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    specs = {"w": P(None, "d", None), "b": P(), "scale": P()}
    with jax.set_mesh(mesh):
        spread = jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs
        )
        params = jax.tree.map(lambda x: x[0], spread)
        tx = case[0]()
        found, _ = jax.jit(tx.update)(spread, tx.init(params))
    assert not found["w"].sharding.is_fully_replicated
    chex.assert_trees_all_close(found, wanted, rtol=2e-5, atol=2e-6)


@every_case
def test_in_a_chain_under_scan_with_donation(case):
    tx = optax.chain(case[0](), optax.adam(0.05))
    params = {"w": jnp.full(3, 0.5, jnp.bfloat16)}

    def step(carry, key):
        params, state = carry
        noise = jax.random.normal(key, (N, 3), jnp.bfloat16)
        rows = {"w": params["w"][None] - 3 + 0.5 * noise}
        updates, state = tx.update(rows, state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda c, keys: jax.lax.scan(step, c, keys), donate_argnums=0)
    keys = jax.random.split(jax.random.key(0), 1000)
    start = (params, tx.init(params))
    shapes = jax.eval_shape(lambda x: x, start)
    (params, state), _ = run(start, keys)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, shapes[1])
    np.testing.assert_allclose(np.asarray(params["w"], float), 3, atol=0.3)


def test_inject_hyperparams():
    tree = stacked(17)
    injected = optax.inject_hyperparams(oa.geometric_median, static_args=("num_iters",))
    tx = injected(nu=0.5, num_iters=4)
    wanted, _ = once(oa.geometric_median(nu=0.5, num_iters=4), tree)
    chex.assert_trees_all_close(once(tx, tree)[0], wanted, rtol=1e-6)
    tx = optax.inject_hyperparams(oa.centered_clip, static_args=("num_iters",))(0.5)
    wanted, _ = once(oa.centered_clip(0.5), tree)
    chex.assert_trees_all_close(once(tx, tree)[0], wanted, rtol=1e-6)


def loss(params, x, y):
    return jnp.sum((x @ params["w"] - y) ** 2)


def test_with_process_and_microbatches():
    """Clip each example, take the median, let Adam step; and by micro-batches."""
    x = jax.random.normal(jax.random.key(0), (N, 3))
    y = jax.random.normal(jax.random.key(1), (N, 2))
    params = {"w": jnp.zeros((3, 2))}
    per_example = jax.vmap(jax.grad(loss), (None, 0, 0))
    clip = optax.clip_by_global_norm(1.0)
    each = lambda rows, _: jax.vmap(lambda g: clip.update(g, clip.init(g))[0])(rows)
    opt = aggregating.process(
        optax.stateless(each), oa.coordinate_median(), optax.sgd(1.0)
    )
    rows = per_example(params, x, y)
    updates, state = opt.update(rows, opt.init(params), params)
    wanted = jnp.median(each(rows, None)["w"], axis=0)
    np.testing.assert_allclose(updates["w"], -wanted, rtol=1e-6)
    assert int(state[1].aggregation_step) == 1
    concat = optax.microbatching.microbatch(
        per_example,
        argnums=(1, 2),
        microbatch_size=2,
        accumulator=optax.microbatching.AccumulationType.CONCAT,
    )
    by_parts, _ = opt.update(concat(params, x, y), opt.init(params), params)
    chex.assert_trees_all_close(by_parts, updates, rtol=1e-6)


def test_a_thousand_leaves():
    rng = np.random.default_rng(0)
    tree = [jnp.asarray(rng.normal(size=5), jnp.bfloat16) for _ in range(1000)]
    found, _ = once(oa.geometric_median(num_iters=30), tree)
    wanted = reference.geometric_median(matrix(tree), 1e-6, 30)
    np.testing.assert_allclose(flat(found), wanted, atol=0.02)


def test_complex_leaves():
    rng = np.random.default_rng(0)
    v = rng.normal(size=(5, 3)) + 1j * rng.normal(size=(5, 3))
    found, _ = once(oa.geometric_median(num_iters=30), jnp.asarray(v, jnp.complex64))
    as_real = np.concatenate([v.real, v.imag], axis=1)
    wanted = reference.geometric_median(as_real, 1e-6, 30)
    np.testing.assert_allclose(found, wanted[:3] + 1j * wanted[3:], rtol=1e-4)
    with pytest.raises(ValueError, match="no order"):
        once(oa.coordinate_median(), jnp.asarray(v, jnp.complex64))


def test_the_counter_saturates():
    tx = oa.coordinate_median()
    top = np.iinfo(np.int32).max
    state = tx.init(jnp.zeros(2))._replace(left_out=jnp.int32(top - 1))
    _, state = tx.update(jnp.full((3, 2), jnp.nan), state)
    assert int(state.left_out) == top


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: oa.trimmed_mean(-1), "trim must be an integer >= 0"),
        (lambda: once(oa.trimmed_mean(4), stacked()), "at least 9 elements, got 8"),
        (lambda: oa.geometric_median(nu=0.0), "nu must lie in"),
        (lambda: oa.geometric_median(num_iters=0), "num_iters must be an integer"),
        (lambda: once(oa.median_of_means(3), stacked()), "8 elements do not make 3"),
        (lambda: oa.centered_clip(-1.0), "tau must lie in"),
        (lambda: once(oa.krum(6), stacked()), "at least 9 elements, got 8"),
        (lambda: oa.krum(2, 0), "num_selected must be an integer"),
        (lambda: once(oa.flag_aggregator(9), stacked()), "at least 9 elements, got 8"),
        (
            lambda: oa.one_pass_location(oa.distances.l2(), 1.0, init="last"),
            "init must be",
        ),
        (
            lambda: once(
                oa.coordinate_median(), {"a": jnp.zeros((3, 2)), "b": jnp.zeros((4,))}
            ),
            r"\['b'\] has 4 elements, other leaves have 3",
        ),
        (
            lambda: oa.coordinate_median().update(
                {"a": jnp.zeros([])}, oa.coordinate_median().init({})
            ),
            r"\['a'\] of shape \(\) has no axis 0",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def summed_rows(tx, check_vma, varying):
    """Gradients of replicated parameters on eight devices, aggregated."""
    params = {"w": jnp.ones(3), "b": jnp.zeros([])}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)

    def local(params, row):
        loss = lambda p: jnp.sum((p["w"] * row[0] + p["b"]) ** 2)
        at = params
        if varying:
            at = jax.tree.map(lambda p: _mesh.vary(p, ("d",)), params)
        return tx.update(jax.grad(loss)(at), tx.init(params), params)[0]

    found = jax.jit(
        shard_map(
            local,
            mesh=devices(8),
            in_specs=(P(), P("d")),
            out_specs=P(),
            check_vma=check_vma,
        )
    )(params, x)
    each = jax.vmap(
        jax.grad(lambda p, r: jnp.sum((p["w"] * r + p["b"]) ** 2)), (None, 0)
    )
    return found, each(params, x)


NAMED = {
    "coordinate_median": oa.coordinate_median,
    "geometric_median": oa.geometric_median,
    "one_pass_location": functools.partial(
        oa.one_pass_location, oa.distances.l2(), 0.5
    ),
    "upgrad": oa.upgrad,
}


@pytest.mark.parametrize("name", NAMED)
def test_gradients_that_are_already_summed_are_refused(name):
    with pytest.raises(ValueError, match=r"\['b'\] does not vary over 'd'.*pcast"):
        summed_rows(NAMED[name](axis_name="d"), check_vma=True, varying=False)


@pytest.mark.parametrize("way", ["pcast", "unchecked"])
def test_gradients_of_each_device_are_taken(way):
    for make in NAMED.values():
        pcast = way == "pcast"
        found, rows = summed_rows(make(axis_name="d"), pcast, pcast)
        wanted, _ = once(make(), rows)
        chex.assert_trees_all_close(found, wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", NAMED)
def test_gradients_must_have_the_shapes_of_the_parameters(name):
    params = {"w": jnp.zeros((8, 3)), "b": jnp.zeros(8)}
    alone = jax.tree.map(jnp.ones_like, params)
    tx = NAMED[name]()
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"\['b'\] has shape \(8,\).*jax.vmap"):
        tx.update(alone, state, params)
    with pytest.raises(ValueError, match=r"updates has 1 leaves and params 2"):
        tx.update({"w": jnp.ones((2, 8, 3))}, state, params)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x, x]), alone)
    chex.assert_trees_all_close(tx.update(stacked, state, params)[0]["w"], alone["w"])
    partly = {"w": stacked["w"], "b": None}
    assert tx.update(partly, state, params)[0]["b"] is None


def test_masked_subtrees_match_the_parameters():
    params = {"kept": jnp.zeros(2), "rest": {"a": jnp.zeros(3), "b": jnp.zeros(())}}
    rows = jax.tree.map(lambda x: jnp.ones((4, *x.shape)), params)
    tx = optax.masked(oa.geometric_median(), {"kept": True, "rest": False})
    found, _ = tx.update(rows, tx.init(params), params)
    np.testing.assert_allclose(found["kept"], 1)
    tx = oa.geometric_median()
    masked = {"kept": rows["kept"], "rest": optax.MaskedNode()}
    found, _ = tx.update(masked, tx.init(masked), params)
    np.testing.assert_allclose(found["kept"], 1)


OF_ROWS = [
    oa.coordinate_median,
    oa.trimmed_mean,
    oa.geometric_median,
    oa.median_of_means,
    oa.centered_clip,
    oa.krum,
    oa.flag_aggregator,
    oa.one_pass_location,
    oa.mgda,
    oa.upgrad,
    oa.cagrad,
    oa.pcgrad,
]


@pytest.mark.parametrize("factory", OF_ROWS, ids=lambda f: f.__name__)
def test_shared_options_stand_in_signatures_and_docstrings(factory):
    parameters = inspect.signature(factory).parameters
    assert [*parameters][-2:] == ["per_elt_axis", "axis_name"]
    assert parameters["per_elt_axis"].default is parameters["axis_name"].default is None
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    sections = re.findall(r"(?m)^(\w+):$", factory.__doc__)
    assert sections == ["Args", "Returns", "Raises", "Example", "References"]
    args = factory.__doc__.split("Args:\n")[1].split("\n\nReturns:")[0]
    assert re.findall(r"(?m)^  (\w+): [A-Z`]", args) == [*parameters]


def test_options_that_are_not_there_are_refused():
    with pytest.raises(TypeError, match=r"krum\(\) got an unexpected .* 'axis'"):
        oa.krum(1, axis=0)
    bound = "clip_by_coordinate_quantile"
    assert inspect.signature(getattr(oa, bound)).parameters["scope"].default == "leaf"
