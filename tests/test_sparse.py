"""Neighbour lists: the same numbers as the masked matrices, found and attended to without these."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import LargestTensor, assert_near, generator, gradients, graph_inputs
from torch.nn.functional import normalize

from hrem_layers import (
    ALONE,
    AssociationGraph,
    HREMLoss,
    InfoNCELoss,
    RelationInteraction,
    SparseRelationGraph,
    TransformerLayer,
    TripletLoss,
)
from hrem_layers._core import neighbors as edges
from hrem_layers._core.batch import PairIds
from hrem_layers._core.exchange import Rows
from hrem_layers.relations import nearest
from hrem_layers.relations import neighbors as search
from hrem_layers.relations.neighbors import nearest_rows

DOUBLE, D, N, M = torch.float64, 8, 4, 6
MECHANISMS = ("fusion", "standalone")


def interaction(**options):
    torch.manual_seed(1)
    module = RelationInteraction(D, num_heads=2, **{"dropout": 0.0, "gate": 0.6, **options}).double()
    with torch.no_grad():  # away from biases of 0 and scales of 1
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def embeddings(n=N, m=M, seed=0):
    g = generator(seed)
    return [torch.randn(count, D, generator=g, dtype=DOUBLE).requires_grad_() for count in (n, m)]


def random_graph(n=N, m=M, within=3, across=2, seed=0, excluded=None):
    """Different nodes in each row, some of them no edge, the last place within of texts no node."""
    g = generator(seed)

    def pick(rows, columns, k, first):
        order = torch.rand(rows, columns, generator=g).argsort(dim=1)[:, :k]
        return first + order

    images = torch.cat([pick(n, n, within, 0), pick(n, m, across, n)], dim=1)
    texts = torch.cat([pick(m, m, within, n), pick(m, n, across, 0)], dim=1)
    index = torch.cat([images, texts])
    index[n:, within - 1] = -1
    connection = (torch.rand(index.shape, generator=g) < 0.7) & (index >= 0)
    connection[0] = False  # an image without any edge
    relevance = torch.randn(index.shape, generator=g, dtype=DOUBLE).requires_grad_()
    return SparseRelationGraph(index, relevance, connection, n, within, excluded)


def equal_on_both_forms(module, v, u, graph):
    inputs = {"v": v, "u": u, "s": graph.relevance, **dict(module.named_parameters())}
    ours, theirs = module(v, u, graph), module(v, u, graph.dense())
    for x, y in zip(ours, theirs, strict=True):
        assert_near(x, y, 1e-13)
    ours_grad, theirs_grad = gradients(inputs, *ours), gradients(inputs, *theirs)
    for name in inputs:
        assert_near(ours_grad[name], theirs_grad[name], 1e-11, name)
    return ours_grad


# interaction


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("weight", [1.0, -0.7, 0.0])
def test_interaction_is_that_of_the_masked_matrix(mechanism, residual, layers, weight):
    module = interaction(mechanism=mechanism, residual=residual, num_layers=layers, relation_weight=weight)
    graph = random_graph()
    grad = equal_on_both_forms(module, *embeddings(), graph)
    assert grad["s"].any() == (weight != 0)
    assert not grad["s"][~graph.connection].any()


@settings(max_examples=20)
@given(n=st.integers(1, 5), m=st.integers(1, 5), seed=st.integers(0, 2**31), mechanism=st.sampled_from(MECHANISMS))
@example(n=1, m=1, seed=0, mechanism="fusion")
def test_any_sizes(n, m, seed, mechanism):
    graph = random_graph(n, m, min(n, m), min(n, m), seed)
    equal_on_both_forms(interaction(mechanism=mechanism), *embeddings(n, m, seed), graph)


def test_gradients_do_not_depend_on_the_chunk(monkeypatch):
    module, (v, u), graph = interaction(), embeddings(), random_graph()
    inputs = {"v": v, "u": u, "s": graph.relevance}
    whole, of_whole = module(v, u, graph), gradients(inputs, *module(v, u, graph))
    monkeypatch.setattr(edges, "_CPU_CHUNK", 1)
    for x, y in zip(module(v, u, graph), whole, strict=True):
        assert_near(x, y, 1e-14)
    for name, grad in gradients(inputs, *module(v, u, graph)).items():
        assert_near(grad, of_whole[name], 1e-12, name)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_gradcheck(mechanism):
    module, (v, u), graph = interaction(mechanism=mechanism), embeddings(2, 3), random_graph(2, 3, 2, 2)

    def of_inputs(v, u, relevance):
        return module(v, u, graph._replace(relevance=relevance))

    assert torch.autograd.gradcheck(of_inputs, (v, u, graph.relevance))


@pytest.mark.parametrize("backward", ["first", "second"])
def test_operators_against_finite_differences(backward):
    g = generator(3)
    x, y = (torch.randn(count, 2, 3, generator=g, dtype=DOUBLE).requires_grad_() for count in (4, 5))
    weights = torch.randn(4, 3, 2, generator=g, dtype=DOUBLE).requires_grad_()
    index = torch.randint(5, (4, 3), generator=g)
    check = torch.autograd.gradcheck if backward == "first" else torch.autograd.gradgradcheck
    assert check(lambda x, y: edges.neighbor_products(x, y, index), (x, y))
    assert check(lambda w, y: edges.neighbor_sums(w, y, index), (weights, y))
    assert check(lambda w, x: edges.neighbor_scatter(w, x, index, 5), (weights, x))


def test_operators_keep_their_promises_to_torch():
    x, y, weights = torch.randn(4, 2, 3), torch.randn(5, 2, 3), torch.randn(4, 3, 2)
    index = torch.randint(5, (4, 3))
    for operator, arguments in (
        (edges._products, (x.requires_grad_(), y.requires_grad_(), index)),
        (edges._sums, (weights.requires_grad_(), y, index)),
        (edges._scatter, (weights, x, index, 5)),
        (search._nearest_rows, (normalize(x[:, 0].detach()), normalize(y[:, 0].detach()), 2, torch.float32)),
    ):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_rows_without_an_edge_keep_their_value_through_the_residual(mechanism):
    module, graph = interaction(mechanism=mechanism), random_graph()
    v, u = embeddings()
    none = graph._replace(connection=torch.zeros_like(graph.connection))
    equal_on_both_forms(module, v, u, none)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_compiles_as_one_graph(mechanism):
    module, (v, u), graph = interaction(mechanism=mechanism), embeddings(), random_graph()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    inputs = {"v": v, "u": u, "s": graph.relevance}
    for x, y in zip(compiled(v, u, graph), module(v, u, graph), strict=True):
        assert_near(x, y, 1e-14)
    ours, theirs = gradients(inputs, *compiled(v, u, graph)), gradients(inputs, *module(v, u, graph))
    for name in inputs:
        assert_near(ours[name], theirs[name], 1e-12, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_half_types(mechanism, dtype):
    module, (v, u), graph = interaction(mechanism=mechanism), embeddings(), random_graph()
    expected = module(v, u, graph)
    got = module.to(dtype)(v.to(dtype), u.to(dtype), graph._replace(relevance=graph.relevance.to(dtype)))
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == dtype
        assert_near(x, y, 0.1)


def test_dropout_drops_its_share_and_backward_draws_the_same():
    x = torch.randn(200, 2, 3, dtype=DOUBLE)
    index, bias = torch.randint(200, (200, 20)), torch.zeros(200, 20, dtype=DOUBLE)
    ones = torch.ones_like(x)
    torch.manual_seed(0)
    rows = Rows(ALONE, (("image", 200),))
    kept = edges.attend_neighbors(x, x, ones, index, bias, rows, rows, 0.25)
    assert 0.95 < kept.mean() < 1.05
    assert kept.std() > 0.02
    x, index = x[:4].clone().requires_grad_(), index[:4] % 4

    def drawn(x):
        torch.manual_seed(0)
        rows = Rows(ALONE, (("image", 4),))
        return edges.attend_neighbors(x, x, x, index, bias[:4], rows, rows, 0.25)

    assert torch.autograd.gradcheck(drawn, (x,))


class Recording(TransformerLayer):
    def forward(self, x, bias=None, context=None):
        self.seen = bias
        return super().forward(x, bias, context)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_layer_of_the_callers_own_gets_the_matrix(mechanism):
    module = RelationInteraction(D, mechanism=mechanism, layer=lambda: Recording(D, num_heads=2), gate=0.6).double()
    graph = random_graph()
    module(*embeddings(), graph)
    seen = module.layers[0].seen if mechanism == "fusion" else module.layers[0]["i2t"].seen
    dense = graph.dense() if mechanism == "fusion" else graph.dense().block("i2t")
    assert torch.equal(seen, dense.attention_bias(1.0))


@pytest.mark.parametrize("as_ids", [True, False])
def test_excluded_pairs_do_not_meet_over_a_third_node(as_ids):
    ids = PairIds(torch.tensor([0, 1, 2, 1]), torch.tensor([0, 1, 2, 3, 1, 0]))
    graph = random_graph(within=4, across=4, excluded=ids if as_ids else ids.matrix())
    module = interaction(mechanism="standalone")
    equal_on_both_forms(module, *embeddings(), graph)
    free = graph._replace(excluded=None)
    assert not torch.equal(module(*embeddings(), graph)[0], module(*embeddings(), free)[0])


# the form


def test_blocks_are_those_of_the_matrix():
    graph = random_graph()
    for name in ("i2i", "i2t", "t2i", "t2t"):
        block, want = graph.block(name).dense(), graph.dense().block(name)
        assert torch.equal(block.connection, want.connection)
        assert torch.equal(block.relevance, want.relevance)
        bias = graph.block(name).attention_bias(0.5)
        matrix = torch.full(want.connection.shape, -math.inf, dtype=DOUBLE)
        on = graph.block(name).connection
        for row in range(len(matrix)):
            matrix[row, bias.index[row, on[row]]] = bias.bias[row, on[row]]
        assert torch.equal(matrix, want.attention_bias(0.5))
    assert graph.dense().num_images == N
    with pytest.raises(ValueError, match="name must be one of 'i2i'"):
        graph.block("t2x")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"index": torch.zeros(N + M, dtype=torch.long)}, ValueError, r"graph.index must have shape \(10, K\)"),
        ({"index": torch.zeros(N + M, 5)}, TypeError, "graph.index must be an integer tensor"),
        (
            {"index": torch.full((N + M, 5), N)},
            ValueError,
            r"graph.index must name nodes in \[0, 4\), or be -1, in the rows",
        ),
        ({"index": torch.full((N + M, 5), -2)}, ValueError, "graph.index must name nodes in .* values from -2 to -2"),
        ({"connection": torch.ones(N + M, 5, dtype=torch.bool)}, ValueError, "connection must be False where"),
        ({"connection": torch.ones(N + M, 5)}, TypeError, "graph.connection must be a bool tensor"),
        ({"relevance": torch.ones(N + M, 4)}, ValueError, "graph.relevance must have shape"),
        ({"num_images": 5}, ValueError, "text_embedding must have shape"),
        ({"num_texts": 5}, ValueError, "text_embedding must have shape"),
        ({"within": 9}, ValueError, "graph.within must be at most 5"),
        ({"excluded": torch.ones(M, N, dtype=torch.bool)}, ValueError, "graph.excluded must have shape"),
        ({"excluded": PairIds(torch.arange(N), torch.arange(N))}, ValueError, "graph.excluded.text must have shape"),
    ],
)
def test_interaction_refuses(change, error, message):
    with pytest.raises(error, match=message):
        interaction()(*embeddings(), random_graph()._replace(**change))


# the search


@settings(max_examples=40)
@given(
    n=st.integers(1, 7), m=st.integers(1, 9), k=st.integers(1, 9), seed=st.integers(0, 2**31), twins=st.booleans(),
    chunk=st.sampled_from([1, 20, 2**21]),
)  # fmt: skip
@example(n=3, m=9, k=3, seed=0, twins=True, chunk=1)
def test_nearest_rows_are_those_of_the_matrix(n, m, k, seed, twins, chunk):
    g, k = generator(seed), min(k, m)
    x, y = (normalize(torch.randn(count, 5, generator=g, dtype=DOUBLE), dim=1) for count in (n, m))
    if twins:  # nodes of which several tie
        y = y[torch.randint(max(1, m // 3), (m,), generator=g)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_CPU_CHUNK", chunk)
        index = nearest_rows(x, y, k, DOUBLE)
    assert index.shape == (n, k)
    near = nearest(x @ y.t(), k)  # all that tie with the k-th
    for row in range(n):
        similarity, chosen = (x @ y.t())[row], index[row].tolist()
        last = similarity.sort(descending=True).values[k - 1]
        above = [j for j in range(m) if similarity[j] > last + 1e-14]
        tied = [j for j in range(m) if near[row, j] and j not in above]
        assert chosen == sorted(above + tied[: k - len(above)])  # the smallest numbers fill what is left


def test_rounding_decides_no_edge():
    """One value in many guises, a few ulp apart: which of them is largest must not matter."""
    row = torch.full((1, 30), 0.5, dtype=torch.float32)
    row = row * (1 + torch.finfo(torch.float32).eps * torch.randint(-2, 3, row.shape, generator=generator(1)))
    y = row.t().contiguous()
    assert nearest_rows(torch.ones(1, 1), y, 4, torch.float32).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_counts_as_near(bad):
    x = normalize(torch.randn(6, 5, generator=generator(0)), dim=1)
    y = x.clone()
    y[4] = bad if math.isnan(bad) else math.nan
    assert (nearest_rows(x, y, 2, torch.float32) == 4).any(dim=1).all()
    assert nearest_rows(x * math.nan, x, 2, torch.float32).tolist() == [[0, 1]] * 6


@pytest.mark.parametrize("on_gpu", [False, True])
def test_every_row_can_be_settled_without_a_look(on_gpu, monkeypatch):
    """What a GPU does, where a look at the values would make it wait: the same choice."""
    x = normalize(torch.randn(9, 5, generator=generator(0), dtype=DOUBLE), dim=1)[torch.arange(9) % 4]
    similarity = x @ x.t()
    last = similarity.topk(3, dim=1).values[:, -1:]
    settled = search._settle(similarity, last, 1e-15, torch.arange(9, dtype=torch.int32), 3).sort(dim=1).values
    assert torch.equal(settled, nearest_rows(x, x, 3, DOUBLE))


def test_search_holds_a_chunk_of_similarities(monkeypatch):
    monkeypatch.setattr(search, "_CPU_CHUNK", 1024)
    x = normalize(torch.randn(256, 2, dtype=DOUBLE), dim=1)
    with LargestTensor() as seen:
        search._nearest_rows._init_fn(x, x, 2, DOUBLE)
    assert seen.elements == 1024  # 4 rows of 256 at a time


# graph and loss


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("several", [True, False])
def test_loss_is_that_of_the_dense_graph_with_the_same_edges(mechanism, exclude, several):
    torch.manual_seed(2)
    loss = HREMLoss(
        16,
        graph=AssociationGraph(topk=3, candidates=3, detach_fragments=False, exclude_positives=exclude),
        interaction=RelationInteraction(16, mechanism=mechanism, num_heads=2, dropout=0.0, gate=0.6),
        pair_loss=TripletLoss(negative_sampling="hardest"),
    ).double()
    inputs = graph_inputs(n=7, dtype=DOUBLE)
    options = {"image_ids": torch.tensor([0, 1, 2, 0, 4, 5, 6])}
    if several:
        inputs = {name: x[:4].detach().requires_grad_(x.requires_grad) if name.startswith("image") else x
                  for name, x in inputs.items()}  # fmt: skip
        options = {"image_ids": torch.tensor([0, 1, 2, 0]), "image_index": torch.tensor([0, 2, 1, 3, 3, 0, 1])}
    leaves = {name: x for name, x in inputs.items() if x.requires_grad} | dict(loss.named_parameters())
    sparse = loss.terms(**inputs, **options)
    of_sparse = gradients(leaves, sparse.total)
    seen = []
    build = loss.graph.forward
    loss.graph.forward = lambda *given, **named: seen.append(build(*given, **named)) or seen[-1].dense()
    dense = loss.terms(**inputs, **options)
    assert isinstance(seen[0], SparseRelationGraph)
    for name, x, y in zip(sparse._fields, sparse, dense, strict=True):
        assert_near(x, y, 1e-12, name)
    of_dense = gradients(leaves, dense.total)
    for name in leaves:  # some are 0 but for rounding
        torch.testing.assert_close(of_sparse[name], of_dense[name], rtol=1e-9, atol=1e-12)


def test_positives_as_ids_are_those_of_the_matrix():
    inputs, ids = graph_inputs(n=6, dtype=DOUBLE), torch.tensor([0, 1, 2, 0, 4, 1])
    torch.manual_seed(1)
    module = AssociationGraph(topk=3, candidates=4, exclude_positives=True).double()
    by_ids = module(**inputs, image_ids=ids)
    by_matrix = module(**inputs, positives=ids.unsqueeze(1) == ids)
    assert torch.equal(by_ids.connection, by_matrix.connection)
    assert torch.equal(by_ids.dense().excluded, by_matrix.dense().excluded)
    assert not by_ids.dense().block("i2t").connection[ids.unsqueeze(1) == ids].any()
    dense = AssociationGraph(topk=3, exclude_positives=True).double()
    assert torch.equal(dense(**inputs, image_ids=ids).excluded, by_matrix.excluded)
    with pytest.raises(ValueError, match="give one of them"):
        module(**inputs, image_ids=ids, positives=by_matrix.excluded)
    with pytest.raises(ValueError, match=r"image_ids must have shape \(6,\)"):
        module(**inputs, image_ids=ids[:5])


def test_equal_embeddings_keep_the_number_of_edges():
    inputs = graph_inputs(n=8, dtype=DOUBLE)
    for name in ("image_embedding", "text_embedding"):
        inputs[name] = inputs[name].detach()[:1].expand(8, -1)
    graph = AssociationGraph(topk=3, candidates=3).double()(**inputs)
    assert graph.index.shape == (16, 6)
    assert torch.equal(graph.block("i2i").index, torch.arange(3).expand(8, 3))
    assert graph.block("i2i").connection.all()


@pytest.mark.parametrize("mechanism", ["fusion", pytest.param("standalone", marks=pytest.mark.slow)])
def test_loss_compiles_as_one_graph(mechanism):
    torch.manual_seed(2)
    loss = HREMLoss(
        16,
        graph=AssociationGraph(topk=3, candidates=2),
        interaction=RelationInteraction(16, mechanism=mechanism, num_heads=2, dropout=0.0, gate=0.6),
    ).double()
    inputs = graph_inputs(n=5, dtype=DOUBLE)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    expected = loss(**inputs)
    torch.manual_seed(0)
    got = compiled(**inputs)
    assert_near(got, expected, 1e-12)
    leaves = dict(loss.named_parameters())
    ours, theirs = gradients(leaves, got), gradients(leaves, expected)
    for name in leaves:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-12)


def test_compiled_parts_are_known_for_what_they_are(monkeypatch):
    """Not asked for the rows of all processes, as a module of the caller's own is."""
    monkeypatch.setattr("hrem_layers.loss._whole", lambda graph: pytest.fail("taken for another module"))
    parts = AssociationGraph(topk=3, candidates=2), RelationInteraction(16, num_heads=2, gate=0.6)
    graph, interaction = (torch.compile(part, backend="eager") for part in parts)
    HREMLoss(16, graph=graph, interaction=interaction)(**graph_inputs(n=5))


@pytest.mark.parametrize("pair_loss", [TripletLoss(), InfoNCELoss(), lambda s, p: s.masked_fill(p, 0).exp().mean()])
def test_no_tensor_is_as_large_as_all_pairs_unless_the_pair_loss_asks_for_it(pair_loss, monkeypatch):
    """Nothing that autograd sees; what the operators hold inside, a chunk, is tested apart."""
    from hrem_layers.losses import _streamed

    monkeypatch.setattr(_streamed, "CPU_TILE", 2**14)
    monkeypatch.setattr(_streamed, "LEAST_ROWS", 1)
    n = 512
    loss = HREMLoss(
        16, graph=AssociationGraph(topk=2, candidates=2), interaction=RelationInteraction(16, num_heads=2, gate=0.6),
        pair_loss=pair_loss,
    )  # fmt: skip
    inputs = [torch.randn(*shape, requires_grad=True) for shape in ((n, 16), (n, 16), (n, 2, 4), (n, 2, 4))]
    with LargestTensor() as seen:
        loss(*inputs, image_ids=torch.arange(n) // 2).backward()
    assert (seen.elements < n * n // 4) == isinstance(pair_loss, torch.nn.Module), seen.elements


def test_exact_units_are_made_some_rows_at_a_time(monkeypatch):
    from hrem_layers.relations import neighbors

    monkeypatch.setattr(neighbors, "_UNITS_CHUNK", 3 * 16)
    x = torch.randn(10, 16, requires_grad=True)
    whole = neighbors.exact_units(x)
    assert whole.requires_grad and whole.dtype == torch.float64
    lengths, normalize = [], neighbors.l2_normalize
    monkeypatch.setattr(neighbors, "l2_normalize", lambda rows: lengths.append(len(rows)) or normalize(rows))
    assert torch.equal(neighbors.exact_units(x.detach()), whole)
    assert lengths == [3, 3, 3, 1]
    assert neighbors.exact_units(x.detach()[:0]).shape == (0, 16)


def test_no_rows_in_float64_are_kept_for_the_backward_pass():
    """They would be twice the embeddings of all processes, on every process."""
    torch.manual_seed(0)
    v, u = (torch.randn(12, 16, requires_grad=True) for _ in range(2))
    kept = []

    def keep(x):
        kept.append((x.dtype, tuple(x.shape)))
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        graph = AssociationGraph(candidates=2)(v, u, torch.randn(12, 5, 16), torch.randn(12, 4, 16))
    assert kept
    assert not [shape for dtype, shape in kept if dtype == DOUBLE and shape[-1] == 16]
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(graph.relevance.sum(), (v, u)))
