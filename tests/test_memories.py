"""Memories of averages: several kinds in one link, a user's own, the shared options."""

import inspect
import warnings
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_avg as oa
from optax_avg import memories

PARAMS = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}
ALL = {
    "ema": oa.weights.ema(0.9),
    "wide": oa.weights.power_function(sigma_rel=0.1),
    "lawa": memories.window(3),
    "lawa2": memories.window(2),
    "bema": memories.corrected(),
}


def trained(tx, steps=7, params=PARAMS):
    def body(carry, i):
        params, state = carry
        grads = jax.tree.map(lambda x: jnp.sin(x + i), params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(body, (params, tx.init(params)), jnp.arange(float(steps)))[0]


@pytest.mark.parametrize("options", [{}, {"every": 2, "start": 1}])
def test_memories_ride_in_one_link(options):
    links = [oa.average(weight, name=name, **options) for name, weight in ALL.items()]
    together = optax.chain(optax.sgd(0.1), oa.average(ALL, **options))
    params, state = trained(together)
    alone, states = trained(optax.chain(optax.sgd(0.1), *links))
    assert oa.average_names(state) == sorted(ALL)
    for name in ALL:
        chex.assert_trees_all_close(
            oa.averaged_params(state, params, name),
            oa.averaged_params(states, alone, name),
            rtol=1e-6,
        )


def test_windows_of_several_lengths_go_round_together():
    tx = oa.average({"three": memories.window(3), "two": memories.window(2)})
    x = jnp.zeros(1)
    last = jnp.iinfo(jnp.int32).max
    state = tx.init(x)._replace(absorbed=jnp.int32(last - 7 - (last - 7) % 6))
    for i in range(20):
        _, state = tx.update(jnp.full(1, float(i)), state, x)
    assert oa.averaged_params(state, x, "three").tolist() == [18.0]
    assert oa.averaged_params(state, x, "two").tolist() == [18.5]


class Extremes(NamedTuple):
    """What a user's own memory keeps: the range of each element."""

    low: Any
    high: Any

    def read(self, absorbed):
        return jax.tree.map(lambda a, b: (a + b) / 2, self.low, self.high)

    def profile(self, stacked=0):
        return None


def midrange():
    def init(x):
        copies = lambda: jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), x)
        return Extremes(copies(), copies())

    def absorb(kept, x, turn):
        new = Extremes(
            jax.tree.map(jnp.minimum, kept.low, x),
            jax.tree.map(jnp.maximum, kept.high, x),
        )
        first = turn.is_base | (turn.number == 1)
        return jax.tree.map(lambda a, b: jnp.where(first, a, b), Extremes(x, x), new)

    return memories.Memory(init, absorb)


def test_a_memory_of_the_users_own(tmp_path):
    tx = optax.chain(
        optax.sgd(1.0), oa.average({"mid": midrange(), "ema": oa.weights.ema(0.9)})
    )
    x = jnp.zeros(2)
    state = tx.init(x)
    for value in (1.0, 5.0, -3.0):
        updates, state = tx.update(x - value, state, x)
        x = optax.apply_updates(x, updates)
    assert oa.averaged_params(state, x, "mid").tolist() == [1.0, 1.0]
    moved = oa.migrate_state(tx.init(x), state)
    chex.assert_trees_all_equal(moved, state)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), (state, x))
    found = oa.averaged_params(*stacked, "mid")
    assert found.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    weights = {"ema": oa.weights.ema(0.9)}
    with oa.posthoc.SnapshotStore(tmp_path, weights=weights) as store:
        with pytest.warns(UserWarning, match="'mid' are kept: it is not a mean"):
            assert store.save(state, 3)
        np.testing.assert_allclose(
            store.mean(name="ema")["value"], oa.averaged_params(state, x, "ema")
        )
    written = optax.chain(optax.sgd(1.0), oa.write_back(oa.average(midrange()), 3))
    x, state = jnp.zeros(2), written.init(jnp.zeros(2))
    for value in (1.0, 5.0, -3.0):
        updates, state = written.update(x - value, state, x)
        x = optax.apply_updates(x, updates)
    assert x.tolist() == [1.0, 1.0]


FACTORIES = {
    "average": (oa.average, (oa.weights.ema(0.9),)),
    "ema_params": (oa.ema_params, (0.9,)),
    "polyak_average": (oa.polyak_average, ()),
    "swa": (oa.swa, (1,)),
    "tail_average": (oa.tail_average, (1,)),
    "power_ema": (oa.power_ema, (0.1,)),
    "lr_weighted_average": (oa.lr_weighted_average, (optax.constant_schedule(0.1),)),
    "window_average": (oa.window_average, (2,)),
    "bema": (oa.bema, ()),
}
OPTIONS = ["every", "start", "name", "where", "nonfinite", "memory_kind"]


@pytest.mark.parametrize("name", FACTORIES)
def test_signatures_and_documentation_name_every_option(name):
    factory, args = FACTORIES[name]
    parameters = inspect.signature(factory).parameters
    documented = factory.__doc__.split("Args:")[1].split("Returns:")[0]
    for option in parameters:
        assert documented.count(f"\n  {option}: ") == 1
    lacks = {"tail_average": {"every"}}.get(name, set())
    assert set(OPTIONS) - lacks <= set(parameters)
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected .*'evry'"):
        factory(*args, evry=2)
    positional = [p for p in parameters.values() if p.kind is not p.KEYWORD_ONLY]
    with pytest.raises(TypeError, match=rf"^{name}\(\) too many positional"):
        factory(*[1] * (len(positional) + 1))


@pytest.mark.parametrize(
    "options", [{"accumulator_dtype": np.dtype("float16")}, {"rounding": "compensated"}]
)
def test_options_that_no_average_would_take_are_refused(options):
    with pytest.raises(ValueError, match="pass them to the memory"):
        oa.average(memories.window(3), **options)
    oa.average({"lawa": memories.window(3), "ema": oa.weights.ema(0.9)}, **options)


def test_hyperparameters_are_injected_alone():
    state = optax.inject_hyperparams(oa.ema_params)(decay=0.999).init(PARAMS)
    assert set(state.hyperparams) == {"decay"}
    state = optax.inject_hyperparams(oa.bema)().init(PARAMS)
    assert set(state.hyperparams) == {"kappa", "eta", "rho", "gamma"}


def test_options_have_the_defaults_that_they_had():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = oa.ema_params(0.9).init(PARAMS)
    assert (int(state.every), int(state.start)) == (1, 0)
    assert [*state.averages] == ["ema"]
    chex.assert_trees_all_equal(
        state, oa.ema_params(0.9, every=1, start=0, name="ema").init(PARAMS)
    )
