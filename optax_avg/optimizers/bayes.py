"""Bayes-SAM: a Gaussian posterior whose variance comes from the gradients.

theta ~ N(x, 1/(N s)),    g at theta,    ge at x + rho g/s
s <- b2 s + (1 - b2) (sqrt(s) |g| + delta + gamma)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_avg import _checks, _leaves, _mesh, _mixups, _numerics, _sight
from optax_avg._keys import key_maker

__all__ = ["BayesState", "bsam", "posterior_variance"]


class BayesState(NamedTuple):
    """State of :func:`bsam`.

    Attributes:
      bayes_step: Number of calls of ``update``, int32; schedules are called with it.
      bayes_momentum: Momentum of the gradients in float32 or wider.
      precision: Precision ``s`` of the posterior of one example, in float32 or wider.
      num_examples: Number ``N`` of examples, float32.
      noise_key: PRNG key of the samples.
      left_out: Number of calls in which a gradient was not finite, int32.
    """

    bayes_step: jax.Array
    bayes_momentum: optax.Updates
    precision: optax.Updates
    num_examples: jax.Array
    noise_key: jax.Array
    left_out: jax.Array


def bsam(
    learning_rate: optax.ScalarOrSchedule,
    num_data: float,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    rho: optax.ScalarOrSchedule = 0.1,
    prior_precision: float = 25.0,
    damping: float = 0.1,
    s_init: float = 1.0,
    key: jax.Array | int = 0,
    axis_name: _mesh.AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Bayes-SAM: SAM whose radius is the variance of a Gaussian posterior.

    The parameters ``x`` are the mean of the posterior, ``1/(N s)`` is its variance:

    - ``theta = x + e``, ``e ~ N(0, 1/(N s))``; ``g`` is the gradient at ``theta``;
    - ``ge`` is the gradient at ``x + rho g/s``;
    - ``m <- b1 m + (1 - b1) (ge + delta x)``, ``delta = prior_precision/N``;
    - ``s <- b2 s + (1 - b2) (sqrt(s) |g| + delta + gamma)``;
    - ``x <- x - lr m/s``.

    All operations are elementwise. This is algorithm 1 of the paper. The authors' code
    takes the step of ``x`` with the precision from before; with ``b2`` near 1 the two
    differ by little. A gradient that is not finite gives zeros and changes neither
    ``m`` nor ``s``.

    The gradient that ``update`` is given is not used, so that XLA removes it under
    ``jax.jit``: two gradients are taken in each step.

    Args:
      learning_rate: Learning rate, a number or a schedule.
      num_data: Number ``N`` of training examples. The authors multiply it by 4 where
        images are augmented.
      b1: Decay of the momentum, in [0, 1).
      b2: Decay of the precision, in [0, 1].
      rho: Radius in units of the variance, not negative; a number or a schedule.
      prior_precision: Precision of the Gaussian prior around zero, not negative.
        ``delta`` is weight decay.
      damping: ``gamma``, positive. It bounds the variance.
      s_init: First precision, positive.
      key: PRNG key, or an integer seed.
      axis_name: Mapped axis or axes over devices with batches of their own, each of
        which draws its own ``theta`` and takes its own ascent (m-sharpness).
        ``sqrt(s) |g|`` and ``ge`` are averaged. ``grad_fn`` must then return the
        gradient of the device.

    Returns:
      An optimizer with the state :class:`BayesState`; only averages come after it.
      ``update`` needs ``grad_fn=``, a function from parameters to gradients on the
      batch. :func:`posterior_variance` reads the variance.

    Raises:
      ValueError: If an argument is out of range. In ``init``, if a leaf is complex. In
        ``update``, if there are no parameters or no ``grad_fn``, or if ``axis_name`` is
        not mapped. In both, if the tree is masked.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_avg as oa
      >>> grad_fn = jax.grad(lambda x: jnp.sum(jnp.array([1.0, 9.0]) * x**2) / 2)
      >>> tx = oa.optimizers.bsam(0.05, 1000, b2=0.99, rho=0.01)
      >>> x = jnp.array([2.0, 2.0])
      >>> state, update = tx.init(x), jax.jit(tx.update, static_argnames="grad_fn")
      >>> for _ in range(500):
      ...     updates, state = update(x, state, x, grad_fn=grad_fn)
      ...     x = optax.apply_updates(x, updates)
      >>> variance = oa.optimizers.posterior_variance(state)
      >>> bool(variance[0] > variance[1])  # the flat direction is less certain
      True

    References:
      Moellenhoff and Khan, "SAM as an Optimal Relaxation of Bayes", 2023, 2210.01620.
    """
    learning_rate = _checks.finite_or_schedule("learning_rate", learning_rate)
    num_data = _checks.finite("num_data", num_data, open_low=True)
    b1 = _checks.within("b1", b1, 0, 1, closed_high=False)
    b2 = _checks.within("b2", b2, 0, 1)
    rho = _checks.finite_or_schedule("rho", rho)
    prior_precision = _checks.finite("prior_precision", prior_precision)
    damping = _checks.finite("damping", damping, open_low=True)
    s_init = _checks.finite("s_init", s_init, open_low=True)
    make_key = key_maker(key, "bsam(learning_rate, num_data, key=jax.random.key(0))")
    axes = _mesh.axis_names(axis_name)

    def init_fn(params: optax.Params) -> BayesState:
        _refuse_masked(params)
        _checks.refuse_complex("bsam", params)
        filled = lambda value: lambda x: _numerics.zeros_like(x) + value
        return BayesState(
            bayes_step=jnp.zeros([], jnp.int32),
            bayes_momentum=_leaves.over(_numerics.zeros_like, params, params),
            precision=_leaves.over(filled(s_init), params, params),
            num_examples=jnp.full([], num_data, jnp.float32),
            noise_key=make_key(),
            left_out=jnp.zeros([], jnp.int32),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        grad_fn: Any = None,  # checked below
        **extra_args: Any,
    ) -> tuple[optax.Updates, BayesState]:
        del extra_args
        _checks.require_params("bsam", params)
        _refuse_masked(updates)
        _mixups.refuse_no_grad_fn("bsam", grad_fn)
        _mesh.require_mapped(axes)
        # inject_hyperparams may have changed it since init.
        state = state._replace(num_examples=jnp.asarray(num_data, jnp.float32))
        x = jax.tree.map(lambda leaf: _mesh.vary(leaf, axes), params)
        s, over = state.precision, lambda f, *trees: _leaves.over(f, params, *trees)

        def gradient(offset: optax.Updates) -> optax.Updates:
            found = grad_fn(_leaves.moved(x, lax.stop_gradient(offset)))
            _mixups.refuse_no_gradient("what grad_fn returns", found, params)
            return over(_numerics.wide, found)

        g = gradient(_noise(state, axes))
        radius = _checks.at_step(rho, state.bayes_step)
        ge = gradient(over(lambda g, s: radius * (g / s), g, s))
        size = over(lambda g, s: jnp.sqrt(s) * jnp.abs(g), g, s)
        if axes:
            ge, size = lax.pmean((ge, size), axes)
        finite = _numerics.all_finite((ge, size))
        delta = prior_precision / num_data
        m = over(
            lambda m, ge, x: b1 * m + (1 - b1) * (ge + delta * _numerics.wide(x)),
            *(state.bayes_momentum, ge, params),
        )
        s = over(lambda s, size: b2 * s + (1 - b2) * (size + delta + damping), s, size)
        lr = _checks.at_step(learning_rate, state.bayes_step)
        steps = over(lambda m, s: jnp.where(finite, -lr * (m / s), 0), m, s)
        steps = _like(steps, updates)
        _sight.report("bsam", received=updates, emitted=steps)
        kept = lambda new, old: jnp.where(finite, new, old).astype(old.dtype)
        return steps, BayesState(
            bayes_step=_numerics.count_if(jnp.asarray(True), state.bayes_step),
            bayes_momentum=jax.tree.map(kept, m, state.bayes_momentum),
            precision=jax.tree.map(kept, s, state.precision),
            num_examples=state.num_examples,
            noise_key=state.noise_key,
            left_out=_numerics.count_if(~finite, state.left_out),
        )

    return optax.GradientTransformationExtraArgs(
        _leaves.shapes_for_shapes(init_fn), update_fn
    )


def posterior_variance(state: optax.OptState) -> optax.Params:
    """The variance ``1/(N s)`` of the posterior of :func:`bsam`, elementwise.

    With it, ``x + sqrt(variance) * noise`` is a sample of the parameters.

    Args:
      state: An optimizer state with one :class:`BayesState` anywhere in it.

    Returns:
      A tree like the parameters in float32 or wider, None for leaves that are not
      floating.

    Raises:
      ValueError: If there is no such state or more than one.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.optimizers.bsam(0.1, num_data=100, s_init=0.5)
      >>> oa.optimizers.posterior_variance(tx.init(jnp.zeros(2))).round(3)
      Array([0.02, 0.02], dtype=float32)
    """
    found = _leaves.states_of(BayesState, state)
    if len(found) != 1:
        raise ValueError(
            f"{len(found)} states of bsam found, need one; train with "
            "oa.optimizers.bsam(learning_rate, num_data)."
        )
    return jax.tree.map(lambda s: 1 / (found[0].num_examples * s), found[0].precision)


def _noise(state: BayesState, axes: Sequence[Any]) -> Any:
    """``e ~ N(0, 1/(N s))``, of its own in each step and on each device of the axes."""
    key = jax.random.fold_in(state.noise_key, state.bayes_step)
    for name in axes:
        key = jax.random.fold_in(key, lax.axis_index(name))
    leaves, structure = jax.tree.flatten(posterior_variance(state))
    keys = jax.random.split(key, max(len(leaves), 1))
    return structure.unflatten(
        [
            jnp.sqrt(variance) * jax.random.normal(k, variance.shape, variance.dtype)
            for k, variance in zip(keys, leaves)
        ]
    )


def _like(steps: optax.Updates, updates: optax.Updates) -> optax.Updates:
    """Steps in the structure and dtypes of the updates."""
    return jax.tree.map(
        lambda g, u: g if u is None else u.astype(g.dtype),
        updates,
        steps,
        is_leaf=lambda leaf: leaf is None,
    )


def _refuse_masked(tree: optax.Params) -> None:
    """Raises if a tree is masked, because the loss cannot be called on it.

    Raises:
      ValueError: If a leaf is ``optax.MaskedNode``.
    """
    if _leaves.has_masked(tree):
        raise ValueError(
            "bsam cannot be used inside optax.masked or optax.partition, because "
            "grad_fn needs all parameters; let it train all of them."
        )
