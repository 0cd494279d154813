"""Robust locations of gradients over iterations, examples, workers and objectives."""

from optax_avg.robust._gradients import NotStackedError

__all__ = ["NotStackedError"]
