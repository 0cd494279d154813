"""The papers' optimizers against float64, in special cases, and what they promise."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_optimizers as reference

import optax_avg as oa
from optax_avg import optimizers as opt
from optax_avg.optimizers.optimistic import _coefficients

SGD = optax.sgd(0.1, momentum=0.9)
BETAS = (0.0, 0.5, 0.9)
# name -> (optimizer, its reference)
PAIRS = {
    "laprop": (
        lambda: opt.laprop(0.1, 0.8, 0.9),
        lambda g: reference.laprop(g, 0.1, 0.8, 0.9, 1e-15),
    ),
    "adamomentum": (
        lambda: opt.adamomentum(0.1, 0.8, 0.9, 1e-3),
        lambda g: reference.adamomentum(g, 0.1, 0.8, 0.9, 1e-3),
    ),
    "diffgrad": (
        lambda: opt.diffgrad(0.1, 0.8, 0.9, 1e-3),
        lambda g: reference.diffgrad(g, 0.1, 0.8, 0.9, 1e-3),
    ),
    "optimistic_amsgrad": (
        lambda: opt.optimistic_amsgrad(0.1, 0.8, 0.9, 1e-3, r=3, reg=0.1),
        lambda g: reference.optimistic_amsgrad(g, 0.1, 0.8, 0.9, 1e-3, 3, 0.1),
    ),
    "aggregated_momentum": (
        lambda: opt.aggregated_momentum(0.1, BETAS),
        lambda g: reference.aggregated_momentum(g, 0.1, BETAS),
    ),
    "gravity": (
        lambda: opt.gravity(0.1, 0.8, alpha=0.0),
        lambda g: reference.gravity(g, 0.1, 0.8),
    ),
    "cautious": (
        lambda: opt.cautious(SGD),
        lambda g: reference.cautious(g, momentum(g)),
    ),
    "grams": (lambda: opt.grams(SGD), lambda g: reference.grams(g, momentum(g))),
    "mars": (
        lambda: opt.mars(0.5, 0.75),
        lambda g: reference.mars(g, 0.5, 0.75, g[:1] + g[:-1], [slice(None)]),
    ),
    "mars_by_leaf": (
        lambda: opt.mars(0.5, 0.75, scope="leaf"),
        lambda g: reference.mars(g, 0.5, 0.75, g[:1] + g[:-1], reference.LEAVES),
    ),
}
every_pair = pytest.mark.parametrize("name", PAIRS)


def momentum(grads):
    """The updates of ``SGD``."""
    return reference.aggregated_momentum(grads, 0.1, [0.9])


def as_tree(vector):
    parts = zip(reference.SHAPES.items(), reference.LEAVES, strict=True)
    return {key: jnp.asarray(vector[s].reshape(shape)) for (key, shape), s in parts}


def as_vector(tree):
    return np.concatenate([np.ravel(tree[key]) for key in reference.SHAPES])


def gradients(seed, count=12):
    """Gradients with a common part, of which some elements are larger than others."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(size=reference.SIZE))
    return [size * (0.5 + rng.normal(size=reference.SIZE)) for _ in range(count)]


def run(tx, grads, extra=lambda i: {}):
    """Updates in float64, as vectors."""
    with jax.enable_x64(True):
        state, update, path = tx.init(as_tree(grads[0])), jax.jit(tx.update), []
        for i, g in enumerate(grads):
            updates, state = update(as_tree(g), state, **extra(i))
            path.append(as_vector(updates))
    return path


def check(found, wanted, tolerance=1e-9):
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


@every_pair
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_paper(name, seed):
    make, wanted = PAIRS[name]
    grads = gradients(seed)
    check(run(make(), grads), wanted(grads))


@every_pair
def test_equals_the_paper_in_float32(name):
    make, wanted = PAIRS[name]
    grads = [g.astype(np.float32) for g in gradients(2)]
    tx = make()
    state, update = tx.init(as_tree(grads[0])), jax.jit(tx.update)
    found = []
    for g in grads:
        updates, state = update(as_tree(g), state)
        found.append(as_vector(updates))
    wide = [g.astype(np.float64) for g in grads]
    np.testing.assert_allclose(found, wanted(wide), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("exact", [False, True])
def test_multi_momentum_equals_the_equation(exact):
    p = np.array([0.5, 0.3, 0.2])
    clusters = np.random.default_rng(0).integers(0, 3, 12)
    grads = gradients(3)
    shares = p if exact else np.full(3, 1 / 3)
    tx = opt.multi_momentum(3, 0.7, list(p) if exact else None)
    found = run(tx, grads, lambda i: {"cluster": jnp.asarray(clusters[i])})
    check(found, reference.multi_momentum(grads, clusters, 0.7, shares))


def test_exact_mars_compares_at_the_parameters_before():
    grads, before = gradients(4), gradients(5)
    extra = lambda i: {"grads_at_previous": as_tree(before[i])}
    wanted = reference.mars(grads, 0.5, 0.75, before, [slice(None)])
    check(run(opt.mars(0.5, 0.75), grads, extra), wanted)


@pytest.mark.parametrize(("alpha", "mu", "gamma"), [(0.5, 1.0, 1.5), (0.1, 2.0, 0.5)])
def test_nag_gs_takes_the_iterates_of_the_paper(alpha, mu, gamma):
    rng = np.random.default_rng(0)
    a = np.diag(np.exp(rng.normal(size=reference.SIZE)))
    gradient = lambda x: a @ (x - 1)
    start = rng.normal(size=reference.SIZE)
    wanted = reference.nag_gs(gradient, start, 12, alpha, mu, gamma)
    tx = opt.nag_gs(alpha, mu, gamma)
    with jax.enable_x64(True):
        x, state, update, found = start, tx.init(as_tree(start)), jax.jit(tx.update), []
        for _ in range(13):
            found.append(x)
            updates, state = update(as_tree(gradient(x)), state)
            x = x + as_vector(updates)
    check(found, wanted, 1e-6)  # gamma is kept in float32


def test_nag_gs_reaches_the_number_of_its_authors():
    """Their README prints it, after a first call that changes nothing."""
    tx, x = opt.nag_gs(0.05, mu=1.0, gamma=1.5), jnp.ones(3)

    def advance(pair, _):
        x, state = pair
        updates, state = tx.update(2 * x, state)  # of the loss x @ x
        return (x + updates, state), None

    (x, _), _ = jax.lax.scan(advance, (x, tx.init(x)), length=199)
    np.testing.assert_allclose(x, -6.888961e-05, rtol=1e-3)


# Special cases that are known exactly.


SPECIAL = {
    # LaProp is a chain of two links of Optax.
    "laprop": (
        lambda: opt.laprop(0.1, 0.8, 0.9, 1e-3),
        lambda: optax.chain(
            optax.scale_by_rms(0.9, 1e-3, eps_in_sqrt=False, bias_correction=True),
            optax.ema(0.8),
            optax.scale(-0.1),
        ),
    ),
    "laprop_without_momentum_is_adam_without": (
        lambda: opt.laprop(0.1, 0.0, 0.9, 1e-3),
        lambda: optax.adam(0.1, b1=0.0, b2=0.9, eps=1e-3),
    ),
    "adamomentum_without_momentum_is_adam_without": (
        lambda: opt.adamomentum(0.1, 0.0, 0.9, 1e-20),
        lambda: optax.adam(0.1, b1=0.0, b2=0.9, eps=0.0),
    ),
    "optimistic_with_one_gradient_and_a_constant_metric": (
        lambda: opt.optimistic_amsgrad(0.1, 0.0, 1.0, 0.25, r=1),
        lambda: optax.optimistic_gradient_descent(0.2, 1.0, 1.0),
    ),
    "one_velocity_is_momentum": (
        lambda: opt.aggregated_momentum(0.1, (0.9,)),
        lambda: optax.sgd(0.1, momentum=0.9),
    ),
    "nag_gs_of_constant_gamma_is_momentum": (
        lambda: opt.nag_gs(0.25, mu=2.0, gamma=2.0),
        lambda: optax.sgd(0.02, momentum=0.64),
    ),
    "cautious_descent_is_descent": (
        lambda: opt.cautious(optax.sgd(0.1)),
        lambda: optax.sgd(0.1),
    ),
    "grams_of_descent_is_descent": (
        lambda: opt.grams(optax.sgd(0.1)),
        lambda: optax.sgd(0.1),
    ),
    "mars_of_strength_zero_is_a_clip": (
        lambda: opt.mars(0.0),
        lambda: optax.clip_by_global_norm(1.0),
    ),
    "mars_without_momentum_is_a_clip": (
        lambda: opt.mars(1.0, 0.0),
        lambda: optax.clip_by_global_norm(1.0),
    ),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_cases(name):
    make, other = SPECIAL[name]
    grads = gradients(6)
    found, wanted = run(make(), grads), run(other(), grads)
    if name.startswith("optimistic"):  # Optax takes the first gradient once
        found, wanted = found[1:], wanted[1:]
    check(found, wanted, 1e-6 if name.startswith("nag") else 1e-9)


def test_one_cluster_changes_nothing():
    grads = gradients(6)
    tx = opt.multi_momentum(1, 0.5)
    check(run(tx, grads, lambda i: {"cluster": 0}), grads)


def test_diffgrad_is_half_of_adam_where_gradients_do_not_change():
    g = gradients(7)[0]
    adam, found = (
        run(tx, [g] * 4)
        for tx in (optax.adam(0.1, 0.8, 0.9), opt.diffgrad(0.1, 0.8, 0.9))
    )
    check(found[1:], 0.5 * np.array(adam[1:]))
    check(found[0], adam[0] / (1 + np.exp(-np.abs(g))))


def test_steps_of_adamomentum_at_first_are_those_of_adam_over_one_minus_b1():
    g = gradients(8)[0]
    found = run(opt.adamomentum(0.1, 0.75, 0.9, 1e-20), [g])[0]
    check(np.abs(found), 0.4)


# What each promises.


def test_a_correction_of_mars_has_no_weight_at_a_constant_gradient():
    g = gradients(9)[0]
    g = g / np.linalg.norm(g) / 2
    check(run(opt.mars(5.0, 0.9), [g] * 3), [g] * 3)


def test_cautious_updates_never_oppose_the_gradient():
    grads = gradients(10, 30)
    found = run(opt.cautious(optax.adam(0.1)), grads)
    plain = run(optax.adam(0.1), grads)
    assert min(float(-u * g @ np.ones(11)) for u, g in zip(found, grads)) > 0
    assert min(float(np.min(-u * g)) for u, g in zip(plain, grads)) < 0
    assert min(float(np.min(-u * g)) for u, g in zip(found, grads)) >= 0


@pytest.mark.parametrize("wrapper", [opt.cautious, opt.grams])
def test_signs_do_not_underflow(wrapper):
    """The product of update and gradient is below the smallest float32."""
    g = jnp.array([1e-25, -1e-25])
    tx = wrapper(optax.sgd(1.0))
    updates, _ = tx.update(g, tx.init(g))
    chex.assert_trees_all_equal(updates, -g)


def test_few_elements_that_agree_grow_a_thousandfold_at_most():
    n = 4000
    tx = opt.cautious(optax.GradientTransformation(optax.init_empty_state, keep))
    g = jnp.ones(n).at[0].set(-1.0)
    updates, _ = tx.update(g, tx.init(g))
    assert float(updates[0]) == pytest.approx(1000)
    assert not updates[1:].any()


def keep(updates, state, params=None):
    del params
    return jnp.ones_like(updates), state


@pytest.mark.parametrize("wrapper", [opt.cautious, opt.grams])
def test_wrappers_pass_a_gradient_that_is_not_finite_on(wrapper):
    """They do not hide it."""
    tx = wrapper(optax.adam(0.1))
    g = jnp.array([1.0, jnp.nan])
    updates, _ = tx.update(g, tx.init(g))
    assert jnp.isfinite(updates).tolist() == [True, False]


@pytest.mark.parametrize("wrapper", [opt.cautious, opt.grams])
def test_wrappers_pass_extra_arguments_to_the_optimizer(wrapper):
    def update(updates, state, params=None, *, factor, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda g: -factor * g, updates), state

    tx = wrapper(optax.GradientTransformationExtraArgs(optax.init_empty_state, update))
    g = jnp.array([1.0, -2.0])
    updates, _ = tx.update(g, tx.init(g), factor=3.0)
    assert updates.tolist() == [-3.0, 6.0]


@pytest.mark.parametrize("wrapper", [opt.cautious, opt.grams])
def test_complex_parameters_have_no_sign(wrapper):
    with pytest.raises(ValueError, match="takes real parameters"):
        wrapper(SGD).init(jnp.ones(2, jnp.complex64))


@pytest.mark.parametrize("wrapper", [opt.cautious, opt.grams])
def test_wrappers_want_an_optimizer(wrapper):
    with pytest.raises(TypeError, match="needs an optimizer"):
        wrapper(optax.adam)


def test_weight_decay_beside_cautious_as_its_docstring_says():
    x = jnp.array([10.0, 10.0])
    g = jnp.array([1.0, -1.0])
    tx = optax.chain(
        opt.cautious(optax.adam(1.0)),
        optax.add_decayed_weights(-1e-2),
        optax.scale(0.5),
    )
    updates, _ = tx.update(g, tx.init(x), x)
    np.testing.assert_allclose(updates, [-0.55, 0.45], rtol=1e-5)


def test_the_prediction_finds_the_limit_of_a_linear_sequence():
    """Two gradients of ``g + a q^t`` suffice, since their differences are collinear."""
    limit = gradients(11)[0]
    grads = [limit * (1 + 3 * 0.5**t) for t in range(6)]
    with jax.enable_x64(True):
        known = [jnp.asarray(np.stack(grads[-3:]))]
        c = _coefficients(known, 2, 1e-9, jnp.asarray(True))
    found = np.asarray(c) @ np.stack(grads[-2:])
    np.testing.assert_allclose(found, limit, rtol=1e-2)


@pytest.mark.parametrize("size", [1.0, 1e2, 1e3, 1e6])
def test_predictions_from_dependent_gradients_are_not_noise(size):
    """Five differences of four numbers, in float32."""
    r, rng = 5, np.random.default_rng(0)
    coefficients = jax.jit(lambda g: _coefficients([g], r, 1e-3, jnp.asarray(True)))
    for _ in range(30):
        known = rng.normal(size=(r + 1, 4)).astype(np.float32)
        found = np.asarray(coefficients(jnp.asarray(size * known))) @ known[1:]
        grads = [g.astype(np.float64) for g in known]
        largest = (np.diff(np.stack(grads), axis=0) ** 2).sum(1).max()
        reg = max(1e-3 / size**2, 10 * r * 2.0**-23 * largest)
        np.testing.assert_allclose(found, reference.predicted(grads, r, reg), atol=0.3)


def test_predictions_of_equal_or_huge_gradients_are_finite():
    tx = opt.optimistic_amsgrad(0.1, r=3)
    update = jax.jit(tx.update)
    for size in (0.0, 1e-30, 1.0, 1e10):
        state = tx.init(jnp.zeros(4))
        for i in range(8):
            g = size * jnp.array([1.0, -1.0, 1.0, 1.0 if i % 2 else 0.5])
            updates, state = update(g, state)
            assert jnp.isfinite(updates).all()


def test_optimistic_amsgrad_undoes_its_last_step_ahead_at_another_rate():
    """The hidden iterate takes the steps of AMSGrad whatever the schedule is."""
    rates = jnp.array([0.1, 0.01, 0.2, 0.05])
    grads = gradients(12, 4)
    tx = opt.optimistic_amsgrad(lambda t: rates[t], r=2)
    update = jax.jit(tx.update)
    params = as_tree(np.zeros(reference.SIZE, np.float32))
    state, hidden = tx.init(params), np.zeros(reference.SIZE)
    for t, g in enumerate(grads):
        updates, state = update(as_tree(g.astype(np.float32)), state)
        params = optax.apply_updates(params, updates)
        theta, v = as_vector(state.theta), as_vector(state.largest_square)
        hidden = hidden - float(rates[t]) * theta / np.sqrt(v)
        found = as_vector(params) + as_vector(state.step_ahead)
        np.testing.assert_allclose(found, hidden, rtol=1e-4, atol=1e-5)


def test_gravity_begins_with_random_steps_of_the_size_alpha():
    tx = opt.gravity(0.5, alpha=0.02, key=3)
    params = {"a": jnp.zeros((50, 40)), "b": jnp.zeros(2000)}
    state = tx.init(params)
    (velocity,) = (s for s in state if isinstance(s, opt.GravityState))
    for leaf in velocity.gravity_velocity.values():
        assert float(jnp.std(leaf)) == pytest.approx(0.04, rel=0.1)
    a, b = (jnp.ravel(x) for x in velocity.gravity_velocity.values())
    assert abs(float(jnp.mean(a * b))) < 0.1 * 0.04**2
    again = opt.gravity(0.5, alpha=0.02, key=jax.random.key(3)).init(params)
    chex.assert_trees_all_equal(again, state)


def test_gravity_of_a_rate_that_begins_at_zero_has_no_first_velocity():
    tx = opt.gravity(optax.linear_schedule(0.0, 1.0, 10), alpha=0.02)
    state = tx.init(jnp.zeros(3))
    assert not any(
        s.gravity_velocity.any() for s in state if hasattr(s, "gravity_step")
    )


def test_multi_momentum_takes_out_what_differs_between_the_clusters():
    """Gradients of two clusters that differ by a constant become their mean."""
    tx = opt.multi_momentum(2, 0.0, [0.25, 0.75])
    centres = jnp.array([[4.0, 0.0], [0.0, 8.0]])
    state = tx.init(centres[0])
    for cluster in (0, 1, 0, 1):
        updates, state = tx.update(centres[cluster], state, cluster=cluster)
    np.testing.assert_allclose(updates, [1.0, 6.0], rtol=1e-6)


def test_multi_momentum_needs_a_cluster():
    tx = opt.multi_momentum(2, 0.5)
    g = jnp.ones(2)
    wrong = (None, 2, -1, jnp.array(2), np.array(-1), 0.5, True, jnp.array([0, 1]))
    for cluster in wrong:
        with pytest.raises(ValueError, match="needs the cluster of the batch"):
            tx.update(g, tx.init(g), cluster=cluster)


NARROW = {
    **{
        name: pair[0]
        for name, pair in PAIRS.items()
        if name not in ("cautious", "grams")
    },
    "nag_gs": lambda: opt.nag_gs(0.5),
    "multi_momentum": lambda: opt.multi_momentum(2, 0.5),
}


@pytest.mark.parametrize("name", NARROW)
def test_memories_are_wide_and_updates_narrow(name):
    tx = NARROW[name]()
    params = {"w": jnp.ones((2, 3), jnp.bfloat16), "n": jnp.arange(3), "none": None}
    grads = {"w": jnp.ones((2, 3), jnp.bfloat16), "n": None, "none": None}
    state = tx.init(params)
    extra = {"cluster": 1} if name == "multi_momentum" else {}
    updates, after = tx.update(grads, state, params, **extra)
    assert updates["w"].dtype == jnp.bfloat16
    assert updates["n"] is None
    for tree in (state, after):
        dtypes = {x.dtype for x in jax.tree.leaves(tree)}
        assert dtypes <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_a_missing_gradient_is_named():
    tx, params = opt.laprop(0.1), {"a": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"updates\['b'\] has no gradient"):
        tx.update({"a": jnp.ones(2), "b": None}, tx.init(params), params)


def test_integer_gradients_pass_through():
    tx = opt.laprop(0.1)
    grads = {"a": jnp.ones(2), "b": jnp.arange(2)}
    updates, _ = tx.update(grads, tx.init(grads))
    assert updates["b"] is grads["b"]


WHOLE = [
    *(opt.laprop, opt.adamomentum, opt.diffgrad, opt.optimistic_amsgrad),
    *(opt.aggregated_momentum, opt.gravity, opt.nag_gs, opt.adamp, opt.sgdp),
    *(opt.adahessian, opt.spl_plus, lambda rate: opt.bsam(rate, num_data=9)),
]


@pytest.mark.parametrize("optimizer", WHOLE)
@pytest.mark.parametrize("rate", [0.1, optax.constant_schedule(0.1)])
def test_integer_leaves_keep_their_dtype(optimizer, rate):
    """In a whole optimizer, whose learning rate would make them float32."""
    params = {"w": jnp.ones(2), "n": jnp.arange(2)}
    grads = {"w": jnp.ones(2), "n": jnp.zeros(2, jnp.int32)}
    tx = optax.with_extra_args_support(optimizer(rate))
    extra = {"grad_fn": lambda p: grads, "value": jnp.ones([]), "loss": jnp.ones([])}
    hvp = {"hvp_fn": lambda v: v}
    updates, _ = tx.update(grads, tx.init(params), params, **extra, **hvp)
    assert updates["n"].dtype == jnp.int32
    assert updates["w"].dtype == jnp.float32


WRONG = {
    "learning_rate": lambda: opt.laprop(-0.1),
    "b1": lambda: opt.laprop(0.1, b1=1.0),
    "b2": lambda: opt.adamomentum(0.1, b2=1.0),
    "eps": lambda: opt.diffgrad(0.1, eps=0.0),
    "betas": lambda: opt.aggregated_momentum(0.1, (0.5, 1.0)),
    "betas must hold": lambda: opt.aggregated_momentum(0.1, ()),
    "beta": lambda: opt.gravity(beta=1.5),
    "alpha": lambda: opt.gravity(alpha=-1.0),
    "key": lambda: opt.gravity(key="a"),
    "mu": lambda: opt.nag_gs(mu=0.0),
    "gamma": lambda: opt.nag_gs(gamma=-1.0),
    "gamma must": lambda: opt.mars(-1.0),
    "scope": lambda: opt.mars(scope="row"),
    "r must": lambda: opt.optimistic_amsgrad(r=0),
    "reg": lambda: opt.optimistic_amsgrad(reg=0.0),
    "num_clusters": lambda: opt.multi_momentum(0, 0.5),
    "probabilities": lambda: opt.multi_momentum(2, 0.5, [0.5, 0.6]),
    "2 shares": lambda: opt.multi_momentum(2, 0.5, [1.0]),
    "shares that sum": lambda: opt.multi_momentum(2, 0.5, [np.nan, 1.0]),
    "got 0.9": lambda: opt.aggregated_momentum(0.1, 0.9),
}


@pytest.mark.parametrize("match", WRONG)
def test_wrong_arguments_are_named(match):
    with pytest.raises(ValueError, match=match):
        WRONG[match]()


def test_decays_may_be_an_array():
    grads = gradients(13)
    for betas in (np.array(BETAS), jnp.array(BETAS)):
        found = run(opt.aggregated_momentum(0.1, betas), grads)
        check(found, reference.aggregated_momentum(grads, 0.1, BETAS), 1e-6)


@pytest.mark.parametrize("name", ["diffgrad", "mars"])
def test_the_last_gradient_is_kept_as_a_copy_in_the_dtype_of_the_memory(name):
    """Or the state could not be donated beside the gradient."""
    tx = PAIRS[name][0]()
    with jax.enable_x64(True):
        x, g = jnp.ones(2, jnp.float64), jnp.ones(2, jnp.float32)
        state = tx.init(x)
        _, after = tx.update(g, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        _, after = tx.update(x, state)
        places = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after)}
        assert x.unsafe_buffer_pointer() not in places


def test_gradients_may_be_python_numbers():
    tx = opt.laprop(0.1)
    updates, _ = tx.update({"a": 0.5}, tx.init({"a": 1.0}))
    assert float(updates["a"]) == pytest.approx(-0.1, rel=1e-5)


@pytest.mark.parametrize("wrapper", [opt.cautious, opt.grams])
def test_a_step_that_the_optimizer_skips_is_skipped(wrapper):
    tx = wrapper(optax.apply_if_finite(optax.adam(0.1), 3))
    g = jnp.array([1.0, -1.0])
    _, state = tx.update(g, tx.init(g))
    updates, _ = tx.update(jnp.array([jnp.nan, 1.0]), state)
    assert not updates.any()


@pytest.mark.parametrize("name", ["masked", "partition"])
def test_exact_mars_of_a_part_of_the_parameters(name):
    mars, g = opt.mars(0.5, 0.75), jnp.array([0.1, -0.2])
    tx = {
        "masked": lambda: optax.masked(mars, {"a": True, "b": False}),
        "partition": lambda: optax.partition(
            {"x": mars, "y": optax.identity()}, {"a": "x", "b": "y"}
        ),
    }[name]()
    grads, before = {"a": g, "b": g}, {"a": 0.5 * g, "b": g}
    updates, _ = tx.update(grads, tx.init(grads), grads, grads_at_previous=before)
    np.testing.assert_allclose(updates["a"], 1.75 * g, rtol=1e-6)
    chex.assert_trees_all_equal(updates["b"], g)


def test_gradients_at_the_parameters_before_must_be_like_the_gradient():
    tx, g = opt.mars(), jnp.ones(2)
    grads = {"a": g, "b": g}
    for before in ({"a": g, "b": None}, {"a": g}, {"a": g, "b": jnp.ones(1)}):
        with pytest.raises(ValueError, match="grads_at_previous"):
            tx.update(grads, tx.init(grads), grads_at_previous=before)


SCHEDULED = {
    "laprop": opt.laprop,
    "adamomentum": opt.adamomentum,
    "diffgrad": opt.diffgrad,
    "optimistic_amsgrad": opt.optimistic_amsgrad,
    "aggregated_momentum": opt.aggregated_momentum,
    "gravity": functools.partial(opt.gravity, alpha=0.0),
    "nag_gs": opt.nag_gs,
}


@pytest.mark.parametrize("name", SCHEDULED)
def test_schedules_begin_at_step_zero(name):
    g = {"a": jnp.array([1.0, -0.5])}
    steps = []
    for rate in (0.1, lambda t: jnp.where(t == 0, 0.1, 0.2)):
        tx = SCHEDULED[name](rate)
        state = tx.init(g)
        first, state = tx.update(g, state)
        steps.append((first, tx.update(g, state)[0]))
    chex.assert_trees_all_close(steps[0][0], steps[1][0], rtol=1e-6)
    assert not np.allclose(steps[0][1]["a"], steps[1][1]["a"])


def test_averages_ride_behind_the_optimizers():
    tx = optax.chain(opt.laprop(0.1), oa.ema_params(0.9))
    params = {"w": jnp.ones(3)}
    oa.check_chain(tx, params)
    state = tx.init(params)
    updates, state = tx.update(params, state, params)
    new = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(oa.averaged_params(state, new), new)
