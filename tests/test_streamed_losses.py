"""Pair losses from embeddings, a chunk of anchors at a time: those of the whole similarity, which is never made."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import assert_near, generator, tensors_peak_mb
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import hrem_layers.losses
from hrem_layers import InfoNCELoss, SigmoidLoss, TripletLoss
from hrem_layers._core.numerics import cosine_matrix, l2_normalize
from hrem_layers.losses import _rows, _streamed, hardest_negative

DOUBLE = torch.float64


@pytest.fixture(scope="module", autouse=True)
def nothing_is_small():
    """What is tested here are chunks, of few numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_streamed, "CHUNK_ELEMENTS", 0)
        yield


NEGATIVES = ("distance_weighted", "hardest", "all", "expected")
LOSSES = {
    **{name: (lambda reduction, name=name: TripletLoss(negative_sampling=name, weight_dim=8, reduction=reduction))
       for name in NEGATIVES},
    "infonce": lambda reduction: InfoNCELoss(0.3, reduction=reduction),
    "infonce learnable": lambda reduction: InfoNCELoss(0.3, learnable=True, reduction=reduction),
    "sigmoid": lambda reduction: SigmoidLoss(0.3, bias=-1.0, reduction=reduction),
    "sigmoid fixed": lambda reduction: SigmoidLoss(0.3, bias=-1.0, learnable=False, reduction=reduction),
}  # fmt: skip
every_loss = pytest.mark.parametrize("name", LOSSES)
either_reduction = pytest.mark.parametrize("reduction", ["sum", "mean"])


def case(n, m, seed=0, dim=5, dtype=DOUBLE):
    """Embeddings of any length; ids of which some stand on one side alone."""
    g = generator(seed)
    x, y = (torch.randn(k, dim, generator=g, dtype=DOUBLE).to(dtype).requires_grad_() for k in (n, m))
    return x, y, torch.randint(0, 4, (n,), generator=g), torch.randint(1, 6, (m,), generator=g)


def whole(loss, x, y, positives):
    """The loss of the similarity, from the same seed."""
    torch.manual_seed(1)
    return loss(cosine_matrix(l2_normalize(x), l2_normalize(y)), positives)


def streamed(loss, x, y, **options):
    torch.manual_seed(1)
    return loss.from_embeddings(x, y, **options)


def assert_same(actual, expected, leaves, tolerance=1e-12):
    """Values and gradients; a factor, as an upstream gradient."""
    assert actual.dtype == expected.dtype and actual.shape == ()
    assert_near(actual, expected, tolerance)
    for ours, theirs in zip(
        torch.autograd.grad(3 * actual, leaves), torch.autograd.grad(3 * expected, leaves), strict=True
    ):
        assert ours.dtype == theirs.dtype
        assert_near(ours, theirs, tolerance)


# the same as the whole


@every_loss
@either_reduction
@pytest.mark.parametrize("chunk_size", [1, 3, 100, None])
@pytest.mark.parametrize("given", ["ids", "positives"])
def test_chunks_are_the_whole(name, reduction, chunk_size, given):
    x, y, image_ids, text_ids = case(7, 11)
    positives = image_ids.unsqueeze(1) == text_ids
    pairs = {"positives": positives} if given == "positives" else {"image_ids": image_ids, "text_ids": text_ids}
    loss = LOSSES[name](reduction).double()
    leaves = [x, y, *loss.parameters()]
    expected = whole(loss, x, y, positives)
    assert_same(streamed(loss, x, y, chunk_size=chunk_size, **pairs), expected, leaves)
    with torch.no_grad():
        assert_near(streamed(loss, x, y, chunk_size=chunk_size, **pairs), expected, 1e-12)


@settings(max_examples=25)
@given(n=st.integers(1, 12), m=st.integers(1, 12), chunk=st.integers(1, 13), seed=st.integers(0, 99),
       name=st.sampled_from(list(LOSSES)))  # fmt: skip
@example(n=1, m=1, chunk=1, seed=0, name="hardest")
@example(n=8, m=8, chunk=4, seed=0, name="infonce")
def test_any_size_and_chunk(n, m, chunk, seed, name):
    x, y, image_ids, text_ids = case(n, m, seed)
    loss = LOSSES[name]("mean").double()
    assert_same(
        streamed(loss, x, y, image_ids=image_ids, text_ids=text_ids, chunk_size=chunk),
        whole(loss, x, y, image_ids.unsqueeze(1) == text_ids), [x, y, *loss.parameters()],
    )  # fmt: skip


@every_loss
def test_a_default_chunk_is_cut_where_the_matrix_is_large(name, monkeypatch):
    x, y, image_ids, text_ids = case(13, 10)
    loss = LOSSES[name]("sum").double()
    expected = whole(loss, x, y, image_ids.unsqueeze(1) == text_ids)
    monkeypatch.setattr(_streamed, "CPU_TILE", 30)
    monkeypatch.setattr(_streamed, "LEAST_ROWS", 1)
    with Largest() as largest:
        actual = streamed(loss, x, y, image_ids=image_ids, text_ids=text_ids)
    assert_same(actual, expected, [x, y, *loss.parameters()])
    assert largest.numel <= 65  # the embeddings, 13 × 5


@pytest.mark.parametrize(("others", "rows"), [(1024, 2048), (4096, 512), (2**16, 128)])
def test_a_default_chunk_has_two_million_similarities_on_a_cpu_and_rows_for_a_fast_product(others, rows):
    chunks = _streamed._chunks(slice(5, 5000), None, torch.empty(others, 1))
    assert chunks[0] == slice(5, 5 + rows) and chunks[-1].stop == 5000


@every_loss
@pytest.mark.parametrize("sparse", [0, 2**40], ids=["what is not zero", "all"])
@pytest.mark.parametrize("chunk_size", [2, None])
def test_gradients_of_the_similarity_alone_or_all_of_them(name, sparse, chunk_size, monkeypatch):
    monkeypatch.setattr(_streamed, "SPARSE", sparse)
    x, y, image_ids, text_ids = case(9, 4)
    loss = LOSSES[name]("sum").double()
    assert_same(
        streamed(loss, x, y, image_ids=image_ids, text_ids=text_ids, chunk_size=chunk_size),
        whole(loss, x, y, image_ids.unsqueeze(1) == text_ids), [x, y, *loss.parameters()],
    )  # fmt: skip


@pytest.mark.parametrize(("name", "products"), [("hardest", 1), ("distance_weighted", 1), ("infonce", 3)])
@pytest.mark.parametrize(("chunk_size", "times"), [(None, 1), (200, 1), (199, 2)])  # images and texts at once, or not
def test_one_negative_per_anchor_needs_no_products_but_the_similarity(name, products, chunk_size, times):
    x, y, _, _ = case(200, 200)
    loss = LOSSES[name]("sum")
    with Largest() as largest:
        streamed(loss, x, y, chunk_size=chunk_size).backward()
    assert largest.multiplied == products * times * 200 * 200 * 5
    value = streamed(loss, x, y, chunk_size=chunk_size)
    assert_same(value, whole(loss, x, y, torch.eye(200, dtype=torch.bool)), [x, y])


@every_loss
@either_reduction
@settings(max_examples=15)
@given(n=st.integers(1, 12), m=st.integers(1, 12), seed=st.integers(0, 99), matrix=st.booleans())
def test_a_small_similarity_is_made_whole(name, reduction, n, m, seed, matrix):
    x, y, image_ids, text_ids = case(n, m, seed)
    positives = image_ids.unsqueeze(1) == text_ids
    pairs = {"positives": positives} if matrix else {"image_ids": image_ids, "text_ids": text_ids}
    loss = LOSSES[name](reduction).double()
    leaves = [x, y, *loss.parameters()]
    expected = streamed(loss, x, y, **pairs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_streamed, "CHUNK_ELEMENTS", n * m)
        actual = streamed(loss, x, y, **pairs)
    assert_same(actual, expected, leaves)


@every_loss
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_embedding_makes_a_small_loss_nan(name, bad, monkeypatch):
    monkeypatch.setattr(_streamed, "CHUNK_ELEMENTS", 2**40)
    x, y, image_ids, text_ids = case(6, 7)
    y.data[4, 2] = bad
    value = streamed(LOSSES[name]("mean").double(), x, y, image_ids=image_ids, text_ids=text_ids, normalize=False)
    assert value.isnan()
    assert torch.autograd.grad(value, x)[0].isnan().any()


def test_what_counts_as_small(monkeypatch):
    monkeypatch.setattr(_streamed, "CHUNK_ELEMENTS", 20)
    taken = []
    sum_over_anchors = _streamed.sum_over_anchors
    monkeypatch.setattr(_streamed, "sum_over_anchors", lambda *a, **k: taken.append(a) or sum_over_anchors(*a, **k))
    x, y, *_ = case(5, 5)
    for options, n, small in (
        ({}, 4, True), ({}, 5, False), ({"chunk_size": 4}, 4, True), ({"chunk_size": 3}, 4, False),
        ({"image_rows": slice(0, 3)}, 4, False), ({"text_rows": slice(1, 4)}, 4, False),
    ):  # fmt: skip
        taken.clear()
        InfoNCELoss().from_embeddings(x[:n], y[:n], **options)
        assert bool(taken) == small, options


@every_loss
def test_without_ids_row_by_row(name):
    x, y, _, _ = case(6, 6)
    loss = LOSSES[name]("mean").double()
    assert_same(streamed(loss, x, y, chunk_size=4), whole(loss, x, y, torch.eye(6, dtype=torch.bool)), [x, y])


@every_loss
def test_ids_of_one_side(name):
    x, y, image_ids, _ = case(6, 6)
    loss = LOSSES[name]("sum").double()
    assert_same(streamed(loss, x, y, image_ids=image_ids, chunk_size=4),
                whole(loss, x, y, image_ids.unsqueeze(1) == image_ids), [x, y])  # fmt: skip
    x, y, _, _ = case(3, 15)
    index = torch.arange(15) // 5  # five captions per image: the row of the image that each describes
    assert_same(streamed(loss, x, y, text_ids=index, chunk_size=4),
                whole(loss, x, y, torch.arange(3).unsqueeze(1) == index), [x, y])  # fmt: skip


@pytest.mark.parametrize("dtypes", [(torch.uint8, torch.int64), (torch.int32, torch.int16)])
def test_ids_of_any_integers(dtypes):
    x, y, image_ids, text_ids = case(6, 9)
    loss = InfoNCELoss()
    expected = loss.from_embeddings(x, y, image_ids=image_ids, text_ids=text_ids)
    assert torch.equal(loss.from_embeddings(x, y, image_ids=image_ids.to(dtypes[0]), text_ids=text_ids.to(dtypes[1])),
                       expected)  # fmt: skip


@every_loss
@pytest.mark.parametrize("ids", [(0, 0), (0, 1)], ids=["no negative", "no positive"])
@either_reduction
def test_nobody_to_compare_with(name, ids, reduction):
    x, y, _, _ = case(4, 5)
    image_ids, text_ids = (torch.full((k,), i) for k, i in zip((4, 5), ids, strict=True))
    loss = LOSSES[name](reduction).double()
    actual = streamed(loss, x, y, image_ids=image_ids, text_ids=text_ids, chunk_size=2)
    assert torch.isfinite(actual)
    assert_same(actual, whole(loss, x, y, image_ids.unsqueeze(1) == text_ids), [x, y])


@every_loss
def test_rows_of_length_one_as_they_are(name):
    x, y, image_ids, text_ids = case(5, 7)
    loss = LOSSES[name]("sum").double()
    u, v = (l2_normalize(t).detach().requires_grad_() for t in (x, y))
    torch.manual_seed(1)
    expected = loss(u @ v.t(), image_ids.unsqueeze(1) == text_ids)
    pairs = {"image_ids": image_ids, "text_ids": text_ids}
    assert_same(streamed(loss, u, v, chunk_size=2, normalize=False, **pairs), expected, [u, v])
    scaled = (u * 3).detach()  # not what was asked for to be normalised
    assert not torch.isclose(streamed(loss, scaled, v, normalize=False, **pairs), expected)
    assert_near(streamed(loss, scaled, v, **pairs), expected, 1e-12)


@pytest.mark.parametrize("name", ["hardest", "expected", "infonce learnable", "sigmoid"])
@pytest.mark.parametrize("side", [0, 1])
def test_gradient_of_one_side_alone(name, side):
    x, y, image_ids, text_ids = case(5, 7)
    loss = LOSSES[name]("sum").double()
    both = torch.autograd.grad(streamed(loss, x, y, image_ids=image_ids, text_ids=text_ids), (x, y))
    one = [x.detach(), y.detach()]
    one[side] = (x, y)[side]
    value = streamed(loss, *one, image_ids=image_ids, text_ids=text_ids, chunk_size=3)
    assert_near(torch.autograd.grad(value, one[side])[0], both[side], 1e-12)


# gradients


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "expected"])  # its weights have no gradient
def test_gradcheck(name):
    x, y, image_ids, text_ids = case(3, 5, seed=3, dim=3)
    loss = LOSSES[name]("mean").double()
    parameters = list(loss.parameters())

    def value(x, y, *_):
        return streamed(loss, x, y, image_ids=image_ids, text_ids=text_ids, chunk_size=2)

    assert torch.autograd.gradcheck(value, (x, y, *parameters))


@pytest.mark.parametrize("name", ["infonce learnable", "sigmoid", "hardest", "expected"])
def test_second_derivatives(name):
    x, y, image_ids, text_ids = case(4, 6, seed=3)
    loss = LOSSES[name]("sum").double()
    leaves = [x, y, *loss.parameters()]

    def second(value):
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in grads), leaves)

    ours = second(streamed(loss, x, y, image_ids=image_ids, text_ids=text_ids, chunk_size=3))
    for a, b in zip(ours, second(whole(loss, x, y, image_ids.unsqueeze(1) == text_ids)), strict=True):
        assert_near(a, b, 1e-10)


@pytest.mark.parametrize("name", ["infonce", "hardest"])
def test_twice_backward_under_torch_func_and_under_checkpointing(name):
    x, y, image_ids, text_ids = case(5, 7)
    loss = LOSSES[name]("sum").double()

    def value(x, y):
        return loss.from_embeddings(x, y, image_ids=image_ids, text_ids=text_ids, chunk_size=3)

    once = value(x, y)
    first = torch.autograd.grad(once, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(once, x)[0])
    assert_near(torch.func.grad(value)(x.detach(), y.detach()), first, 1e-12)
    for reentrant in (False, True):
        x.grad = None
        checkpoint(value, x, y, use_reentrant=reentrant).backward()
        assert torch.equal(first, x.grad)


@pytest.mark.parametrize("whole", [False, True])
def test_activation_checkpointing_computes_all_that_it_holds_once_more(whole, monkeypatch):
    """Not once more for every chunk, whose gradient is found on the way."""
    monkeypatch.setattr(hrem_layers.losses._rows, "CHUNK_ELEMENTS", 20)
    calls, loss = [], LOSSES["infonce learnable"]("sum").double()

    def encode_and_compare(x, y):
        calls.append(1)
        x, y = x.sin(), y.sin()
        return loss(x @ y.t(), torch.eye(len(x), dtype=torch.bool)) if whole else loss.from_embeddings(x, y)

    x, y, *_ = case(12, 12)
    checkpoint(encode_and_compare, x, y, use_reentrant=False).backward()
    assert len(calls) == 2


# draws


def test_the_draws_are_those_of_the_whole_whatever_the_chunk():
    x, y, image_ids, text_ids = case(40, 50, dim=3)
    loss = TripletLoss(negative_sampling="distance_weighted", weight_dim=3, cutoff=0.1, nonzero_cutoff=1.95)
    positives = image_ids.unsqueeze(1) == text_ids
    values = []
    for seed in range(3):
        torch.manual_seed(seed)
        expected = loss(cosine_matrix(l2_normalize(x), l2_normalize(y)), positives)
        after = torch.rand(())
        for chunk_size in (1, 7, None):
            torch.manual_seed(seed)
            actual = loss.from_embeddings(x, y, image_ids=image_ids, text_ids=text_ids, chunk_size=chunk_size)
            assert_near(actual, expected, 1e-12)
            assert torch.equal(torch.rand(()), after)
        values.append(actual.item())
    assert len(set(values)) == 3


def test_given_noise_is_used():
    x, y, image_ids, text_ids = case(7, 9, dim=3)
    loss = TripletLoss(weight_dim=3, nonzero_cutoff=1.95)
    similarity = cosine_matrix(l2_normalize(x), l2_normalize(y))
    noise = torch.rand(16, generator=generator(5), dtype=DOUBLE)
    expected = loss(similarity, image_ids.unsqueeze(1) == text_ids, noise=noise)
    pairs = {"image_ids": image_ids, "text_ids": text_ids}
    assert_same(loss.from_embeddings(x, y, noise=noise, chunk_size=2, **pairs), expected, [x, y])
    assert not torch.isclose(loss.from_embeddings(x, y, noise=noise.flip(0), **pairs), expected)


# anchors shared out


@every_loss
@either_reduction
@pytest.mark.parametrize("cuts", [([0, 3, 7], [0, 6, 11]), ([0, 0, 7], [0, 11, 11]), ([0, 2, 4, 7], [0, 1, 9, 11])])
def test_parts_add_up_to_the_whole(name, reduction, cuts):
    x, y, image_ids, text_ids = case(7, 11)
    loss = LOSSES[name](reduction).double()
    leaves = [x, y, *loss.parameters()]
    expected = whole(loss, x, y, image_ids.unsqueeze(1) == text_ids)
    parts = [
        streamed(loss, x, y, image_ids=image_ids, text_ids=text_ids, chunk_size=2, image_rows=slice(*i),
                 text_rows=slice(*t))
        for i, t in zip(zip(cuts[0], cuts[0][1:], strict=False), zip(cuts[1], cuts[1][1:], strict=False), strict=True)
    ]  # fmt: skip
    assert_same(sum(parts), expected, leaves)


def test_a_part_computes_its_own_anchors_alone():
    x, y, image_ids, text_ids = case(40, 60)
    loss = InfoNCELoss(0.3)

    def products(**rows):
        with Largest() as largest:
            loss.from_embeddings(x, y, image_ids=image_ids, text_ids=text_ids, chunk_size=5, **rows).backward()
        return largest.multiplied

    assert products() == 3 * 2 * 40 * 60 * 5
    assert products(image_rows=slice(0, 10), text_rows=slice(0, 15)) == 3 * 2 * 40 * 60 * 5 / 4


# memory


class Largest(TorchDispatchMode):
    """The most elements of one result, and the multiply-adds of all products."""

    def __enter__(self):
        self.numel = self.multiplied = 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm_"):
            a, b = args[-2:]
            self.multiplied += a.shape[0] * a.shape[1] * b.shape[1]
        return out


@every_loss
@pytest.mark.parametrize("chunk_size", [4, 16])
def test_the_similarity_is_never_whole(name, chunk_size):
    x, y, _, _ = case(120, 150, dim=3)
    image_ids, text_ids = torch.arange(120), torch.arange(150) % 120
    loss = LOSSES[name]("sum").double()
    with Largest() as largest:
        streamed(loss, x, y, image_ids=image_ids, text_ids=text_ids, chunk_size=chunk_size).backward()
    assert largest.numel <= max(chunk_size * 151, 150 * 3)  # sums over the first 0 to 150 of a row


@every_loss
def test_a_gradient_takes_the_place_of_its_similarity(name, monkeypatch):
    """One matrix of a chunk's size is there, beside who belongs together."""
    monkeypatch.setattr(_rows, "CHUNK_ELEMENTS", 2**13)
    x, y, _, _ = case(600, 500, dim=2, dtype=torch.float32)
    ids = torch.arange(600)
    loss = LOSSES[name]("sum")
    run = lambda: streamed(loss, x, y, image_ids=ids, text_ids=ids[:500], chunk_size=450)  # noqa: E731
    run()
    similarity, flags = 450 * 600 * 4 / 1e6, 450 * 600 / 1e6  # of the texts
    assert similarity <= tensors_peak_mb(run) < 1.5 * similarity + flags


# dtypes


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_embeddings_are_multiplied_in_float32(name, dtype):
    x, y, image_ids, text_ids = case(5, 7, dtype=dtype)
    loss = LOSSES[name]("mean")
    value = streamed(loss, x, y, image_ids=image_ids, text_ids=text_ids)
    assert value.dtype == torch.float32
    assert_same(value, whole(loss, x.float(), y.float(), image_ids.unsqueeze(1) == text_ids), [x, y], 1e-2)
    assert_near(value, whole(loss, x.float(), y.float(), image_ids.unsqueeze(1) == text_ids), 1e-6)


@every_loss
def test_autocast_changes_nothing(name):
    x, y, image_ids, text_ids = case(5, 7, dtype=torch.float32)
    loss = LOSSES[name]("mean")
    expected = streamed(loss, x, y, image_ids=image_ids, text_ids=text_ids)
    gradient = torch.autograd.grad(expected, x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = streamed(loss, x, y, image_ids=image_ids, text_ids=text_ids)
        assert torch.equal(value, expected)
        assert torch.equal(torch.autograd.grad(value, x)[0], gradient)


def test_mixed_dtypes():
    x, y, image_ids, text_ids = case(5, 7)
    value = InfoNCELoss(0.3).from_embeddings(x.to(torch.bfloat16), y, image_ids=image_ids, text_ids=text_ids)
    assert value.dtype == DOUBLE


# tracing


@pytest.mark.parametrize("name", ["distance_weighted", "infonce learnable", "sigmoid"])
def test_traced_whole_it_is_the_same(name, fresh_compiler):
    x, y, image_ids, text_ids = case(5, 7)
    loss = LOSSES[name]("mean").double()

    def call(x, y, noise):
        options = {"noise": noise} if isinstance(loss, TripletLoss) else {}
        return loss.from_embeddings(x, y, image_ids=image_ids, text_ids=text_ids, chunk_size=4, **options)

    noise = torch.rand(12, dtype=DOUBLE) if name == "distance_weighted" else None
    leaves = [x, y, *loss.parameters()]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(x, y, noise)
    found = torch.autograd.grad(compiled, leaves)
    expected = call(x, y, noise)
    assert_near(compiled, expected, 1e-12)
    for ours, theirs in zip(found, torch.autograd.grad(expected, leaves), strict=True):
        assert_near(ours, theirs, 1e-12)


# what is not finite, and what is refused


@every_loss
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("normalize", [True, False])
def test_one_bad_embedding_makes_the_loss_nan(name, bad, side, normalize):
    x, y, image_ids, text_ids = case(6, 7)
    with torch.no_grad():
        (x, y)[side][4, 2] = bad
    value = streamed(LOSSES[name]("sum").double(), x, y, image_ids=image_ids, text_ids=text_ids, chunk_size=2,
                     normalize=normalize)  # fmt: skip
    assert torch.isnan(value)
    value.backward()
    assert not torch.isfinite(x.grad).all() and not torch.isfinite(y.grad).all()
    with torch.no_grad():
        assert torch.isnan(streamed(LOSSES[name]("sum").double(), x, y, image_ids=image_ids, text_ids=text_ids))


@pytest.mark.parametrize("place", [0, 5, 6, 12])
@pytest.mark.parametrize("negative_sampling", ["distance_weighted", "hardest"])
def test_bad_noise_makes_the_loss_nan(place, negative_sampling):
    x, y, image_ids, text_ids = case(6, 7)
    noise = torch.rand(13)
    loss = TripletLoss(negative_sampling=negative_sampling)
    pairs = {"image_ids": image_ids, "text_ids": text_ids}
    assert torch.isfinite(loss.from_embeddings(x, y, noise=noise, **pairs))
    noise[place] = math.nan
    similarity = cosine_matrix(l2_normalize(x), l2_normalize(y))
    assert torch.isnan(loss(similarity, image_ids.unsqueeze(1) == text_ids, noise=noise))
    assert torch.isnan(loss.from_embeddings(x, y, noise=noise, **pairs))


@pytest.mark.parametrize("name", ["infonce learnable", "sigmoid"])
def test_a_bad_parameter_makes_the_loss_nan(name):
    x, y, image_ids, text_ids = case(6, 7)
    loss = LOSSES[name]("mean")
    with torch.no_grad():
        loss.log_scale.fill_(math.nan)
    assert torch.isnan(streamed(loss, x, y, image_ids=image_ids, text_ids=text_ids))


def test_an_infinite_bias_makes_the_loss_nan():
    x, y, _, _ = case(4, 4)
    nobody = torch.zeros(4, 4, dtype=torch.bool)
    loss = SigmoidLoss(0.3, bias=-1.0)
    assert torch.isfinite(loss.from_embeddings(x, y, positives=nobody))
    with torch.no_grad():
        loss.bias.fill_(-math.inf)  # -log σ(∞) = 0
    assert torch.isnan(loss.from_embeddings(x, y, positives=nobody))


IDS = torch.arange(4)
X = torch.ones(4, 3)


@every_loss
@pytest.mark.parametrize("change", [
    ({"image_embedding": X.tolist()}, TypeError, "image_embedding must be a tensor"),
    ({"image_embedding": torch.ones(4)}, ValueError, r"image_embedding must have shape \(N, D\)"),
    ({"text_embedding": torch.ones(4, 2)}, ValueError, r"text_embedding must have shape \(M, 3\)"),
    ({"text_embedding": torch.ones(4, 3).long()}, TypeError, "text_embedding must be a floating-point tensor"),
    ({"text_embedding": torch.ones(5, 3)}, ValueError, "text_ids must say .* 4 images and 5 texts"),
    ({"text_embedding": torch.ones(0, 3), "text_ids": IDS[:0]}, ValueError, "text_embedding must hold at least 1"),
    ({"image_ids": IDS[:3]}, ValueError, r"image_ids must have shape \(4,\)"),
    ({"image_ids": IDS.float()}, TypeError, "image_ids must be an integer tensor"),
    ({"text_ids": IDS.bool()}, TypeError, "text_ids must be an integer tensor"),
    ({"positives": torch.eye(4)}, TypeError, "positives must be a bool tensor"),
    ({"positives": torch.eye(4, 3).bool()}, ValueError, r"positives must have shape \(4, 4\)"),
    ({"positives": torch.eye(4).bool(), "image_ids": IDS}, ValueError, "give one of them"),
    ({"positives": torch.eye(4).bool(), "text_ids": IDS}, ValueError, "give one of them"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
    ({"chunk_size": 2.5}, TypeError, "chunk_size must be an int"),
    ({"normalize": 1}, TypeError, "normalize must be True or False"),
    ({"exchange": 3}, TypeError, "exchange must be a hrem_layers.Exchange"),
    ({"image_rows": 3}, TypeError, "image_rows must be a slice"),
    ({"image_rows": slice(0.0, 4)}, ValueError, "image_rows must be a slice of step 1 within the 4 anchors"),
    ({"image_rows": slice(0, 5)}, ValueError, "image_rows must be a slice of step 1 within the 4 anchors"),
    ({"text_rows": slice(-1, 4)}, ValueError, "text_rows must be a slice of step 1"),
    ({"text_rows": slice(0, 4, 2)}, ValueError, "text_rows must be a slice of step 1"),
])  # fmt: skip
def test_wrong_input_is_named(name, change):
    given, error, said = change
    with pytest.raises(error, match=said):
        LOSSES[name]("sum").from_embeddings(**{"image_embedding": X, "text_embedding": X, **given})


def test_a_choice_of_ones_own_needs_the_whole():
    loss = TripletLoss(negative_sampling=hardest_negative)
    with pytest.raises(ValueError, match=r"negative_sampling must be named where the similarity is not whole.*hardest"):
        loss.from_embeddings(X, X)


def test_functions_and_modules_agree():
    x, y, image_ids, text_ids = case(5, 7)
    functions, pairs = hrem_layers.losses, {"image_ids": image_ids, "text_ids": text_ids, "chunk_size": 2}
    for module, value in (
        (TripletLoss(0.3, negative_sampling="expected", weight_dim=9, cutoff=0.4, nonzero_cutoff=1.5),
         functions.streamed_triplet_loss(x, y, margin=0.3, negative_sampling="expected", weight_dim=9, cutoff=0.4,
                                         nonzero_cutoff=1.5, **pairs)),
        (InfoNCELoss(0.5), functions.streamed_info_nce_loss(x, y, scale=2.0, **pairs)),
        (InfoNCELoss(0.5), functions.streamed_info_nce_loss(x, y, scale=torch.tensor(2.0), **pairs)),
        (SigmoidLoss(0.5, bias=-2.0), functions.streamed_sigmoid_loss(x, y, scale=2.0, bias=-2.0, **pairs)),
    ):  # fmt: skip
        assert_near(module.double().from_embeddings(x, y, **pairs), value, 1e-7)
    for function in ("triplet", "info_nce", "sigmoid"):
        with pytest.raises(ValueError, match="reduction must be one of 'sum', 'mean', got 'none'"):
            getattr(functions, f"streamed_{function}_loss")(x, y, reduction="none", **pairs)


def test_a_learnable_temperature_is_held_in_range():
    x, y, image_ids, text_ids = case(5, 7)
    loss, pairs = InfoNCELoss(0.3, learnable=True), {"image_ids": image_ids, "text_ids": text_ids}
    with torch.no_grad():
        loss.log_scale.fill_(9.0)
    at_limit = InfoNCELoss(0.01)
    assert_near(loss.eval().from_embeddings(x, y, **pairs), at_limit.from_embeddings(x, y, **pairs), 1e-6)
    assert loss.log_scale == 9.0
    assert_near(loss.train().from_embeddings(x, y, **pairs), at_limit.from_embeddings(x, y, **pairs), 1e-6)
    assert_near(loss.log_scale.exp(), torch.tensor(100.0), 1e-6)
