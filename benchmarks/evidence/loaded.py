"""A folder in memory, small enough to train on in seconds: principal components of the features, word vectors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.evidence import sources  # noqa: F401  puts examples/ on the path
from hrem_layers._core.masked import masked_mean, zero_padding

if TYPE_CHECKING:
    from pair_data import Pairs

COMPONENTS = 256
SAMPLE = 2000  # training images that the components are computed from, or a little more


class Split(NamedTuple):
    """Caption j tells of image ``owner[j]``."""

    images: Tensor  # [n, r, f]
    tokens: Tensor  # [m, w] rows of the vectors, 0 = padding
    owner: Tensor  # [m]
    pixels: Tensor | None = None  # [n, 3, s, s] uint8
    region_mask: Tensor | None = None  # [n, r] bool; None = all real

    @property
    def mask(self) -> Tensor:
        return self.tokens > 0

    def masked(self, images: Tensor) -> Tensor | None:
        """Which regions of these images (indices) are real."""
        return None if self.region_mask is None else self.region_mask[images]

    def means(self) -> Tensor:
        """(n, f): of each image its mean region."""
        return masked_mean(self.images, self.region_mask)


class Loaded(NamedTuple):
    train: Split
    dev: Split
    test: Split
    vectors: Tensor  # [words + 1, d]; row 0 is padding


def load(
    folder: Path, captions_per_image: int, *, noise: float = 0.0, share: float = 1.0, pixels: bool = False
) -> Loaded:
    """
    Args:
        folder: in the field's precomputed form; ``word_vectors.npz`` is used if it is there, else WordLlama's.
        captions_per_image: of every split.
        noise: share of the training captions that are shuffled among the images, in [0, 1].
        share: share of the training images that are kept, in (0, 1].
        pixels: read ``{split}_pixels.npy`` as well, (n, s, s, 3) uint8.

    Raises:
        ValueError: the pixels are not there, or others than that.
    """
    from pair_data import load_pairs
    from text_tokens import words

    pairs = {name: load_pairs(folder, name, captions_per_image) for name in ("train", "dev", "test")}
    said = {name: [words(c) or ["unknown"] for c in p.captions] for name, p in pairs.items()}
    listed = sorted({w for captions in said.values() for c in captions for w in c})
    row = {w: i for i, w in enumerate(listed, start=1)}
    vectors = torch.from_numpy(_vectors(folder, listed))
    project = None
    out = {}
    for name, p in pairs.items():
        chosen = np.arange(p.num_images)
        if name == "train" and share < 1:
            chosen = np.sort(np.random.default_rng(0).permutation(chosen)[: max(1, round(share * len(chosen)))])

        def features(which: np.ndarray, p: Pairs = p) -> np.ndarray:
            return np.stack([p.features.row(int(i) * p.rows_per_image) for i in which])

        mask = None
        if p.lengths is not None:
            lengths = p.lengths[chosen * p.rows_per_image]
            mask = torch.from_numpy(np.arange(p.features.shape[1]) < lengths[:, None])
        if project is None:
            some = slice(None, None, max(1, len(chosen) // SAMPLE))
            real = slice(None) if mask is None else mask[some].numpy()
            project = _principal_components(features(chosen[some])[real])
        # a few at a time: the features of a large data set as they are may not fit into memory
        images = torch.cat([project(features(part)) for part in np.split(chosen, range(500, len(chosen), 500))])
        captions = [c for i in chosen for c in said[name][i * captions_per_image : (i + 1) * captions_per_image]]
        tokens = torch.zeros(len(captions), min(32, max(map(len, captions))), dtype=torch.long)
        for i, caption in enumerate(captions):
            ids = [row[w] for w in caption[: tokens.shape[1]]]
            tokens[i, : len(ids)] = torch.tensor(ids)
        if name == "train" and noise:
            tokens = _shuffled(tokens, noise)
        owner = torch.arange(len(captions)) // captions_per_image
        drawn = _pixels(folder / f"{name}_pixels.npy", p.num_images)[torch.from_numpy(chosen)] if pixels else None
        out[name] = Split(zero_padding(images, mask), tokens, owner, drawn, mask)
    return Loaded(out["train"], out["dev"], out["test"], vectors)


def _pixels(path: Path, n: int) -> Tensor:
    """(n, 3, s, s) uint8."""
    if not path.is_file():
        raise ValueError(f"pixels: expected a file {path} of shape ({n}, s, s, 3) and type uint8, found none")
    x = np.load(path, allow_pickle=False)
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[0] != n or x.shape[1] != x.shape[2] or x.shape[3] != 3:
        raise ValueError(f"{path}: expected shape ({n}, s, s, 3) and type uint8, got {x.shape} and {x.dtype}")
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


def _shuffled(tokens: Tensor, noise: float) -> Tensor:
    """Each of the chosen captions moves to the place of another chosen one; the same for every seed and row."""
    random = np.random.default_rng(0)
    chosen = random.permutation(len(tokens))[: round(noise * len(tokens))]
    out = tokens.clone()
    out[torch.from_numpy(np.roll(chosen, 1))] = tokens[torch.from_numpy(chosen)]
    return out


def _vectors(folder: Path, listed: list[str]) -> np.ndarray:
    """(len(listed) + 1, d) float32 of mean square 1; words without a vector get zeros."""
    from emoji_features import word_vectors

    path = folder / "word_vectors.npz"
    if not path.is_file():
        known, values = word_vectors(listed)
        np.savez(path, words=known, vectors=values)
    with np.load(path, allow_pickle=False) as archive:
        table = dict(zip(archive["words"].tolist(), archive["vectors"].astype(np.float32), strict=True))
    width = len(next(iter(table.values())))
    out = np.stack([np.zeros(width, np.float32), *(table.get(w, np.zeros(width, np.float32)) for w in listed)])
    return out / np.sqrt((out**2).mean())


def _principal_components(sample: np.ndarray) -> Callable[[np.ndarray], Tensor]:
    """The map (n, R, F) -> (n, R, min(F, 256)) float32 that makes these features' mean square 1."""
    flat = np.asarray(sample, dtype=np.float64).reshape(-1, sample.shape[-1])
    mean = flat.mean(axis=0)
    values, axes = np.linalg.eigh(np.cov((flat - mean).T))
    axes = axes[:, -COMPONENTS:] / np.sqrt(values[-COMPONENTS:].clip(min=0).mean())
    return lambda x: torch.from_numpy(((x - mean) @ axes).astype(np.float32))
