"""Which nodes stand in the lists of a sparse graph, and how relevant those of the own modality are.

Each process finds and weighs the lists of its own rows among the rows of all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hrem_layers._core.exchange import Alone, Exchange
from hrem_layers._core.recompute import recompute
from hrem_layers.relations.neighbors import edge_cosines, exact_units, nearest_rows
from hrem_layers.relations.sparse import SparseRelationBlock


class Lists(NamedTuple):
    """Of each row its nearest nodes of a block by the cosine of the embeddings, (rows, K), columns counted from 0."""

    i2i: Tensor
    i2t: Tensor
    t2i: Tensor
    t2t: Tensor


def find_lists(
    image_embedding: Tensor,
    text_embedding: Tensor,
    k: int,
    neighbors: Callable[[int], int],
    exchange: Exchange,
    *,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> Lists:
    """At most ``k`` nodes each: within a modality of c nodes at most ``neighbors(c)``; across, all k candidates.

    ``dtypes``: what ties is judged in, within and across.
    """
    alone = isinstance(exchange, Alone)
    v, u = image_embedding.detach(), text_embedding.detach()

    def search(own: Tensor, other: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Units of own rows, of a side and of the other one: the nearest to both among all of the first. Over several
        processes these are there in float64 for one side at a time."""
        units, count = own if alone else exact_units(embedding), embedding.shape[0]
        near = nearest_rows(own, units, min(k, neighbors(count)), dtypes[0])
        return near, nearest_rows(other, units, min(k, count), dtypes[1])

    own_images = exact_units(v[exchange.own("image", v.shape[0])])
    own_texts = exact_units(u[exchange.own("text", u.shape[0])])
    i2i, t2i = search(own_images, own_texts, v)
    t2t, i2t = search(own_texts, own_images, u)
    return Lists(i2i, i2t, t2i, t2t)


def block_within(
    side: str, embedding: Tensor, index: Tensor, exchange: Exchange, relevance: Callable[[Tensor], Tensor]
) -> SparseRelationBlock:
    """The block of images (``side`` "image") or texts among themselves: an edge to every node of the lists, weighed by
    ``relevance`` of the cosines (rows, K). These are computed again in backward."""

    def weigh(own: Tensor) -> Tensor:
        units = everyone = exact_units(own)
        if not isinstance(exchange, Alone):
            everyone = exchange.share_rows(side, units, exact_units(embedding.detach()))
        return relevance(edge_cosines(units, everyone, index))

    weighed = recompute(weigh, exchange.own_rows(side, embedding))
    return SparseRelationBlock(index, weighed, torch.ones_like(index, dtype=torch.bool), embedding.shape[0])
