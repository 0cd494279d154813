"""Slow, obvious float64 NumPy references of the sharpness family.

A point is one flat vector; ``SLICES`` says where its leaves begin and end. Each
reference is a function ``(g, a, x, memory, step) -> (result, memory)`` of the gradient
functions ``g`` of the loss and ``a`` of what is ascended on, with ``memory`` None
before the first step.
"""

import numpy as np

SHAPES = {"bias": (3,), "norm": (2,), "weight": (3, 2)}
EDGES = np.cumsum([0] + [int(np.prod(shape)) for shape in SHAPES.values()])
SLICES = {
    name: slice(a, b) for name, a, b in zip(SHAPES, EDGES[:-1], EDGES[1:], strict=True)
}
SIZE = int(EDGES[-1])


def problem(seed=0):
    """A smooth function that is no quadratic: matrix, frequencies, quartic weights."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(SIZE, SIZE))
    return root @ root.T / SIZE, rng.uniform(0.5, 2, SIZE), rng.uniform(0.1, 1, SIZE)


def gradient(x, matrix, frequency, quartic):
    """Of ``x'Ax/2 + sum cos(c x) + sum q x^4/4``."""
    return matrix @ x - frequency * np.sin(frequency * x) + quartic * x**3


def hessian(x, matrix, frequency, quartic):
    diagonal = 3 * quartic * x**2 - frequency**2 * np.cos(frequency * x)
    return matrix + np.diag(diagonal)


def unit(v):
    n = np.linalg.norm(v)
    return v / n if n > 0 else 0 * v


def orthogonal(v, w):
    n = w @ w
    return v - (v @ w) / n * w if n > 0 else v


def only(v, names):
    kept = np.zeros_like(v)
    for name in names:
        kept[SLICES[name]] = v[SLICES[name]]
    return kept


def plain(offset):
    """The gradient at ``x + offset(a0, x)``."""
    return lambda g, a, x, memory, step: (g(x + offset(a(x), x)), None)


def sam(rho):
    return plain(lambda g0, x: rho * unit(g0))


def usam(rho):
    return plain(lambda g0, x: rho * g0)


def dnsam(rho, norm):
    return plain(lambda g0, x: rho * g0 / norm)


def with_metric(rho, metric):
    def offset(g0, x):
        t = metric(g0, x)
        return rho * t**2 * g0 / np.linalg.norm(t * g0)

    return plain(offset)


def asam(rho, eta):
    return with_metric(rho, lambda g0, x: np.abs(x) + eta)


def fisher_sam(rho, eta):
    def offset(g0, x):
        f = 1 / (1 + eta * g0**2)
        return rho * f * g0 / np.sqrt(g0 @ (f * g0))

    return plain(offset)


def sam_on(rho):
    return plain(lambda g0, x: rho * unit(only(g0, ["norm"])))


def by_leaf(rho):
    """AdaSAP: a radius and a norm for every leaf."""

    def offset(g0, x):
        d = np.zeros_like(g0)
        for name, part in SLICES.items():
            d[part] = rho[name] * unit(g0[part])
        return d

    return plain(offset)


def by_row(rho):
    """PamaCF: a norm for every row of a matrix."""

    def offset(g0, x):
        d = np.zeros_like(g0)
        for name, part in SLICES.items():
            v = g0[part].reshape(SHAPES[name])
            rows = [unit(row) for row in v] if v.ndim > 1 else [unit(v)]
            d[part] = rho * np.concatenate(rows)
        return d

    return plain(offset)


def awp(gamma):
    def offset(g0, x):
        d = np.zeros_like(g0)
        part = SLICES["weight"]
        d[part] = gamma * np.linalg.norm(x[part]) * unit(g0[part])
        return d

    return plain(offset)


def amp(epsilon, eta, steps):
    def step(g, a, x, memory, step):
        d = np.zeros_like(x)
        for _ in range(steps):
            d = d + eta * a(x + d)
            n = np.linalg.norm(d)
            if n > epsilon:
                d = d * epsilon / n
        return g(x + d), None

    return step


def fsam(rho, sparsity, refresh):
    def step(g, a, x, memory, step):
        a0 = a(x)
        mask = np.ones_like(x) if memory is None else memory
        result = g(x + rho * unit(mask * a0))
        if step % refresh == 0:
            mask = np.ones_like(x)
            mask[np.argsort(a0**2, kind="stable")[: int(sparsity * len(x))]] = 0
        return result, mask

    return step


def gsam(rho, alpha):
    def step(g, a, x, memory, step):
        gd = g(x + rho * unit(a(x)))
        return gd - alpha * orthogonal(g(x), gd), None

    return step


def mixed(rho, alpha):
    """GNP; WSAM with ``alpha = gamma/(1 - gamma)``."""

    def step(g, a, x, memory, step):
        return (1 - alpha) * g(x) + alpha * g(x + rho * unit(a(x))), None

    return step


def gradient_regularisation(gamma, epsilon, scheme):
    def step(g, a, x, memory, step):
        g0, a0 = g(x), a(x)
        ahead, behind = g(x + epsilon * a0), g(x - epsilon * a0)
        difference = {
            "forward": (ahead - g0) / epsilon,
            "backward": (g0 - behind) / epsilon,
            "central": (ahead - behind) / (2 * epsilon),
        }
        return g0 + gamma * difference[scheme], None

    return step


def cr_sam(rho, gamma, beta):
    def step(g, a, x, memory, step):
        g0, d = g(x), rho * unit(a(x))
        gw, gb = g(x + d), g(x - d)
        return gw + gamma * (gw + gb - 2 * g0) + beta * (gw - gb), None

    return step


def vasso(rho, theta):
    def step(g, a, x, memory, step):
        a0 = a(x)
        m = a0 if memory is None else (1 - theta) * memory + theta * a0
        return g(x + rho * unit(m)), m

    return step


def friendly_sam(rho, sigma, decay):
    def step(g, a, x, memory, step):
        a0 = a(x)
        if memory is None:
            return g(x + rho * unit(a0)), a0
        result = g(x + rho * unit(a0 - sigma * memory))
        return result, decay * memory + (1 - decay) * a0

    return step


def look_sam(rho, k, alpha):
    def step(g, a, x, memory, step):
        g0 = g(x)
        if step % k == 0:
            gd = g(x + rho * unit(a(x)))
            return gd, orthogonal(gd, g0)
        return g0 + alpha * np.linalg.norm(g0) * unit(memory), memory

    return step


def every_k(rho, k):
    def step(g, a, x, memory, step):
        return (g(x + rho * unit(a(x))) if step % k == 0 else g(x)), None

    return step


def momentum_sam(rho, mu):
    def step(g, a, x, memory, step):
        v = np.zeros_like(x) if memory is None else memory
        gd = g(x - rho * unit(v))
        return gd, mu * v + gd

    return step


def gam(rho, rho_prime, alpha, beta, gamma, decomposition="paper"):
    def step(g, a, x, memory, step):
        first = x + rho_prime * unit(a(x))
        second = x + rho * unit(a(first) - a(x))
        third = second + rho_prime * unit(a(second))
        g0, g1, g2, g3 = g(x), g(first), g(second), g(third)
        plus = alpha * g1 + (1 - alpha) * g3
        minus = beta * g0 + (1 - beta) * g2
        if decomposition == "reference":
            minus = g0 + abs(1 - beta) * g2
        return plus - gamma * orthogonal(minus, plus), None

    return step
