"""The rules as first links of an Optax chain: ``oa.sam(rho)`` and its kin.

Each takes the arguments of its rule in :mod:`optax_avg.rules` and needs ``grad_fn=`` in
``update``, as :func:`optax_avg.as_link` says.
"""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, ParamSpec

import optax

from optax_avg.sharpness import combinations, offsets
from optax_avg.sharpness._rule import SharpnessRule
from optax_avg.sharpness.forms import as_link

__all__ = [
    "asam",
    "cr_sam",
    "dnsam",
    "esam",
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

P = ParamSpec("P")

_RETURNS = """\
  The rule as the first link of a chain. Its ``update`` needs ``grad_fn=``, a function
  from parameters to gradients, see :func:`optax_avg.as_link`."""
_EXAMPLE = """\
  >>> import jax, jax.numpy as jnp, optax, optax_avg as oa
  >>> tx = optax.chain(oa.{name}({arguments}), optax.sgd(1.0))
  >>> grad_fn = jax.grad(lambda x: jnp.sum(jnp.array([0.5, 1.0]) * x["norm"] ** 2))
  >>> x = {{"norm": jnp.array([3.0, 2.0])}}
  >>> updates, _ = tx.update(grad_fn(x), tx.init(x), x, grad_fn=grad_fn)
  >>> [round(float(u), 2) for u in updates["norm"]]
  {result}"""


def _link_of(
    factory: Callable[P, SharpnessRule], arguments: str, result: str
) -> Callable[P, optax.GradientTransformationExtraArgs]:
    """The factory of a link from that of a rule.

    Args:
      factory: The factory of the rule.
      arguments: Arguments in the example of the link.
      result: What the example prints.

    Returns:
      A factory with the signature of the other and a docstring for links.
    """

    @functools.wraps(factory)
    def make(
        *args: P.args, **kwargs: P.kwargs
    ) -> optax.GradientTransformationExtraArgs:
        return as_link(factory(*args, **kwargs), factory.__name__)

    example = _EXAMPLE.format(name=factory.__name__, arguments=arguments, result=result)
    new = {"Returns": _RETURNS, "Example": example}
    named: Any = make
    named.__module__ = __name__  # doctest leaves out what comes from other modules
    named.__doc__ = _with_sections(inspect.getdoc(factory) or "", new)
    # inject_hyperparams reads the names of arguments here.
    named.__signature__ = inspect.signature(factory).replace(
        return_annotation=optax.GradientTransformationExtraArgs
    )
    return make


def _with_sections(doc: str, new: dict[str, str]) -> str:
    """A docstring with the text of some of its sections replaced."""
    head, *parts = re.split(r"^(\w+):\n", doc, flags=re.MULTILINE)
    sections = [
        f"{title}:\n{new.get(title, text.rstrip())}\n"
        for title, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    return "\n".join([head.rstrip() + "\n", *sections])


asam = _link_of(offsets.asam, "0.5", "[-4.12, -5.34]")
cr_sam = _link_of(combinations.cr_sam, "0.5", "[-3.31, -4.82]")
dnsam = _link_of(offsets.dnsam, "0.5, norm=4.0", "[-3.38, -5.0]")
esam = _link_of(offsets.esam, "0.5, beta=1.0", "[-3.3, -4.8]")
fisher_sam = _link_of(offsets.fisher_sam, "0.5", "[-3.11, -4.17]")
friendly_sam = _link_of(combinations.friendly_sam, "0.5", "[-3.3, -4.8]")
gam = _link_of(combinations.gam, "0.5, 0.25", "[-3.21, -4.78]")
gam_hvp = _link_of(combinations.gam_hvp, "0.5", "[-3.27, -4.84]")
gnp = _link_of(combinations.gnp, "0.5", "[-3.24, -4.64]")
gradient_regularisation = _link_of(
    combinations.gradient_regularisation, "0.5", "[-4.5, -8.0]"
)
gsam = _link_of(combinations.gsam, "0.5", "[-3.23, -4.85]")
look_sam = _link_of(combinations.look_sam, "0.5", "[-3.3, -4.8]")
momentum_sam = _link_of(combinations.momentum_sam, "0.5", "[-3.0, -4.0]")
sam = _link_of(offsets.sam, "0.5", "[-3.3, -4.8]")
sam_on = _link_of(offsets.sam_on, "0.5", "[-3.3, -4.8]")
sparse_sam = _link_of(offsets.sparse_sam, "0.5", "[-3.3, -4.8]")
usam = _link_of(offsets.usam, "0.5", "[-4.5, -8.0]")
vasso = _link_of(combinations.vasso, "0.5", "[-3.3, -4.8]")
wsam = _link_of(combinations.wsam, "0.5", "[-5.7, -11.2]")
