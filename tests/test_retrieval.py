from __future__ import annotations

import itertools
import json
import math
import statistics
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hrem_layers.retrieval import positions, retrieval_metrics, retrieval_metrics_from_similarity
from hrem_layers.retrieval import similarity as similarity_module
from hrem_layers.retrieval.similarity import Cosines, Given

GOLDEN = Path(__file__).parent / "golden"


# ---- slow references -------------------------------------------------------------------------------


def slow_positions(similarity, query_ids, item_ids, ties="pessimistic"):
    """One query, one item at a time; ``similarity[q][i]`` may be any numbers that compare exactly."""
    found = []
    for row, query in zip(similarity, query_ids, strict=True):
        matching = [s for s, item in zip(row, item_ids, strict=True) if item == query]
        if matching:
            best = max(matching)
            others = [s for s, item in zip(row, item_ids, strict=True) if item != query]
            found.append(1 + sum(s >= best if ties == "pessimistic" else s > best for s in others))
    return found


def slow_direction(positions):
    recalls = [100 * sum(p <= k for p in positions) / len(positions) for k in (1, 5, 10)]
    return (*recalls, math.floor(statistics.median(positions)), sum(positions) / len(positions), len(positions))


def slow_metrics(similarity, image_ids, text_ids, ties="pessimistic"):
    transposed = list(zip(*similarity, strict=True))
    return (
        slow_direction(slow_positions(similarity, image_ids, text_ids, ties)),
        slow_direction(slow_positions(transposed, text_ids, image_ids, ties)),
    )


def assert_same(metrics, expected):
    for got, want in zip(metrics, expected, strict=True):
        assert tuple(got) == pytest.approx(want, rel=1e-12)


def ids_for(draw, image_count, text_count):
    """Ids under which everything has a match: images may share one, texts come in any order and number."""
    labels = st.integers(-3, 3)
    image_ids = draw(st.lists(labels, min_size=image_count, max_size=image_count))
    first = draw(st.permutations(sorted(set(image_ids))))
    more = text_count - len(first)
    rest = draw(st.lists(st.sampled_from(image_ids), min_size=max(more, 0), max_size=max(more, 0)))
    return image_ids, draw(st.permutations([*first, *rest]))


# ---- the release -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["small", "odd"])
@pytest.mark.parametrize("ties", ["pessimistic", "optimistic"])
def test_agrees_with_the_release(size, ties):
    golden = np.load(GOLDEN / size / "retrieval.npz")
    similarity = torch.from_numpy(golden["similarity"])
    captions = int(golden["captions_per_image"])
    metrics = retrieval_metrics_from_similarity(similarity, captions_per_image=captions, ties=ties)
    assert list(metrics.i2t[:5]) == pytest.approx(golden["i2t"].tolist(), rel=1e-12)
    assert list(metrics.t2i[:5]) == pytest.approx(golden["t2i"].tolist(), rel=1e-12)
    assert (metrics.i2t.num_queries, metrics.t2i.num_queries) == (40, 200)
    assert metrics.rsum == pytest.approx(golden["i2t"][:3].sum() + golden["t2i"][:3].sum())


# ---- positions, ties, ids ----------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(data=st.data(), ties=st.sampled_from(["pessimistic", "optimistic"]))
def test_similarity_against_a_slow_loop(data, ties):
    n = data.draw(st.integers(1, 7))
    image_ids, text_ids = ids_for(data.draw, n, data.draw(st.integers(1, 14)))
    value = st.sampled_from([-math.inf, -0.5, -0.0, 0.0, 0.25, 0.5, math.inf])  # few values: many ties
    row = st.lists(value, min_size=len(text_ids), max_size=len(text_ids))
    similarity = data.draw(st.lists(row, min_size=n, max_size=n))
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    metrics = retrieval_metrics_from_similarity(
        torch.tensor(similarity, dtype=dtype),
        image_ids=image_ids,
        text_ids=torch.tensor(text_ids),
        ties=ties,
        chunk_size=data.draw(st.sampled_from([None, 1, 2, 3, 5])),
    )
    assert_same(metrics, slow_metrics(similarity, image_ids, text_ids, ties))


def draw_embeddings(draw, count, width):
    """Rows of small whole numbers, many of them equal or proportional: cosines that tie exactly."""
    row = st.lists(st.integers(-2, 2), min_size=width, max_size=width)
    pool = draw(st.lists(row, min_size=1, max_size=4))
    rows = draw(st.lists(st.one_of(st.sampled_from(pool), row), min_size=count, max_size=count))
    scale = draw(st.lists(st.sampled_from([0.5, 1, 4]), min_size=count, max_size=count))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    return rows, torch.tensor(rows, dtype=dtype) * torch.tensor(scale, dtype=dtype)[:, None]


def fixed_point(rows):
    """The definition in the module's head, in float64 and Python's whole numbers."""
    norms = [math.sqrt(sum(x * x for x in row)) or 1.0 for row in rows]
    return [[round(x / norm * 2**26) for x in row] for row, norm in zip(rows, norms, strict=True)]


def products(rows, columns):
    return [[sum(x * y for x, y in zip(row, column, strict=True)) for column in columns] for row in rows]


def signed_squared_cosines(rows, columns):
    """sign(cos) · cos² as fractions: ordered as the cosines are, without any rounding."""
    squares = [[sum(x * x for x in row) or 1 for row in side] for side in (rows, columns)]
    return [
        [Fraction(dot * abs(dot), a * b) for dot, b in zip(line, squares[1], strict=True)]
        for line, a in zip(products(rows, columns), squares[0], strict=True)
    ]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), ties=st.sampled_from(["pessimistic", "optimistic"]), width=st.integers(1, 5))
def test_embeddings_against_a_slow_loop(data, ties, width):
    image_ids, text_ids = ids_for(data.draw, data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12)))
    image_rows, image_embedding = draw_embeddings(data.draw, len(image_ids), width)
    text_rows, text_embedding = draw_embeddings(data.draw, len(text_ids), width)
    metrics = retrieval_metrics(
        image_embedding,
        text_embedding,
        image_ids=np.array(image_ids),
        text_ids=text_ids,
        ties=ties,
        chunk_size=data.draw(st.sampled_from([None, 1, 2, 3])),
    )
    similarity = products(fixed_point(image_rows), fixed_point(text_rows))
    assert_same(metrics, slow_metrics(similarity, image_ids, text_ids, ties))
    # And against true geometry: cosines that tie only by chance of number theory may fall either way.
    exact = signed_squared_cosines(image_rows, text_rows)
    low = slow_metrics(exact, image_ids, text_ids, "optimistic")
    high = slow_metrics(exact, image_ids, text_ids, "pessimistic")
    for got, least, most in zip(metrics, low, high, strict=True):
        assert least[4] - 1e-9 <= got.mean_rank <= most[4] + 1e-9


def test_a_wide_problem_against_a_slow_float64_loop():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(30, 64, generator=generator)
    texts = images.repeat_interleave(3, 0) + 2.5 * torch.randn(90, 64, generator=generator)
    normalised = [torch.nn.functional.normalize(x.double(), dim=1) for x in (images, texts)]
    similarity = (normalised[0] @ normalised[1].T).tolist()
    expected = slow_metrics(similarity, range(30), [j // 3 for j in range(90)])
    assert 0 < expected[0][0] < 100  # neither trivial nor hopeless
    for chunk_size in (None, 7, 64):
        assert_same(retrieval_metrics(images, texts, captions_per_image=3, chunk_size=chunk_size), expected)


def test_equal_items_tie_exactly_wherever_they_stand():
    # Every text equals its image up to scale, and every image occurs under ten ids: nine others tie with
    # each match. In float32 some would come out one bit lower or higher.
    generator = torch.Generator().manual_seed(1)
    distinct = torch.randn(13, 67, generator=generator)
    images = distinct.repeat(10, 1)
    texts = 3 * images
    for chunk_size in (None, 3, 17, 64):
        worst = retrieval_metrics(images, texts, chunk_size=chunk_size)
        best = retrieval_metrics(images, texts, chunk_size=chunk_size, ties="optimistic")
        for direction in worst:
            assert direction == (0.0, 0.0, 100.0, 10.0, 10.0, 130)
        for direction in best:
            assert direction == (100.0, 100.0, 100.0, 1.0, 1.0, 130)


def test_no_figure_depends_on_chunks_order_threads_or_autocast():
    # Near-duplicates, apart by about the last bit of float32: any rounding of the sums would show.
    generator = torch.Generator().manual_seed(2)
    centre = torch.randn(1, 101, generator=generator)
    images = centre + 3e-7 * torch.randn(120, 101, generator=generator)
    texts = images.repeat_interleave(2, 0) + 3e-7 * torch.randn(240, 101, generator=generator)
    expected = retrieval_metrics(images, texts, captions_per_image=2)
    assert expected.i2t.mean_rank > 1
    for chunk_size in (3, 33, 128, 10_000):
        assert retrieval_metrics(images, texts, captions_per_image=2, chunk_size=chunk_size) == expected
    image_order, text_order = torch.randperm(120), torch.randperm(240)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        shuffled = retrieval_metrics(
            images[image_order], texts[text_order], image_ids=image_order, text_ids=text_order // 2
        )
    assert shuffled == expected


@pytest.mark.parametrize("width", [1, 2, 63, 64, 65, 768, 2048])
def test_products_are_exact_in_blocks_of_any_shape(width):
    generator = torch.Generator().manual_seed(width)
    images, texts = (torch.randn(70, width, generator=generator) for _ in range(2))
    texts[:10] = images[:10]  # cosine 1, the largest partial sums
    texts[10:20] = images[10:20].abs()
    cosines = similarity_module.Cosines.of(images, texts)
    exact = (cosines.images.long()[:, None] * cosines.texts.long()).sum(-1)
    for rows, columns in ((70, 70), (1, 70), (70, 1), (3, 17), (1, 1)):
        got = cosines.block(slice(0, rows), slice(0, columns))
        assert torch.equal(got.long(), exact[:rows, :columns])
    true = torch.nn.functional.normalize(images.double()) @ torch.nn.functional.normalize(texts.double()).T
    torch.testing.assert_close(exact.double() / 2**52, true, rtol=0, atol=5e-8)


def test_fixed_point_does_not_depend_on_the_rows_around():
    rows = torch.randn(5, 37, generator=torch.Generator().manual_seed(3))
    together = similarity_module.fixed_point("rows", rows.repeat(9000, 1))  # several of its internal chunks
    for row, fixed in zip(rows, together[:5], strict=True):
        assert torch.equal(similarity_module.fixed_point("rows", row[None])[0], fixed)
        assert torch.equal(similarity_module.fixed_point("rows", row[None] * 2.0**-20)[0], fixed)
    assert torch.equal(together.view(9000, 5, 37), together[:5].expand(9000, 5, 37))


def test_sums_of_squares_do_not_depend_on_the_layout_in_memory():
    values = torch.rand(50, 333, dtype=torch.float64, generator=torch.Generator().manual_seed(10))
    by_columns = values.T.contiguous().T
    expected = similarity_module.ordered_sum(values.clone())
    assert torch.equal(similarity_module.ordered_sum(by_columns.T.clone().T), expected)
    torch.testing.assert_close(expected, values.sum(1, keepdim=True))
    assert not torch.equal(by_columns.sum(1, keepdim=True), expected)  # so the order does show


def test_ids_of_a_narrow_type_do_not_narrow_the_positions():
    ids = torch.zeros(400, dtype=torch.uint8)
    ids[0] = 1
    similarity = torch.ones(400, 400)
    metrics = retrieval_metrics_from_similarity(similarity, image_ids=ids, text_ids=ids)
    assert metrics.i2t.mean_rank == (400 + 399 * 2) / 400


def test_layouts_of_ids_agree():
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(12, 8, generator=generator)
    texts = images.repeat_interleave(5, 0) + torch.randn(60, 8, generator=generator)
    expected = retrieval_metrics(images, texts, captions_per_image=5)
    rows = torch.arange(60) // 5
    assert retrieval_metrics(images, texts, text_ids=rows) == expected
    assert retrieval_metrics(images, texts, text_ids=rows.numpy().astype(np.uint8)) == expected
    renamed = torch.tensor([2**40 - 7 * i for i in range(12)])
    assert retrieval_metrics(images, texts, image_ids=renamed, text_ids=renamed[rows]) == expected
    assert retrieval_metrics(images, texts[::5]) == retrieval_metrics(images, texts[::5], captions_per_image=1)


def test_repeated_images_are_items_of_their_own():
    similarity = torch.tensor([[0.5, 0.9], [0.5, 0.9], [0.1, 0.2]])  # two rows are one image
    metrics = retrieval_metrics_from_similarity(similarity, image_ids=[0, 0, 1], text_ids=[0, 1])
    assert metrics.i2t.num_queries == 3
    assert metrics.i2t.mean_rank == pytest.approx((2 + 2 + 1) / 3)
    assert metrics.t2i.mean_rank == (1 + 3) / 2  # text 1 has both copies ahead of its image


def test_few_ids_with_many_members():
    generator = torch.Generator().manual_seed(5)
    images, texts = torch.randn(300, 4, generator=generator), torch.randn(700, 4, generator=generator)
    image_ids, text_ids = (torch.randint(0, 40, (count,), generator=generator) for count in (300, 700))
    cosines = products(*(fixed_point(x.double().tolist()) for x in (images, texts)))
    expected = slow_metrics(cosines, image_ids.tolist(), text_ids.tolist())
    for chunk_size in (None, 50):
        assert_same(
            retrieval_metrics(images, texts, image_ids=image_ids, text_ids=text_ids, chunk_size=chunk_size),
            expected,
        )


# ---- what has no rank ------------------------------------------------------------------------------


def test_unmatched_items_are_an_error_or_distractors():
    similarity = torch.tensor([[0.5, 0.6, 0.1], [0.7, 0.2, 0.3], [0.4, 0.9, 0.8]])
    ids = {"image_ids": [0, 1, 7], "text_ids": [0, 9, 1]}
    with pytest.raises(ValueError, match=r"image_ids: 1 of 3 images have no text of the same id \(7\)"):
        retrieval_metrics_from_similarity(similarity, **ids)
    with pytest.raises(ValueError, match=r"text_ids: 1 of 3 texts have no image of the same id \(9\)"):
        retrieval_metrics_from_similarity(similarity[:2], image_ids=[0, 1], text_ids=[0, 9, 1])
    metrics = retrieval_metrics_from_similarity(similarity, **ids, unmatched="distractor")
    # image 0: text 9 ahead; image 1: text 0 ahead; text 0: image 1 ahead; text 1: image 7 ahead
    assert (metrics.i2t.mean_rank, metrics.i2t.num_queries) == (2.0, 2)
    assert (metrics.t2i.mean_rank, metrics.t2i.num_queries) == (2.0, 2)
    with pytest.raises(ValueError, match="no id in common"):
        retrieval_metrics_from_similarity(similarity, image_ids=[0, 1, 2], text_ids=[3, 4, 5], unmatched="distractor")


@settings(max_examples=60, deadline=None)
@given(data=st.data(), chunk_size=st.sampled_from([None, 1, 2, 3]))
def test_distractors_against_a_slow_loop(data, chunk_size):
    labels = st.lists(st.integers(0, 5), min_size=1, max_size=8)
    image_ids, text_ids = [0, *data.draw(labels)], [*data.draw(labels), 0]
    row = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=len(text_ids), max_size=len(text_ids))
    similarity = data.draw(st.lists(row, min_size=len(image_ids), max_size=len(image_ids)))
    metrics = retrieval_metrics_from_similarity(
        torch.tensor(similarity),
        image_ids=image_ids,
        text_ids=text_ids,
        unmatched="distractor",
        chunk_size=chunk_size,
    )
    assert_same(metrics, slow_metrics(similarity, image_ids, text_ids))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["image_embedding", "text_embedding"])
def test_embeddings_that_are_not_finite_are_an_error(side, bad):
    embeddings = {"image_embedding": torch.randn(40_000, 30), "text_embedding": torch.randn(40_000, 30)}
    embeddings[side][39_000, 29] = bad
    with pytest.raises(ValueError, match=f"{side} must be finite, row 39000 is not"):
        retrieval_metrics(**embeddings)


@pytest.mark.parametrize("position", [(0, 0), (3, 2), (17, 44), (19, 49)])
def test_nan_similarity_is_an_error(position):
    similarity = torch.rand(20, 50)
    similarity[position] = math.nan
    with pytest.raises(ValueError, match=f"similarity must not hold NaN, got it in row {position[0]}:"):
        retrieval_metrics_from_similarity(similarity, text_ids=torch.arange(50) % 20)


def test_a_row_of_zeros_ties_with_everything():
    images = torch.eye(3)
    texts = torch.eye(3)
    texts[1] = 0
    metrics = retrieval_metrics(images, texts)
    assert metrics.t2i.mean_rank == pytest.approx((1 + 3 + 1) / 3)
    # image 1 has similarity 0 with all three texts
    assert metrics.i2t.mean_rank == pytest.approx((1 + 3 + 1) / 3)


@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e200, 1e308])
def test_any_scale(scale):
    generator = torch.Generator().manual_seed(6)
    images, texts = (torch.rand(20, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    assert retrieval_metrics(images * scale, texts) == retrieval_metrics(images, texts)


# ---- five folds ------------------------------------------------------------------------------------


def folds_by_hand(images, texts, bounds, captions):
    parts = [
        retrieval_metrics(images[a:b], texts[a * captions : b * captions], captions_per_image=captions)
        for a, b in bounds
    ]
    return [
        (*np.mean([tuple(tuple(part)[d])[:5] for part in parts], axis=0), sum(tuple(p)[d].num_queries for p in parts))
        for d in (0, 1)
    ]


def test_five_folds_are_runs_of_images():
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(50, 8, generator=generator)
    texts = images.repeat_interleave(5, 0) + 2 * torch.randn(250, 8, generator=generator)
    expected = folds_by_hand(images, texts, [(a, a + 10) for a in range(0, 50, 10)], 5)
    metrics = retrieval_metrics(images, texts, captions_per_image=5, folds=5)
    assert_same(metrics, expected)
    assert metrics.i2t.num_queries == 50 and metrics.t2i.num_queries == 250
    assert metrics.rsum > retrieval_metrics(images, texts, captions_per_image=5).rsum  # smaller galleries
    assert_same(retrieval_metrics(images, texts, captions_per_image=5, chunk_size=3, folds=5), expected)

    # Any ids, texts in any order; images keep theirs, as it decides the folds.
    order = torch.randperm(250, generator=generator)
    names = torch.randperm(1000, generator=generator)[:50]
    metrics = retrieval_metrics(images, texts[order], image_ids=names, text_ids=names[order // 5], folds=5)
    assert_same(metrics, expected)

    cosine = torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(texts).T
    assert_same(retrieval_metrics_from_similarity(cosine, captions_per_image=5, folds=5), expected)
    assert_same(
        retrieval_metrics_from_similarity(cosine[:, order], image_ids=names, text_ids=names[order // 5], folds=5),
        expected,
    )


def test_folds_that_do_not_divide_lose_nothing():
    generator = torch.Generator().manual_seed(8)
    images, texts = torch.randn(11, 4, generator=generator), torch.randn(11, 4, generator=generator)
    metrics = retrieval_metrics(images, texts, folds=3)
    assert_same(metrics, folds_by_hand(images, texts, [(0, 4), (4, 8), (8, 11)], 1))
    assert metrics.i2t.num_queries == 11
    assert tuple(retrieval_metrics(images, texts, folds=1)) == tuple(retrieval_metrics(images, texts))


def test_copies_of_an_image_share_a_fold():
    images = torch.eye(4)[[0, 1, 0, 2, 3, 3]]  # copies apart from one another
    texts = torch.eye(4)
    metrics = retrieval_metrics(images, texts, image_ids=[5, 1, 5, 2, 3, 3], text_ids=[5, 1, 2, 3], folds=2)
    assert metrics.i2t == (100.0, 100.0, 100.0, 1.0, 1.0, 6)
    assert metrics.t2i == (100.0, 100.0, 100.0, 1.0, 1.0, 4)


def test_ties_reach_the_folds():
    images, texts = torch.ones(6, 3), torch.ones(6, 3)
    assert retrieval_metrics(images, texts, folds=2).i2t.mean_rank == 3
    assert retrieval_metrics(images, texts, folds=2, ties="optimistic").i2t.mean_rank == 1
    assert retrieval_metrics_from_similarity(torch.ones(6, 6), folds=2).t2i.mean_rank == 3


# ---- result, memory, devices -----------------------------------------------------------------------


def test_result_prints_and_serialises():
    golden = np.load(GOLDEN / "small" / "retrieval.npz")
    metrics = retrieval_metrics_from_similarity(torch.from_numpy(golden["similarity"]), captions_per_image=5)
    figures = metrics.as_dict()
    assert json.loads(json.dumps(figures)) == figures
    assert all(type(value) is float for value in figures.values())
    assert list(figures) == [
        *(f"i2t_{name}" for name in ("r1", "r5", "r10", "median_rank", "mean_rank")),
        *(f"t2i_{name}" for name in ("r1", "r5", "r10", "median_rank", "mean_rank")),
        "rsum",
    ]
    assert figures["i2t_r5"] == metrics.i2t.r5 and figures["t2i_mean_rank"] == metrics.t2i.mean_rank
    assert figures["rsum"] == metrics.rsum == pytest.approx(378.0)
    assert str(metrics) == metrics.table()
    assert metrics.table().splitlines() == [
        "                   R@1    R@5   R@10   median     mean   queries",
        "image to text     42.5   80.0   92.5      2.0      4.0        40",
        "text to image     23.5   62.5   77.0      4.0      6.9       200",
        "rSum 378.0",
    ]


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor made, views of ``inputs`` left out."""

    def __init__(self, *inputs):
        super().__init__()
        self.given = [tensor.untyped_storage().data_ptr() for tensor in inputs]
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_is_larger_than_a_block():
    images, texts = torch.randn(600, 4), torch.randn(3000, 4)
    similarity = torch.randn(600, 3000)
    options = {"captions_per_image": 5, "chunk_size": 120}
    for call, inputs, folds in (
        (retrieval_metrics, (images, texts), None),
        (retrieval_metrics, (images, texts), 5),
        (retrieval_metrics_from_similarity, (similarity,), None),
    ):
        with LargestTensor(*inputs) as largest:
            call(*inputs, **options, folds=folds)
        assert largest.elements <= 120 * 120
    with LargestTensor(images, texts) as largest:  # one id for everything: all pairs match
        retrieval_metrics(images, texts, image_ids=[1] * 600, text_ids=[1] * 3000, chunk_size=120)
    assert largest.elements <= 120 * 120


def test_the_band_of_matches_is_narrow(monkeypatch):
    computed = []
    block = similarity_module.Given.block
    monkeypatch.setattr(
        similarity_module.Given,
        "block",
        lambda self, *at: computed.append(block(self, *at).numel()) or block(self, *at),
    )
    retrieval_metrics_from_similarity(torch.rand(2000, 4000), captions_per_image=2, chunk_size=500)
    assert sum(computed) < 1.3 * 2000 * 4000  # twice the band on top of once the matrix


def test_needs_no_graph_and_leaves_inputs_alone():
    images, texts = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    before, similarity = images.detach().clone(), images @ texts.T
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda index: index):
        retrieval_metrics(images, texts)
        retrieval_metrics(images, texts, folds=2)
        retrieval_metrics_from_similarity(similarity)
        retrieval_metrics_from_similarity(similarity, folds=2)
    assert not saved and images.grad is None and torch.equal(images, before)


def test_cosines_are_computed_where_float64_exists():
    cpu, cuda, mps = (torch.device(name) for name in ("cpu", "cuda:1", "mps"))
    for given_, used in ((cpu, cpu), (cuda, cuda), (mps, cpu)):
        assert similarity_module.exact_device(SimpleNamespace(device=given_)) == used


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("chunk_size", [None, 50])
def test_gpu_gives_the_same_figures(chunk_size):
    generator = torch.Generator().manual_seed(9)
    images = torch.randn(1, 77, generator=generator) + 1e-6 * torch.randn(300, 77, generator=generator)
    texts = images.repeat_interleave(5, 0) + 1e-6 * torch.randn(1500, 77, generator=generator)
    options = {"captions_per_image": 5, "chunk_size": chunk_size}
    expected = retrieval_metrics(images, texts, **options)
    assert retrieval_metrics(images.cuda(), texts.cuda(), **options) == expected
    folds = retrieval_metrics(images, texts, **options, folds=5)
    assert retrieval_metrics(images.cuda(), texts.cuda(), **options, folds=5) == folds
    similarity = (images @ texts.T).half()
    assert retrieval_metrics_from_similarity(
        similarity.cuda(), text_ids=torch.arange(1500) // 5, chunk_size=chunk_size
    ) == retrieval_metrics_from_similarity(similarity, **options)


# ---- errors ----------------------------------------------------------------------------------------

E, T = torch.rand(4, 3), torch.rand(8, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]], T), TypeError, "image_embedding must be a tensor"),
        ((E.long(), T), TypeError, "image_embedding must be a floating-point tensor"),
        ((E[0], T), ValueError, r"image_embedding must have shape \(n, D\)"),
        ((E, T[:, :2]), ValueError, r"text_embedding must have shape \(m, 3\)"),
        ((E, T.to("meta")), ValueError, "text_embedding must be on cpu"),
        ((E[:0], T), ValueError, "image_embedding must not be empty"),
        ((E[:, :0], T[:, :0]), ValueError, "image_embedding must not be empty"),
        ((E, T[:0]), ValueError, "text_embedding must not be empty"),
        ((E, T), ValueError, "as many texts as images, got 4 images and 8 texts"),
    ],
)
def test_bad_embeddings(arguments, error, message):
    with pytest.raises(error, match=message):
        retrieval_metrics(*arguments)
    with pytest.raises(error, match=message):
        retrieval_metrics(*arguments, folds=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"captions_per_image": 0}, ValueError, "captions_per_image must be at least 1"),
        ({"captions_per_image": 2.0}, TypeError, "captions_per_image must be an int"),
        ({"captions_per_image": 3}, ValueError, r"4 \* 3 = 12 texts for 4 images, got 8 texts$"),
        ({"captions_per_image": 2, "text_ids": [0] * 8}, ValueError, "exclude one another"),
        ({"captions_per_image": 2, "image_ids": [0] * 4}, ValueError, "exclude one another"),
        ({"image_ids": [0, 1, 2, 3]}, ValueError, "text_ids must be given with image_ids"),
        ({"text_ids": [0] * 7}, ValueError, r"text_ids must have shape \(8,\), got an array of shape \(7,\)"),
        ({"text_ids": [0.0] * 8}, TypeError, r"text_ids must be integers of shape \(8,\), got list of float64"),
        ({"text_ids": [True] * 8}, TypeError, r"text_ids must be integers of shape \(8,\), got list of bool"),
        ({"text_ids": ["a"] * 8}, TypeError, r"text_ids must be integers of shape \(8,\), got list"),
        (
            {"text_ids": [0] * 8, "image_ids": torch.zeros(4, 1).long()},
            ValueError,
            r"image_ids must have shape \(4,\)",
        ),
        ({"captions_per_image": 2, "ties": "average"}, ValueError, "ties must be one of 'pessimistic', "),
        ({"captions_per_image": 2, "chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
        ({"captions_per_image": 2, "chunk_size": True}, TypeError, "chunk_size must be an int"),
    ],
)
def test_bad_options(options, error, message):
    for call, inputs in ((retrieval_metrics, (E, T)), (retrieval_metrics_from_similarity, (E @ T.T,))):
        for folds in (None, 5):
            with pytest.raises(error, match=message):
                call(*inputs, **options, folds=folds)


def test_bad_similarity_unmatched_and_folds():
    with pytest.raises(TypeError, match="similarity must be a floating-point tensor"):
        retrieval_metrics_from_similarity(torch.ones(2, 2).long())
    with pytest.raises(ValueError, match=r"similarity must have shape \(n, m\)"):
        retrieval_metrics_from_similarity(torch.ones(2))
    with pytest.raises(ValueError, match="similarity must not be empty"):
        retrieval_metrics_from_similarity(torch.ones(0, 2), folds=5)
    with pytest.raises(ValueError, match="unmatched must be one of 'error', 'distractor', got 'drop'"):
        retrieval_metrics(E, E, unmatched="drop")
    with pytest.raises(ValueError, match="folds must be at most the number of images, 4, got 5"):
        retrieval_metrics(E, T, captions_per_image=2, folds=5)
    with pytest.raises(ValueError, match="folds must be at least 1"):
        retrieval_metrics(E, T, captions_per_image=2, folds=0)
    with pytest.raises(ValueError, match=r"text_ids: 2 of 4 images have no text of the same id \(2, 3\)"):
        retrieval_metrics(E, T, text_ids=[0, 1] * 4, folds=2)
    with pytest.raises(ValueError, match=r"are images repeated\? then pass every 5th"):
        retrieval_metrics(torch.rand(10, 3), torch.rand(10, 3), captions_per_image=5)


# ways that are taken at some sizes only


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12), m=st.integers(1, 20), width=st.sampled_from([1, 2, 5, 600]), ids=st.integers(1, 20),
    ties=st.sampled_from(["pessimistic", "optimistic"]), seed=st.integers(0, 2**31), coarse=st.booleans(),
    given=st.booleans(),
)  # fmt: skip
def test_every_way_of_counting_is_the_same(n, m, width, ids, ties, seed, coarse, given):
    g = torch.Generator().manual_seed(seed)
    image_ids, text_ids = (torch.randint(ids, (count,), generator=g) for count in (n, m))
    text_ids[0] = image_ids[0]
    x, y = (torch.randn(count, width, generator=g) for count in (n, m))
    if coarse:  # many ties
        x, y = x.round(), y.round()
    similarity = Cosines.of(x, y)
    if given:
        similarity = Given((x @ y.T).masked_fill(torch.rand(n, m, generator=g) < 0.2, -torch.inf))
    found = []
    for few_matches, few_products, chunk_size in itertools.product((0, 2**40), (0, 2**40), (7, 20)):  # 20: one block
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(positions, "_FEW_MATCHES", few_matches)
            patch.setattr(positions, "_FEW_PRODUCTS", few_products)
            found.append(positions.items_ahead(similarity, image_ids, text_ids, ties, chunk_size))
    has_match = torch.isin(image_ids, text_ids), torch.isin(text_ids, image_ids)
    for other in found[1:]:
        for ours, theirs, asks in zip(other, found[0], has_match, strict=True):
            assert torch.equal(ours[asks], theirs[asks])


def test_which_way_is_taken(monkeypatch):
    screened, blocks, products = [], [], []
    screen, matching_blocks, product = positions.Screen, positions._matching_blocks, Cosines.block
    monkeypatch.setattr(positions, "Screen", lambda *a: screened.append(a) or screen(*a))
    monkeypatch.setattr(positions, "_matching_blocks", lambda *a: blocks.append(a) or matching_blocks(*a))
    monkeypatch.setattr(Cosines, "block", lambda *a: products.append(a) or product(*a))
    for count, ids, chunk_size, expected in (
        (20, 20, None, (0, 0, 1)),  # one product, from which the best matches come too
        (20, 2, None, (0, 1, 1)),
        (20, 20, 10, (0, 0, 4)),
        (2100, 2100, None, (1, 0, None)),  # a screen takes as many as it needs
    ):
        for calls in (screened, blocks, products):
            calls.clear()
        x, of = torch.randn(count, 8), torch.arange(count) % ids
        retrieval_metrics(x, x, image_ids=of, text_ids=of, chunk_size=chunk_size)
        assert (len(screened), len(blocks)) == expected[:2]
        assert expected[2] in (len(products), None)
