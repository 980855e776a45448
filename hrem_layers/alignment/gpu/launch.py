"""Launching the kernels: when they apply, with which blocks, and the matrix products around them.

Nothing here waits for the GPU: grids come from shapes, and which texts a launch concerns is decided on the device.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hrem_layers._core.numerics import tie_tolerance
from hrem_layers.alignment.block import LEAKY_SLOPE
from hrem_layers.alignment.gpu.arguments import Blocks, Form, Products, Sizes
from hrem_layers.alignment.scores import PairScores, Scores
from hrem_layers.alignment.sides import Side, fragments_grad, make_side

# The similarities of one pair, in powers of 2, have to fit the registers of a program. What is wider runs as batched
# PyTorch.
MAX_WORDS, MAX_REGIONS, MAX_PAIR = 128, 256, 2**14
# Similarities of a program: more are one pair's alone, fewer are several images'. And those of a warp: with few warps
# nothing is sorted twice, until they spill (benchmarks/kernel_figures.py).
_TILE = 2**10
_PER_WARP, _GRAD_PER_WARP = 2**11, 2**10
# Similarities of a chunk: 32 MB of float32, which the L2 cache of an A100 (40 MB) or H100 (50 MB) holds; and the rows
# of its product, which cuBLAS likes not to be few.
_CHUNK, _CHUNK_ROWS = 2**23, 2**11


def kernel_applies(image_fragments: Tensor, text_fragments: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels can do it: CUDA from Ampere on, Triton at hand, widths within limits, not float64."""
    (i, r, _), (t, w, _) = image_fragments.shape, text_fragments.shape
    return (
        image_fragments.device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(image_fragments.device) >= (8, 0)
        and dtype in (torch.float32, torch.float16, torch.bfloat16)
        and r <= MAX_REGIONS
        and w <= MAX_WORDS
        and _power_of_2(r) * _power_of_2(w) <= MAX_PAIR
        and i > 0
        and t > 0
        and _has_triton()
    )


def blocks_for(words: int, r: int, per_warp: int) -> tuple[Blocks, int]:
    """A program's tile for texts of up to ``words`` words (a power of 2), and its number of warps."""
    regions = max(16, _power_of_2(r))
    images = max(1, _TILE // (words * regions))
    return Blocks(images, words, regions), min(16, max(1, images * words * regions // per_warp))


class _Inputs(NamedTuple):
    images: Side
    texts: Side
    extent: Tensor  # [t]: place of each text's last real word + 1
    mode: str
    topk: int
    masked: bool

    def launches(self, sizes: Sizes, per_warp: int) -> Iterator[tuple[tuple[int, int], Blocks, int, int]]:
        """Grid, blocks, the extent that the launch before has dealt with, warps."""
        smallest, words = -1, 16 if self.masked else max(16, _power_of_2(sizes.words))
        while True:
            blocks, warps = blocks_for(words, sizes.regions, per_warp)
            yield (sizes.texts, -(-sizes.images // blocks.images)), blocks, smallest, warps
            if words >= sizes.words:
                return
            smallest, words = words, 2 * words

    def chunk(self, t0: int, t1: int, i0: int, i1: int, row_length: int) -> tuple[Products, Sizes]:
        w, r = (side.runs[0].width for side in (self.texts, self.images))
        x = product(self.texts.rows[t0 * w : t1 * w], self.images.rows[i0 * r : i1 * r].t())
        parts = (
            None if x is None else x[a:b]
            for x, a, b in (
                (self.texts.real, t0, t1), (self.images.real, i0, i1),
                (self.texts.longest, t0, t1), (self.images.longest, i0, i1),
            )
        )  # fmt: skip
        return Products(x, *parts), Sizes(t1 - t0, i1 - i0, w, r, self.topk, row_length)

    def form(self) -> Form:
        eps = torch.finfo(torch.float32).eps
        return Form(self.mode == "scan", LEAKY_SLOPE, eps**2, tie_tolerance(torch.float32))


def score_all_fused(
    image_fragments: Tensor,
    text_fragments: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    *,
    mode: str,
    topk: int,
    dtype: torch.dtype,
) -> Scores:
    """As :func:`hrem_layers.alignment.tiles.score_all`."""
    from hrem_layers.alignment.gpu.kernel import score_kernel

    given = _inputs(image_fragments, text_fragments, image_mask, text_mask, mode, topk, dtype)
    (i, r, _), (t, w, _) = image_fragments.shape, text_fragments.shape
    means, tops = (torch.zeros(shape, device=given.extent.device) for shape in ((2, t, i), (2, t, i, topk)))
    out = PairScores(*means, *tops)
    for t0, t1, i0, i1 in _chunks(t, w, i, r):
        products, sizes = given.chunk(t0, t1, i0, i1, i)
        window = out.window(slice(t0, t1), slice(i0, i1))
        for grid, blocks, smallest, warps in given.launches(sizes, _PER_WARP):
            score_kernel[grid](
                products, given.extent[t0:t1], window, sizes, blocks, smallest, given.form(), num_warps=warps
            )
    return out.scores()


def score_all_fused_backward(
    image_fragments: Tensor,
    text_fragments: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    grad: Scores,
    *,
    mode: str,
    topk: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """As :func:`hrem_layers.alignment.tiles.score_all_backward`; the similarities are computed again."""
    from hrem_layers.alignment.gpu.kernel import score_grad_kernel

    given = _inputs(image_fragments, text_fragments, image_mask, text_mask, mode, topk, dtype)
    images, texts = given.images, given.texts
    (i, r, _), (t, w, _) = image_fragments.shape, text_fragments.shape
    pair_grad = PairScores.of(grad)
    before = torch.nn.functional.pad
    pair_grad = PairScores(
        pair_grad.mean_i2t.contiguous(),
        pair_grad.mean_t2i.contiguous(),
        before(pair_grad.top_i2t.cumsum(dim=2), (1, 0)),  # the sum over the places before each
        before(pair_grad.top_t2i.cumsum(dim=2), (1, 0)),
    )
    grad_images = torch.zeros_like(images.rows, dtype=torch.float32)
    grad_texts = torch.zeros_like(texts.rows, dtype=torch.float32)
    for t0, t1, i0, i1 in _chunks(t, w, i, r):
        products, sizes = given.chunk(t0, t1, i0, i1, i)
        grad_x = torch.zeros_like(products.x, dtype=dtype)
        window = pair_grad.window(slice(t0, t1), slice(i0, i1))
        for grid, blocks, smallest, warps in given.launches(sizes, _GRAD_PER_WARP):
            score_grad_kernel[grid](
                products, given.extent[t0:t1], window, grad_x, sizes, blocks, smallest, given.form(), num_warps=warps
            )
        rows, columns = slice(t0 * w, t1 * w), slice(i0 * r, i1 * r)
        grad_images[columns] += product(grad_x.t(), texts.rows[rows])
        grad_texts[rows] += product(grad_x, images.rows[columns])
    return fragments_grad(grad_images, images, image_fragments), fragments_grad(grad_texts, texts, text_fragments)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, whatever they are: half types are multiplied as they are and added in float32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda and _half_to_float():
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _inputs(
    image_fragments: Tensor,
    text_fragments: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    mode: str,
    topk: int,
    dtype: torch.dtype,
) -> _Inputs:
    t, w, _ = text_fragments.shape
    if text_mask is None:
        extent = torch.full((t,), w, dtype=torch.int32, device=text_fragments.device)
    else:
        place = torch.arange(1, w + 1, dtype=torch.int32, device=text_mask.device)
        extent = (text_mask * place).amax(dim=1)
    images, texts = (
        make_side(x, mask, packed=False, normalize=mode != "dot", dtype=dtype)
        for x, mask in ((image_fragments, image_mask), (text_fragments, text_mask))
    )
    images, texts = (
        side._replace(rows=side.rows.contiguous(), real=None if side.real is None else side.real.contiguous())
        for side in (images, texts)
    )
    return _Inputs(images, texts, extent, mode, topk, text_mask is not None)


def _chunks(t: int, w: int, i: int, r: int) -> Iterator[tuple[int, int, int, int]]:
    """Texts and images whose products are made at one time: a few more rows than cuBLAS needs, the rest columns."""
    per_text = max(1, min(t, _CHUNK_ROWS // w, _CHUNK // (w * r)))
    per_image = max(1, min(i, _CHUNK // (per_text * w * r)))
    per_text = max(per_text, min(t, _CHUNK // (w * r * per_image)))
    for t0 in range(0, t, per_text):
        for i0 in range(0, i, per_image):
            yield t0, min(t, t0 + per_text), i0, min(i, i0 + per_image)


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@functools.cache
def _half_to_float() -> bool:
    """Whether ``torch.mm`` takes ``out_dtype`` (PyTorch 2.8): before, half types are widened first, and slower."""
    return "dtype" in torch.ops.aten.mm.overloads()


@functools.cache
def _has_triton() -> bool:
    """Triton 3.5 or newer: arguments in groups, and the oldest that the kernels have been tried with."""
    if importlib.util.find_spec("triton") is None:
        return False
    version: str = importlib.import_module("triton").__version__
    return tuple(int(x) for x in version.split(".")[:2]) >= (3, 5)
