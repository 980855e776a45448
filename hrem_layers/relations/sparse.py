"""The graph as neighbour lists: of each node the few it attends to, and nothing that is as large as all pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hrem_layers._core.batch import PairIds, pairs_at
from hrem_layers._core.checks import (
    check_bool_tensor,
    check_choice,
    check_index_tensor,
    check_int,
    check_tensor,
)
from hrem_layers._core.exchange import ALONE, Exchange, Rows, check_exchange
from hrem_layers._core.neighbors import NeighborBias
from hrem_layers._core.numerics import compute_dtype
from hrem_layers.relations.dense import (
    BLOCKS,
    Candidates,
    RelationBlock,
    RelationGraph,
    check_count,
    check_graph,
    distance_relevance,
    edge_bias,
    row_divergence,
)
from hrem_layers.relations.neighbors import edge_cosines, exact_units


class SparseRelationBlock(NamedTuple):
    """One of the four blocks of a :class:`SparseRelationGraph`: rows receive, ``columns`` nodes give.

    Example:
        >>> index, connection = torch.tensor([[2, 0]]), torch.tensor([[True, False]])
        >>> block = SparseRelationBlock(index, torch.tensor([[0.5, 0.9]]), connection, columns=3)
        >>> block.dense().connection
        tensor([[False, False,  True]])
    """

    index: Tensor  # type: ignore[assignment]  # tuple has a method of this name, of no use here
    """(rows, K) int64 in [0, columns); −1 = no node."""
    relevance: Tensor
    """(rows, K) float; only its values on edges count."""
    connection: Tensor
    """(rows, K) bool, True = edge."""
    columns: int

    def dense(self) -> RelationBlock:
        """The (rows, columns) matrices; relevance 0 at nodes that are in no list."""
        return RelationBlock(
            _scatter(self.connection, self.index, self.columns), _scatter(self.relevance, self.index, self.columns)
        )

    def attention_bias(self, relation_weight: float) -> NeighborBias:
        """``relation_weight · S`` on edges, −inf elsewhere, with the nodes that it is for."""
        rows, nodes = (Rows(ALONE, (("image", count),)) for count in (self.index.shape[0], self.columns))
        return _neighbor_bias(self.index, self.relevance, self.connection, relation_weight, rows, nodes)


class SparseRelationGraph(NamedTuple):
    """A graph over N images and M texts, images first, in which each node has at most K neighbours.

    What :class:`RelationGraph` holds in (N + M, N + M) matrices, in (N + M, K) lists; :meth:`dense` gives those. The
    first ``within`` places of a row are for nodes of its own modality, the others for those of the other one. Both
    parts are filled from the front, and no node stands twice in a row.

    Example:
        >>> v, u = torch.randn(6, 64), torch.randn(6, 64)
        >>> graph = AssociationGraph(candidates=2)(v, u, torch.randn(6, 36, 64), torch.randn(6, 12, 64))
        >>> graph.index.shape, graph.block("i2t").relevance.shape
        (torch.Size([12, 4]), torch.Size([6, 2]))
        >>> graph.dense().connection.shape
        torch.Size([12, 12])
    """

    index: Tensor  # type: ignore[assignment]
    """(N + M, K) int64, numbers of nodes in [0, N + M); −1 = no node."""
    relevance: Tensor
    """S: (N + M, K) float; only its values on edges count, and across the modalities in L_reg."""
    connection: Tensor
    """A: (N + M, K) bool, True = edge. A node without an edge in the places across is a candidate alone."""
    num_images: int
    """N."""
    within: int
    """How many of the K places are for nodes of the own modality."""
    excluded: Tensor | PairIds | None = None
    """Pairs that must not see each other, not over a third node either: (N, M) bool, or equal ids; None = none."""
    num_texts: int | None = None
    """M; None = all rows that are not images."""
    exchange: Exchange | None = None
    """Only this process's rows of images and of texts are here, among those of the exchange; None = all rows."""

    def rows(self, sides: str = "it") -> Rows:
        """How the rows of images (``"i"``), texts (``"t"``) or both lie over the processes."""
        names = {"i": "image", "t": "text"}
        return Rows(self.exchange or ALONE, tuple((names[side], self.total(side)) for side in sides))

    def whole(self) -> SparseRelationGraph:
        """With the rows of all processes."""
        if self.exchange is None:
            return self
        index, relevance, connection = (torch.cat(self.rows().collect(x)) for x in self[:3])
        return SparseRelationGraph(index, relevance, connection, *self[3:6], self.num_texts)

    def total(self, side: str) -> int:
        """Images (``"i"``) or texts (``"t"``) of all processes. (As much as the total of :meth:`rows`, which the
        compiler of PyTorch 2.5 cannot trace.)"""
        if side == "i":
            return self.num_images
        return self.index.shape[0] - self.num_images if self.num_texts is None else self.num_texts

    @property
    def candidates(self) -> Candidates:
        """The pairs across the modalities that S knows."""
        return Candidates(self.block("i2t").index, self.block("t2i").index)

    def block(self, name: str) -> SparseRelationBlock:
        """One of the four blocks, ``"i2i"``, ``"i2t"``, ``"t2i"``, ``"t2t"``; its columns count from 0.

        Raises:
            ValueError: another name.
        """
        check_choice("name", name, BLOCKS)
        n = self.num_images
        here = n if self.exchange is None else self.rows("i").here
        rows = slice(None, here) if name[0] == "i" else slice(here, None)
        first, columns = (0, n) if name[2] == "i" else (n, self.total("t"))
        places = slice(None, self.within) if name[0] == name[2] else slice(self.within, None)
        index, relevance, connection = (x[rows, places] for x in self[:3])
        width = min(index.shape[1], columns)  # what no row can fill
        index = index[:, :width]
        return SparseRelationBlock(
            torch.where(index < 0, index, index - first), relevance[:, :width], connection[:, :width], columns
        )

    def dense(self) -> RelationGraph:
        """The same graph as (N + M, N + M) matrices; relevance 0 at nodes that are in no list."""
        graph, excluded = self.whole(), self.excluded
        nodes = graph.index.shape[0]
        return RelationGraph(
            _scatter(graph.connection, graph.index, nodes),
            _scatter(graph.relevance, graph.index, nodes),
            graph.num_images,
            graph.candidates,
            excluded.matrix() if isinstance(excluded, PairIds) else excluded,
        )

    def attention_bias(self, relation_weight: float) -> NeighborBias:
        """``relation_weight · S`` on edges, −inf elsewhere, with the nodes that it is for."""
        rows = self.rows()
        return _neighbor_bias(self.index, self.relevance, self.connection, relation_weight, rows, rows)


AnyGraph = RelationGraph | SparseRelationGraph


def assemble(
    i2i: SparseRelationBlock, i2t: SparseRelationBlock, t2i: SparseRelationBlock, t2t: SparseRelationBlock,
    excluded: Tensor | PairIds | None, exchange: Exchange | None,
) -> SparseRelationGraph:  # fmt: skip
    """The graph of four blocks; the narrower of two gets places without a node."""
    n, m = i2i.columns, t2t.columns
    within, across = max(i2i.index.shape[1], t2t.index.shape[1]), max(i2t.index.shape[1], t2i.index.shape[1])

    def join(field: str, fill: float) -> Tensor:
        def one(block: SparseRelationBlock, width: int, first: int) -> Tensor:
            x: Tensor = getattr(block, field)
            x = x + first if field == "index" else x
            return torch.nn.functional.pad(x, (0, width - x.shape[1]), value=fill)

        images = torch.cat([one(i2i, within, 0), one(i2t, across, n)], dim=1)
        texts = torch.cat([one(t2t, within, n), one(t2i, across, 0)], dim=1)
        return torch.cat([images, texts])

    return SparseRelationGraph(
        join("index", -1), join("relevance", 0), join("connection", False), n, within, excluded, m, exchange
    )


def without_detours(
    within: SparseRelationBlock, across: SparseRelationBlock, excluded: Tensor | PairIds, rows: slice
) -> SparseRelationBlock:
    """``within`` without its edges to rows that have just attended, ``across``, to what is excluded for their row.

    ``across`` and ``excluded`` have all rows; ``rows`` are those of ``within``, which may be one process's own.
    """
    kept = within.connection
    for place in range(across.index.shape[1]):  # one (rows, K) matrix at a time
        given = across.index[:, place].clamp(min=0)  # [rows]
        via, edge = given[within.index.clamp(min=0)], across.connection[:, place][within.index.clamp(min=0)]
        kept = kept & ~(pairs_at(excluded, via, rows) & edge)
    return within._replace(connection=kept)


def list_divergence(
    graph: SparseRelationGraph, x: Tensor, y: Tensor, sigma: float, *, squared: bool, dtype: torch.dtype
) -> Tensor:
    """L_reg over what each row has in its places across, x (N, D) and y (M, D) of any length and without gradient; what
    :func:`hrem_layers.relations.guide_divergence` is for a matrix. In float64 there are all rows of one side at a
    time."""
    total = torch.zeros((), dtype=dtype, device=x.device)
    for name, own, other in (("i2t", x, y), ("t2i", y, x)):
        block, own = graph.block(name), graph.rows(name[0]).own(own)
        cosines = edge_cosines(exact_units(own), exact_units(other), block.index.clamp(min=0))
        guide = distance_relevance(cosines, sigma, squared=squared, dtype=dtype)
        learned, nobody = block.relevance.to(compute_dtype(dtype)), block.index < 0
        low = torch.finfo(dtype).min / 2  # −inf has no difference
        total = total + row_divergence(
            learned.masked_fill(nobody, low),
            guide.masked_fill(nobody, low),
            rows=graph.total(name[0]),
        )
    return (graph.exchange or ALONE).add_up(total)


def check_any_graph(graph: object, n: int, m: int, device: torch.device) -> AnyGraph:
    """Raises TypeError or ValueError unless this is a graph, in either form, over these images and texts."""
    if not isinstance(graph, SparseRelationGraph):
        return check_graph(graph, n, m, device)
    check_count("graph.num_images", graph.num_images)
    check_count("graph.num_texts", graph.num_texts)
    if graph.exchange is not None:
        check_exchange("graph.exchange", graph.exchange)
    if graph.num_images != n or graph.num_texts not in (None, m):
        raise ValueError(
            f"graph must be over {n} images and {m} texts, got num_images={graph.num_images} and "
            f"num_texts={graph.num_texts}"
        )
    here = n + m if graph.exchange is None else graph.rows().here
    check_index_tensor("graph.index", graph.index, (here, "K"), device=device)
    shape = tuple(graph.index.shape)
    check_tensor("graph.relevance", graph.relevance, shape, device=device)
    check_bool_tensor("graph.connection", graph.connection, shape, device=device, meaning="edge")
    if not torch.compiler.is_compiling():
        check_int("graph.within", graph.within, minimum=0, maximum=shape[1])
        if device.type == "cpu" and graph.index.numel():
            _check_nodes(graph, n, n + m)
    if isinstance(graph.excluded, PairIds):
        check_index_tensor("graph.excluded.image", graph.excluded.image, (n,), device=device)
        check_index_tensor("graph.excluded.text", graph.excluded.text, (m,), device=device)
    elif graph.excluded is not None:
        check_bool_tensor("graph.excluded", graph.excluded, (n, m), device=device, meaning="excluded")
    return graph


def _check_nodes(graph: SparseRelationGraph, n: int, nodes: int) -> None:
    """Every place holds −1 or a node of the modality that it is for; on a GPU a look at the values would wait."""
    here = graph.rows("i").here
    for rows, first in ((slice(None, here), True), (slice(here, None), False)):
        for places, own in ((slice(None, graph.within), True), (slice(graph.within, None), False)):
            low, high = (0, n) if first == own else (n, nodes)
            there = graph.index[rows, places]
            if bool((((there < low) | (there >= high)) & (there != -1)).any()):
                raise ValueError(
                    f"graph.index must name nodes in [{low}, {high}), or be -1, in the rows of "
                    f"{'images' if first else 'texts'}, places {'within' if own else 'across'}, got values from "
                    f"{int(there.min())} to {int(there.max())}"
                )
    if bool(((graph.index == -1) & graph.connection).any()):
        raise ValueError("graph.connection must be False where graph.index is -1, no node")


def count_texts(graph: object, n: int) -> int | str:
    """How many texts go with ``n`` images in this graph: as many, or what the graph says ("M" if it says nothing)."""
    if not isinstance(graph, (RelationGraph, SparseRelationGraph)) or graph.num_images is None:
        return n
    if isinstance(graph, SparseRelationGraph):
        return graph.total("t") if isinstance(graph.index, Tensor) else "M"
    return graph.connection.shape[0] - graph.num_images if isinstance(graph.connection, Tensor) else "M"


def _neighbor_bias(
    index: Tensor, relevance: Tensor, connection: Tensor, relation_weight: float, rows: Rows, nodes: Rows
) -> NeighborBias:
    return NeighborBias(index.clamp(min=0), edge_bias(connection, relevance, relation_weight), rows, nodes)


def _scatter(values: Tensor, index: Tensor, columns: int) -> Tensor:
    """``values`` (n, K) at the columns ``index`` (n, K) of an (n, columns) matrix of zeros (False); −1 is nowhere."""
    wide = values.new_zeros(values.shape[0], columns + 1)
    return wide.scatter(1, torch.where(index < 0, columns, index), values)[:, :columns]
