"""Robust locations of gradients over iterations, examples, workers and objectives."""
