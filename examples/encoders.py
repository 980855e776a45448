"""The two encoders: fragments first, then FragmentRelation pools them into one embedding."""

from __future__ import annotations

from typing import Any

import numpy as np
import processes
import torch
import torch.nn.functional as F
from text_tokens import PAD, Vocabulary
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from hrem_layers import FragmentRelation


class MaskedBatchNorm(nn.Module):
    """Batch norm over the real rows of all processes, so that neither padding nor sharding changes it."""

    def __init__(self, features: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``x`` (N, R, F), ``mask`` (N, R) -> (N, R, F)."""
        if self.training:
            real = mask.unsqueeze(-1).to(torch.float32)
            count, total = real.sum(), (x.float() * real).sum((0, 1))
            count, total = processes.add_up(count), processes.add_up(total)
            mean = total / count
            var = processes.add_up(((x.float() - mean).square() * real).sum((0, 1))) / count
            with torch.no_grad():
                unbiased = var * count / (count - 1).clamp(min=1)
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(unbiased, self.momentum)
        else:
            mean, var = self.running_mean, self.running_var
        scale = self.weight * torch.rsqrt(var + self.eps)
        return x * scale.to(x.dtype) + (self.bias - mean * scale).to(x.dtype)


class ImageEncoder(nn.Module):
    """Region features -> regions in the joint space (linear + two-layer MLP, as in the release) -> embedding."""

    def __init__(self, feature_dim: int, embed_dim: int, relation: FragmentRelation) -> None:
        super().__init__()
        self.linear = nn.Linear(feature_dim, embed_dim)
        self.mlp_in, self.mlp_out = (
            nn.Linear(feature_dim, embed_dim // 2),
            nn.Linear(embed_dim // 2, embed_dim),
        )
        self.norm = MaskedBatchNorm(embed_dim // 2)
        self.relation = relation
        for layer in (self.linear, self.mlp_in, self.mlp_out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """``images`` (N, R, F), ``mask`` (N, R) -> embedding (N, D), regions (N, R, D)."""
        regions = self.linear(images) + self.mlp_out(F.relu(self.norm(self.mlp_in(images), mask)))
        return self.relation(regions, mask), regions


class BiGRUEncoder(nn.Module):
    """Word vectors -> bidirectional GRU, the mean of both directions -> embedding."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        embed_dim: int,
        relation: FragmentRelation,
        *,
        word_dim: int = 300,
        vectors: dict[str, np.ndarray] | None = None,
    ) -> None:
        super().__init__()
        if vectors:
            word_dim = len(next(iter(vectors.values())))
        self.words = nn.Embedding(len(vocabulary), word_dim, padding_idx=PAD)
        nn.init.uniform_(self.words.weight, -0.1, 0.1)
        with torch.no_grad():
            self.words.weight[PAD] = 0
            for place, word in enumerate(vocabulary.known, start=2):
                if vectors and word in vectors:
                    self.words.weight[place] = torch.from_numpy(vectors[word])
        self.gru = nn.GRU(word_dim, embed_dim, batch_first=True, bidirectional=True)
        self.relation = relation

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """``tokens`` (N, W), ``mask`` (N, W) -> embedding (N, D), words (N, W, D)."""
        lengths = mask.sum(dim=1).cpu()
        packed = pack_padded_sequence(self.words(tokens), lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=tokens.shape[1])
        words = sum(states.chunk(2, dim=-1)) / 2  # [n, w, d]
        return self.relation(words, mask), words


class BertEncoder(nn.Module):
    """A BERT of the transformers library -> linear -> embedding."""

    def __init__(self, bert: Any, embed_dim: int, relation: FragmentRelation) -> None:
        super().__init__()
        self.bert = bert
        self.linear = nn.Linear(bert.config.hidden_size, embed_dim)
        self.relation = relation

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """``tokens`` (N, W), ``mask`` (N, W) -> embedding (N, D), words (N, W, D)."""
        states = self.bert(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        words = self.linear(states)
        return self.relation(words, mask), words


def load_bert(name_or_path: str) -> tuple[Any, Any]:
    """Tokenizer and model from a local folder or the hub."""
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ImportError('--text-encoder bert needs transformers: pip install "hrem-layers[bert]"') from error
    return AutoTokenizer.from_pretrained(name_or_path), AutoModel.from_pretrained(name_or_path)
