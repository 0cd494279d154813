"""Which of the averages is best, and how far each looks back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_avg as oa
from optax_avg import posthoc, weights

KEPT = {
    "ema": weights.ema(0.9),
    "long": weights.power_function(sigma_rel=0.1),
    "lawa": oa.memories.window(5),
}


def train(tx, steps, x=0.0):
    """The iterates are 1, 2, 3, ..."""
    x = jnp.array(x)
    state, update = tx.init(x), jax.jit(tx.update)
    for _ in range(steps):
        u, state = update(jnp.array(-1.0), state, x)
        x = optax.apply_updates(x, u)
    return state, x


CHAIN = optax.chain(optax.sgd(1.0), oa.average(KEPT))


def test_the_best_of_all():
    state, x = train(CHAIN, 20)
    read = {name: float(oa.averaged_params(state, x, name)) for name in KEPT}
    for wanted in (*KEPT, "parameters"):
        goal = read.get(wanted, float(x))
        best = oa.best_average(state, x, lambda p, goal=goal: -abs(float(p) - goal))
        assert best.name == wanted
        assert best.score == 0
        assert float(best.params) == goal
        assert [*best.scores] == ["parameters", *sorted(KEPT)]
        assert best.scores["lawa"] == pytest.approx(-abs(18 - goal))


def test_some_of_them():
    state, x = train(CHAIN, 20)
    seen = []

    def score(params):
        seen.append(float(params))
        return -params

    best = oa.best_average(state, x, score, ["lawa"])
    assert best.name == "lawa"
    assert seen == [20.0, 18.0]
    assert oa.best_average(state, x, score, []).name == "parameters"


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_score_that_is_not_finite_is_the_worst(bad):
    state, x = train(CHAIN, 20)
    best = oa.best_average(state, x, lambda p: jnp.where(p == 18, -1e30, bad))
    assert best.name == "lawa"
    assert best.score == pytest.approx(-1e30)
    none = oa.best_average(state, x, lambda p: bad)
    assert none.name == "parameters"
    np.testing.assert_equal(none.score, float(bad))


def test_equal_scores_leave_the_live_parameters():
    state, x = train(CHAIN, 20)
    assert oa.best_average(state, x, lambda p: 1.0).name == "parameters"
    before = train(CHAIN, 0)  # the averages hold nothing yet and read as these
    assert oa.best_average(*before, lambda p: -p).name == "parameters"


def test_mistakes_are_named():
    state, x = train(CHAIN, 2)
    with pytest.raises(ValueError, match="score must return one number"):
        oa.best_average(state, x, lambda p: jnp.ones(3))
    with pytest.raises(ValueError, match=r"no average named 'emma'; there is \["):
        oa.best_average(state, x, float, ["emma"])
    with pytest.raises(ValueError, match=r"write names=\['ema'\]"):
        oa.best_average(state, x, float, "ema")
    odd = train(optax.chain(optax.sgd(1.0), oa.polyak_average(name="parameters")), 2)
    with pytest.raises(ValueError, match="an average is named 'parameters'"):
        oa.best_average(*odd, float)


def test_it_reads_a_primal_average():
    state, y = train(oa.primal_average(optax.sgd(1.0), weights.uniform(), 0.5), 3)
    best = oa.best_average(state, y, lambda p: -p)  # of z = 1, 2, 3: x = 2, y = 2.5
    assert (best.name, float(best.params), float(y)) == ("primal", 2.0, 2.5)


@pytest.mark.parametrize("steps", [1, 3, 40])
@pytest.mark.parametrize("every", [1, 3])
def test_widths_and_ages_are_those_of_the_profiles(steps, every):
    tx = optax.chain(optax.sgd(1.0), oa.average(KEPT, every=every))
    state, _ = train(tx, steps)
    found = {x.name: x for x in oa.summarize_averages(state, KEPT_WEIGHTS)}
    n = steps // every
    assert [*found] == oa.average_names(state) == sorted(KEPT)
    assert {x.iterates for x in found.values()} == {n}
    if not n:
        assert all(x.mean_age is x.sigma_rel is x.kind is None for x in found.values())
        return
    for name in ("ema", "long"):
        p = weights.profile(KEPT[name], n)
        np.testing.assert_allclose(found[name].mean_age, p.mean_age, atol=1e-6)
        np.testing.assert_allclose(found[name].sigma_rel, p.relative_width, atol=1e-6)
    k = min(5, n)
    assert found["lawa"].mean_age == pytest.approx((k - 1) / 2)
    assert found["lawa"].sigma_rel == pytest.approx(np.std(np.arange(k)) / n)
    assert [found[name].kind for name in found] == ["recorded", "window", "power"]


KEPT_WEIGHTS = {"ema": KEPT["ema"]}


def test_ages_are_how_far_the_averages_lag():
    """On the iterates 1, 2, 3, ... an average is its newest iterate minus its age."""
    state, x = train(CHAIN, 40)
    for found in oa.summarize_averages(state, KEPT_WEIGHTS):
        average = float(oa.averaged_params(state, x, found.name))
        assert 40 - average == pytest.approx(found.mean_age, rel=1e-4)


def test_the_store_says_the_same(tmp_path):
    state, x = train(CHAIN, 40)
    with posthoc.SnapshotStore(tmp_path, weights=KEPT_WEIGHTS) as store:
        store.save(state, 40, x)
    kept = {a.name: a for a in posthoc.summarize_store(tmp_path).averages}
    for found in oa.summarize_averages(state, KEPT_WEIGHTS):
        there = kept[found.name]
        assert (found.kind, found.iterates) == (there.kind, there.iterates)
        np.testing.assert_allclose(found[3:], there[3:], rtol=1e-5)


def test_what_is_not_known_is_left_open():
    tx = optax.chain(optax.sgd(1.0), oa.ema_params(0.9), oa.bema())
    found = oa.summarize_averages(train(tx, 4)[0])
    assert found == [oa.AverageSummary("bema", 4), oa.AverageSummary("ema", 4)]
    assert oa.summarize_averages(optax.sgd(0.1).init(jnp.ones(2))) == []


def test_members_of_a_stack_share_a_summary():
    tx = oa.power_ema(0.1)
    state = jax.vmap(tx.init)(jnp.ones((3, 2)))
    update = lambda s: tx.update(jnp.ones(2), s, jnp.ones(2))[1]
    state = jax.vmap(update)(state)
    (found,) = oa.summarize_averages(state)
    assert (found.iterates, found.mean_age) == (1, 0.0)
    apart = state._replace(absorbed=jnp.array([1, 2, 1]))
    with pytest.raises(ValueError, match=r"have \[1, 2\] as numbers of iterates"):
        oa.summarize_averages(apart)
