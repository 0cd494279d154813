"""Step sizes from the value of the loss, which is modelled as far as it can fall.

    min_w |w - w_t|^2_B/2            so that f + g'(w - w_t) <= f_min
    min_(w, a) a + (f + g'(w - w_t) - a)_+/(1 - beta)
               + |w - w_t|^2/(2 lr) + (a - a_t)^2/(2 lr_a)

The first is Polyak's step under a preconditioner ``B``, the second SPL+, which
minimises the conditional value at risk (CVaR). Both have closed forms.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_avg import _checks, _leaves, _mixups, _numerics

__all__ = ["PolyakState", "SplState", "preconditioned_polyak", "spl_plus"]

Slack = Literal["l1", "l2"] | None


class PolyakState(NamedTuple):
    """State of :func:`preconditioned_polyak`.

    Attributes:
      polyak_step: Number of steps so far, int32; schedules are called with it.
      slack_value: The slack ``s``, float32 or wider; 0 without slack.
      inner_state: State of the preconditioner.
    """

    polyak_step: jax.Array
    slack_value: jax.Array
    inner_state: optax.OptState


def preconditioned_polyak(
    preconditioner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    f_min: float = 0.0,
    max_learning_rate: float = float("inf"),
    slack: Slack = None,
    lam: float = 0.01,
) -> optax.GradientTransformationExtraArgs:
    """PSPS: Polyak's step size under any diagonal preconditioner.

    ``w <- w - learning_rate gamma B^-1 g`` with ``gamma = (f - f_min)/n``,
    ``n = <g, B^-1 g>``, where ``B^-1 g`` is what ``preconditioner`` makes of ``g``.
    The scale of ``B`` cancels. The loss at a minimum of every batch must be about
    ``f_min``; if it is not, take a slack variable ``s >= 0``, which starts at 0:

    * ``slack="l1"``: ``t = (f - f_min - s + lam)_+/(1 + n)``,
      ``gamma = min(t, (f - f_min)/n)``, ``s <- (s - lam + t)_+``.
    * ``slack="l2"``: ``h = 1/(1 + lam)``, ``gamma = (f - f_min - h s)_+/(n + h)``,
      ``s <- h (s + gamma)``.

    Negative steps are left out: where ``f < f_min``, or ``n <= 0``, there is no step.
    With ``optax.identity()`` it is ``optax.polyak_sgd``.

    Args:
      preconditioner: Transformation that multiplies the gradient by positive numbers,
        such as ``optax.scale_by_rms()``, ``optax.scale_by_rss()`` or
        ``scale_by_adahessian(b1=0.0)``. It has no momentum.
      learning_rate: Factor of the step, a float or a schedule. It has no unit.
      f_min: Lower bound of the loss.
      max_learning_rate: Largest ``gamma``, positive.
      slack: ``"l1"`` or ``"l2"`` for a slack variable with that penalty.
      lam: Weight of the penalty of the slack, positive.

    Returns:
      An optimizer with the state :class:`PolyakState`. ``update`` needs ``value=``, the
      loss of the batch, and passes it and other extra arguments on.

    Raises:
      ValueError: If an argument is out of range, or if ``update`` gets no ``value``.
      TypeError: If ``preconditioner`` is no transformation.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_avg as oa
      >>> scale = optax.stateless(lambda g, _: g / jnp.array([100.0, 1.0]))
      >>> tx = oa.optimizers.preconditioned_polyak(scale)
      >>> loss = lambda x: jnp.sum(jnp.array([100.0, 1.0]) * x**2) / 2
      >>> x = jnp.array([1.0, 1.0])
      >>> value, g = jax.value_and_grad(loss)(x)
      >>> tx.update(g, tx.init(x), x, value=value)[0].tolist()
      [-0.5, -0.5]

    References:
      Abdukhakimov et al., "Stochastic Gradient Descent with Preconditioned Polyak
      Step-size", 2023, 2310.02093.
    """
    _mixups.refuse_no_optimizer("preconditioned_polyak", preconditioner)
    learning_rate = _checks.finite_or_schedule("learning_rate", learning_rate)
    f_min = _checks.within("f_min", f_min, -float("inf"), float("inf"), open_low=True)
    most = _checks.within(
        "max_learning_rate", max_learning_rate, 0, float("inf"), open_low=True
    )
    _checks.one_of("slack", slack, (None, "l1", "l2"))
    lam = _checks.finite("lam", lam, open_low=True)
    tx = optax.with_extra_args_support(preconditioner)

    def init(params: optax.Params) -> PolyakState:
        dtype = _numerics.dtype_of_norms(_leaves.select(params, None))
        return PolyakState(
            jnp.zeros([], jnp.int32), jnp.zeros([], dtype), tx.init(params)
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PolyakState]:
        f = _value_of("preconditioned_polyak", value)
        made, inner = tx.update(
            updates, state.inner_state, params, value=value, **extra_args
        )
        n = _numerics.dot(*_float_leaves(updates, made))
        s, gap = state.slack_value, jnp.maximum(f - f_min, 0)
        if slack == "l1":
            gamma, s = _l1(gap, n, s, lam)
        elif slack == "l2":
            gamma, s = _l2(gap, n, s, lam)
        else:
            gamma = _ratio(gap, n)
        rate = _checks.at_step(learning_rate, state.polyak_step)
        factor = -rate * jnp.where(n > 0, jnp.minimum(gamma, most), 0)
        return _scaled(factor, made, updates), PolyakState(
            _numerics.advance_clock(state.polyak_step),
            jnp.where(n > 0, s, state.slack_value).astype(state.slack_value.dtype),
            inner,
        )

    return optax.GradientTransformationExtraArgs(
        _leaves.shapes_for_shapes(init), update
    )


class SplState(NamedTuple):
    """State of :func:`spl_plus`.

    Attributes:
      spl_step: Number of steps so far, int32; schedules are called with it.
      loss_quantile: ``a``, which goes to the ``beta``-quantile of the losses, float32
        or wider.
    """

    spl_step: jax.Array
    loss_quantile: jax.Array


def spl_plus(
    learning_rate: optax.ScalarOrSchedule,
    quantile_learning_rate: optax.ScalarOrSchedule | None = None,
    beta: float = 0.9,
    *,
    first_quantile: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """SPL+: a stochastic prox-linear method for the conditional value at risk.

    The mean of the losses above their ``beta``-quantile is
    ``min_a a + E (f - a)_+/(1 - beta)``. Each step minimises this with ``f`` replaced
    by its linear model, plus ``|w - w_t|^2/(2 lr) + (a - a_t)^2/(2 lr_a)``:

    ``eta = clip((f - a + lr_a)/(lr_a + lr |g|^2), 0, 1/(1 - beta))``,
    ``w <- w - lr eta g``, ``a <- a - lr_a (1 - eta)``.

    ``w`` and ``a`` have different units: if the losses are multiplied by ``c``, divide
    ``lr`` by ``c`` and multiply ``lr_a`` by ``c`` for the same steps.

    The loss is that of one example, or of examples that count as one. For batches of
    examples that count each, see :func:`optax_avg.losses.cvar_weights`.

    Args:
      learning_rate: ``lr``, a float or a schedule, not negative.
      quantile_learning_rate: ``lr_a``, in units of the loss: a float or a schedule, not
        negative. The default is ``lr``, which is the plain stochastic prox-linear
        method (SPL).
      beta: Share of the losses that lie below the quantile, in [0, 1).
      first_quantile: ``a`` at first, in units of the loss.

    Returns:
      An optimizer with the state :class:`SplState`; ``update`` needs ``value=``.

    Raises:
      ValueError: If an argument is out of range, or if ``update`` gets no ``value``.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.optimizers.spl_plus(1.0, beta=0.5)
      >>> x = jnp.zeros(1)
      >>> state = tx.init(x)
      >>> updates, state = tx.update(jnp.array([2.0]), state, x, value=4.0)
      >>> updates.tolist(), float(state.loss_quantile)
      ([-2.0], 0.0)

    References:
      Meng and Gower, "A Model-Based Method for Minimizing CVaR and Beyond", 2023,
      2305.17498.
    """
    if quantile_learning_rate is None:
        quantile_learning_rate = learning_rate
    lr = _checks.finite_or_schedule("learning_rate", learning_rate)
    lr_a = _checks.finite_or_schedule("quantile_learning_rate", quantile_learning_rate)
    beta = _checks.within("beta", beta, 0, 1, closed_high=False)
    infinity = float("inf")
    first = _checks.within("first_quantile", first_quantile, -infinity, infinity)

    def init(params: optax.Params) -> SplState:
        dtype = _numerics.dtype_of_norms(_leaves.select(params, None))
        return SplState(jnp.zeros([], jnp.int32), jnp.full([], first, dtype))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SplState]:
        del params, extra_args
        f = _value_of("spl_plus", value)
        a, step = state.loss_quantile, state.spl_step
        rate, rate_a = _checks.at_step(lr, step), _checks.at_step(lr_a, step)
        n = _numerics.dot(*_float_leaves(updates, updates))
        eta = _ratio(jnp.maximum(f - a + rate_a, 0), rate_a + rate * n)
        eta = jnp.minimum(eta, 1 / (1 - beta))
        return _scaled(-rate * eta, updates, updates), SplState(
            _numerics.advance_clock(step),
            (a - rate_a * (1 - eta)).astype(a.dtype),
        )

    return optax.GradientTransformationExtraArgs(
        _leaves.shapes_for_shapes(init), update
    )


def _l1(
    gap: jax.Array, n: jax.Array, s: jax.Array, lam: Any
) -> tuple[jax.Array, jax.Array]:
    """The step size and the new slack with the penalty ``lam s``, ``s >= 0``."""
    t = jnp.maximum(gap - s + lam, 0) / (1 + n)
    return jnp.minimum(t, _ratio(gap, n)), jnp.maximum(s - lam + t, 0)


def _l2(
    gap: jax.Array, n: jax.Array, s: jax.Array, lam: Any
) -> tuple[jax.Array, jax.Array]:
    """The step size and the new slack with the penalty ``lam/2 s^2``."""
    h = 1 / (1 + lam)
    gamma = jnp.maximum(gap - h * s, 0) / (n + h)
    return gamma, h * (s + gamma)


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a/b`` where ``b > 0``, 0 elsewhere."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def _value_of(name: str, value: Any) -> jax.Array:
    """The value of the loss in float32 or wider.

    Raises:
      ValueError: If there is none, or an array of several.
    """
    if value is None:
        raise ValueError(
            f"{name} needs the loss; call tx.update(grads, state, params, value=value) "
            "with value, grads = jax.value_and_grad(loss)(params)."
        )
    if jnp.ndim(value):
        raise ValueError(
            f"value of {name} must be one number, got an array of shape "
            f"{jnp.shape(value)}; take its mean."
        )
    return _numerics.wide(jnp.asarray(value))


def _float_leaves(*trees: Any) -> tuple[list[jax.Array], ...]:
    """The leaves of trees with the same leaves that are there and floating."""
    flat = [jax.tree.leaves(tree) for tree in trees]
    there = [i for i, x in enumerate(flat[0]) if _leaves.is_float(x)]
    return tuple([leaves[i] for i in there] for leaves in flat)


def _scaled(factor: jax.Array, tree: Any, like: Any) -> Any:
    """``factor`` times the float leaves of a tree, in the dtypes of another."""

    def one(x: jax.Array, other: jax.Array) -> jax.Array:
        if not _leaves.is_float(x):
            return x
        # A step of zero is zero, whatever the preconditioner made of the gradient.
        step = jnp.where(factor == 0, 0, factor * _numerics.wide(x))
        return step.astype(other.dtype)

    return jax.tree.map(one, tree, like)
