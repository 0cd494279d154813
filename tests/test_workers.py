"""Workers with parameters of their own, and the rounds in which they meet."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_workers as ref
from cases import params_of
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_collectives import collectives

import optax_avg as oa
from optax_avg.workers import FedAUState, Participation, fedau, resize

WORKERS, STEPS, EVERY, LR = 8, 12, 3, 0.3
LEAVES = [slice(0, 4), slice(4, 10)]  # of the flat vectors of the references
INNER = (0.05, 0.9, 0.95, 1e-8, 0.1)
OUTER = optax.sgd(0.7, momentum=0.9, nesterov=True)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def tree_of(x):
    """A flat vector, or an array of them, as parameters."""
    x = jnp.asarray(x)
    b, w = (x[..., leaf] for leaf in LEAVES)
    return {"b": b, "w": w.reshape(*w.shape[:-1], 3, 2)}


def flat(tree):
    w = np.asarray(tree["w"])
    return np.concatenate([tree["b"], w.reshape(*w.shape[:-2], 6)], axis=-1)


def problem(workers=WORKERS, steps=STEPS, seed=0):
    """``x0``, ``c`` and ``h`` of the references."""
    rng = np.random.default_rng(seed)
    c = rng.normal(size=(workers, 1, 10)) + 0.3 * rng.normal(size=(workers, steps, 10))
    return rng.normal(size=10), c, np.linspace(0.5, 1.5, 10)


def worker_of(tx, h):
    """All steps of one worker."""
    h = tree_of(h)

    def run(params, state, points, takes_part):
        def body(carry, inputs):
            params, state = carry
            point, present = inputs
            grads = jax.tree.map(lambda x, c, k: k * (x - c), params, point, h)
            updates, state = tx.update(grads, state, params, participates=present)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        (_, state), seen = jax.lax.scan(body, (params, state), (points, takes_part))
        return seen, state

    return run


def placed(run, how):
    """One worker's function for all, with the workers along the first axis."""
    if how in ("vmap", "pmap"):
        return getattr(jax, how)(run, axis_name="d")

    def local(*args):
        args = jax.tree.map(lambda x: x[0], args)
        return jax.tree.map(lambda x: x[None], run(*args))

    mesh = jax.make_mesh((WORKERS,), ("d",), axis_types=(AxisType.Auto,))
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=P("d"),
        out_specs=P("d"),
        check_vma=how == "shard_map",
    )


def train(tx, x0, c, h, how="vmap", takes_part=None, state=None):
    """Parameters of all workers after each step, and their last states."""
    workers, steps = c.shape[:2]
    params = tree_of(np.repeat(x0[None], workers, axis=0) if x0.ndim == 1 else x0)
    if state is None:
        state = jax.vmap(tx.init)(params)
    if takes_part is None:
        takes_part = np.ones((workers, steps), bool)
    run = placed(worker_of(tx, h), how)
    run = run if how == "pmap" else jax.jit(run)
    seen, state = run(params, state, tree_of(c), jnp.asarray(takes_part))
    return flat(seen), state


def local_sgd(**options):
    return optax.chain(optax.sgd(LR), oa.sync_params("d", EVERY, **options))


WEIGHTS = [3, 1, 0, 2, 5, 1, 1, 4]
PRESENT = np.random.default_rng(5).uniform(size=(WORKERS, STEPS // EVERY)) < 0.4
METHODS = {
    "local_sgd": (
        local_sgd(),
        lambda x0, c, h: ref.local_sgd(x0, c, h, LR, EVERY),
    ),
    "fedavg": (
        local_sgd(weights=WEIGHTS),
        lambda x0, c, h: ref.local_sgd(x0, c, h, LR, EVERY, WEIGHTS),
    ),
    "variance_corrected": (
        local_sgd(weights=WEIGHTS, correct_variance=True),
        lambda x0, c, h: ref.local_sgd(x0, c, h, LR, EVERY, WEIGHTS, LEAVES),
    ),
    "fedau": (
        local_sgd(weights=fedau(cutoff=3)),
        lambda x0, c, h: ref.fedau(x0, c, h, LR, EVERY, PRESENT, cutoff=3),
    ),
    "diloco": (
        optax.chain(
            optax.adamw(*INNER[:4], weight_decay=INNER[4]),
            oa.sync_params("d", EVERY, outer=OUTER),
        ),
        lambda x0, c, h: ref.DiLoCo(x0, h, INNER, EVERY, WORKERS).run(c),
    ),
    "median": (
        local_sgd(mean=oa.coordinate_median(axis_name="d")),
        lambda x0, c, h: ref.median(x0, c, h, LR, EVERY),
    ),
    "gossip": (
        optax.chain(optax.sgd(LR), oa.gossip_params("d", 2, 0.25)),
        lambda x0, c, h: ref.gossip(x0, c, h, LR, 2, 0.25),
    ),
    "gossip_variance_corrected": (
        optax.chain(optax.sgd(LR), oa.gossip_params("d", EVERY, correct_variance=True)),
        lambda x0, c, h: ref.gossip(x0, c, h, LR, EVERY, 1 / 3, LEAVES),
    ),
    "momentum_averaged": (
        optax.chain(
            oa.sync_state(optax.sgd(LR, momentum=0.8), "d", EVERY),
            oa.sync_params("d", EVERY),
        ),
        lambda x0, c, h: ref.momentum(x0, c, h, LR, 0.8, EVERY, "mean"),
    ),
    "momentum_reset": (
        optax.chain(
            oa.sync_state(optax.sgd(LR, momentum=0.8), "d", EVERY, "reset"),
            oa.sync_params("d", EVERY),
        ),
        lambda x0, c, h: ref.momentum(x0, c, h, LR, 0.8, EVERY, "reset"),
    ),
}
PLACES = [
    *((name, "shard_map") for name in METHODS),
    *((name, "unchecked") for name in ("diloco", "median", "gossip")),
    *((name, "pmap") for name in ("diloco", "fedau", "gossip")),
]


@pytest.mark.parametrize(("name", "how"), PLACES)
def test_reference(name, how, x64):
    tx, reference = METHODS[name]
    x0, c, h = problem()
    present = np.repeat(PRESENT, EVERY, axis=1) if name == "fedau" else None
    found, _ = train(tx, x0, c, h, how, present)
    wanted = reference(x0, c, h)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    # The workers have really been apart.
    assert np.std(wanted[:, 1], axis=0).max() > 0.01


@pytest.mark.parametrize("name", METHODS)
def test_vmap_simulates_workers(name):
    tx, reference = METHODS[name]
    x0, c, h = problem(seed=1)
    present = np.repeat(PRESENT, EVERY, axis=1) if name == "fedau" else None
    found, _ = train(tx, x0, c, h, "vmap", present)
    np.testing.assert_allclose(found, reference(x0, c, h), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("cutoff", [1, 2, 50])
def test_weights_of_fedau(cutoff):
    rows = np.random.default_rng(0).uniform(size=(4, 60)) < [[0], [0.1], [0.6], [1]]
    weights = fedau(cutoff)
    for row in rows:
        memory, found = weights.init(), []
        for present in row:
            weight, memory = weights.weigh(memory, present)
            found.append(float(weight))
        np.testing.assert_allclose(found, ref.fedau_weights(row, cutoff), rtol=1e-6)


def test_known_chances_of_taking_part_are_weights_too():
    """Workers of chance 1/2 and 1/4: one that comes counts 2 and 4 times."""
    chance = Participation(
        lambda: (), lambda memory, present: (jnp.where(present, 4.0, 0), memory)
    )
    tx = oa.sync_params("d", 1, weights=chance)
    x = jnp.zeros(4)
    update = jax.vmap(
        lambda u, s, x, p: tx.update(u, s, x, participates=p), axis_name="d"
    )
    present = jnp.array([True, False, True, False])
    updates, _ = update(
        jnp.array([1.0, 2.0, 3.0, 4.0]), jax.vmap(tx.init)(x), x, present
    )
    assert updates.tolist() == [4.0] * 4


@pytest.mark.parametrize("name", ["local_sgd", "diloco", "median"])
def test_workers_agree_after_each_round(name):
    x0, c, h = problem()
    found, state = train(METHODS[name][0], x0, c, h)
    for t in range(STEPS):
        spread = np.ptp(found[:, t], axis=0)
        assert (spread.max() < 1e-6) == ((t + 1) % EVERY == 0)
    if name != "local_sgd":
        anchor = flat(state[1].anchor)
        np.testing.assert_array_equal(anchor, np.repeat(anchor[:1], WORKERS, axis=0))
        np.testing.assert_allclose(found[:, -1], anchor, rtol=1e-6, atol=1e-7)


def test_every_step_of_sgd_is_data_parallel_sgd():
    x0, c, h = problem()
    tx = optax.chain(optax.sgd(LR), oa.sync_params("d", 1))
    found, _ = train(tx, x0, c, h)
    wanted = ref.local_sgd(x0, c.mean(axis=0, keepdims=True), h, LR, STEPS + 1)
    wanted = np.repeat(wanted, WORKERS, axis=0)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_one_worker_with_plain_outer_steps_is_lookahead():
    x0, c, h = problem(workers=1)
    sync = oa.sync_params(None, EVERY, outer=optax.sgd(0.5))
    found, _ = train(optax.chain(optax.sgd(LR), sync), x0, c, h)
    wanted, _ = train(optax.chain(optax.sgd(LR), oa.lookahead(EVERY, 0.5)), x0, c, h)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_one_worker_alone_is_left_alone():
    x0, c, h = problem(workers=1)
    wanted = ref.local_sgd(x0, c, h, LR, STEPS + 1)
    for sync in (oa.sync_params("d", 2), oa.gossip_params("d"), oa.gossip_params(None)):
        found, _ = train(optax.chain(optax.sgd(LR), sync), x0, c, h)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


# What is not finite.


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_worker_whose_last_step_is_not_finite_comes_to_the_others(value):
    x0, c, h = problem()
    broken = c.copy()
    broken[2, EVERY - 1] = value
    found, state = train(local_sgd(), x0, broken, h)
    assert np.isfinite(found).all()
    others = [i for i in range(WORKERS) if i != 2]
    wanted = ref.local_sgd(x0, c[others, :EVERY], h, LR, EVERY)
    np.testing.assert_allclose(found[2, EVERY - 1], wanted[0, -1], rtol=1e-4)
    assert state[1].left_out.tolist() == [1] * WORKERS


@pytest.mark.parametrize("name", ["local_sgd", "median"])
def test_a_worker_that_has_become_nan_stays_out(name):
    """An update is added and cannot lead back from NaN."""
    x0, c, h = problem()
    broken = c.copy()
    broken[2, 1] = np.nan
    found, state = train(METHODS[name][0], x0, broken, h)
    others = [i for i in range(WORKERS) if i != 2]
    assert np.isnan(found[2, 1:]).all()
    reference = ref.local_sgd if name == "local_sgd" else ref.median
    wanted = reference(x0, c[others], h, LR, EVERY)
    np.testing.assert_allclose(found[others], wanted, rtol=1e-3, atol=1e-5)
    assert state[1].left_out.tolist() == [STEPS // EVERY] * WORKERS


def test_a_step_that_is_not_finite_may_be_left_out():
    x0, c, h = problem()
    broken = c.copy()
    broken[2, 1] = np.nan
    inner = optax.apply_if_finite(optax.sgd(LR), 5)
    tx = optax.chain(inner, oa.sync_params("d", EVERY))
    found, state = train(tx, x0, broken, h)
    assert np.isfinite(found).all()
    assert state[1].left_out.tolist() == [0] * WORKERS


@pytest.mark.parametrize("name", ["local_sgd", "fedau", "diloco", "median"])
def test_a_round_without_finite_workers_changes_nothing_common(name):
    tx = METHODS[name][0]
    x0, c, h = problem(steps=2 * EVERY)
    found, state = train(tx, x0, c[:, :EVERY], h)
    broken = c[:, EVERY:].copy()
    broken[:, -1] = np.nan
    after, new = train(tx, found[:, -1], broken, h, state=state)
    before, new = state[1], new[1]
    assert new.left_out.tolist() == [WORKERS] * WORKERS
    if name == "local_sgd":  # nothing to return to
        assert np.isnan(after[:, -1]).all()
        return
    np.testing.assert_allclose(after[:, -1], found[:, -1], rtol=1e-6, atol=1e-7)
    for part in ("anchor", "outer_state", "mean_state"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(before, part), getattr(new, part)
        )


def test_nobody_takes_part():
    x0, c, h = problem(steps=EVERY)
    absent = np.zeros((WORKERS, EVERY), bool)
    found, state = train(METHODS["diloco"][0], x0, c, h, takes_part=absent)
    np.testing.assert_allclose(found[:, -1], np.repeat(x0[None], WORKERS, 0), rtol=1e-6)
    assert state[1].left_out.tolist() == [0] * WORKERS
    assert all(not x.any() for x in jax.tree.leaves(state[1].outer_state))


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_gossip_leaves_out_what_is_not_finite(bad):
    """On a ring of 0 1 2 3 at 1 2 4 8; the shares are 1/4."""
    tx = oa.gossip_params("d", share=0.25)
    x = jnp.array([1.0, 2.0, 4.0, 8.0])
    x = x.at[bad].set(jnp.nan)
    updates = jax.vmap(tx.update, axis_name="d")
    u, state = updates(jnp.where(jnp.isnan(x), 0, 0 * x), jax.vmap(tx.init)(x), x)
    found = x + u
    assert state.gossip_left_out.tolist() == [int(i == bad) for i in range(4)]
    nan = np.nan
    wanted = {0: [nan, 2.5, 4.5, 7], 1: [2.75, nan, 5, 5.25], 3: [1.25, 2.25, 3.5, nan]}
    assert np.array_equal(found, wanted[bad], equal_nan=True)


def test_a_worker_of_gossip_that_is_not_finite_takes_its_neighbours_mean():
    """The update itself is not finite, the parameters before it are."""
    tx = oa.gossip_params("d", share=0.25)
    x, u = jnp.array([1.0, 2.0, 4.0, 8.0]), jnp.array([0, np.nan, 0, 0])
    u, _ = jax.vmap(tx.update, axis_name="d")(u, jax.vmap(tx.init)(x), x)
    assert (x + u).tolist() == [2.75, 2.5, 5.0, 5.25]


def test_momentum_that_is_not_finite_is_left_out():
    tx = oa.sync_state(optax.trace(1.0), "d", 1)
    g = jnp.array([1.0, jnp.inf, 5.0, 0.0])
    _, state = jax.vmap(tx.update, axis_name="d")(g, jax.vmap(tx.init)(g), g)
    assert state.synced.trace.tolist() == [2.0] * 4


# Dtypes, masks and leaves of other kinds.


def test_small_outer_steps_are_not_lost_in_bf16():
    """Each round moves the common point by 2**-17, the spacing at 1 is 2**-7."""
    tx = optax.chain(optax.sgd(1.0), oa.sync_params(None, 1, outer=optax.sgd(2.0**-10)))
    x = jnp.ones(3, jnp.bfloat16)
    g = jnp.full(3, -(2.0**-7), jnp.bfloat16)

    def body(carry, _):
        x, state = carry
        updates, state = tx.update(g, state, x)
        return (optax.apply_updates(x, updates), state), None

    run = jax.jit(lambda c: jax.lax.scan(body, c, None, length=1024)[0])
    x, state = run((x, tx.init(x)))
    assert state[1].anchor.dtype == jnp.float32
    np.testing.assert_allclose(state[1].anchor, 1 + 2.0**-7, rtol=1e-6)
    assert x.dtype == jnp.bfloat16
    assert x.tolist() == [1 + 2.0**-7] * 3


def test_the_mean_in_bf16_is_rounded_once():
    """The mean is a little over half a spacing above 1, and no update says so."""
    above = 1 + 2.0**-7
    x = jnp.where(jnp.arange(1024) < 513, above, 1).astype(jnp.bfloat16)
    tx = oa.sync_params("d", 1)
    u, _ = jax.vmap(tx.update, axis_name="d")(0 * x, jax.vmap(tx.init)(x), x)
    assert u.dtype == jnp.bfloat16
    assert (x + u).tolist() == [above] * 1024


def test_other_leaves_stay_each_workers_own():
    tree = {
        "w": jnp.zeros(4),
        "own": jnp.arange(4.0),
        "n": jnp.arange(4),
        "none": None,
    }
    outside = {"w": True, "own": False, "n": True, "none": None}
    for tx in (
        oa.sync_params("d", 1, where=lambda path, _: "own" not in str(path)),
        oa.sync_params("d", 1, outer=optax.sgd(1.0), where=outside),
        oa.gossip_params("d", where=outside),
        optax.masked(oa.sync_params("d", 1), outside),
    ):
        moved = {"w": jnp.arange(4.0), "n": None}
        updates = {**jax.tree.map(jnp.zeros_like, tree), **moved}
        state = jax.vmap(tx.init)(tree)
        u, _ = jax.vmap(tx.update, axis_name="d")(updates, state, tree)
        assert u["own"].tolist() == [0.0] * 4
        assert u["n"] is u["none"] is None
        assert u["w"].std() < moved["w"].std()


@pytest.mark.parametrize("name", ["variance_corrected", "gossip_variance_corrected"])
def test_equal_elements_have_no_variance_to_restore(name):
    tx = METHODS[name][0]
    tree = {"one": jnp.ones((8, 1)), "same": jnp.full((8, 5), 0.1)}
    grads = jax.tree.map(jnp.zeros_like, tree)
    state = jax.vmap(tx.init)(tree)
    for _ in range(EVERY):
        updates, state = jax.vmap(tx.update, axis_name="d")(grads, state, tree)
    moved = optax.apply_updates(tree, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), moved, tree)


# Another number of workers.


@pytest.mark.parametrize("now", [3, 13])
def test_another_number_of_workers(now, x64):
    tx = METHODS["diloco"][0]
    x0, c, h = problem()
    reference = ref.DiLoCo(x0, h, INNER, EVERY, WORKERS)
    reference.run(c)
    found, state = train(tx, x0, c, h)
    old = reference.optimizers
    copies = [ref.AdamW(*INNER) for _ in range(now)]
    for i, copy in enumerate(copies):
        copy.__dict__.update(old[i % WORKERS].__dict__)
    reference.optimizers = copies
    later = problem(workers=now, seed=3)[1]
    state = resize(state, now)
    assert jax.tree.leaves(state)[0].shape[0] == now
    found, _ = train(tx, resize(found[:, -1], now), later, h, state=state)
    np.testing.assert_allclose(found, reference.run(later), rtol=1e-9, atol=1e-12)


def test_new_workers_of_fedau_have_no_past():
    past = FedAUState(*(jnp.array([3, 4]) for _ in range(3)))
    more = resize({"a": past, "b": jnp.array([[1.0], [2.0]])}, 5)
    assert more["a"].rounds.tolist() == [3, 4, 0, 0, 0]
    assert more["b"][:, 0].tolist() == [1.0, 2.0, 1.0, 2.0, 1.0]
    assert resize(past, 1).waited.tolist() == [3]


def test_resize_names_the_cause():
    with pytest.raises(ValueError, match=r"first axes of \[\(2,\), \(3,\)\]"):
        resize({"a": jnp.ones(2), "b": jnp.ones(3)}, 2)
    with pytest.raises(ValueError, match="first axis of the workers"):
        resize(jnp.ones([]), 2)
    with pytest.raises(ValueError, match="workers must be an integer >= 1"):
        resize(jnp.ones(3), 0)


# Devices.


@pytest.mark.parametrize("name", METHODS)
def test_between_rounds_no_worker_waits(name):
    """All collectives are in branches."""
    tx = METHODS[name][0]
    params = tree_of(np.ones((WORKERS, 10)))
    state = jax.vmap(tx.init)(params)

    def one(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(placed(one, "shard_map"))
    always, branches = collectives(
        step.lower(params, state, params).compile().as_text()
    )
    assert not always
    wanted = "collective-permute" if "gossip" in name else "all-reduce"
    assert branches[wanted]


def test_the_common_state_may_have_no_axis_of_workers():
    """With the spec ``P()`` for the state, which ``init`` makes outside."""
    x0, c, h = problem()
    tx = oa.sync_params("d", EVERY, outer=OUTER)
    sgd = optax.sgd(LR)
    mesh = jax.make_mesh((WORKERS,), ("d",), axis_types=(AxisType.Auto,))
    params, shared = tree_of(np.repeat(x0[None], WORKERS, 0)), tx.init(tree_of(x0))

    def local(params, state, point):
        params, point = jax.tree.map(lambda x: x[0], (params, point))
        grads = jax.tree.map(lambda x, c, k: k * (x - c), params, point, tree_of(h))
        updates, _ = sgd.update(grads, sgd.init(params), params)
        updates, state = tx.update(updates, state, params)
        params = optax.apply_updates(params, updates)
        return jax.tree.map(lambda x: x[None], params), state

    specs = {"in_specs": (P("d"), P(), P("d")), "out_specs": (P("d"), P())}
    step = jax.jit(jax.shard_map(local, mesh=mesh, **specs))
    for t in range(EVERY):
        params, shared = step(params, shared, tree_of(c[:, t]))
    wanted, _ = train(optax.chain(sgd, tx), x0, c[:, :EVERY], h)
    np.testing.assert_allclose(flat(params), wanted[:, -1], rtol=1e-5, atol=1e-6)
    assert shared.anchor["b"].shape == (4,)


def test_workers_of_several_devices():
    """Parameters of a worker in two parts; one element is not finite on one of them."""
    mesh = jax.make_mesh((4, 2), ("d", "model"), axis_types=(AxisType.Auto,) * 2)
    x = jnp.arange(24.0).reshape(4, 6) ** 1.5
    u = jnp.zeros((4, 6)).at[1, 5].set(jnp.nan)
    tx = oa.sync_params("d", 1, correct_variance=True)
    spec = P("d", "model")

    def local(u, x):
        updates, state = tx.update(u[0], tx.init(x[0]), x[0])
        return (x[0] + updates)[None], state.left_out

    step = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=(spec, P()))
    found, left_out = jax.jit(step)(u, x)
    kept = np.asarray(x)[[0, 2, 3]]
    z = kept.mean(axis=0)
    z = z.mean() + np.sqrt(kept.var(axis=1).mean() / z.var()) * (z - z.mean())
    np.testing.assert_allclose(found, np.repeat(z[None], 4, 0), rtol=1e-5)
    assert left_out == 1


# Errors and the order of links.


def test_parameters_that_all_share_are_refused():
    mesh = jax.make_mesh((WORKERS,), ("d",), axis_types=(AxisType.Auto,))
    x = {"w": jnp.ones(3)}
    for name in ("sync_params", "gossip_params"):
        tx = getattr(oa, name)("d", 1)
        step = lambda x, tx=tx: tx.update(x, tx.init(x), x)[0]
        with pytest.raises(
            ValueError, match=rf"{name} needs .*params\['w'\] is the sa"
        ):
            jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P())(x)


def sync(*args, **kwargs):
    return lambda: oa.sync_params(*args, **kwargs)


MEDIAN = oa.coordinate_median(axis_name="d")
ERRORS = {
    "every": (sync("d", 0), "every must be an integer >= 1"),
    "negative": (sync("d", 1, [1, -1]), "weights must be one number"),
    "zeros": (sync("d", 1, [0, 0]), "weights must be one number"),
    "one": (sync("d", 1, 3.0), "weights must be one number"),
    "function": (sync("d", 1, len), "weights must be one number"),
    "nan": (sync("d", 1, [1, np.nan]), "weights must be one number"),
    "mean and weights": (sync("d", 1, [1, 2], mean=MEDIAN), "without weights"),
    "mean of one": (sync(None, 1, mean=MEDIAN), "several workers"),
    "variance of displacements": (
        sync("d", 1, outer=OUTER, correct_variance=True),
        "for means of parameters",
    ),
    "share": (lambda: oa.gossip_params("d", share=0.6), "share must lie in"),
    "how": (lambda: oa.sync_state(OUTER, "d", 1, "keep"), "how must be"),
    "cutoff": (lambda: fedau(0), "cutoff must be an integer >= 1"),
    "where": (
        lambda: oa.sync_params("d", 1, where={"w": False}).init({"w": jnp.ones(1)}),
        "nothing would be synced",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_cause(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("option", ["outer", "mean"])
def test_what_is_no_transformation_is_refused(option):
    with pytest.raises(TypeError, match="sync_params needs an"):
        oa.sync_params("d", 1, **{option: optax.sgd})


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (oa.sync_params("d", 1, [1, 2, 3]), "3 weights for 4 workers"),
        (oa.sync_params("d", 1, mean=oa.coordinate_median()), "but over an axis of"),
        (oa.sync_params("elsewhere", 1), "axis_name='elsewhere' is not mapped"),
        (oa.gossip_params("elsewhere"), "axis_name='elsewhere' is not mapped"),
        (oa.sync_state(OUTER, "elsewhere", 1), "axis_name='elsewhere' is not mapped"),
    ],
)
def test_errors_of_update(tx, message):
    x = jnp.ones((4, 3))
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.vmap(tx.update, axis_name="d")(x, jax.vmap(tx.init)(x), x)


SGD = optax.sgd(0.1)
ALONE = functools.partial(oa.sync_params, None, 2, outer=optax.sgd(0.5))


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (optax.chain(ALONE(), SGD), "sync_params does not stand last"),
        (optax.chain(oa.gossip_params(None), SGD), "gossip_params does not stand last"),
        (
            optax.chain(SGD, oa.ema_params(0.9), ALONE()),
            "ema_params stands before sync_params",
        ),
    ],
)
def test_the_order_of_links(tx, message):
    with pytest.raises(ValueError, match=message):
        oa.check_chain(tx, params_of(jnp.float32))


def test_an_average_of_what_workers_agreed_on_is_fine():
    tx = optax.chain(SGD, ALONE(), oa.ema_params(0.9))
    oa.check_chain(tx, params_of(jnp.float32))
    oa.check_chain(optax.MultiSteps(tx, 2), params_of(jnp.float32))
