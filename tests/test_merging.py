"""Merges against float64, their special cases, masks, bad input and checkpoints."""

import functools
import itertools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_merging as reference
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_avg import _numerics, merging

W = [0.5, 0.3, 0.2]
SHAPES = {"kernel": (5, 4), "bias": (7,)}
# A merge of models and a base, and the same on float64 vectors.
CASES = {
    "uniform": (lambda ms, b: merging.uniform(ms), lambda xs, x0: np.mean(xs, axis=0)),
    "weighted": (
        lambda ms, b: merging.weighted(ms, W),
        lambda xs, x0: np.average(xs, axis=0, weights=W),
    ),
    "wise_ft": (
        lambda ms, b: merging.wise_ft(b, ms[0], 0.3),
        lambda xs, x0: 0.7 * x0 + 0.3 * xs[0],
    ),
    "task_arithmetic": (
        lambda ms, b: merging.task_arithmetic(ms, b, 0.4),
        lambda xs, x0: x0 + 0.4 * sum(x - x0 for x in xs),
    ),
    "ties": (
        lambda ms, b: merging.ties(ms, b, 0.4, scale=1.5),
        lambda xs, x0: reference.ties(xs, x0, 0.4, 1.5),
    ),
    "model_stock": (merging.model_stock, reference.model_stock),
    "slerp": (
        lambda ms, b: merging.slerp(ms[0], ms[1], 0.3),
        lambda xs, x0: reference.slerp(xs[0], xs[1], 0.3),
    ),
    "karcher": (
        lambda ms, b: merging.karcher(ms, W),
        lambda xs, x0: reference.karcher(xs, W),
    ),
    "variance_corrected": (
        lambda ms, b: merging.variance_corrected(ms, W),
        lambda xs, x0: reference.variance_corrected(xs, W),
    ),
    "fisher": (
        lambda ms, b: merging.fisher(ms, [square(m) for m in ms], W),
        lambda xs, x0: reference.fisher(xs, [x**2 for x in xs], W),
    ),
    "gradient_matching": (
        lambda ms, b: merging.gradient_matching(
            ms, [square(m) for m in ms], b, square(b), 0.6, 0.1
        ),
        lambda xs, x0: reference.gradient_matching(
            xs, [x**2 for x in xs], x0, x0**2, 0.6, 0.1
        ),
    ),
}
COMPILED = {name: jax.jit(ours) for name, (ours, _) in CASES.items()}
every_case = pytest.mark.parametrize("case", CASES)


def square(tree):
    return jax.tree.map(lambda x: x**2, tree)


def models_and_base(seed, dtype=jnp.float32, n=3):
    rng = np.random.default_rng(seed)
    base = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    models = [
        {name: x + rng.normal(size=x.shape) for name, x in base.items()}
        for _ in range(n)
    ]
    cast = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, dtype))
    return [cast(m) for m in models], cast(base)


def float64(models, base, name):
    flat = lambda tree: np.asarray(tree[name], np.float64).reshape(-1)
    return [flat(m) for m in models], flat(base)


@every_case
@hypothesis.given(st.integers(0, 10**6))
def test_equals_the_reference(case, seed):
    _, theirs = CASES[case]
    models, base = models_and_base(seed)
    found = COMPILED[case](models, base)
    for name, shape in SHAPES.items():
        wanted = theirs(*float64(models, base, name)).reshape(shape)
        np.testing.assert_allclose(found[name], wanted, rtol=2e-4, atol=2e-5)


@every_case
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_rounded_once(case, dtype):
    ours, theirs = CASES[case]
    models, base = models_and_base(3, dtype)
    if case in ("fisher", "gradient_matching"):
        pytest.skip("their curvature is squared in the low precision of this test")
    found = ours(models, base)
    for name, shape in SHAPES.items():
        assert found[name].dtype == dtype
        wanted = theirs(*float64(models, base, name)).reshape(shape)
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.float64(found[name]), wanted, rtol=eps, atol=eps)


@every_case
def test_jit_leaves_alone_and_other_leaves(case):
    """Compiled; leaf by leaf as within the whole; integers come first."""
    ours, _ = CASES[case]
    models, base = models_and_base(4)
    found = ours(models, base)
    chex.assert_trees_all_close(
        jax.jit(ours)(models, base), found, rtol=1e-5, atol=1e-6
    )
    for name in SHAPES:
        alone = ours([m[name] for m in models], base[name])
        np.testing.assert_allclose(alone, found[name], rtol=1e-6)
    counted = [m | {"steps": jnp.asarray(t)} for t, m in enumerate(models)]
    whole = ours(counted, base | {"steps": jnp.asarray(9)})
    assert whole["steps"] == (9 if case == "wise_ft" else 0)
    chex.assert_trees_all_close({k: whole[k] for k in SHAPES}, found, rtol=1e-6)


@every_case
def test_a_shared_mask_is_kept(case):
    ours, _ = CASES[case]
    models, base = models_and_base(5)
    mask = {
        name: np.arange(np.prod(s)).reshape(s) % 3 > 0 for name, s in SHAPES.items()
    }
    prune = lambda tree: jax.tree.map(lambda x, keep: jnp.where(keep, x, 0), tree, mask)
    found = ours([prune(m) for m in models], prune(base))
    for name, keep in mask.items():
        np.testing.assert_array_equal(np.asarray(found[name])[~keep], 0)
        assert (np.asarray(found[name])[keep] != 0).any()


@every_case
def test_one_model_many_times_is_that_model(case):
    if case in ("wise_ft", "task_arithmetic", "ties", "gradient_matching", "fisher"):
        pytest.skip("moves from the base by a scale of its own")
    models, base = models_and_base(6)
    found = CASES[case][0]([models[0]] * 3, base)
    chex.assert_trees_all_close(found, models[0], rtol=1e-5, atol=1e-6)


@every_case
@pytest.mark.parametrize("scale", [1e-30, 1e15])
def test_scale(case, scale):
    if case in ("fisher", "gradient_matching"):
        pytest.skip("squares of these leave float32 in the test, not in the merge")
    models, base = models_and_base(7)
    big = functools.partial(jax.tree.map, lambda x: x * scale)
    found = COMPILED[case]([big(m) for m in models], big(base))
    wanted = big(COMPILED[case](models, base))
    chex.assert_trees_all_close(found, wanted, rtol=1e-4, atol=1e-5 * scale)


@every_case
@pytest.mark.parametrize("shape", [(), (0, 3), (1,)])
def test_scalars_and_empty_leaves(case, shape):
    models = [{"x": jnp.full(shape, v)} for v in (1.0, 2.0, 4.0)]
    found = CASES[case][0](models, {"x": jnp.full(shape, 0.5)})
    assert found["x"].shape == shape
    assert np.isfinite(found["x"]).all()


@every_case
def test_sharded(case):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("d"))
    rng = np.random.default_rng(8)
    trees = [{"w": np.float32(rng.normal(size=(16, 3)))} for _ in range(4)]
    plain = [jax.tree.map(jnp.asarray, t) for t in trees]
    spread = [jax.device_put(t, rows) for t in trees]
    merge = jax.jit(CASES[case][0])
    found, wanted = merge(spread[:3], spread[3]), merge(plain[:3], plain[3])
    chex.assert_trees_all_close(found, wanted, rtol=1e-4, atol=1e-5)


def pick(*values):
    return lambda rng, shape: rng.choice(np.float32(values), size=shape)


ODD = {
    "huge": pick(-1e38, 5e37, 1e38),
    "large": pick(-1e30, 2e30, 1e30),
    "tiny": pick(-1e-30, 2e-30, 1e-30),
    "denormal": pick(-1e-45, 0, 1e-45),
    "zero": pick(0.0),
    "signs": pick(-1.0, 1.0),
    "mixed": pick(-1e30, 1e-30, 0.0, 1.0),
}


@every_case
@pytest.mark.parametrize("values", ODD)
def test_finite_models_give_finite_ones(case, values):
    """Outside jit as within; never beyond what the models and a scale span."""
    merge = CASES[case][0]
    if case in ("fisher", "gradient_matching"):  # squares would not be finite
        merge = CURVED[case]
    rng = np.random.default_rng(13)
    for _ in range(5):
        shapes = {"one": (1,), "two": (2,), "many": (20,)}
        trees = [{k: ODD[values](rng, s) for k, s in shapes.items()} for _ in range(4)]
        # Model 0 and its opposite: neither angle nor mean direction.
        trees[1] = {k: -x for k, x in trees[0].items()}
        found = merge(trees[:3], trees[3])
        for name in shapes:
            most = max(np.abs(np.float64(t[name])).max() for t in trees)
            assert (np.abs(np.float64(found[name])) <= 7 * most).all(), (
                name,
                trees,
                found,
            )


CURVED = {
    "fisher": lambda ms, b: merging.fisher(ms, [size(m) for m in ms], W),
    "gradient_matching": lambda ms, b: merging.gradient_matching(
        ms, [size(m) for m in ms], b, size(b), 0.6
    ),
}


def size(tree):
    return jax.tree.map(abs, tree)


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e38])
def test_angles_do_not_depend_on_the_size(scale):
    models = [jnp.array([0.4, 0.0]), jnp.array([0.0, 0.4]), jnp.array([0.4, 0.2])]
    base, big = jnp.zeros(2), [x * scale for x in models]
    for merge in (
        lambda xs: merging.slerp(xs[0], xs[1], 0.3),
        merging.karcher,
        merging.variance_corrected,
        lambda xs: merging.model_stock(xs, base),
        lambda xs: merging.ties(xs, base, 1.0),
    ):
        found = np.float64(merge(big)) / scale
        np.testing.assert_allclose(found, merge(models), rtol=1e-5)


# --- identities ---


def test_special_cases_of_each_other():
    models, base = models_and_base(9)
    zeros, ones = jax.tree.map(jnp.zeros_like, base), jax.tree.map(jnp.ones_like, base)
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)
    uniform = merging.uniform(models)
    close(merging.task_arithmetic(models, base, 1 / 3), uniform)
    close(merging.fisher(models, [ones] * 3), uniform)
    close(merging.fisher(models, [zeros] * 3), uniform)
    # Gradient matching without curvature of its own is task arithmetic.
    close(
        merging.gradient_matching(models, [zeros] * 3, base, ones, 0.7),
        merging.task_arithmetic(models, base, 0.7),
    )
    # Without a base Hessian, at scale 1, it is Fisher merging.
    hs = [square(m) for m in models]
    close(
        merging.gradient_matching(models, hs, base, zeros), merging.fisher(models, hs)
    )
    close(merging.gradient_matching(models, [zeros] * 3, base, zeros), base)
    close(merging.wise_ft(base, models[0], 0.0), base)
    close(merging.wise_ft(base, models[0], 1.0), models[0])
    close(merging.slerp(models[0], models[1], 0.0), models[0])
    close(merging.slerp(models[0], models[1], 1.0), models[1])
    assert merging.diwa is merging.greedy_soup


def test_model_stock_at_its_ends():
    """Orthogonal models know nothing: the base; parallel ones all: their mean."""
    base = jnp.zeros(3)
    across = [jnp.array([1.0, 0, 0]), jnp.array([0, 1.0, 0])]
    np.testing.assert_allclose(merging.model_stock(across, base), base, atol=1e-7)
    along = [jnp.array([1.0, 0, 0]), jnp.array([3.0, 0, 0])]
    np.testing.assert_allclose(merging.model_stock(along, base), [2, 0, 0], rtol=1e-6)
    against = [jnp.array([1.0, 0, 0]), jnp.array([-1.0, 0.5, 0])]
    np.testing.assert_allclose(merging.model_stock(against, base), base, atol=1e-7)
    # cos 60 degrees = 1/2: t = 2/3 of two models, by the paper's equation 3.
    two = [jnp.array([1.0, 0]), jnp.array([0.5, 0.75**0.5])]
    found = merging.model_stock(two, jnp.zeros(2))
    np.testing.assert_allclose(found, 2 / 3 * (two[0] + two[1]) / 2, rtol=1e-5)


def test_slerp_near_parallel_and_opposite_is_a_line():
    a = jnp.array([1.0, 2.0, 3.0])
    for b in (a, 2 * a, a + 1e-6, -a, jnp.zeros(3)):
        np.testing.assert_allclose(
            merging.slerp(a, b, 0.25), 0.75 * a + 0.25 * b, rtol=1e-5, atol=1e-6
        )


def test_karcher_of_two_is_the_middle_of_their_arc():
    (a, b, _), _ = models_and_base(10)
    unit = lambda tree: jax.tree.map(lambda x: x / jnp.linalg.norm(x), tree)
    found = merging.karcher([unit(a), unit(b)])
    chex.assert_trees_all_close(found, merging.slerp(unit(a), unit(b), 0.5), rtol=1e-4)
    zero = jnp.zeros(3)
    np.testing.assert_array_equal(merging.karcher([zero, zero]), zero)


def test_karcher_without_a_mean_direction_is_the_weighted_mean():
    a, b = jnp.array([3.0, 4.0]), jnp.array([1.0, -2.0])
    for models, w in (
        ([a, -a], [0.5, 0.5]),  # they cancel
        ([a, -2 * a], [0.7, 0.3]),  # one is opposite to the mean of all
        ([a, a, -a], W),
        ([a, -a, b, -b], [0.25] * 4),
        ([x[:1] for x in (a, b, -a)], W),  # one element: signs are all there is
        ([x[:1] for x in (a, b, a)], W),
    ):
        wanted = merging.weighted(models, w)
        for karcher in (merging.karcher, jax.jit(merging.karcher)):
            np.testing.assert_allclose(karcher(models, w), wanted, atol=1e-6)
    # As slerp has it, for which opposite models have no arc either.
    found = merging.karcher([a, -a], [0.7, 0.3])
    np.testing.assert_allclose(found, merging.slerp(a, -a, 0.3), rtol=1e-6)
    # Two that cancel leave the mean of a third where it is.
    u, v = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    np.testing.assert_allclose(merging.karcher([u, -u, v]), v, atol=1e-6)


@pytest.mark.parametrize("values", ["near opposite", "near parallel"])
@hypothesis.given(st.floats(1e-7, 0.5))
def test_karcher_of_unit_vectors_stays_within_the_ball(values, angle):
    turn = np.pi - angle if values == "near opposite" else angle
    a, b = jnp.array([1.0, 0.0]), jnp.array([np.cos(turn), np.sin(turn)], jnp.float32)
    for w in ([0.5, 0.5], [0.7, 0.3]):
        assert float(_numerics.norm(merging.karcher([a, b], w))) < 1.03


def test_a_mean_that_is_only_rounding_is_not_blown_up():
    x = jnp.asarray(np.random.default_rng(0).normal(size=50), jnp.float32)
    found = merging.variance_corrected([x, -x, -x], [0.5, 0.3, 0.2])
    np.testing.assert_allclose(found, 0, atol=1e-6)
    constant = [jnp.full(7, v) for v in (0.1, 0.3, 0.7)]
    found = merging.variance_corrected(constant, W)
    np.testing.assert_allclose(found, merging.weighted(constant, W), rtol=1e-6)


def kept_by_ties(models, base, density, scope, jit):
    """How many elements of each model stay, and which, when it is merged alone."""
    merge = lambda m, b: merging.ties([m], b, density, scope=scope)
    merge = jax.jit(merge) if jit else merge
    join = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    return [join(merge(m, base)) != join(base) for m in models]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("scope", ["leaf", "global"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_ties_keeps_exactly_its_share(dtype, scope, jit):
    """However many magnitudes are equal, of bf16 or of signs; the first ones stay."""
    rng = np.random.default_rng(14)
    shapes = {"a": (40, 5), "b": (7,), "c": (1,), "d": (0, 3)}
    base = {k: jnp.zeros(s, dtype) for k, s in shapes.items()}
    coarse = lambda s: jnp.asarray(np.sign(rng.normal(size=s)) * rng.integers(1, 4, s))
    models = [
        {k: coarse(s).astype(dtype) for k, s in shapes.items()},
        {k: jnp.ones(s, dtype) for k, s in shapes.items()},
        {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()},
    ]
    kept = kept_by_ties(models, base, 0.2, scope, jit)
    wanted = 40 + 1 + 1 if scope == "leaf" else round(0.2 * 208)
    for model, stays in zip(models, kept, strict=True):
        assert stays.sum() == wanted
        size = np.concatenate([np.abs(np.float64(x)).ravel() for x in model.values()])
        parts = [slice(0, 200), slice(200, 207), slice(207, 208)]
        for part in parts if scope == "leaf" else [slice(None)]:
            order = np.argsort(-size[part], kind="stable")
            first = order[: stays[part].sum()]
            np.testing.assert_array_equal(np.flatnonzero(stays[part]), np.sort(first))


def test_ties_with_64_bits():
    with jax.enable_x64(True):
        x = jnp.asarray([1.0, 1 + 1e-12, 1 - 1e-12, -1 - 1e-12, 0.5])
        (kept,) = kept_by_ties([x], jnp.zeros(5), 0.4, "leaf", jit=False)
    np.testing.assert_array_equal(kept, [False, True, False, True, False])


def test_ties_compares_globally_as_the_authors_do():
    """All elements in one vector, as the authors' code has it."""
    models, base = models_and_base(11)
    found = merging.ties(models, base, 0.3, scope="global")
    join = lambda t: np.concatenate([np.ravel(t[k]) for k in SHAPES]).astype(np.float64)
    wanted = reference.ties([join(m) for m in models], join(base), 0.3, 1.0)
    np.testing.assert_allclose(join(found), wanted, rtol=1e-5, atol=1e-6)
    assert not np.allclose(join(merging.ties(models, base, 0.3)), wanted)


def test_ties_of_everything_that_agrees_is_task_arithmetic():
    rng = np.random.default_rng(0)
    models = [jnp.asarray(1 + rng.random(9)) for _ in range(3)]
    found = merging.ties(models, jnp.ones(9), 1.0)
    wanted = merging.task_arithmetic(models, jnp.ones(9), 1 / 3)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_dare():
    base, model = {"a": jnp.ones(4000), "b": jnp.zeros(9)}, {"a": jnp.full(4000, 3.0)}
    model["b"] = jnp.ones(9)
    first, second = merging.dare([model, model], base, 0.25, key=0)
    assert set(np.unique(first["a"])) == {1.0, 9.0}  # 1 + 2/0.25
    assert abs(float(jnp.mean(first["a"] == 9.0)) - 0.25) < 0.03
    assert not np.array_equal(first["a"], second["a"])
    for key in (jax.random.key(0), jax.random.PRNGKey(0), np.int64(0), jnp.array(0)):
        again = merging.dare([model], base, 0.25, key=key)[0]
        chex.assert_trees_all_equal(again, first)
    # A leaf alone, by its name, meets the same fate.
    alone = merging.dare([{"a": model["a"]}], {"a": base["a"]}, 0.25, key=0)[0]
    np.testing.assert_array_equal(alone["a"], first["a"])
    whole = merging.dare([model], base, 1.0, key=3)[0]
    chex.assert_trees_all_close(whole, model)


def test_greedy_soup_adds_what_helps():
    target = jnp.array([1.0, 1.0])
    points = [[1.0, 0.0], [0.0, 3.0], [1.2, 2.0], [5.0, 5.0]]
    seen = []

    def score(x):
        seen.append(x)
        return -jnp.sum((x - target) ** 2)

    soup = merging.greedy_soup([jnp.array(p) for p in points], score)
    # Scores -1, -5, -1.04, -32; (0 + 2) is nearly the target, the others harm.
    assert soup.chosen == [0, 2]
    np.testing.assert_allclose(soup.params, [1.1, 1.0], rtol=1e-6)
    np.testing.assert_allclose(soup.score, -0.01, rtol=1e-4)
    assert len(seen) == 4 + 3
    nan = merging.greedy_soup([jnp.array(0.0), jnp.array(1.0)], lambda x: jnp.log(x))
    assert nan.chosen == [1]


def test_variance_corrected_keeps_the_variance():
    models, _ = models_and_base(12)
    found = merging.variance_corrected(models)
    for name in SHAPES:
        wanted = np.mean([np.var(m[name]) for m in models])
        np.testing.assert_allclose(np.var(found[name]), wanted, rtol=1e-5)
    constant = merging.variance_corrected([jnp.ones(3), jnp.full(3, 2.0)])
    np.testing.assert_allclose(constant, 1.5)


def test_dawin():
    logits = [jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([[0.0, 0.0], [0.0, 9.0]])]
    found = merging.dawin(logits)
    assert found.shape == (2, 2)
    np.testing.assert_allclose(found.sum(axis=0), 1, rtol=1e-6)

    def entropy(x):
        p = np.exp(x) / np.exp(x).sum()
        return -(p * np.log(p)).sum()

    h = np.array([[entropy(np.float64(row)) for row in x] for x in logits])
    np.testing.assert_allclose(found, np.exp(-h) / np.exp(-h).sum(axis=0), rtol=1e-5)
    sure = merging.dawin(
        [jnp.array([jnp.inf * 0 + 1e4, -1e4]), jnp.array([0.0, -jnp.inf])]
    )
    np.testing.assert_allclose(sure, [0.5, 0.5])
    # Per sample, under vmap.
    models = [jnp.array(1.0), jnp.array(3.0)]
    each = jax.vmap(lambda w: merging.weighted(models, w))(found.T)
    np.testing.assert_allclose(each, found.T @ np.array([1.0, 3.0]), rtol=1e-6)


@pytest.mark.parametrize("batch", [1, 4, 7, 50])
def test_squared_gradients(batch):
    rng = np.random.default_rng(0)
    x, y = np.float32(rng.normal(size=(7, 3))), np.float32(rng.normal(size=7))
    params = {"w": jnp.ones(3), "b": jnp.zeros([]), "n": jnp.arange(2)}

    def loss(p, example):
        a, b = example
        return (a @ p["w"] + p["b"] - b) ** 2 / 2

    found = jax.jit(lambda p: merging.squared_gradients(loss, p, (x, y), batch=batch))(
        params
    )
    residual = x.astype(np.float64).sum(axis=1) - y
    wanted = ((residual[:, None] * x) ** 2).mean(axis=0)
    np.testing.assert_allclose(found["w"], wanted, rtol=1e-5)
    np.testing.assert_allclose(found["b"], (residual**2).mean(), rtol=1e-5)
    np.testing.assert_array_equal(found["n"], 0)


def test_squared_gradients_hold_no_more_than_a_batch():
    examples, params = jnp.ones((256, 4)), jnp.ones((4, 5000))

    def memory(batch):
        found = lambda p: merging.squared_gradients(
            lambda p, e: jnp.sum((e @ p) ** 2), p, examples, batch=batch
        )
        stats = jax.jit(found).lower(params).compile().memory_analysis()
        return stats.temp_size_in_bytes

    one = params.size * 4
    assert memory(4) < 16 * one
    assert memory(256) > 200 * one


@pytest.mark.parametrize("value", [-1.0, np.inf, np.nan])
def test_curvature_that_is_none_is_refused(value):
    """Outside jit; within it, the weighted mean, and the base."""
    x, y = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([5.0, 4.0])}
    good, bad = {"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([1.0, value])}
    match = r"must be finite and not negative; this does not hold at \['w'\]\.$"
    fisher = lambda: merging.fisher([x, y], [bad, good], [0.25, 0.75])
    matching = lambda: merging.gradient_matching([x, y], [bad, bad], x, good)
    for call in (fisher, matching):
        with pytest.raises(ValueError, match=match):
            call()
    if value == -1:  # a sum that is, of matrices that are not
        with pytest.raises(ValueError, match=match):
            merging.fisher([x, y], [good, good | {"w": jnp.array([1.0, 9.0])}], [2, -1])
    if value != -1:
        np.testing.assert_allclose(jax.jit(fisher)()["w"], [4, 3.5])
        np.testing.assert_allclose(jax.jit(matching)()["w"][1], 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, b: merging.uniform([]), "there are no models"),
        (
            lambda a, b: merging.uniform([a, a | {"v": 1j * a["v"]}]),
            r"tree 1 is complex64 at \['v'\]",
        ),
        (lambda a, b: merging.greedy_soup([], lambda x: 0), "there are no models"),
        (lambda a, b: merging.weighted([a, a], [1.0]), "as many weights"),
        (
            lambda a, b: merging.weighted([a, a], [1.0, 1.0]),
            "sum to one, got a sum of 2",
        ),
        (lambda a, b: merging.weighted([a, a], [np.nan, 1.0]), "sum to one"),
        (lambda a, b: merging.uniform([a, b]), r"tree 1 has shape \(3,\) at \['v'\]"),
        (
            lambda a, b: merging.uniform([a, {"u": a["u"]}]),
            r"tree 1 has no leaf \['v'\]",
        ),
        (
            lambda a, b: merging.uniform([{"u": a["u"]}, a]),
            r"has a leaf \['v'\], which the first tree does",
        ),
        (lambda a, b: merging.uniform([(jnp.ones(1),), [jnp.ones(1)]]), "structure"),
        (lambda a, b: merging.task_arithmetic([a], b), r"at \['v'\]"),
        (lambda a, b: merging.uniform([a["u"], a]), "1 is not a single leaf, as the f"),
        (
            lambda a, b: merging.uniform([a, a["u"]]),
            "1 is a single leaf, which the first t",
        ),
        (
            lambda a, b: merging.uniform([a["u"], b["v"]]),
            r"has shape \(3,\) at the only leaf, where the first tree has \(2,\)",
        ),
        (
            lambda a, b: merging.uniform([a["u"], 1j * a["u"]]),
            "tree 1 is complex64 at the only leaf",
        ),
        (
            lambda a, b: merging.fisher([a["u"]], [-a["u"]]),
            r"this does not hold at the only leaf\.$",
        ),
        (lambda a, b: merging.model_stock([a], a), "at least two models"),
        (lambda a, b: merging.ties([a], a, 0.0), "density must lie in"),
        (lambda a, b: merging.ties([a], a, 0.5, scope="x"), "scope must be"),
        (lambda a, b: merging.dare([a], a, 1.5, 0), "density must lie in"),
        (lambda a, b: merging.fisher([a, a], [a]), "as many fishers"),
        (lambda a, b: merging.gradient_matching([a], [], a, a), "as many hessians"),
        (lambda a, b: merging.gradient_matching([a], [a], a, a, 1, -1), "damping"),
        (lambda a, b: merging.karcher([a, a], [2.0, -1.0]), "must not be negative"),
        (lambda a, b: merging.dawin([jnp.ones(2), jnp.ones(3)]), "arrays of one shape"),
        (lambda a, b: merging.greedy_soup([a], lambda x: np.nan), "no score is finite"),
        (
            lambda a, b: merging.squared_gradients(lambda p, e: 0.0, a, (jnp.ones(0),)),
            "arrays of one length",
        ),
        (
            lambda a, b: merging.squared_gradients(lambda p, e: 0.0, a, [1.0]),
            "arrays of one length",
        ),
    ],
)
def test_bad_input(call, message):
    a = {"u": jnp.ones(2), "v": jnp.ones(2)}
    with pytest.raises(ValueError, match=message):
        call(a, {"u": jnp.ones(2), "v": jnp.ones(3)})


class Chain(nn.Module):
    """Convolution, normalisation, convolution, flattening, two dense layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.relu(nn.Conv(5, (3, 3), strides=2)(x))
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(8)(x))
        return nn.Dense(3)(x)


CHAIN = [("Conv_0", "BatchNorm_0"), "Conv_1", "Dense_0", "Dense_1"]


def chain(seed, dtype=jnp.float32):
    """A network with everything in it random, statistics included."""
    net = Chain()
    images = jax.random.normal(jax.random.key(0), (4, 6, 6, 2))
    tree = net.init(jax.random.key(seed), images)
    rng = np.random.default_rng(seed)
    fill = lambda x: jnp.asarray(np.abs(rng.normal(size=x.shape)) + 0.1, dtype)
    return jax.tree.map(fill, tree), lambda tree: net.apply(tree, images)


def shuffled(tree, seed):
    """The same network with its channels in another order, written out by hand."""
    rng = np.random.default_rng(seed)
    p, q, r = rng.permutation(6), rng.permutation(5), rng.permutation(8)
    flat = np.concatenate([pixel * 5 + q for pixel in range(9)])
    w, statistics = tree["params"], tree["batch_stats"]["BatchNorm_0"]
    one = {"kernel": w["Conv_0"]["kernel"][..., p], "bias": w["Conv_0"]["bias"][p]}
    norm = {k: v[p] for k, v in w["BatchNorm_0"].items()}
    two = {
        "kernel": w["Conv_1"]["kernel"][:, :, p][..., q],
        "bias": w["Conv_1"]["bias"][q],
    }
    three = {
        "kernel": w["Dense_0"]["kernel"][flat][:, r],
        "bias": w["Dense_0"]["bias"][r],
    }
    four = {"kernel": w["Dense_1"]["kernel"][r], "bias": w["Dense_1"]["bias"]}
    layers = ["Conv_0", "BatchNorm_0", "Conv_1", "Dense_0", "Dense_1"]
    return {
        "params": dict(zip(layers, [one, norm, two, three, four], strict=True)),
        "batch_stats": {"BatchNorm_0": {k: v[p] for k, v in statistics.items()}},
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_permuted_channels_are_found_again(dtype):
    tree, _ = chain(1, dtype)
    other = shuffled(tree, 2)
    assert not np.array_equal(
        other["params"]["Conv_0"]["bias"], tree["params"]["Conv_0"]["bias"]
    )
    chex.assert_trees_all_equal(merging.permute(other, tree, CHAIN), tree)
    chex.assert_trees_all_equal(merging.permute(tree, tree, CHAIN), tree)


def test_permuting_keeps_the_function_and_comes_nearer():
    a, apply = chain(1)
    b, _ = chain(7)
    found = merging.permute(b, a, CHAIN)
    np.testing.assert_allclose(apply(found), apply(b), rtol=1e-5)
    distance = lambda x: sum(
        float(jnp.sum((u - v) ** 2))
        for u, v in zip(jax.tree.leaves(x), jax.tree.leaves(a), strict=True)
    )
    assert distance(found) < 0.97 * distance(b)
    # No permutation of the channels of one layer alone comes nearer.
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.permutation(8)
        moved = jax.tree.map(lambda x: x, found)
        moved["params"]["Dense_0"] = {
            k: v[..., p] for k, v in found["params"]["Dense_0"].items()
        }
        last = found["params"]["Dense_1"]
        moved["params"]["Dense_1"] = last | {"kernel": last["kernel"][p]}
        assert distance(moved) >= distance(found) - 1e-4


def test_channels_of_every_pixel_are_told_apart():
    """By what comes after flattening alone: all else is equal."""
    rng = np.random.default_rng(4)
    after = rng.normal(size=(3 * 4, 2))
    order = np.array([2, 0, 3, 1])
    other = after.reshape(3, 4, 2)[:, order].reshape(12, 2)
    a, b = ({"in": np.ones((2, 4)), "out": x} for x in (after, other))
    found = merging.permute(b, a, ["in", "out"])
    np.testing.assert_array_equal(found["out"], np.float32(after))


@pytest.mark.parametrize("seed", [0, 1])
def test_matching_goes_on_until_no_layer_gains(seed):
    rng = np.random.default_rng(seed)
    widths = [3, 12, 12, 12, 12, 2]
    layers = [f"layer_{i}" for i in range(5)]
    a, b = (
        {
            name: {"kernel": rng.normal(size=shape), "bias": rng.normal(size=shape[1])}
            for name, shape in zip(layers, itertools.pairwise(widths), strict=True)
        }
        for _ in range(2)
    )
    distance = lambda x: float(_numerics.norm(jax.tree.map(jnp.subtract, x, a)))
    once = merging.permute(b, a, layers, max_sweeps=1)
    found = merging.permute(b, a, layers)
    assert distance(found) < distance(once) < distance(b)
    chex.assert_trees_all_equal(merging.permute(found, a, layers), found)


def test_matching_one_hidden_layer_is_the_best_of_all_orders():
    rng = np.random.default_rng(3)
    a, b = (
        {"in": rng.normal(size=(2, 5)), "out": rng.normal(size=(5, 3))}
        for _ in range(2)
    )
    gain = lambda p: np.sum(a["in"] * b["in"][:, p]) + np.sum(a["out"] * b["out"][p])
    best = max(itertools.permutations(range(5)), key=lambda p: gain(list(p)))
    found = merging.permute(b, a, ["in", "out"])
    np.testing.assert_allclose(found["in"], b["in"][:, list(best)], rtol=1e-6)
    np.testing.assert_allclose(found["out"], b["out"][list(best)], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "layers", "message"),
    [
        ({}, ["in"], "at least two"),
        ({}, ["in", "outs"], r"no leaf has 'outs' in its path: \[\"\['in'\]\""),
        ({"in": jnp.ones((2, 3))}, ["in", "out"], r"\['out'\] takes 4 inputs"),
        ({"bias": jnp.ones(3)}, [("in", "bias"), "out"], "leaves of a layer"),
        ({"in": jnp.full((2, 4), jnp.nan)}, ["in", "out"], r"\['in'\] is not finite"),
    ],
)
def test_bad_chains(change, layers, message):
    tree = {"in": jnp.ones((2, 4)), "out": jnp.ones((4, 3))} | change
    with pytest.raises(ValueError, match=message):
        merging.permute(tree, tree, layers)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_what_dare_drops_is_the_base_exactly(dtype):
    """Otherwise the rounding of narrow models counts in the elections of TIES."""
    base = jnp.asarray(np.random.default_rng(0).normal(size=2000), jnp.float32)
    models = [(base + 0.5).astype(dtype) for _ in range(2)]
    dropped = merging.dare(models, base, 0.5, key=0)
    kept = np.stack(dropped) != np.asarray(base)
    assert 0.45 < kept.mean() < 0.55
    assert all(x.dtype == jnp.float32 for x in dropped)
    made = merging.ties(dropped, base, 1.0) - base
    sizes = np.where(kept.any(0), 1.0, 0.0)
    np.testing.assert_allclose(made, sizes, atol=0.05)


def test_wise_ft_takes_any_number():
    far = merging.wise_ft(jnp.zeros(2), jnp.ones(2), 1e6)
    np.testing.assert_allclose(far, 1e6, rtol=1e-6)
    near = merging.wise_ft(jnp.zeros(2), jnp.ones(2), 1e17)
    np.testing.assert_allclose(near, 1e17, rtol=1e-6)


@pytest.mark.parametrize(
    "merge",
    [
        merging.uniform,
        merging.variance_corrected,
        lambda models: merging.weighted(models, [1.0]),
        lambda models: merging.greedy_soup(models, lambda x: 1.0),
    ],
)
@pytest.mark.parametrize("models", [jnp.ones(1), {"a": jnp.ones(2)}])
def test_models_are_passed_as_a_list(merge, models):
    with pytest.raises(ValueError, match=r"a list of trees, such as uniform\(\[a, b\]"):
        merge(models)


def test_a_score_is_one_number():
    with pytest.raises(ValueError, match=r"score must .*shape \(2,\); take its mean"):
        merging.greedy_soup([jnp.ones(2), jnp.ones(2)], lambda x: x)
