"""How states lie on devices, and what boxes of Flax say about it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, beside
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_avg as oa

RULES = (("embed", None), ("mlp", "d"))


class MLP(nn.Module):
    """Two layers with names for the axes of their matrices and of one bias."""

    @nn.compact
    def __call__(self, x):
        kernel = nn.initializers.lecun_normal()
        named = nn.with_logical_partitioning
        x = nn.Dense(
            8,
            kernel_init=named(kernel, ("embed", "mlp")),
            bias_init=named(nn.initializers.zeros, ("mlp",)),
        )(x)
        return nn.Dense(4, kernel_init=named(kernel, ("mlp", "embed")))(nn.tanh(x))


def loss(params, x):
    return jnp.mean((MLP().apply({"params": params}, x) - 1) ** 2)


@functools.partial(jax.jit, static_argnums=0)
def train_step(tx, params, state, x):
    updates, state = tx.update(jax.grad(loss)(params, x), state, params)
    return optax.apply_updates(params, updates), state


def start(tx, x):
    params = MLP().init(jax.random.key(0), x)["params"]
    return params, tx.init(params)


@pytest.mark.parametrize("k", [3, 4])
def test_window_under_logical_partitioning(k):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), oa.window_average(k))
    x = jnp.linspace(-1.0, 1.0, 30).reshape(5, 6)
    plain_params, plain_state = start(tx, x)
    begin = functools.partial(start, tx)
    specs = nn.get_partition_spec(jax.eval_shape(begin, x))
    shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)
    params, state = jax.jit(begin, out_shardings=shardings)(x)
    for _ in range(k + 1):
        plain_params, plain_state = train_step(tx, plain_params, plain_state, x)
        params, state = train_step(tx, params, state, x)
    ring = nn.unbox(state[1].averages["window"].ring)
    assert ring["Dense_0"]["kernel"].sharding.spec == P(None, None, "d")
    assert ring["Dense_0"]["bias"].sharding.spec == P(None, "d")
    assert tuple(ring["Dense_1"]["kernel"].sharding.spec)[:2] == (None, "d")
    average = oa.averaged_params(state, params)
    assert jax.tree.structure(average) == jax.tree.structure(params)
    for leaf, wanted, live in zip(
        jax.tree.leaves(average),
        jax.tree.leaves(oa.averaged_params(plain_state, plain_params)),
        jax.tree.leaves(params),
        strict=True,
    ):
        np.testing.assert_allclose(leaf, wanted, rtol=1e-5, atol=1e-6)
        assert leaf.sharding.is_equivalent_to(live.sharding, leaf.ndim)


class Row(nnx.Module):
    """One vector that lies over the devices."""

    def __init__(self):
        make = nnx.with_partitioning(lambda: jnp.arange(8.0), ("d",))
        self.w = nnx.Param(make())


@pytest.mark.parametrize("k", [3, 4])
def test_window_in_an_nnx_optimizer(k):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    tx = optax.chain(optax.sgd(0.1), oa.window_average(k))

    @nnx.jit
    def create():
        model = Row()
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        state = nnx.state((model, optimizer))
        specs = nnx.get_partition_spec(state)
        nnx.update((model, optimizer), jax.lax.with_sharding_constraint(state, specs))
        return model, optimizer

    with jax.set_mesh(mesh):
        model, optimizer = create()
        before = np.asarray(model.w[...])
        grads = nnx.grad(lambda model: jnp.sum(model.w[...] ** 2))
        for _ in range(2):
            optimizer.update(model, grads(model))
        ring = jax.tree.leaves(optimizer.opt_state[1].averages["window"].ring)[0]
        average = oa.averaged_params(optimizer, nnx.state(model, nnx.Param))
    specs = nnx.get_partition_spec(nnx.state(optimizer))
    spec = specs["opt_state"][1]["averages"]["window"]["ring"]["w"].get_value()
    assert ring.sharding.spec == spec == P(None, "d")
    np.testing.assert_allclose(average["w"][...], 0.72 * before, rtol=1e-6)


def test_window_of_nnx_variables_in_linen():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    make = nnx.with_partitioning(nnx.initializers.ones, ("d", None))
    layer = nnx.bridge.to_linen(nnx.Linear, 4, 3, kernel_init=make)
    with jax.set_mesh(mesh):
        params = layer.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
        state = oa.window_average(3).init(params)
        specs = nn.get_partition_spec(state.averages["window"].ring)
    assert specs["kernel"] == P(None, "d", None)


@pytest.mark.filterwarnings("error:Some donated buffers were not usable")
@pytest.mark.parametrize("spec", [P(), P("d")])
def test_an_average_in_host_memory_stays_there(spec):
    """Under jit, with params and state donated; the numbers are the device's."""
    to_host = jax.jit(lambda x: jax.device_put(x + 1, jax.memory.Space.Host))
    if to_host(jnp.ones(1)).sharding.memory_kind != "pinned_host":
        pytest.skip("jit of this jax gives no results in host memory (0.8.1 on CPU)")
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, spec)
    start = {"w": jnp.arange(8.0), "b": jnp.ones((4, 2))}
    found = []
    for kind in ("device", "pinned_host"):
        tx = optax.chain(optax.sgd(0.1), oa.ema_params(0.9, memory_kind=kind))

        def step(params, state, tx=tx):
            updates, state = tx.update(params, state, params)
            return optax.apply_updates(params, updates), state

        params = jax.device_put(jax.tree.map(jnp.copy, start), place)
        state = jax.jit(tx.init)(params)
        advance = jax.jit(step, donate_argnums=(0, 1))
        for _ in range(3):
            old = jax.tree.leaves(state[1].averages)
            params, state = advance(params, state)
            assert all(x.is_deleted() for x in old if x.ndim)
        for x in jax.tree.leaves(state[1].averages):
            if x.ndim and kind == "pinned_host":
                assert x.sharding.memory_kind == "pinned_host"
                assert x.sharding.is_equivalent_to(
                    place.with_memory_kind("pinned_host"), x.ndim
                )
        average = oa.averaged_params(state, params)
        found.append(jax.tree.map(np.asarray, average))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_devices_without_host_memory_are_named(monkeypatch):
    class Device:
        platform = "toy"

        def addressable_memories(self):
            return []

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    tx = oa.ema_params(0.9, memory_kind="pinned_host")
    with pytest.raises(
        ValueError, match="'pinned_host': devices of the backend 'toy' do"
    ):
        tx.init({"w": jnp.ones(2)})


def boxed(shape, names, value=0.5):
    return nn.LogicallyPartitioned(jnp.full(shape, value), names)


# The names of the axes of a transformer, as in Flax's example lm1b. All shapes differ.
LANGUAGE_MODEL = {
    "embedding": boxed((16, 8), ("vocab", "embed")),
    "query": boxed((8, 4, 6), ("embed", "heads", "kv")),
    "up": boxed((8, 24), ("embed", "mlp")),
    "down": boxed((24, 8), ("mlp", "embed")),
    "scale": boxed((8,), ("embed",)),
    "bias": boxed((24,), ("mlp",)),
}
NAMES = {x.value.shape: x.names for x in LANGUAGE_MODEL.values()}


def names_of(shape, stacked):
    """Names of the axes of an array of a state; of one more axis if it is a stack."""
    if shape in NAMES:
        return NAMES[shape]
    return (None, *NAMES[shape[1:]]) if stacked and shape[1:] in NAMES else None


@pytest.mark.parametrize("name", CASES)
def test_states_have_the_names_of_their_parameters(name):
    """Every array like a parameter is in a box like its box, also after an update."""
    tx = beside(CASES[name], optax.adamw(0.1))
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)

    def begin(params):
        state = tx.init(params)
        grads = jax.tree.map(jnp.ones_like, params)
        grad_fn = lambda params: jax.tree.map(lambda x: 2 * x, params)
        updates, after = tx.update(grads, state, params, grad_fn=grad_fn)
        return state, after, updates

    state, after, updates = jax.eval_shape(begin, LANGUAGE_MODEL)
    assert jax.tree.structure(updates) == jax.tree.structure(LANGUAGE_MODEL)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    leaves = jax.tree.leaves(state, is_leaf=is_box)
    # A box of a leaf that is left out holds nothing.
    for box in [x for x in leaves if is_box(x) and jax.tree.leaves(x)]:
        assert len(box.names) == box.value.ndim
        wanted = names_of(box.value.shape, stacked=True)
        if wanted is not None:
            assert (*box.names,) == wanted
    for x in leaves:
        if not is_box(x):
            assert names_of(x.shape, stacked=False) is None
