"""The two encoders: fragments first, then FragmentRelation pools them into one embedding."""

from __future__ import annotations

from pathlib import Path
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
    """Tokenizer and model from a local folder or the hub.

    Raises:
        ImportError: transformers is missing.
        ValueError: there is no such model, or what is there does not load.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ImportError('--text-encoder bert needs transformers: pip install "hrem-layers[bert]"') from error
    check_bert_folder(name_or_path)
    try:
        tokenizer, bert = AutoTokenizer.from_pretrained(name_or_path), AutoModel.from_pretrained(name_or_path)
    except Exception as error:  # OSError, ValueError, KeyError and others, by what is missing or damaged
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"--bert {name_or_path}: expected a BERT of transformers, found none that loads ({reason})"
        ) from error
    if not hasattr(bert.config, "hidden_size") or tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise ValueError(
            f"--bert {name_or_path}: expected a model like BERT with [CLS] and [SEP], found {type(bert).__name__}"
        )
    return tokenizer, bert


def check_bert_folder(name_or_path: str) -> None:
    """Raises ValueError if this must be a folder and is none. A name such as ``bert-base-uncased`` is the hub's."""
    path = Path(name_or_path).expanduser()
    looks_like_path = path.is_absolute() or name_or_path.startswith((".", "~")) or len(path.parts) > 2
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"--bert {name_or_path}: expected a folder with config.json, found none in it")
    if not name_or_path or (looks_like_path and not path.is_dir()):
        raise ValueError(
            f"--bert {name_or_path}: expected a folder of transformers or a name on the hub, found no folder"
        )


def longest_caption(tokenizer: Any, bert: Any) -> int | None:
    """How many ids, [CLS] and [SEP] among them, the model has positions for; None = any number."""
    limits = [tokenizer.model_max_length]
    positions = getattr(bert.config, "max_position_embeddings", None)
    if positions:
        # RoBERTa and its kin count positions from the padding id + 1 on
        table = getattr(getattr(bert, "embeddings", None), "position_embeddings", None)
        first = table.padding_idx + 1 if getattr(table, "padding_idx", None) is not None else 0
        limits.append(positions - first)
    limit = min(limits)
    return int(limit) if limit < 10**6 else None
