"""What is searched: a folder of pictures, a folder of feature files, or one file of features; and its thumbnails."""

from __future__ import annotations

import beside  # isort: skip  # noqa: F401

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from data_files import Features, load_array
from pictures import SIZE, TILE, find_pictures, open_picture, picture_features
from PIL import Image


class Item(NamedTuple):
    """``file``: picture, or file of features (R, F); ``row``: of a file of features of many images, else -1."""

    file: str
    row: int = -1

    def __str__(self) -> str:
        return f"row {self.row}" if self.row >= 0 else Path(self.file).name


def read_collection(source: Path) -> tuple[list[Item], Iterator[np.ndarray], list[str]]:
    """The items, the features (R, F) of each in the same order, and what was left out, a line each.

    ``source`` is a folder of pictures, one of ``.npy`` files (R, F), one per image, or an ``.npy`` file (images, R, F).
    Of that file rows equal to the row before are left out: some distributions repeat each image once per caption.

    Raises:
        ValueError: there is nothing to encode.
    """
    if source.is_file() and source.suffix == ".npy":
        features = Features(source)
        rows = [
            i for i in range(len(features)) if not i or not np.array_equal(features.array[i], features.array[i - 1])
        ]
        skipped = len(features) - len(rows)
        left = [f"{skipped} rows that repeat the row before them"] if skipped else []
        return [Item(str(source), i) for i in rows], map(features.row, rows), left
    if not source.is_dir():
        raise ValueError(f"{source}: expected a folder of pictures or of .npy files, or an .npy file; found none")
    pictures, left = [], []
    for path in find_pictures(source):
        try:
            open_picture(path, SIZE)
            pictures.append(path)
        except ValueError as error:
            left.append(str(error))
    if pictures:
        return [Item(str(path)) for path in pictures], picture_features(pictures), left
    files = sorted(source.rglob("*.npy"))
    if not files:
        raise ValueError(f"{source}: expected pictures (.jpg, .png, ...) or .npy files of features, found none")
    return [Item(str(path)) for path in files], (load_array(path) for path in files), left


def thumbnail(item: Item) -> Image.Image | None:
    """From the picture; of features from the picture of the same name beside them, or ``*_pictures.npy``."""
    path = Path(item.file)
    if item.row >= 0:
        pictures = path.with_name(path.name.replace("_ims.npy", "_pictures.npy"))
        if pictures == path or not pictures.is_file():
            return None
        array = load_array(pictures, mmap_mode="r")
        return Image.fromarray(np.asarray(array[item.row])) if item.row < len(array) else None
    if path.suffix == ".npy":
        beside = [p for p in find_pictures(path.parent) if p.stem == path.stem]
        if not beside:
            return None
        path = beside[0]
    try:
        return open_picture(path, TILE)
    except ValueError:  # moved or deleted since
        return None
