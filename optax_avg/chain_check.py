"""Whether the links of a chain stand where they must.

A perturbation must see the gradient itself, so it stands first. An average must see
the updates that training applies, so it stands last.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_avg import _leaves, _mixups, _sight
from optax_avg.averages.readout import (
    average_states,
    is_average_state,
    read_leaves,
)
from optax_avg.optimizers import BayesState
from optax_avg.robust import NotStackedError
from optax_avg.sharpness import RuleState
from optax_avg.sharpness.decoupled import DecoupledState
from optax_avg.sharpness.multi_call import MultiCallState
from optax_avg.workers import GossipState, SyncState

__all__ = ["check_chain"]

_PATIENCE = 128  # calls after which a link that has not been reached is given up
_LARGE = 100.0  # size of gradients on which the usual clips act
_SMALL = 1e-3  # size of gradients beside which a small weight decay can be seen


def check_chain(
    tx: optax.GradientTransformation | optax.MultiSteps,
    params: Any,
    updates: Any = None,
    **extra_args: Any,
) -> None:
    """Raises an error if an average or a perturbation stands at the wrong place.

    A wrong order of links is silent in training. An average that is not last averages
    parameters that are never trained; a perturbation that is not first ascends along
    something else than the gradient. This function sends a probe through the chain and
    compares what each link sees with what enters and leaves the whole chain. It also
    finds an average that stands outside ``optax.MultiSteps`` and absorbs every
    micro-step, or outside :func:`optax_avg.multi_call` and absorbs perturbed
    parameters. Other links, such as aggregators and clips, are not checked.

    Call it once, before training. It runs a few updates without compilation and changes
    neither ``params`` nor any state. A link that computes the updates anew counts as a
    change even if their values stay the same, as after a clip at a very large norm; a
    cast does not. Around ``optax.MultiSteps(...).gradient_transformation()`` only the
    values are compared; check the chain inside by a call of its own, and the optimizer
    inside :func:`optax_avg.multi_call` as well. For links with ``axis_name``, build the
    chain once more without it and check that one.

    Args:
      tx: Transformation to check, usually an ``optax.chain``.
      params: Parameters of the model or their shapes as ``jax.ShapeDtypeStruct``.
      updates: What the training loop passes to ``tx.update``. The default is a random
        tree like ``params``; chains that start with an aggregator need the stacked
        gradients.
      **extra_args: Extra arguments that ``tx.update`` needs. ``grad_fn`` has a default.

    Raises:
      ValueError: If a link stands at the wrong place. The message names each such link
        and says where it belongs. Also if two averages of one name hold the same leaf,
        or if an aggregator gets no stacked gradients.
      TypeError: If ``tx`` is no transformation.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> params = {"w": jnp.ones(3)}
      >>> oa.check_chain(optax.chain(optax.adam(1e-3), oa.ema_params(0.9)), params)
      >>> wrong = optax.chain(oa.ema_params(0.9), optax.adam(1e-3))
      >>> oa.check_chain(wrong, params)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
        ...
      ValueError: ema_params does not stand last: a later link changes the updates...
    """
    _mixups.refuse_no_chain(tx, params)
    params = jax.tree.map(_filled, params)
    params = jax.tree.map(_moved, params, _noise(params, _SMALL, seed=1))
    if updates is not None:
        _probe(tx, params, updates, extra_args)
        return
    for size in (_LARGE, _SMALL):
        try:
            _probe(tx, params, _noise(params, size, seed=0), extra_args)
        except NotStackedError as error:
            raise ValueError(
                "this chain has an aggregator, which needs the gradients of several "
                "elements. Pass the stacked gradients as the third argument: "
                "check_chain(tx, params, stacked)."
            ) from error


def _probe(tx: Any, params: Any, grads: Any, extra_args: dict[str, Any]) -> None:
    """Checks a chain with one probe."""
    if isinstance(tx, optax.MultiSteps):  # around it, only values can be compared
        _probe(tx.inner_opt, params, grads, extra_args)
    # Plain transformations take no extra arguments, MultiSteps takes them as it is.
    link = tx if isinstance(tx, optax.MultiSteps) else _with_extra_args(tx)
    grads = jax.tree.map(_on_device, grads)
    state = link.init(params)
    _refuse_namesakes(state, params)
    passed_on = not _accumulates(state)
    ours = [x for x in jax.tree.leaves(state, is_leaf=_has_a_place) if _has_a_place(x)]
    if any(isinstance(x, (RuleState, DecoupledState, BayesState)) for x in ours):
        grad_fn = lambda x: _gradient(grads, params, x)
        extra_args = {"grad_fn": grad_fn, **extra_args}
    wrong: list[str] = []
    reached, has_moved, stride = 0, False, 0
    with jax.disable_jit():
        for _ in range(_PATIENCE):
            sights: list[_sight.Sight] = []
            before = average_states(state)
            with _sight.collected(sights):
                out, state = link.update(grads, state, params, **extra_args)
            # Where MultiSteps stands still, what overflowed becomes NaN.
            moves = any(jnp.any(jnp.abs(x) > 0) for x in jax.tree.leaves(out))
            if moves:
                wrong += _misplaced(sights, grads, out, passed_on)
            elif has_moved and _accumulates(state):
                wrong += _miscounting(sights, before, average_states(state), stride)
            reached = max(reached, len(sights))
            # One call more than the first that moves: then MultiSteps stands still.
            if reached >= len(ours) and has_moved:
                break
            stride += not has_moved
            has_moved |= moves
    if wrong:
        raise ValueError("\n".join(dict.fromkeys(wrong)))
    if reached < len(ours):
        warnings.warn(
            f"check_chain reached only {reached} of the {len(ours)} links that it "
            f"checks in {_PATIENCE} calls: a wrapper calls the others less often.",
            UserWarning,
            stacklevel=3,
        )


def _with_extra_args(tx: Any) -> Any:
    return optax.with_extra_args_support(tx)


def _accumulates(state: Any) -> bool:
    """Whether ``optax.MultiSteps`` is in a chain."""
    is_one = lambda node: isinstance(node, optax.MultiStepsState)
    return any(map(is_one, jax.tree.leaves(state, is_leaf=is_one)))


def _has_a_place(node: Any) -> bool:
    """Whether a node of the state belongs to a link that stands first or last."""
    ours = (RuleState, DecoupledState, MultiCallState, BayesState)
    ours += (SyncState, GossipState)
    return is_average_state(node) or isinstance(node, ours)


def _refuse_namesakes(state: Any, params: Any) -> None:
    """Raises if two averages of one name hold the same leaf, as reading them would."""
    names = [name for node in average_states(state) for name in node.averages]
    for name in set(names):
        if names.count(name) > 1:  # an average of its own may be inside optax.flatten
            read_leaves(state, params, name)


def _on_device(x: Any) -> Any:
    """An array of NumPy as one of JAX, which links pass on as the same object."""
    return jnp.asarray(x) if isinstance(x, np.ndarray) and _leaves.is_float(x) else x


def _misplaced(
    sights: list[_sight.Sight], grads: Any, out: Any, passed_on: bool
) -> list[str]:
    """What is wrong with the order of the links in one call.

    With ``passed_on``, links that leave the updates alone return the same arrays.
    """
    wrong = []
    for i, sight in enumerate(sights):
        if sight.received is not None and _differ(sight.received, grads, passed_on):
            wrong.append(
                f"{sight.link} does not stand first: an earlier link changes the "
                f"gradient. Write optax.chain({sight.link}(...), optimizer)."
            )
        if sight.emitted is None:
            continue
        if _differ(sight.emitted, out, passed_on):
            wrong.append(
                f"{sight.link} does not stand last: a later link changes the updates. "
                f"Write optax.chain(optimizer, {sight.link}(...))."
            )
        if sight.received is None and any(s.perturbs for s in sights[:i]):
            wrong.append(
                f"{sight.link} stands after multi_call and sees perturbed parameters. "
                f"Write multi_call(rule, optax.chain(optimizer, {sight.link}(...)))."
            )
        later = [s for s in sights[i + 1 :] if s.rewrites and _meet(sight, s)]
        if later:
            wrong.append(
                f"{sight.link} stands before {later[0].link}, which replaces the "
                f"parameters. Write {sight.link}(...) after it."
            )
    return wrong


def _miscounting(
    sights: list[_sight.Sight], before: list[Any], after: list[Any], stride: int
) -> list[str]:
    """Which averages count a call in which the parameters stand still.

    Those whose ``every`` and ``start`` are whole numbers of ``stride`` calls, after
    which the parameters move, absorb the right iterates all the same.
    """
    averages = [s for s in sights if s.received is None and s.is_average]
    moved = [np.any(old.step != new.step) for old, new in zip(before, after)]
    if len(averages) == len(after):  # MultiSteps computes what it then leaves out
        averages = [s for s, has_moved in zip(averages, moved) if has_moved]
    counted = [state for state, has_moved in zip(after, moved) if has_moved]
    return [
        f"{sight.link} stands outside optax.MultiSteps and counts every micro-step. "
        f"Write optax.MultiSteps(optax.chain(optimizer, {sight.link}(...)), k)."
        for sight, state in zip(averages, counted)
        if np.any((state.every % stride != 0) | (state.start % stride != 0))
    ]


def _differ(tree: Any, other: Any, passed_on: bool) -> bool:
    """Whether two trees differ at the leaves that are there in the first.

    With ``passed_on``, another array of the same type differs even if its values agree:
    some link has computed it. Values are compared where the dtype or shape has changed,
    as in a cast. Inside ``optax.flatten`` a link sees one vector.
    """
    if isinstance(tree, jax.Array) and not isinstance(other, jax.Array):
        flat = [jnp.ravel(jnp.asarray(x)) for x in jax.tree.leaves(other)]
        return not jnp.array_equal(tree, jnp.concatenate(flat), equal_nan=True)

    def one(x, y):
        if _leaves.is_absent(x) or not _leaves.is_float(x):
            return False
        if x is y:
            return False
        if passed_on and (x.dtype, x.shape) == (y.dtype, y.shape):
            return True
        return not jnp.array_equal(x, y, equal_nan=True)

    return any(
        jax.tree.leaves(jax.tree.map(one, tree, other, is_leaf=_leaves.is_absent))
    )


def _meet(a: _sight.Sight, b: _sight.Sight) -> bool:
    """Whether two links see a leaf in common: those of a partition do not."""
    leaves = [
        [
            not _leaves.is_absent(x)
            for x in jax.tree.leaves(s, is_leaf=_leaves.is_absent)
        ]
        for s in (a.emitted, b.emitted)
    ]
    return any(x and y for x, y in zip(*leaves))


def _filled(x: Any) -> Any:
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x


def _moved(x: Any, noise: Any) -> Any:
    """Away from zero, where weight decay does nothing."""
    return x + noise if _leaves.is_float(x) else x


def _noise(params: Any, size: float, seed: int) -> Any:
    """Random numbers at float leaves; the others as they are."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), max(len(leaves), 1))

    def one(key, x):
        if not _leaves.is_float(x):
            return x
        noise = size * jax.random.normal(key, jnp.shape(x))
        noise = noise.astype(jnp.result_type(x))
        return jax.device_put(noise, x.sharding) if isinstance(x, jax.Array) else noise

    return structure.unflatten([one(*pair) for pair in zip(keys, leaves)])


def _gradient(grads: Any, params: Any, x: Any) -> Any:
    """A gradient at ``x`` that is ``grads`` at ``params``."""

    def one(g, p, q):
        return g + (q - p).astype(g.dtype) if _leaves.is_float(p) else g

    return jax.tree.map(one, grads, params, x)
