"""Rules that combine the gradients they take, or remember them.

result = combine(g_0, ..., g_n)
"""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax

from optax_avg import _checks, _leaves, _mixups, _numerics
from optax_avg.sharpness._ascent import (
    Radius,
    after_clean,
    ascent,
    check_one_radius,
    check_radius,
    check_some,
    radius_at,
)
from optax_avg.sharpness._rule import Combine, Memory, SharpnessRule
from optax_avg.sharpness.offsets import sam

__all__ = [
    "cr_sam",
    "every_k",
    "friendly_sam",
    "gam",
    "gam_hvp",
    "gnp",
    "gradient_regularisation",
    "gsam",
    "look_sam",
    "momentum_sam",
    "vasso",
    "wsam",
]

Scheme = Literal["forward", "backward", "central", "exact"]
Decomposition = Literal["paper", "reference"]


def _linear(*pairs: tuple[jax.typing.ArrayLike, optax.Updates]) -> optax.Updates:
    """``sum_i c_i v_i`` over trees, from pairs ``(c_i, v_i)``."""
    factors = [c for c, _ in pairs]
    return jax.tree.map(
        lambda *leaves: sum(c * v for c, v in zip(factors, leaves, strict=True)),
        *[tree for _, tree in pairs],
    )


def _combining(f: Callable[..., optax.Updates]) -> Combine:
    """A ``combine`` without memory from a function of the gradients."""
    return lambda params, grads, state: (f(*grads), state.rule_memory)


def gsam(rho: Radius = 0.05, alpha: float = 0.4) -> SharpnessRule:
    """Surrogate-gap SAM: ``gd - alpha (part of g0 orthogonal to gd)``.

    ``d = rho g0/|g0|``.

    Args:
      rho: Radius; a number, a schedule, or a tree of them like a prefix of params. The
        authors let it follow the learning rate, as does
        :func:`optax_avg.schedules.follow_learning_rate`.
      alpha: Weight of the ascent on the surrogate gap, not negative. With 0 this is
        SAM.

    Returns:
      A rule of 2 gradients.

    Raises:
      ValueError: If ``rho`` or ``alpha`` is negative or not finite.

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x: x @ (jnp.array([0.5, 1.0]) * x)
      >>> rule = oa.rules.gsam(0.5, alpha=0.4)
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(loss), rule)
      >>> x = jnp.array([3.0, 2.0])
      >>> [round(float(g), 2) for g in sharp(x, sharp.init(x))[1]]
      [3.23, 4.85]

    References:
      Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training",
      2022, 2203.08065.
    """
    alpha = _checks.finite("alpha", alpha)
    combine = lambda g0, gd: _linear((1, gd), (-alpha, _numerics.project_out(g0, gd)))
    return sam(rho)._replace(combine=_combining(combine), in_result=None)


def gnp(rho: Radius = 0.05, alpha: float = 0.8) -> SharpnessRule:
    """Gradient norm penalty: ``(1 - alpha) g0 + alpha gd`` with ``d = rho g0/|g0|``.

    This is the paper's rule. The authors' code mixes in ``g0/|g0|`` in place of ``g0``.

    Args:
      rho: Radius; a number, a schedule, or a tree of them like a prefix of params. The
        paper writes ``r``.
      alpha: Weight of the penalty over the radius, not negative. With 1 this is SAM.

    Returns:
      A rule of 2 gradients.

    Raises:
      ValueError: If ``rho`` or ``alpha`` is negative or not finite.

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x: x @ (jnp.array([0.5, 1.0]) * x)
      >>> rule = oa.rules.gnp(0.5, alpha=0.5)
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(loss), rule)
      >>> x = jnp.array([3.0, 2.0])
      >>> [round(float(g), 2) for g in sharp(x, sharp.init(x))[1]]
      [3.15, 4.4]

    References:
      Zhao et al., "Penalizing Gradient Norm for Efficiently Improving Generalization in
      Deep Learning", 2022, 2202.03599.
    """
    alpha = _checks.finite("alpha", alpha)
    combine = lambda g0, gd: _linear((1 - alpha, g0), (alpha, gd))
    return sam(rho)._replace(combine=_combining(combine), in_result=None)


def wsam(rho: Radius = 0.05, gamma: float = 0.9) -> SharpnessRule:
    """Weighted SAM: ``(1 - a) g0 + a gd`` with ``a = gamma/(1 - gamma)``.

    ``d = rho g0/|g0|``. This is the coupled form; :func:`optax_avg.decoupled_wsam` is
    the other one.

    Args:
      rho: Radius; a number, a schedule, or a tree of them like a prefix of params.
      gamma: Weight of the sharpness, in [0, 1). With 1/2 this is SAM.

    Returns:
      A rule of 2 gradients.

    Raises:
      ValueError: If ``rho`` is negative or not finite, or ``gamma`` is not in [0, 1).

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x: x @ (jnp.array([0.5, 1.0]) * x)
      >>> rule = oa.rules.wsam(0.5, gamma=0.75)
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(loss), rule)
      >>> x = jnp.array([3.0, 2.0])
      >>> [round(float(g), 2) for g in sharp(x, sharp.init(x))[1]]
      [3.9, 6.4]

    References:
      Yue et al., "Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
      Regularization Term", 2023, 2305.15817.
    """
    rho = check_radius("rho", rho)
    gamma = _checks.within("gamma", gamma, 0, 1, closed_high=False)
    return gnp(rho, gamma / (1 - gamma))


def gradient_regularisation(
    gamma: float = 0.01,
    rho: optax.ScalarOrSchedule = 0.01,
    scheme: Scheme = "forward",
) -> SharpnessRule:
    """Gradient of ``L + gamma/2 |grad L|^2`` by finite differences, or exactly.

    ``"forward"``: ``g0 + gamma (g(x + rho g0) - g0)/rho``; ``"backward"``: ``g0 + gamma
    (g0 - g(x - rho g0))/rho``; ``"central"``: ``g0 + gamma (g(x + rho g0) - g(x - rho
    g0))/(2 rho)``; ``"exact"``: ``g0 + gamma H g0``.

    Args:
      gamma: Weight of the penalty, not negative.
      rho: Step of the difference per unit of gradient, a positive number or a schedule.
        The paper writes ``epsilon``.
      scheme: Which difference to take, or ``"exact"`` for the Hessian-vector product.

    Returns:
      A rule of 2 gradients (3 for ``"central"``; 1 and a Hessian-vector product for
      ``"exact"``). It depends on the scale of the loss.

    Raises:
      ValueError: If ``gamma`` is negative, ``rho`` is not positive or is a tree, one of
        them is not finite, or ``scheme`` is unknown.
      TypeError: When ``"exact"`` is used, if the gradient has no forward derivative.
        An example is a ``jax.custom_vjp`` whose ``fwd`` calls the function itself.

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x: x @ (jnp.array([0.5, 1.0]) * x)
      >>> rule = oa.rules.gradient_regularisation(0.5, scheme="exact")
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(loss), rule)
      >>> x = jnp.array([3.0, 2.0])
      >>> [round(float(g), 2) for g in sharp(x, sharp.init(x))[1]]
      [4.5, 8.0]

    References:
      Karakida et al., "Understanding Gradient Regularization in Deep Learning:
      Efficient Finite-Difference Computation and Implicit Bias", 2023, 2210.02720.
    """
    gamma = _checks.finite("gamma", gamma)
    rho = check_one_radius("rho", rho, "gradient_regularisation", open_low=True)
    _checks.one_of("scheme", scheme, get_args(Scheme))
    if scheme == "exact":
        return SharpnessRule(
            2,
            lambda *_: None,
            _combining(lambda g0, hg: _linear((1, g0), (gamma, hg))),
            direction=lambda i, params, grads, state: grads[0] if i == 1 else None,
        )
    signs = {"forward": (1,), "backward": (-1,), "central": (1, -1)}[scheme]

    def probe(i, params, grads, state):
        if i == 0:
            return None
        return _numerics.scale(signs[i - 1] * radius_at(rho, state), grads[0])

    def combine(params, grads, state):
        g0, r = grads[0], gamma / radius_at(rho, state)
        if scheme == "central":
            result = _linear((1, g0), (r / 2, grads[1]), (-r / 2, grads[2]))
        else:
            sign = signs[0]
            result = _linear((1 - sign * r, g0), (sign * r, grads[1]))
        return result, state.rule_memory

    return SharpnessRule(1 + len(signs), probe, combine)


def cr_sam(rho: Radius = 0.05, gamma: float = 0.1, beta: float = 0.01) -> SharpnessRule:
    """Curvature-regularised SAM: ``gw + gamma (gw + gb - 2 g0) + beta (gw - gb)``.

    ``gw`` is the gradient at ``x + d``, ``gb`` that at ``x - d``, ``d = rho g0/|g0|``.

    Args:
      rho: Radius; a number, a schedule, or a tree of them like a prefix of params.
      gamma: Weight of the second difference, not negative.
      beta: Weight of the first difference, not negative. If ``gamma`` and ``beta`` are
        0 this is SAM.

    Returns:
      A rule of 3 gradients.

    Raises:
      ValueError: If ``rho``, ``gamma`` or ``beta`` is negative or not finite.

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x: x @ (jnp.array([0.5, 1.0]) * x)
      >>> rule = oa.rules.cr_sam(0.5, gamma=0.1, beta=0.25)
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(loss), rule)
      >>> x = jnp.array([3.0, 2.0])
      >>> [round(float(g), 2) for g in sharp(x, sharp.init(x))[1]]
      [3.45, 5.2]

    References:
      Wu et al., "CR-SAM: Curvature Regularized Sharpness-Aware Minimization", 2024,
      2312.13555.
    """
    rho = check_radius("rho", rho)
    gamma = _checks.finite("gamma", gamma)
    beta = _checks.finite("beta", beta)

    def probe(i, params, grads, state):
        if i == 0:
            return None
        d = ascent(params, grads[0], radius_at(rho, state))
        return d if i == 1 else _numerics.scale(-1, d)

    combine = lambda g0, gw, gb: _linear(
        (1 + gamma + beta, gw), (gamma - beta, gb), (-2 * gamma, g0)
    )
    return SharpnessRule(3, probe, _combining(combine))


def _zeros(params: optax.Params) -> optax.Updates:
    """Zeros in the place of gradients, in float32 or wider."""
    return _leaves.over(_numerics.zeros_like, params, params)


def _no_mean(params: optax.Params) -> Memory:
    """A mean of gradients that has seen none: ``(False, zeros)``."""
    return jnp.asarray(False), _zeros(params)


def _ema(memory: Memory, decay: float | jax.Array, g: optax.Updates) -> Memory:
    """``m <- decay m + (1 - decay) g``; the first gradient itself."""
    begun, m = memory
    mixed = jax.tree.map(
        lambda m, g: jnp.where(begun, decay * m + (1 - decay) * g, g), m, g
    )
    return jnp.asarray(True), mixed


def vasso(rho: Radius = 0.05, theta: float = 0.4) -> SharpnessRule:
    """Variance-suppressed SAM: ``d = rho m/|m|``, result ``gd``.

    ``m <- (1 - theta) m + theta g0`` before ``d`` is made; ``m`` starts at the first
    ``g0``.

    Args:
      rho: Radius; a number, a schedule, or a tree of them like a prefix of params.
      theta: Weight of the newest gradient, in [0, 1]. With 1 this is SAM.

    Returns:
      A rule of 2 gradients that remembers ``m``.

    Raises:
      ValueError: If ``rho`` is negative or not finite, or ``theta`` is not in [0, 1].

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x: x @ (jnp.array([0.5, 1.0]) * x)
      >>> rule = oa.rules.vasso(0.5, theta=0.4)
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(loss), rule)
      >>> x = jnp.array([3.0, 2.0])
      >>> [round(float(g), 2) for g in sharp(x, sharp.init(x))[1]]
      [3.3, 4.8]

    References:
      Li and Giannakis, "Enhancing Sharpness-Aware Optimization Through Variance
      Suppression", 2023, 2309.15639.
    """
    rho = check_radius("rho", rho)
    theta = _checks.within("theta", theta, 0, 1)

    def offset(params, g0, state):
        _, m = _ema(state.rule_memory, 1 - theta, g0)
        return ascent(params, m, radius_at(rho, state))

    def combine(params, grads, state):
        return grads[-1], _ema(state.rule_memory, 1 - theta, grads[0])

    return SharpnessRule(2, after_clean(offset), combine, _no_mean, in_result=())


def friendly_sam(
    rho: Radius = 0.05, sigma: float = 1.0, decay: float = 0.9
) -> SharpnessRule:
    """Friendly SAM: ``d = rho u/|u|`` with ``u = g0 - sigma m``, result ``gd``.

    Then ``m <- decay m + (1 - decay) g0``. The first step is a step of SAM and sets
    ``m`` to ``g0``.

    Args:
      rho: Radius; a number, a schedule, or a tree of them like a prefix of params.
      sigma: Share of the full gradient, as estimated by ``m``, that is removed from the
        ascent; not negative. With 0 this is SAM.
      decay: Decay of ``m``, in [0, 1].

    Returns:
      A rule of 2 gradients that remembers ``m``.

    Raises:
      ValueError: If ``rho`` or ``sigma`` is negative or not finite, or ``decay`` is not
        in [0, 1].

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x: x @ (jnp.array([0.5, 1.0]) * x)
      >>> rule = oa.rules.friendly_sam(0.5)
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(loss), rule)
      >>> x = jnp.array([3.0, 2.0])
      >>> [round(float(g), 2) for g in sharp(x, sharp.init(x))[1]]
      [3.3, 4.8]

    References:
      Li et al., "Friendly Sharpness-Aware Minimization", 2024, 2403.12350.
    """
    rho = check_radius("rho", rho)
    sigma = _checks.finite("sigma", sigma)
    decay = _checks.within("decay", decay, 0, 1)

    def offset(params, g0, state):
        # m is zero before the first step.
        noise = _linear((1, g0), (-sigma, state.rule_memory[1]))
        return ascent(params, noise, radius_at(rho, state))

    def combine(params, grads, state):
        return grads[-1], _ema(state.rule_memory, decay, grads[0])

    return SharpnessRule(2, after_clean(offset), combine, _no_mean, in_result=())


def every_k(rule: SharpnessRule, k: int) -> SharpnessRule:
    """The rule at every ``k``-th step, the plain gradient at the others.

    The first step follows the rule. On the other steps the further evaluations are
    skipped by ``lax.cond``. XLA's CPU backend runs gradients of convolutions inside of
    ``lax.cond`` an order of magnitude slower. There choose between two programs, as the
    second example of :func:`optax_avg.sharpness_aware` does, or use
    :func:`optax_avg.multi_call`, which takes every gradient outside of it.

    Args:
      rule: A rule of two evaluations or more.
      k: Number of steps from one that follows the rule to the next, at least 1.

    Returns:
      A rule whose other steps cost one gradient.

    Raises:
      ValueError: If ``k`` is below 1, or the rule has one evaluation.
      TypeError: If ``rule`` is no rule.

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> rule = oa.rules.every_k(oa.rules.sam(0.5), 2)
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(lambda x: 0.5 * x**2), rule)
      >>> x = jnp.array(2.0)
      >>> _, first, state = sharp(x, sharp.init(x))
      >>> float(first), float(sharp(x, state)[1])
      (2.5, 2.0)
    """
    _mixups.refuse_no_rule("every_k", rule)
    _checks.check_integer("k", k, 1)
    if rule.num_evals < 2:
        raise ValueError(
            "every_k needs a rule of two evaluations or more; use this rule as it is."
        )
    inner = rule.due
    due = lambda state: (
        (state.rule_step % k == 0) & (True if inner is None else inner(state))
    )
    return rule._replace(due=due, period=_numerics.common_multiple(rule.period, k))


def look_sam(rho: Radius = 0.05, k: int = 5, alpha: float = 0.7) -> SharpnessRule:
    """LookSAM: SAM every ``k`` steps, its new direction reused in between.

    SAM steps have the result ``gd`` and keep ``gv``, the part of ``gd`` orthogonal to
    ``g0``. The other steps have the result ``g0 + alpha (|g0|/|gv|) gv``, or ``g0`` if
    ``gv`` is 0.

    Args:
      rho: Radius; a number, a schedule, or a tree of them like a prefix of params.
      k: Number of steps from one SAM step to the next, at least 1. With 1 this is SAM.
      alpha: Weight of the reused direction, not negative.

    Returns:
      A rule of ``1 + 1/k`` gradients that remembers ``gv``.

    Raises:
      ValueError: If ``rho`` or ``alpha`` is negative or not finite, or ``k`` is below
        1.

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x: x @ (jnp.array([0.5, 1.0]) * x)
      >>> rule = oa.rules.look_sam(0.5, k=5)
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(loss), rule)
      >>> x = jnp.array([3.0, 2.0])
      >>> [round(float(g), 2) for g in sharp(x, sharp.init(x))[1]]
      [3.3, 4.8]

    References:
      Liu et al., "Towards Efficient and Scalable Sharpness-Aware Minimization", 2022,
      2203.02714.
    """
    alpha = _checks.finite("alpha", alpha)

    def combine(params, grads, state):
        return grads[-1], _numerics.project_out(grads[-1], grads[0])

    def skip(params, g0, state):
        gv = state.rule_memory
        return _linear((1, g0), (alpha * _numerics.norm(g0), _numerics.unit(gv))), gv

    rule = SharpnessRule(2, sam(rho).probe, combine, _zeros, skip=skip)
    return every_k(rule, k)


def momentum_sam(rho: Radius = 0.05, mu: float = 0.9) -> SharpnessRule:
    """Momentum SAM: ``d = -rho v/|v|``, result ``gd``, then ``v <- mu v + gd``.

    A step costs one gradient. Value, aux and statistics are those at ``x + d``.

    Args:
      rho: Radius; a number, a schedule, or a tree of them like a prefix of params.
      mu: Decay of the momentum ``v``, in [0, 1).

    Returns:
      A rule of 1 gradient that remembers ``v``.

    Raises:
      ValueError: If ``rho`` is negative or not finite, or ``mu`` is not in [0, 1).

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> rule = oa.rules.momentum_sam(0.5)
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(lambda x: 0.5 * x**2), rule)
      >>> x = jnp.array(2.0)
      >>> _, first, state = sharp(x, sharp.init(x))
      >>> float(first), float(sharp(x, state)[1])
      (2.0, 1.5)

    References:
      Becker et al., "Momentum-SAM: Sharpness Aware Minimization without Computational
      Overhead", 2024, 2401.12033.
    """
    rho = check_radius("rho", rho)
    mu = _checks.within("mu", mu, 0, 1, closed_high=False)

    def probe(i, params, grads, state):
        v = state.rule_memory
        return _numerics.scale(-1, ascent(params, v, radius_at(rho, state)))

    def combine(params, grads, state):
        return grads[0], _linear((mu, state.rule_memory), (1, grads[0]))

    return SharpnessRule(1, probe, combine, _zeros)


def gam(
    rho: Radius = 0.2,
    rho_prime: Radius = 0.02,
    alpha: float = 0.6,
    beta: float = 0.5,
    gamma: float = 0.03,
    decomposition: Decomposition = "paper",
) -> SharpnessRule:
    """Gradient norm aware minimization, algorithm 2.

    With ``u(v) = v/|v|``: ``g1`` at ``x + rho' u(g0)``; ``e2 = rho u(g1 - g0)``; ``g2``
    at ``x + e2``; ``g3`` at ``x + e2 + rho' u(g2)``. ``h+ = alpha g1 + (1 - alpha) g3``
    and ``h- = beta g0 + (1 - beta) g2``; result ``h+ - gamma (part of h- orthogonal to
    h+)``. The authors' code has ``h- = g0 + |1 - beta| g2``:
    ``decomposition="reference"``.

    The defaults are those of the authors' code for CIFAR-100 with a ResNet. Its names
    are ``grad_norm_rho`` for ``rho``, ``grad_rho`` for ``rho_prime``, ``grad_beta_1``
    for ``alpha``, ``grad_beta_0`` for ``beta`` and ``grad_gamma`` for ``gamma``.

    Args:
      rho: Radius of the ball in which the gradient norm is maximised; a number, a
        schedule, or a tree of them like a prefix of params.
      rho_prime: Length of the step of the finite differences, of the same kinds.
      alpha: Weight of ``g1`` in ``h+``, in [0, 1].
      beta: Weight of ``g0`` in ``h-``, not negative.
      gamma: Weight of the orthogonal part, not negative. With ``alpha`` 1 and ``gamma``
        0 this is SAM of radius ``rho_prime``.
      decomposition: Which ``h-`` to use, ``"paper"`` or ``"reference"``.

    Returns:
      A rule of 4 gradients.

    Raises:
      ValueError: If ``alpha`` is not in [0, 1], another number is negative or not
        finite, or ``decomposition`` is unknown.

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x: x @ (jnp.array([0.5, 1.0]) * x)
      >>> rule = oa.rules.gam(0.5, 0.25)
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(loss), rule)
      >>> x = jnp.array([3.0, 2.0])
      >>> [round(float(g), 2) for g in sharp(x, sharp.init(x))[1]]
      [3.21, 4.78]

    References:
      Zhang et al., "Gradient Norm Aware Minimization Seeks First-Order Flatness and
      Improves Generalization", 2023, 2303.03108; code: github.com/xxgege/GAM.
    """
    rho, rho_prime = check_radius("rho", rho), check_radius("rho_prime", rho_prime)
    alpha = _checks.within("alpha", alpha, 0, 1)
    beta = _checks.finite("beta", beta)
    gamma = _checks.finite("gamma", gamma)
    _checks.one_of("decomposition", decomposition, get_args(Decomposition))

    def probe(i, params, grads, state):
        if i == 0:
            return None
        r, r_prime = radius_at(rho, state), radius_at(rho_prime, state)
        if i == 1:
            return ascent(params, grads[0], r_prime)
        e2 = ascent(params, _linear((1, grads[1]), (-1, grads[0])), r)
        return e2 if i == 2 else _numerics.add(e2, ascent(params, grads[2], r_prime))

    def combine(g0, g1, g2, g3):
        plus = _linear((alpha, g1), (1 - alpha, g3))
        if decomposition == "paper":
            minus = _linear((beta, g0), (1 - beta, g2))
        else:
            minus = _linear((1, g0), (abs(1 - beta), g2))
        return _linear((1, plus), (-gamma, _numerics.project_out(minus, plus)))

    check = check_some(None, "", rho, rho_prime)
    return SharpnessRule(4, probe, _combining(combine), check, num_ascents=3)


def gam_hvp(rho: optax.ScalarOrSchedule = 0.2, alpha: float = 1.0) -> SharpnessRule:
    """Gradient norm aware minimization, algorithm 1, with Hessian-vector products.

    ``f = H g0/|g0|``, ``xa = x + rho f/|f|``, result ``g0 + alpha rho H(xa) g(xa)/
    |g(xa)|``.

    Args:
      rho: Radius of the ball in which the gradient norm is maximised, a number or a
        schedule.
      alpha: Weight of the regulariser, not negative.

    Returns:
      A rule of 2 gradients and 2 Hessian-vector products.

    Raises:
      ValueError: If ``rho`` or ``alpha`` is negative or not finite, or ``rho`` is a
        tree.
      TypeError: When the rule is used, if the gradient has no forward derivative. An
        example is a ``jax.custom_vjp`` whose ``fwd`` calls the function itself.

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x: x @ (jnp.array([0.5, 1.0]) * x)
      >>> rule = oa.rules.gam_hvp(0.5)
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(loss), rule)
      >>> x = jnp.array([3.0, 2.0])
      >>> [round(float(g), 2) for g in sharp(x, sharp.init(x))[1]]
      [3.27, 4.84]

    References:
      Zhang et al., "Gradient Norm Aware Minimization Seeks First-Order Flatness and
      Improves Generalization", 2023, 2303.03108.
    """
    rho = check_one_radius("rho", rho, "gam_hvp")
    alpha = _checks.finite("alpha", alpha)

    def probe(i, params, grads, state):
        return None if i < 2 else ascent(params, grads[1], radius_at(rho, state))

    def direction(i, params, grads, state):
        return _numerics.unit(grads[i - 1]) if i in (1, 3) else None

    def combine(params, grads, state):
        r = radius_at(rho, state)
        return _linear((1, grads[0]), (alpha * r, grads[3])), state.rule_memory

    return SharpnessRule(
        4, probe, combine, direction=direction, num_ascents=2, in_result=(0,)
    )
