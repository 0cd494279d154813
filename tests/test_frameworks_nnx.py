"""Whole models of Flax nnx: averages and sharpness."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_avg as oa

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).normal(size=(6, 2)), jnp.float32)
average_of = oa.frameworks.nnx.averaged_model
value_and_grad = oa.frameworks.nnx.value_and_grad


class Net(nnx.Module):
    """BatchNorm, Dropout, a layer that is used twice under two names, a buffer."""

    def __init__(self, seed=0, rate=0.5):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.again = self.first
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x):
        self.calls[...] += 1
        x = self.dropout(self.norm(self.again(jnp.tanh(self.first(x)))))
        return self.head(x)


def loss_fn(model, x, y):
    return ((model(x) - y) ** 2).mean()


def arrays(tree):
    """The leaves, keys of random numbers as numbers."""
    key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return [
        np.asarray(jax.random.key_data(x) if key(x) else x)
        for x in jax.tree.leaves(tree)
    ]


def equal(a, b):
    for x, y in zip(arrays(a), arrays(b), strict=True):
        np.testing.assert_array_equal(x, y)


def trained(model, steps=3, wrt=nnx.Param, extra=()):
    tx = optax.chain(optax.sgd(0.1), oa.polyak_average(), *extra)
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)
    seen = []

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, wrt))(model, X, Y)
        optimizer.update(model, grads)

    for _ in range(steps):
        step(model, optimizer)
        seen.append(arrays(nnx.state(model, wrt)))
    return optimizer, seen


# The package


def test_nothing_is_imported_before_it_is_asked_for():
    code = (
        "import sys, optax_avg as oa;"
        "named = {'flax', 'equinox'} & set(sys.modules); assert not named, named;"
        "assert 'nnx' in dir(oa.frameworks);"
        "oa.frameworks.nnx.averaged_model;"
        "assert 'flax' in sys.modules and 'equinox' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'torch'"):
        oa.frameworks.torch  # noqa: B018


# Averages


@pytest.mark.parametrize("jitted", [False, True])
def test_averaged_model(jitted):
    model = Net()
    optimizer, seen = trained(model)
    before = arrays(nnx.state(model))
    read = nnx.jit(average_of) if jitted else average_of
    average = read(model, optimizer)
    for found, *iterates in zip(arrays(nnx.state(average, nnx.Param)), *seen):
        np.testing.assert_allclose(found, np.mean(iterates, axis=0), rtol=1e-5)
    equal(nnx.state(average, nnx.Not(nnx.Param)), nnx.state(model, nnx.Not(nnx.Param)))
    assert average.again is average.first
    assert average.first is not model.first
    average.eval()
    average(X)
    average.norm.mean[...] += 1.0
    equal(nnx.state(model), before)
    assert not model.norm.use_running_average


def test_averaged_model_shares_no_array_with_the_model():
    """The arrays of training may be donated afterwards."""
    model = Net()
    optimizer, _ = trained(model)
    average = average_of(model, optimizer)
    wanted = arrays(nnx.state(average))
    for leaf in jax.tree.leaves(nnx.state((model, optimizer))):
        leaf.delete()
    equal(nnx.state(average), wanted)


def test_parameters_that_the_average_leaves_out_are_copied():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    kernels = lambda params: jax.tree.map(lambda x: x.ndim == 2, params)
    tx = optax.chain(optax.sgd(0.1), optax.masked(oa.ema_params(0.9), kernels))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    average = average_of(model, optimizer)
    bias = np.array(model.bias[...])
    model.bias[...].delete()
    np.testing.assert_array_equal(average.bias[...], bias)


def test_averaged_model_of_some_variables():
    model = Net()
    head = nnx.All(nnx.Param, nnx.PathContains("head"))
    optimizer, seen = trained(model, wrt=head)
    average = average_of(model, optimizer)
    for found, *iterates in zip(arrays(nnx.state(average, head)), *seen):
        np.testing.assert_allclose(found, np.mean(iterates, axis=0), rtol=1e-5)
    equal(nnx.state(average, nnx.Not(head)), nnx.state(model, nnx.Not(head)))


def test_averaged_model_by_name():
    model = Net()
    optimizer, _ = trained(model, extra=(oa.ema_params(0.5),))
    found = nnx.state(average_of(model, optimizer, "ema"), nnx.Param)
    equal(found, oa.averaged_params(optimizer, nnx.state(model, nnx.Param), "ema"))
    with pytest.raises(ValueError, match="pass name="):
        average_of(model, optimizer)
    with pytest.raises(TypeError, match=r"needs the nnx\.Optimizer"):
        average_of(model, optimizer.opt_state, "ema")


def test_whole_states_and_models_are_told_what_to_pass():
    model = Net()
    optimizer, _ = trained(model)
    for whole in (nnx.state(model), model):
        with pytest.raises(ValueError, match=r"pass nnx.state\(model, nnx.Param\)"):
            oa.averaged_params(optimizer, whole)


# Sharpness


def reference(model, rho):
    """SAM by hand: the value and gradient, and the model after the clean pass."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        copy = nnx.merge(graphdef, params, rest, copy=True)
        return loss_fn(copy, X, Y), nnx.state(copy, nnx.Not(nnx.Param))

    (value, after), g = jax.value_and_grad(loss, has_aux=True)(params)
    scale = rho / optax.tree.norm(g)
    there = jax.tree.map(lambda x, g: x + scale * g, params, g)
    return value, jax.grad(loss, has_aux=True)(there)[0], after


@pytest.mark.parametrize("jitted", [False, True])
def test_value_and_grad_is_sam_of_the_clean_pass(jitted):
    model = Net()
    value, grads, after = reference(model, 0.3)
    params = arrays(nnx.state(model, nnx.Param))
    sharp = value_and_grad(loss_fn, oa.rules.sam(0.3))
    found = (nnx.jit(sharp) if jitted else sharp)(model, X, Y)
    np.testing.assert_allclose(found[0], value, rtol=1e-5)
    for a, b in zip(arrays(found[1]), arrays(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    # One call's worth of statistics, keys and counts, and the parameters as before.
    for a, b in zip(
        arrays(nnx.state(model, nnx.Not(nnx.Param))), arrays(after), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert int(model.calls[...]) == 1
    equal(nnx.state(model, nnx.Param), params)


def test_value_and_grad_without_radius_is_that_of_nnx():
    ours, theirs = Net(), Net()
    value, grads = value_and_grad(loss_fn, oa.rules.sam(0.0))(ours, X, Y)
    wanted, gradient = nnx.value_and_grad(loss_fn)(theirs, X, Y)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    assert jax.tree.structure(nnx.state(grads)) == jax.tree.structure(
        nnx.state(gradient)
    )
    for a, b in zip(arrays(grads), arrays(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    for a, b in zip(arrays(nnx.state(ours)), arrays(nnx.state(theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_dropout_draws_the_same_in_every_pass():
    model = Net(rate=0.5)
    drawn = []

    def loss(model, x, y):
        mask = model.dropout(jnp.ones((64,)))
        jax.debug.callback(lambda mask: drawn.append(np.asarray(mask)), mask)
        return loss_fn(model, x, y)

    value_and_grad(loss, oa.rules.sam(0.1))(model, X, Y)
    value_and_grad(loss, oa.rules.sam(0.1))(model, X, Y)
    jax.effects_barrier()
    first, second, third, fourth = drawn
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(third, fourth)
    assert not np.array_equal(first, third)


def test_other_modules_among_the_arguments():
    """They keep what the clean pass did to them, and have no gradient."""
    model, teacher, rngs = Net(), Net(seed=1), nnx.Rngs(5)

    def loss(model, others, *, rngs):
        noise = jax.random.normal(rngs.noise(), Y.shape)
        return ((model(X) - others["teacher"](X) + noise) ** 2).mean()

    twins = Net(), Net(seed=1), nnx.Rngs(5)
    wanted, gradient = nnx.value_and_grad(
        lambda model, teacher, rngs: loss(model, {"teacher": teacher}, rngs=rngs)
    )(*twins)
    sharp = value_and_grad(loss, oa.rules.sam(0.0))
    value, grads = sharp(model, {"teacher": teacher}, rngs=rngs)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for a, b in zip(arrays(grads), arrays(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert int(teacher.calls[...]) == 1
    assert int(rngs.default.count[...]) == 1


def test_aux_and_a_step_of_the_optimizer():
    model = Net()
    optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=nnx.Param)
    with_aux = lambda model, x, y: (loss_fn(model, x, y), {"calls": model.calls[...]})
    sharp = value_and_grad(with_aux, oa.rules.sam(0.05), has_aux=True)

    @nnx.jit
    def step(model, optimizer):
        (value, aux), grads = sharp(model, X, Y)
        optimizer.update(model, grads)
        return value, aux

    model.dropout.rate = 0.0
    values, calls = zip(*[step(model, optimizer) for _ in range(30)])
    assert float(values[-1]) < 0.7 * float(values[0])
    assert [int(aux["calls"]) for aux in calls] == list(range(1, 31))


def test_some_variables_alone_are_perturbed():
    model = Net()
    head = nnx.All(nnx.Param, nnx.PathContains("head"))
    sharp = value_and_grad(loss_fn, oa.rules.sam(0.3), wrt=head)
    _, grads = sharp(model, X, Y)
    assert jax.tree.structure(grads) == jax.tree.structure(nnx.state(model, head))
    where = nnx.map_state(
        lambda path, x: x.replace("head" in path), nnx.state(model, nnx.Param)
    )
    radius = jax.tree.map(lambda x: 0.3, nnx.state(model, nnx.Param))
    paths = lambda path, leaf: "head" in jax.tree_util.keystr(path)
    for rule in (
        oa.rules.usam(0.3, where=where),
        oa.rules.usam(radius, where=paths),
    ):
        twins = Net(), Net()
        _, found = value_and_grad(loss_fn, rule)(twins[0], X, Y)
        _, wanted = value_and_grad(loss_fn, oa.rules.usam(0.3), wrt=head)(
            twins[1], X, Y
        )
        for a, b in zip(arrays(found["head"]), arrays(wanted["head"]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="no variable of wrt"):
        value_and_grad(loss_fn, oa.rules.sam(0.3), wrt=nnx.Intermediate)(model, X, Y)


SCHEDULE = lambda step: 0.1 / (1.0 + step)
STATEFUL = {
    "schedule": oa.rules.sam(SCHEDULE),
    "memory": oa.rules.momentum_sam(0.1),
    "due": oa.rules.every_k(oa.rules.sam(0.1), 2),
}


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("jitted", [False, True])
def test_rules_with_a_state(name, jitted):
    rule, model = STATEFUL[name], Net(rate=0.0)
    sharp = value_and_grad(loss_fn, rule)
    with pytest.raises(ValueError, match=r"rule_state = sharp\.init"):
        sharp(model, X, Y)
    rule_state = sharp.init(model)
    call = nnx.jit(lambda model, memory: sharp(model, X, Y, rule_state=memory))
    if not jitted:
        call = lambda model, memory: sharp(model, X, Y, rule_state=memory)
    found = [arrays(call(model, rule_state)[1]) for _ in range(3)]
    # The same by hand.
    model = Net(rate=0.0)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    plain = oa.sharpness_aware(
        jax.value_and_grad(
            lambda params: loss_fn(nnx.merge(graphdef, params, rest, copy=True), X, Y)
        ),
        rule,
    )
    state = plain.init(params)
    for step in found:
        _, grads, state = plain(params, state)
        for a, b in zip(step, arrays(grads), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert any(not np.allclose(a, b) for a, b in zip(found[0], found[1]))


def test_a_state_of_another_rule():
    model = Net()
    schedule = oa.rules.sam(lambda step: 0.1 / (1.0 + step))
    sharp = [
        value_and_grad(loss_fn, rule) for rule in (schedule, oa.rules.momentum_sam(0.1))
    ]
    for one, other in (sharp, sharp[::-1]):
        with pytest.raises(ValueError, match="rule_state is not that of this rule"):
            one(model, X, Y, rule_state=other.init(model))


def test_rules_without_a_state_need_none():
    for rule in (
        oa.rules.gsam(0.1, 0.1),
        oa.rules.gam(),
        oa.rules.sam(optax.constant_schedule(0.1)),
    ):
        _, grads = value_and_grad(loss_fn, rule)(Net(), X, Y)
        _, plain = nnx.value_and_grad(loss_fn)(Net(), X, Y)
        assert jax.tree.structure(grads) == jax.tree.structure(plain)
        assert optax.tree.norm(optax.tree.sub(grads, plain)) > 1e-6


@pytest.mark.parametrize("perturbation", ["global", "local"])
def test_gradients_over_a_mapped_axis(perturbation):
    """A global perturbation is that of the whole batch, a local one is each part's."""
    graphdef, state = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    over = {"axis_name": "d", "perturbation": perturbation}
    sharp = value_and_grad(loss_fn, oa.rules.sam(0.3), **over)
    plain = value_and_grad(loss_fn, oa.rules.sam(0.3))
    model = lambda: nnx.merge(graphdef, state, copy=True)
    parts = X.reshape(2, 3, 3), Y.reshape(2, 3, 2)
    values, found = jax.vmap(lambda x, y: sharp(model(), x, y), axis_name="d")(*parts)
    value, wanted = plain(model(), X, Y)
    if perturbation == "local":
        each = [plain(model(), x, y)[1] for x, y in zip(*parts)]
        wanted = jax.tree.map(lambda *leaves: sum(leaves) / 2, *each)
    np.testing.assert_allclose(values, [value, value], rtol=1e-5)
    for a, b in zip(arrays(found), arrays(wanted), strict=True):
        np.testing.assert_allclose(a, np.stack([b, b]), rtol=1e-4, atol=1e-6)


def test_a_perturbation_as_a_link():
    """The other form in an nnx.Optimizer: ``grad_fn`` of plain parameters."""
    model, twin = (nnx.Linear(3, 2, rngs=nnx.Rngs(0)) for _ in range(2))
    tx = optax.chain(oa.sam(0.3), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    def grad_fn(arrays):
        whole = lambda arrays: nnx.merge(graphdef, arrays, rest, copy=True)
        return jax.grad(lambda arrays: loss_fn(whole(arrays), X, Y))(arrays)

    optimizer.update(model, nnx.grad(loss_fn)(model, X, Y), grad_fn=grad_fn)
    _, grads = value_and_grad(loss_fn, oa.rules.sam(0.3))(twin, X, Y)
    nnx.Optimizer(twin, optax.sgd(0.1), wrt=nnx.Param).update(twin, grads)
    for a, b in zip(arrays(nnx.state(model)), arrays(nnx.state(twin)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_mixups():
    with pytest.raises(TypeError, match="arguments are swapped"):
        value_and_grad(oa.rules.sam(0.1), loss_fn)
    with pytest.raises(TypeError, match="needs a rule"):
        value_and_grad(loss_fn, oa.sam(0.1))
