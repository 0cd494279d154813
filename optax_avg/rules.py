"""The sharpness family as rules: where to take gradients, how to combine them.

``g0`` is the gradient at ``x``, ``gd`` at ``x + d``, ``u(v)`` is ``v/|v|`` and 0 at 0.
Rules of :mod:`optax_avg.sharpness.offsets` differ from SAM in ``d``, rules of
:mod:`optax_avg.sharpness.combinations` in what becomes of the gradients. Every radius
takes a float or a schedule of the optimizer step.
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
