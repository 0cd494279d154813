"""Whole models of Equinox: averages, sharpness, serialisation."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_avg as oa

average_of = oa.frameworks.equinox.averaged_model
value_and_grad = oa.frameworks.equinox.value_and_grad
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).normal(size=(6, 2)), jnp.float32)
arrays = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_array))
trainable = lambda model: eqx.filter(model, eqx.is_inexact_array)


class Net(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    head: eqx.nn.MLP
    calls: jax.Array

    def __init__(self, seed=0):
        keys = jax.random.split(jax.random.key(seed))
        self.first = eqx.nn.Linear(3, 3, key=keys[0])
        self.norm = eqx.nn.BatchNorm(3, "batch", mode="batch")
        self.dropout = eqx.nn.Dropout(0.5)
        self.head = eqx.nn.MLP(3, 2, 4, 1, key=keys[1])
        self.calls = jnp.array(0)

    def __call__(self, x, state, key):
        x, state = self.norm(self.first(x), state)
        return self.head(self.dropout(x, key=key)), state


def loss(model, state, key):
    keys = jax.random.split(key, len(X))
    each = jax.vmap(model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
    out, state = each(X, state, keys)
    return ((out - Y) ** 2).mean(), state


def mlp(seed=0):
    return eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(seed))


def plain_loss(model):
    return ((jax.vmap(model)(X) - Y) ** 2).mean()


def trained(tx, model, steps=3):
    state, seen = tx.init(trainable(model)), []

    @eqx.filter_jit
    def step(model, state):
        grads = eqx.filter_grad(plain_loss)(model)
        updates, state = tx.update(grads, state, trainable(model))
        return eqx.apply_updates(model, updates), state

    for _ in range(steps):
        model, state = step(model, state)
        seen.append(arrays(trainable(model)))
    return model, state, seen


TX = optax.chain(optax.adam(0.1), oa.polyak_average())


@pytest.mark.parametrize("jitted", [False, True])
def test_averaged_model(jitted):
    model, state, seen = trained(TX, mlp())
    read = eqx.filter_jit(average_of) if jitted else average_of
    average = read(model, state)
    for found, *iterates in zip(arrays(average), *seen):
        np.testing.assert_allclose(found, np.mean(iterates, axis=0), rtol=1e-5)
    assert average.activation is model.activation
    assert jax.tree.structure(average) == jax.tree.structure(model)
    assert jax.vmap(average)(X).shape == (6, 2)


def test_averaged_model_of_a_part_and_with_other_leaves():
    """Integers, running states and frozen parts come from the model."""
    model, _ = eqx.nn.make_with_state(Net)()
    trains = jax.tree.map(lambda _: False, model)
    trains = eqx.tree_at(lambda m: [m.first.weight, m.first.bias], trains, [True, True])
    tx = optax.chain(optax.sgd(1.0), oa.polyak_average())
    params = eqx.filter(model, trains)
    state = tx.init(params)
    _, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    average = average_of(model, state, filter_spec=trains)
    np.testing.assert_allclose(average.first.bias, model.first.bias - 1.0, rtol=1e-6)
    head = lambda model: arrays((model.head, model.calls))
    jax.tree.map(np.testing.assert_array_equal, head(average), head(model))
    with pytest.raises(ValueError, match=r"eqx\.filter"):
        average_of(model, state)


def test_leaves_that_are_not_filtered():
    model, state, _ = trained(TX, mlp())
    with pytest.raises(ValueError, match=r"eqx.filter\(model, eqx.is_inexact_array\)"):
        oa.averaged_params(state, model)
    with pytest.raises(TypeError, match=r"eqx.filter\(model, eqx.is_inexact_array\)"):
        oa.ema_params(0.9).init(model)


def test_update_without_params():
    model = mlp()
    state = TX.init(trainable(model))
    with pytest.raises(ValueError, match=r"with Equinox they are eqx.filter"):
        TX.update(eqx.filter_grad(plain_loss)(model), state)


# Sharpness


@pytest.mark.parametrize("jitted", [False, True])
def test_value_and_grad_is_sam_of_the_clean_pass(jitted):
    model, state = eqx.nn.make_with_state(Net)()
    clone = jax.tree.map(lambda x: x, state)
    key = jax.random.key(3)
    (value, after), g = eqx.filter_value_and_grad(loss, has_aux=True)(model, clone, key)
    scale = 0.3 / optax.tree.norm(g)
    there = eqx.apply_updates(model, jax.tree.map(lambda g: scale * g, g))
    clone = jax.tree.map(lambda x: x, state)
    wanted = eqx.filter_grad(loss, has_aux=True)(there, clone, key)[0]
    sharp = value_and_grad(loss, oa.rules.sam(0.3), has_aux=True)
    call = eqx.filter_jit(sharp) if jitted else sharp
    (found, aux), grads = call(model, state, key)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    assert jax.tree.structure(grads) == jax.tree.structure(g)
    for pairs in ((grads, wanted), (aux, after)):
        for a, b in zip(*map(arrays, pairs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_state_that_every_pass_uses_up():
    """Without ``vmap`` a model marks the state that it was given as old."""

    class Counting(eqx.Module):
        w: jax.Array
        calls: eqx.nn.StateIndex

        def __init__(self):
            self.w, self.calls = jnp.array(2.0), eqx.nn.StateIndex(jnp.array(0))

        def __call__(self, state):
            state = state.set(self.calls, state.get(self.calls) + 1)
            return 0.5 * self.w**2, state

    model, state = eqx.nn.make_with_state(Counting)()
    loss = lambda model, state: model(state)
    sharp = value_and_grad(loss, oa.rules.sam(0.5), has_aux=True)
    (_, after), grads = sharp(model, state)
    assert int(after.get(model.calls)) == 1
    np.testing.assert_allclose(grads.w, 2.5)


def test_a_global_perturbation_is_that_of_the_whole_batch():
    model = mlp()
    loss = lambda model, x, y: ((jax.vmap(model)(x) - y) ** 2).mean()
    over = {"axis_name": "d", "perturbation": "global"}
    sharp = value_and_grad(loss, oa.rules.sam(0.3), **over)
    parts = X.reshape(2, 3, 3), Y.reshape(2, 3, 2)
    _, found = jax.vmap(lambda x, y: sharp(model, x, y), axis_name="d")(*parts)
    _, wanted = value_and_grad(loss, oa.rules.sam(0.3))(model, X, Y)
    for a, b in zip(arrays(found), arrays(wanted), strict=True):
        np.testing.assert_allclose(a, np.stack([b, b]), rtol=1e-4, atol=1e-6)


def test_a_rule_with_a_state():
    model = mlp()
    rule = oa.rules.sam(lambda step: 0.3 / (1.0 + step))
    sharp = value_and_grad(plain_loss, rule)
    with pytest.raises(ValueError, match=r"rule_state = sharp\.init"):
        sharp(model)
    state = sharp.init(model)
    for step in range(3):
        value, grads, state = eqx.filter_jit(sharp)(model, rule_state=state)
        fixed = value_and_grad(plain_loss, oa.rules.sam(0.3 / (1.0 + step)))
        wanted, gradient = fixed(model)
        np.testing.assert_allclose(value, wanted, rtol=1e-6)
        for a, b in zip(arrays(grads), arrays(gradient), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_state_of_another_rule():
    model, rules = mlp(), (oa.rules.sam(lambda step: 0.1), oa.rules.momentum_sam(0.1))
    sharp = [value_and_grad(plain_loss, rule) for rule in rules]
    for one, other in (sharp, sharp[::-1]):
        with pytest.raises(ValueError, match="rule_state is not that of this rule"):
            one(model, rule_state=other.init(model))


def test_radii_and_where_like_the_model():
    model = mlp()
    radius = jax.tree.map(lambda _: 0.3, trainable(model))
    first = eqx.tree_at(
        lambda m: m.layers[1],
        radius,
        replace_fn=lambda layer: jax.tree.map(lambda _: 0.0, layer),
    )
    where = jax.tree.map(bool, first)
    grads = [
        arrays(value_and_grad(plain_loss, rule)(model)[1])
        for rule in (oa.rules.usam(first), oa.rules.usam(0.3, where=where))
    ]
    whole = arrays(value_and_grad(plain_loss, oa.rules.usam(0.3))(model)[1])
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert any(not np.allclose(a, b) for a, b in zip(grads[0], whole))


def test_serialisation_round_trip(tmp_path):
    tx = optax.chain(optax.adam(0.1), oa.window_average(2), oa.ema_params(0.9))
    model, state, _ = trained(tx, mlp())
    eqx.tree_serialise_leaves(tmp_path / "run.eqx", (model, state))
    empty = mlp(seed=1)
    like = (empty, tx.init(trainable(empty)))
    restored, restored_state = eqx.tree_deserialise_leaves(tmp_path / "run.eqx", like)
    for name in ("window", "ema"):
        pairs = [
            arrays(average_of(*each, name))
            for each in ((model, state), (restored, restored_state))
        ]
        jax.tree.map(np.testing.assert_array_equal, *pairs)
    assert jax.tree.structure(restored_state) == jax.tree.structure(state)
