"""What Optax's own tests ask of every optimizer, asked of ours.

Inits on shapes alone, dtypes with 64 bits, trees of parameters found in states, steps
to a minimum; ``test_contract.py`` has what they ask besides.
"""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from cases import (
    AVERAGES,
    CASES,
    FEEDBACK,
    LINKS,
    SIBLINGS,
    beside,
    grads_of,
    params_of,
    read,
)

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_kind = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow] * (name in SIBLINGS))
        for name, case in CASES.items()
    ],
)
# SAM climbs along the gradient of a real function; complex elements have no order.
REAL = {
    *LINKS,
    *("multi_call", "decoupled_wsam", "cclip", "clip_by_coordinate_quantile"),
    *("coordinate_median", "trimmed_mean"),
    *("spectral_regularisation", "adahessian", "scale_by_adahessian"),
    "preconditioned_polyak",
    *("cautious", "grams"),
    # Sizes and signs are compared; a variance is real.
    *("bsam", *FEEDBACK),
}
DTYPES = {
    "float32": (jnp.float32, jnp.float32, jnp.float32),
    "float64": (jnp.float64, jnp.float64, jnp.float64),
    "mixed": (jnp.float32, jnp.float64, jnp.bfloat16),
    "complex": (jnp.complex64, jnp.complex128, jnp.float32),
}


@every_case
def test_init_of_shapes_is_a_state_of_shapes(case):
    params = jax.eval_shape(lambda: params_of(jnp.bfloat16))
    state = case.make().init(params)
    wanted = jax.eval_shape(case.make().init, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, wanted)


def types_after_a_step(tx, dtypes):
    """Types of updates, parameters and states before and after a step, nothing run."""

    def begin():
        params = params_of(jnp.float32)
        params = {
            key: x.astype(dtype)
            for (key, x), dtype in zip(params.items(), dtypes, strict=True)
        }
        return params, tx.init(params)

    def advance(params, state):
        grads = lambda params: jax.tree.map(
            lambda g, x: g.astype(x.dtype), grads_of(params), params
        )
        return tx.update(grads(params), state, params, grad_fn=grads)

    params, state = jax.eval_shape(begin)
    updates, after = jax.eval_shape(advance, params, state)
    return updates, params, after, state


@each_kind
@pytest.mark.parametrize("kind", DTYPES)
def test_dtypes_last_under_x64(case, kind):
    if kind == "complex" and any(case is CASES[name] for name in REAL):
        pytest.skip("takes real parameters")
    with jax.enable_x64(True):
        found = types_after_a_step(case.make(), DTYPES[kind])
        updates, params, after, state = found
    assert jax.tree.flatten(after) == jax.tree.flatten(state)
    chex.assert_trees_all_equal_dtypes(updates, params)


@every_case
def test_map_params_finds_the_trees_like_the_parameters(case):
    params = params_of(jnp.float32)
    tx = case.make()
    state = tx.init(params)
    same = optax.tree.map_params(tx, lambda leaf: leaf, state)
    chex.assert_trees_all_equal(same, state)
    found = optax.tree.map_params(tx, lambda leaf: None, state)
    left = jax.tree.leaves(found)
    assert not any(x.shape[-2:] == (8, 2) or x.shape[-1:] == (8,) for x in left)


MINIMUM = {"a": jnp.array([1.0, -1.0, 2.0]), "b": jnp.array([[1.0, 0.0], [-1.0, 4.0]])}
# Their averages are still some way behind after 4000 steps.
LAGGING = AVERAGES["bema"], AVERAGES["lr_weighted_average"]
# Rounds of solvers take long. What perp_grad leaves of a gradient never scales; Gravity
# hardly moves where gradients are far above 1; norm_preserving keeps the norm.
LONG = {"mgda", "geometric_median"}
ELSEWHERE = {"perp_grad", "gravity", "norm_preserving"}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case, id=name, marks=[pytest.mark.slow] * (name in SIBLINGS | LONG)
        )
        for name, case in CASES.items()
        if name not in ELSEWHERE
    ],
)
def test_steps_lead_to_the_minimum(case):
    tx = beside(case, optax.sgd(0.1))
    gap = lambda x: optax.tree.sub(x, MINIMUM)
    grad_fn = jax.grad(lambda x: optax.tree.norm(gap(x), squared=True))

    def advance(pair, _):
        params, state = pair
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return (optax.apply_updates(params, updates), state), None

    params = {"a": jnp.array([-1.0, 10.0, 1.0]), "b": jnp.zeros((2, 2))}
    train = jax.jit(lambda pair: jax.lax.scan(advance, pair, length=4000)[0])
    params, state = train((params, tx.init(params)))
    seen = {} if case in LAGGING else read(state, params)
    for tree in (params, *seen.values()):
        chex.assert_trees_all_close(tree, MINIMUM, rtol=3e-2, atol=3e-2)
