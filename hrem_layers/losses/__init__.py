"""Pair losses: callables ``(similarity, positives) -> scalar`` that HREMLoss applies to its four similarities.

Each is a module over a function of the same options, and the ways of choosing negatives are functions too. Each also
starts from embeddings, with ``loss.from_embeddings`` or a ``streamed_`` function: then the similarity is never whole.
"""

from hrem_layers.losses.infonce import InfoNCELoss, info_nce_loss, streamed_info_nce_loss
from hrem_layers.losses.negatives import (
    distance_log_weights,
    distance_weighted_negative,
    every_negative_weights,
    expected_negative_weights,
    hardest_negative,
)
from hrem_layers.losses.sigmoid import SigmoidLoss, sigmoid_loss, streamed_sigmoid_loss
from hrem_layers.losses.triplet import TripletLoss, streamed_triplet_loss, triplet_loss

__all__ = [
    "InfoNCELoss",
    "SigmoidLoss",
    "TripletLoss",
    "distance_log_weights",
    "distance_weighted_negative",
    "every_negative_weights",
    "expected_negative_weights",
    "hardest_negative",
    "info_nce_loss",
    "sigmoid_loss",
    "streamed_info_nce_loss",
    "streamed_sigmoid_loss",
    "streamed_triplet_loss",
    "triplet_loss",
]
