"""What rooms share of checkpoints: groups of leaves, and how lists of them differ."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
import pytest

import optax_avg as oa
from optax_avg import posthoc
from optax_avg._checkpoints.leaves import ONLY, Leaf, batches, difference, flat, nested


@pytest.mark.parametrize(
    ("sizes", "most", "groups"),
    [
        ([], 10, []),
        ([0, 0], 0, [[0, 1]]),
        ([4, 6, 1], 10, [[0, 1], [2]]),
        ([11, 2, 3], 10, [[0], [1, 2]]),
        ([2, 11, 3], 10, [[0], [1], [2]]),
    ],
)
def test_batches(sizes, most, groups):
    assert batches(sizes, most) == groups


def leaf(name, shape=(2,), dtype="float32"):
    return Leaf(tuple(name.split("/")), shape, dtype)


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ([leaf("b/c"), leaf("a", dtype="bfloat16")], ""),
        ([leaf("a")], "has no leaf b.c, which x has"),
        ([leaf("a"), leaf("b/c", (3,))], "has shape (3,) at b.c, where x has (2,)"),
        ([leaf("a", dtype="complex64"), leaf("b/c")], "complex64 at a, where x is fl"),
        ([leaf("a"), leaf("b/c"), leaf("d")], "has a leaf d, which x does not have"),
        ([leaf(ONLY)], "is a single leaf, which x is not"),
    ],
)
def test_differences(theirs, said):
    found = difference([leaf("a"), leaf("b/c")], theirs, "x")
    assert said in found if said else not found


def test_paths_and_dicts():
    leaves = {("a",): 1, ("b", "c"): 2}
    assert flat(nested(leaves)) == leaves
    with pytest.raises(ValueError, match="lies in a, an array"):
        nested({("a",): 1, ("a", "b"): 2})


def test_parameters_without_floats_beside_an_average(tmp_path):
    """They are not kept, and the record does not name them."""
    params = {"n": jnp.arange(3)}
    tx = optax.chain(optax.sgd(0.1), oa.power_ema([0.1]))
    weights = {"w": jnp.ones(2)}
    state = tx.update(weights, tx.init(weights), weights)[1]
    with posthoc.SnapshotStore(tmp_path) as store:
        assert not store.save(None, 1, params)
        assert store.save(state, 2, params)
    (average,) = posthoc.summarize_store(tmp_path).averages
    assert average.kind == "power"
    assert average.iterates == 1


class Ordered(NamedTuple):
    b: Any
    a: Any


def test_leaves_in_another_order_are_not_mixed_up(tmp_path):
    """Trees of other containers have the same names in another order."""
    with posthoc.SnapshotStore(tmp_path) as store:
        store.save(None, 1, Ordered(jnp.zeros(2), jnp.ones(2)))
        store.save(None, 2, {"b": jnp.zeros(2), "a": jnp.ones(2)})
        with pytest.raises(ValueError, match="leaves in another order than the newest"):
            store.mean()
