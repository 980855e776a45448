# mypy: ignore-errors
# (values of a Triton program have no types that a checker knows)
r"""The GPU kernels: a program turns the products of one text with some images into p and q, or into their gradient.

Imported only where it runs (it needs Triton). The products themselves, all words by all regions of a chunk, are
cuBLAS's (:mod:`hrem_layers.alignment.gpu.launch`); a chunk is small enough to be in the L2 cache still when the kernel
reads it, once. LeakyReLU, both norms, both maxima, the means and
the largest values are computed while the tile is in registers. The formulas and the letters are those of
:mod:`hrem_layers.alignment.block`.

- *Words and regions* fill powers of 2, of which only the comparisons, not the products, are partly idle. A launch is
  for the texts that fit WP but not half of it; the others leave at once, and the host never looks at a mask.
- *The largest values* are sorted, bitonically, in registers; where a value and what ties with it stand among them
  is found by bisection.
- *Backward* multiplies the chunk again, finds the same maxima and writes the derivative of the products, which
  matrix products then turn into gradients. No atomics: the same input gives the same bits. Values that tie share the
  gradients of their places; with these as sums from the first place on, that is a difference of two numbers over how
  many tie.

What a kernel is given comes in groups, NamedTuples of :mod:`hrem_layers.alignment.gpu.arguments`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hrem_layers.alignment.gpu.tile import (
    best_region,
    best_word,
    bounds,
    finite,
    first_product,
    inverse_norms,
    load_tile,
    product_places,
    region_wins,
    tie_margins,
    word_wins,
)


@triton.jit
def score_kernel(
    products, extent, out, sizes, BLOCKS: tl.constexpr, SMALLEST: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    """From products to p and q.

    ``products``: Products; ``extent`` (T): place of each text's last real word + 1; ``out``: PairScores, which must
    hold zeros; ``sizes``: Sizes; ``BLOCKS``: Blocks, for texts whose extent is over ``SMALLEST``; ``FORM``: Form.
    """
    text = tl.program_id(0)
    last = tl.load(extent + text)
    if (last <= SMALLEST) | (last > BLOCKS.words):
        return
    image = tl.program_id(1) * BLOCKS.images + tl.arange(0, BLOCKS.images)
    image_ok = image < sizes.images
    s, word_ok, region_ok, poison = load_tile(products, text, image, sizes, BLOCKS, FORM)
    inverse_regions, inverse_words = inverse_norms(s, FORM)
    f = best_region(s, inverse_words, word_ok, region_ok)
    g = best_word(s, inverse_regions, word_ok, region_ok)
    pair = text.to(tl.int64) * sizes.row_length + image  # [BI]
    words = tl.maximum(tl.sum(word_ok.to(tl.float32), axis=0), 1.0)
    regions = tl.maximum(tl.sum(region_ok.to(tl.float32), axis=1), 1.0)
    tl.store(out.mean_i2t + pair, tl.sum(finite(g), axis=1) / regions + poison, mask=image_ok)
    tl.store(out.mean_t2i + pair, tl.sum(finite(f), axis=1) / words + poison, mask=image_ok)
    store_largest(out.top_i2t, g, poison, pair, image_ok, sizes.topk, BLOCKS.regions)
    store_largest(out.top_t2i, f, poison, pair, image_ok, sizes.topk, BLOCKS.words)


@triton.jit
def store_largest(top, values, poison, pair, image_ok, K, N: tl.constexpr):
    """The K largest of values (BI, N) in descending order; where there are fewer, the zeros stay that are there."""
    ordered = tl.sort(values, descending=True)
    place = tl.arange(0, N)[None, :]
    ok = image_ok[:, None] & (place < K) & ((ordered > float("-inf")) | (poison != poison)[:, None])
    tl.store(top + pair[:, None] * K + place, finite(ordered) + poison[:, None], mask=ok)


@triton.jit
def score_grad_kernel(
    products, extent, grad, grad_x, sizes, BLOCKS: tl.constexpr, SMALLEST: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    """From products and the gradients of the scores to that of the products.

    As :func:`score_kernel`; ``grad``: PairScores whose ``top_*`` (T, ``row_length``, K + 1) are sums over the places
    before. Writes ``grad_x`` (T·W, I·R), which must hold zeros; rows of padded words and columns of padded regions are
    left alone.
    """
    text = tl.program_id(0)
    last = tl.load(extent + text)
    if (last <= SMALLEST) | (last > BLOCKS.words):
        return
    image = tl.program_id(1) * BLOCKS.images + tl.arange(0, BLOCKS.images)
    image_ok = image < sizes.images
    s, word_ok, region_ok, poison = load_tile(products, text, image, sizes, BLOCKS, FORM)
    inverse_regions, inverse_words = inverse_norms(s, FORM)
    f = best_region(s, inverse_words, word_ok, region_ok)
    g = best_word(s, inverse_regions, word_ok, region_ok)
    margin = tie_margins(products, text, image, sizes, FORM)  # [BI]
    pair = text.to(tl.int64) * sizes.row_length + image
    words = tl.maximum(tl.sum(word_ok.to(tl.float32), axis=0), 1.0)
    regions = tl.maximum(tl.sum(region_ok.to(tl.float32), axis=1), 1.0)

    # the gradients of f and g, divided by how many share the maximum
    grad_f = tl.load(grad.mean_t2i + pair, mask=image_ok, other=0.0) / words
    grad_f = place_grad(grad.top_t2i, grad_f, f, margin, pair, image_ok, sizes.topk, BLOCKS.words)
    wins_f = region_wins(s, inverse_words, f, margin, region_ok) & word_ok[None, :, None]
    grad_f /= tl.maximum(tl.sum(wins_f.to(tl.float32), axis=2), 1.0)
    grad_g = tl.load(grad.mean_i2t + pair, mask=image_ok, other=0.0) / regions
    grad_g = place_grad(grad.top_i2t, grad_g, g, margin, pair, image_ok, sizes.topk, BLOCKS.regions)
    wins_g = word_wins(s, inverse_regions, g, margin, word_ok) & region_ok[:, None, :]
    grad_g /= tl.maximum(tl.sum(wins_g.to(tl.float32), axis=1), 1.0)

    # d(s / ‖s‖) = (g − a <g, a>) / ‖s‖ along the normed dimension; g ≠ 0 only where a is the maximum
    f, g = finite(f), finite(g)
    grad_s = tl.where(wins_f, grad_f[:, :, None] * inverse_words[:, None, :], 0.0)
    grad_s += tl.where(wins_g, grad_g[:, None, :] * inverse_regions[:, :, None], 0.0)
    if FORM.scan:
        along_words = tl.sum(tl.where(wins_f, (grad_f * f)[:, :, None], 0.0), axis=1)
        along_regions = tl.sum(tl.where(wins_g, (grad_g * g)[:, None, :], 0.0), axis=2)
        grad_s -= s * (along_words * inverse_words * inverse_words)[:, None, :]
        grad_s -= s * (along_regions * inverse_regions * inverse_regions)[:, :, None]
        grad_s = tl.where(s > 0, grad_s, grad_s * FORM.slope)
    grad_s += poison[:, None, None]
    tl.store(
        grad_x + first_product(text, sizes) + product_places(image, sizes, BLOCKS),
        grad_s.to(grad_x.dtype.element_ty), mask=word_ok[None, :, None] & region_ok[:, None, :],
    )  # fmt: skip


@triton.jit
def place_grad(sums, from_mean, values, margin, pair, image_ok, K, N: tl.constexpr):
    """What each of values (BI, N) gets: from the mean, and its share of the places below K that it and what ties with
    it hold; 0 where there is no value.
    """
    ok = image_ok[:, None] & (values > float("-inf"))
    first, ties = bounds(values, margin, N)
    stop = tl.minimum(first + ties, K)
    high = tl.load(sums + pair[:, None] * (K + 1) + stop, mask=ok, other=0.0)
    low = tl.load(sums + pair[:, None] * (K + 1) + tl.minimum(first, K), mask=ok, other=0.0)
    return tl.where(ok, from_mean[:, None] + (high - low) / tl.maximum(ties, 1).to(tl.float32), 0.0)
