"""Locations of the rows of a matrix in float64, from the definitions."""

import numpy as np


def coordinate_median(v):
    return np.median(v, axis=0)


def trimmed_mean(v, trim):
    return np.sort(v, axis=0)[trim : len(v) - trim].mean(axis=0)


def geometric_median(v, nu, num_iters):
    """Weiszfeld on the vectors, from the mean of those near the middle one."""
    size = np.linalg.norm(v, axis=1)
    reference = v[np.argsort(size, kind="stable")[(len(v) - 1) // 2]]
    distance = np.linalg.norm(v - reference, axis=1)
    centre = v[np.argsort(distance, kind="stable")[(len(v) - 1) // 2]]
    apart = np.linalg.norm(v - centre, axis=1)
    z = v[apart <= np.sort(apart)[(len(v) - 1) // 2]].mean(axis=0)
    for _ in range(num_iters):
        beta = 1 / np.maximum(nu, np.linalg.norm(v - z, axis=1))
        z = beta @ v / beta.sum()
    return z


def median_of_means(v, groups, nu, num_iters):
    means = v.reshape(groups, -1, v.shape[1]).mean(axis=1)
    return geometric_median(means, nu, num_iters)


def centered_clip(v, m, tau, num_iters):
    for _ in range(num_iters):
        apart = v - m
        size = np.linalg.norm(apart, axis=1, keepdims=True)
        m = m + (np.minimum(1, tau / np.maximum(size, 1e-300)) * apart).mean(axis=0)
    return m


def krum(v, f, num_selected):
    squared = ((v[:, None] - v[None]) ** 2).sum(axis=-1)
    scores = []
    for i in range(len(v)):
        others = np.sort(np.delete(squared[i], i))
        scores.append(others[: len(v) - f - 2].sum())
    return v[np.argsort(scores, kind="stable")[:num_selected]].mean(axis=0)


def flag(v, rank, num_iters):
    """Singular vectors of the weighted matrix of directions, of shape (d, n)."""
    g = (v / np.linalg.norm(v, axis=1, keepdims=True)).T
    y = np.linalg.svd(g, full_matrices=False)[0][:, :rank]
    for _ in range(num_iters):
        explained = ((y.T @ g) ** 2).sum(axis=0)
        weighted = g * (np.abs(1 - explained) + 1e-7) ** -0.25
        y = np.linalg.svd(weighted, full_matrices=False)[0][:, :rank]
    return (y @ (y.T @ v.T)).mean(axis=1)
