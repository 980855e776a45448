"""AssociationGraph and RelationGraph: A, S and the regulariser against the formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_near, generator, gradients, graph_inputs, repad
from torch.nn.functional import normalize

from hrem_layers import AssociationGraph, RelationBlock, RelationGraph, align_fragments, pair_cosines
from hrem_layers.relations import distance_relevance, nearest

DOUBLE = torch.float64


def graph_module(**options):
    torch.manual_seed(1)
    return AssociationGraph(**{"topk": 3, **options}).double()


def mlp_by_hand(mlp, q):
    hidden = (q @ mlp[0].weight.t() + mlp[0].bias).clamp(min=0)
    return (hidden @ mlp[2].weight.t() + mlp[2].bias).squeeze(-1)


def edges_by_hand(similarity, k):
    """Row by row: everything at least as similar as the k-th of the sorted row."""
    rows = []
    for row in similarity.tolist():
        kth = sorted(row, reverse=True)[k - 1]
        rows.append([value >= kth for value in row])
    return torch.tensor(rows)


def relevance_by_hand(x, y, sigma, squared):
    x, y = normalize(x, dim=1), normalize(y, dim=1)
    power = 2 if squared else 1
    return torch.tensor(
        [[math.exp(-(math.dist(a, b) ** power) / sigma) for b in y.tolist()] for a in x.tolist()], dtype=DOUBLE
    )


@settings(max_examples=40)
@given(
    n=st.integers(1, 6), r=st.integers(1, 4), w=st.integers(1, 4), seed=st.integers(0, 2**31),
    ratio=st.sampled_from([0.01, 0.3, 0.5, 1.0]), sigma=st.sampled_from([0.5, 1.0, 3.0]), squared=st.booleans(),
    mode=st.sampled_from(["scan", "cosine", "dot"]), topk=st.integers(1, 5), padded=st.booleans(),
)  # fmt: skip
def test_connection_and_relevance(n, r, w, seed, ratio, sigma, squared, mode, topk, padded):
    inputs = graph_inputs(n=n, r=r, w=w, dim=4, seed=seed, dtype=DOUBLE)
    if not padded:
        inputs["image_mask"] = inputs["text_mask"] = None
    module = graph_module(topk=topk, neighbor_ratio=ratio, sigma=sigma, squared_distance=squared, alignment=mode)
    graph = module(**inputs)
    v, u, r_, c_, r_mask, c_mask = inputs.values()
    aligned = align_fragments(r_, c_, r_mask, c_mask, topk=topk, mode=mode)
    k = max(1, int(n * ratio))
    expected = {
        "i2i": (normalize(v, dim=1) @ normalize(v, dim=1).t(), relevance_by_hand(v, v, sigma, squared)),
        "t2t": (normalize(u, dim=1) @ normalize(u, dim=1).t(), relevance_by_hand(u, u, sigma, squared)),
        "i2t": (aligned.mean_i2t, mlp_by_hand(module.mlp_i2t, aligned.top_i2t) + aligned.mean_i2t),
        "t2i": (aligned.mean_t2i, mlp_by_hand(module.mlp_t2i, aligned.top_t2i) + aligned.mean_t2i),
    }
    assert graph.connection.shape == graph.relevance.shape == (2 * n, 2 * n)
    for name, (similarity, relevance) in expected.items():
        block = graph.block(name)
        assert_near(block.relevance, relevance, 1e-10, name)
        if similarity.unique().numel() == similarity.numel() or name in ("i2i", "t2t"):
            assert torch.equal(block.connection, edges_by_hand(similarity, k)), name
        assert (block.connection.sum(dim=1) >= k).all()


@pytest.mark.parametrize(
    ("n", "ratio", "k"),
    [
        (1, 0.01, 1),
        (1, 1.0, 1),
        (5, 0.1, 1),
        (7, 0.5, 3),
        (8, 0.5, 4),
        (10, 0.99, 9),
        (6, 1.0, 6),
        (50, 0.58, 29),
    ],  # 28.999999999999996 in floating point
)
def test_how_many_neighbors(n, ratio, k):
    graph = graph_module(neighbor_ratio=ratio)(**graph_inputs(n=n, dtype=DOUBLE))
    assert all((graph.block(name).connection.sum(dim=1) == k).all() for name in ("i2i", "i2t", "t2i", "t2t"))


def test_all_that_tie_with_the_last_neighbor_are_kept():
    similarity = torch.tensor([[0.9, 0.5, 0.5, 0.1], [0.2, 0.2, 0.2, 0.2], [-1.0, -2.0, -3.0, -4.0]])
    assert nearest(similarity, 2).tolist() == [
        [True, True, True, False], [True] * 4, [True, True, False, False],
    ]  # fmt: skip
    assert nearest(similarity, 1).sum(dim=1).tolist() == [1, 4, 1]
    # two equal texts: an image that keeps one keeps the other
    inputs = {name: x.detach().clone() for name, x in graph_inputs(n=4, dtype=DOUBLE).items()}
    for name in ("text_embedding", "text_fragments", "text_mask"):
        inputs[name][1] = inputs[name][0]
    graph = graph_module(neighbor_ratio=0.25)(**inputs)
    for name in ("i2t", "t2t"):
        connection = graph.block(name).connection
        assert torch.equal(connection[:, 0], connection[:, 1]), name


def test_no_gradient_through_the_connection():
    graph = graph_module()(**graph_inputs(dtype=DOUBLE))
    assert graph.connection.dtype == torch.bool
    assert not graph.connection.requires_grad
    assert not nearest(torch.rand(3, 3, requires_grad=True), 2).requires_grad


@pytest.mark.parametrize("detach", [True, False])
def test_gradient_to_embeddings_always_and_to_fragments_when_asked(detach):
    inputs = graph_inputs(dtype=DOUBLE)
    module = graph_module(detach_fragments=detach)
    grads = gradients({**inputs, **dict(module.named_parameters())}, module(**inputs).relevance)
    assert grads["image_embedding"].any()
    assert grads["text_embedding"].any()
    assert bool(grads["image_fragments"].any()) is not detach
    assert bool(grads["text_fragments"].any()) is not detach
    assert all(grads[name].any() for name, _ in module.named_parameters())


@pytest.mark.parametrize("mode", ["scan", "cosine", "dot"])
@pytest.mark.parametrize("squared", [False, True])
def test_gradcheck(mode, squared):
    inputs = graph_inputs(n=2, r=3, w=2, dim=3, dtype=DOUBLE)
    module = graph_module(topk=2, alignment=mode, squared_distance=squared, detach_fragments=False)
    *leaves, r_mask, c_mask = inputs.values()
    assert torch.autograd.gradcheck(lambda *x: module(*x, r_mask, c_mask).relevance, tuple(leaves))
    names = [name for name, _ in module.named_parameters()]

    def with_parameters(*parameters):
        weights = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, weights, tuple(inputs.values())).relevance

    assert torch.autograd.gradcheck(with_parameters, tuple(module.parameters()))


@settings(max_examples=30)
@given(
    fill=st.sampled_from([None, math.nan, math.inf, -math.inf, 1e300]), extra=st.integers(0, 4),
    seed=st.integers(0, 2**31), detach=st.booleans(), mode=st.sampled_from(["scan", "cosine", "dot"]),
)  # fmt: skip
def test_padding_may_hold_anything_anywhere(fill, extra, seed, detach, mode):
    inputs = graph_inputs(n=4, r=3, w=4, dim=5, seed=seed, dtype=DOUBLE)
    module = graph_module(detach_fragments=detach, alignment=mode)
    wide, back = dict(inputs), {}
    for side in ("image", "text"):
        leaf, mask, back[f"{side}_fragments"] = repad(
            inputs[f"{side}_fragments"], inputs[f"{side}_mask"], fill=fill, extra=extra, seed=seed
        )
        wide |= {f"{side}_fragments": leaf, f"{side}_mask": mask}
    here, there = module(**inputs), module(**wide)
    assert torch.equal(here.connection, there.connection)
    assert_near(there.relevance, here.relevance, 1e-11)
    parameters = dict(module.named_parameters())
    here_grads = gradients({**inputs, **parameters}, here.relevance)
    there_grads = gradients({**wide, **parameters}, there.relevance)
    for name, expected in here_grads.items():
        actual = there_grads[name]
        if name in back:
            assert not actual[~wide[name.replace("fragments", "mask")]].any()
            actual = back[name](actual)
        assert_near(actual, expected, 1e-9, name)


def test_order_of_the_batch():
    inputs = graph_inputs(n=5, dtype=DOUBLE)
    order = torch.tensor([3, 0, 4, 1, 2])
    both = torch.cat([order, order + 5])
    module = graph_module()
    here, there = module(**inputs), module(**{name: x[order] for name, x in inputs.items()})
    assert torch.equal(there.connection, here.connection[both][:, both])
    assert_near(there.relevance, here.relevance[both][:, both], 1e-12)


def test_swapping_images_and_texts_swaps_the_blocks():
    inputs = graph_inputs(n=5, dtype=DOUBLE)
    module = graph_module()
    swapped = {name.replace("image", "_").replace("text", "image").replace("_", "text", 1) if "image" in name
               else name.replace("text", "image"): x for name, x in inputs.items()}  # fmt: skip
    module.mlp_t2i.load_state_dict(module.mlp_i2t.state_dict())
    here, there = module(**inputs), module(**swapped)
    # the connection across goes by p; "scan" treats the two directions alike
    for name, other in (("i2i", "t2t"), ("i2t", "t2i"), ("t2i", "i2t")):
        assert torch.equal(here.block(name).connection, there.block(other).connection), name
        assert_near(here.block(name).relevance, there.block(other).relevance, 1e-12, name)


def test_embeddings_of_any_length():
    inputs = graph_inputs(dtype=DOUBLE)
    module = graph_module()
    scaled = {
        **inputs,
        "image_embedding": 7 * inputs["image_embedding"],
        "text_embedding": inputs["text_embedding"] / 9,
    }
    here, there = module(**inputs), module(**scaled)
    assert torch.equal(here.connection, there.connection)
    assert_near(there.relevance, here.relevance, 1e-12)
    regularization = [
        module.regularization(here, each["image_embedding"], each["text_embedding"]) for each in (inputs, scaled)
    ]
    assert_near(*regularization, 1e-10)


@pytest.mark.parametrize("squared", [False, True])
def test_equal_embeddings_have_relevance_one_and_a_finite_gradient(squared):
    x = torch.randn(1, 6).expand(4, 6).clone().requires_grad_()
    inputs = {**graph_inputs(n=4, dim=6), "image_embedding": x}
    module = AssociationGraph(topk=3, squared_distance=squared)
    graph = module(**inputs)
    assert torch.equal(graph.block("i2i").relevance, torch.ones(4, 4))
    assert torch.equal(graph.block("t2t").relevance.diagonal(), torch.ones(4))
    grads = gradients(inputs, graph.relevance)
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_zero_embeddings_and_items_without_real_fragments():
    inputs = graph_inputs(n=4, dtype=DOUBLE)
    leaves = {}
    for name, x in inputs.items():
        x = x.detach().clone()
        x[1] = 0  # a zero embedding, zero fragments, an empty mask
        leaves[name] = x.requires_grad_(x.dtype.is_floating_point)
    module = graph_module(detach_fragments=False)
    graph = module(**leaves)
    assert torch.isfinite(graph.relevance).all()
    assert (graph.connection.view(8, 2, 4).sum(dim=2) >= 2).all()
    no_fragments = mlp_by_hand(module.mlp_i2t, torch.zeros(3).double())
    assert_near(graph.block("i2t").relevance[1], no_fragments.expand(4), 1e-12)
    grads = gradients({**leaves, **dict(module.named_parameters())}, graph.relevance)
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    assert not grads["image_fragments"][1].any()
    others = torch.tensor([0, 2, 3])
    rest = graph_module(detach_fragments=False)(**{name: x[others] for name, x in inputs.items()})
    both = torch.cat([others, others + 4])
    assert_near(graph.relevance[both][:, both], rest.relevance, 1e-12)


def test_texts_shorter_than_topk():
    inputs = graph_inputs(n=3, r=2, w=1, dtype=DOUBLE)
    module = graph_module(topk=10)
    graph = module(**inputs)
    assert torch.isfinite(graph.relevance).all()
    q = align_fragments(*list(inputs.values())[2:], topk=10, mode="cosine").top_t2i
    assert not q[..., 1:].any()
    assert_near(graph.block("t2i").relevance, mlp_by_hand(module.mlp_t2i, q) + q[..., 0], 1e-12)


def test_batch_of_one():
    inputs = graph_inputs(n=1, dtype=DOUBLE)
    module = graph_module()
    graph = module(**inputs)
    assert graph.connection.all()
    regularization = module.regularization(graph, inputs["image_embedding"], inputs["text_embedding"])
    assert regularization.item() == 0
    assert all(torch.isfinite(x).all() for x in gradients(inputs, graph.relevance, regularization).values())


def test_chunk_size_changes_nothing():
    inputs = graph_inputs(n=5, dtype=DOUBLE)
    graphs = [graph_module(chunk_size=size)(**inputs) for size in (None, 1, 7)]
    for graph in graphs[1:]:
        assert torch.equal(graph.connection, graphs[0].connection)
        assert_near(graph.relevance, graphs[0].relevance, 1e-12)


def regularization_by_hand(relevance, v, u, sigma, squared):
    n = len(v)
    guide = relevance_by_hand(v, u, sigma, squared)
    total = 0.0
    for learned, target in ((relevance[:n, n:], guide), (relevance[n:, :n], guide.t())):
        for row, goal in zip(learned.tolist(), target.tolist(), strict=True):
            p, q = ([math.exp(x) / sum(math.exp(y) for y in values) for x in values] for values in (row, goal))
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / n
    return torch.tensor(total, dtype=DOUBLE)


@pytest.mark.parametrize("sigma", [0.5, 2.0])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("n", [2, 5])
def test_regularization(n, sigma, squared):
    inputs = graph_inputs(n=n, dtype=DOUBLE)
    v, u = inputs["image_embedding"], inputs["text_embedding"]
    module = graph_module(sigma=sigma, squared_distance=squared)
    relevance = torch.randn(2 * n, 2 * n, dtype=DOUBLE).requires_grad_()
    graph = RelationGraph(torch.ones(2 * n, 2 * n, dtype=torch.bool), relevance)
    value = module.regularization(graph, v, u)
    assert_near(value, regularization_by_hand(relevance, v, u, sigma, squared), 1e-10)
    value.backward()
    assert v.grad is None  # the guide is a target
    assert u.grad is None
    assert relevance.grad[:n, n:].any()
    assert not relevance.grad[:n, :n].any()
    assert torch.autograd.gradcheck(lambda s: module.regularization(graph._replace(relevance=s), v, u), relevance)


def test_regularization_is_zero_where_learned_and_guide_agree():
    v, u = (torch.randn(4, 6, dtype=DOUBLE, generator=generator(i)) for i in range(2))
    guide = relevance_by_hand(v, u, 1.0, False)
    relevance = torch.zeros(8, 8, dtype=DOUBLE)
    relevance[:4, 4:], relevance[4:, :4] = guide + 3.0, guide.t() - 1.0  # a constant does not matter to a softmax
    graph = RelationGraph(torch.ones(8, 8, dtype=torch.bool), relevance)
    assert graph_module().regularization(graph, v, u).abs().item() < 1e-14


def test_distances_come_from_differences():
    x = normalize(torch.randn(50, 512), dim=1)
    relevance = distance_relevance(pair_cosines(x, x).across, 1.0, squared=False, dtype=torch.float32)
    assert torch.equal(relevance.diagonal(), torch.ones(50))


def test_dtypes():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        inputs = graph_inputs(dtype=dtype)
        module = AssociationGraph(topk=3).to(dtype)
        graph = module(**inputs)
        assert graph.relevance.dtype == dtype
        assert graph.connection.dtype == torch.bool
        regularization = module.regularization(graph, inputs["image_embedding"], inputs["text_embedding"])
        assert regularization.dtype == (DOUBLE if dtype == DOUBLE else torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # whatever the encoders end in, S is as exact as the similarities that it came from
        for dtype in (torch.float32, torch.bfloat16):
            assert AssociationGraph(topk=3)(**graph_inputs(dtype=dtype)).relevance.dtype == torch.float32


def test_blocks():
    connection = torch.arange(36).view(6, 6) % 2 == 0
    relevance = torch.arange(36.0).view(6, 6)
    graph = RelationGraph(connection, relevance)
    assert graph.block("i2t").relevance.tolist() == [[3.0, 4.0, 5.0], [9.0, 10.0, 11.0], [15.0, 16.0, 17.0]]
    assert graph.block("t2i").relevance[0].tolist() == [18.0, 19.0, 20.0]  # rows receive: text 0 from the images
    rows = [torch.cat([graph.block(f"{a}2i").relevance, graph.block(f"{a}2t").relevance], dim=1) for a in "it"]
    assert torch.equal(torch.cat(rows), relevance)
    assert torch.equal(graph.block("t2t").connection, connection[3:, 3:])
    assert isinstance(graph.block("i2i"), RelationBlock)
    assert not hasattr(graph.block("i2i"), "block")
    wide = RelationGraph(connection, relevance, num_images=2)
    assert wide.block("i2t").relevance.tolist() == relevance[:2, 2:].tolist()
    assert wide.block("t2t").relevance.tolist() == relevance[2:, 2:].tolist()


@pytest.mark.parametrize("weight", [0.0, 1.0, -2.5])
def test_attention_bias(weight):
    connection = torch.tensor([[True, False], [True, True]])
    # off the edges S may hold anything
    relevance = torch.tensor([[0.5, math.nan], [-1.0, math.inf if weight == 0 else 2.0]], requires_grad=True)
    if weight == 0:
        connection[1, 1] = False
    bias = RelationGraph(connection, relevance).attention_bias(weight)
    expected = [[0.5 * weight, -math.inf], [-weight, -math.inf if weight == 0 else 2 * weight]]
    assert torch.equal(bias, torch.tensor(expected))
    (grad,) = torch.autograd.grad(bias[connection].sum(), relevance)
    assert torch.equal(grad, torch.where(connection, weight, 0.0))


def test_defaults():
    module = AssociationGraph()
    names = "topk", "neighbor_ratio", "sigma", "squared_distance", "alignment", "detach_fragments", "chunk_size"
    assert [getattr(module, name) for name in names] == [10, 0.5, 1.0, False, "cosine", True, None]
    shapes = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    assert shapes == {
        f"mlp_{d}.{i}.{kind}": shape
        for d in ("i2t", "t2i")
        for i, kind, shape in ((0, "weight", (10, 10)), (0, "bias", (10,)), (2, "weight", (1, 10)), (2, "bias", (1,)))
    }


def test_runs_without_masks():
    full = graph_inputs(dtype=DOUBLE)
    full["image_mask"], full["text_mask"] = (torch.ones_like(full[f"{side}_mask"]) for side in ("image", "text"))
    module = graph_module()
    assert_near(module(*list(full.values())[:4]).relevance, module(**full).relevance, 1e-12)


# ties, order, and what is not finite


@pytest.mark.parametrize("mode", ["scan", "cosine", "dot"])
@pytest.mark.parametrize(("r", "w"), [(1, 1), (1, 4), (3, 1), (3, 4)])
@pytest.mark.parametrize("twins", ["none", "duplicated items", "one embedding"])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_edges_do_not_depend_on_order_or_chunk(mode, r, w, twins, dtype):
    inputs = {name: x.detach().clone() for name, x in graph_inputs(n=7, r=r, w=w, dtype=dtype).items()}
    for name, x in inputs.items():
        if twins == "duplicated items":
            x[4:] = x[:3]
        elif twins == "one embedding" and name.endswith("embedding"):
            x[:] = x[:1]
    module = graph_module(alignment=mode).to(dtype)
    here = module(**inputs)
    for seed in range(5):
        order = torch.randperm(7, generator=generator(seed))
        both = torch.cat([order, order + 7])
        module.chunk_size = [None, 1, 3, 7, 49][seed]
        there = module(**{name: x[order] for name, x in inputs.items()})
        assert torch.equal(there.connection, here.connection[both][:, both]), seed


def test_values_a_few_ulp_apart_tie_and_others_do_not():
    row = torch.tensor([[0.5, 0.5 - 2e-7, 0.5 - 1e-5, 0.9]])
    assert nearest(row, 2).tolist() == [[True, True, False, True]]
    assert nearest(1000 * row, 2, scale=None).tolist() == [[True, True, False, True]]
    assert nearest(row.double(), 2).tolist() == [[True, False, False, True]]


def test_the_k_nearest_are_chosen_among_the_allowed():
    row, allowed = torch.tensor([[0.9, 0.5, 0.4, 0.3]]), torch.tensor([[False, True, True, True]])
    assert nearest(row, 2, allowed=allowed).tolist() == [[False, True, True, False]]
    assert nearest(row, 4, allowed=allowed).tolist() == [[False, True, True, True]]
    assert not nearest(row, 1, allowed=allowed & False).any()


@pytest.mark.parametrize("candidates", [None, 3])
@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_exclude_positives(candidates, ratio):
    inputs, ids = graph_inputs(n=6, dtype=DOUBLE), torch.tensor([0, 1, 2, 0, 4, 5])
    positives = ids.unsqueeze(1) == ids
    graph = graph_module(exclude_positives=True, neighbor_ratio=ratio, candidates=candidates)(
        **inputs, positives=positives
    ).dense()
    assert not graph.block("i2t").connection[positives].any()
    assert not graph.block("t2i").connection[positives.t()].any()
    if candidates is None:
        least = min(max(1, int(6 * ratio)), 4)
        assert (graph.block("i2t").connection.sum(dim=1) >= least).all()
    assert torch.equal(graph.excluded, positives)
    open_graph = graph_module(neighbor_ratio=ratio, candidates=candidates)(**inputs).dense()
    assert torch.equal(graph.block("i2i").connection, open_graph.block("i2i").connection)
    assert torch.equal(graph.relevance, open_graph.relevance)


@pytest.mark.parametrize("candidates", [None, 2])
@pytest.mark.parametrize("name", ["image_embedding", "text_embedding", "image_fragments", "text_fragments"])
@pytest.mark.parametrize("mode", ["scan", "cosine", "dot"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_reaches_an_edge(candidates, name, mode, bad):
    inputs = {key: x.detach().clone() for key, x in graph_inputs(n=5, dtype=DOUBLE).items()}
    place = inputs[name.replace("fragments", "mask")][1].nonzero()[0] if name.endswith("fragments") else ()
    inputs[name][(1, *place, 2)] = bad
    graph = graph_module(alignment=mode, candidates=candidates)(**inputs)
    assert not torch.isfinite(graph.relevance[graph.connection]).all()


def test_given_cosines_of_another_device_are_refused():
    v, u = torch.randn(2, 3, 8)
    elsewhere = type(pair_cosines(v, u))(*(x.to("meta") for x in pair_cosines(v, u)))
    with pytest.raises(ValueError, match=r"cosines\.images must be on cpu like the other inputs, got .* meta"):
        AssociationGraph()(v, u, torch.randn(3, 4, 5), torch.randn(3, 6, 5), cosines=elsewhere)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_given_cosines_that_are_not_finite_have_no_relevance(bad):
    relevance = distance_relevance(torch.tensor([1.0, bad, 0.0]), 1.0, squared=False, dtype=torch.float32)
    assert torch.isfinite(relevance).tolist() == [True, False, True]


@pytest.mark.parametrize("scale", [1e-20, 1e19])
def test_very_long_and_very_short_embeddings(scale):
    inputs = graph_inputs(n=5)
    module = AssociationGraph(topk=3)
    scaled = {name: x.detach() * scale if x.dtype.is_floating_point else x for name, x in inputs.items()}
    here, there = module(**inputs), module(**scaled)
    assert torch.equal(here.connection, there.connection)
    assert_near(there.relevance, here.relevance, 1e-5)


# N images with M texts


@pytest.mark.parametrize("candidates", [None, 2, 4])
def test_several_texts_per_image(candidates):
    """The blocks are those of a batch in which every image stands once for each of its texts."""
    index = torch.tensor([0, 2, 1, 0, 2, 2])
    wide = {name: x.detach() for name, x in graph_inputs(n=6, dtype=DOUBLE).items()}
    once = {name: x[:3] if name.startswith("image") else x for name, x in wide.items()}
    module = graph_module(candidates=candidates, neighbor_ratio=1.0)
    given = module(**once, image_index=index)
    graph = given.dense()
    assert given.num_images == graph.num_images == 3
    assert graph.connection.shape == graph.relevance.shape == (9, 9)
    repeated = {name: x[index] if name.startswith("image") else x for name, x in once.items()}
    expected = graph_module(neighbor_ratio=1.0)(**repeated)
    first = torch.tensor([0, 2, 1])  # where image 0, 1, 2 stands first in the repeated batch
    for name in ("i2i", "i2t", "t2i", "t2t"):
        rows, columns = (first if side == "i" else torch.arange(6) for side in (name[0], name[2]))
        block, want = graph.block(name), expected.block(name)
        on_edges = block.connection
        assert_near(block.relevance[on_edges], want.relevance[rows][:, columns][on_edges], 1e-12, name)
        assert on_edges.all() or candidates in (2, 4)
    value = module.regularization(given, once["image_embedding"], once["text_embedding"])
    assert_near(value, module.regularization(graph, once["image_embedding"], once["text_embedding"]), 1e-12)
    assert value > 0


def test_image_index_is_checked():
    inputs = graph_inputs(n=4)
    texts = {name: torch.cat([x, x]) if name.startswith("text") else x for name, x in inputs.items()}
    with pytest.raises(ValueError, match=r"text_embedding must have shape \(4, 16\)"):
        graph_module()(**texts)
    for bad, error in (
        (torch.arange(8), ValueError), (torch.arange(8.0), TypeError), (torch.arange(7) % 4, ValueError),
        (-torch.ones(8, dtype=torch.long), ValueError), ([0] * 8, TypeError),
        (torch.ones(8, dtype=torch.bool), TypeError),
    ):  # fmt: skip
        with pytest.raises(error, match="image_index"):
            graph_module()(**texts, image_index=bad)


# own alignment


def test_own_alignment():
    seen = []

    def mine(images, texts, image_mask, text_mask, topk):
        seen.append(topk)
        return align_fragments(images, texts, image_mask, text_mask, topk=topk, mode="dot")

    inputs = graph_inputs(dtype=DOUBLE)
    here, there = graph_module(alignment=mine)(**inputs), graph_module(alignment="dot")(**inputs)
    assert seen == [3]
    assert torch.equal(here.connection, there.connection)
    assert torch.equal(here.relevance, there.relevance)
    for bad in (lambda *_: 3, lambda *given: tuple(mine(*given)), lambda *given: mine(*given[:4], 2)):
        with pytest.raises((TypeError, ValueError), match="alignment"):
            graph_module(alignment=bad)(**inputs)
    with pytest.raises(ValueError, match="candidates"):
        graph_module(alignment=mine, candidates=2)
    with pytest.raises(ValueError, match="alignment"):
        AssociationGraph(alignment="cosin")
