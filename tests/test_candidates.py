"""``candidates=k``: the dense graph, restricted to each row's k most similar nodes."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LargestTensor
from torch import Tensor
from torch.autograd import gradcheck

from hrem_layers import AssociationGraph, HREMLoss, SparseRelationGraph, align_fragments
from hrem_layers.alignment import parts as parts_module
from hrem_layers.alignment.candidates import align_candidates
from hrem_layers.alignment.parts import Part, align_in_parts
from hrem_layers.relations import nearest

GOLDEN = Path(__file__).parent / "golden"
MODES = ("scan", "cosine", "dot")


def batch(seed: int, n: int, r: int, w: int, d: int, masked: bool = True, dtype: torch.dtype = torch.double) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    masks = [torch.rand(n, width, generator=generator) > 0.3 for width in (r, w)] if masked else [None, None]
    return {
        "image_embedding": draw(n, d),
        "text_embedding": draw(n, d),
        "image_fragments": draw(n, r, d).requires_grad_(),
        "text_fragments": draw(n, w, d).requires_grad_(),
        "image_mask": masks[0],
        "text_mask": masks[1],
    }


def candidate_pairs(b: dict, index: Tensor, back: Tensor, **options: object) -> tuple[Tensor, ...]:
    """mean_i2t, mean_t2i, top_i2t, top_t2i at the candidates of both directions."""
    r, c, r_mask, c_mask = b["image_fragments"], b["text_fragments"], b["image_mask"], b["text_mask"]
    i2t = align_candidates(r, c, r_mask, c_mask, index, **options)
    t2i = align_candidates(c, r, c_mask, r_mask, back, **options)
    return i2t[0], t2i[0], i2t[1], t2i[1]


def pick(x: Tensor, index: Tensor) -> Tensor:
    return x[torch.arange(len(x)).unsqueeze(1), index]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 6),
    r=st.integers(1, 5),
    w=st.integers(1, 5),
    k=st.integers(1, 6),
    topk=st.integers(1, 6),
    mode=st.sampled_from(MODES),
    chunk_size=st.sampled_from([None, 1, 2, 3, 7]),
    masked=st.booleans(),
)
def test_chosen_pairs_are_those_of_the_dense_alignment(
    seed: int, n: int, r: int, w: int, k: int, topk: int, mode: str, chunk_size: int | None, masked: bool
) -> None:
    b = batch(seed, n, r, w, 4, masked)
    index, back = torch.randint(n, (2, n, k), generator=torch.Generator().manual_seed(seed))  # repeats allowed
    dense = align_fragments(
        b["image_fragments"], b["text_fragments"], b["image_mask"], b["text_mask"], topk=topk, mode=mode
    )
    expected = tuple(pick(x, at) for x, at in zip(dense, (index, back, index, back), strict=True))
    got = candidate_pairs(b, index, back, topk=topk, mode=mode, chunk_size=chunk_size)
    weights = [torch.randn_like(x) for x in expected]

    def gradients(scores: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        total = sum((x * weight).sum() for x, weight in zip(scores, weights, strict=True))
        return torch.autograd.grad(total, (b["image_fragments"], b["text_fragments"]))

    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    for x, y in zip(gradients(got), gradients(expected), strict=True):  # rounding errors divided by small norms
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6), n=st.integers(0, 6), k=st.integers(1, 6), parts=st.integers(1, 8),
    mode=st.sampled_from(MODES), masked=st.booleans(),
)  # fmt: skip
def test_parts_of_the_candidates_give_what_all_at_once_give(
    seed: int, n: int, k: int, parts: int, mode: str, masked: bool
) -> None:
    b, g = batch(seed, 6, 4, 3, 5, masked), torch.Generator().manual_seed(seed)
    index = torch.randint(6, (n, k), generator=g)
    rows, mask = b["image_fragments"][:n], None if b["image_mask"] is None else b["image_mask"][:n]
    texts, texts_mask = b["text_fragments"], b["text_mask"]
    expected = align_candidates(rows, texts, mask, texts_mask, index, topk=3, mode=mode)
    pieces = (x.sort().values for x in torch.randperm(6, generator=g).tensor_split(parts))  # some of them are empty
    fetched = (Part(ids, texts[ids], None if texts_mask is None else texts_mask[ids]) for ids in pieces)
    got = align_in_parts(rows, mask, index, fetched, topk=3, mode=mode, chunk_size=None)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_against_finite_differences(mode: str) -> None:
    b = batch(1, 3, 4, 3, 5)
    index = torch.tensor([[0, 2], [1, 0], [2, 2]])
    assert gradcheck(
        lambda x, y: align_candidates(x, y, b["image_mask"], b["text_mask"], index, topk=3, mode=mode, chunk_size=2),
        (b["image_fragments"], b["text_fragments"]),
    )


@pytest.mark.parametrize("mode", MODES)
def test_float64_gradient_is_the_dense_one_to_float64(mode: str) -> None:
    """No constant of the formula is rounded to float32 on the way."""
    b = batch(2, 5, 6, 4, 8)
    everyone = torch.arange(5).expand(5, 5).contiguous()
    inputs = (b["image_fragments"], b["text_fragments"])
    dense = align_fragments(*inputs, b["image_mask"], b["text_mask"], topk=3, mode=mode)
    got = candidate_pairs(b, everyone, everyone, topk=3, mode=mode)
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=x.dtype) for x in dense]
    expected = torch.autograd.grad(dense, inputs, weights)
    for x, y in zip(torch.autograd.grad(got, inputs, weights), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 7),
    k=st.integers(1, 9),
    ratio=st.sampled_from([0.2, 0.5, 1.0]),
    detach=st.booleans(),
)
def test_graph_is_the_dense_one_at_the_candidates(seed: int, n: int, k: int, ratio: float, detach: bool) -> None:
    b = batch(seed, n, 4, 3, 6)
    torch.manual_seed(seed)
    options = {"topk": 3, "neighbor_ratio": ratio, "detach_fragments": detach, "alignment": "cosine"}
    sparse = AssociationGraph(candidates=k, **options).double()
    dense = AssociationGraph(**options).double()
    dense.load_state_dict(sparse.state_dict())
    given_graph, expected = sparse(**b), dense(**b)
    assert isinstance(given_graph, SparseRelationGraph) == (k < n)
    got = given_graph.dense()
    for name, x in (("i2i", b["image_embedding"]), ("t2t", b["text_embedding"])):
        block = got.block(name)
        within = torch.nn.functional.cosine_similarity(x.unsqueeze(1), x.unsqueeze(0), dim=2)
        edges = nearest(within, max(1, int(n * ratio)) if k >= n else min(k, max(1, int(n * ratio))))
        assert torch.equal(block.connection, edges)
        want = expected.block(name).relevance
        torch.testing.assert_close(block.relevance[edges], want[edges], rtol=1e-12, atol=1e-12)
    cosine = torch.nn.functional.cosine_similarity(
        b["image_embedding"].unsqueeze(1), b["text_embedding"].unsqueeze(0), dim=2
    )
    fragments = b["image_fragments"], b["text_fragments"], b["image_mask"], b["text_mask"]
    aligned = align_fragments(*fragments, topk=3, mode="cosine")
    for name, similarity, p in (("i2t", cosine, aligned.mean_i2t), ("t2i", cosine.t(), aligned.mean_t2i)):
        block = got.block(name)
        candidate = nearest(similarity, min(k, n))
        p = p.detach().masked_fill(~candidate, -torch.inf)
        assert torch.equal(block.connection, candidate & nearest(p, min(k, max(1, int(n * ratio)))))
        want = torch.where(candidate, expected.block(name).relevance, 0)
        torch.testing.assert_close(block.relevance, want, rtol=1e-9, atol=1e-9)
    if k >= n:
        assert all(torch.equal(x, y) for x, y in zip(got[:2], expected[:2], strict=True))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 6), k=st.integers(1, 6))
def test_regularizer_compares_the_candidates(seed: int, n: int, k: int) -> None:
    b = batch(seed, n, 4, 3, 6)
    torch.manual_seed(seed)
    module = AssociationGraph(topk=3, candidates=k).double()
    given = module(**b)
    graph = given.dense()
    v, u = (torch.nn.functional.normalize(b[name], dim=1) for name in ("image_embedding", "text_embedding"))
    guide = torch.exp(-torch.cdist(v, u))
    total = 0.0
    for name, g in (("i2t", guide), ("t2i", guide.t())):
        similarity = v @ u.t() if name == "i2t" else u @ v.t()
        for row in range(n):
            chosen = similarity[row].topk(min(k, n)).indices
            p, q = (x[row, chosen].softmax(0) for x in (graph.block(name).relevance, g))
            total += (p * (p / q).log()).sum() / n
    value = module.regularization(given, b["image_embedding"], b["text_embedding"])
    torch.testing.assert_close(value, total, rtol=1e-9, atol=1e-12)
    assert torch.isfinite(value)


@pytest.mark.parametrize("size", ["small", "odd"])
def test_all_candidates_give_the_recorded_dense_graph(size: str) -> None:
    """The sparse computation itself with k = N; the module would take the dense path."""
    with np.load(GOLDEN / size / "association_graph.npz") as data:
        record = {name: data[name] for name in data.files}
    r, c = (torch.from_numpy(record[name]) for name in ("image_fragments", "text_fragments"))
    c_mask = torch.arange(c.shape[1]) < torch.from_numpy(record["text_lengths"]).unsqueeze(1)
    n = len(r)
    everyone = torch.arange(n).expand(n, n).contiguous()
    b = {"image_fragments": r, "text_fragments": c, "image_mask": None, "text_mask": c_mask}
    mean_i2t, mean_t2i, top_i2t, top_t2i = candidate_pairs(b, everyone, everyone, topk=int(record["topk"]), mode="scan")
    for name, mean, top in (("i2t", mean_i2t, top_i2t), ("t2i", mean_t2i, top_t2i)):
        np.testing.assert_allclose(mean, record[f"mean_{name}"], atol=1e-5)
        w1, b1, w2, b2 = (
            torch.from_numpy(record[f"weights.adj_learning.mlp_{name}.{place}"])
            for place in ("0.weight", "0.bias", "3.weight", "3.bias")
        )
        relevance = ((top @ w1.t() + b1).relu() @ w2.t() + b2).squeeze(2) + mean
        np.testing.assert_allclose(relevance, record[f"relevance_{name}"], atol=1e-5)


def test_loss_trains_through_candidates() -> None:
    b = batch(3, 8, 4, 3, 16, dtype=torch.float32)
    torch.manual_seed(0)
    module = HREMLoss(16, graph=AssociationGraph(topk=3, candidates=3, detach_fragments=False))
    leaves = [b[name].requires_grad_() for name in ("image_embedding", "text_embedding")]
    optimizer = torch.optim.Adam([*module.parameters(), *leaves, b["image_fragments"], b["text_fragments"]], 0.02)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = module(**b)
        loss.backward()
        assert all(x.grad is not None and torch.isfinite(x.grad).all() for x in module.parameters())
        assert b["image_fragments"].grad.any()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_empty_items_give_zeros() -> None:
    b = batch(3, 4, 3, 3, 5)
    b["image_mask"][1], b["text_mask"][2] = False, False
    everyone = torch.arange(4).expand(4, 4).contiguous()
    scores = candidate_pairs(b, everyone, everyone, topk=2)
    assert all(torch.isfinite(x).all() for x in scores)
    for x, image, text in ((scores[0], 1, 2), (scores[2], 1, 2)):
        assert not x[image].any()
        assert not x[:, text].any()
    grads = torch.autograd.grad(sum(x.sum() for x in scores), (b["image_fragments"], b["text_fragments"]))
    assert all(torch.isfinite(x).all() for x in grads)
    assert not grads[0][1].any()
    assert not grads[1][2].any()


def test_nothing_in_the_padding_matters() -> None:
    b = batch(4, 4, 3, 3, 5)
    index = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])
    clean = candidate_pairs(b, index, index)
    with torch.no_grad():
        b["image_fragments"][~b["image_mask"]] = torch.nan
        b["text_fragments"][~b["text_mask"]] = torch.inf
    assert all(torch.equal(x, y) for x, y in zip(clean, candidate_pairs(b, index, index), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_reduce_in_float32(dtype: torch.dtype) -> None:
    b = batch(5, 4, 3, 3, 16, dtype=torch.float32)
    index = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])
    expected = candidate_pairs(b, index, index)
    half = {name: x.detach().to(dtype).requires_grad_() if "fragments" in name else x for name, x in b.items()}
    got = candidate_pairs(half, index, index)
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=0.05, atol=0.05)
    sum(x.sum() for x in got).backward()
    assert half["image_fragments"].grad.dtype == dtype


def test_autocast_multiplies_in_its_dtype_as_the_dense_alignment_does() -> None:
    b = batch(5, 4, 3, 3, 16, masked=False, dtype=torch.float32)
    index = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense = align_fragments(b["image_fragments"], b["text_fragments"])
        got = candidate_pairs(b, index, index)
    exact = candidate_pairs(b, index, index)
    for x, y, z in zip(got, dense, exact, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, pick(y, index), rtol=0.01, atol=0.01)
        assert not torch.equal(x, z)


def test_working_memory_is_that_of_a_chunk() -> None:
    """No tensor made on the way is larger than a chunk's gathered fragments, whatever N and k."""
    from hrem_layers.alignment import candidates

    n, k, m, d, topk = 64, 32, 6, 10, 2
    x = torch.randn(n, m, d)
    index = torch.randint(n, (n, k))
    inputs = (x, x, None, None, index)
    with LargestTensor() as seen:
        candidates._align_op._init_fn(*inputs, "scan", topk, 8)
        grads = torch.ones(n, k), torch.ones(n, k, topk)
        candidates._align_backward_op._init_fn(*inputs, *grads, "scan", topk, 8)
    assert seen.elements == max(8 * m * d, n * k * topk, x.numel())
    assert n * k * m * d > 20 * seen.elements


@pytest.mark.parametrize("mode", MODES)
def test_fragments_without_gradient_are_prepared_in_chunks(mode: str, monkeypatch) -> None:
    from hrem_layers.alignment import candidates

    b = batch(4, 6, 3, 4, 5)
    b["image_fragments"].data[2, 0, 0] = torch.inf
    index = torch.randint(6, (6, 2))
    detached = {name: x.detach() if x is not None else None for name, x in b.items()}
    whole = candidate_pairs(detached, index, index, mode=mode)
    monkeypatch.setattr(candidates, "_CPU_CHUNK", 1)
    for x, y in zip(candidate_pairs(detached, index, index, mode=mode), whole, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12, equal_nan=True)


def test_compiles_as_one_graph() -> None:
    b = batch(6, 5, 4, 3, 8, dtype=torch.float32)
    module = AssociationGraph(topk=3, candidates=2, detach_fragments=False)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    expected, got = module(**b), compiled(**b)
    assert torch.equal(got.connection, expected.connection)
    torch.testing.assert_close(got.relevance, expected.relevance)
    inputs = (b["image_fragments"], b["text_fragments"])
    for x, y in zip(
        torch.autograd.grad(got.relevance.sum(), inputs), torch.autograd.grad(expected.relevance.sum(), inputs),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_operators_get_the_chunk_that_the_caller_asks_for(chunk_size: int | None, monkeypatch) -> None:
    from hrem_layers.alignment import candidates

    seen, chunks = [], candidates._chunks
    monkeypatch.setattr(candidates, "_chunks", lambda *inputs: seen.append(inputs[-1]) or chunks(*inputs))
    b = batch(7, 4, 3, 2, 5)
    index = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])
    mean, _ = align_candidates(b["image_fragments"], b["text_fragments"], None, None, index, chunk_size=chunk_size)
    mean.sum().backward()
    assert seen == [chunk_size] * 2  # forward and backward


def test_operators_keep_their_promises_to_torch() -> None:
    from hrem_layers.alignment import candidates

    b = batch(7, 4, 3, 2, 5)
    index = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])
    arguments = (b["image_fragments"], b["text_fragments"], b["image_mask"], b["text_mask"], index, "scan", 2, None)
    torch.library.opcheck(candidates._align_op, arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"candidates": 0}, ValueError, "candidates must be at least 1, got 0"),
        ({"candidates": 1.5}, TypeError, "candidates must be an int"),
        ({"candidates": True}, TypeError, "candidates must be an int"),
    ],
)
def test_module_refuses(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AssociationGraph(**options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"index": torch.zeros(4, 2)}, TypeError, "index must be an integer tensor, got .*float32"),
        ({"index": torch.zeros(3, 2, dtype=torch.long)}, ValueError, r"index must have shape \(4, k\), got .*\(3, 2\)"),
        ({"index": [[0]]}, TypeError, "index must be an integer tensor .* got list"),
        ({"index": torch.full((4, 2), 4)}, IndexError, "index must name rows of giving, from 0 to 3, got .* 4 to 4"),
        ({"index": torch.full((4, 2), -1)}, IndexError, "index must name rows of giving, from 0 to 3, got .* -1 to -1"),
        ({"giving": torch.zeros(4, 3, 6)}, ValueError, "giving must have shape"),
        ({"giving": torch.zeros(4, 3, 5, dtype=torch.int)}, TypeError, "giving must be a floating-point tensor"),
        ({"giving": torch.zeros(4, 0, 5)}, ValueError, "at least 1 wide"),
        ({"giving_mask": torch.zeros(4, 3)}, TypeError, "giving_mask must be a bool tensor"),
        ({"receiving_mask": torch.zeros(3, 3, dtype=torch.bool)}, ValueError, "receiving_mask must have shape"),
        ({"mode": "max"}, ValueError, "mode must be one of"),
        ({"topk": 0}, ValueError, "topk must be at least 1"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
    ],
)
def test_alignment_refuses(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "receiving": torch.zeros(4, 3, 5), "giving": torch.zeros(4, 3, 5), "receiving_mask": None,
        "giving_mask": None, "index": torch.zeros(4, 2, dtype=torch.long), **change,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        align_candidates(**arguments)


def test_a_part_is_gone_before_the_next_is_fetched_and_few_rows_are_copied_at_once(monkeypatch):
    monkeypatch.setattr(parts_module, "_CPU_CHUNK", 3 * 4 * 5)  # three rows
    prepare, align, made, aligned = parts_module._prepare, parts_module._align_op, [], []

    def prepare_and_watch(*arguments):
        made.append(weakref.ref(out := prepare(*arguments)))
        return out

    def align_and_count(x, *rest):
        aligned.append(len(x))
        return align(x, *rest)

    monkeypatch.setattr(parts_module, "_prepare", prepare_and_watch)
    monkeypatch.setattr(parts_module, "_align_op", align_and_count)

    def fetched():
        for ids in torch.arange(8).split(3):
            assert all(prepared() is None for prepared in made[1:]), "of an earlier part"
            yield Part(ids, torch.randn(3, 6, 5)[: len(ids)], None)

    align_in_parts(torch.randn(20, 4, 5), None, torch.arange(8).repeat(20, 1), fetched(), topk=2, mode="cosine",
                   chunk_size=None)  # fmt: skip
    assert max(aligned) == 3 and sum(aligned) == 3 * 20
