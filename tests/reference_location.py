"""Distances, their proximal steps and the tracker in plain float64 NumPy.

A gradient is a vector of 18 numbers: a matrix of 4 x 3, a vector of 5 and a scalar.
"""

import numpy as np

SHAPES = {"matrix": (4, 3), "vector": (5,), "scalar": ()}
SLICES = {"matrix": slice(0, 12), "vector": slice(12, 17), "scalar": slice(17, 18)}
SIZE = 18


def huber(x, mu):
    return np.where(np.abs(x) <= mu, x**2 / 2, mu * (np.abs(x) - mu / 2))


def matrices(z):
    """The leaves as matrices: vectors and scalars have one column."""
    yield z[SLICES["matrix"]].reshape(4, 3)
    yield z[SLICES["vector"]].reshape(5, 1)
    yield z[SLICES["scalar"]].reshape(1, 1)


def distance(name, z, mu, q):
    """``D(z)`` with ``z = m - g``."""
    if name == "mean":
        return z @ z / 2
    if name == "l2":
        return np.linalg.norm(z)
    if name == "l1":
        return np.abs(z).sum()
    if name == "linf":
        return np.abs(z).max()
    if name == "huber":
        return float(huber(np.linalg.norm(z), mu))
    if name == "huber_elementwise":
        return huber(z, mu).sum()
    if name == "pinball":  # rho_q(g - m)
        return np.maximum(-q * z, (1 - q) * z).sum()
    assert name == "spectral"
    return sum(np.linalg.svd(m, compute_uv=False).sum() for m in matrices(z))


def l1_ball(z, radius):
    """Projection by sorting (Held, Wolfe and Crowder 1974)."""
    sizes = np.sort(np.abs(z))[::-1]
    if sizes.sum() <= radius:
        return z
    excess = (np.cumsum(sizes) - radius) / np.arange(1, len(z) + 1)
    theta = excess[np.nonzero(sizes > excess)[0][-1]]
    return np.sign(z) * np.maximum(np.abs(z) - theta, 0)


def step(name, delta, tau, mu, q):
    n = np.linalg.norm(delta)
    if name == "mean":
        return tau / (1 + tau) * delta
    if name == "l2":
        return min(1, tau / n) * delta
    if name == "l1":
        return np.clip(delta, -tau, tau)
    if name == "linf":
        return l1_ball(delta, tau)
    if name == "huber":
        return tau * mu / max(n, mu * (1 + tau)) * delta
    if name == "huber_elementwise":
        return tau / (1 + tau) * np.clip(delta, -mu * (1 + tau), mu * (1 + tau))
    if name == "pinball":
        return np.clip(delta, -tau * (1 - q), tau * q)
    assert name == "spectral"
    found = []
    for matrix in matrices(delta):
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        found.append(((u * np.minimum(s, tau)) @ vt).ravel())
    return np.concatenate(found)


def track(name, gradients, tau, mu, q):
    """Locations after each gradient, from the first."""
    m, path = gradients[0], [gradients[0]]
    for g in gradients[1:]:
        m = m + step(name, g - m, tau, mu, q)
        path.append(m)
    return np.stack(path)


NAMES = (
    "mean",
    "l2",
    "l1",
    "linf",
    "huber",
    "huber_elementwise",
    "pinball",
    "spectral",
)
