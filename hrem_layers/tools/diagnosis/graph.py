"""A graph that connects nobody or everybody, and relevance that is the same for all."""

from __future__ import annotations

import torch
from torch import Tensor

from hrem_layers.loss import HREMLoss
from hrem_layers.relations import BLOCKS, RelationBlock, RelationGraph
from hrem_layers.tools.diagnosis.findings import Finding
from hrem_layers.tools.diagnosis.observed import Observed

FULL = 0.95
"""Share of the other nodes."""
FEW = 2.0
"""Edges per node to others, in all."""
ENOUGH_NODES = 4
"""Of a block's columns: with fewer, few neighbours are many."""
FLAT = 0.005
"""Spread of λ·S on a row's edges: it changes attention by half a per cent."""


def look_at_graph(loss: HREMLoss, seen: Observed) -> list[Finding]:
    if seen.graph is None:
        return []
    graph = seen.graph
    return [*_edges(graph), *_relevance(graph, float(getattr(loss.interaction, "relation_weight", 1.0)))]


def _edges(graph: RelationGraph) -> list[Finding]:
    blocks = {name: graph.block(name) for name in BLOCKS}
    others = {name: _to_others(name, block) for name, block in blocks.items()}
    per_node = {name: float(edges.sum()) / max(edges.shape[0], 1) for name, edges in others.items()}
    possible = {name: max(edges.shape[1] - (name[0] == name[2]), 1) for name, edges in others.items()}
    large = [name for name in BLOCKS if others[name].shape[1] >= ENOUGH_NODES]
    found = []
    nodes = graph.connection.shape[0]
    total = sum(float(edges.sum()) for edges in others.values()) / max(nodes, 1)
    bare = [name for name in large if per_node[name] < 0.5]
    if large and (total < FEW or bare):
        seen = f"A node has {total:.2g} edges to others on average, of {nodes - 1} possible ({_said(per_node)})."
        remedy = (
            "Enhanced embeddings are then those of single samples. Raise neighbor_ratio, or candidates; with "
            "exclude_positives the batch must hold other images; a graph of your own should connect "
            "every node to others."
        )
        found.append(Finding("graph nearly empty", seen, remedy))
    crowded = [name for name in large if per_node[name] > FULL * possible[name]]
    if crowded:
        share = {name: 100 * per_node[name] / possible[name] for name in crowded}
        seen = f"Of the possible edges there are {_said(share, '%')}."
        remedy = (
            "Nobody is chosen, and each sample gets the same mixture. Lower neighbor_ratio (0.5 is "
            "the release's). If it is "
            "low already, nodes tie: embeddings or fragments are equal, look at collapsed embeddings and at the masks."
        )
        found.append(Finding("graph nearly full", seen, remedy))
    return found


def _to_others(name: str, block: RelationBlock) -> Tensor:
    edges = block.connection
    return edges & ~torch.eye(edges.shape[0], dtype=torch.bool, device=edges.device) if name[0] == name[2] else edges


def _relevance(graph: RelationGraph, weight: float) -> list[Finding]:
    """Per block the mean over rows of the standard deviation on the edges to others."""
    spread = {}
    for name in BLOCKS:
        block = graph.block(name)
        edges = _to_others(name, block)
        value = _spread(abs(weight) * block.relevance.float(), edges)
        if value is not None and value < FLAT:
            spread[name] = value
    if not spread:
        return []
    if weight == 0:
        seen = "relation_weight is 0: relevance is not looked at."
        remedy = (
            "Give RelationInteraction a relation_weight (1 is the default), or regularization_weight=0 to save L_reg."
        )
    else:
        seen = f"On the edges of a node, relation_weight · S varies by {_said(spread)} (standard deviation)."
        remedy = (
            "Attention then weighs all neighbours alike. Blocks i2i and t2t: S = "
            "exp(−distance/sigma), so choose sigma near "
            "the distance of neighbours (larger and smaller ones flatten it), or the embeddings are "
            "equally far from each "
            "other. Blocks i2t and t2i: the fragments of a sample are alike, or the masks are wrong. "
            "Or raise relation_weight."
        )
    return [Finding("flat relevance", seen, remedy)]


def _spread(values: Tensor, edges: Tensor) -> float | None:
    count = edges.sum(dim=1)
    chosen = torch.where(edges, values, 0)
    mean = chosen.sum(dim=1) / count.clamp(min=1)
    square = torch.where(edges, (values - mean.unsqueeze(1)).square(), 0).sum(dim=1)
    enough = count >= 2
    if not bool(enough.any()):
        return None
    return float((square / count.clamp(min=1)).sqrt()[enough].mean())


def _said(values: dict[str, float], unit: str = "") -> str:
    digits = ".0f" if unit else ".2g"
    return ", ".join(f"{value:{digits}}{unit} in {name}" for name, value in values.items())
