"""Fragment-level relations: the fragments of one modality become one embedding (paper, section 3.2)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from hrem_layers._core.checks import (
    check_bool_tensor,
    check_int,
    check_number,
    check_same_device,
    check_tensor,
    describe,
)
from hrem_layers._core.masked import masked_max_k_mean, masked_mean, zero_padding
from hrem_layers._core.numerics import module_dtype
from hrem_layers._core.transformer import LayerFactory, TransformerLayer, make_layers, run_layer


class FragmentRelation(nn.Module):
    r"""Self-attention over the fragments of each item, then two poolings.

    .. math:: v = \beta\, \mathrm{maxpool}_k(r) + (1 - \beta)\, \mathrm{mean}(\mathrm{transformer}(r))

    where maxpool_k is, per dimension, the mean of the k largest real values. Padding takes no part in
    the attention, the maximum or the mean; it may hold anything, NaN and inf included.

    How this differs from the paper and the release: the paper pools with the plain maximum
    (``max_pool_k=1``). The release takes the mean of the top 2, but one item with a single fragment
    makes it use k = 1 for the rest of the batch; here an item with fewer than k real fragments
    averages those that it has, and no other item notices. An item without any real fragment gives
    zeros, not NaN.

    Args:
        embed_dim: D, size of a fragment; a multiple of ``num_heads``.
        num_heads: heads of the self-attention.
        num_layers: transformer layers (post-norm, ReLU).
        ffn_dim: width of their feed-forward layer; None = ``embed_dim``.
        dropout: their dropout probability, in [0, 1).
        beta: β, the share of the max pooling, in [0, 1].
        max_pool_k: k of maxpool_k, at least 1.
        layer: a function without arguments that makes another layer, called once per layer: a module
            ``(x (N, R, D), bias (N, 1, R)) -> (N, R, D)``, bias 0 at real fragments and −inf at padding, or None.
            ``num_heads``, ``ffn_dim`` and ``dropout`` are then not used.

    Example:
        >>> pool = FragmentRelation(64, num_heads=4)
        >>> regions, mask = torch.randn(2, 36, 64), torch.arange(36) < torch.tensor([[36], [10]])
        >>> pool(regions, mask).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        num_heads: int = 16,
        num_layers: int = 1,
        ffn_dim: int | None = None,
        dropout: float = 0.1,
        beta: float = 0.8,
        max_pool_k: int = 2,
        layer: LayerFactory | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = check_int("embed_dim", embed_dim, minimum=1)
        self.num_heads = check_int("num_heads", num_heads, minimum=1)
        self.num_layers = check_int("num_layers", num_layers, minimum=1)
        self.ffn_dim = self.embed_dim if ffn_dim is None else check_int("ffn_dim", ffn_dim, minimum=1)
        self.dropout = check_number("dropout", dropout, minimum=0, below=1)
        self.beta = check_number("beta", beta, minimum=0, maximum=1)
        self.max_pool_k = check_int("max_pool_k", max_pool_k, minimum=1)
        default = partial(
            TransformerLayer, self.embed_dim, num_heads=self.num_heads, ffn_dim=self.ffn_dim, dropout=self.dropout
        )
        self.layers = nn.ModuleList(make_layers(layer, self.num_layers, default))

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, num_layers={self.num_layers}, ffn_dim={self.ffn_dim}, "
            f"dropout={self.dropout}, beta={self.beta}, max_pool_k={self.max_pool_k}"
        )

    def forward(self, fragments: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            fragments: (N, R, D), R at least 1; float16, bfloat16, float32 or float64, whatever the dtype of the
                weights, which is what the layers compute in.
            mask: (N, R) bool, True = real; None = all real.

        Returns:
            (N, D), not normalised, in the dtype of ``fragments``.

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        """
        check_tensor("fragments", fragments, ("N", "R", self.embed_dim))
        n, r, _ = fragments.shape
        if r < 1:
            raise ValueError(f"fragments must hold at least 1 fragment per item, got {describe(fragments)}")
        check_same_device("fragments", fragments, self)
        related, bias = fragments.to(module_dtype(self)), None
        if mask is not None:
            check_bool_tensor("mask", mask, (n, r), device=fragments.device)
            fragments, related = zero_padding(fragments, mask), zero_padding(related, mask)
            # [n, 1, r]: every fragment sees the real ones
            bias = torch.zeros_like(mask, dtype=related.dtype).masked_fill(~mask, -torch.inf).unsqueeze(1)
        for layer in self.layers:
            related = run_layer(layer, related, bias)  # [n, r, d]
        pooled = masked_max_k_mean(fragments, mask, self.max_pool_k)  # [n, d]
        mean = masked_mean(related, mask)  # [n, d]
        return (self.beta * pooled + (1 - self.beta) * mean).to(fragments.dtype)
