"""The small optimizers of the papers, and the links that they are made of.

Whole optimizers take the learning rate first. Links named ``scale_by_`` are the same
without it. ``cautious``, ``grams``, ``project_radial`` and ``norm_preserving`` wrap an
optimizer; ``mars``, ``multi_momentum``, ``norm_loss`` and ``spectral_regularisation``
stand before one.
"""

from optax_avg.optimizers.accelerated import UDogState, u_dog
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
from optax_avg.optimizers.hessian_diagonals import (
    AdaHessianState,
    adahessian,
    scale_by_adahessian,
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
from optax_avg.optimizers.polyak_steps import (
    PolyakState,
    SplState,
    preconditioned_polyak,
    spl_plus,
)
from optax_avg.optimizers.projections import adamp, project_radial, sgdp
from optax_avg.optimizers.signs import cautious, grams
from optax_avg.optimizers.variance import (
    ClusterState,
    MarsState,
    mars,
    multi_momentum,
)
from optax_avg.optimizers.weight_norms import (
    NormPreservingState,
    SpectralState,
    norm_loss,
    norm_preserving,
    spectral_regularisation,
)

__all__ = [
    "AdaHessianState",
    "AdamomentumState",
    "AggregatedState",
    "ClusterState",
    "FrictionState",
    "GravityState",
    "MarsState",
    "NagGsState",
    "NormPreservingState",
    "OptimisticState",
    "PolyakState",
    "SpectralState",
    "SplState",
    "UDogState",
    "adahessian",
    "adamomentum",
    "adamp",
    "aggregated_momentum",
    "cautious",
    "diffgrad",
    "grams",
    "gravity",
    "laprop",
    "mars",
    "multi_momentum",
    "nag_gs",
    "norm_loss",
    "norm_preserving",
    "optimistic_amsgrad",
    "preconditioned_polyak",
    "project_radial",
    "scale_by_adahessian",
    "scale_by_adamomentum",
    "scale_by_aggregated_momentum",
    "scale_by_diffgrad",
    "scale_by_laprop",
    "sgdp",
    "spectral_regularisation",
    "spl_plus",
    "u_dog",
]
