"""Rules that combine the gradients they take, or remember them.

result = combine(g_0, ..., g_n)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_avg import _checks, _leaves, _mixups, _numerics
from optax_avg.sharpness._rule import Grads, RuleState, SharpnessRule
from optax_avg.sharpness.offsets import (
    Radius,
    after_clean,
    ascent,
    check_one_radius,
    check_radius,
    finite,
    radius_at,
    sam,
)


def _linear(*pairs: tuple[Any, Any]) -> Any:
    """``sum_i c_i v_i`` over trees."""
    factors = [c for c, _ in pairs]
    return jax.tree.map(
        lambda *leaves: sum(c * v for c, v in zip(factors, leaves, strict=True)),
        *[tree for _, tree in pairs],
    )


def _combining(f: Callable[..., Any]) -> Callable[[Any, Grads, RuleState], Any]:
    """A ``combine`` without memory from a function of the gradients."""
    return lambda params, grads, state: (f(*grads), state.rule_memory)


def gsam(rho: Radius = 0.05, alpha: float = 0.4) -> SharpnessRule:
    """Surrogate-gap SAM: ``gd - alpha (part of g0 orthogonal to gd)``.

    Args:
      rho: radius; the authors let it follow the learning rate, see
        :func:`optax_avg.schedules.follow_learning_rate`.
      alpha: weight of the ascent on the surrogate gap; 0 is SAM.

    Returns:
      A rule of 2 gradients.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax_avg as oa
      >>> rule = oa.rules.gsam(0.05, alpha=0.4)

    References:
      Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training",
      2022, 2203.08065.
    """
    alpha = finite("alpha", alpha)
    combine = lambda g0, gd: _linear((1, gd), (-alpha, _numerics.project_out(g0, gd)))
    return sam(rho)._replace(combine=_combining(combine), in_result=None)


def gnp(rho: Radius = 0.05, alpha: float = 0.8) -> SharpnessRule:
    """Gradient norm penalty: ``(1 - alpha) g0 + alpha gd`` with ``d = rho u(g0)``.

    The authors' code mixes in ``u(g0)`` in place of ``g0``; this is the paper's.

    Args:
      rho: Radius; the paper writes ``r``.
      alpha: penalty over radius; 1 is SAM.

    Returns:
      A rule of 2 gradients.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax_avg as oa
      >>> rule = oa.rules.gnp(0.05, alpha=0.8)

    References:
      Zhao et al., "Penalizing Gradient Norm for Efficiently Improving Generalization in
      Deep Learning", 2022, 2202.03599.
    """
    alpha = finite("alpha", alpha)
    combine = lambda g0, gd: _linear((1 - alpha, g0), (alpha, gd))
    rule = sam(rho)
    return rule._replace(combine=_combining(combine), in_result=None)


def wsam(rho: Radius = 0.05, gamma: float = 0.9) -> SharpnessRule:
    """Weighted SAM: ``(1 - a) g0 + a gd`` with ``a = gamma/(1 - gamma)``.

    This is the coupled form; see :func:`optax_avg.decoupled_wsam` for the other.

    Args:
      rho: radius.
      gamma: weight of the sharpness, in [0, 1); 1/2 is SAM.

    Returns:
      A rule of 2 gradients.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax_avg as oa
      >>> rule = oa.rules.wsam(0.05, gamma=0.5)

    References:
      Yue et al., "Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
      Regularization Term", 2023, 2305.15817.
    """
    rho = check_radius("rho", rho)
    gamma = _checks.within("gamma", gamma, 0, 1, closed_high=False)
    return gnp(rho, gamma / (1 - gamma))


def gradient_regularisation(
    gamma: float = 0.01, rho: Radius = 0.01, scheme: str = "forward"
) -> SharpnessRule:
    """Gradient of ``L + gamma/2 |grad L|^2`` by finite differences, or exactly.

    ``"forward"``: ``g0 + gamma (g(x + rho g0) - g0)/rho``; ``"backward"``: ``g0 + gamma
    (g0 - g(x - rho g0))/rho``; ``"central"``: ``g0 + gamma (g(x + rho g0) - g(x - rho
    g0))/(2 rho)``; ``"exact"``: ``g0 + gamma H g0``.

    Args:
      gamma: weight of the penalty.
      rho: Step of the difference; positive. The paper writes ``epsilon``.
      scheme: of the difference.

    Returns:
      A rule of 2 gradients (3 for ``"central"``; 1 and a Hessian-vector product for
      ``"exact"``). It is not invariant to the scale of the loss.

    Raises:
      ValueError: If an argument is out of range.
      TypeError: When ``"exact"`` is used, if the gradient has no forward derivative, as
        where the ``fwd`` of a ``jax.custom_vjp`` calls the function itself.

    Example:
      >>> import optax_avg as oa
      >>> rule = oa.rules.gradient_regularisation(0.1, 0.05)

    References:
      Karakida et al., "Understanding Gradient Regularization in Deep Learning:
      Efficient Finite-Difference Computation and Implicit Bias", 2023, 2210.02720.
    """
    gamma = finite("gamma", gamma)
    rho = check_one_radius("rho", rho, "gradient_regularisation", open_low=True)
    if scheme == "exact":
        return SharpnessRule(
            2,
            lambda *_: None,
            _combining(lambda g0, hg: _linear((1, g0), (gamma, hg))),
            direction=lambda i, params, grads, state: grads[0] if i == 1 else None,
        )
    signs = {"forward": (1,), "backward": (-1,), "central": (1, -1)}
    if scheme not in signs:
        raise ValueError(f"scheme must be one of {[*signs, 'exact']}, got {scheme!r}.")

    def probe(i, params, grads, state):
        if i == 0:
            return None
        return _numerics.scale(signs[scheme][i - 1] * radius_at(rho, state), grads[0])

    def combine(params, grads, state):
        g0, r = grads[0], gamma / radius_at(rho, state)
        if scheme == "central":
            result = _linear((1, g0), (r / 2, grads[1]), (-r / 2, grads[2]))
        else:
            sign = signs[scheme][0]
            result = _linear((1 - sign * r, g0), (sign * r, grads[1]))
        return result, state.rule_memory

    return SharpnessRule(1 + len(signs[scheme]), probe, combine)


def cr_sam(rho: Radius = 0.05, gamma: float = 0.1, beta: float = 0.01) -> SharpnessRule:
    """Curvature-regularised SAM, with ``gw`` at ``x + d`` and ``gb`` at ``x - d``.

    ``gw + gamma (gw + gb - 2 g0) + beta (gw - gb)``, ``d = rho u(g0)``.

    Args:
      rho: radius.
      gamma: weight of the second difference.
      beta: weight of the first difference; with ``gamma`` 0 as well this is SAM.

    Returns:
      A rule of 3 gradients.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax_avg as oa
      >>> rule = oa.rules.cr_sam(0.05)

    References:
      Wu et al., "CR-SAM: Curvature Regularized Sharpness-Aware Minimization", 2024,
      2312.13555.
    """
    rho = check_radius("rho", rho)
    gamma = finite("gamma", gamma)
    beta = finite("beta", beta)

    def probe(i, params, grads, state):
        if i == 0:
            return None
        d = ascent(params, grads[0], radius_at(rho, state))
        return d if i == 1 else _numerics.scale(-1, d)

    combine = lambda g0, gw, gb: _linear(
        (1 + gamma + beta, gw), (gamma - beta, gb), (-2 * gamma, g0)
    )
    return SharpnessRule(3, probe, _combining(combine))


def _ema_of_gradients(params: Any) -> tuple[jax.Array, Any]:
    """No gradient yet, and zeros."""
    return jnp.asarray(False), _leaves.over(_numerics.zeros_like, params, params)


def _ema(memory: Any, decay: Any, g: Any) -> tuple[jax.Array, Any]:
    """``m <- decay m + (1 - decay) g``; the first gradient itself."""
    begun, m = memory
    mixed = jax.tree.map(
        lambda m, g: jnp.where(begun, decay * m + (1 - decay) * g, g), m, g
    )
    return jnp.asarray(True), mixed


def vasso(rho: Radius = 0.05, theta: float = 0.4) -> SharpnessRule:
    """Variance-suppressed SAM: ``d = rho u(m)``, ``m <- (1 - theta) m + theta g0``.

    ``m`` starts at the first ``g0``.

    Args:
      rho: radius.
      theta: weight of the newest gradient, in [0, 1]; 1 is SAM.

    Returns:
      A rule of 2 gradients that remembers ``m``.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax_avg as oa
      >>> rule = oa.rules.vasso(0.05, theta=0.4)

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

    probe = after_clean(offset)
    return SharpnessRule(2, probe, combine, _ema_of_gradients, in_result=())


def friendly_sam(
    rho: Radius = 0.05, sigma: float = 1.0, decay: float = 0.9
) -> SharpnessRule:
    """Friendly SAM: ``d = rho u(g0 - sigma m)``, then ``m`` follows ``g0``.

    ``m <- decay m + (1 - decay) g0``. The first step is SAM's and sets ``m`` to ``g0``.

    Args:
      rho: radius.
      sigma: share of the full gradient, as ``m`` estimates it, that is removed; 0 is
        SAM.
      decay: of ``m``, in [0, 1].

    Returns:
      A rule of 2 gradients that remembers ``m``.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax_avg as oa
      >>> rule = oa.rules.friendly_sam(0.05)

    References:
      Li et al., "Friendly Sharpness-Aware Minimization", 2024, 2403.12350.
    """
    rho = check_radius("rho", rho)
    sigma = finite("sigma", sigma)
    decay = _checks.within("decay", decay, 0, 1)

    def offset(params, g0, state):
        # m is zero before the first step.
        noise = _linear((1, g0), (-sigma, state.rule_memory[1]))
        return ascent(params, noise, radius_at(rho, state))

    def combine(params, grads, state):
        return grads[-1], _ema(state.rule_memory, decay, grads[0])

    probe = after_clean(offset)
    return SharpnessRule(2, probe, combine, _ema_of_gradients, in_result=())


def every_k(rule: SharpnessRule, k: int) -> SharpnessRule:
    """The rule at every ``k``-th step, from the first; the plain gradient elsewhere.

    The other evaluations stand under ``lax.cond``, in which XLA's CPU backend runs
    gradients of convolutions an order of magnitude slower; there take
    :func:`optax_avg.multi_call`, which has every gradient outside of it.

    Args:
      rule: any rule with a clean evaluation.
      k: at least 1.

    Returns:
      A rule whose other steps cost one gradient.

    Raises:
      ValueError: If ``k`` is below 1, or the rule has one evaluation.

    Example:
      >>> import optax_avg as oa
      >>> rule = oa.rules.every_k(oa.rules.sam(0.05), 5)
    """
    _mixups.refuse_no_rule("every_k", rule)
    _checks.check_integer("k", k, 1)
    if rule.num_evals < 2:
        raise ValueError("every_k needs a rule of two evaluations or more.")
    inner = rule.due
    due = lambda state: (
        (state.rule_step % k == 0) & (True if inner is None else inner(state))
    )
    return rule._replace(due=due, period=_numerics.common_multiple(rule.period, k))


def look_sam(rho: Radius = 0.05, k: int = 5, alpha: float = 0.7) -> SharpnessRule:
    """LookSAM: SAM every ``k`` steps, its new direction reused in between.

    SAM steps return ``gd`` and keep ``gv``, the part of ``gd`` orthogonal to ``g0``;
    the others return ``g0 + alpha (|g0|/|gv|) gv``, or ``g0`` while ``gv`` is 0.

    Args:
      rho: radius.
      k: steps between SAM steps; 1 is SAM.
      alpha: weight of the reused direction.

    Returns:
      A rule of ``1 + 1/k`` gradients that remembers ``gv``.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax_avg as oa
      >>> rule = oa.rules.look_sam(0.05, k=5)

    References:
      Liu et al., "Towards Efficient and Scalable Sharpness-Aware Minimization", 2022,
      2203.02714.
    """
    alpha = finite("alpha", alpha)

    def combine(params, grads, state):
        return grads[-1], _numerics.project_out(grads[-1], grads[0])

    def skip(params, g0, state):
        gv = state.rule_memory
        return _linear((1, g0), (alpha * _numerics.norm(g0), _numerics.unit(gv))), gv

    rule = SharpnessRule(
        2,
        sam(rho).probe,
        combine,
        init_memory=lambda params: _ema_of_gradients(params)[1],
        skip=skip,
    )
    return every_k(rule, k)


def momentum_sam(rho: Radius = 0.05, mu: float = 0.9) -> SharpnessRule:
    """Momentum SAM: ``d = -rho u(v)``, result ``gd``, then ``v <- mu v + gd``.

    One gradient a step. Value, aux and statistics are those of the perturbed pass.

    Args:
      rho: radius.
      mu: decay of the momentum ``v``, in [0, 1).

    Returns:
      A rule of 1 gradient that remembers ``v``.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax_avg as oa
      >>> oa.rules.momentum_sam(0.05).num_evals
      1

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

    return SharpnessRule(1, probe, combine, lambda params: _ema_of_gradients(params)[1])


def gam(
    rho: Radius = 0.2,
    rho_prime: Radius = 0.02,
    alpha: float = 0.6,
    beta: float = 0.5,
    gamma: float = 0.03,
    decomposition: str = "paper",
) -> SharpnessRule:
    """Gradient norm aware minimization, algorithm 2.

    ``g1`` at ``x + rho' u(g0)``; ``e2 = rho u(g1 - g0)``; ``g2`` at ``x + e2``; ``g3``
    at ``x + e2 + rho' u(g2)``. ``h+ = alpha g1 + (1 - alpha) g3`` and ``h- = beta g0 +
    (1 - beta) g2``; result ``h+ - gamma (part of h- orthogonal to h+)``. The authors'
    code has ``h- = g0 + |1 - beta| g2``: ``decomposition="reference"``.

    The defaults are those of the authors' code for CIFAR-100 with a ResNet. There
    ``grad_norm_rho`` is ``rho``, ``grad_rho`` is ``rho_prime``, ``grad_beta_1``, the
    weight of ``g1``, is ``alpha``, ``grad_beta_0`` is ``beta``, and ``grad_gamma`` is
    ``gamma``, as its README says, too.

    Args:
      rho: radius of the ball in which the gradient norm is maximised.
      rho_prime: step of the finite differences.
      alpha: weight of ``g1`` in ``h+``.
      beta: weight of ``g0`` in ``h-``.
      gamma: weight of the orthogonal part; with ``alpha`` 1 and ``gamma`` 0 this is SAM
        of radius ``rho_prime``.
      decomposition: ``"paper"`` or ``"reference"``.

    Returns:
      A rule of 4 gradients.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax_avg as oa
      >>> oa.rules.gam().num_evals
      4

    References:
      Zhang et al., "Gradient Norm Aware Minimization Seeks First-Order Flatness and
      Improves Generalization", 2023, 2303.03108; code: github.com/xxgege/GAM.
    """
    rho, rho_prime = check_radius("rho", rho), check_radius("rho_prime", rho_prime)
    alpha = _checks.within("alpha", alpha, 0, 1)
    beta = finite("beta", beta)
    gamma = finite("gamma", gamma)
    if decomposition not in ("paper", "reference"):
        raise ValueError(
            f"decomposition must be 'paper' or 'reference', got {decomposition!r}."
        )

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

    return SharpnessRule(4, probe, _combining(combine), num_ascents=3)


def gam_hvp(rho: Radius = 0.2, alpha: float = 1.0) -> SharpnessRule:
    """Gradient norm aware minimization, algorithm 1, with Hessian-vector products.

    ``f = H g0/|g0|``, ``xa = x + rho u(f)``, result ``g0 + alpha rho H(xa) g(xa)/
    |g(xa)|``.

    Args:
      rho: radius of the ball in which the gradient norm is maximised.
      alpha: weight of the regulariser.

    Returns:
      A rule of 2 gradients and 2 Hessian-vector products.

    Raises:
      ValueError: If an argument is out of range.
      TypeError: When it is used, if the gradient has no forward derivative, as where
        the ``fwd`` of a ``jax.custom_vjp`` calls the function itself.

    Example:
      >>> import optax_avg as oa
      >>> rule = oa.rules.gam_hvp(0.2)

    References:
      Zhang et al., 2023, 2303.03108.
    """
    rho = check_one_radius("rho", rho, "gam_hvp")
    alpha = finite("alpha", alpha)

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
