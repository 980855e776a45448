"""Small faults in graph, relations and interaction that other tests did not notice: each test here notices one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hrem_layers import (
    AssociationGraph,
    Candidates,
    HREMLoss,
    RelationGraph,
    RelationInteraction,
    SparseRelationGraph,
    TransformerLayer,
    align_fragments,
)
from hrem_layers.relations import check_any_graph, check_graph
from hrem_layers.relations.neighbors import _settle

D, F = 16, 8


def batch(n: int, m: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n + m)
    shapes = (n, D), (m, D), (n, 4, F), (m, 3, F)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def lists(n: int, m: int, k: int = 5) -> SparseRelationGraph:
    graph = AssociationGraph(candidates=k, exclude_positives=True).double().eval()
    image_index = torch.arange(m) % n
    found = graph(*batch(n, m), image_index=image_index, image_ids=torch.arange(n))
    assert isinstance(found, SparseRelationGraph)
    return found


def test_no_candidate_edge_joins_what_belongs_together() -> None:
    n, m = 6, 18
    connection = lists(n, m).dense().block("i2t").connection
    together = torch.arange(n).unsqueeze(1) == torch.arange(m) % n
    assert connection.any() and not (connection & together).any()
    back = lists(n, m).dense().block("t2i").connection
    assert back.any() and not (back & together.t()).any()


def test_the_wider_of_two_blocks_keeps_all_its_edges() -> None:
    """Two images have a neighbour among themselves, eighteen texts five each."""
    graph = lists(2, 18)
    assert graph.within == 5
    assert (graph.dense().block("t2t").connection.sum(dim=1) == 5).all()
    assert (graph.dense().block("i2i").connection.sum(dim=1) <= 1).all()


@pytest.mark.parametrize(("n", "m"), [(4, 12), (7, 7)])
def test_ways_over_two_hops_are_cut_on_lists_as_on_the_matrix(n: int, m: int) -> None:
    graph = lists(n, m)
    interaction = RelationInteraction(D, mechanism="standalone", num_heads=2, dropout=0.0, gate=0.6).double().eval()
    v, u = batch(n, m)[:2]
    for x, y in zip(interaction(v, u, graph), interaction(v, u, graph.dense()), strict=True):
        torch.testing.assert_close(x, y)


class Louder(TransformerLayer):
    """A layer of the user's own that is also one of ours: it is given the matrix, as its forward expects."""

    def forward(self, x: Tensor, bias: Tensor, context: Tensor | None = None) -> Tensor:
        assert isinstance(bias, Tensor) and bias.shape == (len(x), len(x if context is None else context))
        return 2 * super().forward(x, bias, context)


def test_a_layer_with_a_forward_of_its_own_gets_the_matrix() -> None:
    interaction = RelationInteraction(D, layer=lambda: Louder(D, num_heads=2), gate=0.6).double().eval()
    v, u = batch(5, 5)[:2]
    graph = lists(5, 5, 3)
    for x, y in zip(interaction(v, u, graph), interaction(v, u, graph.dense()), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(("num_images", "n", "m"), [(None, 2, 4), (3, 2, 4), (2, 3, 3), (None, 4, 2)])
def test_a_graph_over_others_is_refused(num_images: int | None, n: int, m: int) -> None:
    nodes = n + m
    graph = RelationGraph(torch.ones(nodes, nodes, dtype=torch.bool), torch.zeros(nodes, nodes), num_images)
    with pytest.raises(ValueError, match=f"graph must be over {n} images and {m} texts, got num_images={num_images}"):
        check_graph(graph, n, m, torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_images": 2.0}, "graph.num_images must be an int"),
        ({"candidates": 3}, "graph.candidates must be Candidates"),
        ({"candidates": Candidates(torch.full((2, 1), 2), torch.zeros(2, 1, dtype=torch.long))}, "i2t must lie in"),
        ({"candidates": Candidates(torch.zeros(2, 1, dtype=torch.long), torch.full((2, 1), -1))}, "t2i must lie in"),
    ],
)
def test_what_a_graph_says_of_itself_is_checked(change: dict[str, object], message: str) -> None:
    graph = RelationGraph(torch.ones(4, 4, dtype=torch.bool), torch.zeros(4, 4), 2)
    with pytest.raises((TypeError, ValueError), match=message):
        check_graph(graph._replace(**change), 2, 2, torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_texts": 12.0}, "graph.num_texts must be"), ({"exchange": "x"}, "graph.exchange must")],
)
def test_what_lists_say_of_themselves_is_checked(change: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        check_any_graph(lists(4, 12)._replace(**change), 4, 12, torch.device("cpu"))


@pytest.mark.parametrize("change", [{"num_images": 5}, {"num_texts": 5}])
def test_lists_over_others_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="graph must be over 4 images and 12 texts"):
        check_any_graph(lists(4, 12)._replace(**change), 4, 12, torch.device("cpu"))


@pytest.mark.parametrize("field", ["across", "images", "texts"])
def test_cosines_of_another_batch_are_refused_by_name(field: str) -> None:
    from hrem_layers import pair_cosines

    v, u, regions, words = (x.float() for x in batch(4, 4))
    cosines = pair_cosines(v, u)
    if field not in cosines._fields:
        field = cosines._fields[0]
    with pytest.raises(ValueError, match=f"cosines.{field} must"):
        AssociationGraph()(v, u, regions, words, cosines=cosines._replace(**{field: torch.zeros(3, 3)}))


def test_excluded_positives_hold_in_the_loss_with_candidates() -> None:
    n = 6
    loss = HREMLoss(D, graph=AssociationGraph(candidates=3, exclude_positives=True)).double().eval()
    ids = torch.tensor([0, 0, 1, 2, 3, 4])
    graph = loss.relate(*batch(n, n), image_ids=ids).graph.dense()
    assert not (graph.block("i2t").connection & (ids.unsqueeze(1) == ids)).any()


@pytest.mark.parametrize(("regions", "words", "dim"), [(0, 3, 4), (3, 0, 4), (3, 3, 0)])
def test_fragments_of_no_width_are_refused(regions: int, words: int, dim: int) -> None:
    with pytest.raises(ValueError, match=f"got R = {regions}, W = {words} and D = {dim}"):
        align_fragments(torch.zeros(2, regions, dim), torch.zeros(2, words, dim))


def test_what_is_apart_by_just_the_tolerance_ties() -> None:
    """And goes to the smaller number, not to what is larger by rounding."""
    similarity, last = torch.tensor([[1.0, 1 + 2.0**-10]]), torch.tensor([[1.0]])
    assert _settle(similarity, last, 2.0**-10, torch.arange(2, dtype=torch.int32), 1).tolist() == [[0]]
