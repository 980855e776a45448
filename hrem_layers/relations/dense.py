r"""The graph over the samples of a batch, and the pure functions that its blocks are made with (paper, section 3.3).

N images and M texts; the nodes are the images, then the texts: ``[[I→I, I→T], [T→I, T→T]]``, and the row is the
node that receives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hrem_layers._core.checks import (
    check_bool_tensor,
    check_choice,
    check_index_tensor,
    check_indices,
    check_int,
    check_number,
    check_sides,
    check_tensor,
    said,
)
from hrem_layers._core.numerics import autocast_off, compute_dtype, tie_tolerance
from hrem_layers.relations.neighbors import exact_units

BLOCKS = ("i2i", "i2t", "t2i", "t2t")


class RelationBlock(NamedTuple):
    """One of the four blocks of a graph: rows receive, columns give.

    Example:
        >>> block = RelationBlock(torch.tensor([[True, False]]), torch.tensor([[0.5, 0.9]]))
        >>> block.attention_bias(2.0)
        tensor([[1., -inf]])
    """

    connection: Tensor
    """(rows, columns) bool, True = edge."""
    relevance: Tensor
    """(rows, columns) float; only its values on edges count."""

    def attention_bias(self, relation_weight: float) -> Tensor:
        """``relation_weight · S`` on edges, −inf elsewhere; weight 0 gives 0 on edges. Shape and dtype of S."""
        return edge_bias(self.connection, self.relevance, relation_weight)


class Candidates(NamedTuple):
    """Which nodes of the other modality a row was aligned with; columns are numbers of texts and of images.

    Example:
        >>> v, u = torch.randn(6, 64), torch.randn(6, 64)
        >>> regions, words = torch.randn(6, 36, 64), torch.randn(6, 12, 64)
        >>> AssociationGraph(candidates=2)(v, u, regions, words).candidates.i2t.shape
        torch.Size([6, 2])
    """

    i2t: Tensor
    """(N, k) int64."""
    t2i: Tensor
    """(M, k) int64."""


class RelationGraph(NamedTuple):
    """A graph over N images and M texts, images first: ``[[I→I, I→T], [T→I, T→T]]``.

    The row is the node that receives: in block ``"i2t"`` row i says which texts image i attends to.

    Example:
        >>> graph = RelationGraph(torch.ones(5, 5, dtype=torch.bool), torch.zeros(5, 5), num_images=2)
        >>> graph.block("i2t").relevance.shape
        torch.Size([2, 3])
    """

    connection: Tensor
    """A: (N + M, N + M) bool, True = edge."""
    relevance: Tensor
    """S: (N + M, N + M) float; only its values on edges count."""
    num_images: int | None = None
    """N; None = half of the nodes."""
    candidates: Candidates | None = None
    """The pairs across the modalities that S knows; None = all."""
    excluded: Tensor | None = None
    """(N, M) bool: pairs that must not see each other, not over a third node either; None = none."""

    def block(self, name: str) -> RelationBlock:
        """One of the four blocks: ``"i2i"`` (N, N), ``"i2t"`` (N, M), ``"t2i"`` (M, N), ``"t2t"`` (M, M).

        Raises:
            ValueError: another name.
        """
        check_choice("name", name, BLOCKS)
        n = self.connection.shape[0] // 2 if self.num_images is None else self.num_images
        rows, columns = (slice(None, n) if side == "i" else slice(n, None) for side in (name[0], name[2]))
        return RelationBlock(self.connection[rows, columns], self.relevance[rows, columns])

    def dense(self) -> RelationGraph:
        """Itself, as :meth:`hrem_layers.SparseRelationGraph.dense` gives this form of the other."""
        return self

    def attention_bias(self, relation_weight: float) -> Tensor:
        """``relation_weight · S`` on edges, −inf elsewhere; weight 0 gives 0 on edges. Shape and dtype of S."""
        return edge_bias(self.connection, self.relevance, relation_weight)


def edge_bias(connection: Tensor, relevance: Tensor, relation_weight: float) -> Tensor:
    """``relation_weight · S`` on edges, −inf elsewhere, of matrices or of lists; NaN where an infinity would remove or
    outweigh edges."""
    if not torch.compiler.is_compiling():  # a symbol there
        check_number("relation_weight", relation_weight)
    weighted = relation_weight * relevance
    return torch.where(connection, weighted.masked_fill(weighted.isinf(), torch.nan), -torch.inf)


def check_count(name: str, count: int | None) -> None:
    if count is not None and not torch.compiler.is_compiling():  # a symbol there
        check_int(name, count, minimum=0)


def check_graph(graph: object, n: int, m: int, device: torch.device) -> RelationGraph:
    """Raises TypeError or ValueError unless this is a RelationGraph over ``n`` images and ``m`` texts on ``device``."""
    if not isinstance(graph, RelationGraph):
        raise TypeError(f"graph must be a RelationGraph, got {said(graph)}")
    nodes = n + m
    check_count("graph.num_images", graph.num_images)
    check_bool_tensor("graph.connection", graph.connection, (nodes, nodes), device=device, meaning="edge")
    check_tensor("graph.relevance", graph.relevance, (nodes, nodes), device=device)
    if (n if graph.num_images is None else graph.num_images) != n or (graph.num_images is None and n != m):
        raise ValueError(f"graph must be over {n} images and {m} texts, got num_images={graph.num_images}")
    if graph.candidates is not None:
        if not isinstance(graph.candidates, Candidates):
            raise TypeError(f"graph.candidates must be Candidates or None, got {said(graph.candidates)}")
        for side, index, rows, columns in zip(Candidates._fields, graph.candidates, (n, m), (m, n), strict=True):
            check_index_tensor(f"graph.candidates.{side}", index, (rows, "k"), device=device)
            check_indices(f"graph.candidates.{side}", index, columns, "nodes of the other modality")
    if graph.excluded is not None:
        check_bool_tensor("graph.excluded", graph.excluded, (n, m), device=device, meaning="excluded")
    return graph


class Cosines(NamedTuple):
    """Of every two samples, in float64 where the device has it: near 1 a distance needs what float32 rounds away.

    Example:
        >>> cosines = pair_cosines(torch.randn(3, 64), torch.randn(5, 64))
        >>> cosines.images.shape, cosines.texts.shape, cosines.across.shape
        (torch.Size([3, 3]), torch.Size([5, 5]), torch.Size([3, 5]))
    """

    images: Tensor
    """(N, N)."""
    texts: Tensor
    """(M, M)."""
    across: Tensor
    """(N, M)."""


def check_cosines(cosines: object, n: int, m: int, device: torch.device) -> None:
    """Raises TypeError or ValueError unless these are the cosines of ``n`` images and ``m`` texts, or None."""
    if cosines is None:
        return
    if not isinstance(cosines, Cosines):
        raise TypeError(f"cosines must be what pair_cosines returns, or None, got {said(cosines)}")
    for name, x, shape in zip(Cosines._fields, cosines, ((n, n), (m, m), (n, m)), strict=True):
        check_tensor(f"cosines.{name}", x, shape, device=device)


def pair_cosines(image_embedding: Tensor, text_embedding: Tensor) -> Cosines:
    """Cosines of embeddings (N, D) and (M, D) of any length: three products, which everything else goes by.

    Example:
        >>> pair_cosines(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0], [1.0, 0.0]])).across
        tensor([[0., 1.]], dtype=torch.float64)
    """
    check_sides(image_embedding, text_embedding)
    with autocast_off(image_embedding.device):
        x, y = exact_units(image_embedding), exact_units(text_embedding)
        return Cosines(x @ x.t(), y @ y.t(), x @ y.t())


def distance_relevance(cosine: Tensor, sigma: float, *, squared: bool, dtype: torch.dtype) -> Tensor:
    r""":math:`\exp(-\lVert x - y\rVert / \sigma)`, with ``squared`` :math:`\exp(-\lVert x - y\rVert^2 / \sigma)`.

    From cosines of :func:`pair_cosines`, as :math:`\lVert x - y\rVert^2 = 2 - 2\cos`; the result in ``dtype``.
    Two equal embeddings have relevance 1 and get a zero gradient (that of the norm at 0 is not defined). What is no
    number has none.
    """
    square = 2 - 2 * cosine.masked_fill(cosine.isinf(), torch.nan)  # no infinite distance, of relevance 0 or 1
    # rounding error of a product of unit vectors; in float64 below (1e-7)², the last bit of a float32 distance of 1
    equal = square < 45 * torch.finfo(cosine.dtype).eps
    distance = square.masked_fill(equal, 1).sqrt().masked_fill(equal, 0).to(dtype)
    return torch.exp(-(distance.square() if squared else distance) / sigma)


def nearest(similarity: Tensor, k: int, *, scale: float | None = 1.0, allowed: Tensor | None = None) -> Tensor:
    """Per row of ``similarity`` (N, M), True at the ``k`` largest values and at all that tie with the k-th.

    Values a few ulp apart tie: which of them is larger is decided by rounding. NaN counts as near, so that it
    goes on to whatever is computed over the edges.

    Args:
        similarity: (N, M).
        k: at least 1, at most M.
        scale: the magnitude of which an ulp is meant; None = the largest of the row.
        allowed: (N, M) bool; where False there is no edge, and the k are chosen among the others. None = all.
    """
    with torch.no_grad():
        similarity = similarity.detach()
        ulps = tie_tolerance(similarity.dtype)
        tolerance = ulps * (similarity.abs().amax(dim=1, keepdim=True) if scale is None else scale)
        if allowed is not None:
            similarity = similarity.masked_fill(~allowed, -torch.inf)
        threshold = similarity.topk(k, dim=1).values[:, -1:]  # [n, 1]
        edges = ~(similarity < threshold - tolerance)
        return edges if allowed is None else edges & allowed


def row_divergence(logits: Tensor, guide: Tensor, *, rows: int | None = None) -> Tensor:
    """KL(softmax(logits) ‖ softmax(guide)) of each row, (N, M) each; a scalar, their sum by ``rows`` (None = N)."""
    divergence = F.kl_div(guide.log_softmax(dim=1), logits.log_softmax(dim=1), reduction="sum", log_target=True)
    return divergence / (logits.shape[0] if rows is None else rows)


def guide_divergence(
    graph: RelationGraph, across: Tensor, sigma: float, *, squared: bool, dtype: torch.dtype
) -> Tensor:
    """L_reg: both directions of S against the guide G, which ``across`` (N, M) of :class:`Cosines` gives.

    Where the graph has candidates, the distributions are those over a row's candidates.
    """
    guide = distance_relevance(across.detach(), sigma, squared=squared, dtype=dtype)
    total = torch.zeros((), dtype=dtype, device=across.device)
    for name, goal in (("i2t", guide), ("t2i", guide.t())):
        learned = graph.block(name).relevance.to(compute_dtype(dtype))
        if graph.candidates is not None:
            index = graph.candidates.i2t if name == "i2t" else graph.candidates.t2i
            learned, goal = learned.gather(1, index.long()), goal.gather(1, index.long())
        total = total + row_divergence(learned, goal)
    return total
