"""Fragment alignment: every image of the batch with every text (paper, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from hrem_layers._checks import check_bool_tensor, check_choice, check_int, check_tensor
from hrem_layers.alignment.formula import MODES, Scores
from hrem_layers.alignment.op import align_op
from hrem_layers.masked import l2_normalize, zero_padding

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
    pairs and give the same numbers whatever its value. The backward pass computes the similarities
    again instead of keeping them. Differentiable once (there is no double backward).

    Args:
        image_fragments: (I, R, D) regions.
        text_fragments: (T, W, D) words, same dtype and device.
        image_mask: (I, R) bool, True = real; None = all real.
        text_mask: (T, W) likewise.
        topk: length of q, at least 1.
        mode: ``"scan"``, ``"cosine"`` or ``"dot"``.
        chunk_size: image-text pairs whose R·W similarities exist at one time, at least 1. None = about a
            million similarities on a CPU (4 MB, as the cache likes it), 16 million elsewhere.

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
    if text_fragments.dtype != image_fragments.dtype:
        raise TypeError(
            f"text_fragments must have the dtype of image_fragments, {image_fragments.dtype}, "
            f"got {text_fragments.dtype}"
        )
    if min(r, w) < 1:
        raise ValueError(f"image_fragments and text_fragments must be at least 1 wide, got R = {r} and W = {w}")
    images, texts = zero_padding(image_fragments, image_mask), zero_padding(text_fragments, text_mask)
    if mode != "dot":
        images, texts = l2_normalize(images), l2_normalize(texts)
    if torch.is_autocast_enabled(images.device.type):
        dtype = torch.get_autocast_dtype(images.device.type)
        if images.dtype == torch.float32:
            images, texts = images.to(dtype), texts.to(dtype)
    return Scores(*align_op(images, texts, image_mask, text_mask, mode, topk, chunk_size))
