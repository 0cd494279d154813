"""The sharpness family against its references, its identities and its three forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_sharpness as ref
from sharpness_cases import ALL, PRODUCTS, RULES, SGD, flat, loss_of, tree_of

import optax_avg as oa
from optax_avg import rules

STEPS = 7
every_rule = pytest.mark.parametrize("name", ALL)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def start(seed=1):
    return np.random.default_rng(seed).normal(size=ref.SIZE)


def descend_by_reference(step_of):
    """SGD with momentum on the results of a reference."""
    parts = ref.problem()
    g = lambda x: ref.gradient(x, *parts)
    x, velocity, memory, results = start(), 0.0, None, []
    for i in range(STEPS):
        result, memory = step_of(g, x, memory, i)
        velocity = 0.5 * velocity + result
        x = x - 0.05 * velocity
        results.append(result)
    return x, results


def by_wrapper(rule, loss, params, steps=STEPS):
    sharp = oa.sharpness_aware(jax.value_and_grad(loss), rule)

    @jax.jit
    def advance(params, state, opt_state):
        value, grads, state = sharp(params, state)
        updates, opt_state = SGD.update(grads, opt_state, params)
        return value, grads, optax.apply_updates(params, updates), state, opt_state

    state, opt_state, results = sharp.init(params), SGD.init(params), []
    for _ in range(steps):
        value, grads, params, state, opt_state = advance(params, state, opt_state)
        results.append((value, grads))
    return params, results


def by_link(rule, loss, params, steps=STEPS):
    tx = optax.chain(oa.as_link(rule), SGD)
    grad_fn = jax.grad(loss)

    @jax.jit
    def advance(params, state):
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = advance(params, state)
    return params


def by_calls(rule, loss, params, steps=STEPS):
    tx = oa.multi_call(rule, SGD)

    @jax.jit
    def advance(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = advance(params, state)
        while int(state.evaluation):
            params, state = advance(params, state)
    return oa.eval_params(state, params)


@pytest.mark.parametrize("name", RULES)
def test_reference(name, x64):
    rule, reference = RULES[name]
    wanted, results = descend_by_reference(reference)
    params, found = by_wrapper(rule, loss_of(*ref.problem()), tree_of(start()))
    for (_, grads), result in zip(found, results, strict=True):
        np.testing.assert_allclose(flat(grads), result, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(flat(params), wanted, rtol=1e-10, atol=1e-12)


def test_hessian_product_rules(x64):
    """Against the dense Hessian."""
    x, parts = start(), ref.problem()
    g0, h0 = ref.gradient(x, *parts), ref.hessian(x, *parts)
    at = x + 0.25 * ref.unit(h0 @ ref.unit(g0))
    ga, ha = ref.gradient(at, *parts), ref.hessian(at, *parts)
    wanted = {
        "gr_exact": g0 + 0.5 * h0 @ g0,
        "gam_hvp": g0 + 0.5 * 0.25 * ha @ ref.unit(ga),
    }
    for name, rule in PRODUCTS.items():
        _, [(_, grads)] = by_wrapper(rule, loss_of(*parts), tree_of(x), steps=1)
        np.testing.assert_allclose(flat(grads), wanted[name], rtol=1e-10)


@every_rule
def test_three_forms_agree(name, x64):
    loss, params = loss_of(*ref.problem()), tree_of(start())
    wrapped, _ = by_wrapper(ALL[name], loss, params)
    linked = by_link(ALL[name], loss, params)
    np.testing.assert_allclose(flat(linked), flat(wrapped), rtol=1e-12)
    if name in PRODUCTS:
        with pytest.raises(ValueError, match="use sharpness_aware"):
            by_calls(ALL[name], loss, params)
    else:
        called = by_calls(ALL[name], loss, params)
        np.testing.assert_allclose(flat(called), flat(wrapped), rtol=1e-9)


@every_rule
def test_value_is_that_of_the_clean_parameters(name):
    loss, params = loss_of(*ref.problem()), tree_of(start())
    _, results = by_wrapper(ALL[name], loss, params, steps=1)
    np.testing.assert_allclose(results[0][0], loss(params), rtol=1e-6)


ZERO_RADIUS = {
    "sam": rules.sam(0.0),
    "usam": rules.usam(0.0),
    "dnsam": rules.dnsam(0.0),
    "asam": rules.asam(0.0),
    "fisher_sam": rules.fisher_sam(0.0),
    "fsam": rules.fsam(0.0),
    "sam_on": rules.sam_on(0.0),
    "amp": rules.amp(0.0),
    "awp": rules.awp(0.0),
    "esam": rules.esam(0.0),
    "vasso": rules.vasso(0.0),
    "friendly_sam": rules.friendly_sam(0.0),
    "momentum_sam": rules.momentum_sam(0.0),
}
ZERO_RADIUS_TO_ROUNDING = {
    "gsam": rules.gsam(0.0),
    "gnp": rules.gnp(0.0),
    "wsam": rules.wsam(0.0),
    "cr_sam": rules.cr_sam(0.0),
    "look_sam": rules.look_sam(0.0, 1),
    "gam": rules.gam(0.0, 0.0),
    "gam_hvp": rules.gam_hvp(0.0),
}


@pytest.mark.parametrize("name", [*ZERO_RADIUS, *ZERO_RADIUS_TO_ROUNDING])
def test_zero_radius_is_the_plain_gradient(name):
    loss, params = loss_of(*ref.problem()), tree_of(start())
    value_and_grad = jax.jit(jax.value_and_grad(loss))
    _, wanted = value_and_grad(params)
    rule = (ZERO_RADIUS | ZERO_RADIUS_TO_ROUNDING)[name]
    sharp = oa.sharpness_aware(value_and_grad, rule)
    _, grads, _ = sharp(params, sharp.init(params))  # eager: one program for both
    if name in ZERO_RADIUS:
        np.testing.assert_array_equal(flat(grads), flat(wanted))
    else:
        np.testing.assert_allclose(flat(grads), flat(wanted), rtol=1e-6)


EQUAL_SAM = {
    "gsam": rules.gsam(0.25, 0.0),
    "gnp": rules.gnp(0.25, 1.0),
    "wsam": rules.wsam(0.25, 0.5),
    "cr_sam": rules.cr_sam(0.25, 0.0, 0.0),
    "vasso": rules.vasso(0.25, 1.0),
    "friendly_sam": rules.friendly_sam(0.25, 0.0),
    "look_sam": rules.look_sam(0.25, 1),
    "fisher_sam": rules.fisher_sam(0.25, 0.0),
    "gam": rules.gam(9.0, 0.25, alpha=1.0, gamma=0.0),
    "esam": rules.esam(0.25, 1.0),
    "fsam": rules.fsam(0.25, 0.0),
    "every_k": rules.every_k(rules.sam(0.25), 1),
    "row_of_a_vector": rules.sam(0.25),
}


@pytest.mark.parametrize("name", EQUAL_SAM)
def test_special_cases_are_sam(name, x64):
    loss, params = loss_of(*ref.problem()), tree_of(start())
    wanted, _ = by_wrapper(rules.sam(0.25), loss, params)
    found, _ = by_wrapper(EQUAL_SAM[name], loss, params)
    np.testing.assert_allclose(flat(found), flat(wanted), rtol=1e-13)


def test_forward_regularisation_with_gamma_epsilon_is_usam(x64):
    loss, params = loss_of(*ref.problem()), tree_of(start())
    wanted, _ = by_wrapper(rules.usam(0.25), loss, params)
    rule = rules.gradient_regularisation(0.25, 0.25)
    found, _ = by_wrapper(rule, loss, params)
    np.testing.assert_allclose(flat(found), flat(wanted), rtol=1e-13)


def test_sam_commutes_with_scaling_the_loss_and_usam_does_not(x64):
    loss, params = loss_of(*ref.problem()), tree_of(start())
    scaled = lambda params: 8 * loss(params)
    gradient = lambda rule, loss: flat(by_wrapper(rule, loss, params, 1)[1][0][1])
    sam, usam = rules.sam(0.25), rules.usam(0.25)
    np.testing.assert_allclose(gradient(sam, scaled), 8 * gradient(sam, loss), 1e-12)
    difference = gradient(usam, scaled) - 8 * gradient(usam, loss)
    assert np.linalg.norm(difference) > 1


@pytest.mark.parametrize("sign", [-1, 1])
def test_usam_is_stable_if_the_theorem_says_so(sign, x64):
    """Stable on ``lam x^2/2`` if and only if ``eta (lam + rho lam^2) < 2``."""
    lam, rho = 3.0, 0.25
    eta = 2 / (lam + rho * lam**2) * (1 + sign * 0.01)
    sharp = oa.sharpness_aware(
        jax.value_and_grad(lambda x: lam * x**2 / 2), rules.usam(rho)
    )
    x = jnp.array(1.0)
    for _ in range(200):
        x = x - eta * sharp(x, sharp.init(x))[1]
    assert (abs(float(x)) < 1) == (sign < 0)


def test_asam_is_invariant_to_rescaling_of_weights(x64):
    """With ``x -> A x`` and the same loss the gradient is divided by ``A``."""
    loss, x = loss_of(*ref.problem()), start()
    a = np.exp(np.random.default_rng(2).normal(size=ref.SIZE))
    rescaled = lambda params: loss(jax.tree.map(jnp.divide, params, tree_of(a)))
    rule = rules.asam(0.5, eta=0.0)
    _, [(_, plain)] = by_wrapper(rule, loss, tree_of(x), 1)
    _, [(_, moved)] = by_wrapper(rule, rescaled, tree_of(a * x), 1)
    np.testing.assert_allclose(a * flat(moved), flat(plain), rtol=1e-10)


def test_optax_contrib_sam_in_opaque_mode():
    loss, params = loss_of(*ref.problem()), tree_of(start())
    ascend = optax.chain(optax.contrib.normalize(), optax.sgd(0.25))
    theirs = optax.contrib.sam(SGD, ascend, opaque_mode=True)
    state, other = theirs.init(params), params
    for _ in range(STEPS):
        updates, state = theirs.update(
            jax.grad(loss)(other), state, other, grad_fn=lambda p, _: jax.grad(loss)(p)
        )
        other = optax.apply_updates(other, updates)
    ours, _ = by_wrapper(rules.sam(0.25), loss, params)
    np.testing.assert_allclose(flat(ours), flat(other), rtol=2e-5)


def test_decoupled_wsam_is_wsam_under_plain_sgd():
    loss = loss_of(*ref.problem())
    grad_fn, x = jax.grad(loss), tree_of(start().astype(np.float32))
    coupled = optax.chain(oa.wsam(0.25, 0.75), optax.sgd(0.125))
    decoupled = oa.decoupled_wsam(optax.sgd(0.125), 0.125, 0.25, 0.75)
    found = [
        tx.update(grad_fn(x), tx.init(x), x, grad_fn=grad_fn)[0]
        for tx in (coupled, decoupled)
    ]
    np.testing.assert_allclose(*map(flat, found), rtol=1e-4, atol=1e-6)


def test_decoupled_wsam_adds_the_sharpness_after_adam():
    """Algorithm 1 by hand: Adam sees g0 alone, each step's rate scales the rest."""
    parts = ref.problem()
    grad_fn, x = jax.grad(loss_of(*parts)), tree_of(start().astype(np.float32))
    rate = lambda step: 0.125 / (1 + step)
    adam = optax.adam(rate)
    tx = oa.decoupled_wsam(adam, rate, 0.25, 0.75)
    state, adam_state = tx.init(x), adam.init(x)
    for t in range(3):
        at = flat(x).astype(float)
        g0 = ref.gradient(at, *parts)
        gd = ref.gradient(at + 0.25 * ref.unit(g0), *parts)
        plain, adam_state = adam.update(grad_fn(x), adam_state, x)
        wanted = flat(plain) - 0.125 / (1 + t) * 3.0 * (gd - g0)
        updates, state = tx.update(grad_fn(x), state, x, grad_fn=grad_fn)
        np.testing.assert_allclose(flat(updates), wanted, rtol=1e-4, atol=1e-5)
        x = optax.apply_updates(x, updates)
