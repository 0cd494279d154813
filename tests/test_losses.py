"""Losses and weights of examples against their definitions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_optimizers_b as reference
from hypothesis import given
from hypothesis import strategies as st

from optax_avg import losses

seeds = st.integers(0, 2**32 - 1)


@given(seed=seeds, n=st.sampled_from([1, 2, 7, 30]), beta=st.floats(0, 0.99))
def test_cvar_weights(seed, n, beta):
    batch = np.random.default_rng(seed).normal(size=n)
    weights = np.asarray(losses.cvar_weights(jnp.asarray(batch), beta), np.float64)
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    assert weights.min() >= 0
    wanted = reference.cvar(batch, beta)
    assert weights @ batch == pytest.approx(wanted, abs=1e-4)


def test_cvar_between_the_mean_and_the_maximum():
    batch = jnp.array([3.0, -1.0, 2.0, 2.0, 9.0])
    assert losses.cvar_weights(batch, 0.0).tolist() == pytest.approx([0.2] * 5)
    assert losses.cvar_weights(batch, 0.99).tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]
    # 5 (1 - 0.5) = 2.5 examples: two whole and half of one of those that tie.
    found = losses.cvar_weights(batch, 0.5)
    np.testing.assert_allclose(found, [0.4, 0, 0.2, 0, 0.4], rtol=1e-6)


MASK = jax.jit(losses.z_error_mask)


@given(seed=seeds, n=st.sampled_from([2, 7, 40]), z_max=st.floats(0.5, 3))
def test_z_error_mask(seed, n, z_max):
    rng = np.random.default_rng(seed)
    scores = rng.standard_t(2, size=n).astype(np.float32)
    labels = rng.integers(0, 3, size=n)
    for given_labels in (None, labels):
        found = MASK(jnp.asarray(scores), z_max, given_labels)
        own = np.zeros(n) if given_labels is None else labels
        wanted = reference.z_error_mask(scores.astype(np.float64), z_max, own)
        # A score on the border may fall on either side.
        assert np.mean(np.asarray(found) != wanted) <= (n > 5) * 0.1


def test_z_error_loss_is_the_mean_of_what_is_kept():
    batch = jnp.array([1.0, 3.0, 2.0, 2.0, 1.0, 3.0, 2.0, 400.0])
    assert float(losses.z_error_loss(batch)) == pytest.approx(2.0)
    assert float(losses.z_error_loss(batch, 10.0)) == pytest.approx(51.75)
    gradient = jax.grad(losses.z_error_loss)(batch)
    np.testing.assert_allclose(gradient, [1 / 7] * 7 + [0], rtol=1e-6)


def test_z_error_of_logits_by_class():
    """A logit that is usual for one class is an outlier of the other."""
    logits = jnp.array([-4.0, -4.1, -3.9, -4.0, -4.1, -3.9, 4.0, 4.0, 4.1, 3.9, 4.0])
    labels = jnp.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    assert bool(losses.z_error_mask(logits).all())
    mask = losses.z_error_mask(logits, 2.0, labels)
    assert mask.tolist() == [True] * 6 + [False] + [True] * 4
    batch = jnp.where(mask, 1.0, 50.0)
    assert float(losses.z_error_loss(batch, scores=logits, labels=labels)) == 1.0


def test_examples_that_are_not_finite_are_left_out():
    batch = jnp.array([1.0, jnp.nan, 3.0, jnp.inf])
    assert losses.z_error_mask(batch).tolist() == [True, False, True, False]
    assert float(losses.z_error_loss(batch)) == 2.0
    start = losses.adaptive_k_start()
    weights, memory = losses.adaptive_k(batch, start)
    assert weights.tolist() == [0.5, 0.0, 0.5, 0.0]
    assert float(memory.loss_mean) == pytest.approx(0.2)
    weights, after = losses.adaptive_k(jnp.full(3, jnp.nan), memory)
    assert weights.tolist() == [0.0] * 3
    chex.assert_trees_all_equal(after, memory)
    assert float(losses.z_error_loss(jnp.full(3, jnp.nan))) == 0.0


def test_equal_scores_are_all_kept():
    assert bool(losses.z_error_mask(jnp.full(5, 0.3), 0.1).all())
    one_each = losses.z_error_mask(jnp.arange(3.0), 0.1, jnp.arange(3))
    assert bool(one_each.all())


def test_adaptive_k():
    rng = np.random.default_rng(0)
    batches = rng.exponential(1.5, size=(20, 8))
    memory, found = losses.adaptive_k_start(), []
    for batch in batches:
        as32 = jnp.asarray(batch, jnp.float32)
        weights, memory = losses.adaptive_k(as32, memory, 0.8, 0.99, 1e-3)
        found.append(weights)
    wanted = reference.adaptive_k(batches, 0.8, 0.99, 1e-3)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert 0 < np.mean(np.array(found) == 0) < 1


def test_the_threshold_of_adaptive_k_starts_above_three_and_ends_at_one():
    """``0.1/sqrt(0.001)`` at first, whatever the losses; then ``m/sqrt(v)``."""
    memory = losses.adaptive_k_start()
    batch = jnp.full(4, 0.5).at[0].set(3.16 / 4)
    _, first = losses.adaptive_k(batch, memory)
    assert float(first.loss_mean / jnp.sqrt(first.loss_square)) == pytest.approx(
        10**0.5, rel=1e-5
    )
    body = lambda memory, _: (losses.adaptive_k(batch, memory)[1], None)
    last, _ = jax.lax.scan(body, memory, length=20_000)
    assert float(last.loss_mean / jnp.sqrt(last.loss_square)) == pytest.approx(1, 1e-3)


def test_if_all_losses_are_too_large_the_batch_changes_nothing():
    memory = losses.AdaptiveKMemory(jnp.float32(1.0), jnp.float32(1.0))
    weights, _ = losses.adaptive_k(jnp.full(3, 5.0), memory)
    assert weights.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "weigh",
    [
        lambda x: losses.cvar_weights(x, 0.5),
        lambda x: losses.adaptive_k(x, losses.adaptive_k_start())[0],
    ],
)
def test_weights_are_constants_for_the_gradient(weigh):
    batch = jnp.array([1.0, 5.0, 2.0, 4.0])
    gradient = jax.grad(lambda x: jnp.sum(weigh(x) * x))(batch)
    np.testing.assert_array_equal(gradient, weigh(batch))


def test_narrow_losses_are_weighed_in_float32():
    batch = jnp.array([1.0, 5.0, 2.0, 4.0], jnp.bfloat16)
    assert losses.cvar_weights(batch, 0.5).dtype == jnp.float32
    assert losses.z_error_loss(batch).dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: losses.cvar_weights(jnp.ones((2, 2))), "one number for each example"),
        (lambda: losses.cvar_weights(jnp.ones(2), 1.0), "beta must lie"),
        (lambda: losses.z_error_mask(jnp.ones(2), 0.0), "z_max must lie"),
        (lambda: losses.z_error_mask(jnp.ones(2), labels=jnp.ones(3)), "labels of z_"),
        (
            lambda: losses.adaptive_k(jnp.ones(2), losses.adaptive_k_start(), beta1=1),
            "beta1 must lie",
        ),
    ],
)
def test_errors_name_the_cause(call, match):
    with pytest.raises(ValueError, match=match):
        call()
