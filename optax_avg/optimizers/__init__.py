"""Small optimizers of the papers: compressed gradients, and a posterior around SAM.

Compressed gradients of workers
    error_feedback      EF, EF21 and EControl
    identity, top_k, random_k, sign, low_rank       what the workers send
    bytes_sent          how many bytes that is
    Compressor, ErrorFeedbackState

A posterior around SAM
    bsam, posterior_variance, BayesState
"""

from optax_avg.optimizers.bayes import BayesState, bsam, posterior_variance
from optax_avg.optimizers.compressors import (
    Compressor,
    bytes_sent,
    identity,
    low_rank,
    random_k,
    sign,
    top_k,
)
from optax_avg.optimizers.feedback import ErrorFeedbackState, error_feedback

__all__ = [
    "BayesState",
    "Compressor",
    "ErrorFeedbackState",
    "bsam",
    "bytes_sent",
    "error_feedback",
    "identity",
    "low_rank",
    "posterior_variance",
    "random_k",
    "sign",
    "top_k",
]
