"""Optimizers of the papers in plain float64 NumPy, one equation a line.

Each function takes gradients as vectors of 11 numbers, which stand for a matrix of 3 x
2, a vector of 4 and a scalar, and returns the updates.
"""

import numpy as np

SHAPES = {"matrix": (3, 2), "vector": (4,), "scalar": ()}
LEAVES = [slice(0, 6), slice(6, 10), slice(10, 11)]
SIZE = 11


def laprop(grads, lr, b1, b2, eps):
    """Ziyin et al. 2020."""
    m, v, out = np.zeros(SIZE), np.zeros(SIZE), []
    for t, g in enumerate(grads, 1):
        v = b2 * v + (1 - b2) * g**2
        m = b1 * m + (1 - b1) * g / (np.sqrt(v / (1 - b2**t)) + eps)
        out.append(-lr * m / (1 - b1**t))
    return out


def adamomentum(grads, lr, b1, b2, eps):
    """Wang et al. 2021."""
    m, v, out = np.zeros(SIZE), np.zeros(SIZE), []
    for t, g in enumerate(grads, 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * m**2 + eps
        out.append(-lr * (m / (1 - b1**t)) / np.sqrt(v / (1 - b2**t)))
    return out


def diffgrad(grads, lr, b1, b2, eps):
    """Dubey et al. 2019."""
    m, v, before, out = np.zeros(SIZE), np.zeros(SIZE), np.zeros(SIZE), []
    for t, g in enumerate(grads, 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        xi = 1 / (1 + np.exp(-np.abs(before - g)))
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        out.append(-lr * xi * m_hat / (np.sqrt(v_hat) + eps))
        before = g
    return out


def predicted(known, r, reg):
    """Regularised minimal polynomial extrapolation (Scieur et al. 2016)."""
    if len(known) <= r:
        return known[-1]
    newest = np.stack(known[-r:], axis=1)
    u = np.diff(np.stack(known[-r - 1 :], axis=1), axis=1)
    z = np.linalg.solve(u.T @ u + reg * np.eye(r), np.ones(r))
    return newest @ (z / z.sum())


def optimistic_amsgrad(grads, lr, b1, b2, eps, r, reg):
    """Wang et al. 2019, with both variables of the algorithm."""
    theta, v = np.zeros(SIZE), np.full(SIZE, eps)
    v_max, w, auxiliary, out = v, np.zeros(SIZE), np.zeros(SIZE), []
    for t, g in enumerate(grads, 1):
        old, theta = theta, b1 * theta + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        v_max = np.maximum(v_max, v)
        auxiliary = auxiliary - lr * theta / np.sqrt(v_max)
        h = b1 * old + (1 - b1) * predicted(grads[:t], r, reg)
        new = auxiliary - lr * h / np.sqrt(v_max)
        out.append(new - w)
        w = new
    return out


def aggregated_momentum(grads, lr, betas):
    """Lucas et al. 2018."""
    v, out = np.zeros((len(betas), SIZE)), []
    for g in grads:
        v = np.array(betas)[:, None] * v - g
        out.append(lr / len(betas) * v.sum(0))
    return out


def gravity(grads, lr, beta):
    """Bahrami and Pouriyan Zadeh 2021, from a velocity of zero."""
    velocity, out = np.zeros(SIZE), []
    for t, g in enumerate(grads):
        zeta = np.empty(SIZE)
        for leaf in LEAVES:
            m = 1 / np.abs(g[leaf]).max()
            zeta[leaf] = g[leaf] / (1 + (g[leaf] / m) ** 2)
        b = (beta * t + 1) / (t + 2)
        velocity = b * velocity + (1 - b) * zeta
        out.append(-lr * velocity)
    return out


def nag_gs(gradient, x, steps, alpha, mu, gamma):
    """Leplat et al. 2022: the iterates of Algorithm 1 from ``v = x``."""
    v, path = x, [x]
    for _ in range(steps + 1):
        x = (x + alpha * v) / (1 + alpha)
        gamma = (gamma + alpha * mu) / (1 + alpha)
        tau = alpha * mu / gamma
        v = (v + tau * x - alpha / gamma * gradient(x)) / (1 + tau)
        path.append(x)
    return path[1:]  # the first line changes nothing at v = x


def cautious(grads, updates):
    """Liang et al. 2024."""
    out = []
    for g, u in zip(grads, updates, strict=True):
        new = np.empty(SIZE)
        for leaf in LEAVES:
            phi = (-u[leaf] * g[leaf] > 0).astype(float)
            new[leaf] = u[leaf] * phi / max(phi.mean(), 1e-3)
        out.append(new)
    return out


def grams(grads, updates):
    """Cao et al. 2024."""
    return [-np.sign(g) * np.abs(u) for g, u in zip(grads, updates, strict=True)]


def mars(grads, gamma, b1, before, groups):
    """Yuan et al. 2024; ``before`` are the gradients that each is compared with."""
    out = []
    for g, old in zip(grads, before, strict=True):
        c = g + gamma * b1 / (1 - b1) * (g - old)
        for group in groups:
            c[group] = c[group] / max(np.linalg.norm(c[group]), 1)
        out.append(c)
    return out


def multi_momentum(grads, clusters, beta, p):
    """One momentum a cluster as a control variate (Yuan et al. 2019)."""
    m, out = np.zeros((len(p), SIZE)), []
    for g, k in zip(grads, clusters, strict=True):
        out.append(g - m[k] + p @ m)
        m[k] = beta * m[k] + (1 - beta) * g
    return out
