"""The small optimizers of the papers, each a link of an Optax chain.

Whole optimizers take the learning rate first. Links named ``scale_by_`` are the same
without it.

Adaptive step sizes
    laprop, adamomentum, diffgrad, optimistic_amsgrad, adamp, adahessian
    preconditioned_polyak, u_dog        with no learning rate to tune
Momentum
    aggregated_momentum, nag_gs, gravity, sgdp
Wrappers of an optimizer
    cautious, grams         by the signs of the gradient
    project_radial, norm_preserving     by the weights
Links before an optimizer
    mars, multi_momentum    less variance
    norm_loss, spectral_regularisation      penalties
    spl_plus                the mean of the worst losses
Compressed gradients of workers
    error_feedback          EF, EF21 and EControl
    identity, top_k, random_k, sign, low_rank       what the workers send
    bytes_sent              how many bytes that is
A posterior around SAM
    bsam, posterior_variance
"""

from optax_avg.optimizers.accelerated import (
    UDogState,
    u_dog,
)
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
from optax_avg.optimizers.bayes import (
    BayesState,
    bsam,
    posterior_variance,
)
from optax_avg.optimizers.compressors import (
    Compressor,
    bytes_sent,
    identity,
    low_rank,
    random_k,
    sign,
    top_k,
)
from optax_avg.optimizers.feedback import (
    ErrorFeedbackState,
    error_feedback,
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
from optax_avg.optimizers.optimistic import (
    OptimisticState,
    optimistic_amsgrad,
)
from optax_avg.optimizers.polyak_steps import (
    PolyakState,
    SplState,
    preconditioned_polyak,
    spl_plus,
)
from optax_avg.optimizers.projections import (
    adamp,
    project_radial,
    sgdp,
)
from optax_avg.optimizers.signs import (
    cautious,
    grams,
)
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
    "BayesState",
    "ClusterState",
    "Compressor",
    "ErrorFeedbackState",
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
    "bsam",
    "bytes_sent",
    "cautious",
    "diffgrad",
    "error_feedback",
    "grams",
    "gravity",
    "identity",
    "laprop",
    "low_rank",
    "mars",
    "multi_momentum",
    "nag_gs",
    "norm_loss",
    "norm_preserving",
    "optimistic_amsgrad",
    "posterior_variance",
    "preconditioned_polyak",
    "project_radial",
    "random_k",
    "scale_by_adahessian",
    "scale_by_adamomentum",
    "scale_by_aggregated_momentum",
    "scale_by_diffgrad",
    "scale_by_laprop",
    "sgdp",
    "sign",
    "spectral_regularisation",
    "spl_plus",
    "top_k",
    "u_dog",
]
