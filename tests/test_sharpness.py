"""The sharpness family against its references, its identities and its three forms."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_sharpness as ref
from flax import nnx
from sharpness_cases import ALL, PRODUCTS, RADII, RULES, SGD, flat, loss_of, tree_of

import optax_avg as oa
from optax_avg import rules
from optax_avg.sharpness._ascent import Radius
from optax_avg.sharpness.offsets import is_normalisation

STEPS = 7
every_rule = pytest.mark.parametrize("name", ALL)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def start(seed=1):
    return np.random.default_rng(seed).normal(size=ref.SIZE)


def descend_by_reference(step_of, ascent=0):
    """SGD with momentum on the results of a reference; the ascent is on a problem."""
    g, a = (
        functools.partial(ref.gradient, matrix=m, frequency=f, quartic=q)
        for m, f, q in (ref.problem(), ref.problem(ascent))
    )
    x, velocity, memory, results = start(), 0.0, None, []
    for i in range(STEPS):
        result, memory = step_of(g, a, x, memory, i)
        velocity = 0.5 * velocity + result
        x = x - 0.05 * velocity
        results.append(result)
    return x, results


def problem(seed=0):
    """One loss per seed and precision, by which ``wrapped_step`` is cached."""
    return problem_in(jnp.result_type(float), seed)


@functools.cache
def problem_in(precision, seed):
    return loss_of(*ref.problem(seed))


@functools.cache
def wrapped_step(rule, loss, ascent):
    """A step of the wrapper, compiled once for all tests of one rule."""
    ascent_fn = None if ascent is None else jax.value_and_grad(ascent)
    sharp = oa.sharpness_aware(jax.value_and_grad(loss), rule, ascent_fn=ascent_fn)

    @jax.jit
    def advance(params, state, opt_state):
        value, grads, state = sharp(params, state)
        updates, opt_state = SGD.update(grads, opt_state, params)
        return value, grads, optax.apply_updates(params, updates), state, opt_state

    return sharp, advance


def by_wrapper(rule, loss, params, steps=STEPS, ascent=None):
    sharp, advance = wrapped_step(rule, loss, ascent)
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
    return oa.clean_params(state, params)


@pytest.mark.parametrize("name", RULES)
def test_reference(name, x64):
    rule, reference = RULES[name]
    wanted, results = descend_by_reference(reference)
    params, found = by_wrapper(rule, problem(), tree_of(start()))
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


OTHER = 7
TWO_AT_LEAST = [name for name, rule in ALL.items() if rule.num_evals > 1]


@pytest.mark.parametrize("name", [name for name in RULES if name in TWO_AT_LEAST])
def test_ascent_on_another_loss(name, x64):
    """Offsets are made of the ascent's gradients alone, results of the loss's."""
    rule, reference = RULES[name]
    loss, ascent = problem(), problem(OTHER)
    wanted, results = descend_by_reference(reference, OTHER)
    x = tree_of(start())
    params, found = by_wrapper(rule, loss, x, ascent=ascent)
    for (_, grads), result in zip(found, results, strict=True):
        np.testing.assert_allclose(flat(grads), result, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(flat(params), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", TWO_AT_LEAST)
def test_value_is_that_of_the_ascent_at_every_step(name, k):
    loss, ascent = problem(), problem(OTHER)
    value_and_grad = jax.value_and_grad(ascent)
    sharp = oa.sharpness_aware(
        jax.value_and_grad(loss), rules.every_k(ALL[name], k), ascent_fn=value_and_grad
    )
    params, step = tree_of(start()), jax.jit(sharp)
    state = sharp.init(params)
    for _ in range(2):
        value, _, state = step(params, state)
        np.testing.assert_allclose(value, ascent(params), rtol=1e-6)


def test_ascent_of_hessian_product_rules(x64):
    """The direction is the ascent's, the Hessian in the result the loss's."""
    x, parts, others = start(), ref.problem(), ref.problem(OTHER)
    g0, h0 = ref.gradient(x, *parts), ref.hessian(x, *parts)
    a0, b0 = ref.gradient(x, *others), ref.hessian(x, *others)
    at = x + 0.25 * ref.unit(b0 @ ref.unit(a0))
    ga, ha = ref.gradient(at, *parts), ref.hessian(at, *parts)
    wanted = {
        "gr_exact": g0 + 0.5 * h0 @ a0,
        "gam_hvp": g0 + 0.5 * 0.25 * ha @ ref.unit(ga),
    }
    for name, rule in PRODUCTS.items():
        _, [(_, grads)] = by_wrapper(
            rule, loss_of(*parts), tree_of(x), 1, loss_of(*others)
        )
        np.testing.assert_allclose(flat(grads), wanted[name], rtol=1e-10)


@every_rule
def test_three_forms_agree(name, x64):
    loss, params = problem(), tree_of(start())
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
    loss, params = problem(), tree_of(start())
    _, results = by_wrapper(ALL[name], loss, params, steps=1)
    np.testing.assert_allclose(results[0][0], loss(params), rtol=1e-6)


ZERO_RADIUS = {
    "sam": rules.sam(0.0),
    "usam": rules.usam(0.0),
    "dnsam": rules.dnsam(0.0),
    "asam": rules.asam(0.0),
    "fisher_sam": rules.fisher_sam(0.0),
    "sparse_sam": rules.sparse_sam(0.0),
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
    loss, params = problem(), tree_of(start())
    value_and_grad = jax.jit(jax.value_and_grad(loss))
    _, wanted = value_and_grad(params)
    rule = (ZERO_RADIUS | ZERO_RADIUS_TO_ROUNDING)[name]
    sharp = oa.sharpness_aware(value_and_grad, rule)
    _, grads, _ = sharp(params, sharp.init(params))  # eager: one program for both
    if name in ZERO_RADIUS:
        np.testing.assert_array_equal(flat(grads), flat(wanted))
    else:
        np.testing.assert_allclose(flat(grads), flat(wanted), rtol=1e-6)


SAM = rules.sam(0.25)
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
    "sparse_sam": rules.sparse_sam(0.25, 0.0),
    "every_k": rules.every_k(rules.sam(0.25), 1),
    "row_of_a_vector": rules.sam(0.25),
}


@pytest.mark.parametrize("name", EQUAL_SAM)
def test_special_cases_are_sam(name, x64):
    loss, params = problem(), tree_of(start())
    wanted, _ = by_wrapper(SAM, loss, params)
    found, _ = by_wrapper(EQUAL_SAM[name], loss, params)
    np.testing.assert_allclose(flat(found), flat(wanted), rtol=1e-13)


def test_forward_regularisation_with_gamma_rho_is_usam(x64):
    loss, params = problem(), tree_of(start())
    wanted, _ = by_wrapper(rules.usam(0.25), loss, params)
    rule = rules.gradient_regularisation(0.25, 0.25)
    found, _ = by_wrapper(rule, loss, params)
    np.testing.assert_allclose(flat(found), flat(wanted), rtol=1e-13)


def test_sam_commutes_with_scaling_the_loss_and_usam_does_not(x64):
    loss, params = problem(), tree_of(start())
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
    loss, x = problem(), start()
    a = np.exp(np.random.default_rng(2).normal(size=ref.SIZE))
    rescaled = lambda params: loss(jax.tree.map(jnp.divide, params, tree_of(a)))
    rule = rules.asam(0.5, eta=0.0)
    _, [(_, plain)] = by_wrapper(rule, loss, tree_of(x), 1)
    _, [(_, moved)] = by_wrapper(rule, rescaled, tree_of(a * x), 1)
    np.testing.assert_allclose(a * flat(moved), flat(plain), rtol=1e-10)


def test_optax_contrib_sam_in_opaque_mode():
    loss, params = problem(), tree_of(start())
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
    loss = problem()
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


def test_gam_defaults_are_those_of_the_authors_code():
    """grad_beta_1 = 0.6 weighs g1 and grad_beta_0 = 0.5 weighs g0."""
    defaults = inspect.signature(rules.gam).parameters
    names = ("rho", "rho_prime", "alpha", "beta", "gamma")
    assert [defaults[name].default for name in names] == [0.2, 0.02, 0.6, 0.5, 0.03]


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("values", [(0.0,), (0.0, 1.0), (0.0, 1e-30, 2e-30), (3.0,)])
def test_ties_do_not_defeat_the_sparsity(values, sparsity):
    """Exactly the promised share is left out, of equal entries the first."""
    rng = np.random.default_rng(0)
    shapes = {"a": (5, 4), "b": (), "c": (3, 2, 3)}
    grads = {
        name: jnp.asarray(rng.choice(values, shape), jnp.float32)
        for name, shape in shapes.items()
    }
    rule = rules.sparse_sam(0.25, sparsity)
    state = oa.sharpness_aware(jax.value_and_grad(sum), rule).init(grads)
    _, (mask, _) = jax.jit(rule.combine)(grads, [grads, grads], state)
    join = lambda tree: np.concatenate([np.ravel(tree[name]) for name in shapes])
    kept, entries = join(mask), join(grads)
    wanted = np.ones(entries.size, bool)
    wanted[np.argsort(entries, kind="stable")[: int(sparsity * entries.size)]] = False
    np.testing.assert_array_equal(kept, wanted)


@pytest.mark.parametrize(("k", "refresh"), [(1, 4), (3, 4), (4, 3), (7, 2)])
@pytest.mark.parametrize("start", [0, 2**31 - 40])
def test_masks_are_renewed_at_the_next_step_that_is_due(k, refresh, start):
    """Not at the common multiples of two numbers that have little in common."""
    rule = rules.sparse_sam(0.1, 0.5, refresh)
    rule = rule if k == 1 else rules.every_k(rule, k)
    draw = lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (64,))
    sharp = oa.sharpness_aware(jax.value_and_grad(lambda x, i: draw(i) @ x), rule)
    x, step = jnp.ones(64), jax.jit(sharp)
    state = sharp.init(x)._replace(rule_step=jnp.array(start - start % k, jnp.int32))
    renewed = []
    for i in range(60):
        before = state.rule_memory[0]
        _, _, state = step(x, state, i)
        if (state.rule_memory[0] != before).any():
            renewed.append(i)
    due = k * -(-refresh // k)  # the first due step after refresh steps
    assert renewed[0] == 0
    gaps = np.diff(renewed)
    if start:  # the clock goes back once, which may renew early
        assert (gaps <= due).all()
        assert (gaps == due).sum() >= len(gaps) - 2
    else:
        assert (gaps == due).all()


RADIUS_TREES = {
    "sam": lambda r: rules.sam(r),
    "usam": rules.usam,
    "dnsam": rules.dnsam,
    "asam": rules.asam,
    "fisher_sam": rules.fisher_sam,
    "sparse_sam": rules.sparse_sam,
    "sam_on": rules.sam_on,
    "awp": rules.awp,
    "esam": rules.esam,
    "gsam": rules.gsam,
    "gnp": rules.gnp,
    "wsam": rules.wsam,
    "cr_sam": rules.cr_sam,
    "vasso": rules.vasso,
    "friendly_sam": rules.friendly_sam,
    "look_sam": rules.look_sam,
    "momentum_sam": rules.momentum_sam,
    "gam": lambda r: rules.gam(r, r),
}
ONE_RADIUS = {
    "rho of amp": rules.amp,
    "eta of amp": lambda r: rules.amp(0.5, r),
    "norm of dnsam": lambda r: rules.dnsam(0.1, r),
    "rho of gam_hvp": rules.gam_hvp,
    "rho of gradient_regularisation": lambda r: rules.gradient_regularisation(1, r),
}


@pytest.mark.parametrize("name", RADIUS_TREES)
def test_a_tree_of_equal_radii_is_one_radius(name, x64):
    loss, params = problem(), tree_of(start())
    make = RADIUS_TREES[name]
    wanted, _ = by_wrapper(make(0.25), loss, params, 3)
    tree = {"bias": 0.25, "norm": lambda step: 0.25, "weight": 0.25}
    found, _ = by_wrapper(make(tree), loss, params, 3)
    np.testing.assert_allclose(flat(found), flat(wanted), rtol=1e-12)
    zero = {"bias": 0.0, "norm": 0.0, "weight": 0.0}
    plain, _ = by_wrapper(make(zero), loss, params, 3)
    assert not np.allclose(flat(plain), flat(wanted), rtol=1e-9)
    other = {"bias": 0.25, "norm": 0.25}
    with pytest.raises(ValueError, match="a prefix of them"):
        by_wrapper(make(other), loss, params, 3)


@pytest.mark.parametrize("name", ONE_RADIUS)
def test_a_tree_of_radii_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} is one number or schedule"):
        ONE_RADIUS[name](RADII)


NUMBERS = [
    (factory, parameter.name)
    for factory in (getattr(rules, name) for name in rules.__all__)
    for parameter in inspect.signature(factory).parameters.values()
    if isinstance(parameter.default, float)
]


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -1.0, np.float32(np.inf)])
@pytest.mark.parametrize(
    ("factory", "name"), NUMBERS, ids=[f"{f.__name__}-{n}" for f, n in NUMBERS]
)
def test_numbers_that_are_not_finite_are_refused(factory, name, value):
    with pytest.raises(ValueError, match=f"^{name} must lie in"):
        factory(**{name: value})


RADII_OF_RULES = [
    (factory, parameter.name)
    for factory in (getattr(rules, name) for name in rules.__all__)
    for parameter in inspect.signature(factory).parameters.values()
    if parameter.annotation in (Radius, optax.ScalarOrSchedule)
]


@pytest.mark.parametrize(
    "value", [None, "0.1", True, [], {"w": None}, {"w": "0.1"}, {"w": 1.0, "b": True}]
)
@pytest.mark.parametrize(
    ("factory", "name"),
    RADII_OF_RULES,
    ids=[f"{f.__name__}-{n}" for f, n in RADII_OF_RULES],
)
def test_what_is_no_radius_is_refused(factory, name, value):
    with pytest.raises(
        ValueError, match=f"^{name} (must be a number|of .* is one num)"
    ):
        factory(**{name: value})


def test_intervals_are_named_as_the_user_did():
    for value in (0, -1, 1.5, True, None):
        with pytest.raises(ValueError, match=r"^k must be an integer >= 1"):
            rules.every_k(rules.sam(), value)
        with pytest.raises(ValueError, match=r"^k must be an integer >= 1"):
            rules.look_sam(k=value)
        with pytest.raises(ValueError, match=r"^refresh must be an integer >= 1"):
            rules.sparse_sam(refresh=value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rules.sam(scope="rows"), "scope must be 'global', 'leaf' or 'row'"),
        (
            lambda: rules.gradient_regularisation(scheme="both"),
            "scheme must be 'forward', 'backward', 'central' or 'exact'",
        ),
        (
            lambda: rules.gam(decomposition="code"),
            "decomposition must be 'paper' or 'reference'",
        ),
    ],
)
def test_unknown_names_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}, got '"):
        make()


def test_radii_in_trees_are_checked():
    with pytest.raises(ValueError, match="rho must lie in"):
        rules.sam({"bias": 0.1, "norm": np.inf})
    with pytest.raises(ValueError, match="learning_rate must lie in"):
        oa.decoupled_wsam(SGD, np.inf)


@pytest.mark.parametrize(
    "make",
    [
        lambda: jax.random.key(3),
        lambda: jax.random.PRNGKey(3),
        lambda: 3,
        lambda: np.int64(3),
        lambda: np.array(3),
        lambda: jnp.array(3),
    ],
)
def test_keys_of_esam(make):
    """Copied into the state, which may be donated; injected or not."""
    loss, params = problem(), tree_of(start().astype(np.float32))
    grad_fn, key = jax.grad(loss), make()
    wanted = oa.esam(0.25, 0.5, 3)
    wanted = wanted.update(params, wanted.init(params), params, grad_fn=grad_fn)[0]
    injected = optax.inject_hyperparams(oa.esam)  # has the key itself in its state
    static = optax.inject_hyperparams(oa.esam, static_args=("key",))
    for esam, donated in ((oa.esam, 1), (static, 1), (injected, ())):
        tx = esam(0.25, 0.5, key)
        step = jax.jit(
            lambda p, s, tx=tx: tx.update(p, s, p, grad_fn=grad_fn),
            donate_argnums=donated,
        )
        for _ in range(2):
            updates, _ = step(params, tx.init(params))
            np.testing.assert_allclose(flat(updates), flat(wanted), rtol=1e-5)


@pytest.mark.parametrize(
    "key", [0.5, True, np.True_, jnp.array(True), None, "seed", np.ones(2), 2**63]
)
@pytest.mark.parametrize(
    "take",
    [
        lambda key: rules.esam(key=key),
        oa.pcgrad,
        lambda key: oa.merging.dare([jnp.ones(2)], jnp.zeros(2), 0.5, key),
    ],
)
def test_what_is_no_key_is_refused(take, key):
    with pytest.raises(ValueError, match="key must be a PRNG key or an integer seed"):
        take(key)


NORMALISATIONS = [
    *("BatchNorm_0", "LayerNorm", "GroupNorm", "RMSNorm", "InstanceNorm2d", "rms_norm"),
    *("norm1", "norms", "norm2d", "q_norm", "input_layernorm", "batch_normalization"),
    *("ln", "ln_1", "ln_f", "bn1", "BN", "gn2", "preln", "postLN", "ResNetBN"),
    *("post_attention_layernorm", "LayerNormalization", "resnet/~/batch_norm"),
]
OTHERS = [
    *("normalizer", "normal_head", "normalize_fn", "normal", "abnormal", "normed"),
    *("Dense_0", "plan", "kernel", "signal", "online", "gnn", "bnb", "columns", "ffn"),
]


@pytest.mark.parametrize("name", NORMALISATIONS + OTHERS)
def test_names_of_normalisations(name):
    """Of the leaf or of the module that holds it, with what frameworks add."""
    leaf = jnp.ones(2)
    trees = [{name: leaf}, {name: {"scale": leaf}}, {name: [{"w": leaf}]}]
    for tree in [*trees, {"a": {name: {"w": nnx.State({"value": leaf})}}}]:
        [(path, _)] = jax.tree.flatten_with_path(tree)[0]
        assert is_normalisation(path, leaf) == (name in NORMALISATIONS), path
    [(path, _)] = jax.tree.flatten_with_path({name: {"Dense_0": {"w": leaf}}})[0]
    assert not is_normalisation(path, leaf)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (rules.sam_on, "no leaf belongs to a normalisation by its name"),
        (lambda: rules.sam_on(where=lambda path, x: False), "where is true of no leaf"),
        (lambda: rules.sam(where={"w": False, "b": False}), "where is true of no leaf"),
        (lambda: rules.usam(where=lambda path, x: False), "where is true of no leaf"),
        (lambda: rules.asam(where=lambda path, x: False), "this would be sam"),
        (rules.awp, "no leaf has two dimensions"),
    ],
)
def test_a_rule_that_would_perturb_nothing_is_refused(make, message):
    x = {"w": jnp.ones(2), "b": jnp.ones(3)}
    for maker in (
        oa.sharpness_aware(jax.value_and_grad(sum), make()),
        oa.as_link(make()),
        oa.multi_call(make(), SGD),
    ):
        with pytest.raises(ValueError, match=rf"{message}.*\['b'\], \['w'\]"):
            maker.init(x)


def test_a_mask_of_a_single_leaf_has_no_names():
    with pytest.raises(ValueError, match=r"be perturbed\. There is one leaf\.$"):
        oa.sam(where=False).init(jnp.ones(2))


@pytest.mark.parametrize("name", PRODUCTS)
def test_error_says_what_hessian_products_need(name):
    loss, x = only_reverse, jnp.ones(3)
    sharp, link = oa.sharpness_aware(jax.value_and_grad(loss), ALL[name]), ALL[name]
    link = oa.as_link(link)
    with pytest.raises(TypeError, match=r"custom_vjp.*or take .*gam\(\)"):
        sharp(x, sharp.init(x))
    with pytest.raises(TypeError, match=r"custom_vjp.*or take .*gam\(\)"):
        link.update(x, link.init(x), x, grad_fn=jax.grad(loss))


@jax.custom_vjp
def only_reverse(x):
    return jnp.sum(x**2)


only_reverse.defvjp(lambda x: (only_reverse(x), x), lambda x, g: (2 * g * x,))


@pytest.mark.parametrize(
    "rule",
    [
        lambda rho: rules.sam(rho),
        lambda rho: rules.asam(rho),
        lambda rho: rules.dnsam(rho),
        lambda rho: rules.awp(rho),
        lambda rho: rules.gam(rho),
        lambda rho: rules.gam(0.1, rho),
    ],
)
def test_a_tree_of_radii_is_compared_with_params_at_init(rule):
    params = {"a": jnp.ones((2, 2))}
    wrong = oa.as_link(rule({"b": 0.1}))
    with pytest.raises(
        ValueError, match=r"radii have \['b'\] and params \['a'\]; pass"
    ):
        wrong.init(params)
    oa.as_link(rule({"a": lambda step: 0.1})).init(params)
