"""The sharpness family as rules: where to take gradients, how to combine them.

    g_i = gradient at x + probe(i, g_0, ..., g_{i-1}),
    result = combine(g_0, g_1, ...)

``g0`` is the gradient at ``x``, ``gd`` that at ``x + d``. ``v/|v|`` is 0 if ``v`` is 0.
Rules of :mod:`optax_avg.sharpness.offsets` differ from SAM in the offset ``d``, rules
of :mod:`optax_avg.sharpness.combinations` in how they combine the gradients. Every
radius is a number or a schedule of the optimizer step; a radius that may differ between
leaves can also be a tree of them.
"""

from optax_avg.sharpness.combinations import (
    cr_sam,
    every_k,
    friendly_sam,
    gam,
    gam_hvp,
    gnp,
    gradient_regularisation,
    gsam,
    look_sam,
    momentum_sam,
    vasso,
    wsam,
)
from optax_avg.sharpness.offsets import (
    amp,
    asam,
    awp,
    dnsam,
    esam,
    fisher_sam,
    sam,
    sam_on,
    sparse_sam,
    usam,
)

__all__ = [
    "amp",
    "asam",
    "awp",
    "cr_sam",
    "dnsam",
    "esam",
    "every_k",
    "fisher_sam",
    "friendly_sam",
    "gam",
    "gam_hvp",
    "gnp",
    "gradient_regularisation",
    "gsam",
    "look_sam",
    "momentum_sam",
    "sam",
    "sam_on",
    "sparse_sam",
    "usam",
    "vasso",
    "wsam",
]
