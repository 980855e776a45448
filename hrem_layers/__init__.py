"""Relation modelling among the images and texts of a batch, for image-text retrieval (HREM, CVPR 2023).

In the order in which data flows: :class:`FragmentRelation`, :class:`AssociationGraph`,
:class:`RelationInteraction`, :class:`HREMLoss`, with :class:`NeighborBatchSampler` beside them.
"""

from hrem_layers._core.exchange import ALONE, Exchange
from hrem_layers._core.transformer import TransformerLayer
from hrem_layers.alignment import Scores, align_fragments
from hrem_layers.fragments import FragmentRelation
from hrem_layers.graph import AssociationGraph
from hrem_layers.interaction import RelationInteraction
from hrem_layers.loss import HREMLoss, HREMTerms, Relations
from hrem_layers.losses import InfoNCELoss, SigmoidLoss, TripletLoss
from hrem_layers.relations import Candidates, Cosines, RelationBlock, RelationGraph, pair_cosines
from hrem_layers.retrieval import (
    DirectionMetrics,
    RetrievalMetrics,
    retrieval_metrics,
    retrieval_metrics_from_similarity,
)
from hrem_layers.sampler import NeighborBatchSampler
from hrem_layers.sparse import SparseRelationBlock, SparseRelationGraph

__version__ = "0.1.0"

__all__ = [
    "ALONE",
    "AssociationGraph",
    "Candidates",
    "Cosines",
    "DirectionMetrics",
    "Exchange",
    "FragmentRelation",
    "HREMLoss",
    "HREMTerms",
    "InfoNCELoss",
    "NeighborBatchSampler",
    "RelationBlock",
    "RelationGraph",
    "RelationInteraction",
    "Relations",
    "RetrievalMetrics",
    "Scores",
    "SigmoidLoss",
    "SparseRelationBlock",
    "SparseRelationGraph",
    "TransformerLayer",
    "TripletLoss",
    "align_fragments",
    "pair_cosines",
    "retrieval_metrics",
    "retrieval_metrics_from_similarity",
]
