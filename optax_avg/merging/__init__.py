"""Merges of finished models into one.

    x = x_0 + sum_t C_t (x_t - x_0)

Every leaf is merged by itself, so checkpoints larger than memory can be merged. Sums
are float32 or wider. Results have the dtypes of the first model, and leaves that are
not floating point come from it. A zero that all models share, as in a pruning mask,
stays zero.
"""

from optax_avg.merging.basin import permute
from optax_avg.merging.curvature import fisher, gradient_matching, squared_gradients
from optax_avg.merging.soups import (
    Soup,
    cooldown,
    dawin,
    diwa,
    greedy_soup,
    uniform,
    variance_corrected,
    weighted,
    wise_ft,
)
from optax_avg.merging.spheres import karcher, slerp
from optax_avg.merging.task_vectors import dare, model_stock, task_arithmetic, ties

__all__ = [
    "Soup",
    "cooldown",
    "dare",
    "dawin",
    "diwa",
    "fisher",
    "gradient_matching",
    "greedy_soup",
    "karcher",
    "model_stock",
    "permute",
    "slerp",
    "squared_gradients",
    "task_arithmetic",
    "ties",
    "uniform",
    "variance_corrected",
    "weighted",
    "wise_ft",
]
