"""Schedules against float64 references, hand-derived values and published facts."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_avg import schedules
from optax_avg.averages import links as averaging

from_norms = schedules.from_gradient_norms

N = 160  # one shape of counts, so that every operation is compiled once
COUNTS = np.arange(N)
INT32_MAX = 2**31 - 1
TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}

rates = st.floats(0.0, 10.0)
short = st.integers(0, 50)


def values(schedule):
    return np.asarray(schedule(COUNTS), np.float64)


# References, in float64, one count at a time.


def swa_cyclic_reference(alpha_1, alpha_2, c, start, count):
    i = count + 1 - start
    if i < 1:
        return alpha_1
    t = ((i - 1) % c + 1) / c
    return (1 - t) * alpha_1 + t * alpha_2


def swa_authors_reference(init, swa, start, count):
    """Constant to 50% of the time before averaging, linear to 90%, constant."""
    corners = np.array([0, 0.5, 0.9, 1]) * start
    return float(np.interp(count, corners, [init, init, swa, swa]))


def swalr_reference(init, swa, start, steps, shape, count):
    """What torch's ``SWALR`` says after ``count - start`` calls of its ``step``."""
    k = count - start
    if k < 0:
        return init
    x = min(1.0, k / steps) if steps else 1.0
    f = x if shape == "linear" else math.sin(math.pi * x / 2) ** 2
    return init + f * (swa - init)


def wsd_reference(peak, W, S, D, init, end, cooldown, count):
    if count < W:
        return init + (peak - init) * count / W
    if count <= W + S or D == 0:
        return peak
    if count >= W + S + D:
        return end
    left = (W + S + D - count) / D
    f = left if cooldown == "linear" else 1 - math.sqrt(1 - left)
    return end + f * (peak - end)


def horizon_free_reference(peak, alpha, power, W, count):
    if count < W:
        return peak * count / W
    return peak * (alpha / (count - W + alpha)) ** power


def linear_reference(peak, T, W, count):
    s = count + 1
    if s >= T:
        return 0.0
    return peak * s / W if s < W else peak * (T - s) / (T - W)


def smooth_reference(norms, smoothing):
    T = len(norms)
    half = math.floor(smoothing * T) // 2
    smoothed = []
    for t in range(T):
        near = [max(i, 0) for i in range(t - half, t + half + 1)]
        near = [i if i < T else 2 * (T - 1) - i for i in near]
        smoothed.append(np.median([norms[i] for i in near]))
    return np.array(smoothed)


def refined_reference(norms, power, smoothing):
    G = smooth_reference(norms, smoothing)
    eta = [
        G[t] ** -power * math.fsum(G[p] ** -power for p in range(t + 1, len(G)))
        for t in range(len(G))
    ]
    return np.array(eta) / max(eta)


class TestSwaCyclic:
    @hypothesis.given(rates, rates, st.integers(1, 40), short)
    def test_reference(self, a, b, cycle, start):
        high, low = max(a, b), min(a, b)
        got = values(schedules.swa_cyclic(high, low, cycle, start))
        want = [swa_cyclic_reference(high, low, cycle, start, n) for n in COUNTS]
        np.testing.assert_allclose(got, want, **TOLERANCE)

    def test_by_hand(self):
        rate = schedules.swa_cyclic(5.0, 1.0, cycle=4)
        np.testing.assert_allclose(values(rate)[:9], [4, 3, 2, 1, 4, 3, 2, 1, 4])

    def test_cycle_of_one_is_the_low_constant_rate(self):
        rate = schedules.swa_cyclic(0.5, 0.125, cycle=1, start=3)
        assert values(rate)[:5].tolist() == [0.5, 0.5, 0.5, 0.125, 0.125]

    def test_mean_over_a_cycle(self):
        c, high, low = 20, 0.05, 0.01
        mean = values(schedules.swa_cyclic(high, low, c))[:c].mean()
        np.testing.assert_allclose(mean, ((c - 1) * high + (c + 1) * low) / (2 * c))

    @pytest.mark.parametrize(("cycle", "start"), [(1, 0), (3, 0), (4, 5), (5, 7)])
    def test_swa_absorbs_at_the_lowest_rate(self, cycle, start):
        rate = schedules.swa_cyclic(1.0, 0.25, cycle, start)
        tx = optax.chain(optax.sgd(rate), averaging.swa(start=start, every=cycle))

        def step(carry, _):
            x, state = carry
            before = state[-1].absorbed
            updates, state = tx.update(jnp.float32(-1.0), state, x)
            # The gradient is -1, so the update is the rate itself.
            out = updates, state[-1].absorbed > before
            return (optax.apply_updates(x, updates), state), out

        x = jnp.float32(0.0)
        (_, state), (seen, absorbed) = jax.lax.scan(step, (x, tx.init(x)), length=30)
        lowest = np.asarray(seen) == 0.25
        assert np.asarray(absorbed).tolist() == lowest.tolist()
        assert int(state[-1].absorbed) == (30 - start) // cycle
        # One step early or late, and they no longer meet.
        assert (np.roll(lowest, 1) != np.asarray(absorbed)).any() == (cycle > 1)

    def test_before(self):
        warm = optax.linear_schedule(0.0, 1.0, 4)
        rate = schedules.swa_cyclic(0.5, 0.25, 2, start=4, before=warm)
        want = [0.0, 0.25, 0.5, 0.75, 0.375, 0.25, 0.375]
        assert values(rate)[:7].tolist() == want
        rate = schedules.swa_cyclic(0.5, 0.25, 2, start=2, before=2.0)
        assert values(rate)[:4].tolist() == [2.0, 2.0, 0.375, 0.25]

    def test_swapped_rates(self):
        with pytest.raises(ValueError, match="swap them"):
            schedules.swa_cyclic(0.01, 0.05, 10)
        schedules.swa_cyclic(0.05, 0.05, 10)


class TestSwaConstant:
    @hypothesis.given(rates, rates, st.integers(0, 140))
    def test_authors_reference(self, init, swa, start):
        got = values(schedules.swa_constant(init, swa, start))
        if start == 0:
            want = np.full(N, swa)
        else:
            want = [swa_authors_reference(init, swa, start, n) for n in COUNTS]
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-5)

    @hypothesis.given(rates, rates, short, short, st.sampled_from(["linear", "cosine"]))
    def test_swalr_reference(self, init, swa, start, steps, shape):
        got = values(schedules.swa_constant(init, swa, start, steps, anneal=shape))
        want = [swalr_reference(init, swa, start, steps, shape, n) for n in COUNTS]
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=5e-6)

    def test_vgg_recipe_of_the_authors(self):
        # VGG16 on CIFAR-100: 0.05 for half of 161 epochs, 0.01 from 90% on.
        got = values(schedules.swa_constant(0.05, 0.01, start=161))
        np.testing.assert_allclose(got[:81], 0.05, rtol=1e-6)
        np.testing.assert_allclose(got[145:], 0.01, rtol=1e-6)
        assert (np.diff(got[80:146]) < 0).all()
        slope = -0.04 / (0.4 * 161)
        np.testing.assert_allclose(np.diff(got[81:144]), slope, rtol=1e-3)

    def test_annealed_before_averaging_starts_or_after(self):
        before = values(schedules.swa_constant(1.0, 0.5, 100))
        after = values(schedules.swa_constant(1.0, 0.5, 100, 10))
        assert before[90] == before[100] == 0.5
        assert after[100] == 1.0
        assert after[110] == 0.5
        assert after[101] == pytest.approx(0.95)

    def test_shapes(self):
        cosine = values(schedules.swa_constant(1.0, 0.0, 0, 6, anneal="cosine"))
        want = [1.0, (2 + math.sqrt(3)) / 4, 0.75, 0.5, 0.25]
        np.testing.assert_allclose(cosine[:5], want, atol=1e-6)
        jump = values(schedules.swa_constant(1.0, 0.25, 2, 0))
        assert jump[:4].tolist() == [1.0, 1.0, 0.25, 0.25]


class TestWarmupStableDecay:
    @hypothesis.given(
        rates, rates, rates, short, short, short, st.sampled_from(["linear", "1-sqrt"])
    )
    def test_reference(self, peak, init, end, W, S, D, cooldown):
        got = values(
            schedules.warmup_stable_decay(
                peak, W, S, D, init_value=init, end_value=end, cooldown=cooldown
            )
        )
        want = [wsd_reference(peak, W, S, D, init, end, cooldown, n) for n in COUNTS]
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=5e-6)

    def test_by_hand(self):
        rate = schedules.warmup_stable_decay(1.0, 4, 2, 4)
        want = [0, 0.25, 0.5, 0.75, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
        assert values(rate)[:12].tolist() == want
        rate = schedules.warmup_stable_decay(2.0, 0, 3, 16, cooldown="1-sqrt")
        got = values(rate)[[0, 3, 4, 7, 12, 19]]
        assert got.tolist() == [2.0, 2.0, 1.5, 1.0, 0.5, 0.0]

    @hypothesis.given(short, short, st.integers(1, 50))
    def test_monotone_and_bounded(self, W, S, D):
        for cooldown in ("linear", "1-sqrt"):
            got = values(
                schedules.warmup_stable_decay(
                    3.0, W, S, D, init_value=1.0, end_value=0.5, cooldown=cooldown
                )
            )
            assert got.min() >= 0.5 - 1e-6
            assert got.max() <= 3.0 + 1e-6
            assert (np.diff(got[: W + 1]) > 0).all()
            assert (got[W : W + S + 1] == 3.0).all()
            assert (np.diff(got[W + S : W + S + D + 1]) < 0).all()
            assert (got[W + S + D :] == 0.5).all()

    def test_sqrt_lies_below_linear(self):
        linear, sqrt = (
            values(schedules.warmup_stable_decay(1.0, 5, 5, 40, cooldown=c))
            for c in ("linear", "1-sqrt")
        )
        assert (sqrt[:11] == linear[:11]).all()
        assert (sqrt[11:50] < linear[11:50]).all()

    def test_continuous_at_the_joints(self):
        # Linear phases: no step is larger than the steeper of the two slopes.
        got = values(schedules.warmup_stable_decay(1.0, 20, 30, 50))
        assert np.abs(np.diff(got)).max() <= 1 / 20 + 1e-6
        assert np.abs(np.diff(got[20:])).max() <= 1 / 50 + 1e-6

    def test_no_cooldown_stays_at_the_peak(self):
        rate = schedules.warmup_stable_decay(0.5, 2, 3, 0)
        assert values(rate)[-1] == 0.5


class TestLinearToZero:
    @hypothesis.given(rates, st.integers(1, 120), st.integers(0, 119))
    def test_reference(self, peak, T, W):
        W = min(W, T - 1)
        got = values(schedules.linear_to_zero(peak, T, W))
        want = [linear_reference(peak, T, W, n) for n in COUNTS]
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=5e-6)

    def test_by_hand(self):
        got = values(schedules.linear_to_zero(2.0, 8))
        want = [1.75, 1.5, 1.25, 1, 0.75, 0.5, 0.25, 0, 0]
        assert got[:9].tolist() == want
        assert values(schedules.linear_to_zero(1.0, 1))[:2].tolist() == [0.0, 0.0]

    def test_one_step_ahead_of_optax(self):
        ours = values(schedules.linear_to_zero(1.0, 64))
        theirs = np.asarray(optax.linear_schedule(1.0, 0.0, 64)(COUNTS))
        assert ours[:-1].tolist() == theirs[1:].tolist()

    def test_step_t_minus_one_is_the_last_to_move(self):
        got = values(schedules.linear_to_zero(1.0, 50, 10))
        assert got[9] == got.max() == 1.0
        assert got[48] == pytest.approx(1 / 40)
        assert got[49] == 0.0


class TestHorizonFree:
    @hypothesis.given(rates, st.floats(0.5, 1e4), st.floats(0.0, 2.0), short)
    def test_reference(self, peak, alpha, power, W):
        rate = schedules.horizon_free(peak, alpha, power=power, warmup_steps=W)
        want = [horizon_free_reference(peak, alpha, power, W, n) for n in COUNTS]
        np.testing.assert_allclose(values(rate), want, **TOLERANCE)

    def test_it_falls_as_the_square_root_for_ever(self):
        rate = schedules.horizon_free(1.0, 100.0)
        far = np.asarray(rate(np.array([10**6, 4 * 10**6, INT32_MAX])), float)
        assert far[0] == pytest.approx(1e-2, rel=1e-3)
        assert far[0] / far[1] == pytest.approx(2, rel=1e-3)
        assert far[2] == pytest.approx((100 / 2**31) ** 0.5, rel=1e-3)


def test_horizon_free_by_hand():
    got = values(schedules.horizon_free(2.0, 3, warmup_steps=2))
    np.testing.assert_allclose(got[[0, 1, 2, 11, 26]], [0, 1, 2, 1, 2 / 3], 1e-6)
    assert (values(schedules.horizon_free(0.5, 7, power=0)) == 0.5).all()


norm_lists = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=60)


class TestRefined:
    @hypothesis.given(norm_lists, st.sampled_from([0.5, 1, 2]), st.floats(0, 1))
    def test_reference(self, norms, power, smoothing):
        rate = from_norms(norms, 1.0, power=power, smoothing=smoothing)
        got = values(rate)
        want = refined_reference(norms, power, smoothing)
        np.testing.assert_allclose(got[: len(norms)], want, rtol=1e-6, atol=1e-30)
        assert (got[len(norms) :] == 0).all()

    def test_by_hand(self):
        # w = 1/4, 1, 1/4, 1; tails 9/4, 5/4, 1, 0; eta = 9/16, 20/16, 4/16, 0.
        rate = from_norms([2.0, 1.0, 2.0, 1.0], 20.0, smoothing=0)
        np.testing.assert_allclose(values(rate)[:5], [9, 20, 4, 0, 0], rtol=1e-6)
        # w = 1/2, 1, 1/2, 1; tails 5/2, 3/2, 1, 0; eta = 5/4, 6/4, 2/4, 0.
        rate = from_norms([2.0, 1.0, 2.0, 1.0], 6.0, power=1, smoothing=0)
        np.testing.assert_allclose(values(rate)[:4], [5, 6, 2, 0], rtol=1e-6)

    @pytest.mark.parametrize("power", [1, 2])
    @pytest.mark.parametrize("T", [2, 3, 10, 101])
    def test_constant_norms_give_linear_decay(self, power, T):
        got = values(from_norms(np.full(T, 0.3), 1.0, power=power))[:T]
        linear = values(schedules.linear_to_zero(1.0, T))[:T]
        np.testing.assert_allclose(got, linear / linear[0], rtol=1e-6)

    def test_power_and_order_matter(self):
        norms = np.geomspace(5.0, 0.5, 40)
        sgd, adam, backwards = (
            values(from_norms(g, 1.0, power=p))[:40]
            for g, p in ((norms, 2), (norms, 1), (norms[::-1], 2))
        )
        want = refined_reference(norms, 2, 0.1)
        np.testing.assert_allclose(sgd, want, rtol=1e-6)
        for wrong in (adam, backwards):
            assert np.abs(wrong - want).max() > 0.1

    def test_large_early_norms_give_warmup_and_falling_norms_a_late_decay(self):
        early = np.where(COUNTS < 40, 10.0 - COUNTS / 5, 2.0)
        got = values(from_norms(early, 1.0))
        assert (np.diff(got[8:32]) > 0).all()
        assert 30 < got.argmax() < 60
        late = np.where(COUNTS < 120, 2.0, 2.0 - (COUNTS - 119) / 25)
        linear = 1 - COUNTS / (N - 1)
        got = values(from_norms(late, 1.0))
        assert (got[1:158] > got[0] * linear[1:158]).all()
        assert got.argmax() > 120

    @hypothesis.given(norm_lists, st.floats(0, 1))
    def test_bounded_and_ends_at_zero(self, norms, smoothing):
        got = values(from_norms(norms, 3.0, smoothing=smoothing))
        assert got.min() >= 0
        assert got.max() == 3.0
        assert got[len(norms) - 1] == 0

    @hypothesis.given(norm_lists, st.floats(1e-6, 1e6))
    def test_units_of_the_norms_do_not_matter(self, norms, scale):
        one = values(from_norms(norms, 1.0))
        other = values(from_norms(scale * np.asarray(norms), 1.0))
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-30)

    @hypothesis.given(norm_lists, st.floats(0, 1))
    def test_power_moves_through_the_filter(self, norms, smoothing):
        # An odd median commutes with monotone maps, so G^2 at power 1 is G at power 2.
        one = from_norms(norms, 1.0, power=2, smoothing=smoothing)
        other = from_norms(np.square(norms), 1.0, power=1, smoothing=smoothing)
        np.testing.assert_allclose(values(one), values(other), rtol=1e-6, atol=1e-30)

    def test_sum_of_the_rates(self):
        # sum_t w_t sum_(p > t) w_p = ((sum w)^2 - sum w^2) / 2.
        norms = np.linspace(1.0, 2.0, 50)
        w = norms**-2
        got = values(from_norms(norms, 1.0, smoothing=0))
        want = (w.sum() ** 2 - (w**2).sum()) / 2 / (w[0] * w[1:].sum())
        np.testing.assert_allclose(got.sum() / got[0], want, rtol=1e-6)

    def test_filter_removes_a_spike_and_keeps_a_step(self):
        spike = np.ones(50)
        spike[20] = 1e4
        smooth = values(from_norms(spike, 1.0, smoothing=0.1))[:50]
        np.testing.assert_allclose(smooth, 1 - np.arange(50) / 49, rtol=1e-6)
        assert values(from_norms(spike, 1.0, smoothing=0))[20] < 1e-7
        step = np.where(np.arange(50) < 25, 3.0, 1.0)
        filtered, raw = (values(from_norms(step, 1.0, smoothing=s)) for s in (0.1, 0))
        np.testing.assert_allclose(filtered, raw, rtol=1e-6)

    def test_padding(self):
        # Width 3. Left: median(1, 1, 9). Right: median(9, 4, 9), mirrored about the 4.
        norms = [1.0, 9.0, 3.0, 5.0, 2.0, 8.0, 9.0, 4.0]
        smoothed = [1.0, 3.0, 5.0, 3.0, 5.0, 8.0, 8.0, 9.0]
        got = from_norms(norms, 1.0, smoothing=0.3)
        want = from_norms(smoothed, 1.0, smoothing=0)
        assert values(got).tolist() == values(want).tolist()

    def test_other_number_of_steps(self):
        norms = np.geomspace(1.0, 3.0, 21)
        coarse = values(from_norms(norms, 1.0))[:21]
        fine = values(from_norms(norms, 1.0, steps=101))
        np.testing.assert_allclose(fine[:101:5], coarse, rtol=1e-6)
        middle = (coarse[0] * 3 + coarse[1] * 2) / 5
        assert fine[2] == pytest.approx(middle, rel=1e-6)
        assert fine[101] == 0
        two = values(from_norms(norms, 1.0, steps=2))
        assert two[:3].tolist() == [coarse[0], 0.0, 0.0]

    def test_warmup(self):
        plain = values(from_norms(np.ones(40), 2.0))
        warm = values(from_norms(np.ones(40), 2.0, warmup_steps=8))
        ramp = np.minimum((COUNTS + 1) / 8, 1)
        np.testing.assert_allclose(warm, ramp * plain, rtol=1e-6)

    def test_extreme_norms(self):
        for norms in ([1e-200, 1e-200, 1e-200], [1e200, 1.0, 1e-200]):
            got = values(from_norms(norms, 1.0, smoothing=0))
            assert np.isfinite(got).all()
            assert got.max() == 1.0

    def test_reads_jax_arrays_of_low_precision(self):
        norms = jnp.array([4.0, 2.0, 1.0, 1.0], jnp.bfloat16)
        got = values(from_norms(norms, 1.0, smoothing=0))
        want = refined_reference([4.0, 2.0, 1.0, 1.0], 2, 0)
        np.testing.assert_allclose(got[:4], want, rtol=1e-6)

    @pytest.mark.parametrize(
        ("norms", "message"),
        [
            ([], "vector of two or more"),
            ([1.0], "vector of two or more"),
            (2.0, "vector of two or more"),
            (np.ones((3, 2)), r"shape \(3, 2\)"),
            ([1.0, math.nan, 1.0], r"grad_norms\[1\] = nan"),
            ([1.0, 1.0, 0.0], r"grad_norms\[2\] = 0"),
            ([-1.0, 1.0, -2.0], r"2 of 3 .* grad_norms\[0\] = -1"),
            ([1.0, math.inf], r"grad_norms\[1\] = inf"),
        ],
    )
    def test_bad_norms(self, norms, message):
        with pytest.raises(ValueError, match=message):
            from_norms(norms, 1.0)


EXAMPLES = {
    "swa_cyclic": lambda v: schedules.swa_cyclic(v, 0.01, 7, 20),
    "swa_constant": lambda v: schedules.swa_constant(v, 0.01, 99),
    "swa_constant_cosine": lambda v: schedules.swa_constant(
        v, 0.01, 20, 30, anneal="cosine"
    ),
    "wsd": lambda v: schedules.warmup_stable_decay(v, 10, 20, 30),
    "wsd_sqrt": lambda v: schedules.warmup_stable_decay(
        v, 10, 20, 30, cooldown="1-sqrt", end_value=0.01
    ),
    "horizon_free": lambda v: schedules.horizon_free(v, 20, warmup_steps=9),
    "linear_to_zero": lambda v: schedules.linear_to_zero(v, 90, 9),
    "from_gradient_norms": lambda v: from_norms(np.linspace(1, 3, 70), v, steps=90),
    "follow_learning_rate": lambda v: schedules.follow_learning_rate(
        optax.linear_schedule(1.0, 0.1, 60), v, 1.0, rho_min=0.02, lr_min=0.1
    ),
}


def test_radius_follows_the_learning_rate_and_stops_at_zero():
    """By hand: 0.1 + 0.3 (lr - 0.2)/0.6, and 0 where that is negative, in warm-up."""
    lr = lambda count: jnp.asarray([0.0, 0.1, 0.2, 0.8])[count]
    rho = schedules.follow_learning_rate(lr, 0.4, 0.8, rho_min=0.1, lr_min=0.2)
    found = [float(rho(count)) for count in range(4)]
    np.testing.assert_allclose(found, [0.0, 0.05, 0.1, 0.4], rtol=1e-6, atol=1e-7)
    steep = schedules.follow_learning_rate(lr, 0.4, 0.8, rho_min=0.0, lr_min=0.2)
    assert float(steep(0)) == 0.0


@pytest.mark.parametrize("name", EXAMPLES)
class TestAsOptaxSchedules:
    def test_scalar_array_jit_and_vmap_agree(self, name):
        rate = EXAMPLES[name](0.5)
        want = values(rate)
        assert want.max() > want.min()
        np.testing.assert_allclose(jax.jit(rate)(COUNTS), want, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(jax.vmap(rate)(COUNTS), want, rtol=1e-6, atol=1e-8)
        for n in (0, 1, 21, 57, N - 1):
            np.testing.assert_allclose(rate(n), want[n], rtol=1e-6, atol=1e-8)
            traced = jax.jit(rate)(jnp.int32(n))
            np.testing.assert_allclose(traced, want[n], rtol=1e-6, atol=1e-8)

    def test_float32_in_the_shape_of_the_counts(self, name):
        rate = EXAMPLES[name](0.5)
        for count in (3, np.int64(3), jnp.int32(3), jnp.arange(6).reshape(2, 3)):
            got = jnp.asarray(rate(count))
            assert got.dtype == jnp.float32
            assert got.shape == jnp.shape(count)

    def test_float32_with_64_bit_types_on(self, name):
        want = values(EXAMPLES[name](0.5))
        jax.config.update("jax_enable_x64", True)
        try:
            rate = EXAMPLES[name](0.5)
            assert rate(COUNTS).dtype == rate(3).dtype == jnp.float32
            np.testing.assert_allclose(values(rate), want, rtol=2e-6, atol=1e-7)
        finally:
            jax.config.update("jax_enable_x64", False)

    def test_past_the_end(self, name):
        rate = EXAMPLES[name](0.5)
        far = np.asarray(rate(np.array([10**6, INT32_MAX - 1, INT32_MAX])))
        assert np.isfinite(far).all()
        if name == "swa_cyclic":
            assert ((far >= 0.01) & (far <= 0.5)).all()
        elif name == "horizon_free":
            assert (np.diff(far) <= 0).all()
            assert (far > 0).all()
        else:
            np.testing.assert_array_equal(far, np.asarray(rate(N - 1)))

    def test_traced_rates(self, name):
        peaks = jnp.array([0.25, 0.5, 1.0])
        got = jax.jit(jax.vmap(lambda v: EXAMPLES[name](v)(COUNTS)))(peaks)
        for row, peak in zip(got, (0.25, 0.5, 1.0), strict=True):
            want = values(EXAMPLES[name](peak))
            np.testing.assert_allclose(row, want, rtol=1e-5, atol=1e-7)

    def test_bfloat16_rates_are_computed_in_float32(self, name):
        low, full = EXAMPLES[name](jnp.bfloat16(0.5)), EXAMPLES[name](0.5)
        np.testing.assert_allclose(values(low), values(full), rtol=1e-6, atol=1e-8)

    def test_drives_an_optimizer(self, name):
        rate = EXAMPLES[name](0.5)
        tx = optax.sgd(rate)

        def step(state, _):
            updates, state = tx.update(jnp.float32(-1.0), state)
            return state, updates

        _, seen = jax.lax.scan(step, tx.init(jnp.float32(0.0)), length=N)
        np.testing.assert_allclose(seen, values(rate), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("make", "end"),
    [
        (lambda n: schedules.swa_cyclic(0.5, 0.01, n, start=1), 0.01),
        (lambda n: schedules.swa_constant(0.5, 0.01, 0, n), 0.01),
        (lambda n: schedules.swa_constant(0.5, 0.01, 0, n, anneal="cosine"), 0.01),
        (lambda n: schedules.warmup_stable_decay(0.5, 0, 0, n), 0.0),
        (
            lambda n: schedules.warmup_stable_decay(
                0.5, 0, 0, n, end_value=0.01, cooldown="1-sqrt"
            ),
            0.01,
        ),
        (lambda n: schedules.linear_to_zero(0.5, n + 1), 0.0),
        (lambda n: from_norms(np.ones(n + 1), 0.5), 0.0),
    ],
)
def test_ends_are_exact_under_jit(make, end):
    # n * (1/n), into which XLA turns n / n, misses 1 in float32 for these n.
    for n in (41, 47, 55, 61):
        last = jax.jit(make(n))(np.int32(n))
        assert last == jnp.float32(end)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.swa_cyclic(-1.0, 0.0, 5), "alpha_1"),
        (lambda: schedules.swa_cyclic(1.0, math.nan, 5), "alpha_2"),
        (lambda: schedules.swa_cyclic(1.0, 0.1, 0), "cycle must be an integer >= 1"),
        (lambda: schedules.swa_cyclic(1.0, 0.1, 2.5), "cycle must be an integer"),
        (lambda: schedules.swa_cyclic(1.0, 0.1, 5, -1), "start"),
        (lambda: schedules.swa_cyclic(1.0, 0.1, 5, 5, before=-1.0), "before"),
        (lambda: schedules.swa_constant("1", 0.1, 5), "init_value must be a number"),
        (lambda: schedules.swa_constant(1.0, math.inf, 5), "swa_value"),
        (lambda: schedules.swa_constant(1.0, 0.1, True), "start"),
        (lambda: schedules.swa_constant(1.0, 0.1, 5, -1), "anneal_steps"),
        (lambda: schedules.swa_constant(1.0, 0.1, 5, anneal="cos"), "'cosine'"),
        (lambda: schedules.warmup_stable_decay(-1.0, 1, 1, 1), "peak_value"),
        (lambda: schedules.warmup_stable_decay(1.0, -1, 1, 1), "warmup_steps"),
        (lambda: schedules.warmup_stable_decay(1.0, 1, -1, 1), "stable_steps"),
        (lambda: schedules.warmup_stable_decay(1.0, 1, 1, -1), "decay_steps"),
        (
            lambda: schedules.warmup_stable_decay(1.0, 1, 1, 1, init_value=-1),
            "init_value",
        ),
        (
            lambda: schedules.warmup_stable_decay(1.0, 1, 1, 1, end_value=-1),
            "end_value",
        ),
        (
            lambda: schedules.warmup_stable_decay(1.0, 1, 1, 1, cooldown="sqrt"),
            "'linear' or '1-sqrt', got 'sqrt'",
        ),
        (lambda: schedules.horizon_free(-1.0, 5), "peak_value"),
        (lambda: schedules.horizon_free(1.0, 0.0), "alpha"),
        (lambda: schedules.horizon_free(1.0, math.inf), "alpha"),
        (lambda: schedules.horizon_free(1.0, 5, power=-0.5), "power"),
        (lambda: schedules.horizon_free(1.0, 5, warmup_steps=0.5), "warmup_steps"),
        (lambda: schedules.linear_to_zero(math.inf, 5), "peak_value"),
        (lambda: schedules.linear_to_zero(1.0, 0), "steps must be an integer >= 1"),
        (lambda: schedules.linear_to_zero(1.0, 5, 5), "pass steps > 5"),
        (lambda: from_norms([1, 2], -1.0), "peak_value"),
        (lambda: from_norms([1, 2], 1.0, power=0), "power"),
        (lambda: from_norms([1, 2], 1.0, power=math.inf), "power"),
        (
            lambda: from_norms([1, 2], 1.0, smoothing=1.5),
            "smoothing",
        ),
        (
            lambda: from_norms([1, 2], 1.0, smoothing=-0.1),
            "smoothing",
        ),
        (lambda: from_norms([1, 2], 1.0, steps=1), "steps"),
        (
            lambda: from_norms([1, 2], 1.0, warmup_steps=2),
            "warmup_steps = 2",
        ),
        (
            lambda: schedules.follow_learning_rate(lambda t: 1.0, -1.0, 1.0),
            "rho_max",
        ),
        (
            lambda: schedules.follow_learning_rate(lambda t: 1.0, 1.0, 1.0, lr_min=1.0),
            "must be above lr_min",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
