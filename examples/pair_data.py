"""Images and captions in the field's precomputed form, read without loading the features.

A folder holds, for every split, ``{split}_ims.npy`` (n, R, F), the features of R regions per image,
and ``{split}_caps.txt``, a caption per line, the captions of one image together. In some distributions of the
data the rows of dev and test are repeated once per caption; then rows = captions, and every fifth is kept.
If there is a ``{split}_ids.npy`` (n,), images with equal ids show the same thing: positives of one another. If there
is a ``{split}_lengths.npy`` (rows,), only so many regions of a row are real, the first. Further lists of captions may
stand beside ``_caps.txt``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import processes
import torch
from data_files import DataError, Features, check_is_file, digest, is_there, misfit, read_captions, read_integers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

__all__ = ["Batch", "Captions", "DataError", "Images", "Pairs", "TrainingPairs", "collate", "load_pairs", "pad"]

HASHED_IN_FULL = 2**27  # features of a split
Encode = Callable[[str, "np.random.Generator | None"], list[int]]


class Pairs(NamedTuple):
    """One split, checked. ``row_of(i)`` is where image i stands in ``features``."""

    features: Features  # [rows, r, f], on disk
    captions: list[str]
    captions_per_image: int
    rows_per_image: int
    ids: np.ndarray  # [images] int64
    lengths: np.ndarray | None  # [rows] int64
    path: Path

    @property
    def num_images(self) -> int:
        return len(self.captions) // self.captions_per_image

    def row_of(self, i: int) -> int:
        return i * self.rows_per_image

    def image(self, i: int) -> np.ndarray:
        """The regions (R, F) float32 of image ``i``, read from disk."""
        row = self.row_of(i)
        regions = self.features.row(row)
        return regions if self.lengths is None else regions[: self.lengths[row]]

    def check_all(self) -> None:
        """Reads every image once; several processes share the work.

        Raises:
            DataError: NaN or inf in an image.
        """
        for i in processes.progress(processes.shard(self.num_images), f"reading {self.path.name}"):
            self.image(i)

    def fingerprint(self) -> dict[str, str]:
        """What makes these data these data, by the name of the file that it stands in.

        Of features above 512 MB the counts, the width, and a sample of the images: they may be 60 GB.
        """
        n, (_, regions, width) = self.num_images, self.features.shape
        sample = range(n) if n * regions * width <= HASHED_IN_FULL else _spread(n)
        split = self.path.name.removesuffix("_ims.npy")
        content = digest(self.image(i).tobytes() for i in sample)
        found = {
            self.path.name: f"{n} images of {regions} x {width} features, {content}",
            f"{split}_caps.txt": f"{len(self.captions)} captions, {digest(self.captions)}",
            f"{split}_ids.npy": f"{len(np.unique(self.ids))} distinct ids, {digest([self.ids.tobytes()])}",
        }
        if self.lengths is not None and self.lengths.min() < regions:
            lengths = self.lengths[:: self.rows_per_image]
            found[f"{split}_lengths.npy"] = f"{lengths.sum()} real regions, {digest([lengths.tobytes()])}"
        return found


def read_lengths(path: Path, features: Features) -> np.ndarray | None:
    """How many regions of each row are real, [rows] int64; None if there is no such file: all are.

    Raises:
        DataError: it is no such file, or does not fit the features.
    """
    if not is_there(path):
        return None
    lengths = read_integers(path, len(features), "the number of real regions per row")
    if lengths.min() < 1 or lengths.max() > features.shape[1]:
        raise misfit(path, f"numbers of regions from 1 to {features.shape[1]}", f"{lengths.min()} to {lengths.max()}")
    return lengths


def load_pairs(folder: Path, split: str, captions_per_image: int = 5, lists: Sequence[str] = ("caps",)) -> Pairs:
    """Opens one split of ``folder`` and checks that its files fit each other.

    Args:
        captions_per_image: in the first list. Each further list has the same number of captions for every image too,
            which its length tells.
        lists: the captions are those of ``{split}_{name}.txt``; the first must be there, of the others those count
            that are. ``captions`` of the result holds the captions of an image together, list by list.

    Raises:
        DataError: a file is missing, unreadable, or has the wrong shape or number of rows or an empty caption.
    """
    features_path, captions_path = folder / f"{split}_ims.npy", folder / f"{split}_{lists[0]}.txt"
    check_is_file(features_path)
    check_is_file(captions_path)
    captions = read_captions(captions_path)
    if not captions or len(captions) % captions_per_image:
        raise misfit(
            captions_path,
            f"{captions_per_image} captions per image, a caption per line",
            f"{len(captions)} lines, which is no multiple of {captions_per_image} above 0",
        )
    features = Features(features_path)
    images = len(captions) // captions_per_image
    if len(features) not in (images, len(captions)):
        raise misfit(
            features_path,
            f"{images} rows (one per image) or {len(captions)} (one per caption), as {captions_path.name} has "
            f"{len(captions)} lines",
            f"{len(features)} rows",
        )
    rows_per_image = len(features) // images
    more = [path for name in lists[1:] if is_there(path := folder / f"{split}_{name}.txt")]
    captions = _join(captions, [(path, read_captions(path)) for path in more], images)
    captions_per_image = len(captions) // images
    if rows_per_image > 1:
        _check_repeated(features, rows_per_image)
    ids_path, lengths_path = folder / f"{split}_ids.npy", folder / f"{split}_lengths.npy"
    ids = read_integers(ids_path, images, "an id per image") if is_there(ids_path) else np.arange(images)
    lengths = read_lengths(lengths_path, features)
    return Pairs(features, captions, captions_per_image, rows_per_image, ids, lengths, features_path)


def _join(captions: list[str], more: Sequence[tuple[Path, list[str]]], images: int) -> list[str]:
    """Image by image, what all lists say of it."""
    for path, lines in more:
        if not lines or len(lines) % images:
            raise misfit(path, f"as many captions for each of {images} images", f"{len(lines)} lines")
    every = [captions, *(lines for _, lines in more)]
    sizes = [len(lines) // images for lines in every]
    return [
        line
        for i in range(images)
        for lines, k in zip(every, sizes, strict=True)
        for line in lines[i * k : (i + 1) * k]
    ]


def _spread(images: int) -> list[int]:
    """Some 64 of them, the first and the last among them."""
    return sorted({*np.linspace(0, images - 1, min(images, 64)).astype(int).tolist()})


def _check_repeated(features: Features, times: int) -> None:
    images = len(features) // times
    for image in _spread(images):
        rows = features.array[image * times : (image + 1) * times]
        if not np.array_equal(rows, np.broadcast_to(rows[:1], rows.shape), equal_nan=True):
            raise misfit(
                features.path,
                f"every image {times} times in a row, as there are as many rows as captions",
                f"different rows {image * times} to {(image + 1) * times - 1}",
            )


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

    def __init__(self, pairs: Pairs, encode: Encode, *, region_drop: float, seed: int) -> None:
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

    def __init__(self, pairs: Pairs, encode: Encode) -> None:
        self.captions, self.encode = pairs.captions, encode

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, i: int) -> Tensor:
        return torch.tensor(self.encode(self.captions[i], None))


def start_worker(_: int) -> None:
    """For ``worker_init_fn``: Ctrl-C is for the main process, which ends its workers."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


def loader_options(arguments: Any, device: torch.device) -> dict[str, Any]:
    """What all loaders have in common. A generator of its own: they draw nothing from the model's."""
    return {
        "num_workers": arguments.num_workers,
        "pin_memory": device.type == "cuda",
        "generator": torch.Generator(),
        "worker_init_fn": start_worker,
    }
