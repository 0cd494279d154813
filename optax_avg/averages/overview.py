"""What averages an optimizer state holds, how far they look back, and which is best."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_avg import _checks
from optax_avg import weights as weights_
from optax_avg.averages._rule import AverageState
from optax_avg.averages.readout import average_names, average_states, averaged_params

__all__ = ["AverageSummary", "BestAverage", "best_average", "summarize_averages"]

LIVE = "parameters"  # name of the live parameters among the averages


class AverageSummary(NamedTuple):
    """An average in a few numbers.

    Attributes:
      name: Name of the average.
      iterates: Number of iterates in it.
      kind: ``"power"``, ``"window"`` or ``"recorded"``, which is by its weights; None
        if it is not known.
      sigma_rel: Standard deviation of the weights over the number of iterates; None if
        they are not known.
      mean_age: Mean number of iterates since the one that is averaged; None if the
        weights are not known.
    """

    name: str
    iterates: int
    kind: str | None = None
    sigma_rel: float | None = None
    mean_age: float | None = None


class BestAverage(NamedTuple):
    """The best of the live parameters and their averages.

    Attributes:
      name: Name of the average; ``"parameters"`` for the live parameters.
      score: Its score.
      params: The parameters themselves.
      scores: All scores by name, the live parameters first.
    """

    name: str
    score: float
    params: optax.Params
    scores: dict[str, float]


def best_average(
    state: optax.OptState,
    params: optax.Params,
    score: Callable[[optax.Params], ArrayLike],
    names: Sequence[str] | None = None,
) -> BestAverage:
    """Scores the live parameters and their averages, one after another.

    Memory holds the best so far and the one that is scored.

    Args:
      state: An optimizer state, or an object with an ``opt_state``.
      params: The current parameters.
      score: Takes parameters and returns their score on held-out data. Larger is
        better; a score that is not finite is the worst.
      names: Names of the averages to try beside the live parameters; by default all.

    Returns:
      A :class:`BestAverage`. Of equal scores the live parameters win, then the average
      whose name comes first.

    Raises:
      ValueError: If there is no average of a name, one is named ``"parameters"``, or a
        score is not one number.

    Example:
      >>> import jax.numpy as jnp, optax, optax_avg as oa
      >>> tx = optax.chain(optax.sgd(1.0), oa.polyak_average())
      >>> x = jnp.array(0.0)
      >>> state = tx.init(x)
      >>> for _ in range(3):  # 1, 2, 3
      ...     u, state = tx.update(jnp.array(-1.0), state, x)
      ...     x = optax.apply_updates(x, u)
      >>> best = oa.best_average(state, x, lambda x: -abs(x - 1.9))
      >>> best.name, float(best.params)
      ('polyak', 2.0)
    """
    if isinstance(names, str):
        raise ValueError(f"names must be a list of names; write names=[{names!r}].")
    names = average_names(state) if names is None else [*names]
    if LIVE in names:
        raise ValueError(
            f"an average is named {LIVE!r}, as the live parameters are here; give it "
            "another name=."
        )
    best = BestAverage(LIVE, _checks.one_score(score(params)), params, {})
    scores = {LIVE: best.score}
    for name in names:
        average = averaged_params(state, params, name)
        scores[name] = found = _checks.one_score(score(average))
        if _checks.rank(found) > _checks.rank(best.score):
            best = BestAverage(name, found, average, {})
    return best._replace(scores=scores)


def summarize_averages(
    state: optax.OptState, weights: Mapping[str, weights_.Weight] | None = None
) -> list[AverageSummary]:
    """What averages a state holds, with their widths and mean ages.

    The states of power functions and windows say what they are. Of other averages the
    weights must be given.

    Args:
      state: An optimizer state, or an object with an ``opt_state``.
      weights: Weights of averages by name, as given to :func:`optax_avg.average`.

    Returns:
      An :class:`AverageSummary` for each name, sorted. Averages of parts of the
      parameters under one name, as in ``optax.partition``, are described by the first.

    Raises:
      ValueError: If a weight is none, or the members of a stacked state have absorbed
        different numbers of iterates.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.average({"lawa": oa.memories.window(5), "ema": oa.weights.ema(0.9)})
      >>> x = jnp.ones(2)
      >>> state = tx.init(x)
      >>> for _ in range(10):
      ...     _, state = tx.update(x, state, x)
      >>> for found in oa.summarize_averages(state, {"ema": oa.weights.ema(0.9)}):
      ...     print(found.name, found.iterates, f"{found.mean_age:.2f}")
      ema 10 3.65
      lawa 10 2.00
    """
    known = weights or {}
    found: dict[str, AverageSummary] = {}
    for node in average_states(state):
        for name in node.averages:
            if name not in found:
                found[name] = _summary(node, name, known.get(name))
    return [found[name] for name in sorted(found)]


def _summary(
    node: AverageState, name: str, weight: weights_.Weight | None
) -> AverageSummary:
    n = _one("numbers of iterates", node.absorbed)
    profile = node.averages[name].profile(jnp.ndim(node.absorbed)) or {}
    if not n:
        return AverageSummary(name, n)
    if "window" in profile:
        k = min(profile["window"], n)
        p = weights_.cooldown("linear", k)  # the mean of the last k iterates
        return AverageSummary(name, n, "window", p.relative_width * k / n, p.mean_age)
    kind = "recorded"
    if "power" in profile:
        kind, weight = "power", weights_.power_function(profile["power"])
    if weight is None:
        return AverageSummary(name, n)
    p = weights_.profile(weight, n, every=_one("strides", node.every))
    return AverageSummary(name, n, kind, p.relative_width, p.mean_age)


def _one(what: str, counter: jax.Array) -> int:
    """A counter of a state; the members of a stacked state have equal ones."""
    found = np.unique(np.asarray(counter)).tolist()
    if len(found) > 1:
        raise ValueError(
            f"the members of a stacked state have {found} as {what}; summarize each by "
            "itself, as jax.tree.map(lambda x: x[i], opt_state)."
        )
    return found[0]
