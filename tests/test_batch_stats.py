"""Statistics of normalisation over a population, in three frameworks.

The reference concatenates what a layer has seen and takes NumPy's mean and variance in
float64.
"""

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given
from jax.sharding import PartitionSpec as P

import optax_avg as oa
from optax_avg.frameworks import _pooling

BATCHES = [jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[10.0], [20.0]])]
RNG = np.random.default_rng(0)
# Batches of several sizes whose means differ: means of variances are far off.
DATA = [
    jnp.asarray(RNG.normal(shift, 1.0 + abs(shift), size=(n, 3)), jnp.float32)
    for n, shift in ((4, 0.0), (7, 2.0), (1, 5.0), (4, -3.0))
]


def moments(values):
    """Mean and variance of all rows of some arrays, in float64."""
    rows = np.concatenate(
        [np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in values]
    )
    return rows.mean(0), rows.var(0)


def check(stats, values, rtol=2e-5):
    mean, var = moments(values)
    np.testing.assert_allclose(stats[0], mean, rtol=rtol, atol=1e-5)
    np.testing.assert_allclose(stats[1], var, rtol=rtol, atol=1e-5)


def norm_nnx(features, **options):
    return nnx.BatchNorm(features, rngs=nnx.Rngs(0), **options)


def of_nnx(layer):
    return layer.mean[...], layer.var[...]


def variables_of(model, x, **kwargs):
    return model.init(jax.random.key(0), x, **kwargs)


def of_linen(variables, *path):
    for name in ("batch_stats", *path):
        variables = variables[name]
    return variables["mean"], variables["var"]


# The pool


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    shift=st.floats(-100, 100),
    seed=st.integers(0, 99),
)
def test_pool_is_the_population(sizes, shift, seed):
    rng = np.random.default_rng(seed)
    data = [rng.normal(shift * i, 1.0, size=(n, 2)) for i, n in enumerate(sizes)]
    pool = _pooling.empty_pool(jnp.zeros(2))
    for x in data:
        # A masked layer says NaN where nothing is left.
        mean = x.mean(0) if len(x) else np.full(2, np.nan)
        var = x.var(0) if len(x) else np.full(2, np.nan)
        pool = _pooling.absorbed(pool, len(x), jnp.float32(mean), jnp.float32(var))
    rows = np.concatenate(data)
    assert float(pool.pool_count[0]) == len(rows)
    if len(rows):
        var = pool.pool_within + pool.pool_between
        np.testing.assert_allclose(pool.pool_mean, rows.mean(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(var, rows.var(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.9, 0.99, 0.999, 0.9999, 127 / 128])
def test_momenta_are_read_as_they_were_written(momentum):
    found = _pooling._as_written(np.full(3, momentum, np.float32))
    np.testing.assert_array_equal(found, np.full(3, momentum))


# The numbers that pooled variances must give, whatever the momentum


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("exact", [False, True])
def test_two_batches_of_one_feature(momentum, exact):
    model = norm_nnx(1, momentum=momentum)
    same = oa.frameworks.nnx.recompute_batch_stats(model, BATCHES, exact=exact)
    assert same is model
    layer = nn.BatchNorm(momentum=momentum, use_running_average=False)
    variables = variables_of(layer, BATCHES[0])
    linen = oa.frameworks.linen.recompute_batch_stats(
        layer.apply, variables, BATCHES, exact=exact
    )
    for mean, var in (of_nnx(model), of_linen(linen)):
        np.testing.assert_allclose(mean, [7.2], rtol=2e-6)
        np.testing.assert_allclose(var, [50.96], rtol=2e-6)  # torch's update_bn: 25.5


@pytest.mark.parametrize("mode", ["batch", "ema"])
@pytest.mark.parametrize("momentum", [0.9, 0.999])
@pytest.mark.parametrize("exact", [False, True])
def test_two_batches_in_equinox(mode, momentum, exact):
    model, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        1, "batch", mode=mode, momentum=momentum
    )
    new = oa.frameworks.equinox.recompute_batch_stats(
        model, state, BATCHES, exact=exact
    )
    index = model.batch_state_index if mode == "batch" else model.ema_state_index
    np.testing.assert_allclose(new.get(index)[0], [7.2], rtol=2e-6)
    np.testing.assert_allclose(new.get(index)[1], [50.96], rtol=2e-6)
    state.get(index)  # is still valid
    still = eqx.nn.inference_mode(model)
    each = jax.vmap(still, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    out, _ = each(jnp.array([[7.2], [7.2 + 50.96**0.5]]), new)
    np.testing.assert_allclose(out, [[0.0], [1.0]], atol=1e-5)


def test_an_iterator_is_read_once():
    read = []

    def stream():
        for batch in BATCHES:
            read.append(batch)
            yield batch

    model = oa.frameworks.nnx.recompute_batch_stats(norm_nnx(1), stream())
    np.testing.assert_allclose(of_nnx(model), [[7.2], [50.96]], rtol=2e-6)
    assert len(read) == 2
    with pytest.raises(ValueError, match="pass a list, or leave exact out"):
        oa.frameworks.nnx.recompute_batch_stats(model, stream(), exact=True)
    with pytest.raises(ValueError, match="there is no batch"):
        oa.frameworks.nnx.recompute_batch_stats(model, iter([]))


# Whole models


class Deep(nnx.Module):
    """Layers, a list, Dropout and a BatchNorm that is used twice."""

    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norms = nnx.List(
            [nnx.BatchNorm(4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)]
        )
        self.shared = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.norms[0](self.first(x))
        x = self.dropout(jnp.tanh(x))
        x = self.shared(x) + 1.0
        x = jnp.tanh(self.shared(2.0 * x))
        return self.norms[1](x[:, None] * jnp.ones((1, 5, 1)))


def others_of(model):
    """All but the statistics, keys of random numbers as numbers."""
    key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    leaves = jax.tree.leaves(nnx.state(model, nnx.Not(nnx.BatchStat)))
    return [np.array(jax.random.key_data(x) if key(x) else x) for x in leaves]


def inputs_of_deep(model, data, exact):
    """What each layer sees, in float64."""
    kernel = np.asarray(model.first.kernel[...], np.float64)
    bias = np.asarray(model.first.bias[...], np.float64)

    def normalised(batches, over=None):
        stats = None if over is None else moments(over)
        out = []
        for x in batches:
            mean, var = moments([x]) if stats is None else stats
            out.append((x - mean) / np.sqrt(var + 1e-5))
        return out

    rows = [np.asarray(x, np.float64) @ kernel + bias for x in data]
    first = normalised(rows, rows if exact else None)
    one = [np.tanh(x) for x in first]
    two = [2.0 * (x + 1.0) for x in normalised(one)]
    last = [np.tanh(x) for x in normalised(two)]
    return rows, one, two, last


def test_nested_and_shared_layers_of_nnx():
    model = Deep(nnx.Rngs(0))
    before = others_of(model)
    model.train()
    oa.frameworks.nnx.recompute_batch_stats(model, DATA)
    rows, one, two, last = inputs_of_deep(model, DATA, exact=False)
    check(of_nnx(model.norms[0]), rows)
    check(of_nnx(model.shared), one + two)
    check(of_nnx(model.norms[1]), last, rtol=1e-4)
    for a, b in zip(before, others_of(model), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not model.dropout.deterministic
    assert type(model.shared) is nnx.BatchNorm
    assert len(jax.tree.leaves(nnx.state(model, nnx.BatchStat))) == 6


class Plain(nn.Module):
    """The same in linen, with the switch as an attribute, an argument, or neither."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        x = nn.Dropout(0.5, deterministic=not train)(jnp.tanh(x))
        shared = nn.BatchNorm(momentum=0.5, name="shared")
        x = shared(x, not train) + 1.0
        x = jnp.tanh(shared(2.0 * x, use_running_average=not train))
        return nn.BatchNorm(name="last")(
            x[:, None] * jnp.ones((1, 5, 1)), use_running_average=not train
        )


@pytest.mark.parametrize("kwargs", [{"train": False}, {"train": True}])
def test_nested_and_shared_layers_of_linen(kwargs):
    model = Plain()
    variables = variables_of(model, DATA[0], train=False)
    if kwargs["train"]:
        kwargs = {**kwargs, "rngs": {"dropout": jax.random.key(1)}}
    found = oa.frameworks.linen.recompute_batch_stats(
        model.apply, variables, DATA, **kwargs
    )
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    twin = Deep(nnx.Rngs(0))
    twin.first.kernel[...] = variables["params"]["Dense_0"]["kernel"]
    rows, one, two, last = inputs_of_deep(twin, DATA, exact=False)
    check(of_linen(found, "BatchNorm_0"), rows)
    if not kwargs["train"]:
        check(of_linen(found, "shared"), one + two)
        check(of_linen(found, "last"), last, rtol=1e-4)


class Two(nnx.Module):
    def __init__(self, rngs):
        self.second = nnx.BatchNorm(2, rngs=rngs)  # not in the order of the calls
        self.first = nnx.BatchNorm(3, rngs=rngs)
        self.linear = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.linear(self.first(x))))


class TwoLinen(nn.Module):
    def setup(self):
        self.second = nn.BatchNorm(use_running_average=True)
        self.first = nn.BatchNorm(use_running_average=True)
        self.linear = nn.Dense(2)

    def __call__(self, x):
        return self.second(jnp.tanh(self.linear(self.first(x))))


class TwoEquinox(eqx.Module):
    second: eqx.nn.BatchNorm
    first: eqx.nn.BatchNorm
    linear: eqx.nn.Linear

    def __init__(self):
        self.second = eqx.nn.BatchNorm(2, "batch", mode="ema")
        self.first = eqx.nn.BatchNorm(3, "batch", mode="batch")
        self.linear = eqx.nn.Linear(3, 2, key=jax.random.key(0))

    def __call__(self, x, state):
        x, state = self.first(x, state)
        return self.second(jnp.tanh(self.linear(x)), state)


def second_inputs(kernel, bias, exact):
    kernel, bias = np.asarray(kernel, np.float64), np.asarray(bias, np.float64)
    out = []
    for x in DATA:
        mean, var = moments(DATA) if exact else moments([x])
        x = (np.asarray(x, np.float64) - mean) / np.sqrt(var + 1e-5)
        out.append(np.tanh(x @ kernel + bias))
    return out


@pytest.mark.parametrize("exact", [False, True])
def test_later_layers_see_what_evaluation_shows_them(exact):
    model = Two(nnx.Rngs(0))
    oa.frameworks.nnx.recompute_batch_stats(model, DATA, exact=exact)
    wanted = second_inputs(model.linear.kernel[...], model.linear.bias[...], exact)
    check(of_nnx(model.first), DATA)
    check(of_nnx(model.second), wanted, rtol=1e-4)

    model = TwoLinen()
    variables = variables_of(model, DATA[0])
    params = variables["params"]["linear"]
    found = oa.frameworks.linen.recompute_batch_stats(
        model.apply, variables, DATA, exact=exact
    )
    check(of_linen(found, "first"), DATA)
    wanted = second_inputs(params["kernel"], params["bias"], exact)
    check(of_linen(found, "second"), wanted, rtol=1e-4)

    model, state = eqx.nn.make_with_state(TwoEquinox)()
    found = oa.frameworks.equinox.recompute_batch_stats(model, state, DATA, exact=exact)
    check(found.get(model.first.batch_state_index), DATA)
    wanted = second_inputs(model.linear.weight.T, model.linear.bias, exact)
    check(found.get(model.second.ema_state_index), wanted, rtol=1e-4)


def test_exact_statistics_are_those_of_the_evaluated_model():
    """A second round finds nothing to change."""
    model = oa.frameworks.nnx.recompute_batch_stats(Two(nnx.Rngs(0)), DATA, exact=True)
    model.eval()
    seen = [np.asarray(jnp.tanh(model.linear(model.first(x)))) for x in DATA]
    check(of_nnx(model.second), seen, rtol=1e-4)


def test_masked_values_do_not_count():
    masks = [jnp.arange(len(x)) < n for x, n in zip(DATA, (2, 7, 0, 3))]
    kept = [x[mask] for x, mask in zip(DATA, masks)]
    batches = [(x, mask[:, None]) for x, mask in zip(DATA, masks)]
    model = oa.frameworks.nnx.recompute_batch_stats(
        norm_nnx(3), batches, lambda model, batch: model(batch[0], mask=batch[1])
    )
    check(of_nnx(model), kept)
    layer = nn.BatchNorm(use_running_average=False)
    apply_fn = lambda variables, batch, mutable: layer.apply(
        variables, batch[0], mask=batch[1], mutable=mutable
    )
    found = oa.frameworks.linen.recompute_batch_stats(
        apply_fn, variables_of(layer, DATA[0]), batches
    )
    check(of_linen(found), kept)
    with pytest.raises(ValueError, match="mask of the first batch"):
        oa.frameworks.nnx.recompute_batch_stats(
            norm_nnx(3),
            batches[2:],
            lambda model, batch: model(batch[0], mask=batch[1]),
        )


class Own(nn.Module):
    """A layer of the user's: other moments of the batch, PyTorch's momentum."""

    @nn.compact
    def __call__(self, x, train=True):
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        if train:
            m, v = x.mean(0), x.var(0)
            if not self.is_initializing():
                mean.value = 0.75 * mean.value + 0.25 * m
                var.value = 0.9375 * var.value + 0.0625 * v
        else:
            m, v = mean.value, var.value
        return (x - m[None]) / jnp.sqrt(v[None] + 1e-5)


class OwnNnx(nnx.Module):
    def __init__(self):
        self.mean = nnx.BatchStat(jnp.zeros(3))
        self.var = nnx.BatchStat(jnp.ones(3))
        self.momentum = 0.25  # of the new value, as in PyTorch

    def __call__(self, x):
        for old, new in ((self.mean, x.mean(0)), (self.var, x.var(0))):
            old[...] = (1 - self.momentum) * old[...] + self.momentum * new
        return x


def test_layers_of_the_users():
    layer = Own()
    variables = variables_of(layer, DATA[0])
    found = oa.frameworks.linen.recompute_batch_stats(layer.apply, variables, DATA)
    check(of_linen(found), DATA)
    model = oa.frameworks.nnx.recompute_batch_stats(OwnNnx(), DATA)
    check(of_nnx(model), DATA)
    with pytest.raises(ValueError, match="did not move its statistics"):
        oa.frameworks.linen.recompute_batch_stats(
            layer.apply, variables, DATA, train=False
        )


class Derived(nn.BatchNorm):
    """A call within a call is one call."""

    @nn.compact
    def __call__(self, x):
        return super().__call__(x) + 1.0


def test_a_derived_layer_counts_once():
    layer = Derived(use_running_average=True)
    found = oa.frameworks.linen.recompute_batch_stats(
        layer.apply, variables_of(layer, DATA[0]), DATA
    )
    check(of_linen(found), DATA)


class Stack(nn.Module):
    """Blocks in a scan: their statistics are stacked."""

    @nn.compact
    def __call__(self, x):
        block = nn.scan(
            lambda layer, x, _: (2.0 * layer(x) + 1.0, None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=2,
        )
        return block(nn.BatchNorm(use_running_average=False), x, None)[0]


def test_stacked_layers():
    model = Stack()
    variables = variables_of(model, DATA[1])
    found = oa.frameworks.linen.recompute_batch_stats(model.apply, variables, DATA)
    (stats,) = found["batch_stats"].values()
    check((stats["mean"][0], stats["var"][0]), DATA)
    # The batch of one example is 0 after the first block, and the others are spread.
    wanted = []
    for x in DATA:
        mean, var = moments([x])
        wanted.append(2.0 * (np.asarray(x) - mean) / np.sqrt(var + 1e-5) + 1.0)
    check((stats["mean"][1], stats["var"][1]), wanted)


class StackNnx(nnx.Module):
    """The same in Flax nnx."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=0)
        def blocks(rngs):
            return nnx.BatchNorm(3, rngs=rngs)

        self.blocks = blocks(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def through(block, x):
            return 2.0 * block(x) + 1.0

        return through(self.blocks, x)


def test_stacked_layers_of_nnx():
    model = oa.frameworks.nnx.recompute_batch_stats(StackNnx(nnx.Rngs(0)), DATA)
    mean, var = of_nnx(model.blocks)
    check((mean[0], var[0]), DATA)
    wanted = []
    for x in DATA:
        m, v = moments([x])
        wanted.append(2.0 * (np.asarray(x) - m) / np.sqrt(v + 1e-5) + 1.0)
    check((mean[1], var[1]), wanted)


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_a_shared_layer_of_equinox(mode):
    class Twice(eqx.Module):
        norm: eqx.nn.BatchNorm
        dropout: eqx.nn.Dropout

        def __init__(self):
            self.norm = eqx.nn.BatchNorm(3, "batch", mode=mode)
            self.dropout = eqx.nn.Dropout(0.5)  # without a key: must be off

        def __call__(self, x, state):
            x, state = self.norm(x, state)
            return self.norm(jnp.tanh(2.0 * self.dropout(x)), state)

    model, state = eqx.nn.make_with_state(Twice)()
    found = oa.frameworks.equinox.recompute_batch_stats(model, state, DATA)
    second = []
    for x in DATA:
        mean, var = moments([x])
        x = (np.asarray(x, np.float64) - mean) / np.sqrt(var + 1e-5)
        second.append(np.tanh(2.0 * x))
    norm = model.norm
    index = norm.batch_state_index if mode == "batch" else norm.ema_state_index
    check(found.get(index), [*DATA, *second])


class OwnEquinox(eqx.nn.BatchNorm):
    """A layer of the user's, without an argument for the mode."""

    def __call__(self, x, state):
        x, state = super().__call__(2.0 * x, state)
        return x + 5.0, state


@pytest.mark.parametrize("mode", ["batch", "ema"])
@pytest.mark.parametrize("exact", [False, True])
def test_a_derived_layer_of_equinox(mode, exact):
    class Both(eqx.Module):
        first: OwnEquinox
        second: eqx.nn.BatchNorm

        def __init__(self):
            self.first = OwnEquinox(3, "batch", mode=mode)
            self.second = eqx.nn.BatchNorm(3, "batch", mode="batch")

        def __call__(self, x, state):
            x, state = self.first(x, state)
            return self.second(x, state)

    model, state = eqx.nn.make_with_state(Both)()
    found = oa.frameworks.equinox.recompute_batch_stats(model, state, DATA, exact=exact)
    twice, norm = [2.0 * np.asarray(x, np.float64) for x in DATA], model.first
    wanted = []
    for x in twice:
        mean, var = moments(twice if exact else [x])
        wanted.append((x - mean) / np.sqrt(var + 1e-5) + 5.0)
    index = norm.batch_state_index if mode == "batch" else norm.ema_state_index
    check(found.get(index), twice)
    check(found.get(model.second.batch_state_index), wanted, rtol=1e-4)


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_stacked_models_of_equinox(mode):
    """An ensemble has a statistic and a count for each member."""
    new = eqx.nn.make_with_state(eqx.nn.BatchNorm)
    each = eqx.filter_vmap(lambda _: new(3, "batch", mode=mode))
    model, state = each(jnp.arange(2))

    def forward(model, state, x):
        over = {"axis_name": "batch", "in_axes": (0, None), "out_axes": (0, None)}
        x = 2.0 * x
        return eqx.filter_vmap(lambda *pair: jax.vmap(pair[0], **over)(x, pair[1])[1])(
            model, state
        )

    found = oa.frameworks.equinox.recompute_batch_stats(model, state, DATA, forward)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        assert a.shape == b.shape
    index = model.batch_state_index if mode == "batch" else model.ema_state_index
    for mean, var in zip(*found.get(index)):
        check((mean, var), [2.0 * x for x in DATA])


def test_layers_of_equinox_with_several_axes():
    model, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, ("a", "b"), mode="batch")
    with pytest.raises(ValueError, match="join several axes; pass forward="):
        oa.frameworks.equinox.recompute_batch_stats(model, state, DATA)

    def forward(model, state, x):
        over = {"in_axes": (0, None), "out_axes": (0, None)}
        each = jax.vmap(jax.vmap(model, axis_name="b", **over), axis_name="a", **over)
        return each(x, state)[1]

    batches = [x.reshape(-1, 1, 3) for x in DATA]
    found = oa.frameworks.equinox.recompute_batch_stats(model, state, batches, forward)
    check(found.get(model.batch_state_index), DATA)


def test_an_order_that_a_compiled_program_hides():
    layer = nn.BatchNorm(use_running_average=True)
    variables = variables_of(layer, DATA[0])
    compiled = jax.jit(layer.apply, static_argnames="mutable")
    apply_fn = lambda variables, x, mutable: compiled(
        variables, x, mutable=tuple(mutable)
    )
    again = oa.frameworks.linen.recompute_batch_stats
    for _ in range(2):
        check(of_linen(again(apply_fn, variables, DATA)), DATA)
    with pytest.raises(ValueError, match=r"pass one without jax\.jit"):
        again(apply_fn, variables, DATA, exact=True)


def test_models_without_such_layers_pass_through():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    assert oa.frameworks.nnx.recompute_batch_stats(model, DATA) is model
    dense = nn.Dense(2)
    variables = variables_of(dense, DATA[0])
    found = oa.frameworks.linen.recompute_batch_stats(dense.apply, variables, DATA)
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    model, state = eqx.nn.make_with_state(eqx.nn.Linear)(3, 2, key=jax.random.key(0))
    oa.frameworks.equinox.recompute_batch_stats(model, state, DATA)


def test_layers_that_are_not_called_keep_their_statistics():
    model = Two(nnx.Rngs(0))
    model.second.mean[...] = jnp.array([3.0, 4.0])
    for exact in (False, True):
        oa.frameworks.nnx.recompute_batch_stats(
            model, DATA, lambda model, x: model.first(x), exact=exact
        )
        check(of_nnx(model.first), DATA)
        np.testing.assert_array_equal(model.second.mean[...], [3.0, 4.0])


def test_models_that_are_not_called():
    nothing = r"let forward or apply_fn call the model that it is given"
    with pytest.raises(ValueError, match=nothing):
        oa.frameworks.nnx.recompute_batch_stats(norm_nnx(3), DATA, lambda model, x: x)
    layer = nn.BatchNorm(use_running_average=True)
    with pytest.raises(ValueError, match=nothing):
        oa.frameworks.linen.recompute_batch_stats(
            lambda variables, x, mutable: (x, variables),
            variables_of(layer, DATA[0]),
            DATA,
        )
    model, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="batch")
    with pytest.raises(ValueError, match=nothing):
        oa.frameworks.equinox.recompute_batch_stats(
            model, state, DATA, lambda model, state, x: state
        )


def test_a_forward_that_returns_more_than_the_state():
    model, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="batch")
    over = {"axis_name": "batch", "in_axes": (0, None), "out_axes": (0, None)}
    forward = lambda model, state, x: jax.vmap(model, **over)(x, state)
    with pytest.raises(TypeError, match=r"of \(out, state\) take the second"):
        oa.frameworks.equinox.recompute_batch_stats(model, state, DATA, forward)


def test_nothing_on_the_way_is_nan():
    with jax.debug_nans(True):
        model = oa.frameworks.nnx.recompute_batch_stats(norm_nnx(3), DATA)
    check(of_nnx(model), DATA)


def test_statistics_are_not_computed_under_jit():
    with pytest.raises(TypeError, match=r"outside of jax\.jit"):
        nnx.jit(oa.frameworks.nnx.recompute_batch_stats)(norm_nnx(3), DATA)


# Devices


def test_layers_join_a_mapped_axis():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    data = [
        jnp.asarray(RNG.normal(i, 1 + i, (n, 3)), jnp.float32)
        for i, n in enumerate((8, 4, 16))
    ]
    model = norm_nnx(3, axis_name="d")

    def forward(model, x):
        graphdef, state = nnx.split(model)

        def each(state, x):
            inner = nnx.merge(graphdef, state, copy=True)
            inner(x)
            return nnx.state(inner)

        moved = jax.shard_map(each, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
        nnx.update(model, moved(state, x))

    oa.frameworks.nnx.recompute_batch_stats(model, data, forward)
    check(of_nnx(model), data)

    layer = nn.BatchNorm(use_running_average=True, axis_name="d")
    alone = nn.BatchNorm(use_running_average=True)

    def apply_fn(variables, x, mutable):
        each = lambda variables, x: layer.apply(variables, x, mutable=mutable)
        mapped = jax.shard_map(
            each, mesh=mesh, in_specs=(P(), P("d")), out_specs=(P("d"), P())
        )
        return mapped(variables, x)

    variables = variables_of(alone, data[0])
    found = oa.frameworks.linen.recompute_batch_stats(apply_fn, variables, data)
    check(of_linen(found), data)
    # The same axis by vmap, with masks that differ between its members.
    masks = [jnp.arange(len(x)) % 4 < 3 for x in data]
    batches = [(x.reshape(4, -1, 3), m.reshape(4, -1, 1)) for x, m in zip(data, masks)]

    def masked(variables, batch, mutable):
        each = lambda x, mask: layer.apply(variables, x, mask=mask, mutable=mutable)
        axes = {"axis_name": "d", "out_axes": (0, None)}
        return jax.vmap(each, **axes)(*batch)

    found = oa.frameworks.linen.recompute_batch_stats(masked, variables, batches[2:])
    check(of_linen(found), [data[2][masks[2]]])


# jax 0.8 warns that a pmap inside jit moves data.
@pytest.mark.filterwarnings("ignore:The function jit\\(step\\) includes a pmap")
def test_pmap():
    layer = nn.BatchNorm(use_running_average=True, axis_name="d")
    alone = nn.BatchNorm(use_running_average=True)
    variables = variables_of(alone, DATA[0])
    copies = jax.tree.map(lambda x: jnp.stack([x] * 4), variables)

    def apply_fn(variables, x, mutable):
        each = lambda variables, x: layer.apply(variables, x, mutable=mutable)
        return jax.pmap(each, axis_name="d", devices=jax.devices()[:4])(variables, x)

    data = [jnp.concatenate([x] * 4) + jnp.arange(4.0 * len(x))[:, None] for x in DATA]
    batches = [x.reshape(4, -1, 3) for x in data]
    found = oa.frameworks.linen.recompute_batch_stats(apply_fn, copies, batches)
    mean, var = of_linen(found)
    for i in range(4):
        check((mean[i], var[i]), data)


def test_a_batch_in_parts_on_devices_is_one_batch():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    parts = jax.sharding.NamedSharding(mesh, P("d"))
    data = [
        jax.device_put(jnp.ones((4 * n, 3)) * jnp.arange(4.0 * n)[:, None], parts)
        for n in (1, 2)
    ]
    model = oa.frameworks.nnx.recompute_batch_stats(norm_nnx(3), data)
    check(of_nnx(model), data)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_statistics_are_summed_in_float32(dtype):
    layer = norm_nnx(3, momentum=0.99)
    for stat in (layer.mean, layer.var):
        stat.set_value(stat[...].astype(dtype))
    oa.frameworks.nnx.recompute_batch_stats(layer, DATA)
    mean, var = of_nnx(layer)
    assert mean.dtype == var.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    check((mean.astype(jnp.float32), var.astype(jnp.float32)), DATA, rtol=eps)
