"""Averages chosen after training, from snapshots of others.

:func:`coefficients` and :func:`coefficients_of_profiles` say which combination of
averages is the one that was not kept; :class:`SnapshotStore` keeps snapshots on disk
and combines them (``pip install "optax_avg[posthoc]"``).
"""

from optax_avg.posthoc._plan import Part, Plan
from optax_avg.posthoc._profiles import (
    Coefficients,
    coefficients,
    coefficients_of_profiles,
)
from optax_avg.posthoc.selection import swad_window
from optax_avg.posthoc.store import SnapshotStore
from optax_avg.weights import gamma_from_sigma_rel, sigma_rel_from_gamma

__all__ = [
    "Coefficients",
    "Part",
    "Plan",
    "SnapshotStore",
    "coefficients",
    "coefficients_of_profiles",
    "gamma_from_sigma_rel",
    "sigma_rel_from_gamma",
    "swad_window",
]
