"""Optimizers, constraints and losses in float64, from their papers."""

import numpy as np


def cosine(a, b):
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return abs(np.sum(a * b)) / size if size else 0.0


def projected(p, g, w, delta):
    """AdamP's projection of an update, and whether there was one; channels last."""
    if w.ndim < 2:
        return p, False
    channels = range(w.shape[-1])
    dim = w[..., 0].size
    if max(cosine(w[..., c], g[..., c]) for c in channels) < delta / np.sqrt(dim):
        out = p.copy()
        for c in channels:
            u = w[..., c] / np.linalg.norm(w[..., c])
            out[..., c] -= np.sum(u * p[..., c]) * u
        return out, True
    if cosine(w, g) < delta / np.sqrt(w.size):
        u = w / np.linalg.norm(w)
        return p - np.sum(u * p) * u, True
    return p, False


def adamp(w, gradients, lr, b1, b2, eps, decay, delta, ratio):
    """The weights after each step, and whether it was projected."""
    m = v = np.zeros_like(w)
    seen = []
    for t, g in enumerate(gradients, 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        p = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        q, is_radial = projected(p, g, w, delta)
        w = w - lr * (q + (ratio if is_radial else 1) * decay * w)
        seen.append((w, is_radial))
    return seen


def sgdp(w, gradients, lr, momentum, decay, delta, ratio):
    m = np.zeros_like(w)
    seen = []
    for g in gradients:
        m = momentum * m + g
        q, is_radial = projected(m, g, w, delta)
        w = w - lr * (q + (ratio if is_radial else 1) * decay * w)
        seen.append((w, is_radial))
    return seen


def norm_preserving_momentum(w, gradients, lr, momentum, start):
    """LAWN around SGD with momentum, for one weight."""
    m, c, seen = np.zeros_like(w), None, []
    flat = lambda v, w: v - np.sum(v * w) / np.sum(w * w) * w
    for t, g in enumerate(gradients):
        if t == start:
            c = np.linalg.norm(w)
        m = momentum * m + (g if c is None else flat(g, w))
        u = -lr * m
        if c is None:
            w = w + u
        else:
            w = w + flat(u, w)
            w = c * w / np.linalg.norm(w)
        seen.append(w)
    return seen


def norm_loss_gradient(w, lam):
    """Column by column."""
    out = np.zeros_like(w)
    for c in range(w.shape[-1]):
        size = np.linalg.norm(w[..., c])
        out[..., c] = -2 * lam * (1 - size) * w[..., c] / size
    return out


def spectral_gradient(w, lam):
    """By a singular value decomposition, outputs last."""
    u, s, v = np.linalg.svd(w.reshape(-1, w.shape[-1]), full_matrices=False)
    return (lam * s[0] * np.outer(u[:, 0], v[0])).reshape(w.shape)


def adahessian(gradients, signs, hessian, b1, b2, eps, k, axes):
    """Directions for signs that were drawn; ``axes`` of the spatial average."""
    m = v = np.zeros_like(gradients[0])
    seen = []
    for t, (g, z) in enumerate(zip(gradients, signs, strict=True), 1):
        d = z * (hessian @ z.ravel()).reshape(z.shape)
        if axes:
            d = np.broadcast_to(d.mean(axes, keepdims=True), d.shape)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * d * d
        vhat = np.sqrt(v / (1 - b2**t)) ** k
        seen.append(m / (1 - b1**t) / (vhat + eps))
    return seen


def u_dog(gradient, x0, steps, c, reps_rel):
    """``z`` and the average after each step; all sums are taken from their start."""
    x, y = [x0], [x0]  # x[t + 1] and y[t + 1] are made in step t
    rbar, alphas, ms, gs, seen = [], [], [], [], []
    average = lambda weights, points: (
        sum(w * p for w, p in zip(weights, points, strict=True)) / sum(weights)
    )
    for t in range(steps):
        far = [np.linalg.norm(p - x0) for p in x + y]
        rbar.append(max([reps_rel * (1 + np.linalg.norm(x0)), *far]))
        omega = [sum(rbar[: k + 1]) for k in range(t + 1)]
        alphas.append(omega[t] / rbar[t])
        z = average(omega, [*x[1:], y[t]])
        ms.append(gradient(z, 2 * t))
        q = sum(
            a**2 * np.sum((g - m) ** 2)
            for a, g, m in zip(alphas[:-1], gs, ms[:-1], strict=True)
        )
        top = max(a**2 * np.sum(m**2) for a, m in zip(alphas, ms, strict=True))
        x.append(y[t] - alphas[t] * c * rbar[t] / np.sqrt(max(top, q)) * ms[t])
        mean = average(omega, x[1:])
        gs.append(gradient(mean, 2 * t + 1))
        q += alphas[t] ** 2 * np.sum((gs[t] - ms[t]) ** 2)
        y.append(y[t] - alphas[t] * c * rbar[t] / np.sqrt(max(top, q)) * gs[t])
        seen.append((z, mean))
    return seen


def cvar(losses, beta):
    """``min_a a + mean (L - a)_+/(1 - beta)``; a minimum is at one of the losses."""
    return min(a + np.mean(np.maximum(losses - a, 0)) / (1 - beta) for a in losses)


def z_error_mask(scores, z_max, labels):
    kept = []
    for score, label in zip(scores, labels, strict=True):
        own = scores[labels == label]
        sigma = own.std(ddof=1) if len(own) > 1 else 0.0
        kept.append(sigma == 0 or abs(score - own.mean()) / sigma <= z_max)
    return np.array(kept)


def adaptive_k(batches, beta1, beta2, eps):
    """The weights of each batch."""
    m = v = 0.0
    seen = []
    for losses in batches:
        m = beta1 * m + (1 - beta1) * losses.mean()
        v = beta2 * v + (1 - beta2) * losses.mean() ** 2
        kept = losses <= m / (np.sqrt(v) + eps)
        seen.append(kept / max(kept.sum(), 1))
    return seen
