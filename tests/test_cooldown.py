"""Cooldowns in retrospect: averages of iterates that stand for decayed updates."""

import hypothesis.extra.numpy as npst
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from safetensors.numpy import load_file, save_file

import optax_avg as oa
from optax_avg import merging, weights
from optax_avg.posthoc import SnapshotStore

FALLS = {
    "linear": lambda s: 1 - s,
    "sqrt": lambda s: 1 - s**0.5,
    "cosine": lambda s: np.cos(np.pi * s / 2) ** 2,
}
each_shape = pytest.mark.parametrize("shape", FALLS)
UPDATES = npst.arrays(np.float64, (40, 3), elements=st.floats(-1e3, 1e3, width=32))
AVERAGES = {
    "short": weights.power_function(sigma_rel=0.05),
    "long": weights.power_function(sigma_rel=0.10),
    "lawa": oa.memories.window(10),
}


def coefficients(shape, k):
    """``c_0 ... c_k`` from the definition, and the factors ``w_1 ... w_k``."""
    f = FALLS.get(shape, shape)
    w = np.array([f((i - 1) / k) for i in range(1, k + 1)])
    return np.array([1 - w[0], *(w[:-1] - w[1:]), w[-1]]), w


@given(UPDATES, st.integers(1, 40), st.sampled_from([*FALLS]))
def test_averaging_iterates_is_decaying_their_updates(updates, k, shape):
    iterates = np.cumsum(updates, axis=0)
    _, w = coefficients(shape, k)
    start = iterates[-k - 1] if k < 40 else np.zeros(3)
    decayed = start + w @ updates[-k:]
    c = weights.cooldown(shape, k)
    averaged = c.initial * start + c.weights @ iterates[-k:]
    scale = 40 * max(np.abs(iterates).max(), np.abs(updates).max())
    np.testing.assert_allclose(averaged, decayed, rtol=0, atol=1e-15 * scale)


@given(st.integers(1, 500), st.sampled_from([*FALLS]))
def test_weights_are_a_mean_of_iterates(k, shape):
    found, (c, _) = weights.cooldown(shape, k), coefficients(shape, k)
    p = np.append(found.initial, found.weights)
    np.testing.assert_allclose(p, c, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-14)
    assert found.weights.dtype == np.float64
    age = np.arange(k, -1, -1.0)
    np.testing.assert_allclose(found.mean_age, p @ age, rtol=1e-9, atol=1e-12)
    spread = np.sqrt(p @ (age - p @ age) ** 2) / k
    np.testing.assert_allclose(found.relative_width, spread, rtol=1e-6, atol=1e-9)


def test_a_shape_of_the_user_may_begin_below_one_and_end_above_zero():
    f = lambda s: 0.8 - 0.5 * s
    found, (c, _) = weights.cooldown(f, 5), coefficients(f, 5)
    np.testing.assert_allclose(np.append(found.initial, found.weights), c, rtol=1e-12)
    assert found.initial == pytest.approx(0.2)
    single = weights.cooldown(lambda s: jnp.sqrt(1 - s), 300)  # in float32
    wanted = coefficients(lambda s: (1 - s) ** 0.5, 300)[0]
    np.testing.assert_allclose(single.weights, wanted[1:], atol=1e-6)


@pytest.mark.parametrize("bad", [lambda s: s, lambda s: 2 - s, lambda s: -s, np.log])
def test_a_shape_that_does_not_fall_is_refused(bad):
    with np.errstate(divide="ignore"), pytest.raises(ValueError, match="must fall"):
        weights.cooldown(bad, 5)


def test_unknown_shapes_and_lengths_are_refused():
    with pytest.raises(ValueError, match="'linear', 'sqrt' or 'cosine', got 'step'"):
        weights.cooldown("step", 5)
    for steps in (0, 2.5, True):
        with pytest.raises(ValueError, match="steps must be an integer >= 1"):
            weights.cooldown("sqrt", steps)


@pytest.mark.parametrize(("shape", "rate"), [("linear", "linear"), ("sqrt", "1-sqrt")])
def test_the_factors_are_those_of_the_schedule(shape, rate):
    """A branch that cools down takes ``w_i`` times the rate at its step ``i``."""
    schedule = oa.schedules.warmup_stable_decay(1.0, 0, 30, 20, cooldown=rate)
    w = schedule(np.arange(30, 50))
    found = np.append(1, 1 - np.cumsum(weights.cooldown(shape, 20).weights)[:-1])
    np.testing.assert_allclose(found, w, atol=1e-6)


def run(tx, updates, each=None):
    """Iterates under averages; ``each(step, state, params)``."""
    params = jnp.zeros(updates.shape[1])
    state, advance = tx.init(params), jax.jit(tx.update)
    trace = [np.asarray(params)]
    for step, update in enumerate(updates, start=1):
        u, state = advance(jnp.asarray(update, jnp.float32), state, params)
        params = optax.apply_updates(params, u)
        trace.append(np.asarray(params))
        if each is not None:
            each(step, state, params)
    return np.array(trace, np.float64), params, state


def noise(steps, seed=0):
    return np.random.default_rng(seed).normal(size=(steps, 4))


def test_the_linear_one_is_the_window_in_the_chain():
    trace, params, state = run(oa.window_average(7), noise(30))
    c = weights.cooldown("linear", 7)
    found = oa.averaged_params(state, params)
    np.testing.assert_allclose(found, c.weights @ trace[-7:], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A store of averages and parameters, every 5 of 200 steps, and the iterates."""
    store = SnapshotStore(tmp_path_factory.mktemp("kept"))
    save = lambda step, *rest: step % 5 == 0 and store.save(rest[0], step, rest[1])
    trace, _, _ = run(oa.average(AVERAGES), noise(200), save)
    store.wait()  # the command does not
    yield store, trace
    store.close()


@each_shape
def test_parameters_that_were_saved_now_and_then(kept, shape):
    """They stand for a training whose iterates they are."""
    store, trace = kept
    options = {"cooldown": (shape, 60), "names": ["parameters"]}
    found = store.reconstruct(jnp.zeros(4), **options)
    c, _ = coefficients(shape, 12)
    np.testing.assert_allclose(found, c[1:] @ trace[145:201:5], rtol=1e-5, atol=1e-5)
    plan = store.plan(**options)
    assert plan.residual < 1e-6
    assert {(p.start, p.every) for p in plan.parts} == {(0, 5)}
    assert [p.iterates for p in plan.parts] == [*range(1, 41)]


@each_shape
def test_it_may_end_at_an_earlier_snapshot(kept, shape):
    store, trace = kept
    found = store.reconstruct(cooldown=(shape, 40), names=["parameters"], step=120)
    c, _ = coefficients(shape, 8)
    (found,) = found.values()
    np.testing.assert_allclose(found, c[1:] @ trace[85:121:5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "shape", "least", "most"),
    [
        (["short", "long"], "linear", 0.0, 0.05),
        (["short", "long"], "cosine", 0.0, 0.01),
        (["lawa"], "linear", 0.0, 1e-6),
        (["lawa"], "cosine", 0.02, 0.05),
        ([*AVERAGES, "parameters"], "cosine", 0.0, 0.001),
        # One iterate of the sharp corner has a large weight, and no average has it.
        (["short", "long"], "sqrt", 0.2, 0.5),
    ],
)
@pytest.mark.filterwarnings("ignore:the snapshots miss the weights")
def test_the_residual_is_the_error_on_independent_iterates(
    kept, names, shape, least, most
):
    """``|p - sum_i x_i p_i|/|p|`` of the weights, made one by one."""
    store, trace = kept
    plan = store.plan(cooldown=(shape, 100), names=names)
    target = np.append(np.zeros(101), coefficients(shape, 100)[0][1:])
    assert least <= plan.residual <= most
    made = np.zeros(201)
    for part in plan.parts:
        weight = AVERAGES.get(part.name)
        if callable(weight):
            p = weights.profile(weight, part.iterates).weights
        else:
            k = min(10 if part.name == "lawa" else 1, part.iterates)
            p = np.where(np.arange(part.iterates) < part.iterates - k, 0, 1 / k)
        made[1 : part.iterates + 1] += part.weight * p
    missed = np.linalg.norm(made - target) / np.linalg.norm(target)
    np.testing.assert_allclose(plan.residual, missed, rtol=1e-3, atol=1e-6)
    found = store.reconstruct(jnp.zeros(4), cooldown=(shape, 100), names=names)
    np.testing.assert_allclose(found, made @ trace, rtol=1e-3, atol=1e-3)


def test_a_target_out_of_reach_is_warned_of(kept):
    with pytest.warns(UserWarning, match=r"miss the weights of this average by \d\d"):
        kept[0].reconstruct(cooldown=("sqrt", 100), names=["short", "long"])


def test_averages_with_a_stride(tmp_path):
    with SnapshotStore(tmp_path) as store:
        tx = oa.power_ema([0.05, 0.10], every=4)
        save = lambda step, state, _: step % 8 == 0 and store.save(state, step)
        trace, _, _ = run(tx, noise(200), save)
        found = store.reconstruct(jnp.zeros(4), cooldown=("cosine", 98))
        c, _ = coefficients("cosine", 25)  # of 98 steps, every fourth: 25 iterates
        wanted = c[1:] @ trace[104:201:4]
        np.testing.assert_allclose(found, wanted, atol=0.02 * np.abs(trace).max())
        assert store.plan(cooldown=("cosine", 98)).residual < 0.05


def test_mistakes_are_named(kept):
    store, _ = kept
    for bad in ("sqrt", "sq", ("sqrt",), ("sqrt", 0), ("sqrt", 2.5), 2000):
        with pytest.raises(ValueError, match=r"cooldown"):
            store.plan(cooldown=bad)
    with pytest.raises(ValueError, match="shape must be 'linear'"):
        store.plan(cooldown=("exponential", 20))
    with pytest.raises(ValueError, match=r"has 200 .* pass cooldown=\('sqrt', 200\)"):
        store.plan(cooldown=("sqrt", 201))
    with pytest.raises(ValueError, match="there must be one target"):
        store.plan(cooldown=("sqrt", 20), window=20)
    assert store.plan(cooldown=("linear", 200)).residual < 0.05


def test_parameters_on_an_odd_grid_miss_iterates(tmp_path):
    with SnapshotStore(tmp_path) as store:
        for step in (20, 30, 40, 60, 70):
            store.save(None, step, {"w": jnp.full(2, float(step))})
        options = {"names": ["parameters"], "cooldown": ("linear", 20)}
        assert store.reconstruct(**options)["w"].tolist() == [65.0, 65.0]
        assert store.plan(**options).residual < 1e-6
        options["cooldown"] = "linear", 30  # of 50, 60 and 70
        with pytest.warns(UserWarning, match="the snapshots miss the weights"):
            store.reconstruct(**options)


def test_merged_checkpoints_equal_the_store(kept):
    store, trace = kept
    checkpoints = [{"w": jnp.asarray(x, jnp.float32)} for x in trace[155:201:5]]
    for shape in FALLS:
        found = merging.cooldown(checkpoints, shape)["w"]
        options = {"cooldown": (shape, 50), "names": ["parameters"]}
        wanted = store.reconstruct(jnp.zeros(4), **options)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    uniform = merging.uniform(checkpoints)
    linear = merging.cooldown(checkpoints, "linear")
    np.testing.assert_allclose(linear["w"], uniform["w"], rtol=1e-6)


def test_merging_needs_a_shape_from_one():
    with pytest.raises(ValueError, match=r"must begin at 1, .* f\(0\) is 0.5"):
        merging.cooldown([jnp.ones(2)] * 3, lambda s: 0.5 - 0.5 * s)
    with pytest.raises(ValueError, match="there are no models"):
        merging.cooldown([])
    assert merging.cooldown([jnp.ones(2)]).tolist() == [1.0, 1.0]


@each_shape
def test_the_command_merges_checkpoints(run, tmp_path, shape):
    x = np.random.default_rng(1).normal(size=(9, 5)).astype(np.float32)
    paths = [tmp_path / f"step_{100 * i}.safetensors" for i in range(1, 10)]
    for path, row in zip(paths, x, strict=True):
        save_file({"w": row, "n": np.array([3])}, path)
    out = tmp_path / "cooled.safetensors"
    code, _, errors = run("merge", "cooldown", *paths, "--shape", shape, "--out", out)
    assert code == 0, errors
    assert "do not ascend" not in errors
    found = load_file(out)
    c, _ = coefficients(shape, 9)
    np.testing.assert_allclose(found["w"], c[1:] @ x, rtol=1e-5, atol=1e-6)
    assert found["n"].tolist() == [3]


def test_the_command_warns_of_checkpoints_in_the_order_of_a_shell(run, tmp_path):
    paths = [tmp_path / f"step_{i}.safetensors" for i in (1000, 200)]
    for path in paths:
        save_file({"w": np.ones(2, np.float32)}, path)
    out = tmp_path / "cooled.safetensors"
    code, _, errors = run("merge", "cooldown", *paths, "--out", out)
    assert code == 0
    assert "the numbers in the names of the checkpoints do not ascend" in errors


def test_the_command_reconstructs(kept, run, tmp_path):
    store, _ = kept
    out = tmp_path / "cooled.safetensors"
    args = ("reconstruct", store.directory, "--name", "parameters", "--out", out)
    code, _, errors = run(*args, "--cooldown", "sqrt:60")
    assert code == 0, errors
    wanted = store.reconstruct(cooldown=("sqrt", 60), names=["parameters"])
    (found,), (wanted,) = load_file(out).values(), wanted.values()
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    said = run(*args, "--cooldown", "sqrt:60", "--dry-run", "--force")[1]
    assert "--cooldown sqrt:60 at step 200 of 40 snapshots" in said


@pytest.mark.parametrize("bad", ["sqrt", "sqrt:", "sqrt:x", "sqrt:-5", "exp:20", ":20"])
def test_the_command_says_how_to_write_a_cooldown(kept, run, tmp_path, bad):
    code, _, errors = run(
        "reconstruct", kept[0].directory, "--cooldown", bad, "--out", tmp_path / "x"
    )
    assert code == 2
    assert "write --cooldown sqrt:2000" in " ".join(errors.replace("│", " ").split())
