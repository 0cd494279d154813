"""Robust rules stay near the good rows, whatever a minority of rows is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_aggregation as reference
from attacks import attacks

import optax_avg as oa

N, D = 11, 6
TINY = np.finfo(np.float32).tiny


@functools.cache
def rows():
    """Attacks on 3 to 11 rows of 1 to 6 dimensions, NaN and zero elsewhere."""
    sets, bads, counts = [], [], []
    for n in range(3, N + 1):
        for d in range(1, D + 1):
            v, bad = attacks(D * n + d, 50, n, d)
            absent, none = N - n, ((0, 0), (0, 0), (0, D - d))
            beside = ((0, 0), (0, absent), (0, 0))
            sets.append(np.pad(np.pad(v, none), beside, constant_values=np.nan))
            bads.append(np.pad(bad, beside[:2], constant_values=True))
            counts.append(np.full(len(v), n))
    v, bad, n = np.concatenate(sets), np.concatenate(bads), np.concatenate(counts)
    good = np.where(bad[:, :, None], 0, v.astype(np.float64))
    return v, n, bad.sum(axis=1) - (N - n), np.linalg.norm(good, axis=2).max(axis=1)


# A rule and what it promises for the size of its result: from the number of rows, that
# of bad ones and the largest good row.
def of_median(n, f, most):
    return 2 * (n - f) / (n - 2 * f) * most


def of_coordinates(n, f, most):
    return np.sqrt(D) * most


def of_krum(f):
    # The best has one good row among its neighbours, no farther than its score.
    return lambda n, _, most: (1 + 2 * np.sqrt(N - f - 2)) * most


RULES = {
    "geometric_median": (oa.geometric_median(), of_median),
    "geometric_median_of_wide_nu": (oa.geometric_median(nu=1.0), of_median),
    "median_of_means": (oa.median_of_means(N), of_median),
    "centered_clip": (oa.centered_clip(1.0, 3), lambda n, f, most: most + 1),
    "centered_clip_of_small_tau": (
        oa.centered_clip(1e-30, 3),
        lambda n, f, most: most + 1e-30,
    ),
    "coordinate_median": (oa.coordinate_median(), of_coordinates),
    "trimmed_mean": (oa.trimmed_mean((N - 1) // 2), of_coordinates),
    "one_pass_location": (
        oa.one_pass_location(oa.distances.l2(), 1.0, init="zeros"),
        lambda n, f, most: n + 0 * most,
    ),
    "krum": (oa.krum(4), of_krum(4)),
    "multi_krum": (oa.krum(2, N - 2), of_krum(2)),
}
KRUMS = {"krum": 4, "multi_krum": 2}


@pytest.mark.parametrize("name", RULES)
def test_a_minority_of_rows_does_not_get_far(name):
    tx, bound = RULES[name]
    v, n, f, most = rows()
    if name in KRUMS:
        chosen = (n == N) & (f <= KRUMS[name])
        v, n, f, most = v[chosen], n[chosen], f[chosen], most[chosen]
    state = tx.init(jnp.zeros(D))
    found = jax.jit(jax.vmap(lambda x: tx.update(x, state)[0]))(v)
    size = np.linalg.norm(np.asarray(found, np.float64), axis=1)
    far = ~(size <= bound(n, f, most) * (1 + 1e-5) + D * TINY)
    assert not far.any(), f"{v[far][0]}: {found[far][0]}"


@pytest.mark.parametrize(
    "v",
    [
        [0, 0, 1e32],
        [0, 0, 0, -1.6e8, -1.6e27],
        [1e-30, 1e-30, 1e-30, 3e38, -3e38],
        [-2.0, -2.0, -2.0, 3e38, 1e-45],
        [5e-39, 5e-39, 3e38],
    ],
)
def test_a_majority_of_identical_rows_wins(v):
    v = jnp.asarray(v, jnp.float32)[:, None]
    rules = [oa.geometric_median(), oa.median_of_means(len(v)), oa.coordinate_median()]
    if len(v) == 5:
        rules += [oa.krum(1), oa.krum(1, 3), oa.krum(2)]
    for tx in rules:
        found, _ = jax.jit(tx.update)(v, tx.init(v[0]))
        np.testing.assert_allclose(found, v[0], rtol=1e-6, atol=TINY)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e20])
@pytest.mark.parametrize("far", [1e19, 1e30, 1.5e38])
def test_far_rows_pull_with_their_direction(size, far):
    """Against float64, in which 1e-30 beside 1e38 is no difficulty."""
    rng = np.random.default_rng(0)
    v = size * rng.normal(size=(7, 3))
    v[[1, 4, 5]] = far * np.array([[1.0, 0, 0], [0, 1, 0], [0.6, 0.8, 0]])
    v = np.float32(v)
    nu = np.float32(1e-3 * size)
    tx = oa.geometric_median(nu=nu, num_iters=30)
    found, _ = jax.jit(tx.update)(jnp.asarray(v), tx.init(jnp.zeros(3)))
    wanted = reference.geometric_median(np.float64(v), float(nu), 30)
    np.testing.assert_allclose(found / size, wanted / size, rtol=1e-3, atol=1e-3)
    tx = oa.centered_clip(size, 4)
    found, _ = jax.jit(tx.update)(jnp.asarray(v), tx.init(jnp.zeros(3)))
    wanted = reference.centered_clip(np.float64(v), np.zeros(3), size, 4)
    np.testing.assert_allclose(found / size, wanted / size, rtol=1e-4, atol=1e-4)


def test_multi_krum_of_more_rows_than_are_good():
    with pytest.raises(ValueError, match="at least 6 elements, got 5"):
        oa.krum(1, 5).update(jnp.zeros((5, 2)), oa.krum(1).init(jnp.zeros(2)))


@pytest.mark.parametrize("far", [1e30, 3e38])
def test_flag_of_sizes_far_apart_is_finite(far):
    v = jnp.array([[far, 0.0], [1e-37, 0.0], [0.0, 1.0], [0.0, 0.0]])
    tx = oa.flag_aggregator(2)
    found, _ = jax.jit(tx.update)(v, tx.init(v[0]))
    np.testing.assert_allclose(found, [far / 4, 0], rtol=1e-5, atol=1e-6 * far)


MEDIANS = {
    "geometric_median": oa.geometric_median(),
    "median_of_means": oa.median_of_means(5),
    "krum": oa.krum(1),
    "multi_krum": oa.krum(1, 3),
    "trimmed_mean": oa.trimmed_mean(1),
}
UPDATES = {name: jax.jit(tx.update) for name, tx in MEDIANS.items()}


@pytest.mark.parametrize("narrow", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("bad", [1.0, 9.0, 1e300])
@pytest.mark.parametrize("size", [1.0, 1e-40])
@pytest.mark.parametrize("name", MEDIANS)
def test_identical_rows_of_mixed_width(name, size, bad, narrow):
    """Scales of the wide leaf lie beyond the range of the narrow one."""
    with jax.enable_x64(True):
        wide = jnp.full((5, 3), size, jnp.float64).at[0].mul(bad)
        rows = {"a": wide, "b": jnp.ones((5, 2), narrow) * (size == 1)}
        start = MEDIANS[name].init(jax.tree.map(lambda x: x[0], rows))
        found, state = UPDATES[name](rows, start)
    np.testing.assert_allclose(np.float64(found["a"]), size, rtol=1e-6)
    np.testing.assert_array_equal(np.float64(found["b"]), size == 1)
    assert int(state.left_out) == 0


@pytest.mark.parametrize(("n", "f", "tau"), [(9, 4, 0.01), (21, 10, 0.05), (9, 4, 5.0)])
def test_centered_clip_goes_no_farther_in_many_calls(n, f, tau):
    """Good rows on both sides pull back only where they lie behind the location."""
    good = np.array([[0.0, (-1.0) ** i] for i in range(n - f)])
    rows = jnp.asarray(np.concatenate([good, [[1e3, 0.0]] * f]))
    tx = oa.centered_clip(tau)
    advance = lambda state, _: (tx.update(rows, state)[1], None)
    state, _ = jax.lax.scan(advance, tx.init(jnp.zeros(2)), length=3000)
    size = float(jnp.linalg.norm(state.aggregation_memory))
    q = f / (n - f)
    assert size <= max(1 + tau, (1 - q**2) ** -0.5) + tau


@pytest.mark.parametrize("tx", [oa.geometric_median(), oa.coordinate_median()])
def test_counters_among_the_rows(tx):
    """Leaves that are not floating are those of the first row."""
    rows = {"w": jnp.ones((3, 2)), "n": jnp.arange(6).reshape(3, 2)}
    state = tx.init({"w": jnp.ones(2), "n": jnp.arange(2)})
    assert tx.update(rows, state)[0]["n"].tolist() == [0, 1]
    rows["n"] = np.zeros((3, 2), jax.dtypes.float0)
    found = tx.update(rows, state)[0]["n"]
    assert found.shape == (2,)
    assert found.dtype == jax.dtypes.float0
    with pytest.raises(ValueError, match=r"updates\['n'\] of shape \(\) has no axis 0"):
        tx.update({"w": jnp.ones((3, 2)), "n": jnp.array(3)}, state)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_counters_on_devices():
    """Each device holds one row, and so one counter of the shape of the parameters."""
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((4,), ("d",), axis_types=(auto,))
    tx = oa.geometric_median(axis_name="d")
    rows = {"w": jnp.ones((4, 2)), "n": jnp.zeros((4, 3), int)}

    def local(rows):
        one = jax.tree.map(lambda x: x[0], rows)
        return jax.tree.map(lambda x: x[None], tx.update(one, tx.init(one))[0])

    spec = jax.sharding.PartitionSpec("d")
    found = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )(rows)
    assert found["n"].shape == (4, 3)
