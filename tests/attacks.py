"""Random attacks on robust rules: fewer than half of the rows are anything at all."""

import numpy as np

SMALLEST, GREATEST = -45.0, np.log10(3e38)  # subnormal to almost infinite


def attacks(seed, count, n, d):
    """Rows (count, n, d) in float32, and which of them are bad (count, n).

    Good rows are of one size or of many, near or far from each other, identical, zero
    or subnormal. Bad rows are of any size along random directions or along good rows,
    repeated or not; some are zero, copies of a good row, infinite or NaN. There are
    none to ``(n - 1) // 2`` of them.
    """
    rng = np.random.default_rng(seed)
    good = _good(rng, count, n, d)
    bad = _bad(rng, good)
    number = rng.integers(0, (n - 1) // 2 + 1, size=(count, 1))
    is_bad = rng.permuted(np.arange(n)[None] < number, axis=1)
    with np.errstate(over="ignore"):
        v = np.where(is_bad[:, :, None], bad, good).astype(np.float32)
    return v, is_bad


def _directions(rng, *shape):
    x = rng.normal(size=shape) * (rng.random(shape) < 0.7)
    x[..., 0] += np.where(rng.random(shape[:-1]) < 0.5, 1, -1) * 1e-3
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _sizes(rng, low, high, *shape):
    return 10 ** rng.uniform(low, high, size=shape)


def _good(rng, count, n, d):
    common = rng.choice([0.0, 1e-30, 1e-45, 1.0, 1e30], size=(count, 1, 1))
    wide = _sizes(rng, SMALLEST, 36, count, 1, 1)
    common = np.where(rng.random((count, 1, 1)) < 0.5, common, wide)
    centre = common * _directions(rng, count, 1, d)
    spread = common * rng.choice([0, 1e-7, 1e-3, 1], size=(count, 1, 1))
    around = centre + spread * rng.normal(size=(count, n, d))
    scattered = _sizes(rng, SMALLEST, 36, count, n, 1) * _directions(rng, count, n, d)
    good = np.where(rng.random((count, 1, 1)) < 0.8, around, scattered)
    return _with_copies(rng, good, 0.2)


def _bad(rng, good):
    count, n, d = good.shape
    one = _sizes(rng, SMALLEST, GREATEST, count, 1, 1)
    own = _sizes(rng, SMALLEST, GREATEST, count, n, 1)
    size = np.where(rng.random((count, 1, 1)) < 0.5, one, own)
    along = good / np.maximum(np.linalg.norm(good, axis=2, keepdims=True), 1e-300)
    along = along * rng.choice([-1, 1], size=(count, n, 1))
    same = _directions(rng, count, 1, d)
    ways = [_directions(rng, count, n, d), along, np.broadcast_to(same, good.shape)]
    way = rng.integers(0, len(ways), size=(count, 1, 1))
    bad = size * np.choose(way, ways)
    kind = rng.random((count, n, 1))
    bad = np.where(kind < 0.1, 0.0, bad)
    bad = np.where((kind > 0.1) & (kind < 0.2), -good, bad)
    bad = np.where((kind > 0.2) & (kind < 0.25), np.inf, bad)
    bad = np.where((kind > 0.25) & (kind < 0.3), np.nan, bad)
    return _with_copies(rng, bad, 0.3)


def _with_copies(rng, rows, share):
    """Some sets of rows have every row but the first replaced by another one."""
    count, n, _ = rows.shape
    source = rng.integers(0, n, size=(count, n))
    keep = (rng.random((count, 1)) > share) | (np.arange(n)[None] == 0)
    source = np.where(keep, np.arange(n)[None], source)
    return np.take_along_axis(rows, source[:, :, None], axis=1)
