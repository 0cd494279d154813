"""Multi-call: the clean parameters are the truth, whatever is handed in."""

import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_sharpness as ref
from sharpness_cases import ALL, PRODUCTS, SGD, flat, loss_of, tree_of
from test_sharpness import start

import optax_avg as oa
from optax_avg import rules

RULES = {name: rule for name, rule in ALL.items() if name not in PRODUCTS}
DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32)
OPTIMIZERS = {"sgd": optax.sgd(0.05, momentum=0.5), "adam": optax.adam(0.05)}


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def gradients_of(loss, dtype):
    """Gradients in a dtype that need not be that of the parameters."""
    return lambda p, bad=0.0: cast(
        jax.tree.map(lambda g: g + bad, jax.grad(loss)(cast(p, jnp.float32))), dtype
    )


def caller(tx, grad_fn, **options):
    @jax.jit(**options)
    def call(params, state, bad=0.0):
        updates, state = tx.update(grad_fn(params, bad), state, params)
        return optax.apply_updates(params, updates), state

    return call


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sam", "momentum_sam", "gam", "look_sam"])
def test_learning_rate_zero_moves_no_bit(name, dtype, grad_dtype):
    """Weights of 1e-3 to 1e3 beside offsets of 0.1."""
    sizes = 10.0 ** np.linspace(-3, 3, ref.SIZE)
    params = cast(tree_of(start() * sizes), dtype)
    bowl = lambda p: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(p))
    tx = oa.multi_call(RULES[name], optax.sgd(0.0))
    call = caller(tx, gradients_of(bowl, grad_dtype))
    state, at, moved = tx.init(params), params, 0
    for _ in range(24):
        at, state = call(at, state)
        equal(oa.clean_params(state, at), params)
        moved += np.any(flat(at) != flat(params))
    assert moved
    chex.assert_trees_all_equal_dtypes(at, params)


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_parameters_come_back_themselves(dtype, grad_dtype):
    """Bit for bit where weights are larger than offsets, in any dtypes."""
    rng = np.random.default_rng(0)
    signs = rng.choice([-1, 1], ref.SIZE)
    params = cast(tree_of(signs * rng.uniform(0.5, 1, ref.SIZE)), dtype)
    tx = oa.multi_call(rules.sam(0.25), optax.sgd(0.0))
    call = caller(tx, gradients_of(loss_of(*ref.problem()), grad_dtype))
    state, at = tx.init(params), params
    for _ in range(10):
        between, state = call(at, state)
        at, state = call(between, state)
        assert np.any(flat(between) != flat(params))
        equal(at, params)


def test_way_back_is_rounded_by_the_offset_at_most():
    """Additive updates cannot do better where the offset is the larger."""
    params = tree_of(1e-6 * start().astype(np.float32))
    tx = oa.multi_call(rules.sam(0.25), optax.sgd(0.0))
    call = caller(tx, gradients_of(loss_of(*ref.problem()), jnp.float32))
    state, at = tx.init(params), params
    for _ in range(50):
        at, state = call(*call(at, state))
        equal(oa.clean_params(state, at), params)
        assert np.abs(flat(at) - flat(params)).max() < 0.25 * 2.0**-24


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_are_those_of_the_optimizer_alone(dtype, grad_dtype):
    """With radius 0 and any dtypes: nothing is rounded that it would not round."""
    tx = optax.sgd(0.0625)
    grad_fn = jax.jit(gradients_of(loss_of(*ref.problem()), grad_dtype))
    alone = plain = cast(tree_of(start()), dtype)
    ours = oa.multi_call(rules.sam(0.0), tx)
    state, other = ours.init(plain), tx.init(alone)
    update = jax.jit(ours.update)
    for _ in range(10):
        updates, other = tx.update(grad_fn(alone), other, alone)
        alone = optax.apply_updates(alone, updates)
        for _ in range(2):
            updates, state = update(grad_fn(plain), state, plain)
            plain = optax.apply_updates(plain, updates)
        equal(oa.clean_params(state, plain), alone)
        equal(plain, alone)


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"), [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.float16)]
)
def test_adam_with_gradients_of_another_dtype(dtype, grad_dtype):
    grad_fn = gradients_of(loss_of(*ref.problem()), grad_dtype)
    alone = plain = cast(tree_of(start()), dtype)
    tx = OPTIMIZERS["adam"]
    ours = oa.multi_call(rules.sam(0.0), tx)
    state, other = ours.init(plain), tx.init(alone)
    call, step = caller(ours, grad_fn), caller(tx, grad_fn)
    for _ in range(5):
        alone, other = step(alone, other)
        plain, state = call(*call(plain, state))
    chex.assert_trees_all_equal_dtypes(state.inner_state, other)
    np.testing.assert_allclose(
        flat(plain).astype(float),
        flat(alone).astype(float),
        rtol=2 * float(jnp.finfo(dtype).eps),
    )


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [(name, "sgd") for name in RULES] + [("gam", "adam"), ("look_sam", "adam")],
)
def test_a_bad_gradient_of_any_evaluation_leaves_the_step_out(name, optimizer):
    """NaN, then infinity, in each evaluation in turn; all else as if it never came."""
    rule = RULES[name]
    tx = oa.multi_call(rule, OPTIMIZERS[optimizer])
    call = caller(tx, gradients_of(loss_of(*ref.problem()), jnp.float32))

    def step(params, state, bad=-1, value=0.0):
        due = rule.due is None or rule.due(state.rule_state)
        for i in range(rule.num_evals if due else 1):
            params, state = call(params, state, value if i == bad else 0.0)
        assert int(state.evaluation) == 0
        return params, state

    params = tree_of(start().astype(np.float32))
    first = step(params, tx.init(params))
    for params, state in (first, step(*first)):
        _, wanted = step(params, state)
        due = rule.due is None or rule.due(state.rule_state)
        for i in range(rule.num_evals if due else 1):
            for value in (np.nan, np.inf):
                at, bad = step(params, state, i, value)
                assert int(bad.rejected) == 1
                equal(kept(bad), kept(state))
                _, after = step(at, bad)
                np.testing.assert_allclose(
                    flat(after.clean_params),
                    flat(wanted.clean_params),
                    rtol=1e-4,
                    atol=1e-5,
                )


def kept(state):
    """What a step that is left out must not touch."""
    as_numbers = lambda x: (
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    )
    rule_state = jax.tree.map(as_numbers, state.rule_state)
    return state.clean_params, rule_state, state.inner_state


def test_an_offset_out_of_range_leaves_the_step_out():
    """Finite gradients of float16 whose unnormalised offset is not."""
    tx = oa.multi_call(rules.usam(60.0), optax.sgd(0.1))
    x = jnp.ones(2, jnp.float16)
    state = tx.init(x)
    for _ in range(2):
        updates, state = tx.update(jnp.full(2, 3e4, jnp.float16), state, x)
        x = optax.apply_updates(x, updates)
    np.testing.assert_array_equal(x, 1)
    assert int(state.rejected) == 1


def test_a_combination_out_of_range_leaves_the_step_out():
    tx = oa.multi_call(rules.gnp(0.1, alpha=9.0), optax.sgd(0.1))
    x = jnp.ones(2, jnp.float16)
    state = tx.init(x)
    for g in (-6e4, 6e4):
        updates, state = tx.update(jnp.full(2, g, jnp.float16), state, x)
        x = optax.apply_updates(x, updates)
    np.testing.assert_array_equal(oa.clean_params(state, x), 1)
    assert int(state.rejected) == 1


def test_changes_from_outside_are_undone_unless_the_clean_copy_has_them():
    grad_fn = gradients_of(loss_of(*ref.problem()), jnp.float32)
    tx = oa.multi_call(rules.sam(0.25), SGD)
    call = caller(tx, grad_fn)
    params = tree_of(start().astype(np.float32))
    params, state = call(*call(params, tx.init(params)))
    other = jax.tree.map(lambda x: x / 2, params)
    _, ignored = call(*call(other, state))
    assert not np.allclose(flat(ignored.clean_params), flat(other), atol=1e-2)
    told = state._replace(clean_params=other)
    at, found = call(*call(other, told))
    g0 = flat(grad_fn(other))
    moved = tree_of((flat(other) + 0.25 * ref.unit(g0)).astype(np.float32))
    momentum = flat(state.inner_state[0].trace)
    wanted = flat(other) - 0.05 * (0.5 * momentum + flat(grad_fn(moved)))
    np.testing.assert_allclose(flat(found.clean_params), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(flat(at), wanted, rtol=1e-4, atol=1e-5)


def test_leaves_without_a_gradient_follow_the_parameters():
    tx = oa.multi_call(rules.sam(0.25), optax.sgd(0.1))
    params = {"w": jnp.ones(2), "frozen": jnp.ones(2), "step": jnp.array(3)}
    grads = {"w": jnp.ones(2), "frozen": None, "step": None}
    state = tx.init(params)
    for i in range(4):
        params |= {"frozen": jnp.full(2, float(i)), "step": jnp.array(i)}
        updates, state = tx.update(grads, state, params)
        assert updates["frozen"] is None
        params = params | {"w": params["w"] + updates["w"]}
        clean = oa.clean_params(state, params)
        np.testing.assert_array_equal(clean["frozen"], i)
        assert int(clean["step"]) == i
    np.testing.assert_allclose(clean["w"], 0.8, rtol=1e-6)


@pytest.mark.parametrize("name", ["sam", "gam", "every_k", "vasso", "momentum_sam"])
def test_scan_and_donation(name):
    """A NaN on the way included."""
    grad_fn = gradients_of(loss_of(*ref.problem()), jnp.bfloat16)
    tx = oa.multi_call(RULES[name], OPTIMIZERS["adam"])
    bad = jnp.where(jnp.arange(40) == 7, jnp.nan, 0.0)
    call = caller(tx, grad_fn, donate_argnums=(0, 1))
    params = cast(tree_of(start()), jnp.bfloat16)
    state = tx.init(params)
    scanned = jax.jit(
        lambda c: jax.lax.scan(lambda c, b: (call(*c, b), None), c, bad)[0]
    )((params, state))
    params, state = jax.tree.map(jnp.copy, params), tx.init(params)
    for b in bad:
        params, state = call(params, state, b)
    assert int(state.rejected) == 1
    assert np.isfinite(flat(params)).all()
    np.testing.assert_allclose(
        flat(oa.clean_params(state, params)).astype(float),
        flat(oa.clean_params(scanned[1], scanned[0])).astype(float),
        rtol=0.05,
        atol=0.05,
    )


def test_an_optimizer_may_count_in_python_numbers():
    """Its state has a leaf that is no array; gradients are wider than parameters."""
    counting = optax.GradientTransformation(
        lambda params: {"count": 0},
        lambda g, state, params=None: (g, {"count": state["count"] + 1}),
    )
    tx = oa.multi_call(oa.rules.sam(), counting)
    x = jnp.ones(3, jnp.bfloat16)
    state = tx.init(x)
    for _ in range(4):
        _, state = tx.update(jnp.ones(3), state, x)
    assert int(state.inner_state["count"]) == 2


def test_clean_parameters_are_found_in_any_nesting():
    x = jnp.array(2.0)
    tx = optax.chain(optax.clip(1.0), oa.multi_call(rules.sam(0.5), optax.sgd(1.0)))
    state = optax.MultiSteps(tx, 2).init(x)
    for found in (state, (state,), types.SimpleNamespace(opt_state=state)):
        equal(oa.clean_params(found, jnp.array(2.5)), x)
    with pytest.raises(ValueError, match=r"found 2; pass the state of oa\.multi_call"):
        oa.clean_params((state, state), x)
