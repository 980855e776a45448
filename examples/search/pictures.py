"""Picture files: to the feature maps that the encoders take, and to a sheet of thumbnails."""

from __future__ import annotations

import beside  # isort: skip  # noqa: F401

import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from emoji_features import BATCH, load_network
from PIL import Image, ImageDraw, ImageFont, ImageOps

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
SIZE = 128  # pixels, as the default data of the script: 4 x 4 grid cells
TILE, LINE = 160, 18
MEAN, STD = (torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


def find_pictures(folder: Path) -> list[Path]:
    """All picture files in ``folder`` and below, sorted; hidden ones left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )


def open_picture(picture: Path | bytes, size: int = SIZE) -> Image.Image:
    """The whole picture, upright, on a white square of ``size`` pixels.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        opened = Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)
        opened.draft("RGB", (2 * size, 2 * size))  # JPEGs are read small: many times faster
        upright = ImageOps.exif_transpose(opened).convert("RGBA")
    except Exception as error:  # of any kind, by what is wrong with it; DecompressionBombError too
        name = "the picture" if isinstance(picture, bytes) else str(picture)
        raise ValueError(f"{name}: expected a picture, got a file that does not open ({error})") from error
    square = Image.new("RGBA", (size, size), "white")
    small = ImageOps.contain(upright, (size, size))
    square.alpha_composite(small, ((size - small.width) // 2, (size - small.height) // 2))
    return square.convert("RGB")


def feature_maps(squares: Iterable[Image.Image]) -> Iterator[np.ndarray]:
    """Yields (R, F) float32 per picture: the cells of the last feature map of an ImageNet network, R = (size / 32)²."""
    network, rest = load_network(), iter(squares)
    while batch := [np.asarray(square) for square in islice(rest, BATCH)]:
        x = (torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2) / 255 - MEAN) / STD
        with torch.inference_mode():
            maps = network.extract_features(x.contiguous(memory_format=torch.channels_last))
        yield from maps.flatten(2).transpose(1, 2).contiguous().numpy()


def sheet(title: str, tiles: Sequence[tuple[Image.Image | None, str]], columns: int = 4) -> Image.Image:
    """A contact sheet: thumbnails (None: a grey tile) with a line of text below each, and a title."""
    rows = -(-len(tiles) // columns)
    page = Image.new("RGB", (columns * (TILE + 8) + 8, 2 * LINE + rows * (TILE + 2 * LINE)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    draw.text((8, 8), _shorten(title, page.width - 16, font), fill="black", font=font)
    for place, (picture, text) in enumerate(tiles):
        x, y = 8 + place % columns * (TILE + 8), 2 * LINE + place // columns * (TILE + 2 * LINE)
        page.paste(picture.resize((TILE, TILE)) if picture else "#dddddd", (x, y, x + TILE, y + TILE))
        draw.text((x, y + TILE + 2), _shorten(text, TILE, font), fill="black", font=font)
    return page


def _shorten(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cut in the middle, as ends of file names tell more than their middles."""
    if font.getlength(text) <= width:
        return text
    keep = len(text) - 1
    while keep > 2 and font.getlength(f"{text[: keep // 2]}…{text[-(keep - keep // 2) :]}") > width:
        keep -= 1
    return f"{text[: keep // 2]}…{text[-(keep - keep // 2) :]}"
