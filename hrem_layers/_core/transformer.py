"""The transformer layer that every attention of the library runs on, and how a caller brings another."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hrem_layers._core.attention import attend
from hrem_layers._core.checks import (
    check_bool,
    check_choice,
    check_int,
    check_number,
    check_tensor,
    check_weights,
    describe,
    said,
)
from hrem_layers._core.neighbors import NeighborBias, attend_neighbors, drop_rows
from hrem_layers._core.numerics import autocast_dtype, compute_dtype


class BiasedAttention(nn.Module):
    r"""Multi-head attention with one additive bias for all heads:
    :math:`\mathrm{softmax}(Q K^\top / \sqrt{d_k} + B)\, V`, then an output projection.

    A bias of −inf removes a key. A query whose keys are all removed gets zeros, where
    :class:`torch.nn.MultiheadAttention` gives NaN. Parameters carry the names, shapes and
    initialisation of :class:`torch.nn.MultiheadAttention`, so that its weights load.

    Args:
        embed_dim: D, size of queries, keys, values and output; a multiple of ``num_heads``.
        num_heads: number of heads.
        dropout: dropout probability of the attention weights, in [0, 1).
    """

    def __init__(self, embed_dim: int, *, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed_dim = check_int("embed_dim", embed_dim, minimum=1)
        self.num_heads = check_int("num_heads", num_heads, minimum=1)
        self.dropout = check_number("dropout", dropout, minimum=0, below=1)
        if self.embed_dim % self.num_heads:
            fitting = max(h for h in range(1, self.num_heads) if self.embed_dim % h == 0)
            raise ValueError(
                f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}; "
                f"num_heads={fitting} would fit"
            )
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        self.out_proj.reset_parameters()
        nn.init.zeros_(self.out_proj.bias)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}"

    def forward(self, query: Tensor, context: Tensor, bias: Tensor | NeighborBias | None) -> Tensor:
        """``query`` (..., n, D) looks at ``context`` (..., m, D) under ``bias`` (..., n, m) -> (..., n, D).

        ``query is context`` is self-attention. ``bias`` broadcasts over leading dimensions. A bias on neighbour lists
        goes with a query (n, D) and a context (m, D): the same numbers as with the matrix that is −inf elsewhere.
        (Over several processes both are this one's own rows, and keys and values come from all.)
        """
        d = self.embed_dim
        if query is context:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            q = F.linear(query, self.in_proj_weight[:d], self.in_proj_bias[:d])
            k, v = F.linear(context, self.in_proj_weight[d:], self.in_proj_bias[d:]).chunk(2, dim=-1)
        dropout = self.dropout if self.training else 0.0
        if isinstance(bias, NeighborBias):
            q, k, v = (rearrange(x, "n (h d) -> n h d", h=self.num_heads) for x in (q, k, v))
            connected = _reachable(bias.bias)
            weighed = torch.where(connected, bias.bias, 0)
            out = attend_neighbors(q, k, v, bias.index, weighed, bias.rows, bias.nodes, dropout)
            return torch.where(connected, self.out_proj(rearrange(out, "n h d -> n (h d)")), 0)
        q, k, v = (rearrange(x, "... n (h d) -> ... h n d", h=self.num_heads) for x in (q, k, v))
        reachable = None
        if bias is not None:
            reachable = _reachable(bias)
            # a row of -inf alone has no softmax: let it look anywhere, its result is dropped below
            bias = torch.where(reachable, bias, 0).to(q.dtype).unsqueeze(-3)  # [..., 1, n, m]
        out = attend(q, k, v, bias, dropout)  # [..., h, n, d]
        out = self.out_proj(rearrange(out, "... h n d -> ... n (h d)"))
        return out if reachable is None else torch.where(reachable, out, 0)


def _reachable(bias: Tensor) -> Tensor:
    """(..., n, 1): rows that are not −inf throughout; NaN is not −inf, it goes on."""
    return ~(bias == -torch.inf).all(dim=-1, keepdim=True)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class TransformerLayer(nn.Module):
    """Attention and feed-forward, each with dropout, residual and LayerNorm (post-norm and ReLU, as in the release).

    With ``context=None`` this computes what :class:`torch.nn.TransformerEncoderLayer` computes, with
    the same parameter names; with a context it is the same layer as cross-attention.

    Args:
        embed_dim: D; a multiple of ``num_heads``.
        num_heads: heads of the attention.
        ffn_dim: width of the feed-forward layer; None = ``embed_dim``.
        dropout: dropout probability (attention weights, both residual branches, feed-forward), in [0, 1).
        norm_first: normalise what goes into attention and feed-forward (pre-norm) instead of the sums after them.
        activation: of the feed-forward, ``"relu"`` or ``"gelu"``.

    Example:
        >>> layer = TransformerLayer(32, num_heads=4, norm_first=True, activation="gelu")
        >>> layer(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        num_heads: int,
        ffn_dim: int | None = None,
        dropout: float = 0.0,
        norm_first: bool = False,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.self_attn = BiasedAttention(embed_dim, num_heads=num_heads, dropout=dropout)
        embed_dim = self.self_attn.embed_dim
        ffn_dim = embed_dim if ffn_dim is None else check_int("ffn_dim", ffn_dim, minimum=1)
        self.norm_first = check_bool("norm_first", norm_first)
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.linear1 = nn.Linear(embed_dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, embed_dim)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(self.self_attn.dropout)

    def forward(self, x: Tensor, bias: Tensor | NeighborBias | None = None, context: Tensor | None = None) -> Tensor:
        """
        Args:
            x: (..., n, D), what is changed.
            bias: (..., n, m), added to the attention's scores; −inf removes a key. None = none. Or what
                ``attention_bias`` of a :class:`hrem_layers.SparseRelationGraph` gives, with ``x`` (n, D).
            context: (..., m, D), what ``x`` looks at; None = ``x``. With ``norm_first`` it goes through ``norm1`` too.

        Returns:
            (..., n, D).
        """
        self._check(x, bias, context)
        drop = self._dropout(bias)
        if self.norm_first:
            inner = self.norm1(x)
            x = x + drop(self.self_attn(inner, inner if context is None else self.norm1(context), bias))
            out: Tensor = x + drop(self._feed(self.norm2(x), drop))
            return out
        attended = self.self_attn(x, x if context is None else context, bias)
        x = self.norm1(x + drop(attended))
        out = self.norm2(x + drop(self._feed(x, drop)))
        return out

    def _check(self, x: Tensor, bias: Tensor | NeighborBias | None, context: Tensor | None) -> None:
        d, weight = self.self_attn.embed_dim, self.linear1.weight
        given = [("x", x)] if context is None else [("x", x), ("context", context)]
        for name, rows in given:
            lead = ("...",) * (rows.dim() - 2) if isinstance(rows, Tensor) and not rows.is_nested else ("...",)
            check_tensor(name, rows, (*lead, "n", d), device=weight.device)
            # with weights of float32 autocast takes care of the half types
            cast = compute_dtype(rows.dtype) == weight.dtype and autocast_dtype(weight.device) is not None
            if rows.dtype != weight.dtype and not cast:
                raise TypeError(f"{name} must be {weight.dtype} like the weights, got {describe(rows)}")
        check_weights("x", x, self)
        if bias is None or isinstance(bias, NeighborBias):
            return
        n, m = x.shape[-2], (x if context is None else context).shape[-2]
        lead = ("...",) * (bias.dim() - 2) if isinstance(bias, Tensor) and not bias.is_nested else ("...",)
        check_tensor("bias", bias, (*lead, "n", "m"), device=weight.device)
        if not (bias.shape[-2] in (1, n) and bias.shape[-1] == m):
            raise ValueError(f"bias must have shape (..., {n}, {m}) or (..., 1, {m}), got {describe(bias)}")

    def _dropout(self, bias: Tensor | NeighborBias | None) -> Callable[[Tensor], Tensor]:
        if not isinstance(bias, NeighborBias):
            return self.dropout
        p = self.dropout.p if self.training else 0.0
        return lambda x: drop_rows(x, bias.rows, p) if p else x

    def _feed(self, x: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
        out: Tensor = self.linear2(drop(ACTIVATIONS[self.activation](self.linear1(x))))
        return out


LayerFactory = Callable[[], nn.Module]
"""Makes one layer: a module ``(x, bias, context) -> x`` with the shapes of :class:`TransformerLayer`."""


def make_layers(factory: LayerFactory | None, count: int, default: LayerFactory) -> list[nn.Module]:
    """``count`` new layers of the caller's kind, or of the default one."""
    if factory is None:
        return [default() for _ in range(count)]
    if not callable(factory) or isinstance(factory, nn.Module):
        raise TypeError(f"layer must be a function without arguments that makes a layer, or None, got {said(factory)}")
    made = [factory() for _ in range(count)]
    for layer in made:
        if not isinstance(layer, nn.Module):
            raise TypeError(f"layer must make a torch.nn.Module, but made {said(layer)}")
    if len({id(layer) for layer in made}) < count:
        raise ValueError("layer must make a new module at every call, but made the same one twice")
    return made


def run_layer(layer: nn.Module, x: Tensor, *rest: object) -> Tensor:
    """``layer(x, *rest)``; TypeError or ValueError unless it has the shape of ``x``, as a caller's own may not."""
    return check_tensor("what layer returns", layer(x, *rest), tuple(x.shape), device=x.device)
