"""The average inside the optimizer against its references and relatives."""

import functools

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import schedule_free, schedule_free_eval_params

import optax_avg as oa
from optax_avg import weights

CURVATURE = np.array([1.0, 0.3, 0.05, 2.0])


def gradient(y, t, xp=np):
    """Of a quadratic with noise that depends on the step."""
    return CURVATURE.astype(y.dtype) * (y - 1) + xp.sin(xp.arange(4) + 7.0 * t).astype(
        y.dtype
    )


def train(tx, steps, dtype=jnp.float32, each=None, start=None):
    """Steps of a transformation on the quadratic."""
    y = jnp.linspace(-2.0, 2.0, 4).astype(dtype) if start is None else start
    state = tx.init(y)

    @jax.jit
    def advance(y, state, t):
        u, state = tx.update(gradient(y, t, jnp), state, y)
        return optax.apply_updates(y, u), state

    for t in range(steps):
        y, state = advance(y, state, jnp.float32(t))
        if each is not None:
            each(t, y, state)
    return y, state


def reference(w, beta, steps, *, rate=0.1, decay=0.0, at="y", momentum=0.0):
    """``z``, ``x`` and ``y`` in float64, line by line."""
    z = x = y = np.linspace(-2.0, 2.0, 4)
    m = np.zeros(4)
    seen = []
    for t in range(steps):
        m = momentum * m + gradient(y, t)
        z = z - rate * (m + decay * (y if at == "y" else z))
        x = x + w(t + 1) * (z - x)
        y = beta * x + (1 - beta) * z
        seen.append((x, y))
    return seen


@pytest.mark.parametrize("at", ["y", "z"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9, 0.9968, 1.0])
@pytest.mark.parametrize(
    ("weight", "w"),
    [
        (weights.uniform(), lambda t: 1 / t),
        # Generalized Primal Averaging, with mu_x = 0.95.
        (weights.ema(0.95, debias=False), lambda t: 0.05),
        (weights.polynomial(3), lambda t: 4 / (t + 3)),
        (weights.mass(lambda t: t), lambda t: 2 / (t + 1)),
    ],
)
def test_equals_the_equations_in_float64(weight, w, beta, at):
    optimizer = optax.chain(
        optax.trace(0.5), optax.add_decayed_weights(0.2), optax.scale(-0.1)
    )
    tx = oa.primal_average(optimizer, weight, beta, decay_at=at)
    seen = reference(w, beta, 60, decay=0.2, at=at, momentum=0.5)

    def check(t, y, state):
        if t % 7 == 0 or t > 55:
            np.testing.assert_allclose(y, seen[t][1], rtol=2e-5, atol=2e-5)
            x = oa.averaged_params(state, y)
            np.testing.assert_allclose(x, seen[t][0], rtol=2e-5, atol=2e-5)

    train(tx, 60, each=check)


def test_decay_looks_elsewhere_at_y_and_at_z():
    optimizer = optax.chain(optax.add_decayed_weights(0.2), optax.scale(-0.1))
    make = lambda at: oa.primal_average(optimizer, weights.uniform(), 0.9, decay_at=at)
    at_y, at_z = (train(make(at), 30)[0] for at in ("y", "z"))
    assert float(jnp.abs(at_y - at_z).max()) > 1e-3


RATES = {
    "constant": optax.constant_schedule(0.1),
    "warmed-up": optax.linear_schedule(0.0, 0.2, 20),
}


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("b1", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("make", [optax.sgd, functools.partial(optax.adam, b1=0.0)])
def test_equals_schedule_free(make, rate, b1):
    # Optax evaluates the rate that it weighs by one step later than its optimizer.
    lr = RATES[rate]
    mass = weights.mass(lambda t: lr(t) ** 2)
    theirs, state = train(schedule_free(make(lr), lr, b1=b1), 100)
    ours, own = train(oa.primal_average(make(lr), mass, b1), 100)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    average = schedule_free_eval_params(state, theirs)
    found = oa.averaged_params(own, ours)
    np.testing.assert_allclose(found, average, rtol=1e-6, atol=1e-6)


def test_right_where_the_sum_of_schedule_free_saturates():
    """In bfloat16 its sum of weights stays at 256, so that its weight stays 1/256."""
    steps, start = 2000, jnp.linspace(-2, 2, 4).astype(jnp.bfloat16)
    tx = schedule_free(optax.sgd(0.1), 1.0, b1=0.9)
    _, theirs = train(tx, steps, start=start)
    assert float(theirs.weight_sum) == 256
    ours = oa.primal_average(optax.sgd(0.1), weights.uniform(), 0.9)
    y, state = train(ours, steps, start=start)
    assert state.primal.averages["primal"].ahead.dtype == jnp.float32
    # Gradients at the bfloat16 parameters are right to their rounding only.
    wanted, in_float32 = train(ours, steps)
    x = oa.averaged_params(in_float32, wanted)
    np.testing.assert_allclose(exact_average(state, y), x, atol=0.02)


def exact_average(state, y):
    """``x`` before it is rounded to the dtype of the parameters."""
    kept = state.primal.averages["primal"]
    return np.asarray(y, np.float64) + np.asarray(kept.read(1), np.float64)


def scanned(tx, updates, start):
    """Many steps of given updates."""

    def body(carry, u):
        u, state = tx.update(u, carry[1], carry[0])
        return (optax.apply_updates(carry[0], u), state), None

    return jax.jit(lambda c: jax.lax.scan(body, c, updates)[0])((start, tx.init(start)))


@pytest.mark.parametrize(
    ("weight", "w", "beta"),
    [
        (weights.uniform(), lambda t: 1 / t, 0.9),
        (weights.ema(0.9999, debias=False), lambda t: 1e-4, 0.9),
        (weights.ema(0.9967, debias=False), lambda t: 0.0033, 0.9968),
    ],
)
def test_a_hundred_thousand_steps_do_not_drift(weight, w, beta):
    """Rounding adds up as in a sum of as many updates, with no preferred side."""
    steps = 100_000
    updates = 1e-3 * np.random.default_rng(0).normal(size=(steps, 8))
    updates = updates.astype(np.float32)
    z = x = np.ones(8)
    for t, u in enumerate(updates.astype(np.float64), start=1):
        z = z + u
        x = x + w(t) * (z - x)
    tx = oa.primal_average(optax.identity(), weight, beta)
    y, state = scanned(tx, jnp.asarray(updates), jnp.ones(8))
    summed = scanned(optax.identity(), jnp.asarray(updates), jnp.ones(8))[0]
    plain = np.abs(np.asarray(summed, float) - z).max()
    bound = 3 * max(plain, 1e-5)
    assert np.abs(np.asarray(y, float) - (beta * x + (1 - beta) * z)).max() < bound
    found = np.asarray(oa.averaged_params(state, y), float)
    assert np.abs(found - x).max() < bound


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("beta", [0.5, 0.9, 1.0])
def test_narrow_parameters_are_exact(dtype, beta):
    """Only the ``y`` at which gradients are taken is rounded: ``x`` is not."""
    narrow = {jnp.bfloat16: ml_dtypes.bfloat16, jnp.float16: np.float16}[dtype]
    tx = oa.primal_average(optax.identity(), weights.uniform(), beta)
    y, z, x = jnp.ones(4, dtype), np.ones(4), np.ones(4)
    state, update = tx.init(y), jax.jit(tx.update)
    for t in range(1, 500):
        u = jnp.asarray([1e-4, -3e-4, 2e-5, 0.01]).astype(dtype)
        step, state = update(u, state, y)
        assert step.dtype == y.dtype == dtype
        y = optax.apply_updates(y, step)
        z = z + np.asarray(u, np.float64)
        x = x + (z - x) / t
        exact = beta * x + (1 - beta) * z
        spacing = np.abs(np.asarray(exact.astype(narrow), float)) * 2.0**-7
        assert (np.abs(np.asarray(y, float) - exact) <= spacing).all()
    np.testing.assert_allclose(exact_average(state, y), x, rtol=1e-6)
    average = oa.averaged_params(state, y)
    assert average.dtype == dtype
    np.testing.assert_array_equal(average, x.astype(narrow))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("weight", [weights.uniform(), weights.mass(lambda t: t)])
def test_beta_zero_is_the_average_beside_bit_for_bit(dtype, weight):
    inside = oa.primal_average(optax.adamw(0.1), weight, 0.0)
    beside = optax.chain(optax.adamw(0.1), oa.average(weight, name="primal"))
    ours, theirs = train(inside, 50, dtype), train(beside, 50, dtype)
    chex.assert_trees_all_equal(ours, theirs)
    chex.assert_trees_all_equal(
        *(oa.averaged_params(state, y) for y, state in (ours, theirs))
    )


def test_a_traced_beta_of_zero_trains_as_the_plain_optimizer():
    make = optax.inject_hyperparams(
        oa.primal_average, static_args=("optimizer", "weight")
    )
    tx = make(optimizer=optax.adamw(0.1), weight=weights.uniform(), beta=0.0)
    y, state = train(tx, 50)
    plain, _ = train(optax.adamw(0.1), 50)
    np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-6)
    beside = optax.chain(optax.adamw(0.1), oa.polyak_average())
    wanted = oa.averaged_params(*train(beside, 50)[::-1])
    found = oa.averaged_params(state, y)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_beta_one_is_primal_averaging():
    y, state = train(oa.primal_average(optax.sgd(0.1), weights.uniform(), 1.0), 40)
    np.testing.assert_array_equal(oa.averaged_params(state, y), y)


def test_a_beta_that_changes_moves_y_alone():
    """``x`` and ``z`` follow the equations whatever ``y`` was before."""
    beta = lambda step: jnp.where(step < 10, 0.2, 0.8)
    y, state = train(oa.primal_average(optax.sgd(0.1), weights.uniform(), beta), 30)
    z = x = at = np.linspace(-2.0, 2.0, 4)
    for t in range(30):
        z = z - 0.1 * gradient(at, t)
        x = x + (z - x) / (t + 1)
        b = 0.2 if t < 10 else 0.8
        at = b * x + (1 - b) * z
    np.testing.assert_allclose(y, at, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(oa.averaged_params(state, y), x, rtol=1e-5, atol=1e-5)


def one_step(tx, params):
    """Three steps of a constant gradient."""
    state, grads = (
        tx.init(params),
        jax.tree.map(lambda x: jnp.full_like(x, 0.5), params),
    )
    for _ in range(3):
        u, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, u)
    return params, state


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": True, "n": False}),
    "partition": lambda tx: optax.partition(
        {"a": tx, "rest": optax.sgd(0.1)}, {"w": "a", "b": "a", "n": "rest"}
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_average_is_read_from_anywhere(wrapper):
    params = {"w": jnp.ones((8, 2)), "b": jnp.zeros(3), "n": jnp.ones(2)}
    tx = oa.primal_average(optax.sgd(0.1), weights.uniform(), 0.9)
    plain, own = one_step(tx, params)
    wrapped, state = one_step(WRAPPERS[wrapper](tx), params)
    wanted = oa.averaged_params(own, plain)
    if wrapper in ("masked", "partition"):
        wanted["n"] = wrapped["n"]
    assert oa.average_names(state) == ["primal"]
    chex.assert_trees_all_close(oa.averaged_params(state, wrapped), wanted, rtol=1e-6)


def test_leaves_outside_are_trained_by_the_optimizer_alone():
    params = {"w": jnp.ones((8, 2)), "b": jnp.zeros(3)}
    only = lambda path, _: "w" in jax.tree_util.keystr(path)
    tx = oa.primal_average(optax.adam(0.1), weights.uniform(), 0.9, where=only)
    y, state = one_step(tx, params)
    plain, _ = one_step(optax.adam(0.1), params)
    chex.assert_trees_all_equal(y["b"], plain["b"])
    assert float(jnp.abs(y["w"] - plain["w"]).max()) > 1e-3
    average = oa.averaged_params(state, y)
    chex.assert_trees_all_equal(average["b"], y["b"])
    assert float(jnp.abs(average["w"] - y["w"]).max()) > 1e-3
    with pytest.raises(ValueError, match="where is true of no leaf"):
        oa.primal_average(
            optax.adam(0.1), weights.uniform(), 0.9, where=lambda *_: False
        ).init(params)


def test_leaves_that_cannot_be_averaged_pass_through():
    params = {
        "w": jnp.ones(2),
        "n": jnp.array(3),
        "none": None,
        "key": jax.random.key(0),
        "empty": jnp.zeros((0, 2)),
    }
    grads = {**dict.fromkeys(params), "w": jnp.ones(2), "empty": jnp.zeros((0, 2))}
    halve = optax.stateless(lambda u, _: jax.tree.map(lambda g: -0.5 * g, u))
    tx = oa.primal_average(halve, weights.uniform(), 0.9)
    u, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert u["n"] is u["none"] is u["key"] is None
    assert u["w"].tolist() == [-0.5, -0.5]
    moved = {**params, "w": params["w"] + u["w"], "n": jnp.array(7)}
    average = oa.averaged_params(state, moved)
    assert average["none"] is None
    assert int(average["n"]) == 7
    assert average["key"] is params["key"]
    assert average["w"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_elements_that_are_not_finite_are_left_out(bad, dtype):
    tx = oa.primal_average(optax.sgd(0.1), weights.uniform(), 0.9)
    y, state = train(tx, 5, dtype)
    update, sound = jax.jit(tx.update), gradient(y, 1.0, jnp)
    u, hurt = update(sound.at[2].set(bad), state, y)
    still, wanted = update(sound.at[2].set(0), state, y)
    chex.assert_trees_all_equal((u, hurt), (still, wanted))
    moved = optax.apply_updates(y, u)
    assert bool(jnp.isfinite(oa.averaged_params(hurt, moved)).all())
    u, _ = update(sound, hurt, moved)  # and training goes on
    assert optax.apply_updates(moved, u)[2] != moved[2]


def test_keep_does_not_check():
    tx = oa.primal_average(optax.sgd(0.1), weights.uniform(), 0.9, nonfinite="keep")
    y, state = train(tx, 2)
    u, state = tx.update(jnp.full(4, jnp.nan), state, y)
    assert bool(jnp.isnan(u).all())


def test_whole_steps_are_rolled_back_around_it():
    tx = optax.apply_if_finite(
        oa.primal_average(optax.adam(0.1), weights.uniform(), 0.9), 5
    )
    y, state = train(tx, 5)
    before = oa.averaged_params(state, y)
    u, state = tx.update(jnp.full(4, jnp.nan), state, y)
    chex.assert_trees_all_equal(optax.apply_updates(y, u), y)
    chex.assert_trees_all_equal(oa.averaged_params(state, y), before)


@given(st.floats(-36, 36), st.sampled_from([0.1, 0.9, 1.0]))
def test_any_size_of_numbers(log10, beta):
    """Scaling all by a power of two scales all results, short of the range's ends."""
    scale = 2.0 ** round(log10 * np.log2(10))
    tx = oa.primal_average(optax.sgd(0.1), weights.uniform(), beta)
    state, y = tx.init(jnp.ones(3)), jnp.ones(3)
    far, big = tx.init(jnp.full(3, scale)), jnp.full(3, scale)
    g = jnp.array([1.0, -2.0, 0.25])
    for _ in range(3):
        u, state = tx.update(g, state, y)
        y = optax.apply_updates(y, u)
        u, far = tx.update(g * scale, far, big)
        big = optax.apply_updates(big, u)
    np.testing.assert_allclose(big / scale, y, rtol=1e-6)
    found = oa.averaged_params(far, big) / scale
    np.testing.assert_allclose(found, oa.averaged_params(state, y), rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "copies"), [(jnp.float32, 1), (jnp.bfloat16, 2), (jnp.float16, 2)]
)
def test_float32_copies_in_the_state(dtype, copies):
    params = {"w": jnp.ones((64, 8), dtype), "b": jnp.ones(100, dtype)}
    tx = oa.primal_average(optax.sgd(0.1), weights.mass(lambda t: t), 0.9)
    leaves = [x for x in jax.tree.leaves(tx.init(params)) if x.ndim]
    assert {x.dtype for x in leaves} == {jnp.dtype(jnp.float32)}
    assert sum(x.size for x in leaves) == copies * (64 * 8 + 100)


COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("at", ["y", "z"])
def test_sharded_like_the_parameters_and_no_device_waits(dtype, at):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, P("d"))
    params = jax.device_put({"w": jnp.ones((8, 3), dtype)}, place)
    tx = oa.primal_average(optax.adamw(0.1), weights.uniform(), 0.9, decay_at=at)
    state = jax.jit(tx.init)(params)
    for leaf in jax.tree.leaves(state.primal):
        assert not leaf.ndim or leaf.sharding.is_equivalent_to(place, leaf.ndim)

    def advance(params, state):
        u, state = tx.update(params, state, params)
        params = optax.apply_updates(params, u)
        return params, state, oa.averaged_params(state, params)

    text = jax.jit(advance).lower(params, state).compile().as_text()
    assert not any(f"{name}(" in text for name in COLLECTIVES)


def test_extra_arguments_reach_the_optimizer():
    def update(updates, state, params=None, *, value, **extra):
        return jax.tree.map(lambda g: -value * g, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = oa.primal_average(inner, weights.uniform(), 0.5)
    y = jnp.ones(2)
    u, _ = tx.update(y, tx.init(y), y, value=0.25, unheard_of=1)
    np.testing.assert_allclose(u, -0.25)


def test_averages_after_it_average_what_training_holds():
    tx = optax.chain(
        oa.primal_average(optax.sgd(0.1), weights.uniform(), 0.9), oa.ema_params(0.5)
    )
    oa.check_chain(tx, jnp.ones(4))
    y, state = train(tx, 10)
    assert oa.average_names(state) == ["ema", "primal"]
    seen = reference(lambda t: 1 / t, 0.9, 10)
    np.testing.assert_allclose(
        oa.averaged_params(state, y, "primal"), seen[-1][0], rtol=1e-5, atol=1e-5
    )
    p = weights.profile(weights.ema(0.5), 10).weights
    wanted = sum(a * y for a, (_, y) in zip(p, seen, strict=True))
    found = oa.averaged_params(state, y, "ema")
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_later_link_that_changes_the_updates_is_found():
    inside = oa.primal_average(optax.sgd(0.1), weights.uniform(), 0.9)
    oa.check_chain(inside, jnp.ones(4))
    with pytest.raises(ValueError, match="primal_average does not stand last"):
        oa.check_chain(optax.chain(inside, optax.scale(0.5)), jnp.ones(4))


def test_it_may_begin_within_a_training():
    y, old = train(optax.adam(0.1), 20)
    tx = oa.primal_average(optax.adam(0.1), weights.uniform(), 0.9)
    state = tx.init(y)._replace(inner_state=old)
    chex.assert_trees_all_equal(oa.averaged_params(state, y), y)
    _, state = tx.update(gradient(y, 0.0, jnp), state, y)
    assert int(optax.tree.get(state, "count")) == 21


def test_snapshots_name_it_as_no_mean_of_the_parameters(tmp_path):
    _, state = train(oa.primal_average(optax.sgd(0.1), weights.uniform(), 0.9), 3)
    said = "'primal' are kept: it is not a mean"
    with (
        oa.posthoc.SnapshotStore(tmp_path) as store,
        pytest.warns(UserWarning, match=said),
    ):
        assert not store.save(state, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"optimizer": 0.1}, TypeError, "needs an optimizer"),
        ({"weight": oa.ema_params(0.9)}, TypeError, "needs a weight"),
        ({"weight": weights.ema}, ValueError, "call it first"),
        ({"weight": 0.9}, ValueError, "a weight is a function of t"),
        ({"beta": 1.5}, ValueError, r"beta must lie in \[0, 1\]"),
        ({"beta": -0.1}, ValueError, r"beta must lie in \[0, 1\]"),
        ({"beta": "x"}, ValueError, "beta must be a number"),
        ({"decay_at": "x"}, ValueError, "decay_at must be 'y' or 'z'"),
        ({"nonfinite": "reject"}, ValueError, "nonfinite must be 'skip' or 'keep'"),
    ],
)
def test_mistakes_are_named(change, error, message):
    arguments = {"optimizer": optax.sgd(0.1), "weight": weights.uniform(), "beta": 0.9}
    with pytest.raises(error, match=message):
        oa.primal_average(**{**arguments, **change})


def test_float64_parameters_keep_their_digits():
    with jax.enable_x64(True):
        tx = oa.primal_average(
            optax.sgd(0.1), lambda t: 0.25, 0.5
        )  # both exact in float32
        y, z, x = jnp.ones(3, jnp.float64), np.ones(3), np.ones(3)
        state = tx.init(y)
        for t in range(20):
            g = jnp.sin(jnp.arange(3.0) + t)
            u, state = tx.update(g, state, y)
            assert u.dtype == jnp.float64
            y = optax.apply_updates(y, u)
            z = z - 0.1 * np.asarray(g)
            x = x + 0.25 * (z - x)
        np.testing.assert_allclose(oa.averaged_params(state, y), x, rtol=1e-13)
