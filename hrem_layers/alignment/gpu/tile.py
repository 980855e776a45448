# mypy: ignore-errors
# (values of a Triton program have no types that a checker knows)
"""What happens on one tile of image-text pairs, in pieces: see :mod:`hrem_layers.alignment.gpu.kernel`.

The tile is (BI, WP, RP): some images, the words of one text, regions. Values per word are (BI, WP), per region
(BI, RP).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.standard import _log2


@triton.jit
def load_tile(products, text, image, sizes, BLOCKS: tl.constexpr, FORM: tl.constexpr):
    """s, 0 where a word or region is not real; which are real, (WP) and (BI, RP); and NaN per image (BI) where
    a product is not finite, else 0: maxima pass a NaN over.
    """
    w, r = tl.arange(0, BLOCKS.words), tl.arange(0, BLOCKS.regions)
    place = image[:, None] * sizes.regions + r[None, :]
    region_ok = (image < sizes.images)[:, None] & (r < sizes.regions)[None, :]
    word_ok = w < sizes.words
    x = tl.load(
        products.x + first_product(text, sizes) + product_places(image, sizes, BLOCKS),
        mask=word_ok[None, :, None] & region_ok[:, None, :], other=0.0,
    )  # fmt: skip
    poison = tl.sum(tl.sum(x * 0.0, axis=2), axis=1)
    if products.word_mask is not None:
        word_ok = tl.load(products.word_mask + text * sizes.words + w, mask=word_ok, other=0) != 0
    if products.region_mask is not None:
        region_ok = tl.load(products.region_mask + place, mask=region_ok, other=0) != 0
    if FORM.scan:
        x = tl.where(x > 0, x, x * FORM.slope)
    return tl.where(word_ok[None, :, None] & region_ok[:, None, :], x, 0.0), word_ok, region_ok, poison


@triton.jit
def first_product(text, sizes):
    """Where the products of the text's first word begin."""
    return text.to(tl.int64) * sizes.words * (sizes.images * sizes.regions)


@triton.jit
def product_places(image, sizes, BLOCKS: tl.constexpr):
    """Where the products of the tile are from there on (BI, WP, RP): 32 bits, as a chunk has less."""
    w, r = tl.arange(0, BLOCKS.words), tl.arange(0, BLOCKS.regions)
    place = image[:, None] * sizes.regions + r[None, :]
    return w[None, :, None] * (sizes.images * sizes.regions) + place[:, None, :]


@triton.jit
def inverse_norms(s, FORM: tl.constexpr):
    """1 / ‖s over regions‖ (BI, WP) and 1 / ‖s over words‖ (BI, RP)."""
    return inverse_root(tl.sum(s * s, axis=2), FORM), inverse_root(tl.sum(s * s, axis=1), FORM)


@triton.jit
def inverse_root(square, FORM: tl.constexpr):
    """1 / √square, 0 below the rounding error of a cosine; 1 where there is no norm to divide by."""
    if FORM.scan:
        root = 1.0 / tl.sqrt(tl.maximum(square, FORM.smallest_square))
        return tl.where(square > FORM.smallest_square, root, 0.0)
    else:
        return square * 0.0 + 1.0


@triton.jit
def best_region(s, inverse_words, word_ok, region_ok):
    """f (BI, WP), each word's largest; −inf where the word is not real or no region is."""
    a = tl.where(region_ok[:, None, :], s * inverse_words[:, None, :], float("-inf"))
    return tl.where(word_ok[None, :], tl.max(a, axis=2), float("-inf"))


@triton.jit
def best_word(s, inverse_regions, word_ok, region_ok):
    """g (BI, RP), each region's largest; −inf likewise."""
    b = tl.where(word_ok[None, :, None], s * inverse_regions[:, :, None], float("-inf"))
    return tl.where(region_ok, tl.max(b, axis=1), float("-inf"))


@triton.jit
def finite(best):
    return tl.where(best > float("-inf"), best, 0.0)


@triton.jit
def tie_margins(products, text, image, sizes, FORM: tl.constexpr):
    """How far values of a pair that tie may be apart (BI): see :func:`hrem_layers.alignment.pooling.tie_margin`."""
    margin = (image < sizes.images).to(tl.float32) * FORM.tolerance
    if products.longest_word is not None:
        margin = margin * tl.load(products.longest_word + text)
        margin = margin * tl.load(products.longest_region + image, mask=image < sizes.images, other=0.0)
    return margin


@triton.jit
def region_wins(s, inverse_words, f, margin, region_ok):
    """Which regions are the maximum f or tie with it: (BI, WP, RP)."""
    return (s * inverse_words[:, None, :] >= (f - margin[:, None])[:, :, None]) & region_ok[:, None, :]


@triton.jit
def word_wins(s, inverse_regions, g, margin, word_ok):
    """Which words are the maximum g or tie with it: (BI, WP, RP)."""
    return (s * inverse_regions[:, :, None] >= (g - margin[:, None])[:, None, :]) & word_ok[None, :, None]


@triton.jit
def bounds(values, margin, N: tl.constexpr):
    """values (BI, N), −inf where there is none -> how many exceed each by more than the margin, how many tie with it."""
    ordered = tl.sort(values, descending=True)
    exceed = how_many(ordered, values + margin[:, None], False, N)
    return exceed, how_many(ordered, values - margin[:, None], True, N) - exceed


@triton.jit
def how_many(ordered, least, EQUAL: tl.constexpr, N: tl.constexpr):
    """How many in each row of ``ordered`` (BI, N), descending, are over ``least`` (BI, N), or EQUAL to it."""
    found = tl.zeros(ordered.shape, tl.int32)
    STEPS: tl.constexpr = _log2(N)
    for j in tl.static_range(STEPS):
        found = farther(ordered, found, least, EQUAL, N >> (j + 1))
    return farther(ordered, found, least, EQUAL, 1)


@triton.jit
def farther(ordered, found, least, EQUAL: tl.constexpr, STEP: tl.constexpr):
    """``found`` + STEP, where as many are over ``least``."""
    there = tl.gather(ordered, found + (STEP - 1), 1)
    if EQUAL:
        return tl.where(there >= least, found + STEP, found)
    else:
        return tl.where(there > least, found + STEP, found)
