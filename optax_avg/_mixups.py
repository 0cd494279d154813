"""What users mix up, said before it goes wrong.

Every function returns nothing where all is well, and raises an error that names the
call to write instead.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_avg import _checks, _leaves

RULE_FOR_LINK = (
    "a sharpness rule stands where Optax wants a transformation; take the link, such "
    "as oa.sam(0.05) in place of oa.rules.sam(0.05), or oa.as_link(rule)."
)


def refuse_no_rule(name: str, rule: object) -> None:
    """Raises unless ``rule`` is a sharpness rule.

    Raises:
      TypeError: If it is not.
    """
    if _is_rule(rule):
        return
    if isinstance(rule, optax.GradientTransformation):
        came = "an Optax transformation; oa.sam(0.05) is the link of a chain"
    elif callable(rule):
        came = f"the function {_name_of(rule)}, which has to be called first"
    else:
        came = f"{type(rule).__name__}"
    raise TypeError(f"{name} needs a rule, such as oa.rules.sam(0.05). It got {came}.")


def refuse_transformation(name: str, weight: object) -> None:
    """Raises if an Optax transformation stands where a weight belongs.

    Raises:
      TypeError: If it does.
    """
    if isinstance(weight, optax.GradientTransformation):
        raise TypeError(
            f"{name} needs a weight, such as oa.weights.ema(0.999). It got a "
            "transformation; if that is an average already, such as oa.ema_params("
            "0.999), put it into the chain as it is."
        )


def refuse_swapped(name: str, rule: object, other: object, call: str) -> None:
    """Raises if a rule stands where the other argument belongs, and the other way.

    Raises:
      TypeError: If they are swapped.
    """
    if _is_rule(other) and not _is_rule(rule):
        raise TypeError(
            f"{name} needs a rule. The two arguments are swapped; call {call}."
        )


def refuse_no_rule_state(state: object) -> None:
    """Raises unless the function of ``sharpness_aware`` was given its state.

    Raises:
      TypeError: If it was given something else, such as the batch.
    """
    if not hasattr(state, "rule_step"):
        raise TypeError(
            "the second argument must be the state of the rule. It is "
            f"{_words(state)}; call out, grads, state = sharp(params, state, *args) "
            "with state = sharp.init(params) at first."
        )


def refuse_no_optimizer(name: str, optimizer: object) -> None:
    """Raises unless ``optimizer`` is an Optax transformation.

    Raises:
      TypeError: If it is not.
    """
    refuse_no_transformation(name, optimizer, "an optimizer, such as optax.adamw(1e-3)")


def refuse_no_transformation(name: str, tx: object, wanted: str) -> None:
    """Raises unless ``tx`` is an Optax transformation.

    Raises:
      TypeError: If it is not.
    """
    if not is_transformation(tx):
        raise TypeError(f"{name} needs {wanted}. It got {_came(tx)}.")


def refuse_no_chain(tx: object, params: optax.Params) -> None:
    """Raises unless the first argument of ``check_chain`` is what it checks.

    Raises:
      TypeError: If it is not.
    """
    if is_transformation(params) and not is_transformation(tx):
        raise TypeError(
            "check_chain takes the chain first and the parameters second; call "
            "check_chain(tx, params)."
        )
    wanted = "a chain, such as optax.chain(optax.adam(1e-3), oa.ema_params(0.999))"
    refuse_no_transformation("check_chain", tx, wanted)


def is_transformation(tx: object) -> bool:
    """Whether Optax takes ``tx`` for a transformation; rules are none."""
    return isinstance(tx, optax.GradientTransformation) or (
        not _is_rule(tx) and hasattr(tx, "init") and hasattr(tx, "update")
    )


def _came(x: object) -> str:
    """What came in place of a transformation, in a few words."""
    if _is_rule(x):
        return "a sharpness rule"
    if callable(x):
        return f"the function {_name_of(x)}, which has to be called first"
    return type(x).__name__


def refuse_no_function(name: str, fn: object) -> None:
    """Raises unless ``fn`` can be called.

    Raises:
      TypeError: If it cannot.
    """
    if not callable(fn):
        came = "a sharpness rule" if _is_rule(fn) else type(fn).__name__
        raise TypeError(
            f"{name} must be a function. It got {came}; call "
            "oa.sharpness_aware(jax.value_and_grad(loss), oa.rules.sam(0.05))."
        )


def refuse_no_grad_fn(name: str, grad_fn: object) -> None:
    """Raises unless a link was given a function from parameters to gradients.

    Raises:
      ValueError: If it was given none.
      TypeError: If it was given something else, such as the gradient itself.
    """
    call = "call tx.update(grads, state, params, grad_fn=jax.grad(loss))."
    if grad_fn is None:
        raise ValueError(
            f"{name} needs the gradient as a function; {call} Where the call is not "
            "yours, as in Flax's TrainState, use oa.frameworks.linen.TrainState, which "
            "hands grad_fn on, or take the gradients by "
            "oa.sharpness_aware(jax.value_and_grad(loss), rule) without this link."
        )
    if not callable(grad_fn):
        raise TypeError(
            f"grad_fn of {name} must be a function from parameters to gradients. It is "
            f"{_words(grad_fn)}; {call}"
        )


def refuse_no_pair(name: str, found: Any, params: optax.Params, has_aux: bool) -> None:
    """Raises unless a function returned what ``jax.value_and_grad`` returns.

    Raises:
      ValueError: If it did not.
    """
    call = f"jax.value_and_grad(loss{', has_aux=True' if has_aux else ''})"
    wanted = "((value, aux), gradient)" if has_aux else "(value, gradient)"
    if not _is_pair(found) or not _fits(found[1], params):
        raise ValueError(
            f"{name} must return {wanted} with a gradient like params. It returned "
            f"{_words(found)}; pass {call}, not the loss itself or jax.grad(loss)."
        )
    out = found[0]
    if has_aux and not _is_pair(out):
        raise ValueError(
            f"{name} must return {wanted} because of has_aux=True. It returned no aux; "
            f"pass {call}, or leave has_aux out."
        )
    if not has_aux and _is_pair(out):
        raise ValueError(
            f"{name} returned a pair where the value should stand. If the loss returns "
            "(value, aux), call sharpness_aware(..., has_aux=True)."
        )


def refuse_no_gradient(name: str, found: Any, params: optax.Params) -> None:
    """Raises unless ``found`` is a gradient: a tree like ``params``.

    Raises:
      ValueError: If it is not.
    """
    if _fits(found, params):
        return
    if _is_pair(found) and _fits(found[1], params):
        way = "a value and a gradient; take the gradient alone, as from jax.grad(loss)"
    elif _is_pair(found) and _fits(found[0], params):
        way = "a gradient and an aux; take the gradient alone"
    else:
        way = f"{_words(found)}; take the gradient as from jax.grad(loss)"
    raise ValueError(f"{name} must be a gradient like params. It is {way}.")


def refuse_no_direction(v: Any, params: Any) -> None:
    """Raises unless ``v`` is a direction: a tree like ``params``.

    Raises:
      ValueError: If it is not.
    """
    if not _fits(v, params):
        raise ValueError(
            f"v must have the structure and shapes of params. It is {_words(v)}; pass "
            "a tree like params."
        )


def refuse_no_loss(name: str, loss: Any, params: Any) -> None:
    """Raises unless ``loss`` is a function of ``params`` alone that has a gradient.

    Raises:
      TypeError: If it is no such function, or the two arguments are swapped.
      ValueError: If a leaf is complex or no float.
    """
    alone = f"{name} needs a loss of the parameters alone"
    if not callable(loss):
        came = "the two arguments swapped" if callable(params) else _words(loss)
        raise TypeError(
            f"{alone}. It got {came}; call "
            f"{name}(lambda p: loss(p, batch), params, ...)."
        )
    try:
        inspect.signature(loss).bind(params)
    except TypeError as error:
        raise TypeError(
            f"{alone}, and this one takes other arguments ({error}); call "
            f"{name}(lambda p: loss(p, batch), params, ...)."
        ) from error
    except ValueError:  # a builtin without a signature
        pass
    _checks.refuse_complex(name, params)
    for path, leaf in jax.tree.flatten_with_path(params)[0]:
        if not _leaves.is_float(leaf):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} is {jnp.result_type(leaf)}, which "
                f"has no gradient; call {name} on the float leaves alone, with a loss "
                "that puts the others back, such as lambda p: loss({**params, **p})."
            )


def _is_rule(x: object) -> bool:
    return isinstance(x, tuple) and hasattr(x, "num_evals")


def _is_pair(x: object) -> bool:
    return isinstance(x, (tuple, list)) and len(x) == 2


def _name_of(fn: object) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


def _words(found: Any) -> str:
    """What a function returned, in a few words."""
    leaves = jax.tree.leaves(found)
    if len(leaves) == 1 and leaves[0] is found:
        if not hasattr(found, "shape"):
            return f"of type {type(found).__name__}"
        return f"an array of shape {jnp.shape(found)}"
    return f"a {type(found).__name__} of {len(leaves)} arrays"


def _fits(tree: object, params: optax.Params) -> bool:
    """Whether a tree has the structure and shapes of params; None fits any leaf."""
    leaves, structure = jax.tree.flatten(params)
    try:
        parts = structure.flatten_up_to(tree)
    except (ValueError, TypeError):
        return False
    return all(
        part is None
        or (jax.tree_util.all_leaves([part]) and jnp.shape(part) == jnp.shape(leaf))
        for part, leaf in zip(parts, leaves, strict=True)
    )
