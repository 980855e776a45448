"""Which regions of an image the words of a text fall on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from hrem_layers._core.checks import check_bool_tensor, check_int, check_tensor
from hrem_layers._core.numerics import l2_normalize
from hrem_layers.tools.plot.style import SEQUENTIAL, check_picture, new_figure, text_style, to_array, wrapped

OVERLAY = 0.72
"""How much of the picture the colour covers."""


def plot_alignment(
    image_fragments: Tensor,
    text_fragments: Tensor,
    *,
    picture: object,
    words: Sequence[str] | None = None,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    boxes: Tensor | npt.NDArray[Any] | None = None,
    columns: int = 4,
) -> Figure:
    """One image's regions and one text's words: per word the cosine with each region, as colours over the picture.

    The region with the largest cosine, which is what the alignment keeps of a word, has a frame. All pictures share one
    scale, so that a word that fits nowhere looks pale.

    Args:
        image_fragments: (R, F), the regions of one image.
        text_fragments: (W, F), the words of one text.
        picture: the image, (H, W, 3) uint8 or floats in [0, 1], or a PIL image.
        words: W strings, or as many as are real; None = numbers.
        image_mask: (R,) bool, True = real.
        text_mask: (W,) bool, True = real.
        grid: (rows, columns) of regions that tile the picture in reading order, R = rows · columns; None = square,
            unless there are ``boxes``.
        boxes: (R, 4) of (left, top, right, bottom) in pixels of the picture, in place of a grid.
        columns: pictures side by side, at least 1.

    Returns:
        A figure: the picture, then one copy per real word.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or number.
    """
    check_tensor("image_fragments", image_fragments, ("R", "F"))
    r, f = image_fragments.shape
    check_tensor("text_fragments", text_fragments, ("W", f), device=image_fragments.device)
    w = text_fragments.shape[0]
    check_int("columns", columns, minimum=1)
    real_regions, real_words = _real("image_mask", image_mask, r), _real("text_mask", text_mask, w)
    labels = _labels(words, real_words)
    shown = check_picture("picture", picture)
    areas = _boxes(boxes, r) if boxes is not None else _cells(grid, r, *shown.shape[:2])
    regions, texts = (l2_normalize(x.detach().float()) for x in (image_fragments, text_fragments))
    cosines = to_array(texts @ regions.t())

    chosen = np.flatnonzero(real_words)
    values = cosines[np.ix_(chosen, np.flatnonzero(real_regions))]
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    scale = Normalize(low, max(high, low + 1e-6))
    panels = len(chosen) + 1
    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    height = min(max(shown.shape[0] / max(shown.shape[1], 1), 0.4), 2.0)
    with text_style():
        figure = new_figure(1.9 * columns + 0.8, (1.9 * height + 0.45) * rows + 0.1)
        axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False).ravel())
        for ax in axes:
            ax.axis("off")
        axes[0].imshow(shown, cmap="gray")
        axes[0].set_title("image")
        colours = ScalarMappable(scale, SEQUENTIAL)
        for ax, word, label in zip(axes[1:], chosen, labels, strict=False):
            _panel(ax, shown, areas, cosines[word], real_regions, colours)
            ax.set_title(wrapped(label, 22), fontweight="bold")
        figure.colorbar(colours, ax=list(axes), shrink=0.8, aspect=30, label="cosine of word and region")
    return figure


def _panel(
    ax: Axes,
    picture: npt.NDArray[Any],
    areas: npt.NDArray[Any],
    values: npt.NDArray[Any],
    real: npt.NDArray[Any],
    colours: ScalarMappable,
) -> None:
    """The picture in grey, each region in its colour; small boxes above large ones."""
    grey = picture if picture.ndim == 2 else picture[..., :3].mean(axis=2)
    ax.imshow(grey, cmap="gray", vmin=0, vmax=255 if picture.dtype == np.uint8 else 1)
    size = (areas[:, 2] - areas[:, 0]) * (areas[:, 3] - areas[:, 1])
    for region in np.argsort(-size, kind="stable"):
        if real[region] and np.isfinite(values[region]):
            left, top, right, bottom = areas[region]
            colour = colours.to_rgba(values[region])
            ax.add_patch(
                Rectangle((left, top), right - left, bottom - top, facecolor=colour, alpha=OVERLAY, linewidth=0)
            )
    known = np.where(real & np.isfinite(values), values, -np.inf)
    if np.isfinite(known).any():
        left, top, right, bottom = areas[int(known.argmax())]
        for edge, width in (("white", 3.6), ("#d55e00", 1.8)):  # seen on light and on dark
            ax.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=edge, lw=width))
    ax.set_xlim(-0.5, picture.shape[1] - 0.5)
    ax.set_ylim(picture.shape[0] - 0.5, -0.5)


def _real(name: str, mask: Tensor | None, count: int) -> npt.NDArray[Any]:
    if mask is None:
        return np.ones(count, dtype=bool)
    check_bool_tensor(name, mask, (count,))
    return to_array(mask)


def _labels(words: Sequence[str] | None, real: npt.NDArray[Any]) -> list[str]:
    chosen = np.flatnonzero(real)
    if words is None:
        return [f"word {index}" for index in chosen]
    if isinstance(words, str):
        raise TypeError(f"words must be a list of strings, one per word, got the string {words!r}")
    if len(words) == len(real):
        return [str(words[int(index)]) for index in chosen]
    if len(words) == len(chosen):
        return list(map(str, words))
    raise ValueError(f"words must hold {len(real)}, one per fragment, or {len(chosen)} real ones, got {len(words)}")


def _cells(grid: tuple[int, int] | None, r: int, height: int, width: int) -> npt.NDArray[Any]:
    if grid is None:
        side = math.isqrt(r)
        if side * side != r:
            raise ValueError(f"grid must be (rows, columns), or boxes be given: {r} regions are no square, got None")
        grid = (side, side)
    rows, columns = (check_int("grid", x, minimum=1) for x in grid)
    if rows * columns != r:
        raise ValueError(f"grid must have {r} cells, one per region, got {rows} by {columns}")
    y, x = np.divmod(np.arange(r), columns)
    left, top = x * width / columns - 0.5, y * height / rows - 0.5
    return np.stack([left, top, left + width / columns, top + height / rows], axis=1)


def _boxes(boxes: Tensor | npt.NDArray[Any], r: int) -> npt.NDArray[Any]:
    array = to_array(boxes) if isinstance(boxes, Tensor) else np.asarray(boxes, dtype=np.float32)
    if array.shape != (r, 4):
        raise ValueError(f"boxes must have shape ({r}, 4), one per region, got {array.shape}")
    return array
