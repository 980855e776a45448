"""Two small encoders per kind: heads on frozen features, or a CNN on pixels and a GRU on words that train from scratch.

Both give fragments and embeddings through :class:`~hrem_layers.FragmentRelation`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks.evidence.loaded import Loaded, Split
from hrem_layers import FragmentRelation

DIM, HEADS = 128, 8
KINDS = ("heads", "trainable")
SHIFT = 3  # pixels, at most, by which a picture moves in training


class Encoder(nn.Module):
    """Fragments -> linear -> FragmentRelation."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, DIM)
        self.relation = FragmentRelation(DIM, num_heads=HEADS, dropout=dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        fragments = self.linear(x)
        return self.relation(fragments, mask), fragments


class Pair(nn.Module):
    """Heads on frozen features; the word vectors stay as they are and are no part of the state."""

    def __init__(self, data: Loaded, dropout: float) -> None:
        super().__init__()
        self.image = Encoder(data.train.images.shape[2], dropout)
        self.text = Encoder(data.vectors.shape[1], dropout)
        self.register_buffer("vectors", data.vectors, persistent=False)

    def pictures(self, split: Split) -> Tensor:
        """What :meth:`forward` takes rows of."""
        return split.images

    def real(self, split: Split, images: Tensor) -> Tensor | None:
        """Which regions of these images (indices) are real."""
        return split.masked(images)

    def encode_images(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.image(images, mask)

    def encode_texts(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.text(self.vectors[tokens], tokens > 0)

    def forward(
        self, images: Tensor, tokens: Tensor, region_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        v, regions = self.encode_images(images, region_mask)
        u, words = self.encode_texts(tokens)
        return v, u, regions, words

    @torch.no_grad()
    def embed(self, split: Split) -> tuple[Tensor, Tensor]:
        self.eval()
        pictures = self.pictures(split)
        parts = torch.arange(len(pictures)).split(500)
        v = torch.cat([self.encode_images(pictures[i], self.real(split, i))[0] for i in parts])
        u = torch.cat([self.encode_texts(t)[0] for t in split.tokens.split(500)])
        return v, u


class TrainablePair(Pair):
    """A CNN of five convolutions on pixels; word vectors that train, and a bidirectional GRU."""

    def __init__(self, data: Loaded, dropout: float) -> None:
        if data.train.pixels is None:
            raise ValueError("data: expected pixels, got none")
        nn.Module.__init__(self)
        self.cnn = nn.Sequential(
            _block(data.train.pixels.shape[1], 32, stride=2), _block(32, 64, stride=2), _block(64, 128, stride=2),
            _block(128, 128), _block(128, 128),
        )  # fmt: skip
        self.image = Encoder(128, dropout)
        self.words = nn.Embedding.from_pretrained(data.vectors.clone(), freeze=False, padding_idx=0)
        self.gru = nn.GRU(data.vectors.shape[1], DIM, batch_first=True, bidirectional=True)
        self.text = Encoder(DIM, dropout)

    def pictures(self, split: Split) -> Tensor:
        if split.pixels is None:
            raise ValueError("split: expected pixels, got none")
        return split.pixels

    def real(self, split: Split, images: Tensor) -> Tensor | None:
        """All: the CNN's regions are not those of the features."""
        return None

    def encode_images(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = images.float() / 127.5 - 1
        if self.training:
            x = _moved(x)
        regions = self.cnn(x).flatten(2).transpose(1, 2)  # [n, r, 128]
        return self.image(regions, mask)

    def encode_texts(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        lengths = (tokens > 0).sum(dim=1)
        packed = pack_padded_sequence(self.words(tokens), lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=tokens.shape[1])
        both = states.unflatten(2, (2, DIM)).mean(dim=2)  # the field's average of both directions
        return self.text(both, tokens > 0)


def make_pair(kind: str, data: Loaded, dropout: float) -> Pair:
    """The encoders of a kind.

    Raises:
        ValueError: an unknown kind, or no pixels for a CNN.
    """
    if kind not in KINDS:
        raise ValueError(f"encoders: expected one of {', '.join(KINDS)}, got {kind!r}")
    return Pair(data, dropout) if kind == "heads" else TrainablePair(data, dropout)


def _block(inside: int, outside: int, stride: int = 1) -> nn.Module:
    convolution = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.ReLU())


def _moved(x: Tensor) -> Tensor:
    """Each picture mirrored or not, and all of the batch shifted by the same few pixels; white comes in."""
    flip = torch.rand(len(x)) < 0.5
    x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
    side = x.shape[2]
    top, left = torch.randint(2 * SHIFT + 1, (2,))
    return nn.functional.pad(x, (SHIFT,) * 4, value=1.0)[:, :, top : top + side, left : left + side]
