"""A few hundred pairs in the precomputed form, learnable but not trivial, for the tests of the example script."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
from pair_data import Images
from torch.utils.data import Dataset

THINGS = [
    "dog",
    "cat",
    "horse",
    "bird",
    "car",
    "boat",
    "train",
    "bike",
    "child",
    "woman",
    "man",
    "girl",
    "tree",
    "house",
    "field",
    "river",
]
DOINGS = ["runs", "sits", "jumps", "sleeps", "eats", "plays", "waits", "stands"]
COLOURS = ["red", "blue", "green", "yellow", "white", "black", "brown", "grey"]
PLACES = ["park", "street", "beach", "kitchen", "garden", "forest", "station", "bridge"]


def write_folder(
    folder: Path, *, train: int = 96, dev: int = 24, test: int = 24, regions: int = 6, size: int = 24, seed: int = 0,
    repeat: tuple[str, ...] = ("dev",),
) -> Path:  # fmt: skip
    """Every image shows a thing, a doing, a colour and a place; regions are noisy sums of their directions."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    kinds = [THINGS, DOINGS, COLOURS, PLACES]
    directions = [random.normal(size=(len(kind), size)) for kind in kinds]
    for split, n in (("train", train), ("dev", dev), ("test", test)):
        choices = np.stack([random.integers(len(kind), size=n) for kind in kinds], axis=1)
        features = np.zeros((n, regions, size), dtype=np.float32)
        captions = []
        for i, choice in enumerate(choices):
            for r in range(regions):
                features[i, r] = directions[r % 4][choice[r % 4]] + 0.3 * random.normal(size=size)
            thing, doing, colour, place = (kind[c] for kind, c in zip(kinds, choice, strict=True))
            captions += [
                f"A {colour} {thing} {doing} in the {place}.",
                f"The {thing} is {colour} and {doing}",
                f"In a {place}, a {thing} {doing}.",
                f"a {colour} thing that {doing}: it's a {thing}",
                f"{place} with {colour} {thing}",
            ]
        np.save(folder / f"{split}_ims.npy", np.repeat(features, 5, axis=0) if split in repeat else features)
        (folder / f"{split}_caps.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    return folder


class OwnMemory(Dataset):
    """Item i is how many bytes of its own, on no disk, the process holds that reads image i."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> int:
        assert len(self.images[i])
        status = Path(f"/proc/{os.getpid()}/status").read_text()
        return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])  # type: ignore[index]
