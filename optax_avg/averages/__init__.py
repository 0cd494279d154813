"""Averages of the parameters, ``avg += w(t) (x_t - avg)``."""
