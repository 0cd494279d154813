"""AdaHessian, U-DoG, Polyak's step and SPL+ against references and special cases."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_optimizers_b as reference
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

import optax_avg as oa
from optax_avg import optimizers

seeds = st.integers(0, 2**32 - 1)


# AdaHessian


def symmetric(size, seed):
    a = np.random.default_rng(seed).normal(size=(size, size))
    return a + a.T


@pytest.mark.parametrize(
    ("shape", "axes", "options"),
    [
        ((6,), (), {}),
        ((2, 3), (), {"hessian_power": 0.5}),
        ((2, 2, 1, 2), (0, 1), {}),
        ((2, 2, 1, 2), (), {"spatial_axes": lambda leaf: ()}),
        ((2, 4), (1,), {"spatial_axes": lambda leaf: (1,)}),
    ],
)
def test_adahessian(shape, axes, options):
    hessian = symmetric(np.prod(shape), 0)
    gradients = np.random.default_rng(1).normal(size=(3, *shape))
    tx = optimizers.scale_by_adahessian(0.8, 0.9, 1e-2, **options)
    signs, seen = [], []

    def hvp_fn(z):
        signs.append(np.asarray(z, np.float64))
        return jnp.asarray((hessian @ signs[-1].ravel()).reshape(shape))

    x = jnp.zeros(shape)
    state = tx.init(x)
    for g in gradients:
        u, state = tx.update(jnp.asarray(g), state, x, hvp_fn=hvp_fn)
        seen.append(u)
    k = options.get("hessian_power", 1.0)
    wanted = reference.adahessian(gradients, signs, hessian, 0.8, 0.9, 1e-2, k, axes)
    np.testing.assert_allclose(seen, wanted, rtol=1e-5, atol=1e-6)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert not np.array_equal(signs[0], signs[1])


def quartic(params):
    w, b = params["w"], params["b"]
    return jnp.sum((w @ b) ** 2) + jnp.sum(w**4) + jnp.sum(b**4)


def test_three_ways_to_pass_the_curvature():
    params = {"w": jnp.arange(6.0).reshape(3, 2) / 5, "b": jnp.array([1.0, -0.5])}
    grad_fn = jax.grad(quartic)
    hvp_fn = lambda v: oa.landscape.hessian_product(quartic, params, v)
    tx = optimizers.adahessian(0.1, weight_decay=0.1, key=jax.random.key(3))
    ways = ({"value_fn": quartic}, {"grad_fn": grad_fn}, {"hvp_fn": hvp_fn})
    step = lambda way: tx.update(grad_fn(params), tx.init(params), params, **way)[0]
    found = [jax.jit(lambda way=way: step(way))() for way in ways]
    chex.assert_trees_all_close(*found, rtol=1e-5)


def test_with_the_exact_diagonal_it_is_the_step_of_newton():
    """Decoupled weight decay is added to it."""
    loss = lambda x: jnp.sum(jnp.array([5.0, 1.0, 0.2]) * (x - 2) ** 2) / 2
    x = jnp.array([1.0, -1.0, 4.0])
    tx = optimizers.adahessian(1.0, eps=0.0, weight_decay=0.25)
    u, _ = tx.update(jax.grad(loss)(x), tx.init(x), x, value_fn=loss)
    np.testing.assert_allclose(x + u, 2 - 0.25 * x, rtol=1e-5)


def test_integers_beside_the_weights():
    params = {"w": jnp.array([1.0, 2.0]), "n": jnp.array(3), "none": None}
    loss = lambda p: jnp.sum(p["w"] ** 2) * p["n"]
    g = {"w": 6 * params["w"], "n": None, "none": None}
    tx = optimizers.scale_by_adahessian(eps=0.0)
    u, _ = tx.update(g, tx.init(params), params, value_fn=loss)
    assert u["n"] is None
    np.testing.assert_allclose(u["w"], params["w"], rtol=1e-6)


def test_adahessian_without_curvature_stays():
    tx = optimizers.scale_by_adahessian(eps=0.0)
    x = jnp.ones(2)
    u, _ = tx.update(x, tx.init(x), x, hvp_fn=jnp.zeros_like)
    assert u.tolist() == [0.0, 0.0]


def test_adahessian_says_what_it_needs():
    tx, x = optimizers.adahessian(0.15), jnp.ones(2)
    with pytest.raises(ValueError, match="value_fn=loss"):
        tx.update(x, tx.init(x), x)
    with pytest.raises(ValueError, match="takes real parameters"):
        tx.init(jnp.ones(2, complex))
    with pytest.raises(ValueError, match="hessian_power must lie"):
        optimizers.adahessian(0.15, hessian_power=2.0)


# U-DoG

CURVATURE = np.array([1.0, 0.3, 0.05, 2.0])


def noisy(x, call, xp=np):
    return CURVATURE.astype(x.dtype) * (x - 1) + xp.sin(xp.arange(4) + 7.0 * call)


def follow(tx, gradient, calls, x):
    """The parameters and the average after each call."""

    def body(carry, call):
        x, state = carry
        u, state = tx.update(gradient(x, call), state, x)
        x = optax.apply_updates(x, u)
        return (x, state), (x, oa.averaged_params(state, x))

    train = jax.jit(lambda c: jax.lax.scan(body, c, jnp.arange(calls * 1.0))[1])
    return train((x, tx.init(x)))


def at(seen, call):
    return jax.tree.map(lambda leaf: leaf[call], seen)


def test_u_dog():
    x0 = np.linspace(-2.0, 2.0, 4)
    tx = optimizers.u_dog(0.9, 1e-2)
    ours = follow(tx, lambda x, t: noisy(x, t, jnp), 40, jnp.asarray(x0, jnp.float32))
    wanted = reference.u_dog(noisy, x0, 21, 0.9, 1e-2)
    for t, (z, _) in enumerate(wanted[1:]):
        np.testing.assert_allclose(ours[0][2 * t + 1], z, rtol=2e-4, atol=2e-4)
    for t, (_, mean) in enumerate(wanted[:-1]):
        query, average = at(ours, 2 * t)
        np.testing.assert_allclose(average, mean, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(query, average, rtol=1e-6)
        np.testing.assert_allclose(ours[1][2 * t + 1], average, rtol=1e-6)


def test_u_dog_is_accelerated():
    """Four times as many steps, about a sixteenth of the error, on a quadratic."""
    curvature = jnp.asarray(1 / np.arange(1, 65) ** 2, jnp.float32)
    gradient = lambda x, t: curvature * (x - 1)
    _, average = follow(optimizers.u_dog(), gradient, 1600, jnp.zeros(64))
    error = lambda x: float(jnp.sum(curvature * (x - 1) ** 2) / 2)
    early, late = error(average[399]), error(average[1599])
    assert late < early / 10
    # Steps of length 1/L, which are not accelerated, are behind.
    assert late < error(1 - (1 - curvature) ** 1600)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_u_dog_does_not_see_the_scale_of_the_loss(scale):
    gradient = lambda x, t: noisy(x, t, jnp)
    scaled = lambda x, t: scale * gradient(x, t)
    x = jnp.linspace(-2.0, 2.0, 4)
    found, wanted = (follow(optimizers.u_dog(), g, 12, x) for g in (scaled, gradient))
    chex.assert_trees_all_close(found, wanted, rtol=1e-4)


def test_u_dog_on_several_leaves_is_that_on_one():
    x = jnp.linspace(-2.0, 2.0, 4)
    whole = at(follow(optimizers.u_dog(), lambda x, t: noisy(x, t, jnp), 10, x), -1)
    split = lambda x: {"a": x[:1], "b": x[1:].reshape(3, 1)}
    join = lambda p: jnp.concatenate([p["a"], p["b"].ravel()])
    gradient = lambda p, t: split(noisy(join(p), t, jnp))
    parts = at(follow(optimizers.u_dog(), gradient, 10, split(x)), -1)
    for ours, wanted in zip(parts, whole, strict=True):
        np.testing.assert_allclose(join(ours), wanted, rtol=1e-5)


def test_u_dog_at_a_minimum_stays():
    tx, x = optimizers.u_dog(), jnp.array([1.5, -2.0])
    state, update = tx.init(x), jax.jit(tx.update)
    for _ in range(4):
        u, state = update(jnp.zeros(2), state, x)
        assert u.tolist() == [0.0, 0.0]
    assert oa.averaged_params(state, x, "u_dog").tolist() == x.tolist()


def test_u_dog_in_bfloat16_keeps_its_own_place():
    """The iterates do not round to the dtype of the parameters."""
    gradient = lambda x, t: CURVATURE.astype(np.float32) * (x.astype(jnp.float32) - 1)
    narrow = lambda x, t: gradient(x, t).astype(x.dtype)
    x = jnp.linspace(-2.0, 2.0, 4)
    _, wanted = follow(optimizers.u_dog(), gradient, 300, x)
    _, found = follow(optimizers.u_dog(), narrow, 300, x.astype(jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found[-1], float), wanted[-1], atol=0.05)


def test_u_dog_says_what_it_needs():
    with pytest.raises(ValueError, match="reps_rel must lie"):
        optimizers.u_dog(reps_rel=0.0)
    with pytest.raises(ValueError, match="u_dog needs the parameters"):
        optimizers.u_dog().update(jnp.ones(1), optimizers.u_dog().init(jnp.ones(1)))


# Polyak's step


def with_diagonal(diagonal):
    """A preconditioner: the gradient divided by a diagonal."""
    return optax.stateless(lambda g, _: g / diagonal)


@given(seed=seeds)
def test_polyak_is_that_of_optax_in_other_units(seed):
    """Polyak's step in ``y = sqrt(B) x`` is the preconditioned one in ``x``."""
    rng = np.random.default_rng(seed)
    root = jnp.asarray(np.exp(rng.normal(size=5)), jnp.float32)
    x, g = (jnp.asarray(rng.normal(size=5), jnp.float32) for _ in range(2))
    f = float(rng.exponential())
    plain = optax.polyak_sgd(max_learning_rate=1e9, f_min=-0.5)
    wanted, _ = plain.update(g / root, plain.init(x), root * x, value=f)
    tx = optimizers.preconditioned_polyak(with_diagonal(root**2), f_min=-0.5)
    found, _ = tx.update(g, tx.init(x), x, value=f)
    np.testing.assert_allclose(found, wanted / root, rtol=1e-4)


def brute_force(n, f, s, cost, bounds):
    """The step and the slack of the problem of which the closed form is."""
    goal = lambda v: v[0] ** 2 * n / 2 + (v[1] - s) ** 2 / 2 + cost(v[1])
    model = {"type": "ineq", "fun": lambda v: v[1] - (f - v[0] * n)}
    start = [f / n, max(s, 0.0)]
    found = scipy.optimize.minimize(
        goal, start, bounds=[(None, None), bounds], constraints=[model], tol=1e-12
    )
    return found.x


@pytest.mark.parametrize("slack", ["l1", "l2"])
@given(seed=seeds)
def test_slack_solves_its_problem(slack, seed):
    rng = np.random.default_rng(seed)
    g, diagonal = rng.normal(size=3), np.exp(rng.normal(size=3))
    f, s, lam = rng.exponential(), rng.exponential(), rng.uniform(0.1, 2)
    tx = optimizers.preconditioned_polyak(with_diagonal(diagonal), slack=slack, lam=lam)
    x = jnp.zeros(3)
    state = tx.init(x)._replace(slack_value=jnp.float32(s))
    u, state = tx.update(jnp.asarray(g, jnp.float32), state, x, value=f)
    cost = (lambda s: lam * s) if slack == "l1" else (lambda s: lam / 2 * s**2)
    bounds = (0, None) if slack == "l1" else (None, None)
    gamma, wanted = brute_force(np.sum(g**2 / diagonal), f, s, cost, bounds)
    np.testing.assert_allclose(u, -gamma * g / diagonal, rtol=1e-2, atol=2e-3)
    np.testing.assert_allclose(float(state.slack_value), wanted, atol=2e-3)


def test_the_scale_of_the_preconditioner_cancels():
    x, g = jnp.ones(3), jnp.array([1.0, -2.0, 3.0])
    steps = []
    for scale in (1e-3, 1.0, 1e3):
        tx = optimizers.preconditioned_polyak(optax.scale(scale))
        steps.append(tx.update(g, tx.init(x), x, value=2.0)[0])
    for found in steps:
        np.testing.assert_allclose(found, -2 / 14 * g, rtol=1e-6)


def test_polyak_solves_a_quadratic_of_any_condition():
    scales = jnp.array([1e4, 1.0, 1e-4])
    loss = lambda x: jnp.sum(scales * x**2)
    tx = optimizers.preconditioned_polyak(
        optimizers.scale_by_adahessian(0.0, 0.5, eps=0.0)
    )
    x = jnp.array([1.0, -2.0, 3.0])
    state = tx.init(x)
    for _ in range(12):
        value, g = jax.value_and_grad(loss)(x)
        u, state = tx.update(g, state, x, value=value, value_fn=loss)
        x = optax.apply_updates(x, u)
    np.testing.assert_allclose(x, 0, atol=1e-2)


def test_limits_and_schedules_of_the_polyak_step():
    rates = optax.piecewise_constant_schedule(1.0, {1: 0.5})
    tx = optimizers.preconditioned_polyak(
        optax.identity(), rates, max_learning_rate=0.25
    )
    x = jnp.ones(1)
    state = tx.init(x)
    seen = []
    for value in (0.1, 9.0, -1.0):
        u, state = tx.update(jnp.ones(1), state, x, value=value)
        seen.append(float(u[0]))
    assert seen == pytest.approx([-0.1, -0.125, 0.0])


def test_what_does_not_descend_takes_no_step():
    x = jnp.ones(2)
    for make, g in ((optax.scale(-1.0), x), (optax.identity(), 0 * x)):
        tx = optimizers.preconditioned_polyak(make, slack="l2")
        state = tx.init(x)._replace(slack_value=jnp.float32(0.5))
        u, after = tx.update(g, state, x, value=1.0)
        assert u.tolist() == [0.0, 0.0]
        assert float(after.slack_value) == 0.5


def test_the_loss_must_be_given_as_one_number():
    x = jnp.ones(2)
    polyak = optimizers.preconditioned_polyak(optax.identity())
    for tx in (optimizers.spl_plus(0.1), polyak):
        with pytest.raises(ValueError, match="needs the loss"):
            tx.update(x, tx.init(x), x)
        with pytest.raises(ValueError, match="must be one number"):
            tx.update(x, tx.init(x), x, value=x)
    with pytest.raises(ValueError, match="slack must be None, 'l1' or 'l2'"):
        optimizers.preconditioned_polyak(optax.identity(), slack="l3")
    with pytest.raises(TypeError, match="needs an optimizer"):
        optimizers.preconditioned_polyak(0.1)


# SPL+


@given(seed=seeds)
def test_spl_minimises_its_model(seed):
    """Along the gradient the model depends on two numbers; on a grid none is lower."""
    rng = np.random.default_rng(seed)
    f, a, n = rng.normal(), rng.normal(), rng.exponential()
    lr, lr_a, beta = *rng.uniform(0.1, 2, size=2), rng.uniform(0, 0.9)
    tx = optimizers.spl_plus(lr, lr_a, beta, first_quantile=a)
    g = jnp.array([np.sqrt(n)], jnp.float32)
    u, state = tx.update(g, tx.init(g), None, value=f)

    def model(step, new):  # w - w_t = -step g
        excess = np.maximum(f - step * n - new, 0) / (1 - beta)
        return new + excess + step**2 * n / (2 * lr) + (new - a) ** 2 / (2 * lr_a)

    found = -float(u[0]) / np.sqrt(n), float(state.loss_quantile)
    steps, news = np.meshgrid(np.linspace(-1, 20, 301), np.linspace(-20, 20, 301))
    assert model(*found) <= model(steps, news).min() + 1e-4
    near = np.linspace(-0.05, 0.05, 41)
    steps, news = np.meshgrid(found[0] + near, found[1] + near)
    assert model(*found) <= model(steps, news).min() + 1e-4


def test_spl_far_from_the_quantile_is_the_subgradient_method():
    """Steps of ``g/(1 - beta)`` above it, and none below."""
    tx, g = optimizers.spl_plus(0.1, 0.5, beta=0.75), jnp.array([1.0, -2.0])
    for value, eta in ((100.0, 4.0), (-100.0, 0.0)):
        u, state = tx.update(g, tx.init(g), value=value)
        np.testing.assert_allclose(u, -0.1 * eta * g, rtol=1e-6)
        assert float(state.loss_quantile) == pytest.approx(-0.5 * (1 - eta))


def test_the_units_of_the_two_rates():
    """Of a loss times ``c`` the steps are the same with ``lr/c`` and ``c lr_a``."""
    x, g = jnp.ones(2), jnp.array([1.0, -3.0])
    found = []
    for c in (1.0, 100.0):
        tx = optimizers.spl_plus(0.1 / c, 0.5 * c)
        state = tx.init(x)
        for value in (1.0, 4.0, 2.0):
            u, state = tx.update(c * g, state, x, value=c * value)
        found.append((u, state.loss_quantile / c))
    chex.assert_trees_all_close(*found, rtol=1e-5)


def test_spl_finds_the_minimum_of_the_worst_losses():
    """Of losses ``|w - c|``, nine with ``c = 0`` and one with ``c = 4``.

    The worst twentieth is ``4 - w`` below 2 and ``w`` above.
    """
    tx = optimizers.spl_plus(0.002, beta=0.95)
    centres = jnp.asarray(np.random.default_rng(0).permutation([0.0] * 9 + [4.0]))

    def body(carry, i):
        w, state = carry
        value, g = jax.value_and_grad(lambda w: jnp.abs(w - centres[i % 10]))(w)
        u, state = tx.update(g, state, w, value=value)
        return (w + u, state), None

    start = jnp.float32(0.0)
    (w, state), _ = jax.lax.scan(body, (start, tx.init(start)), jnp.arange(20_000))
    assert float(w) == pytest.approx(2.0, abs=0.1)
    assert float(state.loss_quantile) == pytest.approx(2.0, abs=0.1)
