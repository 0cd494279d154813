"""Rules that differ from SAM in the offset; the result is the gradient there.

d = rho T^2 g0 / |T g0|,    result = gradient at x + d
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_avg import _tree
from optax_avg.sharpness import Grads, RuleState, SharpnessRule

Radius = Any  # a float, a schedule, or a tree of them like (a prefix of) params
Metric = Callable[[Any, Any], Any]


def ascent(
    params: Any,
    grads: Any,
    radius: Any,
    *,
    mask: _tree.Where | None = None,
    metric: Metric | None = None,
    scope: str = "global",
) -> Any:
    """The offset ``d = rho T^2 g / |T g|`` that all of the family build on.

    Args:
      params: ``x``.
      grads: ``g``.
      radius: ``rho``, a number or a tree of them like a prefix of ``params``.
      mask: leaves to perturb, before the norm is taken.
      metric: ``(params, grads) -> T``, elementwise; 1 by default.
      scope: of the norm: ``"global"``, ``"leaf"``, or ``"row"`` (along the first axis
        of every matrix, for embedding tables).

    Returns:
      A tree like ``params``, None where there is no offset.
    """
    g = masked(mask, params, grads)
    t = None if metric is None else metric(params, grads)
    tg = g if t is None else _tree.over(lambda g, t: t * g, params, g, t)
    direction = tg if t is None else _tree.over(lambda g, t: t * g, params, tg, t)
    if scope == "global":
        n = _tree.norm(tg)
        norms = _tree.over(lambda _: n, params, g)
    else:
        norms = _tree.over(_row_norm if scope == "row" else _tree.norm, params, tg)
    radii = _spread(radius, params)
    return _tree.over(
        lambda v, n, r: jnp.where(n > 0, r, 0) * (v / jnp.where(n > 0, n, 1)),
        params,
        direction,
        norms,
        radii,
    )


def masked(mask: _tree.Where | None, params: Any, grads: Any) -> Any:
    """Gradients, None outside the mask."""
    if mask is None:
        return grads
    return jax.tree.map(
        lambda keep, g: g if keep else None,
        inside_of(mask, params),
        grads,
        is_leaf=lambda x: x is None,
    )


def inside_of(mask: _tree.Where | None, params: Any) -> Any:
    """A tree of bools like ``params``."""
    selected = _tree.select(params, mask)
    return jax.tree.map(
        lambda leaf: not _tree.is_masked(leaf), selected, is_leaf=_tree.is_masked
    )


def _row_norm(v: jax.Array) -> jax.Array:
    if v.ndim < 2:
        return _tree.norm(v)
    return jax.vmap(_tree.norm)(v).reshape(-1, *[1] * (v.ndim - 1))


def _spread(radius: Any, params: Any) -> Any:
    """One radius a leaf, from a prefix tree."""
    return jax.tree.map(
        lambda r, part: jax.tree.map(lambda _: _tree.wide(jnp.asarray(r)), part),
        radius,
        params,
    )


def radius_at(radius: Radius, state: RuleState) -> Any:
    """The radius of this step: schedules are called with the optimizer step."""
    return jax.tree.map(lambda r: r(state.rule_step) if callable(r) else r, radius)


def check_radius(name: str, radius: Radius) -> Radius:
    """Raises unless every number in ``radius`` is finite and not negative."""
    return jax.tree.map(
        lambda r: r if callable(r) else _tree.within(name, r, 0, float("inf")), radius
    )


def _check_scope(scope: str) -> None:
    if scope not in ("global", "leaf", "row"):
        raise ValueError(f"scope must be 'global', 'leaf' or 'row', got {scope!r}.")


def descend(params: Any, grads: Grads, state: RuleState) -> tuple[Any, Any]:
    """The result of SAM and its kin: the last gradient, memory as it was."""
    del params
    return grads[-1], state.rule_memory


def after_clean(offset: Callable[[Any, Any, RuleState], Any]) -> Callable[..., Any]:
    """A probe with a clean evaluation first; ``offset(params, g0, state)`` second."""

    def probe(i, params, grads, state):
        return None if i == 0 else offset(params, grads[0], state)

    return probe


def sam(
    rho: Radius = 0.05,
    *,
    mask: _tree.Where | None = None,
    metric: Metric | None = None,
    scope: str = "global",
) -> SharpnessRule:
    """Sharpness-aware minimization: ``d = rho T^2 g0/|T g0|``, result ``gd``.

    With ``scope="leaf"`` and a tree of radii this is AdaSAP's perturbation by groups,
    with ``scope="row"`` PamaCF's by rows of an embedding table.

    Args:
      rho: radius; a float, a schedule, or a tree of them like a prefix of params.
      mask: leaves to perturb, a tree of bools or ``(key_path, leaf) -> bool``.
      metric: ``(params, grads) -> T``, elementwise; 1 by default.
      scope: of the norm, ``"global"``, ``"leaf"`` or ``"row"``.

    Returns:
      A rule of 2 gradients.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax_avg as oa
      >>> oa.rules.sam(0.05).num_evals
      2

    References:
      Foret et al., "Sharpness-Aware Minimization for Efficiently Improving
      Generalization", 2021, 2010.01412.
    """
    rho = check_radius("rho", rho)
    _check_scope(scope)
    offset = lambda params, g0, state: ascent(
        params, g0, radius_at(rho, state), mask=mask, metric=metric, scope=scope
    )
    return SharpnessRule(2, after_clean(offset), descend)


def usam(rho: Radius = 0.05, *, mask: _tree.Where | None = None) -> SharpnessRule:
    """Unnormalised SAM: ``d = rho g0``, result ``gd``.

    Args:
      rho: radius per unit of gradient.
      mask: leaves to perturb.

    Returns:
      A rule of 2 gradients. It is not invariant to the scale of the loss.

    Raises:
      ValueError: If ``rho`` is negative.

    Example:
      >>> import optax_avg as oa
      >>> rule = oa.rules.usam(0.1)

    References:
      Compagnoni et al., "An SDE for Modeling SAM: Theory and Insights", 2023,
      2301.08203.
    """
    return dnsam(rho, 1.0, mask=mask)


def dnsam(
    rho: Radius = 0.05, norm: Any = 1.0, *, mask: _tree.Where | None = None
) -> SharpnessRule:
    """Deterministically normalised SAM: ``d = rho g0/norm``, result ``gd``.

    Args:
      rho: radius.
      norm: in place of ``|g0|``; a float or a schedule, positive.
      mask: leaves to perturb.

    Returns:
      A rule of 2 gradients.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax_avg as oa
      >>> rule = oa.rules.dnsam(0.05, norm=3.0)

    References:
      Compagnoni et al., 2023, 2301.08203.
    """
    rho = check_radius("rho", rho)
    if not callable(norm):
        norm = _tree.within("norm", norm, 0, float("inf"), open_low=True)

    def offset(params, g0, state):
        radii = _spread(radius_at(rho, state), params)
        n = radius_at(norm, state)
        return _tree.over(
            lambda g, r: r / n * g, params, masked(mask, params, g0), radii
        )

    return SharpnessRule(2, after_clean(offset), descend)


def asam(
    rho: Radius = 0.5, eta: float = 0.01, *, where: _tree.Where | None = None
) -> SharpnessRule:
    """Adaptive SAM: ``d = rho T^2 g0/|T g0|`` with ``T = |x| + eta``, result ``gd``.

    The authors adapt leaves named "weight" alone; other leaves have ``T = 1``. With
    ``eta = 0`` the rule is invariant to rescaling of weights that leaves the loss.

    Args:
      rho: radius.
      eta: added to ``|x|``; not negative.
      where: leaves to adapt, all by default.

    Returns:
      A rule of 2 gradients.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax_avg as oa
      >>> rule = oa.rules.asam(0.5)

    References:
      Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
      Learning of Deep Neural Networks", 2021, 2102.11600.
    """
    eta = _tree.within("eta", eta, 0, float("inf"))

    def metric(params, grads):
        return jax.tree.map(
            lambda x, keep, g: (
                None
                if g is None
                else jnp.abs(_tree.wide(x)) + eta
                if keep
                else jnp.ones_like(g)
            ),
            params,
            inside_of(where, params),
            grads,
        )

    return sam(rho, metric=metric)


def fisher_sam(rho: Radius = 0.1, eta: float = 1.0) -> SharpnessRule:
    """Fisher SAM: ``d = rho F g0/sqrt(g0' F g0)``, ``F = 1/(1 + eta g0^2)``.

    Args:
      rho: radius.
      eta: weight of the squared gradient; 0 is SAM.

    Returns:
      A rule of 2 gradients. It is not invariant to the scale of the loss.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax_avg as oa
      >>> rule = oa.rules.fisher_sam(0.1)

    References:
      Kim et al., "Fisher SAM: Information Geometry and Sharpness Aware Minimisation",
      2022, 2206.04920.
    """
    eta = _tree.within("eta", eta, 0, float("inf"))
    metric = lambda params, grads: jax.tree.map(
        lambda g: lax.rsqrt(1 + eta * jnp.square(g)), grads
    )
    return sam(rho, metric=metric)


def fsam(
    rho: Radius = 0.05, sparsity: float = 0.5, refresh: int = 100
) -> SharpnessRule:
    """Sparse SAM: perturbs the parameters of the largest diagonal Fisher entries.

    The Fisher is the squared gradient of the batch at every ``refresh``-th step; its
    mask serves the steps after, and the steps up to the first one perturb all. The
    norm is over the masked gradient.

    Args:
      rho: radius.
      sparsity: share of the parameters that is left unperturbed, in [0, 1).
      refresh: steps between masks.

    Returns:
      A rule of 2 gradients with a mask in its memory.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax_avg as oa
      >>> rule = oa.rules.fsam(0.05, sparsity=0.5)

    References:
      Mi et al., "Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation
      Approach", 2022, 2210.05497.
    """
    rho = check_radius("rho", rho)
    sparsity = _tree.within("sparsity", sparsity, 0, 1, closed_high=False)
    _tree.check_every(refresh, 0)

    def init(params):
        return _tree.over(lambda x: jnp.ones_like(x, dtype=bool), params, params)

    def offset(params, g0, state):
        sparse = _tree.over(
            lambda g, m: m * g, params, g0, _as_float(state.rule_memory)
        )
        return ascent(params, sparse, radius_at(rho, state))

    def combine(params, grads, state):
        g0 = grads[0]

        def renew(_):
            fisher = jax.tree.map(lambda g: jnp.square(jnp.abs(g)), g0)
            leaves = jax.tree.leaves(fisher)
            below = jnp.floor(sparsity * sum(float(leaf.size) for leaf in leaves))
            threshold = _tree.order_statistic(leaves, below)
            return jax.tree.map(lambda f: f >= threshold, fisher)

        due = state.rule_step % refresh == 0
        keep = lambda mask: jax.tree.map(
            lambda m, g: _tree.vary(m, _tree.varying_axes(g)), mask, g0
        )
        memory = lax.cond(due, renew, keep, state.rule_memory)
        return grads[-1], memory

    return SharpnessRule(2, after_clean(offset), combine, init)


def _as_float(mask: Any) -> Any:
    return jax.tree.map(lambda m: m.astype(jnp.float32), mask)


def sam_on(
    rho: Radius = 0.05,
    where: _tree.Where | None = None,
    *,
    metric: Metric | None = None,
) -> SharpnessRule:
    """SAM on the normalisation parameters alone; the norm is over them.

    Args:
      rho: radius.
      where: the leaves to perturb; by default those whose path names a normalisation
        (``norm``, ``bn``, ``ln`` in any case).
      metric: as in :func:`sam`, for the adaptive variants.

    Returns:
      A rule of 2 gradients.

    Raises:
      ValueError: If ``rho`` is negative.

    Example:
      >>> import optax_avg as oa
      >>> rule = oa.rules.sam_on(0.5)

    References:
      Mueller et al., "Normalization Layers Are All That Sharpness-Aware Minimization
      Needs", 2023, 2306.04226.
    """
    return sam(rho, mask=is_normalisation if where is None else where, metric=metric)


def is_normalisation(path: Any, leaf: Any) -> bool:
    """Whether a key path names a normalisation layer."""
    del leaf
    name = jax.tree_util.keystr(path).lower()
    return re.search(r"norm|(?<![a-z])(bn|ln)(?![a-z])", name) is not None


def awp(gamma: Radius = 0.01) -> SharpnessRule:
    """Adversarial weight perturbation: per leaf ``gamma |x_l| u(g0_l)``.

    Leaves of two or more dimensions are perturbed.

    Args:
      gamma: radius relative to the norm of each leaf.

    Returns:
      A rule of 2 gradients.

    Raises:
      ValueError: If ``gamma`` is negative.

    Example:
      >>> import optax_avg as oa
      >>> rule = oa.rules.awp(0.01)

    References:
      Wu et al., "Adversarial Weight Perturbation Helps Robust Generalization", 2020,
      2004.05884.
    """
    gamma = check_radius("gamma", gamma)

    def offset(params, g0, state):
        r = radius_at(gamma, state)
        radii = jax.tree.map(
            lambda x: r * _tree.norm(x) if _tree.is_float(x) else r, params
        )
        matrices = lambda path, x: jnp.ndim(x) >= 2
        return ascent(params, g0, radii, mask=matrices, scope="leaf")

    return SharpnessRule(2, after_clean(offset), descend)


def amp(epsilon: Radius = 0.5, eta: Radius = 1.0, steps: int = 1) -> SharpnessRule:
    """Adversarial model perturbation: projected gradient ascent in a ball.

    ``steps`` times ``d <- Proj(d + eta g(x + d))`` onto ``|d| <= epsilon`` over all
    leaves (the authors project leaf by leaf), result ``gd``.

    Args:
      epsilon: radius of the ball.
      eta: step of the ascent.
      steps: ascent steps; at least 1.

    Returns:
      A rule of ``1 + steps`` gradients.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax_avg as oa
      >>> oa.rules.amp(0.5, steps=3).num_evals
      4

    References:
      Zheng et al., "Regularizing Neural Networks via Adversarial Model Perturbation",
      2021, 2010.04925.
    """
    epsilon, eta = check_radius("epsilon", epsilon), check_radius("eta", eta)
    _tree.check_integer("steps", steps, 1)

    def probe(i, params, grads, state):
        if i == 0:
            return None
        ball, step = radius_at(epsilon, state), radius_at(eta, state)
        d = jax.tree.map(jnp.zeros_like, grads[0])
        for g in grads:
            d = jax.tree.map(lambda d, g: d + step * g, d, g)
            n = _tree.norm(d)
            d = _tree.scale(jnp.where(n > ball, ball / jnp.maximum(n, ball), 1), d)
        return d

    return SharpnessRule(1 + steps, probe, descend, num_ascents=steps)


def esam(rho: Radius = 0.05, beta: float = 0.5, key: Any = 0) -> SharpnessRule:
    """Efficient SAM's weight perturbation: SAM on random leaves, divided by ``beta``.

    ``d_l = b_l/beta rho g0_l/|g0|``, ``b_l`` 1 with probability ``beta``, else 0.

    Args:
      rho: radius.
      beta: share of the leaves that is perturbed, in (0, 1].
      key: a PRNG key or an integer seed.

    Returns:
      A rule of 2 gradients with the key in its memory.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax, optax_avg as oa
      >>> rule = oa.rules.esam(0.05, 0.5, jax.random.key(0))

    References:
      Du et al., "Efficient Sharpness-Aware Minimization for Improved Training of Neural
      Networks", 2022, 2110.03141.
    """
    rho = check_radius("rho", rho)
    beta = _tree.within("beta", beta, 0, 1, open_low=True)

    def init(params):
        del params
        return jax.random.key(key) if isinstance(key, int) else key

    def offset(params, g0, state):
        d = ascent(params, g0, radius_at(rho, state))
        leaves, structure = jax.tree.flatten(d)
        at_step = jax.random.fold_in(state.rule_memory, state.rule_step)
        kept = jax.random.bernoulli(at_step, beta, (len(leaves),))
        return structure.unflatten(
            [jnp.where(keep, leaf / beta, 0) for keep, leaf in zip(kept, leaves)]
        )

    return SharpnessRule(2, after_clean(offset), descend, init)
