"""Training that continues from averages, against references and Optax's Lookahead."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

import optax_avg as oa

DIRECTION = lambda x: -0.1 * (x - 3.0)


def train(tx, x, steps, trace=None):
    state = tx.init(x)
    update = jax.jit(lambda s, x: tx.update(x - 3.0, s, x))
    for _ in range(steps):
        updates, state = update(state, x)
        x = optax.apply_updates(x, updates)
        if trace is not None:
            trace.append(x)
    return x, state


@given(st.integers(1, 6), st.floats(0.0, 1.0), st.integers(1, 20))
def test_lookahead_reference(period, alpha, steps):
    x = jnp.array([0.0, 10.0])
    tx = optax.chain(optax.sgd(0.1), oa.lookahead(period, alpha))
    wanted = reference.lookahead(x, DIRECTION, steps, period, alpha)
    np.testing.assert_allclose(train(tx, x, steps)[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fast", [optax.sgd(0.1, momentum=0.9), optax.adam(0.1)])
def test_lookahead_has_the_iterates_of_optax(fast):
    x = jnp.array([0.0, 10.0])
    theirs = optax.lookahead(fast, sync_period=5, slow_step_size=0.5)
    pair = optax.LookaheadParams.init_synced(x)
    state = theirs.init(pair)
    ours = []
    train(optax.chain(fast, oa.lookahead(5, 0.5)), x, 17, trace=ours)
    for iterate in ours:
        updates, state = theirs.update(pair.fast - 3.0, state, pair)
        pair = optax.apply_updates(pair, updates)
        np.testing.assert_allclose(iterate, pair.fast, rtol=2e-5)


@given(st.integers(1, 6), st.floats(0.1, 0.99), st.integers(1, 20))
def test_switch_ema_reference(every, decay, steps):
    x = jnp.array([0.0, 10.0])
    tx = optax.chain(optax.sgd(0.1), oa.switch_ema(decay, every))
    wanted = reference.switch_ema(x, DIRECTION, steps, every, decay)
    np.testing.assert_allclose(train(tx, x, steps)[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "tx", [oa.switch_ema(0.5, 2), oa.lookahead(2, 0.5)], ids=["switch", "lookahead"]
)
def test_leaves_without_an_update_stay(tx):
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    state = tx.init(params)
    for u in (jnp.zeros(2), jnp.ones(2)):
        updates, state = tx.update({"a": u, "b": None}, state, params)
    assert updates["b"] is None
    assert (updates["a"] != 1).all()


def test_training_holds_the_average_after_a_switch():
    tx = optax.chain(optax.adam(0.3), oa.switch_ema(0.5, every=4))
    x, state = train(tx, jnp.array([0.0, 10.0]), 8)
    np.testing.assert_allclose(x, oa.averaged_params(state, x), rtol=1e-6)
    x, state = train(tx, x, 1)
    assert not np.allclose(x, 3.0)


def test_optimizer_state_is_left_alone():
    x = jnp.array([0.0, 10.0])
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), oa.switch_ema(0.5, every=1))
    _, state = train(tx, x, 1)
    np.testing.assert_allclose(optax.tree.get(state, "trace"), x - 3.0)


def test_nothing_is_written_before_the_first_iterate():
    x = jnp.array([0.0, 10.0])
    plain = train(optax.sgd(0.1), x, 4)[0]
    tx = optax.chain(optax.sgd(0.1), oa.write_back(oa.tail_average(start=5), every=2))
    np.testing.assert_array_equal(train(tx, x, 4)[0], plain)


def test_leaves_that_are_not_averaged_keep_their_updates():
    where = {"a": True, "b": False}
    tx = oa.write_back(oa.ema_params(0.5, debias=False, where=where), every=1)
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    updates = jax.tree.map(lambda x: 2 * x, params)
    new, _ = tx.update(updates, tx.init(params), params)
    np.testing.assert_allclose(new["a"], [1.0, 1.0])
    np.testing.assert_array_equal(new["b"], [2.0, 2.0])


def test_an_exploding_step_is_replaced_by_the_average():
    tx = oa.switch_ema(0.5, every=1)
    x = jnp.array([1.0])
    state = tx.init(x)
    _, state = tx.update(jnp.array([1.0]), state, x)
    updates, state = tx.update(jnp.array([jnp.nan]), state, x)
    np.testing.assert_array_equal(x + updates, [2.0])


def test_any_single_average_can_be_written_back():
    for average in (oa.window_average(3), oa.bema(), oa.power_ema(0.1)):
        tx = optax.chain(optax.sgd(0.1), oa.write_back(average, every=3))
        x, state = train(tx, jnp.array([0.0, 10.0]), 3)
        np.testing.assert_allclose(x, oa.averaged_params(state, x), rtol=1e-6)


@pytest.mark.parametrize("inner", [optax.sgd(0.1), oa.power_ema([0.05, 0.1])])
def test_write_back_needs_one_average(inner):
    with pytest.raises(ValueError, match="needs a transformation with one average"):
        oa.write_back(inner, 2).init(jnp.ones(2))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda average: optax.chain(optax.sgd(0.1), average),
        optax.chain,
        lambda average: optax.masked(average, True),
    ],
)
def test_write_back_needs_the_average_itself(wrap):
    tx = oa.write_back(wrap(oa.ema_params(0.9)), 2)
    with pytest.raises(ValueError, match=r"'ema' itself.*optimizer, write_back\(av"):
        tx.init(jnp.ones(2))


@pytest.mark.parametrize(("own", "every"), [(1, 3), (2, 3), (3, 3), (2, 4)])
def test_write_back_goes_on_at_the_largest_integer(own, every):
    tx = oa.write_back(oa.ema_params(0.5, debias=False, every=own), every)
    last, period = 2**31 - 1, np.lcm(own, every)
    step = jnp.int32(last - last % period)
    state = tx.init(jnp.zeros(1))._replace(step=step, absorbed=jnp.int32(5))
    update = jax.jit(lambda state: tx.update(jnp.ones(1), state, jnp.zeros(1)))
    written, absorbed = [], []
    for _ in range(3 * period):
        before = int(state.absorbed)
        updates, state = update(state)
        written.append(float(updates[0]) < 1)
        absorbed.append(int(state.absorbed) > before)
    wanted = np.arange(1, 1 + 3 * period)
    assert written == (wanted % every == 0).tolist()
    assert absorbed == (wanted % own == 0).tolist()


def test_lookahead_goes_on_at_the_largest_integer():
    tx = oa.lookahead(3, 0.5)
    last = 2**31 - 1
    state = tx.init(jnp.zeros(1))._replace(step=jnp.int32(last - last % 3), absorbed=5)
    updates = []
    for _ in range(9):
        update, state = tx.update(jnp.ones(1), state, jnp.zeros(1))
        updates.append(float(update[0]))
    # Every third step leads half the way from the slow weights: 1/2, 3/4, 7/8.
    assert updates == [1, 1, 0.5, 1, 1, 0.75, 1, 1, 0.875]
