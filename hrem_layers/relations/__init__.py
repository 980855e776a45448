"""The graph over the samples of a batch (paper, section 3.3): who is connected, A, and how relevant they are, S.

``dense.py`` holds it as matrices over all nodes, with the pure functions that its blocks are made with; ``sparse.py``
as neighbour lists, and ``neighbors.py`` finds those a chunk of rows at a time.
"""

from hrem_layers.relations.dense import (
    BLOCKS,
    Candidates,
    Cosines,
    RelationBlock,
    RelationGraph,
    check_cosines,
    check_graph,
    distance_relevance,
    guide_divergence,
    nearest,
    pair_cosines,
    row_divergence,
)
from hrem_layers.relations.sparse import AnyGraph, SparseRelationBlock, SparseRelationGraph, check_any_graph

__all__ = [
    "BLOCKS",
    "AnyGraph",
    "Candidates",
    "Cosines",
    "RelationBlock",
    "RelationGraph",
    "SparseRelationBlock",
    "SparseRelationGraph",
    "check_any_graph",
    "check_cosines",
    "check_graph",
    "distance_relevance",
    "guide_divergence",
    "nearest",
    "pair_cosines",
    "row_divergence",
]
