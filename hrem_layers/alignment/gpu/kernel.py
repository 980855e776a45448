# mypy: ignore-errors
# (values of a Triton program have no types that a checker knows)
r"""The fused GPU kernels: a program computes a tile of image-text pairs from fragments to p and q.

Imported only where it runs (it needs Triton). A program takes BT texts and BI images. It multiplies their
fragments (float32 accumulators), and LeakyReLU, both norms, both maxima, the means and the largest values are
computed while the tile is on the chip; per pair 2·(topk + 1) numbers go to memory. The formulas and the letters are
those of :mod:`hrem_layers.alignment.block`.

- *Regions.* Triton's blocks are powers of 2. Regions are therefore cut in two parts, RA + RB (36 = 32 + 16, with 12
  idle columns instead of the 28 of 64); what is computed over regions is computed for each part and joined.
- *Words* fill WP rows. A launch is for the texts that fit WP but not half of it; the host launches every WP and never
  looks at a mask. Texts come sorted by the place of their last word, so that nearly every program is either full of its
  launch's texts or has none and leaves at once.
- *The largest values* need no sort: the place of a value among them is the number of values that beat it (of equal
  values the first), counted on the tile; a value whose place is below topk is stored there.
- *Backward* computes the tile again, finds the same maxima and writes the derivative of the similarities, which
  matrix products then turn into gradients. No atomics: the same input gives the same bits. Values that tie share the
  gradients of their places; with these as sums from the first place on, that is a difference of two numbers over how
  many tie.

What a kernel is given comes in groups, NamedTuples of :mod:`hrem_layers.alignment.gpu.arguments`: each modality's
fragments, the scores or their gradients, the sizes; as constants the blocks and the form.
"""

# ruff: noqa: RUF059  (score_tile gives more than each kernel needs)
from __future__ import annotations

import triton
import triton.language as tl

from hrem_layers.alignment.gpu.tile import (
    finite,
    launched,
    region_bounds,
    region_places,
    region_wins,
    score_tile,
    tie_margins,
    word_bounds,
    word_places,
    word_wins,
)


@triton.jit
def align_kernel(
    texts, images, extent, out, sizes, BLOCKS: tl.constexpr, SMALLEST: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    """From fragments to p and q.

    ``texts``, ``images``: Fragments; ``extent`` (T): place of each text's last word + 1; ``out``: PairScores, which
    must hold zeros; ``sizes``: Sizes; ``BLOCKS``: Blocks, for texts whose extent is over ``SMALLEST``; ``FORM``: Form.
    """
    text, image, text_ok = launched(extent, sizes, BLOCKS, SMALLEST)
    if tl.sum(text_ok.to(tl.int32)) == 0:
        return
    (sa, ok_a, inverse_a, ga, sb, ok_b, inverse_b, gb, f, inverse_regions, word_ok, words, regions) = score_tile(
        texts, images, text, text_ok, image, sizes, BLOCKS, FORM
    )
    A: tl.constexpr = BLOCKS.regions_a
    B: tl.constexpr = BLOCKS.regions_b
    pair_ok = text_ok[:, None] & (image < sizes.images)[None, :]
    words, regions = tl.maximum(words, 1.0)[:, None], tl.maximum(regions, 1.0)[None, :]
    pair = text.to(tl.int64)[:, None] * sizes.images + image[None, :]  # [BT, BI]
    sum_g = tl.sum(finite(ga), axis=2)
    place_a = region_places(ga, ga, 0, 0, A, A)
    if B:
        sum_g += tl.sum(finite(gb), axis=2)
        place_a += region_places(ga, gb, 0, A, A, B)
        place_b = region_places(gb, gb, A, A, B, B) + region_places(gb, ga, A, 0, B, A)
        store_places(out.top_i2t, gb, place_b, pair, pair_ok, sizes.topk)
    store_places(out.top_i2t, ga, place_a, pair, pair_ok, sizes.topk)
    tl.store(out.mean_i2t + pair, sum_g / regions, mask=pair_ok)
    tl.store(out.mean_t2i + pair, tl.sum(finite(f), axis=1) / words, mask=pair_ok)
    place = word_places(f, BLOCKS.words)
    ok = pair_ok[:, None, :] & (f > float("-inf")) & (place < sizes.topk)
    tl.store(out.top_t2i + pair[:, None, :] * sizes.topk + place, f, mask=ok)


@triton.jit
def align_grad_kernel(
    texts, images, extent, grad, grad_x, sizes, row_length,
    BLOCKS: tl.constexpr, SMALLEST: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """From fragments and the gradients of the scores to that of the similarities before the LeakyReLU.

    As :func:`align_kernel`; ``grad``: PairScores whose ``top_*`` (T, ``row_length``, K + 1) are sums over the places
    before, and whose ``mean_*`` have rows of ``row_length`` too. Writes ``grad_x`` (T·W, I·R), which must hold zeros;
    rows of padded words and columns of padded regions are left alone.
    """
    text, image, text_ok = launched(extent, sizes, BLOCKS, SMALLEST)
    if tl.sum(text_ok.to(tl.int32)) == 0:
        return
    (sa, ok_a, inverse_a, ga, sb, ok_b, inverse_b, gb, f, inverse_regions, word_ok, words, regions) = score_tile(
        texts, images, text, text_ok, image, sizes, BLOCKS, FORM
    )
    A: tl.constexpr = BLOCKS.regions_a
    B: tl.constexpr = BLOCKS.regions_b
    K = sizes.topk
    pair_ok = text_ok[:, None] & (image < sizes.images)[None, :]
    words, regions = tl.maximum(words, 1.0)[:, None], tl.maximum(regions, 1.0)[None, :]
    pair = text.to(tl.int64)[:, None] * row_length + image[None, :]
    margin = tie_margins(texts, images, text, text_ok, image, sizes, FORM)  # [BT, BI]

    # the gradients of f and g, divided by how many share the maximum
    ok = pair_ok[:, None, :] & (f > float("-inf"))
    first, ties = word_bounds(f, margin)
    grad_f = top_grad(grad.top_t2i, pair[:, None, :], first, ties, ok, K)
    grad_f += (tl.load(grad.mean_t2i + pair, mask=pair_ok, other=0.0) / words)[:, None, :]
    shared = tl.sum(region_wins(sa, inverse_a, f, margin, ok_a).to(tl.float32), axis=3)
    if B:
        shared += tl.sum(region_wins(sb, inverse_b, f, margin, ok_b).to(tl.float32), axis=3)
    grad_f = tl.where(ok, grad_f, 0.0) / tl.maximum(shared, 1.0)  # [BT, WP, BI]

    mean = tl.load(grad.mean_i2t + pair, mask=pair_ok, other=0.0) / regions
    first, ties = region_bounds(ga, ga, margin)
    if B:
        first_ab, ties_ab = region_bounds(ga, gb, margin)
        first_bb, ties_bb = region_bounds(gb, gb, margin)
        first_ba, ties_ba = region_bounds(gb, ga, margin)
        first, ties = first + first_ab, ties + ties_ab
        grad_gb = region_grad(
            grad.top_i2t, pair, pair_ok, mean, sb, inverse_regions, gb, first_bb + first_ba, ties_bb + ties_ba,
            margin, word_ok, K,
        )  # fmt: skip
    grad_ga = region_grad(
        grad.top_i2t, pair, pair_ok, mean, sa, inverse_regions, ga, first, ties, margin, word_ok, K
    )  # fmt: skip
    along = along_regions(sa, inverse_regions, ga, grad_ga, margin, word_ok)
    if B:
        along += along_regions(sb, inverse_regions, gb, grad_gb, margin, word_ok)

    f = finite(f)
    store_grad(
        grad_x, sa, f, grad_f, inverse_a, ga, grad_ga, inverse_regions, along, margin, word_ok, ok_a, text, image, 0,
        sizes, BLOCKS.words, A, FORM,
    )  # fmt: skip
    if B:
        store_grad(
            grad_x, sb, f, grad_f, inverse_b, gb, grad_gb, inverse_regions, along, margin, word_ok, ok_b, text, image,
            A, sizes, BLOCKS.words, B, FORM,
        )  # fmt: skip


@triton.jit
def store_places(top, g, place, pair, pair_ok, K):
    """g (BT, BI, RP) to its places among the K largest of its pair."""
    ok = pair_ok[:, :, None] & (g > float("-inf")) & (place < K)
    tl.store(top + pair[:, :, None] * K + place, g, mask=ok)


@triton.jit
def top_grad(sums, pair, first, ties, ok, K):
    """What values get that share the places from ``first`` on, as many as ``ties``, of those below K."""
    stop = tl.minimum(first + ties, K)
    first = tl.minimum(first, K)
    high = tl.load(sums + pair * (K + 1) + stop, mask=ok, other=0.0)
    low = tl.load(sums + pair * (K + 1) + first, mask=ok, other=0.0)
    return (high - low) / tl.maximum(ties, 1).to(tl.float32)


@triton.jit
def region_grad(sums, pair, pair_ok, mean, s, inverse_regions, g, first, ties, margin, word_ok, K):
    """The gradient of g (BT, BI, RP), divided by how many words share the maximum."""
    ok = pair_ok[:, :, None] & (g > float("-inf"))
    grad = mean[:, :, None] + top_grad(sums, pair[:, :, None], first, ties, ok, K)
    wins = word_wins(s, inverse_regions, g, margin, word_ok)
    return tl.where(ok, grad, 0.0) / tl.maximum(tl.sum(wins.to(tl.float32), axis=1), 1.0)


@triton.jit
def along_regions(s, inverse_regions, g, grad_g, margin, word_ok):
    """<grad_b, b> over the regions of one part: (BT, WP, BI)."""
    wins = word_wins(s, inverse_regions, g, margin, word_ok)
    return tl.sum(tl.where(wins, (grad_g * finite(g))[:, None, :, :], 0.0), axis=3)


@triton.jit
def store_grad(
    grad_x, s, f, grad_f, inverse_words, g, grad_g, inverse_regions, along_regions, margin, word_ok, region_ok,
    text, image, first, sizes, WP: tl.constexpr, RP: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """d(s / ‖s‖) = (g − a <g, a>) / ‖s‖ along the normed dimension; g ≠ 0 only where a is the maximum."""
    ok = word_ok[:, :, None, None] & region_ok[None, None, :, :]
    grad_a = tl.where(region_wins(s, inverse_words, f, margin, region_ok) & ok, grad_f[:, :, :, None], 0.0)
    grad_b = tl.where(word_wins(s, inverse_regions, g, margin, word_ok) & ok, grad_g[:, None, :, :], 0.0)
    grad = grad_a * inverse_words[:, None, :, :] + grad_b * inverse_regions[:, :, :, None]
    if FORM.scan:
        along_words = tl.sum(grad_a * f[:, :, :, None], axis=1)  # [BT, BI, RP]
        grad -= s * (along_words * inverse_words * inverse_words)[:, None, :, :]
        grad -= s * (along_regions * inverse_regions * inverse_regions)[:, :, :, None]
        grad = tl.where(s > 0, grad, grad * FORM.slope)
    w, r = tl.arange(0, WP), first + tl.arange(0, RP)
    row = text.to(tl.int64)[:, None] * sizes.words + w[None, :]
    column = image[:, None] * sizes.regions + r[None, :]
    place = row[:, :, None, None] * (sizes.images * sizes.regions) + column[None, None, :, :]
    tl.store(grad_x + place, grad.to(grad_x.dtype.element_ty), mask=ok)
