"""Bayes-SAM: the algorithm, its noise, its variance, and devices."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_optimizers_c as ref
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_avg as oa
from optax_avg.optimizers import bsam, posterior_variance

OPTIONS = {"b1": 0.75, "b2": 0.5, "rho": 0.25, "prior_precision": 8.0, "damping": 0.125}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def gradient(x):
    """Of ``sum x^4/4 + sin(x)``."""
    return x**3 + np.cos(x)


def recording(points):
    """A function to gradients that keeps the points it is called at."""

    def grad_fn(tree):
        points.append(jax.tree.map(np.asarray, tree))
        return jax.tree.map(lambda x: x**3 + jnp.cos(x), tree)

    return grad_fn


def test_algorithm_of_the_paper(x64):
    x = {"a": np.array([0.5, -1.0, 2.0]), "b": np.array([[1.5]])}
    m = jax.tree.map(np.zeros_like, x)
    s = jax.tree.map(np.ones_like, x)
    tx = bsam(lambda step: 0.0625 * (step + 1), 64.0, **OPTIONS)
    params = jax.tree.map(jnp.asarray, x)
    state = tx.init(params)
    for t in range(5):
        points = []
        updates, state = tx.update(params, state, params, grad_fn=recording(points))
        params = optax.apply_updates(params, updates)
        theta, ascended = points
        for name in x:
            wanted, x[name], m[name], s[name] = ref.bsam_step(
                *(x[name], m[name], s[name], theta[name], gradient),
                lr=0.0625 * (t + 1),
                n=64,
                **OPTIONS,
            )
            np.testing.assert_allclose(ascended[name], wanted, rtol=1e-12)
            np.testing.assert_allclose(params[name], x[name], rtol=1e-12)
            variance = posterior_variance(state)[name]
            np.testing.assert_allclose(variance, 1 / (64 * s[name]), rtol=1e-12)
    assert int(state.bayes_step) == 5


def test_the_noise_has_the_variance_of_the_posterior():
    tx = bsam(0.0, 400.0, s_init=0.25, b2=1.0)
    params = {"a": jnp.ones(20_000), "b": jnp.ones(20_000)}
    state, seen = tx.init(params), []
    for _ in range(2):
        points = []
        _, state = tx.update(params, state, params, grad_fn=recording(points))
        seen += [points[0]["a"] - 1, points[0]["b"] - 1]
    assert float(posterior_variance(state)["a"][0]) == pytest.approx(0.01)
    for noise in seen:
        assert abs(np.mean(noise)) < 4e-3
        assert np.var(noise) == pytest.approx(0.01, rel=0.05)
    apart = np.corrcoef(seen) - np.eye(4)
    assert np.abs(apart).max() < 0.05


def test_the_noise_follows_a_number_of_examples_that_is_injected():
    x = jnp.zeros(20_000)
    tx = optax.inject_hyperparams(bsam)(learning_rate=0.0, num_data=100.0)
    state = tx.init(x)
    state.hyperparams["num_data"] = jnp.float32(1e4)
    points = []
    _, state = tx.update(x, state, x, grad_fn=recording(points))
    assert np.var(points[0]) == pytest.approx(1e-4, rel=0.05)
    assert float(state.inner_state.num_examples) == 1e4


def test_other_keys_give_other_noise():
    def first(key):
        points = []
        tx = bsam(0.1, 10.0, key=key)
        x = jnp.zeros(3)
        tx.update(x, tx.init(x), x, grad_fn=recording(points))
        return points[0].tolist()

    assert first(1) == first(jax.random.key(1)) != first(2)


def test_the_precision_settles_where_it_is_known():
    """``s = sqrt(s) |g| + c`` has ``sqrt(s) = (|g| + sqrt(g^2 + 4 c))/2``."""
    g = jnp.array([0.0, 0.5, -2.0])
    tx = bsam(0.0, 100.0, b2=0.9, prior_precision=30.0, damping=0.1)
    x = jnp.zeros(3)
    state, update = (
        tx.init(x),
        jax.jit(functools.partial(tx.update, grad_fn=lambda x: g)),
    )
    for _ in range(300):
        _, state = update(x, state, x)
    root = (np.abs(g) + np.sqrt(np.asarray(g) ** 2 + 4 * 0.4)) / 2
    np.testing.assert_allclose(posterior_variance(state), 0.01 / root**2, rtol=1e-4)


def test_without_noise_and_radius_it_is_momentum_over_precision():
    tx = bsam(0.5, 1e30, rho=0.0, b1=0.0, b2=1.0, s_init=4.0, prior_precision=0.0)
    x = jnp.array([1.0, -2.0])
    updates, _ = tx.update(x, tx.init(x), x, grad_fn=lambda x: 3 * x)
    np.testing.assert_allclose(updates, -0.5 * 3 * x / 4, rtol=1e-6)


def test_it_finds_the_posterior_of_a_gaussian():
    """With ``N`` times the loss ``(x - 1)^2 h/2`` flat directions are less certain."""
    h = jnp.array([0.25, 4.0])
    tx = bsam(0.05, 1000.0, b2=0.99, rho=0.01, prior_precision=0.0)
    x = jnp.zeros(2)
    update = jax.jit(functools.partial(tx.update, grad_fn=lambda x: h * (x - 1)))
    state = tx.init(x)
    for _ in range(1500):
        updates, state = update(x, state, x)
        x = optax.apply_updates(x, updates)
    np.testing.assert_allclose(x, 1.0, atol=0.05)
    variance = posterior_variance(state)
    assert float(variance[0]) > float(variance[1])


def test_a_gradient_that_is_not_finite_changes_nothing():
    tx = bsam(0.1, 10.0)
    x = jnp.ones(3)
    _, state = tx.update(x, tx.init(x), x, grad_fn=lambda x: x)
    nan = lambda x: x.at[1].set(jnp.nan)
    updates, after = tx.update(x, state, x, grad_fn=nan)
    assert updates.tolist() == [0.0] * 3
    chex.assert_trees_all_equal(after.precision, state.precision)
    chex.assert_trees_all_equal(after.bayes_momentum, state.bayes_momentum)
    assert (int(after.left_out), int(after.bayes_step)) == (1, 2)


def test_devices_share_their_gradients():
    """Of linear losses the gradient is the same everywhere."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    c = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    options = {**OPTIONS, "b2": 0.5}
    tx = bsam(0.5, 64.0, axis_name="d", **options)
    x = jnp.array([1.0, 2.0, -1.0])

    def local(x, state, row):
        return tx.update(x, state, x, grad_fn=jax.grad(lambda x: jnp.sum(row[0] * x)))

    specs = {"in_specs": (P(), P(), P("d")), "out_specs": P()}
    step = jax.jit(jax.shard_map(local, mesh=mesh, **specs))
    updates, state = step(x, tx.init(x), c)
    s = 0.5 + 0.5 * (np.abs(c).mean(axis=0) + 0.125 + 0.125)
    m = 0.25 * (c.mean(axis=0) + 0.125 * np.asarray(x))
    np.testing.assert_allclose(state.precision, s, rtol=1e-5)
    np.testing.assert_allclose(updates, -0.5 * m / s, rtol=1e-5)


def test_devices_draw_samples_of_their_own():
    """The mean of 64 sizes varies an eighth as much as one."""
    tx = bsam(0.1, 1.0, b2=0.0, damping=1e-9, prior_precision=0.0, axis_name="d")
    x = jnp.zeros(2000)

    def one(_):
        return tx.update(x, tx.init(x), x, grad_fn=lambda x: x)[1].precision

    sizes = np.asarray(jax.vmap(one, axis_name="d")(jnp.arange(64))[0])
    assert sizes.mean() == pytest.approx(np.sqrt(2 / np.pi), rel=0.05)
    wanted = np.sqrt(np.pi / 2 - 1) / 8
    assert sizes.std() / sizes.mean() == pytest.approx(wanted, rel=0.15)


def test_the_gradient_at_the_parameters_is_not_taken():
    """Under jit, what ``update`` does not use is not computed."""
    tx = bsam(0.1, 10.0)
    x = jnp.ones((4, 4))
    grad_fn = lambda x: jnp.dot(x, x)

    def step(x, state):
        return tx.update(grad_fn(x), state, x, grad_fn=grad_fn)

    text = jax.jit(step).lower(x, tx.init(x)).compile().as_text()
    assert text.count(" dot(") == 2


def test_the_variance_is_found_in_a_chain():
    x = {"w": jnp.ones(2), "count": jnp.array(3)}
    tx = optax.chain(bsam(0.1, 50.0, s_init=2.0), oa.ema_params(0.9))
    found = posterior_variance(tx.init(x))
    assert found["count"] is None
    np.testing.assert_allclose(found["w"], 0.01, rtol=1e-6)
    with pytest.raises(ValueError, match="0 states of bsam found"):
        posterior_variance(optax.sgd(0.1).init(x))
    with pytest.raises(ValueError, match="2 states of bsam found"):
        posterior_variance((tx.init(x), tx.init(x)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate must"),
        ({"num_data": 0.0}, "num_data must"),
        ({"b1": 1.0}, "b1 must"),
        ({"b2": 1.5}, "b2 must"),
        ({"rho": -0.1}, "rho must"),
        ({"prior_precision": -1.0}, "prior_precision must"),
        ({"damping": 0.0}, "damping must"),
        ({"s_init": 0.0}, "s_init must"),
        ({"key": "x"}, "key must be a PRNG key"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        bsam(**{"learning_rate": 0.1, "num_data": 10.0, **options})


def test_what_update_needs():
    tx = bsam(0.1, 10.0)
    x = jnp.ones(2)
    with pytest.raises(ValueError, match="grad_fn"):
        tx.update(x, tx.init(x), x)
    named = bsam(0.1, 10.0, axis_name="d")
    with pytest.raises(ValueError, match="axis_name='d' is not mapped"):
        named.update(x, named.init(x), x, grad_fn=lambda x: x)
    with pytest.raises(ValueError, match="bsam takes real parameters"):
        tx.init(jnp.zeros(2, jnp.complex64))


def test_the_check_of_chains_knows_its_place():
    """It takes its own gradients: what a link before it does to one is lost."""
    x = {"w": jnp.ones(2)}
    oa.check_chain(optax.chain(bsam(0.1, 50.0), oa.ema_params(0.9)), x)
    with pytest.raises(ValueError, match="bsam does not stand first"):
        oa.check_chain(optax.chain(optax.clip(0.1), bsam(0.1, 50.0)), x)
    with pytest.raises(ValueError, match="bsam does not stand last"):
        oa.check_chain(optax.chain(bsam(0.1, 50.0), optax.scale(0.5)), x)
