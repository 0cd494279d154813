"""Slow float64 references of trainings of several workers, from the papers.

Every function takes points ``c`` of shape (workers, steps, d) and returns the
parameters of all workers after each step, shape (workers, steps, d). A worker's loss at
step ``t`` is ``sum_k h_k (x_k - c_k)^2 / 2``.
"""

import numpy as np


def gradients(x, c, h):
    """Of all workers, each at its own parameters."""
    return h[None] * (x - c)


def recorded(step, x, c):
    """All parameters after each step; ``step(t, x)`` returns the next ones."""
    seen = []
    for t in range(c.shape[1]):
        x = step(t, x)
        seen.append(x)
    return np.stack(seen, axis=1)


def all_at(point, workers):
    return np.repeat(point[None], workers, axis=0)


def local_sgd(x0, c, h, lr, every, weights=None, correct=None):
    """Local SGD; FedAvg with weights. ``correct`` restores the variance by leaf."""
    workers = len(c)
    w = np.ones(workers) if weights is None else np.asarray(weights, float)

    def step(t, x):
        x = x - lr * gradients(x, c[:, t], h)
        if (t + 1) % every:
            return x
        z = sum(w[i] * x[i] for i in range(workers)) / w.sum()
        for leaf in correct or ():
            wanted = sum(w[i] * np.var(x[i, leaf]) for i in range(workers)) / w.sum()
            m = z[leaf].mean()
            z[leaf] = m + np.sqrt(wanted / np.var(z[leaf])) * (z[leaf] - m)
        return all_at(z, workers)

    return recorded(step, all_at(x0, workers), c)


def momentum(x0, c, h, lr, mu, every, how):
    """Parallel restarted SGD with momentum; buffers averaged, or zero after a round."""
    workers = len(c)
    u = np.zeros((workers, len(x0)))

    def step(t, x):
        nonlocal u
        u = mu * u + gradients(x, c[:, t], h)
        x = x - lr * u
        if (t + 1) % every:
            return x
        u = all_at(u.mean(axis=0), workers) if how == "mean" else 0 * u
        return all_at(x.mean(axis=0), workers)

    return recorded(step, all_at(x0, workers), c)


def fedau_weights(takes_part, cutoff):
    """Weights of one worker from whether it takes part, one for each round.

    The recursion over the running mean, as the paper prints it.
    """
    mean, number, waited, weights = 1.0, 0, 0, []
    for present in takes_part:
        weights.append(mean)
        waited += 1
        if present or waited == cutoff:
            mean = waited if number == 0 else (number * mean + waited) / (number + 1)
            number += 1
            waited = 0
    return weights


def fedau(x0, c, h, lr, every, takes_part, cutoff):
    """FedAU; ``takes_part`` has the shape (workers, rounds)."""
    workers = len(c)
    weights = [fedau_weights(row, cutoff) for row in takes_part]
    common = x0

    def step(t, x):
        nonlocal common
        x = x - lr * gradients(x, c[:, t], h)
        if (t + 1) % every:
            return x
        r = t // every
        moved = 0 * common
        for n in range(workers):
            if takes_part[n][r]:
                moved = moved + weights[n][r] * (x[n] - common)
        common = common + moved / workers
        return all_at(common, workers)

    return recorded(step, all_at(x0, workers), c)


class AdamW:
    """One worker's AdamW, as PyTorch writes it."""

    def __init__(self, lr, b1, b2, eps, decay):
        self.lr, self.b1, self.b2, self.eps, self.decay = lr, b1, b2, eps, decay
        self.t, self.m, self.v = 0, 0.0, 0.0

    def step(self, x, g):
        self.t += 1
        x = x * (1 - self.lr * self.decay)
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        m = self.m / (1 - self.b1**self.t)
        v = self.v / (1 - self.b2**self.t)
        return x - self.lr * m / (np.sqrt(v) + self.eps)


class DiLoCo:
    """DiLoCo: AdamW inside, PyTorch's SGD with Nesterov momentum outside."""

    def __init__(self, x0, h, inner, every, workers, lr=0.7, mu=0.9):
        self.common, self.h, self.every = x0, h, every
        self.lr, self.mu, self.buffer = lr, mu, None
        self.optimizers = [AdamW(*inner) for _ in range(workers)]

    def run(self, c):
        workers = len(c)

        def step(t, x):
            g = gradients(x, c[:, t], self.h)
            x = np.stack([o.step(*row) for o, *row in zip(self.optimizers, x, g)])
            if (t + 1) % self.every:
                return x
            outer = (self.common[None] - x).mean(axis=0)
            if self.buffer is None:
                self.buffer = outer
            else:
                self.buffer = self.mu * self.buffer + outer
            self.common = self.common - self.lr * (outer + self.mu * self.buffer)
            return all_at(self.common, workers)

        return recorded(step, all_at(self.common, workers), c)


def median(x0, c, h, lr, every):
    """Local SGD with the median of each coordinate in place of the mean."""
    workers = len(c)

    def step(t, x):
        x = x - lr * gradients(x, c[:, t], h)
        return x if (t + 1) % every else all_at(np.median(x, axis=0), workers)

    return recorded(step, all_at(x0, workers), c)


def ring(workers, share):
    """The mixing matrix of a ring."""
    w = (1 - 2 * share) * np.eye(workers)
    for i in range(workers):
        w[i, (i - 1) % workers] += share
        w[i, (i + 1) % workers] += share
    return w


def gossip(x0, c, h, lr, every, share, correct=None):
    """Gossip after the local step."""
    workers = len(c)
    w = ring(workers, share)

    def step(t, x):
        x = x - lr * gradients(x, c[:, t], h)
        if (t + 1) % every:
            return x
        z = w @ x
        for leaf in correct or ():
            wanted = w @ np.var(x[:, leaf], axis=1)
            m = z[:, leaf].mean(axis=1, keepdims=True)
            got = np.var(z[:, leaf], axis=1)
            z[:, leaf] = m + np.sqrt(wanted / got)[:, None] * (z[:, leaf] - m)
        return z

    return recorded(step, all_at(x0, workers), c)
