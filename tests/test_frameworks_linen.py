"""Flax linen: a TrainState that hands arguments on, and checkpoints of averages."""

from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax.training import checkpoints, train_state

import optax_avg as oa

TrainState = oa.frameworks.linen.TrainState
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
MODEL = nn.Dense(2)
PARAMS = MODEL.init(jax.random.key(0), X)["params"]


def loss(params):
    return (MODEL.apply({"params": params}, X) ** 2).mean()


def new(tx, kind=TrainState, **fields):
    return kind.create(apply_fn=MODEL.apply, params=PARAMS, tx=tx, **fields)


def stepped(state, steps=3, **extra):
    for _ in range(steps):
        state = state.apply_gradients(grads=jax.grad(loss)(state.params), **extra)
    return state


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def averages():
    return optax.chain(
        optax.adam(0.1),
        oa.average({"ema": oa.weights.ema(0.9), "window": oa.memories.window(2)}),
        oa.ema_params(0.9, name="narrow", accumulator_dtype=jnp.bfloat16),
    )


def test_extra_arguments_reach_the_optimizer():
    grad_fn = jax.grad(loss)
    tx = optax.chain(oa.sam(0.5), optax.sgd(0.1))
    found = jax.jit(lambda state: stepped(state, grad_fn=grad_fn))(new(tx))
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        params = optax.apply_updates(params, updates)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found.params, params
    )
    assert int(found.step) == 3
    assert found.tx is tx


def test_values_reach_a_scheduler():
    tx = optax.chain(
        optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1, cooldown=0)
    )
    found = stepped(new(tx), 4, value=jnp.array(1.0))
    assert float(optax.tree.get(found.opt_state, "scale")) < 1


class WithStats(TrainState):
    batch_stats: Any


def test_fields_are_replaced():
    state = new(optax.chain(oa.sam(0.5), optax.sgd(0.1)), WithStats, batch_stats=0)
    state = stepped(state, 1, batch_stats=7, grad_fn=jax.grad(loss))
    assert state.batch_stats == 7
    assert isinstance(state, WithStats)


def test_without_extra_arguments_it_is_that_of_flax():
    for tx in (optax.adam(0.1), averages()):
        equal(
            stepped(new(tx)).opt_state,
            stepped(new(tx, train_state.TrainState)).opt_state,
        )


def test_arguments_that_nobody_takes():
    plain = optax.GradientTransformation(*optax.identity()[:2])
    with pytest.raises(TypeError, match=r"\['valu'\] are no fields .* takes no extra"):
        stepped(new(plain), 1, valu=1.0)


def test_statistics_that_no_field_takes():
    """A chain takes any extra argument, and would drop them without a word."""
    state = new(optax.chain(optax.sgd(0.1), oa.ema_params(0.9)))
    with pytest.raises(TypeError, match="a line batch_stats: Any"):
        stepped(state, 1, batch_stats={"mean": jnp.zeros(2)})


def test_averaged_params():
    state = stepped(new(averages()))
    for name in ("ema", "window", "narrow"):
        found = jax.jit(lambda state, name=name: state.averaged_params(name))(state)
        wanted = oa.averaged_params(state.opt_state, state.params, name)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, wanted
        )
    with pytest.raises(ValueError, match="pass name="):
        state.averaged_params()


def test_variables_are_told_what_to_pass():
    state = stepped(new(optax.chain(optax.sgd(0.1), oa.ema_params(0.9))))
    variables = {"params": state.params, "batch_stats": {"mean": jnp.zeros(2)}}
    with pytest.raises(ValueError, match=r"pass variables\['params'\]"):
        oa.averaged_params(state, variables)


# Checkpoints


def test_msgpack_round_trip():
    state = stepped(new(averages()))
    restored = flax.serialization.from_bytes(
        new(averages()), flax.serialization.to_bytes(state)
    )
    equal(restored.opt_state, state.opt_state)
    again, wanted = stepped(restored, 2), stepped(state, 2)
    equal(again.params, wanted.params)
    equal(again.averaged_params("ema"), wanted.averaged_params("ema"))


def test_checkpoints_of_flax(tmp_path):
    state = stepped(new(averages()))
    checkpoints.save_checkpoint(tmp_path, state, 3)
    restored = checkpoints.restore_checkpoint(tmp_path, new(averages()))
    assert int(restored.step) == 3
    equal(restored.opt_state, state.opt_state)


def test_orbax_round_trip(tmp_path):
    state = stepped(new(averages()))
    keep = lambda state: {"params": state.params, "opt_state": state.opt_state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", keep(state))
        checkpointer.wait_until_finished()
        empty = jax.eval_shape(lambda: keep(new(averages())))
        restored = checkpointer.restore(tmp_path / "state", empty)
    equal(restored, keep(state))


def test_an_old_checkpoint_into_a_chain_with_a_new_average():
    old_tx = optax.chain(optax.adam(0.1), oa.ema_params(0.9))
    saved = flax.serialization.to_bytes(stepped(new(old_tx)))
    old = flax.serialization.from_bytes(new(old_tx), saved)
    tx = optax.chain(optax.adam(0.1), oa.ema_params(0.9), oa.window_average(2))
    fresh = new(tx)
    state = fresh.replace(
        step=old.step,
        params=old.params,
        opt_state=oa.migrate_state(fresh.opt_state, old.opt_state),
    )
    equal(state.averaged_params("ema"), old.averaged_params())
    equal(state.averaged_params("window"), old.params)
    equal(stepped(state).averaged_params("ema"), stepped(old).averaged_params())
