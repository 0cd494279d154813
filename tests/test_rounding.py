"""Dithered rounding of narrow accumulators against float64 references."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_avg as oa
from optax_avg.averages import _dither

NARROW = [jnp.bfloat16, jnp.float16]
ONE = 2**32  # of which the digits of u are a fraction


def rounded(x, dtype, u):
    y = jax.jit(_dither.raise_and_cut, static_argnums=1)(x, dtype, jnp.uint32(u))
    return np.asarray(y).astype(np.float64)


def spacing(x, dtype):
    """The distance of neighbours in a dtype, subnormal numbers included."""
    limits = jnp.finfo(dtype)
    size = np.maximum(np.abs(x), float(limits.smallest_normal))
    return 2.0 ** (np.floor(np.log2(size)) - limits.nmant)


def reference(x, dtype, u):
    """``s floor(|x| / s + u)`` with the sign of ``x``, in float64."""
    x = np.asarray(x, np.float64)
    s = spacing(x, dtype)
    return np.sign(x) * s * np.floor(np.abs(x) / s + np.asarray(u) / ONE)


def numbers(dtype, wide, n=20_000):
    """Numbers of all magnitudes that the dtype has, the subnormal ones of fp16 too."""
    rng = np.random.default_rng(0)
    low, high = (-8.5, 4.5) if dtype == jnp.float16 else (-37, 38)
    x = rng.standard_normal(n) * 10 ** rng.uniform(low, high, n)
    x = x[np.abs(x) < float(jnp.finfo(dtype).max)]
    if dtype != jnp.float16:  # some processors take their subnormal numbers for 0
        x = x[np.abs(x) > float(jnp.finfo(dtype).smallest_normal)]
    return np.asarray(x, wide)


@pytest.mark.parametrize("u", [0, 1 << 16, ONE // 3, ONE // 2, ONE - (1 << 16)])
@pytest.mark.parametrize("dtype", NARROW)
def test_float32_is_raised_and_cut(dtype, u):
    x = numbers(dtype, np.float32)
    bits = 32 - (jnp.finfo(jnp.float32).nmant - jnp.finfo(dtype).nmant)
    exact = reference(x, dtype, u >> bits << bits)
    y = rounded(x, dtype, u)
    # Of the smallest numbers, 13 bits are kept beside the spacing before the cut.
    near = np.abs(np.abs(x) / spacing(x, dtype) + u / ONE) % 1
    edge = np.minimum(near, 1 - near) < 2**-12
    assert np.mean(edge) < 0.01
    np.testing.assert_array_equal(y[~edge], exact[~edge])
    assert np.max(np.abs(y - x) / spacing(x, dtype)) <= 1


@pytest.mark.parametrize("dtype", [*NARROW, jnp.float32])
def test_float64_is_raised_and_cut(dtype):
    with jax.enable_x64(True):
        x = numbers(dtype, np.float64)
        for u in (0, 12345, ONE // 3, ONE - 1):
            np.testing.assert_array_equal(rounded(x, dtype, u), reference(x, dtype, u))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("u", [0, ONE // 2, ONE - 1])
def test_ends_of_the_range(dtype, u):
    largest = np.float32(jnp.finfo(dtype).max)
    below = np.nextafter(largest, np.float32(0))
    above = np.nextafter(largest, np.float32(np.inf))
    finite = np.array([largest, below, above, -below, -largest], np.float32)
    assert np.isfinite(rounded(finite, dtype, u)).all()
    np.testing.assert_array_equal(np.sign(rounded(finite, dtype, u)), np.sign(finite))
    others = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0], np.float32)
    np.testing.assert_array_equal(rounded(others, dtype, u), others)


@pytest.mark.parametrize("dtype", NARROW)
@given(bits=st.integers(0, 2**16 - 1), u=st.integers(0, ONE - 1))
def test_numbers_of_the_narrow_dtype_stay(dtype, bits, u):
    x = np.asarray(bits, np.uint16).view(dtype).astype(np.float32)
    if np.abs(x) < np.finfo(np.float32).smallest_normal and dtype == jnp.bfloat16:
        assert rounded(x, dtype, u) in (0, x)  # which some processors take for 0
    else:
        np.testing.assert_array_equal(rounded(x, dtype, u), x)


def slow_digits(t, seed):
    """``u_j = t_j xor g_j(t_{j+1}, ...)``, digit by digit."""

    def mix(x):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ (x >> shift)) * factor % ONE
        return x ^ (x >> 16)

    u = 0
    for j in range(32):
        g = mix((t >> j >> 1) ^ mix(j ^ seed))
        u = 2 * u + (((t >> j) ^ g) & 1)
    return u


@given(t=st.integers(0, 2**31 - 1), seed=st.integers(0, ONE - 1))
def test_digits_of_time(t, seed):
    assert int(_dither.digits_of_time(jnp.int32(t), seed)) == slow_digits(t, seed)


@functools.cache
def digits_of_times(seed):
    return jax.jit(jax.vmap(lambda t: _dither.digits_of_time(t, seed)))


@given(run=st.integers(0, 2**20), seed=st.sampled_from([0, 7, ONE - 1]))
def test_every_run_of_iterates_meets_every_interval_once(run, seed):
    t = jnp.arange(1024, dtype=jnp.int32) + (run << 10)
    u = np.asarray(digits_of_times(seed)(t)) ^ np.uint32(0xC0FFEE11)
    for k in range(11):
        prefixes = (u.astype(np.uint64) >> (32 - k)).reshape(-1, 2**k)
        assert (np.sort(prefixes) == np.arange(2**k)).all()


@pytest.mark.parametrize("k", [1, 2, 5])
def test_runs_meet_the_intervals_in_other_orders(k):
    """Where the lowest interval is met in a run of ``2^k``: anywhere, equally often."""
    runs = 4096
    t = jnp.arange(runs << k)
    u = np.asarray(digits_of_times(7)(t))
    lowest = np.argmin(u.reshape(runs, 2**k), axis=1)
    counts = np.bincount(lowest, minlength=2**k)
    share = 2.0**-k
    assert np.abs(counts - runs * share).max() < 4 * np.sqrt(runs * share)
    # Nor does the place in one run say where it is in the next.
    same = np.mean(lowest[1:] == lowest[:-1])
    assert abs(same - share) < 4 * np.sqrt(share / runs)


@pytest.mark.parametrize("value", [1.2345, -0.001234, 300.7, 3e-6, 0.0])
@pytest.mark.parametrize("dtype", NARROW)
def test_the_mean_over_time_is_exact(dtype, value):
    """A run of 2^16 iterates meets every threshold that 16 digits can tell apart."""
    x = np.full(2**16, value, np.float32)
    u = digits_of_times(3)(jnp.arange(2**16))
    y = np.asarray(_dither.raise_and_cut(x, dtype, u ^ 12345)).astype(np.float64)
    s = spacing(np.float64(value), dtype)
    # Below the smallest normal number of fp16 two bits of x are lost.
    slack = (
        s * 2.0**-13 if 0 < abs(value) < 6e-5 and dtype == jnp.float16 else 1e-14 * s
    )
    assert abs(y.mean() - np.float64(x[0])) <= slack


@pytest.mark.parametrize("value", [1.2345, -0.001234, 3e-6])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("step", [0, 1, 1000])
def test_the_mean_over_elements_is_right(dtype, value, step):
    n = 100_000
    u = _dither.digits_of_time(jnp.int32(step), 3) ^ _dither.digits_of_place((n,), 5)
    x = jnp.full(n, value, jnp.float32)
    y = np.asarray(_dither.raise_and_cut(x, dtype, u)).astype(np.float64)
    s = spacing(value, dtype)
    assert len(np.unique(y)) <= 2
    assert abs(y.mean() - np.float64(np.float32(value))) < 4 * s / 2 / np.sqrt(n)


def test_elements_of_large_leaves_have_places():
    """Modulo 2^32, where a stride is beyond it too."""
    shape = (3, 1 << 17, 1 << 16)
    u = jax.eval_shape(lambda: _dither.digits_of_place(shape, 0))
    assert (u.shape, u.dtype) == (shape, jnp.uint32)
    small = np.asarray(_dither.digits_of_place((4, 5, 6), 9))
    flat = np.asarray(_dither.digits_of_place((120,), 9))
    np.testing.assert_array_equal(small.ravel(), flat)
    assert len(np.unique(flat)) == 120


# Streams of parameters.

STEPS, ELEMENTS = 6000, 300


def ema_of(xs, decay):
    """The debiased EMA of rows in float64."""
    averages, a = np.empty(xs.shape), np.zeros(xs.shape[1:])
    for t, x in enumerate(xs.astype(np.float64), start=1):
        a = a + (1 - decay) / (1 - decay**t) * (x - a)
        averages[t - 1] = a
    return averages


def averages_of(tx, xs):
    still = jax.tree.map(lambda x: jnp.zeros_like(x[0]), xs)

    def body(state, x):
        state = tx.update(still, state, x)[1]
        names = oa.average_names(state)
        kept = {n: state.averages[n].read(state.absorbed) for n in names}
        return state, jax.tree.map(lambda a: a.astype(jnp.float32), kept)

    first = jax.tree.map(lambda x: x[0], xs)
    return jax.tree.map(
        lambda x: np.asarray(x, np.float64),
        jax.jit(lambda: jax.lax.scan(body, tx.init(first), xs))()[1],
    )


def narrow(decay, dtype=jnp.bfloat16, rounding=None):
    return oa.memories.running(
        oa.weights.ema(decay), accumulator_dtype=dtype, rounding=rounding
    )


def both(decay, dtype=jnp.bfloat16):
    return oa.average(
        {
            "dithered": narrow(decay, dtype),
            "stochastic": narrow(decay, dtype, "stochastic"),
        }
    )


def late_errors(xs, tx, decay):
    """Errors in the second half of the stream, ``(steps, elements)``."""
    found, exact = averages_of(tx, jnp.asarray(xs, jnp.float32)), ema_of(xs, decay)
    half = len(xs) // 2
    return {name: (a - exact)[half:] for name, a in found.items()}


def rms(x):
    return np.sqrt(np.mean(x**2))


@functools.cache
def start_and_noise():
    rng = np.random.default_rng(0)
    start = rng.uniform(1, 1.5, ELEMENTS) * rng.choice([-1, 1], ELEMENTS)
    return start, rng.standard_normal((STEPS, ELEMENTS))


@pytest.mark.parametrize(
    ("decay", "dtype"),
    [(0.99, jnp.bfloat16), *((d, n) for d in (0.999, 0.9999) for n in NARROW)],
)
def test_errors_on_a_walk_are_half_of_those_of_random_bits(decay, dtype):
    start, noise = start_and_noise()
    # In steps of a few spacings, as parameters move in training.
    xs = (start + np.cumsum(0.02 * noise, axis=0)).astype(np.float32)
    errors = late_errors(xs, both(decay, dtype), decay)
    assert rms(errors["dithered"]) <= 0.5 * rms(errors["stochastic"])


@pytest.mark.parametrize("period", [2, 3, 64, 89, 144, 377])
def test_no_period_is_worse_than_with_random_bits(period):
    """Periods of sequences that are in use: powers of 2 and Fibonacci's numbers."""
    start, _ = start_and_noise()
    t = np.arange(STEPS)[:, None]
    xs = (start + 0.1 * np.cos(2 * np.pi * t / period + 1)).astype(np.float32)
    errors = late_errors(xs, both(0.999), 0.999)
    assert rms(errors["dithered"]) <= rms(errors["stochastic"])


def test_noise_that_is_new_at_every_step_is_no_worse_than_with_random_bits():
    start, noise = start_and_noise()
    xs = (start + 0.1 * noise).astype(np.float32)
    errors = late_errors(xs, both(0.999), 0.999)
    assert rms(errors["dithered"]) <= 0.95 * rms(errors["stochastic"])


@pytest.mark.parametrize("slope", [1e-6, 1e-5, 1e-4])
@pytest.mark.parametrize("decay", [0.99, 0.999])
def test_bias_on_ramps_is_a_fraction_of_a_spacing(decay, slope):
    """The average runs ahead: it steps when it is furthest behind."""
    start, _ = start_and_noise()
    xs = (start + slope * np.arange(STEPS)[:, None]).astype(np.float32)
    s = spacing(start, jnp.bfloat16)  # all in one binade
    e = late_errors(xs, oa.average(narrow(decay)), decay)["average"] / s
    assert abs(e.mean()) < 0.35
    assert rms(e.mean(axis=0)) < 0.6
    assert rms(e) < 0.8


def test_a_constant_is_kept_between_its_neighbours():
    start, _ = start_and_noise()
    xs = np.broadcast_to(start.astype(np.float32), (STEPS, ELEMENTS))
    e = late_errors(xs, oa.average(narrow(0.999)), 0.999)["average"]
    e /= spacing(start, jnp.bfloat16)
    assert np.abs(e).max() <= 2
    assert rms(e) < 0.5
    assert abs(e.mean()) < 0.05


def correlation(a, b):
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


def test_averages_leaves_and_elements_are_independent():
    n, steps = 2000, 400
    rng = np.random.default_rng(1)
    x = np.broadcast_to(rng.uniform(1, 1.5, (1, 1)), (steps, n)).astype(np.float32)
    x = x + 1e-4 * np.arange(steps, dtype=np.float32)[:, None]
    tx = oa.average({"one": narrow(0.99), "two": narrow(0.99)})
    found = averages_of(tx, {"a": jnp.asarray(x), "b": jnp.asarray(x)})
    exact = ema_of(x, 0.99)
    bound = 4 / np.sqrt(n)
    for step in (200, 301, 399):
        e = {(k, leaf): (v[leaf] - exact)[step] for k, v in found.items() for leaf in v}
        a, b = e["one", "a"], e["one", "b"]
        assert abs(correlation(a, b)) < bound  # leaves
        assert abs(correlation(a, e["two", "a"])) < bound  # averages
        assert abs(correlation(a[1:], a[:-1])) < bound  # neighbours
        assert abs(correlation(a[50:], a[:-50])) < bound


def test_dithered_is_the_default_of_narrow_accumulators():
    start, noise = start_and_noise()
    xs = jnp.asarray((start + 0.1 * noise)[:50], jnp.float32)
    for dtype in NARROW:
        a = averages_of(oa.average(narrow(0.9, dtype)), xs)
        b = averages_of(oa.average(narrow(0.9, dtype, "dithered")), xs)
        np.testing.assert_array_equal(a["average"], b["average"])


def test_float16_follows_small_parameters():
    """Below 6e-5 its spacing stays at 6e-8: coarse, but without a bias."""
    n = 2000
    xs = np.full((2000, n), 3.3e-7, np.float32)
    found = averages_of(oa.average(narrow(0.99, jnp.float16)), jnp.asarray(xs))
    e = (found["average"] - np.float64(xs[0, 0]))[1000:] / 2.0**-24
    assert abs(e.mean()) < 0.03
    assert rms(e) < 0.7


def test_float64_iterates():
    with jax.enable_x64(True):
        xs = jnp.full((1500, 300), 1.2345678, jnp.float64)
        tx = oa.average(narrow(0.99))
        state = tx.init(xs[0])
        step = jax.jit(lambda state, x: tx.update(jnp.zeros_like(x), state, x)[1])
        for x in xs[:300]:
            state = step(state, x)
        average = state.averages["average"].average
        assert average.dtype == jnp.bfloat16
        e = np.asarray(average, np.float64) - 1.2345678
        assert abs(e.mean()) < 4 * 2**-7 / 2 / np.sqrt(300)


def test_shards_round_as_the_whole_leaf_does():
    """The same bits, no collective, and no index as large as the leaf in memory."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    params = {
        "w": jnp.linspace(-1, 1, 64 * 48).reshape(64, 48),
        "v": jnp.linspace(0, 3, 8 * 16 * 24).reshape(8, 16, 24),
    }
    specs = {"w": P("x", "y"), "v": P("y", None, "x")}
    shards = {
        k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in params.items()
    }
    tx = oa.ema_params(0.9, accumulator_dtype=jnp.bfloat16)
    step = lambda state, x: tx.update(x, state, x)[1]
    ends = []
    for x in (params, shards):
        state = jax.jit(tx.init)(x)
        run = jax.jit(step, donate_argnums=0).lower(state, x).compile()
        for _ in range(5):
            state = run(state, x)
        ends.append(state.averages["ema"].average)
    jax.tree.map(np.testing.assert_array_equal, *ends)
    entry = run.as_text().split("ENTRY")[1]
    assert not re.findall(r"\b(all-\w+|reduce-scatter|collective-permute)", entry)
    large = re.findall(r"= [us]32\[(?:16,24|8,16,6|64,48|8,16,24|4,16,6)\]", entry)
    assert "bf16[16,24]" in entry
    assert not large
