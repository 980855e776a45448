"""Launching the fused kernels: when they apply, with which blocks, and the matrix products around them.

Nothing here waits for the GPU: grids come from shapes, and which texts a launch concerns is decided on the device.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hrem_layers._core.numerics import tie_tolerance
from hrem_layers.alignment.block import LEAKY_SLOPE
from hrem_layers.alignment.gpu.arguments import Blocks, Form, Fragments, Sizes
from hrem_layers.alignment.scores import PairScores, Scores
from hrem_layers.alignment.sides import Side, fragments_grad, make_side

# Limits of a tile. What is wider runs as batched PyTorch.
MAX_WORDS, MAX_REGIONS = 128, 256
# Words by regions of a tile: as compiled for sm_80 and sm_90, the forward kernel then keeps everything in
# registers; backward holds more at a time and takes half the columns.
_TILE_ROWS, _TILE_COLUMNS, _GRAD_TILE_COLUMNS = 64, 192, 96
# Comparisons of values with one another in a tile, in which the places of the largest are found.
_COMPARISONS = 2**14
_NUM_WARPS, _NUM_STAGES = 8, 2
# elements of the derivative of the similarities that exist at one time in backward
_GRAD_ELEMENTS = 2**26


def kernel_applies(image_fragments: Tensor, text_fragments: Tensor, dtype: torch.dtype) -> bool:
    """Whether the fused kernel can do it: CUDA from Ampere on, Triton at hand, widths within limits, not float64."""
    (i, r, _), (t, w, _) = image_fragments.shape, text_fragments.shape
    return (
        image_fragments.device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(image_fragments.device) >= (8, 0)
        and dtype in (torch.float32, torch.float16, torch.bfloat16)
        and r <= MAX_REGIONS
        and w <= MAX_WORDS
        and i > 0
        and t > 0
        and _has_triton()
    )


def region_parts(r: int) -> tuple[int, int]:
    """Powers of 2 (RA, RB), RA ≥ 16, RB = 0 or ≥ 16, that hold ``r`` regions with few idle columns."""
    whole = max(16, _power_of_2(r))
    half = whole // 2
    rest = max(16, _power_of_2(r - half)) if r > half else 0
    return (half, rest) if half >= 16 and half + rest < whole else (whole, 0)


def blocks_for(words: int, r: int, element_size: int, tile_columns: int) -> Blocks:
    a, b = region_parts(r)
    images = max(1, min(_floor_power_of_2(tile_columns // (a + b)), _COMPARISONS // words**2))
    texts = max(1, min(_TILE_ROWS // words, _COMPARISONS // (images * a**2)))
    return Blocks(texts, images, words, a, b, 128 // element_size)


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
    from hrem_layers.alignment.gpu.kernel import align_kernel

    images, texts, order, extent = _inputs(image_fragments, text_fragments, image_mask, text_mask, mode, dtype)
    (i, r, d), (t, w, _) = image_fragments.shape, text_fragments.shape
    out = PairScores(
        *(torch.zeros(shape, device=extent.device) for shape in ((t, i), (t, i), (t, i, topk), (t, i, topk)))
    )
    for blocks, smallest in _launches(w, r, dtype.itemsize, text_mask is not None, _TILE_COLUMNS):
        align_kernel[_grid(blocks, t, i)](
            _part(texts, w, slice(0, t)), _part(images, r, slice(0, i)), extent, out, Sizes(t, i, w, r, d, topk),
            blocks, smallest, _form(mode), num_warps=_NUM_WARPS, num_stages=_NUM_STAGES,
        )  # fmt: skip
    _spread_what_is_not_finite(out, texts.rows.view(t, -1), images.rows.view(i, -1))
    if order is not None:
        back = order.argsort()
        out = PairScores(*(x.index_select(0, back) for x in out))
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
    from hrem_layers.alignment.gpu.kernel import align_grad_kernel

    images, texts, order, extent = _inputs(image_fragments, text_fragments, image_mask, text_mask, mode, dtype)
    (i, r, d), (t, w, _) = image_fragments.shape, text_fragments.shape
    pair_grad = PairScores.of(grad)
    if order is not None:
        pair_grad = PairScores(*(x.index_select(0, order) for x in pair_grad))
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
        rows, columns = slice(t0 * w, t1 * w), slice(i0 * r, i1 * r)
        grad_x = torch.zeros((t1 - t0) * w, (i1 - i0) * r, dtype=dtype, device=extent.device)
        for blocks, smallest in _launches(w, r, dtype.itemsize, text_mask is not None, _GRAD_TILE_COLUMNS):
            align_grad_kernel[_grid(blocks, t1 - t0, i1 - i0)](
                _part(texts, w, slice(t0, t1)), _part(images, r, slice(i0, i1)), extent[t0:t1],
                PairScores(*(x[t0:t1, i0:i1] for x in pair_grad)), grad_x, Sizes(t1 - t0, i1 - i0, w, r, d, topk), i,
                blocks, smallest, _form(mode), num_warps=_NUM_WARPS, num_stages=_NUM_STAGES,
            )  # fmt: skip
        grad_images[columns] += grad_x.t() @ texts.rows[rows]
        grad_texts[rows] += grad_x @ images.rows[columns]
    if order is not None:
        texts = texts._replace(source=_row_source(order, w), mask=None)
    return fragments_grad(grad_images, images, image_fragments), fragments_grad(grad_texts, texts, text_fragments)


def _inputs(
    image_fragments: Tensor,
    text_fragments: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    mode: str,
    dtype: torch.dtype,
) -> tuple[Side, Side, Tensor | None, Tensor]:
    """Both sides in the padded layout, texts sorted by extent, the order of the texts and their extents."""
    t, w, _ = text_fragments.shape
    order = None
    if text_mask is None:
        extent = torch.full((t,), w, dtype=torch.int32, device=text_fragments.device)
    else:
        place = torch.arange(1, w + 1, dtype=torch.int32, device=text_mask.device)
        extent, order = (text_mask * place).amax(dim=1).sort(stable=True)
        text_fragments, text_mask = text_fragments.index_select(0, order), text_mask.index_select(0, order)
    normalize = mode != "dot"
    sides = (
        make_side(image_fragments, image_mask, packed=False, normalize=normalize, dtype=dtype),
        make_side(text_fragments, text_mask, packed=False, normalize=normalize, dtype=dtype),
    )
    images, texts = (
        side._replace(rows=side.rows.contiguous(), mask=None if side.mask is None else side.mask.contiguous())
        for side in sides
    )
    return images, texts, order, extent


def _row_source(order: Tensor, w: int) -> Tensor:
    return (order.unsqueeze(1) * w + torch.arange(w, device=order.device)).flatten()


def _launches(w: int, r: int, element_size: int, masked: bool, tile_columns: int) -> Iterator[tuple[Blocks, int]]:
    """Blocks, and the extent that the launch before them has dealt with."""
    smallest, words = 0, 16 if masked else max(16, _power_of_2(w))
    while True:
        yield blocks_for(words, r, element_size, tile_columns), smallest
        if words >= w:
            return
        smallest, words = words, 2 * words


def _grid(blocks: Blocks, t: int, i: int) -> tuple[int, int]:
    return -(-t // blocks.texts), -(-i // blocks.images)


def _part(side: Side, width: int, items: slice) -> Fragments:
    """What the kernel is given of the items of one side."""
    mask = None if side.mask is None else side.mask[items]
    longest = None if side.longest is None else side.longest[items]
    return Fragments(side.rows[items.start * width : items.stop * width], mask, longest)


def _form(mode: str) -> Form:
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    eps = torch.finfo(torch.float32).eps
    return Form(mode == "scan", LEAKY_SLOPE, eps**2, tie_tolerance(torch.float32), precision)


def _spread_what_is_not_finite(out: PairScores, texts: Tensor, images: Tensor) -> None:
    """NaN to all scores of an item (row) that is not finite: maxima on the chip pass a NaN over."""
    text, image = (
        x.new_zeros(len(x)).masked_fill_(~x.isfinite().all(dim=1), torch.nan).float() for x in (texts, images)
    )
    pair = text.unsqueeze(1) + image
    out.mean_i2t.add_(pair)
    out.mean_t2i.add_(pair)
    out.top_i2t.add_(pair.unsqueeze(2))
    out.top_t2i.add_(pair.unsqueeze(2))


def _chunks(t: int, w: int, i: int, r: int) -> Iterator[tuple[int, int, int, int]]:
    """Texts and images of each piece of backward."""
    per_image = max(1, min(i, _GRAD_ELEMENTS // (w * r)))
    per_text = max(1, min(t, _GRAD_ELEMENTS // (w * r * per_image)))
    for t0 in range(0, t, per_text):
        for i0 in range(0, i, per_image):
            yield t0, min(t, t0 + per_text), i0, min(i, i0 + per_image)


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _floor_power_of_2(n: int) -> int:
    return 1 << int(math.log2(max(1, n)))


@functools.cache
def _has_triton() -> bool:
    """Triton 3.5 or newer: arguments in groups, and the oldest that the kernels have been tried with."""
    if importlib.util.find_spec("triton") is None:
        return False
    version: str = importlib.import_module("triton").__version__
    return tuple(int(x) for x in version.split(".")[:2]) >= (3, 5)
