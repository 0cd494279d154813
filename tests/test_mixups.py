"""What users mix up, and the error that names the call to write instead."""

import functools
import inspect

import jax
import jax.numpy as jnp
import optax
import pytest
from sharpness_cases import ALL

import optax_avg as oa
from optax_avg import rules

LINK = r"oa\.sam\(0\.05\) is the link of a chain"
FACTORY = r"the function sam, which has to be called first"
TAKERS = {
    "sharpness_aware": lambda rule: oa.sharpness_aware(jax.value_and_grad(sum), rule),
    "as_link": oa.as_link,
    "multi_call": lambda rule: oa.multi_call(rule, optax.sgd(0.1)),
    "every_k": lambda rule: rules.every_k(rule, 2),
}


@pytest.mark.parametrize("name", TAKERS)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (oa.sam(), LINK),
        (optax.adam(0.1), LINK),
        (rules.sam, FACTORY),
        (oa.sam, FACTORY),
        (0.05, "It got float"),
        (None, "It got NoneType"),
    ],
)
def test_something_else_than_a_rule(name, given, message):
    with pytest.raises(TypeError, match=f"{name} needs a rule.*{message}"):
        TAKERS[name](given)


@pytest.mark.parametrize(
    "use",
    [
        lambda rule: optax.chain(rule, optax.sgd(0.1)),
        lambda rule: optax.named_chain(("rule", rule)),
        lambda rule: optax.MultiSteps(rule, 2),
        lambda rule: optax.masked(rule, True),
        lambda rule: optax.apply_if_finite(rule, 2),
        lambda rule: optax.with_extra_args_support(rule),
        lambda rule: rule.init({}),
    ],
)
def test_a_rule_where_optax_wants_a_link(use):
    with pytest.raises(AttributeError, match=r"take the link, such as oa\.sam"):
        use(rules.sam())


@pytest.mark.parametrize("take", [oa.multi_call, oa.decoupled_wsam])
@pytest.mark.parametrize(
    ("given", "message"),
    [(rules.sam(), "a sharpness rule"), (optax.sgd, "function sgd"), (0.1, "float")],
)
def test_something_else_than_an_optimizer(take, given, message):
    first = (rules.sam(),) if take is oa.multi_call else ()
    last = () if take is oa.multi_call else (0.1,)
    with pytest.raises(TypeError, match=f"needs an optimizer.*{message}"):
        take(*first, given, *last)


def test_arguments_in_the_wrong_order():
    with pytest.raises(TypeError, match=r"multi_call needs a rule.*swapped; call oa"):
        oa.multi_call(optax.sgd(0.1), rules.sam())
    swapped = r"sharpness_aware needs a rule.*swapped; call oa"
    with pytest.raises(TypeError, match=swapped):
        oa.sharpness_aware(rules.sam(), jax.value_and_grad(sum))
    with pytest.raises(TypeError, match="value_and_grad_fn must be a function"):
        oa.sharpness_aware(rules.sam(), rules.sam())
    with pytest.raises(TypeError, match="ascent_fn must be a function"):
        oa.sharpness_aware(jax.value_and_grad(sum), rules.sam(), ascent_fn=1.0)


@pytest.mark.parametrize("second", [(), (jnp.ones(2),), ({"x": jnp.ones(2)},)])
def test_the_state_of_a_rule_is_forgotten(second):
    sharp = oa.sharpness_aware(jax.value_and_grad(loss), rules.sam())
    with pytest.raises(TypeError, match=r"state = sharp\.init\(params\)"):
        sharp(jnp.ones(2), *second)


def test_a_link_without_its_gradient_names_the_other_form():
    tx = oa.sam()
    with pytest.raises(ValueError, match=r"TrainState.* oa\.sharpness_aware"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: oa.sharpness_aware(
            jax.value_and_grad(loss), rules.sam(), axis_name="devices"
        )(x, oa.sam().init(x)),
        lambda x: oa.krum(1, axis_name="devices").update(
            x, oa.krum(1, axis_name="devices").init(x), x
        ),
    ],
    ids=["sharpness_aware", "krum"],
)
def test_an_axis_that_is_not_mapped(call):
    with pytest.raises(ValueError, match="axis_name='devices' is not mapped here"):
        call(jnp.ones(2))


@pytest.mark.parametrize("given", [oa.ema_params(0.9), {"a": oa.ema_params(0.9)}])
def test_an_average_where_a_weight_belongs(given):
    with pytest.raises(TypeError, match="put it into the chain as it is"):
        oa.average(given)


def test_a_name_beside_a_dict_of_weights():
    with pytest.raises(ValueError, match="gives each average its name"):
        oa.average({"a": oa.weights.uniform()}, name="b")


def loss(p):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(p))


def with_aux(p):
    return loss(p), {"seen": p}


PARAMS = {
    "dict": {"w": jnp.ones((2, 3)), "b": jnp.ones(2)},
    "pair": (jnp.ones((2, 3)), jnp.ones(2)),
    "array": jnp.ones(2),
    "nested_pair": (jnp.ones(2), jnp.ones(2)),
}
NOT_PAIRS = {
    "loss": loss,
    "gradient": jax.grad(loss),
    "loss_with_aux": with_aux,
    "gradient_with_aux": jax.grad(with_aux, has_aux=True),
    "two_arguments": lambda p: jax.value_and_grad(lambda p, q: loss(p), (0, 1))(p, p),
    "by_example": lambda p: jax.tree.map(lambda x: jnp.stack([x, x]), (0.0, p)),
}


@pytest.mark.parametrize("place", ["value_and_grad_fn", "ascent_fn"])
@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("fn", NOT_PAIRS)
def test_something_else_than_value_and_grad(fn, params, has_aux, place):
    right = jax.value_and_grad(with_aux if has_aux else loss, has_aux=has_aux)
    both = {"value_and_grad_fn": right, "ascent_fn": right} | {place: NOT_PAIRS[fn]}
    x = PARAMS[params]
    sharp = oa.sharpness_aware(
        both["value_and_grad_fn"],
        rules.sam(),
        has_aux=has_aux,
        ascent_fn=both["ascent_fn"],
    )
    with pytest.raises(ValueError, match=rf"{place} .*pass jax\.value_and_grad\(loss"):
        sharp(x, sharp.init(x))


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("name", ["sam", "every_k", "momentum_sam"])
def test_forgotten_aux(name, params):
    x = PARAMS[params]
    aux = jax.value_and_grad(with_aux, has_aux=True)
    sharp = oa.sharpness_aware(aux, ALL[name])
    with pytest.raises(ValueError, match=r"has_aux=True\)"):
        sharp(x, sharp.init(x))
    sharp = oa.sharpness_aware(jax.value_and_grad(loss), ALL[name], has_aux=True)
    with pytest.raises(ValueError, match=r"leave has_aux out"):
        sharp(x, sharp.init(x))
    sharp = oa.sharpness_aware(aux, ALL[name], has_aux=True)
    (value, _), _, _ = sharp(x, sharp.init(x))
    assert float(value) == float(loss(x))


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (jax.value_and_grad(loss), "a value and a gradient"),
        (jax.grad(with_aux, has_aux=True), "a gradient and an aux"),
        (loss, "an array of shape"),
    ],
)
def test_something_else_than_a_gradient(fn, message, params):
    x = PARAMS[params]
    if params == "array" and message == "an array of shape":
        x = jnp.ones((2, 2))
    link, calls = oa.sam(), oa.multi_call(rules.sam(), optax.sgd(0.1))
    grads = jax.grad(loss)(x)
    with pytest.raises(ValueError, match=f"grad_fn .*{message}"):
        link.update(grads, link.init(x), x, grad_fn=fn)
    for tx in (link, calls):
        with pytest.raises(ValueError, match=f"first argument of update .*{message}"):
            tx.update(fn(x), tx.init(x), x, grad_fn=jax.grad(loss))


@pytest.mark.parametrize("params", PARAMS)
def test_gradients_where_their_function_should_stand(params):
    x = PARAMS[params]
    grads = jax.grad(loss)(x)
    for link in (oa.sam(), oa.decoupled_wsam(optax.sgd(0.1), 0.1)):
        for chain in (link, optax.chain(link)):
            with pytest.raises(TypeError, match=r"It is an? .*grad_fn=jax\.grad\(loss"):
                chain.update(grads, chain.init(x), x, grad_fn=grads)
    with pytest.raises(TypeError, match="grad_fn of sam must be a function"):
        oa.check_chain(oa.sam(), x, grad_fn=grads)


FACTORIES = {
    name: getattr(oa.weights, name)
    for name in dir(oa.weights)
    if inspect.isfunction(f := getattr(oa.weights, name))
    and f.__module__ == oa.weights.__name__
    and not name.startswith("_")
}


@pytest.mark.parametrize("name", FACTORIES)
def test_a_weight_whose_factory_was_not_called(name):
    makes_one = "A weight." in FACTORIES[name].__doc__ or name == "with_stride"
    call = rf"call it first, as in oa\.weights\.{name}\(" if makes_one else "call what"
    for take in (
        oa.average,
        lambda weight: oa.average({"a": weight}),
        lambda weight: oa.weights.profile(weight, 3),
    ):
        with pytest.raises(ValueError, match=rf"^a weight .* {name} is none: {call}"):
            take(FACTORIES[name])


@pytest.mark.parametrize("given", [oa.ema_params, oa.sam, oa.weights.Mass])
def test_something_else_of_this_library_than_a_weight(given):
    with pytest.raises(ValueError, match=r"is none: call what makes a weight, as in"):
        oa.average(given)


@pytest.mark.parametrize(
    "make",
    [
        lambda: oa.ema_params(optax.constant_schedule),
        lambda: oa.average(functools.partial(oa.weights.ema, debias=False)),
    ],
)
def test_a_function_that_returns_a_schedule_or_weight(make):
    x = jnp.ones(2)
    with pytest.raises(ValueError, match=r"must return a number.*is a function; call"):
        make().update(x, make().init(x), x)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (oa.ema_params, "the function ema_params, which has to be called first"),
        (0.999, "float"),
        (rules.sam(), "a sharpness rule"),
    ],
)
def test_something_else_than_an_average_to_write_back(given, message):
    with pytest.raises(TypeError, match=f"write_back needs an average.*{message}"):
        oa.write_back(given, 5)


def test_what_is_right_is_taken():
    """None for leaves without a gradient, a list for the pair, a scalar."""
    x = {"w": jnp.ones(2), "frozen": jnp.ones(3)}

    def value_and_grad(p):
        value, g = jax.value_and_grad(loss)(p)
        return [value, g | {"frozen": None}]

    sharp = oa.sharpness_aware(value_and_grad, rules.sam())
    _, g, _ = sharp(x, sharp.init(x))
    assert g["frozen"] is None
    sharp = oa.sharpness_aware(jax.value_and_grad(lambda x: x**2), rules.sam())
    _, g, _ = sharp(jnp.array(2.0), sharp.init(jnp.array(2.0)))
    assert abs(float(g) - 4.1) < 1e-6


@pytest.mark.parametrize("name", ALL)
def test_complex_leaves_are_refused_by_name(name):
    x = {"bias": jnp.ones(2), "norm": jnp.ones(3), "weight": jnp.ones((2, 2)) + 1j}
    makers = [
        oa.sharpness_aware(jax.value_and_grad(loss), ALL[name]),
        oa.as_link(ALL[name]),
        oa.multi_call(ALL[name], optax.sgd(0.1)),
    ]
    for maker in makers:
        with pytest.raises(ValueError, match=r"\['weight'\] is complex.*lax\.com"):
            maker.init(x)
