"""Optimizers of second order from elsewhere, between links of this library.

Nothing of them is built anew here. Those of Optax are always tried, the others where
they are installed. FOSI and the packages of Shampoo on PyPI call functions that JAX
removed before 0.8.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_avg as oa

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 6)).astype(np.float32)
Y = X @ RNG.normal(size=(6, 4)).astype(np.float32) + 0.5
STEPS, DECAY, RHO = 60, 0.8, 0.01


def loss(params):
    return jnp.mean((X @ params["w"] + params["b"][None] - Y) ** 2)


def start():
    return {"b": jnp.zeros(4), "w": jnp.zeros((6, 4))}


class Kin(NamedTuple):
    """An optimizer, and what it needs in each step beside the gradient.

    Attributes:
      tx: The transformation.
      extra: ``(params, step, memory) -> (extra arguments, memory)``.
      memory: What ``extra`` is given at first.
    """

    tx: optax.GradientTransformation
    extra: Callable[..., tuple[dict[str, Any], Any]] = lambda params, step, memory: (
        {},
        memory,
    )
    memory: Any = None


def muon():
    return Kin(optax.contrib.muon(0.1))


def sophia():
    tx = optax.contrib.sophia(0.1, update_interval=2)
    return Kin(tx, lambda params, step, memory: ({"obj_fn": loss}, memory))


def lbfgs():
    return Kin(optax.lbfgs(0.1, linesearch=None))


def kfac():
    """K-FAC of kfac-jax: the loop keeps the curvature and passes it to ``update``."""
    kfac_jax = pytest.importorskip(
        "kfac_jax", reason="kfac-jax needs distrax; no dependency of the tests"
    )
    if jax.__version_info__ >= (0, 10) and kfac_jax.__version__ == "0.0.8":
        pytest.skip("kfac-jax 0.0.8 calls Primitive.get_bind_params of older jax")

    def registered(params, batch):
        x, y = batch
        predicted = x @ params["w"] + params["b"][None]
        kfac_jax.register_squared_error_loss(predicted, y)
        return jnp.mean((predicted - y) ** 2)

    precondition = kfac_jax.OptaxPreconditioner(
        registered,
        damping=1e-2,
        inverse_update_period=2,
        distributed_inverses=False,
        distributed_precon_apply=False,
    )
    key = jax.random.key(0)

    def extra(params, step, memory):
        batch = (jnp.asarray(X), jnp.asarray(Y))
        memory = precondition.maybe_update(
            memory, (params, batch), jax.random.fold_in(key, step)
        )
        memory = precondition.increment_count(memory)
        return {"precond_state": memory}, memory

    batch = (jnp.asarray(X), jnp.asarray(Y))
    memory = precondition.init((start(), batch), key)
    tx = optax.chain(precondition.as_gradient_transform(), optax.sgd(0.3))
    return Kin(tx, extra, memory)


def kron():
    """Kronecker factors as SOAP has them, of PSGD; no SOAP for Optax is on PyPI."""
    psgdax = pytest.importorskip(
        "psgdax", reason="psgdax is no dependency of the tests"
    )
    tx = psgdax.kron(0.1)
    # It refuses the extra arguments of others, such as the grad_fn of SAM.
    plain = lambda updates, state, params=None: tx.update(updates, state, params)
    return Kin(optax.GradientTransformation(tx.init, plain))


ALL = [muon, sophia, lbfgs, kfac, kron]
each_kin = pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)


class Seen(NamedTuple):
    """The updates that passed a link."""

    seen_updates: Any


def eavesdropping():
    """A link that passes updates on and keeps the last ones."""
    init = lambda params: Seen(jax.tree.map(jnp.zeros_like, params))
    update = lambda updates, state, params=None: (updates, Seen(updates))
    return optax.GradientTransformation(init, update)


def links_before():
    return oa.sam(RHO), oa.clip_by_percentile(50.0, window=4)


def trained(kin):
    """Iterates, what reached the optimizer in each step, and the last state."""
    tx = optax.chain(*links_before(), eavesdropping(), kin.tx, oa.ema_params(DECAY))
    grad_fn = jax.grad(loss)

    @jax.jit
    def advance(params, state, step, memory):
        extra, memory = kin.extra(params, step, memory)
        updates, state = tx.update(
            grad_fn(params), state, params, grad_fn=grad_fn, **extra
        )
        return optax.apply_updates(params, updates), state, memory

    params, memory = start(), kin.memory
    state = tx.init(params)
    iterates, reached = [params], []
    for step in range(STEPS):
        params, state, memory = advance(params, state, step, memory)
        iterates.append(params)
        reached.append(state[2].seen_updates)
    return iterates, reached, state


@each_kin
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_stands_between_sam_clip_and_average(make):
    with jax.numpy_rank_promotion("allow"):  # in code that is not ours
        iterates, reached, state = trained(make())
    assert loss(iterates[-1]) < 0.1 * loss(iterates[0])
    before = optax.chain(*links_before())
    memory, ahead = (
        before.init(start()),
        jax.jit(before.update, static_argnames="grad_fn"),
    )
    grad_fn = jax.grad(loss)
    for x, found in zip(iterates[:-1], reached, strict=True):
        wanted, memory = ahead(grad_fn(x), memory, x, grad_fn=grad_fn)
        chex.assert_trees_all_close(found, wanted, rtol=1e-4, atol=1e-5)
    weights = DECAY ** np.arange(STEPS)[::-1]
    weights = weights / weights.sum()
    wanted = jax.tree.map(
        lambda *xs: np.tensordot(weights, np.stack(xs), axes=1), *iterates[1:]
    )
    average = oa.averaged_params(state, iterates[-1])
    chex.assert_trees_all_close(average, wanted, rtol=1e-4, atol=1e-5)


def test_the_check_of_chains_knows_the_order():
    kin = sophia()
    extra, _ = kin.extra(start(), 0, kin.memory)
    sound = optax.chain(*links_before(), kin.tx, oa.ema_params(DECAY))
    oa.check_chain(sound, start(), **extra)
    wrong = optax.chain(oa.ema_params(DECAY), kin.tx)
    with pytest.raises(ValueError, match="does not stand last"):
        oa.check_chain(wrong, start(), **extra)
