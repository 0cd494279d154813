"""The small optimizers of the papers, and the links that they are made of.

Whole optimizers take the learning rate first. Links named ``scale_by_`` are the same
without it. ``cautious`` and ``grams`` wrap an optimizer; ``mars`` and
``multi_momentum`` stand before one.
"""

from optax_avg.optimizers.adaptive import (
    AdamomentumState,
    FrictionState,
    adamomentum,
    diffgrad,
    laprop,
    scale_by_adamomentum,
    scale_by_diffgrad,
    scale_by_laprop,
)
from optax_avg.optimizers.momenta import (
    AggregatedState,
    GravityState,
    NagGsState,
    aggregated_momentum,
    gravity,
    nag_gs,
    scale_by_aggregated_momentum,
)
from optax_avg.optimizers.optimistic import OptimisticState, optimistic_amsgrad
from optax_avg.optimizers.signs import cautious, grams
from optax_avg.optimizers.variance import (
    ClusterState,
    MarsState,
    mars,
    multi_momentum,
)

__all__ = [
    "AdamomentumState",
    "AggregatedState",
    "ClusterState",
    "FrictionState",
    "GravityState",
    "MarsState",
    "NagGsState",
    "OptimisticState",
    "adamomentum",
    "aggregated_momentum",
    "cautious",
    "diffgrad",
    "grams",
    "gravity",
    "laprop",
    "mars",
    "multi_momentum",
    "nag_gs",
    "optimistic_amsgrad",
    "scale_by_adamomentum",
    "scale_by_aggregated_momentum",
    "scale_by_diffgrad",
    "scale_by_laprop",
]
