"""Fragment-level relations: the fragments of one modality become one embedding (paper, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hrem_layers._core.checks import check_bool_tensor, check_int, check_number, check_tensor
from hrem_layers._core.masked import masked_max_k_mean, masked_mean, zero_padding
from hrem_layers._core.transformer import TransformerLayer


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
    ) -> None:
        super().__init__()
        self.embed_dim = check_int("embed_dim", embed_dim, minimum=1)
        self.num_heads, self.num_layers, self.dropout = num_heads, num_layers, dropout
        self.ffn_dim = embed_dim if ffn_dim is None else ffn_dim
        self.beta = check_number("beta", beta, minimum=0, maximum=1)
        self.max_pool_k = check_int("max_pool_k", max_pool_k, minimum=1)
        self.layers = nn.ModuleList(
            TransformerLayer(embed_dim, num_heads=num_heads, ffn_dim=ffn_dim, dropout=dropout)
            for _ in range(check_int("num_layers", num_layers, minimum=1))
        )

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, num_layers={self.num_layers}, ffn_dim={self.ffn_dim}, "
            f"dropout={self.dropout}, beta={self.beta}, max_pool_k={self.max_pool_k}"
        )

    def forward(self, fragments: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            fragments: (N, R, D), floating point; R at least 1.
            mask: (N, R) bool, True = real; None = all real.

        Returns:
            (N, D), in the dtype of ``fragments`` (under autocast: as autocast decides); not normalised.

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        """
        check_tensor("fragments", fragments, ("N", "R", self.embed_dim))
        n, r, _ = fragments.shape
        if r < 1:
            raise ValueError(f"fragments must hold at least 1 fragment an item, got shape {tuple(fragments.shape)}")
        bias = None
        if mask is not None:
            check_bool_tensor("mask", mask, (n, r), device=fragments.device)
            fragments = zero_padding(fragments, mask)
            bias = torch.zeros_like(mask, dtype=fragments.dtype).masked_fill(~mask, -torch.inf)
            bias = bias.unsqueeze(1).expand(n, r, r)  # [n, r, r]: every fragment sees the real ones
        related = fragments
        for layer in self.layers:
            related = layer(related, bias)  # [n, r, d]
        pooled = masked_max_k_mean(fragments, mask, self.max_pool_k)  # [n, d]
        return self.beta * pooled + (1 - self.beta) * masked_mean(related, mask)  # [n, d]
