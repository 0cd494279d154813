"""Averages of the parameters, ``avg += w(t) (x_t - avg)``."""

from optax_avg.averages._options import AverageOptions
from optax_avg.averages._rule import AverageState

__all__ = ["AverageOptions", "AverageState"]
