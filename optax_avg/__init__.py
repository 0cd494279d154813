"""Averages of parameters and gradients at perturbed parameters, for Optax.

Links of an Optax chain
    averages        average, ema_params, polyak_average, swa, tail_average, power_ema,
                    lr_weighted_average, window_average, bema
    write-back      write_back, switch_ema, lookahead
    around an optimizer     primal_average (Schedule-Free, GPA), PrimalState
    their state     AverageState
    their options   AverageOptions

Reading and moving averages
    averaged_params, average_names, migrate_state
    best_average                the best of the live parameters and their averages
    summarize_averages          their widths and mean ages
    AverageSummary, BestAverage

Workers with parameters of their own
    sync_params     local steps, then a mean: local SGD, FedAvg, FedAU, DiLoCo
    gossip_params   means of neighbours on a ring
    sync_state      around the optimizer of the local steps: its state averaged or reset
    SyncState, GossipState, SyncedState

Checking the order of a chain, once before training
    check_chain

Gradients at perturbed parameters
    sharpness_aware             a drop-in for value_and_grad, from a rule
    sam, gam, ...               a rule as the first link of a chain
    multi_call, clean_params    for trainers that compute one gradient a call
    decoupled_wsam              adds the sharpness after the optimizer
    as_link, SharpnessRule, RuleState, MultiCallState, DecoupledState
    trajectory_loss             MESA's, with an average as the teacher

Robust locations of gradients over iterations
    track_location, vclip, cclip, clipped_ema, adaptive_radius
    LocationState, AdaptiveRadius

Clips that follow the norms seen so far
    clip_by_zscore, clip_by_percentile, clip_by_quantile, clip_by_coordinate_quantile,
    clip_by_ema_norm, clip_redescending
    scale_by_clipped_adagrad_norm, scale_by_induced_metric
    their state     ClipState

Robust locations across examples, micro-batches and workers (aggregators of Optax)
    coordinate_median, trimmed_mean, geometric_median, median_of_means, centered_clip,
    krum, flag_aggregator, adaptive_k_mean, one_pass_location
    their state     AggregationState

How heavy are the tails of the noise
    track_tail_index, tail_indices, TailState, TailIndices

Several objectives
    mgda, cagrad, upgrad, pcgrad    aggregators over the objectives
    bloop, perp_grad                links of a chain
    their state                     BloopState

Families of plain functions
    distances       from a gradient to its location; values for track_location
    merging         finished models into one: soups, task vectors, Fisher, spheres
    posthoc         averages chosen after training, from snapshots of others
    surgery         project_out, the one orthogonal projection
    tail_index      estimates of how heavy a tail is
    rules           the sharpness family: where to take gradients, how to combine them
    memories        what an average keeps of the iterates: running, window, corrected
    weights         w(t), the one number that tells one average from another
    schedules       learning-rate schedules that belong with averaging
    optimizers      the small optimizers of the papers, each a chain of links
    landscape       curvature, sharpness, barriers and planes of a loss
    losses          losses that leave examples out, weights of the examples of a batch
    workers         weights of workers that come and go, another number of workers
    frameworks      whole models of Flax nnx, Flax linen and Equinox
"""

from optax_avg import (
    frameworks,
    landscape,
    losses,
    merging,
    optimizers,
    posthoc,
    rules,
    schedules,
    weights,
    workers,
)
from optax_avg.averages import AverageOptions, AverageState, memories
from optax_avg.averages.links import (
    average,
    bema,
    ema_params,
    lr_weighted_average,
    polyak_average,
    power_ema,
    swa,
    tail_average,
    window_average,
)
from optax_avg.averages.migration import migrate_state
from optax_avg.averages.overview import (
    AverageSummary,
    BestAverage,
    best_average,
    summarize_averages,
)
from optax_avg.averages.primal import PrimalState, primal_average
from optax_avg.averages.readout import average_names, averaged_params
from optax_avg.averages.write_back import lookahead, switch_ema, write_back
from optax_avg.chain_check import check_chain
from optax_avg.robust import distances, surgery, tail_index
from optax_avg.robust.aggregation import (
    AggregationState,
    centered_clip,
    coordinate_median,
    flag_aggregator,
    geometric_median,
    krum,
    median_of_means,
    one_pass_location,
    trimmed_mean,
)
from optax_avg.robust.clipping import (
    ClipState,
    clip_by_coordinate_quantile,
    clip_by_ema_norm,
    clip_by_percentile,
    clip_by_quantile,
    clip_by_zscore,
    clip_redescending,
    scale_by_clipped_adagrad_norm,
    scale_by_induced_metric,
)
from optax_avg.robust.example_losses import adaptive_k_mean
from optax_avg.robust.location import (
    AdaptiveRadius,
    LocationState,
    adaptive_radius,
    cclip,
    clipped_ema,
    track_location,
    vclip,
)
from optax_avg.robust.objectives import cagrad, mgda, pcgrad, upgrad
from optax_avg.robust.surgery import BloopState, bloop, perp_grad
from optax_avg.robust.tail_index import (
    TailIndices,
    TailState,
    tail_indices,
    track_tail_index,
)
from optax_avg.sharpness import RuleState, SharpnessRule
from optax_avg.sharpness.decoupled import (
    DecoupledState,
    decoupled_wsam,
    trajectory_loss,
)
from optax_avg.sharpness.forms import SharpnessAware, as_link, sharpness_aware
from optax_avg.sharpness.links import (
    asam,
    cr_sam,
    dnsam,
    esam,
    fisher_sam,
    friendly_sam,
    gam,
    gam_hvp,
    gnp,
    gradient_regularisation,
    gsam,
    look_sam,
    momentum_sam,
    sam,
    sam_on,
    sparse_sam,
    usam,
    vasso,
    wsam,
)
from optax_avg.sharpness.multi_call import MultiCallState, clean_params, multi_call
from optax_avg.workers import (
    GossipState,
    SyncedState,
    SyncState,
    gossip_params,
    sync_params,
    sync_state,
)

__version__ = "0.1.0"

__all__ = [
    "AdaptiveRadius",
    "AggregationState",
    "AverageOptions",
    "AverageState",
    "AverageSummary",
    "BestAverage",
    "BloopState",
    "ClipState",
    "DecoupledState",
    "GossipState",
    "LocationState",
    "MultiCallState",
    "PrimalState",
    "RuleState",
    "SharpnessAware",
    "SharpnessRule",
    "SyncState",
    "SyncedState",
    "TailIndices",
    "TailState",
    "adaptive_k_mean",
    "adaptive_radius",
    "as_link",
    "asam",
    "average",
    "average_names",
    "averaged_params",
    "bema",
    "best_average",
    "bloop",
    "cagrad",
    "cclip",
    "centered_clip",
    "check_chain",
    "clean_params",
    "clip_by_coordinate_quantile",
    "clip_by_ema_norm",
    "clip_by_percentile",
    "clip_by_quantile",
    "clip_by_zscore",
    "clip_redescending",
    "clipped_ema",
    "coordinate_median",
    "cr_sam",
    "decoupled_wsam",
    "distances",
    "dnsam",
    "ema_params",
    "esam",
    "fisher_sam",
    "flag_aggregator",
    "frameworks",
    "friendly_sam",
    "gam",
    "gam_hvp",
    "geometric_median",
    "gnp",
    "gossip_params",
    "gradient_regularisation",
    "gsam",
    "krum",
    "landscape",
    "look_sam",
    "lookahead",
    "losses",
    "lr_weighted_average",
    "median_of_means",
    "memories",
    "merging",
    "mgda",
    "migrate_state",
    "momentum_sam",
    "multi_call",
    "one_pass_location",
    "optimizers",
    "pcgrad",
    "perp_grad",
    "polyak_average",
    "posthoc",
    "power_ema",
    "primal_average",
    "rules",
    "sam",
    "sam_on",
    "scale_by_clipped_adagrad_norm",
    "scale_by_induced_metric",
    "schedules",
    "sharpness_aware",
    "sparse_sam",
    "summarize_averages",
    "surgery",
    "swa",
    "switch_ema",
    "sync_params",
    "sync_state",
    "tail_average",
    "tail_index",
    "tail_indices",
    "track_location",
    "track_tail_index",
    "trajectory_loss",
    "trimmed_mean",
    "upgrad",
    "usam",
    "vasso",
    "vclip",
    "weights",
    "window_average",
    "workers",
    "write_back",
    "wsam",
]
