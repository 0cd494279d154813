"""Rules that differ from SAM in the offset; the result is the gradient there.

d = rho T^2 g0 / |T g0|,    result = gradient at x + d
"""

import re
from typing import Any, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import keystr

from optax_avg import _checks, _leaves, _mesh, _numerics
from optax_avg._keys import key_maker
from optax_avg.sharpness._ascent import (
    UNPERTURBED,
    Metric,
    Offset,
    Radius,
    Scope,
    after_clean,
    ascent,
    check_one_radius,
    check_radius,
    check_some,
    descend,
    inside,
    is_inside,
    radius_at,
    spread,
)
from optax_avg.sharpness._rule import InitMemory, SharpnessRule

__all__ = [
    "amp",
    "asam",
    "awp",
    "dnsam",
    "esam",
    "fisher_sam",
    "is_normalisation",
    "sam",
    "sam_on",
    "sparse_sam",
    "usam",
]


def _descending(
    offset: Offset, init_memory: InitMemory = lambda params: ()
) -> SharpnessRule:
    """A rule of two gradients whose result is the second."""
    return SharpnessRule(2, after_clean(offset), descend, init_memory, in_result=())


def sam(
    rho: Radius = 0.05,
    *,
    where: _leaves.Where | None = None,
    metric: Metric | None = None,
    scope: Scope = "global",
) -> SharpnessRule:
    """Sharpness-aware minimization: ``d = rho T^2 g0/|T g0|``, result ``gd``.

    With ``scope="leaf"`` and a tree of radii this is the perturbation by groups of
    AdaSAP. With ``scope="row"`` it is that of PamaCF by rows of an embedding table.

    Args:
      rho: Radius; a number, a schedule, or a tree of them like a prefix of params.
      where: Leaves to perturb: a tree of bools, or ``(key_path, leaf) -> bool``.
      metric: Function ``(params, grads) -> T`` with an elementwise scale for every
        leaf. 1 by default.
      scope: What the norm ``|T g0|`` covers: ``"global"`` all leaves, ``"leaf"`` each
        leaf, ``"row"`` each slice along the first axis of a leaf of two or more
        dimensions.

    Returns:
      A rule of 2 gradients.

    Raises:
      ValueError: If ``rho`` is negative or not finite, or ``scope`` is unknown.

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x: x @ (jnp.array([0.5, 1.0]) * x)
      >>> rule = oa.rules.sam(0.5)
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(loss), rule)
      >>> x = jnp.array([3.0, 2.0])
      >>> [round(float(g), 2) for g in sharp(x, sharp.init(x))[1]]
      [3.3, 4.8]

    References:
      Foret et al., "Sharpness-Aware Minimization for Efficiently Improving
      Generalization", 2021, 2010.01412.
    """
    rho = check_radius("rho", rho)
    _checks.one_of("scope", scope, get_args(Scope))
    offset = lambda params, g0, state: ascent(
        params, g0, radius_at(rho, state), where=where, metric=metric, scope=scope
    )
    return _descending(offset, check_some(where, f"where {UNPERTURBED}", rho))


def usam(rho: Radius = 0.05, *, where: _leaves.Where | None = None) -> SharpnessRule:
    """Unnormalised SAM: ``d = rho g0``, result ``gd``.

    Args:
      rho: Radius per unit of gradient; a number, a schedule, or a tree of them.
      where: Leaves to perturb: a tree of bools, or ``(key_path, leaf) -> bool``.

    Returns:
      A rule of 2 gradients. It depends on the scale of the loss.

    Raises:
      ValueError: If ``rho`` is negative or not finite.

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x: x @ (jnp.array([0.5, 1.0]) * x)
      >>> rule = oa.rules.usam(0.1)
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(loss), rule)
      >>> x = jnp.array([3.0, 2.0])
      >>> [round(float(g), 2) for g in sharp(x, sharp.init(x))[1]]
      [3.3, 4.8]

    References:
      Compagnoni et al., "An SDE for Modeling SAM: Theory and Insights", 2023,
      2301.08203.
    """
    return dnsam(rho, 1.0, where=where)


def dnsam(
    rho: Radius = 0.05,
    norm: optax.ScalarOrSchedule = 1.0,
    *,
    where: _leaves.Where | None = None,
) -> SharpnessRule:
    """Deterministically normalised SAM: ``d = rho g0/norm``, result ``gd``.

    Args:
      rho: Radius; a number, a schedule, or a tree of them like a prefix of params.
      norm: Positive number or schedule that replaces ``|g0|``.
      where: Leaves to perturb: a tree of bools, or ``(key_path, leaf) -> bool``.

    Returns:
      A rule of 2 gradients.

    Raises:
      ValueError: If ``rho`` is negative, ``norm`` is not positive, or one of them is
        not finite.

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x: x @ (jnp.array([0.5, 1.0]) * x)
      >>> rule = oa.rules.dnsam(0.5, norm=4.0)
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(loss), rule)
      >>> x = jnp.array([3.0, 2.0])
      >>> [round(float(g), 2) for g in sharp(x, sharp.init(x))[1]]
      [3.38, 5.0]

    References:
      Compagnoni et al., "An SDE for Modeling SAM: Theory and Insights", 2023,
      2301.08203.
    """
    rho = check_radius("rho", rho)
    norm = check_one_radius("norm", norm, "dnsam", open_low=True)

    def offset(params, g0, state):
        radii = spread(radius_at(rho, state), params)
        n = radius_at(norm, state)
        return _leaves.over(
            lambda g, r: r / n * g, params, inside(where, params, g0), radii
        )

    return _descending(offset, check_some(where, f"where {UNPERTURBED}", rho))


def asam(
    rho: Radius = 0.5, eta: float = 0.01, *, where: _leaves.Where | None = None
) -> SharpnessRule:
    """Adaptive SAM: ``d = rho T^2 g0/|T g0|`` with ``T = |x| + eta``, result ``gd``.

    All leaves are adapted by default. The authors' code adapts only leaves named
    "weight", and others have ``T = 1``: choose them with ``where``. With ``eta = 0``
    the rule is invariant to rescalings of the weights that leave the loss unchanged.

    Args:
      rho: Radius; a number, a schedule, or a tree of them like a prefix of params.
      eta: Number added to ``|x|``, not negative.
      where: Leaves to adapt, all by default: a tree of bools, or ``(key_path, leaf) ->
        bool``.

    Returns:
      A rule of 2 gradients.

    Raises:
      ValueError: If ``rho`` or ``eta`` is negative or not finite.

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x: x @ (jnp.array([0.5, 1.0]) * x)
      >>> rule = oa.rules.asam(0.5, eta=0.0)
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(loss), rule)
      >>> x = jnp.array([3.0, 2.0])
      >>> [round(float(g), 2) for g in sharp(x, sharp.init(x))[1]]
      [4.12, 5.33]

    References:
      Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
      Learning of Deep Neural Networks", 2021, 2102.11600.
    """
    eta = _checks.finite("eta", eta)

    def metric(params, grads):
        return jax.tree.map(
            lambda x, keep, g: (
                None
                if g is None
                else jnp.abs(_numerics.wide(x)) + eta
                if keep
                else jnp.ones_like(g)
            ),
            params,
            is_inside(where, params),
            grads,
        )

    unscaled = "where is true of no leaf, so that this would be sam"
    check = check_some(where, unscaled, rho)
    return sam(rho, metric=metric)._replace(init_memory=check)


def fisher_sam(rho: Radius = 0.1, eta: float = 1.0) -> SharpnessRule:
    """Fisher SAM: ``d = rho F g0/sqrt(g0' F g0)``, ``F = 1/(1 + eta g0^2)``.

    Args:
      rho: Radius; a number, a schedule, or a tree of them like a prefix of params.
      eta: Weight of the squared gradient, not negative. With 0 this is SAM.

    Returns:
      A rule of 2 gradients. It depends on the scale of the loss.

    Raises:
      ValueError: If ``rho`` or ``eta`` is negative or not finite.

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x: x @ (jnp.array([0.5, 1.0]) * x)
      >>> rule = oa.rules.fisher_sam(0.5)
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(loss), rule)
      >>> x = jnp.array([3.0, 2.0])
      >>> [round(float(g), 2) for g in sharp(x, sharp.init(x))[1]]
      [3.11, 4.17]

    References:
      Kim et al., "Fisher SAM: Information Geometry and Sharpness Aware Minimisation",
      2022, 2206.04920.
    """
    eta = _checks.finite("eta", eta)
    metric = lambda params, grads: jax.tree.map(
        lambda g: lax.rsqrt(1 + eta * jnp.square(g)), grads
    )
    return sam(rho, metric=metric)


def sparse_sam(
    rho: Radius = 0.05, sparsity: float = 0.5, refresh: int = 100
) -> SharpnessRule:
    """Sparse SAM: perturbs the parameters of the largest diagonal Fisher entries.

    ``d = rho m g0/|m g0|`` with a mask ``m`` of zeros and ones, result ``gd``. The
    Fisher entries are the squared gradient of one batch. A mask is made every
    ``refresh`` steps and is used from the next step on; until the first mask is made
    all parameters are perturbed. Among equal entries, such as zeros, the ones that come
    first are dropped first, so that the share is exact for sparse gradients as well.

    Args:
      rho: Radius; a number, a schedule, or a tree of them like a prefix of params.
      sparsity: Share of the parameters that is not perturbed, in [0, 1), rounded down
        to a whole number of them.
      refresh: Number of steps for which a mask is used, at least 1.

    Returns:
      A rule of 2 gradients that remembers a mask.

    Raises:
      ValueError: If ``rho`` is negative or not finite, ``sparsity`` is not in [0, 1),
        ``refresh`` is below 1, or there are 2**31 parameters or more.

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x: x @ (jnp.array([0.5, 1.0]) * x)
      >>> rule = oa.rules.sparse_sam(0.5, sparsity=0.5)
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(loss), rule)
      >>> x = jnp.array([3.0, 2.0])
      >>> [round(float(g), 2) for g in sharp(x, sharp.init(x))[1]]
      [3.3, 4.8]

    References:
      Mi et al., "Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation
      Approach", 2022, 2210.05497.
    """
    rho = check_radius("rho", rho)
    sparsity = _checks.within("sparsity", sparsity, 0, 1, closed_high=False)
    _checks.check_integer("refresh", refresh, 1)

    def init(params):
        if sum(jnp.size(x) for x in jax.tree.leaves(params)) >= 2**31:
            raise ValueError(
                "sparse_sam counts up to 2**31 - 1 parameters; use sam(where=)."
            )
        mask = _leaves.over(lambda x: ~_numerics.zeros_like(x, bool), params, params)
        return mask, jnp.array(-refresh, jnp.int32)

    def offset(params, g0, state):
        mask, _ = state.rule_memory
        sparse = _leaves.over(
            lambda g, m: m * g,
            params,
            g0,
            jax.tree.map(lambda m: m.astype(jnp.float32), mask),
        )
        return ascent(params, sparse, radius_at(rho, state))

    def combine(params, grads, state):
        g0 = grads[0]
        mask, renewed = state.rule_memory
        passed = state.rule_step - renewed
        due = (passed >= refresh) | (passed < 0)  # the clock has gone back
        keep = lambda mask: jax.tree.map(
            lambda m, g: _mesh.vary(m, _mesh.varying_axes(g)), mask, g0
        )
        mask = lax.cond(due, lambda _: _largest(g0, sparsity), keep, mask)
        return grads[-1], (mask, jnp.where(due, state.rule_step, renewed))

    return _descending(offset, init)._replace(combine=combine, period=2 * refresh)


def _largest(g: optax.Updates, sparsity: Any) -> Any:
    """Marks the entries of largest size, all but a share of ``sparsity``."""
    sizes, structure = jax.tree.flatten(jax.tree.map(jnp.abs, g))
    count = sum(leaf.size for leaf in sizes)
    # Python counts exactly where float32 cannot.
    share: Any = sparsity * count
    exact = int(share) if isinstance(share, float) else share.astype(jnp.int32)
    dropped = jnp.minimum(exact, count - 1)
    return structure.unflatten(_numerics.ranked_after(sizes, dropped))


def sam_on(
    rho: Radius = 0.05,
    where: _leaves.Where | None = None,
    *,
    metric: Metric | None = None,
) -> SharpnessRule:
    """SAM on the parameters of normalisation layers; the norm covers these alone.

    ``d = rho T^2 g0/|T g0|`` on the selected leaves, 0 elsewhere, result ``gd``.

    By default a leaf is selected by its own name and that of the module that holds it.
    Only the name of the leaf and that of the module around it are looked at: in
    ``["PreNorm_0"]["Dense_0"]["kernel"]`` the names are ``Dense_0`` and ``kernel``.
    Names are split into words at ``/``, ``.``, ``_``, digits and capitals. A leaf is
    perturbed if one of the words

    - ends in ``norm`` or ``norms`` (``BatchNorm_0``, ``rms_norm``, ``layernorm``,
      ``norm1``), or is ``normalization`` or ``normalisation``, or
    - is ``bn``, ``ln`` or ``gn``, perhaps after ``pre`` or ``post`` (``bn1``, ``ln_f``,
      ``ResNetBN``, ``preln``).

    ``normalizer``, ``normal_head`` and ``normalize_fn`` are none of these.

    Args:
      rho: Radius; a number, a schedule, or a tree of them like a prefix of params.
      where: Leaves to perturb: a tree of bools, or ``(key_path, leaf) -> bool``. By
        default those whose names say that they belong to a normalisation.
      metric: Function ``(params, grads) -> T`` for the adaptive variants, as in
        :func:`sam`.

    Returns:
      A rule of 2 gradients.

    Raises:
      ValueError: If ``rho`` is negative or not finite or, when the state is made, no
        leaf is selected.

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x: x["norm"] ** 2 + x["kernel"] ** 2
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(loss), oa.rules.sam_on(0.5))
      >>> x = {"kernel": jnp.array(1.0), "norm": jnp.array(1.0)}
      >>> {name: float(g) for name, g in sharp(x, sharp.init(x))[1].items()}
      {'kernel': 2.0, 'norm': 3.0}

    References:
      Mueller et al., "Normalization Layers Are All That Sharpness-Aware Minimization
      Needs", 2023, 2306.04226.
    """
    otherwise = f"where {UNPERTURBED}"
    if where is None:
        where = is_normalisation
        otherwise = (
            "no leaf belongs to a normalisation by its name; pass "
            "where=lambda path, leaf: ..., true of the leaves to perturb"
        )
    check = check_some(where, otherwise, rho)
    return sam(rho, where=where, metric=metric)._replace(init_memory=check)


def is_normalisation(path: Any, leaf: Any) -> bool:
    """Whether a key path names a parameter of a normalisation layer."""
    del leaf
    names = re.split(r"[/.]", "/".join(keystr((key,), simple=True) for key in path))
    # Indices and the containers of frameworks name no module.
    names = [n for n in names if not re.fullmatch(r"\d*|value|raw_value|~", n)]
    words = [word.lower() for name in names[-2:] for word in _WORD.findall(name)]
    return any(_NORMALISATION.fullmatch(word) for word in words)


_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_NORMALISATION = re.compile(
    r"\w*norms?|(batch|layer|group|instance)?normali[sz]ation|(pre|post)?(bn|ln|gn)"
)


def awp(rho: Radius = 0.01) -> SharpnessRule:
    """Adversarial weight perturbation: ``d_l = rho |x_l| g0_l/|g0_l|`` for each leaf.

    The result is ``gd``. Only leaves of two or more dimensions are perturbed.

    Args:
      rho: Radius relative to the norm of each leaf; a number, a schedule, or a tree of
        them like a prefix of params. The paper writes ``gamma``.

    Returns:
      A rule of 2 gradients.

    Raises:
      ValueError: If ``rho`` is negative or not finite or, when the state is made, no
        leaf has two dimensions.

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x: jnp.sum(x**2) / 2
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(loss), oa.rules.awp(0.5))
      >>> x = jnp.array([[3.0, 4.0]])
      >>> print(sharp(x, sharp.init(x))[1])
      [[4.5 6. ]]

    References:
      Wu et al., "Adversarial Weight Perturbation Helps Robust Generalization", 2020,
      2004.05884.
    """
    rho = check_radius("rho", rho)

    def offset(params, g0, state):
        radii = jax.tree.map(
            lambda r, x: r * _numerics.norm(x) if _leaves.is_float(x) else r,
            spread(radius_at(rho, state), params),
            params,
        )
        return ascent(params, g0, radii, where=_is_matrix, scope="leaf")

    otherwise = "no leaf has two dimensions, so that nothing would be perturbed"
    return _descending(offset, check_some(_is_matrix, otherwise, rho))


def _is_matrix(path: Any, leaf: Any) -> bool:
    del path
    return jnp.ndim(leaf) >= 2


def amp(
    rho: optax.ScalarOrSchedule = 0.5, eta: optax.ScalarOrSchedule = 1.0, steps: int = 1
) -> SharpnessRule:
    """Adversarial model perturbation: projected gradient ascent in a ball.

    ``d <- Proj(d + eta g(x + d))`` onto ``|d| <= rho``, ``steps`` times from ``d = 0``;
    result ``gd``. The norm covers all leaves (the authors project leaf by leaf).

    Args:
      rho: Radius of the ball, a number or a schedule. The paper writes ``epsilon``.
      eta: Step size of the ascent, a number or a schedule.
      steps: Number of ascent steps, at least 1.

    Returns:
      A rule of ``1 + steps`` gradients.

    Raises:
      ValueError: If ``rho`` or ``eta`` is negative, not finite or a tree, or ``steps``
        is below 1.

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x: x @ (jnp.array([0.5, 1.0]) * x)
      >>> rule = oa.rules.amp(0.5, eta=1.0, steps=2)
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(loss), rule)
      >>> x = jnp.array([3.0, 2.0])
      >>> [round(float(g), 2) for g in sharp(x, sharp.init(x))[1]]
      [3.28, 4.82]

    References:
      Zheng et al., "Regularizing Neural Networks via Adversarial Model Perturbation",
      2021, 2010.04925.
    """
    rho = check_one_radius("rho", rho, "amp")
    eta = check_one_radius("eta", eta, "amp")
    hint = "; inside optax.inject_hyperparams name it in static_args"
    steps = _checks.static_integer("steps", steps, 1, hint)

    def probe(i, params, grads, state):
        if i == 0:
            return None
        ball, step = radius_at(rho, state), radius_at(eta, state)
        d = jax.tree.map(jnp.zeros_like, grads[0])
        for g in grads:
            d = jax.tree.map(lambda d, g: d + step * g, d, g)
            n = _numerics.norm(d)
            d = _numerics.scale(jnp.where(n > ball, ball / jnp.maximum(n, ball), 1), d)
        return d

    return SharpnessRule(1 + steps, probe, descend, num_ascents=steps, in_result=())


def esam(
    rho: Radius = 0.05, beta: float = 0.5, key: jax.Array | int = 0
) -> SharpnessRule:
    """Efficient SAM's weight perturbation: SAM on random leaves, divided by ``beta``.

    ``d_l = b_l/beta rho g0_l/|g0|``, ``b_l`` 1 with probability ``beta``, else 0;
    result ``gd``.

    Args:
      rho: Radius; a number, a schedule, or a tree of them like a prefix of params.
      beta: Probability that a leaf is perturbed, in (0, 1].
      key: PRNG key, or an integer seed.

    Returns:
      A rule of 2 gradients that remembers the key.

    Raises:
      ValueError: If ``rho`` is negative or not finite, ``beta`` is not in (0, 1], or
        ``key`` is neither a key nor an integer.

    Example:
      >>> import jax, jax.numpy as jnp, optax_avg as oa
      >>> loss = lambda x: x @ (jnp.array([0.5, 1.0]) * x)
      >>> rule = oa.rules.esam(0.5, 1.0, jax.random.key(0))
      >>> sharp = oa.sharpness_aware(jax.value_and_grad(loss), rule)
      >>> x = jnp.array([3.0, 2.0])
      >>> [round(float(g), 2) for g in sharp(x, sharp.init(x))[1]]
      [3.3, 4.8]

    References:
      Du et al., "Efficient Sharpness-Aware Minimization for Improved Training of Neural
      Networks", 2022, 2110.03141.
    """
    rho = check_radius("rho", rho)
    beta = _checks.within("beta", beta, 0, 1, open_low=True)
    make_key = key_maker(key, "esam(key=jax.random.key(0))")

    def offset(params, g0, state):
        d = ascent(params, g0, radius_at(rho, state))
        leaves, structure = jax.tree.flatten(d)
        at_step = jax.random.fold_in(state.rule_memory, state.rule_step)
        kept = jax.random.bernoulli(at_step, beta, (len(leaves),))
        return structure.unflatten(
            [jnp.where(keep, leaf / beta, 0) for keep, leaf in zip(kept, leaves)]
        )

    # Beyond the largest integer, leaves that were drawn 2^20 steps before.
    rule = _descending(offset, lambda params: make_key())
    return rule._replace(period=2**20)
