"""The field's precomputed form, ``{train,test}_ims.npy`` and ``_caps.txt``, in the fewest lines that train from it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class Words:
    """Lower-case words of the training captions; 0 = padding, 1 = unknown."""

    def __init__(self, captions: list[str]) -> None:
        found = sorted({word for caption in captions for word in self.split(caption)})
        self.index = {word: i + 2 for i, word in enumerate(found)}

    @staticmethod
    def split(caption: str) -> list[str]:
        return re.findall(r"[\w']+", caption.lower())

    def __len__(self) -> int:
        return len(self.index) + 2

    def __call__(self, caption: str) -> Tensor:
        return torch.tensor([self.index.get(word, 1) for word in self.split(caption)] or [1])


class Pairs(Dataset[tuple[int, np.ndarray, Tensor]]):
    """One item per caption: the image's number, its features (R, F) or (F,), the caption's word ids."""

    def __init__(self, folder: Path, split: str, words: Words | None = None) -> None:
        for name in (f"{split}_caps.txt", f"{split}_ims.npy"):
            if not (folder / name).is_file():
                raise SystemExit(f"error: {folder} has no file {name}")
        self.captions = (folder / f"{split}_caps.txt").read_text(encoding="utf-8").strip("\n").split("\n")
        self.images = np.load(folder / f"{split}_ims.npy", mmap_mode="r")
        self.per_image, rest = divmod(len(self.captions), len(self.images))
        if rest or not self.per_image:
            raise ValueError(f"{folder}: {split}_caps.txt has {len(self.captions)} lines for {len(self.images)} images")
        self.words = words or Words(self.captions)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, i: int) -> tuple[int, np.ndarray, Tensor]:
        image = i // self.per_image
        return image, self.images[image].astype(np.float32), self.words(self.captions[i])


def collate(items: list[tuple[int, np.ndarray, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image numbers (N,), features (N, R, F), word ids (N, W) and caption lengths (N,)."""
    numbers, features, captions = zip(*items, strict=True)
    regions = torch.from_numpy(np.stack(features))
    if regions.dim() == 2:  # one vector per image: R = 1
        regions = regions.unsqueeze(1)
    lengths = torch.tensor([len(caption) for caption in captions])
    return torch.tensor(numbers), regions, torch.nn.utils.rnn.pad_sequence(list(captions), batch_first=True), lengths
