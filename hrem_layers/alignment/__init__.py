"""Fragment alignment: every image of the batch with every text (paper, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from hrem_layers._core.checks import check_bool_tensor, check_choice, check_int, check_tensor
from hrem_layers._core.numerics import autocast_dtype
from hrem_layers.alignment.block import MODES, Scores
from hrem_layers.alignment.op import align_op

__all__ = ["MODES", "Scores", "align_fragments"]


def align_fragments(
    image_fragments: Tensor,
    text_fragments: Tensor,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    *,
    topk: int = 10,
    mode: str = "scan",
    chunk_size: int | None = None,
) -> Scores:
    r"""Aligns the regions of every image with the words of every text.

    With :math:`s_{mn} = \cos(r_m, c_n)` and mode ``"scan"`` (the release):
    :math:`s \leftarrow \mathrm{LeakyReLU}_{0.1}(s)`;

    - text→image: :math:`\hat s_{mn} = s_{mn} / \lVert s_{m\cdot}\rVert`, the norm over the real words of
      that text, then the maximum over its regions: a value per word;
    - image→text: :math:`\tilde s_{mn} = s_{mn} / \lVert s_{\cdot n}\rVert`, the norm over the real regions
      of that image, then the maximum over words: a value per region.

    ``"cosine"`` leaves out LeakyReLU and norms, ``"dot"`` the cosine as well (the paper's formula).
    Of the values per word (region), over the real ones only: the mean is p, the ``topk`` largest in
    descending order are q, with 0 in the places for which there is no value. An image or text without
    any real fragment has p = 0 and q = 0.

    One operator, never a loop over samples; forward and backward work through tiles of ``chunk_size``
    pairs and give the same numbers whatever its value. On a CPU up to 16.8 million similarities (64 MB in
    float32) are kept for the backward pass; those beyond, and all of them elsewhere, are computed again. On
    CUDA a fused Triton kernel does the work if it can (Triton installed, compute capability 8.0 or more, R up
    to 256, W up to 128, not float64); the rest runs as batched PyTorch. Where several regions (words) share a
    maximum, they share its gradient. Differentiable once (there is no double backward).

    Args:
        image_fragments: (I, R, D) regions.
        text_fragments: (T, W, D) words, same dtype (under autocast: any) and device.
        image_mask: (I, R) bool, True = real; None = all real.
        text_mask: (T, W) likewise.
        topk: length of q, at least 1.
        mode: ``"scan"``, ``"cosine"`` or ``"dot"``.
        chunk_size: image-text pairs whose R·W similarities are worked on at one time, at least 1. None =
            two million similarities on a CPU (8 MB, as the cache likes it), 16 million elsewhere. The fused
            kernel holds a tile on the chip and has no use for it.

    Returns:
        Scores: ``mean_i2t`` (I, T), ``mean_t2i`` (T, I), ``top_i2t`` (I, T, topk), ``top_t2i`` (T, I, topk);
        rows are the side that receives. float32 for float16 and bfloat16 fragments, else their dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
    """
    check_choice("mode", mode, MODES)
    check_int("topk", topk, minimum=1)
    if chunk_size is not None:
        check_int("chunk_size", chunk_size, minimum=1)
    check_tensor("image_fragments", image_fragments, ("I", "R", "D"))
    i, r, d = image_fragments.shape
    check_tensor("text_fragments", text_fragments, ("T", "W", d), device=image_fragments.device)
    t, w, _ = text_fragments.shape
    if image_mask is not None:
        check_bool_tensor("image_mask", image_mask, (i, r), device=image_fragments.device)
    if text_mask is not None:
        check_bool_tensor("text_mask", text_mask, (t, w), device=image_fragments.device)
    image_dtype, text_dtype = _product_dtype(image_fragments), _product_dtype(text_fragments)
    if text_dtype != image_dtype:
        raise TypeError(
            f"text_fragments must have the dtype of image_fragments, {image_fragments.dtype}, "
            f"got {text_fragments.dtype}"
        )
    if min(r, w) < 1:
        raise ValueError(f"image_fragments and text_fragments must be at least 1 wide, got R = {r} and W = {w}")
    with_grad = torch.is_grad_enabled() and (image_fragments.requires_grad or text_fragments.requires_grad)
    keep = with_grad and image_fragments.device.type == "cpu"
    *scores, _kept = align_op(
        image_fragments, text_fragments, image_mask, text_mask, mode, topk, chunk_size, image_dtype, keep
    )
    return Scores(*scores)


def _product_dtype(fragments: Tensor) -> torch.dtype:
    """The dtype in which fragments are multiplied: autocast's, if it is on and concerns them, else their own."""
    dtype = autocast_dtype(fragments.device)
    return fragments.dtype if dtype is None or fragments.dtype == torch.float64 else dtype
