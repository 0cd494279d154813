"""Directions for several objectives against float64, and what they promise."""

import functools
import itertools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_surgery as reference

import optax_avg as oa
from optax_avg.robust import surgery
from optax_avg.robust._quadratic import nonnegative_minimiser

RULES = {
    "mgda": (oa.mgda(), reference.mgda),
    "upgrad": (oa.upgrad(), reference.upgrad),
    "cagrad": (oa.cagrad(0.5), lambda g: reference.cagrad(g, 0.5)),
    "cagrad_wide": (oa.cagrad(2.0), lambda g: reference.cagrad(g, 2.0)),
}
every_rule = pytest.mark.parametrize("name", RULES)
UPDATES = {name: jax.jit(rule[0].update) for name, rule in RULES.items()}


def direction(name, g):
    g = jnp.asarray(g, jnp.float32)
    params = jnp.zeros(g.shape[1])
    found, _ = UPDATES[name](g, RULES[name][0].init(params))
    return np.asarray(found, np.float64)


def objectives(seed, n=3, d=5):
    rng = np.random.default_rng(seed)
    return np.float32(rng.normal(size=(n, d)) + 0.3 * rng.normal(size=d)).astype(float)


@pytest.mark.parametrize("size_of_w", [1e-30, 1e-14, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("size_of_v", [1e-30, 1.0, 1e30])
def test_project_out_equals_the_definition_at_any_size(size_of_v, size_of_w):
    """Also where only the product of both leaves the range of float32."""
    a, b = np.random.default_rng(0).normal(size=(2, 30)).astype(np.float32)
    v, w = np.float32(size_of_v) * (a + b), np.float32(size_of_w) * b
    trees = ({"a": x[:10], "b": x[10:]} for x in (v, w))
    found = jax.jit(surgery.project_out)(*trees)
    u, wide = w / np.linalg.norm(np.float64(w)), np.float64(v)
    wanted = wide - (wide @ u) * u
    np.testing.assert_allclose(
        np.concatenate([found["a"], found["b"]]), wanted, atol=2e-6 * size_of_v
    )


@pytest.mark.parametrize("place", range(4))
def test_project_out_does_not_hide_nan(place):
    bad = jnp.ones(4).at[place].set(jnp.nan)
    for v, w in ((bad, jnp.ones(4)), (jnp.ones(4), bad)):
        assert jnp.isnan(surgery.project_out(v, w)[place])


@every_rule
@hypothesis.given(seed=st.integers(0, 1000))
def test_equals_the_definition(name, seed):
    g = objectives(seed)
    size = np.abs(g).max()
    np.testing.assert_allclose(
        direction(name, g), RULES[name][1](g), rtol=2e-3, atol=2e-4 * size
    )


CAGRAD = {c: oa.cagrad(c) for c in (0.4, 0.5, 0.9, 1.5)}


@functools.cache
def directions_of_sets(tx):
    """Of many sets of objectives at once."""
    return jax.jit(jax.vmap(lambda g: tx.update(g, tx.init(g[0]))[0]))


def all_directions(name, g):
    return np.float64(directions_of_sets(RULES[name][0])(jnp.asarray(g, jnp.float32)))


@pytest.mark.parametrize(("n", "d"), [(2, 2), (3, 2), (6, 2), (8, 3)])
def test_more_objectives_than_dimensions(n, d):
    """All of a thousand, down to gradients that are opposite but for 1e-3."""
    g = np.stack([objectives(s, n, d) for s in range(1000 if n < 8 else 200)])
    size = np.linalg.norm(g, axis=2, keepdims=True)
    faces = (
        g[:, list(f)] / size[:, list(f)] for f in itertools.combinations(range(n), d)
    )
    # The squared sine of the least angle, where d is 2.
    least = np.min([np.linalg.svd(f)[1][:, -1] ** 2 for f in faces], axis=0)
    rounding = np.finfo(np.float32).eps / least * size.max(axis=(1, 2))
    for name, bound in (("mgda", 2e-5), ("upgrad", rounding)):
        wanted = np.stack([RULES[name][1](x) for x in g])
        error = np.max(np.abs(all_directions(name, g) - wanted), axis=1)
        assert (error < bound).all()
        assert np.quantile(error, 0.95) < 2e-5


@hypothesis.given(seed=st.integers(0, 1000), log_ratio=st.integers(-4, 4))
def test_no_objective_gets_worse(seed, log_ratio):
    g = objectives(seed)
    g[0] *= 10.0**log_ratio
    for name in ("mgda", "upgrad"):
        d = direction(name, g)
        slopes = g @ d / np.linalg.norm(g, axis=1)
        assert (slopes >= -1e-3 * np.linalg.norm(d)).all()
    d = direction("mgda", g)
    # The first-order condition of the shortest convex combination.
    assert (g @ d >= d @ d * (1 - 1e-2) - 1e-6 * np.linalg.norm(g, axis=1)).all()


@hypothesis.given(seed=st.integers(0, 1000), log_scale=st.integers(-30, 30))
def test_scale(seed, log_scale):
    g = objectives(seed)
    scale = 10.0**log_scale
    for name in RULES:
        np.testing.assert_allclose(
            direction(name, scale * g) / scale, direction(name, g), rtol=1e-3, atol=1e-4
        )


@every_rule
def test_opposite_gradients_cancel(name):
    g = np.array([[1.0, 2.0], [-1.0, -2.0]])
    np.testing.assert_allclose(direction(name, g), 0, atol=1e-5)


@every_rule
def test_repeated_and_aligned_gradients(name):
    g = np.array([[1.0, 2.0], [1.0, 2.0], [2.0, 4.0]])
    wanted = {"mgda": [1, 2], "upgrad": [4 / 3, 8 / 3]}
    factor = {"cagrad": 1.5, "cagrad_wide": 3.0}.get(name, 0) * 4 / 3
    expected = wanted.get(name, [factor, 2 * factor])
    np.testing.assert_allclose(direction(name, g), expected, rtol=1e-3)


@every_rule
def test_a_zero_gradient(name):
    g = np.array([[1.0, 2.0], [0.0, 0.0]])
    wanted = {"mgda": 0.0, "upgrad": 0.5, "cagrad": 0.75, "cagrad_wide": 1.5}[name]
    np.testing.assert_allclose(direction(name, g), wanted * g[0], atol=2e-3)


@pytest.mark.parametrize("n", [2, 5])
def test_mgda_with_a_zero_gradient_is_exactly_zero(n):
    g = objectives(5, n)
    g[1] = 0
    np.testing.assert_array_equal(direction("mgda", g), 0)
    g[1] = 1e-20 * g[0]
    np.testing.assert_array_equal(direction("mgda", g), np.float32(g[1]))


@pytest.mark.parametrize(("ratio", "seen"), [(1e-17, True), (1e-20, False)])
def test_gradients_that_the_greatest_hides(ratio, seen):
    """They count in means and sums and take nothing from others."""
    g = np.array([[1.0, 1.0], [-ratio, 0.0]])
    rest = 0.0 if seen else 1.0
    np.testing.assert_allclose(direction("upgrad", g), [rest / 2, 0.5], atol=1e-6)
    tx = oa.pcgrad(0)
    found, _ = tx.update(jnp.asarray(g, jnp.float32), tx.init(jnp.zeros(2)))
    np.testing.assert_allclose(found, [rest, 1], atol=1e-6)


def test_cagrad_with_a_tiny_gradient_goes_on():
    g = np.array([[1.0, 0.0], [0.0, 1e-9]])
    np.testing.assert_allclose(direction("cagrad", g), [0.5, 0.25], atol=1e-3)


@every_rule
def test_a_bad_gradient_is_left_out(name):
    g = objectives(3, 4)
    bad = g.copy()
    bad[2, 1] = np.nan
    wanted = direction(name, np.delete(g, 2, axis=0))
    np.testing.assert_allclose(direction(name, bad), wanted, atol=1e-4)


def test_cagrad_at_zero_is_the_mean():
    g = jnp.asarray(objectives(4), jnp.float32)
    tx = oa.cagrad(0.0)
    found, _ = tx.update(g, tx.init(g[0]))
    np.testing.assert_allclose(found, g.mean(axis=0), rtol=1e-6)


def test_cagrad_of_two_by_hand():
    """With d in 1/4 + [-c/4, c/4] the worst of d and -d/2 is best at the left end."""
    g = np.array([[1.0, 0.0], [-0.5, 0.0]])
    np.testing.assert_allclose(direction("cagrad", g), [0.125, 0], atol=1e-5)
    np.testing.assert_allclose(direction("cagrad_wide", g), [0, 0], atol=1e-5)


DEGENERATE = {
    "plain": lambda g, rng: g,
    "repeated": lambda g, rng: g[rng.integers(0, 2, len(g))],
    "zero": lambda g, rng: g * (np.arange(len(g)) != 1)[:, None],
    "opposite": lambda g, rng: np.concatenate(
        [g[:-1], -rng.choice([0.5, 1, 2]) * g[:1]]
    ),
    "rank_1": lambda g, rng: g[:, :1] * g[:1],
    "rank_2": lambda g, rng: g[:, :2] @ g[:2],
    "ratios": lambda g, rng: g * 10 ** rng.uniform(-3, 3, (len(g), 1)),
    "far_ratios": lambda g, rng: g * rng.choice([1e-30, 1, 1e30], (len(g), 1)),
    "stationary": lambda g, rng: np.concatenate([g[:-1], -rng.random((1, 4)) @ g[:-1]]),
    "tiny": lambda g, rng: 1e-30 * g,
    "huge": lambda g, rng: 1e30 * g,
}


PCGRAD = oa.pcgrad(0)


def degenerate(kind, d, count=4):
    rng = np.random.default_rng(d)
    sets = [DEGENERATE[kind](objectives(s, 5, d), rng) for s in range(count)]
    return np.float32(sets).astype(float)


def directions_of_cagrad(c, d):
    """Of all degenerate sets, and the sets in units of their greatest row."""
    g = np.concatenate([degenerate(kind, d) for kind in DEGENERATE])
    size = np.linalg.norm(g, axis=2).max(axis=1)[:, None]
    found = np.float64(directions_of_sets(CAGRAD[c])(jnp.asarray(g, jnp.float32)))
    return found / size, g / size[:, None]


@pytest.mark.parametrize("c", [0.4, 0.9, 1.5])
@pytest.mark.parametrize("d", [3, 6])
def test_cagrad_is_the_best_within_its_ball(c, d):
    for found, g in zip(*directions_of_cagrad(c, d), strict=True):
        mean = g.mean(axis=0)
        size = np.linalg.norm(mean)
        assert np.linalg.norm(found - mean) <= c * size * (1 + 1e-3) + 1e-7
        best = (g @ reference.cagrad(g, c)).min()
        assert (g @ found).min() >= best - 2e-3 * size - 1e-7


@pytest.mark.parametrize("c", [0.5, 0.9, 1.5])
@pytest.mark.parametrize("small", [1e-2, 1e-3])
def test_cagrad_of_gradients_of_other_lengths(c, small):
    """How far common descent can go does not depend on the lengths of the rows."""
    sets = np.random.default_rng(0).normal(size=(40, 3, 4)) * [[1.0], [1.0], [small]]
    directions = directions_of_sets(CAGRAD[c])(jnp.asarray(sets, jnp.float32))
    for g, found in zip(sets, np.float64(directions), strict=True):
        mean = g.mean(axis=0)
        assert np.linalg.norm(found - mean) <= c * np.linalg.norm(mean) * (1 + 1e-4)
        best = (g @ reference.cagrad(g, c)).min()
        scale = small * np.linalg.norm(mean)
        assert (g @ found).min() >= best - 0.02 * scale


@pytest.mark.parametrize(
    ("c", "g"),
    [
        (1.5, [[1.0, 0.0], [-0.001, 0.0001]]),
        (0.9, [[1, 0.5, 0, 0], [-1, 0.7, 0.2, 0], [0.003, -0.01, 0.004, 0.001]]),
    ],
)
def test_cagrad_of_nearly_opposite_gradients_of_other_lengths(c, g):
    tx, g = oa.cagrad(c), np.array(g)
    start = tx.init(jnp.zeros(g.shape[1]))
    found = np.asarray(tx.update(jnp.asarray(g, jnp.float32), start)[0], float)
    assert (g @ found).min() >= 0.99 * (g @ reference.cagrad(g, c)).min()


def nearly_opposite(gap, count=20):
    rng = np.random.default_rng(2)
    first = rng.normal(size=(count, 1, 2))
    first /= np.linalg.norm(first, axis=2, keepdims=True)
    other = gap * rng.normal(size=(count, 1, 2)) / 2**0.5 - first
    return np.float32(np.concatenate([first, other], axis=1)).astype(float)


@pytest.mark.parametrize("c", [0.4, 0.9])
def test_cagrad_of_gradients_that_cancel_stays_within_its_ball(c):
    """The Gram matrix has lost the length of their mean; the mean itself has not."""
    g = np.concatenate([nearly_opposite(gap) for gap in (1e-2, 1e-3, 1e-5)])
    found = np.float64(directions_of_sets(CAGRAD[c])(jnp.asarray(g, jnp.float32)))
    mean = g.mean(axis=1)
    # The mean of the gradients is rounded as they are.
    size = np.linalg.norm(mean, axis=1)
    assert (np.linalg.norm(found - mean, axis=1) <= c * size * (1 + 1e-5) + 1e-7).all()


def test_cagrad_over_devices_keeps_to_the_same_ball():
    g = nearly_opposite(1e-3)[0]
    tx = oa.cagrad(0.5, axis_name="d")
    update = jax.vmap(lambda row: tx.update(row, tx.init(row))[0], axis_name="d")
    found = jax.jit(update)(jnp.asarray(g, jnp.float32))
    wanted = direction("cagrad", g)
    np.testing.assert_allclose(found, [wanted, wanted], rtol=1e-5)


def test_cagrad_at_pareto_stationary_points():
    """Where no direction helps all, the closest to the mean that hurts none."""
    g = np.array([[1.0, 0.0], [-0.5, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(direction("cagrad", g), [0, 1 / 3], atol=1e-4)
    g = np.array([[1.0, 2.0], [-3.0, -6.0]])  # none but zero hurts none
    np.testing.assert_allclose(direction("cagrad", g), [-0.5, -1], atol=1e-4)
    np.testing.assert_allclose(direction("cagrad_wide", g), 0, atol=1e-4)


def test_cagrad_comes_to_the_minimum_of_the_mean():
    """Of (x - 1)^2 and 4 (x + 1)^2; all of [-1, 1] is Pareto-optimal."""
    losses = lambda x: jnp.array([(x - 1) ** 2, 4 * (x + 1) ** 2])
    tx = optax.chain(oa.cagrad(0.5), optax.sgd(0.1))

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(jax.jacrev(losses)(x), state, x)
        return (optax.apply_updates(x, updates), state), None

    x = jnp.asarray(2.0)
    (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), length=100)
    np.testing.assert_allclose(x, -0.6, atol=1e-3)


@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_rows(kind):
    """Finite, no longer than the rows, and what each rule promises."""
    g = degenerate(kind, 3)
    size = np.linalg.norm(g, axis=2).max(axis=1)[:, None]
    found = directions_of_sets(PCGRAD)(jnp.asarray(g, jnp.float32))
    found = np.float64(found) / size
    assert (np.linalg.norm(found, axis=1) <= 5.001).all()
    for name in ("mgda", "upgrad"):
        found = all_directions(name, g) / size
        assert (np.linalg.norm(found, axis=1) <= 1.001).all()
        slopes = np.einsum("snd,sd->sn", g / size[:, None], found)
        assert (slopes >= -1e-3).all()


def test_pcgrad_is_one_of_the_orders_and_comes_to_all():
    g = np.array([[1.0, 0.2, 0.0], [-0.9, 0.8, -0.4], [0.1, -1.0, -0.7]])
    others = [[j for j in range(3) if j != i] for i in range(3)]
    orders = itertools.product(*(itertools.permutations(o) for o in others))
    possible = np.array([reference.pcgrad(g, order) for order in orders])
    distinct = np.unique(possible.round(5), axis=0)
    tx = oa.pcgrad(jax.random.key(0))
    stacked = jnp.asarray(g, jnp.float32)
    state = tx.init(jnp.zeros(3))
    update, seen = jax.jit(tx.update), set()
    for _ in range(60):
        found, state = update(stacked, state)
        apart = np.abs(distinct - np.asarray(found)).max(axis=1)
        assert apart.min() < 1e-5
        seen.add(int(apart.argmin()))
    assert seen == set(range(len(distinct)))
    assert len(distinct) > 1


@pytest.mark.parametrize(
    "key", [np.int64(3), np.array(3), jnp.array(3), jax.random.key(3)]
)
def test_keys_of_pcgrad(key):
    state = oa.pcgrad(key).init(jnp.zeros(2))
    wanted = oa.pcgrad(3).init(jnp.zeros(2))
    chex.assert_trees_all_equal(state, wanted)


def test_pcgrad_of_two():
    tx = oa.pcgrad(3)
    stacked = jnp.array([[1.0, 0.0], [-2.0, 2.0]])
    found, state = tx.update(stacked, tx.init(jnp.zeros(2)))
    wanted = reference.pcgrad(np.asarray(stacked, float), [[1], [0]])
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    agree = jnp.array([[1.0, 0.0], [2.0, 2.0]])
    found, _ = tx.update(agree, state)
    np.testing.assert_allclose(found, agree.sum(axis=0), rtol=1e-6)


def test_the_solver_visits_every_kind_of_support():
    rng = np.random.default_rng(0)
    solve = jax.jit(nonnegative_minimiser)
    supports = set()
    for _ in range(60):
        rows = rng.normal(size=(4, 6))
        a, b = rows @ rows.T, rng.normal(size=4)
        v = np.asarray(solve(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)))
        slope = a @ v - b
        assert (v >= 0).all()
        assert (slope > -1e-3).all()
        assert np.abs(v * slope).max() < 1e-3
        supports.add(int((v > 0).sum()))
    assert supports == {0, 1, 2, 3, 4}


def test_project_out():
    v = {"a": jnp.array([3.0, 4.0]), "b": jnp.array(1.0, jnp.bfloat16)}
    w = {"a": jnp.array([0.0, 2.0]), "b": jnp.array(2.0, jnp.bfloat16)}
    found = surgery.project_out(v, w)
    along = (4 * 2 + 1 * 2) / 8
    np.testing.assert_allclose(found["a"], [3, 4 - 2 * along], rtol=1e-6)
    np.testing.assert_allclose(found["b"], 1 - 2 * along, rtol=1e-6)
    zero = jax.tree.map(jnp.zeros_like, w)
    chex.assert_trees_all_equal(
        surgery.project_out(v, zero), jax.tree.map(lambda x: x.astype(jnp.float32), v)
    )
    tiny = jax.tree.map(lambda x: (1e-30 * x).astype(x.dtype), w)
    chex.assert_trees_all_close(surgery.project_out(v, tiny), found, rtol=1e-2)


@pytest.mark.parametrize("project_on", ["previous", "updated"])
@pytest.mark.parametrize("init", ["first", "zeros"])
def test_bloop_by_hand(project_on, init):
    """Against the recursion in float64, with two auxiliary gradients."""
    rng = np.random.default_rng(0)
    tx = oa.bloop(0.3, 0.1, project_on=project_on, init=init)
    state, m = tx.init(jnp.zeros(4)), np.zeros(4)
    update = jax.jit(tx.update)
    for step in range(6):
        g, a, b = rng.normal(size=(3, 4))
        first = step == 0 and init == "first"
        new = g if first else m + 0.1 * (g - m)
        used = new if project_on == "updated" else m
        if first:
            used = np.zeros(4)
        wanted = g.copy()
        for aux in (a, b):
            size = used @ used
            wanted += 0.3 * (aux - (aux @ used / size * used if size else 0))
        m = new
        as_f32 = lambda x: jnp.asarray(x, jnp.float32)
        found, state = update(
            as_f32(g), state, aux_grads=(as_f32(a), as_f32(b)), other=1
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.main_ema, m, rtol=1e-5, atol=1e-6)
    assert int(state.bloop_step) == 6


def test_bloop_leaves_bad_gradients_out():
    tx = oa.bloop(1.0, 0.5)
    g, aux = jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])
    _, state = tx.update(g, tx.init(g), aux_grads=(aux,))
    bad = jnp.array([jnp.nan, 1.0])
    found, after = jax.jit(tx.update)(bad, state, aux_grads=(aux,))
    np.testing.assert_array_equal(found, 0)
    np.testing.assert_array_equal(after.main_ema, state.main_ema)
    assert int(after.left_out) == 1
    assert int(after.bloop_step) == 1
    found, after = jax.jit(tx.update)(g, after, aux_grads=(bad, aux))
    np.testing.assert_allclose(found, [1, 2])
    assert int(after.left_out) == 2


def test_bloop_finds_the_best_minimiser():
    """Main loss x1^2, auxiliary |x - (3, 2)|^2: its minimiser on x1 = 0 is (0, 2)."""
    main = lambda x: x[0] ** 2
    aux = lambda x: jnp.sum((x - jnp.array([3.0, 2.0])) ** 2)
    ends = {}
    for name, tx in {
        "bloop": optax.chain(oa.bloop(0.5), optax.sgd(0.1)),
        "sum": optax.sgd(0.1),
    }.items():
        x = jnp.array([1.0, -1.0])
        state = tx.init(x)

        @jax.jit
        def advance(x, state, name=name, tx=tx):
            g, a = jax.grad(main)(x), jax.grad(aux)(x)
            if name == "bloop":
                updates, state = tx.update(g, state, x, aux_grads=(a,))
            else:
                updates, state = tx.update(g + 0.5 * a, state, x)
            return optax.apply_updates(x, updates), state

        for _ in range(300):
            x, state = advance(x, state)
        ends[name] = np.asarray(x)
    assert np.abs(ends["bloop"] - [0, 2]).max() < 0.02
    assert ends["sum"][0] > 0.9


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize("rescale", [False, True])
def test_perp_grad(scope, rescale):
    x = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([[0.5, -3.0]])}
    g = {"a": jnp.array([0.3, -1.0]), "b": jnp.array([[2.0, 1.0]])}
    tx = oa.perp_grad(scope=scope, rescale=rescale)
    found, _ = jax.jit(tx.update)(g, tx.init(x), x)

    def wanted(g, x):
        g, x = np.asarray(g, float).ravel(), np.asarray(x, float).ravel()
        p = g - g @ x / (x @ x) * x
        return p * np.linalg.norm(g) / np.linalg.norm(p) if rescale else p

    if scope == "leaf":
        for key in g:
            np.testing.assert_allclose(
                found[key].ravel(), wanted(g[key], x[key]), rtol=1e-5
            )
    else:
        join = lambda tree: np.concatenate([tree["a"].ravel(), tree["b"].ravel()])
        np.testing.assert_allclose(join(found), wanted(join(g), join(x)), rtol=1e-5)


def test_perp_grad_of_anything():
    tx = oa.perp_grad(rescale=True)
    x = {"a": jnp.zeros(3, jnp.bfloat16), "n": None, "k": jnp.array(3)}
    g = {"a": jnp.ones(3, jnp.bfloat16), "n": None, "k": None}
    found, _ = jax.jit(tx.update)(g, tx.init(x), x)
    np.testing.assert_array_equal(np.asarray(found["a"], float), 1)
    assert found["a"].dtype == jnp.bfloat16
    along = {"a": jnp.ones(3), "n": None, "k": None}
    found, _ = tx.update(along, tx.init(x), along)
    assert np.all(np.isfinite(found["a"]))
    assert tx.update({}, tx.init({}), {})[0] == {}
    with pytest.raises(ValueError, match="perp_grad needs the parameters"):
        tx.update(g, tx.init(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: oa.cagrad(-1.0), "c must lie in"),
        (lambda: oa.bloop(-1.0), "lam must lie in"),
        (lambda: oa.bloop(1.0, 2.0), "ema_rate must lie in"),
        (lambda: oa.bloop(1.0, project_on="next"), "'previous' or 'updated'"),
        (lambda: oa.bloop(1.0, init="ones"), "'first' or 'zeros'"),
        (lambda: oa.perp_grad(scope="row"), "'global' or 'leaf'"),
        (
            lambda: oa.bloop(1.0).update(jnp.ones(2), oa.bloop(1.0).init(jnp.ones(2))),
            r"aux_grads=\(gradient,\)",
        ),
        (
            lambda: oa.bloop(1.0).update(
                jnp.ones(2),
                oa.bloop(1.0).init(jnp.ones(2)),
                aux_grads=((jnp.ones(2), jnp.ones(2)),),
            ),
            "2 leaves, the main one 1",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
