"""Rules that differ from SAM in the offset; the result is the gradient there.

d = rho T^2 g0 / |T g0|,    result = gradient at x + d
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import keystr, tree_leaves_with_path

from optax_avg import _checks, _leaves, _mesh, _numerics
from optax_avg._keys import key_maker
from optax_avg.sharpness._rule import Grads, RuleState, SharpnessRule

Radius = Any  # a float, a schedule, or a tree of them like (a prefix of) params
Metric = Callable[[Any, Any], Any]


def ascent(
    params: Any,
    grads: Any,
    radius: Any,
    *,
    where: _leaves.Where | None = None,
    metric: Metric | None = None,
    scope: str = "global",
) -> Any:
    """The offset ``d = rho T^2 g / |T g|`` that all of the family build on.

    Args:
      params: ``x``.
      grads: ``g``.
      radius: ``rho``, a number or a tree of them like a prefix of ``params``.
      where: leaves to perturb, before the norm is taken.
      metric: ``(params, grads) -> T``, elementwise; 1 by default.
      scope: of the norm: ``"global"``, ``"leaf"``, or ``"row"`` (along the first axis
        of every matrix, for embedding tables).

    Returns:
      A tree like ``params``, None where there is no offset.
    """
    g = masked(where, params, grads)
    t = None if metric is None else metric(params, grads)
    tg = g if t is None else _leaves.over(lambda g, t: t * g, params, g, t)
    direction = tg if t is None else _leaves.over(lambda g, t: t * g, params, tg, t)
    if scope == "global":
        n = _numerics.norm(tg)
        norms = _leaves.over(lambda _: n, params, g)
    else:
        norms = _leaves.over(
            _row_norm if scope == "row" else _numerics.norm, params, tg
        )
    radii = _spread(radius, params)
    return _leaves.over(
        lambda v, n, r: jnp.where(n > 0, r, 0) * (v / jnp.where(n > 0, n, 1)),
        params,
        direction,
        norms,
        radii,
    )


def masked(where: _leaves.Where | None, params: Any, grads: Any) -> Any:
    """Gradients, None outside the mask."""
    if where is None:
        return grads
    return jax.tree.map(
        lambda keep, g: g if keep else None,
        inside_of(where, params),
        grads,
        is_leaf=lambda x: x is None,
    )


def inside_of(where: _leaves.Where | None, params: Any) -> Any:
    """A tree of bools like ``params``."""
    selected = _leaves.select(params, where)
    return jax.tree.map(
        lambda leaf: not _leaves.is_masked(leaf), selected, is_leaf=_leaves.is_masked
    )


def _row_norm(v: jax.Array) -> jax.Array:
    if v.ndim < 2:
        return _numerics.norm(v)
    return jax.vmap(_numerics.norm)(v).reshape(-1, *[1] * (v.ndim - 1))


def _spread(radius: Any, params: Any) -> Any:
    """One radius a leaf, from a prefix tree.

    Raises:
      ValueError: If the tree is no prefix.
    """
    try:
        return jax.tree.map(
            lambda r, part: jax.tree.map(
                lambda _: _numerics.wide(jnp.asarray(r)), part
            ),
            radius,
            params,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            "a tree of radii must be like params or a prefix of them; pass a number, a "
            f"schedule, or such a tree. {error}"
        ) from error


def radius_at(radius: Radius, state: RuleState) -> Any:
    """The radius of this step: schedules are called with the optimizer step."""
    return jax.tree.map(lambda r: r(state.rule_step) if callable(r) else r, radius)


def finite(name: str, value: Any, open_low: bool = False) -> Any:
    """A number from 0 on.

    Raises:
      ValueError: If it is negative, infinite or no number.
    """
    return _checks.within(
        name, value, 0, float("inf"), open_low=open_low, closed_high=False
    )


def check_radius(name: str, radius: Radius) -> Radius:
    """Raises unless every number in ``radius`` is finite and not negative.

    Raises:
      ValueError: If one is not, or there is none.
    """
    if not jax.tree.leaves(radius):
        raise ValueError(
            f"{name} must be a number, a schedule, or a tree of them like a prefix of "
            f"params, got {radius!r}."
        )
    return jax.tree.map(lambda r: r if callable(r) else finite(name, r), radius)


def check_one_radius(name: str, radius: Any, rule: str, open_low: bool = False) -> Any:
    """The same, where a rule takes one radius for all leaves.

    Raises:
      ValueError: If it is a tree, or out of range.
    """
    if radius is not None and not jax.tree_util.all_leaves([radius]):
        raise ValueError(
            f"{name} of {rule} is one number or schedule for all leaves, got a tree; "
            "sam(), asam(), dnsam(), awp() and gam() take trees of radii."
        )
    return radius if callable(radius) else finite(name, radius, open_low)


def check_some(where: _leaves.Where | None, otherwise: str) -> Callable[[Any], Any]:
    """An ``init_memory`` that remembers nothing and raises if a mask keeps no leaf."""

    def init_memory(params):
        inside = () if where is None else jax.tree.leaves(inside_of(where, params))
        if inside and not any(inside):
            paths = [keystr(path) for path, _ in tree_leaves_with_path(params)]
            shown = ", ".join(paths[:5]) + (", ..." if len(paths) > 5 else "")
            are = f"The leaves are {shown}" if paths[0] else "There is one leaf"
            raise ValueError(f"{otherwise}. {are}.")
        return ()

    return init_memory


UNPERTURBED = "is true of no leaf, so that nothing would be perturbed"


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


def _descending(
    offset: Callable[[Any, Any, RuleState], Any],
    init_memory: Callable[[Any], Any] = lambda params: (),
) -> SharpnessRule:
    """A rule of two gradients whose result is the second."""
    return SharpnessRule(2, after_clean(offset), descend, init_memory, in_result=())


def sam(
    rho: Radius = 0.05,
    *,
    where: _leaves.Where | None = None,
    metric: Metric | None = None,
    scope: str = "global",
) -> SharpnessRule:
    """Sharpness-aware minimization: ``d = rho T^2 g0/|T g0|``, result ``gd``.

    With ``scope="leaf"`` and a tree of radii this is AdaSAP's perturbation by groups,
    with ``scope="row"`` PamaCF's by rows of an embedding table.

    Args:
      rho: radius; a float, a schedule, or a tree of them like a prefix of params.
      where: leaves to perturb, a tree of bools or ``(key_path, leaf) -> bool``.
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
        params, g0, radius_at(rho, state), where=where, metric=metric, scope=scope
    )
    return _descending(offset, check_some(where, f"where {UNPERTURBED}"))


def usam(rho: Radius = 0.05, *, where: _leaves.Where | None = None) -> SharpnessRule:
    """Unnormalised SAM: ``d = rho g0``, result ``gd``.

    Args:
      rho: radius per unit of gradient.
      where: leaves to perturb.

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
    return dnsam(rho, 1.0, where=where)


def dnsam(
    rho: Radius = 0.05, norm: Any = 1.0, *, where: _leaves.Where | None = None
) -> SharpnessRule:
    """Deterministically normalised SAM: ``d = rho g0/norm``, result ``gd``.

    Args:
      rho: radius.
      norm: in place of ``|g0|``; a float or a schedule, positive.
      where: leaves to perturb.

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
    norm = check_one_radius("norm", norm, "dnsam", open_low=True)

    def offset(params, g0, state):
        radii = _spread(radius_at(rho, state), params)
        n = radius_at(norm, state)
        return _leaves.over(
            lambda g, r: r / n * g, params, masked(where, params, g0), radii
        )

    return _descending(offset, check_some(where, f"where {UNPERTURBED}"))


def asam(
    rho: Radius = 0.5, eta: float = 0.01, *, where: _leaves.Where | None = None
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
    eta = finite("eta", eta)

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
            inside_of(where, params),
            grads,
        )

    check = check_some(where, "where is true of no leaf, so that this would be sam")
    return sam(rho, metric=metric)._replace(init_memory=check)


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
    eta = finite("eta", eta)
    metric = lambda params, grads: jax.tree.map(
        lambda g: lax.rsqrt(1 + eta * jnp.square(g)), grads
    )
    return sam(rho, metric=metric)


def sparse_sam(
    rho: Radius = 0.05, sparsity: float = 0.5, refresh: int = 100
) -> SharpnessRule:
    """Sparse SAM: perturbs the parameters of the largest diagonal Fisher entries.

    The Fisher is the squared gradient of the batch at every ``refresh``-th step; its
    mask serves the steps after, and the steps up to the first one perturb all. The
    norm is over the masked gradient. Of equal entries, as of zeros, those that stand
    first are left out first, so that the share holds for a sparse gradient, too.

    Args:
      rho: radius.
      sparsity: share of the parameters that is left unperturbed, in [0, 1), rounded
        down to a whole number of them.
      refresh: Least number of steps between two masks.

    Returns:
      A rule of 2 gradients with a mask in its memory.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import optax_avg as oa
      >>> rule = oa.rules.sparse_sam(0.05, sparsity=0.5)

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
        sparse = _leaves.over(
            lambda g, m: m * g, params, g0, _as_float(state.rule_memory[0])
        )
        return ascent(params, sparse, radius_at(rho, state))

    def combine(params, grads, state):
        g0 = grads[0]

        def renew(_):
            sizes, structure = jax.tree.flatten(jax.tree.map(jnp.abs, g0))
            count = sum(leaf.size for leaf in sizes)
            # Python counts exactly where float32 cannot.
            share: Any = sparsity * count
            exact = int(share) if isinstance(share, float) else share.astype(jnp.int32)
            dropped = jnp.minimum(exact, count - 1)
            return structure.unflatten(_numerics.ranked_after(sizes, dropped))

        mask, renewed = state.rule_memory
        passed = state.rule_step - renewed
        due = (passed >= refresh) | (passed < 0)  # the clock has gone back
        keep = lambda mask: jax.tree.map(
            lambda m, g: _mesh.vary(m, _mesh.varying_axes(g)), mask, g0
        )
        mask = lax.cond(due, renew, keep, mask)
        return grads[-1], (mask, jnp.where(due, state.rule_step, renewed))

    return _descending(offset, init)._replace(combine=combine, period=2 * refresh)


def _as_float(mask: Any) -> Any:
    return jax.tree.map(lambda m: m.astype(jnp.float32), mask)


def sam_on(
    rho: Radius = 0.05,
    where: _leaves.Where | None = None,
    *,
    metric: Metric | None = None,
) -> SharpnessRule:
    """SAM on the normalisation parameters alone; the norm is over them.

    By default a leaf counts by its own name and by that of the module that holds it,
    not by those further out: in ``["PreNorm_0"]["Dense_0"]["kernel"]`` the names are
    ``Dense_0`` and ``kernel``. Names are split into words at ``/``, ``.``, ``_``,
    digits and capitals. A leaf is perturbed if one of the words

    - ends in ``norm`` or ``norms`` (``BatchNorm_0``, ``rms_norm``, ``layernorm``,
      ``norm1``), or is ``normalization`` or ``normalisation``, or
    - is ``bn``, ``ln`` or ``gn``, with ``pre`` or ``post`` before it or not (``bn1``,
      ``ln_f``, ``ResNetBN``, ``preln``).

    ``normalizer``, ``normal_head`` and ``normalize_fn`` are none of these.

    Args:
      rho: radius.
      where: the leaves to perturb, a tree of bools or ``(key_path, leaf) -> bool``; by
        default those whose names say that they belong to a normalisation.
      metric: as in :func:`sam`, for the adaptive variants.

    Returns:
      A rule of 2 gradients.

    Raises:
      ValueError: If ``rho`` is out of range or, when the state is made, no leaf is to
        be perturbed.

    Example:
      >>> import optax_avg as oa
      >>> rule = oa.rules.sam_on(0.5)

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
    check = check_some(where, otherwise)
    return sam(rho, where=where, metric=metric)._replace(init_memory=check)


def is_normalisation(path: Any, leaf: Any) -> bool:
    """Whether a key path names a parameter of a normalisation layer."""
    del leaf
    names = re.split(r"[/.]", "/".join(_key_name(key) for key in path))
    # Indices and the containers of frameworks name no module.
    names = [n for n in names if not re.fullmatch(r"\d*|value|raw_value|~", n)]
    words = [word.lower() for name in names[-2:] for word in WORD.findall(name)]
    return any(NORMALISATION.fullmatch(word) for word in words)


WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
NORMALISATION = re.compile(
    r"\w*norms?|(batch|layer|group|instance)?normali[sz]ation|(pre|post)?(bn|ln|gn)"
)


def _key_name(key: Any) -> str:
    return keystr((key,), simple=True)


def awp(rho: Radius = 0.01) -> SharpnessRule:
    """Adversarial weight perturbation: per leaf ``rho |x_l| u(g0_l)``.

    Leaves of two or more dimensions are perturbed.

    Args:
      rho: Radius relative to the norm of each leaf; the paper writes ``gamma``.

    Returns:
      A rule of 2 gradients.

    Raises:
      ValueError: If ``rho`` is negative.

    Example:
      >>> import optax_avg as oa
      >>> rule = oa.rules.awp(0.01)

    References:
      Wu et al., "Adversarial Weight Perturbation Helps Robust Generalization", 2020,
      2004.05884.
    """
    rho = check_radius("rho", rho)

    def offset(params, g0, state):
        radii = jax.tree.map(
            lambda r, x: r * _numerics.norm(x) if _leaves.is_float(x) else r,
            _spread(radius_at(rho, state), params),
            params,
        )
        return ascent(params, g0, radii, where=_is_matrix, scope="leaf")

    otherwise = "no leaf has two dimensions, so that nothing would be perturbed"
    return _descending(offset, check_some(_is_matrix, otherwise))


def _is_matrix(path: Any, leaf: Any) -> bool:
    del path
    return jnp.ndim(leaf) >= 2


def amp(rho: Radius = 0.5, eta: Radius = 1.0, steps: int = 1) -> SharpnessRule:
    """Adversarial model perturbation: projected gradient ascent in a ball.

    ``steps`` times ``d <- Proj(d + eta g(x + d))`` onto ``|d| <= rho`` over all
    leaves (the authors project leaf by leaf), result ``gd``.

    Args:
      rho: Radius of the ball; the paper writes ``epsilon``.
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
