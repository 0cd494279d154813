"""The recipes of docs/recipes.md, against hand-made numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_avg as oa

A = np.array([[2.0, 0.5], [0.5, 1.0]], np.float32)
X = jnp.array([1.0, -2.0])


def quadratic(x):
    return 0.5 * x @ (A @ x)


def test_mesa_pulls_the_student_to_the_average():
    """At the optimum of the base loss the teacher is all that is left."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
    tx = optax.chain(optax.sgd(0.5), oa.ema_params(0.9, debias=False))
    teacher = {"w": jnp.zeros((3, 4)).at[0, 0].set(2.0)}
    opt_state = tx.init(teacher)
    _, opt_state = tx.update({"w": jnp.zeros((3, 4))}, opt_state, teacher)
    params = {"w": jnp.zeros((3, 4))}

    def loss(params, teacher):
        return oa.trajectory_loss(x @ params["w"], x @ teacher["w"], 2.0)

    start = loss(params, oa.averaged_params(opt_state, params))
    for _ in range(300):
        target = oa.averaged_params(opt_state, params)
        grads = jax.grad(loss)(params, target)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    assert float(loss(params, target)) < 0.01 * float(start)


def test_flooding_turns_the_gradient_below_the_level():
    for level, sign in ((0.0, 1.0), (100.0, -1.0)):
        flooded = lambda x, b=level: jnp.abs(quadratic(x) - b) + b
        sharp = oa.sharpness_aware(jax.value_and_grad(flooded), oa.rules.sam(0.0))
        _, grads, _ = sharp(X, sharp.init(X))
        np.testing.assert_allclose(grads, sign * A @ X, rtol=1e-6)


def test_fedspeed():
    alpha, rho, lam = 0.75, 0.125, 4.0
    rule = oa.rules.gradient_regularisation(gamma=alpha * rho, rho=rho)
    sharp = oa.sharpness_aware(jax.value_and_grad(quadratic), rule)
    _, grads, _ = sharp(X, sharp.init(X))
    server, correction = jnp.array([0.5, 0.5]), jnp.array([0.25, -0.25])
    found = grads + (X - server) / lam - correction
    g0 = A @ X
    quasi = (1 - alpha) * g0 + alpha * A @ (X + rho * g0)
    np.testing.assert_allclose(found, quasi + (X - server) / lam - correction, 1e-6)


def test_booster():
    """``grad f + lam (grad h(x) - grad h(x - alpha u(grad h)))``."""
    alpha, lam = 0.5, 3.0
    harm = lambda x: jnp.sum(x**4)
    harmful = oa.sharpness_aware(
        jax.value_and_grad(lambda x: -harm(x)), oa.rules.sam(alpha)
    )
    _, minus_hd, _ = harmful(X, harmful.init(X))
    found = jax.grad(quadratic)(X) + lam * (jax.grad(harm)(X) + minus_hd)
    h0 = 4 * np.asarray(X) ** 3
    there = np.asarray(X) - alpha * h0 / np.linalg.norm(h0)
    np.testing.assert_allclose(found, A @ X + lam * (h0 - 4 * there**3), rtol=1e-5)
