"""What the kernels are given, in groups. Nothing here needs Triton."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Products(NamedTuple):
    """The products of the words of some texts by the regions of some images, and who is real among them."""

    x: Tensor  # [texts * words, images * regions], float32
    word_mask: Tensor | None  # [texts, words] bool, None = all real
    region_mask: Tensor | None  # [images, regions] bool
    longest_word: Tensor | None  # [texts], length of the longest fragment where they are not normalised
    longest_region: Tensor | None  # [images]


class Sizes(NamedTuple):
    """Of the texts and images of one launch; ``row_length``: images in a row of the scores, or of their gradients."""

    texts: int
    images: int
    words: int
    regions: int
    topk: int
    row_length: int


class Blocks(NamedTuple):
    """A program's tile, all powers of 2: one text with some images."""

    images: int
    words: int
    regions: int


class Form(NamedTuple):
    """Constants of the formula."""

    scan: bool
    slope: float  # of the LeakyReLU
    smallest_square: float  # of a norm that counts
    tolerance: float  # within which cosines tie
