"""Compressors: what a worker sends in place of a vector, and what it stands for.

    |v - C(v)|^2 <= (1 - delta) |v|^2,    0 < delta <= 1

Each is a value for :func:`optax_avg.optimizers.error_feedback` and works leaf by leaf.
The papers compress one vector of all parameters; ``optax.flatten(error_feedback(...))``
does so.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_avg import _checks, _leaves, _mesh, _numerics
from optax_avg._keys import key_maker

__all__ = [
    "Compressor",
    "bytes_sent",
    "identity",
    "low_rank",
    "random_k",
    "sign",
    "top_k",
]

# What one worker sends of one leaf.
Message = tuple[jax.Array, ...]
# A PRNG key that all workers share, or () of a compressor that draws nothing.
Key = Any


class Compressor(NamedTuple):
    """A contractive compressor of one leaf.

    Attributes:
      compress: ``(v, key) -> message``. ``v`` is an array in float32 or wider, the
        message a tuple of arrays.
      total: ``(messages, like, key) -> sum``. ``messages`` is a message with an
        additional first axis of workers. The result is the sum over workers of the
        arrays ``C(v)`` that the messages stand for, of the shape and dtype of ``like``.
      adds_up: ``shape -> bool``, whether the sum of the messages of a leaf of this
        shape is the message of the sum. If so, workers take the mean of their messages
        in an all-reduce. If not, they gather the messages of all.
      make_key: Function that makes the PRNG key of the state, ``()`` for none.

    Example:
      A compressor that sends the mean of the elements.

      >>> import jax.numpy as jnp, optax_avg as oa
      >>> mean = oa.optimizers.Compressor(
      ...     compress=lambda v, key: (jnp.mean(v),),
      ...     total=lambda message, like, key: jnp.full_like(like, jnp.sum(message[0])),
      ...     adds_up=lambda shape: True,
      ... )
      >>> tx = oa.optimizers.error_feedback(mean, "ef")
      >>> g = jnp.array([1.0, 3.0])
      >>> tx.update(g, tx.init(g))[0].tolist()
      [2.0, 2.0]
    """

    compress: Callable[[jax.Array, Key], Message]
    total: Callable[[Message, jax.Array, Key], jax.Array]
    adds_up: Callable[[tuple[int, ...]], bool] = lambda shape: False
    make_key: Callable[[], Key] = lambda: ()


def bytes_sent(compressor: Compressor, tree: optax.Updates) -> int:
    """The number of bytes of what one worker sends in one step.

    They are counted from the arrays that the compressor makes. How often a collective
    passes them on, and what it adds, depends on the devices.

    Args:
      compressor: The compressor.
      tree: A gradient, or its shapes as ``jax.ShapeDtypeStruct``. Leaves that are not
        floating are not sent. Values of narrow leaves are sent in float32.

    Returns:
      The number of bytes.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> g = {"w": jnp.ones((100, 10)), "b": jnp.ones(10)}
      >>> oa.optimizers.bytes_sent(oa.optimizers.identity(), g)
      4040
      >>> oa.optimizers.bytes_sent(oa.optimizers.top_k(0.1), g)  # values and places
      808
      >>> oa.optimizers.bytes_sent(oa.optimizers.sign(), g)  # bits and scales
      135
    """

    def message(leaf):
        dtype = _numerics.float32_or_wider(jnp.result_type(leaf))
        v = jax.ShapeDtypeStruct(jnp.shape(leaf), dtype)
        return jax.eval_shape(
            lambda v: compressor.compress(v, compressor.make_key()), v
        )

    leaves = [x for x in jax.tree.leaves(tree) if _leaves.is_float(x)]
    sent = jax.tree.leaves([message(leaf) for leaf in leaves])
    return sum(x.size * x.dtype.itemsize for x in sent)


def identity() -> Compressor:
    """``C(v) = v``, ``delta = 1``: an all-reduce of the gradients.

    Returns:
      A compressor.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.optimizers.error_feedback(oa.optimizers.identity())
      >>> g = jnp.array([1.0, 3.0])
      >>> tx.update(g, tx.init(g))[0].tolist()
      [1.0, 3.0]
    """
    return Compressor(
        lambda v, key: (v,),
        lambda message, like, key: jnp.sum(message[0], axis=0),
        lambda shape: True,
    )


def top_k(k: int | float) -> Compressor:
    """The ``k`` elements of largest size of each leaf, ``delta = k/d``.

    A worker sends their values and their places, int32.

    Args:
      k: An integer is the number of elements of each leaf. A float in (0, 1] is the
        share of the elements of each leaf, rounded, at least one: ``1`` is one element
        and ``1.0`` all of them.

    Returns:
      A compressor.

    Raises:
      ValueError: If ``k`` is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.optimizers.error_feedback(oa.optimizers.top_k(1), "ef")
      >>> g = jnp.array([1.0, -3.0])
      >>> tx.update(g, tx.init(g))[0].tolist()
      [0.0, -3.0]

    References:
      Alistarh et al., "The Convergence of Sparsified Gradient Methods", 2018,
      1809.10505.
    """
    count = _count_of(k, "top_k")

    def compress(v: jax.Array, key: Key) -> Message:
        del key
        flat = v.reshape(-1)
        places = lax.top_k(jnp.abs(flat), count(flat.size))[1]
        return flat[places], places

    def total(message: Message, like: jax.Array, key: Key) -> jax.Array:
        del key
        values, places = message
        return _placed(values.reshape(-1), places.reshape(-1), like)

    return Compressor(compress, total)


def random_k(k: int | float, key: jax.Array | int = 0) -> Compressor:
    """``k`` random elements of each leaf as they are, ``delta = k/d`` in expectation.

    All workers draw the same places from one key, so that no place is sent and an
    all-reduce of ``k`` values does.

    Args:
      k: An integer is the number of elements of each leaf. A float in (0, 1] is the
        share of the elements of each leaf, rounded, at least one.
      key: PRNG key, or an integer seed.

    Returns:
      A compressor.

    Raises:
      ValueError: If ``k`` is out of range, or ``key`` is neither a key nor an integer.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> compressor = oa.optimizers.random_k(0.5, key=0)
      >>> tx = oa.optimizers.error_feedback(compressor, "ef")
      >>> g = jnp.ones(4)
      >>> float(tx.update(g, tx.init(g))[0].sum())
      2.0

    References:
      Stich et al., "Sparsified SGD with Memory", 2018, 1809.07599.
    """
    count = _count_of(k, "random_k")

    def places(size: int, key: Key) -> jax.Array:
        return lax.top_k(jax.random.uniform(key, (size,)), count(size))[1]

    def compress(v: jax.Array, key: Key) -> Message:
        flat = v.reshape(-1)
        return (flat[places(flat.size, key)],)

    def total(message: Message, like: jax.Array, key: Key) -> jax.Array:
        return _placed(jnp.sum(message[0], axis=0), places(like.size, key), like)

    make_key = key_maker(key, "random_k(k, key=jax.random.key(0))")
    return Compressor(compress, total, lambda shape: True, make_key)


def sign() -> Compressor:
    """The mean size of each leaf with the signs of the elements, ``|v|_1/d sgn(v_i)``.

    ``delta = |v|_1^2/(d |v|^2)``. A worker sends one bit for each element, eight in a
    byte, and the size. Zero counts as positive.

    Returns:
      A compressor.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.optimizers.error_feedback(oa.optimizers.sign(), "ef")
      >>> g = jnp.array([1.0, -3.0])
      >>> tx.update(g, tx.init(g))[0].tolist()
      [2.0, -2.0]

    References:
      Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression
      Schemes", 2019, 1901.09847.
    """

    def compress(v: jax.Array, key: Key) -> Message:
        del key
        flat = v.reshape(-1)
        return jnp.sum(jnp.abs(flat)) / max(flat.size, 1), jnp.packbits(flat >= 0)

    def total(message: Message, like: jax.Array, key: Key) -> jax.Array:
        del key

        def add(so_far, one):
            scale, bits = one
            positive = jnp.unpackbits(bits, count=like.size).astype(bool)
            return so_far + jnp.where(positive, scale, -scale), None

        # One worker after another, or the bits of all would be floats at once.
        zeros = _zeros(like.size, message[0])
        return lax.scan(add, zeros, message)[0].reshape(like.shape)

    return Compressor(compress, total)


def low_rank(rank: int, key: jax.Array | int = 0) -> Compressor:
    """``C(M) = P P' M`` with ``rank`` orthonormal columns ``P`` that span ``M Q``.

    ``Q`` is Gaussian, drawn anew in each step and the same for all workers. A matrix
    whose rank is at most ``rank`` is sent exactly. This is the power iteration of
    PowerSGD without its warm start: there ``Q`` comes from the step before, and the
    workers agree on one ``P``.

    A worker sends ``P`` and ``M' P``. The rows of ``M`` are the first axes of a leaf,
    the columns the others, divided where rows and columns together are fewest: a kernel
    of shape (3, 3, 64, 128) has 576 rows, and one of (128, 64, 3, 3) has 128. Vectors,
    and matrices for which ``P`` and ``M' P`` are no smaller, are sent whole.

    Args:
      rank: Number of columns, at least 1.
      key: PRNG key, or an integer seed.

    Returns:
      A compressor.

    Raises:
      ValueError: If ``rank`` is below 1, or ``key`` is neither a key nor an integer.

    Example:
      >>> import jax.numpy as jnp, optax_avg as oa
      >>> tx = oa.optimizers.error_feedback(oa.optimizers.low_rank(1), "ef")
      >>> g = jnp.outer(jnp.arange(3.0), jnp.array([1.0, -1.0, 2.0]))
      >>> bool(jnp.allclose(tx.update(g, tx.init(g))[0], g, atol=1e-5))
      True

    References:
      Vogels et al., "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
      Optimization", 2019, 1905.13727.
    """
    hint = "; inside optax.inject_hyperparams name the compressor in static_args"
    rank = _checks.static_integer("rank", rank, 1, hint)

    def sides(shape: tuple[int, ...]) -> tuple[int, int]:
        splits = range(1, len(shape))
        return min(
            [(math.prod(shape[:i]), math.prod(shape[i:])) for i in splits], key=sum
        )

    def whole(shape: tuple[int, ...]) -> bool:
        return len(shape) < 2 or rank * sum(sides(shape)) >= math.prod(shape)

    def compress(v: jax.Array, key: Key) -> Message:
        if whole(v.shape):
            return (v,)
        matrix = v.reshape(sides(v.shape))
        q = jax.random.normal(key, (matrix.shape[1], rank), v.dtype)
        p = jnp.linalg.qr(jnp.dot(matrix, q, precision="highest"))[0]
        return p, jnp.dot(matrix.T, p, precision="highest")

    def total(message: Message, like: jax.Array, key: Key) -> jax.Array:
        del key
        if whole(like.shape):
            return jnp.sum(message[0], axis=0)
        sums = jnp.einsum("wir,wjr->ij", *message, precision="highest")
        return sums.reshape(like.shape)

    make_key = key_maker(key, "low_rank(rank, key=jax.random.key(0))")
    return Compressor(compress, total, whole, make_key)


def _count_of(k: int | float, name: str) -> Callable[[int], int]:
    """The number of elements to send as a function of the size of a leaf.

    Raises:
      ValueError: If ``k`` is out of range.
    """
    if isinstance(k, (float, np.floating)):
        share = _checks.within("k", k, 0, 1, open_low=True)
        return lambda size: min(size, max(1, round(share * size)))
    hint = f" or a share in (0, 1]; call {name}(0.01) for one in a hundred"
    number = _checks.static_integer("k", k, 1, hint)
    return lambda size: min(size, number)


def _placed(values: jax.Array, places: jax.Array, like: jax.Array) -> jax.Array:
    """Zeros like a leaf to which values are added at places."""
    return _zeros(like.size, values).at[places].add(values).reshape(like.shape)


def _zeros(size: int, values: jax.Array) -> jax.Array:
    """A vector of zeros that differs between the devices where ``values`` does."""
    return _mesh.vary(jnp.zeros(size, values.dtype), _mesh.varying_axes(values))
