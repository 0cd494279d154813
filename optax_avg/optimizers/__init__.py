"""The optimizers, constraints and penalties of single papers, each as a link.

Whole optimizers take the learning rate first. Constraints are wrappers of an inner
transformation, penalties are links that stand before one.
"""

from optax_avg.optimizers.accelerated import UDogState, u_dog
from optax_avg.optimizers.hessian_diagonals import (
    AdaHessianState,
    adahessian,
    scale_by_adahessian,
)
from optax_avg.optimizers.polyak_steps import (
    PolyakState,
    SplState,
    preconditioned_polyak,
    spl_plus,
)
from optax_avg.optimizers.projections import adamp, project_radial, sgdp
from optax_avg.optimizers.weight_norms import (
    NormPreservingState,
    SpectralState,
    norm_loss,
    norm_preserving,
    spectral_regularisation,
)

__all__ = [
    "AdaHessianState",
    "NormPreservingState",
    "PolyakState",
    "SpectralState",
    "SplState",
    "UDogState",
    "adahessian",
    "adamp",
    "norm_loss",
    "norm_preserving",
    "preconditioned_polyak",
    "project_radial",
    "scale_by_adahessian",
    "sgdp",
    "spectral_regularisation",
    "spl_plus",
    "u_dog",
]
