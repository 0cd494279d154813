"""The order of a chain: right ones pass, wrong ones are named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import AVERAGES, CALLS, CASES, LINKS, SIBLINGS, params_of

import optax_avg as oa

PARAMS = params_of(jnp.float32)
LABELS = {"w": "slow", "b": "fast", "scale": "fast"}
MASK = {"w": True, "b": False, "scale": True}


def in_its_place(case):
    if case.place == "alone":
        return case.make()
    links = [optax.clip(1.0), optax.sgd(0.1, momentum=0.9)]
    return optax.chain(
        *([case.make(), *links] if case.place == "first" else [*links, case.make()])
    )


@pytest.mark.parametrize("name", sorted((AVERAGES | LINKS | CALLS).keys() - SIBLINGS))
def test_every_link_passes_in_its_place(name):
    oa.check_chain(in_its_place(CASES[name]), PARAMS)


def partitioned(last):
    return optax.partition(
        {
            "slow": optax.chain(optax.sgd(0.1), oa.ema_params(0.9), *last),
            "fast": optax.chain(optax.adam(0.1), oa.ema_params(0.5)),
        },
        LABELS,
    )


RIGHT = {
    "two averages": optax.chain(
        optax.sgd(0.1), oa.ema_params(0.9), oa.polyak_average()
    ),
    "an average after write-back": optax.chain(
        optax.sgd(0.1), oa.switch_ema(0.9, 2), oa.polyak_average()
    ),
    "both ends": optax.chain(oa.sam(), optax.adamw(0.1), oa.ema_params(0.9)),
    "inside MultiSteps": optax.MultiSteps(
        optax.chain(oa.sam(), optax.adamw(0.1), oa.ema_params(0.9)), 4
    ),
    "inside apply_if_finite": optax.apply_if_finite(
        optax.chain(optax.adamw(0.1), oa.ema_params(0.9)), 3
    ),
    "a late, rare average": optax.chain(optax.sgd(0.1), oa.swa(10**6, 10**4)),
    "a warm-up from zero": optax.chain(
        optax.sgd(optax.linear_schedule(0.0, 0.1, 10)), oa.ema_params(0.9)
    ),
    "masked": optax.chain(optax.sgd(0.1), optax.masked(oa.ema_params(0.9), MASK)),
    "partitioned": partitioned([]),
    "hyperparameters": optax.inject_hyperparams(
        lambda rate, decay: optax.chain(optax.sgd(rate), oa.ema_params(decay))
    )(0.1, 0.9),
    "no link of ours": optax.adam(0.1),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_right_chains_pass(name, dtype):
    oa.check_chain(RIGHT[name], params_of(dtype))


WRONG = {
    "an average first": (
        optax.chain(oa.ema_params(0.9), optax.adam(0.1)),
        "ema_params does not stand last",
    ),
    "an average before the learning rate": (
        optax.chain(optax.scale_by_adam(), oa.window_average(3), optax.scale(-0.1)),
        "window_average does not stand last",
    ),
    "a late, rare average before weight decay": (
        optax.chain(optax.sgd(0.1), oa.swa(10**6, 10**4), optax.add_decayed_weights(1)),
        "swa does not stand last",
    ),
    "an average before write-back": (
        optax.chain(optax.sgd(0.1), oa.bema(), oa.switch_ema(0.9, 1000)),
        "bema stands before switch_ema",
    ),
    "write-back before the learning rate": (
        optax.chain(oa.lookahead(5, 0.5), optax.sgd(0.1)),
        "lookahead does not stand last",
    ),
    "one of a partition": (
        partitioned([optax.scale(0.5)]),
        "ema_params does not stand last",
    ),
    "around MultiSteps": (
        optax.chain(
            optax.MultiSteps(optax.adam(0.1), 5).gradient_transformation(),
            oa.ema_params(0.9),
        ),
        "ema_params stands outside optax.MultiSteps",
    ),
    "inside MultiSteps": (
        optax.MultiSteps(optax.chain(oa.ema_params(0.9), optax.adam(0.1)), 3),
        "ema_params does not stand last",
    ),
    "SAM after a clip": (
        optax.chain(optax.clip_by_global_norm(1.0), oa.sam(), optax.sgd(0.1)),
        "sam does not stand first",
    ),
    "SAM after the optimizer": (
        optax.chain(optax.sgd(0.1), oa.sam()),
        "sam does not stand first",
    ),
    "any rule": (
        optax.chain(optax.clip(1.0), oa.as_link(oa.rules.gsam())),
        "sharpness does not stand first",
    ),
    "decoupled WSAM before a scale": (
        optax.chain(oa.decoupled_wsam(optax.sgd(0.1), 0.1), optax.scale(0.5)),
        "decoupled_wsam does not stand last",
    ),
    "an average inside decoupled WSAM": (
        oa.decoupled_wsam(optax.chain(optax.sgd(0.1), oa.ema_params(0.9)), 0.1),
        "ema_params does not stand last",
    ),
    "an average after the multi-call form": (
        optax.chain(oa.multi_call(oa.rules.sam(), optax.sgd(0.1)), oa.ema_params(0.9)),
        "ema_params stands after multi_call",
    ),
    "the multi-call form before a scale": (
        optax.chain(oa.multi_call(oa.rules.sam(), optax.sgd(0.1)), optax.scale(0.5)),
        "multi_call does not stand last",
    ),
}


# Links that leave the values of a usual probe as they are.
IDLE = {
    "clip_by_global_norm": optax.clip_by_global_norm(1e9),
    "adaptive_grad_clip": optax.adaptive_grad_clip(1e9),
    "keep_params_nonnegative": optax.keep_params_nonnegative(),
    "zero_nans": optax.zero_nans(),
    "scale": optax.scale(1.0),
    "clip_by_zscore in its warm-up": oa.clip_by_zscore(),
    "vclip at its first gradient": oa.vclip(1e-6),
}


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.MultiSteps(tx, 2)])
@pytest.mark.parametrize("name", IDLE)
def test_links_that_leave_the_probe_alone_are_seen(name, wrap):
    params = {"w": jnp.full((3, 2), 5.0)}
    last = optax.chain(optax.adam(1e-3), oa.ema_params(0.9), IDLE[name])
    with pytest.raises(ValueError, match="ema_params does not stand last"):
        oa.check_chain(wrap(last), params)
    first = optax.chain(IDLE[name], oa.sam(), optax.adam(1e-3))
    with pytest.raises(ValueError, match="sam does not stand first"):
        oa.check_chain(wrap(first), params)


def test_links_that_pass_the_updates_on_are_no_hindrance():
    idle = [
        oa.track_tail_index(),
        optax.identity(),
        optax.masked(optax.scale(2), False),
    ]
    tx = optax.chain(*idle, oa.sam(), optax.sgd(0.1), oa.ema_params(0.9), *idle)
    oa.check_chain(tx, PARAMS)
    oa.check_chain(tx, PARAMS, jax.tree.map(np.asarray, PARAMS))


def cast(dtype):
    return optax.stateless(lambda g, _: jax.tree.map(lambda x: x.astype(dtype), g))


def test_a_cast_is_no_hindrance():
    tx = optax.chain(cast("float32"), oa.sam(), optax.sgd(0.1))
    oa.check_chain(tx, params_of(jnp.bfloat16))


def test_two_averages_of_one_name():
    tx = optax.chain(optax.sgd(0.1), oa.ema_params(0.9), oa.ema_params(0.99))
    with pytest.raises(ValueError, match=r"two averages named 'ema' .*another name="):
        oa.check_chain(tx, PARAMS)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_chains_are_named(name):
    tx, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        oa.check_chain(tx, PARAMS)


def test_all_that_is_wrong_is_said():
    tx = optax.chain(
        optax.clip(1.0), oa.sam(), oa.ema_params(0.9), oa.polyak_average(), optax.sgd(1)
    )
    with pytest.raises(ValueError, match="stand") as error:
        oa.check_chain(tx, PARAMS)
    lines = str(error.value).splitlines()
    assert [line.split()[0] for line in lines] == [
        "sam",
        "ema_params",
        "polyak_average",
    ]


def test_a_wrapper_that_passes_no_extra_arguments_is_no_hindrance():
    def closed(inner):
        return optax.GradientTransformation(
            inner.init, lambda g, state, params=None: inner.update(g, state, params)
        )

    oa.check_chain(closed(optax.chain(optax.sgd(0.1), oa.ema_params(0.9))), PARAMS)
    with pytest.raises(ValueError, match="ema_params does not stand last"):
        oa.check_chain(closed(optax.chain(oa.ema_params(0.9), optax.sgd(1))), PARAMS)


def test_links_that_are_not_reached_are_said():
    inner = oa.ema_params(0.9)
    idle = optax.GradientTransformation(inner.init, lambda g, state, _=None: (g, state))
    with pytest.warns(UserWarning, match="0 of the 1 links"):
        oa.check_chain(idle, PARAMS)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("decay", [1e-4, 1e-2])
def test_a_small_weight_decay_is_seen(dtype, decay):
    params = {"w": jnp.full((16, 16), 0.02, dtype), "zero": jnp.zeros(3, dtype)}
    for link in (optax.identity(), cast("float32")):  # after a cast values decide
        links = [optax.add_decayed_weights(decay), link, oa.sam(), optax.sgd(0.1)]
        with pytest.raises(ValueError, match="sam does not stand first"):
            oa.check_chain(optax.chain(*links), params)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_small_change_after_an_average_is_seen(dtype):
    warm_up = optax.linear_schedule(0.0, 3e-5, 10_000)
    tx = optax.chain(optax.adam(warm_up), oa.ema_params(0.9), optax.scale(0.97))
    with pytest.raises(ValueError, match="ema_params does not stand last"):
        oa.check_chain(tx, params_of(dtype))


def test_line_searches_get_what_they_know():
    def loss(params):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))

    value, grads = jax.value_and_grad(loss)(PARAMS)
    search = optax.scale_by_backtracking_linesearch(15)
    tx = optax.chain(optax.sgd(1.0), search, oa.ema_params(0.9))
    oa.check_chain(tx, PARAMS, grads, value=value, grad=grads, value_fn=loss)


def test_a_rate_that_falls_to_zero_is_no_accumulation():
    rate = optax.piecewise_constant_schedule(1e-2, {1: 0.0})
    oa.check_chain(optax.chain(optax.sgd(rate), oa.ema_params(0.9)), PARAMS)


def test_an_average_of_every_real_step_may_stand_outside():
    accumulated = optax.MultiSteps(optax.adam(0.1), 4).gradient_transformation()
    oa.check_chain(optax.chain(accumulated, oa.ema_params(0.9, every=4)), PARAMS)


@pytest.mark.parametrize(
    ("average", "name"),
    [
        (oa.swa(start=750), "swa"),
        (oa.tail_average(100), "tail_average"),
        (oa.ema_params(0.9, every=2), "ema_params"),
        (oa.window_average(6, every=102), "window_average"),
        (oa.lookahead(3, 0.5), "lookahead"),
    ],
)
def test_averages_of_some_micro_steps_are_found(average, name):
    """None of them absorbs the one call that the check sees."""
    accumulated = optax.MultiSteps(optax.sgd(0.1), 4).gradient_transformation()
    with pytest.raises(ValueError, match=f"{name} stands outside optax.MultiSteps"):
        oa.check_chain(optax.chain(accumulated, average), PARAMS)


def test_an_average_inside_and_one_outside():
    inner = optax.chain(optax.sgd(0.1), oa.polyak_average())
    inside = optax.MultiSteps(inner, 4).gradient_transformation()
    oa.check_chain(inside, PARAMS)
    with pytest.raises(ValueError, match=r"^ema_params stands outside [^\n]*$"):
        oa.check_chain(optax.chain(inside, oa.ema_params(0.9)), PARAMS)


def test_flattened_updates_are_compared():
    oa.check_chain(optax.flatten(optax.chain(optax.sgd(1), oa.ema_params(0.9))), PARAMS)
    wrong = optax.flatten(optax.chain(oa.ema_params(0.9), optax.sgd(0.1)))
    with pytest.raises(ValueError, match="ema_params does not stand last"):
        oa.check_chain(wrong, PARAMS)


def test_shapes_are_enough():
    shapes = jax.eval_shape(lambda: PARAMS)
    oa.check_chain(optax.chain(optax.sgd(0.1), oa.ema_params(0.9)), shapes)


def test_stacked_rows_are_passed_as_updates():
    tx = optax.chain(oa.coordinate_median(), optax.adam(0.1), oa.ema_params(0.9))
    rows = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), PARAMS)
    oa.check_chain(tx, PARAMS, rows)


@pytest.mark.parametrize("params", [PARAMS, jnp.ones(3), jnp.ones([])])
@pytest.mark.parametrize("first", [oa.coordinate_median(), oa.mgda(per_elt_axis=-1)])
def test_an_aggregator_asks_for_stacked_gradients(first, params):
    tx = optax.chain(first, optax.adam(0.1))
    with pytest.raises(ValueError, match="stacked gradients as the third argument"):
        oa.check_chain(tx, params)


def test_a_location_in_one_pass_asks_for_stacked_gradients():
    tx = optax.chain(oa.one_pass_location(oa.distances.l2(), 0.5), optax.adam(0.1))
    with pytest.raises(ValueError, match="stacked gradients as the third argument"):
        oa.check_chain(tx, PARAMS)


@pytest.mark.parametrize(
    ("tx", "params", "message"),
    [
        (3, PARAMS, "It got int"),
        (None, PARAMS, "It got NoneType"),
        (oa.sam, PARAMS, "the function sam, which has to be called first"),
        (oa.rules.sam(), PARAMS, "a sharpness rule"),
        (PARAMS, optax.sgd(0.1), r"call check_chain\(tx, params\)"),
        (PARAMS, optax.MultiSteps(optax.sgd(0.1), 2), r"call check_chain\(tx, params"),
    ],
)
def test_something_else_than_a_chain(tx, params, message):
    with pytest.raises(TypeError, match=f"^check_chain .*{message}"):
        oa.check_chain(tx, params)


def test_nothing_of_the_users_changes():
    params = {"w": jnp.ones(3), "steps": jnp.arange(2), "none": None}
    tx = optax.chain(oa.sam(), optax.sgd(0.1), oa.ema_params(0.9))
    oa.check_chain(tx, params)
    np.testing.assert_array_equal(params["w"], jnp.ones(3))
    assert not jax.config.jax_disable_jit
