"""Workers that train on their own between means of their parameters.

``oa.sync_params``, ``oa.gossip_params`` and ``oa.sync_state`` are the transformations.
"""

from optax_avg.workers.gossip import GossipState, gossip_params
from optax_avg.workers.participation import FedAUState, Participation, fedau
from optax_avg.workers.states import SyncedState, resize, sync_state
from optax_avg.workers.sync import SyncState, sync_params

__all__ = [
    "FedAUState",
    "GossipState",
    "Participation",
    "SyncState",
    "SyncedState",
    "fedau",
    "gossip_params",
    "resize",
    "sync_params",
    "sync_state",
]
