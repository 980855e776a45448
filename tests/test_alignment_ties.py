"""Equal values, zero vectors, vectors of any length, NaN: dense, on candidates and as loops alike."""

from __future__ import annotations

import math

import pytest
import torch
from support import generator, random_mask, weigh

from hrem_layers import align_fragments
from hrem_layers.alignment.candidates import align_candidates
from hrem_layers.alignment.reference import align_by_loops

MODES = ("scan", "cosine", "dot")
pytestmark = pytest.mark.usefixtures("cpu_alignment")
SIZES = [(5, 6), (1, 1), (1, 4), (4, 1), (7, 3)]


def dense(images, texts, image_mask=None, text_mask=None, **options):
    return tuple(align_fragments(images, texts, image_mask, text_mask, **options))


def on_candidates(images, texts, image_mask=None, text_mask=None, **options):
    """All pairs by ``align_candidates``."""
    i, t = len(images), len(texts)
    every_text, every_image = torch.arange(t).expand(i, t), torch.arange(i).expand(t, i)
    mean_i2t, top_i2t = align_candidates(images, texts, image_mask, text_mask, every_text, **options)
    mean_t2i, top_t2i = align_candidates(texts, images, text_mask, image_mask, every_image, **options)
    return mean_i2t, mean_t2i, top_i2t, top_t2i


WAYS = {"dense": dense, "on_candidates": on_candidates}


def random(n, width, seed, dtype=torch.float64, dim=6):
    return torch.randn(n, width, dim, generator=generator(seed), dtype=torch.float64).to(dtype)


def results(align, images, texts, *masks, **options):
    """Values and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in (images, texts)]
    out = tuple(align(*leaves, *masks, **options))
    return [*(x.detach() for x in out), *torch.autograd.grad(weigh(*out), leaves)]


def assert_same(ours, theirs, tolerance):
    for place, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        error, scale = (x.double() - y.double()).abs().max(), max(1.0, float(y.abs().max()))
        assert error <= tolerance * scale, f"output {place} is off by {error:.3g} where the largest is {scale:.3g}"


def repeated(what, r, w):
    images, texts = random(3, r, 0), random(4, w, 1)
    if what == "fragments":
        images[:, 1:3], texts[:, 1:3] = images[:, :1], texts[:, :1]
    elif what == "items":
        images[1:], texts[1:] = images[0], texts[0]
    elif what == "zeros":
        images[0, 0] = texts[1] = 0
    elif what == "everything":
        images[:], texts[:] = images[0, 0], texts[0, 0]
    return images, texts


@pytest.mark.parametrize("what", ["fragments", "items", "zeros", "everything"])
@pytest.mark.parametrize(("r", "w"), SIZES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
def test_ties_share_as_in_the_loops(what, r, w, mode, way):
    images, texts = repeated(what, r, w)
    for masked in (False, True):
        masks = (random_mask(3, r, 2, at_least=0), random_mask(4, w, 3, at_least=0)) if masked else (None, None)
        for topk in (1, 2, 9):
            options = {"topk": topk, "mode": mode}
            expected = results(align_by_loops, images, texts, *masks, **options)
            for chunk_size in (None, 1, 3):
                ours = results(WAYS[way], images, texts, *masks, chunk_size=chunk_size, **options)
                assert_same(ours, expected, 1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_what_differs_in_the_last_places_ties(mode, way, scale):
    """In float32 as well, where the copies of a region may come out of the product a few ulp apart."""
    images, texts = random(2, 4, 0, torch.float32), random(3, 3, 1, torch.float32)
    images[:, 1] = images[:, 0] * (1 + 2 * torch.finfo(torch.float32).eps)
    images, texts = images * scale, texts * scale
    grad = results(WAYS[way], images, texts, mode=mode, topk=2)[4]
    if mode == "dot":
        torch.testing.assert_close(grad[:, 0], grad[:, 1], rtol=1e-5, atol=1e-5 * scale)
    else:
        torch.testing.assert_close(grad[:, 0] * scale, grad[:, 1] * scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
def test_what_differs_by_more_does_not_tie(mode, way):
    images, texts = random(1, 2, 0), random(1, 1, 1)
    images[:, 1] = images[:, 0]
    images[:, 1, 0] += 1e-6
    expected = results(align_by_loops, images, texts, mode=mode, topk=1)
    assert_same(results(WAYS[way], images, texts, mode=mode, topk=1), expected, 1e-8)
    if mode == "dot":
        assert (expected[4][0].abs().sum(dim=1) > 0).tolist() == [True, True]  # the mean of i2t reaches both
        (grad,) = torch.autograd.grad(WAYS[way](images.requires_grad_(), texts, mode=mode, topk=1)[3].sum(), images)
        assert (grad[0].abs().sum(dim=1) > 0).sum() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("what", ["nothing", "fragments", "items"])
@pytest.mark.parametrize(("r", "w"), SIZES)
@pytest.mark.parametrize("mode", MODES)
def test_neither_the_chunk_nor_the_order_of_the_batch_matters(dtype, what, r, w, mode):
    images, texts = (x.to(dtype) for x in repeated(what, r, w))
    rows, columns = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    if mode == "scan" and dtype == torch.float32:
        # "scan" divides by the norms of similarities. Of those that nearly vanish, copies come out of a product of
        # another shape as different as what does not tie; which does so hangs on the processor.
        images, texts = images.abs(), texts.abs()
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5

    def run(align, images, texts, order_images, order_texts, **options):
        leaves = [x.clone().requires_grad_() for x in (images, texts)]
        out = align(leaves[0][order_images], leaves[1][order_texts], topk=3, mode=mode, **options)
        back = order_images.argsort(), order_texts.argsort()
        places = (back[0], back[1]), (back[1], back[0]), (back[0], back[1]), (back[1], back[0])
        out = [x[a][:, b] for x, (a, b) in zip(out, places, strict=True)]
        return [*(x.detach() for x in out), *torch.autograd.grad(weigh(*out), leaves)]

    plain = torch.arange(3), torch.arange(4)
    expected = run(dense, images, texts, *plain)
    for align in WAYS.values():
        for order in (plain, (rows, columns)):
            for chunk_size in (None, 1, 2, 5):
                assert_same(run(align, images, texts, *order, chunk_size=chunk_size), expected, tolerance)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["scan", "cosine"])
@pytest.mark.parametrize("scales", [(1e19, 1e-20), (1e-20, 1e30), (3e-37, 1e37), (1e-22, 1e-22)])
def test_the_length_of_a_vector_does_not_matter(way, mode, scales):
    images, texts = random(3, 4, 0), random(2, 5, 1)
    mask = random_mask(2, 5, 2)
    plain = results(WAYS[way], images.float(), texts.float(), None, mask, mode=mode, topk=3)
    scaled = [(x * scale).float() for x, scale in zip((images, texts), scales, strict=True)]
    found = results(WAYS[way], *scaled, None, mask, mode=mode, topk=3)
    found[4:] = (x.double() * scale for x, scale in zip(found[4:], scales, strict=True))
    assert_same(found, plain, 1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["scan", "cosine"])
def test_zero_vectors_get_no_gradient(way, mode):
    images, texts = random(3, 4, 0), random(2, 5, 1)
    images[0, 1], images[1, 2] = 0, torch.finfo(torch.float64).tiny / 8  # subnormal
    grad = results(WAYS[way], images, texts, mode=mode, topk=3)[4]
    assert not grad[0, 1].any()
    assert not grad[1, 2].any()
    assert torch.isfinite(grad).all()
    assert grad[2].any(dim=1).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("threshold", [0.5, 4.0])
def test_where_the_norm_of_scan_counts_as_zero(way, threshold):
    """At eps, the rounding of a cosine: a word at right angles up to that has no direction."""
    eps = torch.finfo(torch.float64).eps
    images = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)
    texts = torch.tensor([[[threshold * eps, 1.0]]], dtype=torch.float64)
    out = WAYS[way](images, texts, mode="scan", topk=1)
    assert out[1].item() == (1 if threshold > 1 else 0)  # s / ‖s‖ over the one word


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_not_finite_reaches_its_pairs_and_no_other(value, side, mode, way, masked):
    images, texts = random(3, 4, 0), random(2, 5, 1)
    masks = (random_mask(3, 4, 2, at_least=2), random_mask(2, 5, 3, at_least=2)) if masked else (None, None)
    clean = WAYS[way](images, texts, *masks, mode=mode, topk=2)
    fragments, mask = (images, masks[0]) if side == "image" else (texts, masks[1])
    place = 1 if mask is None else int(mask[1].int().argmax())
    fragments[1, place, 2] = value
    if mask is not None:
        images[~masks[0]] = texts[~masks[1]] = math.nan  # in the padding it is nothing
    out = WAYS[way](images, texts, *masks, mode=mode, topk=2)
    for receiver, x, y in zip(("image", "text") * 2, out, clean, strict=True):
        dim = 0 if receiver == side else 1
        hit = x.select(dim, 1)
        assert not torch.isfinite(hit if hit.dim() == 1 else hit.sum(dim=-1)).any()
        others = torch.tensor([i for i in range(x.shape[dim]) if i != 1])
        torch.testing.assert_close(x.index_select(dim, others), y.index_select(dim, others))
    leaves = [x.clone().requires_grad_() for x in (images, texts)]
    out = WAYS[way](*leaves, *masks, mode=mode, topk=2)
    grads = torch.autograd.grad(sum(x.sum() for x in out), leaves)
    assert not all(torch.isfinite(x).all() for x in grads)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_product_that_overflows_is_not_taken_for_an_empty_item(way, masked):
    images = torch.full((1, 2, 3), 1e30)
    masks = (torch.tensor([[True, False]]), torch.tensor([[False, True]])) if masked else (None, None)
    out = WAYS[way](images, -images, *masks, mode="dot", topk=1)
    assert all((x == -math.inf).all() for x in out)
