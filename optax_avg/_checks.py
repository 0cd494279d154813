"""Checks of arguments, with errors that say what to write instead."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_avg import _leaves, _numerics


def require_params(name: str, params: optax.Params | None) -> None:
    """Raises if ``update`` was called without the parameters."""
    if params is None:
        raise ValueError(
            f"{name} needs the parameters; call tx.update(updates, state, params). "
            "Flax's TrainState and nnx.Optimizer pass them; with Equinox they are "
            "eqx.filter(model, eqx.is_inexact_array), with Haiku the params."
        )


def refuse_complex(name: str, params: optax.Params) -> None:
    """Raises if a leaf is complex.

    JAX's gradient of a complex leaf is the conjugate of the direction of ascent, and
    Optax expects the direction itself: which one it is cannot be seen.

    Raises:
      ValueError: If a leaf is complex, naming it.
    """
    for path, leaf in jax.tree.flatten_with_path(params)[0]:
        if _leaves.is_float(leaf) and jnp.iscomplexobj(leaf):
            raise ValueError(
                f"{name} takes real parameters, and params{jax.tree_util.keystr(path)} "
                "is complex. Train its real and imaginary part as two leaves and join "
                "them in the loss with jax.lax.complex(real, imag)."
            )


def check_integer(name: str, value: Any, low: int) -> Any:
    """``value`` as a Python integer from ``low`` on; a ``jax.Array`` as it is.

    Raises:
      ValueError: If it is not an integer, or below ``low``.
    """
    if isinstance(value, jax.Array):  # traced ones too
        return value
    return static_integer(name, value, low)


def static_integer(name: str, value: Any, low: int, hint: str = "") -> int:
    """``value``, an integer of Python or NumPy, as a Python integer from ``low`` on.

    Raises:
      ValueError: If it is not an integer, or below ``low``; the message ends in
        ``hint``.
    """
    refused = ValueError(f"{name} must be an integer >= {low}, got {value!r}{hint}.")
    if isinstance(value, (bool, np.bool_, jax.Array)):
        raise refused
    try:
        number = operator.index(value)
    except TypeError:
        raise refused from None
    if number < low:
        raise refused
    return number


def within(
    name: str,
    value: Any,
    low: float,
    high: float,
    open_low: bool = False,
    closed_high: bool = True,
    elementwise: bool = False,
) -> Any:
    """A number as a float after the range check; a ``jax.Array`` as float32.

    Raises:
      ValueError: If the value is not a number, is out of range, or is an array of
        several numbers, unless ``elementwise``.
    """
    is_array = isinstance(value, (jax.Array, np.ndarray))
    if is_array and value.ndim and not elementwise:
        raise ValueError(
            f"{name} must be one number, got an array of shape {value.shape}."
        )
    if isinstance(value, np.ndarray) and not value.ndim:
        value, is_array = value.item(), False
    if is_array:
        return value.astype(_numerics.float32_or_wider(value.dtype))
    if not isinstance(value, (int, float, np.number)) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {value!r}.")
    value = float(value)
    above = value > low if open_low else value >= low
    below = value <= high if closed_high else value < high
    if not (above and below):
        left, right = "(" if open_low else "[", "]" if closed_high else ")"
        raise ValueError(
            f"{name} must lie in {left}{low:g}, {high:g}{right}, got {value:g}."
        )
    return value


def finite(name: str, value: Any, open_low: bool = False) -> Any:
    """A finite number from 0 on, as :func:`within` returns it.

    Raises:
      ValueError: If it is negative, infinite or no number, or 0 with ``open_low``.
    """
    return within(name, value, 0, float("inf"), open_low=open_low, closed_high=False)


def number_or_schedule(
    name: str, value: Any, low: float, high: float, **bounds: bool
) -> Any:
    """A schedule as it is, and a number as :func:`within` returns it.

    Raises:
      ValueError: If it is a number out of range, or neither of the two.
    """
    return value if callable(value) else within(name, value, low, high, **bounds)


def finite_or_schedule(name: str, value: Any, open_low: bool = False) -> Any:
    """A schedule as it is, and a number as :func:`finite` returns it.

    Raises:
      ValueError: If it is a number out of range, or neither of the two.
    """
    return value if callable(value) else finite(name, value, open_low)


def at_step(value: Any, step: jax.Array) -> Any:
    """The value of a schedule at a step; a number as it is."""
    return value(step) if callable(value) else value


def one_of(name: str, value: object, choices: Sequence[str | None]) -> None:
    """Raises unless ``value`` is one of a few strings, or None where that is one.

    Raises:
      ValueError: If it is not.
    """
    if value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(
            f"{name} must be {', '.join(others)} or {last}, got {value!r}."
        )


def one_score(given: Any) -> float:
    """What a function that scores parameters returned, as a float.

    Raises:
      ValueError: If it is an array of several numbers.
    """
    if jnp.ndim(given):
        raise ValueError(
            "score must return one number for a model, larger is better. It returned "
            f"an array of shape {jnp.shape(given)}; take its mean."
        )
    return float(given)


def rank(score: float) -> float:
    """A score, of which one that is not finite is the worst."""
    return score if math.isfinite(score) else -math.inf
