"""What the fused kernels are given, in groups. Nothing here needs Triton."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Fragments(NamedTuple):
    """One modality, n items of up to m fragments."""

    rows: Tensor  # [n * m, d], normalised if the mode asks for it, zeros in the padding
    mask: Tensor | None  # [n, m] bool, None = all real
    longest: Tensor | None  # [n], length of the longest fragment where they are not normalised


class Sizes(NamedTuple):
    texts: int
    images: int
    words: int
    regions: int
    dim: int
    topk: int


class Blocks(NamedTuple):
    """The blocks of a launch: texts, images, words, the two parts of the regions, depth of the product."""

    texts: int
    images: int
    words: int
    regions_a: int
    regions_b: int
    depth: int


class Form(NamedTuple):
    """Constants of the formula."""

    scan: bool
    slope: float  # of the LeakyReLU
    smallest_square: float  # of a norm that counts
    tolerance: float  # within which cosines tie
    precision: str  # of a product of float32
