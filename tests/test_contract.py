"""What every public transformation promises, whatever it computes."""

import functools
import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import (
    AGGREGATORS,
    AVERAGES,
    CASES,
    SIBLINGS,
    beside,
    grads_of,
    jitted,
    observe,
    params_of,
    read,
    run,
    step,
)
from jax import shard_map
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_avg as oa

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def with_slow(slow):
    """All cases, some of them only with the slow tests."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, id=name, marks=[pytest.mark.slow] * slow(name))
            for name, case in CASES.items()
        ],
    )


each_kind = with_slow(lambda name: name in SIBLINGS)
# Where what is around a link is tried, not the link: some of each build.
A_FEW = {
    *("average_several", "ema_params", "ema_params_compensated", "window_average"),
    *("bema", "write_back", "lookahead", "sam", "gam", "look_sam", "vasso"),
    *("multi_call", "decoupled_wsam", "vclip", "clip_by_percentile", "bloop"),
    *("centered_clip", "pcgrad", "primal_average"),
}
a_few = with_slow(lambda name: name not in A_FEW)
# Five gradients a step, and solvers in it: seconds where others take a tenth of one.
SLOW_STEPS = AGGREGATORS.keys() - {"centered_clip"}
every_average = pytest.mark.parametrize("case", AVERAGES.values(), ids=AVERAGES.keys())
REJECTING = {
    name: case._replace(kwargs={**case.kwargs, "nonfinite": "reject"})
    for name, case in AVERAGES.items()
    if "nonfinite" in inspect.signature(case.factory).parameters
}
every_rejecting = pytest.mark.parametrize(
    "case", REJECTING.values(), ids=REJECTING.keys()
)
SECOND = (
    "ema_params",
    "window_average",
    "bema",
    "sam",
    "gam",
    "vclip",
    "clip_by_percentile",
    "one_pass_location",
)


def each_kind_with(name, *values):
    """Each kind with the first of the values, a few with the others, too."""
    return pytest.mark.parametrize(
        ("case", name),
        [
            pytest.param(
                case,
                value,
                id=f"{key}-{getattr(value, '__name__', value)}",
                marks=[pytest.mark.slow]
                * (key in SIBLINGS or not (value == values[0] or key in SECOND)),
            )
            for key, case in CASES.items()
            for value in values
        ],
    )


SGD = optax.sgd(0.1, momentum=0.9)


CHAINS = {id(case): beside(case, SGD) for case in CASES.values()}


def chain(case):
    return CHAINS[id(case)]


def gradients(i):
    """The gradient function of step ``i``, which some links need."""
    return lambda params: grads_of(params, i)


def steps_of(case, state):
    return int(optax.tree.get(state, case.counter)) // case.samples


def tolerance(dtype):
    return {"atol": 2 * float(jnp.finfo(dtype).eps), "rtol": 1e-5}


def rounding_of(case):
    """Relative tolerance; what rounds narrow accumulators depends on the leaf."""
    narrow = ("ema_params_bf16", "ema_params_fp16", "ema_params_stochastic")
    return 2e-2 if case in [CASES[name] for name in narrow] else 1e-6


def check_close(a, b, **kwargs):
    chex.assert_trees_all_close(as_f32(a), as_f32(b), **kwargs)


def numbers_of(tree):
    """The leaves that are no PRNG keys."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return [x for x in jax.tree.leaves(tree) if not is_key(x)]


def as_f32(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


def test_every_public_transformation_has_a_case():
    names = {
        name
        for family in (oa, oa.optimizers)
        for name in family.__all__
        if inspect.isfunction(getattr(family, name))
        and re.search(
            "GradientTransformation|Aggregator",
            str(inspect.signature(getattr(family, name)).return_annotation),
        )
    }
    covered = {case.factory.__name__ for case in CASES.values()}
    assert names == (covered | {"write_back", "multi_call"}) - {"<lambda>"}


@each_kind
def test_jit_equals_eager(case):
    dtype = jnp.bfloat16  # where XLA is free to keep more digits under jit
    tx, params = chain(case), params_of(dtype)
    before = params, tx.init(params)
    for i in range(3):
        jit_params, jit_state = jitted(tx)(*before, i)
        if i != 1:  # every eager ``lax.cond`` is compiled anew
            eager_params, eager_state = step(tx, *before, i)
            check_close(
                observe(jit_state, jit_params),
                observe(eager_state, eager_params),
                **tolerance(dtype),
            )
            chex.assert_trees_all_equal_dtypes(jit_state, eager_state)
        before = jit_params, jit_state


@each_kind
def test_one_trace_serves_all_steps(case):
    tx, params = chain(case), params_of(jnp.bfloat16)

    traces = []

    @jax.jit
    def advance(params, state):
        traces.append(1)
        return step(tx, params, state)

    state = tx.init(params)
    for _ in range(4):
        params, state = advance(params, state)
    assert steps_of(case, state) == 4 // case.calls
    assert len(traces) == 1


@each_kind_with("dtype", jnp.bfloat16, jnp.float16, jnp.float32)
def test_scan_keeps_state_and_updates(case, dtype):
    tx, params = chain(case), params_of(dtype)
    state = tx.init(params)

    def body(carry, i):
        params, state = carry
        grad_fn = gradients(i)
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        assert all(
            u.dtype == g.dtype
            for u, g in zip(
                jax.tree.leaves(updates), jax.tree.leaves(grads_of(params)), strict=True
            )
        )
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    (_, new_state), after = jax.lax.scan(body, (params, state), jnp.arange(7))
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    alone, before = jitted(tx), (params, state)
    for i in range(7):
        found = jax.tree.map(lambda x, i=i: x[i], after)
        seen, wanted = observe(*found[::-1]), observe(*alone(*before, i)[::-1])
        for tree in seen.values():
            chex.assert_trees_all_equal_shapes_and_dtypes(tree, params)
        check_close(seen, wanted, **tolerance(dtype))
        before = found  # each step from one point: these gradients let roundings grow


RunningMemory, WindowMemory = oa.memories.RunningMemory, oa.memories.WindowMemory


def split(kept):
    """The scalars that a memory keeps beside its trees, and the leaves of these."""
    scalars = jax.tree.leaves(
        (kept.mass, kept.gamma) if isinstance(kept, RunningMemory) else ()
    )
    ids = {id(x) for x in scalars}
    return scalars, [x for x in jax.tree.leaves(kept) if id(x) not in ids]


@every_average
def test_counters_and_accumulators_keep_their_own_dtypes(case):
    state = case.make().init(params_of(jnp.bfloat16))
    for name in ("step", "absorbed", "rejected"):
        assert getattr(state, name).dtype == jnp.int32
    wants = case.kwargs.get("accumulator_dtype", jnp.float32)
    for kept in state.averages.values():
        is_window = isinstance(kept, WindowMemory)
        scalars, trees = split(kept)
        exact = jnp.bfloat16 if is_window else wants
        assert {x.dtype for x in trees} == {jnp.dtype(exact)}
        assert {x.dtype for x in scalars} <= {jnp.dtype(jnp.float32)}


@every_average
def test_nothing_absorbed_reads_params_exactly(case):
    params = params_of(jnp.float32)
    state = case.make().init(jax.tree.map(lambda x: x + 1, params))
    for average in read(state, params).values():
        chex.assert_trees_all_equal(average, params)


@each_kind
def test_extra_args_are_accepted(case):
    tx, params = chain(case), params_of(jnp.float32)
    accepting = optax.GradientTransformationExtraArgs(
        tx.init, functools.partial(tx.update, value=1.0, unheard_of="x")
    )
    chex.assert_trees_all_equal(run(tx, params, 1), run(accepting, params, 1))


@every_case
def test_missing_params_are_named(case):
    tx, params = case.make(), params_of(jnp.float32)
    if not case.needs_params:
        updates, _ = jax.eval_shape(lambda: tx.update(params, tx.init(params)))
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        return
    with pytest.raises(ValueError, match=r"needs the parameters; call tx.update"):
        tx.update(grads_of(params), tx.init(params))


@each_kind
@pytest.mark.filterwarnings("error:Some donated buffers were not usable")
def test_params_and_state_can_be_donated(case):
    tx, params = chain(case), params_of(jnp.float32)
    wanted = observe(*reversed(run(tx, params, 4)))
    advance = jax.jit(functools.partial(step, tx), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)
    for i in range(4):
        params, state = advance(params, state, i)
        seen = jax.tree.map(jnp.copy, observe(state, params))
        old = jax.tree.leaves((params, state))
    advance(params, state, 0)
    assert all(x.is_deleted() for x in old if x.ndim)
    check_close(seen, wanted, rtol=1e-6)


@every_case
def test_init_copies(case):
    params = params_of(jnp.float32)
    pointers = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(params)}
    leaves = jax.tree.leaves(case.make().init(params))
    leaves = [x for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    own = [x.unsafe_buffer_pointer() for x in leaves]
    assert not pointers & set(own)
    assert len(set(own)) == len(own)


@a_few
def test_vmap_equals_a_loop(case):
    tx, params = chain(case), params_of(jnp.float32)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), params)
    state = jax.vmap(tx.init)(stacked)
    one = functools.partial(step, tx)
    alone, together = jitted(tx), jax.jit(jax.vmap(one, in_axes=(0, 0, None)))
    for i in range(5):
        # Each step starts from one point: these gradients let roundings grow.
        rows = [jax.tree.map(lambda x, k=k: x[k], (stacked, state)) for k in range(3)]
        stacked, state = together(stacked, state, i)
        seen = jax.vmap(observe)(state, stacked)
        for k, row in enumerate(rows):
            wanted_params, wanted_state = alone(*row, i)
            check_close(
                jax.tree.map(lambda x, k=k: x[k], seen),
                observe(wanted_state, wanted_params),
                rtol=1e-6,
                atol=1e-6,
            )


@every_average
def test_masked_averages_what_is_inside(case):
    params = params_of(jnp.float32)
    mask = {"w": True, "b": False, "scale": True}
    whole = run(chain(case), params, 5)
    part = run(optax.chain(SGD, optax.masked(case.make(), mask)), params, 5)
    for name, average in read(part[1], part[0]).items():
        chex.assert_trees_all_equal(average["b"], part[0]["b"])
        wanted = oa.averaged_params(whole[1], whole[0], name)
        check_close(average["w"], wanted["w"], rtol=rounding_of(case))


@every_average
def test_partition_merges_its_parts(case):
    params = params_of(jnp.float32)
    labels = {"w": "one", "b": "two", "scale": "one"}
    transforms = {key: chain(case) for key in ("one", "two")}
    parts = run(optax.partition(transforms, labels), params, 5)
    whole = run(chain(case), params, 5)
    check_close(
        read(parts[1], parts[0]), read(whole[1], whole[0]), rtol=rounding_of(case)
    )


@each_kind
def test_inject_hyperparams(case):
    params = params_of(jnp.float32)
    injected = optax.inject_hyperparams(case.factory, static_args=case.static)
    tx = beside(case._replace(factory=injected), SGD)
    with_injection = run(tx, params, 5)
    plain = run(chain(case), params, 5)
    check_close(observe(*with_injection[::-1]), observe(*plain[::-1]), rtol=1e-5)
    if case.place == "first":
        inner, wanted = with_injection[1][0].inner_state, plain[1][0]
        check_close(numbers_of(inner), numbers_of(wanted), rtol=1e-5, atol=1e-5)


@a_few
def test_multi_steps_moves_once_per_real_step(case):
    params = params_of(jnp.float32)
    tx = chain(case)
    outer = optax.MultiSteps(tx, every_k_schedule=3).gradient_transformation()
    state = outer.init(params)
    accumulated, plain = params, tx.init(params)
    advance = jax.jit(functools.partial(step, outer))
    for i in range(12):
        accumulated, state = advance(accumulated, state, i // 3)
    for i in range(4):
        params, plain = jitted(tx)(params, plain, i)
    assert steps_of(case, state) == steps_of(case, plain) > 0
    check_close(
        observe(state, accumulated), observe(plain, params), rtol=1e-5, atol=1e-6
    )


@a_few
def test_apply_if_finite_rolls_back(case):
    params = params_of(jnp.float32)
    tx = optax.apply_if_finite(chain(case), max_consecutive_errors=5)
    params, state = run(tx, params, 3)
    before, steps = observe(state, params), steps_of(case, state)
    nan = lambda params: jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    update = jax.jit(functools.partial(tx.update, grad_fn=nan))
    updates, state = update(nan(params), state, params)
    params = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal(observe(state, params), before)
    assert steps_of(case, state) == steps


@every_average
def test_only_elements_that_are_not_finite_are_left_out(case):
    """The others are averaged as if nothing had happened."""
    tx, clean = case.make(), case.make()
    params, state = run(tx, params_of(jnp.float32), 4)
    other, update = state, jax.jit(tx.update)
    for bad in (jnp.nan, jnp.inf, -jnp.inf, jnp.nan):
        before = read(state, params)
        updates = grads_of(params)
        hurt = updates | {"b": updates["b"].at[2].set(bad)}
        _, state = update(hurt, state, params)
        _, other = jax.jit(clean.update)(updates, other, params)
        for name, average in read(state, params).items():
            assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(average))
            wanted = read(other, params)[name]
            sound = jnp.arange(8) != 2
            found = average | {"b": jnp.where(sound, average["b"], wanted["b"])}
            chex.assert_trees_all_equal(found, wanted)
            if is_running(case):
                assert average["b"][2] == before[name]["b"][2]
    assert int(state.rejected) == 0


def is_running(case):
    """Whether an element that is left out keeps its average: not so in a window."""
    kept = case.make().init(params_of(jnp.float32)).averages.values()
    return not any(isinstance(x, WindowMemory) for x in kept)


@every_rejecting
def test_non_finite_iterate_is_left_out_whole(case):
    tx, params = case.make(), params_of(jnp.float32)
    params, state = run(tx, params, 4)
    before = read(state, params)
    bad = grads_of(params) | {"b": jnp.full(8, jnp.nan).at[1:].set(0.0)}
    update = jax.jit(tx.update)
    for _ in range(4):
        _, state = update(bad, state, params)
    assert int(state.step) == 8
    assert int(state.rejected) > 0
    chex.assert_trees_all_equal(read(state, params), before)


@a_few
def test_key_in_the_state_beside_it(case):
    params = params_of(jnp.float32)
    tx = beside(case, optax.sgd(0.1), optax.add_noise(0.1, 0.5, 0))
    params, state = run(tx, params, 4)
    assert steps_of(case, state) == 4 // case.calls
    chex.assert_tree_all_finite(observe(state, params))


def float_gradients(params):
    """None for the leaves that have no gradient."""
    return jax.tree.map(
        lambda x: jnp.sin(x) if jnp.issubdtype(x.dtype, jnp.floating) else None, params
    )


@a_few
def test_leaves_that_are_not_float(case):
    params = {
        **params_of(jnp.float32),
        "none": None,
        "count": jnp.array(3),
        "flag": jnp.array(True),
        "key": jax.random.key(0),
    }
    grads = {
        **grads_of(params_of(jnp.float32)),
        "none": None,
        "count": None,
        "flag": None,
        "key": None,
    }
    tx = case.make()
    state = jax.jit(tx.init)(params)
    update = jax.jit(functools.partial(tx.update, grad_fn=float_gradients))
    for _ in range(4):
        updates, state = update(grads, state, params)
    assert updates["count"] is None
    newest = {**params, "count": jnp.array(7)}
    for average in read(state, newest).values():
        chex.assert_trees_all_equal_structs(average, params)
        assert int(average["count"]) == 7
        assert bool(average["flag"])
        assert average["key"].dtype == params["key"].dtype


@a_few
def test_masked_and_empty_trees(case):
    tx = case.make()
    update = jax.jit(functools.partial(tx.update, grad_fn=lambda params: params))
    masked = {"a": optax.MaskedNode()}
    whole = case.place != "last" and not case.takes_masks
    for params in ({}, {"a": None}, masked, {"a": jnp.zeros((0, 3))}):
        if whole and case.needs_params and params is masked:
            with pytest.raises(ValueError, match="cannot be used inside"):
                tx.init(params)
            continue
        state = tx.init(params)
        for _ in range(2):
            updates, state = update(params, state, params)
        # Of gradients without elements the norm is zero.
        assert steps_of(case, state) == (2 // case.calls if case.counts_zeros else 0)
        chex.assert_trees_all_equal(updates, params)


@every_case
def test_zero_gradients_stay_put(case):
    params = params_of(jnp.float16)
    tx = case.make()
    state = tx.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(functools.partial(tx.update, grad_fn=lambda params: zeros))
    for _ in range(7):
        updates, state = update(zeros, state, params)
        if case.rests:
            chex.assert_trees_all_equal(updates, zeros)
        chex.assert_tree_all_finite(updates)
    check_close(
        read(state, params),
        dict.fromkeys(read(state, params), params),
        rtol=rounding_of(case),
    )


@every_average
def test_map_params_finds_the_averages(case):
    params = params_of(jnp.float32)
    tx = chain(case)
    state = tx.init(params)
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
    kept = [*state[1].averages.values()]
    if not any(isinstance(one, WindowMemory) for one in kept):
        chex.assert_trees_all_equal_shapes_and_dtypes(doubled, state)
    for leaf, twice in zip(
        jax.tree.leaves(state[1]), jax.tree.leaves(doubled[1]), strict=True
    ):
        is_counter = leaf.ndim == 0 and jnp.issubdtype(leaf.dtype, jnp.integer)
        is_scalar = any(leaf is x for one in kept for x in split(one)[0])
        factor = 1 if is_counter or is_scalar else 2
        np.testing.assert_array_equal(
            np.asarray(twice, float), factor * np.asarray(leaf, float)
        )


@every_case
def test_init_under_eval_shape(case):
    params = params_of(jnp.bfloat16)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(chain(case).init, structs), chain(case).init(params)
    )


HOST_MEMORY_OF_EXPLICIT_SHARDS = pytest.mark.xfail(
    jax.__version_info__ < (0, 10, 2),
    reason="jax before 0.10.2 refuses device_put to jax.memory.Space.Host there: "
    "'Side-effect ops cannot be replicated'",
    raises=jax.errors.JaxRuntimeError,
)


def spread(params, mesh):
    specs = {"w": P("d", None), "b": P("d"), "scale": P()}
    return jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, specs
    )


@each_kind_with("kind", AxisType.Explicit, AxisType.Auto)
def test_sharded_params_give_sharded_averages(case, kind, request):
    if case is CASES["ema_params_host"] and kind is AxisType.Explicit:
        request.applymarker(HOST_MEMORY_OF_EXPLICIT_SHARDS)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    plain = run(chain(case), params_of(jnp.float32), 5)
    with jax.set_mesh(mesh):
        tx, params = chain(case), spread(params_of(jnp.float32), mesh)
        state = tx.init(params)
        types = jax.tree.map(jax.typeof, state)
        advance = jax.jit(functools.partial(step, tx), donate_argnums=(0, 1))
        for i in range(5):
            params, state = advance(params, state, i)
        seen = observe(state, params)
        assert jax.tree.map(jax.typeof, state) == types
    for leaf in jax.tree.leaves(state):
        if leaf.ndim and leaf.size >= 8:
            assert not leaf.sharding.is_fully_replicated
    for tree in seen.values():
        assert tree["w"].sharding.is_equivalent_to(params["w"].sharding, 2)
    check_close(seen, observe(plain[1], plain[0]), rtol=1e-5)


@each_kind_with("kind", AxisType.Auto, AxisType.Explicit)
def test_jitted_init_keeps_sharding(case, kind, request):
    if case is CASES["ema_params_host"] and kind is AxisType.Explicit:
        request.applymarker(HOST_MEMORY_OF_EXPLICIT_SHARDS)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    params = spread(params_of(jnp.float32), mesh)
    state = jax.jit(case.make().init)(params)
    wanted = {leaf.shape: leaf.sharding for leaf in params.values()}
    for leaf in jax.tree.leaves(state):
        own = leaf.shape if leaf.shape in wanted else leaf.shape[1:]
        if own in wanted and own:
            spec = P(*[None] * (leaf.ndim - len(own)), *wanted[own].spec)
            kept = NamedSharding(mesh, spec, memory_kind=leaf.sharding.memory_kind)
            assert leaf.sharding.is_equivalent_to(kept, leaf.ndim)


@each_kind_with("check_vma", True, False)
def test_shard_map_of_data_parallel_steps(case, check_vma):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    tx = chain(case)
    params = params_of(jnp.float32)

    def local(params, state, shift):
        def grad_fn(params):
            return jax.lax.pmean(grads_of(params, shift[0]), "d")

        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    advance = jax.jit(
        shard_map(
            local,
            mesh=mesh,
            in_specs=(P(), P(), P("d")),
            out_specs=P(),
            check_vma=check_vma,
        )
    )
    new_params, state = jax.tree.map(
        lambda x: jax.device_put(
            x, NamedSharding(mesh, P(), memory_kind=x.sharding.memory_kind)
        ),
        (params, tx.init(params)),
    )
    for i in range(4):
        shift = jax.device_put(jnp.full(8, float(i)), NamedSharding(mesh, P("d")))
        new_params, state = advance(new_params, state, shift)
    wanted_params, wanted = run(tx, params, 4)
    check_close(
        observe(state, new_params), observe(wanted, wanted_params), rtol=1e-4, atol=1e-6
    )


COLLECTIVE = r"\b(all-\w+|reduce-scatter|collective-permute)(-start)?\("


@every_average
def test_averages_of_sharded_params_talk_to_no_other_device(case):
    """Also where an iterate is not finite: every element is judged alone."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, P("d"))
    params = jax.device_put({"w": jnp.ones((8, 3)), "b": jnp.ones(16)}, place)
    tx = optax.chain(optax.adamw(0.1), case.make())
    state = jax.jit(tx.init)(params)
    update = lambda params, state: tx.update(params, state, params)
    text = jax.jit(update).lower(params, state).compile().as_text()
    assert not re.findall(COLLECTIVE, text)


@every_rejecting
def test_shard_map_of_sharded_params_agrees_on_finiteness(case):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    tx = case.make()
    params = jax.device_put({"b": jnp.arange(8.0)}, NamedSharding(mesh, P("d")))
    specs = jax.tree.map(
        lambda x: P("d") if x.ndim == 1 else P(None, "d") if x.ndim == 2 else P(),
        jax.eval_shape(tx.init, params),
    )

    def local(params, state, updates):
        updates, state = tx.update(updates, state, params)
        return updates, state

    advance = jax.jit(
        shard_map(
            local,
            mesh=mesh,
            in_specs=(P("d"), specs, P("d")),
            out_specs=(P("d"), specs),
        )
    )
    state = tx.init(params)
    one_bad = {"b": jnp.zeros(8).at[3].set(jnp.nan)}
    for _ in range(6):
        _, state = advance(params, state, one_bad)
    assert int(state.step) == 6
    assert int(state.absorbed) == 0
    assert int(state.rejected) > 0


@a_few
def test_pmap(case):
    tx, params = chain(case), params_of(jnp.float32)
    replicated, state = jax.pmap(lambda _: (params, tx.init(params)))(jnp.arange(8))
    advance = jax.pmap(functools.partial(step, tx), in_axes=(0, 0, None))
    for i in range(3):
        replicated, state = advance(replicated, state, i)
    alone = run(tx, params, 3)
    batch = jax.pmap(observe)(state, replicated)
    check_close(
        jax.tree.map(lambda x: x[5], batch), observe(alone[1], alone[0]), rtol=1e-5
    )


@every_case
def test_lowers_for_every_platform(case):
    tx, params = chain(case), params_of(jnp.bfloat16)
    state = jax.eval_shape(tx.init, params)

    def advance(params, state):
        params, state = step(tx, params, state)
        return params, state, observe(state, params)

    platforms = ("cpu", "cuda", "tpu")
    exported = jax.export.export(jax.jit(advance), platforms=platforms)(params, state)
    assert exported.platforms == platforms


@a_few
def test_orbax_round_trip_continues_bit_for_bit(case, tmp_path):
    tx = chain(case)
    advance = jitted(tx)
    params, state = run(tx, params_of(jnp.bfloat16), 3)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        template = {"params": params, "state": tx.init(params)}
        restored = checkpointer.restore(tmp_path / "step", template)
    chex.assert_trees_all_equal(restored["state"], state)
    resumed = restored["params"], restored["state"]
    for i in range(3, 6):
        params, state = advance(params, state, i)
        resumed = advance(*resumed, i)
    chex.assert_trees_all_equal(resumed, (params, state))


@with_slow(lambda name: name in SLOW_STEPS)
def test_thirty_thousand_steps_in_bf16(case):
    params = {x: jnp.full((4, 2), 0.5, jnp.bfloat16) for x in ("w", "b")}
    tx = beside(case, optax.sgd(0.05))

    def body(carry, i):
        params, state = carry
        grad_fn = lambda params: jax.tree.map(
            lambda x: (x - 3 + jnp.sin(i * 1.0)).astype(x.dtype), params
        )
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return (optax.apply_updates(params, updates), state), None

    start = (params, tx.init(params))
    (params, state), _ = jax.jit(lambda c: jax.lax.scan(body, c, jnp.arange(30_000)))(
        start
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(state, start[1])
    steps = steps_of(case, state)
    if case.counts_zeros:
        assert steps == 30_000 // case.calls
    else:  # in bfloat16 a gradient is exactly zero now and then
        assert 30_000 - 30 < steps <= 30_000
    # BEMA still adds (rho + gamma t)^-eta of the way from x_0 = 0.5 to 3.
    wanted = 3 + (30_010**-0.2 * 2.5 if case is CASES["bema"] else 0)
    # AdaGrad's steps have long fallen below the spacing of bf16.
    shrinking = case is CASES["scale_by_clipped_adagrad_norm"]
    if case is CASES["perp_grad"]:  # these gradients only scale the parameters
        wanted = 0.5
    if shrinking:
        assert 0.5 < float(params["w"][0, 0]) < 3
    elif case.place == "first":  # live parameters follow the noise
        np.testing.assert_allclose(np.asarray(params["w"], float), wanted, atol=0.6)
    for average in read(state, params).values():
        np.testing.assert_allclose(np.asarray(average["w"], float), wanted, atol=0.15)
