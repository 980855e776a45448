"""Relation modelling among the images and texts of a batch, for image-text retrieval (HREM, CVPR 2023).

In the order in which data flows: :class:`FragmentRelation`, :class:`AssociationGraph`,
:class:`RelationInteraction`, :class:`HREMLoss`, with :class:`NeighborBatchSampler` beside them.
"""

from hrem_layers.alignment import align_fragments
from hrem_layers.fragments import FragmentRelation
from hrem_layers.graph import AssociationGraph
from hrem_layers.interaction import RelationInteraction
from hrem_layers.loss import HREMLoss, HREMTerms
from hrem_layers.losses import InfoNCELoss, TripletLoss
from hrem_layers.relations import RelationGraph
from hrem_layers.retrieval import (
    DirectionMetrics,
    RetrievalMetrics,
    retrieval_metrics,
    retrieval_metrics_from_similarity,
)
from hrem_layers.sampler import NeighborBatchSampler

__version__ = "0.1.0"

__all__ = [
    "AssociationGraph",
    "DirectionMetrics",
    "FragmentRelation",
    "HREMLoss",
    "HREMTerms",
    "InfoNCELoss",
    "NeighborBatchSampler",
    "RelationGraph",
    "RelationInteraction",
    "RetrievalMetrics",
    "TripletLoss",
    "align_fragments",
    "retrieval_metrics",
    "retrieval_metrics_from_similarity",
]
