"""Averages against float64 references, special cases and hand-made numbers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from cases import AVERAGES
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_avg as oa

LAST = np.iinfo(np.int32).max
every_average = pytest.mark.parametrize("case", AVERAGES.values(), ids=AVERAGES.keys())


def feed(tx, xs, **kwargs):
    """Feeds the iterates ``xs[1:]`` to an average that starts at ``xs[0]``."""
    update = jax.jit(tx.update)
    state = tx.init(xs[0])
    for before, after in itertools.pairwise(xs):
        _, state = update(jax.tree.map(jnp.subtract, after, before), state, before)
    return state


def walk(seed, steps, dtype=jnp.float32, shape=(3,)):
    """A random walk that the dtype represents exactly, so that x_t is what it says."""
    rng = np.random.default_rng(seed)
    xs = np.cumsum(rng.integers(-4, 5, (steps + 1, *shape)), axis=0) / 8
    return [jnp.asarray(x, dtype) for x in xs]


def result(tx, xs, name=None):
    return np.asarray(oa.averaged_params(feed(tx, xs), xs[-1], name), np.float64)


strides = st.tuples(st.integers(1, 4), st.integers(0, 5), st.integers(0, 10**6))
dtypes = st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16])


def check_close(actual, wanted, dtype=jnp.float32):
    np.testing.assert_allclose(
        actual, wanted, rtol=1e-5, atol=max(2e-5, 3 * float(jnp.finfo(dtype).eps))
    )


@given(strides, dtypes, st.floats(0.0, 1.0))
def test_ema_is_the_normalised_sum_of_powers(stride, dtype, decay):
    every, start, seed = stride
    xs = walk(seed, 17, dtype)
    last = len(reference.absorbed_steps(17, every, start))
    if decay in (0.0, 1.0):
        masses = lambda t, s: 1.0 if decay else float(t == last)
    else:
        masses = lambda t, s: decay ** float(last - t)
    wanted = reference.weighted_mean(xs, masses, every, start)
    actual = result(oa.ema_params(decay, every=every, start=start), xs)
    check_close(actual, wanted, dtype)


@given(strides, dtypes, st.floats(0.0, 1.0))
def test_biased_ema_counts_the_initial_parameters(stride, dtype, decay):
    every, start, seed = stride
    xs = walk(seed, 17, dtype)
    wanted = reference.average(xs, lambda t: 1 - decay, every, start)
    tx = oa.ema_params(decay, debias=False, every=every, start=start)
    check_close(result(tx, xs), wanted, dtype)


UNIFORM = {
    "polyak": lambda every, start: oa.polyak_average(every=every, start=start),
    "swa": lambda every, start: oa.swa(start, every),
    "tail": lambda every, start: oa.tail_average(start),
    "ema": lambda every, start: oa.ema_params(1.0, every=every, start=start),
    **{
        name: lambda every, start, weight=weight: oa.average(
            weight, every=every, start=start
        )
        for name, weight in {
            "polynomial": oa.weights.polynomial(0),
            "power_function": oa.weights.power_function(0.0),
            "mass": oa.weights.mass(lambda t: 3.0),
            "by_hand": lambda t: 1 / t,
        }.items()
    },
}


@pytest.mark.parametrize("name", UNIFORM)
@settings(max_examples=4)
@given(strides, dtypes)
def test_uniform_averages_are_means(name, stride, dtype):
    every, start, seed = stride
    xs = walk(seed, 17, dtype)
    stride = 1 if name == "tail" else every
    wanted = reference.weighted_mean(xs, lambda t, s: 1.0, stride, start)
    check_close(result(UNIFORM[name](every, start), xs), wanted, dtype)


@given(strides, st.floats(0.0, 30.0))
def test_power_function_weights_are_differences_of_powers(stride, gamma):
    # Equation of DESIGN section 5: w_i = (i^(g+1) - (i-1)^(g+1)) / t^(g+1).
    every, start, seed = stride
    xs = walk(seed, 17)
    wanted = reference.weighted_mean(
        xs, lambda t, s: t ** (gamma + 1) - (t - 1) ** (gamma + 1), every, start
    )
    tx = oa.average(oa.weights.power_function(gamma), every=every, start=start)
    check_close(result(tx, xs), wanted)


@given(strides, st.floats(0.0, 8.0))
def test_polynomial_average(stride, eta):
    every, start, seed = stride
    xs = walk(seed, 17)
    wanted = reference.average(xs, lambda t: (eta + 1) / (t + eta), every, start)
    tx = oa.average(oa.weights.polynomial(eta), every=every, start=start)
    check_close(result(tx, xs), wanted)


@given(strides)
def test_scheduled_decay_is_debiased_by_the_product_of_decays(stride):
    every, start, seed = stride
    xs = walk(seed, 17)
    d = lambda s: 0.3 + 0.04 * s
    steps = reference.absorbed_steps(17, every, start)
    decays = [d(i * every) for i in range(len(steps))]
    masses = [(1 - decays[i]) * np.prod(decays[i + 1 :]) for i in range(len(steps))]
    wanted = reference.weighted_mean(xs, lambda t, s: masses[t - 1], every, start)
    tx = oa.ema_params(d, every=every, start=start)
    check_close(result(tx, xs), wanted)
    biased = reference.average(xs, lambda t: 1 - decays[t - 1], every, start)
    check_close(
        result(oa.ema_params(d, debias=False, every=every, start=start), xs), biased
    )


def test_constant_schedule_is_the_constant():
    xs = walk(0, 30)
    check_close(
        result(oa.ema_params(lambda s: 0.9), xs), result(oa.ema_params(0.9), xs)
    )


@given(strides, st.sampled_from([1.0, 2.0]))
def test_lr_weighted_average_follows_the_optimizers_clock(stride, power):
    every, start, seed = stride
    xs = walk(seed, 17)
    lr = optax.linear_schedule(1.0, 0.1, 20)
    wanted = reference.weighted_mean(
        xs, lambda t, s: (1.0 - 0.9 * (s - 1) / 20) ** power, every, start
    )
    tx = oa.lr_weighted_average(lr, power, every=every, start=start)
    check_close(result(tx, xs), wanted)


def test_zero_masses_follow_the_newest_iterate():
    xs = walk(1, 6)
    tx = oa.average(oa.weights.mass(lambda t: jnp.where(t < 4, 0.0, 1.0)))
    np.testing.assert_array_equal(result(tx, xs[:4]), xs[3])
    check_close(result(tx, xs), np.mean(np.stack(xs[4:]), axis=0))


@given(strides, st.integers(1, 5), dtypes)
def test_window_is_the_mean_of_the_latest(stride, k, dtype):
    every, start, seed = stride
    xs = walk(seed, 17, dtype)
    wanted = reference.window(xs, k, every, start)
    check_close(result(oa.window_average(k, every, start=start), xs), wanted, dtype)


def test_window_does_not_drift():
    # 1e8 enters and leaves; a running sum in float32 would keep its rounding error.
    xs = [jnp.asarray([v], jnp.float32) for v in [0.0, 1e8, 0.1, 0.2, 0.3, 0.4]]
    np.testing.assert_allclose(result(oa.window_average(3), xs), [0.3], rtol=1e-6)


@given(strides, st.floats(0.1, 1.0), st.floats(0.0, 1.0))
def test_bema(stride, kappa, eta):
    every, start, seed = stride
    xs = walk(seed, 17)
    wanted = reference.bema(xs, kappa, eta, every=every, start=start)
    check_close(result(oa.bema(kappa, eta, every=every, start=start), xs), wanted)


def test_bema_moves_in_bfloat16():
    """Its steps are far below the spacing of bfloat16."""
    xs = np.repeat([1.0, 2.0], [1, 2000])[:, None] * np.ones(64, np.float32)
    tx = oa.bema(1.0, 50.0, 1000.0, 1e-9, accumulator_dtype=jnp.bfloat16)
    state = feed(tx, xs)
    found = oa.averaged_params(state, jnp.zeros(64))
    np.testing.assert_allclose(np.mean(found), 2 - 0.999**2000, atol=0.02)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float8_e4m3fn, jnp.complex64])
def test_bema_refuses_accumulators_that_cannot_hold_it(dtype):
    with pytest.raises(ValueError, match="accumulator_dtype must be floating"):
        oa.bema(accumulator_dtype=dtype)


def test_bema_by_hand():
    # rho 0, gamma 1, kappa 1, eta 0 at t = 1: ema = x_1, correction x_1 - x_0.
    xs = [jnp.array([1.0]), jnp.array([4.0])]
    np.testing.assert_allclose(result(oa.bema(1.0, 0.0, 0.0, 1.0), xs), [7.0])


def test_several_horizons_equal_single_ones():
    xs = walk(3, 12)
    several = oa.average(
        {"short": oa.weights.ema(0.5), "long": oa.weights.uniform()}, every=2, start=1
    )
    assert oa.average_names(several.init(xs[0])) == ["long", "short"]
    for name, weight in (
        ("short", oa.weights.ema(0.5)),
        ("long", oa.weights.uniform()),
    ):
        alone = result(oa.average(weight, every=2, start=1), xs)
        np.testing.assert_array_equal(result(several, xs, name), alone)


def test_power_ema_names_its_widths():
    xs = walk(4, 40)
    state = feed(oa.power_ema([0.05, 0.10]), xs)
    for width in (0.05, 0.10):
        alone = result(oa.power_ema(width), xs)
        many = oa.averaged_params(state, xs[-1], f"power_ema_{width:g}")
        np.testing.assert_allclose(many, alone, rtol=1e-6)


def test_average_is_of_the_parameters_that_training_holds():
    # bf16 next to 256 has steps of 2: an update of 0.9 changes nothing.
    tx = oa.polyak_average()
    x = jnp.full(3, 256, jnp.bfloat16)
    state = tx.init(x)
    for _ in range(3):
        _, state = jax.jit(tx.update)(jnp.full(3, 0.9, jnp.bfloat16), state, x)
    np.testing.assert_array_equal(state.averages["polyak"].average, np.full(3, 256.0))


def test_first_iterate_is_taken_exactly():
    tx = oa.ema_params(0.999)
    state = tx.init(jnp.array([1e8, -3.0]))
    x = jnp.array([0.1, 0.7])
    _, state = jax.jit(tx.update)(jnp.zeros(2), state, x)
    np.testing.assert_array_equal(state.averages["ema"].average, x)


@pytest.mark.parametrize("rounding", ["dithered", "stochastic", "compensated"])
def test_bf16_average_moves(rounding):
    # To nearest, 1 + 0.001 (2 - 1) is 1 in bf16 for ever.
    assert float(jnp.asarray(0.999, jnp.bfloat16)) == 1.0
    tx = oa.ema_params(
        0.999, debias=False, accumulator_dtype=jnp.bfloat16, rounding=rounding
    )
    ones = jnp.ones(4096)

    def body(state, _):
        return tx.update(jnp.zeros_like(ones), state, 2 * ones)[1], None

    state, _ = jax.lax.scan(body, tx.init(ones), length=700)
    assert state.averages["ema"].average.dtype == jnp.bfloat16
    wanted = 2 - 0.999**700  # 1.5036
    average = np.asarray(oa.averaged_params(state, ones))
    assert abs(average.mean() - wanted) < 0.004
    if rounding == "compensated":
        np.testing.assert_allclose(average, wanted, atol=0.002)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("value", [1.2345, -0.001234, 300.7, 3e-6, 0.0])
def test_stochastic_rounding_is_unbiased_between_neighbours(dtype, value):
    n = 200_000
    tx = oa.ema_params(0.5, accumulator_dtype=dtype, rounding="stochastic")
    x = jnp.full(n, value, jnp.float32)
    _, state = tx.update(jnp.zeros(n), tx.init(x), x)
    rounded = np.asarray(state.averages["ema"].average, np.float64)
    value = np.float64(np.float32(value))
    neighbours = np.unique(rounded)
    assert len(neighbours) <= 2
    assert neighbours.min() <= value <= neighbours.max()
    gap = np.ptp(neighbours)
    assert abs(rounded.mean() - value) <= 4 * gap / np.sqrt(n) + 1e-12


def test_compensation_extends_float32():
    # In a uniform mean of 2^16 values the weights near float32's resolution.
    steps = 1 << 16
    rng = np.random.default_rng(0)
    xs = (1 + rng.standard_normal((steps, 8))).astype(np.float32)
    errors = {}
    for rounding in (None, "compensated"):
        tx = oa.polyak_average(rounding=rounding)

        def body(state, x, tx=tx):
            return tx.update(jnp.zeros(8), state, x)[1], None

        state, _ = jax.lax.scan(body, tx.init(jnp.zeros(8)), jnp.asarray(xs))
        exact = np.asarray(state.averages["polyak"].average, np.float64)
        if rounding:
            exact = exact + np.asarray(
                state.averages["polyak"].compensation, np.float64
            )
        errors[rounding] = np.abs(exact - xs.mean(0, dtype=np.float64)).max()
    assert errors["compensated"] < 1e-9 < errors[None]


def test_wider_leaves_keep_their_width():
    with jax.enable_x64(True):
        x = jnp.asarray([1.0 + 1e-12], jnp.float64)
        state = feed(oa.ema_params(0.9), [x, x, x])
        assert state.averages["ema"].average.dtype == jnp.float64
        np.testing.assert_allclose(oa.averaged_params(state, x), x, rtol=1e-15)


def test_complex_leaves():
    x = jnp.asarray([1 + 2j, 3 - 1j], jnp.complex64)
    state = feed(oa.polyak_average(accumulator_dtype=jnp.float32), [x, 2 * x, 4 * x])
    np.testing.assert_allclose(oa.averaged_params(state, x), 3 * x, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_counters_of_absorbed_and_rejected(bad):
    tx = oa.ema_params(0.9, every=2, nonfinite="reject")
    x = {"a": jnp.ones(2), "b": jnp.ones((2, 2))}
    state = tx.init(x)
    zero = jax.tree.map(jnp.zeros_like, x)
    poisoned = zero | {"b": zero["b"].at[1, 0].set(bad)}
    for updates in (zero, zero, zero, poisoned, poisoned, zero):
        _, state = jax.jit(tx.update)(updates, state, x)
    assert (int(state.step), int(state.absorbed), int(state.rejected)) == (6, 2, 1)
    assert all(bool(jnp.isfinite(v).all()) for v in jax.tree.leaves(state.averages))


BIASED = {
    "ema": lambda **kwargs: oa.ema_params(0.5, debias=False, **kwargs),
    "compensated": lambda **kwargs: oa.ema_params(
        0.5, debias=False, rounding="compensated", **kwargs
    ),
    "dithered": lambda **kwargs: oa.ema_params(
        0.5, debias=False, accumulator_dtype=jnp.bfloat16, **kwargs
    ),
    "stochastic": lambda **kwargs: oa.ema_params(
        0.5,
        debias=False,
        accumulator_dtype=jnp.bfloat16,
        rounding="stochastic",
        **kwargs,
    ),
    "half_life": lambda **kwargs: oa.average(oa.weights.half_life(1.0), **kwargs),
    "bema": lambda **kwargs: oa.bema(1.0, 0.0, 0.0, 0.5, **kwargs),
}


@pytest.mark.parametrize("make", BIASED.values(), ids=BIASED.keys())
def test_a_broken_element_heals_with_the_next_finite_iterate(make):
    """As after a restart from a checkpoint that holds a NaN."""
    tx = make()
    state = feed(tx, [jnp.ones(2), jnp.full(2, 2.0)])
    names = ("average", "corrected", "ema", "base", "compensation")
    hurt = lambda path, x: (
        x.at[0].set(jnp.nan) if x.ndim and str(path[-1])[1:] in names else x
    )
    state = jax.tree.map_with_path(hurt, state)
    assert jnp.isnan(oa.averaged_params(state, jnp.ones(2))[0])
    _, state = jax.jit(tx.update)(jnp.full(2, 3.0), state, jnp.zeros(2))
    assert oa.averaged_params(state, jnp.ones(2))[0] == 3.0


def test_non_finite_iterates_can_be_let_through():
    tx = oa.ema_params(0.9, nonfinite="keep")
    _, state = tx.update(jnp.array([jnp.nan]), tx.init(jnp.ones(1)), jnp.ones(1))
    assert bool(jnp.isnan(state.averages["ema"].average).all())


@given(st.integers(1, 7), st.sampled_from([2.0, 50.0]))
def test_half_life_does_not_depend_on_the_stride(every, h):
    # After 42 steps at the new value, half-lives counted in steps whatever the stride.
    tx = oa.average(oa.weights.half_life(h), every=every)
    xs = [jnp.zeros(1)] + [jnp.ones(1)] * 42
    steps = 42 - 42 % every
    np.testing.assert_allclose(result(tx, xs), [1 - 2 ** (-steps / h)], rtol=1e-5)


@given(st.integers(1, 6))
def test_power_function_does_not_depend_on_the_stride(every):
    tx = oa.average(oa.weights.power_function(2.0), every=every)
    xs = [jnp.full(1, s, jnp.float32) for s in range(61)]
    fine = result(oa.average(oa.weights.power_function(2.0)), xs)
    steps = 60 - 60 % every
    # Mean of tau under 3 tau^2/T^3 is 3T/4; a stride adds at most one stride.
    assert abs(result(tx, xs)[0] - fine[0] * steps / 60) <= every


@pytest.mark.parametrize(
    "use",
    [
        lambda where, x: oa.ema_params(0.9, where=where).init(x),
        lambda where, x: oa.sam(where=where).init(x),
        lambda where, x: oa.landscape.barrier(None, x, x, where=where),
    ],
    ids=["average", "sam", "barrier"],
)
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"b": True}, r"where has \['b'\] and params \['a'\]; pass bools"),
        ((True, True), r"where has \[0\], \[1\] and params \['a'\]; pass bools"),
        (lambda path, leaf: "a" in path, r"no leaf.*\['a'\].*keystr\(path\)\."),
        ({"a": False}, r"where is true of no leaf.*The leaves are \['a'\]"),
        (False, r"where is true of no leaf.*The leaves are \['a'\]"),
    ],
)
def test_where_that_selects_nothing(use, where, message):
    with pytest.raises(ValueError, match=message):
        use(where, {"a": jnp.ones(2)})


def test_a_part_may_have_nothing_that_is_selected():
    """The same average on every part of a partition."""
    ema = oa.ema_params(0.9, where=lambda path, leaf: leaf.ndim > 1)
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    tx = optax.partition({"one": ema, "two": ema}, {"w": "one", "b": "two"})
    assert oa.average_names(tx.init(params)) == ["ema"]


def test_where_takes_predicates_and_trees():
    params = {
        "dense": {"kernel": jnp.ones(2), "bias": jnp.ones(2)},
        "norm": jnp.ones(2),
    }
    updates = jax.tree.map(jnp.ones_like, params)
    by_path = lambda path, leaf: "kernel" in jax.tree_util.keystr(path)
    by_tree = {"dense": {"kernel": True, "bias": False}, "norm": False}
    for where in (by_path, by_tree):
        tx = oa.polyak_average(where=where)
        state = tx.init(params)
        assert len(jax.tree.leaves(state.averages)) == 1
        _, state = tx.update(updates, state, params)
        average = oa.averaged_params(state, params)
        np.testing.assert_array_equal(average["dense"]["kernel"], [2.0, 2.0])
        np.testing.assert_array_equal(average["dense"]["bias"], [1.0, 1.0])
    prefix = oa.polyak_average(where={"dense": True, "norm": False})
    assert len(jax.tree.leaves(prefix.init(params).averages)) == 2


def test_off_stride_steps_run_no_arithmetic_on_the_average():
    tx = oa.ema_params(0.9, every=10)
    x = jnp.ones(1000)
    jaxpr = jax.make_jaxpr(tx.update)(x, tx.init(x), x)
    outside = [
        e.primitive.name
        for e in jaxpr.eqns
        if any(getattr(v.aval, "size", 0) == 1000 for v in e.outvars)
    ]
    assert set(outside) <= {"add", "cond"}
    assert outside.count("cond") == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: oa.ema_params(1.5), r"decay must lie in \[0, 1\], got 1.5"),
        (lambda: oa.ema_params(float("nan")), "decay must lie"),
        (lambda: oa.ema_params("0.9"), "decay must be a number"),
        (lambda: oa.ema_params(0.9, every=0), "every must be an integer >= 1"),
        (lambda: oa.ema_params(0.9, every=2.5), "every must be an integer >= 1"),
        (lambda: oa.swa(-1), "start must be an integer >= 0"),
        (lambda: oa.ema_params(0.9, rounding="up"), "rounding must be"),
        (lambda: oa.ema_params(0.9, accumulator_dtype=jnp.int32), "must be floating"),
        (lambda: oa.ema_params(0.9, memory_kind="disk"), "memory_kind must be"),
        (lambda: oa.average({}), "average needs a weight"),
        (lambda: oa.average(0.9), "a weight is a function of t"),
        (lambda: oa.window_average(0), "k must be an integer >= 1"),
        (lambda: oa.window_average(2.0), "static_args"),
        (lambda: oa.power_ema(0.3), "sigma_rel must lie"),
        (lambda: oa.power_ema([0.1, 0.1]), "distinct widths"),
        (lambda: oa.lr_weighted_average(0.1), "needs a schedule"),
        (lambda: oa.bema(kappa=2.0), "kappa must lie"),
        (lambda: oa.bema(gamma=0.0), "gamma must lie"),
        (lambda: oa.lookahead(5, 1.5), "slow_step_size must lie"),
        (lambda: oa.lookahead(0, 0.5), "sync_period must be an integer >= 1"),
        (lambda: oa.write_back(oa.ema_params(0.9), 0), "every must be an integer"),
        (lambda: oa.switch_ema(0.9, 2.0), "every must be an integer"),
        (lambda: oa.ema_params(0.9, every=True), "every must be an integer"),
        (lambda: oa.ema_params(0.9, every=np.True_), "every must be an integer"),
        (lambda: oa.ema_params(0.9, start=np.int64(-1)), "start must be an integer"),
        (
            lambda: oa.window_average(jnp.array(3)),
            "k must be .* static_args",
        ),
        (
            lambda: oa.ema_params(0.9, accumulator_dtype=jnp.float8_e4m3fn),
            "16 bits or more",
        ),
        (
            lambda: oa.ema_params(0.9, accumulator_dtype=jnp.complex64),
            "must be floating, real",
        ),
        (
            lambda: oa.power_ema(np.full((2, 2), 0.1)),
            r"of them, got .*\(2, 2\)",
        ),
        (lambda: oa.power_ema([]), "power_ema needs distinct widths"),
        (lambda: oa.power_ema("0.1"), "sigma_rel must be a number"),
        (lambda: oa.power_ema(np.array([0.1, 0.4])), "sigma_rel must lie"),
        (
            lambda: oa.ema_params(np.array([0.9, 0.99])),
            "decay must be one number",
        ),
        (lambda: oa.ema_params(np.array(1.5)), "decay must lie"),
        (lambda: oa.bema(kappa=jnp.ones(3)), "kappa must be one number"),
        (lambda: oa.lookahead(5, np.array([0.5, 0.6])), "slow_step_size must be one"),
    ],
)
def test_bad_arguments_are_refused_by_the_factory(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_integers_of_numpy_are_integers():
    xs = walk(6, 12)
    for make in (
        lambda number: oa.ema_params(0.9, every=number(2), start=number(1)),
        lambda number: oa.window_average(number(3), number(2)),
        lambda number: oa.swa(number(2), number(3)),
        lambda number: oa.lookahead(number(2), 0.5),
    ):
        np.testing.assert_array_equal(result(make(np.int64), xs), result(make(int), xs))
    assert int(oa.swa(np.array(2), np.uint8(3)).init(xs[0]).every) == 3


def test_widths_of_power_emas_may_come_in_any_container():
    xs = walk(7, 20)
    several = feed(oa.power_ema([0.05, 0.1]), xs)
    for widths in (
        (0.05, 0.1),
        np.array([0.05, 0.1]),
        np.array([0.05, 0.1], np.float32),
        jnp.array([0.05, 0.1]),
    ):
        state = feed(oa.power_ema(widths), xs)
        assert oa.average_names(state) == ["power_ema_0.05", "power_ema_0.1"]
        for name, average in several.averages.items():
            np.testing.assert_allclose(
                state.averages[name].average, average.average, rtol=1e-5
            )
    one = result(oa.power_ema(0.1), xs)
    for width in (np.array(0.1), np.float64(0.1), jnp.array(0.1)):
        state = feed(oa.power_ema(width), xs)
        np.testing.assert_allclose(state.averages["power_ema"].average, one, rtol=1e-5)
    injected = optax.inject_hyperparams(oa.power_ema)(sigma_rel=np.array([0.05, 0.1]))
    with pytest.raises(ValueError, match=r'write static_args=\("sigma_rel",\)'):
        jax.jit(injected.init)(xs[0])


def test_a_weight_is_one_number():
    tx = oa.average(lambda t: jnp.array([0.1, 0.2, 0.3]))
    with pytest.raises(ValueError, match=r"must be one number .* of shape \(3,\)"):
        tx.update(jnp.zeros(3), tx.init(jnp.ones(3)), jnp.ones(3))


ALIASES = {
    "average": lambda: oa.average(oa.weights.uniform()),
    "ema_params": lambda: oa.ema_params(0.9),
    "polyak_average": oa.polyak_average,
    "swa": lambda: oa.swa(1),
    "tail_average": lambda: oa.tail_average(1),
    "power_ema": oa.power_ema,
    "lr_weighted_average": lambda: oa.lr_weighted_average(lambda count: 1.0),
    "window_average": lambda: oa.window_average(2),
    "bema": oa.bema,
    "write_back": lambda: oa.write_back(oa.ema_params(0.9), 2),
    "switch_ema": lambda: oa.switch_ema(0.9, 2),
    "lookahead": lambda: oa.lookahead(2, 0.5),
}


@pytest.mark.parametrize("name", ALIASES)
def test_errors_name_what_the_user_called(name):
    tx = ALIASES[name]()
    with pytest.raises(ValueError, match=f"^{name} needs the parameters; call"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


TABLE = np.array([0.5, 0.9, 0.3, 0.8, 0.6, 0.7, 0.2, 0.4])


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda s: oa.ema_params(s, every=2, start=3),
        lambda s: oa.ema_params(s, debias=False),
        lambda s: oa.average(oa.weights.ramp(s)),
        lambda s: oa.average(oa.weights.half_life(s, fraction=0.5)),
        lambda s: oa.average(oa.weights.inverse_gamma(1.0, 1.0, s)),
        lambda s: oa.lr_weighted_average(s, 2.0, every=2, start=3),
        lambda s: oa.switch_ema(s, 3),
    ],
    ids=["ema", "biased", "ramp", "half_life", "inverse_gamma", "lr", "switch"],
)
def test_schedules_may_index_a_table(make, x64):
    with jax.enable_x64(x64):
        kinds = []

        def from_table(count):
            kinds.append(count.dtype)
            return jnp.asarray(TABLE, jnp.float32)[count]

        by_choice = lambda count: jnp.select(
            [count == i for i in range(len(TABLE))], list(TABLE.astype(np.float32))
        )
        xs = walk(8, 7)
        np.testing.assert_allclose(
            result(make(from_table), xs), result(make(by_choice), xs), rtol=1e-6
        )
        assert set(kinds) == {jnp.dtype(jnp.int32)}


@every_average
def test_init_takes_shapes_without_values(case):
    structs = {
        "w": jax.ShapeDtypeStruct((4, 2), jnp.bfloat16),
        "n": jax.ShapeDtypeStruct((), jnp.int32),
    }
    tx = optax.chain(optax.adam(0.1), case.make())
    concrete = tx.init(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), structs))
    kind = lambda x: (x.shape, x.dtype)
    assert jax.tree.map(kind, tx.init(structs)) == jax.tree.map(kind, concrete)


@pytest.mark.parametrize("injected", [False, True])
@every_average
def test_types_of_the_state_are_fixed_under_x64(case, injected):
    factory = case.factory
    if injected:
        factory = optax.inject_hyperparams(factory, static_args=case.static)
    with jax.enable_x64(True):
        params = (jnp.array([1.0, 2.0], jnp.float32), jnp.array([3.0, 4.0]))
        tx = factory(**case.kwargs)
        state = tx.init(params)
        kinds = jax.tree.map(jax.typeof, (params, state))
        update = jax.jit(tx.update)
        for _ in range(4):
            updates, state = update(params, state, params)
            assert jax.tree.map(jax.typeof, (updates, state)) == kinds
        for name in oa.average_names(state):
            average = oa.averaged_params(state, params, name)
            assert jax.tree.map(jax.typeof, average) == kinds[0]


@pytest.mark.parametrize("rounding", [None, "dithered", "stochastic", "compensated"])
def test_complex_leaves_with_narrow_accumulators(rounding):
    x = jnp.asarray([1 + 2j, 3 - 1j], jnp.complex64)
    tx = oa.polyak_average(accumulator_dtype=jnp.bfloat16, rounding=rounding)
    state = feed(tx, [x, 2 * x, 4 * x])
    assert state.averages["polyak"].average.dtype == jnp.complex64
    np.testing.assert_allclose(oa.averaged_params(state, x), 3 * x, rtol=1e-6)
    with jax.enable_x64(True):
        wide = oa.polyak_average(accumulator_dtype=jnp.float64).init(x)
        assert wide.averages["polyak"].average.dtype == jnp.complex128


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@every_average
def test_parameters_of_8_bits(case, dtype):
    tx = case.make()
    xs = [jnp.full(3, v, dtype) for v in (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)]
    step = jnp.full(3, 0.5, dtype)
    state, wide_state = tx.init(xs[0]), tx.init(xs[0].astype(jnp.float32))
    update = jax.jit(tx.update)
    for x in xs[:-1]:
        updates, state = update(step, state, x)
        assert updates.dtype == dtype
        wide = x.astype(jnp.float32)
        _, wide_state = update(step.astype(jnp.float32), wide_state, wide)
    for name in oa.average_names(state):
        average = oa.averaged_params(state, xs[-1], name)
        wanted = oa.averaged_params(wide_state, xs[-1].astype(jnp.float32), name)
        assert average.dtype == dtype
        np.testing.assert_allclose(average.astype(jnp.float32), wanted, rtol=0.13)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_non_finite_parameters_of_8_bits(dtype):
    x = jnp.ones(3, dtype)
    tx = oa.polyak_average(nonfinite="reject")
    _, state = jax.jit(tx.update)(x.at[1].set(jnp.nan), tx.init(x), x)
    assert (int(state.absorbed), int(state.rejected)) == (0, 1)
    tx = oa.polyak_average()
    _, state = jax.jit(tx.update)(x.at[1].set(jnp.nan), tx.init(x), x)
    assert oa.averaged_params(state, x).astype(jnp.float32).tolist() == [2, 1, 2]


@pytest.mark.parametrize("nonfinite", ["skip", "reject", "keep"])
@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("make", BIASED.values(), ids=BIASED.keys())
def test_a_start_that_is_not_finite_is_the_first_iterate(make, start, nonfinite):
    tx = make(start=start, nonfinite=nonfinite)
    # The second element is sound: it starts from the parameters of step `start`.
    xs = [jnp.full(2, -9.0)] * start + [jnp.array([jnp.nan, 1.0])]
    xs += [jnp.array([2.0, 3.0]), jnp.array([4.0, 4.0])]
    update = jax.jit(tx.update)
    state = tx.init(xs[0])
    for after in xs[1:]:
        # From 0, because nothing finite leads away from a NaN.
        _, state = update(after, state, jnp.zeros(2))
    healed = [jnp.array([2.0, 1.0]), *xs[-2:]]
    wanted = result(make(), healed)
    found = oa.averaged_params(state, xs[-1])
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert (int(state.absorbed), int(state.rejected)) == (2, 0)


def test_nan_on_request_stays_after_the_first_iterate():
    tx = oa.ema_params(0.5, nonfinite="keep")
    xs = [jnp.ones(1), jnp.ones(1), jnp.full(1, jnp.nan)]
    state = tx.init(xs[0])
    for x in [*xs[1:], jnp.ones(1)]:
        _, state = tx.update(x, state, jnp.zeros(1))
    assert bool(jnp.isnan(state.averages["ema"].average).all())


def late(tx, x, **counters):
    """The state of an average whose counters have come far."""
    return tx.init(x)._replace(**{k: jnp.int32(v) for k, v in counters.items()})


@pytest.mark.parametrize("every", [1, 3, 1000])
def test_the_clock_keeps_its_stride_at_the_largest_integer(every):
    tx = oa.polyak_average(every=every)
    # A step that is due, a few before the last.
    due = LAST - LAST % every
    state = late(tx, jnp.zeros(1), step=due - 1, absorbed=5)
    _, (absorbed, steps) = jax.lax.scan(
        lambda state, _: (
            (new := tx.update(jnp.ones(1), state, jnp.zeros(1))[1]),
            (new.absorbed - state.absorbed, new.step),
        ),
        state,
        length=2 * every + 1,
    )
    wanted = [i % every == 0 for i in range(2 * every + 1)]
    np.testing.assert_array_equal(absorbed, wanted)
    assert int(steps.min()) > LAST - 2 * every


def test_counters_of_iterates_do_not_wrap():
    x = jnp.zeros(1)
    for tx in (oa.polyak_average(), oa.bema()):
        state = late(tx, x, step=LAST, absorbed=LAST, rejected=LAST)
        _, state = jax.jit(tx.update)(jnp.ones(1), state, x)
        assert (int(state.step), int(state.absorbed)) == (LAST, LAST)
        average = oa.averaged_params(state, x)
        assert 0 < float(average[0]) < 0.1
        _, state = jax.jit(tx.update)(jnp.full(1, jnp.nan), state, x)
        assert int(state.rejected) == LAST
    tx = oa.lr_weighted_average(lambda count: jnp.where(count >= 0, 1.0, jnp.nan))
    state = late(tx, x, step=LAST, absorbed=LAST)
    _, state = jax.jit(tx.update)(jnp.ones(1), state, x)
    assert bool(jnp.isfinite(state.averages["lr_weighted"].average).all())


def test_a_window_goes_round_at_the_largest_integer():
    tx = oa.window_average(3)
    state = late(tx, jnp.zeros(1), step=LAST, absorbed=LAST)
    for i in range(1, 8):
        _, state = tx.update(jnp.full(1, float(i)), state, jnp.zeros(1))
    np.testing.assert_allclose(oa.averaged_params(state, jnp.zeros(1)), [6.0])


def test_averages_draw_random_bits_of_their_own():
    n = 4096
    x = jnp.full(n, 1 + 2.0**-8)  # halfway between neighbours in bf16
    narrow = {"accumulator_dtype": jnp.bfloat16}

    def bits(tx, params, read=lambda state: state):
        _, state = tx.update(
            jax.tree.map(jnp.zeros_like, params), tx.init(params), params
        )
        return [np.asarray(a) > 1 for a in jax.tree.leaves(read(state))]

    chain = optax.chain(
        oa.ema_params(0.9, name="a", **narrow), oa.ema_params(0.9, name="b", **narrow)
    )
    drawn = bits(chain, {"u": x, "v": x}, lambda s: (s[0].averages, s[1].averages))
    both = oa.average({"c": oa.weights.ema(0.9), "d": oa.weights.ema(0.99)}, **narrow)
    drawn += bits(both, {"u": x}, lambda state: state.averages)
    # Parts of the parameters under one name, as in optax.partition.
    parts = optax.partition(
        {key: oa.ema_params(0.9, **narrow) for key in "uv"}, {"u": "u", "v": "v"}
    )
    is_average = lambda node: isinstance(node, oa.AverageState)
    held = lambda state: [
        node.averages
        for node in jax.tree.leaves(state, is_leaf=is_average)
        if is_average(node)
    ]
    drawn += bits(parts, {"u": x, "v": x}, held)
    for i, first in enumerate(drawn):
        assert 0.45 < first.mean() < 0.55
        for second in drawn[:i]:
            assert 0.45 < (first == second).mean() < 0.55
    # Where a link stands does not matter.
    turned = optax.chain(oa.swa(0), oa.ema_params(0.9, name="a", **narrow))
    again = bits(turned, {"u": x, "v": x}, lambda state: state[1].averages)
    np.testing.assert_array_equal(again, drawn[:2])


def test_sums_of_masses_do_not_stop_growing():
    # In float32, 2^24 + 1 is 2^24.
    begun = 2**24
    tx = oa.average(oa.weights.mass(lambda t: 1.0))
    state = tx.init(jnp.zeros(1))
    kept = state.averages["average"]._replace(mass=(jnp.float32(begun), jnp.zeros([])))
    state = state._replace(absorbed=jnp.int32(begun), averages={"average": kept})
    state, _ = jax.lax.scan(
        lambda state, _: (tx.update(jnp.ones(1), state, jnp.zeros(1))[1], None),
        state,
        length=2001,
    )
    total = sum(map(float, state.averages["average"].mass))
    assert total == begun + 2001


def test_bf16_decay_from_inject_hyperparams_is_what_it_was_cast_to():
    tx = optax.inject_hyperparams(oa.ema_params)(decay=0.9)
    xs = walk(5, 8, jnp.bfloat16)
    state = feed(tx, xs)
    assert state.hyperparams["decay"].dtype == jnp.bfloat16
    rounded = float(jnp.bfloat16(0.9))
    wanted = reference.weighted_mean(xs, lambda t, s: rounded ** (8 - t))
    average = np.asarray(oa.averaged_params(state, xs[-1]), np.float64)
    check_close(average, wanted, jnp.bfloat16)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("shape", [(7,), (300_000,), (600, 500), (3, 3, 200, 200)])
def test_finiteness_of_small_and_large_leaves(shape, bad):
    # Large matrices are checked by another route than small leaves.
    x = jnp.ones(shape).at[(-1,) * len(shape)].set(bad)
    tx = oa.polyak_average(nonfinite="reject")
    _, state = jax.jit(tx.update)(jnp.zeros_like(x), tx.init(x), x)
    assert int(state.rejected) == int(not np.isfinite(np.float32(bad)))
