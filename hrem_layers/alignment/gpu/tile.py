# mypy: ignore-errors
# (values of a Triton program have no types that a checker knows)
"""What happens on one tile of image-text pairs, in pieces: see :mod:`hrem_layers.alignment.gpu.kernel`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def launched(extent, sizes, BLOCKS: tl.constexpr, SMALLEST: tl.constexpr):
    """The texts (BT) and images (BI) of this program, and which of the texts its launch is for."""
    text = tl.program_id(0) * BLOCKS.texts + tl.arange(0, BLOCKS.texts)
    image = tl.program_id(1) * BLOCKS.images + tl.arange(0, BLOCKS.images)
    last_word = tl.load(extent + text, mask=text < sizes.texts, other=0)
    return text, image, (last_word > SMALLEST) & (last_word <= BLOCKS.words)


@triton.jit
def score_tile(texts, images, text, text_ok, image, sizes, BLOCKS: tl.constexpr, FORM: tl.constexpr):
    """What forward and backward share, for texts ``text`` (BT), those that are ``text_ok``, and images ``image`` (BI).

    Of each part of the regions: s, which regions are real, 1 / ‖s over words‖ and g. Then f, 1 / ‖s over regions‖,
    which words are real, and how many words and regions are. f and g are −inf where there is nothing real. Without a
    second part (regions_b = 0) the first stands in its place.
    """
    A: tl.constexpr = BLOCKS.regions_a
    B: tl.constexpr = BLOCKS.regions_b
    word_ok = word_mask(texts, text, text_ok, sizes, BLOCKS.words)
    sa, ok_a = similarities(texts, images, text, text_ok, image, 0, sizes, A, BLOCKS, FORM)
    squares = tl.sum(sa * sa, axis=3)
    regions = tl.sum(ok_a.to(tl.float32), axis=1)
    inverse_a = inverse_root(tl.sum(sa * sa, axis=1), FORM)
    f = best_region(sa, inverse_a, ok_a)
    if B:
        sb, ok_b = similarities(texts, images, text, text_ok, image, A, sizes, B, BLOCKS, FORM)
        squares += tl.sum(sb * sb, axis=3)
        regions += tl.sum(ok_b.to(tl.float32), axis=1)
        inverse_b = inverse_root(tl.sum(sb * sb, axis=1), FORM)
        f = tl.maximum(f, best_region(sb, inverse_b, ok_b))
    f = tl.where(word_ok[:, :, None], f, float("-inf"))
    inverse_regions = inverse_root(squares, FORM)
    ga = best_word(sa, inverse_regions, word_ok, ok_a)
    if B:
        gb = best_word(sb, inverse_regions, word_ok, ok_b)
    else:
        sb, ok_b, inverse_b, gb = sa, ok_a, inverse_a, ga
    words = tl.sum(word_ok.to(tl.float32), axis=1)
    return sa, ok_a, inverse_a, ga, sb, ok_b, inverse_b, gb, f, inverse_regions, word_ok, words, regions


@triton.jit
def word_mask(texts, text, text_ok, sizes, WP: tl.constexpr):
    """Which words are real: (BT, WP)."""
    w = tl.arange(0, WP)
    ok = text_ok[:, None] & (w < sizes.words)[None, :]
    if texts.mask is not None:
        ok = tl.load(texts.mask + text[:, None] * sizes.words + w[None, :], mask=ok, other=0) != 0
    return ok


@triton.jit
def similarities(
    texts, images, text, text_ok, image, first, sizes, RP: tl.constexpr, BLOCKS: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    """s (BT, WP, BI, RP) for RP regions from ``first`` on, and which of them are real (BI, RP)."""
    BT: tl.constexpr = BLOCKS.texts
    BI: tl.constexpr = BLOCKS.images
    WP: tl.constexpr = BLOCKS.words
    D = sizes.dim
    w, r, d = tl.arange(0, WP), first + tl.arange(0, RP), tl.arange(0, BLOCKS.depth)
    row = tl.reshape(text.to(tl.int64)[:, None] * sizes.words + w[None, :], (BT * WP,))
    row_ok = tl.reshape(text_ok[:, None] & (w < sizes.words)[None, :], (BT * WP,))
    place = image.to(tl.int64)[:, None] * sizes.regions + r[None, :]
    ok = (image < sizes.images)[:, None] & (r < sizes.regions)[None, :]
    column, column_ok = tl.reshape(place, (BI * RP,)), tl.reshape(ok, (BI * RP,))
    x = tl.zeros((BT * WP, BI * RP), tl.float32)
    for start in range(0, D, BLOCKS.depth):
        d_ok = start + d < D
        c = tl.load(texts.rows + row[:, None] * D + (start + d), mask=row_ok[:, None] & d_ok[None, :], other=0.0)
        v = tl.load(
            images.rows + column[None, :] * D + (start + d)[:, None], mask=column_ok[None, :] & d_ok[:, None], other=0.0
        )
        x = tl.dot(c, v, x, input_precision=FORM.precision)
    if FORM.scan:
        x = tl.where(x > 0, x, x * FORM.slope)
    if images.mask is not None:
        ok = tl.load(images.mask + place, mask=ok, other=0) != 0
    return tl.reshape(x, (BT, WP, BI, RP)), ok


@triton.jit
def tie_margins(texts, images, text, text_ok, image, sizes, FORM: tl.constexpr):
    """How far values of a pair that tie may be apart (BT, BI): see :func:`hrem_layers.alignment.pooling.tie_margin`."""
    margin = text_ok[:, None].to(tl.float32) * (image < sizes.images)[None, :].to(tl.float32) * FORM.tolerance
    if texts.longest is not None:
        margin = margin * tl.load(texts.longest + text, mask=text_ok, other=0.0)[:, None]
        margin = margin * tl.load(images.longest + image, mask=image < sizes.images, other=0.0)[None, :]
    return margin


@triton.jit
def inverse_root(square, FORM: tl.constexpr):
    """1 / √square, 0 below the rounding error of a cosine; 1 where there is no norm to divide by."""
    if FORM.scan:
        root = 1.0 / tl.sqrt(tl.maximum(square, FORM.smallest_square))
        return tl.where(square > FORM.smallest_square, root, 0.0)
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


@triton.jit
def region_wins(s, inverse_words, f, margin, region_ok):
    """Which regions are the maximum f (BT, WP, BI) or tie with it: (BT, WP, BI, RP)."""
    least = (f - margin[:, None, :])[:, :, :, None]
    return (s * inverse_words[:, None, :, :] >= least) & region_ok[None, None, :, :]


@triton.jit
def word_wins(s, inverse_regions, g, margin, word_ok):
    """Which words are the maximum g (BT, BI, RP) or tie with it: (BT, WP, BI, RP)."""
    least = (g - margin[:, :, None])[:, None, :, :]
    return (s * inverse_regions[:, :, :, None] >= least) & word_ok[:, :, None, None]


@triton.jit
def word_bounds(f, margin):
    """f (BT, WP, BI) -> how many words exceed each by more than the margin, and how many tie with it."""
    above = f[:, None, :, :] - f[:, :, None, :]
    margin = margin[:, None, None, :]
    exceed = tl.sum((above > margin).to(tl.int32), axis=2)
    return exceed, tl.sum((tl.abs(above) <= margin).to(tl.int32), axis=2)


@triton.jit
def region_bounds(g, other, margin):
    """g (BT, BI, RP) among ``other`` (BT, BI, OTHER): how many exceed each by more than the margin, how many tie."""
    above = other[:, :, None, :] - g[:, :, :, None]
    margin = margin[:, :, None, None]
    exceed = tl.sum((above > margin).to(tl.int32), axis=3)
    return exceed, tl.sum((tl.abs(above) <= margin).to(tl.int32), axis=3)
