"""AdamP, LAWN and penalties of norms against their references and special cases."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_optimizers_b as reference
from hypothesis import given
from hypothesis import strategies as st

import optax_avg as oa
from optax_avg import optimizers

KINDS = ("channels", "layer", "plain")
seeds = st.integers(0, 2**32 - 1)


def train(tx, w, gradients):
    """The parameters after each step."""
    state, seen = tx.init(w), []
    update = jax.jit(tx.update)
    for g in gradients:
        u, state = update(g, state, w)
        w = optax.apply_updates(w, u)
        seen.append(w)
    return seen


def gradient_of_kind(kind, g, w):
    """Orthogonal to every channel, only to the whole leaf, or to neither."""
    if kind == "plain":
        return g + 0.5 * w
    axes = tuple(range(w.ndim - 1))
    product = np.sum(g * w, axes, keepdims=True) / np.sum(w * w, axes, keepdims=True)
    g = g - product * w
    if kind == "layer":  # the radial parts of two channels cancel
        sizes = np.sum(w * w, axes)
        g[..., 0] += w[..., 0] / sizes[0]
        g[..., 1] -= w[..., 1] / sizes[1]
    return g


class Follower:
    """Gradients that depend on the weights of the reference, as they come."""

    def __init__(self, kind, shape, seed):
        self.random = np.random.default_rng(seed)
        self.kind, self.shape = kind, shape

    def __call__(self, w):
        return gradient_of_kind(self.kind, self.random.normal(size=self.shape), w)


def gradients_along(step, w, draw, number):
    """Gradients of one kind at the weights that the reference has then."""
    gradients = []
    for _ in range(number):
        at = step(gradients)[-1][0] if gradients else w
        gradients.append(draw(at))
    return gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4, 3), (2, 2, 2, 3)])
def test_adamp_and_sgdp(kind, shape):
    w = np.random.default_rng(0).normal(size=shape)
    adam = lambda gs: reference.adamp(w, gs, 0.1, 0.8, 0.95, 1e-3, 0.2, 0.1, 0.3)
    sgd = lambda gs: reference.sgdp(w, gs, 0.1, 0.8, 0.2, 0.1, 0.3)
    ours = {
        adam: optimizers.adamp(0.1, 0.8, 0.95, 1e-3, 0.2, wd_ratio=0.3),
        sgd: optimizers.sgdp(0.1, 0.8, 0.2, wd_ratio=0.3),
    }
    for wanted, tx in ours.items():
        gradients = gradients_along(wanted, w, Follower(kind, shape, 1), 4)
        as32 = [jnp.asarray(g, jnp.float32) for g in gradients]
        seen = train(tx, jnp.asarray(w, jnp.float32), as32)
        for (x, is_radial), found in zip(wanted(gradients), seen, strict=True):
            assert is_radial == (kind != "plain")
            np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-5)


def test_channels_may_come_first():
    rng = np.random.default_rng(2)
    w = rng.normal(size=(4, 3))
    gradients = [
        jnp.asarray(gradient_of_kind("channels", rng.normal(size=(4, 3)), w))
        for _ in range(2)
    ]
    last = train(optimizers.sgdp(0.01), jnp.asarray(w), gradients)[-1]
    tx = optimizers.sgdp(0.01, channel_axis=0)
    first = train(tx, jnp.asarray(w.T), [g.T for g in gradients])[-1]
    np.testing.assert_allclose(first.T, last, rtol=1e-6)


def test_without_a_threshold_they_are_adamw_and_sgd():
    params = {"w": jnp.arange(6.0).reshape(3, 2) - 2, "b": jnp.ones(2)}
    gradients = [jax.tree.map(lambda x, i=i: jnp.sin(x + i), params) for i in range(4)]
    pairs = [
        (
            optimizers.adamp(0.1, weight_decay=0.2, delta=0.0),
            optax.adamw(0.1, weight_decay=0.2),
        ),
        (optimizers.sgdp(0.1, 0.7, delta=0.0), optax.sgd(0.1, momentum=0.7)),
    ]
    for ours, theirs in pairs:
        found, wanted = (train(tx, params, gradients)[-1] for tx in (ours, theirs))
        chex.assert_trees_all_close(found, wanted, rtol=1e-6)


@given(seed=seeds, power=st.sampled_from([-30, 0, 30]))
def test_nothing_radial_is_left_whatever_the_scale(seed, power):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(5, 3))
    g = gradient_of_kind("channels", rng.normal(size=(5, 3)), w)
    tx = optimizers.project_radial(optax.scale(3.0), wd_ratio=0.0, weight_decay=1.0)
    kick = optimizers.project_radial(
        optax.stateless(lambda g, _: jax.tree.map(lambda x: x + 1, g))
    )
    scaled_w = jnp.asarray(w * 10.0**power, jnp.float32)
    scaled_g = jnp.asarray(g * 10.0**-power, jnp.float32)
    out, _ = tx.update(scaled_g, tx.init(scaled_w), scaled_w)
    np.testing.assert_allclose(
        np.asarray(out) * 10.0**power, 3 * g, rtol=1e-4, atol=1e-5
    )
    out, _ = kick.update(scaled_g * 0, kick.init(scaled_w), scaled_w)
    along = np.sum(np.asarray(out) * w, 0)
    np.testing.assert_allclose(along, 0, atol=1e-5)
    assert np.linalg.norm(out) > 0.1


@pytest.mark.parametrize(("cosine", "is_radial"), [(0.09, True), (0.11, False)])
def test_the_threshold_falls_with_the_root_of_the_size(cosine, is_radial):
    """``delta/sqrt(dim) = 0.4/4``, by channel and by leaf: there is one channel."""
    w = jnp.ones((16, 1))
    across = jnp.tile(jnp.array([[1.0], [-1.0]]), (8, 1))
    g = cosine * w + (1 - cosine**2) ** 0.5 * across
    tx = optimizers.project_radial(optax.identity(), 0.4)
    out, _ = tx.update(g, tx.init(w), w)
    wanted = g - cosine * w if is_radial else g
    np.testing.assert_allclose(out, wanted, atol=1e-6)


def test_vectors_are_never_projected_and_decay_whole():
    tx = optimizers.project_radial(optax.identity(), weight_decay=0.5)
    params = {"b": jnp.array([3.0, 4.0]), "s": jnp.array(2.0)}
    g = {"b": jnp.array([-4.0, 3.0]), "s": jnp.array(0.0)}
    out, _ = tx.update(g, tx.init(params), params)
    assert out["b"].tolist() == [-2.5, 5.0]
    assert float(out["s"]) == 1.0


def test_leaves_without_numbers_pass():
    tx = optimizers.adamp(0.1)
    params = {
        "w": jnp.ones((2, 2)),
        "e": jnp.zeros((0, 3)),
        "n": None,
        "i": jnp.ones(2, int),
    }
    g = {"w": jnp.ones((2, 2)), "e": jnp.zeros((0, 3)), "n": None, "i": None}
    out, _ = tx.update(g, tx.init(params), params)
    assert out["n"] is None
    assert out["i"] is None
    assert bool(jnp.all(jnp.isfinite(out["w"])))


@pytest.mark.parametrize("start", [0, 2])
def test_norm_preserving(start):
    rng = np.random.default_rng(3)
    w, b = rng.normal(size=(3, 4)), rng.normal(size=4)
    gw, gb = rng.normal(size=(5, 3, 4)), rng.normal(size=(5, 4))
    tx = optimizers.norm_preserving(optax.sgd(0.2, momentum=0.9), start)
    params = {"w": jnp.asarray(w, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    gradients = [{"w": jnp.asarray(x), "b": jnp.asarray(y)} for x, y in zip(gw, gb)]
    seen = train(tx, params, gradients)
    wanted = reference.norm_preserving_momentum(w, gw, 0.2, 0.9, start)
    for found, x in zip(seen, wanted, strict=True):
        np.testing.assert_allclose(found["w"], x, rtol=1e-4, atol=1e-5)
    norms = [float(jnp.linalg.norm(x["w"])) for x in [params, *seen]]
    assert norms[start:] == pytest.approx([norms[start]] * (6 - start), rel=1e-6)
    assert start == 0 or abs(norms[1] / norms[0] - 1) > 0.01
    # Vectors are trained by the optimizer alone.
    plain = train(optax.sgd(0.2, momentum=0.9), params, gradients)[-1]
    np.testing.assert_allclose(seen[-1]["b"], plain["b"], rtol=1e-6)


def test_norms_do_not_drift_in_bfloat16():
    w = jnp.asarray(np.random.default_rng(4).normal(size=(8, 8)), jnp.bfloat16)
    tx = optimizers.norm_preserving(optax.sgd(0.1))

    def body(carry, i):
        w, state = carry
        u, state = tx.update(jnp.sin(9 * w + i).astype(w.dtype), state, w)
        return (optax.apply_updates(w, u), state), None

    (last, state), _ = jax.lax.scan(body, (w, tx.init(w)), jnp.arange(300))
    size = lambda x: float(jnp.linalg.norm(x.astype(jnp.float32)))
    assert size(last) == pytest.approx(size(w), rel=2e-3)
    assert float(state.radii) == pytest.approx(size(w), rel=1e-6)
    assert size(last - w) > 1


def test_a_weight_of_zero_is_not_kept_at_zero():
    tx = optimizers.norm_preserving(optax.sgd(1.0))
    w = jnp.zeros((2, 2))
    u, _ = tx.update(jnp.ones((2, 2)), tx.init(w), w)
    assert u.tolist() == [[-1.0, -1.0]] * 2


def test_norm_loss_is_the_gradient_of_its_penalty():
    w = np.random.default_rng(5).normal(size=(2, 3, 4))
    g = np.random.default_rng(6).normal(size=(2, 3, 4))
    penalty = lambda w: 0.3 * jnp.sum((1 - jnp.sqrt(jnp.sum(w**2, (0, 1)))) ** 2)
    tx = optimizers.norm_loss(0.3)
    found, _ = tx.update(jnp.asarray(g), tx.init(w), jnp.asarray(w, jnp.float32))
    wanted = reference.norm_loss_gradient(w, 0.3)
    np.testing.assert_allclose(wanted, jax.grad(penalty)(w), rtol=1e-4)
    np.testing.assert_allclose(found, g + wanted, rtol=1e-4, atol=1e-5)


def test_norm_loss_leads_to_unit_columns():
    tx = optax.chain(optimizers.norm_loss(0.5), optax.sgd(0.2))
    w = {"w": jnp.array([[3.0, 0.1], [4.0, 0.2]]), "b": jnp.array([5.0, 5.0])}
    last = train(tx, w, [jax.tree.map(jnp.zeros_like, w)] * 60)[-1]
    np.testing.assert_allclose(jnp.linalg.norm(last["w"], axis=0), 1, rtol=1e-3)
    np.testing.assert_allclose(last["w"][:, 0], [0.6, 0.8], rtol=1e-3)
    assert last["b"].tolist() == [5.0, 5.0]


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 2, 4)])
def test_spectral_regularisation(shape):
    """One power iteration a step is enough while the weights stay."""
    w = np.random.default_rng(7).normal(size=shape)
    tx = optimizers.spectral_regularisation(0.3)
    params = {"w": jnp.asarray(w, jnp.float32), "b": jnp.ones(4)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    state, update = tx.init(params), jax.jit(tx.update)
    first, state = update(zeros, state, params)
    for _ in range(60):
        found, state = update(zeros, state, params)
    wanted = reference.spectral_gradient(w, 0.3)
    np.testing.assert_allclose(found["w"], wanted, atol=2e-4)
    assert np.abs(first["w"] - wanted).max() > 1e-2
    assert found["b"].tolist() == [0.0] * 4


def test_spectral_gradient_is_that_of_half_the_square():
    w = np.random.default_rng(8).normal(size=(4, 3))
    half = lambda w: 0.15 * jnp.linalg.norm(w, 2) ** 2
    wanted = jax.grad(half)(jnp.asarray(w, jnp.float32))
    np.testing.assert_allclose(reference.spectral_gradient(w, 0.3), wanted, rtol=1e-3)


def test_outputs_may_come_first():
    w = np.random.default_rng(9).normal(size=(3, 5)).astype(np.float32)
    zeros = jnp.zeros((3, 5))
    for last, first in [
        (optimizers.norm_loss(0.3), optimizers.norm_loss(0.3, out_axis=0)),
        (
            optimizers.spectral_regularisation(0.3, num_iters=40),
            optimizers.spectral_regularisation(0.3, num_iters=40, out_axis=0),
        ),
    ]:
        found = jax.jit(first.update)(zeros, first.init(w), w)[0]
        wanted = jax.jit(last.update)(zeros.T, last.init(w.T), w.T)[0]
        np.testing.assert_allclose(found, wanted.T, atol=1e-4)


def test_a_matrix_of_zeros_or_nan_keeps_its_vector():
    tx = optimizers.spectral_regularisation()
    state = tx.init(jnp.ones((3, 2)))
    for bad in (0.0, jnp.nan):
        w = jnp.full((3, 2), bad)
        out, after = tx.update(jnp.zeros((3, 2)), state, w)
        chex.assert_trees_all_equal(after, state)
        assert bad != 0 or not out.any()


def test_where_chooses_the_leaves():
    params = {"a": jnp.full((2, 2), 3.0), "b": jnp.full((2, 2), 3.0)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    where = {"a": True, "b": False}
    for tx in (
        optimizers.norm_loss(where=where),
        optimizers.spectral_regularisation(where=where),
    ):
        out, _ = tx.update(zeros, tx.init(params), params)
        assert out["a"].all()
        assert not out["b"].any()
    tx = optimizers.norm_preserving(optax.sgd(1.0), where=where)
    g = jax.tree.map(lambda x: x.at[0, 0].set(1.0), zeros)
    new = optax.apply_updates(params, tx.update(g, tx.init(params), params)[0])
    assert float(jnp.linalg.norm(new["a"])) == pytest.approx(6.0)
    assert float(new["b"][0, 0]) == 2.0


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: optimizers.adamp(0.1, b1=1.0), "b1 must lie"),
        (lambda: optimizers.adamp(0.1, wd_ratio=2.0), "wd_ratio must lie"),
        (lambda: optimizers.sgdp(0.1, delta=-1.0), "delta must lie"),
        (lambda: optimizers.sgdp(0.1, channel_axis=0.5), "channel_axis must be an"),
        (lambda: optimizers.norm_preserving(optax.sgd(1.0), -1), "start must be an"),
        (lambda: optimizers.norm_loss(-1.0), "lam must lie"),
        (lambda: optimizers.spectral_regularisation(num_iters=0), "num_iters must be"),
        (lambda: optimizers.spectral_regularisation(key="x"), "key must be a PRNG"),
        (
            lambda: optimizers.norm_loss(where={"w": False}).init({"w": jnp.ones(2)}),
            "where is true of no leaf",
        ),
        (
            lambda: optimizers.spectral_regularisation().init(
                {"w": jnp.ones((2, 2), complex)}
            ),
            "takes real parameters",
        ),
    ],
)
def test_errors_name_the_cause(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_what_is_no_optimizer_is_refused():
    for factory in (optimizers.project_radial, optimizers.norm_preserving):
        with pytest.raises(TypeError, match="needs an optimizer"):
            factory(oa.rules.sam())


def test_the_share_of_weight_decay_keeps_its_digits():
    with jax.enable_x64(True):
        w, g = jnp.array([[3.0], [4.0]]), jnp.array([[4.0], [-3.0]])  # orthogonal
        tx = oa.optimizers.project_radial(optax.identity(), weight_decay=1.0)
        updates, _ = tx.update(g, tx.init(w), w)
        np.testing.assert_allclose(updates, g + 0.1 * w, rtol=1e-14)
