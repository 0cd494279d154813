"""The rules as first links of an Optax chain: ``oa.sam(rho)`` and its kin.

Each takes the arguments of its rule in :mod:`optax_avg.rules` and, in ``update``,
``grad_fn=`` (see :func:`optax_avg.as_link`).
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

import optax

from optax_avg import rules
from optax_avg.sharpness import SharpnessRule, as_link

P = ParamSpec("P")


def _link_of(
    factory: Callable[P, SharpnessRule],
) -> Callable[P, optax.GradientTransformationExtraArgs]:
    @functools.wraps(factory)
    def make(
        *args: P.args, **kwargs: P.kwargs
    ) -> optax.GradientTransformationExtraArgs:
        return as_link(factory(*args, **kwargs), factory.__name__)

    named: Any = make
    # inject_hyperparams reads the names of arguments here.
    named.__signature__ = inspect.signature(factory).replace(
        return_annotation=optax.GradientTransformationExtraArgs
    )
    return make


amp = _link_of(rules.amp)
asam = _link_of(rules.asam)
awp = _link_of(rules.awp)
cr_sam = _link_of(rules.cr_sam)
dnsam = _link_of(rules.dnsam)
esam = _link_of(rules.esam)
fisher_sam = _link_of(rules.fisher_sam)
friendly_sam = _link_of(rules.friendly_sam)
fsam = _link_of(rules.fsam)
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
