"""The options that all averages share, defined and documented here alone.

A factory states what is its own and takes the rest as ``**options``. The decorator
:func:`with_options` completes its signature, so that tools show every option, and the
section Args of its docstring.
"""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypedDict, TypeVar

import jax

from optax_avg._leaves import Where

P = ParamSpec("P")
T = TypeVar("T")


class CommonOptions(TypedDict, total=False):
    """Options of every average."""

    name: str
    where: Where | None
    nonfinite: Literal["reject", "keep"]
    memory_kind: Literal["device", "pinned_host"] | None


class MemoryOptions(CommonOptions, total=False):
    """Options of averages that choose the steps at which they absorb."""

    every: Any
    start: Any


class AccumulatorOptions(CommonOptions, total=False):
    """Options of averages that are kept in an accumulator."""

    accumulator_dtype: jax.typing.DTypeLike | None
    rounding: Literal["stochastic", "compensated"] | None


class AverageOptions(MemoryOptions, AccumulatorOptions, total=False):
    """All options of averages."""


# None stands for a number, or optax.inject_hyperparams would inject the default.
_DEFAULTS: dict[str, Any] = {
    "every": None,
    "start": None,
    "name": "average",
    "accumulator_dtype": None,
    "rounding": None,
    "where": None,
    "nonfinite": "reject",
    "memory_kind": None,
}
_DOCS = {
    "every": """Number of optimizer steps between absorbed iterates; 1 by default.
  Weights that speak of time keep their time constant in optimizer steps.""",
    "start": """Number of optimizer steps to leave out at the beginning; 0 by default.
  The average starts from the parameters of this step.""",
    "name": """Name by which :func:`optax_avg.averaged_params` finds the average.""",
    "accumulator_dtype": """Dtype of averages that are given by a weight, a float of
  16 bits or more. The default is float32, or the dtype of the leaf if that is
  wider. The average of a complex leaf is complex64 or wider.""",
    "rounding": """How the average is rounded to ``accumulator_dtype``. ``None`` rounds
  to nearest, or stochastically if the dtype is narrower than float32, where
  rounding to nearest would stop a slow average. ``"stochastic"`` is unbiased; its
  random bits depend on the step, the name and the leaf. ``"compensated"`` keeps
  the rounding error in a second tree and adds it back.""",
    "where": """Leaves to average: a tree of bools like a prefix of the parameters, or
  a predicate ``(key_path, leaf) -> bool``. The others are read from the
  parameters.""",
    "nonfinite": """``"reject"``, the default, leaves out an iterate, whole, if any
  element of it is NaN or infinite. ``"keep"`` does not look.""",
    "memory_kind": """``"pinned_host"`` keeps the average in host memory. Under
  explicit sharding this needs jax 0.10.2.""",
}


def with_options(
    options: type[CommonOptions], **defaults: Any
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Completes the signature and the docstring of a factory by options.

    Args:
      options: The options that the factory takes as ``**options``. Those that it names
        among its own parameters are not added.
      **defaults: Defaults of this factory, where they are not those of all.

    Returns:
      A decorator. The factory gets every option, its default filled in.
    """

    def decorate(factory: Callable[P, T]) -> Callable[P, T]:
        before = inspect.signature(factory)
        own = [p for p in before.parameters.values() if p.kind is not p.VAR_KEYWORD]
        named = {p.name for p in own}
        kinds = inspect.get_annotations(options)
        taken = {
            key: defaults.get(key, default)
            for key, default in _DEFAULTS.items()
            if key in kinds and key not in named
        }
        keyword = inspect.Parameter.KEYWORD_ONLY
        added = [
            inspect.Parameter(key, keyword, default=value, annotation=kinds[key])
            for key, value in taken.items()
        ]
        signature = before.replace(parameters=[*own, *added])

        @functools.wraps(factory)
        def make(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{factory.__name__}() {error}") from None
            return factory(*bound.args, **{**taken, **bound.kwargs})

        named_make: Any = make
        named_make.__signature__ = signature
        named_make.__doc__ = _with_docs(factory.__doc__ or "", [*taken])
        return make

    return decorate


def _with_docs(doc: str, keys: list[str]) -> str:
    """The docstring with the options at the end of its section Args."""
    doc = re.sub(r"\n +\*\*options: [^\n]*", "", doc)
    head, rest = inspect.cleandoc(doc).split("\nReturns:\n")
    args = "".join(f"  {key}: {_DOCS[key]}\n".replace("\n  ", "\n    ") for key in keys)
    if "\nArgs:\n" not in head:
        head = f"{head}\nArgs:\n"
    return f"{head.rstrip()}\n{args}\nReturns:\n{rest}\n"
