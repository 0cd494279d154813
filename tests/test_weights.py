"""Weights: published values, identities, conversions, profiles."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import optax_avg as oa
from optax_avg import _numerics, weights

T = np.arange(1.0, 200.0)


def values(weight, every=1):
    weight = weights.with_stride(weight)
    return np.array([float(weight(jnp.float32(t), every)) for t in T])


@pytest.mark.parametrize(
    ("weight", "equation"),
    [
        (weights.ema(0.9), lambda t: 0.1 / (1 - 0.9**t)),
        (weights.ema(0.9, debias=False), lambda t: 0.1),
        (weights.ema(0.0), lambda t: 1.0),
        (weights.ema(1.0), lambda t: 1 / t),
        (weights.uniform(), lambda t: 1 / t),
        (weights.polynomial(8), lambda t: 9 / (t + 8)),
        (weights.power_function(6.94), lambda t: 1 - (1 - 1 / t) ** 7.94),
        (weights.half_life(50), lambda t: 1 - 2 ** (-1 / 50)),
        (weights.half_life(fraction=0.1), lambda t: 1 - 2 ** (-1 / (0.1 * t))),
        (weights.half_life(5, fraction=0.1), lambda t: 1 - 2 ** (-1 / min(5, 0.1 * t))),
        (weights.half_life(lambda s: 5 + s), lambda t: 1 - 2 ** (-1 / (4 + t))),
        (weights.ramp(0.9), lambda t: 1 - min(0.9, (1 + t) / (10 + t))),
        (
            weights.inverse_gamma(2.0, 0.75, 0.99, 0.1),
            # In both references the decay of the first step is 0, whatever the bounds.
            lambda t: 1 - (t > 1) * min(max(1 - (1 + (t - 1) / 2) ** -0.75, 0.1), 0.99),
        ),
        (weights.gravity(0.9), lambda t: 1 - (0.9 * t + 1) / (t + 2)),
        (
            weights.half_life_linear(0.9, 0.9999, 100),
            # AdEMAMix's own form of the schedule, 2409.03137, appendix A.1.
            lambda t: (
                1
                - min(
                    math.exp(
                        math.log(0.9)
                        * math.log(0.9999)
                        / (
                            (1 - min(t / 100, 1)) * math.log(0.9999)
                            + min(t / 100, 1) * math.log(0.9)
                        )
                    ),
                    0.9999,
                )
            ),
        ),
    ],
)
def test_equations(weight, equation):
    np.testing.assert_allclose(values(weight), [equation(t) for t in T], rtol=2e-5)


@pytest.mark.parametrize("d", [0.9, 0.9999, 0.9999999])
def test_debiased_ema_keeps_its_digits_near_one(d):
    # float64: (1 - d) / (1 - d^t), where float32 arithmetic would be off by percents.
    t = np.array([1.0, 2.0, 10.0, 1e4, 1e6])
    exact = [math.expm1(math.log(d)) / math.expm1(i * math.log(d)) for i in t]
    ours = [float(weights.ema(d)(jnp.float32(i))) for i in t]
    np.testing.assert_allclose(ours, exact, rtol=1e-6)
    assert ours[0] == 1.0


def test_ramp_keeps_its_digits_for_late_steps():
    w = float(weights.ramp(1.0)(jnp.float32(1e7)))
    assert w == pytest.approx(9 / (10 + 1e7), rel=1e-6)


def test_power_function_by_hand():
    # gamma 1: weights 1, 3, 5 over 9, the differences of squares.
    p = weights.profile(weights.power_function(1.0), 3)
    np.testing.assert_allclose(p.weights, [1 / 9, 3 / 9, 5 / 9], rtol=1e-12)


@pytest.mark.parametrize(
    # Pairs given by Karras et al. 2024 (2312.02696), section 3.1: gamma 16.97 and 6.94.
    ("sigma_rel", "gamma"),
    [(0.05, 16.97), (0.10, 6.94)],
)
def test_published_widths(sigma_rel, gamma):
    assert weights.gamma_from_sigma_rel(sigma_rel) == pytest.approx(gamma, abs=0.005)
    assert weights.sigma_rel_from_gamma(gamma) == pytest.approx(sigma_rel, abs=5e-5)


@given(st.floats(1e-3, 0.2886))
def test_gamma_solves_the_cubic(s):
    g = weights.gamma_from_sigma_rel(s)
    roots = np.roots([1, 7, 16 - s**-2, 12 - s**-2]).real
    assert g == pytest.approx(roots.max(), rel=1e-6, abs=1e-6)
    assert weights.sigma_rel_from_gamma(max(g, 0.0)) == pytest.approx(s, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.1, 0.25])
def test_profile_of_the_power_function_has_its_width(sigma_rel):
    p = weights.profile(weights.power_function(sigma_rel=sigma_rel), 4000)
    gamma = weights.gamma_from_sigma_rel(sigma_rel)
    assert p.relative_width == pytest.approx(sigma_rel, rel=1e-3)
    assert p.mean_age == pytest.approx(4000 / (gamma + 2), rel=5e-3)
    half_life = weights.half_life_from_gamma(gamma, 4000)
    assert p.weights[-round(half_life) :].sum() == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize(
    "weight",
    [
        weights.ema(0.9),
        weights.ema(lambda s: 0.5 + 0.001 * s),
        weights.uniform(),
        weights.polynomial(3.0),
        weights.power_function(2.0),
        weights.inverse_gamma(),
        weights.mass(lambda t: t**2),
        lambda t: 1 / t,
    ],
)
def test_unbiased_profiles_sum_to_one_on_the_iterates(weight):
    p = weights.profile(weight, 100)
    assert p.weights.dtype == np.float64
    assert p.weights.sum() == pytest.approx(1, abs=1e-12)
    assert p.initial == pytest.approx(0, abs=1e-15)


def test_profile_counts_the_initial_parameters():
    p = weights.profile(weights.ema(0.5, debias=False), 3)
    np.testing.assert_allclose(p.weights, [0.125, 0.25, 0.5])
    assert p.initial == 0.125
    assert p.mean_age == pytest.approx(0.125 * 3 + 0.125 * 2 + 0.25)


def test_profile_of_a_long_ema():
    p = weights.profile(weights.ema(0.99), 5000)
    assert p.mean_age == pytest.approx(0.99 / 0.01, rel=1e-6)
    assert p.relative_width * 5000 == pytest.approx(math.sqrt(0.99) / 0.01, rel=1e-6)


def test_profile_leaves_the_precision_of_jax_alone():
    weights.profile(weights.uniform(), 3)
    assert jnp.zeros(1).dtype == jnp.float32


@pytest.mark.parametrize(
    ("weight", "second"),
    [
        (lambda t, decay=0.75: 1 - decay, 0.25),
        (lambda t, dt: 1 / (t + dt), 1 / 12),
        (lambda t, stride: 1 / (t + stride), 1 / 12),
        (lambda t, dt=1: 1 / (t + dt), 1 / 12),
        (lambda t, *, decay=0.75: 1 - decay, 0.25),
        (lambda *args: 1 / sum(args), 1 / 12),
    ],
)
def test_defaults_of_the_user_are_not_strides(weight, second):
    """``decay=decay`` is how Python binds the variable of a loop."""
    assert weights.sequence(weight, 2, every=10)[1] == second


@pytest.mark.parametrize("every", [1, 5, 20])
def test_weights_that_speak_of_time_ignore_the_stride(every):
    per_step = 1 - values(weights.half_life(30))[0]
    per_stride = 1 - values(weights.half_life(30), every)[0]
    assert per_stride == pytest.approx(per_step**every, rel=1e-5)
    late = weights.with_stride(weights.half_life_linear(0.9, 0.99, 10))
    assert float(late(jnp.float32(50), every)) == pytest.approx(
        1 - 0.99**every, rel=1e-5
    )


@given(st.floats(0.5, 0.9999), st.floats(0.1, 64))
def test_conversions_are_inverse(d, kappa):
    h = weights.half_life_from_decay(d)
    assert weights.decay_from_half_life(h) == pytest.approx(d, rel=1e-12)
    scaled = weights.scale_decay(d, kappa)
    assert weights.half_life_from_decay(scaled) == pytest.approx(h / kappa, rel=1e-6)


@given(st.floats(0.01, 0.5))
def test_half_life_of_power_functions(fraction):
    gamma = weights.gamma_from_half_life(fraction * 1000, 1000)
    assert gamma >= -1e-12
    h = weights.half_life_from_gamma(max(gamma, 0.0), 1000)
    assert h == pytest.approx(fraction * 1000, rel=1e-9)


def test_batch_scaling_rule():
    # Busbridge et al. 2023 (2307.13813): rho -> rho^kappa.
    assert weights.scale_decay(0.9999, 16) == pytest.approx(0.9999**16, rel=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_traced_hyper_parameters(dtype):
    args = jnp.asarray([0.5, 0.25, 0.125], dtype)

    @jax.jit
    def traced(a):
        t = jnp.float32(7)
        return jnp.stack(
            [
                weights.ema(a[0])(t),
                weights.power_function(sigma_rel=a[2])(t),
                weights.polynomial(a[1])(t),
                weights.half_life(a[0])(t),
                weights.ramp(a[0])(t),
                weights.gravity(a[1])(t),
                weights.half_life_linear(a[1], a[0], 10.0)(t),
                weights.inverse_gamma(a[0], a[1], a[0])(t),
            ]
        )

    t = jnp.float32(7)
    plain = [
        weights.ema(0.5)(t),
        weights.power_function(sigma_rel=0.125)(t),
        weights.polynomial(0.25)(t),
        weights.half_life(0.5)(t),
        weights.ramp(0.5)(t),
        weights.gravity(0.25)(t),
        weights.half_life_linear(0.25, 0.5, 10.0)(t),
        weights.inverse_gamma(0.5, 0.25, 0.5)(t),
    ]
    result = traced(args)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, np.array(plain, np.float32), rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weights.ema(-0.1), "decay must lie"),
        (lambda: weights.ema(True), "decay must be a number"),
        (lambda: weights.polynomial(-1), "eta must lie"),
        (lambda: weights.power_function(), "one of gamma and sigma_rel"),
        (lambda: weights.power_function(1.0, sigma_rel=0.1), "one of gamma"),
        (lambda: weights.power_function(-1.0), r"gamma must lie in \(-1"),
        (lambda: weights.gamma_from_sigma_rel(0.0), "sigma_rel must lie"),
        (lambda: weights.half_life(), "needs h"),
        (lambda: weights.half_life(0), "h must lie"),
        (lambda: weights.half_life(5, fraction=0.0), "fraction must lie"),
        (lambda: weights.inverse_gamma(gamma=0), "gamma must lie"),
        (lambda: weights.half_life_linear(0.9, 1.0, 5), "beta_end must lie"),
        (lambda: weights.mass(3.0), "mass takes a function"),
        (
            lambda: weights.profile(weights.uniform(), 0),
            "steps must be an integer >= 1",
        ),
        (lambda: weights.profile(weights.uniform(), 3, every=0), "every must be an"),
        (lambda: weights.inverse_gamma(1.0, 1.0, 0.5, 0.6), "0.6 must not exceed max"),
        (lambda: weights.ema(jnp.ones(2)), r"decay must be one number, .*\(2,\)"),
        (
            lambda: weights.power_function(sigma_rel=np.full(2, 0.1)),
            "sigma_rel must be",
        ),
        (lambda: weights.sequence(lambda t: jnp.ones(2), 3), "a weight must be one"),
        (lambda: weights.scale_decay(0.9, 0.0), "kappa must lie"),
        (lambda: weights.gamma_from_half_life(600, 1000), "h / steps must lie"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_weights_of_averages_are_their_profiles():
    # One-hot iterates read the weights off the average itself.
    weight = oa.weights.power_function(sigma_rel=0.15)
    tx = oa.average(weight)
    eye = jnp.eye(12)
    state = tx.init(jnp.zeros(12))
    for i in range(12):
        _, state = tx.update(eye[i], state, jnp.zeros(12))
    p = weights.profile(weight, 12)
    np.testing.assert_allclose(state.averages["average"].average, p.weights, atol=1e-6)


@pytest.mark.parametrize("mass", [1.0, 0.1])
def test_sums_of_masses_keep_their_digits(mass):
    # A float32 sum of ones stands still from 2^24 on.
    weight = weights.mass(lambda t: mass)
    begun = 2**24
    start = np.float32(np.float32(mass) * begun), np.float32(0)
    step = lambda total, _: (weights.advance(weight, 1.0, 1, total)[1], None)
    total, _ = jax.lax.scan(step, start, length=3000)
    wanted = np.float64(np.float32(mass)) * (begun + 3000)
    assert float(total[0]) + float(total[1]) == pytest.approx(wanted, rel=1e-10)
    w, _ = weights.advance(weight, 1.0, 1, total)
    assert float(w) == pytest.approx(1 / (begun + 3001), rel=3e-7)


@pytest.mark.parametrize("decay", [0.9, 0.99999, 1 - 1e-6])
def test_scheduled_decays_near_one_keep_their_digits(decay):
    # r S rounds to S long before S is 1; with (1 - r) S it goes on.
    weight = weights.ema(lambda step: jnp.float32(decay))
    d = np.float64(np.float32(decay))
    begun = 1 - 0.05  # the sum of the weights, close to its limit
    steps = 5000
    start = jnp.float32(begun), jnp.float32(0)
    step = lambda total, _: (weights.advance(weight, 1.0, 1, total)[1], None)
    total, _ = jax.lax.scan(step, start, length=steps)
    wanted = 1 - (1 - np.float64(np.float32(begun))) * d**steps
    found = float(total[0]) + float(total[1])
    assert found - begun == pytest.approx(wanted - begun, rel=1e-4, abs=1e-6)


def test_masses_that_are_forgotten():
    # r = 0 at t = 3: nothing of what was large before is left.
    weight = weights.Mass(
        retain=lambda t, dt: jnp.where(t == 3, 0.0, 1.0),
        add=lambda t, dt: jnp.where(t < 3, 1e10, 1.0),
    )
    total = (jnp.float32(0), jnp.float32(0))
    found = []
    for t in (1.0, 2.0, 3.0, 4.0):
        w, total = weights.advance(weight, t, 1, total)
        found.append(float(w))
    assert found == [1.0, 0.5, 1.0, 0.5]


def test_steps_of_schedules_are_exact_integers():
    for t, dt in ((1, 1), (2**24, 100), (2**24 - 1, 127)):
        step = _numerics.step_of(jnp.float32(t), dt)
        assert step.dtype == jnp.int32
        assert int(step) == (t - 1) * dt
    last = 2**31 - 1
    assert 0 < int(_numerics.step_of(jnp.float32(last), 10, 3)) <= last
    assert int(_numerics.step_of(jnp.float32(last), 1)) > last - 256


def test_profiles_read_tables_and_integers_of_numpy():
    table = jnp.asarray([0.5, 0.25, 0.75])
    from_table = weights.ema(lambda step: table[step])
    found = weights.sequence(from_table, np.int64(3))
    # S(t) = d S(t-1) + 1 - d by hand: 1/2, 7/8, 29/32.
    np.testing.assert_allclose(found, [1.0, 0.75 / 0.875, 0.25 / 0.90625])


def test_conversions_take_arrays():
    widths = np.array([0.05, 0.1])
    wanted = [weights.gamma_from_sigma_rel(float(s)) for s in widths]
    found = weights.gamma_from_sigma_rel(jnp.asarray(widths))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
