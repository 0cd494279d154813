"""Clips that follow the norms, against plain NumPy written from the papers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_avg as oa

SHAPES = {"a": (3, 2), "b": (4,)}
FACTORIES = {
    "zscore": lambda: oa.clip_by_zscore(2.0, 0.9, 5),
    "percentile": lambda: oa.clip_by_percentile(50.0, 6),
    "quantile": lambda: oa.clip_by_quantile(0.75, 0.5),
    "coordinate": lambda: oa.clip_by_coordinate_quantile(0.75, 0.5),
    "ema_norm": lambda: oa.clip_by_ema_norm(1.25, 0.75, lambda_abs=2.0, warmup_steps=4),
    "redescending": lambda: oa.clip_redescending(),
    "adagrad": lambda: oa.scale_by_clipped_adagrad_norm(2.0, 0.5),
    "induced": lambda: oa.scale_by_induced_metric(0.5, 0.75),
}
every_clip = pytest.mark.parametrize("name", FACTORIES)


def gradients(count=30, seed=0, spikes=True):
    """Random trees; every seventh is fifty times larger."""
    rng = np.random.default_rng(seed)
    scales = np.exp(0.3 * rng.normal(size=count))
    if spikes:
        scales[6::7] *= 50
    return [
        {
            k: (s * rng.normal(size=shape)).astype(np.float32)
            for k, shape in SHAPES.items()
        }
        for s in scales
    ]


def norm(tree):
    return float(np.sqrt(sum(np.sum(x.astype(float) ** 2) for x in tree.values())))


def run(tx, grads):
    state, update, path = tx.init(grads[0]), jax.jit(tx.update), []
    for g in grads:
        out, state = update(g, state)
        path.append({k: np.asarray(v) for k, v in out.items()})
    return path, state


def times(factor, tree):
    return {k: factor * v for k, v in tree.items()}


def zscore(grads, z_max=2.0, decay=0.9, warmup=5):
    norms, out = [], []
    for g in grads:
        n = norm(g)
        if len(norms) < warmup:
            norms.append(n)
            mu, var = np.mean(norms), np.var(norms)
            out.append(g)
            continue
        z = (n - mu) / np.sqrt(var)
        clipped = mu + z_max / (z / z_max) * np.sqrt(var) if z > z_max else n
        out.append(times(clipped / n, g))
        mu = decay * mu + (1 - decay) * clipped
        var = decay * var + (1 - decay) * (clipped - mu) ** 2
    return out


def percentile(grads, p=50.0, window=6):
    out, norms = [], []
    for g in grads:
        norms.append(norm(g))
        high = np.percentile(norms[-window:], p)
        out.append(times(min(1, high / norms[-1]), g))
    return out


def quantile(grads, q=0.75, rate=0.5):
    tau, out = None, []
    for g in grads:
        n = norm(g)
        if tau is None:
            tau = n
            out.append(g)
            continue
        out.append(times(min(1, tau / n), g))
        tau *= np.exp(-rate * ((n <= tau) - q))
    return out


def coordinate(grads, q=0.75, rate=0.5):
    tau, out = {}, []
    for g in grads:
        clipped = {}
        for k, x in g.items():
            if k not in tau:
                tau[k], clipped[k] = np.abs(x).mean(), x
                continue
            clipped[k] = np.clip(x, -tau[k], tau[k])
            tau[k] *= np.exp(-rate * ((np.abs(x) <= tau[k]).mean() - q))
        out.append(clipped)
    return out


def ema_norm(grads, relative=1.25, decay=0.75, absolute=2.0, warmup=4):
    gamma, out = {}, []
    for t, g in enumerate(grads):
        clipped = {}
        for k, x in g.items():
            n = np.linalg.norm(x)
            if t < warmup:
                h = min(1, absolute / norm(g))
                gamma[k] = min(gamma.get(k, np.inf), h * n)
            else:
                h = min(1, relative * gamma[k] / n)
                gamma[k] = decay * gamma[k] + (1 - decay) * h * n
            clipped[k] = h * x
        out.append(clipped)
    return out


def redescending(grads):
    return [
        {k: x / (1 + (x * np.abs(x).max()) ** 2) for k, x in g.items()} for g in grads
    ]


def adagrad(grads, max_norm=2.0, b=0.5):
    out = []
    for g in grads:
        kept = times(min(1, max_norm / norm(g)), g)
        out.append(times(1 / b, kept))
        b = np.sqrt(b**2 + norm(kept) ** 2)
    return out


def induced(grads, xi=0.5, decay=0.75):
    ema, out = 0.0, []
    for t, g in enumerate(grads):
        ema = decay * ema + (1 - decay) * xi * norm(g) ** 2
        out.append(times(1 / (1 + ema / (1 - decay ** (t + 1))), g))
    return out


REFERENCES = {
    name: globals()[name] for name in FACTORIES
}  # a function of each name stands above


@every_clip
def test_agrees_with_its_reference(name):
    grads = gradients()
    found, _ = run(FACTORIES[name](), grads)
    for out, wanted in zip(found, REFERENCES[name](grads), strict=True):
        for key in SHAPES:
            np.testing.assert_allclose(out[key], wanted[key], rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["zscore", "percentile", "quantile", "ema_norm"])
def test_spikes_are_cut_to_the_usual_size(name):
    grads = gradients(60)
    found, state = run(FACTORIES[name](), grads)
    for i in range(34, 60, 7):
        assert norm(found[i]) < 0.2 * norm(grads[i])
    assert int(state.clipped) >= 7


def test_zscore_by_hand():
    """Norms 1, 3 in the warm-up: mean 2, deviation 1. Then 10: z 8, limit 2 + 4/8."""
    tx = oa.clip_by_zscore(2.0, 0.5, 2)
    state, out = tx.init(jnp.zeros(1)), []
    for g in (1.0, 3.0, 10.0):
        u, state = tx.update(jnp.array([g]), state)
        out.append(float(u[0]))
    np.testing.assert_allclose(out, [1.0, 3.0, 2.5], rtol=1e-6)
    mu, var, _ = state.clip_statistics
    np.testing.assert_allclose(mu, [2.25], rtol=1e-6)
    np.testing.assert_allclose(var, [0.5 * 1 + 0.5 * 0.25**2], rtol=1e-6)
    assert int(state.clipped) == 1


def test_a_leaf_without_gradients_wakes_up():
    """In the paper its threshold would be zero for ever."""
    tx = oa.clip_by_ema_norm(warmup_steps=3)
    grads = [{"a": np.ones(2, np.float32), "b": np.zeros(3, np.float32)}] * 5
    grads += [{"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)}] * 2
    found, _ = run(tx, grads)
    np.testing.assert_array_equal(found[5]["b"], 1.0)
    np.testing.assert_array_equal(found[6]["b"], 1.0)


def test_undelayed_adagrad_norm_is_normalised_at_first():
    tx = oa.scale_by_clipped_adagrad_norm(1e9, 1e-6, delay=False)
    grads = gradients(2)
    found, _ = run(tx, grads)
    np.testing.assert_allclose(norm(found[0]), 1.0, rtol=1e-5)
    both = np.hypot(norm(grads[0]), norm(grads[1]))
    np.testing.assert_allclose(norm(found[1]), norm(grads[1]) / both, rtol=1e-5)


@pytest.mark.parametrize("delay", [True, False])
def test_adagrad_norm_goes_on_in_long_runs(delay):
    """One step changes less than half the last digit of the sum, a thousand more."""
    tx = oa.scale_by_clipped_adagrad_norm(1.0, 2.0**13, delay=delay)
    g = jnp.array([0.6, 0.8])
    many = jax.jit(
        lambda state: jax.lax.scan(
            lambda state, _: tx.update(g, state)[::-1], state, length=20_000
        )
    )
    state, out = many(tx.init(g))
    b, rest = np.float64(state.clip_statistics[0]), state.clip_statistics[1]
    np.testing.assert_allclose(b + np.float64(rest), (2**26 + 20_000) ** 0.5, rtol=1e-9)
    assert float(out[-1, 0]) < float(out[0, 0])


def test_no_metric_is_no_change():
    grads = gradients(3)
    found, _ = run(oa.scale_by_induced_metric(0.0), grads)
    for out, g in zip(found, grads, strict=True):
        for key in SHAPES:
            np.testing.assert_array_equal(out[key], g[key])


@every_clip
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_gradients_become_zeros_and_leave_no_trace(name, bad):
    good = gradients(12)
    broken = {k: v.copy() for k, v in good[0].items()}
    broken["b"][-1] = bad
    mixed = [g for pair in zip([broken] * 12, good, strict=True) for g in pair]
    found, state = run(FACTORIES[name](), mixed)
    wanted, clean = run(FACTORIES[name](), good)
    for out in found[::2]:
        assert all((x == 0).all() for x in out.values())
    for out, without in zip(found[1::2], wanted, strict=True):
        for key in SHAPES:
            np.testing.assert_array_equal(out[key], without[key])
    assert int(state.rejected) == 12
    assert int(state.clipped) == int(clean.clipped)


@every_clip
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_any_size_stays_finite(name, scale, dtype):
    tx = FACTORIES[name]()
    g = {k: jnp.full(shape, scale, dtype) for k, shape in SHAPES.items()}
    ordinary = {k: jnp.ones(shape, dtype) for k, shape in SHAPES.items()}
    state, update = tx.init(g), jax.jit(tx.update)
    for current in [g] * 8 + [ordinary] * 8 + [g] * 2:
        out, state = update(current, state)
        for key, x in out.items():
            assert x.dtype == dtype
            found = np.asarray(x, np.float64)
            assert np.isfinite(found).all()
            bound = 2.001 * np.abs(np.asarray(current[key], np.float64))
            assert (np.abs(found) <= bound).all()
    assert int(state.rejected) == 0


@pytest.mark.parametrize("name", ["quantile", "zscore", "ema_norm"])
def test_many_bf16_leaves(name):
    """Their norm is 31.6, not the 16 of a sum in bf16."""
    leaves = {str(i): jnp.ones((), jnp.bfloat16) for i in range(1000)}
    tx = FACTORIES[name]()
    out, state = tx.update(leaves, tx.init(leaves))
    if name == "quantile":
        np.testing.assert_allclose(state.location_radius, [1000**0.5], rtol=1e-3)
    elif name == "zscore":
        np.testing.assert_allclose(state.clip_statistics[0], [1000**0.5], rtol=1e-3)
    else:
        np.testing.assert_allclose(float(out["0"]), 2 / 1000**0.5, rtol=1e-2)


def test_fp16_norms_beyond_its_range():
    g = {"a": jnp.full((2,), 300.0, jnp.float16)}
    tx = oa.scale_by_clipped_adagrad_norm(3.0, 1.0)
    out, _ = tx.update(g, tx.init(g))
    np.testing.assert_allclose(out["a"], 3 / np.sqrt(2), rtol=1e-3)


def test_missing_gradients_keep_their_group():
    """A leaf that has no gradient this time finds its own limit again."""
    tx = oa.clip_by_ema_norm(1.0, 1.0, lambda_abs=1e9, warmup_steps=1)
    full = {"a": jnp.array([1.0]), "b": jnp.array([10.0])}
    state = tx.init(full)
    _, state = tx.update(full, state)
    out, state = tx.update({"a": None, "b": jnp.array([20.0])}, state)
    assert out["a"] is None
    np.testing.assert_allclose(out["b"], [10.0], rtol=1e-6)
    out, state = tx.update({"a": jnp.array([5.0]), "b": None}, state)
    np.testing.assert_allclose(out["a"], [1.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: oa.clip_by_zscore(0.0), "z_max must lie in"),
        (lambda: oa.clip_by_zscore(decay=1.0), "decay must lie in"),
        (lambda: oa.clip_by_zscore(warmup_steps=0), "warmup_steps must be an integer"),
        (lambda: oa.clip_by_percentile(101.0), "percentile must lie in"),
        (lambda: oa.clip_by_percentile(window=0), "window must be an integer"),
        (lambda: oa.clip_by_quantile(2.0), "quantile must lie in"),
        (lambda: oa.clip_by_ema_norm(0.5), "lambda_rel must lie in"),
        (lambda: oa.clip_by_ema_norm(lambda_abs=0.0), "lambda_abs must lie in"),
        (lambda: oa.clip_redescending(0.0), "scale must lie in"),
        (lambda: oa.scale_by_clipped_adagrad_norm(0.0), "max_norm must lie in"),
        (lambda: oa.scale_by_clipped_adagrad_norm(b0=0.0), "b0 must lie in"),
        (lambda: oa.scale_by_induced_metric(-1.0), "xi must lie in"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_quantile_is_met():
    """The share of gradients that stay as they are."""
    tx = oa.clip_by_quantile(0.9, 0.1)
    sample = jax.random.normal(jax.random.key(0), (4000, 8))
    body = lambda state, g: (tx.update(g, state)[1], None)
    state, _ = jax.lax.scan(body, tx.init(sample[0]), sample)
    np.testing.assert_allclose(int(state.accepted) / 4000, 0.9, atol=0.02)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)


def test_norms_of_every_size_side_by_side():
    """One leaf beyond the range of squares must not spoil the norms of the others."""
    g = {"tiny": 1e-30, "usual": 3.0, "huge": 1e30, "zero": 0.0}
    g = {key: jnp.full(4, value) for key, value in g.items()}
    tx = oa.clip_by_ema_norm(lambda_abs=1e38, warmup_steps=1)
    _, state = tx.update(g, tx.init(g))
    wanted = [2 * float(x[0]) for x in g.values()]  # in the order of the keys
    wanted = dict(zip(g, wanted, strict=True))
    np.testing.assert_allclose(
        state.clip_statistics, [wanted[key] for key in sorted(g)], rtol=1e-6
    )


def test_percentile_of_the_latest_norms_beyond_the_largest_count():
    tx = oa.clip_by_percentile(100.0, 2)
    state = tx.init(jnp.zeros([]))
    state = state._replace(clip_step=jnp.array(np.iinfo(np.int32).max))
    for size in (100.0, 1.0, 1.0, 2.0):
        out, state = tx.update(jnp.array(size), state)
        assert float(out) == size
    assert sorted(state.clip_statistics.tolist()) == [1.0, 2.0]
    assert int(state.clip_step) == np.iinfo(np.int32).max


def test_float64_norms_that_float32_statistics_cannot_hold():
    with jax.enable_x64(True):
        tx = oa.scale_by_clipped_adagrad_norm(max_norm=1e300)
        state = tx.init(jnp.zeros([], jnp.float32))
        out, state = tx.update(jnp.array(1e200), state)
        assert float(out) == 0
        assert int(state.rejected) == 1
        assert float(state.clip_statistics[0]) == 1
        wide = tx.init(jnp.zeros([], jnp.float64))
        out, wide = tx.update(jnp.array(1e200), wide)
        assert float(out) == 1e200
        assert float(wide.clip_statistics[0]) == 1e200


BEGINNINGS = {
    "zeros": [0.0] * 40,
    "subnormal": [1e-42] * 40,
    "1e19": [1e19],
    "3e19": [1.0, 1.2, 3e19],
    "1e30": [1.0, 1e30, 0.8],
    "1e38": [1e38] * 3,
    "infinite": [np.inf] * 40,
    "all": [0.0, np.inf, 1e-42, 1.0, 1e38, np.nan, 0.0],
}
FOLLOWERS = FACTORIES | {
    "tracker": lambda: oa.vclip(oa.adaptive_radius(0.5)),
    "elements": lambda: oa.cclip(oa.adaptive_radius(0.5)),
}


@functools.cache
def scanned(name):
    tx = FOLLOWERS[name]()

    def advance(state, g):
        out, state = tx.update(g, state)
        return state, out

    return tx, jax.jit(lambda state, grads: jax.lax.scan(advance, state, grads))


@pytest.mark.parametrize("warmup_steps", [2, 3, 10])
def test_a_small_first_norm_does_not_clip_the_others(warmup_steps):
    tx = oa.clip_by_zscore(warmup_steps=warmup_steps)
    state, advance = tx.init(jnp.zeros(1)), jax.jit(tx.update)
    for norm in [1e-20, *[1.0, 1.2] * 20]:
        out, state = advance(jnp.array([norm]), state)
    np.testing.assert_allclose(out, 1.2, rtol=1e-6)


def test_a_spike_in_the_warm_up_does_not_lift_the_limit():
    tx = oa.clip_by_zscore()
    advance = jax.jit(tx.update)
    state = tx.init(jnp.zeros(1))
    for norm in [1.0, 1.2, 1e6, *[1.0, 1.2] * 30]:
        _, state = advance(jnp.array([norm]), state)
    out, _ = advance(jnp.array([1000.0]), state)
    assert float(out[0]) < 2


def in_time(grads):
    return {k: jnp.asarray(np.stack([g[k] for g in grads])) for k in SHAPES}


@functools.cache
def usual():
    return in_time(gradients(1200, seed=3, spikes=False))


@pytest.mark.parametrize("beginning", BEGINNINGS)
@pytest.mark.parametrize("name", FOLLOWERS)
def test_recovers_from_any_beginning(name, beginning):
    tx, run = scanned(name)
    last = gradients(1, seed=4, spikes=False)[0]
    ones = {k: np.ones(shape, np.float32) / 10**0.5 for k, shape in SHAPES.items()}
    first = [times(np.float32(size), ones) for size in BEGINNINGS[beginning]]
    start = tx.init(ones)
    begun, out = run(start, in_time(first))
    assert all(np.isfinite(x).all() for x in out.values())
    state, _ = run(begun, usual())
    clean, _ = run(start, usual())
    chex.assert_tree_all_finite(state)
    ends = [run(s, in_time([last]))[1] for s in (state, clean)]
    sizes = [norm({k: np.asarray(v[0]) for k, v in end.items()}) for end in ends]
    assert 0.5 < sizes[0] / sizes[1] < 2
    if name in ("zscore", "percentile", "quantile", "coordinate", "ema_norm"):
        _, out = run(state, in_time([times(1000.0, last)]))
        cut = norm({k: np.asarray(v[0]) for k, v in out.items()})
        assert cut < 0.02 * norm(times(1000.0, last))


@pytest.mark.parametrize("name", ["zscore", "percentile", "ema_norm"])
def test_zeros_leave_no_trace(name):
    """A gradient that is zero says nothing of the size of others."""
    grads = gradients(14)
    zero = times(np.float32(0), grads[0])
    mixed = [g for pair in zip(grads, [zero] * 14, strict=True) for g in pair]
    found, state = run(FACTORIES[name](), mixed)
    wanted, clean = run(FACTORIES[name](), grads)
    chex.assert_trees_all_equal(state, clean)
    for out, without in zip(found[::2], wanted, strict=True):
        chex.assert_trees_all_equal(out, without)


def test_a_leaf_that_pauses_keeps_its_limit():
    tx = oa.clip_by_ema_norm(1.25, 0.5, lambda_abs=10.0, warmup_steps=1)
    both = {"a": jnp.array([1.0]), "b": jnp.array([1.0])}
    pause = {"a": jnp.array([1.0]), "b": jnp.array([0.0])}
    state, advance = tx.init(both), jax.jit(tx.update)
    for g in [both, *[pause] * 60]:
        _, state = advance(g, state)
    out, _ = advance(both, state)
    np.testing.assert_allclose(out["b"], [1.0])


def test_a_spike_of_one_leaf_in_the_warm_up_spares_the_others():
    tx = oa.clip_by_ema_norm(lambda_abs=10.0, warmup_steps=3)
    usual = {"a": jnp.array([1.0]), "b": jnp.array([1.0])}
    state = tx.init(usual)
    for g in (usual, {"a": jnp.array([1e30]), "b": jnp.array([1.0])}, usual):
        _, state = tx.update(g, state)
    out, _ = tx.update(usual, state)
    np.testing.assert_allclose(out["b"], [1.0])


def test_no_metric_is_no_change_for_any_norm():
    tx = oa.scale_by_induced_metric(0.0)
    g = jnp.array([1e25])
    out, state = tx.update(g, tx.init(g))
    out, _ = tx.update(out, state)
    np.testing.assert_array_equal(out, g)
