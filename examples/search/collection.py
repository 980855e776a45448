"""What is searched: a folder of pictures, a folder of feature files, or one file of features; and its thumbnails."""

from __future__ import annotations

import beside  # isort: skip  # noqa: F401

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from data_files import Features, load_array
from pair_data import read_lengths
from pictures import SUFFIXES, TILE, feature_maps, find_pictures, open_picture
from PIL import Image


class Item(NamedTuple):
    """``file``: picture, or file of features (R, F); ``row``: of a file of features of many images, else -1."""

    file: str
    row: int = -1

    def __str__(self) -> str:
        return f"row {self.row}" if self.row >= 0 else Path(self.file).name


class Collection:
    """Iterated once, gives the features (R, F) of each image; then ``items`` are those, and ``left_out`` says of others
    why, a line each.

    ``source`` is a folder of pictures, one of ``.npy`` files (R, F), one per image, or an ``.npy`` file (images, R, F).
    Of that file rows equal to the row before are left out: some distributions repeat each image once per caption; and
    of a row only as many regions count as ``*_lengths.npy`` beside it says, if there is one.

    Raises:
        ValueError: there is nothing to encode.
    """

    def __init__(self, source: Path) -> None:
        self.items: list[Item] = []
        self.left_out: list[str] = []
        if source.is_file() and source.suffix == ".npy":
            self._features = self._of_rows(Features(source), source)
        elif not source.is_dir():
            raise ValueError(f"{source}: expected a folder of pictures or of .npy files, or an .npy file; found none")
        elif pictures := find_pictures(source):
            self._features = feature_maps(self._of_pictures(pictures))
        elif files := sorted(source.rglob("*.npy")):
            self._features = self._of_files(files)
        else:
            raise ValueError(f"{source}: expected pictures (.jpg, .png, ...) or .npy files of features, found none")

    def __iter__(self) -> Iterator[np.ndarray]:
        yield from self._features
        if not self.items:
            raise ValueError(f"nothing could be read: {'; '.join(self.left_out[:3])}")

    def _of_rows(self, features: Features, source: Path) -> Iterator[np.ndarray]:
        lengths = read_lengths(beside_it(source, "lengths"), features)
        for i in range(len(features)):
            if i and np.array_equal(features.array[i], features.array[i - 1]):
                self.left_out.append(f"row {i}, which repeats the row before it")
                continue
            self.items.append(Item(str(source), i))
            yield features.row(i) if lengths is None else features.row(i)[: lengths[i]]

    def _of_pictures(self, paths: list[Path]) -> Iterator[Image.Image]:
        for path in paths:
            try:
                square = open_picture(path)
            except ValueError as error:
                self.left_out.append(str(error))
                continue
            self.items.append(Item(str(path)))
            yield square

    def _of_files(self, paths: list[Path]) -> Iterator[np.ndarray]:
        for path in paths:
            self.items.append(Item(str(path)))
            yield load_array(path)


def beside_it(features: Path, what: str) -> Path:
    """Of ``test_ims.npy`` the file ``test_{what}.npy``, which need not exist."""
    return features.with_name(f"{features.stem.removesuffix('_ims')}_{what}.npy")


def thumbnail(item: Item) -> Image.Image | None:
    """From the picture; of features from the picture of the same name beside them, or ``*_pictures.npy``."""
    path = Path(item.file)
    if item.row >= 0:
        pictures = beside_it(path, "pictures")
        if not pictures.is_file():
            return None
        array = load_array(pictures, mmap_mode="r")
        return Image.fromarray(np.asarray(array[item.row])) if item.row < len(array) else None
    if path.suffix == ".npy":
        same_name = (path.with_suffix(suffix) for suffix in sorted(SUFFIXES))
        path = next((other for other in same_name if other.is_file()), path)
    try:
        return open_picture(path, TILE)
    except ValueError:  # moved or deleted since
        return None
