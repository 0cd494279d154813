"""Averages chosen after training, from snapshots of others.

:func:`coefficients` and :func:`coefficients_of_profiles` say which combination of
averages is closest to one that was not kept. :class:`SnapshotStore` keeps snapshots on
disk and combines them (``pip install "optax_avg[posthoc]"``). :func:`stream_average`
combines them a few leaves at a time, and :func:`summarize_store` says what is there.
"""

from optax_avg.posthoc._plan import Part, Plan
from optax_avg.posthoc._profiles import (
    Coefficients,
    Normalization,
    coefficients,
    coefficients_of_profiles,
)
from optax_avg.posthoc._records import NoSnapshotError
from optax_avg.posthoc.inspection import (
    AverageSummary,
    StoreSummary,
    is_store,
    summarize_average,
    summarize_store,
    swad_window,
)
from optax_avg.posthoc.store import SnapshotStore
from optax_avg.posthoc.streaming import Stream, stream_average
from optax_avg.weights import gamma_from_sigma_rel, sigma_rel_from_gamma

__all__ = [
    "AverageSummary",
    "Coefficients",
    "NoSnapshotError",
    "Normalization",
    "Part",
    "Plan",
    "SnapshotStore",
    "StoreSummary",
    "Stream",
    "coefficients",
    "coefficients_of_profiles",
    "gamma_from_sigma_rel",
    "is_store",
    "sigma_rel_from_gamma",
    "stream_average",
    "summarize_average",
    "summarize_store",
    "swad_window",
]
