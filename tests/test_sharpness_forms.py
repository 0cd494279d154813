"""Sharpness rules among devices, micro-batches, narrow dtypes and bad gradients."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_sharpness as ref
from cases import SIBLINGS
from jax import shard_map
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharpness_cases import ALL, PRODUCTS, flat, loss_of, tree_of
from test_sharpness import start

import optax_avg as oa
from optax_avg import rules
from optax_avg.sharpness import links
from optax_avg.sharpness._rule import advanced

every_rule = pytest.mark.parametrize("name", ALL)
X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
Y = np.sin(X.sum(axis=1))
W = np.array([0.3, -0.2, 0.5], np.float32)


def loss(w, x, y):
    return jnp.mean((jnp.tanh(x @ w) - y) ** 2)


def sam_over_groups(size):
    """m-sharpness by hand: the mean over groups of ``size`` examples of SAM's."""
    grads = []
    for i in range(0, 8, size):
        x, y = X[i : i + size], Y[i : i + size]
        g0 = jax.grad(loss)(W, x, y)
        grads.append(jax.grad(loss)(W + 0.25 * g0 / jnp.linalg.norm(g0), x, y))
    return np.mean(grads, axis=0)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    ("perturbation", "m"),
    [("local", 1), ("c", 2), (("b", "c"), 4), (("a", "b", "c"), 8), ("global", 8)],
)
def test_m_sharpness(perturbation, m, check_vma):
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)
    axes = ("a", "b", "c")
    sharp = oa.sharpness_aware(
        jax.value_and_grad(loss),
        rules.sam(0.25),
        axis_name=axes,
        perturbation=perturbation,
    )
    step = shard_map(
        lambda w, state, x, y: sharp(w, state, x, y),
        mesh=mesh,
        in_specs=(P(), P(), P(axes), P(axes)),
        out_specs=P(),
        check_vma=check_vma,
    )
    value, grads, _ = jax.jit(step)(jnp.asarray(W), sharp.init(W), X, Y)
    np.testing.assert_allclose(grads, sam_over_groups(m), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(value, loss(W, X, Y), rtol=1e-6)


# Without the check only memory and shared state may differ: a rule of each kind.
UNCHECKED = ("sam", "vasso", "sparse_sam", "every_k")


@pytest.mark.parametrize(
    ("name", "check_vma"),
    [
        pytest.param(name, check, marks=[pytest.mark.slow] * slow)
        for name in ALL
        for check, slow in ((True, name in SIBLINGS), (False, name not in UNCHECKED))
    ],
)
def test_rules_in_shard_map(name, check_vma):
    """Global perturbation is the rule on the whole batch; local leaves state shared."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    params = {"norm": jnp.asarray(W[:1]), "w": jnp.asarray(W[1:, None])}
    fn = jax.value_and_grad(
        lambda p, x, y: loss(jnp.concatenate([p["norm"], p["w"].ravel()]), x, y)
    )
    rule = ALL[name] if name != "sam_leaf" else rules.sam(0.25, scope="leaf")

    def run(perturbation):
        sharp = oa.sharpness_aware(fn, rule, axis_name="d", perturbation=perturbation)
        step = jax.jit(
            shard_map(
                lambda p, s, x, y: sharp(p, s, x, y),
                mesh=mesh,
                in_specs=(P(), P(), P("d"), P("d")),
                out_specs=P(),
                check_vma=check_vma,
            )
        )
        # Where the results of a step lie, or the second would be compiled anew.
        everywhere = NamedSharding(mesh, P())
        state = jax.device_put(sharp.init(params), everywhere)
        for _ in range(2):
            _, grads, state = step(params, state, X, Y)
        return grads, state

    alone = oa.sharpness_aware(fn, rule)
    state, step = alone.init(params), jax.jit(alone)
    for _ in range(2):
        _, wanted, state = step(params, state, X, Y)
    grads, found = run("global")
    for key in params:
        np.testing.assert_allclose(grads[key], wanted[key], rtol=2e-4, atol=1e-6)
    local, found = run("local")
    assert int(found.rule_step) == 2
    for leaf in jax.tree.leaves((local, found.rule_memory)):
        shards = [
            np.asarray(jax.random.key_data(s.data))
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else np.asarray(s.data)
            for s in leaf.addressable_shards
        ]
        for shard in shards:
            np.testing.assert_array_equal(shard, shards[0])


def accumulated(fn, parts):
    """Value and gradient averaged over micro-batches."""

    def value_and_grad(w, x, y):
        results = [
            fn(w, xs, ys)
            for xs, ys in zip(jnp.split(x, parts), jnp.split(y, parts), strict=True)
        ]
        return jax.tree.map(lambda *leaves: sum(leaves) / parts, *results)

    return value_and_grad


def test_around_an_accumulating_gradient():
    """The full batch is perturbed as one."""
    sharp = oa.sharpness_aware(
        accumulated(jax.value_and_grad(loss), 4), rules.sam(0.25)
    )
    _, grads, _ = sharp(W, sharp.init(W), X, Y)
    np.testing.assert_allclose(grads, sam_over_groups(8), rtol=1e-5)


def test_inside_an_accumulating_gradient():
    """Every micro-batch is perturbed by itself."""
    sharp = oa.sharpness_aware(jax.value_and_grad(loss), rules.sam(0.25))
    inner = lambda w, x, y: sharp(w, sharp.init(w), x, y)[:2]
    _, grads = accumulated(inner, 4)(W, X, Y)
    np.testing.assert_allclose(grads, sam_over_groups(2), rtol=1e-5)


def test_multi_steps_after_the_wrapper():
    sharp = oa.sharpness_aware(jax.value_and_grad(loss), rules.sam(0.25))
    tx = optax.MultiSteps(optax.sgd(0.5), every_k_schedule=4)
    w, state, opt_state = jnp.asarray(W), sharp.init(W), tx.init(jnp.asarray(W))
    for i in range(0, 8, 2):
        _, grads, state = sharp(w, state, X[i : i + 2], Y[i : i + 2])
        updates, opt_state = tx.update(grads, opt_state, w)
        w = optax.apply_updates(w, updates)
    np.testing.assert_allclose(w, W - 0.5 * sam_over_groups(2), rtol=1e-5)


@pytest.mark.parametrize("form", ["wrapper", "link"])
@pytest.mark.parametrize("name", [n for n in ALL if n not in PRODUCTS])
def test_evaluations_per_step(name, form):
    """Counted when they run, not when they are traced."""
    calls = []

    base = loss_of(*ref.problem())
    params = tree_of(start().astype(np.float32))

    def value_and_grad(p):
        jax.debug.callback(lambda: calls.append(1))
        return jax.value_and_grad(base)(p)

    rule = ALL[name]
    grad_fn = lambda p: value_and_grad(p)[1]
    if form == "wrapper":
        sharp = oa.sharpness_aware(value_and_grad, rule)
        state = sharp.init(params)
        step = jax.jit(lambda state: sharp(params, state)[1:])
    else:
        link = oa.as_link(rule)
        state = link.init(params)
        step = jax.jit(
            lambda state: link.update(
                params if rule.num_evals == 1 else grad_fn(params),
                state,
                params,
                grad_fn=grad_fn,
            )
        )
    counts = []
    for _ in range(4):
        calls.clear()
        _, state = step(state)
        jax.effects_barrier()
        counts.append(len(calls))
    sparse = [rule.num_evals, 1, 1, rule.num_evals]
    wanted = sparse if name in ("look_sam", "every_k") else [rule.num_evals] * 4
    assert counts == wanted


def test_momentum_sam_compiles_one_gradient():
    """As a link, the gradient that the loop computed is dead code."""
    products = lambda fn, *args: (
        jax.jit(fn).lower(*args).compile().as_text().count("custom-call(")
        or jax.jit(fn).lower(*args).compile().as_text().count(" dot(")
    )
    big = jax.random.normal(jax.random.key(0), (64, 64))
    fn = jax.grad(lambda w: jnp.sum(jnp.tanh(big @ w) ** 2))
    link = oa.momentum_sam(0.1)
    state = link.init(big)
    step = lambda w, s: link.update(fn(w), s, w, grad_fn=fn)
    assert products(step, big, state) == products(fn, big) > 0
    two = oa.sam(0.1)
    step = lambda w, s: two.update(fn(w), s, w, grad_fn=fn)
    assert products(step, big, two.init(big)) == 2 * products(fn, big)


@every_rule
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_zero_gradients_stay_zero(name, dtype):
    """At a minimum; a NaN in an offset would come back in the next gradient."""
    params = jax.tree.map(lambda x: jnp.zeros_like(x, dtype), tree_of(start()))
    bowl = lambda p: sum(jnp.sum(x * x) for x in jax.tree.leaves(p))
    sharp = oa.sharpness_aware(jax.value_and_grad(bowl), ALL[name])
    state, step = sharp.init(params), jax.jit(sharp)
    for _ in range(3):
        _, grads, state = step(params, state)
        for leaf in jax.tree.leaves(grads):
            assert leaf.dtype == dtype
            np.testing.assert_array_equal(np.asarray(leaf, float), 0)


SCALED = ("usam", "dnsam", "amp", "amp_three", "fisher_sam")
SCALED += tuple(name for name in ALL if name.startswith("gr_"))


@pytest.mark.parametrize("name", [name for name in ALL if name not in SCALED])
def test_gradients_of_any_size(name):
    """A tiny or huge gradient makes the same offset, where scale does not matter."""
    base = loss_of(*ref.problem())
    params = tree_of(start().astype(np.float32))

    def value_and_grad(p, scale):
        value, grads = jax.value_and_grad(base)(p)
        return value, jax.tree.map(lambda g: g * scale, grads)

    sharp = oa.sharpness_aware(value_and_grad, ALL[name])
    step = jax.jit(sharp)
    _, wanted, _ = step(params, sharp.init(params), 1.0)
    for scale in (1e-30, 1e30):
        _, grads, _ = step(params, sharp.init(params), scale)
        np.testing.assert_allclose(
            flat(grads) / scale, flat(wanted), rtol=2e-4, atol=1e-5
        )


@every_rule
def test_a_nan_does_not_stay_in_memory(name):
    base = loss_of(*ref.problem())
    params = tree_of(start().astype(np.float32))
    fn = lambda p, factor: jax.tree.map(
        lambda x: x * factor, jax.value_and_grad(base)(p)
    )
    sharp = oa.sharpness_aware(fn, ALL[name])
    step = jax.jit(sharp)
    _, _, state = step(params, sharp.init(params), 1.0)
    _, grads, bad = step(params, state, jnp.nan)
    assert not np.isfinite(flat(grads)).any()
    for before, after in zip(
        jax.tree.leaves(state.rule_memory),
        jax.tree.leaves(bad.rule_memory),
        strict=True,
    ):
        if not jnp.issubdtype(before.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(before, after)
    _, grads, _ = step(params, bad, 1.0)
    assert np.isfinite(flat(grads)).all()


def test_fp16_gradients_whose_squares_overflow():
    """(300, 300) has a norm of 424 and squares beyond fp16."""
    fn = lambda p: (0.0, jnp.full(2, 300, jnp.float16) + 0 * p)
    sharp = oa.sharpness_aware(fn, rules.sam(1.0))
    seen = []

    def spy(p):
        seen.append(p)
        return fn(p)

    x = jnp.zeros(2, jnp.float16)
    oa.sharpness_aware(spy, rules.sam(1.0))(x, sharp.init(x))
    np.testing.assert_allclose(seen[1], 0.5**0.5, rtol=1e-3)


def test_ascent_on_another_loss():
    """The offset comes from ``ascent_fn``, the gradient from the loss."""
    penalised = lambda w: jnp.sum(w**2) + jnp.sum(w**4)
    plain = lambda w: jnp.sum(w**4)
    w = jnp.array([1.0, -2.0])
    sharp = oa.sharpness_aware(
        jax.value_and_grad(penalised),
        rules.sam(0.5),
        ascent_fn=jax.value_and_grad(plain),
    )
    value, grads, _ = sharp(w, sharp.init(w))
    g0 = 4 * w**3
    moved = w + 0.5 * g0 / jnp.linalg.norm(g0)
    np.testing.assert_allclose(grads, 2 * moved + 4 * moved**3, rtol=1e-6)
    assert float(value) == float(plain(w))


def test_aux_is_that_of_the_clean_pass():
    seen = lambda w: (jnp.sum(w**2), {"at": w})
    sharp = oa.sharpness_aware(
        jax.value_and_grad(seen, has_aux=True), rules.gam(), has_aux=True
    )
    w = jnp.array([1.0, -2.0])
    (value, aux), _, _ = jax.jit(sharp)(w, sharp.init(w))
    np.testing.assert_array_equal(aux["at"], w)
    assert float(value) == 5.0


def test_clear_errors():
    x = {"w": jnp.ones(2)}
    link = oa.sam(0.1)
    state = link.init(x)
    with pytest.raises(ValueError, match=r"sam needs the gradient as a function"):
        link.update(x, state, x)
    with pytest.raises(ValueError, match="sam needs the parameters"):
        link.update(x, state, None, grad_fn=lambda p: p)
    masked = optax.masked(oa.sam(0.1), {"w": False})
    with pytest.raises(ValueError, match="pass where= to the rule"):
        masked.init(x)
    for wrong in (
        lambda: oa.sam(-0.1),
        lambda: oa.sam(float("nan")),
        lambda: oa.sam(0.1, scope="column"),
        lambda: oa.wsam(gamma=1.0),
        lambda: oa.gam(decomposition="other"),
        lambda: rules.amp(steps=0),
        lambda: oa.look_sam(k=0),
        lambda: oa.sparse_sam(sparsity=1.0),
        lambda: oa.gradient_regularisation(scheme="upwind"),
        lambda: rules.every_k(rules.momentum_sam(), 2),
        lambda: oa.sharpness_aware(len, rules.sam(), axis_name="a", perturbation="b"),
        lambda: oa.sharpness_aware(len, rules.momentum_sam(), ascent_fn=len),
        lambda: oa.trajectory_loss(jnp.zeros((2, 3)), jnp.zeros((3, 2))),
        lambda: oa.clean_params(optax.EmptyState(), x),
    ):
        with pytest.raises(ValueError, match=r"must|needs|takes|differ"):
            wrong()


@pytest.mark.parametrize(
    ("axis_name", "perturbation", "message"),
    [
        (None, "global", "averages the ascent over axis_name, and there is none"),
        (None, "d", "out of axis_name="),
        ("d", None, "must be 'local', 'global' or axes"),
        ("d", (), "must be 'local', 'global' or axes"),
    ],
)
def test_a_perturbation_over_no_axis_is_refused(axis_name, perturbation, message):
    with pytest.raises(ValueError, match=f"^perturbation.*{message}"):
        oa.sharpness_aware(
            len, rules.sam(), axis_name=axis_name, perturbation=perturbation
        )


@pytest.mark.parametrize(
    ("make", "period"),
    [
        (lambda: rules.every_k(rules.sam(), 3), 3),
        (lambda: rules.every_k(rules.every_k(rules.sam(), 2), 3), 6),
        (lambda: rules.every_k(rules.sam(), jnp.array(3)), 3),
        (lambda: rules.every_k(rules.every_k(rules.sam(), 2), jnp.array(3)), 6),
        (lambda: rules.look_sam(k=4), 4),
    ],
)
def test_what_is_due_stays_due_beyond_the_largest_integer(make, period):
    rule = make()
    last = 2**31 - 1
    state = oa.as_link(rule).init(jnp.ones(2))
    state = state._replace(rule_step=jnp.int32(last - last % period))
    due = []
    for _ in range(3 * period):
        due.append(bool(rule.due(state)))
        state = advanced(rule, state, (), ())
    assert due == 3 * [True, *[False] * (period - 1)]


def test_masks_and_draws_go_on_beyond_the_largest_integer():
    last, steps = jnp.int32(2**31 - 1), {}
    for name, rule in {
        "sparse_sam": rules.sparse_sam(refresh=5),
        "esam": rules.esam(),
    }.items():
        state = oa.as_link(rule).init(jnp.ones(2))._replace(rule_step=last)
        state = state._replace(rule_memory=())
        steps[name] = [state := advanced(rule, state, (), ()) for _ in range(7)]
    assert [int(s.rule_step) % 5 for s in steps["sparse_sam"]] == [3, 4, 0, 1, 2, 3, 4]
    assert len({int(s.rule_step) for s in steps["esam"]}) == 7


def test_esam_perturbs_a_share_of_the_leaves():
    """E[d] is SAM's offset: over many steps and leaves the share is beta."""
    params = [jnp.ones(())] * 100
    rule = rules.esam(1.0, 0.25, jax.random.key(1))
    state = oa.sharpness_aware(jax.value_and_grad(sum), rule).init(params)
    offset = np.array(rule.probe(1, params, [params], state))
    values, counts = np.unique(offset, return_counts=True)
    np.testing.assert_allclose(values, [0, 1 / 10 / 0.25], rtol=1e-6)
    assert abs(counts[1] / 100 - 0.25) < 0.1
    later = rule.probe(
        1, params, [params], state._replace(rule_step=state.rule_step + 1)
    )
    assert not np.array_equal(offset, np.array(later))


def test_trajectory_loss_is_the_scaled_divergence():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 5, 4))
    softmax = lambda z: np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
    p, q = softmax(teacher / 3), softmax(student / 3)
    wanted = 9 * np.mean(np.sum(p * np.log(p / q), axis=-1))
    found = oa.trajectory_loss(jnp.asarray(student), jnp.asarray(teacher), 3.0)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    to_teacher = jax.grad(oa.trajectory_loss, argnums=1)
    assert not np.any(to_teacher(jnp.asarray(student), jnp.asarray(teacher)))


@pytest.mark.parametrize("k", [1, 3])
def test_multi_call_keeps_clean_parameters_through_donation(k):
    tx = oa.multi_call(rules.every_k(rules.gam(), k), optax.adam(1e-2))
    base = loss_of(*ref.problem())
    params = tree_of(start().astype(np.float32))
    step = jax.jit(
        lambda p, s: (lambda u, s: (optax.apply_updates(p, u), s))(
            *tx.update(jax.grad(base)(p), s, p)
        ),
        donate_argnums=(0, 1),
    )
    state, before = tx.init(params), base(params)
    for _ in range(200):
        params, state = step(params, state)
    clean = oa.clean_params(state, params)
    assert base(clean) < before - 1
    assert (
        functools.reduce(
            max,
            [
                float(jnp.abs(a - b).max())
                for a, b in zip(
                    jax.tree.leaves(clean), jax.tree.leaves(params), strict=True
                )
            ],
        )
        <= 0.3
    )


def test_trajectory_loss_of_impossible_classes():
    logits = jnp.array([[0.0, 1.0, -jnp.inf]])
    student = jnp.array([[1.0, 0.0, -jnp.inf]])
    np.testing.assert_allclose(oa.trajectory_loss(logits, logits), 0.0, atol=1e-6)
    grads = jax.grad(oa.trajectory_loss)(student, logits)
    two = jax.grad(oa.trajectory_loss)(student[:, :2], logits[:, :2])
    np.testing.assert_allclose(grads[:, :2], two, rtol=1e-5)


SECTIONS = ["Args:", "Returns:", "Raises:", "Example:", "References:"]


@pytest.mark.parametrize("name", links.__all__)
def test_links_document_themselves(name):
    link, rule = getattr(oa, name), getattr(rules, name)
    lines = inspect.getdoc(link).splitlines()
    assert lines[0] == inspect.getdoc(rule).splitlines()[0]
    assert [line for line in lines if line in SECTIONS] == SECTIONS
    assert f"oa.{name}(" in link.__doc__
    assert "first link of a chain" in link.__doc__
    assert "A rule of" not in link.__doc__
    given = inspect.signature(link).parameters
    assert given == inspect.signature(rule).parameters
    assert all(f"\n  {parameter}: " in inspect.getdoc(link) for parameter in given)


def test_a_docstring_without_a_section_keeps_the_others():
    doc = links._with_sections("Head.\n\nArgs:\n  x: Number.\n", {"Returns": "  Y."})
    assert doc == "Head.\n\nArgs:\n  x: Number.\n"


@pytest.mark.parametrize("name", ["look_sam", "every_k", "sam", "momentum_sam"])
@pytest.mark.parametrize("with_ascent", [False, True])
def test_programs_chosen_outside_of_jit_equal_the_one_with_cond(name, with_ascent):
    rule = ALL[name]
    if with_ascent and rule.num_evals < 2:
        with_ascent = False
    value_and_grad = jax.value_and_grad(loss, has_aux=False)
    ascent_fn = jax.value_and_grad(lambda *args: 2 * loss(*args))
    sharp = oa.sharpness_aware(
        value_and_grad, rule, ascent_fn=ascent_fn if with_ascent else None
    )
    w, state = jnp.asarray(W), sharp.init(jnp.asarray(W))
    steps = {due: jax.jit(sharp.given(due)) for due in (True, False)}
    one = jax.jit(sharp)
    for i in range(5):
        due = bool(sharp.due(state))
        assert due == (i % 3 == 0 if name in ("look_sam", "every_k") else True)
        wanted = one(w, state, X, Y)
        found = steps[due](w, state, X, Y)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, wanted
        )
        w, state = w - 0.1 * found[1], found[2]


def test_a_program_for_steps_that_are_known_holds_no_other_gradient():
    calls = []

    def value_and_grad(*args):
        calls.append(0)
        return jax.value_and_grad(loss)(*args)

    sharp = oa.sharpness_aware(value_and_grad, rules.look_sam(0.25, 3))
    state = sharp.init(W)
    for due, wanted in ((True, 2), (False, 1)):
        calls.clear()
        jax.make_jaxpr(sharp.given(due))(W, state, X, Y)
        assert len(calls) == wanted
