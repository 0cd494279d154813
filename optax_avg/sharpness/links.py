"""The rules as first links of an Optax chain: ``oa.sam(rho)`` and its kin.

Each takes the arguments of its rule in :mod:`optax_avg.rules` and, in ``update``,
``grad_fn=`` (see :func:`optax_avg.as_link`). :func:`decoupled_wsam` is no link: its
term comes after the optimizer.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import jax
import optax

from optax_avg import _checks, _leaves, _mixups, _numerics, _sight, rules
from optax_avg.sharpness._rule import RuleState, SharpnessRule
from optax_avg.sharpness.forms import as_link
from optax_avg.sharpness.offsets import Radius, finite, radius_at

P = ParamSpec("P")
RETURNS = """Returns:
  The rule as the first link of a chain; ``update`` needs ``grad_fn=``, a function
  from parameters to gradients, see :func:`optax_avg.as_link`.

"""


def _link_of(
    factory: Callable[P, SharpnessRule],
) -> Callable[P, optax.GradientTransformationExtraArgs]:
    @functools.wraps(factory)
    def make(
        *args: P.args, **kwargs: P.kwargs
    ) -> optax.GradientTransformationExtraArgs:
        return as_link(factory(*args, **kwargs), factory.__name__)

    named: Any = make
    # From Python 3.13 on the compiler has already taken the indentation away.
    head, rest = inspect.cleandoc(factory.__doc__ or "").split("\nReturns:\n")
    raises = rest[rest.index("Raises:") : rest.index("Example:")]
    named.__doc__ = (
        f"{head}\n{RETURNS}{raises}"
        f"Example:\n  >>> import optax, optax_avg as oa\n"
        f"  >>> tx = optax.chain(oa.{factory.__name__}(), optax.sgd(0.1))\n\n"
        f"{rest[rest.index('References:') :]}\n"
    )
    # inject_hyperparams reads the names of arguments here.
    named.__signature__ = inspect.signature(factory).replace(
        return_annotation=optax.GradientTransformationExtraArgs
    )
    return make


asam = _link_of(rules.asam)
cr_sam = _link_of(rules.cr_sam)
dnsam = _link_of(rules.dnsam)
esam = _link_of(rules.esam)
fisher_sam = _link_of(rules.fisher_sam)
friendly_sam = _link_of(rules.friendly_sam)
sparse_sam = _link_of(rules.sparse_sam)
gam = _link_of(rules.gam)
gam_hvp = _link_of(rules.gam_hvp)
gnp = _link_of(rules.gnp)
gradient_regularisation = _link_of(rules.gradient_regularisation)
gsam = _link_of(rules.gsam)
look_sam = _link_of(rules.look_sam)
momentum_sam = _link_of(rules.momentum_sam)
sam = _link_of(rules.sam)
sam_on = _link_of(rules.sam_on)
usam = _link_of(rules.usam)
vasso = _link_of(rules.vasso)
wsam = _link_of(rules.wsam)


class DecoupledState(NamedTuple):
    """State of :func:`decoupled_wsam`.

    Attributes:
      rule_state: that of SAM.
      inner_state: the optimizer's.
    """

    rule_state: RuleState
    inner_state: Any


def decoupled_wsam(
    optimizer: optax.GradientTransformation,
    learning_rate: Any,
    rho: Radius = 0.05,
    gamma: float = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """Weighted SAM with the sharpness outside of the optimizer, as weight decay is.

    ``x <- x + optimizer(g0) - lr gamma/(1 - gamma) (gd - g0)``, ``d = rho u(g0)``.

    Args:
      optimizer: sees the plain gradient alone.
      learning_rate: ``lr``, a float or a schedule of the optimizer step; that of
        ``optimizer``.
      rho: radius.
      gamma: weight of the sharpness, in [0, 1); with plain SGD this is :func:`wsam`.

    Returns:
      A transformation that stands last but for averages; ``update`` needs ``grad_fn=``,
      see :func:`optax_avg.as_link`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = oa.decoupled_wsam(optax.sgd(1.0), 1.0, rho=0.5, gamma=0.5)
      >>> grad_fn = jax.grad(lambda x: 0.5 * x**2)
      >>> x = jnp.array(2.0)
      >>> float(tx.update(grad_fn(x), tx.init(x), x, grad_fn=grad_fn)[0])
      -2.5

    References:
      Yue et al., "Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
      Regularization Term", 2023, 2305.15817, algorithm 1.
    """
    _mixups.refuse_no_optimizer("decoupled_wsam", optimizer)
    gamma = _checks.within("gamma", gamma, 0, 1, closed_high=False)
    if not callable(learning_rate):
        learning_rate = finite("learning_rate", learning_rate)
    inner = optax.with_extra_args_support(optimizer)
    perturbed = as_link(rules.sam(rho), "decoupled_wsam")

    def init(params: Any) -> DecoupledState:
        start: Any = perturbed.init(params)
        return DecoupledState(start, inner.init(params))

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        with _sight.collected(None):  # it reports for both
            found: Any = perturbed.update(
                updates, state.rule_state, params, **extra_args
            )
        gd, rule_state = found
        lr = radius_at(learning_rate, state.rule_state)
        steps, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )

        def add(step, g0, gd):
            if step is None or not _leaves.is_float(step):
                return step
            sharpness = _numerics.wide(gd) - _numerics.wide(g0)
            return (_numerics.wide(step) - lr * gamma / (1 - gamma) * sharpness).astype(
                step.dtype
            )

        steps = jax.tree.map(add, steps, updates, gd, is_leaf=lambda x: x is None)
        _sight.report("decoupled_wsam", received=updates, emitted=steps)
        return steps, DecoupledState(rule_state, inner_state)

    return optax.GradientTransformationExtraArgs(
        _leaves.shapes_for_shapes(init), update
    )
