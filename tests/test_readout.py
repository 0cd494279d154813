"""Finding averages in optimizer states, in every framework, and moving them."""

import re
from typing import NamedTuple

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import optax_avg as oa

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}


def stepped(tx, params=PARAMS, steps=3):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_no_average():
    with pytest.raises(ValueError, match="there is no average in this optimizer state"):
        oa.averaged_params(optax.adam(1e-3).init(PARAMS), PARAMS)


def test_swapped_arguments():
    state = oa.ema_params(0.9).init(PARAMS)
    with pytest.raises(ValueError, match=r"swapped; call averaged_params\(opt_state, "):
        oa.averaged_params(PARAMS, state)


def test_a_model_with_functions():
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    tx, filter_it = oa.ema_params(0.9), r"eqx\.filter\(model, eqx\.is_inexact_array\)"
    with pytest.raises(TypeError, match=f"a leaf is the function .*{filter_it}"):
        tx.init(model)
    with pytest.raises(ValueError, match=f"6 leaves and the average 4; .*{filter_it}"):
        oa.averaged_params(tx.init(eqx.filter(model, eqx.is_inexact_array)), model)


def test_several_averages_list_their_names():
    tx = optax.chain(optax.sgd(0.1), oa.ema_params(0.9), oa.window_average(2))
    params, state = stepped(tx)
    with pytest.raises(ValueError, match=r"pass name=, one of \['ema', 'window'\]"):
        oa.averaged_params(state, params)
    with pytest.raises(ValueError, match=r"no average named 'swa'; there is \['ema'"):
        oa.averaged_params(state, params, "swa")
    assert oa.averaged_params(state, params, "window")["w"].shape == (2, 3)


def test_two_averages_of_one_name():
    tx = optax.chain(oa.ema_params(0.9), oa.ema_params(0.99))
    with pytest.raises(
        ValueError, match=r"two averages named 'ema' hold params\['b'\]"
    ):
        oa.averaged_params(tx.init(PARAMS), PARAMS)


def test_parameters_that_do_not_match():
    state = oa.ema_params(0.9).init(PARAMS)
    with pytest.raises(ValueError, match=r"params\['w'\] has shape \(3, 2\)"):
        oa.averaged_params(state, {**PARAMS, "w": jnp.ones((3, 2))})
    with pytest.raises(ValueError, match="params has 1 leaves and the average 2"):
        oa.averaged_params(state, {"w": jnp.ones((2, 3))})


@pytest.mark.parametrize(
    ("of_init", "other", "found", "wanted"),
    [
        ("ab", "bc", "['b']", "['a']"),
        ("a", "b", "['b']", "['a']"),
        ("ab", "ac", "['c']", "['b']"),
    ],
)
@pytest.mark.parametrize(
    ("make", "read"),
    [
        (oa.ema_params(0.9), oa.averaged_params),
        (oa.multi_call(oa.rules.sam(), optax.sgd(0.1)), oa.clean_params),
    ],
)
def test_leaves_of_other_names(make, read, of_init, other, found, wanted):
    state = make.init({key: jnp.ones(2) for key in of_init})
    message = rf"params{re.escape(found)} stands where .* has {re.escape(wanted)}; pass"
    with pytest.raises(ValueError, match=message):
        read(state, {key: jnp.ones(2) for key in other})


@pytest.mark.parametrize(
    "other",
    [{"params": {"a": jnp.ones(2)}}, [jnp.ones(2)], (jnp.ones(2),)],
)
def test_leaves_in_other_containers(other):
    state = oa.ema_params(0.9).init({"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="stands where the average has"):
        oa.averaged_params(state, other)


class Pair(NamedTuple):
    w: jax.Array
    x: jax.Array


SAME_NAMES = {
    "dict": {"w": jnp.ones(2), "x": jnp.ones(2)},
    "NamedTuple": Pair(jnp.ones(2), jnp.ones(2)),
    "FrozenDict": flax.core.freeze({"w": jnp.ones(2), "x": jnp.ones(2)}),
    "nnx.State": nnx.State({"w": nnx.Param(jnp.ones(2)), "x": nnx.Param(jnp.ones(2))}),
    "boxes": {
        "w": flax.linen.Partitioned(jnp.ones(2), (None,)),
        "x": flax.linen.Partitioned(jnp.ones(2), (None,)),
    },
}


@pytest.mark.parametrize("kind", SAME_NAMES)
@pytest.mark.parametrize("other", SAME_NAMES)
def test_other_containers_with_the_same_names(kind, other):
    state = oa.ema_params(0.9).init(SAME_NAMES[kind])
    found = oa.averaged_params(state, SAME_NAMES[other])
    assert jax.tree.structure(found) == jax.tree.structure(SAME_NAMES[other])


def test_dtype_and_values_follow_params():
    params, state = stepped(optax.chain(optax.sgd(0.1), oa.polyak_average()))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    average = oa.averaged_params(state, half)
    assert average["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(
        oa.averaged_params(state, params)["w"], np.full((2, 3), 0.8), rtol=1e-6
    )


def test_result_never_aliases_the_state():
    params, state = stepped(oa.ema_params(0.9))
    average = oa.averaged_params(state, params)
    owned = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)}
    assert all(x.unsafe_buffer_pointer() not in owned for x in jax.tree.leaves(average))


def test_readout_under_jit():
    params, state = stepped(optax.chain(optax.sgd(0.1), oa.ema_params(0.9)))
    jitted = jax.jit(oa.averaged_params)(state, params)
    np.testing.assert_allclose(
        jitted["w"], oa.averaged_params(state, params)["w"], rtol=1e-6
    )


def loss(model, x):
    return jnp.mean(model(x) ** 2)


STACKED = {
    "ema": lambda: oa.ema_params(0.5),
    "window": lambda: oa.window_average(2),
    "bema": lambda: oa.bema(),
    "masked": lambda: oa.window_average(3, where=lambda path, leaf: leaf.ndim > 1),
    "dithered": lambda: oa.ema_params(0.5, accumulator_dtype=jnp.bfloat16),
    "compensated": lambda: oa.ema_params(
        0.5, accumulator_dtype=jnp.bfloat16, rounding="compensated"
    ),
}


@pytest.mark.parametrize("name", STACKED)
def test_stacked_states_are_read_member_by_member(name):
    """As many members as rows and columns, after 0, 1 and 4 steps."""
    tx = optax.chain(optax.sgd(0.1), STACKED[name]())
    params = {"w": jnp.arange(9.0).reshape(3, 3), "b": jnp.zeros(3)}
    members = [stepped(tx, params, steps) for steps in (0, 1, 4)]
    singles = [oa.averaged_params(state, member) for member, state in members]
    stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    params, state = stack(*members)
    found = oa.averaged_params(state, params)
    jax.tree.map(np.testing.assert_array_equal, found, stack(*singles))
    twice = oa.averaged_params(stack(state, state), stack(params, params))
    jax.tree.map(np.testing.assert_array_equal, twice, stack(found, found))


def test_states_that_are_stacked_along_another_axis():
    tx = oa.window_average(2)
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 3), PARAMS)
    axes = jax.tree.map(lambda x: x.ndim, tx.init(PARAMS))
    state = jax.vmap(tx.init, out_axes=axes)(stacked)
    with pytest.raises(ValueError, match=r"jax.vmap\(averaged_params, in_axes="):
        oa.averaged_params(state, stacked)
    found = jax.vmap(oa.averaged_params, in_axes=(axes, 0))(state, stacked)
    jax.tree.map(np.testing.assert_array_equal, found, stacked)


def test_flax_nnx():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    tx = optax.chain(
        optax.sgd(0.1), oa.polyak_average(), oa.window_average(2), oa.bema()
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x, kernels = jnp.ones((4, 2)), []

    @nnx.jit
    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(loss)(model, x))

    for _ in range(3):
        step(model, optimizer, x)
        kernels.append(np.asarray(model.kernel[...]))
    params = nnx.state(model, nnx.Param)
    for source in (optimizer, optimizer.opt_state):
        average = oa.averaged_params(source, params, "polyak")
        np.testing.assert_allclose(
            average["kernel"][...], np.mean(kernels, axis=0), rtol=1e-5
        )
    window = oa.averaged_params(optimizer, params, "window")
    np.testing.assert_allclose(
        window["kernel"][...], np.mean(kernels[1:], axis=0), rtol=1e-5
    )
    live = loss(model, x)
    graph, _, rest = nnx.split(model, nnx.Param, ...)
    averaged = nnx.merge(graph, oa.averaged_params(optimizer, params, "polyak"), rest)
    assert float(loss(averaged, x)) > float(live)


def test_flax_train_state():
    state = train_state.TrainState.create(
        apply_fn=None, params=PARAMS, tx=optax.chain(optax.sgd(0.1), oa.ema_params(0.5))
    )
    state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, PARAMS))
    average = oa.averaged_params(state, state.params)
    np.testing.assert_allclose(average["w"], state.params["w"], rtol=1e-6)


def test_equinox():
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    params, state = stepped(optax.chain(optax.sgd(0.1), oa.polyak_average()), params)
    average = eqx.combine(oa.averaged_params(state, params), static)
    np.testing.assert_allclose(
        average.layers[0].bias, model.layers[0].bias - 0.2, rtol=1e-5
    )


def test_state_of_a_wrapper_in_a_wrapper():
    inner = optax.inject_hyperparams(oa.ema_params)(decay=0.5)
    masked = optax.masked(optax.chain(optax.sgd(0.1), inner), {"w": True, "b": False})
    tx = optax.MultiSteps(optax.apply_if_finite(masked, 3), 1).gradient_transformation()
    params, state = stepped(tx)
    average = oa.averaged_params(state, params)
    assert not np.allclose(average["w"], params["w"])
    np.testing.assert_array_equal(average["b"], params["b"])


def test_migration_keeps_the_optimizer_and_starts_the_average():
    old_tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    params, old = stepped(old_tx)
    new_tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(0.1), oa.ema_params(0.9)
    )
    state = oa.migrate_state(new_tx.init(params), old)
    assert jax.tree.structure(state) == jax.tree.structure(new_tx.init(params))
    np.testing.assert_array_equal(
        optax.tree.get(state, "mu")["w"], optax.tree.get(old, "mu")["w"]
    )
    assert int(optax.tree.get(state, "absorbed")) == 0
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = new_tx.update(grads, state, params)
    wanted, _ = old_tx.update(grads, old, params)
    np.testing.assert_array_equal(updates["w"], wanted["w"])


def test_migration_keeps_averages_by_name():
    params, old = stepped(optax.chain(optax.sgd(0.1), oa.ema_params(0.9)))
    new_tx = optax.chain(optax.sgd(0.1), oa.window_average(2), oa.ema_params(0.9))
    state = oa.migrate_state(new_tx.init(params), old)
    np.testing.assert_array_equal(
        oa.averaged_params(state, params, "ema")["w"],
        oa.averaged_params(old, params)["w"],
    )
    np.testing.assert_array_equal(
        oa.averaged_params(state, params, "window")["w"], params["w"]
    )


def test_migration_recognises_swapped_states():
    """By their counters; without any, as of SGD, nothing can be told."""
    for new_tx in (
        optax.chain(optax.adam(0.1), oa.ema_params(0.9)),
        optax.chain(oa.ema_params(0.9), optax.adam(0.1)),
    ):
        params, old = stepped(optax.adam(0.1))
        with pytest.raises(
            ValueError, match=r"swapped\. Call migrate_state\(new_tx\.in"
        ):
            oa.migrate_state(old, new_tx.init(params))
    params, old = stepped(optax.chain(optax.adam(0.1), oa.ema_params(0.9)))
    state = optax.adam(0.1).init(params)
    with pytest.warns(UserWarning, match="are dropped"):
        state = oa.migrate_state(state, old)
    # A state that goes on takes over one that has been trained for less.
    oa.migrate_state(old, state)
    oa.migrate_state(optax.sgd(0.1).init(params), optax.sgd(0.1).init(params))
    params, old = stepped(optax.sgd(0.1))
    new = optax.chain(optax.sgd(0.1), oa.ema_params(0.9)).init(params)
    with pytest.warns(UserWarning, match="are dropped"):
        oa.migrate_state(old, new)


def test_migration_names_a_place_in_a_chain_without_a_name():
    with pytest.raises(
        ValueError, match=r"first at new_state\[0\]: it is .* and old_s"
    ):
        oa.migrate_state((jnp.ones(2),), (jnp.ones(3),))


def test_migration_refuses_another_optimizer():
    _, old = stepped(optax.sgd(0.1, momentum=0.9))
    tx = optax.chain(optax.adam(0.1), oa.ema_params(0.9))
    with pytest.raises(ValueError, match="differ in more than averages, first at"):
        oa.migrate_state(tx.init(PARAMS), old)
    with pytest.raises(ValueError, match="the old state has more"):
        oa.migrate_state(oa.ema_params(0.9).init(PARAMS), old)


def test_migration_refuses_an_optimizer_whose_fields_have_the_same_names():
    _, old = stepped(optax.scale_by_adam())
    tx = optax.chain(optax.scale_by_belief(), oa.ema_params(0.9))
    with pytest.raises(ValueError, match=r"of ScaleByBeliefState.*of ScaleByAdamState"):
        oa.migrate_state(tx.init(PARAMS), old)


def test_migration_names_what_differs_in_the_optimizer():
    _, old = stepped(optax.adam(0.1, mu_dtype=jnp.bfloat16))
    tx = optax.chain(optax.adam(0.1), oa.ema_params(0.9))
    message = (
        r"\.mu\['b'\] of ScaleByAdamState: it is float32\[3\] and .*is bfloat16\[3\]"
    )
    with pytest.raises(ValueError, match=message):
        oa.migrate_state(tx.init(PARAMS), old)


LR = optax.linear_schedule(1.0, 0.1, 10)
SMALL = {"w": jnp.ones((2, 2)), "b": jnp.zeros(3)}
HALF = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.zeros(3)}


@pytest.mark.parametrize(
    ("old", "new", "params", "message"),
    [
        # Everything that an average of one name may have in another way.
        (
            oa.ema_params(0.9),
            oa.ema_params(0.9),
            SMALL,
            r"'ema'\].average\['w'\] is float32\[2, 2\] and was float32\[2, 3\]",
        ),
        (
            oa.window_average(2),
            oa.window_average(2),
            HALF,
            r"\['w'\] is bfloat16\[2, 2, 3\] and was float32\[2, 2, 3\]",
        ),
        (
            oa.window_average(2),
            oa.window_average(4),
            PARAMS,
            r"the weights {'window': 4} and had {'window': 2}",
        ),
        (
            oa.ema_params(0.9),
            oa.ema_params(0.9, accumulator_dtype=jnp.bfloat16),
            PARAMS,
            r"\['b'\] is bfloat16\[3\] and was float32\[3\]",
        ),
        (
            oa.ema_params(0.9),
            oa.ema_params(0.9, rounding="compensated"),
            PARAMS,
            r"averages\['ema'\].compensation\['b'\] is float32\[3\] and was absent",
        ),
        (
            oa.ema_params(0.9, where={"w": True, "b": False}),
            oa.ema_params(0.9),
            PARAMS,
            r"averages\['ema'\].average\['b'\] is float32\[3\] and was absent",
        ),
        (
            oa.ema_params(0.9),
            oa.ema_params(0.9, where={"w": True, "b": False}),
            PARAMS,
            r"averages\['ema'\].average\['b'\] is absent and was float32\[3\]",
        ),
        (
            oa.polyak_average(name="ema"),
            oa.lr_weighted_average(LR, name="ema"),
            PARAMS,
            r"averages\['ema'\].mass\[0\] is float32\[\] and was absent",
        ),
        (
            oa.ema_params(0.9),
            oa.window_average(2, name="ema"),
            PARAMS,
            "'ema' in new_state has the memory WindowMemory and had RunningMemory",
        ),
        (
            oa.bema(),
            oa.bema(accumulator_dtype=jnp.float16),
            PARAMS,
            r"averages\['bema'\].corrected\['b'\] is float16\[3\] and was float32\[3\]",
        ),
        (
            oa.ema_params(0.9),
            oa.ema_params(0.9, every=10),
            PARAMS,
            "has every=10 and had every=1; to start it afresh, give it another name=",
        ),
        (oa.tail_average(1), oa.tail_average(5), PARAMS, "has start=5 and had start=1"),
        (oa.power_ema(0.05), oa.power_ema(0.1), PARAMS, "the weights .*6.9"),
        (
            oa.power_ema([0.05]),
            oa.power_ema([0.05, 0.1]),
            PARAMS,
            r"new_state holds .*lacks \['power_ema_0.1'\]: they would share",
        ),
        (
            optax.chain(oa.average({"a": oa.weights.uniform()}), oa.swa(3, name="b")),
            oa.average({"a": oa.weights.uniform(), "b": oa.weights.uniform()}),
            PARAMS,
            "the average 'b' in new_state has start=0 and had start=3",
        ),
        (
            oa.ema_params(0.9),
            optax.chain(oa.ema_params(0.9), oa.ema_params(0.99)),
            PARAMS,
            r"new_state\[1\] is the second link with the average 'ema'",
        ),
        (
            optax.chain(oa.ema_params(0.9), oa.ema_params(0.99)),
            oa.ema_params(0.9),
            PARAMS,
            "2 averages named 'ema', of which 2 hold the leaves of the one in",
        ),
    ],
)
def test_migration_refuses_what_is_not_the_same_average(old, new, params, message):
    _, old_state = stepped(old)
    with pytest.raises(ValueError, match=message):
        oa.migrate_state(new.init(params), old_state)


def test_migration_refuses_to_share_counters_that_differ():
    a, b = (oa.average({name: oa.weights.uniform()}) for name in "ab")
    params, state = stepped(optax.chain(a, b))
    ahead = stepped(optax.chain(a, b), steps=5)[1][1]
    both = oa.average({"a": oa.weights.uniform(), "b": oa.weights.uniform()})
    moved = oa.migrate_state(both.init(params), state)
    for name in "ab":
        np.testing.assert_array_equal(
            oa.averaged_params(moved, params, name)["w"],
            oa.averaged_params(state, params, name)["w"],
        )
    with pytest.raises(ValueError, match=r"in one link, .* their step are 3 and 5"):
        oa.migrate_state(both.init(params), (state[0], ahead))


def test_migration_follows_names_through_the_stacking_order():
    links = {
        "ema": oa.ema_params(0.9),
        "slow": oa.ema_params(0.99, name="slow"),
        "compensated": oa.ema_params(0.9, name="compensated", rounding="compensated"),
        "bits": oa.ema_params(0.9, name="bits", accumulator_dtype=jnp.bfloat16),
        "lr_weighted": oa.lr_weighted_average(LR),
        "window": oa.window_average(2),
        "bema": oa.bema(),
    }
    params, old = stepped(optax.chain(optax.add_noise(0.1, 0.5, 0), *links.values()))
    backwards = list(links.values())[::-1]
    new_tx = optax.chain(optax.add_noise(0.1, 0.5, 0), oa.swa(2), *backwards)
    state = oa.migrate_state(new_tx.init(params), old)
    assert state[0].rng_key is old[0].rng_key
    assert int(state[1].absorbed) == 0
    for new, before in zip(state[2:], old[:0:-1], strict=True):
        assert type(new) is type(before)
        jax.tree.map(np.testing.assert_array_equal, new, before)


def test_migration_splits_a_link_and_says_what_it_drops():
    uniform = oa.weights.uniform()
    params, old = stepped(oa.average({"a": uniform, "b": uniform, "c": uniform}))
    tx = optax.chain(oa.average({"b": uniform}), oa.average({"a": uniform}))
    with pytest.warns(
        UserWarning, match=r"averages \['c'\] of the old state are dropped"
    ):
        state = oa.migrate_state(tx.init(params), old)
    for name in "ab":
        np.testing.assert_array_equal(
            oa.averaged_params(state, params, name)["w"],
            oa.averaged_params(old, params, name)["w"],
        )
    # The two links may be donated together.
    jax.jit(lambda state: state, donate_argnums=0)(state)


def test_migration_says_that_a_renamed_average_starts_afresh():
    params, old = stepped(oa.ema_params(0.9))
    tx = oa.ema_params(0.9, name="teacher")
    with pytest.warns(UserWarning, match=r"averages \['ema'\] of the old state"):
        state = oa.migrate_state(tx.init(params), old)
    assert int(state.absorbed) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: oa.write_back(oa.window_average(2), 2),
        lambda: oa.switch_ema(0.9, 2),
        lambda: oa.lookahead(2, 0.5),
    ],
    ids=["write_back", "switch_ema", "lookahead"],
)
def test_migration_of_what_is_written_back(make):
    sgd = optax.sgd(0.1, momentum=0.9)
    params, old = stepped(optax.chain(sgd, make()))
    tx = optax.chain(sgd, oa.swa(1), make())
    state = oa.migrate_state(tx.init(params), old)
    jax.tree.map(np.testing.assert_array_equal, (state[0], state[2]), old)


def test_migration_inside_of_wrappers():
    mask = {"w": True, "b": False}
    ema = optax.inject_hyperparams(oa.ema_params)(decay=0.5)
    adam = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)

    def wrapped(*links):
        inner = optax.masked(optax.chain(adam, *links), mask)
        return optax.MultiSteps(optax.apply_if_finite(inner, 3), 2)

    params, plain = stepped(wrapped().gradient_transformation(), steps=4)
    new_tx = wrapped(ema).gradient_transformation()
    state = oa.migrate_state(new_tx.init(params), plain)
    assert int(optax.tree.get(state, "absorbed")) == 0
    assert int(optax.tree.get(state, "gradient_step")) == 2
    params, old = stepped(new_tx, steps=4)
    old = optax.tree.set(old, decay=jnp.float32(0.25))
    newest = wrapped(oa.swa(1), ema).gradient_transformation()
    state = oa.migrate_state(newest.init(params), old)
    assert float(optax.tree.get(state, "decay")) == 0.25
    np.testing.assert_array_equal(
        oa.averaged_params(state, params, "ema")["w"],
        oa.averaged_params(old, params)["w"],
    )


def test_migration_of_parts_that_share_a_name():
    labels = {"w": "one", "b": "two"}
    chain = lambda *links: optax.chain(optax.sgd(0.1), *links, oa.ema_params(0.9))
    split = lambda *links: optax.partition(
        {"one": chain(*links), "two": chain(*links)}, labels
    )
    params, old = stepped(split())
    state = oa.migrate_state(split(oa.swa(1)).init(params), old)
    for key, value in oa.averaged_params(old, params).items():
        np.testing.assert_array_equal(
            oa.averaged_params(state, params, "ema")[key], value
        )


def test_migration_of_shapes_without_values():
    structs = jax.eval_shape(lambda: PARAMS)
    old_tx = optax.chain(optax.adam(0.1), oa.ema_params(0.9))
    new_tx = optax.chain(optax.adam(0.1), oa.ema_params(0.9), oa.swa(3))
    state = oa.migrate_state(
        jax.eval_shape(new_tx.init, structs), jax.eval_shape(old_tx.init, structs)
    )
    wanted = jax.eval_shape(new_tx.init, structs)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), wanted
    )
