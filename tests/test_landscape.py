"""Curvature, sharpness and barriers against dense matrices and hand-made numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_sharpness as ref
from sharpness_cases import flat, loss_of, tree_of
from test_sharpness import start

from optax_avg import landscape

KEY = jax.random.key(0)


def problem(dtype=np.float32):
    parts = ref.problem()
    return loss_of(*parts), start().astype(dtype), ref.hessian(start(), *parts)


def test_hessian_product_is_that_of_the_dense_hessian():
    loss, x, dense = problem()
    v = np.random.default_rng(3).normal(size=ref.SIZE).astype(np.float32)
    found = landscape.hessian_product(loss, tree_of(x), tree_of(v))
    np.testing.assert_allclose(flat(found), dense @ v, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 3, ref.SIZE])
def test_top_eigenvalues_of_the_dense_hessian(k):
    loss, x, dense = problem()
    find = jax.jit(
        lambda p: landscape.top_eigenvalues(loss, p, KEY, k=k, num_iters=ref.SIZE)
    )
    wanted = np.sort(np.linalg.eigvalsh(dense))[::-1][:k]
    np.testing.assert_allclose(find(tree_of(x)), wanted, rtol=1e-4, atol=1e-4)


def test_lanczos_goes_on_past_an_invariant_subspace():
    """The identity exhausts its Krylov space at once."""
    found = landscape.top_eigenvalues(lambda x: x @ x, jnp.ones(6), KEY, 6, 6)
    np.testing.assert_allclose(found, 2.0, rtol=1e-5)


@functools.cache
def spectrum_of(k, num_iters):
    return jax.jit(
        lambda h, key: landscape.top_eigenvalues(
            lambda x: 0.5 * x @ (h @ x), jnp.zeros(len(h)), key, k, num_iters
        )
    )


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20])
@pytest.mark.parametrize(
    "spectrum", [(3, 3, 1, 1, 2, 2, 2, 0), (5, 5, 0, 0, 0, 0, 0, 0), range(-8, 0)]
)
def test_lanczos_on_spectra_of_any_size_and_multiplicity(spectrum, scale):
    wanted = np.sort(spectrum)[::-1].astype(float)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    for basis in (np.eye(8), turn):
        h = jnp.asarray(scale * (basis * wanted) @ basis.T, jnp.float32)
        found = np.asarray(spectrum_of(8, 8)(h, KEY), float) / scale
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_repeated_eigenvalue_may_be_found_once_before_the_end():
    """What the docstring says: the copy of 50 is missing, not wrong."""
    diagonal = jnp.concatenate([jnp.array([50.0, 50.0, 40.0]), jnp.linspace(0, 9, 61)])
    few = spectrum_of(2, 8)(jnp.diag(diagonal), KEY)
    np.testing.assert_allclose(few, [50.0, 40.0], rtol=1e-4)
    all_of_them = spectrum_of(3, 64)(jnp.diag(diagonal), KEY)
    np.testing.assert_allclose(all_of_them, [50.0, 50.0, 40.0], rtol=1e-4)


@jax.custom_vjp
def only_reverse(x):
    return jnp.sum(x**2)


only_reverse.defvjp(lambda x: (only_reverse(x), x), lambda x, g: (2 * g * x,))


MEASURES = {
    "hessian_product": lambda loss, x: landscape.hessian_product(loss, x, x),
    "gradient_norm": lambda loss, x: landscape.gradient_norm_in_ball(loss, x),
    "eigenvalues": lambda loss, x: landscape.top_eigenvalues(loss, x, KEY, num_iters=2),
    "trace": lambda loss, x: landscape.hessian_trace(loss, x, KEY, 2),
    "sharpness": landscape.sharpness,
}


@pytest.mark.parametrize("name", ["hessian_product", "gradient_norm"])
def test_error_says_what_hessian_products_need(name):
    with pytest.raises(TypeError, match=r"fwd of a jax\.custom_vjp.*jax\.custom_jvp"):
        MEASURES[name](only_reverse, jnp.ones(3))


@pytest.mark.parametrize("name", MEASURES)
def test_complex_leaves_are_refused(name):
    with pytest.raises(ValueError, match=r"takes real parameters"):
        MEASURES[name](lambda x: jnp.sum(jnp.abs(x) ** 2), jnp.ones(3, jnp.complex64))


def test_other_type_errors_stay_what_they_are():
    with pytest.raises(TypeError, match="unsupported operand"):
        landscape.hessian_product(lambda x: x @ x + "a", jnp.ones(3), jnp.ones(3))


def test_lanczos_on_a_large_diagonal():
    """Converges to the top of a spectrum long before it has seen all of it."""
    diagonal = jnp.concatenate([jnp.array([50.0, 40.0]), jnp.linspace(0, 10, 2000)])
    found = landscape.top_eigenvalues(
        lambda x: 0.5 * jnp.sum(diagonal * x**2), jnp.ones(2002), KEY, 2, 30
    )
    np.testing.assert_allclose(found, [50.0, 40.0], rtol=1e-4)


def test_trace_within_its_error():
    loss, x, dense = problem()
    trace, error = jax.jit(
        lambda p: landscape.hessian_trace(loss, p, KEY, num_samples=400)
    )(tree_of(x))
    assert abs(float(trace) - np.trace(dense)) < 4 * float(error)
    off_diagonal = dense - np.diag(np.diag(dense))
    wanted = np.sqrt(2 * np.sum(off_diagonal**2) / 400)
    np.testing.assert_allclose(error, wanted, rtol=0.25)


def test_sharpness_by_hand():
    loss, x, _ = problem()
    g = ref.gradient(x.astype(float), *ref.problem())
    moved = tree_of((x + 0.25 * ref.unit(g)).astype(np.float32))
    wanted = float(loss(moved) - loss(tree_of(x)))
    found = landscape.sharpness(loss, tree_of(x), 0.25)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 5])
def test_gradient_norm_in_ball_of_a_quadratic(num_steps):
    """Along an eigenvector by hand; elsewhere below the maximum over the circle."""
    h = jnp.diag(jnp.array([4.0, 1.0]))
    x = jnp.array([0.0, 1.0])
    loss = lambda x: 0.5 * x @ h @ x
    found = float(landscape.gradient_norm_in_ball(loss, x, 0.5, num_steps)) / 0.5
    np.testing.assert_allclose(found, 1.5, rtol=1e-5)
    tilted = jnp.array([0.1, 1.0])
    few = landscape.gradient_norm_in_ball(loss, tilted, 0.5, 1)
    many = landscape.gradient_norm_in_ball(loss, tilted, 0.5, num_steps)
    grid = [
        np.linalg.norm(h @ (tilted + 0.5 * np.array([np.cos(a), np.sin(a)])))
        for a in np.linspace(0, 2 * np.pi, 3601)
    ]
    assert float(few) <= float(many) * (1 + 1e-6)
    assert float(many) <= 0.5 * max(grid) * (1 + 1e-6)


def test_barrier_moves_what_it_is_told():
    a = {"w": jnp.array(-1.0), "b": jnp.array(0.0)}
    b = {"w": jnp.array(1.0), "b": jnp.array(3.0)}
    loss = lambda p: (p["w"] ** 2 - 1) ** 2 + p["b"]
    whole = jax.jit(lambda: landscape.barrier(loss, a, b))()
    np.testing.assert_allclose(whole.barrier, 1.0, rtol=1e-6)
    np.testing.assert_allclose(whole.losses[-1], 3.0)
    part = landscape.barrier(loss, a, b, where=lambda path, x: "b" in str(path))
    np.testing.assert_allclose(part.barrier, 0.0, atol=1e-6)
    np.testing.assert_allclose(part.losses, jnp.linspace(0, 3, 11), rtol=1e-5)
    convex = landscape.barrier(lambda p: p["w"] ** 2, a, b)
    np.testing.assert_allclose(convex.barrier, 0.8**2 - 1, rtol=1e-5)


def test_plane_meets_its_models():
    rng = np.random.default_rng(0)
    models = [
        {"w": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)} for _ in range(3)
    ]
    loss = lambda p: jnp.sum(jnp.sin(p["w"]))
    seen = []
    drawn = landscape.plane(
        loss, models, num=5, margin=0.0, progress=lambda *at: seen.append(at)
    )
    assert seen == [(i + 1, 5) for i in range(5)]
    np.testing.assert_allclose(drawn.models[0], 0)
    distance = float(jnp.linalg.norm(models[1]["w"] - models[2]["w"]))
    gap = np.linalg.norm(drawn.models[1] - drawn.models[2])
    np.testing.assert_allclose(gap, distance, rtol=1e-5)
    corner = jax.tree.map(jnp.zeros_like, models[0])
    right = {"w": corner["w"].at[0, 0].set(2.0)}
    top = {"w": corner["w"].at[2, 1].set(-3.0)}
    drawn = landscape.plane(loss, [corner, right, top], num=3, margin=0.0)
    found = drawn.losses[[0, 0, -1], [0, -1, 0]]
    np.testing.assert_allclose(found, [0, np.sin(2), np.sin(-3)], atol=1e-6)
    with pytest.raises(ValueError, match="on one line"):
        landscape.plane(loss, [models[0], models[1], models[1]])


def test_filter_normalised_directions():
    params = {
        "kernel": 3 * jax.random.normal(KEY, (3, 3, 2, 5)),
        "bias": jnp.ones(5),
    }
    d = landscape.filter_normalised(jax.random.key(1), params)
    size = lambda x: jnp.sqrt(jnp.sum(x**2, axis=(0, 1, 2)))
    np.testing.assert_allclose(size(d["kernel"]), size(params["kernel"]), rtol=1e-5)
    assert not d["bias"].any()
    assert not np.allclose(d["kernel"], params["kernel"])


def test_errors_name_the_leaf():
    a, b = {"w": jnp.ones(2)}, {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"params\['w'\]: \(2,\) and \(3,\)"):
        landscape.barrier(lambda p: 0.0, a, b)
    with pytest.raises(ValueError, match="differ in structure"):
        landscape.barrier(lambda p: 0.0, a, {"v": jnp.ones(2)})
    with pytest.raises(ValueError, match="k must lie between"):
        landscape.top_eigenvalues(lambda p: 0.0, a, KEY, k=5)
    with pytest.raises(ValueError, match="num_samples"):
        landscape.hessian_trace(lambda p: 0.0, a, KEY, num_samples=1)
    with pytest.raises(ValueError, match="three models"):
        landscape.plane(lambda p: 0.0, [a, a])


@pytest.mark.parametrize("sketch", [4, ref.SIZE + 3])
def test_hutch_plus_plus_on_the_dense_hessian(sketch):
    """Exact once the sketch spans all; below, the part outside the basis is sampled."""
    loss, x, dense = problem()
    trace, error = landscape.hessian_trace(
        loss, tree_of(x), KEY, num_samples=200, sketch=sketch
    )
    if sketch > ref.SIZE:
        assert float(error) < 1e-4
    np.testing.assert_allclose(trace, np.trace(dense), atol=4 * float(error) + 1e-3)


def test_hutch_plus_plus_beats_hutchinson_on_a_decaying_spectrum():
    """The same products: error of 64 random rotations of the spectrum 1/i^2."""
    size, spectrum = 64, 1.0 / np.arange(1, 65) ** 2
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))[0]
    h = jnp.asarray(rotation * spectrum @ rotation.T, jnp.float32)
    loss = lambda x: 0.5 * x @ h @ x

    def error(num_samples, sketch):
        find = lambda key: landscape.hessian_trace(
            loss, jnp.ones(size), key, num_samples, sketch=sketch
        )[0]
        found = jax.vmap(find)(jax.random.split(KEY, 64))
        return np.sqrt(np.mean((np.asarray(found) - spectrum.sum()) ** 2))

    assert error(10, 10) < 0.25 * error(30, 0)


def test_m_sharpness_is_the_mean_over_groups():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(12, 3)), jnp.float32)
    loss = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)
    w = jnp.array([0.5, -1.0, 0.25])
    groups = [
        float(landscape.sharpness(lambda w, i=i: loss(w, x[i : i + 4]), w, 0.1))
        for i in (0, 4, 8)
    ]
    found = jax.jit(lambda w: landscape.m_sharpness(loss, w, x, 4, 0.1))(w)
    np.testing.assert_allclose(found, np.mean(groups), rtol=1e-4)
    with pytest.raises(ValueError, match="divide the 12 examples"):
        landscape.m_sharpness(loss, w, x, 5)


def test_slices_by_hand():
    loss = lambda p: jnp.sum(p["a"] ** 2) + p["b"]
    x = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
    d = {"a": jnp.array([1.0, 0.0]), "b": jnp.array(1.0)}
    e = {"a": jnp.array([0.0, 1.0]), "b": jnp.array(0.0)}
    line = landscape.slice_1d(loss, x, d, radius=2.0, num=5)
    wanted = [(1 + t) ** 2 + 4 + 3 + t for t in np.linspace(-2, 2, 5)]
    np.testing.assert_allclose(line.losses, wanted, rtol=1e-6)
    grid = landscape.slice_2d(loss, x, (d, e), radius=2.0, num=5)
    np.testing.assert_allclose(grid.losses[2], wanted, rtol=1e-6)
    np.testing.assert_allclose(
        grid.losses[:, 2], [1 + (2 + t) ** 2 + 3 for t in grid.v], rtol=1e-6
    )
    with pytest.raises(ValueError, match="structure"):
        landscape.slice_1d(loss, x, d["a"])


def test_progress_reaches_the_end():
    """Every long function reports all of its work, under jit too."""
    x, key = jnp.array([1.0, 2.0, 3.0]), KEY
    loss = lambda x: jnp.sum(x**4)
    models = [x, x + jnp.array([1.0, 0, 0]), x + jnp.array([0, 1.0, 0])]
    calls = {
        "eigenvalues": lambda p: landscape.top_eigenvalues(loss, x, key, progress=p),
        "trace": lambda p: landscape.hessian_trace(loss, x, key, 5, progress=p),
        "m": lambda p: landscape.m_sharpness(
            lambda x, y: loss(x * y[0]), x, jnp.ones((4, 3)), 2, progress=p
        ),
        "barrier": lambda p: landscape.barrier(loss, x, 2 * x, 7, progress=p),
        "slice": lambda p: landscape.slice_1d(loss, x, x, num=7, progress=p),
    }
    totals = {"eigenvalues": 3, "trace": 5, "m": 2, "barrier": 7, "slice": 7}
    for name, call in calls.items():
        seen = []
        report = functools.partial(lambda seen, *done: seen.append(done), seen)
        jax.block_until_ready(jax.jit(functools.partial(call, report))())
        jax.effects_barrier()
        n = totals[name]
        assert sorted(seen) == [(i, n) for i in range(1, n + 1)], name
    for call in (
        lambda p: landscape.plane(loss, models, num=4, progress=p),
        lambda p: landscape.slice_2d(loss, x, (x, x), num=4, progress=p),
    ):
        seen = []
        call(functools.partial(lambda seen, *done: seen.append(done), seen))
        assert seen == [(i, 4) for i in range(1, 5)]


@pytest.mark.parametrize("seed", range(4))
def test_lanczos_on_low_rank_hessians(seed):
    """What is left of an exhausted Krylov space is rounding, not a direction."""
    key = jax.random.key(seed)
    diagonal = jnp.zeros(50).at[:2].set(jnp.array([10.0, 5.0]))
    found = landscape.top_eigenvalues(
        lambda x: 0.5 * x @ (diagonal * x), jnp.ones(50), key, 3, 30
    )
    np.testing.assert_allclose(found, [10.0, 5.0, 0.0], atol=1e-4)
    a = np.random.default_rng(seed).normal(size=(5, 200)).astype(np.float32)
    wanted = np.linalg.svd(a.astype(float), compute_uv=False) ** 2
    loss = lambda x: 0.5 * jnp.sum((jnp.asarray(a) @ x) ** 2)
    found = landscape.top_eigenvalues(loss, jnp.ones(200), key, 5)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_barrier_leaves_other_leaves_as_they_are():
    """Integers and PRNG keys are not averaged, not even with themselves."""
    a = {"x": jnp.array(-1.0), "n": jnp.array(13), "key": jax.random.key(0)}
    b = {"x": jnp.array(1.0), "n": jnp.array(99), "key": jax.random.key(1)}

    def loss(p):
        bits = jax.random.bits(p["key"]).astype(jnp.float32)
        return (p["x"] ** 2 - 1) ** 2 + p["n"] + 0 * bits

    found = landscape.barrier(loss, a, b, 21)
    np.testing.assert_allclose(found.barrier, 1.0, rtol=1e-5)
    np.testing.assert_allclose(found.losses[0], 13.0)


def test_the_direction_takes_the_dtype_of_the_parameters():
    x = jnp.array([1.0, 2.0], jnp.bfloat16)
    v = jnp.array([0.5, -1.0])
    found = landscape.hessian_product(lambda x: jnp.sum(x**3), x, v)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, [3.0, -12.0])


QUADRATIC = lambda x: jnp.sum(jnp.arange(1.0, 4.0) * x**2) / 2
POINT_CALLS = {
    "hessian_product": lambda loss, x: landscape.hessian_product(loss, x, x),
    "top_eigenvalues": lambda loss, x: landscape.top_eigenvalues(loss, x, 0),
    "hessian_trace": lambda loss, x: landscape.hessian_trace(loss, x, 0),
    "sharpness": landscape.sharpness,
    "gradient_norm_in_ball": landscape.gradient_norm_in_ball,
}


@pytest.mark.parametrize("name", POINT_CALLS)
@pytest.mark.parametrize(
    ("loss", "x", "message"),
    [
        (jnp.ones(3), QUADRATIC, "the two arguments swapped; call .*p, batch"),
        (lambda p, batch: p.sum(), jnp.ones(3), "takes other arguments .*'batch'"),
        (QUADRATIC, jnp.arange(3), "int32, which has no gradient; call"),
        (3.0, jnp.ones(3), "of type float; call"),
    ],
)
def test_what_is_no_loss_of_the_parameters(name, loss, x, message):
    with pytest.raises((TypeError, ValueError), match=f"{name}.*{message}|{message}"):
        POINT_CALLS[name](loss, x)


@pytest.mark.parametrize("v", [jnp.ones(2), {"a": jnp.ones(3)}])
def test_a_direction_that_is_not_like_params(v):
    with pytest.raises(ValueError, match="v must have the structure and shapes of"):
        landscape.hessian_product(QUADRATIC, jnp.ones(3), v)


def test_seeds_and_keys_are_the_same():
    x, key = jnp.ones(3), jax.random.key(7)
    for call in (
        lambda key: landscape.top_eigenvalues(QUADRATIC, x, key, 2, 2),
        lambda key: landscape.hessian_trace(QUADRATIC, x, key, 3)[0],
        lambda key: landscape.filter_normalised(key, jnp.ones((2, 3))),
    ):
        np.testing.assert_array_equal(call(7), call(key))
        with pytest.raises(ValueError, match=r"key must be .*jax\.random\.key\(0\)"):
            call("seven")
