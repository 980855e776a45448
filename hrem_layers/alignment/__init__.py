"""Fragment alignment: every image of the batch with every text (paper, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from hrem_layers._core.checks import check_bool_tensor, check_choice, check_int, check_tensor
from hrem_layers._core.numerics import product_dtype
from hrem_layers.alignment.op import align_op
from hrem_layers.alignment.scores import MODES, Scores

__all__ = ["MODES", "Scores", "align_fragments"]


def align_fragments(
    image_fragments: Tensor,
    text_fragments: Tensor,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    *,
    topk: int = 10,
    mode: str = "cosine",
    chunk_size: int | None = None,
) -> Scores:
    r"""Aligns the regions of every image with the words of every text.

    The similarities are :math:`s_{mn} = \cos(r_m, c_n)` in mode ``"cosine"`` and the products
    :math:`r_m \cdot c_n` in mode ``"dot"`` (the paper's formula). The maximum over the regions of an image is a
    value per word, the maximum over the words of a text a value per region. Of the values per word (region), over
    the real ones only: the mean is p, the ``topk`` largest in descending order are q, with 0 in the places for
    which there is no value. An image or text without any real fragment has p = 0 and q = 0.
    :mod:`hrem_layers.alignment.reference` has this as loops.

    Mode ``"scan"`` is the release's: with :math:`s \leftarrow \mathrm{LeakyReLU}_{0.1}(\cos(r_m, c_n))`,

    - text→image: :math:`\hat s_{mn} = s_{mn} / \lVert s_{m\cdot}\rVert`, the norm over the real words of
      that text, then the maximum over regions;
    - image→text: :math:`\tilde s_{mn} = s_{mn} / \lVert s_{\cdot n}\rVert`, the norm over the real regions
      of that image, then the maximum over words.

    .. warning:: In the SCAN form p follows the caption's length rather than the match: the norm divides by what
       grows with the number of words. See docs/method.md. Choose it to agree with the release.

    Regions (words) whose value is the maximum share its gradient evenly, and so do values that share a place of q.
    Equal is what differs by up to 8 units in the last place: of 1, in mode ``"dot"`` of the largest magnitude
    among those compared. A fragment's length may be anything above the smallest normal number of its dtype; what
    is shorter is a zero vector, with a zero gradient in the modes that normalise. NaN or infinity in a real
    fragment makes p and q of its pairs non-finite; padding may hold anything.

    One operator, never a loop over samples; forward and backward work through tiles of ``chunk_size``
    pairs and give the same numbers whatever its value. On a CPU up to 16.8 million similarities (64 MB in
    float32) are kept for the backward pass; those beyond, and all of them elsewhere, are computed again. With Numba
    (``pip install "hrem-layers[cpu]"``) compiled kernels do on a CPU what follows the products, and take less time
    (docs/performance.md); they are compiled in the first call, for ten to twenty seconds, and kept on disk. On
    CUDA a fused Triton kernel does the work if it can (Triton 3.5 or newer installed, compute capability 8.0 or
    more, R up to 256, W up to 128, not float64); the rest runs as batched PyTorch. Differentiable once (there is
    no double backward).

    Float16 and bfloat16 are multiplied as they are, after normalisation in float32, and give float32 similarities.
    Under autocast fragments are multiplied in its dtype, and, except by the kernel, the similarities are rounded to
    it: in bfloat16 neighbours 0.4% apart then tie (``benchmarks/dtype_error.py`` prints what this does).

    Args:
        image_fragments: (I, R, D) regions.
        text_fragments: (T, W, D) words, same device. Of two dtypes both become the wider; each gets its
            gradient in its own.
        image_mask: (I, R) bool, True = real; None = all real.
        text_mask: (T, W) likewise.
        topk: length of q, at least 1.
        mode: ``"cosine"``, ``"dot"`` or ``"scan"``.
        chunk_size: image-text pairs whose R·W similarities are worked on at one time, at least 1. None =
            about two million similarities on a CPU (8 MB, as the cache likes it), 16 million elsewhere. The fused
            kernel holds a tile on the chip and has no use for it.

    Returns:
        Scores: ``mean_i2t`` (I, T), ``mean_t2i`` (T, I), ``top_i2t`` (I, T, topk), ``top_t2i`` (T, I, topk);
        rows are the side that receives. In ``[-1, 1]`` except in mode ``"dot"``. float32 for float16 and bfloat16
        fragments, else their dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.

    Example:
        >>> image = torch.eye(4)[:3].unsqueeze(0)  # one image of three regions
        >>> text = torch.eye(4)[2:].unsqueeze(0)  # one text of two words, one of which is in the image
        >>> scores = align_fragments(image, text, topk=2)
        >>> scores.mean_t2i, scores.top_t2i
        (tensor([[0.5000]]), tensor([[[1., 0.]]]))
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
    if r < 1 or w < 1 or d < 1:
        raise ValueError(
            f"image_fragments and text_fragments must be at least 1 wide, got R = {r}, W = {w} and D = {d}"
        )
    dtype, rounded = product_dtype(image_fragments, text_fragments)
    with_grad = torch.is_grad_enabled() and (image_fragments.requires_grad or text_fragments.requires_grad)
    keep = with_grad and image_fragments.device.type == "cpu"
    *scores, _kept = align_op(
        image_fragments, text_fragments, image_mask, text_mask, mode, topk, chunk_size, dtype, rounded, keep
    )
    return Scores(*scores)
