"""Means of gradients that leave rows out by their losses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import optax_avg as oa

N, DIM, STEPS = 8, 5, 6


def adaptive_k(rows, losses, beta1=0.9, beta2=0.999, eps=1e-8):
    """Means of each step, in float64, from the equations of the paper's code."""
    m = v = 0.0
    means = []
    for x, loss in zip(np.asarray(rows, float), np.asarray(losses, float), strict=True):
        m = beta1 * m + (1 - beta1) * loss.mean()
        v = beta2 * v + (1 - beta2) * loss.mean() ** 2
        chosen = loss <= m / (np.sqrt(v) + eps)
        means.append(x[chosen].sum(0) / max(chosen.sum(), 1))
    return np.stack(means)


def problem(seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(STEPS, N, DIM)).astype(np.float32)
    return jnp.asarray(rows), jnp.asarray(rng.gamma(1.0, 2.0, (STEPS, N)), jnp.float32)


def run(tx, rows, losses, state=None):
    step = jax.jit(lambda x, s, l: tx.update(x, s, losses=l))
    state = tx.init(jnp.zeros(DIM)) if state is None else state
    found = []
    for x, loss in zip(rows, losses, strict=True):
        z, state = step(x, state, loss)
        found.append(z)
    return jnp.stack(found), state


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_reference(betas):
    rows, losses = problem()
    found, state = run(oa.adaptive_k_mean(*betas), rows, losses)
    np.testing.assert_allclose(found, adaptive_k(rows, losses, *betas), atol=1e-6)
    assert state.aggregation_step == STEPS
    # Some rows were left out in some step, and not all of them.
    shares = np.abs(found - rows.mean(1)).max(1)
    assert shares.max() > 0.01
    assert np.abs(found).max(1).max() > 0


def test_equals_the_gradient_of_the_weighted_loss():
    """As the docstring says: weights in the loss need no gradient of each example."""
    batch = jnp.linspace(-3.0, 9.0, N)
    loss = lambda x, b: (x - b) ** 2 / 4
    x, memory = jnp.array(0.5), oa.losses.adaptive_k_start()
    each, grads = jax.vmap(jax.value_and_grad(loss), (None, 0))(x, batch)
    tx = oa.adaptive_k_mean()
    z, state = tx.update(grads, tx.init(x), x, losses=each)

    def weighted(x):
        values = jax.vmap(loss, (None, 0))(x, batch)
        weights, new = oa.losses.adaptive_k(values, memory)
        return jnp.sum(weights * values), new

    wanted, new = jax.grad(weighted, has_aux=True)(x)
    assert 0 < jnp.sum(each > 3.17) < N
    np.testing.assert_allclose(z, wanted, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, state.aggregation_memory, new)


def test_equal_losses_give_the_mean():
    rows, _ = problem()
    found, _ = run(oa.adaptive_k_mean(), rows[:1], jnp.ones((1, N)))
    np.testing.assert_allclose(found[0], rows[0].mean(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_row_that_is_not_finite_counts_nowhere(bad, where):
    rows, losses = problem()
    tx = oa.adaptive_k_mean()
    wanted, kept = run(tx, rows[:, 1:], losses[:, 1:])
    if where == "gradient":
        found, state = run(tx, rows.at[:, 0, 2].set(bad), losses.at[:, 0].set(0.0))
        assert state.left_out == STEPS
    else:
        found, state = run(tx, rows, losses.at[:, 0].set(bad))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    memory, kept = state.aggregation_memory, kept.aggregation_memory
    np.testing.assert_allclose(memory, kept, rtol=1e-6)


def test_no_row_below_the_threshold_gives_zero():
    tx = oa.adaptive_k_mean()
    state = tx.init(jnp.zeros(2))
    z, _ = tx.update(jnp.ones((3, 2)), state, losses=jnp.array([4.0, 5.0, 6.0]))
    assert z.tolist() == [0.0, 0.0]  # the first threshold is sqrt(10)


@pytest.mark.parametrize("rows_each", [None, 2])
@pytest.mark.parametrize("check_vma", [True, False])
def test_the_threshold_is_that_of_all_devices(rows_each, check_vma):
    rows, losses = problem()
    devices = N if rows_each is None else N // rows_each
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), "d")
    axis = None if rows_each is None else 0
    tx = oa.adaptive_k_mean(per_elt_axis=axis, axis_name="d")
    state = tx.init(jnp.zeros(DIM))

    def own(x, loss, state):
        x, loss = (x[0], loss[0]) if rows_each is None else (x, loss)
        return tx.update(x, state, losses=loss)

    specs = {"in_specs": (P("d"), P("d"), P()), "out_specs": P()}
    step = jax.jit(jax.shard_map(own, mesh=mesh, check_vma=check_vma, **specs))
    found = []
    for x, loss in zip(rows, losses, strict=True):
        z, state = step(x, loss, state)
        found.append(np.asarray(z))
    np.testing.assert_allclose(found, adaptive_k(rows, losses), atol=1e-6)


def test_errors_name_the_call():
    tx = optax.with_extra_args_support(oa.adaptive_k_mean())
    state, rows = tx.init(jnp.zeros(2)), jnp.ones((3, 2))
    with pytest.raises(ValueError, match="losses=losses"):
        tx.update(rows, state)
    with pytest.raises(ValueError, match=r"2 losses of shape \(2,\) for 3 rows"):
        tx.update(rows, state, losses=jnp.ones(2))
    for name in ("beta1", "beta2", "eps"):
        with pytest.raises(ValueError, match=name):
            oa.adaptive_k_mean(**{name: -1.0})
