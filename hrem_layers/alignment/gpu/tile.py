"""What happens on one tile of image-text pairs, in pieces: see :mod:`hrem_layers.alignment.gpu.kernel`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def score_tile(
    texts, images, text_mask, image_mask, text, text_ok, image, num_images, W, R, D,
    BT: tl.constexpr, BI: tl.constexpr, WP: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr, BD: tl.constexpr,
    MASKED_WORDS: tl.constexpr, MASKED_REGIONS: tl.constexpr,
    SCAN: tl.constexpr, SLOPE: tl.constexpr, EPS2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What forward and backward share, for texts ``text`` (BT), those that are ``text_ok``, and images ``image`` (BI).

    Of each part of the regions: s, which regions are real, 1 / ‖s over words‖, g and the places of g. Then f, the
    places of f, 1 / ‖s over regions‖, which words are real, and how many words and regions are. f and g are
    −inf where there is nothing real. Without a second part (RB = 0) the first stands in its place.
    """
    word_ok = word_mask(text_mask, text, text_ok, W, WP, MASKED_WORDS)
    sa, ok_a = similarities(
        texts, images, image_mask, text, text_ok, image, 0, num_images, W, R, D,
        BT, BI, WP, RA, BD, MASKED_REGIONS, SCAN, SLOPE, PRECISION,
    )  # fmt: skip
    squares = tl.sum(sa * sa, axis=3)
    regions = tl.sum(ok_a.to(tl.float32), axis=1)
    inverse_a = inverse_root(tl.sum(sa * sa, axis=1), SCAN, EPS2)
    f = best_region(sa, inverse_a, ok_a)
    if RB:
        sb, ok_b = similarities(
            texts, images, image_mask, text, text_ok, image, RA, num_images, W, R, D,
            BT, BI, WP, RB, BD, MASKED_REGIONS, SCAN, SLOPE, PRECISION,
        )  # fmt: skip
        squares += tl.sum(sb * sb, axis=3)
        regions += tl.sum(ok_b.to(tl.float32), axis=1)
        inverse_b = inverse_root(tl.sum(sb * sb, axis=1), SCAN, EPS2)
        f = tl.maximum(f, best_region(sb, inverse_b, ok_b))
    f = tl.where(word_ok[:, :, None], f, float("-inf"))
    inverse_regions = inverse_root(squares, SCAN, EPS2)
    ga = best_word(sa, inverse_regions, word_ok, ok_a)
    place_a = region_places(ga, ga, 0, 0, RA, RA)
    if RB:
        gb = best_word(sb, inverse_regions, word_ok, ok_b)
        place_a += region_places(ga, gb, 0, RA, RA, RB)
        place_b = region_places(gb, gb, RA, RA, RB, RB) + region_places(gb, ga, RA, 0, RB, RA)
    else:
        sb, ok_b, inverse_b, gb, place_b = sa, ok_a, inverse_a, ga, place_a
    words = tl.sum(word_ok.to(tl.float32), axis=1)
    return (
        sa, ok_a, inverse_a, ga, place_a, sb, ok_b, inverse_b, gb, place_b,
        f, word_places(f, WP), inverse_regions, word_ok, words, regions,
    )  # fmt: skip


@triton.jit
def word_mask(text_mask, text, text_ok, W, WP: tl.constexpr, MASKED: tl.constexpr):
    """Which words are real: (BT, WP)."""
    w = tl.arange(0, WP)
    ok = text_ok[:, None] & (w < W)[None, :]
    if MASKED:
        ok = tl.load(text_mask + text[:, None] * W + w[None, :], mask=ok, other=0) != 0
    return ok


@triton.jit
def similarities(
    texts, images, image_mask, text, text_ok, image, first, num_images, W, R, D,
    BT: tl.constexpr, BI: tl.constexpr, WP: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr,
    MASKED: tl.constexpr, SCAN: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """s (BT, WP, BI, RP) for RP regions from ``first`` on, and which of them are real (BI, RP)."""
    w, r, d = tl.arange(0, WP), first + tl.arange(0, RP), tl.arange(0, BD)
    row = tl.reshape(text.to(tl.int64)[:, None] * W + w[None, :], (BT * WP,))
    row_ok = tl.reshape(text_ok[:, None] & (w < W)[None, :], (BT * WP,))
    place = image.to(tl.int64)[:, None] * R + r[None, :]
    ok = (image < num_images)[:, None] & (r < R)[None, :]
    column, column_ok = tl.reshape(place, (BI * RP,)), tl.reshape(ok, (BI * RP,))
    x = tl.zeros((BT * WP, BI * RP), tl.float32)
    for start in range(0, D, BD):
        d_ok = start + d < D
        c = tl.load(texts + row[:, None] * D + (start + d), mask=row_ok[:, None] & d_ok[None, :], other=0.0)
        v = tl.load(
            images + column[None, :] * D + (start + d)[:, None], mask=column_ok[None, :] & d_ok[:, None], other=0.0
        )
        x = tl.dot(c, v, x, input_precision=PRECISION)
    if SCAN:
        x = tl.where(x > 0, x, x * SLOPE)
    if MASKED:
        ok = tl.load(image_mask + place, mask=ok, other=0) != 0
    return tl.reshape(x, (BT, WP, BI, RP)), ok


@triton.jit
def inverse_root(square, SCAN: tl.constexpr, EPS2: tl.constexpr):
    """1 / √square, 0 below the rounding error of a cosine; 1 where there is no norm to divide by."""
    if SCAN:
        return tl.where(square > EPS2, 1.0 / tl.sqrt(tl.maximum(square, EPS2)), 0.0)
    else:
        return square * 0.0 + 1.0


@triton.jit
def best_region(s, inverse_words, region_ok):
    """f (BT, WP, BI) over the regions of one part; −inf where none is real."""
    a = s * inverse_words[:, None, :, :]
    return tl.max(tl.where(region_ok[None, None, :, :], a, float("-inf")), axis=3)


@triton.jit
def best_word(s, inverse_regions, word_ok, region_ok):
    """g (BT, BI, RP) of one part; −inf where no word is real, or the region is not."""
    b = s * inverse_regions[:, :, :, None]
    g = tl.max(tl.where(word_ok[:, :, None, None], b, float("-inf")), axis=1)
    return tl.where(region_ok[None, :, :], g, float("-inf"))


@triton.jit
def finite(best):
    return tl.where(best > float("-inf"), best, 0.0)


@triton.jit
def precedes(x, x_place, y, y_place):
    """Whether y comes before x among the largest values."""
    return ((y > x) | ((y == x) & (y_place < x_place))).to(tl.int32)


@triton.jit
def word_places(f, WP: tl.constexpr):
    """f (BT, WP, BI), −inf where there is none -> how many words beat each: (BT, WP, BI)."""
    w = tl.arange(0, WP)
    beats = precedes(f[:, :, None, :], w[None, :, None, None], f[:, None, :, :], w[None, None, :, None])
    return tl.sum(beats, axis=2)


@triton.jit
def region_places(g, other, first, other_first, RP: tl.constexpr, OTHER: tl.constexpr):
    """g (BT, BI, RP), other (BT, BI, OTHER) -> how many of ``other`` beat each of g: (BT, BI, RP)."""
    r, o = first + tl.arange(0, RP), other_first + tl.arange(0, OTHER)
    beats = precedes(g[:, :, :, None], r[None, None, :, None], other[:, :, None, :], o[None, None, None, :])
    return tl.sum(beats, axis=3)
