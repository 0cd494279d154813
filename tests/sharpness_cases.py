"""Every rule with its reference, and a link for each in the contract suite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference_sharpness as ref

from optax_avg import rules

RADII = {"bias": 0.25, "norm": 0.5, "weight": 0.125}


def is_norm(path, leaf):
    return "norm" in jax.tree_util.keystr(path)


# Radii are powers of two: rules take them in float32.
RULES = {
    "sam": (rules.sam(0.125), ref.sam(0.125)),
    "sam_schedule": (
        rules.sam(lambda step: jnp.where(step < 100, 0.25, 9.0)),
        ref.sam(0.25),
    ),
    "sam_mask": (rules.sam(0.125, where=is_norm), ref.sam_on(0.125)),
    "sam_leaf": (rules.sam(RADII, scope="leaf"), ref.by_leaf(RADII)),
    "sam_row": (rules.sam(0.25, scope="row"), ref.by_row(0.25)),
    "sam_metric": (
        rules.sam(0.25, metric=lambda x, g: jax.tree.map(lambda x: 1 + x**2, x)),
        ref.with_metric(0.25, lambda g0, x: 1 + x**2),
    ),
    "usam": (rules.usam(0.125), ref.usam(0.125)),
    "dnsam": (rules.dnsam(0.125, 4.0), ref.dnsam(0.125, 4.0)),
    "asam": (rules.asam(0.5, 0.25), ref.asam(0.5, 0.25)),
    "fisher_sam": (rules.fisher_sam(0.125, 0.5), ref.fisher_sam(0.125, 0.5)),
    "sparse_sam": (rules.sparse_sam(0.25, 0.5, 2), ref.fsam(0.25, 0.5, 2)),
    "sam_on": (rules.sam_on(0.25), ref.sam_on(0.25)),
    "amp": (rules.amp(0.5, 0.125, 1), ref.amp(0.5, 0.125, 1)),
    "amp_three": (rules.amp(0.5, 0.25, 3), ref.amp(0.5, 0.25, 3)),
    "awp": (rules.awp(0.125), ref.awp(0.125)),
    "gsam": (rules.gsam(0.25, 0.5), ref.gsam(0.25, 0.5)),
    "gnp": (rules.gnp(0.25, 0.75), ref.mixed(0.25, 0.75)),
    "wsam": (rules.wsam(0.25, 0.75), ref.mixed(0.25, 3.0)),
    "gr_forward": (
        rules.gradient_regularisation(0.5, 0.125),
        ref.gradient_regularisation(0.5, 0.125, "forward"),
    ),
    "gr_backward": (
        rules.gradient_regularisation(0.5, 0.125, "backward"),
        ref.gradient_regularisation(0.5, 0.125, "backward"),
    ),
    "gr_central": (
        rules.gradient_regularisation(0.5, 0.125, "central"),
        ref.gradient_regularisation(0.5, 0.125, "central"),
    ),
    "cr_sam": (rules.cr_sam(0.25, 0.5, 0.125), ref.cr_sam(0.25, 0.5, 0.125)),
    "vasso": (rules.vasso(0.25, 0.25), ref.vasso(0.25, 0.25)),
    "friendly_sam": (
        rules.friendly_sam(0.25, 0.5, 0.75),
        ref.friendly_sam(0.25, 0.5, 0.75),
    ),
    "look_sam": (rules.look_sam(0.25, 3, 0.5), ref.look_sam(0.25, 3, 0.5)),
    "every_k": (rules.every_k(rules.sam(0.25), 3), ref.every_k(0.25, 3)),
    "momentum_sam": (rules.momentum_sam(0.25, 0.75), ref.momentum_sam(0.25, 0.75)),
    "gam": (
        rules.gam(0.25, 0.125, 0.375, 0.75, 0.25),
        ref.gam(0.25, 0.125, 0.375, 0.75, 0.25),
    ),
    "gam_reference": (
        rules.gam(0.25, 0.125, 0.375, 0.75, 0.25, "reference"),
        ref.gam(0.25, 0.125, 0.375, 0.75, 0.25, "reference"),
    ),
}
PRODUCTS = {
    "gr_exact": rules.gradient_regularisation(0.5, scheme="exact"),
    "gam_hvp": rules.gam_hvp(0.25, 0.5),
}
RANDOM = {"esam": rules.esam(0.25, 0.5, 3)}
ALL = {name: rule for name, (rule, _) in RULES.items()} | PRODUCTS | RANDOM


def tree_of(x):
    """A point of the references as a tree of JAX arrays."""
    return {
        name: jnp.asarray(x[part].reshape(ref.SHAPES[name]))
        for name, part in ref.SLICES.items()
    }


def flat(tree):
    """Back again."""
    return np.concatenate([np.asarray(tree[name]).ravel() for name in ref.SHAPES])


def loss_of(matrix, frequency, quartic):
    """The problem of the references in JAX."""
    a, c, q = (jnp.asarray(part) for part in (matrix, frequency, quartic))

    def loss(params):
        x = jnp.concatenate([params[name].ravel() for name in ref.SHAPES])
        quadratic = 0.5 * x @ (a.astype(x.dtype) @ x)
        return quadratic + jnp.sum(jnp.cos(c * x)) + jnp.sum(q * x**4) / 4

    return loss


SGD = optax.sgd(0.05, momentum=0.5)
