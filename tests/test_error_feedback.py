"""Error feedback over several workers, and the compressors of what they send."""

import functools
import inspect
import re

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_optimizers_c as ref
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_avg as oa
from optax_avg.optimizers import (
    ErrorFeedbackState,
    bytes_sent,
    error_feedback,
    identity,
    low_rank,
    random_k,
    sign,
    top_k,
)

WORKERS, STEPS = 8, 4
SHAPES = {"b": (5,), "c": (), "w": (6, 4)}
ETA = {"ef": None, "ef21": None, "econtrol": 0.25}
SPECS = ErrorFeedbackState(P(), P("d"), P("d"), P(), P(), P("d"))
each_variant = pytest.mark.parametrize("variant", ETA)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def key_of(seed, step, leaf):
    """The key of a leaf in a step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), leaf)


def chosen_at_random(k):
    """Random places, drawn by JAX; all else is NumPy's."""

    def compress(step, leaf, v):
        kept = jax.random.uniform(key_of(3, step, leaf), (v.size,))
        out = np.zeros_like(v)
        places = np.argsort(-np.asarray(kept))[: min(k, v.size)]
        out.flat[places] = v.flat[places]
        return out

    return compress


def of_low_rank(step, leaf, v):
    if v.ndim < 2:
        return v.copy()
    q = jax.random.normal(key_of(5, step, leaf), (v.shape[1], 2), v.dtype)
    return ref.projected(np.asarray(q))(v)


def fixed(compress):
    return lambda step, leaf, v: compress(v)


def largest(share):
    return lambda step, leaf, v: ref.top_k(max(1, round(share * v.size)))(v)


COMPRESSORS = {
    "identity": (identity(), fixed(ref.identity)),
    "top_k": (top_k(2), fixed(ref.top_k(2))),
    "top_share": (top_k(0.25), largest(0.25)),
    "random_k": (random_k(2, key=3), chosen_at_random(2)),
    "sign": (sign(), fixed(ref.sign)),
    "low_rank": (low_rank(2, key=5), of_low_rank),
}


def gradients(seed=0, workers=WORKERS, steps=STEPS):
    """One tree per step, with the workers along the first axis."""
    rng = np.random.default_rng(seed)
    return [
        {name: rng.normal(size=(workers, *shape)) for name, shape in SHAPES.items()}
        for _ in range(steps)
    ]


def by_reference(steps, compress, variant, eta=0.0):
    """One tree per step."""
    found = {
        name: ref.error_feedback(
            [list(tree[name]) for tree in steps],
            lambda t, v, i=i: compress(t, i, v),
            variant,
            eta,
        )
        for i, name in enumerate(SHAPES)
    }
    return [{name: found[name][t] for name in SHAPES} for t in range(len(steps))]


def on_devices(tx, check_vma=True):
    """``init`` and ``update`` with one worker on each of eight devices."""
    mesh = jax.make_mesh((WORKERS,), ("d",), axis_types=(AxisType.Auto,))
    place = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)

    def update(rows, state):
        return tx.update(jax.tree.map(lambda x: x[0], rows), state)

    init = place(tx.init, in_specs=P(), out_specs=SPECS)
    step = place(update, in_specs=(P("d"), SPECS), out_specs=(P(), SPECS))
    return jax.jit(init), jax.jit(step)


def simulated(tx):
    """The same with all workers on one device."""
    init = lambda params, workers: jax.vmap(lambda _: tx.init(params), axis_name="d")(
        jnp.arange(workers)
    )
    return init, jax.jit(jax.vmap(tx.update, axis_name="d"))


def like_one(tree):
    return jax.tree.map(lambda x: jnp.zeros_like(x[0]), tree)


def run(init, step, trees):
    state, results = init(like_one(trees[0])), []
    for tree in trees:
        result, state = step(tree, state)
        results.append(result)
    return results, state


@pytest.mark.parametrize("name", COMPRESSORS)
@each_variant
def test_reference(name, variant, x64):
    compressor, compress = COMPRESSORS[name]
    tx = error_feedback(compressor, variant, eta=ETA[variant], axis_name="d")
    trees = gradients()
    found, _ = run(*on_devices(tx), trees)
    wanted = by_reference(trees, compress, variant, ETA[variant])
    for a, b in zip(found, wanted, strict=True):
        chex.assert_trees_all_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_types_of_shard_map_change_nothing(name):
    tx = error_feedback(COMPRESSORS[name][0], "econtrol", eta=0.25, axis_name="d")
    trees = jax.tree.map(np.float32, gradients(1))
    with_types, state = run(*on_devices(tx), trees)
    without, other = run(*on_devices(tx, check_vma=False), trees)
    chex.assert_trees_all_close(with_types, without, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, other)
    assert state.compression_error["w"].shape == (WORKERS, *SHAPES["w"])
    assert state.mean_estimate["w"].shape == SHAPES["w"]
    assert state.estimate["c"].shape == (WORKERS,)


@each_variant
def test_without_compression_it_is_the_mean(variant):
    tx = error_feedback(identity(), variant, eta=ETA[variant], axis_name="d")
    init, step = simulated(tx)
    state = init(like_one(gradients()[0]), WORKERS)
    for tree in gradients(2):
        found, state = step(tree, state)
        wanted = jax.tree.map(lambda x: np.mean(x, axis=0), tree)
        for i in range(WORKERS):
            row = jax.tree.map(lambda x, i=i: x[i], found)
            chex.assert_trees_all_close(row, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", COMPRESSORS)
@each_variant
def test_one_worker(name, variant, x64):
    compressor, compress = COMPRESSORS[name]
    tx = error_feedback(compressor, variant, eta=ETA[variant])
    trees = gradients(3, workers=1)
    alone = [jax.tree.map(lambda x: jnp.asarray(x[0]), tree) for tree in trees]
    state, update = tx.init(alone[0]), jax.jit(tx.update)
    wanted = by_reference(trees, compress, variant, ETA[variant])
    for g, result in zip(alone, wanted, strict=True):
        found, state = update(g, state)
        chex.assert_trees_all_close(found, result, rtol=1e-9, atol=1e-12)
    assert state.mean_estimate == ()
    assert int(state.feedback_step) == STEPS


def test_the_classic_algorithm_has_the_learning_rate_inside(x64):
    """``p = lr g + e``, ``x -= C(p)``, ``e = p - C(p)``: the link stands behind it."""
    rates = [0.5, 0.25, 0.125, 1.0]
    schedule = lambda step: jnp.asarray(rates)[step]
    tx = optax.chain(optax.sgd(schedule), error_feedback(top_k(1), "ef"))
    g = jnp.asarray(np.random.default_rng(4).normal(size=(4, 5)))
    state, e = tx.init(g[0]), np.zeros(5)
    for t in range(4):
        updates, state = tx.update(g[t], state)
        p = rates[t] * np.asarray(g[t]) + e
        c = ref.top_k(1)(p)
        e = p - c
        np.testing.assert_allclose(updates, -c, rtol=1e-12)


@pytest.mark.parametrize("make", [top_k(2), sign()], ids=["top_k", "sign"])
def test_econtrol_without_feedback_is_ef21(make):
    trees = jax.tree.map(np.float32, gradients(5))
    pair = [
        run(
            lambda params, tx=tx: simulated(tx)[0](params, WORKERS),
            simulated(tx)[1],
            trees,
        )[0]
        for tx in (
            error_feedback(make, "ef21", axis_name="d"),
            error_feedback(make, "econtrol", eta=0.0, axis_name="d"),
        )
    ]
    chex.assert_trees_all_equal(*pair)


def test_eta_follows_a_schedule(x64):
    rates = [0.0, 0.5, 1.0, 0.25]
    scheduled = error_feedback(
        top_k(1), "econtrol", eta=lambda step: jnp.asarray(rates)[step]
    )
    g = np.random.default_rng(6).normal(size=(4, 5))
    state = scheduled.init(jnp.zeros(5))
    e, h = np.zeros(5), np.zeros(5)
    for t in range(4):
        found, state = scheduled.update(jnp.asarray(g[t]), state)
        c = ref.top_k(1)(rates[t] * e + g[t] - h)
        e, h = e + g[t] - h - c, h + c
        np.testing.assert_allclose(found, h, rtol=1e-12, atol=1e-14)


A = np.array([[-3.0, 2.0, 2.0], [2.0, -3.0, 2.0], [2.0, 2.0, -3.0]])


def three_workers(x):
    """Gradients of ``<a_i, x>^2 + |x|^2/4``."""
    return 2 * (A @ x)[:, None] * A + x[None] / 2


def test_the_example_in_which_plain_compression_diverges():
    """Beznosikov et al., "On Biased Compression for Distributed Learning", 2020,
    2002.12410: from (t, t, t), top-1 of each worker leads to (1 + 11 lr/6) t.
    """
    lr = 0.02
    x = np.full(3, 2.0)
    for variant in ETA:
        tx = error_feedback(top_k(1), variant, eta=ETA[variant], axis_name="d")
        init, step = simulated(tx)
        state = init(jnp.zeros(3), 3)
        found, _ = step(three_workers(x), state)
        np.testing.assert_allclose(x - lr * found[0], (1 + 11 * lr / 6) * x, rtol=1e-6)


@each_variant
def test_feedback_converges_in_this_example(variant):
    tx = error_feedback(top_k(1), variant, eta=ETA[variant], axis_name="d")
    init, step = simulated(tx)
    state, x = init(jnp.zeros(3), 3), np.full(3, 2.0)
    for _ in range(1500):
        found, state = step(three_workers(x), state)
        x = x - 0.01 * np.asarray(found[0])
    assert np.linalg.norm(x) < 1e-3


# Some processors take numbers below the smallest normal one, and such means, for 0.
vectors = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=12).map(
    lambda v: np.where(np.abs(v) < 1e-30, 0, v).astype(np.float32)
)


def decoded(compressor, v, key=()):
    message = compressor.compress(v, key)
    return np.asarray(compressor.total(tuple(x[None] for x in message), v, key))


def squares(v):
    return float(np.sum(np.square(v, dtype=np.float64)))


@hypothesis.given(vectors, st.integers(1, 12))
def test_contraction_of_the_largest(v, k):
    k = min(k, v.size)
    left = v - decoded(top_k(k), jnp.asarray(v))
    assert squares(left) <= (1 - k / v.size) * squares(v) * (1 + 1e-6)
    assert np.count_nonzero(v - left) <= k


@hypothesis.given(vectors)
def test_contraction_of_signs(v):
    """The distance is known: ``|v|^2 - |v|_1^2/d``."""
    left = squares(v - decoded(sign(), jnp.asarray(v)))
    wanted = squares(v) - np.sum(np.abs(v, dtype=np.float64)) ** 2 / v.size
    np.testing.assert_allclose(left, wanted, rtol=1e-4, atol=1e-5 * squares(v))


@hypothesis.given(st.integers(0, 99), st.integers(1, 3))
def test_contraction_of_low_rank(seed, rank):
    m = np.random.default_rng(seed).normal(size=(7, 2, 4)).astype(np.float32)
    near = decoded(low_rank(rank), jnp.asarray(m), jax.random.key(seed))
    # The best approximation is the truncated singular value decomposition.
    best = np.sum(np.linalg.svd(m.reshape(7, 8), compute_uv=False)[rank:] ** 2)
    assert (1 - 1e-4) * best <= squares(m - near) < squares(m)
    assert np.linalg.matrix_rank(near.reshape(7, 8), tol=1e-3) <= rank


def test_contraction_of_random_places():
    v = jnp.asarray(np.random.default_rng(7).normal(size=10), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 2000)
    left = jax.vmap(lambda key: v - total_of(random_k(3), v, key))(keys)
    found = float(jnp.mean(jnp.sum(left**2, axis=1)) / jnp.sum(v**2))
    assert abs(found - 0.7) < 0.02
    assert np.all(np.sum(np.asarray(left) == 0, axis=1) == 3)


def total_of(compressor, v, key):
    message = compressor.compress(v, key)
    return compressor.total(tuple(x[None] for x in message), v, key)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_zeros_stay_zeros(name):
    v = jnp.zeros((6, 4))
    assert not np.any(total_of(COMPRESSORS[name][0], v, jax.random.key(0)))


def test_matrices_of_low_rank_are_sent_exactly():
    rng = np.random.default_rng(8)
    m = (rng.normal(size=(9, 2)) @ rng.normal(size=(2, 7))).astype(np.float32)
    found = decoded(low_rank(2), jnp.asarray(m), jax.random.key(1))
    np.testing.assert_allclose(found, m, rtol=1e-4, atol=1e-5)


def test_places_change_from_step_to_step_and_leaf_to_leaf():
    tx = error_feedback(random_k(8, key=0), "ef")
    tree = {"a": jnp.ones(64), "b": jnp.ones(64)}
    state, seen = tx.init(tree), []
    for _ in range(2):
        sent, state = tx.update(tree, state)
        seen += [frozenset(np.flatnonzero(leaf)) for leaf in sent.values()]
    assert len(set(seen)) == 4


WIDTHS = {"f32": 4, "s32": 4, "u8": 1, "u32": 4, "pred": 1}


def travelling(text, kind):
    """Bytes of the results of all collectives of a kind in a compiled program."""
    total = 0
    for result in re.findall(rf"= (\S.*?) {kind}(?:-start)?\(", text):
        for name, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
            total += WIDTHS[name] * int(
                np.prod([int(n) for n in shape.split(",") if n])
            )
    return total


@pytest.mark.parametrize("name", COMPRESSORS)
def test_what_travels_is_what_is_counted(name):
    """Every worker gets the messages of all eight, or their mean."""
    compressor = COMPRESSORS[name][0]
    init, step = on_devices(error_feedback(compressor, axis_name="d"))
    tree = jax.tree.map(np.float32, gradients()[0])
    text = step.lower(tree, init(like_one(tree))).compile().as_text()
    gathered = travelling(text, "all-gather") / WORKERS
    reduced = travelling(text, "all-reduce")
    assert gathered + reduced == bytes_sent(compressor, like_one(tree))
    whole = {"identity": True, "random_k": True}.get(name, False)
    assert (gathered == 0) == whole


@pytest.mark.parametrize(
    ("compressor", "wanted"),
    [
        (identity(), 4 * (5 + 1 + 24)),
        (top_k(2), 8 * (2 + 1 + 2)),
        (top_k(0.25), 8 * (1 + 1 + 6)),
        (random_k(2), 4 * (2 + 1 + 2)),
        (sign(), (4 + 1) + (4 + 1) + (4 + 3)),
        (low_rank(2), 4 * (5 + 1 + 2 * (6 + 4))),
    ],
    ids=COMPRESSORS,
)
def test_bytes(compressor, wanted):
    tree = {name: jnp.zeros(shape, jnp.bfloat16) for name, shape in SHAPES.items()}
    shapes = jax.eval_shape(lambda: tree)
    assert bytes_sent(compressor, tree | {"count": jnp.array(3)}) == wanted
    assert bytes_sent(compressor, shapes) == wanted


@each_variant
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_worker_whose_gradient_is_not_finite_waits(variant, check_vma):
    tx = error_feedback(top_k(2), variant, eta=ETA[variant], axis_name="d")
    init, step = on_devices(tx, check_vma)
    first, second = jax.tree.map(np.float32, gradients(9, steps=2))
    _, before = step(first, init(like_one(first)))
    hurt = jax.tree.map(np.copy, second)
    hurt["b"][5, 1] = np.nan
    found, after = step(hurt, before)
    _, sound = step(second, before)
    chex.assert_tree_all_finite((found, after))
    for name in ("compression_error", "estimate"):
        old, new, other = (getattr(s, name) for s in (before, after, sound))
        row = lambda tree: jax.tree.map(lambda x: x[5], tree)
        rest = lambda tree: jax.tree.map(lambda x: np.delete(x, 5, axis=0), tree)
        chex.assert_trees_all_equal(row(new), row(old))
        chex.assert_trees_all_equal(rest(new), rest(other))
    assert after.left_out.tolist() == [0, 0, 0, 0, 0, 1, 0, 0]


@each_variant
@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("size", [1e38, 3e38])
def test_a_gradient_that_is_finite_but_too_large_does_no_lasting_harm(
    name, variant, size
):
    tx = error_feedback(COMPRESSORS[name][0], variant, eta=ETA[variant])
    g = jnp.ones((6, 5))
    state, update = tx.init(g), jax.jit(tx.update)
    for sign_of in (1, -1, 1, -1):
        found, state = update(sign_of * size * g, state)
        chex.assert_tree_all_finite((found, state.compression_error, state.estimate))
    assert int(state.left_out) == 4
    found, state = update(g, state)
    assert int(state.left_out) == 4
    assert np.any(np.asarray(found) != 0)


def test_tiny_and_large_gradients_are_not_left_out():
    for name, (compressor, _) in COMPRESSORS.items():
        for size in (1e-30, 1e30):
            tx = error_feedback(compressor, "ef")
            g = size * jnp.outer(jnp.arange(1.0, 7.0), jnp.arange(1.0, 6.0))
            found, state = tx.update(g, tx.init(g))
            assert int(state.left_out) == 0, name
            left = state.compression_error / size
            sent = found / size
            np.testing.assert_allclose(sent + left, g / size, rtol=1e-5)
            assert squares(left) < squares(np.asarray(g) / size)


@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        ((3, 3, 64, 128), (576, 128)),  # a kernel of Flax
        ((128, 64, 3, 3), (128, 576)),  # a kernel of Equinox
        ((12, 64, 32), (768, 32)),  # layers that lax.scan goes through
        ((7, 2, 4), (7, 8)),
    ],
)
def test_rows_and_columns_of_kernels(shape, sides):
    v = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert bytes_sent(low_rank(2), v) == 4 * 2 * sum(sides)


def test_kernels_of_low_rank_are_sent_exactly():
    rng = np.random.default_rng(13)
    m = rng.normal(size=(72, 2)) @ rng.normal(size=(2, 16))
    kernel = jnp.asarray(m.reshape(3, 3, 8, 16), jnp.float32)
    found = decoded(low_rank(2), kernel, jax.random.key(1))
    np.testing.assert_allclose(found, kernel, rtol=1e-4, atol=1e-4)


def test_memories_lie_as_the_parameters_do():
    """Workers along one axis of the mesh, parts of the parameters along the other."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    tx = error_feedback(top_k(1), "ef21", axis_name="data")
    rows, parts, both = P("data", "model"), P("model"), P(("data", "model"))
    specs = ErrorFeedbackState(P(), rows, rows, parts, P(), both)
    place = functools.partial(jax.shard_map, mesh=mesh)
    init = jax.jit(place(tx.init, in_specs=parts, out_specs=specs))
    update = jax.jit(
        place(
            lambda g, state: tx.update(g[0], state),
            in_specs=(rows, specs),
            out_specs=(parts, specs),
        )
    )
    g = np.random.default_rng(10).normal(size=(2, 8)).astype(np.float32)
    found, state = update(g, init(jnp.zeros(8)))
    assert state.estimate.shape == (2, 8)
    assert {s.data.shape for s in state.estimate.addressable_shards} == {(1, 2)}
    # Each part of two elements sends the larger one.
    pairs = g.reshape(2, 4, 2)
    kept = np.where(np.abs(pairs) == np.abs(pairs).max(2, keepdims=True), pairs, 0)
    np.testing.assert_allclose(found, kept.reshape(2, 8).mean(axis=0), rtol=1e-6)


def test_flat_parameters_are_one_vector():
    """The largest elements of all leaves, as in the papers."""
    tx = optax.flatten(error_feedback(top_k(1), "ef"))
    tree = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([[3.0]])}
    found, _ = tx.update(tree, tx.init(tree), tree)
    chex.assert_trees_all_equal(found, {"a": jnp.zeros(2), "b": jnp.array([[3.0]])})


def test_before_adam_it_is_the_compression_of_microadam():
    """Every entry is sent in the end, and training follows Adam's."""
    target = jnp.asarray(np.random.default_rng(11).normal(size=20), jnp.float32)
    tx = optax.chain(error_feedback(top_k(0.1), "ef"), optax.adam(0.05))
    x = jnp.zeros(20)
    state, update = tx.init(x), jax.jit(tx.update)
    for _ in range(600):
        updates, state = update(x - target, state, x)
        x = optax.apply_updates(x, updates)
    np.testing.assert_allclose(x, target, atol=0.1)


def test_summed_gradients_are_refused():
    tx = error_feedback(top_k(1), axis_name="d")
    mesh = jax.make_mesh((WORKERS,), ("d",), axis_types=(AxisType.Auto,))

    def local(params, row):
        g = jax.grad(lambda p: jnp.sum((p["b"] * row[0]) ** 2))(params)
        return tx.update(g, tx.init(params))[0]

    step = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
    with pytest.raises(ValueError, match=r"\['b'\] does not vary over 'd'.*pcast"):
        jax.jit(step)({"b": jnp.ones(2)}, jnp.ones((WORKERS, 2)))


def test_memories_of_several_workers_on_a_device_are_refused():
    tx = error_feedback(top_k(1), axis_name="d")
    state = simulated(tx)[0](jnp.zeros(2), 3)
    with pytest.raises(ValueError, match="must number one worker; call init inside"):
        jax.vmap(tx.update, in_axes=(0, None), axis_name="d")(jnp.ones((3, 2)), state)


@each_variant
@pytest.mark.parametrize("workers", [1, 3])
def test_memories_of_workers_are_not_broadcast(variant, workers):
    tx = error_feedback(top_k(1), variant, eta=ETA[variant], axis_name="d")
    state = simulated(tx)[0](jnp.zeros(2), workers)
    rows = lambda tree: jax.tree.map(lambda x: x[:, 0], tree)  # as shard_map has it
    alone = error_feedback(top_k(1), variant, eta=ETA[variant])
    state = alone.init(jnp.zeros(2))._replace(
        compression_error=rows(state.compression_error) if variant != "ef21" else (),
        estimate=rows(state.estimate) if variant != "ef" else (),
    )
    with pytest.raises(ValueError, match=r"shape \(2,\), and its memory.*init anew"):
        alone.update(jnp.ones(2), state)


@pytest.mark.parametrize("call", ["init", "update"])
def test_axes_must_be_mapped(call):
    tx = error_feedback(top_k(1), axis_name="d")
    alone = error_feedback(top_k(1)).init(jnp.zeros(2))
    with pytest.raises(ValueError, match="axis_name='d' is not mapped"):
        tx.init(jnp.zeros(2)) if call == "init" else tx.update(jnp.zeros(2), alone)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: error_feedback(top_k), TypeError, r"needs a compressor.*got top_k"),
        (lambda: error_feedback(0.1), TypeError, "needs a compressor.*got float"),
        (lambda: error_feedback(sign(), "ef22"), ValueError, "variant must be"),
        (
            lambda: error_feedback(sign(), eta=0.1),
            ValueError,
            "eta belongs to EControl",
        ),
        (lambda: error_feedback(sign(), "econtrol"), ValueError, "eta belongs to"),
        (lambda: error_feedback(sign(), "econtrol", eta=2.0), ValueError, "eta must"),
        (lambda: top_k(0), ValueError, "k must be an integer >= 1.*or a share"),
        (lambda: top_k(1.5), ValueError, r"k must lie in \(0, 1\]"),
        (lambda: random_k(True), ValueError, "k must be an integer"),
        (lambda: random_k(2, key="a"), ValueError, "key must be a PRNG key"),
        (lambda: low_rank(0), ValueError, "rank must be an integer >= 1"),
    ],
)
def test_wrong_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_complex_parameters_are_refused():
    with pytest.raises(ValueError, match="error_feedback takes real parameters"):
        error_feedback(sign()).init(jnp.zeros(2, jnp.complex64))


def test_they_stand_in_the_family():
    for name in ("bsam", "error_feedback", "top_k", "random_k", "sign", "low_rank"):
        assert inspect.isfunction(getattr(oa.optimizers, name))


def test_pmap_is_vmap():
    tx = error_feedback(top_k(2), "econtrol", eta=0.25, axis_name="d")
    rows = jax.tree.map(np.float32, gradients(12)[0])
    params = like_one(rows)
    both = []
    for mapped in (jax.pmap, jax.vmap):
        state = mapped(lambda _: tx.init(params), axis_name="d")(jnp.arange(WORKERS))
        both.append(mapped(tx.update, axis_name="d")(rows, state))
    chex.assert_trees_all_close(*both, rtol=1e-5, atol=1e-6)
