"""Robust locations of gradients over iterations, examples, workers and objectives."""

from optax_avg.robust._stack import NotStackedError

__all__ = ["NotStackedError"]
