"""Merges of vectors in float64 NumPy, as the papers write them."""

import itertools

import numpy as np


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def model_stock(xs, x0):
    n = len(xs)
    pairs = itertools.combinations([x - x0 for x in xs], 2)
    c = np.clip(np.mean([cosine(a, b) for a, b in pairs]), 0, 1)
    t = n * c / (1 + (n - 1) * c)
    return t * np.mean(xs, axis=0) + (1 - t) * x0


def ties(xs, x0, density, scale):
    taus = []
    for x in xs:
        tau = x - x0
        keep = np.argsort(-np.abs(tau), kind="stable")[: round(density * tau.size)]
        taus.append(np.where(np.isin(np.arange(tau.size), keep), tau, 0))
    merged = np.zeros_like(x0)
    for j in range(x0.size):
        column = np.array([tau[j] for tau in taus])
        sign = np.sign(column.sum())
        agree = column[(np.sign(column) == sign) & (column != 0)]
        merged[j] = agree.mean() if agree.size else 0
    return x0 + scale * merged


def slerp(a, b, t):
    angle = np.arccos(np.clip(cosine(a, b), -1, 1))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def karcher(xs, w, rounds=500):
    """Descent on the sphere with small steps."""
    units = [x / np.linalg.norm(x) for x in xs]
    u = sum(a * v for a, v in zip(w, units, strict=True))
    u /= np.linalg.norm(u)
    for _ in range(rounds):
        step = np.zeros_like(u)
        for a, v in zip(w, units, strict=True):
            angle = np.arccos(np.clip(u @ v, -1, 1))
            if angle > 1e-12:
                step += a * angle / np.sin(angle) * (v - (u @ v) * u)
        u = u + 0.5 * step
        u /= np.linalg.norm(u)
    return u * sum(a * np.linalg.norm(x) for a, x in zip(w, xs, strict=True))


def fisher(xs, fs, w):
    total = sum(a * f for a, f in zip(w, fs, strict=True))
    plain = sum(a * x for a, x in zip(w, xs, strict=True))
    found = sum(a * f * x for a, f, x in zip(w, fs, xs, strict=True))
    return np.where(total > 0, found / np.where(total > 0, total, 1), plain)


def gradient_matching(xs, hs, x0, h0, scale, damping):
    bar = h0 + damping + scale * sum(hs)
    move = sum((h + h0 + damping) / bar * (x - x0) for x, h in zip(xs, hs, strict=True))
    return x0 + scale * move


def variance_corrected(xs, w):
    x = sum(a * v for a, v in zip(w, xs, strict=True))
    wanted = sum(a * np.var(v) for a, v in zip(w, xs, strict=True))
    return x.mean() + (x - x.mean()) * np.sqrt(wanted / np.var(x))
