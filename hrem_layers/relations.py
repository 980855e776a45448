"""What the graph hands to the attention: connection and relevance, with names for their blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hrem_layers._core.checks import check_bool_tensor, check_choice, check_tensor

BLOCKS = ("i2i", "i2t", "t2i", "t2t")


class RelationGraph(NamedTuple):
    """A graph over N images and N texts, images first: ``[[I→I, I→T], [T→I, T→T]]``.

    The row is the node that receives: in block ``"i2t"`` row i says which texts image i attends to.
    """

    connection: Tensor
    """A: (2N, 2N) bool, True = edge."""
    relevance: Tensor
    """S: (2N, 2N) float; only its values on edges count."""

    def block(self, name: str) -> RelationGraph:
        """One of the four blocks, ``"i2i"``, ``"i2t"``, ``"t2i"``, ``"t2t"``, of both: (N, N) each."""
        check_choice("name", name, BLOCKS)
        n = self.connection.shape[0] // 2
        rows, columns = (slice(None, n) if side == "i" else slice(n, None) for side in (name[0], name[2]))
        return RelationGraph(self.connection[rows, columns], self.relevance[rows, columns])

    def attention_bias(self, relation_weight: float) -> Tensor:
        """``relation_weight · S`` on edges, −inf elsewhere; weight 0 gives 0 on edges. Shape and dtype of S."""
        return torch.where(self.connection, relation_weight * self.relevance, -torch.inf)


def check_graph(graph: object, nodes: int, device: torch.device) -> None:
    """Raises TypeError or ValueError unless this is a RelationGraph over ``nodes`` nodes on ``device``."""
    if not isinstance(graph, RelationGraph):
        raise TypeError(f"graph must be a RelationGraph, got {type(graph).__name__}")
    check_bool_tensor("graph.connection", graph.connection, (nodes, nodes), device=device)
    check_tensor("graph.relevance", graph.relevance, (nodes, nodes), device=device)
