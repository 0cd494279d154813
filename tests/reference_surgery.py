"""Directions for several objectives in float64, from their definitions."""

import itertools

import numpy as np
import scipy.optimize


def mgda(g):
    """The shortest of the shortest points of all faces of the simplex."""
    best = None
    for size in range(1, len(g) + 1):
        for face in itertools.combinations(range(len(g)), size):
            part = g[list(face)]
            # KKT: G w = l 1 with sum w = 1, in the least-squares sense.
            system = np.block(
                [[part @ part.T, np.ones((size, 1))], [np.ones((1, size)), 0]]
            )
            right = np.append(np.zeros(size), 1.0)
            w = np.linalg.lstsq(system, right, rcond=None)[0][:size]
            if (w >= -1e-12).all():
                d = w @ part
                if best is None or np.linalg.norm(d) < np.linalg.norm(best) - 1e-12:
                    best = d
    return best


def upgrad(g):
    """The mean of the rows' projections on the cone of ``d`` with ``g d >= 0``.

    By Moreau ``g_i + G' v`` with ``v >= 0`` of the least length, sought on all sets of
    independent rows, one of which has it by Caratheodory.
    """
    best = g.copy()
    for size in range(1, min(g.shape) + 1):
        for face in itertools.combinations(range(len(g)), size):
            part = g[list(face)]
            v = np.linalg.lstsq(part.T, -g.T, rcond=None)[0]
            d = g + v.T @ part
            shorter = np.linalg.norm(d, axis=1) < np.linalg.norm(best, axis=1)
            best = np.where(((v >= 0).all(axis=0) & shorter)[:, None], d, best)
    return best.mean(axis=0)


def cagrad(g, c):
    """``d`` itself by sequential quadratic programming, ``min_i <g_i, d> >= s``."""
    g0 = g.mean(axis=0)
    radius = c * np.linalg.norm(g0)
    found = scipy.optimize.minimize(
        lambda z: -z[-1],
        np.append(g0, (g @ g0).min()),
        jac=lambda z: np.append(np.zeros(g.shape[1]), -1.0),
        constraints=[
            {"type": "ineq", "fun": lambda z: g @ z[:-1] - z[-1]},
            {
                "type": "ineq",
                "fun": lambda z: radius**2 - ((z[:-1] - g0) ** 2).sum(),
                "jac": lambda z: np.append(-2 * (z[:-1] - g0), 0.0),
            },
        ],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return found.x[:-1]


def pcgrad(g, orders):
    """The algorithm as it stands, ``orders[i]`` the order of the others."""
    total = np.zeros(g.shape[1])
    for i, row in enumerate(g):
        part = row.copy()
        for j in orders[i]:
            if part @ g[j] < 0:
                part = part - part @ g[j] / (g[j] @ g[j]) * g[j]
        total += part
    return total
