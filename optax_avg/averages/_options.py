"""The options that all averages share, defined and documented here alone.

A factory states what is its own and takes the rest as ``**options``. The decorator
:func:`with_options` completes its signature, so that tools show every option, and its
docstring.
"""

from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypedDict, TypeVar

import jax

from optax_avg import _options
from optax_avg._leaves import Where
from optax_avg._options import Option

P = ParamSpec("P")
T = TypeVar("T")


class CommonOptions(TypedDict, total=False):
    """Options of every average."""

    name: str
    where: Where | None
    nonfinite: Literal["skip", "reject", "keep"]
    memory_kind: Literal["device", "pinned_host"] | None


class MemoryOptions(CommonOptions, total=False):
    """Options of averages that choose the steps at which they absorb."""

    every: Any
    start: Any


class AccumulatorOptions(CommonOptions, total=False):
    """Options of averages that are kept in an accumulator."""

    accumulator_dtype: jax.typing.DTypeLike | None
    rounding: Literal["dithered", "stochastic", "compensated"] | None


class AverageOptions(MemoryOptions, AccumulatorOptions, total=False):
    """All options of averages."""


# None stands for a number, or optax.inject_hyperparams would inject the default.
_OPTIONS = {
    "every": Option(
        None,
        """Number of optimizer steps between absorbed iterates; 1 by default.
  A decay is per absorbed iterate. ``half_life``, ``half_life_linear`` and
  ``power_function`` are in optimizer steps whatever ``every`` is.""",
    ),
    "start": Option(
        None,
        """Number of optimizer steps to leave out at the beginning; 0 by default.
  The average starts from the parameters of this step.""",
    ),
    "name": Option(
        "average",
        """Name by which :func:`optax_avg.averaged_params` finds the average.""",
    ),
    "accumulator_dtype": Option(
        None,
        """Dtype in which averages that are given by a weight are stored, a float of
  16 bits or more. The default is float32, or the dtype of the leaf if that is wider.
  float16 is more accurate than bfloat16 for parameters between 6e-5 and 65504.
  The average of a complex leaf is complex64 or wider.""",
    ),
    "rounding": Option(
        None,
        """How the average is rounded to ``accumulator_dtype``. ``None`` rounds
  to nearest, or ``"dithered"`` if the dtype is narrower than float32, where rounding
  to nearest would stop a slow average. ``"dithered"`` rounds up or down as a fixed
  sequence says, whose errors cancel over time: in bfloat16 the average is wrong by
  0.2 to 1 % of the parameters, in float16 by 0.03 to 0.4 %. ``"stochastic"`` rounds
  at random, with errors up to four times as large, and takes longer.
  ``"compensated"`` keeps the rounding error in a second tree and adds it back, which
  in bfloat16 takes as much memory as float32. The docs have a table of errors
  (``docs/results.md``).""",
    ),
    "where": Option(
        None,
        """Leaves to average: a tree of bools like a prefix of the parameters, or
  a predicate ``(key_path, leaf) -> bool``. The others are read from the
  parameters. ``init`` raises a ValueError if no leaf is selected.""",
    ),
    "nonfinite": Option(
        "skip",
        """What to do with NaN and infinities. ``"skip"``, the default, leaves
  out these elements: the average stays as it is there, and absorbs the others.
  ``"reject"`` leaves out the whole iterate and counts it in ``rejected``, which
  takes one more pass over the parameters. ``"keep"`` does not check: a NaN then
  stays in the average.""",
    ),
    "memory_kind": Option(
        None,
        """``"pinned_host"`` keeps the average in host memory, also where the state
  is donated. ``init`` raises a ValueError if the devices have no such memory. Under
  explicit sharding this needs jax 0.10.2.""",
    ),
}


def with_options(
    kinds: type[CommonOptions], **defaults: Any
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Completes a factory by the options of ``kinds``, some with other defaults."""
    return _options.with_options(
        kinds,
        _OPTIONS,
        raises="ValueError: If an argument is out of range.",
        **defaults,
    )
