"""Slow float64 NumPy references of error feedback and Bayes-SAM."""

import numpy as np


def identity(v):
    return v.copy()


def top_k(k):
    def compress(v):
        out = np.zeros_like(v)
        chosen = sorted(range(v.size), key=lambda i: -abs(v.flat[i]))[:k]
        for i in chosen:
            out.flat[i] = v.flat[i]
        return out

    return compress


def sign(v):
    return np.abs(v).mean() * np.where(v >= 0, 1.0, -1.0)


def projected(q):
    """The part of a matrix in the span of its product with ``q``."""

    def compress(v):
        u, s, _ = np.linalg.svd(v @ q, full_matrices=False)
        u = u[:, s > 1e-12 * s.max(initial=0)]
        return u @ (u.T @ v)

    return compress


def error_feedback(gradients, compress, variant, eta=0.0):
    """The result of every step.

    ``gradients`` has one list per step, with one array per worker; ``compress`` is a
    function of the step and a vector.
    """
    n = len(gradients[0])
    e = [np.zeros_like(g) for g in gradients[0]]
    h = [np.zeros_like(g) for g in gradients[0]]
    results = []
    for t, rows in enumerate(gradients):
        sent = []
        for i, g in enumerate(rows):
            if variant == "ef":
                c = compress(t, g + e[i])
                e[i] = g + e[i] - c
            elif variant == "ef21":
                c = compress(t, g - h[i])
                h[i] = h[i] + c
            else:
                c = compress(t, eta * e[i] + g - h[i])
                e[i] = e[i] + g - h[i] - c
                h[i] = h[i] + c
            sent.append(c)
        results.append(sum(sent if variant == "ef" else h) / n)
    return results


def bsam_step(x, m, s, theta, grad, *, lr, n, b1, b2, rho, prior_precision, damping):
    """One step from the sample ``theta``: the ascended point, and the new x, m, s."""
    delta = prior_precision / n
    g = grad(theta)
    ascended = x + rho * g / s
    m = b1 * m + (1 - b1) * (grad(ascended) + delta * x)
    s = b2 * s + (1 - b2) * (np.sqrt(s) * np.abs(g) + delta + damping)
    return ascended, x - lr * m / s, m, s
