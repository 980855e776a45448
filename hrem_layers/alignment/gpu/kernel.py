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
- *Backward* computes the tile again, finds the same places and writes the derivative of the similarities, which
  matrix products then turn into gradients. No atomics: the same input gives the same bits.
"""

# ruff: noqa: RUF059  (score_tile gives more than each kernel needs)
from __future__ import annotations

import triton
import triton.language as tl

from hrem_layers.alignment.gpu.tile import finite, score_tile


@triton.jit
def align_kernel(
    texts, images, text_mask, image_mask, extent,
    mean_i2t, mean_t2i, top_i2t, top_t2i,
    num_texts, num_images, W, R, D, K,
    BT: tl.constexpr, BI: tl.constexpr, WP: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr, BD: tl.constexpr,
    SMALLEST: tl.constexpr, MASKED_WORDS: tl.constexpr, MASKED_REGIONS: tl.constexpr,
    SCAN: tl.constexpr, SLOPE: tl.constexpr, EPS2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """texts (T, W, D), images (I, R, D), masks (T, W) and (I, R), extent (T): place of the last word + 1.

    Writes mean_* (T, I) and top_* (T, I, K), which must hold zeros.
    """
    first_text, first_image = tl.program_id(0) * BT, tl.program_id(1) * BI
    text, image = first_text + tl.arange(0, BT), first_image + tl.arange(0, BI)
    last_word = tl.load(extent + text, mask=text < num_texts, other=0)
    text_ok = (last_word > SMALLEST) & (last_word <= WP)
    if tl.sum(text_ok.to(tl.int32)) == 0:
        return
    (
        sa, ok_a, inverse_a, ga, place_a, sb, ok_b, inverse_b, gb, place_b,
        f, place, inverse_regions, word_ok, words, regions,
    ) = score_tile(
        texts, images, text_mask, image_mask, text, text_ok, image, num_images, W, R, D,
        BT, BI, WP, RA, RB, BD, MASKED_WORDS, MASKED_REGIONS, SCAN, SLOPE, EPS2, PRECISION,
    )  # fmt: skip
    pair_ok = text_ok[:, None] & (image < num_images)[None, :]
    words, regions = tl.maximum(words, 1.0)[:, None], tl.maximum(regions, 1.0)[None, :]
    pair = text.to(tl.int64)[:, None] * num_images + image[None, :]  # [BT, BI]
    sum_g = tl.sum(finite(ga), axis=2)
    store_places(top_i2t, ga, place_a, pair, pair_ok, K)
    if RB:
        sum_g += tl.sum(finite(gb), axis=2)
        store_places(top_i2t, gb, place_b, pair, pair_ok, K)
    tl.store(mean_i2t + pair, sum_g / regions, mask=pair_ok)
    tl.store(mean_t2i + pair, tl.sum(finite(f), axis=1) / words, mask=pair_ok)
    ok = pair_ok[:, None, :] & (f > float("-inf")) & (place < K)
    tl.store(top_t2i + pair[:, None, :] * K + place, f, mask=ok)


@triton.jit
def align_grad_kernel(
    texts, images, text_mask, image_mask, extent,
    grad_mean_i2t, grad_mean_t2i, grad_top_i2t, grad_top_t2i, grad_x,
    num_texts, num_images, W, R, D, K, ROW,
    BT: tl.constexpr, BI: tl.constexpr, WP: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr, BD: tl.constexpr,
    SMALLEST: tl.constexpr, MASKED_WORDS: tl.constexpr, MASKED_REGIONS: tl.constexpr,
    SCAN: tl.constexpr, SLOPE: tl.constexpr, EPS2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same inputs, the gradients of the four outputs, rows of (T, ROW, ...); writes grad_x (T·W, I·R).

    grad_x must hold zeros; rows of padded words and columns of padded regions are left alone.
    """
    first_text, first_image = tl.program_id(0) * BT, tl.program_id(1) * BI
    text, image = first_text + tl.arange(0, BT), first_image + tl.arange(0, BI)
    last_word = tl.load(extent + text, mask=text < num_texts, other=0)
    text_ok = (last_word > SMALLEST) & (last_word <= WP)
    if tl.sum(text_ok.to(tl.int32)) == 0:
        return
    (
        sa, ok_a, inverse_a, ga, place_a, sb, ok_b, inverse_b, gb, place_b,
        f, place, inverse_regions, word_ok, words, regions,
    ) = score_tile(
        texts, images, text_mask, image_mask, text, text_ok, image, num_images, W, R, D,
        BT, BI, WP, RA, RB, BD, MASKED_WORDS, MASKED_REGIONS, SCAN, SLOPE, EPS2, PRECISION,
    )  # fmt: skip
    pair_ok = text_ok[:, None] & (image < num_images)[None, :]
    words, regions = tl.maximum(words, 1.0)[:, None], tl.maximum(regions, 1.0)[None, :]
    pair = text.to(tl.int64)[:, None] * ROW + image[None, :]

    # the gradients of f and g, divided by how many share the maximum
    ok = pair_ok[:, None, :] & (f > float("-inf"))
    top = tl.load(grad_top_t2i + pair[:, None, :] * K + place, mask=ok & (place < K), other=0.0)
    mean = tl.load(grad_mean_t2i + pair, mask=pair_ok, other=0.0) / words
    shared = ties_over_regions(sa, inverse_a, f, ok_a)
    if RB:
        shared += ties_over_regions(sb, inverse_b, f, ok_b)
    grad_f = tl.where(ok, mean[:, None, :] + top, 0.0) / tl.maximum(shared, 1.0)  # [BT, WP, BI]
    mean = tl.load(grad_mean_i2t + pair, mask=pair_ok, other=0.0) / regions
    grad_ga = region_grad(sa, inverse_regions, ga, place_a, word_ok, mean, grad_top_i2t, pair, pair_ok, K)
    along = along_regions(sa, inverse_regions, ga, grad_ga, word_ok)
    if RB:
        grad_gb = region_grad(sb, inverse_regions, gb, place_b, word_ok, mean, grad_top_i2t, pair, pair_ok, K)
        along += along_regions(sb, inverse_regions, gb, grad_gb, word_ok)

    f = finite(f)
    store_grad(
        grad_x, sa, f, grad_f, inverse_a, ga, grad_ga, inverse_regions, along, word_ok, ok_a, text, image, 0,
        num_images, W, R, WP, RA, SCAN, SLOPE,
    )  # fmt: skip
    if RB:
        store_grad(
            grad_x, sb, f, grad_f, inverse_b, gb, grad_gb, inverse_regions, along, word_ok, ok_b, text, image, RA,
            num_images, W, R, WP, RB, SCAN, SLOPE,
        )  # fmt: skip


@triton.jit
def store_places(top, g, place, pair, pair_ok, K):
    """g (BT, BI, RP) to its places among the K largest of its pair."""
    ok = pair_ok[:, :, None] & (g > float("-inf")) & (place < K)
    tl.store(top + pair[:, :, None] * K + place, g, mask=ok)


@triton.jit
def ties_over_regions(s, inverse_words, f, region_ok):
    best = (s * inverse_words[:, None, :, :] == f[:, :, :, None]) & region_ok[None, None, :, :]
    return tl.sum(best.to(tl.float32), axis=3)


@triton.jit
def region_grad(s, inverse_regions, g, place, word_ok, mean, grad_top, pair, pair_ok, K):
    """The gradient of g (BT, BI, RP), divided by how many words share the maximum."""
    ok = pair_ok[:, :, None] & (g > float("-inf"))
    grad = mean[:, :, None] + tl.load(grad_top + pair[:, :, None] * K + place, mask=ok & (place < K), other=0.0)
    best = (s * inverse_regions[:, :, :, None] == g[:, None, :, :]) & word_ok[:, :, None, None]
    return tl.where(ok, grad, 0.0) / tl.maximum(tl.sum(best.to(tl.float32), axis=1), 1.0)


@triton.jit
def along_regions(s, inverse_regions, g, grad_g, word_ok):
    """<grad_b, b> over the regions of one part: (BT, WP, BI)."""
    best = (s * inverse_regions[:, :, :, None] == g[:, None, :, :]) & word_ok[:, :, None, None]
    return tl.sum(tl.where(best, (grad_g * finite(g))[:, None, :, :], 0.0), axis=3)


@triton.jit
def store_grad(
    grad_x, s, f, grad_f, inverse_words, g, grad_g, inverse_regions, along_regions, word_ok, region_ok,
    text, image, first, num_images, W, R,
    WP: tl.constexpr, RP: tl.constexpr, SCAN: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """d(s / ‖s‖) = (g − a <g, a>) / ‖s‖ along the normed dimension; g ≠ 0 only where a is the maximum."""
    ok = word_ok[:, :, None, None] & region_ok[None, None, :, :]
    grad_a = tl.where((s * inverse_words[:, None, :, :] == f[:, :, :, None]) & ok, grad_f[:, :, :, None], 0.0)
    grad_b = tl.where((s * inverse_regions[:, :, :, None] == g[:, None, :, :]) & ok, grad_g[:, None, :, :], 0.0)
    grad = grad_a * inverse_words[:, None, :, :] + grad_b * inverse_regions[:, :, :, None]
    if SCAN:
        along_words = tl.sum(grad_a * f[:, :, :, None], axis=1)  # [BT, BI, RP]
        grad -= s * (along_words * inverse_words * inverse_words)[:, None, :, :]
        grad -= s * (along_regions * inverse_regions * inverse_regions)[:, :, :, None]
        grad = tl.where(s > 0, grad, grad * SLOPE)
    w, r = tl.arange(0, WP), first + tl.arange(0, RP)
    row = text.to(tl.int64)[:, None] * W + w[None, :]
    column = image[:, None] * R + r[None, :]
    place = row[:, :, None, None] * (num_images * R) + column[None, None, :, :]
    tl.store(grad_x + place, grad.to(grad_x.dtype.element_ty), mask=ok)
