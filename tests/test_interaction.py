"""RelationInteraction: both mechanisms against PyTorch's layers, nodes without an edge, λ."""

from __future__ import annotations

import math

import pytest
import torch
from support import assert_near, generator, gradients
from torch import nn
from torch.nn.functional import normalize

from hrem_layers import FragmentRelation, RelationGraph, RelationInteraction, TransformerLayer

DOUBLE, D, HEADS, N = torch.float64, 8, 2, 5
MECHANISMS = ("fusion", "standalone")


def interaction(**options):
    torch.manual_seed(1)
    module = RelationInteraction(D, num_heads=HEADS, **{"residual": False, **options}).double().eval()
    with torch.no_grad():  # away from biases of 0 and scales of 1
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def embeddings(n=N, seed=0):
    g = generator(seed)
    return [torch.randn(n, D, generator=g, dtype=DOUBLE).requires_grad_() for _ in range(2)]


def random_graph(n=N, seed=0):
    g = generator(seed)
    connection = torch.rand(2 * n, 2 * n, generator=g) < 0.5
    connection |= torch.eye(2 * n, dtype=torch.bool) | torch.eye(2 * n, dtype=torch.bool).roll(n, dims=0)
    return RelationGraph(connection, torch.randn(2 * n, 2 * n, generator=g, dtype=DOUBLE).requires_grad_())


def torch_layer(ours):
    theirs = nn.TransformerEncoderLayer(D, HEADS, ours.linear1.out_features, dropout=0.0, batch_first=True).double()
    theirs.load_state_dict(ours.state_dict())
    return theirs


def torch_cross(ours, x, context, bias):
    """The same layer as cross-attention, from PyTorch's parts."""
    layer = torch_layer(ours)
    x = layer.norm1(x + layer.self_attn(x, context, context, attn_mask=bias)[0])
    return layer.norm2(x + layer.linear2(layer.linear1(x).relu()))


def bias_of(connection, relevance, weight):
    return (weight * relevance).masked_fill(~connection, -math.inf)


def fusion_by_hand(module, v, u, graph):
    x = torch.cat([normalize(v, dim=1), normalize(u, dim=1)])
    bias = bias_of(*graph[:2], module.relation_weight)
    for layer in module.layers:
        x = torch_layer(layer)(x, bias)
    return x[: len(v)], x[len(v) :]


def standalone_by_hand(module, v, u, graph):
    n = len(v)
    a, s = graph.connection, graph.relevance
    w = module.relation_weight
    x, y = normalize(v, dim=1), normalize(u, dim=1)
    for layer in module.layers:
        x, y = (
            torch_cross(layer["i2t"], x, y, bias_of(a[:n, n:], s[:n, n:], w)),
            torch_cross(layer["t2i"], y, x, bias_of(a[n:, :n], s[n:, :n], w)),
        )
        x = torch_layer(layer["i2i"])(x, bias_of(a[:n, :n], s[:n, :n], w))
        y = torch_layer(layer["t2t"])(y, bias_of(a[n:, n:], s[n:, n:], w))
    return x, y


@pytest.mark.parametrize(("mechanism", "by_hand"), [("fusion", fusion_by_hand), ("standalone", standalone_by_hand)])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("weight", [1.0, -0.7, 0.0])
@pytest.mark.parametrize("ffn_dim", [None, 20])
def test_value_and_gradient(mechanism, by_hand, layers, weight, ffn_dim):
    module = interaction(mechanism=mechanism, num_layers=layers, relation_weight=weight, ffn_dim=ffn_dim)
    (v, u), graph = embeddings(), random_graph()
    inputs = {"v": v, "u": u, "relevance": graph.relevance}
    ours, theirs = module(v, u, graph), by_hand(module, v, u, graph)
    for x, y in zip(ours, theirs, strict=True):
        assert_near(x, y, 1e-12)
    ours_grad, theirs_grad = gradients(inputs, *ours), gradients(inputs, *theirs)
    for name in inputs:
        assert_near(ours_grad[name], theirs_grad[name], 1e-10, name)
    assert ours_grad["relevance"].any() == (weight != 0)
    assert not ours_grad["relevance"][~graph.connection].any()


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_gradcheck(mechanism):
    module = interaction(mechanism=mechanism)
    (v, u), graph = embeddings(2), random_graph(2)
    graph.connection[0] = False  # an image without any edge

    def of_inputs(v, u, relevance):
        return module(v, u, graph._replace(relevance=relevance))

    assert torch.autograd.gradcheck(of_inputs, (v, u, graph.relevance))
    names = [name for name, _ in module.named_parameters()]

    def of_parameters(*parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (v, u, graph))

    assert torch.autograd.gradcheck(of_parameters, tuple(module.parameters()), fast_mode=True)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_node_without_any_edge_keeps_its_value_through_the_residual(mechanism):
    module = interaction(mechanism=mechanism)
    (v, u), graph = embeddings(), random_graph()
    graph.connection[1] = False  # image 1 receives nothing
    graph.connection[N + 2] = False  # nor does text 2
    # what others receive from them stays
    enhanced = module(v, u, graph)
    assert all(torch.isfinite(x).all() for x in enhanced)

    def alone(layer, x):
        x = layer.norm1(x)
        return layer.norm2(x + layer.linear2(layer.linear1(x).relu()))

    for x, row, out, steps in ((v, 1, enhanced[0], ("i2t", "i2i")), (u, 2, enhanced[1], ("t2i", "t2t"))):
        expected = normalize(x, dim=1)[row]
        for layer in module.layers:
            for step in [layer] if mechanism == "fusion" else [layer[name] for name in steps]:
                expected = alone(step, expected)
        assert_near(out[row], expected, 1e-12)
    grads = gradients({"v": v, "u": u, "s": graph.relevance, **dict(module.named_parameters())}, *enhanced)
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    whole = random_graph()
    for x, y, row in zip(enhanced, module(v, u, whole), (1, 2), strict=True):
        others = [i for i in range(N) if i != row]
        if mechanism == "fusion":  # one layer: the others look at inputs, which are the same
            assert_near(x[others], y[others], 1e-12)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_graph_without_edges_is_the_feed_forward_alone(mechanism):
    module = interaction(mechanism=mechanism)
    (v, u), graph = embeddings(), random_graph()
    graph = graph._replace(connection=torch.zeros_like(graph.connection))
    first = module(v, u, graph)
    second = module(v, u, graph._replace(relevance=torch.full_like(graph.relevance, math.nan)))
    for x, y in zip(first, second, strict=True):
        assert torch.isfinite(x).all()
        assert torch.equal(x, y)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_lambda_zero_attends_on_edges_without_regard_to_relevance(mechanism):
    module = interaction(mechanism=mechanism, relation_weight=0.0)
    (v, u), graph = embeddings(), random_graph()
    expected = module(v, u, graph)
    other = module(v, u, graph._replace(relevance=torch.randn_like(graph.relevance)))
    for x, y in zip(other, expected, strict=True):
        assert torch.isfinite(x).all()
        assert torch.equal(x, y)
    moved = module(v, u, graph._replace(connection=~graph.connection))
    assert not torch.equal(moved[0], expected[0])


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_order_of_the_batch(mechanism):
    module = interaction(mechanism=mechanism, num_layers=2)
    (v, u), graph = embeddings(), random_graph()
    order = torch.tensor([3, 0, 4, 1, 2])
    both = torch.cat([order, order + N])
    here = module(v, u, graph)
    there = module(v[order], u[order], RelationGraph(*(x[both][:, both] for x in graph[:2])))
    for x, y in zip(there, here, strict=True):
        assert_near(x, y[order], 1e-12)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_embeddings_of_any_length_zero_included(mechanism):
    module = interaction(mechanism=mechanism)
    (v, u), graph = embeddings(), random_graph()
    for x, y in zip(module(5 * v, u / 3, graph), module(v, u, graph), strict=True):
        assert_near(x, y, 1e-12)
    zero = torch.zeros(N, D, dtype=DOUBLE).requires_grad_()
    grads = gradients({"zero": zero, "u": u}, *module(zero, u, graph))
    assert all(torch.isfinite(grad).all() for grad in grads.values())


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_batch_of_one(mechanism):
    module = interaction(mechanism=mechanism)
    (v, u), graph = embeddings(1), random_graph(1)
    assert all(torch.isfinite(x).all() for x in module(v, u, graph))


def test_standalone_steps_have_weights_of_their_own():
    module = interaction(mechanism="standalone", num_layers=2)
    assert len(module.layers) == 2
    assert all(set(layer) == {"i2t", "t2i", "i2i", "t2t"} for layer in module.layers)
    storages = {p.data_ptr() for p in module.parameters()}
    assert len(storages) == len(list(module.parameters())) == 2 * 4 * 12


def test_images_depend_on_texts_only_through_edges():
    module = interaction(mechanism="fusion")
    (v, u), graph = embeddings(), random_graph()
    graph.connection[:N, N:] = False
    (v_grad, u_grad) = gradients({"v": v, "u": u}, module(v, u, graph)[0]).values()
    assert v_grad.any()
    assert not u_grad.any()


def test_defaults():
    module = RelationInteraction(32)
    assert (module.mechanism, module.relation_weight, len(module.layers)) == ("fusion", 1.0, 1)
    layer = module.layers[0]
    assert (layer.self_attn.num_heads, layer.linear1.out_features, layer.dropout.p) == (16, 32, 0.1)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(mechanism, dtype):
    wide = interaction(mechanism=mechanism).to(dtype).float()
    v, u = (x.detach().to(dtype) for x in embeddings())
    graph = random_graph()
    graph = RelationGraph(graph.connection, graph.relevance.detach().to(dtype))
    expected = wide(v.float(), u.float(), graph._replace(relevance=graph.relevance.float()))
    half = interaction(mechanism=mechanism).to(dtype)(v, u, graph)
    for x, y in zip(half, expected, strict=True):
        assert x.dtype == dtype
        assert_near(x.float(), y, 0.01 if dtype == torch.float16 else 0.05)
    # float32 relevance, as the graph gives it under autocast, is welcome to half embeddings
    mixed = interaction(mechanism=mechanism).to(dtype)(v, u, graph._replace(relevance=graph.relevance.float()))
    assert torch.equal(mixed[0], half[0])


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_residual_adds_the_plain_direction(mechanism):
    bare, module = interaction(mechanism=mechanism), interaction(mechanism=mechanism, residual=True)
    module.load_state_dict(bare.state_dict())
    v, u = torch.randn(N, D, dtype=DOUBLE), 7 * torch.randn(N, D, dtype=DOUBLE)
    graph = RelationGraph(torch.rand(2 * N, 2 * N) < 0.7, torch.randn(2 * N, 2 * N, dtype=DOUBLE))
    for got, x, plain in zip(module(v, u, graph), bare(v, u, graph), (v, u), strict=True):
        assert_near(got, normalize(plain, dim=1) + normalize(x, dim=1), 1e-12)


class Collapsed(nn.Module):
    def forward(self, x, bias=None, context=None):
        return torch.ones_like(x)


def test_residual_keeps_apart_what_a_collapsed_layer_makes_equal():
    v, u = torch.randn(N, D), torch.randn(N, D)
    graph = RelationGraph(torch.ones(2 * N, 2 * N, dtype=torch.bool), torch.zeros(2 * N, 2 * N))
    enhanced, _ = RelationInteraction(D, layer=Collapsed)(v, u, graph)
    assert torch.pdist(normalize(enhanced, dim=1)).min() > 0.05
    enhanced, _ = RelationInteraction(D, layer=Collapsed, residual=False)(v, u, graph)
    assert torch.pdist(enhanced).max() == 0


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize(("n", "m"), [(2, 5), (5, 2), (1, 3)])
def test_n_images_with_m_texts(mechanism, n, m):
    """Rectangular blocks are what is left of square ones when the other nodes have no edges."""
    module, big = interaction(mechanism=mechanism), max(n, m)
    v, u = torch.randn(big, D, dtype=DOUBLE), torch.randn(big, D, dtype=DOUBLE)
    there = torch.cat([torch.arange(big) < n, torch.arange(big) < m])
    connection = (torch.rand(2 * big, 2 * big) < 0.7) & there.unsqueeze(0) & there.unsqueeze(1)
    relevance = torch.randn(2 * big, 2 * big, dtype=DOUBLE)
    whole = module(v, u, RelationGraph(connection, relevance))
    part = RelationGraph(connection[there][:, there], relevance[there][:, there], num_images=n)
    for got, expected, count in zip(module(v[:n], u[:m], part), whole, (n, m), strict=True):
        assert_near(got, expected[:count], 1e-12)


@pytest.mark.parametrize("layers", ["fusion", "standalone"])
def test_a_factory_brings_another_layer(layers):
    made = []

    def factory():
        made.append(TransformerLayer(D, num_heads=HEADS, norm_first=True, activation="gelu"))
        return made[-1]

    module = RelationInteraction(D, mechanism=layers, num_layers=2, layer=factory)
    assert len(made) == (2 if layers == "fusion" else 8)
    assert {id(x) for x in made} <= {id(x) for x in module.modules()}
    graph = RelationGraph(torch.ones(2 * N, 2 * N, dtype=torch.bool), torch.zeros(2 * N, 2 * N))
    sum(x.sum() for x in module(torch.randn(N, D), torch.randn(N, D), graph)).backward()
    assert all(p.grad is not None for p in module.parameters())


def test_a_factory_that_is_none_is_refused():
    one = TransformerLayer(D, num_heads=HEADS)
    for bad, error in ((one, TypeError), (lambda: 3, TypeError), (lambda: one, ValueError), ("gelu", TypeError)):
        with pytest.raises(error, match="layer must"):
            RelationInteraction(D, num_layers=2, layer=bad)


@pytest.mark.parametrize("change", [lambda x: (x, None), lambda x: x.mean(-2, keepdim=True), lambda x: x[..., :1]])
def test_what_a_layer_returns_is_checked(change):
    class Changed(nn.Module):
        def forward(self, x, bias=None, context=None):
            return change(x)

    graph = RelationGraph(torch.ones(2 * N, 2 * N, dtype=torch.bool), torch.zeros(2 * N, 2 * N))
    for mechanism in ("fusion", "standalone"):
        with pytest.raises((TypeError, ValueError), match="what layer returns must"):
            RelationInteraction(D, mechanism=mechanism, layer=Changed)(torch.randn(N, D), torch.randn(N, D), graph)
    with pytest.raises((TypeError, ValueError), match="what layer returns must"):
        FragmentRelation(D, layer=Changed)(torch.randn(N, 3, D))


def test_excluded_pairs_do_not_meet_over_a_third_node():
    """Standalone: what an image becomes does not depend on its own text, whatever the edges."""
    module = interaction(mechanism="standalone")
    v, u = torch.randn(N, D, dtype=DOUBLE), torch.randn(N, D, dtype=DOUBLE, requires_grad=True)
    connection = torch.rand(2 * N, 2 * N) < 0.6
    own = torch.eye(N, dtype=torch.bool)
    connection[:N, N:] &= ~own
    connection[N:, :N] &= ~own
    relevance = torch.randn(2 * N, 2 * N, dtype=DOUBLE)
    leaky, tight = (RelationGraph(connection, relevance, N, None, e) for e in (None, own))

    def reach(graph):
        images, _ = module(v, u, graph)
        rows = [torch.autograd.grad(images[i].square().sum(), u, retain_graph=True)[0].abs().sum(1) for i in range(N)]
        return torch.stack(rows)

    assert reach(leaky).diagonal().any()
    assert not reach(tight).diagonal().any()
    assert reach(tight).any()


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("where", ["embedding", "relevance on an edge"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_goes_on(mechanism, where, bad):
    module = interaction(mechanism=mechanism)
    v, u = torch.randn(N, D, dtype=DOUBLE), torch.randn(N, D, dtype=DOUBLE)
    relevance = torch.randn(2 * N, 2 * N, dtype=DOUBLE)
    if where == "embedding":
        v[1, 2] = bad
    else:
        relevance[1] = bad
    images, _ = module(v, u, RelationGraph(torch.ones(2 * N, 2 * N, dtype=torch.bool), relevance))
    assert not torch.isfinite(images[1]).any()
