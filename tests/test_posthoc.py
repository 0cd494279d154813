"""Coefficients against quadrature and least squares, and SWAD's window."""

import tracemalloc

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_avg as oa
from optax_avg import posthoc, weights
from optax_avg.posthoc import _clock, _integrity, _profiles

WIDTHS = st.floats(0.01, 0.28)


def density(t, gamma, grid):
    """The profile of a power function on a grid."""
    inside = grid <= t
    return np.where(inside, (gamma + 1) * grid**gamma / t ** (gamma + 1), 0)


def quadrature(a, b):
    """``<p_a, p_b>`` of ``(time, gamma)`` by Gauss and Legendre's rule, in float64.

    In the fourth root of time, of which ``t^gamma`` is smooth at zero too.
    """
    nodes, factors = np.polynomial.legendre.leggauss(300)
    end, u = min(a[0], b[0]), (nodes + 1) / 2
    grid = end * u**4
    product = density(*a, grid) * density(*b, grid)
    return float(np.sum(factors * product * 2 * end * u**3))


@hypothesis.given(st.floats(0.5, 40), st.floats(0.5, 40), WIDTHS, WIDTHS)
def test_inner_products_equal_quadrature(ta, tb, sa, sb):
    a = ta, weights.gamma_from_sigma_rel(sa)
    b = tb, weights.gamma_from_sigma_rel(sb)
    found = _profiles.power_products(a[0], a[1], b[0], b[1])
    np.testing.assert_allclose(found, quadrature(a, b), rtol=1e-9, atol=1e-30)


def problem(n, widths=(0.05, 0.10)):
    times = np.tile(np.arange(1, n + 1) / n, len(widths))
    return times, np.repeat(widths, n)


@pytest.mark.parametrize("normalize", ["none", "sum", "constrained"])
@pytest.mark.parametrize("target", [0.03, 0.08, 0.15, 0.25])
def test_coefficients_equal_least_squares_on_a_grid(normalize, target):
    """The discrete problem on 20 000 steps, without normal equations."""
    times, widths = problem(6)
    steps = 20_000
    edges = np.arange(steps + 1) / steps

    def row(t, s):
        mass = np.minimum(edges / t, 1) ** (weights.gamma_from_sigma_rel(s) + 1)
        return np.diff(mass) * np.sqrt(steps)

    p = np.stack([row(t, s) for t, s in zip(times, widths, strict=True)], axis=1)
    goal = row(1.0, target)
    if normalize == "constrained":  # x_n = 1 - the others
        rest = np.linalg.lstsq(p[:, :-1] - p[:, -1:], goal - p[:, -1], rcond=None)[0]
        wanted = np.append(rest, 1 - rest.sum())
    else:
        wanted = np.linalg.lstsq(p, goal, rcond=None)[0]
        wanted = wanted / wanted.sum() if normalize == "sum" else wanted
    found = posthoc.coefficients(times, widths, 1.0, target, normalize=normalize)
    np.testing.assert_allclose(found.weights, wanted, atol=2e-3)
    residual = np.linalg.norm(goal - p @ wanted) / np.linalg.norm(goal)
    np.testing.assert_allclose(found.residual, residual, rtol=2e-3)
    if normalize != "none":
        np.testing.assert_allclose(found.weights.sum(), 1, atol=1e-12)


@hypothesis.given(st.integers(2, 12), WIDTHS, st.integers(0, 23))
def test_a_kept_average_is_itself(n, width, i):
    times, widths = problem(n, (0.05, width))
    i %= len(times)
    hypothesis.assume(abs(width - 0.05) > 1e-3)
    found = posthoc.coefficients(times, widths, times[i], widths[i])
    np.testing.assert_allclose(found.weights, np.arange(len(times)) == i, atol=1e-6)
    assert found.residual < 1e-6


@hypothesis.given(st.integers(1, 10), WIDTHS)
def test_more_snapshots_never_do_worse(n, target):
    few = posthoc.coefficients(*problem(n), 1.0, target, normalize="none")
    more = posthoc.coefficients(*problem(2 * n), 1.0, target, normalize="none")
    constrained = posthoc.coefficients(*problem(n), 1.0, target)
    assert more.residual <= few.residual + 1e-7
    assert few.residual <= constrained.residual + 1e-7


def test_residual_falls_with_the_number_of_snapshots():
    """At width 0.15 from 0.05 and 0.10: about fourfold each time the number doubles."""
    errors = [
        posthoc.coefficients(*problem(n), 1.0, 0.15).residual for n in (8, 16, 32, 64)
    ]
    ratios = np.array(errors[:-1]) / errors[1:]
    assert errors[-1] < 1e-3
    assert (ratios > 3).all()
    assert (ratios < 5).all()


def test_the_unit_of_time_does_not_matter():
    times, widths = problem(5)
    a = posthoc.coefficients(times, widths, 1.0, 0.2)
    b = posthoc.coefficients(times * 1e7, widths, 1e7, 0.2)
    np.testing.assert_allclose(a.weights, b.weights, rtol=1e-9)
    np.testing.assert_allclose(a.condition, b.condition, rtol=1e-9)


def test_float64_whatever_jax_is_set_to():
    def found(x64):
        with jax.enable_x64(x64):
            solved = posthoc.coefficients(*problem(16), 1.0, 0.2)
            return solved.weights, weights.sequence(weights.ema(0.999), 1000)

    for with_x64, without in zip(found(True), found(False), strict=True):
        assert without.dtype == np.float64
        np.testing.assert_array_equal(with_x64, without)
    np.testing.assert_allclose(without[-1], 0.001 / (1 - 0.999**1000), rtol=1e-12)


def test_discrete_profiles_tend_to_the_continuous_problem():
    steps, target = 4096, 0.15
    times, widths = problem(8)
    kept = [
        weights.profile(weights.power_function(sigma_rel=s), int(t * steps))
        for t, s in zip(times, widths, strict=True)
    ]
    goal = weights.profile(weights.power_function(sigma_rel=target), steps)
    discrete = posthoc.coefficients_of_profiles(kept, goal)
    continuous = posthoc.coefficients(times, widths, 1.0, target)
    np.testing.assert_allclose(discrete.weights, continuous.weights, atol=5e-3)
    np.testing.assert_allclose(discrete.residual, continuous.residual, rtol=1e-2)


# A weight with a reset, as a restart of the average makes it.
def restarted(t):
    return (
        np.where(t == 7, 1.0, 0.2)
        if isinstance(t, np.ndarray)
        else 0.2 + 0.8 * (t == 7)
    )


KINDS = {
    "power": (
        lambda t: _clock.Power(weights.gamma_from_sigma_rel(0.1)),
        weights.power_function(sigma_rel=0.1),
    ),
    "uniform": (lambda t: _clock.Power(0.0), weights.uniform()),
    "ema": (None, weights.ema(0.9)),
    "ema from the start": (None, weights.ema(0.9, debias=False)),
    "mass": (None, weights.mass(lambda t: t)),
    "restart": (None, restarted),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("chunk", [5, 2**16])
def test_weights_on_iterates_equal_profiles(name, chunk, monkeypatch):
    monkeypatch.setattr(_clock, "CHUNK", chunk)
    make, weight = KINDS[name]
    kinds, profiles = [], []
    long = weights.sequence(weight, 30)
    for t in (4, 13, 30):
        kind = make(t) if make else _clock.Recorded(long)
        profiles.append(weights.profile(weight, t))
        found = _clock.weights_on_iterates(kind, t)
        wanted = np.append(profiles[-1].initial, profiles[-1].weights)
        np.testing.assert_allclose(found, wanted, atol=1e-12)
        kinds.append(_clock.Placed(kind, t))
    goal = weights.profile(weights.ema(0.8), 30)
    ours = _clock.combination(
        kinds,
        _clock.Placed(_clock.Recorded(weights.sequence(weights.ema(0.8), 30)), 30),
    )
    theirs = posthoc.coefficients_of_profiles(profiles, goal)
    np.testing.assert_allclose(ours.weights, theirs.weights, atol=1e-8)
    np.testing.assert_allclose(ours.residual, theirs.residual, atol=1e-8)


@pytest.mark.parametrize(("k", "t"), [(3, 10), (10, 4), (1, 5)])
def test_windows(k, t):
    found = _clock.weights_on_iterates(_clock.Window(k), t)
    wanted = np.zeros(t + 1)
    wanted[max(1, t - k + 1) :] = 1 / min(k, t)
    np.testing.assert_allclose(found, wanted)


def test_an_average_of_the_second_half_by_hand():
    """Twice the mean of all ten less the mean of the first five."""
    kept = [_clock.Placed(_clock.Power(0.0), n) for n in (5, 10)]
    found = _clock.combination(kept, _clock.Placed(_clock.Window(5), 10))
    np.testing.assert_allclose(found.weights, [-1, 2], atol=1e-12)
    assert found.residual < 1e-7


def walk(rng, steps, process):
    """Iterates of shape (steps, 32), float32 in their values."""
    noise, middle = rng.normal(size=(steps, 32)), rng.normal(size=32)
    found = {
        "independent": noise,
        "walk": np.cumsum(noise, 0) / np.sqrt(steps),
        "around a point": middle + 0.01 * noise,
        "towards a point": middle + np.exp(-np.arange(steps) / 20)[:, None] * noise[0],
    }[process]
    return found.astype(np.float32)


def kept_in_float32(kind, x, times):
    """Averages of the first ``times`` iterates as a training makes them."""
    if isinstance(kind, _clock.Window):
        return [x[max(0, t - kind.k) : t].mean(0, dtype=np.float32) for t in times]
    newest = _clock._newest_weights(kind, np.arange(1, len(x) + 1))
    found, average = [], x[0]
    for w, iterate in zip(newest.astype(np.float32), x, strict=True):
        average = iterate if w == 1 else average + w * (iterate - average)
        found.append(average)
    return [found[t - 1] for t in times]


def any_kind(rng, steps):
    choice = rng.choice(["power", "ema", "uniform", "window"], p=[0.6, 0.2, 0.1, 0.1])
    if choice == "power":
        sigma_rel = float(rng.uniform(0.03, 0.27))
        return _clock.Power(weights.gamma_from_sigma_rel(sigma_rel))
    if choice == "ema":
        decay = 1 - 1 / float(rng.uniform(3, steps))
        return _clock.Recorded(weights.sequence(weights.ema(decay), steps))
    if choice == "uniform":
        return _clock.Power(0.0)
    return _clock.Window(int(rng.integers(1, steps)))


ROUNDINGS = {np.float32: 2.0**-24, np.float16: 2.0**-11, jnp.bfloat16: 2.0**-9}


@pytest.mark.parametrize(
    "process", ["independent", "walk", "around a point", "towards a point"]
)
@pytest.mark.parametrize("dtype", ROUNDINGS)
def test_the_true_error_is_not_twice_what_is_claimed(process, dtype):
    """Random averages, counts and targets; without the ridge a sixth would be."""
    rng = np.random.default_rng(0)
    for _ in range(12):
        steps = int(rng.integers(60, 200))
        times = np.unique([*rng.integers(1, steps, rng.integers(2, 20)), steps])
        x = walk(rng, steps, process)
        kept, stored = [], []
        for kind in [any_kind(rng, steps) for _ in range(rng.integers(1, 4))]:
            kept += [_clock.Placed(kind, int(t)) for t in times]
            averages = kept_in_float32(kind, x, times)
            stored += [np.float64(average.astype(dtype)) for average in averages]
        target = any_kind(rng, steps)
        rounding = ROUNDINGS[dtype] + 2.0**-23
        found = _clock.combination(
            kept, _clock.Placed(target, steps), rounding=rounding
        )
        true = _clock.weights_on_iterates(target, steps)[1:] @ np.float64(x)
        error = np.linalg.norm(found.weights @ np.stack(stored) - true)
        assert error <= 2 * found.residual * np.linalg.norm(true)


@pytest.mark.parametrize("process", ["independent", "towards a point"])
@pytest.mark.parametrize("scale", [1e-5, 1e-7, 1e-9])
def test_what_underflows_is_claimed(process, scale):
    """Of numbers that all become zero, no more is lost than all."""
    rng = np.random.default_rng(1)
    for _ in range(12):
        steps = int(rng.integers(60, 200))
        times = np.unique([*rng.integers(1, steps, rng.integers(2, 20)), steps])
        x = walk(rng, steps, process) * np.float32(scale)
        kept, made = [], []
        for kind in [any_kind(rng, steps) for _ in range(rng.integers(1, 4))]:
            kept += [_clock.Placed(kind, int(t)) for t in times]
            made += kept_in_float32(kind, x, times)
        lost = [_integrity.underflow([jnp.asarray(a)], [jnp.float16])[0] for a in made]
        target = any_kind(rng, steps)
        rounding = 2.0**-11 + 2.0**-23 + np.array(lost)
        found = _clock.combination(
            kept, _clock.Placed(target, steps), rounding=rounding
        )
        true = _clock.weights_on_iterates(target, steps)[1:] @ np.float64(x)
        stored = np.stack([np.float64(np.float16(average)) for average in made])
        error = np.linalg.norm(found.weights @ stored - true)
        assert error <= 2 * found.residual * np.linalg.norm(true)
        assert max(lost) <= 1.000001


def test_underflow_by_hand():
    leaves = [jnp.array([3.0, 4e-8]), jnp.zeros(2), jnp.array([1e-9])]
    dtypes = [jnp.float16, jnp.float16, jnp.float16]
    whole, shares = _integrity.underflow(leaves, dtypes)
    np.testing.assert_allclose(shares, [2.0**-24.5 / 3, 0, 1], rtol=1e-5)
    np.testing.assert_allclose(whole, 2.0**-24.5 / 3, rtol=2e-3)
    assert _integrity.underflow(leaves, [jnp.bfloat16] * 3)[0] == 0


def test_rounding_keeps_the_weights_small():
    times, widths = problem(12, (0.10, 0.15, 0.20))
    exact = posthoc.coefficients(times, widths, 1.0, 0.05)
    rounded = posthoc.coefficients(times, widths, 1.0, 0.05, rounding=2.0**-9)
    assert np.abs(exact.weights).sum() > 100
    assert np.abs(rounded.weights).sum() < 30
    assert exact.rounding == 0
    assert rounded.rounding >= 2.0**-9 * np.linalg.norm(rounded.weights)
    assert exact.residual < rounded.residual
    # What the exact weights would cost is more.
    assert 2.0**-9 * np.linalg.norm(exact.weights) > rounded.residual


def test_memory_of_many_snapshots():
    """Never a matrix of snapshots times iterates, which would be 160 MB."""
    kinds = [_clock.Power(weights.gamma_from_sigma_rel(s)) for s in (0.05, 0.10)]
    times = np.linspace(1000, 100_000, 100).astype(int)
    kept = [_clock.Placed(kind, int(t)) for t in times for kind in kinds]
    tracemalloc.start()
    found = _clock.combination(kept, _clock.Placed(_clock.Power(1.0), 100_000))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 25e6
    assert found.residual < 5e-3


def test_snapshots_that_agree_share_their_weight():
    found = posthoc.coefficients([1, 1], [0.1, 0.1], 1.0, 0.1)
    np.testing.assert_allclose(found.weights, [0.5, 0.5], atol=1e-9)
    assert found.condition > 1e12


def with_and_without_eigenvalues(monkeypatch, *args, **options):
    found = posthoc.coefficients(*args, **options)
    with monkeypatch.context() as few:
        few.setattr(_profiles, "MANY", len(args[0]))
        return found, posthoc.coefficients(*args, **options)


@pytest.mark.parametrize("rounding", [0.0, 2.0**-24, 2.0**-9])
@pytest.mark.parametrize("normalize", ["none", "sum", "constrained"])
@pytest.mark.parametrize("target", [0.06, 0.08, 0.10])
def test_many_snapshots_are_combined_as_well(monkeypatch, target, normalize, rounding):
    times, widths = problem(140)
    many, few = with_and_without_eigenvalues(
        monkeypatch, times, widths, 1.0, target, normalize=normalize, rounding=rounding
    )
    np.testing.assert_allclose(many.weights, few.weights, atol=1e-9)
    np.testing.assert_allclose(many.residual, few.residual, rtol=1e-6, atol=1e-7)
    # Norms of a matrix differ by its root of rows, so condition numbers by the rows.
    assert few.condition / len(times) <= many.condition <= few.condition * len(times)


@pytest.mark.parametrize("rounding", [0.0, 2.0**-24, 2.0**-9])
@pytest.mark.parametrize(
    ("repeats", "widths"), [(3, (0.05, 0.10)), (1, (0.1, 0.12, 0.2))]
)
def test_many_snapshots_that_hardly_differ(monkeypatch, repeats, widths, rounding):
    times, widths = problem(120, widths)
    times, widths = np.tile(times, repeats), np.tile(widths, repeats)
    many, few = with_and_without_eigenvalues(
        monkeypatch, times, widths, 1.0, 0.07, rounding=rounding
    )
    assert many.residual <= 1.01 * few.residual + 1e-7
    assert np.abs(many.weights).sum() <= 2 * np.abs(few.weights).sum() + 2
    assert many.weights.sum() == pytest.approx(1, abs=1e-6)


def test_one_of_many_snapshots_is_found():
    times, widths = problem(200)
    found = posthoc.coefficients(times, widths, 0.8, 0.10)
    (at,) = np.flatnonzero((times == 0.8) & (widths == 0.10))
    assert found.weights[at] == pytest.approx(1, abs=1e-8)
    assert found.residual < 1e-6


def test_what_else_would_do():
    times, widths = problem(8)
    low, high = _profiles.widths_within(times, widths, 1.0, 0.05)
    for width, good in ((low, True), (high, True), (low / 2, False), (0.28, False)):
        residual = posthoc.coefficients(times, widths, 1.0, width).residual
        assert (residual <= 0.05) == good
    count = _profiles.snapshots_within([0.05, 0.10], 0.02, 0.05)
    assert posthoc.coefficients(*problem(count), 1.0, 0.02).residual <= 0.05
    assert posthoc.coefficients(*problem(count // 2), 1.0, 0.02).residual > 0.05
    assert _profiles.snapshots_within([0.05], 0.28, 1e-6, most=16) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: posthoc.coefficients([1, 2], [0.1], 2, 0.1), "vectors of one length"),
        (lambda: posthoc.coefficients([], [], 2, 0.1), "vectors of one length"),
        (lambda: posthoc.coefficients([0], [0.1], 2, 0.1), "must be positive"),
        (lambda: posthoc.coefficients([1], [0.1], 0, 0.1), "must be positive"),
        (lambda: posthoc.coefficients([1], [0.4], 1, 0.1), "sigma_rel must lie in"),
        (lambda: posthoc.coefficients([1], [0.1], 1, 0.1, normalize="x"), "normalize"),
        (
            lambda: posthoc.coefficients_of_profiles(
                [], weights.profile(lambda t: 1, 3)
            ),
            "at least one profile",
        ),
        (lambda: posthoc.swad_window([]), "losses must be a vector"),
        (lambda: posthoc.swad_window([1.0], n_converge=0), "n_converge"),
        (lambda: posthoc.swad_window([1.0], ratio=0.5), "ratio must lie in"),
        (lambda: weights.sequence(weights.uniform(), 0), "steps must be an integer"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def swad_by_the_paper(loss, n_s, n_e, r):
    """Algorithm 2 as it stands, with both ends included."""
    start, end, limit = None, len(loss) - 1, 0.0
    for i in range(n_s - 1, len(loss)):
        if start is None:
            recent = loss[i - n_s + 1 : i + 1]
            if recent[0] == min(recent):
                start, limit = i - n_s + 1, r / n_s * sum(recent)
        elif i - n_e + 1 >= 0 and limit < min(loss[i - n_e + 1 : i + 1]):
            end = i - n_e
            break
    return None if start is None else range(start, end + 1)


@hypothesis.given(
    st.lists(st.integers(1, 9), min_size=1, max_size=30),
    st.integers(1, 4),
    st.integers(1, 4),
)
@hypothesis.settings(max_examples=200)
def test_swad_equals_the_paper(losses, n_s, n_e):
    found = posthoc.swad_window(losses, n_s, n_e, 1.3)
    wanted = swad_by_the_paper(losses, n_s, n_e, 1.3)
    if wanted is None:
        wanted = range(int(np.argmin(losses)), int(np.argmin(losses)) + 1)
    assert found == wanted


def test_swad_starts_at_no_loss_that_is_not_finite():
    assert posthoc.swad_window([np.nan, np.inf, 2.0, 1.0, 1.0, 1.0], 2) == range(3, 6)


def test_conversions_are_those_of_weights():
    assert oa.posthoc.gamma_from_sigma_rel is weights.gamma_from_sigma_rel
    assert oa.posthoc.sigma_rel_from_gamma is weights.sigma_rel_from_gamma
