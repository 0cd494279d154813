"""The recipes of docs/recipes.md, against hand-made numbers."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_avg as oa
from optax_avg import _mesh

A = np.array([[2.0, 0.5], [0.5, 1.0]], np.float32)
X = jnp.array([1.0, -2.0])


def quadratic(x):
    return 0.5 * x @ (A @ x)


def test_mesa_pulls_the_student_to_the_average():
    """At the optimum of the base loss the teacher is all that is left."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
    tx = optax.chain(optax.sgd(0.5), oa.ema_params(0.9, debias=False))
    teacher = {"w": jnp.zeros((3, 4)).at[0, 0].set(2.0)}
    opt_state = tx.init(teacher)
    _, opt_state = tx.update({"w": jnp.zeros((3, 4))}, opt_state, teacher)
    params = {"w": jnp.zeros((3, 4))}

    def loss(params, teacher):
        return oa.trajectory_loss(x @ params["w"], x @ teacher["w"], 2.0)

    start = loss(params, oa.averaged_params(opt_state, params))
    for _ in range(300):
        target = oa.averaged_params(opt_state, params)
        grads = jax.grad(loss)(params, target)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    assert float(loss(params, target)) < 0.01 * float(start)


def test_flooding_turns_the_gradient_below_the_level():
    for level, sign in ((0.0, 1.0), (100.0, -1.0)):
        flooded = lambda x, b=level: jnp.abs(quadratic(x) - b) + b
        sharp = oa.sharpness_aware(jax.value_and_grad(flooded), oa.rules.sam(0.0))
        _, grads, _ = sharp(X, sharp.init(X))
        np.testing.assert_allclose(grads, sign * A @ X, rtol=1e-6)


def test_fedspeed():
    alpha, rho, lam = 0.75, 0.125, 4.0
    rule = oa.rules.gradient_regularisation(gamma=alpha * rho, rho=rho)
    sharp = oa.sharpness_aware(jax.value_and_grad(quadratic), rule)
    _, grads, _ = sharp(X, sharp.init(X))
    server, correction = jnp.array([0.5, 0.5]), jnp.array([0.25, -0.25])
    found = grads + (X - server) / lam - correction
    g0 = A @ X
    quasi = (1 - alpha) * g0 + alpha * A @ (X + rho * g0)
    np.testing.assert_allclose(found, quasi + (X - server) / lam - correction, 1e-6)


def test_booster():
    """``grad f + lam (grad h(x) - grad h(x - alpha u(grad h)))``."""
    alpha, lam = 0.5, 3.0
    harm = lambda x: jnp.sum(x**4)
    harmful = oa.sharpness_aware(
        jax.value_and_grad(lambda x: -harm(x)), oa.rules.sam(alpha)
    )
    _, minus_hd, _ = harmful(X, harmful.init(X))
    found = jax.grad(quadratic)(X) + lam * (jax.grad(harm)(X) + minus_hd)
    h0 = 4 * np.asarray(X) ** 3
    there = np.asarray(X) - alpha * h0 / np.linalg.norm(h0)
    np.testing.assert_allclose(found, A @ X + lam * (h0 - 4 * there**3), rtol=1e-5)


def class_weights(counts, beta):
    weights = (1 - beta) / (1 - beta**counts)
    return len(counts) * weights / jnp.sum(weights)


def softmax_gradient(w, x, y, weights):
    """Of the weighted cross-entropy, in NumPy."""
    logits = x @ w
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    share = weights[y] / weights[y].sum()
    return x.T @ (share[:, None] * (p - np.eye(w.shape[1])[y]))


def test_sam_for_classes_of_few_examples():
    rng = np.random.default_rng(1)
    x, y, w = rng.normal(size=(9, 4)), rng.integers(0, 3, 9), rng.normal(size=(4, 3))
    counts, rho = np.array([100.0, 10.0, 1.0]), 0.5
    with jax.enable_x64(True):
        weights = np.asarray(class_weights(jnp.asarray(counts), 0.9))
        # Of one example the effective number is one, of many 1/(1 - beta).
        np.testing.assert_allclose(weights.sum(), 3, rtol=1e-12)
        np.testing.assert_allclose(weights[2] / weights[0], 10 * (1 - 0.9**100))

        def loss(params, x, y, weights):
            each = -jnp.take_along_axis(
                jax.nn.log_softmax(x @ params), y[:, None], axis=1
            )[:, 0]
            return jnp.sum(weights[y] * each) / jnp.sum(weights[y])

        rule = oa.rules.sam(optax.piecewise_constant_schedule(0.1, {1: 5.0}))
        sharp = oa.sharpness_aware(jax.value_and_grad(loss), rule)
        params, state = jnp.asarray(w), sharp.init(jnp.asarray(w))
        for radius in (0.1, rho):
            _, grads, state = sharp(params, state, x, jnp.asarray(y), weights)
            g0 = softmax_gradient(w, x, y, weights)
            there = w + radius * g0 / np.linalg.norm(g0)
            wanted = softmax_gradient(there, x, y, weights)
            np.testing.assert_allclose(grads, wanted, rtol=1e-6, atol=1e-9)


def slopes(f, at, eps=1e-5):
    """Central differences."""
    out = np.zeros_like(at)
    for i in np.ndindex(at.shape):
        d = np.zeros_like(at)
        d[i] = eps
        out[i] = (f(at + d) - f(at - d)) / (2 * eps)
    return out


def udim_of_least_squares(w, x, y, rho, step, lam):
    """The worst data and the gradient of UDIM for ``(w.x - y)^2/2``, in NumPy."""
    each = lambda w, x: (x @ w - y)[:, None] * x
    slope = lambda w, x: each(w, x).mean(axis=0)
    raised = lambda x: np.mean((x @ w - y) ** 2) / 2 + rho * np.linalg.norm(slope(w, x))
    ascent = slopes(raised, x)
    there = x + step * ascent / np.linalg.norm(ascent, axis=1, keepdims=True)

    def inconsistency(w):
        spread = each(w, there).var(axis=0) - each(w, x).var(axis=0)
        return rho * np.linalg.norm(slope(w, there)) + np.linalg.norm(spread)

    g0 = slope(w, x)
    sam = slope(w + rho * g0 / np.linalg.norm(g0), x)
    return there, sam + lam * slopes(inconsistency, w)


def test_udim():
    rho, step, lam = 0.125, 0.5, 2.0
    rng = np.random.default_rng(2)
    w, x, y = rng.normal(size=3), rng.normal(size=(5, 3)), rng.normal(size=5)

    def loss(params, x, y):
        return (x @ params - y) ** 2 / 2

    def mean_loss(params, x, y):
        return jnp.mean(jax.vmap(loss, (None, 0, 0))(params, x, y))

    def worst(params, x, y):
        def raised(x):
            slope = jax.grad(mean_loss)(params, x, y)
            return mean_loss(params, x, y) + rho * optax.tree.norm(slope)

        ascent = jax.grad(raised)(x)
        return x + step * jax.vmap(lambda g: g / (jnp.linalg.norm(g) + 1e-12))(ascent)

    def inconsistency(params, x, there, y):
        each = jax.vmap(jax.grad(loss), (None, 0, 0))
        here, there = each(params, x, y), each(params, there, y)
        spread = jax.tree.map(lambda a, b: jnp.var(b, 0) - jnp.var(a, 0), here, there)
        slope = jax.tree.map(lambda b: jnp.mean(b, 0), there)
        return rho * optax.tree.norm(slope) + optax.tree.norm(spread)

    with jax.enable_x64(True):
        params, inputs, targets = (jnp.asarray(a) for a in (w, x, y))
        sharp = oa.sharpness_aware(jax.value_and_grad(mean_loss), oa.rules.sam(rho))
        _, grads, _ = sharp(params, sharp.init(params), inputs, targets)
        there = worst(params, inputs, targets)
        extra = jax.grad(inconsistency)(params, inputs, there, targets)
        found = jax.tree.map(lambda g, e: g + lam * e, grads, extra)
        wanted = udim_of_least_squares(w, x, y, rho, step, lam)
        np.testing.assert_allclose(there, wanted[0], rtol=1e-6)
        np.testing.assert_allclose(found, wanted[1], rtol=1e-5)


def gaqat(rho, is_scale, k, tau):
    def start(params):
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        return zeros(), zeros(), zeros()  # signs, changes of sign, frozen

    def combine(params, grads, state):
        task, smooth = grads
        signs, turns, frozen = state.rule_memory
        turns = jax.tree.map(lambda n, s, g: n + (s * g < 0), turns, signs, task)
        result = jax.tree.map(
            lambda g, f, scale, d: d + jnp.where(scale & (f > 0), 0, g),
            *(task, frozen, is_scale, smooth),
        )
        due = (state.rule_step + 1) % k == 0
        frozen = jax.tree.map(
            lambda n, f: jnp.where(due, n < tau * k, f).astype(f.dtype), turns, frozen
        )
        turns = jax.tree.map(lambda n: jnp.where(due, 0, n), turns)
        return result, (jax.tree.map(jnp.sign, task), turns, frozen)

    rule = oa.rules.sam(rho)._replace(in_result=None, period=k)
    return rule._replace(init_memory=start, combine=combine)


def test_gaqat_freezes_scales_whose_gradients_keep_their_sign():
    """Of two scales one turns at every step; the weight is never frozen."""
    k, rho = 4, 0.5
    loss = lambda x, c: jnp.sum(c * x["s"]) + x["w"] ** 2 / 2 + jnp.sum(x["s"] ** 2)
    rule = gaqat(rho, {"s": True, "w": False}, k, tau=0.5)
    sharp = oa.sharpness_aware(jax.value_and_grad(loss), rule)
    x = {"s": jnp.array([0.25, 0.5]), "w": jnp.array(2.0)}
    state, step = sharp.init(x), jax.jit(sharp)
    for t in range(3 * k):
        c = np.array([8.0, 8.0 * (-1) ** t])
        _, grads, state = step(x, state, jnp.asarray(c, jnp.float32))
        task = np.array([c[0] + 0.5, c[1] + 1.0, 2.0])
        d = rho * task / np.linalg.norm(task)
        smooth = task + d * np.array([2.0, 2.0, 1.0])
        kept = np.array([0.0 if t >= k else 1.0, 1.0, 1.0])
        wanted = smooth + kept * task
        np.testing.assert_allclose(grads["s"], wanted[:2], rtol=1e-5)
        np.testing.assert_allclose(grads["w"], wanted[2], rtol=1e-5)


def test_statistics_of_batchnorm_averaged_beside_the_parameters():
    beside = oa.ema_params(0.5)
    batch_stats = {"mean": jnp.zeros(1), "var": jnp.ones(1)}
    beside_state = beside.init(batch_stats)
    for mean in (2.0, 4.0):
        batch_stats = {**batch_stats, "mean": jnp.array([mean])}
        zeros = jax.tree.map(jnp.zeros_like, batch_stats)
        _, beside_state = beside.update(zeros, beside_state, batch_stats)
    stats = oa.averaged_params(beside_state, batch_stats)
    np.testing.assert_allclose(stats["mean"], [(0.25 * 2 + 0.5 * 4) / 0.75], 1e-6)
    np.testing.assert_allclose(stats["var"], [1.0], 1e-6)


def mean_of(seen):
    return jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *seen)


def close(found, wanted):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        found,
        wanted,
    )


def test_haiku():
    hk = pytest.importorskip("haiku", reason="needs dm-haiku; pip install dm-haiku")

    def network(x, is_training):
        x = hk.BatchNorm(True, True, 0.9)(hk.Linear(4)(x), is_training)
        return hk.Linear(1)(x)

    model = hk.transform_with_state(network)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    params, state = model.init(jax.random.key(0), x, True)
    tx = optax.chain(optax.adam(0.01), oa.polyak_average())
    opt_state, seen = tx.init(params), []

    def loss(params, state):
        out, state = model.apply(params, state, None, x, True)
        return jnp.mean(out**2), state

    for _ in range(3):
        grads, state = jax.grad(loss, has_aux=True)(params, state)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    averaged = oa.averaged_params(opt_state, params)
    close(averaged, mean_of(seen))
    assert model.apply(averaged, state, None, x, is_training=False)[0].shape == (8, 1)
    with pytest.raises(ValueError, match="with Haiku the params"):
        tx.update(grads, opt_state)


def test_numpyro():
    numpyro = pytest.importorskip("numpyro", reason="needs numpyro; pip install it")
    dist = numpyro.distributions

    def model(data):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
        numpyro.sample("data", dist.Normal(0.0, scale), obs=data)

    def guide(data):
        median = numpyro.param("median", 1.0, constraint=dist.constraints.positive)
        numpyro.sample("scale", dist.LogNormal(jnp.log(median), 0.1))

    tx = optax.chain(optax.adam(0.05), oa.polyak_average())
    svi = numpyro.infer.SVI(model, guide, tx, numpyro.infer.Trace_ELBO())
    data = jnp.array([2.0, -2.0, 1.5])
    svi_state, seen = svi.init(jax.random.key(0), data), []
    for _ in range(4):
        svi_state, _ = svi.update(svi_state, data)
        seen.append(svi.get_params(svi_state))
    params = svi_state.optim_state[1][0]
    averaged = svi.constrain_fn(oa.averaged_params(svi_state.optim_state, params))
    logs = mean_of([{"median": np.log(each["median"])} for each in seen])
    close(averaged, {"median": np.exp(logs["median"])})


def test_keras(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="needs Keras 3; pip install keras")
    text = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
    code = text[text.index("class Average(") : text.index("callback = Average(")]
    spaces = {"keras": keras, "jax": jax, "jnp": jnp}
    exec(code, spaces)
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append([np.array(v.value) for v in self.model.trainable_variables])

    layers = [keras.layers.Dense(4), keras.layers.Dense(1)]
    model = keras.Sequential([keras.layers.Input((3,)), *layers])
    model.compile(optimizer="adam", loss="mse")
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    callback = spaces["Average"](oa.polyak_average())
    watched = {"callbacks": [callback, Watch()], "verbose": 0}
    with jax.numpy_rank_promotion("allow"):  # a bias of Keras is a vector
        model.fit(x, x[:, :1], batch_size=4, epochs=2, **watched)
    weights = [variable.value for variable in model.trainable_variables]
    averaged = oa.averaged_params(callback.state, weights)
    assert len(seen) == 8
    assert not np.allclose(seen[0][0], seen[-1][0])
    close(averaged, mean_of(seen))


def test_compressed_gradients_among_devices():
    """Least squares of eight devices, of which each sees examples of its own."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(64, 8)).astype(np.float32)
    target = rng.normal(size=8).astype(np.float32)
    loss = lambda p, batch: jnp.mean((batch[0] @ p - batch[1]) ** 2)
    link = oa.optimizers.error_feedback(oa.optimizers.top_k(2), axis_name="data")
    tx = optax.chain(link, optax.sgd(0.05))
    w = P("data")
    specs = (oa.optimizers.ErrorFeedbackState(P(), w, w, P(), P(), w), P())

    def step(params, state, batch):
        own = jax.tree.map(lambda x: _mesh.vary(x, ("data",)), params)
        updates, state = tx.update(jax.grad(loss)(own, batch), state, params)
        return optax.apply_updates(params, updates), state

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    place = functools.partial(jax.shard_map, mesh=mesh)
    init = jax.jit(place(tx.init, in_specs=P(), out_specs=specs))
    step = jax.jit(place(step, in_specs=(P(), specs, w), out_specs=(P(), specs)))
    params = jax.device_put(jnp.zeros(8), NamedSharding(mesh, P()))
    state, batch = init(params), jax.device_put((x, x @ target), NamedSharding(mesh, w))
    for _ in range(200):  # on CPU many steps at once wait for each other for ever
        params, state = jax.block_until_ready(step(params, state, batch))
    np.testing.assert_allclose(params, target, atol=1e-2)


def pasted(heading):
    """The first code of a recipe, as it stands."""
    text = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    recipe = text.partition(f"## {heading}")[2]
    return recipe.partition("```python\n")[2].partition("```")[0]


def test_udim_as_it_is_pasted_survives_an_example_without_slope():
    x, y = jnp.array([[0.0, 0.0], [1.0, 2.0]]), jnp.array([0.0, 1.0])
    loss = lambda w, x, y: (x @ w - y) ** 2 / 2
    params, rho, step, lam = jnp.array([0.5, 0.5]), 0.1, 0.1, 1.0
    names = {"jax": jax, "jnp": jnp, "optax": optax, "oa": oa, "loss": loss}
    names |= {"params": params, "x": x, "y": y, "rho": rho, "step": step, "lam": lam}
    before, call, after = pasted("UDIM").partition("value, grads, state =")
    exec(before, names)
    names["state"] = names["sharp"].init(params)
    exec(call + after, names)
    assert np.all(np.isfinite(names["grads"]))
    there = names["worst"](params, x, y)
    np.testing.assert_allclose(np.linalg.norm(there - x, axis=1), [0, 0.1], rtol=1e-5)


def test_compressed_gradients_as_they_are_pasted():
    """The code of the recipe itself, on a batch that no device holds yet."""
    if not hasattr(jax.lax, "pcast"):
        pytest.skip("jax.lax.pcast is not there before jax 0.9")
    code = pasted("Compressed gradients")
    loss = lambda p, batch: jnp.mean((batch[0] @ p - batch[1]) ** 2)
    names = {
        "jax": jax,
        "optax": optax,
        "oa": oa,
        "P": P,
        "loss": loss,
        "functools": functools,
    }
    exec(code, names)
    x = np.random.default_rng(4).normal(size=(64, 8)).astype(np.float32)
    params, batch = jnp.zeros(8), (x, x @ np.arange(8, dtype=np.float32))
    init, step = names["init"], names["step"]
    state, start = init(params), loss(params, batch)
    for _ in range(30):
        params, state = jax.block_until_ready(step(params, state, batch))
    assert loss(params, batch) < 0.5 * start
