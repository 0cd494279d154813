"""Locations over iterations: closed forms, special cases, radii, bad samples."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_location as ref
from hypothesis import given
from hypothesis import strategies as st

import optax_avg as oa

every_distance = pytest.mark.parametrize("name", ref.NAMES)
MU, Q = 0.75, 0.25


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def distance_of(name, mu=MU, quantile=Q):
    """The distance of the reference's name."""
    arguments = {"huber": (mu,), "huber_elementwise": (mu,), "pinball": (quantile,)}
    return getattr(oa.distances, name)(*arguments.get(name, ()))


def tree_of(x, dtype=np.float32):
    return {
        name: np.asarray(x[part].reshape(ref.SHAPES[name]), dtype)
        for name, part in ref.SLICES.items()
    }


def flat(tree):
    return np.concatenate([np.asarray(tree[name]).ravel() for name in ref.SHAPES])


def run(tx, gradients, dtype=np.float32):
    """Emitted updates, and the last state."""
    state = tx.init(tree_of(gradients[0], dtype))
    update, path = jax.jit(tx.update), []
    for g in gradients:
        out, state = update(tree_of(g, dtype), state)
        path.append(flat(out))
    return np.stack(path), state


def samples(seed, count=12, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=(count, ref.SIZE))


@every_distance
@pytest.mark.parametrize("tau", [0.0625, 0.5, 4.0, 64.0])
def test_tracks_as_its_reference(name, tau, x64):
    gradients = samples(0)
    tx = oa.track_location(distance_of(name), tau)
    found, state = run(tx, gradients, np.float64)
    wanted = ref.track(name, gradients, tau, MU, Q)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(found[-1], flat(state.location))
    assert int(state.accepted) + int(state.clipped) == 12 == int(state.location_step)


@every_distance
@given(seed=st.integers(0, 2**32 - 1), log_tau=st.floats(-3, 3))
def test_steps_minimise_the_proximal_objective(name, seed, log_tau):
    """F is 1/tau strongly convex: F(z) >= F(x) + |z - x|^2/(2 tau) only at its minimum.

    F(m) = D(m - g) + |m - m_t|^2 / (2 tau), with m_t = 0 and delta = g.
    """
    rng, tau = np.random.default_rng(seed), 2.0**log_tau
    g = rng.normal(size=ref.SIZE)
    value = lambda m: ref.distance(name, m - g, MU, Q) + m @ m / (2 * tau)
    x = ref.step(name, g, tau, MU, Q)
    for size in (1e-4, 1e-2, 1.0, 10.0):
        for _ in range(20):
            z = x + size * rng.normal(size=ref.SIZE)
            bound = value(x) + (z - x) @ (z - x) / (2 * tau)
            assert value(z) >= bound - 1e-9 * max(1, abs(bound))


@every_distance
def test_nonexpansive_in_location_and_gradient(name):
    """|step(m, g) - step(m', g')| <= max over both, a proximal step's contraction."""
    rng = np.random.default_rng(0)
    tx = oa.track_location(distance_of(name), 0.5, init="zeros")
    update = jax.jit(lambda m, g: tx.update(g, start._replace(location=m))[0])
    start = tx.init(tree_of(rng.normal(size=ref.SIZE)))
    for _ in range(20):
        m, g, other = rng.normal(size=(3, ref.SIZE))
        at = flat(update(tree_of(m), tree_of(g)))
        by_location = flat(update(tree_of(other), tree_of(g)))
        by_gradient = flat(update(tree_of(m), tree_of(other)))
        assert np.linalg.norm(at - by_location) <= np.linalg.norm(m - other) + 1e-5
        assert np.linalg.norm(at - by_gradient) <= np.linalg.norm(g - other) + 1e-5


@pytest.mark.parametrize("name", ["mean", "l2", "huber", "spectral"])
def test_rotation_equivariant(name):
    """Turning the rows of a matrix turns its location."""
    rng = np.random.default_rng(1)
    rotation = jnp.asarray(np.linalg.qr(rng.normal(size=(4, 4)))[0], jnp.float32)
    tx = oa.track_location(distance_of(name), 0.5)
    plain, turned = tx.init(jnp.zeros((4, 3))), tx.init(jnp.zeros((4, 3)))
    for _ in range(6):
        g = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
        out, plain = tx.update(g, plain)
        out_turned, turned = tx.update(rotation @ g, turned)
        np.testing.assert_allclose(out_turned, rotation @ out, rtol=1e-4, atol=1e-5)


def check_same(ours, theirs, gradients, rtol=1e-5):
    found, _ = run(ours, gradients)
    wanted, _ = run(theirs, gradients)
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99])
def test_squared_l2_is_an_ema(beta):
    tau = np.inf if beta == 0 else (1 - beta) / beta
    check_same(
        oa.track_location(oa.distances.mean(), tau, init="zeros"),
        optax.ema(beta, debias=False),
        samples(2),
    )


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_reset_is_ordinary_clipping(scale):
    gradients = samples(3, scale=scale)
    reset = {"init": "zeros", "reset": True}
    check_same(
        oa.track_location(oa.distances.l2(), 2.0, **reset),
        optax.clip_by_global_norm(2.0),
        gradients,
    )
    check_same(
        oa.track_location(oa.distances.l1(), 0.5, **reset), optax.clip(0.5), gradients
    )
    check_same(
        oa.track_location(oa.distances.l2(), 2.0, scope="leaf", **reset),
        optax.clip_by_block_rms(2.0 / np.sqrt(5)),
        [g * is_vector() for g in gradients],
    )
    assert (
        run(oa.track_location(oa.distances.l2(), 2.0, **reset), gradients)[1].location
        == ()
    )


def is_vector():
    mask = np.zeros(ref.SIZE)
    mask[ref.SLICES["vector"]] = 1
    return mask


@every_distance
def test_a_large_tau_is_the_gradient_itself(name):
    """But for the mean's share and Huber's: at infinity all are plain SGD."""
    gradients = samples(4)
    for tau in (np.inf,) if "huber" in name or name == "mean" else (1e4, np.inf):
        found, state = run(oa.track_location(distance_of(name), tau), gradients)
        np.testing.assert_allclose(found, gradients, rtol=1e-5, atol=1e-6)
        assert int(state.clipped) == 0


@pytest.mark.parametrize("name", ["l2", "l1", "linf", "pinball", "spectral", "mean"])
def test_tau_zero_stays_at_the_first(name):
    gradients = samples(5)
    found, state = run(oa.track_location(distance_of(name), 0.0), gradients)
    first = gradients[0].astype(np.float32)
    np.testing.assert_allclose(found, np.tile(first, (12, 1)), rtol=1e-6)
    assert int(state.accepted) == (12 if name == "mean" else 1)


def test_named_uses():
    gradients = samples(6)
    check_same(oa.vclip(0.5), oa.track_location(oa.distances.l2(), 0.5), gradients)
    check_same(oa.cclip(0.5), oa.track_location(oa.distances.l1(), 0.5), gradients)
    found, _ = run(oa.clipped_ema(0.75, 2.0), gradients)
    m = gradients[0]
    for g, out in zip(gradients[1:], found[1:], strict=True):
        n = np.linalg.norm(g - m)
        m = m + 0.25 * min(1, 2.0 / n) * (g - m)
        np.testing.assert_allclose(out, m, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9])
def test_pinball_finds_a_quantile(q):
    """Of an exponential distribution: -ln(1 - q)."""
    tx = oa.track_location(oa.distances.pinball(q), lambda t: 0.5 / (1 + 0.01 * t))
    sample = jax.random.exponential(jax.random.key(0), (20_000, 64))

    def body(state, g):
        m, state = tx.update(g, state)
        return state, m

    _, path = jax.lax.scan(body, tx.init(sample[0]), sample)
    np.testing.assert_allclose(path[-1].mean(), -np.log(1 - q), rtol=0.05)


def test_from_the_median_to_the_mean():
    """Of an exponential distribution: ln 2 as the clip goes to 0, 1 as it grows."""
    sample = jax.random.exponential(jax.random.key(1), (20_000, 256))

    def location(mu):
        tx = oa.track_location(oa.distances.huber_elementwise(mu), 0.05)

        def body(carry, g):
            total, state = carry
            m, state = tx.update(g, state)
            return (total + m, state), None

        start = jnp.zeros(256), tx.init(sample[0])
        (total, _), _ = jax.lax.scan(body, start, sample)
        return float(total.mean()) / len(sample)

    small, large = location(0.02), location(50.0)
    np.testing.assert_allclose(small, np.log(2), rtol=0.15)
    np.testing.assert_allclose(large, 1.0, rtol=0.02)


@pytest.mark.parametrize("name", ["l2", "l1", "linf", "pinball", "spectral"])
@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_adaptive_radius_follows_the_scale(name, factor):
    """After the scale has changed, the share of clipped samples is the same again."""
    tx = oa.track_location(distance_of(name), oa.adaptive_radius(0.5, 0.2))
    gradients = samples(7, 900)
    gradients[300:] *= factor
    _, before = run(tx, gradients[:300])
    _, middle = run(tx, gradients[:600])
    _, after = run(tx, gradients)
    change = float(after.location_radius[0] / before.location_radius[0])
    np.testing.assert_allclose(np.log(change), np.log(factor), atol=0.8)
    if name in ("l2", "linf"):
        share = (int(after.clipped) - int(middle.clipped)) / 300
        np.testing.assert_allclose(share, 0.5, atol=0.1)


def test_adaptive_radius_by_hand():
    """A scalar: unknown at first, then the first distance, then geometric steps."""
    tx = oa.vclip(oa.adaptive_radius(quantile=0.75, rate=0.5), scope="leaf")
    state, seen = tx.init(jnp.array(0.0)), []
    for g in (1.0, 3.0, 3.5, 9.0):
        m, state = tx.update(jnp.array(g), state)
        seen.append((float(m), float(state.location_radius[0])))
    after_third = 2 * np.exp(-0.5 * 0.25)
    wanted = [
        (1.0, 0.0),
        (3.0, 2.0),  # unknown radius: nothing is cut
        (3.5, after_third),
        (3.5 + after_third, after_third * np.exp(0.5 * 0.75)),
    ]
    np.testing.assert_allclose(seen, wanted, rtol=1e-6)
    assert (int(state.accepted), int(state.clipped)) == (3, 1)


def test_scopes():
    """Norms by leaf and by label; the global one sees all."""
    g = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.0, 0.5]), "c": jnp.array([6.0])}
    zeros = jax.tree.map(jnp.zeros_like, g)

    def out(scope):
        tx = oa.track_location(oa.distances.l2(), 1.0, scope=scope, init="zeros")
        return jax.tree.map(lambda x: x.tolist(), tx.update(g, tx.init(zeros))[0])

    by_leaf = out("leaf")
    np.testing.assert_allclose(by_leaf["a"], [0.6, 0.8], rtol=1e-6)
    assert by_leaf["b"] == [0.0, 0.5]
    assert by_leaf["c"] == [1.0]
    by_label = out({"a": "x", "b": "y", "c": "y"})
    assert by_label["a"] == by_leaf["a"]
    np.testing.assert_allclose(by_label["c"], 6 / np.hypot(0.5, 6), rtol=1e-6)
    everything = np.sqrt(25 + 0.25 + 36)
    np.testing.assert_allclose(out("global")["c"], 6 / everything, rtol=1e-6)


@every_distance
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("adaptive", [False, True])
def test_bad_samples_change_a_counter_alone(name, bad, adaptive):
    if adaptive and name in ("mean", "huber", "huber_elementwise"):
        with pytest.raises(ValueError, match="a step size, not a radius"):
            oa.track_location(distance_of(name), oa.adaptive_radius())
        return
    tau = oa.adaptive_radius() if adaptive else lambda t: 1.0 / (1 + t)
    tx = oa.track_location(distance_of(name), tau)
    good, spoiled = samples(8), [bad * np.ones(ref.SIZE)]
    broken = good[3].copy()
    broken[-1] = bad
    for g in good:
        spoiled += [g, broken]
    found, state = run(tx, spoiled)
    wanted, clean = run(tx, good)
    np.testing.assert_array_equal(found[0], 0)
    np.testing.assert_array_equal(found[1::2], wanted)
    np.testing.assert_array_equal(found[2::2], wanted)
    for key in ("location_step", "accepted", "clipped"):
        assert int(getattr(state, key)) == int(getattr(clean, key))
    assert int(state.rejected) == 13


@pytest.mark.parametrize("name", ["l2", "huber", "spectral", "l1", "linf"])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_scale(name, scale):
    """tau and mu scale with the gradients, so the locations do."""
    gradients = samples(9)
    one, _ = run(oa.track_location(distance_of(name), 0.5), gradients)
    # Huber's tau has no unit, only mu has.
    tau = 0.5 if name == "huber" else 0.5 * scale
    big, _ = run(
        oa.track_location(distance_of(name, MU * scale), tau), gradients * scale
    )
    np.testing.assert_allclose(big / scale, one, rtol=1e-4, atol=1e-5)


def test_fp16_gradients_that_overflow_in_the_norm():
    g = {"a": jnp.full((2,), 300.0, jnp.float16)}
    tx = oa.track_location(oa.distances.l2(), 3.0, init="zeros", reset=True)
    out, _ = tx.update(g, tx.init(g))
    assert out["a"].dtype == jnp.float16
    np.testing.assert_allclose(out["a"], 3 / np.sqrt(2), rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: oa.track_location(oa.distances.l2(), -1.0), "tau must lie in"),
        (
            lambda: oa.track_location(oa.distances.l2(), 1.0, init="last"),
            "init must be",
        ),
        (
            lambda: oa.track_location(oa.distances.l2(), 1.0, reset=True),
            "pass init='zeros'",
        ),
        (
            lambda: oa.track_location(oa.distances.l2(), 1.0, scope="row"),
            "scope must be",
        ),
        (lambda: oa.distances.huber(mu=0.0), "mu must lie in"),
        (lambda: oa.distances.pinball(quantile=1.0), "quantile must"),
        (lambda: oa.adaptive_radius(1.5), "quantile must lie in"),
        (lambda: oa.adaptive_radius(rate=0.0), "rate must lie in"),
        (lambda: oa.adaptive_radius(init=0.0), "init must lie in"),
        (lambda: oa.clipped_ema(1.0, 1.0), "decay must lie in"),
        (lambda: oa.clipped_ema(0.9, 0.0), "max_norm must lie in"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("distance", "message"),
    [
        ("l1", r"the string 'l1'; pass oa.distances.l1\(\)"),
        ("l3", r"the string 'l3'; pass one of .*oa.distances.spectral\(\)"),
        (oa.distances.l1, r"function l1, which .*; pass oa.distances.l1\(\)"),
        (oa.distances.huber, r"function huber, which .*; pass oa.distances.huber\(\)"),
        (lambda delta, tau: delta, r"pass oa.distances.Distance\(step\)"),
        (oa.distances.l1().step, r"pass oa.distances.Distance\(step\)"),
        (None, r"It is NoneType; pass one such as oa.distances.l2\(\)"),
    ],
)
@pytest.mark.parametrize("make", [oa.track_location, oa.one_pass_location])
def test_what_is_no_distance_is_refused(make, distance, message):
    with pytest.raises(TypeError, match=message):
        make(distance, 1.0)


@pytest.mark.parametrize(
    "tx", [oa.vclip(1.0), oa.track_tail_index(), oa.centered_clip(1.0)]
)
def test_gradients_must_be_like_the_parameters_of_init(tx):
    state = tx.init({"a": jnp.ones(3)})
    other = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match="2 gradients for a state of 1 leaves; pass"):
        tx.update(other, state)


@pytest.mark.parametrize("tx", [oa.vclip(1.0), oa.track_tail_index()])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"b": jnp.ones(3)}, r"updates\['b'\] stands where the state has \['a'\]"),
        ({"a": jnp.ones(1)}, r"updates\['a'\] has shape \(1,\) and the state \(3,\)"),
    ],
)
def test_gradients_must_have_the_names_and_shapes_of_init(tx, other, message):
    with pytest.raises(ValueError, match=message):
        tx.update(other, tx.init({"a": jnp.ones(3)}))


def metric_l2(w):
    """The l2 norm in a diagonal metric, as a user would write it."""

    def step(delta, tau):
        (d,) = delta  # not joined to others: each leaf is a group
        size = jnp.sqrt(jnp.sum(w * d**2))
        factor = jnp.where(size > tau, tau / jnp.where(size > 0, size, 1), 1)
        return oa.distances.Step([factor * d], size <= tau, size)

    return oa.distances.Distance(step, by_leaf=True)


def test_a_distance_of_your_own():
    """With an adaptive radius, against NumPy, where shapes arrive as they are."""
    w = np.linspace(0.25, 4.0, 6, dtype=np.float32).reshape(2, 3)
    gradients = samples(10, 40)[:, :12].reshape(40, 2, 2, 3)
    radius = oa.adaptive_radius(0.7, 0.3)
    tx = oa.track_location(metric_l2(w), radius, scope="leaf")
    state = tx.init({"a": jnp.zeros((2, 3)), "b": jnp.zeros((2, 3))})
    update = jax.jit(tx.update)
    m, tau = gradients[0].copy(), [None, None]
    for t, g in enumerate(gradients):
        out, state = update({"a": jnp.float32(g[0]), "b": jnp.float32(g[1])}, state)
        for leaf in range(2) if t else ():
            delta = g[leaf] - m[leaf]
            size = np.sqrt(np.sum(w * delta**2))
            limit = np.inf if tau[leaf] is None else tau[leaf]
            m[leaf] += min(1, limit / size) * delta
            grown = np.exp(-0.3 * ((size <= limit) - 0.7))
            tau[leaf] = size if tau[leaf] is None else tau[leaf] * grown
        np.testing.assert_allclose(out["a"], m[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(out["b"], m[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.location_radius, tau, rtol=1e-4)
    assert int(state.clipped) > 5


def test_small_leaves_arrive_joined_unless_a_distance_works_by_leaf():
    seen = {}

    def recorded(by_leaf):
        def step(delta, tau):
            seen[by_leaf] = [d.shape for d in delta]
            return oa.distances.l2().step(delta, tau)

        return oa.distances.Distance(step, by_leaf=by_leaf)

    g = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
    for by_leaf in (False, True):
        tx = oa.track_location(recorded(by_leaf), 1.0)
        tx.update(g, tx.init(g))
    assert seen == {False: [(10,)], True: [(2, 3), (4,)]}


def test_parameters_of_distances_may_be_traced():
    """So that ``inject_hyperparams`` reaches them through a factory of your own."""

    def factory(mu, quantile):
        return optax.chain(
            oa.track_location(oa.distances.huber(mu), 0.5, init="zeros"),
            oa.track_location(oa.distances.pinball(quantile), 0.5, init="zeros"),
        )

    g = jnp.array([3.0, -4.0, 0.25])
    injected = optax.inject_hyperparams(factory)(mu=0.75, quantile=0.25)
    plain = factory(0.75, 0.25)
    found, _ = jax.jit(injected.update)(g, injected.init(g))
    np.testing.assert_allclose(found, plain.update(g, plain.init(g))[0], rtol=1e-6)


def test_linf_far_from_a_small_radius():
    """theta is as large as the gradient, the step as small as the radius."""
    for g in (np.full(1, 1e8), np.array([3e7, 1.0]), np.full(1000, 1000.0)):
        tx = oa.track_location(oa.distances.linf(), 1.0, init="zeros")
        g = jnp.asarray(g, jnp.float32)
        m, state = tx.update(g, tx.init(g))
        np.testing.assert_allclose(jnp.abs(m).sum(), 1.0, rtol=1e-3)
    huge = jnp.array([3e38, 3e38])  # their sum overflows
    m, state = tx.update(huge, tx.init(huge))
    np.testing.assert_allclose(m, [0.5, 0.5], rtol=1e-5)
    m, state = tx.update(jnp.array([1.0, 1.0]), state)
    assert bool(jnp.isfinite(m).all())
    assert int(state.rejected) == 0


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("scope", ["leaf", "global", {"a": "x", "b": "y"}])
def test_a_missing_gradient_keeps_its_radius(reset, scope):
    tx = oa.track_location(
        oa.distances.l2(),
        oa.adaptive_radius(init=1.0),
        scope=scope,
        init="zeros",
        reset=reset,
    )
    g = {"a": jnp.ones(2), "b": jnp.ones(3)}
    state = tx.init(g)
    _, state = tx.update(g, state)
    before = np.asarray(state.location_radius)
    for _ in range(5):
        out, state = tx.update({"a": 3 * jnp.ones(2), "b": None}, state)
        assert out["b"] is None
    after = np.asarray(state.location_radius)
    assert after[0] != before[0]
    if scope != "global":
        assert after[1] == before[1]


def test_repeated_gradients_do_not_shrink_a_radius_to_nothing():
    """Otherwise the next outlier would be taken in full."""
    tx = oa.vclip(oa.adaptive_radius(0.5, 0.2))
    state, update = tx.init(jnp.array(0.0)), jax.jit(tx.update)
    for g in [1.0, 2.0, 1.5] + [1.5] * 1000:
        m, state = update(jnp.array(g), state)
    m, state = update(jnp.array(1e6), state)
    assert float(m) < 10


def test_empty_leaves():
    g = {"a": jnp.zeros((3, 0))}
    for name in ref.NAMES:
        tx = oa.track_location(distance_of(name), 1.0, init="zeros")
        out, state = tx.update(g, tx.init(g))
        assert out["a"].shape == (3, 0)
        assert (int(state.accepted), int(state.clipped)) == (1, 0)


def test_complex_gradients():
    g = jnp.array([3.0 + 4.0j])
    tx = oa.track_location(oa.distances.l2(), 1.0, init="zeros")
    np.testing.assert_allclose(tx.update(g, tx.init(g))[0], [0.6 + 0.8j], rtol=1e-6)
    tx = oa.cclip(1.0)
    with pytest.raises(ValueError, match="no order to clip in"):
        tx.update(g, tx.init(g))


def test_adaptive_radius_of_a_float64_leaf_keeps_its_range():
    with jax.enable_x64(True):
        tx = oa.vclip(oa.adaptive_radius(0.5), init="zeros")
        state = tx.init(jnp.zeros([], jnp.float64))
        for _ in range(3):
            _, state = tx.update(jnp.array(1e200), state)
        assert 1e199 < float(state.location_radius[0]) < 1e201


@pytest.mark.parametrize(
    "tx", [oa.vclip(1.0), oa.clip_by_zscore(), oa.clip_by_quantile(0.5)]
)
def test_a_zero_gradient_of_mixed_width_is_finite(tx):
    with jax.enable_x64(True):
        x = {"a": jnp.zeros(3, jnp.float64), "b": jnp.zeros(2, jnp.float32)}
        _, state = tx.update(x, tx.init(x), x)
    assert int(state.rejected) == 0
